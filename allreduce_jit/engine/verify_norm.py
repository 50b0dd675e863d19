"""What an engine proves of calls with a norm before it makes them: every kernel of a family against the exact bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch

from ..errors import SetupError
from ..policy.norm import GROUP
from ..policy.operation import ITEMSIZE, OpSpec
from . import norm_reference, reference

if TYPE_CHECKING:
    from .base import KernelEngine

ROWS = 3
EPS = 1e-5
SEED = 2026
_PASSES = 2  # through all kernels: both parities
_REPEATED = 3  # calls as callers make them: as kernels, by graphs that are updated, and by those that are ready


def verify_norms(engine: KernelEngine, family: OpSpec) -> None:
    """A few rows through every kernel of ``family``, then as callers have it. Collective.

    Raises:
        SetupError: a result is wrong; CommunicatorFailed: a call did not complete.
    """
    config, norm = engine.config, family.epilogue
    assert norm is not None, "a family with a norm"
    strides = (family.hidden // GROUP, 1) if norm.quant == "group" else (0, 0)
    spec = replace(family, shape=(ROWS, family.hidden), epilogue=replace(norm, eps=EPS, scale_strides=strides))
    runs: list[tuple[str, Callable[..., None], int]] = [
        (f"{plan.algorithm} in blocks of {plan.block} threads", partial(engine.run, spec, plan), 1)
        for plan in engine.verification_plans(spec)
    ]
    if runs and engine.plan(spec).algorithm == engine.verification_plans(spec)[0].algorithm:
        runs.append(("a call", engine.prepared(spec), _REPEATED))
    for turn in range(_PASSES):
        want = _tensors(spec, _sum(spec, config.world_size, turn), turn)
        norm_reference.run(replace(spec, operation="norm"), want)
        for what, run, times in runs:
            tensors = [tensor.to(config.device) for tensor in _tensors(spec, _input(spec, config.rank, turn), turn)]
            for _ in range(times):
                run(*tensors)
            torch.cuda.synchronize(config.device)
            engine.check()
            for pointer, found, right in zip(spec.pointers, tensors, want, strict=True):
                if pointer.name != "input" and (difference := reference.compare(found.cpu(), right)).wrong:
                    raise SetupError(
                        f"rank {config.rank}: {what}, {ROWS}x{spec.hidden} {spec.dtype}: {pointer.name}: {difference}"
                    )


def _tensors(spec: OpSpec, x: torch.Tensor, turn: int) -> list[torch.Tensor]:
    """The tensors of a call, on the CPU; results are poisoned."""
    norm, shape, dtype = spec.epilogue, (spec.rows, spec.hidden), getattr(torch, spec.dtype)
    assert norm is not None
    made: dict[str, torch.Tensor] = {
        "input": x,
        "output": torch.empty(shape, dtype=dtype if norm.quant == "none" else norm_reference.E4M3),
        "residual": _random(spec, "residual", turn).view(shape),
        "weight": _random(spec, "weight", turn)[: spec.hidden].to(getattr(torch, norm.weight)),
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


def _input(spec: OpSpec, rank: int, turn: int) -> torch.Tensor:
    """What ``rank`` adds: a row of any bits, infinities, subnormals and NaNs among them, which make its norm NaN; then rows of numbers."""
    x = _random(spec, rank, turn).view(spec.rows, spec.hidden).clone()
    bits = torch.Generator().manual_seed(SEED + 100 * turn + rank)
    words = spec.hidden * ITEMSIZE[spec.dtype] // 4
    row = torch.randint(-(1 << 31), 1 << 31, (words,), generator=bits).to(torch.int32)
    row[7] = -1  # all ones: what a slot that holds nothing looks like
    x[0] = row.view(x.dtype)
    return x


def _sum(spec: OpSpec, world_size: int, turn: int) -> torch.Tensor:
    return reference.ordered_sum(_input(spec, rank, turn) for rank in range(world_size))


def _random(spec: OpSpec, what: str | int, turn: int) -> torch.Tensor:
    number = {"residual": 100, "weight": 101}[what] if isinstance(what, str) else what
    return reference.values(SEED + turn, number, spec.numel, getattr(torch, spec.dtype))
