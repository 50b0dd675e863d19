"""Calls of the NVLink kernels that normalize, made ready: what their launches are told."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from ..abi import Args, NormArgs
from ..policy import nvlink_norm
from ..policy.norm import signed
from ..policy.norm_catalogue import norm_module
from ..policy.norm_forms import NORM_ALGORITHMS
from ..policy.nvlink_norm import NormPlan
from ..policy.operation import OpSpec
from .driver import KernelLaunch
from .prepared import PreparedCall, binding

if TYPE_CHECKING:
    from .nvlink import NvlinkEngine


def prepare(engine: NvlinkEngine, spec: OpSpec, plan: NormPlan, shape_id: int) -> PreparedCall:
    """As ``KernelEngine.prepare``, of a call of ``all_reduce_norm``. Its tensors begin at multiples of 16 bytes."""
    norm, region = spec.epilogue, engine.layout.regions[NORM_ALGORITHMS[plan.algorithm].region]
    assert norm is not None, "an operation with a norm"
    kernel = engine._kernels[norm_module(plan.form, spec.family, engine.config.world_size).name]
    bindings = []
    for piece in nvlink_norm.launches(plan, spec):
        args = NormArgs(
            call=engine.arguments(spec, plan.algorithm, region, piece, shape_id),
            eps=norm.eps,
            # A scale a row lies dense.
            scale_row=norm.scale_strides[0] if norm.quant == "group" else 1,
            scale_group=norm.scale_strides[1],
            parameters=signed(norm, spec.hidden),
        )
        launch = KernelLaunch(kernel, [args], piece.grid, plan.block, pdl=engine._pdl, cluster=plan.form.cluster)
        pointers = [
            (ctypes.c_uint64.from_buffer(args, _OFFSETS[pointer.name]), pointer.offset(piece.start)) for pointer in spec.pointers
        ]
        bindings.append(binding(launch, pointers))
    return PreparedCall(engine, spec, bindings, bindings)


# Of the argument of each pointer.
_OFFSETS = {name: getattr(Args, name).offset for name in ("input", "output")} | {
    name: getattr(NormArgs, name).offset for name in ("residual", "residual_out", "weight", "norm", "scale")
}
