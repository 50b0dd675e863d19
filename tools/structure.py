"""The ladder of paths and the rooms of the package as pictures, out of the code and of docs/architecture.md."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable

from canvas import Canvas, wrapped

from allreduce_jit.policy import backends, checks
from allreduce_jit.policy.backends import Backend
from allreduce_jit.policy.verdict import CODES
from allreduce_jit.setup import stages

WORDS = {
    "v2": "V2: NVRTC kernels over NVLink",
    "legacy": "legacy: Triton kernels over peer access",
    "host": "host: NVRTC kernels through pinned host memory",
    "torch": "torch.distributed: NCCL, or gloo on the CPU",
}


def codes_in(functions: Iterable[Callable[..., object]]) -> list[str]:
    """The reason codes that functions can give, as their source names them, in the order of ``CODES``."""
    named = {code for function in functions for code in re.findall(r'"([a-z0-9-]+)"', inspect.getsource(function))}
    return [code for code in CODES if code in named]


def for_all() -> list[str]:
    """Codes that leave a group with torch.distributed at once."""
    return codes_in(checks.COMMON)


def from_rung(row: Backend) -> list[str]:
    """Codes for which all ranks leave a path with kernels: what it requires, what its users may want, how it is built."""
    below = backends.BACKENDS.index(row) < len(backends.BACKENDS) - 1
    wishes = [f"{row.path}-switched-off"] if row.switch else []
    built = [code for code in codes_in([stages.Stages]) if code.endswith("-failed")]
    found = {*codes_in(row.requires), *wishes, *(["path-forced"] if below else []), f"no-{row.toolchain.fact}", *built}
    return [code for code in CODES if code in found]


def ladder() -> str:
    """The paths from the highest down, and the codes of each step."""
    width, box, left, line = 920, 58, 24, 17
    rows = backends.BACKENDS
    columns = [wrapped(" · ".join(from_rung(row)).replace(" ·", "\N{NO-BREAK SPACE}·"), 66) for row in rows]
    gap = max(map(len, columns)) * line + 34
    aside = [(code, 0) for code in for_all()]
    height = 74 + len(rows) * (box + gap) + box + 40
    picture = Canvas(width, height, "The ladder of paths: which reason leads from which to which")
    picture.write(16, 26, "The ladder of paths: all ranks go down together, each step with the code of its reason", "title")
    paths = [*(row.path for row in rows), backends.Path.TORCH]
    tops = [52 + i * (box + gap) for i in range(len(paths))]
    for i, (path, top) in enumerate(zip(paths, tops)):
        picture.box(left, top, 520, box, (1, 3, 0)[min(i, 2)])
        picture.write(left + 16, top + 24, WORDS[path.short], "name")
        row = backends.of(path)
        what = "whatever is left; no kernel of ours" if row is None else f"kernels compiled by {row.toolchain.name}"
        why = [f"; taken: {row.why[0]}"] if row is not None and row.why else []
        picture.write(left + 16, top + 43, what + "".join(why), "soft")
    for i, lines in enumerate(columns):
        picture.arrow(left + 24, tops[i] + box, left + 24, tops[i + 1])
        for j, text in enumerate(lines):
            picture.write(left + 42, tops[i] + box + 24 + j * line, text, "code")
    x = 610
    picture.write(x, tops[0] + 16, "Leaves no path with kernels:", "name")
    for j, (code, _) in enumerate(aside):
        picture.write(x + 16, tops[0] + 40 + j * line, code, "code")
    end = tops[0] + 40 + len(aside) * line
    picture.arrow(x + 4, tops[0] + 26, x + 4, max(end, tops[-1] + box / 2) - 0.1, "arrow dash")
    picture.arrow(x + 4, tops[-1] + box / 2, left + 520, tops[-1] + box / 2, "arrow dash")
    note = "no-nccl: where NCCL cannot be set up below, gloo all-reduces through the host."
    picture.write(16, height - 16, note, "soft")
    return picture.text()


def rooms(architecture: str) -> list[tuple[list[str], str]]:
    """The rows of the first drawing in docs/architecture.md: rooms, and what they are."""
    block = re.search(r"```\n(cli .*?)```", architecture, re.S)
    if block is None:
        raise ValueError("docs/architecture.md has no drawing of the rooms")
    found = []
    for line in map(str.strip, block[1].splitlines()):
        told = re.fullmatch(r"(\S+(?: {1,3}\S+)*?) {4,}(\S.*)", line)
        if told is None:
            raise ValueError(f"docs/architecture.md: {line!r}: expected rooms, four spaces or more, and what they are")
        names, what = told.groups()
        found.append((names.split(), what))
    return found


def house(architecture: str) -> str:
    """The rooms, the highest at the top."""
    rows, width, height, left = rooms(architecture), 920, 40, 24
    roof, top = 44, 44
    picture = Canvas(width, top + roof + height * (len(rows) + 1) + 54, "The rooms of the package, along the data flow")
    picture.write(16, 26, "The rooms of the package: each imports those below it, and nothing above", "title")
    span = 440
    picture.line([(left - 8, top + roof), (left + span / 2, top + 6), (left + span + 8, top + roof)], "arrow")
    for i, (names, what) in enumerate(rows):
        y = top + roof + i * height
        shares = [max(6, len(name)) for name in names]
        x = float(left)
        for name, share in zip(names, shares):
            wide = span * share / sum(shares)
            picture.box(x, y + 3, wide - 3, height - 6, (1, 1, 5, 1, 1, 4, 3, 3, 3, 3, 3, 0)[i % 12])
            picture.write(x + wide / 2 - 1.5, y + height / 2 + 4, name, "middle" if len(names) < 6 else "middle soft")
            x += wide
        lines = wrapped(what, 66)
        for j, line in enumerate(lines):
            picture.write(left + span + 18, y + height / 2 + 4 + (j - (len(lines) - 1) / 2) * 15, line, "soft")
    y = top + roof + len(rows) * height
    picture.box(left, y + 9, span - 3, height - 6, 2)
    picture.write(left + span / 2, y + height / 2 + 10, "kernels/cuda · kernels/triton", "middle")
    picture.write(left + span + 18, y + height / 2 + 10, "what runs on the GPU, compiled by jit", "soft")
    picture.write(16, y + height + 36, "What a lower room needs from above is passed in as an argument.", "soft")
    return picture.text()
