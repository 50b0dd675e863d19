"""The exact bits of policy/norm.py in torch's operations, one after the other, on any device.

Torch rounds each of these to nearest and contracts none, on CPUs and on CUDA devices. What must not be written otherwise: a division
by a Python number, which CUDA devices turn into a product with its reciprocal.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import c_float
from dataclasses import dataclass

import torch

from ..policy.norm import GROUP, LARGEST_E4M3, LEAST_GROUP_ABSMAX, LEAST_TOKEN_SCALE, Norm
from ..policy.operation import OpSpec

E4M3 = torch.float8_e4m3fn


@dataclass(frozen=True)
class Normed:
    """What a norm yields: ``residual_out`` and ``norm`` like the input, and of a quantized one e4m3 and its fp32 scales: of no dimension
    (static), or (rows, 1), or (rows, groups)."""

    residual_out: torch.Tensor
    norm: torch.Tensor
    quantized: torch.Tensor | None = None
    scale: torch.Tensor | None = None


def normed(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, norm: Norm, scale: torch.Tensor | None = None
) -> Normed:
    """Of ``x`` (rows, hidden), ``residual`` like it, ``weight`` (hidden,); ``scale``: one fp32 element, for static."""
    a = x.float() if residual is None else x.float() + residual.float()
    t = a.to(x.dtype)
    v = a if norm.rounding == "U" else t.float()
    n = v * rsqrt(tree(v * v) * c_float(1 / x.shape[-1]).value + norm.eps).unsqueeze(-1)
    if norm.rounding == "H":
        n = n.to(x.dtype).float()
    y = (n * (weight.float() + norm.weight_bias)).to(x.dtype)
    if norm.quant == "none":
        return Normed(t, y)
    found = _scales(y, norm.quant) if scale is None else scale.reshape(())
    return Normed(t, y, quantized(y, found), found)


def tree(x: torch.Tensor) -> torch.Tensor:
    """The sum of the last dimension: neighbours first, then neighbouring sums, up to the whole row."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    while x.shape[-1] > 1:
        x = x[..., 0::2] + x[..., 1::2]
    return x.squeeze(-1)


def rsqrt(x: torch.Tensor) -> torch.Tensor:
    """The correctly rounded 1 / sqrt(x) of fp32: in float64, then rounded. No fp32 number's comes near enough to the middle between
    two for float64 to mistake the side (test_norm_reference asks all of them)."""
    wide = x.double().sqrt()
    return (torch.ones_like(wide) / wide).float()


def quantized(y: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """``y`` (rows, hidden) in e4m3, to be multiplied by ``scale``: of no dimension, or (rows, groups)."""
    inverse = torch.ones_like(scale) / scale
    if scale.dim():
        inverse = inverse.repeat_interleave(y.shape[1] // scale.shape[1], dim=1)
    return (y.float() * inverse).clamp(-LARGEST_E4M3, LARGEST_E4M3).to(E4M3)  # not every torch saturates


def _scales(y: torch.Tensor, quant: str) -> torch.Tensor:
    rows, hidden = y.shape
    width = GROUP if quant == "group" else hidden
    absmax = y.float().abs().view(rows, hidden // width, width).amax(-1)  # a NaN if there is one
    largest = torch.full_like(absmax, LARGEST_E4M3)
    if quant == "group":
        return absmax.clamp(min=LEAST_GROUP_ABSMAX) / largest
    return (absmax / largest).clamp(min=LEAST_TOKEN_SCALE)


def run(spec: OpSpec, tensors: Sequence[torch.Tensor]) -> None:
    """Compute a call of an operation with a norm, its all-reduce left out, into the tensors that it writes.

    Args:
        tensors: one per pointer of ``spec``, contiguous, on one device; scales as the epilogue's strides tell.
    """
    norm, named = spec.epilogue, dict(zip((pointer.name for pointer in spec.pointers), tensors, strict=True))
    assert norm is not None, "an operation with a norm"
    shape = spec.rows, spec.hidden
    x, residual = named["input"].view(shape), named["residual"].view(shape) if norm.residual else None
    scale = named["scale"] if norm.quant == "static" else None
    result = normed(x, residual, named["weight"], norm, scale)
    # All has been read: x and residual may be written now.
    named["residual_out"].view(shape).copy_(result.residual_out)
    if result.quantized is None or norm.keep_norm:
        named["output" if result.quantized is None else "norm"].view(shape).copy_(result.norm)
    if result.quantized is not None and result.scale is not None:
        named["output"].view(shape).copy_(result.quantized)
        if norm.quant != "static":
            strides = norm.scale_strides if norm.quant == "group" else (1, 1)
            named["scale"].as_strided(result.scale.shape, strides).copy_(result.scale)
