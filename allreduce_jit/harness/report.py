"""What the command line prints: sizes, tables, the machine it ran on; the standard streams that it goes to."""

from __future__ import annotations

import codecs
import os
import platform
import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from fractions import Fraction
from importlib import metadata
from pathlib import Path
from typing import Any

from . import terminal

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_LARGEST = 1 << 50  # bytes; what no machine holds is a slip
_ASCII = {"µ": "u", "×": "x", "·": "*", "…": "...", "–": "-", "−": "-"}
_DRIVER_FILE = Path("/proc/driver/nvidia/version")


def parse_size(text: str) -> int:
    """Bytes in ``8``, ``1K``, ``128M``, ``1.5G`` (any case, ``B`` and ``iB`` allowed; K is 1024).

    Raises:
        ValueError: the text is no size, or no whole number of bytes.
    """
    match = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?)\s*([KMG]?)(?:I?B)?", text.strip().upper())
    size = Fraction(match[1]) * _UNITS[match[2]] if match else Fraction(-1)
    if not 0 <= size <= _LARGEST or size.denominator != 1:
        raise ValueError(f"{text!r} is no size: expected whole bytes such as 8, 1K, 128M or 1G")
    return int(size)


def format_size(size: int) -> str:
    """``1024`` → ``1K``: the largest unit that divides the size, so that ``parse_size`` gives it back."""
    for unit in ("G", "M", "K"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)


def prepare_streams() -> None:
    """Let the standard streams take whatever is printed: in ASCII what their encoding lacks, nowhere if they are closed."""
    # Descriptors 0 to 2 are never free for sockets and pipes: children inherit them, and libraries write to them.
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(fd, True)
    os.close(fd)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))
        with suppress(AttributeError):  # a stand-in for a stream need not have an encoding
            getattr(sys, name).reconfigure(errors="allreduce-jit")


def _in_ascii(error: UnicodeError) -> tuple[str | bytes, int]:
    """What to write instead of a character that an encoding lacks; bytes of file names stay what they are."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    char = error.object[error.start]
    if "\udc80" <= char <= "\udcff":
        return bytes([ord(char) - 0xDC00]), error.start + 1
    return _ASCII.get(char, char.encode("ascii", "backslashreplace").decode()), error.start + 1


codecs.register_error("allreduce-jit", _in_ascii)


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]], keys: int = 1) -> str:
    """A text table, columns as wide as their widest cell; numbers to the right, words to the left.

    On a terminal that is too narrow for it, several below each other, each with the first ``keys`` columns.
    """
    cells = [list(headers), *([_cell(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells)]
    left = [len(cells) > 1 and any(re.match(r"[A-Za-z]", row[i]) for row in cells[1:]) for i in range(len(headers))]
    cells.insert(1, ["-" * width for width in widths])

    def block(columns: Sequence[int]) -> str:
        lines = ("  ".join(row[i].ljust(widths[i]) if left[i] else row[i].rjust(widths[i]) for i in columns) for row in cells)
        return "\n".join(line.rstrip() for line in lines)

    return "\n\n".join(block(columns) for columns in _blocks(widths, keys, terminal.columns(sys.stdout)))


def _blocks(widths: Sequence[int], keys: int, room: int | None) -> list[list[int]]:
    """Which columns to show beside each other: those that fit into ``room`` (None = all), at least one beside the keys."""
    blocks = [list(range(min(keys, len(widths))))]
    for i in range(keys, len(widths)):
        together = [*blocks[-1], i]
        if room is not None and len(blocks[-1]) > keys and sum(widths[j] + 2 for j in together) - 2 > room:
            together = [*range(keys), i]
            blocks.append(together)
        blocks[-1] = together
    return blocks


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


def word(value: Any) -> str:
    """The text of an enum member, or of anything else."""
    return str(getattr(value, "value", value))


def versions() -> dict[str, str | None]:
    """Versions of this package and of what it stands on; None = not installed. Nothing is imported."""

    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    names = ("allreduce-jit", "torch", "triton", "cuda-bindings", "cuda-core")
    found = {"python": platform.python_version(), **{name: version(name) for name in names}}
    return found | {"triton": found["triton"] or version("pytorch-triton")}  # as PyTorch's own builds call it


def machine() -> dict[str, Any]:
    """A fingerprint that tells results of two machines apart."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": os.cpu_count(),
        "gpus": sorted(set(names)),
        "gpu_count": len(names),
        "driver": driver_version(),
        "cuda": torch.version.cuda,
        "versions": versions(),
    }


def driver_version(path: Path = _DRIVER_FILE) -> str | None:
    """The NVIDIA kernel driver's version, or None without a driver."""
    try:
        match = re.search(r"\s(\d{3,}\.\d+(?:\.\d+)?)\s", path.read_text())
    except OSError:
        return None
    return match[1] if match else None


def headline(facts: dict[str, Any]) -> str:
    """``machine()`` on one line."""
    gpus = f"{facts['gpu_count']} x {', '.join(facts['gpus'])}" if facts["gpu_count"] else "no CUDA GPU"
    parts = [gpus, f"driver {facts['driver']}"] if facts["driver"] else [gpus]
    parts += [f"{name} {version}" for name, version in facts["versions"].items() if version]
    return ", ".join(parts)


def counted(number: int, what: str) -> str:
    """``1 kernel``, ``2,000 kernels``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def reasons(entries: Iterable[dict[str, Any]]) -> list[str]:
    """One line per reason in its JSON form: code, text, and the rank unless the text names it."""
    return [_reason(word(entry["code"]), entry["text"], entry.get("rank")) for entry in entries]


def _reason(code: str, text: str, rank: int | None) -> str:
    named = rank is None or f"rank {rank}" in text
    return f"{code}: {text}" + ("" if named else f" (rank {rank})")
