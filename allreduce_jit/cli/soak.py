"""``allreduce-jit soak``: traffic for as long as wanted, every element of every call compared on the device (``bursts``)."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ..bench import timing
from ..bench.norm_calls import NormKind
from ..errors import AllReduceError, InputError
from ..harness import terminal
from ..harness.place import Place
from ..torch_private import keep_gpu_busy
from . import norm_bursts
from .bursts import MODULUS, Burst, draw
from .ledger import Counts, document, render, resources
from .load import MatrixProducts, NcclTraffic, Stalls

FEW = 40  # eager calls in turn, not too many for the graph cache to keep them (engine.graph_cache)
MANY, REPLAYS = 1000, 50
_SLEEP_CYCLES = 30_000_000  # for the host to enqueue all timed calls meanwhile; else its pauses would count as latency


@dataclass(frozen=True)
class Options:
    """``calls`` and ``seconds``: the first of them to be reached ends the run; None = no limit by it. ``op``: ``all-reduce``,
    ``add-rms-norm`` or ``both``."""

    calls: int | None
    seconds: float | None
    max_bytes: int | None
    seed: int
    gemm: bool
    nccl: bool
    stalls: bool
    op: str = "all-reduce"


def run(args: argparse.Namespace, init: Callable[..., Any] | None = None) -> int:
    """Run, print, and return the exit code: 1 if an element was wrong on any rank or a call did not complete."""
    from ..harness import ranks

    calls = args.calls if args.calls is not None or args.seconds is not None else 100_000
    if calls is None and args.seconds >= args.deadline:
        raise InputError(f"--seconds {args.seconds:g} would be ended by --deadline {args.deadline:g}: raise --deadline")
    if (args.gemm or args.nccl) and not ranks.on_gpus(args.gpus, args.cpu):
        raise InputError("--gemm and --nccl need GPUs, and these ranks would be on the CPU")
    options = Options(calls, args.seconds, args.max_bytes, args.seed, args.gemm, args.nccl, args.stalls, args.op)
    outcome = ranks.run(work, options, init, gpus=args.gpus, cpu=args.cpu, deadline=args.deadline)
    return outcome.conclude(args.json, render)


def work(place: Place, options: Options, init: Callable[..., Any] | None) -> dict[str, Any]:
    """One rank's part; every rank returns the same ledger."""
    if init is None:
        from .. import init
    if place.world_size >= MODULUS:
        raise InputError(f"{place.world_size} ranks: soak tells stale sums from right ones for up to {MODULUS - 1}")
    kinds = () if options.op == "all-reduce" else norm_bursts.kinds(place)
    asked: dict[str, Any] = {"operations": [kind.family for kind in kinds]} if kinds else {}
    with init(device=place.device, **asked) as communicator:
        communicator.warmup()
        return _Soak(place, communicator, options, kinds).run()


class _Soak:
    """This rank's part of a run; all ranks draw the same bursts."""

    def __init__(self, place: Place, communicator: Any, options: Options, kinds: Sequence[NormKind] = ()):
        self.place, self.communicator, self.options, self.kinds = place, communicator, options, kinds
        self.on_gpu = place.device.type == "cuda"
        self.graphs = timing.capturable(place, communicator)
        self.largest = options.max_bytes or (1 << 20 if self.on_gpu else 16 << 10)
        self.most_bytes = 32 << 20 if self.on_gpu else 1 << 20
        self.untimed, self.timed = (12, 4) if self.on_gpu else (0, 1)  # eager turns
        self.counts = Counts()
        self.gemm = MatrixProducts(place.device) if options.gemm else None
        self.nccl = NcclTraffic(place.device) if options.nccl else None
        self.stalls = Stalls(options.stalls, f"{options.seed}/{place.rank}", self.on_gpu)

    def run(self) -> dict[str, Any]:
        """Rounds until the first limit, an error, or a wrong element; then the ledger. Collective."""
        began, number = time.perf_counter(), 0
        progress = terminal.Progress(self.place.rank == 0)
        while True:
            error = None
            try:
                self.round(number)
            except AllReduceError as e:  # the others must hear of it
                error = f"rank {self.place.rank}: {type(e).__name__}: {e}"
            if number < 2:
                self.counts.resources.append(resources(self.place))
            number += 1
            everyone = self.place.gather((error, self.counts.wrong, time.perf_counter() - began))
            errors = [text for text, _, _ in everyone if text]
            wrong, seconds = sum(count for _, count, _ in everyone), max(spent for _, _, spent in everyone)
            calls = self.counts.calls.total()
            limits = (calls, self.options.calls), (seconds, self.options.seconds)
            done = max((spent / limit for spent, limit in limits if limit), default=None)
            progress(f"soak: {calls:,} calls in {seconds:.0f} s, {wrong} wrong elements", done)
            enough = calls >= (self.options.calls or calls + 1) or seconds >= (self.options.seconds or seconds + 1)
            if errors or wrong or enough:
                break
        progress.done()
        self.counts.resources.append(resources(self.place))
        alongside = {
            "gemm": self.gemm.products if self.gemm else 0,
            "nccl": self.nccl.calls if self.nccl else 0,
            "stalls": self.stalls.count,
        }
        return document(self.place, self.communicator, asdict(self.options), self.counts, alongside, errors, seconds)

    def round(self, number: int) -> None:
        """Fresh calls: a few eagerly, again and again, the last turns timed; then many, captured and replayed."""
        dice = random.Random(f"{self.options.seed}/{number}")
        if number == 0 and self.kinds:  # what a first call builds cannot be captured
            every = Burst(self.place, self.communicator, norm_bursts.one_of_each(self.kinds), self.options.seed)
            with self.series(every, "eager", 1):
                every.turn(self.plain)
        few = self.burst(dice, FEW, 2 * number)
        marks: list[tuple[Any, Any]] = []
        with self.series(few, "eager", self.untimed + self.timed):
            for _ in range(self.untimed):
                few.turn(self.plain)
            self.place.synchronize()
            if self.on_gpu:
                keep_gpu_busy(_SLEEP_CYCLES)
            for _ in range(self.timed):
                few.turn(partial(self.timed_call, marks))
        if number == 1:
            self.counts.latencies.clear()  # those of round 0, which loaded torch's kernels
        # The first call lines the ranks up; before it their hosts were apart.
        self.counts.latencies += [self.elapsed_us(*mark) for mark in marks[1:]]
        if self.graphs:
            many = self.burst(dice, MANY, 2 * number + 1)
            with timing.captured(self.communicator.capture) as graph:
                many.turn(self.plain)
            with self.series(many, "graph", REPLAYS):
                for _ in range(REPLAYS):
                    self.stalls.before_replay()
                    if self.nccl:
                        self.nccl.enqueue(10)
                    graph.replay()
            graph.reset()

    def burst(self, dice: random.Random, most_calls: int, number: int) -> Burst:
        calls: list[Any] = []
        shares = 2 if self.options.op == "both" else 1
        limits = most_calls // shares, self.most_bytes // shares, self.largest
        if self.options.op != "add-rms-norm":
            calls += draw(dice, *limits)
        if self.kinds:
            calls += norm_bursts.draw(dice, *limits, self.kinds)
            dice.shuffle(calls)
        return Burst(self.place, self.communicator, calls, self.options.seed + number)

    @contextmanager
    def series(self, burst: Burst, kind: str, turns: int) -> Iterator[None]:
        """Count and verify ``turns`` turns of the body, waiting for the device with the load kept up."""
        burst.start(self.counts.calls.total())
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
        algorithms = [call.algorithm(self.communicator) for call in burst.calls]
        self.counts.add(self.place.rank, burst, kind, turns, algorithms)

    def plain(self, call: Callable[[], Any]) -> None:
        """``around`` for ``Burst.turn`` with stalls, if wanted."""
        self.stalls.before_call()
        call()

    def timed_call(self, marks: list[tuple[Any, Any]], call: Callable[[], Any]) -> None:
        """``around`` for ``Burst.turn`` that adds when each call begins and ends to ``marks``."""
        start = self.now()
        call()
        marks.append((start, self.now()))

    def now(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def elapsed_us(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) * 1e3 if self.on_gpu else (end - start) * 1e6
