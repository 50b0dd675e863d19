"""What an engine proves before it is used: with the calls, streams, graphs and slots that service will use.

``can_access_peer`` is no proof: on some machines peer writes are dropped or damaged, some only beyond some address.
What set-up has not tried is not first tried in service.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import SetupError
from ..inputs import maker, tensor_guard
from ..policy.operation import OpSpec
from . import reference
from .verify_norm import verify_norms

if TYPE_CHECKING:
    from ..policy.plan import Plan
    from .base import KernelEngine
    from .protocol import EagerCall

READ_BYTES = 64 << 10
VERIFY_BYTES = 64 << 10
LAUNCHES = 8  # of a call of several; a stream never has 3 i + 1
CHUNK = 1 << 20  # elements that are filled and compared at once: temporary tensors stay small


def verify(engine: KernelEngine, families: Sequence[OpSpec], memory: bool) -> None:
    """Calls of ``families`` through every kernel against the exact result; with ``memory`` also calls on several streams, and through
    every slot, which are alike for all families. Collective.

    Takes 0.16 s for all-reduces on 2 H200s, most of it for torch to load the kernels that compare; the staging limit bounds what the
    slots take.

    Raises:
        SetupError: a sum is wrong; CommunicatorFailedError: a call did not complete.
    """
    for family in families:
        if family.epilogue is None:
            _kernels(engine, family)
        else:
            verify_norms(engine, family)
    if memory:
        _streams(engine)
        _slots(engine)


def _kernels(engine: KernelEngine, family: OpSpec) -> None:
    """Random data through every kernel, twice (both parities)."""
    world_size, rank, device = engine.config.world_size, engine.config.rank, engine.config.device
    dtype = getattr(torch, family.dtype)
    # Random bits: finite values of all magnitudes, infinities, subnormals and NaNs, all ones among them.
    generator = torch.Generator().manual_seed(2026 + dtype.itemsize)
    bits = torch.randint(-(1 << 31), 1 << 31, (world_size, VERIFY_BYTES // 4), generator=generator)
    bits[:, 7] = -1
    inputs = bits.to(torch.int32).view(dtype)
    want = reference.ordered_sum(inputs)
    whole, ragged = (replace(family, shape=(VERIFY_BYTES // dtype.itemsize - less,)) for less in (0, 1))
    # Whole packets and not: the two forms of every kernel. Then as callers have it. Twice: both parities.
    runs: list[tuple[str, Callable, OpSpec, int]] = [
        (plan.algorithm, partial(engine.run, spec, plan), spec, 1)
        for spec in (whole, ragged)
        for plan in engine.verification_plans(spec)
    ]
    plan = several_launches(engine, whole)
    several = engine.prepare(whole, plan, shape_id=0)
    several.as_graph = True
    engine._graph_cache.make(several.aligned[0][0])
    repeated = 3  # as kernels, by graphs that are updated, and by those that are ready
    runs.append((f"{LAUNCHES} launches of {plan.algorithm}", several, whole, repeated))
    if engine.plan(whole).path == engine.path:  # as callers have it, once all ranks have verified it
        runs.append(("a call", engine.prepared(whole), whole, repeated))
        if engine.c_calls:
            runs.append(("a call in C", _in_c(engine, whole), whole, repeated))
    for turn, (what, run, spec, times) in enumerate(runs * 2):
        # Turned by a little, so that what an earlier round left behind is not taken for this one's.
        x = inputs[rank].roll(turn)[: spec.numel].to(device)
        out = torch.empty_like(x)
        for _ in range(times):
            run(x, out)
        torch.cuda.synchronize(device)
        engine.check()
        difference = reference.compare(out.cpu(), want.roll(turn)[: spec.numel])
        if difference.wrong:
            raise SetupError(f"rank {rank}: {what} of {spec.numel} {spec.dtype} elements: {difference}")


def _in_c(engine: KernelEngine, spec: OpSpec) -> Callable[[torch.Tensor, torch.Tensor], None]:
    """As the front has it: what C declines, Python calls."""
    made: EagerCall | None = None

    def run(x: torch.Tensor, out: torch.Tensor) -> None:
        nonlocal made
        made = made or engine.in_c(spec, tensor_guard(x), maker(x))
        if made is None or made(x, out) is None:
            engine.prepared(spec)(x, out)

    return run


def several_launches(engine: KernelEngine, spec: OpSpec) -> Plan:
    """A plan of ``LAUNCHES`` launches, of the algorithm for the largest messages."""
    return replace(engine.verification_plans(spec)[-1], chunk=spec.numel // LAUNCHES)


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
    for spec, plan in engine.full_plans():
        for turn in range(2):
            x = torch.empty(spec.numel, device=engine.config.device)
            _fill(x, engine.config.rank, turn)
            engine.run(spec, plan, x, x)
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
