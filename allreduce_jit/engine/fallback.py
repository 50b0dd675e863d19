"""The last step of the ladder: torch.distributed, with the same contract but its own rounding."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import torch
import torch.distributed as dist

from ..errors import ClosedError, CommunicatorFailedError, InputError, PeerLostError, PeerTimeoutError, PoisonedError
from ..inputs import memory_problem, raise_no_memory
from ..policy.operation import OpSpec
from ..policy.plan import Plan
from .nccl import Nccl
from .protocol import Call

log = logging.getLogger("allreduce_jit")

_WATCHER_S = 2.0  # how much later than a broken connection a death may be told
_NETWORK = re.compile(r"gloo/transport|connection|socket|broken pipe|timed out|timeout|remote|peer", re.I)


class TorchEngine:
    """``all_reduce`` by NCCL, or by gloo (through the host for CUDA tensors), or nothing to do at one rank.

    Bits: NCCL and gloo round in between and add in their own order; only kernels of ours promise more.

    Args:
        group: CPU-capable, for gloo; None only where there is one rank.
        backend: ``nccl`` or ``gloo``.
        connect: makes NCCL over the ranks of ``group``, at the first call that needs it, or says why not.
        alone: no kernel engine stands beside this one.

    Attributes:
        backend: ``gloo`` also once NCCL could not be set up, on all ranks alike.
        problem: why it could not.
    """

    path = "torch.distributed"

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        device: torch.device,
        rank: int,
        world_size: int,
        backend: str,
        connect: Callable[[], tuple[Nccl | None, str | None]] | None = None,
        alone: bool = True,
    ):
        self.group = group
        self.device = device
        self.rank = rank
        self.world_size = world_size
        self.backend = backend
        self.problem: str | None = None
        self.alone = alone
        self.dead: list[int] = []  # ranks whose process has ended, the first one first
        self._connect = connect
        self._nccl: Nccl | None = None
        self._hurt = False  # a call may have been in flight when a peer died
        self._failure: CommunicatorFailedError | None = None
        self._raised: CommunicatorFailedError | None = None  # the failure, once a caller has been told

    def takes(self, spec: OpSpec) -> bool:
        return spec.operation == "all_reduce"

    def plan(self, spec: OpSpec) -> Plan:
        return Plan(self.path, self.backend, 0, 0, spec.numel)

    def prepared(self, spec: OpSpec) -> Call:
        return self.all_reduce

    def in_c(self, spec: OpSpec, matches: Callable[[torch.Tensor], bool], empty: Callable[[], torch.Tensor]) -> None:
        """None of its calls are."""

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor, *others: torch.Tensor) -> None:
        """Sum ``x`` over the ranks into ``out`` (may be ``x``), any dtype that the backend takes.

        Raises:
            CommunicatorFailedError: a peer's process has ended, or the connection to it is lost.
        """
        if memory_problem(x) or (out is not x and memory_problem(out)):  # freed since a tensor like it was accepted
            raise_no_memory((x, out), self.rank)
        if self.world_size == 1:
            _copy(x, out)
            return
        if self.dead or self._failure is not None:
            self._refuse()
        if self.backend == "nccl" and self._nccl is None:
            self.connect()
        if self.backend == "nccl":
            _copy(x, out)
            self._over_nccl(out)
        elif self.device.type == "cuda":
            self._refuse_capture("this group all-reduces through the host (gloo)", "describe() says why; call it eagerly")
            host = x.cpu().resolve_conj()
            self._over_gloo(host)
            out.copy_(host)
        else:
            _copy(x, out)
            self._over_gloo(out)

    def connect(self) -> None:
        """Set NCCL up, if it is wanted and has not been. Collective, not to be captured."""
        if self._connect is None or self.world_size == 1:
            return
        self._refuse_capture("NCCL sets itself up in its first call", "call warmup() before the capture")
        connect, self._connect = self._connect, None
        self._nccl, self.problem = connect()
        if self._nccl is None:
            self.backend = "gloo"
            if self.rank == 0:
                log.warning("NCCL cannot be set up, gloo all-reduces through the host instead: %s", self.problem)
        elif self.dead:
            self._nccl.abort()

    @property
    def uses_device(self) -> bool:
        """Whether calls may be in flight on the GPU."""
        return self._nccl is not None

    def check(self) -> None:
        """Raise what is known to have hurt a call. Where no kernel of ours tells which calls have completed, that is any
        death of a peer."""
        if self._failure is None and self.dead and (self.alone or self._hurt):
            self._fail(self._death())
        if self._failure is not None:
            self._raised = self._failure
            raise self._failure

    def lost(self, rank: int) -> None:
        """The process of ``rank`` has ended: NCCL would wait for it for ever. From any thread, at once."""
        self.dead.append(rank)
        if len(self.dead) == 1 and self._nccl is not None:
            self._hurt = not self._nccl.completed()
            threading.Thread(target=self._nccl.abort, name="allreduce_jit NCCL abort", daemon=True).start()

    def abort(self) -> None:
        """End the calls in flight on this rank, and refuse new ones."""
        if self.world_size > 1:
            self._fail(PoisonedError(f"rank {self.rank} aborted this communicator", (self.rank,)))
            if self._nccl is not None:
                self._nccl.abort()

    def close(self) -> None:
        """Release what is ours; talks to nobody. No call is in flight, or ``abort`` was called."""
        nccl, self._nccl, self._connect, self.group = self._nccl, None, None, None
        if nccl is not None:
            nccl.abort()

    # -- internals

    def _over_nccl(self, x: torch.Tensor) -> None:
        nccl = self._nccl
        if nccl is None:
            raise ClosedError(f"rank {self.rank}: this communicator was closed during a call")
        try:
            nccl.all_reduce(x)
        except RuntimeError as e:
            if not self.dead:
                raise
            self._raised = self._fail(self._death())
            raise self._raised from e

    def _over_gloo(self, x: torch.Tensor) -> None:
        try:
            dist.all_reduce(x, group=self.group)
        except RuntimeError as e:
            # torch's own words for a bad argument stay as they are; it has no type of its own for a lost connection.
            if not isinstance(e, (dist.DistBackendError, dist.DistNetworkError)) and not _NETWORK.search(str(e)):
                raise
            end = time.monotonic() + _WATCHER_S
            while not self.dead and time.monotonic() < end:
                time.sleep(0.01)
            self._raised = self._fail(self._death() if self.dead else self._unknown(str(e)))
            raise self._raised from e

    def _death(self) -> PeerLostError:
        text = f"rank {self.rank}: the process of rank {self.dead[0]} has ended. {_AFTERWARDS}"
        return PeerLostError(text, (self.dead[0],), self._report("lost", self.dead[0]))

    def _unknown(self, text: str) -> CommunicatorFailedError:
        kind = PeerTimeoutError if re.search("timed? ?out", text, re.I) else CommunicatorFailedError
        return kind(f"rank {self.rank}: torch.distributed lost a rank, which it does not name: {text}. {_AFTERWARDS}",
                    (), self._report("timeout" if kind is PeerTimeoutError else "connection", None))  # fmt: skip

    def _report(self, kind: str, culprit: int | None) -> dict:
        ranks = [{"rank": r, "alive": False if r in self.dead else None, "last_call": None} for r in range(self.world_size)]
        return {"kind": kind, "culprit": culprit, "found_by": self.rank, "rank": self.rank, "ranks": ranks}

    def _fail(self, failure: CommunicatorFailedError) -> CommunicatorFailedError:
        """The first failure: this one, unless there was another."""
        self._failure = self._failure or failure
        return self._failure

    def _refuse(self) -> NoReturn:
        """The cause once, from then on that there was one."""
        if failure := self._raised:
            raise PoisonedError(str(failure), failure.ranks, failure.report) from failure
        self._raised = self._failure or self._fail(self._death())
        raise self._raised

    def _refuse_capture(self, why: str, instead: str) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise InputError(f"{self.device}: {why}, which a CUDA graph cannot capture: {instead}")


_AFTERWARDS = "Close this communicator and build a new one over the ranks that live."


def _copy(x: torch.Tensor, out: torch.Tensor) -> None:
    if out.data_ptr() != x.data_ptr() or out.is_conj() != x.is_conj():
        out.copy_(x)
