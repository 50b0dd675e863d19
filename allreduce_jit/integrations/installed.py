"""``install``: programs that all-reduce through ``torch.distributed`` take our path, without a change of their own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..communicator import Communicator
from ..errors import SetupError
from ..inputs import as_device, never_matches, tensor_guard
from ..paths import Path
from ..records import Record
from ..routes import DTYPE_NAMES, remember
from ..settings import Settings
from ..setup import groups
from ..setup.exchange import all_gather_fields, require_group
from ..torch_private import function_modes, functional_collective, group_name_of
from .interception import Interception, by_group, by_name

log = logging.getLogger("allreduce_jit")

LEFT = {
    "op": "another operation than SUM",
    "kind of tensor": "a subclass of torch.Tensor, or a sparse or nested one",
    "dtype": "no fp32, fp16 or bf16",
    "device": "a tensor on another device than this installation's",
    "layout": "not contiguous, or a negated view",
    "empty": "no elements",
    "no kernel": "no kernel is expected to be fastest at this size, or there is none on this machine (see reason)",
    "mode": "a mode for torch's functions or operators is active, which means to see the call",
    "coalesced": "some group collects calls to make them together",
}
"""Why a call went where it would have gone: the kinds that ``describe`` counts."""

_NUMEL = 1024  # of a probe

_lock = threading.RLock()
_installations: dict[dist.ProcessGroup, Installation] = {}
_interception = Interception()


class _Reached(BaseException):
    """A probe has come to where a call would be taken, or left for the reason ``why``. No handler of ``Exception`` is to hold it up."""

    def __init__(self, why: str | None):
        super().__init__(why)
        self.why = why


@dataclass(frozen=True)
class InstallationReport(Record):
    """What became of ``install``; ``Installation.describe`` makes it.

    Attributes:
        group: name of the program's group, as torch has it.
        path, reason: of the communicator behind it, and why.
        installed: False once it is uninstalled.
        routes: eager, functional and compiled → whether calls on that way are ours, as ``Installation.routes``.
        taken: calls that ran in our kernels, by route.
        left: calls that went where they would have gone, by the kinds of ``LEFT``, those that came at least once.
    """

    group: str
    path: Path
    reason: str
    installed: bool
    routes: Mapping[str, str]
    taken: Mapping[str, int]
    left: Mapping[str, int]


class Installation:
    """One group whose all-reduces are ours where a kernel takes them. Made by ``install``.

    Attributes:
        group: the group of the program.
        routes: eager, functional and compiled → what became of a probe on that way, on all ranks: ``taken``, ``left: ...`` or
            ``off: ...``, and then calls on it go where they went.
        taken: calls that ran in our kernels, by route; those of compiled graphs are among the functional ones.
        left: calls of this group that went where they would have gone, by the kinds of ``LEFT``.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, same_ranks: bool):
        self.group, self.name = group, group.group_name
        self.ranks = dist.get_process_group_ranks(group) if same_ranks else None
        over = group if groups.has_backend(group, "cpu:") else groups.gloo_sibling(group)
        # No NCCL of our own: what no kernel takes is the program's NCCL's.
        self.comm: Communicator = Communicator(over, device, create_groups=False)
        self.path, self.reason = self.comm.path, self.comm.reason
        self.all_reduce = self.comm.all_reduce  # of what ``matches``
        self.matches: Callable[[torch.Tensor], bool] = never_matches  # most calls are like the one before
        self.routes: dict[str, str] = {}
        self.taken = {"eager": 0, "functional": 0}  # dictionaries: a Counter takes 0.1 µs to count
        self.left = dict.fromkeys(LEFT, 0)
        self._index = -1 if device.type == "cpu" else device.index
        self._guards: dict[tuple[torch.Size, torch.dtype], Callable[[torch.Tensor], bool]] = {}

    def why_not(self, x: torch.Tensor) -> str | None:
        """Why a plain strided tensor is not for our kernels, a kind of ``LEFT``; None if it is. The same on all ranks."""
        known = self._guards.get((x.shape, x.dtype), never_matches)
        if known(x):
            self.matches = known
            return None
        if x.dtype not in DTYPE_NAMES:
            return "dtype"
        if x.get_device() != self._index or x.is_meta:
            return "device"
        if not x.is_contiguous() or x.is_neg():
            return "layout"
        numel = x.numel()
        if not numel:
            return "empty"
        if not self.comm.takes(numel, x.dtype):
            return "no kernel"
        guard = tensor_guard(x)
        if guard(x):
            remember(self._guards, (x.shape, x.dtype), guard)
            self.matches = guard
        return None

    def all_reduce_any(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """``all_reduce`` into ``x`` itself or a new tensor, also of one that requires grad: as torch's own, it leaves autograd alone."""
        plain = x.detach() if x.requires_grad else x
        return self.all_reduce(plain, plain if out is x else None)

    def describe(self) -> InstallationReport:
        """What was found at installation and what calls came since."""
        calls = dict(self.taken), {kind: n for kind, n in self.left.items() if n}
        return InstallationReport(self.name, self.path, self.reason, not self.comm.closed, dict(self.routes), *calls)

    # -- internals

    def probe(self, compiled: bool) -> None:
        """Send a call through each route, on this rank alone, and agree with the others on which routes are ours. Collective."""
        found: dict[str, Any] = {route: f"not reached: {problem}" for route, problem in _interception.problems.items()}
        stand_in: Any = _Probe(self)
        by_group[self.group], by_name[self.name] = stand_in, (stand_in, self.group)
        try:
            for route, call in (("eager", self._eagerly), ("functional", self._functionally), ("compiled", self._compiled)):
                if route == "compiled" and not compiled:
                    found[route] = "not probed"
                elif route == "compiled" and "not reached" in found["functional"]:
                    found[route] = found["functional"]  # graphs call the same operators
                elif route not in found:
                    found[route] = self._sent(call)
        finally:
            del by_group[self.group], by_name[self.name]
        answers = all_gather_fields(self.comm.group, found, Settings.from_env().setup_timeout_s)
        for route in found:
            told = [answer[route] for answer in answers]
            bad = [rank for rank, text in enumerate(told) if not text.startswith(("taken", "left", "not probed"))]
            self.routes[route] = f"off: rank {bad[0]}: {told[bad[0]]}" if bad else told[0]
            if not bad and len(set(told)) > 1:
                self.routes[route] = f"off: ranks differ: {'; '.join(f'rank {rank}: {text}' for rank, text in enumerate(told))}"

    def serves(self, route: str, group: dist.ProcessGroup) -> bool:
        """Whether calls over ``group`` that come on ``route`` are this installation's."""
        if self.routes[route].startswith("off") or group_name_of(group) is None:  # which torch has destroyed
            return False
        return group is self.group or (self.ranks is not None and dist.get_process_group_ranks(group) == self.ranks)

    def _sent(self, call: Callable[[torch.Tensor], Any]) -> str:
        with torch.inference_mode(False), torch.no_grad():
            x = torch.ones(_NUMEL, dtype=torch.bfloat16, device=self.comm.device)
            try:
                call(x)
            except _Reached as reached:
                return "taken" if reached.why is None else f"left: {LEFT[reached.why]}"
            except Exception as e:  # noqa: BLE001 - whatever is wrong with a route, the others work, and all ranks are told
                return f"not reached: {type(e).__name__}: {e}"[:500]
        return "not reached: torch.distributed made the call itself"

    def _eagerly(self, x: torch.Tensor) -> None:
        dist.all_reduce(x, group=self.group)

    def _functionally(self, x: torch.Tensor) -> None:
        functional_collective("all_reduce")(x, "sum", self.name)

    def _compiled(self, x: torch.Tensor) -> None:
        torch.compile(self._eagerly, fullgraph=True)(x)

    def close(self) -> None:
        """Release the communicator; idempotent, talks to nobody. ``uninstall`` does it."""
        self.matches, self._guards = never_matches, {}
        self.comm.close()


class _NotCounted(dict[str, int]):
    """The counts of a probe, which goes no further than to where it would be counted."""

    def __missing__(self, kind: str) -> int:
        if kind == "mode" and function_modes():  # which sees the call, and makes it again
            return 0
        raise _Reached(kind)

    def __setitem__(self, kind: str, count: int) -> None:
        pass


class _Probe:
    """Stands where an installation will, and takes no call."""

    def __init__(self, installation: Installation):
        self._installation, self.group, self.left = installation, installation.group, _NotCounted()
        self.matches = never_matches

    def why_not(self, x: torch.Tensor) -> str | None:
        raise _Reached(self._installation.why_not(x))


def install(
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | int | None = None,
    *,
    same_ranks: bool = False,
    compiled: bool = True,
) -> Installation:
    """From now on, all-reduces over ``group`` that a program makes through ``torch.distributed`` run in our kernels where one takes them:
    ``dist.all_reduce`` (SUM, in place, ``async_op`` as well) and functional collectives, eager and in graphs of ``torch.compile``.
    All others go where they went. Collective; once for each group and process: a second call returns the first one's answer.

    A call that is taken runs on the current stream, as other operations do. Sums are those of ``Communicator.all_reduce``: their bits may
    differ from NCCL's. ``dist.destroy_process_group`` uninstalls.

    Not taken: what C++ calls by itself (DistributedDataParallel), ``all_reduce_coalesced``, methods of process groups.

    Args:
        group: None = the default group.
        device: this rank's device; None = the current CUDA device, or the CPU where there is none.
        same_ranks: serve other groups of exactly these ranks as well, as ``DeviceMesh`` makes (and with it Hugging Face transformers),
            whenever they are made. Calls over all of them then have one order, which has to be the same on all ranks.
        compiled: try a compiled graph as well, for the report alone, which takes seconds.

    Returns:
        What was found: ``routes``, ``taken``, ``left``, ``describe()``.

    Raises:
        InputError, InputTypeError, SettingsError: as ``init``.
        SetupError: no route is open on all ranks; nothing is installed.
    """
    group = require_group(group)
    with _lock:
        if group in _installations:
            return _installations[group]
        installation = Installation(group, as_device(device), same_ranks)
        try:
            _interception.open(_met, _before_destruction)
            installation.probe(compiled)
            if not any(installation.serves(route, group) for route in ("eager", "functional")):
                raise SetupError(f"rank {installation.comm.rank}: no call of torch.distributed can be met: {installation.routes}")
        except BaseException:
            _end(installation)
            raise
        _installations[group] = installation
        _forget()
    if installation.comm.rank == 0:
        off = [route for route, told in installation.routes.items() if told.startswith("off")]
        log.log(logging.WARNING if off else logging.INFO, "installed: %s", installation.describe().to_dict())
    return installation


def uninstall(group: dist.ProcessGroup | None = None) -> None:
    """Undo ``install``: of ``group``, or of every group (None). Idempotent, talks to nobody. Drop graphs with calls that were taken before."""
    with _lock:
        for one in [_installations.get(group)] if group is not None else list(_installations.values()):
            if one is not None:
                del _installations[one.group]
                _end(one)


def _end(installation: Installation) -> None:
    _forget()
    installation.close()
    if not _installations:
        _interception.close()


def _met(route: str, group: dist.ProcessGroup) -> Installation | None:
    """Whose calls over ``group`` are, which is asked once for each group; the one that was installed for it, if there is one."""
    with _lock:
        own = _installations.get(group)
        return next((one for one in (own, *_installations.values()) if one is not None and one.serves(route, group)), None)


def _forget() -> None:
    """Ask again whose calls are."""
    by_group.clear()
    by_name.clear()


def _before_destruction(group: dist.ProcessGroup | None) -> None:
    """Process groups are about to be destroyed: ``group``, or all of them."""
    uninstall(None if group is dist.group.WORLD else group)
    _forget()
