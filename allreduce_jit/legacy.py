"""Legacy: Triton kernels that push over any peer-to-peer memory, PCIe included (kernels/triton)."""

from __future__ import annotations

import ctypes

import torch

from .driver import Launch
from .engine import DTYPE_NAMES, KernelEngine, EngineConfig
from .kernel import ITEMSIZE
from .plan import PACKET, Plan, legacy_layout, legacy_part, legacy_plan, legacy_shape
from .triton_kernels.legacy import BLOCK_BYTES, NUM_WARPS, signature

THREADS = 32 * NUM_WARPS


class LegacyEngine(KernelEngine):
    """One-shot and two-shot push all-reduce that relies on nothing but peer stores of whole elements."""

    path = "legacy"
    numbers = {3: "legacy_one_shot", 4: "legacy_two_shot"}

    def __init__(self, config: EngineConfig):
        layout = legacy_layout(config.world_size, config.settings.staging_mb << 20, BLOCK_BYTES)
        super().__init__(config, layout)
        self._kernels: dict[tuple[str, str, bool], tuple[object, int]] = {}
        self._tables: dict[str, torch.Tensor] = {}
        self._launches: dict[tuple[str, str, bool, int], tuple[dict[str, ctypes._SimpleCData], Launch]] = {}

    def plan(self, numel: int, dtype: str) -> Plan:
        config = self.config
        return legacy_plan(
            config.world_size, dtype, numel, self.layout, BLOCK_BYTES, THREADS, config.nvlink, config.deterministic
        )

    def run(self, plan: Plan, x: torch.Tensor, out: torch.Tensor) -> None:
        with torch.cuda.device(self._raw_device):
            self._run(plan, x, out, torch._C._cuda_getCurrentRawStream(self._raw_device))

    def _register(self, spec, entry, artifact, kernel) -> None:
        constants = dict(spec.constants)
        self._kernels[entry, constants["DTYPE"], constants["VECTOR"]] = (kernel, artifact.shared_bytes)

    def _bind(self) -> None:
        for algorithm, region in self.layout.regions.items():
            addresses = [address + region.offset for address in self.memory.addresses]
            self._tables[algorithm] = torch.tensor(addresses, dtype=torch.int64, device=self.config.device)

    def _verification_plans(self, numel: int, dtype: torch.dtype) -> list[Plan]:
        # Both kernels in both forms: an odd number of elements takes the scalar one, a whole one the vector one.
        name = DTYPE_NAMES[dtype]
        layout, world_size = self.layout, self.config.world_size
        return [
            legacy_shape(algorithm, world_size, name, n, layout, BLOCK_BYTES, THREADS)
            for algorithm in self.layout.regions
            for n in (numel, numel - numel % (PACKET // ITEMSIZE[name]))
        ]

    def _launch(self, x: torch.Tensor, out: torch.Tensor, stream: int) -> None:
        self._run(self.plan(x.numel(), DTYPE_NAMES[x.dtype]), x, out, stream)

    def _run(self, plan: Plan, x: torch.Tensor, out: torch.Tensor, stream: int) -> None:
        dtype = DTYPE_NAMES[x.dtype]
        source, target, left = x.data_ptr(), out.data_ptr(), x.numel()
        while left > 0:
            numel = min(left, plan.chunk)
            nbytes = numel * ITEMSIZE[dtype]
            vector = (source | target | nbytes) % PACKET == 0
            part = legacy_part(self.config.world_size, numel, BLOCK_BYTES // ITEMSIZE[dtype])
            blocks = part * ITEMSIZE[dtype] if plan.algorithm == "legacy_two_shot" else nbytes
            arguments, launch = self._prepared(plan.algorithm, dtype, vector, -(-blocks // BLOCK_BYTES))
            arguments["x"].value, arguments["out"].value, arguments["numel"].value = source, target, numel
            if "part" in arguments:
                arguments["part"].value = part
            launch(stream)
            source, target, left = source + nbytes, target + nbytes, left - numel

    def _prepared(self, algorithm: str, dtype: str, vector: bool, grid: int):
        key = (algorithm, dtype, vector, grid)
        if key not in self._launches:
            kernel, shared_bytes = self._kernels[algorithm, dtype, vector]
            arguments = self._arguments(algorithm)
            # Triton's two trailing scratch pointers. No dependent launch: the protocol leans on kernel boundaries.
            values = [*arguments.values(), ctypes.c_uint64(0), ctypes.c_uint64(0)]
            self._launches[key] = (arguments, Launch(kernel, values, grid, THREADS, shared_bytes))
        return self._launches[key]

    def _arguments(self, algorithm: str) -> dict[str, ctypes._SimpleCData]:
        known = {
            "table": self._tables[algorithm].data_ptr(),
            "epoch": self.state.epochs[algorithm],
            "control": self.state.control,
            "report": self.state.report,
            "rank": self.config.rank,
            "capacity": self.layout.regions[algorithm].capacity,
        }
        ctype = {"i32": ctypes.c_int32, "i64": ctypes.c_int64}
        return {n: ctype[t](known.get(n, 0)) for n, t in signature(algorithm).items() if t in ctype}
