"""The front: ``init`` and ``Communicator``."""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from .describe import LARGEST, CommunicatorReport, describe, reasons
from .engine.bounded import within
from .errors import ClosedError, InputError, NotDeterministicError
from .fused import NormCalls, Norms, check_operations
from .inputs import accepted, as_device, plain, require_sum
from .policy.operation import OpSpec
from .policy.plan import Plan
from .policy.verdict import Path
from .routes import DTYPE_NAMES, NO_ROUTE, Routes, spec_of
from .setup import groups
from .setup.exchange import require_cpu_group, require_group
from .setup.ladder import climb
from .setup.service import release, torch_engine, watch_peers
from .torch_private import current_device

if TYPE_CHECKING:
    from .engine.protocol import Engine

log = logging.getLogger("allreduce_jit")

LOCAL_CLOSE_S = 3.0
_Tensor, _STRIDED = torch.Tensor, torch.strided


def init(
    group: dist.ProcessGroup | None = None,
    device: torch.device | str | int | None = None,
    *,
    deterministic: bool = False,
    max_ctas: int | None = None,
    operations: Sequence[OpSpec] = (),
) -> Communicator:
    """A communicator over ``group`` on the best path that all of its ranks can take. Collective.

    Args:
        group: any torch.distributed group (NCCL, gloo or both); None = the default group. What is missing
            (a CPU group to agree over, NCCL for calls without a kernel) is created for its ranks.
        device: this rank's device; None = the current CUDA device, or the CPU where there is none.
        deterministic: promise the exact bits of the fp32 sum in rank order; a call that only
            torch.distributed could run is then an error.
        max_ctas: at most so many thread blocks on paths V2 and host (2 or more), for all-reduces beside other kernels, such
            as matrix products; costs bandwidth. None: as many as are fastest. The bits are the same.
        operations: calls whose kernels are built now rather than by the first of them, which could not be captured:
            ``[allreduce_jit.norm_family(...), ...]``. Those of ``all_reduce`` always are.

    Raises:
        InputError: torch.distributed is not initialised, this rank is not in ``group``, or ``device`` is none;
            on all ranks, if they ask for different things.
        InputTypeError: ``group`` is no process group.
        SettingsError: a bad environment variable on any rank; raised on all.
        NotDeterministicError: ``deterministic`` and no kernel path is possible; the message says why.
    """
    group = require_group(group)
    if max_ctas is not None and (not isinstance(max_ctas, int) or max_ctas < 2):
        raise InputError(f"max_ctas={max_ctas!r}: expected 2 blocks or more (one watches, the others move data), or None")
    operations = check_operations(operations)
    return Communicator(group, as_device(device), deterministic=deterministic, max_ctas=max_ctas, operations=operations)


class Communicator(NormCalls):
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
        highest: Path | None = None,
        lowest: Path | None = None,
        create_groups: bool = True,
        max_ctas: int | None = None,
        operations: Sequence[OpSpec] = (),
    ):
        self.device = device
        self._index = index = -1 if device.type == "cpu" else device.index  # as Tensor.get_device has it
        self._current = current_device if device.type == "cuda" and torch.cuda.is_available() else lambda: index
        self.deterministic = deterministic
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._closed, self._watch = False, None
        self._last = NO_ROUTE  # most calls are like the one before
        self.group = group
        if not groups.has_backend(group, "cpu:"):
            if not create_groups:
                require_cpu_group(group)
            self.group = groups.gloo_sibling(group)
        self._ladder = climb(self.group, device, deterministic, highest, lowest, max_ctas, operations=operations)
        self._engine, self.path = self._ladder.engine, self._ladder.verdict.path
        may_have_nccl = create_groups or groups.has_backend(group, "cuda:nccl")
        self._torch = torch_engine(self.group, device, self._ladder, deterministic=deterministic, may_have_nccl=may_have_nccl)
        if deterministic and self._engine is None and self.world_size > 1:
            raise NotDeterministicError(
                f"rank {self.rank}: deterministic=True needs a kernel path, but {self.reason}; "
                "remove the cause, or build the communicator without deterministic=True"
            )
        self._routes = Routes(self._engines(), deterministic and self.world_size > 1, self.rank)
        self._norms = Norms(self._ladder, self._routes, device, index, self.rank, self._current, max_ctas)
        self._norms.note_failed(operations)
        self._watch = watch_peers(self._ladder, self.rank, self._engines())
        if create_groups and (self._engine is None or not all(self._engine.takes(spec_of(LARGEST, d)) for d in DTYPE_NAMES)):
            self.warmup()  # NCCL takes some calls, and its first one must not be captured
            if self._torch.problem and self._engine is not None:
                self._engine.hands_over = False  # our kernels are faster than gloo at any size
        if self.rank == 0:
            log.info("%s on %d ranks: %s", self.path.value, self.world_size, self.reason)

    # -- calls

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor | None = None, op: object = None) -> torch.Tensor:
        """The sum of ``x`` over all ranks, in ``out`` or a new tensor; ``out=x`` works in place.

        Args:
            x: any shape, on this communicator's device; fp32, fp16 and bf16 take the kernels, other dtypes
                torch.distributed. Contiguous tensors at any address are used as they are, others copied.
            out: same shape, dtype and device; either ``x`` itself or memory that does not overlap it.
            op: for programs that name it: None, ``"sum"`` or ``torch.distributed.ReduceOp.SUM``; others are an ``InputError``.

        Returns:
            ``out``, or a new tensor shaped like ``x``. Enqueued on the current stream, like any CUDA op.

        Raises:
            ClosedError, InputError, InputTypeError, NotDeterministicError: nothing was launched.
            CommunicatorFailedError: an earlier call did not complete, or a peer has died; nothing was launched.
        """
        if op is not None:
            require_sum(op, self.rank)
        route = self._last
        if route.in_c is not None and (done := route.in_c(x, out)) is not None:
            return done
        if self._current() != self._index:
            with torch.cuda.device(self.device):
                return self.all_reduce(x, out)
        # ``plain`` here as well: calling it takes as long as all of this line.
        if type(x) is not _Tensor or x.layout is not _STRIDED or x.is_nested or not route.matches(x):
            route = self._last = self._routes.known(x)
            if route is NO_ROUTE:
                return self._all_reduce(x, out)
            if route.in_c is not None and (done := route.in_c(x, out)) is not None:
                return done
        if out is None:
            out = route.empty()
        elif out is not x and (not plain(out) or not route.matches(out) or abs(out.data_ptr() - x.data_ptr()) < route.nbytes):
            return self._all_reduce(x, out)
        route.call(x, out)
        return out

    def all_reduce_(self, x: torch.Tensor, op: object = None) -> torch.Tensor:
        """``all_reduce`` in place: the sum replaces ``x``, which is returned."""
        return self.all_reduce(x, x, op)

    def _all_reduce(self, x: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """``all_reduce`` with every check."""
        self._check_open()
        source, target, out = accepted(x, out, self.device, self._index, self.rank)
        if source.numel():
            self._last = route = self._routes.of(source)
            route.call(source, target)
            if target is not out:
                out.copy_(target)
        return out

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Put it round ``torch.cuda.graph`` for symmetry with other libraries: it does nothing, as nothing has to be registered."""
        self._check_open()
        yield

    def warmup(self) -> None:
        """Make the first call as cheap as the others. Collective; call it before the first graph capture.

        Kernels are loaded and run when the communicator is built; this sets up NCCL, whose first call may not be captured."""
        self._check_open()
        if not self.deterministic:
            self._torch.connect()

    def check(self) -> None:
        """Raise what kept a call from completing, with the culprit: ``PeerLostError``, ``PeerTimeoutError``, ``CallMismatchError``,
        ``ConcurrentUseError`` or ``PoisonedError``. A call of a peer, too, that this rank never made. Calls in flight have yet to
        end; costs a copy of four bytes from the device.

        On path torch.distributed, where nothing tells which calls have completed, any death of a peer that the watcher knows of
        is raised; and ``CallMismatchError`` and ``ConcurrentUseError`` are not found out."""
        self._check_open()
        for engine in self._engines():
            engine.check()

    def abort(self) -> None:
        """Stop this communicator on all ranks, from any thread: calls in flight end at once, with NaN. A call that NCCL has
        taken ends on this rank alone."""
        self._check_open()
        for engine in self._engines():
            engine.abort()

    def close(self, *, local: bool = False) -> None:
        """Release everything; idempotent, talks to nobody. Drop graphs with calls of this communicator before.

        Args:
            local: after a failure: stop calls in flight rather than wait for them; returns within seconds, whatever the GPU is
                busy with. Survivors may then build a new communicator over a group of their own.
        """
        if self._closed:
            return
        engines = self._engines()
        if local:
            self.abort()
        self._closed, self._last = True, NO_ROUTE
        if self._watch is not None:
            self._watch.close()
        self._routes.clear()
        self._norms.clear()
        self._engine = self._ladder.engine = None
        # A group that outlives destroy_process_group can abort the process at exit.
        self.group = None
        work = partial(release, engines, self.device)
        if not local:
            work()
        elif not within(LOCAL_CLOSE_S, work, "close"):
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
        return "; ".join(r.text for r in reasons(self._ladder, self._torch))

    def takes(self, numel: int, dtype: torch.dtype) -> bool:
        """Whether a kernel runs a call with ``numel`` > 0 elements of ``dtype``; the same on all ranks."""
        return self._engine is not None and self._routes.kernel_takes(numel, dtype)

    def plan(self, numel: int, dtype: torch.dtype) -> Plan:
        """What a call with ``numel`` elements of ``dtype`` would run."""
        self._check_open()
        if numel == 0:
            return Plan(self.path.value, "none", 0, 0, 0)
        spec = spec_of(numel, dtype)
        return self._routes.engine(spec).plan(spec)

    def describe(self) -> CommunicatorReport:
        """Path and reasons, what runs per dtype and size, memory and set-up times. ``to_dict()`` makes it ready for JSON."""
        self._check_open()
        about = self._watch.watched if self._watch else (), self.deterministic, self._norms.describe(), self.rank, self.device
        return describe(self._ladder, self._torch, self._routes, *about)

    # -- internals

    def _engines(self) -> list[Engine]:
        """The best first; torch.distributed takes what no other does."""
        return [self._torch] if self._engine is None else [self._engine, self._torch]

    def _capturing(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"rank {self.rank}: this communicator is closed: build a new one")
