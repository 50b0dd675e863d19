"""torch.library operators over communicators that have a name, for ``torch.compile`` and for engines that call ``torch.ops``.

A graph can hold no communicator, but it can hold its name. What each operator computes and refuses is what the communicator's method
of that name does; importing this module defines them. Functional forms return new contiguous tensors, those with ``_`` at the end of
their names write over their inputs, those with ``_out`` into tensors that the caller gives. There are no derivatives: a tensor that
requires grad is an error, at run time as under ``torch.compile``, where it is one of tracing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.graph import increment_version

from ..communicator import Communicator
from ..errors import ClosedError, InputError, InputTypeError
from ..policy.norm import GROUP

NAMESPACE = "allreduce_jit"

_named: dict[str, weakref.ref[Communicator]] = {}  # weak references by hand: to ask a WeakValueDictionary costs another 0.2 µs


def register_communicator(comm: Communicator, name: str | None = None) -> str:
    """Let ``torch.ops.allreduce_jit.*`` find ``comm``, for as long as somebody holds it.

    Args:
        name: what the operators get, the same on all ranks, as compiled graphs hold it; may be that of a communicator which is closed
            or gone. None: ``comm0``, or the first such name that is free; the same on all ranks that name theirs in the same order.

    Returns:
        The name.

    Raises:
        InputError: another open communicator has this name, or it is no name.
        InputTypeError: ``comm`` is none, or ``name`` no string.
        ClosedError: ``comm`` is closed.
    """
    if not isinstance(comm, Communicator):
        raise InputTypeError(f"register_communicator takes what allreduce_jit.init returns, not {type(comm).__name__}")
    if name is not None and not isinstance(name, str):
        raise InputTypeError(f"name={name!r}: expected a string, or None")
    if comm.closed:
        raise ClosedError(f"rank {comm.rank}: this communicator is closed: build a new one")
    if name is None:
        name = next(free for free in (f"comm{i}" for i in range(len(_named) + 1)) if _is_free(free))
    if not name or (not _is_free(name) and _of(name) is not comm):
        why = "another communicator has this name, which is still open" if name else "expected some letters"
        raise InputError(f"rank {comm.rank}: name={name!r}: {why}")
    for gone in [other for other, known in _named.items() if known() is None]:
        del _named[gone]
    _named[name] = weakref.ref(comm)
    return name


def _is_free(name: str) -> bool:
    known = _named.get(name)
    comm = None if known is None else known()
    return comm is None or comm.closed


def _of(name: str) -> Communicator:
    """The communicator of this name, open or closed."""
    known = _named.get(name)
    comm = None if known is None else known()
    if comm is None:
        there = ", ".join(sorted(other for other, known in _named.items() if known() is not None)) or "none"
        raise InputError(
            f"torch.ops.{NAMESPACE}: there is no communicator {name!r} in this process (there are: {there}): "
            "call allreduce_jit.register_communicator, and keep the communicator"
        )
    return comm


# -- what runs


def _all_reduce(x: torch.Tensor, name: str) -> torch.Tensor:
    return _of(name).all_reduce(x)


def _all_reduce_(x: torch.Tensor, name: str) -> None:
    _of(name).all_reduce(x, x)
    _written(x)


def _norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    name: str,
    *,
    weight_bias: int = 0,
    rounding: str = "R",
) -> tuple[torch.Tensor, torch.Tensor]:
    comm = _of(name)
    return comm.all_reduce_add_rms_norm(x, residual, weight, eps, weight_bias=weight_bias, rounding=rounding)


def _norm_(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    name: str,
    *,
    weight_bias: int = 0,
    rounding: str = "R",
) -> None:
    _norm_out(x, residual, weight, eps, name, x, residual, weight_bias=weight_bias, rounding=rounding)


def _norm_out(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    name: str,
    out: torch.Tensor,
    residual_out: torch.Tensor,
    *,
    weight_bias: int = 0,
    rounding: str = "R",
) -> None:
    comm = _of(name)
    comm.all_reduce_add_rms_norm(
        x, residual, weight, eps, weight_bias=weight_bias, rounding=rounding, out=out, residual_out=residual_out
    )
    _written(out, residual_out)


def _static(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, scale: torch.Tensor, eps: float, name: str, **how: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    quantized, _, total = _of(name).all_reduce_add_rms_norm_fp8(x, residual, weight, eps, scale=scale, **how)
    return quantized, total


def _fp8(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    name: str,
    scales: str = "token",
    *,
    column_major: bool = False,
    weight_bias: int = 0,
    rounding: str = "R",
) -> tuple[torch.Tensor, ...]:
    comm = _of(name)
    _dynamic_only(scales)
    return comm.all_reduce_add_rms_norm_fp8(
        x, residual, weight, eps, scales=scales, column_major=column_major, weight_bias=weight_bias, rounding=rounding
    )


def _dynamic_only(scales: str) -> None:
    if scales == "static":  # whose scale is an input, which no output of an operator may be
        raise InputError('all_reduce_add_rms_norm_fp8: scales="static": use all_reduce_add_rms_norm_fp8_static')


def _fp8_out(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    eps: float,
    name: str,
    scales: str,
    out: torch.Tensor,
    residual_out: torch.Tensor,
    scale_out: torch.Tensor | None = None,
    norm_out: torch.Tensor | None = None,
    *,
    weight_bias: int = 0,
    rounding: str = "R",
) -> None:
    comm = _of(name)
    outs = {"out": out, "residual_out": residual_out, "scale_out": scale_out, "norm_out": norm_out}
    how: dict[str, Any] = {"weight_bias": weight_bias, "rounding": rounding, "with_norm": norm_out is not None}
    comm.all_reduce_add_rms_norm_fp8(x, residual, weight, eps, scale=scale, scales=scales, **how, **outs)
    _written(*(one for one in outs.values() if one is not None))


def _written(*tensors: torch.Tensor) -> None:
    """As torch's own in-place operators do, so that autograd notices what it had kept for a derivative."""
    for tensor in tensors:
        if not tensor.is_inference():
            increment_version(tensor)


# -- what is traced: shapes and strides, of which the results are


def _no_grad(*tensors: torch.Tensor | None) -> None:
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        raise InputError(
            f"a tensor requires grad and operators of {NAMESPACE} are not differentiable: detach it, or trace under torch.no_grad()"
        )


def _dense(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return torch.empty(x.shape, dtype=dtype or x.dtype, device=x.device)


def _like_input(x: torch.Tensor, name: str) -> torch.Tensor:
    _no_grad(x)
    return _dense(x)


def _like_norm(x: Any, residual: Any, weight: Any, eps: float, name: str, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
    _no_grad(x, residual, weight)
    return _dense(x), _dense(x)


def _like_static(x: Any, residual: Any, weight: Any, scale: Any, eps: float, name: str, **how: Any) -> tuple[torch.Tensor, ...]:
    _no_grad(x, residual, weight, scale)
    return _dense(x, torch.float8_e4m3fn), _dense(x)


def _like_fp8(
    x: Any, residual: Any, weight: Any, eps: float, name: str, scales: str = "token", *, column_major: bool = False, **how: Any
) -> tuple[torch.Tensor, ...]:
    _no_grad(x, residual, weight)
    _dynamic_only(scales)
    lead, hidden = x.shape[:-1], x.shape[-1]
    groups = hidden // GROUP if scales == "group" else 1
    made = torch.empty((*lead, groups), dtype=torch.float32, device=x.device)
    if column_major:  # strides as the real ones have: of a matrix of (groups, rows), transposed
        rows = x.numel() // hidden
        made = torch.empty((groups, rows), dtype=torch.float32, device=x.device).t().view((*lead, groups))
    return _dense(x, torch.float8_e4m3fn), made, _dense(x)


def _nothing(*tensors: Any, **how: Any) -> None:
    _no_grad(*(tensor for tensor in tensors if isinstance(tensor, torch.Tensor)))


# -- the table

_HOW = '*, int weight_bias=0, str rounding="R"'
_GIVEN = "Tensor x, Tensor? residual, Tensor weight"
_OUTS = "Tensor(a!) out, Tensor(b!) residual_out"

OPERATORS: dict[str, tuple[str, Callable[..., Any], Callable[..., Any]]] = {
    "all_reduce": ("(Tensor x, str name) -> Tensor", _all_reduce, _like_input),
    "all_reduce_": ("(Tensor(a!) x, str name) -> ()", _all_reduce_, _nothing),
    "all_reduce_add_rms_norm": (f"({_GIVEN}, float eps, str name, {_HOW}) -> (Tensor, Tensor)", _norm, _like_norm),
    "all_reduce_add_rms_norm_": (
        f"(Tensor(a!) x, Tensor(b!) residual, Tensor weight, float eps, str name, {_HOW}) -> ()",
        _norm_,
        _nothing,
    ),
    "all_reduce_add_rms_norm_out": (f"({_GIVEN}, float eps, str name, {_OUTS}, {_HOW}) -> ()", _norm_out, _nothing),
    "all_reduce_add_rms_norm_fp8_static": (
        f"({_GIVEN}, Tensor scale, float eps, str name, {_HOW}) -> (Tensor, Tensor)",
        _static,
        _like_static,
    ),
    "all_reduce_add_rms_norm_fp8": (
        f'({_GIVEN}, float eps, str name, str scales="token", {_HOW[:2]} bool column_major=False,{_HOW[2:]})'
        " -> (Tensor, Tensor, Tensor)",
        _fp8,
        _like_fp8,
    ),
    "all_reduce_add_rms_norm_fp8_out": (
        f"({_GIVEN}, Tensor? scale, float eps, str name, str scales, {_OUTS}, Tensor(c!)? scale_out=None, "
        f"Tensor(d!)? norm_out=None, {_HOW}) -> ()",
        _fp8_out,
        _nothing,
    ),
}
"""name → (schema, what runs, what is traced)."""


def _define() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "DEF")
    for name, (schema, run, traced) in OPERATORS.items():
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        # On every device, so that what is refused hears our reasons. No other wrapping, which would cost more than the dispatcher.
        library.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", traced, lib=library)
    return library


_library = _define()  # operators go with it
