"""The engine of path V2: NVRTC kernels that push over NVLink (kernels/cuda)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

from ..abi import Args, Channel
from ..jit.cache import Artifact
from ..policy import nvlink, nvlink_norm
from ..policy.catalogue import NVLINK_ALGORITHMS, KernelSpec, entry, nvlink_modules
from ..policy.norm_catalogue import has_clusters, norm_module
from ..policy.norm_forms import Form, NormBand
from ..policy.nvlink_norm import NormPlan
from ..policy.operation import ITEMSIZE, OpSpec, all_reduce
from ..policy.plan import MAX_BLOCK, PACKET, Launch, Plan, Region
from .base import EngineConfig, KernelEngine
from .driver import KernelLaunch
from .failure import tag
from .nvlink_norm import prepare
from .prepared import PreparedCall, binding


class NvlinkEngine(KernelEngine):
    """Push all-reduce for GPUs that are all connected by NVLink, and the norm of its rows in the same kernel."""

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
        config = self.config
        if spec.epilogue is None:
            return nvlink.make_plan(spec, config.world_size, self.bands[spec.dtype], self.layout)
        return nvlink_norm.make_plan(spec, config.world_size, self._norm_bands(spec.family), self.layout, config.max_ctas)

    def takes(self, spec: OpSpec) -> bool:
        if spec.epilogue is None:
            return spec.family in self.families  # at any size
        return spec.family in self.families and self.plan(spec).algorithm != nvlink_norm.APART

    def verification_plans(self, spec: OpSpec) -> Sequence[Plan]:
        if spec.epilogue is not None:
            config = self.config
            return [
                nvlink_norm.plan_of(form, spec, config.world_size, self.layout, config.max_ctas)
                for form in self._forms(spec.family)
            ]
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
        if isinstance(plan, NormPlan):
            return prepare(self, spec, plan, shape_id)
        world_size, region = self.config.world_size, self.layout.regions[plan.algorithm]
        forms: dict[bool, list] = {True: [], False: []}  # whole, aligned packets or not
        for piece in nvlink.launches(plan, spec, world_size):
            args = self.arguments(spec, plan.algorithm, region, piece, shape_id)
            for whole, bindings in forms.items():
                kernel = self._kernels[entry(plan.algorithm, spec.dtype, world_size, whole)]
                launch = KernelLaunch(kernel, [args], piece.grid, plan.block, pdl=self._pdl)
                pointers = [
                    (ctypes.c_uint64.from_buffer(args, getattr(Args, pointer.name).offset), pointer.offset(piece.start))
                    for pointer in spec.pointers
                ]
                bindings.append(binding(launch, pointers))
        return PreparedCall(self, spec, forms[spec.nbytes % PACKET == 0], forms[False])

    def arguments(self, spec: OpSpec, algorithm: str, region: Region, piece: Launch, shape_id: int) -> Args:
        """What a launch is told, but for the addresses of a call."""
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
            tag=tag(algorithm, spec.dtype),
            shape_id=shape_id,
            **dict(piece.arguments),
        )
        args.staging[: self.config.world_size] = self.memory.addresses
        return args

    def _norm_bands(self, family: OpSpec) -> tuple[NormBand, ...]:
        config, bare = self.config, self.bands[family.dtype]
        clusters = has_clusters(config.arch)
        return nvlink_norm.make_bands(family, config.world_size, bare, self.layout, clusters, config.max_ctas)

    def _forms(self, family: OpSpec) -> list[Form]:
        return list(dict.fromkeys(band.form for band in self._norm_bands(family)))

    def _modules(self, families: Sequence[OpSpec]) -> list[KernelSpec]:
        config = self.config
        bare = [family for family in families if family.epilogue is None]
        norms = [family for family in families if family.epilogue is not None]
        return [
            *nvlink_modules(config.world_size, bare, few_sms=config.max_ctas is not None),
            *(norm_module(form, family, config.world_size) for family in norms for form in self._forms(family)),
        ]

    def _register(self, spec: KernelSpec, name: str, artifact: Artifact, kernel: Any) -> None:
        self._kernels[name] = kernel
