"""What an engine proves before it is used: with the calls, streams, graphs and slots that service will use.

``can_access_peer`` is no proof: on some machines peer writes are dropped or damaged, some only beyond some address.
What set-up has not tried is not first tried in service.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import SetupError
from ..policy.catalogue import DTYPES
from . import reference

if TYPE_CHECKING:
    from ..policy.plan import Plan
    from .base import KernelEngine

READ_BYTES = 64 << 10
VERIFY_BYTES = 64 << 10
LAUNCHES = 8  # of a call of several; a stream never has 3 i + 1
CHUNK = 1 << 20  # elements that are filled and compared at once: temporary tensors stay small


def verify(engine: KernelEngine) -> None:
    """All-reduce through every kernel, on several streams, and through every slot, against the exact result. Collective.

    Takes 0.16 s on 2 H200s, most of it for torch to load the kernels that compare; the staging limit bounds what the slots take.

    Raises:
        SetupError: a sum is wrong; CommunicatorFailed: a call did not complete.
    """
    for number, dtype in enumerate(getattr(torch, name) for name in DTYPES):
        _kernels(engine, dtype, first=number == 0)
    _streams(engine)
    _slots(engine)


def _kernels(engine: KernelEngine, dtype: torch.dtype, first: bool) -> None:
    """Random data through every kernel, twice (both parities)."""
    from .base import DTYPE_NAMES, Prepared

    world_size, rank, device = engine.config.world_size, engine.config.rank, engine.config.device
    # Random bits: finite values of all magnitudes, infinities, subnormals and NaNs, all ones among them.
    generator = torch.Generator().manual_seed(2026 + dtype.itemsize)
    bits = torch.randint(-(1 << 31), 1 << 31, (world_size, VERIFY_BYTES // 4), generator=generator)
    bits[:, 7] = -1
    inputs = bits.to(torch.int32).view(dtype)
    want = reference.ordered_sum(inputs)
    whole = VERIFY_BYTES // dtype.itemsize
    # Whole packets and not: the two forms of every kernel. Then as callers have it. Twice: both parities.
    runs: list[tuple[str, Callable, int, int]] = [
        (plan.algorithm, partial(engine.run, plan), numel, 1)
        for numel in (whole, whole - 1)
        for plan in engine._verification_plans(numel, dtype)
    ]
    plan = several_launches(engine, whole, dtype)
    several = Prepared(engine, engine._step(plan, whole, dtype, config=0), replayed=True)
    if first:
        engine._graph_cache.make(several.step.whole[0][0])
    again = 3  # as kernels, by graphs that are updated, and by those that are ready
    runs.append((f"{LAUNCHES} launches of {plan.algorithm}", several.all_reduce, whole, again))
    if engine.takes(whole, DTYPE_NAMES[dtype]):
        runs.append(("a call", engine.all_reduce, whole, again))
    for turn, (what, run, numel, times) in enumerate(runs * 2):
        # Turned by a little, so that what an earlier round left behind is not taken for this one's.
        x = inputs[rank].roll(turn)[:numel].to(device)
        out = torch.empty_like(x)
        for _ in range(times):
            run(x, out)
        torch.cuda.synchronize(device)
        engine.check()
        difference = reference.compare(out.cpu(), want.roll(turn)[:numel])
        if difference.wrong:
            raise SetupError(f"rank {rank}: {what} of {numel} {dtype} elements: {difference}")


def several_launches(engine: KernelEngine, numel: int, dtype: torch.dtype) -> Plan:
    """A plan of ``LAUNCHES`` launches, of the algorithm for the largest messages."""
    return replace(engine._verification_plans(numel, dtype)[-1], chunk=numel // LAUNCHES)


def _streams(engine: KernelEngine) -> None:
    """Calls on streams in turn, eager and as the branches of one captured graph, without any order but the engine's own."""
    device = engine.config.device
    streams = [torch.cuda.Stream(device) for _ in range(2)]
    tensors = [torch.empty(numel, device=device) for numel in (1000, 16_000, 1000, 16_000)]
    outputs = [torch.empty_like(x) for x in tensors]

    def calls() -> None:
        for i, (x, out) in enumerate(zip(tensors, outputs)):
            with torch.cuda.stream(streams[i % 2]):
                engine.all_reduce(x, out)

    for turn in range(4):
        for seed, x in enumerate(tensors):
            _fill(x, engine.config.rank, turn + seed)
        torch.cuda.synchronize(device)
        if turn < 2:
            calls()
        else:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.stream(streams[0]):
                graph.capture_begin(capture_error_mode="thread_local")
                try:
                    streams[1].wait_stream(streams[0])
                    calls()
                    streams[0].wait_stream(streams[1])
                finally:
                    graph.capture_end()
            graph.replay()
        torch.cuda.synchronize(device)
        engine.check()
        for seed, out in enumerate(outputs):
            _compare(engine, out, turn + seed, "a captured call" if turn > 1 else "a call on another stream")


def _slots(engine: KernelEngine) -> None:
    """Every slot of every buffer: what a machine does to the first bytes of the staging memory proves nothing of the last."""
    for plan, numel in engine._full_plans():
        for turn in range(2):
            x = torch.empty(numel, device=engine.config.device)
            _fill(x, engine.config.rank, turn)
            engine.run(plan, x, x)
            torch.cuda.synchronize(engine.config.device)
            engine.check()
            _compare(engine, x, turn, f"{plan.algorithm} through all of its slots")


def _pattern(start: int, count: int, rank: int, seed: int, device: torch.device) -> torch.Tensor:
    """Integers of 20 bits that no two places or ranks share but by chance; sums of eight ranks are exact in fp32."""
    places = torch.arange(start, start + count, dtype=torch.int32, device=device)
    return places.mul_(-1640531535).add_(40503 * (8 * seed + rank) + 1).bitwise_right_shift_(12)


def _fill(x: torch.Tensor, rank: int, seed: int) -> None:
    for start in range(0, x.numel(), CHUNK):
        part = x[start : start + CHUNK]
        part.copy_(_pattern(start, part.numel(), rank, seed, x.device))


def _compare(engine: KernelEngine, out: torch.Tensor, seed: int, what: str) -> None:
    wrong = torch.zeros((), dtype=torch.int64, device=out.device)
    for start in range(0, out.numel(), CHUNK):
        part = out[start : start + CHUNK]
        addends = (_pattern(start, part.numel(), rank, seed, out.device) for rank in range(engine.config.world_size))
        wrong += (part != sum(addends)).sum()
    if count := int(wrong):
        raise SetupError(f"rank {engine.config.rank}: {what}, {out.numel()} float32 elements: {count} wrong")
