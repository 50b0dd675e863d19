"""Time one kind of call: in a captured graph, or as eager calls seen from the host."""

from __future__ import annotations

import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from ..harness.place import Place
from ..torch_private import keep_gpu_busy

# Calls in one timed burst: their common start-up is divided by this, so short calls come in longer bursts. The same
# for all that is measured.
BURSTS = ((256 << 10, 200), (4 << 20, 100), (32 << 20, 20))  # (up to so many bytes, calls)
CALLS = 8  # of messages beyond; and on the CPU, where a call takes milliseconds and a burst has nothing to start up
ROTATE = 4  # inputs taken in turn, so that no call finds its own data in a cache
PRIMING = 2  # replays before the warm-up: the first also uploads the graph, the second tells what a launch costs
GATE_US = 100.0
CYCLES_PER_US = 2000  # no GPU's clock is much faster; a slower one only waits for longer


@dataclass(frozen=True)
class Timing:
    """Microseconds per call over the repetitions: the slowest rank's median and 99th percentile."""

    p50_us: float
    p99_us: float


@dataclass(frozen=True)
class Workload:
    """A call and what it is given.

    Attributes:
        call: takes one tensor, or what is ``given`` in its place; may work in place.
        inputs: the tensors taken in turn.
        sources: what each input holds at the start of every burst. Without this, in-place sums grow to
            infinity within a few bursts, and constant data is not representative.
        given: of each input what the call is given, if it is not the input itself.
    """

    call: Callable[[Any], Any]
    inputs: list[torch.Tensor]
    sources: list[torch.Tensor]
    given: Sequence[Any] = ()

    @property
    def calls(self) -> int:
        """Calls in one burst."""
        first = self.inputs[0]
        if first.device.type == "cpu":
            return CALLS
        return next((calls for largest, calls in BURSTS if first.nbytes <= largest), CALLS)

    def refill(self) -> None:
        for tensor, source in zip(self.inputs, self.sources):
            tensor.copy_(source)

    def burst(self) -> None:
        given = self.given or self.inputs
        for i in range(self.calls):
            self.call(given[i % len(given)])


def capturable(place: Place, communicator: Any) -> bool:
    """Whether calls can be captured into a CUDA graph: gloo passes through the host and cannot."""
    return place.device.type == "cuda" and communicator.describe().backend != "gloo"


def device_barrier(place: Place, communicator: Any) -> Callable[[], None]:
    """Lines the ranks up to about a microsecond, on the GPU: a one-element all-reduce of ours, also before competitors.

    A barrier of the hosts would let them go tens of microseconds apart.
    """
    one = torch.ones(1, device=place.device)
    return lambda: communicator.all_reduce(one)


def eager(place: Place, load: Workload, repetitions: int, warmup: int, barrier: Callable[[], Any] | None = None) -> list[float]:
    """This rank's host time per call in each repetition: a burst and one synchronisation, in µs."""
    samples = []
    place.barrier()
    for _ in range(warmup + repetitions):
        load.refill()
        if barrier is not None:
            barrier()
        place.synchronize()
        start = time.perf_counter()
        load.burst()
        place.synchronize()
        samples.append((time.perf_counter() - start) * 1e6 / load.calls)
    return samples[warmup:]


def record(load: Workload, capture: Callable[[], AbstractContextManager[Any]] = nullcontext) -> torch.cuda.CUDAGraph:
    """Capture one burst (CUDA only)."""
    with captured(capture) as graph:
        load.burst()
    return graph


@contextmanager
def captured(capture: Callable[[], AbstractContextManager[Any]]) -> Iterator[torch.cuda.CUDAGraph]:
    """A graph of what the block launches; nothing where a call has no elements, of which torch would warn."""
    graph = torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The CUDA Graph is empty")
        with capture(), torch.cuda.graph(graph):
            yield graph


def replays(
    place: Place,
    load: Workload,
    graph: torch.cuda.CUDAGraph,
    repetitions: int,
    warmup: int,
    barrier: Callable[[], Any] | None = None,
) -> list[float]:
    """This rank's device time per call in each replay of the recorded burst, in µs."""
    return replays_of(place, graph, load.calls, repetitions, warmup, barrier, load.refill)


def replays_of(
    place: Place,
    graph: torch.cuda.CUDAGraph,
    calls: int,
    repetitions: int,
    warmup: int,
    barrier: Callable[[], Any] | None = None,
    refill: Callable[[], None] | None = None,
) -> list[float]:
    """``replays`` of any graph that holds ``calls`` calls.

    A timed interval begins when all ranks have arrived at the barrier, and the whole graph has been launched by
    then: the GPU is kept busy (the gate) until the host is done with launching. Otherwise what is measured is how
    fast the host launches the nodes of a graph, and how far apart the ranks start.

    On a stream of its own, as serving engines replay: on the default stream a graph of 200 calls of NCCL costs the host 18 µs
    a call, which no gate hides.
    """

    def once(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        """One replay; how long the host took over what the gate has to cover, in µs."""
        if refill is not None:
            refill()
        keep_gpu_busy(int(gate * CYCLES_PER_US))
        began = time.perf_counter()
        if barrier is not None:
            barrier()
        start.record()
        graph.replay()
        took = time.perf_counter() - began
        end.record()
        return took * 1e6

    gate, launching = GATE_US, 0.0
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(warmup + repetitions)]
    place.barrier()
    place.synchronize()  # what was enqueued elsewhere
    with torch.cuda.stream(torch.cuda.Stream(place.device)):
        for _ in range(PRIMING):  # on an idle GPU, so that no full queue delays the host
            place.synchronize()
            launching = once(*marks[0])
        gate += 2 * launching
        for start, end in marks:
            once(start, end)
    place.synchronize()
    return [start.elapsed_time(end) * 1e3 / calls for start, end in marks[warmup:]]


def slowest(place: Place, samples: list[float]) -> Timing:
    """Summarise the samples of every rank; collective."""
    mine = (statistics.median(samples), percentile(samples, 99))
    p50, p99 = (max(column) for column in zip(*place.gather(mine)))
    return Timing(p50, p99)


def percentile(samples: list[float], percent: float) -> float:
    """The smallest sample that ``percent`` % of the samples do not exceed."""
    ordered = sorted(samples)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
