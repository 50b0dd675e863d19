"""Time one kind of call: in a captured graph, or as eager calls seen from the host."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from .place import Place

CALLS = 20  # in one timed burst: their common start-up is divided by this
CALLS_SMALL = 100  # of small messages, which take no longer than that start-up
SMALL_BYTES = 256 << 10
ROTATE = 4  # inputs taken in turn, so that no call finds its own data in a cache


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over the repetitions: the slowest rank's median and 99th percentile."""

    p50_us: float
    p99_us: float


@dataclass(frozen=True)
class Workload:
    """A call and what it is given.

    Attributes:
        call: takes one tensor; may work in place.
        inputs: the tensors taken in turn.
        sources: what each input holds at the start of every burst. Without this, in-place sums grow to
            infinity within a few bursts, and constant data is not what anybody reduces.
    """

    call: Callable[[torch.Tensor], Any]
    inputs: list[torch.Tensor]
    sources: list[torch.Tensor]

    @property
    def calls(self) -> int:
        """Calls in one burst."""
        return CALLS_SMALL if self.inputs[0].nbytes <= SMALL_BYTES else CALLS

    def refill(self) -> None:
        for tensor, source in zip(self.inputs, self.sources):
            tensor.copy_(source)

    def burst(self) -> None:
        for i in range(self.calls):
            self.call(self.inputs[i % len(self.inputs)])


def capturable(place: Place, communicator: Any) -> bool:
    """Whether calls can be captured into a CUDA graph: gloo passes through the host and cannot."""
    return place.device.type == "cuda" and communicator.describe()["backend"] != "gloo"


def eager(place: Place, load: Workload, repetitions: int, warmup: int) -> list[float]:
    """This rank's host time per call in each repetition: a burst and one synchronisation, in µs."""
    samples = []
    place.barrier()
    for _ in range(warmup + repetitions):
        load.refill()
        place.synchronize()
        start = time.perf_counter()
        load.burst()
        place.synchronize()
        samples.append((time.perf_counter() - start) * 1e6 / load.calls)
    return samples[warmup:]


def record(
    load: Workload, capture: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> torch.cuda.CUDAGraph:
    """Capture one burst (CUDA only)."""
    graph = torch.cuda.CUDAGraph()
    with capture(), torch.cuda.graph(graph):
        load.burst()
    return graph


def replays(
    place: Place, load: Workload, graph: torch.cuda.CUDAGraph, repetitions: int, warmup: int
) -> list[float]:
    """This rank's device time per call in each replay of the recorded burst, in µs."""
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(warmup + repetitions)]
    place.synchronize()
    place.barrier()
    for start, end in marks:
        load.refill()
        start.record()
        graph.replay()
        end.record()
    place.synchronize()
    return [start.elapsed_time(end) * 1e3 / load.calls for start, end in marks[warmup:]]


def slowest(place: Place, samples: list[float]) -> Timing:
    """Summarise the samples of every rank; collective."""
    mine = (statistics.median(samples), percentile(samples, 99))
    p50, p99 = (max(column) for column in zip(*place.gather(mine)))
    return Timing(p50, p99)


def percentile(samples: list[float], percent: float) -> float:
    """The smallest sample that ``percent`` % of the samples do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
