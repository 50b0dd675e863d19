"""V2: NVRTC kernels that push over NVLink (kernels/cuda)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from .driver import Launch
from .engine import DTYPE_NAMES, EngineConfig, KernelEngine
from .failure import tag
from .kernel import ITEMSIZE, V2_ALGORITHMS, KernelSpec, catalogue, entry
from .plan import PACKET, Plan, ceil_div, v2_bands, v2_layout, v2_plan, v2_shape

MAX_PLANS = 4096  # Control.met of staging.cuh


class Args(ctypes.Structure):
    """``Args`` of kernels/cuda/staging.cuh, field by field."""

    _fields_ = [
        ("staging", ctypes.c_uint64 * 8),
        ("input", ctypes.c_uint64),
        ("output", ctypes.c_uint64),
        ("numel", ctypes.c_uint64),
        ("total", ctypes.c_uint64),
        ("slots", ctypes.c_uint64),
        ("epochs", ctypes.c_uint64),
        ("control", ctypes.c_uint64),
        ("report", ctypes.c_uint64),
        ("rank", ctypes.c_uint32),
        ("capacity", ctypes.c_uint32),
        ("tag", ctypes.c_uint32),
        ("config", ctypes.c_uint32),
        ("launch", ctypes.c_uint32),
        ("last", ctypes.c_uint32),
    ]


class Piece(NamedTuple):
    """One launch of a call: ``numel`` elements from ``start`` on; ``last`` ends what a guard began."""

    start: int
    numel: int
    blocks: int
    last: bool


def launches(plan: Plan, numel: int, dtype: str, world_size: int) -> list[Piece]:
    """The launches of a call. Those of a stream share one guard, a block of the first; all others have their own."""
    algorithm = V2_ALGORITHMS[plan.algorithm]
    threads = plan.block * algorithm.packets
    found = []
    for start in range(0, numel, plan.chunk):
        count = min(plan.chunk, numel - start)
        packets = ceil_div(count * ITEMSIZE[dtype], PACKET * (world_size if algorithm.parts else 1))
        guard = 0 if algorithm.stream and start else 1
        last = not algorithm.stream or start + count == numel
        found.append(Piece(start, count, ceil_div(packets, threads) + guard, last))
    return found


@dataclass
class Step:
    """The launches of one shape of call: each with its arguments and where it begins, in bytes."""

    whole: list[tuple[Launch, Args, int]] = field(default_factory=list)
    ragged: list[tuple[Launch, Args, int]] = field(default_factory=list)


class V2Engine(KernelEngine):
    """Push all-reduce for GPUs that are all connected by NVLink."""

    path = "v2"

    def __init__(self, config: EngineConfig):
        self.bands = v2_bands(config.world_size, config.max_ctas, config.tuned)
        layout = v2_layout(config.world_size, config.settings.staging_mb << 20, self.bands, config.max_ctas)
        super().__init__(config, layout)
        # A launch that starts early occupies multiprocessors beside the one before it.
        early = config.max_ctas is None and int(config.arch.removeprefix("sm_")) >= 90
        self._pdl = config.settings.pdl and early
        self._kernels: dict[str, object] = {}
        self._steps: dict[tuple[int, torch.dtype], Step] = {}
        self._shapes: dict[tuple[int, torch.dtype], int] = {}

    def plan(self, numel: int, dtype: str) -> Plan:
        return v2_plan(self.config.world_size, dtype, numel, self.bands, self.layout)

    def takes(self, numel: int, dtype: str) -> bool:
        return True

    def _catalogue(self) -> list[KernelSpec]:
        return catalogue(self.path, self.config.world_size, narrow=self.config.max_ctas is not None)

    def _register(self, spec, name, artifact, kernel) -> None:
        self._kernels[name] = kernel

    def _verification_plans(self, numel: int, dtype: torch.dtype) -> list[Plan]:
        # Blocks of one warp: the most blocks, channels and guards' neighbours that so few elements can have.
        shape = (32, self.config.world_size, DTYPE_NAMES[dtype])
        return [v2_shape(name, *shape, numel, self.layout) for name in self.layout.regions]

    def run(self, plan: Plan, x: torch.Tensor, out: torch.Tensor) -> None:
        with torch.cuda.device(self._raw_device):
            step = self._step(plan, x.numel(), x.dtype, config=0)
            _fire(step, x.data_ptr(), out.data_ptr(), torch._C._cuda_getCurrentRawStream(self._raw_device))

    def _launch(self, x: torch.Tensor, out: torch.Tensor, stream: int) -> None:
        key = (x.numel(), x.dtype)
        step = self._steps.get(key)
        if step is None:
            if len(self._steps) >= MAX_PLANS - 1:
                self._steps.clear()
                self._shapes.clear()
            config = self._shapes[key] = len(self._shapes) + 1
            step = self._steps[key] = self._step(self.plan(key[0], DTYPE_NAMES[x.dtype]), *key, config)
        _fire(step, x.data_ptr(), out.data_ptr(), stream)

    def _step(self, plan: Plan, numel: int, dtype: torch.dtype, config: int) -> Step:
        name, world_size = DTYPE_NAMES[dtype], self.config.world_size
        region = self.layout.regions[plan.algorithm]
        step = Step()
        for i, piece in enumerate(launches(plan, numel, name, world_size)):
            args = Args(
                numel=piece.numel,
                total=numel,
                slots=region.offset,
                epochs=self.state.epochs[plan.algorithm],
                control=self.state.control,
                report=self.state.report,
                rank=self.config.rank,
                capacity=region.capacity,
                tag=tag(plan.algorithm, name),
                config=config,
                launch=i,
                last=piece.last,
            )
            args.staging[:world_size] = self.memory.addresses
            for whole, found in ((True, step.whole), (False, step.ragged)):
                kernel = self._kernels[entry(plan.algorithm, name, world_size, whole)]
                launch = Launch(kernel, [args], piece.blocks, plan.block, pdl=self._pdl)
                found.append((launch, args, piece.start * dtype.itemsize))
        if numel * dtype.itemsize % PACKET:
            step.whole = step.ragged
        return step


def _fire(step: Step, source: int, target: int, stream: int) -> None:
    for launch, args, offset in step.ragged if (source | target) % PACKET else step.whole:
        args.input = source + offset
        args.output = target + offset
        launch(stream)
