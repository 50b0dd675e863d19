"""The front for everyone: ``init`` and ``Communicator``."""

from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .engine.bounded import within
from .engine.fallback import TorchEngine
from .errors import ClosedError, InputError, NotDeterministicError
from .inputs import as_device, check_output, maker, memory_problem, never_matches, packed, plain, refuse, tensor_guard
from .machine.watcher import watch
from .policy.catalogue import DTYPES, ITEMSIZE
from .policy.plan import Plan
from .policy.verdict import Path, Reason
from .setup import groups, nccl
from .setup.exchange import require_cpu_group, require_group
from .setup.ladder import climb
from .torch_private import current_device

if TYPE_CHECKING:
    from .engine.base import KernelEngine, Prepared

log = logging.getLogger("allreduce_jit")

DTYPE_NAMES = {getattr(torch, name): name for name in DTYPES}
LARGEST_BAND = 1 << 30
MAX_ROUTES = 4096
LOCAL_CLOSE_S = 3.0
_STRIDED = torch.strided
_Tensor = torch.Tensor


@dataclass(slots=True)
class Route:
    """Who runs calls of one shape and dtype.

    Attributes:
        matches: whether a plain tensor is like one that has passed every check, so that it need not; a no says nothing.
        empty: makes such a tensor on the current device.
        nbytes: size of such a tensor.
    """

    runner: Prepared | TorchEngine | None
    matches: Callable[[torch.Tensor], bool]
    empty: Callable[[], torch.Tensor] | None
    nbytes: int


NO_ROUTE = Route(None, never_matches, None, 0)


def init(
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | int | None = None,
    *,
    deterministic: bool = False,
    max_ctas: int | None = None,
) -> Communicator:
    """A communicator over ``group`` on the best path that all of its ranks can take. Collective.

    Args:
        group: any torch.distributed group (NCCL, gloo or both); None = the default group. What is missing
            (a CPU group to agree over, NCCL for calls without a kernel) is created for its ranks.
        device: this rank's device; None = the current CUDA device, or the CPU where there is none.
        deterministic: promise the exact bits of the fp32 sum in rank order; a call that only
            torch.distributed could run is then an error.
        max_ctas: at most so many thread blocks on the V2 path (2 or more), for all-reduces beside other kernels, such
            as matrix products; costs bandwidth. None: as many as are fastest. The bits are the same.

    Raises:
        InputError: torch.distributed is not initialised, this rank is not in ``group``, or ``device`` is none;
            on all ranks, if they ask for different things.
        InputTypeError: ``group`` is no process group.
        SettingsError: a bad environment variable on any rank; raised on all.
        NotDeterministicError: ``deterministic`` and no kernel path is possible; the message says why.
    """
    require_group(group)
    group = dist.group.WORLD if group is None else group
    if max_ctas is not None and (not isinstance(max_ctas, int) or max_ctas < 2):
        raise InputError(f"max_ctas={max_ctas!r}: expected 2 blocks or more (one watches, the others move data), or None")
    return Communicator(group, as_device(device), deterministic=deterministic, max_ctas=max_ctas)


class Communicator:
    """All-reduces over one group on one device. Made by ``init``; also a context manager.

    Calls must come in the same order, with the same shape and dtype, on all ranks.

    Attributes:
        group: the CPU-capable group that set-up was agreed over; None once closed.
        device: this rank's device.
        rank: this rank in the group.
        world_size: number of ranks.
        path: the best path of this communicator (single calls may take another: see ``plan``).
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device,
        *,
        deterministic: bool = False,
        highest: Path = Path.V2,
        lowest: Path = Path.LEGACY,
        create_groups: bool = True,
        max_ctas: int | None = None,
    ):
        self.device = device
        self._index = index = -1 if device.type == "cpu" else device.index  # as Tensor.get_device has it
        self._current = current_device if device.type == "cuda" and torch.cuda.is_available() else lambda: index
        self.deterministic = deterministic
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._closed = False
        self._engine = self._torch = self._watch = None
        self._runners: dict[tuple[int, torch.dtype], Prepared | TorchEngine] = {}  # by number of elements
        self._routes: dict[tuple[torch.Size, torch.dtype], Route] = {}  # of tensors that can be told by one call
        self._last = NO_ROUTE  # most calls are like the one before
        self.group = group
        if not groups.has_backend(group, "cpu:"):
            if not create_groups:
                require_cpu_group(group)
            self.group = groups.gloo_sibling(group)
        self._ladder = climb(self.group, device, deterministic, highest, lowest, max_ctas)
        self._engine = self._ladder.engine
        self.path = self._ladder.verdict.path
        if deterministic and self._engine is None and self.world_size > 1:
            raise NotDeterministicError(
                f"rank {self.rank}: deterministic=True needs a kernel path, but {self.reason}; "
                "remove the cause, or build the communicator without deterministic=True"
            )
        self._torch = self._fallback(create_groups or groups.has_backend(group, "cuda:nccl"))
        self._watch_peers(self._engine, self._torch)
        if create_groups and not self._keeps_all():
            self.warmup()  # NCCL takes some calls, and its first one must not be captured
            if self._torch.problem and self._engine is not None:
                self._engine.hands_over = False  # our kernels are faster than gloo at any size
        if self.rank == 0:
            log.info("%s on %d ranks: %s", self.path.value, self.world_size, self.reason)

    # -- calls

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of ``x`` over all ranks, in ``out`` or a new tensor; ``out=x`` works in place.

        Args:
            x: any shape, on this communicator's device; fp32, fp16 and bf16 take the kernels, other dtypes
                torch.distributed. Contiguous tensors at any address are used as they are, others copied.
            out: same shape, dtype and device; either ``x`` itself or memory that does not overlap it.

        Returns:
            ``out``, or a new tensor shaped like ``x``. Enqueued on the current stream, like any CUDA op.

        Raises:
            ClosedError, InputError, InputTypeError, NotDeterministicError: nothing was launched.
            CommunicatorFailed: an earlier call did not complete, or a peer has died; nothing was launched.
        """
        if self._current() != self._index:
            with torch.cuda.device(self.device):
                return self.all_reduce(x, out)
        route = self._last
        # ``plain`` here as well: calling it takes as long as all of this line.
        if type(x) is not _Tensor or x.layout is not _STRIDED or x.is_nested or not route.matches(x):
            route = self._last = self._known(x)
            if route is NO_ROUTE:
                return self._all_reduce(x, out)
        if out is None:
            out = route.empty()
        elif out is not x and (not plain(out) or not route.matches(out) or abs(out.data_ptr() - x.data_ptr()) < route.nbytes):
            return self._all_reduce(x, out)
        route.runner.all_reduce(x, out)
        return out

    def _all_reduce(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """``all_reduce`` with every check."""
        if (
            self._closed
            or not isinstance(x, torch.Tensor)
            or x.get_device() != self._index
            or x.is_meta
            or x.layout is not _STRIDED
            or (x.requires_grad and torch.is_grad_enabled())
            or memory_problem(x) is not None
        ):
            self._check_open()
            refuse(x, self.device, self.rank)
        dense = x.is_contiguous() and not x.is_neg()
        if out is None:
            if dense:
                out = torch.empty_like(x)
            else:
                x = out = packed(x)
                dense = True
        elif out is not x or not dense:
            dense = check_output(x, out, dense, self.rank)
        if x.numel() == 0:
            return out
        through, target = (x, out) if dense else (packed(x),) * 2
        self._last = route = self._route(through)
        route.runner.all_reduce(through, target)
        if not dense:
            out.copy_(through)
        return out

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Put it round ``torch.cuda.graph`` for symmetry with other libraries: nothing of the caller's is
        registered, so there is nothing to do at either end, and a graph can be replayed at once."""
        self._check_open()
        yield

    def warmup(self) -> None:
        """Make the first call as cheap as the others. Collective; call it before the first graph capture.

        Kernels are loaded and run when the communicator is built; this sets up NCCL as well, for calls that no kernel
        takes, whose first one may not be captured.
        """
        self._check_open()
        if not self.deterministic:
            self._torch.connect()

    def check(self) -> None:
        """Raise what kept a call from completing, with the culprit: ``PeerLost``, ``PeerTimeout``, ``CallMismatch``,
        ``ConcurrentUse`` or ``Poisoned``. A call of a peer, too, that this rank never made. Calls in flight have yet to
        end; costs a copy of four bytes from the device.

        On path torch.distributed, where nothing tells which calls have completed, any death of a peer that the watcher
        knows of is raised; and ``CallMismatch`` and ``ConcurrentUse`` are not found out."""
        self._check_open()
        if self._engine is not None:
            self._engine.check()
        self._torch.check()

    def abort(self) -> None:
        """Stop this communicator on all ranks, from any thread: calls in flight end at once, with NaN. A call that NCCL has
        taken ends on this rank alone."""
        self._check_open()
        if self._engine is not None:
            self._engine.abort()
        self._torch.abort()

    def close(self, *, local: bool = False) -> None:
        """Release everything; idempotent, talks to nobody. Drop graphs with calls of this communicator before.

        Args:
            local: do not wait for calls in flight, stop them; returns within seconds, whatever the GPU is busy with. After a
                failure; survivors may then build a new communicator over a group of their own.
        """
        if self._closed:
            return
        parts = [part for part in (self._engine, self._torch) if part is not None]
        if local:
            for part in parts:
                part.abort()
        self._closed, self._last = True, NO_ROUTE
        if self._watch is not None:
            self._watch.close()
        self._engine = self._torch = None
        self._runners.clear()
        self._routes.clear()
        # A group that outlives destroy_process_group can abort the process at exit.
        self.group = None
        release = partial(_release, parts, self.device)
        if not local:
            release()
        elif not within(LOCAL_CLOSE_S, release, "close"):
            log.warning("rank %d: %s is still at work after %g s, not for this communicator; its memory is freed once that ends",
                        self.rank, self.device, LOCAL_CLOSE_S)  # fmt: skip

    def __enter__(self) -> Communicator:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        # After an exception the other ranks may never make the calls that this rank's wait for.
        self.close(local=kind is not None)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):
            # At exit CUDA may be gone, or busy with a kernel that waits for a dead peer; the memory goes with the
            # process. During a capture, freeing anything would spoil the graph: better to lose the memory.
            if not sys.is_finalizing() and not self._capturing():
                self.close()

    # -- introspection

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def reason(self) -> str:
        """Why this path: the reasons of all steps down, or why V2 is possible."""
        return "; ".join(r.text for r in self._reasons())

    def takes(self, numel: int, dtype: torch.dtype) -> bool:
        """Whether a kernel runs a call with ``numel`` > 0 elements of ``dtype``; the same on all ranks."""
        name = DTYPE_NAMES.get(dtype)
        return name is not None and self._engine is not None and self._engine.takes(numel, name)

    def plan(self, numel: int, dtype: torch.dtype) -> Plan:
        """What a call with ``numel`` elements of ``dtype`` would run."""
        self._check_open()
        name = DTYPE_NAMES.get(dtype)
        if numel == 0:
            return Plan(self.path.value, "none", 0, 0, 0)
        if self._engine is None or name is None:
            return Plan(Path.TORCH.value, self._torch.backend, 0, 0, numel)
        return self._engine.plan(numel, name)

    def describe(self) -> dict:
        """Path and reasons, what runs per dtype and size, memory and set-up times, ready for JSON.

        ``tuning`` is V2's table: ``package``, or the file that ``allreduce-jit tune`` wrote.
        """
        self._check_open()
        engine = self._engine
        return {
            "path": self.path.value,
            "backend": self._torch.backend,
            "reasons": [{"code": r.code, "text": r.text, "rank": r.rank} for r in self._reasons()],
            "rank": self.rank,
            "world_size": self.world_size,
            "device": str(self.device),
            "deterministic": self.deterministic or self.path is Path.V2 or self.world_size == 1,
            "tuning": (self._ladder.tuning or "package") if self.path is Path.V2 else None,
            "bands": [band for dtype in DTYPE_NAMES for band in self._bands(dtype)],
            "staging_bytes": engine.memory.nbytes if engine else 0,
            "device_bytes": engine.memory.nbytes + engine.state.nbytes if engine else 0,
            "watched": list(self._watch.watched) if self._watch else [],
            "timings": {name: round(seconds, 4) for name, seconds in self._ladder.timings.items()},
            "kernels": {"compiled": engine.compiled, "cached": engine.cached} if engine else {"compiled": 0, "cached": 0},
        }

    def _bands(self, dtype: torch.dtype) -> list[dict]:
        """Ranges of sizes that run the same algorithm, in bytes; both ends belong to the range."""
        name = DTYPE_NAMES[dtype]
        size = ITEMSIZE[name]

        def what(numel: int) -> tuple[str, str]:
            plan = self.plan(numel, dtype)
            return plan.path, plan.algorithm

        return [
            {
                "dtype": name,
                "from_bytes": first * size,
                "to_bytes": None if last is None else last * size,
                "path": path,
                "algorithm": algorithm,
            }
            for first, last, (path, algorithm) in stretches(what, LARGEST_BAND // size)
        ]

    # -- internals

    def _reasons(self) -> list[Reason]:
        """Why this path, and why not NCCL where it was wanted."""
        problem = self._torch.problem if self._torch is not None else None
        return [*self._ladder.verdict.reasons, *([Reason("no-nccl", f"NCCL cannot be set up: {problem}")] if problem else [])]

    def _watch_peers(self, *parts: KernelEngine | TorchEngine | None) -> None:
        """Have ``parts`` told when a peer's process ends."""
        # The watch must not keep alive what closes it.
        references = [weakref.ref(part) for part in parts if part is not None]

        def on_death(rank: int) -> None:
            for reference in references:
                part = reference()
                if part is not None:
                    part.lost(rank)

        peers = {rank: process for rank, process in enumerate(self._ladder.processes) if rank != self.rank}
        # Ranks of several hosts are what torch.distributed is for, so that one cannot be watched is no news there.
        self._watch = watch(peers, on_death, logging.WARNING if self._engine is not None else logging.DEBUG)
        if self._engine is not None:
            self._engine.watched = self._watch.watched

    def _fallback(self, may_have_nccl: bool) -> TorchEngine:
        connect, backend = None, self._ladder.verdict.backend
        if backend == "nccl" and self.world_size > 1 and not self.deterministic:  # else it would never be called
            if may_have_nccl:
                connect = partial(nccl.connect, self.group, self.device, self._ladder.settings.setup_timeout_s)
            else:
                backend = "gloo"
        return TorchEngine(self.group, self.device, self.rank, self.world_size, backend, connect, alone=self._engine is None)

    def _keeps_all(self) -> bool:
        """Whether no call of a dtype that kernels take goes to torch.distributed, whatever its size."""
        return self._engine is not None and self.takes(LARGEST_BAND, torch.float32)

    def _known(self, x: object) -> Route:
        """The route of tensors like ``x``, if one was accepted before."""
        route = self._routes.get((x.shape, x.dtype), NO_ROUTE) if plain(x) else NO_ROUTE
        return route if route.matches(x) else NO_ROUTE

    def _route(self, x: torch.Tensor) -> Route:
        """Who runs a call with ``x``, accepted and contiguous."""
        route = self._known(x)
        if route is NO_ROUTE:
            numel, dtype = x.numel(), x.dtype
            runner = self._runners.get((numel, dtype)) or self._runner(numel, dtype)
            route = Route(runner, tensor_guard(x), maker(x), numel * dtype.itemsize)
            if route.matches(x):
                _remember(self._routes, (x.shape, dtype), route)
        return route

    def _runner(self, numel: int, dtype: torch.dtype) -> Prepared | TorchEngine:
        """Who runs calls of that size; remembered, as a plan costs more than the look-up."""
        if self.takes(numel, dtype):
            runner = self._engine.prepared(numel, dtype)
        elif self.deterministic and self.world_size > 1:
            raise NotDeterministicError(
                f"rank {self.rank}: {dtype} is all-reduced by torch.distributed, whose bits differ from the exact "
                "sum; use fp32, fp16 or bf16, or build the communicator without deterministic=True"
            )
        else:
            runner = self._torch
        _remember(self._runners, (numel, dtype), runner)
        return runner

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"rank {self.rank}: this communicator is closed: build a new one")


def _release(parts: list[KernelEngine | TorchEngine], device: torch.device) -> None:
    """Free what ``parts`` hold, once the calls on ``device`` have ended."""
    with contextlib.ExitStack() as stack:
        waits = any(part.uses_device for part in parts)
        if waits:
            stack.enter_context(torch.cuda.device(device))
        for part in parts:
            stack.callback(part.close)
        if waits:
            torch.cuda.synchronize()


def _remember(known: dict, key: object, value: object) -> None:
    """Calls of ever new sizes must not fill the memory: what is forgotten is found again."""
    if len(known) >= MAX_ROUTES:
        known.clear()
    known[key] = value


def stretches(what: Callable[[int], object], last: int) -> Iterator[tuple[int, int | None, object]]:
    """(first, last, answer) for every stretch of 1 … ``last`` with one answer; the final one has no end (None).

    ``what`` must not come back to an answer that it has left, and no plan does.
    """
    first = 1
    while first <= last:
        answer = what(first)
        high = first  # the last number known to have the answer
        while high < last and what(min(2 * high, last)) == answer:
            high = min(2 * high, last)
        beyond = min(2 * high, last + 1)
        while beyond - high > 1:
            middle = (high + beyond) // 2
            high, beyond = (middle, beyond) if what(middle) == answer else (high, middle)
        yield first, (None if high == last else high), answer
        first = high + 1
