"""The kernel of a norm without an all-reduce (kernels/triton/norm.py): which module, which grid. Pure."""

from __future__ import annotations

from .catalogue import KernelSpec
from .operation import DTYPES, NORMS, OpSpec

KERNEL = "add_rms_norm"

# Its arguments in order. The first ones are the addresses of a call, by the names of its pointers; absent ones are 0.
ARGUMENTS = {
    "input": "i64",
    "output": "i64",
    "residual": "i64",
    "weight": "i64",
    "residual_out": "i64",
    "scale": "i64",
    "norm": "i64",
    "rows": "i64",
    "hidden": "i32",
    "inverse": "fp32",
    "eps": "fp32",
    "weight_bias": "fp32",
    "weight_is_fp32": "i32",
    "scale_row": "i64",
    "scale_group": "i64",
}


def module(spec: OpSpec) -> KernelSpec:
    """The module of a call (of an operation of ``NORMS``)."""
    norm = spec.epilogue
    if norm is None:
        raise ValueError(f"{spec.operation} is none of {', '.join(NORMS)}")
    steps = (spec.hidden - 1).bit_length()
    name = f"norm_{norm.rounding.lower()}_{norm.quant}_{DTYPES[spec.dtype]}_{1 << steps}"
    constants = (("DTYPE", spec.dtype), ("ROUNDING", norm.rounding), ("QUANT", norm.quant), ("STEPS", steps))
    return KernelSpec(name, "triton", KERNEL, constants, (KERNEL,))


def warps(steps: int) -> int:
    """Of a block whose row is 2^steps elements: 16 elements a thread, but for rows that would take too few or too many."""
    return min(max((1 << steps) // 512, 1), 16)


def grid(rows: int, max_ctas: int | None) -> int:
    """Blocks that share the rows."""
    return min(rows, max_ctas or rows)
