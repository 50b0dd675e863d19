"""``allreduce-jit tune``: time every V2 algorithm and block size on this machine, keep which is the fastest where.

All-reduces alone. Forms of calls with a norm are those of policy/norm_forms, which takes from the table up to which size calls are
one-shot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..bench import timing
from ..engine import reference
from ..errors import InputError
from ..harness import ranks, report, terminal
from ..harness.place import Place, Seat
from ..policy import measured_tables, nvlink
from ..policy.catalogue import NVLINK_ALGORITHMS, WORLD_SIZES, nvlink_algorithms
from ..policy.operation import ITEMSIZE, all_reduce
from ..policy.plan import MAX_BLOCK
from ..policy.tables import BLOCKS, NEVER, NVLINK_TABLES, STREAM_FROM, Band, Bands
from ..policy.verdict import Path
from ..setup.ladder import climb

SIZES = tuple(1 << shift for shift in range(10, 27))  # 1 KB to 64 MB
MARGIN = 0.02  # within so much of the fastest, no other band is made
REPLAYS, WARMUP = 9, 2

Choice = tuple[str, int]  # algorithm, threads of a block


def run(args: argparse.Namespace, meter: Callable[[Place, str], Meter] | None = None) -> int:
    """Measure, store, print, and return the exit code: 1 if some world size got no table."""
    documents = [ranks.run(work, meter or Meter, gpus=gpus, deadline=args.deadline) for gpus in _world_sizes(args.gpus)]
    if documents[0].rank == 0:
        values = [outcome.value for outcome in documents]
        print(json.dumps(values, indent=2) if args.json else "\n\n".join(map(render, values)))
    return 0 if all(outcome.value["ok"] for outcome in documents) else 1


def _world_sizes(gpus: int | None) -> list[int | None]:
    """Ranks of every run; torchrun's processes have theirs already."""
    if Seat.from_env() is not None or gpus is not None:
        return [gpus]
    present = torch.cuda.device_count()
    if present < 2:
        raise InputError(f"nothing to tune: it takes 2 GPUs or more, this machine shows {report.counted(present, 'CUDA GPU')}")
    return [n for n in WORLD_SIZES if n <= present]


def work(place: Place, meter: Callable[[Place, str], Meter]) -> dict[str, Any]:
    """One rank's part; every rank derives the same tables from the same times, rank 0 keeps them."""
    started, world_size = time.perf_counter(), place.world_size
    progress = terminal.Progress(place.rank == 0)
    facts: dict[str, Any] = {}
    cache_dir: pathlib.Path | None = None
    times: dict[str, dict[int, dict[Choice, float]]] = {name: {size: {} for size in SIZES} for name in ITEMSIZE}
    try:
        if world_size not in WORLD_SIZES:
            raise InputError(f"there is nothing to choose for {world_size} ranks")
        done = 0
        for name in nvlink_algorithms(world_size):
            with contextlib.closing(meter(place, name)) as one:
                steps = _steps(world_size, one.staging_bytes)
                for dtype, size in steps[name]:
                    what = f"tune: {world_size} ranks, {name} {dtype} {report.format_size(size)}"
                    progress(what, done / sum(map(len, steps.values())))
                    for block in BLOCKS:
                        times[dtype][size][name, block] = one(dtype, size, block)
                    done += 1
                facts, cache_dir = one.fingerprint, one.cache_dir
    except InputError as error:  # the same on all ranks
        return {"ok": False, "world_size": world_size, "problem": str(error)}
    finally:
        progress.done()
    tables = {dtype: derive(world_size, by_size) for dtype, by_size in times.items()}
    microseconds = {
        dtype: {
            report.format_size(size): {f"{name}/{block}": round(us, 3) for (name, block), us in found.items()}
            for size, found in by_size.items()
        }
        for dtype, by_size in times.items()
    }
    file = problem = None
    if place.rank == 0:
        try:
            file = str(measured_tables.save(cache_dir, facts, tables, microseconds=microseconds))
        except OSError as e:
            problem = f"the table could not be kept: {e}"
    file, problem = place.gather((file, problem))[0]
    return {
        "ok": problem is None,
        "world_size": world_size,
        "problem": problem,
        "path": file,
        "fingerprint": facts,
        "tables": measured_tables.tables_to_json(tables),
        "microseconds": microseconds,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _steps(world_size: int, staging_bytes: int) -> dict[str, list[tuple[str, int]]]:
    """Dtypes and sizes to measure, by algorithm."""
    steps: dict[str, list[tuple[str, int]]] = {name: [] for name in nvlink_algorithms(world_size)}
    for dtype in ITEMSIZE:
        for size in SIZES:
            for name in candidates(world_size, dtype, size, staging_bytes):
                steps[name].append((dtype, size))
    return steps


def candidates(world_size: int, dtype: str, nbytes: int, staging_bytes: int) -> Iterator[str]:
    """Algorithms that a plan could give a message of ``nbytes``: all but the last have to hold it in one launch."""
    names = nvlink_algorithms(world_size)
    for name in names:
        if NVLINK_ALGORITHMS[name].stream and nbytes <= STREAM_FROM:
            continue
        bands = (Band(nbytes, name, MAX_BLOCK), Band(NEVER, names[-1], MAX_BLOCK))
        layout = nvlink.make_layout(world_size, staging_bytes, bands)
        spec = all_reduce(dtype, nbytes // ITEMSIZE[dtype])
        if name == names[-1] or nvlink.plan_of(name, MAX_BLOCK, spec, world_size, layout).chunk == spec.numel:
            yield name


def derive(world_size: int, times: Mapping[int, Mapping[Choice, float]]) -> Bands:
    """Bands out of the µs of every choice at every size in bytes.

    The cheapest way through the sizes (Viterbi's algorithm), never back to the algorithm of smaller messages: first
    of all least time lost beyond ``MARGIN``, then fewest bands, then least time. Edges lie at the geometric middle.
    """
    order = nvlink_algorithms(world_size).index
    sizes = sorted(times)
    ways: dict[Choice, tuple[tuple[float, int, float], list[Choice]]] = {}
    for size in sizes:
        fastest = min(times[size].values())
        before, ways = ways, {}
        for choice, us in times[size].items():
            ways_here = [
                ((excess, bands + (path[-1] != choice), total), path)
                for (excess, bands, total), path in before.values()
                if order(path[-1][0]) <= order(choice[0])
            ]
            if size == sizes[0]:
                ways_here = [((0.0, 1, 0.0), [])]
            if ways_here:
                (excess, bands, total), path = min(ways_here)
                lost = us / fastest - 1
                ways[choice] = (excess + max(0.0, lost - MARGIN), bands, total + lost), [*path, choice]
    _, path = min(ways.values())
    edges = zip(sizes, sizes[1:], path, path[1:])
    inner = [Band(math.isqrt(size * after), *choice) for size, after, choice, other in edges if choice != other]
    return (*inner, Band(NEVER, *path[-1]))


class Meter:
    """µs per call of one algorithm, by explicit plans on a private engine.

    All of its staging memory is the algorithm's, but for the room of those before it in the package's table.

    Collective, as is every call; ``close`` it before the next one is built, and all stays within the staging limit.

    Attributes:
        staging_bytes: the limit.
        fingerprint, cache_dir: what the times hold for, and where tables are kept.

    Raises:
        InputError: on all ranks, if these GPUs cannot have V2.
    """

    def __init__(self, place: Place, algorithm: str):
        order = nvlink_algorithms(place.world_size).index
        before = [band for band in NVLINK_TABLES[place.world_size] if order(band.algorithm) < order(algorithm)]
        bands = (*before, Band(NEVER, algorithm, MAX_BLOCK))
        tables = dict.fromkeys(ITEMSIZE, bands)
        ladder = climb(place.control, place.device, highest=Path.V2, lowest=Path.V2, tables=tables)
        if ladder.engine is None:
            reasons = "; ".join(reason.text for reason in ladder.verdict.reasons)
            raise InputError(f"only V2 has tables, and {place.world_size} ranks cannot have it here: {reasons}")
        self.place, self.algorithm = place, algorithm
        self.engine: Any = ladder.engine
        self.staging_bytes = ladder.settings.staging_mb << 20
        self.fingerprint = measured_tables.fingerprint(ladder.capabilities[0], place.world_size) or {}  # V2: there is a GPU
        self.cache_dir = ladder.settings.cache_dir
        self._one = torch.ones(2, 1, device=place.device).unbind()  # the barrier's input and output
        self._data: tuple[tuple[str, int] | None, list[torch.Tensor]] = (None, [])

    def __call__(self, dtype: str, nbytes: int, block: int) -> float:
        """The slowest rank's median, in a CUDA graph."""
        spec, engine = all_reduce(dtype, nbytes // ITEMSIZE[dtype]), self.engine
        plan = nvlink.plan_of(self.algorithm, block, spec, self.place.world_size, engine.layout)
        *inputs, out = self._tensors(dtype, spec.numel)
        load = timing.Workload(lambda x: engine.run(spec, plan, x, out), inputs, [])
        graph = timing.record(load)
        samples = timing.replays(self.place, load, graph, REPLAYS, WARMUP, lambda: engine.all_reduce(*self._one))
        engine.check()
        return timing.slowest(self.place, samples).p50_us

    def _tensors(self, dtype: str, numel: int) -> list[torch.Tensor]:
        """Inputs taken in turn and the output; the same for all block sizes."""
        if self._data[0] != (dtype, numel):
            self._data = (None, [])
            where = self.place.rank, numel, getattr(torch, dtype), self.place.device
            inputs = [reference.values(seed, *where) for seed in range(timing.ROTATE)]
            self._data = ((dtype, numel), [*inputs, torch.empty_like(inputs[0])])
        return self._data[1]

    def close(self) -> None:
        self._data = (None, [])
        self.place.synchronize()
        with torch.cuda.device(self.place.device):
            self.engine.close()


def render(document: dict[str, Any]) -> str:
    """The result of one world size as text."""
    head = f"{document['world_size']} ranks"
    if "tables" not in document:
        return f"{head}: {document['problem']}"
    facts = document["fingerprint"]
    rows = []
    for dtype, bands in document["tables"].items():
        begin = "1"
        for band in bands:
            end = None if band["up_to"] is None else str(band["up_to"])
            rows.append((dtype, begin, end, band["algorithm"], band["block"]))
            begin = end and str(int(end) + 1)
    lines = [f"{head}, {facts['gpu']}, driver {facts['driver']}, {document['seconds']:.1f} s"]
    lines.append(report.table(("dtype", "from byte", "to byte", "algorithm", "block"), rows))
    lines.append(document["problem"] or f"kept in {document['path']}; communicators built from now on use it")
    lines.append("calls with a norm are not timed: of this table, they take from which size on they are two-shot")
    return "\n".join(lines)
