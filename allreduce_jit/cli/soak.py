"""``allreduce-jit soak``: traffic for as long as wanted, every element of every call compared on the device.

A burst is a list of calls on slices of flat buffers, one buffer a dtype: one pass fills all inputs, the calls follow
each other without a pause, one pass compares all results. So a verified call costs hardly more than the call.

Rank r's contribution to element i of call number c is 17·h(r, i) + (c mod 17), with small random h. All sums are
integers up to 256, which every dtype holds exactly and every order of adding finds. What is left over of an earlier
call gives another remainder: contributions of the last 16 calls differ modulo 17, and so do the sums of those of up
to 16 ranks, as long as all of the stale ones are equally old.
"""

from __future__ import annotations

import argparse
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from ..bench import timing
from ..engine import reference
from ..errors import AllReduceError, InputError
from ..harness import report
from ..harness.place import Place
from ..torch_private import keep_gpu_busy

MODULUS = 17
LARGEST_SUM = 256  # integers up to it are exact in bf16
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
FEW = 40  # eager calls in turn: those that come again are launched in another way if there are not too many (engine.graph_cache)
MANY, REPLAYS = 1000, 50
_SLEEP_CYCLES = 30_000_000  # for the host to enqueue all timed calls meanwhile; else its pauses would count as latency
_SHOWN = 20


@dataclass(frozen=True)
class Options:
    """``calls`` and ``seconds``: the first of them to be reached ends the run; None = no limit by it."""

    calls: int | None
    seconds: float | None
    max_bytes: int | None
    seed: int
    gemm: bool
    nccl: bool
    stalls: bool


@dataclass(frozen=True)
class Call:
    """One all-reduce of a burst; ``offset`` in elements of its dtype's flat buffers."""

    numel: int
    dtype: torch.dtype
    in_place: bool
    offset: int


def run(args: argparse.Namespace, init: Callable[..., Any] | None = None) -> int:
    """Run, print, and return the exit code: 1 if an element was wrong on any rank or a call did not complete."""
    from ..harness import ranks

    calls = args.calls if args.calls is not None or args.seconds is not None else 100_000
    if calls is None and args.seconds >= args.deadline:
        raise InputError(f"--seconds {args.seconds:g} would be ended by --deadline {args.deadline:g}: raise --deadline")
    if (args.gemm or args.nccl) and not ranks.on_gpus(args.gpus, args.cpu):
        raise InputError("--gemm and --nccl need GPUs, and these ranks would be on the CPU")
    options = Options(calls, args.seconds, args.max_bytes, args.seed, args.gemm, args.nccl, args.stalls)
    outcome = ranks.run(work, options, init, gpus=args.gpus, cpu=args.cpu, deadline=args.deadline)
    return outcome.conclude(args.json, render)


def work(place: Place, options: Options, init: Callable[..., Any] | None) -> dict[str, Any]:
    """One rank's part; every rank returns the same ledger."""
    if init is None:
        from .. import init
    if place.world_size >= MODULUS:
        raise InputError(f"{place.world_size} ranks: soak tells stale sums from right ones for up to {MODULUS - 1}")
    with init(device=place.device) as communicator:
        communicator.warmup()
        soak = _Soak(place, communicator, options)
        soak.run()
        return soak.ledger()


def draw(dice: random.Random, most_calls: int, most_bytes: int, largest: int) -> list[Call]:
    """A burst's calls: sizes log-uniform from one element to ``largest`` bytes, ``most_bytes`` in all."""
    calls, ends = [], dict.fromkeys(DTYPES.values(), 0)
    total = 0
    while len(calls) < most_calls:
        dtype = dice.choice(list(ends))
        numel = min(int(2 ** dice.uniform(0, (largest // dtype.itemsize).bit_length())), largest // dtype.itemsize)
        total += numel * dtype.itemsize
        if total > most_bytes and calls:
            break
        step = 16 // dtype.itemsize
        offset = -(-ends[dtype] // step) * step
        if dice.random() < 0.25:
            offset += dice.randrange(1, step)
        calls.append(Call(numel, dtype, dice.random() < 0.5, offset))
        ends[dtype] = offset + numel
    return calls


class _Flat:
    """The buffers of all calls of one dtype in a burst, and the two passes over them."""

    def __init__(self, place: Place, calls: list[Call], dtype: torch.dtype, seed: int):
        mine = [(index, call) for index, call in enumerate(calls) if call.dtype is dtype]
        size = max((call.offset + call.numel for _, call in mine), default=0)
        n, device = place.world_size, place.device

        def full(value: Any, kind: torch.dtype) -> torch.Tensor:
            return torch.full((size,), value, dtype=kind, device=device)

        self.n = n
        self.call = full(-1, torch.int32)  # index of the call that an element belongs to, -1: a gap
        self.in_place = full(False, torch.bool)
        for index, call in mine:
            part = slice(call.offset, call.offset + call.numel)
            self.call[part] = index
            self.in_place[part] = call.in_place
        self.live = self.call >= 0
        self.age = self.call.clamp(min=0).remainder(MODULUS).to(torch.int16)
        contributions = [_multiples(seed, rank, size, dtype, device, n) for rank in range(n)]
        self.mine, self.sum = contributions[place.rank], sum(contributions[1:], contributions[0])
        self.x, self.y, self.want = (full(0, dtype) for _ in range(3))
        self.phase, self.nan = torch.empty_like(self.age), torch.full((), torch.nan, dtype=dtype, device=device)
        self.wrong, self.bad = full(False, torch.bool), full(False, torch.bool)

    def fill(self, phase: torch.Tensor) -> None:
        """Inputs of a turn in ``x``, or in ``y`` where the call is in place; elsewhere ``y`` holds NaN."""
        torch.add(self.age, phase, out=self.phase)
        self.phase.remainder_(MODULUS)
        torch.add(self.mine, self.phase, out=self.x)
        torch.where(self.in_place, self.x, self.nan, out=self.y)

    def compare(self, errors: torch.Tensor, untroubled: torch.Tensor) -> None:
        """Add the number of wrong elements to ``errors``; remember which they are while ``untroubled``."""
        torch.add(self.sum, self.phase, alpha=self.n, out=self.want)
        torch.ne(self.y, self.want, out=self.wrong)
        self.wrong.logical_and_(self.live)
        errors.add_(self.wrong.sum())
        self.wrong.logical_and_(untroubled)
        self.bad.logical_or_(self.wrong)


def _multiples(seed: int, rank: int, numel: int, dtype: torch.dtype, device: Any, world_size: int) -> torch.Tensor:
    """17·h: multiples of the modulus so small that all sums stay exact."""
    span = max(1, LARGEST_SUM // world_size // MODULUS * 2)
    small = reference.values(seed, rank, numel, dtype, device, kind=reference.INTEGERS, world_size=world_size)
    return small.remainder_(span).sub_(span // 2).mul_(MODULUS)


class Burst:
    """A list of calls with their data; ``turn`` runs and verifies all of them once, and may be captured.

    Nothing is told before ``verdict``: errors are counted on the device.
    """

    def __init__(self, place: Place, communicator: Any, calls: list[Call], seed: int):
        self.communicator, self.calls = communicator, calls
        self.flats = {dtype: _Flat(place, calls, dtype, seed) for dtype in {call.dtype for call in calls}}
        self.elements = sum(call.numel for call in calls)

        def scalar(kind: torch.dtype) -> torch.Tensor:
            return torch.zeros((), dtype=kind, device=place.device)

        self.phase, self.turns, self.errors, self.first = (
            scalar(kind) for kind in (torch.int16, torch.int64, torch.int64, torch.int64)
        )
        self.number = 0
        self._slices = [self._tensors(call) for call in calls]

    def _tensors(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        flat, part = self.flats[call.dtype], slice(call.offset, call.offset + call.numel)
        return (flat.y if call.in_place else flat.x)[part], flat.y[part]

    def start(self, number: int) -> None:
        """The next turn's first call is the run's call ``number``; forget what was counted."""
        self.number = number
        self.phase.fill_(number % MODULUS)
        for counter in (self.turns, self.errors):
            counter.zero_()
        self.first.fill_(-1)
        for flat in self.flats.values():
            flat.bad.zero_()

    def turn(self, around: Callable[[int, Callable[[], Any]], Any]) -> None:
        """Fill, call, compare. ``around(index, call)`` makes each call."""
        for flat in self.flats.values():
            flat.fill(self.phase)
        for index, (x, out) in enumerate(self._slices):
            around(index, lambda x=x, out=out: self.communicator.all_reduce(x, out=out))
        untroubled = self.first < 0
        for flat in self.flats.values():
            flat.compare(self.errors, untroubled)
        self.first.copy_(torch.where(untroubled & (self.errors > 0), self.turns, self.first))
        self.turns.add_(1)
        self.phase.add_(len(self.calls)).remainder_(MODULUS)

    def verdict(self) -> tuple[int, list[tuple[int, Call, int]]]:
        """Wrong elements since ``start``; and of the first turn that had any: (call number, call, wrong elements)."""
        wrong = int(self.errors)
        if not wrong:
            return 0, []
        first, found = int(self.first), []
        for flat in self.flats.values():
            for index, count in zip(*(t.tolist() for t in flat.call[flat.bad].unique(return_counts=True))):
                found.append((self.number + first * len(self.calls) + index, self.calls[index], count))
        return wrong, sorted(found, key=lambda one: one[0])


class _Gemm:
    """Matrix products that keep every multiprocessor busy, on a stream of their own."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.a, self.b, self.c = (torch.randn(4096, 4096, dtype=torch.bfloat16, device=device) for _ in range(3))
        self.done = [torch.cuda.Event() for _ in range(2)]
        self.next = self.products = 0

    def feed(self) -> None:
        """Keep two batches in the queue."""
        while self.done[self.next].query():
            with torch.cuda.stream(self.stream):
                for _ in range(4):
                    torch.mm(self.a, self.b, out=self.c)
                self.done[self.next].record()
            self.next = 1 - self.next
            self.products += 4


class _Nccl:
    """NCCL all-reduces on a stream and in a group of their own."""

    def __init__(self, device: torch.device):
        self.group = dist.new_group(backend="nccl")
        self.stream = torch.cuda.Stream(device)
        self.buffer = torch.zeros(1 << 18, device=device)
        self.calls = 0
        self.enqueue(1)
        self.stream.synchronize()

    def enqueue(self, count: int) -> None:
        with torch.cuda.stream(self.stream):
            for _ in range(count):
                dist.all_reduce(self.buffer, group=self.group)
        self.calls += count


class _Soak:
    """This rank's part of a run; all ranks draw the same bursts."""

    def __init__(self, place: Place, communicator: Any, options: Options):
        self.place, self.communicator, self.options = place, communicator, options
        self.on_gpu = place.device.type == "cuda"
        self.graphs = timing.capturable(place, communicator)
        self.largest = options.max_bytes or (1 << 20 if self.on_gpu else 16 << 10)
        self.most_bytes = 32 << 20 if self.on_gpu else 1 << 20
        self.untimed, self.timed = (12, 4) if self.on_gpu else (0, 1)  # eager turns
        self.private = random.Random(f"{options.seed}/{place.rank}")  # of stalls, which need not agree
        self.done: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.elements = self.wrong = self.stalls = 0
        self.failures: list[dict[str, Any]] = []
        self.errors: list[str] = []
        self.latencies: list[float] = []
        self.gemm = _Gemm(place.device) if options.gemm else None
        self.nccl = _Nccl(place.device) if options.nccl else None
        self.began = time.perf_counter()
        self.resources: list[dict[str, int]] = []

    def run(self) -> None:
        """Rounds until the first limit, an error, or a wrong element; collective."""
        progress, turn = report.Progress(self.place.rank == 0), 0
        while True:
            error = None
            try:
                self.round(turn)
            except AllReduceError as e:  # the others must hear of it
                error = f"rank {self.place.rank}: {type(e).__name__}: {e}"
            turn += 1
            if turn in (1, 2):
                self.resources.append(_resources(self.place))
            everyone = self.place.gather((error, self.wrong, time.perf_counter() - self.began))
            self.errors = [text for text, _, _ in everyone if text]
            wrong, seconds = sum(count for _, count, _ in everyone), max(spent for _, _, spent in everyone)
            calls = self.done.total()
            progress(f"soak: {calls:,} calls in {seconds:.0f} s, {wrong} wrong elements")
            enough = calls >= (self.options.calls or calls + 1) or seconds >= (self.options.seconds or seconds + 1)
            if self.errors or wrong or enough:
                break
        progress.done()
        self.seconds = seconds
        self.resources.append(_resources(self.place))

    def round(self, number: int) -> None:
        """Fresh calls: a few eagerly, again and again, the last turns timed; then many, captured and replayed."""
        dice = random.Random(f"{self.options.seed}/{number}")
        few = self.burst(dice, FEW, 2 * number)
        marks: list[tuple[Any, Any]] = []
        with self.series(few, "eager", self.untimed + self.timed):
            for _ in range(self.untimed):
                few.turn(self.plain)
            self.place.synchronize()
            if self.on_gpu:
                keep_gpu_busy(_SLEEP_CYCLES)
            for _ in range(self.timed):
                few.turn(partial(self.mark, marks))
        if number == 1:
            self.latencies.clear()  # the first round loaded torch's kernels
        # The first call lines the ranks up, which stood apart by what their hosts did before.
        self.latencies += [self.elapsed_us(*mark) for mark in marks[1:]]
        if self.graphs:
            many, graph = self.burst(dice, MANY, 2 * number + 1), torch.cuda.CUDAGraph()
            with self.communicator.capture(), torch.cuda.graph(graph):
                many.turn(self.plain)
            with self.series(many, "graph", REPLAYS):
                for _ in range(REPLAYS):
                    self.host_stall()
                    if self.nccl:
                        self.nccl.enqueue(10)
                    graph.replay()
            graph.reset()

    def burst(self, dice: random.Random, most_calls: int, number: int) -> Burst:
        calls = draw(dice, most_calls, self.most_bytes, self.largest)
        return Burst(self.place, self.communicator, calls, self.options.seed + number)

    @contextmanager
    def series(self, burst: Burst, kind: str, turns: int) -> Iterator[None]:
        """Count and judge ``turns`` turns of the body, waiting for the device with the load kept up."""
        before = self.done.total()
        burst.start(before)
        if self.gemm:
            self.gemm.feed()
        yield
        if self.on_gpu:
            end = torch.cuda.Event()
            end.record()
            while self.gemm and not end.query():
                self.gemm.feed()
                time.sleep(2e-4)
            end.synchronize()
        self.communicator.check()
        self.done[kind] += turns * len(burst.calls)
        for call in burst.calls:
            plan = self.communicator.plan(call.numel, call.dtype)
            self.kinds[f"{plan.algorithm} {str(call.dtype).removeprefix('torch.')}"] += turns
        self.elements += turns * burst.elements
        wrong, found = burst.verdict()
        self.wrong += wrong
        for number, call, count in found[: max(0, _SHOWN - len(self.failures))]:
            where = {"call": number, "numel": call.numel, "dtype": str(call.dtype).removeprefix("torch.")}
            how = {"kind": kind, "in_place": call.in_place, "wrong": count}
            self.failures.append({"rank": self.place.rank, **where, **how})

    def mark(self, marks: list[tuple[Any, Any]], index: int, call: Callable[[], Any]) -> None:
        """``around`` for ``Burst.turn`` that adds when each call begins and ends to ``marks``."""
        start = self.now()
        call()
        marks.append((start, self.now()))

    def plain(self, index: int, call: Callable[[], Any]) -> None:
        if self.options.stalls and self.private.random() < 0.005:
            self.stalls += 1
            if self.on_gpu:
                keep_gpu_busy(int(10 ** self.private.uniform(3, 6)))  # up to half a millisecond
            else:
                self.host_stall(1.0)
        call()

    def host_stall(self, probability: float = 0.05) -> None:
        if self.options.stalls and self.private.random() < probability:
            self.stalls += 1
            time.sleep(10 ** self.private.uniform(-5, -1.5))

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) * 1e3 if self.on_gpu else (end - start) * 1e6

    def ledger(self) -> dict[str, Any]:
        """The same on all ranks; collective."""
        mine = {
            "elements": self.elements,
            "wrong": self.wrong,
            "failures": self.failures,
            "stalls": self.stalls,
            "latency": [timing.percentile(self.latencies, 50), timing.percentile(self.latencies, 99.9)]
            if self.latencies
            else [0.0, 0.0],
            "resources": self.resources,
        }
        everyone = self.place.gather(mine)
        wrong, calls = sum(one["wrong"] for one in everyone), self.done.total()
        median, tail = (max(column) for column in zip(*(one["latency"] for one in everyone)))
        return {
            "ok": not wrong and not self.errors and calls > 0,
            "machine": report.machine(),
            "communicator": self.communicator.describe(),
            "options": asdict(self.options),
            "calls": {"total": calls, **self.done},
            "kinds": dict(sorted(self.kinds.items())),
            "elements": sum(one["elements"] for one in everyone),
            "wrong": wrong,
            "failures": sorted((f for one in everyone for f in one["failures"]), key=lambda f: (f["call"], f["rank"])),
            "hangs": len(self.errors),
            "errors": self.errors,
            "latency_us": {"median": round(median, 2), "p99.9": round(tail, 2), "samples": len(self.latencies)},
            "alongside": {
                "gemm": self.gemm.products if self.gemm else 0,
                "nccl": self.nccl.calls if self.nccl else 0,
                "stalls": sum(one["stalls"] for one in everyone),
            },
            "resources": [one["resources"] for one in everyone],
            "seconds": round(self.seconds, 2),
            "calls_per_second": round(calls / self.seconds) if self.seconds else 0,
        }


def _resources(place: Place) -> dict[str, int]:
    found = {}
    with suppress(OSError):  # no /proc, as in some sandboxes
        found = {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(place.device)
        found["device_bytes"] = total - free
    return found


def render(ledger: dict[str, Any]) -> str:
    """The ledger as text."""
    calls, latency, alongside = ledger["calls"], ledger["latency_us"], ledger["alongside"]
    kinds = ", ".join(f"{count:,} {name}" for name, count in ledger["kinds"].items())
    lines = [
        report.headline(ledger["machine"]),
        f"{ledger['communicator']['path']} on {ledger['communicator']['world_size']} ranks",
        f"{calls['total']:,} calls in {ledger['seconds']} s ({calls.get('eager', 0):,} eager, {calls.get('graph', 0):,} "
        f"in graphs): {kinds}",
        f"alongside: {alongside['gemm']:,} matrix products, {alongside['nccl']:,} NCCL all-reduces, "
        f"{alongside['stalls']:,} stalls",
        f"{ledger['elements']:,} elements checked, {ledger['wrong']:,} wrong; {ledger['hangs']} ranks with errors",
        f"latency: median {latency['median']} µs, p99.9 {latency['p99.9']} µs ({latency['samples']:,} samples a rank)",
    ]
    for name in ledger["resources"][0][0]:
        lines.append(f"{name}, rank 0: " + ", ".join(f"{at[name]:,}" for at in ledger["resources"][0]))
    lines += [
        f"rank {f['rank']}: call {f['call']:,} ({f['kind']}, {f['numel']} {f['dtype']}"
        f"{', in place' if f['in_place'] else ''}): {f['wrong']} wrong elements"
        for f in ledger["failures"][:_SHOWN]
    ]
    return "\n".join([*lines, *ledger["errors"], "ok" if ledger["ok"] else "FAILED"])
