"""Calls with a norm as tools make them: what is normalized how, data that every rank can make, and the exact results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from .. import norms
from ..engine import norm_reference, reference
from ..operands import OLDEST_WITH_E4M3
from ..policy.norm import GROUP, Norm
from ..policy.operation import DTYPES, OpSpec

EPS = 1e-6
STATIC_SCALE = 0.02
_RESIDUAL, _WEIGHT = 1000, 1001  # in place of a rank: the same on all of them
_E4M3_EPS = 2.0**-3

Results = dict[str, torch.Tensor]  # by the keyword of the output: ``out``, ``residual_out``, ``scale_out``, ``norm_out``


@dataclass(frozen=True)
class Given:
    """What a call reads beside x: the same on all ranks. ``scale`` is of static quantization alone."""

    residual: torch.Tensor | None
    weight: torch.Tensor
    scale: torch.Tensor | None


@dataclass(frozen=True)
class NormKind:
    """Calls of one family.

    Attributes:
        dtype: by torch's name.
        hidden, rounding, quant, residual, weight, weight_bias, with_norm: as of ``norms.norm_family``.
        column_major: of scales by the group.
    """

    dtype: str
    hidden: int
    rounding: str = "R"
    quant: str = "none"
    residual: bool = True
    weight: str | None = None
    weight_bias: int = 0
    with_norm: bool = False
    column_major: bool = False

    def __str__(self) -> str:
        more = [self.quant] * (self.quant != "none") + ["sum alone"] * (not self.residual)
        return " ".join([DTYPES[self.dtype], str(self.hidden), self.rounding, *more])

    @property
    def family(self) -> OpSpec:
        """For ``init(operations=)`` and ``plan_norm``. Raises ``InputError``: there is no such family."""
        return norms.norm_family(
            self.dtype,
            self.hidden,
            self.rounding,
            self.quant,
            residual=self.residual,
            weight=self.weight,
            weight_bias=self.weight_bias,
            with_norm=self.with_norm,
        )

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def x(self, seed: int, rank: int, rows: int, device: Any, data: str = reference.RANDOM, world_size: int = 8) -> torch.Tensor:
        """What ``rank`` adds; ``data`` as ``kind`` of ``reference.values``."""
        numel = rows * self.hidden
        made = reference.values(seed, rank, numel, self.torch_dtype, device, kind=data, world_size=world_size)
        return made.view(rows, self.hidden)

    def total(self, seed: int, rows: int, device: Any, world_size: int, data: str = reference.RANDOM) -> torch.Tensor:
        """The exact sum of all ranks' ``x``."""
        return reference.ordered_sum(self.x(seed, rank, rows, device, data, world_size) for rank in range(world_size))

    def given(self, seed: int, rows: int, device: Any) -> Given:
        residual = self.x(seed, _RESIDUAL, rows, device) if self.residual else None
        weight = reference.values(seed, _WEIGHT, self.hidden, getattr(torch, self.weight or self.dtype), device)
        scale = torch.full((1,), STATIC_SCALE, device=device) if self.quant == "static" else None
        return Given(residual, weight, scale)

    def outs(self, rows: int, device: Any) -> Results:
        """Every output, holding what no call yields."""
        like_x = {"dtype": self.torch_dtype, "device": device}
        shape = rows, self.hidden
        quantized = self.quant != "none"
        made = {
            "out": torch.empty(shape, dtype=norm_reference.E4M3, device=device) if quantized else torch.empty(shape, **like_x)
        }
        made["residual_out"] = torch.empty(shape, **like_x)
        if self.quant in ("token", "group"):
            groups = self.hidden // GROUP if self.quant == "group" else 1
            made["scale_out"] = (
                torch.empty(groups, rows, device=device).t() if self.column_major else torch.empty(rows, groups, device=device)
            )
        if self.with_norm:
            made["norm_out"] = torch.empty(shape, **like_x)
        poison(made)
        return made

    def fused(self, communicator: Any, x: torch.Tensor, given: Given, outs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        """The call through ``communicator``, ready to be made again and again; outputs that are not in ``outs`` are new."""
        return self._bound(communicator.all_reduce_add_rms_norm, communicator.all_reduce_add_rms_norm_fp8, x, given, outs)

    def twin(self, x: torch.Tensor, given: Given, outs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        """The same without the all-reduce."""
        return self._bound(norms.add_rms_norm, norms.add_rms_norm_fp8, x, given, outs)

    def _bound(self, plain: Any, fp8: Any, x: torch.Tensor, given: Given, outs: Mapping[str, torch.Tensor]) -> Callable[[], Any]:
        how: dict[str, Any] = {"rounding": self.rounding, "weight_bias": self.weight_bias, **outs}
        if self.quant != "none":
            how |= {"scales": self.quant, "scale": given.scale, "column_major": self.column_major, "with_norm": self.with_norm}
        return partial(plain if self.quant == "none" else fp8, x, given.residual, given.weight, EPS, **how)

    def named(self, results: Sequence[torch.Tensor]) -> Results:
        """What a call has returned, a static scale left out."""
        names = ["out", "residual_out"] if self.quant == "none" else ["out", "scale_out", "residual_out"]
        named = dict(zip([*names, "norm_out"], results))
        if self.quant == "static":
            del named["scale_out"]
        return named

    def expected(self, total: torch.Tensor, given: Given) -> Results:
        """The exact results of a sum, made by torch's operations on its device; may be captured."""
        norm = Norm(self.rounding, self.quant, self.residual, self.weight or self.dtype, self.weight_bias, EPS, self.with_norm)
        made = norm_reference.normed(total, given.residual, given.weight, norm, given.scale)
        found = {"out": made.norm if made.quantized is None else made.quantized, "residual_out": made.residual_out}
        if self.quant in ("token", "group") and made.scale is not None:
            found["scale_out"] = made.scale
        return found | ({"norm_out": made.norm} if self.with_norm else {})


def has_e4m3(device: torch.device) -> bool:
    """Whether calls on ``device`` can quantize."""
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= OLDEST_WITH_E4M3


def poison(tensors: Mapping[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        reference.poison(tensor)


def wrong(found: Mapping[str, torch.Tensor], want: Mapping[str, torch.Tensor]) -> int:
    """Elements of all outputs together whose bits differ."""
    return sum(reference.compare(found[name], want[name]).wrong for name in want)


def off(kind: NormKind, found: Mapping[str, torch.Tensor], want: Results, given: Given, world_size: int) -> str | None:
    """What no other order of adding and no other rounding explains of another's results; None: nothing.

    Quantized values are compared as what they stand for.
    """
    eps = torch.finfo(kind.torch_dtype).eps
    for name, right in want.items():
        if name == "scale_out":
            continue
        got, allowed = found[name].float().reshape(right.shape), 16 * (world_size + 1) * eps
        right = right.float()
        if name == "out" and kind.quant != "none":
            got, right = (_dequantized(kind, values, where, given) for values, where in ((got, found), (right, want)))
            allowed += _E4M3_EPS
        allowed *= max(float(right.abs().max()), 1.0)
        far = float((got - right).abs().max())
        if not far <= allowed:
            return f"wrong {name}: off by up to {far:.3g}, and rounding explains {allowed:.3g}"
    return None


def _dequantized(kind: NormKind, values: torch.Tensor, named: Mapping[str, torch.Tensor], given: Given) -> torch.Tensor:
    scale = given.scale if kind.quant == "static" else named["scale_out"]
    assert scale is not None
    return (
        values
        if scale.numel() == 0
        else (values.view(values.shape[0], scale.shape[-1], -1) * scale.unsqueeze(-1)).view_as(values)
    )
