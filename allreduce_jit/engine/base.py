"""What V2 and legacy share: build in agreed steps, verify with real traffic, launch, report, close.

The steps are separate so that all ranks can agree after each one (``ladder``); no step talks to the group.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from ..abi import MAX_SHAPES
from ..errors import CommunicatorFailed, Poisoned, SetupError
from ..inputs import raise_no_memory
from ..jit.cache import Artifact, KernelCache, decode, encode
from ..jit.compiler import build_all
from ..policy.catalogue import DTYPES, KernelSpec, catalogue
from ..policy.plan import PACKET, Layout, Plan
from ..policy.tables import Bands
from ..settings import Settings
from .driver import Launch, failure, load_module
from .failure import SIGNATURES, SIGNATURES_AT, Kind, abort_code, explain, heard, last_signed
from .graph_cache import GraphCache, replayed
from .memory import LocalState, SideChannel, StagingMemory
from .streams import PER_THREAD, StreamOrder
from .verify import READ_BYTES, verify

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
VERIFY_SECONDS = 10.0
# Below are offsets into storages that have been freed under their tensors, to which torch gives no address: tensors that are
# like earlier ones in all else. The driver gives no memory there.
NO_ADDRESS = 1 << 32
# Not a stream object: that takes longer to make than the rest of a call's preparation.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_capturing = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)


@dataclass(frozen=True)
class EngineConfig:
    """Where an engine runs; the same on all ranks but for ``rank`` and ``device``.

    Attributes:
        max_ctas: blocks that a launch may have; None = as many as are fastest.
        tuned: V2's table of each dtype as measured on this machine; None = the package's.
    """

    rank: int
    world_size: int
    device: torch.device
    arch: str
    nvlink: bool
    deterministic: bool
    settings: Settings
    max_ctas: int | None = None
    tuned: Mapping[str, Bands] | None = None


@dataclass(eq=False)
class Step:
    """The launches of one shape of call: each with its arguments for input and output, and where it begins, in bytes.

    Attributes:
        whole: for tensors at addresses that are multiples of 16.
        ragged: for any others.
    """

    whole: list[tuple[Launch, ctypes._SimpleCData, ctypes._SimpleCData, int]] = field(default_factory=list)
    ragged: list[tuple[Launch, ctypes._SimpleCData, ctypes._SimpleCData, int]] = field(default_factory=list)

    def launches(self, source: int, target: int) -> Iterator[Launch]:
        """Those from and to these addresses, which their arguments hold."""
        for launch, x, out, offset in self.ragged if (source | target) % PACKET else self.whole:
            x.value = source + offset
            out.value = target + offset
            yield launch

    def fire(self, source: int, target: int, stream: int) -> None:
        """Launch from and to these addresses."""
        for launch in self.launches(source, target):
            launch(stream)


@dataclass(slots=True)
class Prepared:
    """An engine's calls of one size and dtype: nothing is left to look up or to plan.

    Attributes:
        replayed: whether they are launched as graphs when they come again.
    """

    engine: KernelEngine
    step: Step
    replayed: bool

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """As ``KernelEngine.all_reduce``, for tensors of this size and dtype."""
        engine = self.engine
        if engine._stopped or engine.state.words[0]:
            engine._refuse()
        stream = _current_stream(engine._raw_device)
        call = self.step, x.data_ptr(), out.data_ptr()
        if call[1] < NO_ADDRESS or call[2] < NO_ADDRESS:
            raise_no_memory(x, out, engine.config.rank)
        lock, order = engine._lock, engine._streams
        try:  # a with statement takes twice as long
            lock.acquire()
            # The default stream is never captured; asking costs as much as all of these lines.
            if stream and _capturing():
                order.enter_captured(stream)
                self.step.fire(call[1], call[2], stream)
                return
            if stream != order.last:
                order.enter(stream)
                engine._graph_cache.stream.value = stream
            graph = None
            if self.replayed and not order.priority:  # the kernels of a graph do not take a stream's priority over
                graph = engine._graph_cache.ready.get(call) or engine._graph_cache.assign(call)
            if graph is None:
                self.step.fire(call[1], call[2], stream)
            elif error := graph.launch():
                raise failure("graph launch", error)
            if stream == PER_THREAD:
                order.leave_per_thread()
        finally:
            lock.release()


class KernelEngine:
    """A path with kernels of our own. Subclasses say which kernels, which layout, and how to launch."""

    path: str
    uses_device = True  # calls may be in flight on the GPU
    channel_bytes: int  # what a channel keeps from call to call

    def __init__(self, config: EngineConfig, layout: Layout):
        self.config = config
        self.layout = layout
        self._raw_device = config.device.index
        self.compiled = self.cached = 0
        self.memory: StagingMemory | None = None
        self.state: LocalState | None = None
        self.side: SideChannel | None = None
        self.dead: list[int] = []  # ranks whose process has ended, the first one first
        self.watched: tuple[int, ...] = ()  # ranks whose end would be noticed
        self._failure: CommunicatorFailed | None = None
        self._stopped = False  # nothing is launched any more
        self._raised = False
        self._streams: StreamOrder | None = None
        self.hands_over = not config.deterministic  # calls for which torch.distributed is expected to be faster
        self._graph_cache = GraphCache()
        self._steps: dict[tuple[int, torch.dtype], Step] = {}
        # Two threads may call, and the launches of one call belong together. An RLock cannot be released for another
        # thread, should a signal's exception come before it was acquired.
        self._lock = threading.RLock()

    # -- construction, in the order in which the ladder calls it

    def compile(self, cache: KernelCache) -> list[str]:
        """Build, or fetch from the cache, this rank's share of the modules; returns them in base64."""
        share = self._catalogue()[self.config.rank :: self.config.world_size]
        found = build_all([(spec, self.config.arch) for spec in share], cache, sharing=self.config.world_size)
        self.cached += sum(was_cached for _, was_cached in found)
        self.compiled += sum(not was_cached for _, was_cached in found)
        return [base64.b64encode(encode(spec.name, artifact)).decode() for spec, (artifact, _) in zip(share, found, strict=True)]

    def load(self, shares: Sequence[Sequence[str]]) -> None:
        """Load every kernel that a plan can pick, from the shares of all ranks."""
        torch.cuda.synchronize(self.config.device)  # the driver's calls need a context, and do not make one
        artifacts = dict(decode(base64.b64decode(text)) for share in shares for text in share)
        for spec in self._catalogue():
            module = load_module(artifacts[spec.name].cubin)
            for entry in spec.entries:
                self._register(spec, entry, artifacts[spec.name], module.kernel(entry))

    def allocate(self) -> str:
        """Allocate and poison the staging memory; returns the handle for the peers."""
        self.state = LocalState(self.layout.channels, self.channel_bytes)
        self.side = SideChannel()
        self._streams = StreamOrder()
        self.memory = StagingMemory(self.layout.nbytes, self.config.rank)
        return self.memory.handle()

    def connect(self, handles: Sequence[str]) -> None:
        """Map the peers' memory and read it once through the copy engine: it must hold the poison."""
        self.memory.connect(handles)
        for rank in range(self.config.world_size):
            if self.memory.read(rank, READ_BYTES).count(0xFF) != READ_BYTES:
                raise SetupError(f"rank {self.config.rank} reads wrong bytes from the memory of rank {rank}")

    def verify(self) -> None:
        """Prove with real traffic what calls will rely on, before the first one; see ``engine.verify``."""
        self.state.set_deadlines(VERIFY_SECONDS, VERIFY_SECONDS)
        verify(self)
        settings = self.config.settings
        self.state.set_deadlines(settings.timeout_s, settings.first_timeout_s)

    # -- service

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Sum ``x`` over the ranks into ``out`` (may be ``x``): contiguous, same shape, supported dtype, numel > 0. The
        current device is this engine's.

        Raises:
            CommunicatorFailed: an earlier call did not complete; nothing was launched.
        """
        self.prepared(x.numel(), x.dtype).all_reduce(x, out)

    def prepared(self, numel: int, dtype: torch.dtype) -> Prepared:
        """Calls of ``numel`` elements of ``dtype``, to be made again and again: planning costs more than launching."""
        with self._lock:
            step = self._steps.get((numel, dtype))
            if step is None:
                if len(self._steps) >= MAX_SHAPES - 1:
                    self._steps.clear()
                plan = self.plan(numel, DTYPE_NAMES[dtype])
                step = self._steps[numel, dtype] = self._step(plan, numel, dtype, config=len(self._steps) + 1)
        return Prepared(self, step, replayed(len(step.whole), numel * dtype.itemsize))

    def check(self) -> None:
        """Raise what kept a call from completing, here or on a peer that stopped this rank for it: a subclass of
        ``CommunicatorFailed`` that names the culprit."""
        if self._failure is None and (code := self.state.words[0] or self._peer_abort_code()):
            self._fail(code)
        if self._failure is not None:
            self._raised = True
            raise self._failure

    def abort(self, kind: Kind = Kind.ABORTED, culprit: int | None = None) -> None:
        """Stop the kernels of all ranks, from any thread; they end at once, with NaN."""
        rank = self.config.rank
        code = abort_code(kind, rank if culprit is None else culprit, rank)
        # One's own first: a kernel here may wait for somebody whose memory cannot be reached any more.
        memory, side = self.memory, self.side
        if memory is None or side is None:
            return
        own, others = memory.addresses[rank], enumerate(memory.addresses)
        side.write([own, *(address for r, address in others if r != rank and r not in self.dead)], code)
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
        code = int.from_bytes(self.side.read(self.memory.addresses[self.config.rank], 4), "little")
        return 0 if code & 0xFF == Kind.LOST else code

    def _refuse(self) -> None:
        if self._raised:
            raise Poisoned(str(self._failure), self._failure.ranks, self._failure.report) from self._failure
        if not self.state.words[0]:  # nothing was hurt so far
            self._fail(abort_code(Kind.LOST, self.dead[0], self.config.rank))
        self.check()

    def _fail(self, code: int) -> None:
        rank, addresses = self.config.rank, self.memory.addresses
        words = list(self.state.words[:10])
        header = self.side.read(addresses[rank] + SIGNATURES_AT, SIGNATURES)
        culprit = code >> 8 & 0xFF
        # V2's kernels leave to us what is still there to be read.
        if words[0] and not words[1]:
            words[1] = int.from_bytes(self.side.read(self.state.control, 4), "little")
        if code & 0xFF == Kind.MISMATCH and culprit != rank and not any(words[6:]):
            mine = last_signed(self.side.read(addresses[culprit] + SIGNATURES_AT, SIGNATURES), rank)
            theirs = last_signed(header, culprit)
            words[6:] = [*(mine or (0, 0, 0))[1:], *(theirs or (0, 0, 0))[1:]]
        self._stopped = True
        self._failure = explain(words, code, rank, heard(header, self.config.world_size), self._alive)

    def _alive(self, rank: int) -> bool | None:
        if rank in self.dead:
            return False
        return True if rank in self.watched or rank == self.config.rank else None

    def close(self) -> None:
        """Free everything. No kernel of this engine may be in flight, no graph with one replayed again."""
        parts = [part for part in (self._graph_cache, self._streams, self.side, self.memory, self.state) if part is not None]
        self._streams = self.side = self.memory = self.state = None
        with contextlib.ExitStack() as stack:
            for part in reversed(parts):
                stack.callback(part.close)

    # -- for subclasses

    def _catalogue(self) -> list[KernelSpec]:
        return catalogue(self.path, self.config.world_size)

    def plan(self, numel: int, dtype: str) -> Plan:
        raise NotImplementedError

    def takes(self, numel: int, dtype: str) -> bool:
        """Whether a call of that size is this engine's; the same answer on all ranks."""
        return self.plan(numel, dtype).path == self.path

    def run(self, plan: Plan, x: torch.Tensor, out: torch.Tensor) -> None:
        """Launch ``plan`` on the current stream, whatever the tables would have picked. The current device is this engine's."""
        step = self._step(plan, x.numel(), x.dtype, config=0)
        step.fire(x.data_ptr(), out.data_ptr(), _current_stream(self._raw_device))

    def _register(self, spec: KernelSpec, entry: str, artifact: Artifact, kernel) -> None:
        raise NotImplementedError

    def _verification_plans(self, numel: int, dtype: torch.dtype) -> list[Plan]:
        """Every kernel for so many elements, in as many blocks as possible."""
        raise NotImplementedError

    def _full_plans(self) -> list[tuple[Plan, int]]:
        """fp32 calls (plan, number of elements) that together use every slot, once for each parity: each is made twice."""
        raise NotImplementedError

    def _step(self, plan: Plan, numel: int, dtype: torch.dtype, config: int) -> Step:
        """Prepare a call; ``config``: which flag of ``Control.met`` is that of its shape."""
        raise NotImplementedError
