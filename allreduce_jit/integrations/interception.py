"""Where calls of ``torch.distributed`` are met: ``dist.all_reduce``, and the operators of functional collectives.

``dist.all_reduce`` stays the function that it is, for those who imported it long ago, and for ``torch.compile``, which knows it by its
identity. torch wraps it to log exceptions, and what it wraps is in a cell of that closure: there goes our function. Operators get a
kernel before those of the devices through ``torch.library``, which sends on to those whatever is not ours.

Both are there while a group is installed; they ask ``by_group`` and ``by_name`` and leave everything else as it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from ..routes import DTYPE_NAMES
from ..torch_private import (
    BEFORE_BACKENDS,
    FUNCTIONAL_COLLECTIVES,
    coalescing,
    default_group,
    function_modes,
    functional_collective,
    group_name_of,
    group_named,
    knows_calls,
    operator_modes,
    to_backends,
)

if TYPE_CHECKING:
    from .installed import Installation

_SUM = dist.ReduceOp.SUM
_Tensor, _STRIDED = torch.Tensor, torch.strided

_NEW: Any = object()

# Whose calls of a group are, and (by the name that functional collectives use, with the group) of a name; None: nobody's of ours.
by_group: dict[dist.ProcessGroup | None, Installation | None] = {}
by_name: dict[str, tuple[Installation | None, dist.ProcessGroup]] = {}


class Done(dist.Work):
    """The handle of a call that is enqueued on the stream of its caller, like any other operation.

    Args:
        tensor: the result.
    """

    def __init__(self, tensor: torch.Tensor):
        super().__init__()
        self._tensor = tensor
        self._event = None
        if tensor.is_cuda:
            with torch.cuda.device(tensor.device):
                self._event = torch.cuda.Event()
                self._event.record()

    def wait(self, timeout: timedelta | None = None) -> bool:
        """What is enqueued on the current stream from now on runs after the call. On the CPU it has ended."""
        if self._event is not None:
            torch.cuda.current_stream(self._tensor.device).wait_event(self._event)
        return True

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()

    def is_completed(self) -> bool:
        return self._event is None or self._event.query()

    def is_success(self) -> bool:
        return self.is_completed()

    def exception(self) -> None:
        return None

    def result(self) -> list[torch.Tensor]:
        return [self._tensor]

    def get_future(self) -> torch.futures.Future:
        self.wait()
        made: torch.futures.Future = torch.futures.Future(devices=[self._tensor.device] if self._tensor.is_cuda else None)
        made.set_result([self._tensor])
        return made


def _eager(original: Callable[..., Any], met: Callable[[dist.ProcessGroup], Installation | None]) -> Callable[..., Any]:
    """``dist.all_reduce`` over ``original``. All that a call needs is within reach: its time is the host time of every call."""
    collecting = coalescing()

    @functools.wraps(original)
    def all_reduce(
        tensor: torch.Tensor, op: Any = _SUM, group: dist.ProcessGroup | None = None, async_op: bool = False
    ) -> dist.Work | None:
        group_or_default = default_group() if group is None else group
        here, why = by_group.get(group_or_default, _NEW), None
        if here is _NEW and isinstance(group_or_default, dist.ProcessGroup):
            here = by_group[group_or_default] = met(group_or_default)
        if here is None or here is _NEW:
            return original(tensor, op, group, async_op)
        if op is not _SUM:
            why = "op"
        elif type(tensor) is not _Tensor:
            why = "kind of tensor"
        elif tensor.dtype not in DTYPE_NAMES:
            why = "dtype"
        elif tensor.layout is not _STRIDED or tensor.is_nested:
            why = "kind of tensor"
        elif function_modes() or operator_modes():
            why = "mode"
        elif collecting:
            why = "coalesced"
        else:
            if here.matches(tensor):
                here.all_reduce(tensor, tensor)
            elif (why := here.why_not(tensor)) is None:
                here.all_reduce_any(tensor, tensor)
            if why is None:
                here.taken["eager"] += 1
                return Done(tensor) if async_op else None
        here.left[why] += 1
        return original(tensor, op, group, async_op)

    return all_reduce


class _Cell:
    """The cell of ``dist.all_reduce`` that holds what it wraps; where there is none, ``problem`` says so."""

    def __init__(self) -> None:
        self.original: Callable[..., Any] | None = None
        self.cell, self.problem = self._find()

    @staticmethod
    def _find() -> tuple[CellType | None, str | None]:
        outer: Any = dist.all_reduce
        inner = getattr(outer, "__wrapped__", None)
        cells = [cell for cell in getattr(outer, "__closure__", None) or () if cell.cell_contents is inner]
        if not isinstance(outer, FunctionType) or not isinstance(inner, FunctionType) or len(cells) != 1:
            return None, f"torch.distributed.all_reduce of torch {torch.__version__} wraps no function in a closure"
        return cells[0], None

    def open(self, met: Callable[[dist.ProcessGroup], Installation | None]) -> None:
        if self.cell is not None:
            original = self.original = self.cell.cell_contents
            self.cell.cell_contents = _eager(original, met)

    def close(self) -> None:
        if self.cell is not None and self.original is not None:
            self.cell.cell_contents, self.original = self.original, None


def _functional(name: str, met: Callable[[dist.ProcessGroup], Installation | None]) -> Callable[..., Any]:
    """The kernel of operator ``name``: ``all_reduce`` or, in place, ``all_reduce_``.

    What is not ours is dispatched again, which releases the GIL. ``torch.library.get_kernel(...).call_boxed`` does not, and a backend
    may wait there for a thread of its own that wants the GIL to free a tensor (seen with gloo and two groups, torch 2.13).
    """
    operator = functional_collective(name)
    in_place = name.endswith("_")

    def kernel(keys: Any, x: torch.Tensor, op: str, group_name: str) -> torch.Tensor:
        if x.is_meta:  # what is traced comes here, too
            return operator.redispatch(to_backends(keys), x, op, group_name)
        here, group = by_name.get(group_name, (_NEW, None))
        if group is None or group_name_of(group) != group_name:
            group = group_named(group_name)
            here, _ = by_name[group_name] = met(group), group
        if here is None:
            return operator.redispatch(to_backends(keys), x, op, group_name)
        if op != "sum":
            why = "op"
        elif type(x) is not _Tensor or x.layout is not _STRIDED or x.is_nested:
            why = "kind of tensor"
        else:
            why = None if here.matches(x) else here.why_not(x)
            if why is None:
                here.taken["functional"] += 1
                made = here.all_reduce_any(x, x if in_place else None)
                return x if in_place else made
        here.left[why] += 1
        return operator.redispatch(to_backends(keys), x, op, group_name)

    return kernel


class _Destruction:
    """Tells ``before`` of process groups that are about to be destroyed."""

    def __init__(self, before: Callable[[dist.ProcessGroup | None], None]):
        original = dist.destroy_process_group

        @functools.wraps(original)
        def destroy_process_group(group: dist.ProcessGroup | None = None) -> None:
            if self._active:
                before(group)
            original(group)

        self._active, self._original, self._ours = True, original, destroy_process_group
        self._set(original, destroy_process_group)

    def close(self) -> None:
        self._active = False  # for who holds on to ours
        self._set(self._ours, self._original)

    @staticmethod
    def _set(old: Any, new: Any) -> None:
        modules: tuple[Any, ...] = dist, dist.distributed_c10d
        for module in modules:
            if module.destroy_process_group is old:
                module.destroy_process_group = new


class Interception:
    """Both places, open from the first group that is installed to the last one that is not any more.

    Attributes:
        problems: route → why calls on it are not met.
    """

    def __init__(self) -> None:
        self.problems: dict[str, str] = {}
        self._cell: _Cell | None = None
        self._library: torch.library.Library | None = None
        self._destruction: _Destruction | None = None

    def open(
        self,
        met: Callable[[str, dist.ProcessGroup], Installation | None],
        before_destruction: Callable[[dist.ProcessGroup | None], None],
    ) -> None:
        """
        Args:
            met: whose calls of a group are that is met for the first time on a route, ``eager`` or ``functional``.
            before_destruction: is given a group that is about to be destroyed, None for all.
        """
        if self._cell is not None:
            return
        self.problems = {}
        self._destruction = _Destruction(before_destruction)
        self._cell = _Cell()
        if problem := knows_calls():
            self.problems = {"eager": problem, "functional": problem}
            return
        if self._cell.problem:
            self.problems["eager"] = self._cell.problem
        self._cell.open(functools.partial(met, "eager"))
        try:
            ours = functools.partial(met, "functional")
            kernels = {name: _functional(name, ours) for name in ("all_reduce", "all_reduce_")}
        except (AttributeError, RuntimeError) as e:
            self.problems["functional"] = f"torch {torch.__version__}: {e}"
            return
        library = self._library = torch.library.Library(FUNCTIONAL_COLLECTIVES, "IMPL")
        for name, kernel in kernels.items():
            library.impl(name, kernel, BEFORE_BACKENDS, with_keyset=True)

    def close(self) -> None:
        if self._cell is not None:
            self._cell.close()
        if self._destruction is not None:
            self._destruction.close()
        by_group.clear()
        by_name.clear()
        self._cell = self._library = self._destruction = None  # a library's kernels go with it
