"""Legacy: Triton kernels that push over any peer-to-peer memory, PCIe included (kernels/triton)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch

from ..policy.catalogue import ITEMSIZE
from ..policy.plan import PACKET, Plan, ceil_div, legacy_layout, legacy_part, legacy_plan, legacy_shape
from ..triton_kernels.p2p import BLOCK_BYTES, NUM_WARPS, signature
from .base import DTYPE_NAMES, EngineConfig, KernelEngine, Step
from .driver import Launch
from .failure import tag

THREADS = 32 * NUM_WARPS


class LegacyEngine(KernelEngine):
    """One-shot and two-shot push all-reduce that relies on nothing but peer stores of whole elements."""

    path = "legacy"
    channel_bytes = 4  # an epoch

    def __init__(self, config: EngineConfig):
        layout = legacy_layout(config.world_size, config.settings.staging_mb << 20, BLOCK_BYTES)
        super().__init__(config, layout)
        self._kernels: dict[tuple[str, str, bool], tuple[object, int]] = {}

    def plan(self, numel: int, dtype: str) -> Plan:
        config = self.config
        return legacy_plan(config.world_size, dtype, numel, self.layout, BLOCK_BYTES, THREADS, config.nvlink, not self.hands_over)

    def _register(self, spec, entry, artifact, kernel) -> None:
        constants = dict(spec.constants)
        self._kernels[entry, constants["DTYPE"], constants["VECTOR"]] = (kernel, artifact.shared_bytes)

    def connect(self, handles: Sequence[str]) -> None:
        super().connect(handles)
        self.state.store_table(self.memory.addresses)

    def _verification_plans(self, numel: int, dtype: torch.dtype) -> list[Plan]:
        # Both kernels in both forms: an odd number of elements takes the scalar one, a whole one the vector one.
        name = DTYPE_NAMES[dtype]
        layout, world_size = self.layout, self.config.world_size
        return [
            legacy_shape(algorithm, world_size, name, n, layout, BLOCK_BYTES, THREADS)
            for algorithm in self.layout.regions
            for n in (numel, numel - numel % (PACKET // ITEMSIZE[name]))
        ]

    def _full_plans(self) -> list[tuple[Plan, int]]:
        found = []
        for name, region in self.layout.regions.items():
            parts = self.config.world_size if name == "legacy_two_shot" else 1
            numel = region.capacity * parts // ITEMSIZE["float32"]
            found.append((legacy_shape(name, self.config.world_size, "float32", numel, self.layout, BLOCK_BYTES, THREADS), numel))
        return found

    def _step(self, plan: Plan, numel: int, dtype: torch.dtype, config: int) -> Step:
        name, itemsize = DTYPE_NAMES[dtype], dtype.itemsize
        step = Step()
        for start in range(0, numel, plan.chunk):
            count = min(plan.chunk, numel - start)
            part = legacy_part(self.config.world_size, count, BLOCK_BYTES // itemsize)
            per_peer = part if plan.algorithm == "legacy_two_shot" else count
            blocks = 1 + ceil_div(per_peer * itemsize, BLOCK_BYTES)  # the guard, and the data
            for aligned, found in ((True, step.whole), (False, step.ragged)):
                vector = aligned and count * itemsize % PACKET == 0
                kernel, shared_bytes = self._kernels[plan.algorithm, name, vector]
                values = self._arguments(plan.algorithm, name, numel=count, total=numel, part=part, shape_id=config)
                # Triton's two trailing scratch pointers. No dependent launch: the protocol leans on kernel boundaries.
                scratch = ctypes.c_uint64(0), ctypes.c_uint64(0)
                launch = Launch(kernel, [*values.values(), *scratch], blocks, THREADS, shared_bytes)
                found.append((launch, values["x"], values["out"], start * itemsize))
        return step

    def _arguments(self, algorithm: str, dtype: str, **of_launch: int) -> dict[str, ctypes._SimpleCData]:
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
            "tag": tag(algorithm, dtype),
            "x": 0,
            "out": 0,
        }
        ctype = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}
        return {name: ctype[kind](known[name]) for name, kind in signature(algorithm).items() if kind in ctype}
