"""Small eager calls that come again are launched as CUDA graphs of one kernel.

The host takes 2 µs less to launch such a graph again than to launch the kernel, and 1 µs more to aim it at another call
first; the GPU takes some 2 µs longer to run it (docs/performance.md). A gain where calls come again with the same addresses,
as an allocator has it, and where it is the host that they wait for.
"""

from __future__ import annotations

import ctypes
import logging
from typing import Any

from .driver import Graph, Launch
from .errors import AllReduceError

log = logging.getLogger("allreduce_jit")

LARGEST = 1 << 20  # bytes of a call
GRAPHS = 64  # of a communicator: 112 KiB of device memory each

Call = tuple[Any, int, int]  # an engine's Step, and the addresses of input and output


class Replays:
    """The graphs of one engine, each aimed at one call, under its lock.

    Attributes:
        ready: what to call to launch a call again.
        stream: where they are launched.
    """

    def __init__(self) -> None:
        self.ready: dict[Call, Graph] = {}
        self.stream = ctypes.c_void_p()
        self._graphs: list[Graph] = []
        self._calls: list[Call | None] = [None] * GRAPHS
        self._next = 0
        self._seen: set[Call] = set()

    def make(self, launch: Launch) -> None:
        """Make all graphs, of any launch; none is run. Later the driver would wait for all that is in flight on this GPU."""
        try:
            for _ in range(GRAPHS):
                self._graphs.append(Graph(launch, self.stream))
        except AllReduceError as e:
            self._refuse(e)

    def __bool__(self) -> bool:
        return bool(self._graphs)

    def aim(self, call: Call) -> Graph | None:
        """A graph for ``call``, which is one launch: taken from the call that has had one for longest. None if the call has
        not come before, or if the driver refuses."""
        if not self._graphs:
            return None
        if call not in self._seen:
            # So short a memory that many calls in turn do not take the graphs from each other.
            if len(self._seen) >= GRAPHS:
                self._seen.clear()
            self._seen.add(call)
            return None
        self._seen.remove(call)
        turn = self._next
        self._next = (turn + 1) % GRAPHS
        graph = self._graphs[turn]
        self.ready.pop(self._calls[turn], None)
        self._calls[turn] = None
        step, source, target = call
        (launch,) = step.launches(source, target)
        try:
            graph.aim(launch)
        except AllReduceError as e:
            self._refuse(e)
            return None
        self._calls[turn], self.ready[call] = call, graph
        return graph

    def _refuse(self, error: AllReduceError) -> None:
        self.close()
        log.warning("eager calls are launched as kernels, which takes the host longer: %s", error)

    def close(self) -> None:
        self.ready.clear()
        while self._graphs:
            self._graphs.pop().close()
