"""Repeated eager calls are launched as CUDA graphs.

Small ones as a graph of one kernel: the host takes 2 µs less to launch it again than to launch the kernel, and 1 µs more to
update its parameters for another call first; the GPU takes some 2 µs longer to run it. Large ones as a graph of all their launches,
each of which takes the GPU 1.5 µs less there, and the host next to nothing (docs/performance.md). A gain where calls are repeated with the
same addresses, as an allocator has it.
"""

from __future__ import annotations

import ctypes
import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from ..errors import AllReduceError
from .driver import Graph, KernelLaunch

if TYPE_CHECKING:
    from .prepared import PreparedCall

log = logging.getLogger("allreduce_jit")

LARGEST = 1 << 20  # bytes of a call of one launch
FEWEST, MOST = 16, 48  # launches of a call of several; with fewer there was little to gain, and on 2 GPUs something to lose
SHORTS, LONGS = 64, 8  # graphs of one kernel, of each size of clusters, and of MOST, of a communicator

Call: TypeAlias = "tuple[PreparedCall, *tuple[int, ...]]"  # what is called, and the address of each of its pointers


def repeats_as_graph(launches: int, nbytes: int) -> bool:
    """Whether calls of so many launches and bytes are launched as graphs when they are repeated."""
    return nbytes <= LARGEST if launches == 1 else FEWEST <= launches <= MOST


@dataclass(slots=True)
class _Ring:
    """Graphs that take turns; ``calls``: what each launches."""

    graphs: list[Graph] = field(default_factory=list)
    calls: list[Call | None] = field(default_factory=list)
    next: int = 0


class GraphCache:
    """The graphs of one engine, each for one call, under its lock.

    Attributes:
        ready: what launches a call again.
        stream: where they are launched.
    """

    def __init__(self) -> None:
        self.ready: dict[Call | None, Graph] = {}
        self.stream = ctypes.c_void_p()
        self._refused = False
        self._short: dict[int, _Ring] = {}  # by the blocks of a cluster, which a graph keeps
        self._long = _Ring()  # without clusters
        self._seen: set[Call] = set()

    def make(self, launch: KernelLaunch) -> None:
        """Make all graphs for launches with clusters like those of ``launch``, once; none is run. Later the driver would wait for all
        that is in flight on this GPU."""
        if self._refused or launch.cluster in self._short:
            return
        short = self._short[launch.cluster] = _Ring()
        try:
            self._fill(short, SHORTS, [launch])
            if launch.cluster == 1:
                self._fill(self._long, LONGS, [launch] * MOST)
        except AllReduceError as e:
            self._refuse(e)

    def _fill(self, ring: _Ring, graphs: int, launches: list[KernelLaunch]) -> None:
        for _ in range(graphs):
            ring.graphs.append(Graph(launches, self.stream))
            ring.calls.append(None)

    def _ring(self, launches: list[KernelLaunch]) -> _Ring | None:
        clusters = launches[0].cluster
        if len(launches) == 1:
            return self._short.get(clusters)
        return self._long if clusters == 1 and self._long.graphs else None

    def assign(self, call: Call) -> Graph | None:
        """A graph for ``call``, taken from the call that has had one for longest. None if the call has not come before, or if
        the driver refuses."""
        if not self._short:
            return None
        if call not in self._seen:
            # So short a memory that many calls in turn do not take the graphs from each other.
            if len(self._seen) >= SHORTS:
                self._seen.clear()
            self._seen.add(call)
            return None
        self._seen.remove(call)
        prepared, *addresses = call
        launches = [launch for launch, *_ in prepared.bind(addresses)]
        ring = self._ring(launches)
        if ring is None:
            return None
        turn = ring.next
        ring.next = (turn + 1) % len(ring.graphs)
        graph = ring.graphs[turn]
        self.ready.pop(ring.calls[turn], None)
        ring.calls[turn] = None
        try:
            graph.update(launches)
        except AllReduceError as e:
            self._refuse(e)
            return None
        ring.calls[turn], self.ready[call] = call, graph
        return graph

    def _refuse(self, error: AllReduceError) -> None:
        self._refused = True
        self.close()
        log.warning("eager calls are launched as kernels, which takes longer: %s", error)

    def close(self) -> None:
        self.ready.clear()
        rings = [*self._short.values(), self._long]
        self._short.clear()
        for ring in rings:
            while ring.graphs:
                ring.graphs.pop().close()
