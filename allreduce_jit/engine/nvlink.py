"""The engine of path V2: NVRTC kernels that push over NVLink (kernels/cuda)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from ..abi import Args, Channel
from ..jit.cache import Artifact
from ..policy import nvlink
from ..policy.catalogue import NVLINK_ALGORITHMS, KernelSpec, entry, nvlink_modules
from ..policy.operation import ITEMSIZE, OpSpec, all_reduce
from ..policy.plan import MAX_BLOCK, PACKET, Plan
from .base import EngineConfig, KernelEngine
from .driver import KernelLaunch
from .failure import tag
from .prepared import PreparedCall, binding


class NvlinkEngine(KernelEngine):
    """Push all-reduce for GPUs that are all connected by NVLink."""

    path = "v2"
    channel_bytes = ctypes.sizeof(Channel)

    def __init__(self, config: EngineConfig):
        tuned = config.tuned or {}
        self.bands = {dtype: nvlink.make_bands(config.world_size, config.max_ctas, tuned.get(dtype)) for dtype in ITEMSIZE}
        bands = chain.from_iterable(self.bands.values())
        super().__init__(config, nvlink.make_layout(config.world_size, config.settings.staging_mb << 20, bands, config.max_ctas))
        # A launch that starts early occupies SMs beside the one before it.
        early = config.max_ctas is None and int(config.arch.removeprefix("sm_")) >= 90
        self._pdl = config.settings.pdl and early
        self._kernels: dict[str, Any] = {}

    def plan(self, spec: OpSpec) -> Plan:
        return nvlink.make_plan(spec, self.config.world_size, self.bands[spec.dtype], self.layout)

    def takes(self, spec: OpSpec) -> bool:
        return spec.family in self.families  # at any size

    def verification_plans(self, spec: OpSpec) -> list[Plan]:
        # Blocks of one warp: the most blocks, channels and guards' neighbours that so few elements can have. With few SMs no
        # more blocks than those: capacities allow for that many of the largest.
        block = 32 if self.config.max_ctas is None else MAX_BLOCK
        return [nvlink.plan_of(name, block, spec, self.config.world_size, self.layout) for name in self.layout.regions]

    def full_plans(self) -> Iterator[tuple[OpSpec, Plan]]:
        for name, region in self.layout.regions.items():
            what = NVLINK_ALGORITHMS[name]
            parts = self.config.world_size if what.parts else 1
            # Three launches of a stream use all of its buffers, as far as launches go.
            packets = 3 * min(region.capacity, nvlink.RESIDENT_PACKETS) if what.stream else region.capacity
            spec = all_reduce("float32", packets * parts * PACKET // ITEMSIZE["float32"])
            yield spec, nvlink.plan_of(name, MAX_BLOCK, spec, self.config.world_size, self.layout)

    def prepare(self, spec: OpSpec, plan: Plan, shape_id: int) -> PreparedCall:
        world_size, region = self.config.world_size, self.layout.regions[plan.algorithm]
        forms: dict[bool, list] = {True: [], False: []}  # whole, aligned packets or not
        for piece in nvlink.launches(plan, spec, world_size):
            args = Args(
                own=self.memory.addresses[self.config.rank],
                numel=piece.numel,
                total=spec.numel,
                slots=region.offset,
                channels=self.state.channels + region.first_channel * self.channel_bytes,
                control=self.state.control,
                report=self.state.report,
                rank=self.config.rank,
                capacity=region.capacity,
                tag=tag(plan.algorithm, spec.dtype),
                shape_id=shape_id,
                **dict(piece.arguments),
            )
            args.staging[:world_size] = self.memory.addresses
            for whole, bindings in forms.items():
                kernel = self._kernels[entry(plan.algorithm, spec.dtype, world_size, whole)]
                launch = KernelLaunch(kernel, [args], piece.grid, plan.block, pdl=self._pdl)
                pointers = [
                    (ctypes.c_uint64.from_buffer(args, getattr(Args, pointer.name).offset), pointer.offset(piece.start))
                    for pointer in spec.pointers
                ]
                bindings.append(binding(launch, pointers))
        return PreparedCall(self, spec, forms[spec.nbytes % PACKET == 0], forms[False])

    def _modules(self, families: Sequence[OpSpec]) -> list[KernelSpec]:
        return nvlink_modules(self.config.world_size, families, few_sms=self.config.max_ctas is not None)

    def _register(self, spec: KernelSpec, name: str, artifact: Artifact, kernel: Any) -> None:
        self._kernels[name] = kernel
