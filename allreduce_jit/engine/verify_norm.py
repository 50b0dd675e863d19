"""What an engine proves of calls with a norm before it makes them: every kernel of a family against the exact bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ..errors import SetupError
from ..policy.norm import GROUP
from ..policy.nvlink_norm import APART
from ..policy.operation import ITEMSIZE, OpSpec
from . import norm_reference, reference

if TYPE_CHECKING:
    from .base import KernelEngine

ROWS = 3
EPS = 1e-5
SEED = 2026
_REPEATED = 3  # as kernels, by graphs that are updated, and by those that are ready


def verify_norms(engine: KernelEngine, family: OpSpec) -> None:
    """A few rows through every kernel of ``family``, as a launch and from graphs, then as callers have it, all twice: both parities.
    Collective.

    Raises:
        SetupError: a result is wrong; CommunicatorFailedError: a call did not complete.
    """
    config, norm = engine.config, family.epilogue
    assert norm is not None, "a family with a norm"
    strides = (family.hidden // GROUP, 1) if norm.quant == "group" else (0, 0)
    spec = replace(family, shape=(ROWS, family.hidden), epilogue=replace(norm, eps=EPS, scale_strides=strides))
    runs: list[tuple[str, Callable[..., None]]] = []
    for plan in engine.verification_plans(spec):
        kernel = engine.prepare(spec, plan, shape_id=0)
        engine._graph_cache.make(kernel.aligned[0][0])
        runs.append((f"{plan.algorithm} in blocks of {plan.block} threads", kernel))
    if engine.plan(spec).algorithm != APART:
        runs.append(("a call", engine.prepared(spec)))
    inputs = [_input(spec, rank) for rank in range(config.world_size)]
    mine, want = _tensors(spec, inputs[config.rank]), _tensors(spec, reference.ordered_sum(inputs))
    norm_reference.run(replace(spec, operation="norm"), want)
    for turn, (what, run) in enumerate(runs * 2):
        # Rows in turn, so that what an earlier round left behind is not taken for this one's.
        tensors = [tensor.to(config.device, copy=True) for tensor in turned(spec, mine, turn)]
        for _ in range(_REPEATED):
            run(*tensors)
        torch.cuda.synchronize(config.device)
        engine.check()
        for pointer, found, right in zip(spec.pointers, tensors, turned(spec, want, turn), strict=True):
            if pointer.name != "input" and (difference := reference.compare(found.cpu(), right)).wrong:
                raise SetupError(f"rank {config.rank}: {what}, {ROWS}x{spec.hidden} {spec.dtype}: {pointer.name}: {difference}")


def turned(spec: OpSpec, tensors: Sequence[torch.Tensor], turn: int) -> list[torch.Tensor]:
    """The tensors of the same call with its rows in another order."""
    return [
        reference.as_bits(tensor).roll(turn, 0).view(tensor.dtype) if pointer.stride else tensor
        for pointer, tensor in zip(spec.pointers, tensors, strict=True)
    ]


def _tensors(spec: OpSpec, x: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of a call, on the CPU; results are poisoned."""
    norm, shape, dtype = spec.epilogue, (spec.rows, spec.hidden), getattr(torch, spec.dtype)
    assert norm is not None
    made: dict[str, torch.Tensor] = {
        "input": x,
        "output": torch.empty(shape, dtype=dtype if norm.quant == "none" else norm_reference.E4M3),
        "residual": _random(spec, 100).view(shape),
        "weight": _random(spec, 101)[: spec.hidden].to(getattr(torch, norm.weight)),
        "residual_out": torch.empty(shape, dtype=dtype),
        "norm": torch.empty(shape, dtype=dtype),
    }
    written = ["output", "residual_out", "norm"]
    if norm.quant == "static":
        made["scale"] = torch.tensor([0.02])
    else:
        made["scale"] = torch.empty(spec.rows, spec.hidden // GROUP if norm.quant == "group" else 1)
        written.append("scale")
    for name in written:
        reference.poison(made[name])
    return [made[pointer.name] for pointer in spec.pointers]


def _input(spec: OpSpec, rank: int) -> torch.Tensor:
    """What ``rank`` adds: a row of any bits, infinities, subnormals and NaNs among them, which make its norm NaN; then rows of numbers."""
    x = _random(spec, rank).view(spec.rows, spec.hidden)
    bits = torch.Generator().manual_seed(SEED + rank)
    row = torch.randint(-(1 << 31), 1 << 31, (spec.hidden * ITEMSIZE[spec.dtype] // 4,), generator=bits).to(torch.int32)
    row[7] = -1  # all ones: what a slot that holds nothing looks like
    x[0] = row.view(x.dtype)
    return x


def _random(spec: OpSpec, number: int) -> torch.Tensor:
    return reference.values(SEED, number, spec.numel, getattr(torch, spec.dtype))
