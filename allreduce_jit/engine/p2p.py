"""The engine of path legacy: Triton kernels that push over any peer-to-peer memory, PCIe included (kernels/triton)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any

from ..jit.cache import Artifact
from ..policy import p2p
from ..policy.catalogue import KernelSpec, p2p_modules
from ..policy.operation import ITEMSIZE, OpSpec, all_reduce
from ..policy.plan import PACKET, Plan
from ..triton_kernels.p2p import signature
from .base import EngineConfig, KernelEngine
from .driver import KernelLaunch
from .failure import tag
from .prepared import PreparedCall, binding

_ARGUMENTS = {"input": "x", "output": "out"}  # the kernels' names for the pointers of a call
_CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}


class P2PEngine(KernelEngine):
    """One-shot and two-shot push all-reduce that relies on nothing but peer stores of whole elements."""

    path = "legacy"
    channel_bytes = 4  # an epoch

    def __init__(self, config: EngineConfig):
        super().__init__(config, p2p.make_layout(config.world_size, config.settings.staging_mb << 20))
        tuned = config.tuned or {}
        self.limits = {dtype: p2p.make_limits(config.world_size, config.nvlink, tuned.get(dtype)) for dtype in ITEMSIZE}
        self._kernels: dict[tuple[str, str, bool], tuple[Any, int]] = {}

    def plan(self, spec: OpSpec) -> Plan:
        return p2p.make_plan(spec, self.config.world_size, self.limits[spec.dtype], self.layout, self.hands_over)

    def connect(self, handles: Sequence[str]) -> None:
        super().connect(handles)
        self.state.store_table(self.memory.addresses)

    def verification_plans(self, spec: OpSpec) -> list[Plan]:
        return [p2p.plan_of(name, spec, self.config.world_size, self.layout) for name in self.layout.regions]

    def full_plans(self) -> Iterator[tuple[OpSpec, Plan]]:
        for name, region in self.layout.regions.items():
            parts = self.config.world_size if name == "legacy_two_shot" else 1
            spec = all_reduce("float32", region.capacity * parts // ITEMSIZE["float32"])
            yield spec, p2p.plan_of(name, spec, self.config.world_size, self.layout)

    def prepare(self, spec: OpSpec, plan: Plan, shape_id: int) -> PreparedCall:
        forms: dict[bool, list] = {True: [], False: []}  # aligned addresses or not
        for piece in p2p.launches(plan, spec, self.config.world_size):
            for aligned, bindings in forms.items():
                vector = aligned and piece.numel * ITEMSIZE[spec.dtype] % PACKET == 0
                kernel, shared_bytes = self._kernels[plan.algorithm, spec.dtype, vector]
                of_launch = dict(piece.arguments) | {"numel": piece.numel, "total": spec.numel, "shape_id": shape_id}
                values = self._arguments(plan.algorithm, spec, of_launch)
                # Triton's two trailing scratch pointers. No dependent launch: the protocol leans on kernel boundaries.
                arguments = [*values.values(), ctypes.c_uint64(0), ctypes.c_uint64(0)]
                launch = KernelLaunch(kernel, arguments, piece.grid, plan.block, shared_bytes)
                pointers = [(values[_ARGUMENTS[p.name]], p.offset(piece.start)) for p in spec.pointers]
                bindings.append(binding(launch, pointers))
        return PreparedCall(self, spec, forms[True], forms[False])

    def _arguments(self, algorithm: str, spec: OpSpec, of_launch: dict[str, int]) -> dict[str, ctypes._SimpleCData]:
        """The kernel's arguments in order, but for the addresses of a call."""
        region = self.layout.regions[algorithm]
        known = of_launch | {
            "table": self.state.table,
            "staging": self.memory.addresses[self.config.rank],
            "epoch": self.state.channels + region.first_channel * self.channel_bytes,
            "control": self.state.control,
            "report": self.state.report,
            "slots": region.offset,
            "capacity": region.capacity,
            "rank": self.config.rank,
            "tag": tag(algorithm, spec.dtype),
            **dict.fromkeys(_ARGUMENTS.values(), 0),
        }
        return {name: _CTYPES[kind](known[name]) for name, kind in signature(algorithm).items() if kind in _CTYPES}

    def _modules(self, families: Sequence[OpSpec]) -> list[KernelSpec]:
        return p2p_modules(self.config.world_size, families)

    def _register(self, spec: KernelSpec, name: str, artifact: Artifact, kernel: Any) -> None:
        constants: dict[str, Any] = dict(spec.constants)
        self._kernels[name, constants["DTYPE"], constants["VECTOR"]] = (kernel, artifact.shared_bytes)
