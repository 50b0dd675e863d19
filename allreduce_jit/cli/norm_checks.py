"""What ``selftest`` checks of calls with a norm: every bit, over dtypes, sizes of rows, roundings, quantizations and ways of calling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from ..bench import timing
from ..bench.norm_calls import Given, NormKind, Results, has_e4m3, poison
from ..engine import reference
from ..harness import report
from ..harness.place import Place

ROWS = (0, 1, 3, 33, 300)
KINDS = (
    NormKind("bfloat16", 64),
    NormKind("bfloat16", 2880),
    NormKind("bfloat16", 4096),
    NormKind("bfloat16", 16384),
    NormKind("float16", 5120),
    NormKind("float32", 1024),
    NormKind("float32", 7168, residual=False),
    NormKind("float16", 2880, "U", weight="float32"),
    NormKind("bfloat16", 4096, "H", weight="float32", weight_bias=1),
    NormKind("bfloat16", 4096, quant="static"),
    NormKind("float16", 1000, quant="token", with_norm=True),
    NormKind("bfloat16", 7168, quant="group", column_major=True),
)
_HEADERS = ("norm", "rows", "path", "kernel", "checked", "#wrong")  # 80 columns with the longest
_Check = tuple[str, Results, Results]  # way of calling, what came out, what should have


class NormChecker:
    """This rank's checks; all ranks walk through the same calls in the same order.

    Args:
        largest: bytes of a tensor; single rows are checked in any case.
        graphs: whether calls can be captured.
        note: takes what was wrong.
    """

    def __init__(
        self,
        place: Place,
        communicator: Any,
        seed: int,
        largest: int,
        graphs: bool,
        note: Callable[[str, reference.Difference], None],
    ):
        self.place, self.communicator, self.seed, self.largest = place, communicator, seed, largest
        self.graphs, self.note = graphs, note

    def steps(self) -> list[tuple[NormKind, int]]:
        """What there is to check, the same on all ranks: the kind, and how many rows."""
        e4m3 = all(self.place.gather(has_e4m3(self.place.device)))
        kinds = [kind for kind in KINDS if e4m3 or kind.quant == "none"]
        return [(kind, rows) for kind in kinds for rows in ROWS if rows < 2 or nbytes(kind, rows) <= self.largest]

    def row(self, kind: NormKind, rows: int) -> dict[str, Any]:
        plan = self.communicator.plan_norm(rows, kind.family)
        # As of all-reduces: the bits of the ordered sum are promised by our kernels alone.
        exact = report.word(plan.path) != "torch.distributed"
        checked = wrong = 0
        for data in (reference.RANDOM, reference.SPECIALS) if exact else (reference.INTEGERS,):
            for way, found, want in self._ways(kind, rows, data):
                for name, right in want.items():
                    difference = reference.compare(found[name], right)
                    checked, wrong = checked + right.numel(), wrong + difference.wrong
                    if difference.wrong:
                        self.note(f"{rows} x {kind} {data} {way}: {name}", difference)
        plans = {"path": report.word(plan.path), "algorithm": plan.algorithm}
        counts = {"checked": checked, "wrong": wrong, "eager_us": None, "graph_us": None}
        return {"size": f"{rows} rows", "dtype": str(kind), "rows": rows, **plans, **counts}

    def _ways(self, kind: NormKind, rows: int, data: str) -> Iterator[_Check]:
        given, want = self._given(kind, rows), self._want(kind, rows, data)
        x, outs = self._mine(kind, rows, data), kind.outs(rows, self.place.device)
        yield "new tensors", kind.named(kind.fused(self.communicator, x, given, {})()), want
        kind.fused(self.communicator, x, given, outs)()
        yield "out=", outs, want
        yield "inputs kept", _inputs(x, given), _inputs(self._mine(kind, rows, data), self._given(kind, rows))
        yield "in place", self._in_place(kind, x, given, outs), want
        yield from self._misaligned(kind, rows, data, want)
        if self.graphs and rows:
            yield from self._captured(kind, rows, data)

    def _in_place(self, kind: NormKind, x: torch.Tensor, given: Given, outs: Results) -> Results:
        poison(outs)
        over_x = "out" if kind.quant == "none" else "norm_out"
        if over_x in outs:
            outs[over_x] = x
        if given.residual is not None:
            outs["residual_out"] = given.residual
        kind.fused(self.communicator, x, given, outs)()
        return outs

    def _misaligned(self, kind: NormKind, rows: int, data: str, want: Results) -> Iterator[_Check]:
        """Views that begin one element into their storage; the elements around them must survive."""
        given, plain = self._given(kind, rows), kind.outs(rows, self.place.device)
        x = _within(self._mine(kind, rows, data))[1]
        if given.residual is not None:
            given = replace(given, residual=_within(given.residual)[1])
        storages = {name: _within(out) for name, out in plain.items() if out.is_contiguous()}
        kind.fused(self.communicator, x, given, {name: view for name, (_, view) in storages.items()})()
        right = {name: _within(want[name])[0] for name in storages}
        yield "misaligned", {name: storage for name, (storage, _) in storages.items()}, right

    def _captured(self, kind: NormKind, rows: int, data: str) -> Iterator[_Check]:
        x, given = self._mine(kind, rows, data), self._given(kind, rows)
        with timing.captured(self.communicator.capture) as graph:
            found = kind.named(kind.fused(self.communicator, x, given, {})())
        for replay in (1, 2):
            x.copy_(self._mine(kind, rows, data, replay))
            poison(found)
            graph.replay()
            yield f"graph replay {replay}", found, self._want(kind, rows, data, replay)

    def _mine(self, kind: NormKind, rows: int, data: str, variation: int = 0) -> torch.Tensor:
        place = self.place
        return kind.x(self.seed + 1000 * variation, place.rank, rows, place.device, data, place.world_size)

    def _given(self, kind: NormKind, rows: int) -> Given:
        return kind.given(self.seed, rows, self.place.device)

    def _want(self, kind: NormKind, rows: int, data: str, variation: int = 0) -> Results:
        total = kind.total(self.seed + 1000 * variation, rows, self.place.device, self.place.world_size, data)
        return kind.expected(total, self._given(kind, rows))


def nbytes(kind: NormKind, rows: int) -> int:
    return rows * kind.hidden * kind.torch_dtype.itemsize


def _inputs(x: torch.Tensor, given: Given) -> Results:
    named = {"x": x, "residual": given.residual, "weight": given.weight, "scale": given.scale}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def _within(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A copy of ``tensor`` as a view that begins one element into its storage, and all of that."""
    storage = torch.empty(tensor.numel() + 2, dtype=tensor.dtype, device=tensor.device)
    poison({"": storage})
    view = storage[1:-1].view(tensor.shape)
    view.copy_(tensor)
    return storage, view


def table(rows: list[dict[str, Any]]) -> str:
    """Merged rows as text, a line a kind."""
    lines = []
    for kind in dict.fromkeys(row["dtype"] for row in rows):
        mine = [row for row in rows if row["dtype"] == kind]
        words = [" / ".join(dict.fromkeys(row[key] for row in mine if row["rows"])) for key in ("path", "algorithm")]
        counts = " ".join(str(row["rows"]) for row in mine)
        lines.append((kind, counts, *words, *(sum(row[key] for row in mine) for key in ("checked", "wrong"))))
    return report.table(_HEADERS, lines)
