"""The engine of path host: NVRTC kernels that meet in pinned host memory (kernels/cuda/host_*.cu), for GPUs that cannot reach each other."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

from ..abi import Args, Channel, Control, Header
from ..jit.cache import Artifact
from ..policy import host
from ..policy.catalogue import KernelSpec, entry, host_modules
from ..policy.host import HOST_TABLES
from ..policy.operation import ITEMSIZE, OpSpec, all_reduce
from ..policy.plan import PACKET, Plan
from .base import EngineConfig, KernelEngine
from .driver import KernelLaunch
from .failure import tag
from .host_memory import HostStaging
from .prepared import PreparedCall, binding

_BLOCK = 64  # threads, of what verifies slots


class HostEngine(KernelEngine):
    """All-reduces through outboxes in host memory: each rank stores its data there once, and reads the peers'."""

    path = "host"
    channel_bytes = ctypes.sizeof(Channel)
    memory: HostStaging

    def __init__(self, config: EngineConfig):
        super().__init__(config, host.make_layout(config.world_size, config.settings.staging_mb << 20))
        tuned = config.tuned or {}
        self.bands = {dtype: tuned.get(dtype, HOST_TABLES[config.world_size]) for dtype in ITEMSIZE}
        early = config.max_ctas is None and int(config.arch.removeprefix("sm_")) >= 90
        self._pdl = config.settings.pdl and early
        self._kernels: dict[str, Any] = {}

    def plan(self, spec: OpSpec) -> Plan:
        return host.make_plan(spec, self.config.world_size, self.bands[spec.dtype], self.layout, self.config.max_ctas)

    def takes(self, spec: OpSpec) -> bool:
        return spec.family in self.families  # at any size

    def verification_plans(self, spec: OpSpec) -> list[Plan]:
        return [self._plan_of(name, spec) for name in self.layout.regions]

    def full_plans(self) -> Iterator[tuple[OpSpec, Plan]]:
        for name, region in self.layout.regions.items():
            packets = region.channels * region.capacity * host.chunk_packets(name)
            spec = all_reduce("float32", packets * PACKET // ITEMSIZE["float32"])
            yield spec, self._plan_of(name, spec)

    def _plan_of(self, name: str, spec: OpSpec) -> Plan:
        config = self.config
        return host.plan_of(name, _BLOCK, host.CHANNELS[name], spec, config.world_size, self.layout, config.max_ctas)

    def prepare(self, spec: OpSpec, plan: Plan, shape_id: int) -> PreparedCall:
        config, region = self.config, self.layout.regions[plan.algorithm]
        forms: dict[bool, list] = {True: [], False: []}  # whole, aligned packets or not
        for piece in host.launches(plan, spec):
            args = Args(
                own=self.memory.addresses[config.rank],
                numel=piece.numel,
                total=spec.numel,
                slots=region.offset,
                channels=self.state.channels + region.first_channel * self.channel_bytes,
                control=self.state.control,
                report=self.state.report,
                rank=config.rank,
                capacity=region.capacity,
                tag=tag(plan.algorithm, spec.dtype),
                shape_id=shape_id,
                **dict(piece.arguments),
            )
            args.staging[: config.world_size] = self.memory.addresses
            for whole, bindings in forms.items():
                kernel = self._kernels[entry(plan.algorithm, spec.dtype, config.world_size, whole)]
                launch = KernelLaunch(kernel, [args], piece.grid, plan.block, pdl=self._pdl)
                pointers = [
                    (ctypes.c_uint64.from_buffer(args, getattr(Args, pointer.name).offset), pointer.offset(piece.start))
                    for pointer in spec.pointers
                ]
                bindings.append(binding(launch, pointers))
        return PreparedCall(self, spec, forms[spec.nbytes % PACKET == 0], forms[False])

    def _staging(self) -> HostStaging:
        """Near its only reader, if there is one alone: a store over a longer way is not waited for, a load is. Else near its writer."""
        config = self.config
        near = config.bus_ids[1 - config.rank if config.world_size == 2 else config.rank] if config.bus_ids else None
        return HostStaging(self.layout.nbytes, config.rank, near)

    def _read_header(self, rank: int, offset: int, nbytes: int) -> bytes:
        return self.memory.peek(rank, offset, nbytes)

    def _write_abort(self, ranks: Sequence[int], code: int) -> None:
        """Peers' waits meet it in their headers; this rank's kernels, replayed ones too, where they begin."""
        for rank in ranks:
            self.memory.poke(rank, Header.abort.offset, code)
        self.side.write([self.state.control + Control.abort.offset], code)

    def _modules(self, families: Sequence[OpSpec]) -> list[KernelSpec]:
        return host_modules(self.config.world_size, [family for family in families if family.epilogue is None])

    def _register(self, spec: KernelSpec, name: str, artifact: Artifact, kernel: Any) -> None:
        self._kernels[name] = kernel
