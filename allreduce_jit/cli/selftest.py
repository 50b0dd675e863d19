"""``allreduce-jit selftest``: every bit of every size, dtype and way of calling against the exact sum, or its exact norm."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from ..bench import timing
from ..describe import Band
from ..engine import reference
from ..harness import ranks, report, terminal
from ..harness.place import Place
from . import norm_checks
from .norm_checks import NormChecker

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_COUNTS = (0, 1, 2, 3, 7, 17, 1021, 65537, 1_000_003)
_HEADERS = ("size", "dtypes", "path", "algorithm", "checked", "#wrong", "eager µs", "graph µs")
_SHOWN = 20
# For the estimate of what is left: a check costs as much as so many bytes beside its own; one of a norm takes a fifth as long.
_CALL, _NORM = 256 << 10, 0.2
_Check = tuple[str, torch.Tensor, torch.Tensor]  # way of calling, what came out, what should have


@dataclass(frozen=True)
class Options:
    """``max_bytes`` None: 64 MB on GPUs, 1 MB on the CPU."""

    max_bytes: int | None
    seed: int


@dataclass(frozen=True)
class Size:
    """A row: ``amount`` elements, or ``amount`` bytes of whichever dtype."""

    amount: int
    in_bytes: bool

    def numel(self, dtype: torch.dtype) -> int:
        return self.amount // dtype.itemsize if self.in_bytes else self.amount

    def __str__(self) -> str:
        return f"{report.format_size(self.amount)}B" if self.in_bytes else f"{self.amount} el"


def run(args: argparse.Namespace, init: Callable[..., Any] | None = None) -> int:
    """Check, print, and return the exit code: 1 if any rank had a wrong element or planned differently."""
    options = Options(args.max_bytes, args.seed)
    outcome = ranks.run(work, options, init, gpus=args.gpus, cpu=args.cpu, deadline=args.deadline)
    return outcome.conclude(args.json, render)


def work(place: Place, options: Options, init: Callable[..., Any] | None) -> dict[str, Any]:
    """One rank's part; every rank returns the same verdict."""
    if init is None:
        from .. import init
    start = time.perf_counter()
    with init(device=place.device) as communicator:
        communicator.warmup()
        checker = _Checker(place, communicator, options)
        rows, norms = checker.all_rows()
        communicator.check()
        everyone = place.gather((rows, norms, checker.failures))
        failures = [failure for *_, found in everyone for failure in found]
        merged, merged_norms = ([_merge(column, failures) for column in zip(*(one[i] for one in everyone))] for i in range(2))
        counted = {key: sum(row[key] for row in (*merged, *merged_norms)) for key in ("checked", "wrong")}
        return {
            "ok": not failures and not counted["wrong"],
            "machine": report.machine(),
            "communicator": communicator.describe().to_dict(),
            "options": asdict(options),
            **counted,
            "failures": failures,
            "rows": merged,
            "norms": merged_norms,
            "seconds": round(time.perf_counter() - start, 3),
        }


def sizes(max_bytes: int, bands: Iterable[Band]) -> list[Size]:
    """Element counts, powers of 4 from 1 KB on, the maximum, and both sides of every change of algorithm."""
    counts = [Size(count, False) for count in _COUNTS if count * 4 <= max_bytes]
    edges = {edge for band in bands for edge in (band.from_bytes, band.to_bytes) if edge and edge > 64}
    amounts = {near // 4 * 4 for edge in edges for near in (edge - 4, edge, edge + 4)}
    amounts |= {1 << shift for shift in range(10, max_bytes.bit_length(), 2)} | {max_bytes}
    return counts + [Size(amount, True) for amount in sorted(amounts) if 4 <= amount <= max_bytes]


class _Checker:
    """This rank's checks; all ranks walk through the same calls in the same order."""

    def __init__(self, place: Place, communicator: Any, options: Options):
        self.place, self.communicator, self.seed = place, communicator, options.seed
        on_gpu = place.device.type == "cuda"
        self.largest = options.max_bytes if options.max_bytes is not None else (64 if on_gpu else 1) << 20
        self.sizes = sizes(self.largest, communicator.describe().bands)
        self.graphs = timing.capturable(place, communicator)
        self.bursts = (5, 1) if on_gpu else (1, 0)
        self.failures: list[str] = []

    def all_rows(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Of all-reduces, and of those with a norm."""
        norms = NormChecker(self.place, self.communicator, self.seed, self.largest, self.graphs, self._note)
        sums = [(size, name, dtype) for size in self.sizes for name, dtype in DTYPES.items()]
        normed = norms.steps()
        costs = [_CALL + size.numel(dtype) * dtype.itemsize for size, _, dtype in sums]
        costs += [_NORM * (_CALL + norm_checks.nbytes(*step)) for step in normed]
        progress, behind = terminal.Progress(self.place.rank == 0), iter(terminal.shares(costs))
        rows, norm_rows = [], []
        for size, name, dtype in sums:
            wrong = sum(row["wrong"] for row in rows)
            progress(f"selftest: {size} {name}, wrong so far: {wrong}", next(behind))
            rows.append(self.row(size, name, dtype))
        for kind, count in normed:
            progress(f"selftest: {count} x {kind}", next(behind))
            norm_rows.append(norms.row(kind, count))
        progress.done()
        return rows, norm_rows

    def row(self, size: Size, name: str, dtype: torch.dtype) -> dict[str, Any]:
        numel = size.numel(dtype)
        plan = self.communicator.plan(numel, dtype)
        # Only our kernels promise the bits of the ordered sum, hence the inputs whose sum has no rounding.
        exact = report.word(plan.path) != "torch.distributed"
        kind = reference.RANDOM if exact else reference.INTEGERS
        checked = wrong = 0
        for data_kind in (kind, reference.SPECIALS) if exact else (kind,):
            for way, actual, want in self._ways(_Data(self.place, self.seed, numel, dtype, data_kind)):
                difference = reference.compare(actual, want)
                checked, wrong = checked + want.numel(), wrong + difference.wrong
                if difference.wrong:
                    self._note(f"{size} {name} {data_kind} {way}", difference)
        eager_us, graph_us = self._times(numel, dtype)
        fields = {"size": str(size), "dtype": name, "numel": numel, "bytes": numel * dtype.itemsize, "data": kind}
        plans = {"path": report.word(plan.path), "algorithm": plan.algorithm}
        return fields | plans | {"checked": checked, "wrong": wrong, "eager_us": eager_us, "graph_us": graph_us}

    def _note(self, what: str, difference: reference.Difference) -> None:
        where = f"element {difference.first} is {difference.got}, expected {difference.want}"
        self.failures.append(f"rank {self.place.rank}: {what}: {difference.wrong} wrong; {where}")

    def _ways(self, data: _Data) -> Iterator[_Check]:
        yield from self._eager(data)
        yield from self._misaligned(data)
        if self.graphs:
            yield from self._captured(data)

    def _eager(self, data: _Data) -> Iterator[_Check]:
        mine = data.mine()
        out = torch.empty_like(mine)
        reference.poison(out)
        self.communicator.all_reduce(mine, out=out)
        yield "out of place", out, data.want()
        yield "new tensor", self.communicator.all_reduce(mine), data.want()
        yield "input kept", mine, data.mine()
        self.communicator.all_reduce(mine, out=mine)
        yield "in place", mine, data.want()

    def _misaligned(self, data: _Data) -> Iterator[_Check]:
        """Views that begin one element into their storage; the elements around them must survive."""
        source, out = (torch.empty(data.numel + 2, dtype=data.dtype, device=self.place.device) for _ in range(2))
        reference.poison(source)
        reference.poison(out)
        source[1:-1] = data.mine()
        want = out.clone()
        want[1:-1] = data.want()
        self.communicator.all_reduce(source[1:-1], out=out[1:-1])
        yield "misaligned", out, want
        view = source[1:-1]
        self.communicator.all_reduce(view, out=view)
        yield "misaligned in place", source, want

    def _captured(self, data: _Data) -> Iterator[_Check]:
        mine = data.mine()
        with timing.captured(self.communicator.capture) as graph:
            out = self.communicator.all_reduce(mine)
        for replay in (1, 2):
            mine.copy_(data.mine(replay))
            reference.poison(out)
            graph.replay()
            yield f"graph replay {replay}", out, data.want(replay)

    def _times(self, numel: int, dtype: torch.dtype) -> tuple[float | None, float | None]:
        if not numel:
            return None, None
        sources = [_Data(self.place, self.seed + i, numel, dtype, reference.RANDOM).mine() for i in range(2)]
        load = timing.Workload(self.communicator.all_reduce, [s.clone() for s in sources], sources)
        eager_us = median(timing.eager(self.place, load, *self.bursts))
        if not self.graphs:
            return eager_us, None
        graph = timing.record(load, self.communicator.capture)
        return eager_us, median(timing.replays(self.place, load, graph, *self.bursts))


@dataclass(frozen=True)
class _Data:
    place: Place
    seed: int
    numel: int
    dtype: torch.dtype
    kind: str

    def mine(self, variation: int = 0) -> torch.Tensor:
        p, seed = self.place, self.seed + 1000 * variation
        return reference.values(seed, p.rank, self.numel, self.dtype, p.device, kind=self.kind, world_size=p.world_size)

    def want(self, variation: int = 0) -> torch.Tensor:
        p, seed = self.place, self.seed + 1000 * variation
        return reference.expected(seed, p.world_size, self.numel, self.dtype, p.device, kind=self.kind)


def _merge(rows: tuple[dict[str, Any], ...], failures: list[str]) -> dict[str, Any]:
    """The ranks' rows of one size and dtype as one."""
    first = rows[0]
    for rank, row in enumerate(rows):
        if (row["path"], row["algorithm"]) != (first["path"], first["algorithm"]):
            plans = f"{row['path']} {row['algorithm']}, rank 0 {first['path']} {first['algorithm']}"
            failures.append(f"rank {rank}: {row['size']} {row['dtype']}: planned {plans}")
    totals = {key: sum(row[key] for row in rows) for key in ("checked", "wrong")}
    times = {key: None if first[key] is None else max(row[key] for row in rows) for key in ("eager_us", "graph_us")}
    return first | totals | times


def render(document: dict[str, Any]) -> str:
    """The result as text."""
    facts, rows = document["communicator"], document["rows"]
    lines = [report.headline(document["machine"]), f"{report.counted(facts['world_size'], 'rank')}, path {facts['path']}"]
    lines += [f"  {reason}" for reason in report.reasons(facts["reasons"])]
    groups = [[row for row in rows if row["size"] == size] for size in dict.fromkeys(row["size"] for row in rows)]
    shown = len(_HEADERS) - all(row["graph_us"] is None for row in rows)
    lines += ["", report.table(_HEADERS[:shown], (_cells(group)[:shown] for group in groups))]
    lines += ["", norm_checks.table(document["norms"]), ""]
    lines.append("times: slowest dtype and rank; checked elements: all ranks and ways of calling together")
    if any(row["data"] == reference.INTEGERS for row in rows):
        lines.append("torch.distributed rounds its own way: its rows used integers, whose sums are exact in any order")
    failures = document["failures"]
    lines += [f"  {failure}" for failure in failures[:_SHOWN]]
    lines += [f"  … and {len(failures) - _SHOWN} more"] if len(failures) > _SHOWN else []
    verdict = terminal.verdict(document["ok"], "PASSED")
    counts = f"{report.counted(document['checked'], 'element')} checked, {document['wrong']:,} wrong"
    return terminal.wrapped("\n".join([*lines, f"{verdict}: {counts}, {document['seconds']:.1f} s"]), 2)


def _cells(rows: list[dict[str, Any]]) -> list[Any]:
    def joined(key: str, glue: str) -> str:
        return glue.join(dict.fromkeys(row[key] for row in rows))

    def slowest(key: str) -> float | None:
        return max((row[key] for row in rows if row[key] is not None), default=None)

    sums = [sum(row[key] for row in rows) for key in ("checked", "wrong")]
    words = [rows[0]["size"], joined("dtype", " "), joined("path", " / "), joined("algorithm", " / ")]
    return [*words, *sums, slowest("eager_us"), slowest("graph_us")]
