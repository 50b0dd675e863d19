"""``allreduce-jit tune``: time what the plans of this machine's path can choose from, keep which is the fastest where.

All-reduces alone. Forms of V2's calls with a norm are those of policy/norm_forms, which takes from the table up to which size calls
are one-shot.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import torch

from ..bench import timing
from ..engine import reference
from ..engine.fallback import TorchEngine
from ..errors import InputError
from ..harness import ranks, report, terminal
from ..harness.place import Place, Seat
from ..policy import backends, measured_tables
from ..policy.catalogue import WORLD_SIZES
from ..policy.operation import ITEMSIZE, OpSpec, all_reduce
from ..policy.plan import Plan
from ..policy.tables import NEVER
from ..policy.tuning import AnyBands, Choice, Tunable
from ..setup import service
from ..setup.ladder import Ladder, climb

SIZES = tuple(1 << shift for shift in range(10, 27))  # 1 KB to 64 MB
MARGIN = 0.02  # within so much of the fastest, no other band is made
REPLAYS, WARMUP = 9, 2


def run(args: argparse.Namespace, meter: type[Meter] | None = None) -> int:
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


def work(place: Place, meter: type[Meter]) -> dict[str, Any]:
    """One rank's part; every rank derives the same tables from the same times, rank 0 keeps them."""
    started, world_size = time.perf_counter(), place.world_size
    progress = terminal.Progress(place.rank == 0)
    facts: dict[str, Any] = {}
    cache_dir: pathlib.Path | None = None
    times: dict[str, dict[int, dict[Choice, float]]] = {name: {size: {} for size in SIZES} for name in ITEMSIZE}
    try:
        if world_size not in WORLD_SIZES:
            raise InputError(f"there is nothing to choose for {world_size} ranks")
        tunable, done = meter.tunable(place), 0
        for name in tunable.algorithms(world_size):
            with contextlib.closing(meter(place, tunable, name)) as one:
                steps = _steps(tunable, world_size, one.staging_bytes)
                for dtype, size in steps[name]:
                    what = f"tune: {world_size} ranks, {name} {dtype} {report.format_size(size)}"
                    progress(what, done / sum(map(len, steps.values())))
                    for choice in tunable.choices(world_size, name):
                        times[dtype][size][choice] = one(dtype, size, choice)
                    done += 1
                facts, cache_dir = one.fingerprint, one.cache_dir
    except InputError as error:  # the same on all ranks
        return {"ok": False, "world_size": world_size, "problem": str(error)}
    finally:
        progress.done()
    tables = {dtype: derive(tunable, world_size, by_size) for dtype, by_size in times.items()}
    microseconds = {
        dtype: {
            report.format_size(size): {"/".join(map(str, choice)): round(us, 3) for choice, us in found.items()}
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
        "rung": tunable.path.value,
        "problem": problem,
        "path": file,
        "fingerprint": facts,
        "tables": measured_tables.tables_to_json(tables),
        "microseconds": microseconds,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _steps(tunable: Tunable, world_size: int, staging_bytes: int) -> dict[str, list[tuple[str, int]]]:
    """Dtypes and sizes to measure, by algorithm."""
    steps: dict[str, list[tuple[str, int]]] = {name: [] for name in tunable.algorithms(world_size)}
    for dtype in ITEMSIZE:
        for size in SIZES:
            for name in tunable.candidates(world_size, dtype, size, staging_bytes):
                steps[name].append((dtype, size))
    return steps


def derive(tunable: Tunable, world_size: int, times: Mapping[int, Mapping[Choice, float]]) -> AnyBands:
    """Bands out of the µs of every choice at every size in bytes.

    The cheapest way through the sizes (Viterbi's algorithm), never back to the algorithm of smaller messages: first
    of all least time lost beyond ``MARGIN``, then fewest bands, then least time. Edges lie at the geometric middle.
    """
    order, band = tunable.algorithms(world_size).index, tunable.band
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
    inner = [band(math.isqrt(size * after), *choice) for size, after, choice, other in edges if choice != other]
    return (*inner, band(NEVER, *path[-1]))


class Meter:
    """µs per call of one algorithm, by explicit plans on a private engine, whose staging memory is the algorithm's as far as it can be.

    Collective, as is every call; ``close`` it before the next one is built, and all stays within the staging limit.

    Attributes:
        staging_bytes: the limit.
        fingerprint, cache_dir: what the times hold for, and where tables are kept.

    Raises:
        InputError: on all ranks, if the path cannot be built here.
    """

    @staticmethod
    def tunable(place: Place) -> Tunable:
        """What can be measured of the path that communicators take here; collective.

        Raises:
            InputError: on all ranks: nothing can.
        """
        ladder = climb(place.control, place.device)
        row = backends.of(ladder.verdict.path)
        if ladder.engine is not None:
            _close(place, ladder.engine)
        if row is None or row.tunable is None:
            path = ladder.verdict.path
            raise InputError(
                f"nothing to tune: {place.world_size} ranks take path {path} here, which has no table: {_why(ladder)}"
            )
        return row.tunable

    def __init__(self, place: Place, tunable: Tunable, algorithm: str):
        tables = dict.fromkeys(ITEMSIZE, tunable.private(place.world_size, algorithm))
        ladder = climb(place.control, place.device, highest=tunable.path, lowest=tunable.path, tables=tables)
        if ladder.engine is None:
            raise InputError(f"{place.world_size} ranks cannot have path {tunable.path} here: {_why(ladder)}")
        self.place, self.of = place, tunable
        self.engine: Any = ladder.engine
        self._ladder = ladder
        self._torch: TorchEngine | None = None
        self.staging_bytes = ladder.settings.staging_mb << 20
        # Where there is a path with kernels, there is a GPU.
        self.fingerprint = measured_tables.fingerprint(ladder.capabilities[0], place.world_size, tunable.path) or {}
        self.cache_dir = ladder.settings.cache_dir
        self._one = torch.ones(2, 1, device=place.device).unbind()  # the barrier's input and output
        self._data: tuple[tuple[str, int] | None, list[torch.Tensor]] = (None, [])
        self._known: dict[tuple[OpSpec, Plan], float] = {}

    def __call__(self, dtype: str, nbytes: int, choice: Choice) -> float:
        """The slowest rank's median, in a CUDA graph. Choices that make the same plan are measured once."""
        spec = all_reduce(dtype, nbytes // ITEMSIZE[dtype])
        plan = self.of.plan(choice, spec, self.place.world_size, self.engine.layout)
        if (spec, plan) not in self._known:
            self._known[spec, plan] = self._measured(spec, plan)
        return self._known[spec, plan]

    def _measured(self, spec: OpSpec, plan: Plan) -> float:
        engine = self.engine
        *inputs, out = self._tensors(spec.dtype, spec.numel)
        if plan.path == engine.path:
            load = timing.Workload(lambda x: engine.run(spec, plan, x, out), inputs, [])
        else:
            nccl = self._nccl()
            load = timing.Workload(lambda x: nccl.all_reduce(x, out), inputs, [])
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
        _close(self.place, *(engine for engine in (self._torch, self.engine) if engine is not None))

    def _nccl(self) -> TorchEngine:
        """What a communicator has for calls that no kernel takes; its first collective cannot be captured."""
        if self._torch is None:
            place = self.place
            self._torch = service.torch_engine(place.control, place.device, self._ladder, deterministic=False, may_have_nccl=True)
            self._torch.connect()
        if self._torch.problem:
            raise InputError(f"path {self.of.path} is measured beside NCCL, which cannot be set up: {self._torch.problem}")
        return self._torch


def _close(place: Place, *engines: Any) -> None:
    place.synchronize()
    with torch.cuda.device(place.device):
        for engine in engines:
            engine.close()


def _why(ladder: Ladder) -> str:
    return "; ".join(reason.text for reason in ladder.verdict.reasons)


def render(document: dict[str, Any]) -> str:
    """The result of one world size as text."""
    head = f"{document['world_size']} ranks"
    if "tables" not in document:
        return f"{head}: {document['problem']}"
    facts, of = document["fingerprint"], measured_tables.tunable_of(document["fingerprint"])
    rows = []
    for dtype, bands in document["tables"].items():
        begin = "1"
        for band in bands:
            end = None if band["up_to"] is None else str(band["up_to"])
            rows.append((dtype, begin, end, *(band[column] for column in of.columns)))
            begin = end and str(int(end) + 1)
    lines = [f"{head}, path {of.path}, {facts['gpu']}, driver {facts['driver']}, {document['seconds']:.1f} s"]
    lines.append(report.table(("dtype", "from byte", "to byte", *of.columns), rows))
    lines.append(document["problem"] or f"kept in {document['path']}; communicators built from now on use it")
    return "\n".join([*lines, of.note] if of.note else lines)
