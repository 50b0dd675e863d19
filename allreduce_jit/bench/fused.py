"""``allreduce-jit bench --op add-rms-norm``: our all-reduce with a norm in one kernel, beside the two apart and others' ways.

The speed of light of a row is that of the all-reduce of its bytes alone: what the norm needs besides comes on top of it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ..engine import reference
from ..errors import InputError
from ..harness import ranks, report
from ..harness.place import Place
from . import fused_competitors, speed_of_light, timing
from .competitors import Competitor, Unavailable, open_competitors
from .norm_calls import Given, NormKind, Results, off, poison, wrong
from .stopwatch import Prepared, Stopwatch

OPERATION = "add-rms-norm"
DTYPES = {"float": "float32", "half": "float16", "bfloat16": "bfloat16"}
OURS = ("fused", "unfused", "all_reduce", "norm")
CHECKED = OURS[:2]
ON_GPU = (1, 8, 32, 128, 512, 2048), (4096, 8192)  # rows, elements of a row
ON_CPU = (1, 8, 32), (1024,)


@dataclass(frozen=True)
class Options:
    """What to measure; ``rows`` and ``hidden`` None = by device, other fields as of ``bench.Options`` and ``norm_family``."""

    rows: tuple[int, ...] | None
    hidden: tuple[int, ...] | None
    iters: int
    warmup: int
    dtype: str
    rounding: str
    quant: str
    check: bool
    mode: str
    peers: tuple[str, ...]
    seed: int
    max_ctas: int | None = None

    def shapes(self, device: torch.device) -> list[tuple[int, int]]:
        """(rows, hidden) of every row of the table."""
        all_rows, all_hidden = ON_GPU if device.type == "cuda" else ON_CPU
        return [(rows, hidden) for hidden in self.hidden or all_hidden for rows in self.rows or all_rows]

    def kind(self, hidden: int) -> NormKind:
        return NormKind(DTYPES[self.dtype], hidden, self.rounding, self.quant)


def measured(args: argparse.Namespace, init: Callable[..., Any] | None) -> ranks.Outcome:
    """Measure on all ranks. Raises ``InputError``: there is no such norm."""
    if args.html is not None:
        raise InputError(f"--html plots all-reduces alone: take the --json of --op {OPERATION}")
    options = Options(
        rows=args.rows,
        hidden=args.hidden,
        iters=args.iters,
        warmup=args.warmup,
        dtype=args.dtype,
        rounding=args.rounding,
        quant=args.quant,
        check=bool(args.check),
        mode=args.mode,
        peers=args.peers,
        seed=args.seed,
        max_ctas=args.max_ctas,
    )
    for hidden in options.hidden or ():
        _ = options.kind(hidden).family
    return ranks.run(work, options, init, gpus=args.gpus, cpu=args.cpu, deadline=args.deadline)


def work(place: Place, options: Options, init: Callable[..., Any] | None) -> dict[str, Any]:
    """One rank's part; every rank returns the same numbers."""
    if init is None:
        from .. import init
    shapes = options.shapes(place.device)
    families = list(dict.fromkeys(options.kind(hidden).family for _, hidden in shapes))
    few = {} if options.max_ctas is None else {"max_ctas": options.max_ctas}
    with init(device=place.device, operations=families, **few) as communicator:
        communicator.warmup()
        light, no_light = speed_of_light.measure(place, communicator)
        bench = _Bench(place, communicator, options, light)
        try:
            steps = [(mode, *shape) for mode in bench.modes() for shape in shapes]
            rows = bench.all_rows(bench.row, steps, lambda _, count, hidden: 2 * count * hidden)
        finally:
            bench.progress.done()
        bench.close()
        wrong = sum(row[name]["wrong"] or 0 for row in rows for name in CHECKED)
        return {
            "ok": wrong == 0,
            "op": OPERATION,
            "machine": report.machine(),
            "communicator": communicator.describe().to_dict(),
            "options": asdict(options),
            "unit": "µs per call: p50 and p99 over bursts on each rank, then the slowest rank",
            "multicast": "off",
            "floor": light.to_json() if light else {"reason": no_light},
            "peers": {one.name: None for one in bench.competitors} | bench.missing,
            "rows": rows,
            "wrong": wrong,
        }


class _Bench(Stopwatch):
    def __init__(self, place: Place, communicator: Any, options: Options, light: Any):
        super().__init__(place, communicator, options)
        self.floor = light
        largest = max(rows * hidden for rows, hidden in options.shapes(place.device)) * options.kind(64).torch_dtype.itemsize
        names = fused_competitors.names(options.peers)
        self.competitors, self.missing = open_competitors(place, names, timing.ROTATE, largest, fused_competitors.kinds())

    def row(self, mode: str, rows: int, hidden: int) -> dict[str, Any]:
        self.announce(f"bench: {mode} {rows} x {hidden}")
        kind, n = self.options.kind(hidden), self.place.world_size
        plan = self.communicator.plan_norm(rows, kind.family)
        path = report.word(plan.path)
        data = _Data(self.place, kind, rows, self.options.seed, path == "torch.distributed")
        ours = self._ours(mode, data)
        theirs = {competitor.name: self._theirs(competitor, mode, data) for competitor in self.competitors}
        times, cells = self.timed(mode, ours, theirs)
        counted = {name: self._wrong(ours[name], data) if self.options.check else None for name in CHECKED}
        nbytes = rows * hidden * kind.torch_dtype.itemsize
        sol_us = self.floor.sol_us(nbytes, n) if self.floor else None
        return {
            "mode": mode,
            "rows": rows,
            "hidden": hidden,
            "bytes": nbytes,
            "dtype": kind.dtype,
            "rounding": kind.rounding,
            "quantization": kind.quant,
            "path": path,
            "algorithm": plan.algorithm,
            "calls": ours["fused"].load.calls,
            **{name: asdict(times[name]) | ({"wrong": counted[name]} if name in counted else {}) for name in OURS},
            "sol_us": sol_us,
            "sol_ratio": times["fused"].p50_us / sol_us if sol_us else None,
            "peers": cells,
        }

    def _ours(self, mode: str, data: _Data) -> dict[str, Prepared]:
        kind, communicator = data.kind, self.communicator
        sums = [torch.empty_like(x) for x in data.inputs]

        def unfused(x: torch.Tensor, total: torch.Tensor, norm: Callable[[], Any]) -> None:
            communicator.all_reduce(x, out=total)
            norm()

        calls: dict[str, list[Callable[[], Any]]] = {name: [] for name in OURS}
        for x, total, given, outs in zip(data.inputs, sums, data.given, data.outs):
            calls["fused"].append(kind.fused(communicator, x, given, outs))
            calls["unfused"].append(partial(unfused, x, total, kind.twin(total, given, outs)))
            calls["all_reduce"].append(partial(communicator.all_reduce, x, out=total))
            calls["norm"].append(kind.twin(x, given, outs))
        loads = {name: timing.Workload(_call, data.inputs, data.sources, those) for name, those in calls.items()}
        for load in loads.values():
            _call(load.given[0])  # what is built by the first call
        return self.recorded(mode, loads)

    def _theirs(self, competitor: Competitor, mode: str, data: _Data) -> Prepared:
        kind, shape = data.kind, data.inputs[0].shape
        tensors = [tensor.view(shape) for tensor in competitor.tensors(shape.numel(), kind.torch_dtype)]
        calls = [
            partial(fused_competitors.call, competitor, kind, tensor, given, outs)
            for tensor, given, outs in zip(tensors, data.given, data.outs)
        ]
        load = timing.Workload(_call, tensors, data.sources, calls)
        want = data.expected(0) if self.options.check else None

        def trial() -> None:
            load.refill()
            poison(data.outs[0])
            calls[0]()
            self.place.synchronize()
            trouble = off(kind, data.outs[0], want, data.given[0], self.place.world_size) if want is not None else None
            if trouble is not None:
                raise Unavailable(trouble)

        return self.prepared(mode, competitor, load, trial)

    def _wrong(self, one: Prepared, data: _Data) -> int:
        """Wrong elements on all ranks together, of what was timed: one more burst with every input."""
        one.load.refill()
        for outs in data.outs:
            poison(outs)
        self.place.synchronize()
        one.load.burst() if one.graph is None else one.graph.replay()
        self.place.synchronize()
        return sum(self.place.gather(sum(wrong(outs, data.expected(i)) for i, outs in enumerate(data.outs))))


class _Data:
    """Inputs in turn with what goes with each; ``exact``: such that their sums are exact in any order of adding."""

    def __init__(self, place: Place, kind: NormKind, rows: int, seed: int, exact: bool):
        self.place, self.kind, self.rows, self.seed = place, kind, rows, seed
        self.data = reference.INTEGERS if exact else reference.RANDOM
        device, n, turns = place.device, place.world_size, range(timing.ROTATE)
        self.sources = [kind.x(seed + i, place.rank, rows, device, self.data, n) for i in turns]
        self.inputs = [source.clone() for source in self.sources]
        self.given: list[Given] = [kind.given(seed + i, rows, device) for i in turns]
        self.outs: list[Results] = [kind.outs(rows, device) for _ in turns]

    def expected(self, i: int) -> Results:
        total = self.kind.total(self.seed + i, self.rows, self.place.device, self.place.world_size, self.data)
        return self.kind.expected(total, self.given[i])


def _call(call: Callable[[], Any]) -> Any:
    return call()
