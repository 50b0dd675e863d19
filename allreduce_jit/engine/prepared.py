"""Calls of one ``OpSpec``, ready to be made again and again: the host's part of an eager call."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..inputs import NO_ADDRESS, raise_no_memory
from ..policy.operation import OpSpec
from ..policy.plan import PACKET
from ..torch_private import current_raw_stream, stream_is_capturing
from .driver import KernelLaunch, failure
from .graph_cache import repeats_as_graph
from .streams import PER_THREAD

if TYPE_CHECKING:
    from .base import KernelEngine

Argument = ctypes._SimpleCData
# A launch, with its arguments for the pointers of the operation (input, output, others), each followed by how far into that tensor
# it begins, in bytes. Flat, as unpacking it is a part of every eager call.
Binding = tuple[KernelLaunch, Argument, int, Argument, int, tuple[tuple[Argument, int], ...]]


def binding(launch: KernelLaunch, pointers: Sequence[tuple[Argument, int]]) -> Binding:
    """``pointers``: (argument, offset in bytes) of each pointer of the operation."""
    (x, x_offset), (out, out_offset), *rest = pointers
    return launch, x, x_offset, out, out_offset, tuple(rest)


class PreparedCall:
    """Calls of one ``OpSpec``: nothing is left to look up or to plan.

    Attributes:
        spec: what is called.
        aligned: the launches of tensors at addresses that are multiples of 16.
        unaligned: those of any others.
        as_graph: whether calls that are repeated are launched as graphs.
    """

    __slots__ = ("engine", "spec", "aligned", "unaligned", "as_graph")

    def __init__(self, engine: KernelEngine, spec: OpSpec, aligned: Sequence[Binding], unaligned: Sequence[Binding]):
        self.engine, self.spec, self.aligned, self.unaligned = engine, spec, aligned, unaligned
        self.as_graph = repeats_as_graph(len(aligned), spec.nbytes)

    def __call__(self, x: torch.Tensor, out: torch.Tensor, *others: torch.Tensor) -> None:
        """Launch on the current stream of the engine's device, which is the current one.

        Args:
            x, out, others: one tensor per pointer of the operation, contiguous; ``out`` may be ``x``.

        Raises:
            CommunicatorFailedError: an earlier call did not complete; nothing was launched.
            InputError: a tensor has no memory any more.
        """
        engine = self.engine
        if engine._stopped or engine.state.words[0]:
            engine._refuse()
        stream = current_raw_stream(engine._raw_device)
        call = self, x.data_ptr(), out.data_ptr()
        if others:
            call += tuple([tensor.data_ptr() for tensor in others])
        if call[1] < NO_ADDRESS or call[2] < NO_ADDRESS or others and min(call[3:]) < NO_ADDRESS:
            raise_no_memory((x, out, *others), engine.config.rank)
        lock, order = engine._lock, engine._streams
        try:  # a with statement takes twice as long
            lock.acquire()
            # The default stream is never captured; asking costs as much as all of these lines.
            if stream and stream_is_capturing():
                order.enter_captured(stream)
                self.bind(call[1:], stream)
                return
            if stream != order.last:
                order.enter(stream)
                engine._graph_cache.stream.value = stream
            graph = None
            if self.as_graph and not order.priority:  # the kernels of a graph do not take a stream's priority over
                graph = engine._graph_cache.ready.get(call) or engine._graph_cache.assign(call)
            if graph is None:
                self.bind(call[1:], stream)
            elif error := graph.launch():
                raise failure("graph launch", error)
            if stream == PER_THREAD:
                order.leave_per_thread()
        finally:
            lock.release()

    def run(self, *tensors: torch.Tensor) -> None:
        """Launch as it is, on the current stream: no order among streams, no graph."""
        self.bind([tensor.data_ptr() for tensor in tensors], current_raw_stream(self.engine._raw_device))

    def bind(self, addresses: Sequence[int], stream: int | None = None) -> Sequence[Binding]:
        """Have the arguments of the launches hold these addresses; given a stream, launch each one as soon as they do."""
        source, target, *others = addresses
        low_bits = source | target
        for address in others:
            low_bits |= address
        bindings = self.unaligned if low_bits % PACKET else self.aligned
        for launch, x, x_offset, out, out_offset, rest in bindings:
            x.value = source + x_offset
            out.value = target + out_offset
            for (argument, offset), address in zip(rest, others) if rest else ():
                argument.value = address + offset
            if stream is not None:
                launch(stream)
        return bindings
