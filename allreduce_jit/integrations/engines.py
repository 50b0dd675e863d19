"""What the plug-ins for inference engines share: their switch, what becomes of a refusal, their log, and the calls of one group."""

from __future__ import annotations

import logging
import os
import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..communicator import Communicator
from ..describe import CommunicatorReport
from ..errors import ClosedError, InputError
from ..inputs import as_device
from ..norms import add_rms_norm, add_rms_norm_fp8, norm_family
from ..policy.nvlink_norm import APART
from ..policy.operation import DTYPES, OpSpec
from ..records import Record
from ..settings import PLUGINS_SWITCH, parse_plugins
from ..version import __version__

log = logging.getLogger("allreduce_jit")

_KERNEL_DTYPES = tuple(getattr(torch, name) for name in DTYPES)
_groups: weakref.WeakValueDictionary[str, Group] = weakref.WeakValueDictionary()


def switch() -> str:
    """``off``, ``on`` or ``require``. Other variables are not looked at: while it is off, nothing of ours may stop an engine.

    Raises:
        SettingsError: it has another value.
    """
    return parse_plugins(PLUGINS_SWITCH, os.environ.get(PLUGINS_SWITCH, "off"))


class _Through(logging.Handler):
    """Hands records to another logger, as it is configured by then: engines do that after their plug-ins are loaded."""

    def __init__(self, name: str):
        super().__init__()
        self.set_name(name)
        self._theirs = logging.getLogger(name)

    def emit(self, record: logging.LogRecord) -> None:
        if logging.getLogger().handlers:
            return  # those show it already
        if not self._theirs.handlers:
            if logging.lastResort is not None and record.levelno >= logging.lastResort.level:
                logging.lastResort.handle(record)
        elif self._theirs.isEnabledFor(record.levelno):
            self._theirs.handle(record)


def speak_through(name: str) -> None:
    """What this package logs is said by logger ``name`` where the root logger has no handlers, and from INFO on."""
    if name not in [handler.get_name() for handler in log.handlers]:
        log.addHandler(_Through(name))
    if log.level == logging.NOTSET:
        log.setLevel(logging.INFO)


@dataclass(frozen=True)
class GroupReport(Record):
    """What a group of an engine has made of its calls.

    Attributes:
        group: as the engine calls it.
        taken: calls that ours ran, by kind.
        left: calls that the engine ran, by reason.
        communicator: what that says of itself; None once it is closed, which is ``{}`` in JSON.
    """

    group: str
    taken: Mapping[str, int]
    left: Mapping[str, int]
    communicator: CommunicatorReport | None

    def to_dict(self) -> dict[str, Any]:
        """Ready for ``json.dumps``."""
        return super().to_dict() | ({"communicator": {}} if self.communicator is None else {})


class Group:
    """One group's calls: those that a kernel of ours runs, and whatever is said of the others.

    Args:
        name: as the engine calls the group.
        comm: its communicator, which ``close`` closes.
        theirs: the engine's own all-reduce; it may be in place.

    Attributes:
        taken: calls that ours ran, by kind.
        left: calls that the engine ran, by reason.
    """

    def __init__(
        self,
        name: str,
        comm: Communicator,
        theirs: Callable[[torch.Tensor], torch.Tensor],
    ):
        self.name, self.comm, self.theirs = name, comm, theirs
        self.taken: Counter[str] = Counter()
        self.left: Counter[str] = Counter()
        self._fused: dict[tuple[int, int, torch.dtype], bool] = {}
        _groups[name] = self

    @classmethod
    def over(
        cls,
        name: str,
        cpu_group: dist.ProcessGroup,
        device: torch.device | str | int,
        theirs: Callable[[torch.Tensor], torch.Tensor],
        operations: Sequence[OpSpec] = (),
    ) -> Group:
        """With a communicator of its own, over ``cpu_group``, which has a CPU backend. Collective.

        Raises:
            SettingsError, InputError, PeerTimeoutError: as ``allreduce_jit.init``.
        """
        # NCCL is the engine's own business: calls without a kernel are left to it.
        return cls(name, Communicator(cpu_group, as_device(device), create_groups=False, operations=operations), theirs)

    def takes(self, x: torch.Tensor) -> bool:
        """Whether an all-reduce of ``x`` is ours: cheap, and the same on all ranks for tensors that are alike. Counts."""
        if x.is_contiguous() and x.device == self.comm.device and not x.requires_grad:
            numel = x.numel()
            if numel and self.comm.takes(numel, x.dtype):
                return True
        self.left[self._why_left(x)] += 1
        return False

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of what ``takes`` was asked about, in a new tensor with the strides of ``x``."""
        self.taken["all_reduce"] += 1
        return self.comm.all_reduce(x)

    def fuses(self, rows: int, hidden: int, dtype: torch.dtype) -> bool:
        """Whether an all-reduce with a norm of so many rows is one kernel; the same on all ranks."""
        key = rows, hidden, dtype
        if key not in self._fused:
            try:
                self._fused[key] = self.comm.plan_norm(rows, norm_family(dtype, hidden)).algorithm != APART
            except InputError:  # a hidden size or dtype that no norm of ours has
                self._fused[key] = False
        return self._fused[key]

    def add_rms_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        *,
        weight_bias: int = 0,
        rounding: str = "R",
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``Communicator.all_reduce_add_rms_norm``; the engine's all-reduce and our norm where no kernel of ours runs the sum."""
        if not self.takes(x):
            return add_rms_norm(self.theirs(x.clone()), residual, weight, eps, weight_bias=weight_bias, rounding=rounding)
        self.taken["add_rms_norm"] += 1
        return self.comm.all_reduce_add_rms_norm(x, residual, weight, eps, weight_bias=weight_bias, rounding=rounding)

    def add_rms_norm_fp8(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, scale: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm in e4m3 by the static ``scale``, sum with the residual), as ``add_rms_norm``."""
        scale = scale.reshape(1)
        if self.takes(x):
            self.taken["add_rms_norm_fp8"] += 1
            found = self.comm.all_reduce_add_rms_norm_fp8(x, residual, weight, eps, scale=scale)
        else:
            found = add_rms_norm_fp8(self.theirs(x.clone()), residual, weight, eps, scale=scale)
        return found[0], found[2]

    def describe(self) -> GroupReport:
        """The group, calls taken and left, and what the communicator says of itself."""
        about = None if self.comm.closed else self.comm.describe()
        return GroupReport(self.name, dict(self.taken), dict(self.left), about)

    def close(self) -> None:
        """Release everything; idempotent, talks to nobody."""
        if _groups.get(self.name) is self:
            del _groups[self.name]
        self.comm.close()

    def _why_left(self, x: torch.Tensor) -> str:
        if self.comm.closed:
            return "closed"
        if x.device != self.comm.device:
            return f"on {x.device}"
        if x.dtype not in _KERNEL_DTYPES:
            return str(x.dtype).removeprefix("torch.")
        if not x.numel():
            return "empty"
        return "not contiguous" if not x.is_contiguous() else "requires grad" if x.requires_grad else "no kernel for the size"


def group_of(name: str) -> Group:
    """The open group of that name in this process.

    Raises:
        ClosedError: there is none.
    """
    found = _groups.get(name)
    if found is None:
        raise ClosedError(
            f"no open group {name!r} of allreduce_jit: it has {', '.join(_groups) or 'none'}; build it before this call"
        )
    return found


def line(engine: str, version: str, group: str, ours: str, fused: str, before: Sequence[str]) -> str:
    """The line that a plug-in logs of a group."""
    first = "; before us: " + (", ".join(before) or "nothing")
    return f"allreduce_jit {__version__} in {engine} {version}, group {group}: {ours}; all-reduce with a norm: {fused}{first}"
