"""What the front relies on in an engine: kernels of our own, or torch.distributed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ..policy.operation import OpSpec
from ..policy.plan import Plan


class Call(Protocol):
    """Runs calls of one ``OpSpec``: one tensor per pointer of the operation, accepted and contiguous."""

    def __call__(self, x: torch.Tensor, out: torch.Tensor, /, *others: torch.Tensor) -> None: ...


EagerCall = Callable[[torch.Tensor, "torch.Tensor | None"], "torch.Tensor | None"]
"""``(x, out)`` -> ``out``, or a new tensor; None: declined, nothing was done."""


class Engine(Protocol):
    """Runs calls of the group.

    Attributes:
        path: of ``policy.verdict.Path``, as text.
        uses_device: calls may be in flight on the GPU.
    """

    @property
    def path(self) -> str: ...
    @property
    def uses_device(self) -> bool: ...

    def takes(self, spec: OpSpec) -> bool:
        """Whether calls of ``spec`` are this engine's; the same answer on all ranks."""
        ...

    def plan(self, spec: OpSpec) -> Plan:
        """What a call of ``spec`` runs, or who else does."""
        ...

    def prepared(self, spec: OpSpec) -> Call:
        """Calls of ``spec``, to be made again and again."""
        ...

    def in_c(self, spec: OpSpec, matches: Callable[[torch.Tensor], bool], empty: Callable[[], torch.Tensor]) -> EagerCall | None:
        """Calls of ``spec`` made in C, of tensors that ``matches`` says yes to; ``empty`` makes such a one. None: in Python alone."""
        ...

    def check(self) -> None:
        """Raise what kept a call from completing: a subclass of ``CommunicatorFailedError``."""
        ...

    def abort(self) -> None:
        """Stop calls in flight and refuse new ones, from any thread."""
        ...

    def lost(self, rank: int) -> None:
        """The process of ``rank`` has ended. From any thread, at once."""
        ...

    def close(self) -> None:
        """Free everything. No call is in flight, or ``abort`` was called."""
        ...
