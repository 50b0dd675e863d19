"""Legacy: Triton kernels that push over any peer-to-peer memory, PCIe included (kernels/triton)."""

from __future__ import annotations

import ctypes

import torch

from .driver import Launch
from .engine import DTYPE_NAMES, KernelEngine, Place
from .plan import PACKET, Plan, legacy_layout, legacy_part, legacy_plan
from .triton_kernels.legacy import BLOCK_BYTES, NUM_WARPS

THREADS = 32 * NUM_WARPS


class LegacyEngine(KernelEngine):
    """One-shot and two-shot push all-reduce that relies on nothing but peer stores of whole elements."""

    path = "legacy"
    algorithms = {3: "legacy_one_shot", 4: "legacy_two_shot"}

    def __init__(self, place: Place):
        layout = legacy_layout(place.world_size, place.settings.staging_mb << 20, BLOCK_BYTES)
        channels = layout.one_shot_capacity // BLOCK_BYTES
        super().__init__(place, layout, (channels, channels))
        self._kernels: dict[tuple[str, str, bool], tuple[object, int]] = {}
        self._tables: dict[str, ctypes.Array] = {}
        self._launches: dict[tuple[str, str, bool, int], tuple[dict[str, ctypes._SimpleCData], Launch]] = {}

    def plan(self, numel: int, dtype: str) -> Plan:
        place = self.place
        return legacy_plan(
            place.world_size, dtype, numel, self.layout, BLOCK_BYTES, THREADS, place.nvlink, place.deterministic
        )

    def run(self, plan: Plan, x: torch.Tensor, out: torch.Tensor) -> None:
        with torch.cuda.device(self._raw_device):
            self._launch_plan(plan, x, out, torch._C._cuda_getCurrentRawStream(self._raw_device))
