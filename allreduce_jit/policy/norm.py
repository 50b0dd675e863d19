"""RMSNorm after a sum as a value: what is added, how it is rounded, what it is quantized to. Pure.

With x the sum of all ranks (or the input of ``add_rms_norm``), rounded to its dtype T; every step in fp32, rounded to nearest, none
contracted into a fused multiply-add:

    a = x + residual                    (without residual: a = x)
    t = T(a)                            residual_out
    v = t, with rounding U: a
    r = rsqrt(tree(v * v) * fp32(1 / hidden) + eps), correctly rounded
    n = v * r, with rounding H: T(v * r)
    y = T(n * (weight + weight_bias))   the norm
    q = e4m3(y * (1 / scale))           quantized, to nearest even, saturating at 448; 1 / scale rounded once

``tree`` is a perfect binary tree over the element's index: neighbours are added first, then neighbouring sums, up to the whole row, which
is padded with zeros to a power of two. It depends on nothing but the row: not on grid, block, world size or batch.

``scale`` is given (static), or max(absmax / 448, 1 / (512 * 448)) of a row of y (token), or max(absmax, 1e-10) / 448 of 128 neighbours
of y (group); it is what the quantized value is to be multiplied by. A NaN in them makes it NaN.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

ROUNDINGS = ("R", "U", "H")
QUANTS = ("none", "static", "token", "group")
GROUP = 128  # elements that share a scale
LARGEST_E4M3 = 448.0
LEAST_TOKEN_SCALE = 1 / (512 * 448)
LEAST_GROUP_ABSMAX = 1e-10
HIDDEN = range(64, 16384 + 1, 8)  # elements of a row


@dataclass(frozen=True)
class Norm:
    """What follows the sum. Kernels of a family take ``eps`` and the strides as arguments, all else is compiled into them.

    Attributes:
        rounding: which engine's arithmetic: ``R`` as vLLM and TensorRT-LLM, ``U`` normalizes the sum before it is rounded (SGLang), ``H``
            rounds once more before the weight (Hugging Face).
        quant: ``none``, or what a scale belongs to: ``static``, ``token``, ``group``.
        residual: whether there is one.
        weight: its dtype: that of the input, or float32.
        weight_bias: 0 or 1, added to the weight.
        eps: as fp32 has it.
        keep_norm: with ``quant``: whether the norm itself is stored, too.
        scale_strides: with ``group``: elements of the scales from one row to the next, and from one group to the next.
    """

    rounding: str = "R"
    quant: str = "none"
    residual: bool = True
    weight: str = ""
    weight_bias: int = 0
    eps: float = 0.0
    keep_norm: bool = False
    scale_strides: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for name, values in (("rounding", ROUNDINGS), ("quant", QUANTS), ("weight_bias", (0, 1))):
            if getattr(self, name) not in values:
                raise ValueError(f"{name} {getattr(self, name)!r}: expected one of {', '.join(map(str, values))}")

    @property
    def family(self) -> Norm:
        """All norms that the same kernels compute."""
        return replace(self, eps=0.0, scale_strides=(0, 0))

    @property
    def parameters(self) -> int:
        """What ranks compare beside the shape: 16 bits."""
        flags = self.residual | (self.weight == "float32") << 1 | self.weight_bias << 2 | self.keep_norm << 3
        return flags | ROUNDINGS.index(self.rounding) << 4 | QUANTS.index(self.quant) << 6


def signed(norm: Norm, hidden: int) -> int:
    """What ranks compare of a call beside its elements, in 64 bits: ``NormArgs.parameters``."""
    return hidden | norm.parameters << 16 | _bits(norm.eps) << 32


def read_signed(word: int) -> dict[str, object]:
    """What ``signed`` made a word of, in words for people."""
    flags = word >> 16 & 0xFFFF
    rounding, quant = flags >> 4 & 3, flags >> 6 & 3
    return {
        "hidden": word & 0xFFFF,
        "rounding": ROUNDINGS[rounding] if rounding < len(ROUNDINGS) else "?",
        "eps": float(f"{struct.unpack('<f', struct.pack('<I', word >> 32 & 0xFFFFFFFF))[0]:.6g}"),
        "residual": bool(flags & 1),
        "fp32 weight": bool(flags & 2),
        "weight_bias": flags >> 2 & 1,
        "quantization": QUANTS[quant],
        "norm kept": bool(flags & 8),
    }


def _bits(eps: float) -> int:
    return struct.unpack("<I", struct.pack("<f", eps))[0]
