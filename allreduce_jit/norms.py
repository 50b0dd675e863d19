"""RMSNorm after a sum: what both ways to it share, through a communicator and of this process's own tensors, which is here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .engine import norm_reference
from .errors import InputError
from .known_norms import KnownNorms
from .operands import Operands, operands, quant_of
from .policy.norm import GROUP, HIDDEN, QUANTS, ROUNDINGS, Norm
from .policy.operation import DTYPES, OpSpec
from .torch_private import current_device

__all__ = ["Operands", "add_rms_norm", "add_rms_norm_fp8", "norm_family", "operands", "quant_of", "run_local"]


def norm_family(
    dtype: str | torch.dtype,
    hidden: int,
    rounding: str = "R",
    quant: str = "none",
    *,
    residual: bool = True,
    weight: str | torch.dtype | None = None,
    weight_bias: int = 0,
    with_norm: bool = False,
) -> OpSpec:
    """The fused calls that the same kernels serve, with any number of rows, for ``init(operations=)``.

    Args:
        dtype: ``float32``, ``float16`` or ``bfloat16``: of the tensors.
        hidden: elements of a row.
        rounding: of the calls: ``R``, ``U`` or ``H``.
        quant: ``none``, or the ``scales`` of calls that quantize: ``static``, ``token`` or ``group``.
        residual: whether they have one.
        weight: its dtype: that of the tensors (None), or ``float32``.
        weight_bias: 0 or 1.
        with_norm: of calls that quantize: whether they return the norm itself, too.

    Raises:
        InputError: there is no such family.
    """
    name = str(dtype).removeprefix("torch.")
    wide = name if weight is None else str(weight).removeprefix("torch.")
    for what, value, values in (
        ("dtype", name, tuple(DTYPES)),
        ("rounding", rounding, ROUNDINGS),
        ("quant", quant, QUANTS),
        ("weight", wide, (name, "float32")),
        ("weight_bias", weight_bias, (0, 1)),
    ):
        if value not in values:
            raise InputError(f"norm_family: {what} {value!r}: expected one of {', '.join(map(str, values))}")
    step = GROUP if quant == "group" else HIDDEN.step
    if hidden not in HIDDEN or hidden % step:
        raise InputError(
            f"norm_family: hidden {hidden!r}: expected a multiple of {step} from {HIDDEN.start} to {HIDDEN.stop - 1}"
        )
    norm = Norm(rounding, quant, bool(residual), wide, weight_bias, keep_norm=with_norm and quant != "none")
    return OpSpec("all_reduce_norm", name, (0, hidden), norm)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    weight_bias: int = 0,
    rounding: str = "R",
    out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Residual and RMSNorm of this process's own ``x``: ``Communicator.all_reduce_add_rms_norm`` without the all-reduce, and the same
    bits as an ``all_reduce`` followed by this. On the current stream.

    Args:
        x: (..., hidden), fp32, fp16 or bf16, hidden a multiple of 8 from 64 to 16384.
        residual: like ``x``, added to it; None: nothing is.
        weight: (hidden,), of the dtype of ``x`` or fp32.
        eps: added to the mean of the squares.
        weight_bias: 0 or 1, added to the weight.
        rounding: ``R``, ``U`` or ``H`` (policy/norm.py).
        out: where the norm goes; may be ``x``.
        residual_out: where ``x + residual`` goes; may be ``residual``.

    Returns:
        (norm, ``x + residual``), like ``x``.

    Raises:
        InputError: a tensor has another shape, dtype or device than expected, overlaps another, or requires grad.
    """
    norm, total = _twin(x, residual, weight, eps, ("none", rounding, weight_bias, False, False), None, out, residual_out)
    return norm, total


def add_rms_norm_fp8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *,
    scale: torch.Tensor | None = None,
    scales: str = "static",
    column_major: bool = False,
    with_norm: bool = False,
    weight_bias: int = 0,
    rounding: str = "R",
    out: torch.Tensor | None = None,
    scale_out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    residual_out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """``add_rms_norm`` whose norm is quantized to e4m3: what it stands for is the quantized value times its scale.

    Args:
        x, residual, weight, eps, weight_bias, rounding, residual_out: as for ``add_rms_norm``.
        scale: one fp32 element on the device of ``x``, of ``scales="static"``.
        scales: ``static``; ``token``: one a row, found from its largest magnitude; ``group``: one for 128 neighbours, of which hidden
            is a multiple.
        column_major: of ``group``: new scales have strides (1, rows). Those of ``scale_out`` are as they are.
        with_norm: return the norm itself, too.
        out: where the quantized norm goes, like ``x`` in float8_e4m3fn.
        scale_out: where scales go that are found: fp32, (..., 1) or (..., hidden / 128).
        norm_out: where the norm goes, with ``with_norm``; may be ``x``.

    Returns:
        (quantized, scales, ``x + residual``), and the norm if it is wanted.

    Raises:
        InputError: as for ``add_rms_norm``; or a GPU without e4m3 (before sm_89).
    """
    how = quant_of(scales, "norm", None), rounding, weight_bias, column_major, with_norm
    return _twin(x, residual, weight, eps, how, scale, out, residual_out, scale_out=scale_out, norm_out=norm_out)


_known = KnownNorms()


def _twin(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    how: tuple,
    scale: torch.Tensor | None,
    out: torch.Tensor | None,
    residual_out: torch.Tensor | None,
    **outs: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    tensor = x if isinstance(x, torch.Tensor) else torch.empty(0)  # any: x will be refused
    index = tensor.get_device()
    where = {"operation": "norm", "device": tensor.device, "index": index, "rank": None}
    here = not tensor.is_cuda or current_device() == index
    return _known.make(_local, where, here, (x, residual, weight, scale), eps, how, out, residual_out, outs)


def _local(spec: OpSpec) -> Callable[..., None]:
    return lambda *tensors: run_local(spec, tensors)


def run_local(spec: OpSpec, tensors: Sequence[torch.Tensor], max_ctas: int | None = None) -> None:
    """Compute a call with a norm, its all-reduce left out: on a CUDA device, which has to be the current one, on its current stream.

    Args:
        tensors: as ``Operands`` has them; ``output`` (with a quantized output ``norm``) may be ``input``.
        max_ctas: thread blocks that the kernel may take.
    """
    if not spec.rows:
        return
    if tensors[0].is_cuda:
        from .engine import local_norm  # which needs the driver

        local_norm.run(spec, tensors, max_ctas)
    else:
        norm_reference.run(spec, tensors)
