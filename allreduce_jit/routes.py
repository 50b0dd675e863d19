"""Which engine runs a call: found once for each size and dtype, and for each kind of tensor that one check can tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import torch

from .errors import NotDeterministicError
from .inputs import maker, never_matches, plain, tensor_guard
from .policy.operation import DTYPES, OpSpec, all_reduce

if TYPE_CHECKING:
    from .engine.protocol import Call, EagerCall, Engine

DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}
MAX_ROUTES = 4096


@dataclass(slots=True)
class Route:
    """Who runs calls of one shape and dtype.

    Attributes:
        call: runs them.
        matches: whether a plain tensor is like one that has passed every check, so that it need not; false negatives are
            possible, false positives are not.
        empty: makes such a tensor on the current device.
        nbytes: size of such a tensor.
        in_c: ``call`` in C, given an output or not, with all checks of its own; it may decline. None: there is no such.
    """

    call: Call
    matches: Callable[[torch.Tensor], bool]
    empty: Callable[[], torch.Tensor]
    nbytes: int
    in_c: EagerCall | None = None


def _no_call(*tensors: torch.Tensor) -> NoReturn:
    raise AssertionError("no tensor matches this route")


NO_ROUTE = Route(_no_call, never_matches, _no_call, 0)


def spec_of(numel: int, dtype: torch.dtype) -> OpSpec:
    """An all-reduce of ``numel`` elements."""
    return all_reduce(DTYPE_NAMES.get(dtype) or str(dtype).removeprefix("torch."), numel)


class Routes:
    """The routes of one communicator.

    Args:
        engines: the best first; the last one takes what no other does.
        deterministic: the last one must not run a call, unless it is the only rank's.
    """

    def __init__(self, engines: Sequence[Engine], deterministic: bool, rank: int):
        self._engines: Sequence[Engine] = engines
        self._deterministic, self._rank = deterministic, rank
        self._calls: dict[OpSpec, Call] = {}
        self._routes: dict[tuple[torch.Size, torch.dtype], Route] = {}  # of tensors that one check can tell
        self._taken: dict[tuple[int, torch.dtype], bool] = {}

    def known(self, x: torch.Tensor) -> Route:
        """The route of tensors like ``x``, if one was accepted before; else ``NO_ROUTE``."""
        route = self._routes.get((x.shape, x.dtype), NO_ROUTE) if plain(x) else NO_ROUTE
        return route if route.matches(x) else NO_ROUTE

    def of(self, x: torch.Tensor) -> Route:
        """The route of ``x``, accepted and contiguous."""
        route = self.known(x)
        if route is NO_ROUTE:
            spec = spec_of(x.numel(), x.dtype)
            call = self._calls.get(spec) or self._prepared(spec)
            route = Route(call, tensor_guard(x), maker(x), x.nbytes)
            if route.matches(x):
                route.in_c = self.engine(spec).in_c(spec, route.matches, route.empty)
                remember(self._routes, (x.shape, x.dtype), route)
        return route

    def engine(self, spec: OpSpec) -> Engine:
        """Who runs calls of ``spec``; the same on all ranks."""
        return next((engine for engine in self._engines if engine.takes(spec)), self._engines[-1])

    def kernel_takes(self, numel: int, dtype: torch.dtype) -> bool:
        """Whether a kernel runs calls of so many elements; remembered, as inference engines ask before each call."""
        taken = self._taken.get((numel, dtype))
        if taken is None:
            taken = self.engine(spec_of(numel, dtype)) is not self._engines[-1]
            remember(self._taken, (numel, dtype), taken)
        return taken

    def clear(self) -> None:
        """Hold no engine any more."""
        self._engines = ()
        self._calls.clear()
        self._routes.clear()
        self._taken.clear()

    def _prepared(self, spec: OpSpec) -> Call:
        """Remembered, as a plan costs more than the look-up."""
        engine = self.engine(spec)
        if self._deterministic and engine is self._engines[-1]:
            raise NotDeterministicError(
                f"rank {self._rank}: torch.{spec.dtype} is all-reduced by torch.distributed, whose bits differ from the exact "
                "sum; use fp32, fp16 or bf16, or build the communicator without deterministic=True"
            )
        call = engine.prepared(spec)
        remember(self._calls, spec, call)
        return call


def remember(known: dict, key: object, value: object) -> None:
    """Calls of ever new sizes must not fill the memory: what is dropped is found again."""
    if len(known) >= MAX_ROUTES:
        known.clear()
    known[key] = value
