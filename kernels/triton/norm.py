"""Residual, RMSNorm and quantization of rows, without an all-reduce: the bits of allreduce_jit/policy/norm.py.

One program takes a row, or several in turn. What decides about bits:
 - The tree: each step makes one sum of two neighbours, a reduction whose order no layout can choose.
 - No product is contracted with a sum: the compiler is told not to (`enable_fp_fusion`, in jit/triton_process.py).
 - `/` is approximate in Triton, and so is `rsqrt`: here are `div_rn` and libdevice's `rsqrt_rn`.
 - Rows end in zeros up to a power of two, whose squares are +0. What the norm makes of them must not reach a scale: 0 * rsqrt(0)
   is NaN.
 - The largest magnitude is found among bits as integers: NaNs are above infinity there.

`out` may be x, `residual_out` may be residual: everything of a row is loaded before its sum is known, and stored after.

Addresses are plain int64 values; all tensors but scales begin at multiples of 16 bytes, and rows are multiples of 8 elements.
"""

import triton
import triton.language as tl
from allreduce_jit.policy import local_norm, norm
from triton.language.extra.cuda import libdevice

from .slots import word_at

_GROUP = tl.constexpr(norm.GROUP)
_LARGEST = tl.constexpr(norm.LARGEST_E4M3)
_LEAST_SCALE, _LEAST_ABSMAX = tl.constexpr(norm.LEAST_TOKEN_SCALE), tl.constexpr(norm.LEAST_GROUP_ABSMAX)
_CONSTANTS = ("DTYPE", "ROUNDING", "QUANT", "STEPS", "INTERPRET")


def signature(kernel_name: str) -> dict[str, str]:
    """Argument types of a kernel in order, as ``triton.compiler.ASTSource`` wants them."""
    return {local_norm.KERNEL: local_norm.ARGUMENTS}[kernel_name] | dict.fromkeys(_CONSTANTS, "constexpr")


@triton.jit
def add_rms_norm(
    input,  # address of x
    output,  # of the norm, or of what it is quantized to
    residual,  # 0: none
    weight,
    residual_out,
    scale,  # fp32: read (static) or written
    norm,  # with a quantized output: of the norm, 0: not wanted
    rows,
    hidden,  # elements of a row, at most 2^STEPS
    inverse,  # 1 / hidden
    eps,
    weight_bias,
    weight_is_fp32,  # else it is of x's dtype
    scale_row,  # elements of the scales from one row to the next
    scale_group,  # and from one group to the next
    DTYPE: tl.constexpr,  # tl.float32, tl.float16 or tl.bfloat16
    ROUNDING: tl.constexpr,  # of policy/norm.py
    QUANT: tl.constexpr,
    STEPS: tl.constexpr,  # of the tree
    INTERPRET: tl.constexpr,  # run by Triton's interpreter
):
    """Any grid: programs take rows in turn."""
    BLOCK: tl.constexpr = 1 << STEPS
    GROUPS: tl.constexpr = BLOCK // _GROUP if QUANT == "group" else 1
    hidden = hidden // 8 * 8  # which it is, and so no 16 bytes are half masked
    at = tl.arange(0, BLOCK)
    exist = at < hidden
    if weight_is_fp32 != 0:
        factor = tl.load(_elements(weight, 0, at, tl.float32), mask=exist, other=0.0)
    else:
        factor = tl.load(_elements(weight, 0, at, DTYPE), mask=exist, other=0.0).to(tl.float32)
    factor += weight_bias
    if QUANT == "static":
        inverse_scale = tl.div_rn(1.0, tl.load(word_at(scale, 0, tl.float32)))

    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        first = row * hidden
        a = tl.load(_elements(input, first, at, DTYPE), mask=exist, other=0.0).to(tl.float32)
        if residual != 0:
            a += tl.load(_elements(residual, first, at, DTYPE), mask=exist, other=0.0).to(tl.float32)
        rounded = a.to(DTYPE)
        v = a if ROUNDING == "U" else rounded.to(tl.float32)
        mean = _tree(v * v, STEPS) * inverse
        n = v * _rsqrt(mean + eps, INTERPRET)
        if ROUNDING == "H":
            n = n.to(DTYPE).to(tl.float32)
        y = (n * factor).to(DTYPE)

        tl.store(_elements(residual_out, first, at, DTYPE), rounded, mask=exist)
        if QUANT == "none":
            tl.store(_elements(output, first, at, DTYPE), y, mask=exist)
        else:
            if norm != 0:
                tl.store(_elements(norm, first, at, DTYPE), y, mask=exist)
            wide = y.to(tl.float32)
            if QUANT == "token":
                found = tl.div_rn(tl.max(_magnitude(wide, exist), axis=0).to(tl.float32, bitcast=True), _LARGEST)
                found = tl.where(found < _LEAST_SCALE, _LEAST_SCALE, found)  # a NaN stays
                tl.store(word_at(scale, row * scale_row, tl.float32), found)
                wide *= tl.div_rn(1.0, found)
            elif QUANT == "group":
                bits = tl.max(tl.reshape(_magnitude(wide, exist), [GROUPS, _GROUP]), axis=1)
                found = bits.to(tl.float32, bitcast=True)
                found = tl.div_rn(tl.where(found < _LEAST_ABSMAX, _LEAST_ABSMAX, found), _LARGEST)
                group = tl.arange(0, GROUPS)
                places = row * scale_row + group * scale_group
                tl.store(word_at(scale, places, tl.float32), found, mask=group < hidden // _GROUP)
                wide = tl.reshape(tl.reshape(wide, [GROUPS, _GROUP]) * tl.div_rn(1.0, found)[:, None], [BLOCK])
            else:
                wide *= inverse_scale
            wide = tl.where(wide > _LARGEST, _LARGEST, wide)
            wide = tl.where(wide < -_LARGEST, -_LARGEST, wide)
            tl.store(_elements(output, first, at, tl.float8e4nv), wide.to(tl.float8e4nv), mask=exist)


@triton.jit
def _elements(address, first, at, DTYPE: tl.constexpr):
    """Pointers to the elements of a row, which begins at element `first`, a multiple of 8."""
    pointers = address.to(tl.pointer_type(DTYPE)) + (first + at)
    return tl.multiple_of(tl.max_contiguous(pointers, at.shape[0]), 16)


@triton.jit
def _tree(x, STEPS: tl.constexpr):
    for step in tl.static_range(1, STEPS):
        x = tl.sum(tl.reshape(x, [1 << (STEPS - step), 2]), axis=1)
    return tl.sum(x, axis=0)


@triton.jit
def _rsqrt(x, INTERPRET: tl.constexpr):
    """Correctly rounded, of fp32."""
    if INTERPRET:
        return (1.0 / tl.sqrt(x.to(tl.float64))).to(tl.float32)
    else:
        return libdevice.rsqrt_rn(x)


@triton.jit
def _magnitude(x, exist):
    """Bits of |x| as integers, in the order of magnitude, NaN last."""
    return tl.where(exist, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
