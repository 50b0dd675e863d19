"""Calls of a norm, of both fronts: checked, made ready and run; and what is left to check of those that are like an earlier one.

To check and to make ready takes longer than ten launches, and a model makes the same few kinds of calls again and again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .inputs import NO_ADDRESS, maker, never_matches, plain, tensor_guard
from .operands import Operands, operands
from .policy.operation import OpSpec
from .policy.plan import PACKET

MOST = 4096  # kinds that are remembered
HOW = (
    "quant",
    "rounding",
    "weight_bias",
    "column_major",
    "keep_norm",
)  # what a call says besides its tensors, as ``operands`` has it
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_STRIDED = torch.strided


@dataclass(slots=True)
class _Known:
    """
    Attributes:
        matches: whether a plain tensor is like ``x``, which is contiguous.
        made: makes each tensor that the caller gets: of a norm alone (norm, sum); else (quantized, scales, sum), and the norm.
        nbytes: of a tensor like ``x``.
        weight: its shape and bytes.
        run: the call, with one tensor per pointer.
    """

    matches: Callable[[torch.Tensor], bool]
    made: tuple[Callable[[], torch.Tensor] | None, ...]
    nbytes: int
    weight: tuple[torch.Size, int]
    run: Callable[..., None]


class KnownNorms:
    """The kinds of calls that were accepted. ``how``: the values of ``HOW``, the same for the same kind."""

    def __init__(self) -> None:
        self._kinds: dict[tuple, _Known] = {}

    def make(
        self,
        prepared: Callable[[OpSpec], Callable[..., None]],
        where: dict[str, Any],
        here: bool,
        given: tuple,
        eps: float,
        how: tuple,
        out: torch.Tensor | None,
        residual_out: torch.Tensor | None,
        outs: dict[str, torch.Tensor | None],
    ) -> tuple[torch.Tensor, ...]:
        """One call; returns its results.

        Args:
            prepared: of a call with at least one row: what runs it, given one tensor per pointer. The device is the current one.
            where: ``operation``, ``device``, ``index`` and ``rank`` of ``operands``.
            here: whether that device is the current one.
            given: x, residual, weight and scale.
            out, residual_out, outs: where results go; ``outs``: those of a quantized norm, by the names of ``operands``.
        """
        fresh = not any(one is not None for one in outs.values())
        if here and fresh and (out is None or how[0] == "none"):
            results = self._call(given, eps, how, out, residual_out, where["index"])
            if results is not None:
                return results
        x, residual, weight, scale = given
        options: dict[str, Any] = {**dict(zip(HOW, how, strict=True)), **outs, **where}
        call = operands(x, residual, weight, eps, scale=scale, out=out, residual_out=residual_out, **options)
        if call.spec.rows:
            with contextlib.nullcontext() if here else torch.cuda.device(where["device"]):
                run = prepared(call.spec)
                run(*call.tensors)
                for destination, source in call.copies:
                    destination.copy_(source)
            if fresh and (out is None or how[0] == "none"):
                self._remember(call, given, eps, how, run, (out, residual_out))
        return call.results

    def _remember(self, call: Operands, given: tuple, eps: float, how: tuple, run: Callable[..., None], into: tuple) -> None:
        """``given`` as it came, and ``into``, the caller's own tensors for results. Nothing where one of them had to be packed."""
        x, residual, weight, scale = given
        used = {id(tensor) for tensor in call.tensors}
        matches = tensor_guard(x) if plain(x) else never_matches
        if call.copies or matches is never_matches or any(t is not None and id(t) not in used for t in given):
            return
        if len(self._kinds) >= MOST:
            self._kinds.clear()
        held = {id(tensor) for tensor in into if tensor is not None}  # like x
        made = tuple(None if one is scale else maker(x if id(one) in held else one) for one in call.results)
        key = x.get_device(), x.shape, x.dtype, weight.dtype, residual is None, eps, how
        self._kinds[key] = _Known(matches, made, x.nbytes, (weight.shape, weight.nbytes), run)

    def clear(self) -> None:
        self._kinds.clear()

    def _call(
        self, given: tuple, eps: float, how: tuple, out: torch.Tensor | None, residual_out: torch.Tensor | None, index: int
    ) -> tuple[torch.Tensor, ...] | None:
        """Make a call of a known kind on the current device, ``index``, and return its results. None: nothing was done, it wants every
        check."""
        x, residual, weight, scale = given
        if type(x) is not _Tensor or x.layout is not _STRIDED or x.is_nested or type(weight) not in (_Parameter, _Tensor):
            return None
        known = self._kinds.get((index, x.shape, x.dtype, weight.dtype, residual is None, eps, how))
        if known is None or not known.matches(x) or not _is_weight(weight, known.weight[0], x):
            return None
        addresses = [x.data_ptr(), weight.data_ptr()]
        if residual is not None:
            if not plain(residual) or not known.matches(residual):
                return None
            addresses.append(residual.data_ptr())
        if scale is not None and not _is_scale(scale, x):
            return None
        for one, allowed in ((out, x), (residual_out, residual)):
            if one is not None and one is not allowed:
                if not plain(one) or not known.matches(one):
                    return None
                addresses.append(one.data_ptr())
        low_bits = 0
        for address in addresses:
            low_bits |= address
            if address < NO_ADDRESS:
                return None
        if low_bits % PACKET or (out is not None or residual_out is not None) and not _separate(known, given, out, residual_out):
            return None
        results: list[Any] = [scale if make is None else make() for make in known.made]
        total = 1 if scale is None and len(results) == 2 else 2
        if out is not None:
            results[0] = out
        if residual_out is not None:
            results[total] = residual_out
        tensors = (
            [x, results[0], weight, results[total]] if residual is None else [x, results[0], residual, weight, results[total]]
        )
        if total == 2:
            tensors.append(results[1])
            tensors += results[3:]
        known.run(*tensors)
        return tuple(results)


def _is_weight(weight: torch.Tensor, shape: torch.Size, x: torch.Tensor) -> bool:
    """Whether a kernel can read it as it is."""
    return (
        weight.shape == shape
        and weight.layout is _STRIDED
        and weight.is_contiguous()
        and weight.get_device() == x.get_device()
        and not weight.is_neg()
        and not (weight.requires_grad and torch.is_grad_enabled())
    )


def _is_scale(scale: torch.Tensor, x: torch.Tensor) -> bool:
    plainly = plain(scale) and scale.numel() == 1 and scale.dtype is torch.float32 and scale.get_device() == x.get_device()
    return plainly and not scale.requires_grad and not scale.is_neg() and scale.data_ptr() >= NO_ADDRESS


def _separate(known: _Known, given: tuple, out: torch.Tensor | None, residual_out: torch.Tensor | None) -> bool:
    """Whether no output lies in the memory of another operand, but for that which it may overwrite."""
    x, residual, weight, scale = given
    if out is not None and residual_out is not None and abs(out.data_ptr() - residual_out.data_ptr()) < known.nbytes:
        return False
    for written, allowed, others in ((out, x, (residual,)), (residual_out, residual, (x,))):
        if written is None:
            continue
        begin = written.data_ptr()
        for other in others if written is allowed else (*others, allowed):
            if other is not None and abs(begin - other.data_ptr()) < known.nbytes:
                return False
        for other, nbytes in ((weight, known.weight[1]), (scale, 4)):
            if other is not None and begin < other.data_ptr() + nbytes and other.data_ptr() < begin + known.nbytes:
                return False
    return True
