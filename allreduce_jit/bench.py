"""``allreduce-jit bench``: nccl-tests' table for our all-reduce, with its competitors to the right."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from . import ranks, reference, report, timing
from .bench_peers import Peer, agreed, open_peers
from .errors import InputError
from .place import Place

DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
_OURS = ("size", "count", "type", "redop", "algorithm", "time", "p99", "algbw", "busbw", "#wrong")


@dataclass(frozen=True)
class Options:
    """What to measure; ``mode`` is ``graph``, ``eager`` or ``both``, ``max_bytes`` None = by device."""

    min_bytes: int
    max_bytes: int | None
    factor: int
    iters: int
    warmup: int
    dtype: str
    check: bool
    mode: str
    peers: tuple[str, ...]
    seed: int

    def sizes(self, device: torch.device) -> list[int]:
        """Bytes of every row: whole elements, growing by ``factor``."""
        found, size = [], max(1, self.min_bytes)
        itemsize = DTYPES[self.dtype].itemsize
        last = self.max_bytes if self.max_bytes is not None else (64 if device.type == "cuda" else 1) << 20
        while size <= last or not found:
            found.append(max(itemsize, size // itemsize * itemsize))
            size *= self.factor
        return list(dict.fromkeys(found))


def run(args: argparse.Namespace, init: Callable[..., Any] | None = None) -> int:
    """Measure, print, and return the exit code: 1 if any element was wrong."""
    if args.max_bytes is not None and args.max_bytes < args.min_bytes:
        raise InputError("the last size (-e) is smaller than the first (-b)")
    options = Options(
        min_bytes=args.min_bytes,
        max_bytes=args.max_bytes,
        factor=args.factor,
        iters=args.iters,
        warmup=args.warmup,
        dtype=args.dtype,
        check=bool(args.check),
        mode=args.mode,
        peers=args.peers,
        seed=args.seed,
    )
    outcome = ranks.run(work, options, init, gpus=args.gpus, cpu=args.cpu, deadline=args.deadline)
    if outcome.rank == 0:
        print(json.dumps(outcome.value, indent=2) if args.json else render(outcome.value))
    return 0 if outcome.value["ok"] else 1


def work(place: Place, options: Options, init: Callable[..., Any] | None) -> dict[str, Any]:
    """One rank's part; every rank returns the same numbers."""
    if init is None:
        from . import init
    with init(device=place.device) as communicator:
        communicator.warmup()
        bench = _Bench(place, communicator, options)
        try:
            rows = [bench.row(mode, size) for mode in bench.modes() for size in bench.sizes]
        finally:
            bench.progress.done()
        bench.close()
        wrong = sum(row["wrong"] or 0 for row in rows)
        return {
            "ok": wrong == 0,
            "machine": report.machine(),
            "communicator": communicator.describe(),
            "options": asdict(options),
            "unit": "µs per call: p50 and p99 over bursts on each rank, then the slowest rank; 1 GB = 1e9 bytes",
            "multicast": "off",
            "peers": {peer.name: None for peer in bench.peers} | bench.missing,
            "rows": rows,
            "wrong": wrong,
            "average_busbw_gbs": sum(row["busbw_gbs"] for row in rows) / len(rows) if rows else 0.0,
        }


class _Bench:
    def __init__(self, place: Place, communicator: Any, options: Options):
        self.place, self.communicator, self.options = place, communicator, options
        self.dtype = DTYPES[options.dtype]
        self.progress = report.Progress(place.rank == 0)
        self.sizes = options.sizes(place.device)
        self.peers, self.missing = open_peers(place, list(options.peers), timing.ROTATE, self.sizes[-1])

    def modes(self) -> list[str]:
        """What was asked for, but eager alone where nothing can be captured."""
        if not timing.capturable(self.place, self.communicator):
            return ["eager"]
        return ["graph", "eager"] if self.options.mode == "both" else [self.options.mode]

    def row(self, mode: str, nbytes: int) -> dict[str, Any]:
        numel, n = nbytes // self.dtype.itemsize, self.place.world_size
        self.progress(f"bench: {mode} {report.format_size(nbytes)}")
        plan = self.communicator.plan(numel, self.dtype)
        sources = [
            reference.values(self.options.seed + i, self.place.rank, numel, self.dtype, self.place.device)
            for i in range(timing.ROTATE)
        ]
        inputs = [source.clone() for source in sources]
        ours = timing.Workload(self.communicator.all_reduce, inputs, sources)
        graph = timing.record(ours, self.communicator.capture) if mode == "graph" else None
        result = timing.slowest(self.place, self._samples(mode, ours, graph))
        algbw = nbytes / result.p50_us / 1e3
        return {
            "mode": mode,
            "bytes": nbytes,
            "count": numel,
            "dtype": self.options.dtype,
            "redop": "sum",
            "path": report.word(plan.path),
            "algorithm": plan.algorithm,
            **asdict(result),
            "algbw_gbs": algbw,
            "busbw_gbs": algbw * 2 * (n - 1) / n,
            "wrong": self._wrong(numel, report.word(plan.path)) if self.options.check else None,
            "peers": {peer.name: self._peer(peer, mode, numel, sources) for peer in self.peers},
        }

    def _samples(self, mode: str, load: timing.Workload, graph: Any) -> list[float]:
        counts = (self.options.iters, self.options.warmup)
        if mode == "eager":
            return timing.eager(self.place, load, *counts)
        return timing.replays(self.place, load, graph, *counts)

    def _wrong(self, numel: int, path: str) -> int:
        """Wrong elements on all ranks together, in a call of its own."""
        place, seed = self.place, self.options.seed
        kind = reference.INTEGERS if path == "torch.distributed" else reference.RANDOM
        mine = reference.values(
            seed, place.rank, numel, self.dtype, place.device, kind=kind, world_size=place.world_size
        )
        want = reference.expected(seed, place.world_size, numel, self.dtype, place.device, kind=kind)
        return sum(place.gather(reference.compare(self.communicator.all_reduce(mine), want).wrong))

    def _peer(self, peer: Peer, mode: str, numel: int, sources: list[torch.Tensor]) -> dict[str, Any]:
        load = timing.Workload(peer.call, peer.tensors(numel, self.dtype), sources)

        def trial() -> None:
            load.refill()
            peer.call(load.inputs[0])
            self.place.synchronize()

        # Step by step, so that a peer that cannot do this size or be captured says so on all ranks alike.
        graph, samples = None, None
        _, trouble = agreed(self.place, trial)
        if trouble is None and mode == "graph":
            graph, trouble = agreed(self.place, lambda: timing.record(load))
        if trouble is None:
            samples, trouble = agreed(self.place, lambda: self._samples(mode, load, graph))
        return asdict(timing.slowest(self.place, samples)) if samples else {"reason": trouble}

    def close(self) -> None:
        for peer in self.peers:
            agreed(self.place, peer.close)


def render(document: dict[str, Any]) -> str:
    """The tables as text."""
    facts = document["communicator"]
    lines = [
        f"# {report.headline(document['machine'])}",
        f"# {facts['world_size']} ranks, path {facts['path']}; {'; '.join(report.reasons(facts['reasons']))}",
        f"# {document['unit']}; NVLink multicast {document['multicast']}",
    ]
    peers = document["peers"].items()
    lines += [f"# peer {name}: {'ok' if why is None else 'unavailable: ' + why}" for name, why in peers]
    names = [name for name, why in peers if why is None]
    for mode in dict.fromkeys(row["mode"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["mode"] == mode]
        lines += ["", f"# {mode}", report.table((*_OURS, *names), (_cells(row, names) for row in rows))]
        lines += _refusals(rows)
    verdict = "OK" if document["ok"] else "FAILED"
    average = document["average_busbw_gbs"]
    lines += ["", f"# Out of bounds values : {document['wrong']} {verdict}"]
    return "\n".join([*lines, f"# Avg bus bandwidth    : {average:.4g} GB/s"])


def _cells(row: dict[str, Any], names: list[str]) -> list[Any]:
    ours = [row["bytes"], row["count"], row["dtype"], row["redop"], row["algorithm"], row["p50_us"], row["p99_us"]]
    ours += [row["algbw_gbs"], row["busbw_gbs"], "N/A" if row["wrong"] is None else row["wrong"]]
    return ours + [row["peers"][name].get("p50_us") for name in names]


def _refusals(rows: list[dict[str, Any]]) -> list[str]:
    texts = {f"# - {name}: {r['reason']}": None for row in rows for name, r in row["peers"].items() if "reason" in r}
    return list(texts)
