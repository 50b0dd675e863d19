"""``allreduce-jit bench``: measure our all-reduce and its competitors, row by row."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from ..engine import reference
from ..errors import InputError
from ..harness import ranks, report
from ..harness.place import Place
from . import fused, fused_table, html, speed_of_light, table, timing
from .competitors import Competitor, open_competitors, require_right_sums
from .stopwatch import Prepared, Stopwatch

DTYPES = {"float": torch.float32, "half": torch.float16, "bfloat16": torch.bfloat16}
_EVER_NEW = "ever_new", "ever_new_with_out"  # fields of a row
EVER_NEW_UP_TO = 1 << 20  # bytes: beyond, the GPU is waited for
ALIGNED = 256  # elements


@dataclass(frozen=True)
class Options:
    """What to measure; ``mode`` is ``graph``, ``eager`` or ``both``, ``max_bytes`` None = by device, ``peers`` the competitors."""

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
    max_ctas: int | None = None

    def sizes(self, device: torch.device) -> list[int]:
        """Bytes of every row: whole elements, growing by ``factor``."""
        found: list[int] = []
        size = max(1, self.min_bytes)
        itemsize = DTYPES[self.dtype].itemsize
        last = self.max_bytes if self.max_bytes is not None else (64 if device.type == "cuda" else 1) << 20
        while size <= last or not found:
            found.append(max(itemsize, size // itemsize * itemsize))
            size *= self.factor
        return list(dict.fromkeys(found))


def run(args: argparse.Namespace, init: Callable[..., Any] | None = None) -> int:
    """Measure (or read), print, and return the exit code: 1 if any element was wrong."""
    if args.source is not None:
        documents = _read(args.source)
        if args.html is not None and any("op" in document for document in documents):
            raise InputError(f"--html plots all-reduces alone, and {args.source} has others")
        written = _publish(args, documents)
        return 0 if written and all(document["ok"] for document in documents) else 1
    outcome = (fused.measured if args.op == fused.OPERATION else _measured)(args, init)
    written = outcome.rank != 0 or _publish(args, [outcome.value])
    return 0 if written and outcome.value["ok"] else 1


def _measured(args: argparse.Namespace, init: Callable[..., Any] | None) -> ranks.Outcome:
    if args.max_bytes is not None and args.max_bytes < args.min_bytes:
        raise InputError("the last size (-e, --max-bytes) is smaller than the first (-b, --min-bytes)")
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
        max_ctas=args.max_ctas,
    )
    return ranks.run(work, options, init, gpus=args.gpus, cpu=args.cpu, deadline=args.deadline)


def _publish(args: argparse.Namespace, documents: list[dict[str, Any]]) -> bool:
    """Write the page and print; whether the page, if wanted, was written. What was measured is printed in any case."""
    written = True
    if args.html is not None:
        try:
            args.html.write_text(html.page(documents), encoding="utf-8")
        except OSError as e:
            written = False
            print(f"allreduce-jit bench: cannot write {args.html}: {e.strerror}", file=sys.stderr)
    if args.json:
        print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=2))
    elif args.source is None or args.html is None:
        print("\n\n".join((fused_table if "op" in document else table).render(document) for document in documents))
    return written


def _read(path: Path) -> list[dict[str, Any]]:
    """The documents of ``--json`` in a file: one, a list, or the values of an object (``docs/benchmarks``)."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise InputError(f"cannot read {path}: {e}") from e
    several = value if isinstance(value, list) else [value, *value.values()] if isinstance(value, dict) else []
    found = [d for d in several if isinstance(d, dict) and {"rows", "peers", "communicator"} <= d.keys()]
    if not found:
        raise InputError(f"{path} holds no document of 'bench --json'")
    return found


def work(place: Place, options: Options, init: Callable[..., Any] | None) -> dict[str, Any]:
    """One rank's part; every rank returns the same numbers."""
    if init is None:
        from .. import init
    few = {} if options.max_ctas is None else {"max_ctas": options.max_ctas}
    with init(device=place.device, **few) as communicator:
        communicator.warmup()
        light, no_light = speed_of_light.measure(place, communicator)
        bench = _Bench(place, communicator, options, light)
        try:
            steps = [(mode, size) for mode in bench.modes() for size in bench.sizes]
            rows = bench.all_rows(bench.row, steps, lambda _, size: size)
        finally:
            bench.progress.done()
        bench.close()
        wrong = sum(row["wrong"] or 0 for row in rows)
        return {
            "ok": wrong == 0,
            "machine": report.machine(),
            "communicator": communicator.describe().to_dict(),
            "options": asdict(options),
            "unit": "µs per call: p50 and p99 over bursts on each rank, then the slowest rank; 1 GB = 1e9 bytes",
            "multicast": "off",
            "floor": light.to_json() if light else {"reason": no_light},
            "peers": {one.name: None for one in bench.competitors} | bench.missing,
            "rows": rows,
            "wrong": wrong,
            "average_busbw_gbs": sum(row["busbw_gbs"] for row in rows) / len(rows) if rows else 0.0,
        }


class _Bench(Stopwatch):
    def __init__(self, place: Place, communicator: Any, options: Options, light: Any):
        super().__init__(place, communicator, options)
        self.floor, self.dtype = light, DTYPES[options.dtype]
        self.sizes = options.sizes(place.device)
        self.competitors, self.missing = open_competitors(place, list(options.peers), timing.ROTATE, self.sizes[-1])

    def row(self, mode: str, nbytes: int) -> dict[str, Any]:
        numel, n = nbytes // self.dtype.itemsize, self.place.world_size
        self.announce(f"bench: {mode} {report.format_size(nbytes)}")
        plan = self.communicator.plan(numel, self.dtype)
        sources = [
            reference.values(self.options.seed + i, self.place.rank, numel, self.dtype, self.place.device)
            for i in range(timing.ROTATE)
        ]
        ours, besides, theirs = self._times(mode, numel, sources)
        sol_us = self.floor.sol_us(nbytes, n) if self.floor else None
        algbw = nbytes / ours.p50_us / 1e3
        return {
            "mode": mode,
            "bytes": nbytes,
            "count": numel,
            "dtype": self.options.dtype,
            "redop": "sum",
            "path": report.word(plan.path),
            "algorithm": plan.algorithm,
            **asdict(ours),
            **besides,
            "sol_us": sol_us,
            "sol_ratio": ours.p50_us / sol_us if sol_us else None,
            "algbw_gbs": algbw,
            "busbw_gbs": algbw * 2 * (n - 1) / n,
            "wrong": self._wrong(numel, report.word(plan.path)) if self.options.check else None,
            "peers": theirs,
        }

    def _times(self, mode: str, numel: int, sources: list[torch.Tensor]) -> tuple[timing.Timing, dict[str, Any], dict[str, Any]]:
        """Ours; what else the row says of ours; and of every competitor its timing, or the reason why there is none.

        Else: calls in a burst; and in eager mode ours with an output that is given (in a graph nothing is allocated), and
        both ways with addresses that are new in every call, as a model in eager mode has them.
        """
        all_reduce, inputs = self.communicator.all_reduce, [source.clone() for source in sources]
        ours = {"new": timing.Workload(all_reduce, inputs, sources)}
        if mode == "eager":
            out = torch.empty_like(inputs[0])
            ours["with_out"] = timing.Workload(lambda x: all_reduce(x, out=out), inputs, sources)
            if inputs[0].nbytes <= EVER_NEW_UP_TO:
                ours |= self._ever_new(inputs)
        recorded = self.recorded(mode, ours)
        theirs = {competitor.name: self._prepared(competitor, mode, numel, sources) for competitor in self.competitors}
        summary, cells = self.timed(mode, recorded, theirs)
        besides = {name: asdict(summary[name]) if name in summary else None for name in ("with_out", *_EVER_NEW)}
        return summary["new"], {"calls": ours["new"].calls, **besides}, cells

    def _ever_new(self, inputs: list[torch.Tensor]) -> dict[str, timing.Workload]:
        """Bursts in which no two calls have the same addresses."""
        numel, calls = inputs[0].numel(), timing.Workload(lambda x: x, inputs, []).calls
        step = -(-numel // ALIGNED) * ALIGNED  # as an allocator would place them
        rows = torch.empty(2, calls * step, dtype=self.dtype, device=self.place.device)
        many, outputs = ([row[i * step :][:numel] for i in range(calls)] for row in rows)
        for i, x in enumerate(many):
            x.copy_(inputs[i % len(inputs)])
        turn, all_reduce = cycle(outputs), self.communicator.all_reduce
        loads = timing.Workload(all_reduce, many, []), timing.Workload(lambda x: all_reduce(x, out=next(turn)), many, [])
        return dict(zip(_EVER_NEW, loads))

    def _wrong(self, numel: int, path: str) -> int:
        """Wrong elements on all ranks together, in a call of its own."""
        place, seed = self.place, self.options.seed
        kind = reference.INTEGERS if path == "torch.distributed" else reference.RANDOM
        mine = reference.values(seed, place.rank, numel, self.dtype, place.device, kind=kind, world_size=place.world_size)
        want = reference.expected(seed, place.world_size, numel, self.dtype, place.device, kind=kind)
        return sum(place.gather(reference.compare(self.communicator.all_reduce(mine), want).wrong))

    def _prepared(self, competitor: Competitor, mode: str, numel: int, sources: list[torch.Tensor]) -> Prepared:
        load = timing.Workload(competitor.call, competitor.tensors(numel, self.dtype), sources)
        want = self.communicator.all_reduce(sources[0]) if self.options.check else None

        def trial() -> None:
            load.refill()
            result = competitor.call(load.inputs[0])
            self.place.synchronize()
            if want is not None:
                require_right_sums(result, want, self.place.world_size)

        return self.prepared(mode, competitor, load, trial)
