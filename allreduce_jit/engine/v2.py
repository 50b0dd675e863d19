"""V2: NVRTC kernels that push over NVLink (kernels/cuda)."""

from __future__ import annotations

import ctypes
from itertools import chain
from typing import NamedTuple

import torch

from ..abi import Args, Channel
from ..policy.catalogue import ITEMSIZE, V2_ALGORITHMS, KernelSpec, catalogue, entry
from ..policy.plan import MAX_BLOCK, PACKET, RESIDENT_PACKETS, Plan, ceil_div, v2_bands, v2_layout, v2_plan, v2_shape
from .base import DTYPE_NAMES, EngineConfig, KernelEngine, Step
from .driver import Launch
from .failure import tag


class Piece(NamedTuple):
    """One launch of a call: ``numel`` elements from ``start`` on; ``last`` ends what a guard began.

    ``scatter`` and ``gather``: the buffers that a launch of a stream uses; others take turns by themselves.
    """

    start: int
    numel: int
    blocks: int
    last: bool
    scatter: int = 0
    gather: int = 0


_STREAM_SCATTERS = (2, 0, 3)  # the first launch's in an even epoch, one that others may lie over, the last launch's


def launches(plan: Plan, numel: int, dtype: str, world_size: int) -> list[Piece]:
    """The launches of a call. Those of a stream share one guard, a block of the first; all others have their own."""
    algorithm = V2_ALGORITHMS[plan.algorithm]
    threads = plan.block * algorithm.packets
    found = []
    starts = range(0, numel, plan.chunk)
    turn = 1 if len(starts) % 3 == 0 else 2  # in the direction in which the last launch meets the last buffer
    for i, start in enumerate(starts):
        count = min(plan.chunk, numel - start)
        packets = ceil_div(count * ITEMSIZE[dtype], PACKET * (world_size if algorithm.parts else 1))
        guard = 0 if algorithm.stream and start else 1
        last = not algorithm.stream or start + count == numel
        buffers = ()
        if algorithm.stream:
            buffers = _STREAM_SCATTERS[i * turn % 3], algorithm.gathers[(len(starts) - 1 - i) % 2]
        found.append(Piece(start, count, ceil_div(packets, threads) + guard, last, *buffers))
    return found


class V2Engine(KernelEngine):
    """Push all-reduce for GPUs that are all connected by NVLink."""

    path = "v2"
    channel_bytes = ctypes.sizeof(Channel)

    def __init__(self, config: EngineConfig):
        tuned = config.tuned or {}
        self.bands = {dtype: v2_bands(config.world_size, config.max_ctas, tuned.get(dtype)) for dtype in ITEMSIZE}
        bands = chain.from_iterable(self.bands.values())
        super().__init__(config, v2_layout(config.world_size, config.settings.staging_mb << 20, bands, config.max_ctas))
        # A launch that starts early occupies multiprocessors beside the one before it.
        early = config.max_ctas is None and int(config.arch.removeprefix("sm_")) >= 90
        self._pdl = config.settings.pdl and early
        self._kernels: dict[str, object] = {}

    def plan(self, numel: int, dtype: str) -> Plan:
        return v2_plan(self.config.world_size, dtype, numel, self.bands[dtype], self.layout)

    def takes(self, numel: int, dtype: str) -> bool:
        return True

    def _catalogue(self) -> list[KernelSpec]:
        return catalogue(self.path, self.config.world_size, narrow=self.config.max_ctas is not None)

    def _register(self, spec, name, artifact, kernel) -> None:
        self._kernels[name] = kernel

    def _verification_plans(self, numel: int, dtype: torch.dtype) -> list[Plan]:
        # Blocks of one warp: the most blocks, channels and guards' neighbours that so few elements can have. With few blocks
        # wanted, no more than those: capacities allow for that many of the largest.
        shape = (32 if self.config.max_ctas is None else MAX_BLOCK, self.config.world_size, DTYPE_NAMES[dtype])
        return [v2_shape(name, *shape, numel, self.layout) for name in self.layout.regions]

    def _full_plans(self) -> list[tuple[Plan, int]]:
        found = []
        for name, region in self.layout.regions.items():
            what = V2_ALGORITHMS[name]
            parts = self.config.world_size if what.parts else 1
            # Three launches of a stream use all of its buffers (_STREAM_SCATTERS and Algorithm.gathers), as far as launches go.
            packets = 3 * min(region.capacity, RESIDENT_PACKETS) if what.stream else region.capacity
            numel = packets * parts * PACKET // ITEMSIZE["float32"]
            found.append((v2_shape(name, MAX_BLOCK, self.config.world_size, "float32", numel, self.layout), numel))
        return found

    def _step(self, plan: Plan, numel: int, dtype: torch.dtype, config: int) -> Step:
        name, world_size = DTYPE_NAMES[dtype], self.config.world_size
        region = self.layout.regions[plan.algorithm]
        step = Step()
        for i, piece in enumerate(launches(plan, numel, name, world_size)):
            args = Args(
                own=self.memory.addresses[self.config.rank],
                numel=piece.numel,
                total=numel,
                slots=region.offset,
                channels=self.state.channels + region.first_channel * self.channel_bytes,
                control=self.state.control,
                report=self.state.report,
                rank=self.config.rank,
                capacity=region.capacity,
                tag=tag(plan.algorithm, name),
                shape_id=config,
                launch=i,
                scatter=piece.scatter,
                gather=piece.gather,
                last=piece.last,
            )
            args.staging[:world_size] = self.memory.addresses
            for whole, found in ((True, step.whole), (False, step.ragged)):
                kernel = self._kernels[entry(plan.algorithm, name, world_size, whole)]
                launch = Launch(kernel, [args], piece.blocks, plan.block, pdl=self._pdl)
                x, out = (ctypes.c_uint64.from_buffer(args, at) for at in (Args.input.offset, Args.output.offset))
                found.append((launch, x, out, piece.start * dtype.itemsize))
        if numel * dtype.itemsize % PACKET:
            step.whole = step.ragged
        return step
