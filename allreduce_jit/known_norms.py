"""Calls of a norm that are like an earlier one, which has passed every check: what is left to check of them.

To check and to make ready takes longer than ten launches, and a model makes the same few kinds of calls again and again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .inputs import never_matches, plain, tensor_guard
from .operands import ALIGNMENT, Operands
from .policy.plan import PACKET
from .torch_private import quick_empty

assert ALIGNMENT == PACKET
MOST = 4096  # kinds that are remembered
LOWEST = 1 << 32  # below are offsets into storages that were freed under their tensors, no addresses (engine/prepared.py)
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter
_STRIDED = torch.strided
Make = Callable[[], torch.Tensor]


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
    made: tuple[Make | None, ...]
    nbytes: int
    weight: tuple[torch.Size, int]
    run: Callable[..., None]


class KnownNorms:
    """The kinds of calls that were accepted on one device. ``how``: what a call says besides its tensors, the same for the same kind."""

    def __init__(self) -> None:
        self._kinds: dict[tuple, _Known] = {}

    def remember(self, call: Operands, given: tuple, eps: float, how: tuple, run: Callable[..., None]) -> None:
        """``given``: x, residual, weight and scale as they came. Nothing where one of them had to be packed."""
        x, residual, weight, scale = given
        used = {id(tensor) for tensor in call.tensors}
        matches = tensor_guard(x) if plain(x) else never_matches
        if call.copies or matches is never_matches or any(t is not None and id(t) not in used for t in given):
            return
        if len(self._kinds) >= MOST:
            self._kinds.clear()
        made = tuple(None if result is scale else _maker(result) for result in call.results)
        key = x.shape, x.dtype, weight.dtype, residual is None, eps, how
        self._kinds[key] = _Known(matches, made, x.nbytes, (weight.shape, weight.nbytes), run)

    def clear(self) -> None:
        self._kinds.clear()

    def call(
        self, given: tuple, eps: float, how: tuple, out: torch.Tensor | None, residual_out: torch.Tensor | None
    ) -> tuple[torch.Tensor, ...] | None:
        """Make a call of a known kind on the current device, and return its results. None: nothing was done, it wants every check.

        Args:
            given: x, residual, weight and scale.
            out, residual_out: where results go; ``out`` of a norm that is not quantized.
        """
        x, residual, weight, scale = given
        if type(x) is not _Tensor or x.layout is not _STRIDED or x.is_nested or type(weight) not in (_Parameter, _Tensor):
            return None
        known = self._kinds.get((x.shape, x.dtype, weight.dtype, residual is None, eps, how))
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
            if address < LOWEST:
                return None
        if (
            low_bits % ALIGNMENT
            or (out is not None or residual_out is not None)
            and not _separate(known, given, out, residual_out)
        ):
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


def _maker(like: torch.Tensor) -> Make:
    """Makes tensors of its shape, strides and dtype on the current device, or the CPU."""
    quick: Any = quick_empty(like.device.type)
    if quick is None:
        return functools.partial(torch.empty_strided, tuple(like.shape), like.stride(), dtype=like.dtype, device=like.device)
    return functools.partial(quick, tuple(like.shape), like.stride(), like.dtype)


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
    return plainly and not scale.requires_grad and not scale.is_neg() and scale.data_ptr() >= LOWEST


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
