"""V2: NVRTC kernels that push over NVLink (kernels/cuda)."""

from __future__ import annotations

import ctypes

import torch

from .driver import Launch
from .engine import DTYPE_NAMES, KernelEngine, EngineConfig
from .kernel import DTYPES
from .plan import Plan, v2_layout, v2_plan, v2_shape

MAX_PLANS = 4096


class Args(ctypes.Structure):
    """``Args`` of kernels/cuda/staging.cuh, field by field."""

    _fields_ = [
        ("staging", ctypes.c_uint64 * 8),
        ("input", ctypes.c_uint64),
        ("output", ctypes.c_uint64),
        ("numel", ctypes.c_uint64),
        ("epochs", ctypes.c_uint64),
        ("control", ctypes.c_uint64),
        ("report", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("capacity", ctypes.c_uint32),
    ]


class V2Engine(KernelEngine):
    """One-shot and two-shot push all-reduce for GPUs that are all connected by NVLink."""

    path = "v2"
    numbers = {1: "one_shot", 2: "two_shot"}

    def __init__(self, config: EngineConfig):
        super().__init__(config, v2_layout(config.world_size, config.settings.staging_mb << 20))
        self._pdl = config.settings.pdl and int(config.arch.removeprefix("sm_")) >= 90
        self._kernels: dict[str, object] = {}
        self._args: dict[str, Args] = {}
        self._launches: dict[tuple[str, int, int], Launch] = {}
        self._steps: dict[tuple[int, torch.dtype], tuple[Args, Launch, int]] = {}

    def plan(self, numel: int, dtype: str) -> Plan:
        return v2_plan(self.config.world_size, dtype, numel, self.config.sm_count, self.layout)

    def takes(self, numel: int, dtype: str) -> bool:
        return True

    def run(self, plan: Plan, x: torch.Tensor, out: torch.Tensor) -> None:
        with torch.cuda.device(self._raw_device):
            stream = torch._C._cuda_getCurrentRawStream(self._raw_device)
            _fire(*self._step(plan, x.dtype), x, out, stream)

    def _register(self, spec, entry, artifact, kernel) -> None:
        self._kernels[entry] = kernel

    def _bind(self) -> None:
        for algorithm, region in self.layout.regions.items():
            args = Args(
                epochs=self.state.epochs[algorithm],
                control=self.state.control,
                report=self.state.report,
                rank=self.config.rank,
                capacity=region.capacity,
            )
            args.staging[: self.config.world_size] = [address + region.offset for address in self.memory.addresses]
            self._args[algorithm] = args

    def _verification_plans(self, numel: int, dtype: torch.dtype) -> list[Plan]:
        shape = (self.config.world_size, DTYPE_NAMES[dtype], numel, 1, self.layout)
        return [v2_shape(algorithm, *shape) for algorithm in self.layout.regions]

    def _launch(self, x: torch.Tensor, out: torch.Tensor, stream: int) -> None:
        key = (x.numel(), x.dtype)
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= MAX_PLANS:
                self._steps.clear()
            step = self._steps[key] = self._step(self.plan(key[0], DTYPE_NAMES[x.dtype]), x.dtype)
        _fire(*step, x, out, stream)

    def _step(self, plan: Plan, dtype: torch.dtype) -> tuple[Args, Launch, int]:
        args = self._args[plan.algorithm]
        name = f"{plan.algorithm}_{DTYPES[DTYPE_NAMES[dtype]]}_ws{self.config.world_size}"
        key = (name, plan.grid, plan.block)
        if key not in self._launches:
            self._launches[key] = Launch(self._kernels[name], [args], plan.grid, plan.block, pdl=self._pdl)
        return args, self._launches[key], plan.chunk


def _fire(args: Args, launch: Launch, chunk: int, x: torch.Tensor, out: torch.Tensor, stream: int) -> None:
    args.input = x.data_ptr()
    args.output = out.data_ptr()
    args.numel = left = x.numel()
    if left <= chunk:
        launch(stream)
        return
    while left > 0:
        args.numel = min(left, chunk)
        launch(stream)
        args.input += chunk * x.element_size()
        args.output += chunk * x.element_size()
        left -= chunk
