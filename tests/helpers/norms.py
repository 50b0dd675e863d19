"""Calls of a norm for tests: rows on which bits go wrong first, every option, and what two ways to compute them differ in."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count, cycle

import torch

from allreduce_jit.engine import reference
from allreduce_jit.operands import operands
from allreduce_jit.policy.norm import GROUP, QUANTS, ROUNDINGS
from allreduce_jit.policy.operation import DTYPES

TINY = {"float32": 1e-24, "bfloat16": 1e-24, "float16": 1e-7}  # its square is 0 (fp16: its norm subnormal)


@dataclass(frozen=True)
class Case:
    """One call. ``rows`` from the sixth on are random; the first ones are those of ``rows_of``."""

    dtype: str
    hidden: int
    rows: int = 6
    rounding: str = "R"
    quant: str = "none"
    residual: bool = True
    weight_fp32: bool = False
    weight_bias: int = 0
    eps: float = 1e-6
    keep_norm: bool = False
    column_major: bool = False
    in_place: bool = False
    seed: int = 0


def cases(hiddens, rows=(6,), dtypes=tuple(DTYPES), roundings=ROUNDINGS, quants=QUANTS):
    """Every pair of dtype and hidden with every rounding and quantization; all other options in turn."""
    seeds, options = count(), cycle(range(2 * 3 * 5 * 7))  # in strides that have no factor in common with those of the loops
    for dtype in dtypes:
        for hidden in hiddens:
            for rounding in roundings:
                for quant in quants:
                    if quant == "group" and hidden % GROUP:
                        continue
                    for many in rows:
                        at = next(options)
                        yield Case(
                            dtype, hidden, many, rounding, quant,
                            residual=at % 3 != 0,
                            weight_fp32=at % 2 == 0,
                            weight_bias=at % 5 % 2,
                            eps=0.0 if at % 7 < 3 else 1e-5,
                            keep_norm=quant != "none" and at % 5 < 3,
                            column_major=quant == "group" and at % 7 % 2 == 0,
                            in_place=at % 3 == 1,
                            seed=next(seeds),
                        )  # fmt: skip


def rows_of(case: Case, which: int) -> torch.Tensor:
    """An operand like x: magnitudes far apart, normal ones, zeros of both signs, squares that underflow, that overflow, specials."""
    dtype = getattr(torch, case.dtype)
    generator = torch.Generator().manual_seed(2 * case.seed + which)
    normal = torch.randn(max(case.rows, 2), case.hidden, generator=generator)
    made = normal.to(dtype)
    spread = reference.values(case.seed, which, case.hidden, dtype)
    specials = made[:1].clone()
    specials[0, : case.hidden // 2] = reference.values(case.seed, which, case.hidden // 2, dtype, kind=reference.SPECIALS)
    largest = torch.finfo(dtype).max
    first = [
        spread[None],
        made[1:2],
        0 * made[:1],
        (normal[:1] * TINY[case.dtype]).to(dtype),
        (normal[:1] * largest / 8).to(dtype),
        specials,
    ]
    return torch.cat([*first, made[len(first) :]])[: case.rows]


def given(case: Case) -> dict:
    """The operands, on the CPU."""
    dtype, generator = getattr(torch, case.dtype), torch.Generator().manual_seed(case.seed)
    weight = torch.randn(case.hidden, generator=generator)
    weight[::7] = -0.0
    return {
        "x": rows_of(case, 0),
        "residual": rows_of(case, 1) if case.residual else None,
        "weight": weight if case.weight_fp32 else weight.to(dtype),
        "scale": torch.rand(1, generator=generator) / 100 if case.quant == "static" else None,
    }


def outs(case: Case, tensors: dict) -> dict:
    """Which operands are written over."""
    if not case.in_place:
        return {}
    norm = {"out": tensors["x"]} if case.quant == "none" else {"norm_out": tensors["x"]} if case.keep_norm else {}
    return norm | ({"residual_out": tensors["residual"]} if case.residual else {})


def options(case: Case) -> dict:
    """Keywords of ``operands`` beside the tensors."""
    names = ("rounding", "weight_bias", "quant", "column_major", "keep_norm")
    return {"eps": case.eps, **{name: getattr(case, name) for name in names}}


def taken(case: Case, operation: str = "norm", **more):
    """Operands of a case on the CPU, with outputs that are poisoned unless they hold inputs."""
    tensors = given(case)
    written = outs(case, tensors)
    call = operands(
        **tensors, **options(case), **written, operation=operation, device=torch.device("cpu"), index=-1, rank=None, **more
    )
    held = [tensor.data_ptr() for tensor in tensors.values() if tensor is not None]
    for result in call.results:
        if result.data_ptr() not in held and result.numel():
            reference.poison(result)
    return call


def difference(case: Case, got, want) -> str:
    """In words what two results differ in; nothing if they are the same, strides included."""
    names = ["norm" if case.quant == "none" else "quantized", *["scale"] * (case.quant != "none"), "residual_out", "kept norm"]
    for name, a, b in zip(names, got, want):
        if (a.shape, a.dtype, a.stride()) != (b.shape, b.dtype, b.stride()):
            return f"{name}: {a.shape} {a.dtype} {a.stride()} for {b.shape} {b.dtype} {b.stride()}"
        found = reference.compare(a.cpu().contiguous(), b.cpu().contiguous())
        if found.wrong:
            return f"{name}: {found}"
    return "" if len(got) == len(want) else f"{len(got)} results for {len(want)}"
