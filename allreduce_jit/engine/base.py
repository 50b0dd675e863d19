"""What V2 and legacy share: build in agreed steps, verify with real traffic, launch, report, close.

The steps are separate so that all ranks can agree after each one (``ladder``); no step talks to the group.
"""

from __future__ import annotations

import base64
import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..abi import MAX_SHAPES, Header
from ..errors import CommunicatorFailedError, PoisonedError, SetupError
from ..jit.cache import Artifact, KernelCache, decode, encode
from ..jit.compiler import build_all
from ..policy.catalogue import KernelSpec
from ..policy.operation import ALL_REDUCE, OpSpec, all_reduce
from ..policy.plan import Layout, Plan
from ..settings import Settings
from .driver import load_module
from .eager import BUILT, eager_call
from .failure import SIGNATURES_AT, SIGNED, Kind, abort_code, explain, heard, last_signed, parameters
from .graph_cache import GraphCache
from .memory import LocalState, SideChannel, StagingMemory
from .prepared import PreparedCall
from .protocol import EagerCall
from .streams import StreamOrder
from .verify import READ_BYTES, verify

VERIFY_SECONDS = 10.0


@dataclass(frozen=True)
class EngineConfig:
    """Where an engine runs; the same on all ranks but for ``rank`` and ``device``.

    Attributes:
        max_ctas: blocks that a launch may have; None = as many as are fastest.
        tuned: the path's own table of each dtype, as measured on this machine; None = the package's.
        bus_ids: PCI bus id of each rank's GPU.
    """

    rank: int
    world_size: int
    device: torch.device
    arch: str
    nvlink: bool
    deterministic: bool
    settings: Settings
    max_ctas: int | None = None
    tuned: Mapping[str, tuple[Any, ...]] | None = None
    bus_ids: tuple[str, ...] = ()


class KernelEngine:
    """A path with kernels of our own. Subclasses say which kernels, which layout, and how to launch."""

    path: str
    uses_device = True  # calls may be in flight on the GPU
    channel_bytes: int  # what a channel keeps from call to call
    # From ``allocate`` to ``close``:
    memory: Any  # StagingMemory, or what a subclass has in its place
    state: LocalState
    side: SideChannel
    _streams: StreamOrder

    def __init__(self, config: EngineConfig, layout: Layout):
        self.config = config
        self.layout = layout
        self._raw_device = config.device.index
        self.c_calls = BUILT and config.settings.c_calls  # eager calls of one launch are made in C
        self.families: list[OpSpec] = []  # of calls whose kernels were verified on all ranks
        self._loaded: set[str] = set()  # names of modules
        self.compiled = self.cached = 0
        self.dead: list[int] = []  # ranks whose process has ended, the first one first
        self.watched: tuple[int, ...] = ()  # ranks whose end would be noticed
        self._failure: CommunicatorFailedError | None = None
        self._stopped = False  # nothing is launched any more
        self._raised: CommunicatorFailedError | None = None  # the failure, once a caller has been told
        self._verified = False  # staging memory, streams and slots are
        self.hands_over = not config.deterministic  # calls for which torch.distributed is expected to be faster
        self._graph_cache = GraphCache()
        self._prepared: dict[OpSpec, PreparedCall] = {}
        # Two threads may call, and the launches of one call belong together. An RLock cannot be released for another
        # thread, should a signal's exception come before it was acquired.
        self._lock = threading.RLock()

    # -- construction, in the order in which the ladder calls it. Kernels of other families may be added in service: compile,
    # -- load and verify alike.

    def compile(self, cache: KernelCache, families: Sequence[OpSpec] = ALL_REDUCE) -> list[str]:
        """Build, or fetch from the cache, this rank's share of the modules of ``families``; returns them in base64."""
        share = self._missing(families)[self.config.rank :: self.config.world_size]
        found = build_all([(spec, self.config.arch) for spec in share], cache, sharing=self.config.world_size)
        self.cached += sum(was_cached for _, was_cached in found)
        self.compiled += sum(not was_cached for _, was_cached in found)
        return [base64.b64encode(encode(spec.name, artifact)).decode() for spec, (artifact, _) in zip(share, found, strict=True)]

    def load(self, shares: Sequence[Sequence[str]], families: Sequence[OpSpec] = ALL_REDUCE) -> None:
        """Load every kernel that a plan of ``families`` can pick, from the shares of all ranks."""
        torch.cuda.synchronize(self.config.device)  # the driver's calls need a context, and do not make one
        artifacts = dict(decode(base64.b64decode(text)) for share in shares for text in share)
        for spec in self._missing(families):
            module = load_module(artifacts[spec.name].cubin)
            for entry in spec.entries:
                self._register(spec, entry, artifacts[spec.name], module.kernel(entry))
            self._loaded.add(spec.name)

    def allocate(self) -> str:
        """Allocate and poison the staging memory; returns the handle for the peers."""
        self.state = LocalState(self.layout.channels, self.channel_bytes)
        self.side = SideChannel()
        self._streams = StreamOrder()
        self.memory = self._staging()
        return self.memory.handle()

    def connect(self, handles: Sequence[str]) -> None:
        """Map the peers' memory and read it once through the copy engine: it must hold what it began with."""
        self.memory.connect(handles)
        for rank in range(self.config.world_size):
            if self.memory.read(rank, READ_BYTES).count(self.memory.FILL) != READ_BYTES:
                raise SetupError(f"rank {self.config.rank} reads wrong bytes from the memory of rank {rank}")

    def verify(self, families: Sequence[OpSpec] = ALL_REDUCE) -> None:
        """Prove with real traffic what calls of ``families`` will rely on, before the first one; see ``engine.verify``."""
        settings = self.config.settings
        with self._lock:  # no other thread's calls in between
            self.state.set_deadlines(VERIFY_SECONDS, VERIFY_SECONDS)
            verify(self, families, memory=not self._verified)
            self._verified = True
            self.state.set_deadlines(settings.timeout_s, settings.first_timeout_s)

    # -- service

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """One all-reduce of ``x`` into ``out``; see ``PreparedCall``."""
        self.prepared(all_reduce(str(x.dtype).removeprefix("torch."), x.numel()))(x, out)

    def prepared(self, spec: OpSpec) -> PreparedCall:
        """Calls of ``spec``, to be made again and again: planning costs more than launching."""
        with self._lock:
            call = self._prepared.get(spec)
            if call is None:
                if len(self._prepared) >= MAX_SHAPES - 1:
                    self._prepared.clear()
                call = self._prepared[spec] = self.prepare(spec, self.plan(spec), shape_id=len(self._prepared) + 1)
        return call

    def in_c(self, spec: OpSpec, matches: Callable[[torch.Tensor], bool], empty: Callable[[], torch.Tensor]) -> EagerCall | None:
        return eager_call(self.prepared(spec), matches, empty) if self.c_calls else None

    def check(self) -> None:
        """Raise what kept a call from completing, here or on a peer that stopped this rank for it: a subclass of
        ``CommunicatorFailedError`` that names the culprit."""
        if self._failure is None and (code := self.state.words[0] or self._peer_abort_code()):
            self._fail(code)
        if self._failure is not None:
            self._raised = self._failure
            raise self._failure

    def abort(self, kind: Kind = Kind.ABORTED, culprit: int | None = None) -> None:
        """Stop the kernels of all ranks, from any thread; they end at once, with NaN."""
        rank = self.config.rank
        code = abort_code(kind, rank if culprit is None else culprit, rank)
        if getattr(self, "memory", None) is None or getattr(self, "side", None) is None:
            return
        # One's own first: a kernel here may wait for somebody whose memory cannot be reached any more.
        others = [peer for peer in range(self.config.world_size) if peer != rank and peer not in self.dead]
        self._write_abort([rank, *others], code)
        if kind is Kind.ABORTED:
            self._fail(code)

    def lost(self, rank: int) -> None:
        """The process of ``rank`` has ended: stop what waits for it, refuse what would. From any thread.

        Calls that completed before stay valid: ``check`` raises only once a kernel was stopped.
        """
        self.dead.append(rank)
        self._stopped = True
        if len(self.dead) == 1:  # others may end because of it
            self.abort(Kind.LOST, rank)

    def _peer_abort_code(self) -> int:
        """The abort code that a peer left here and no kernel of this rank has met. Not a death: whoever needed that rank
        is stopped by it, and calls that completed stay valid."""
        code = int.from_bytes(self._read_header(self.config.rank, Header.abort.offset, Header.abort.size), "little")
        return 0 if code & 0xFF == Kind.LOST else code

    def _refuse(self) -> None:
        if failure := self._raised:
            raise PoisonedError(str(failure), failure.ranks, failure.report) from failure
        if not self.state.words[0]:  # nothing was hurt so far
            self._fail(abort_code(Kind.LOST, self.dead[0], self.config.rank))
        self.check()

    def _fail(self, code: int) -> None:
        rank = self.config.rank
        words = list(self.state.words[:10])
        header, told = self._read_header(rank, SIGNATURES_AT, SIGNED), (None, None)
        culprit = code >> 8 & 0xFF
        # V2's kernels leave to us what is still there to be read.
        if words[0] and not words[1]:
            words[1] = int.from_bytes(self.side.read(self.state.control, 4), "little")
        if code & 0xFF == Kind.MISMATCH and culprit != rank and (culprit not in self.dead or not any(words[8:])):
            theirs = self._read_header(culprit, SIGNATURES_AT, SIGNED)
            # Another thread of this rank may have been quicker with the report than the one that knows their signature.
            if not any(words[6:8]):
                words[6:8] = (last_signed(theirs, rank) or (0, 0, 0))[1:]
            if not any(words[8:]):
                words[8:] = (last_signed(header, culprit) or (0, 0, 0))[1:]
            told = parameters(theirs, rank, words[1]), parameters(header, culprit, words[1])
        self._stopped = True
        self._failure = explain(words, code, rank, heard(header, self.config.world_size), self._alive, told)

    def _alive(self, rank: int) -> bool | None:
        if rank in self.dead:
            return False
        return True if rank in self.watched or rank == self.config.rank else None

    def close(self) -> None:
        """Free everything. No kernel of this engine may be in flight, no graph with one replayed again."""
        self._stopped = True  # first: a call in C reads the report, whose memory goes
        allocated = [vars(self).pop(name, None) for name in ("state", "memory", "side", "_streams")]
        with contextlib.ExitStack() as stack:  # which calls the last one first
            for part in (*allocated, self._graph_cache):
                if part is not None:
                    stack.callback(part.close)

    # -- where staging memory is not the device's, a subclass has its own

    def _staging(self) -> Any:
        return StagingMemory(self.layout.nbytes, self.config.rank)

    def _read_header(self, rank: int, offset: int, nbytes: int) -> bytes:
        return self.side.read(self.memory.addresses[rank] + offset, nbytes)

    def _write_abort(self, ranks: Sequence[int], code: int) -> None:
        self.side.write([self.memory.addresses[rank] + Header.abort.offset for rank in ranks], code)

    # -- for subclasses

    def plan(self, spec: OpSpec) -> Plan:
        """What a call of ``spec`` runs, or torch.distributed's plan where that is expected to be faster."""
        raise NotImplementedError

    def takes(self, spec: OpSpec) -> bool:
        """Whether a call of ``spec`` is this engine's; the same answer on all ranks."""
        return spec.family in self.families and self.plan(spec).path == self.path

    def run(self, spec: OpSpec, plan: Plan, *tensors: torch.Tensor) -> None:
        """Launch ``plan`` on the current stream, whatever the tables would have picked. The current device is this engine's."""
        self.prepare(spec, plan, shape_id=0).run(*tensors)

    def prepare(self, spec: OpSpec, plan: Plan, shape_id: int) -> PreparedCall:
        """A call of ``spec`` that runs ``plan``; ``shape_id``: which flag of ``Control`` tells that all ranks made such a call."""
        raise NotImplementedError

    def _missing(self, families: Sequence[OpSpec]) -> list[KernelSpec]:
        """The modules of ``families`` that are not loaded yet, in one order on all ranks."""
        return [spec for spec in self._modules(families) if spec.name not in self._loaded]

    def _modules(self, families: Sequence[OpSpec]) -> list[KernelSpec]:
        """The modules that calls of ``families`` may run."""
        raise NotImplementedError

    def _register(self, spec: KernelSpec, name: str, artifact: Artifact, kernel: Any) -> None:
        raise NotImplementedError

    def verification_plans(self, spec: OpSpec) -> Sequence[Plan]:
        """Every kernel for a call of ``spec``, in as many blocks as possible."""
        raise NotImplementedError

    def full_plans(self) -> Iterable[tuple[OpSpec, Plan]]:
        """fp32 all-reduces that together use every slot, once for each parity: each is made twice."""
        raise NotImplementedError
