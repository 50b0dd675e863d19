"""What V2 and legacy share: build in agreed steps, verify with real traffic, launch, report, close.

The steps are separate so that all ranks can agree after each one (``ladder``); no step talks to the group.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from . import reference
from .cache import Artifact, KernelCache, decode, encode
from .compiler import build
from .driver import Module
from .errors import PeerTimeout, SetupError
from .kernel import DTYPES, KernelSpec, catalogue
from .memory import LocalState, StagingMemory
from .plan import Layout, Plan
from .settings import Settings

TORCH_DTYPES = {name: getattr(torch, name) for name in DTYPES}
DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
VERIFY_BYTES = 64 << 10
VERIFY_SECONDS = 10.0


@dataclass(frozen=True)
class EngineConfig:
    """Where an engine runs; the same on all ranks but for ``rank`` and ``device``."""

    rank: int
    world_size: int
    device: torch.device
    arch: str
    sm_count: int
    nvlink: bool
    deterministic: bool
    settings: Settings


class KernelEngine:
    """A path with kernels of our own. Subclasses say which kernels, which layout, and how to launch."""

    path: str
    numbers: dict[int, str]  # Report.algorithm -> name

    def __init__(self, config: EngineConfig, layout: Layout):
        self.config = config
        self.layout = layout
        self._raw_device = config.device.index
        self.compiled = self.cached = 0
        self.memory: StagingMemory | None = None
        self.state: LocalState | None = None

    # -- construction, in the order in which the ladder calls it

    def compile(self, cache: KernelCache) -> list[str]:
        """Build, or fetch from the cache, this rank's share of the modules; returns them in base64."""
        share = []
        for spec in catalogue(self.path, self.config.world_size)[self.config.rank :: self.config.world_size]:
            artifact, was_cached = build(spec, self.config.arch, cache)
            self.cached += was_cached
            self.compiled += not was_cached
            share.append(base64.b64encode(encode(spec.name, artifact)).decode())
        return share

    def load(self, shares: Sequence[Sequence[str]]) -> None:
        """Load every kernel that a plan can pick, from the shares of all ranks."""
        torch.cuda.synchronize(self.config.device)  # the driver's calls need a context, and do not make one
        artifacts = dict(decode(base64.b64decode(text)) for share in shares for text in share)
        for spec in catalogue(self.path, self.config.world_size):
            module = Module(artifacts[spec.name].cubin)
            for entry in spec.entries:
                self._register(spec, entry, artifacts[spec.name], module.kernel(entry))

    def allocate(self) -> str:
        """Allocate and poison the staging memory; returns the handle for the peers."""
        self.state = LocalState({name: region.channels for name, region in self.layout.regions.items()})
        self.memory = StagingMemory(self.layout.nbytes, self.config.rank)
        return self.memory.handle()

    def connect(self, handles: Sequence[str]) -> None:
        """Map the peers' memory and read it once through the copy engine: it must hold the poison."""
        self.memory.connect(handles)
        for rank in range(self.config.world_size):
            if self.memory.read(rank, VERIFY_BYTES).count(0xFF) != VERIFY_BYTES:
                raise SetupError(f"rank {self.config.rank} reads wrong bytes from the memory of rank {rank}")
        self._bind()

    def verify(self) -> None:
        """All-reduce random data through every kernel, twice (both parities), against the exact result.

        ``can_access_peer`` is no proof: on some machines peer writes are dropped or damaged.
        """
        self.state.set_deadline(VERIFY_SECONDS)
        world_size, rank, device = self.config.world_size, self.config.rank, self.config.device
        generator = torch.Generator().manual_seed(2026)
        for dtype in TORCH_DTYPES.values():
            # Random bits: finite values of all magnitudes, infinities, subnormals and NaNs, all ones among them.
            bits = torch.randint(-(1 << 31), 1 << 31, (world_size, VERIFY_BYTES // 4), generator=generator)
            bits[:, 7] = -1
            numel = VERIFY_BYTES // dtype.itemsize - 1
            inputs = bits.to(torch.int32).view(dtype)[:, :numel]
            want = reference.ordered_sum(inputs)
            for turn, plan in enumerate(self._verification_plans(numel, dtype) * 2):
                # Turned by a little, so that what an earlier round left behind is not taken for this one's.
                x = inputs[rank].roll(turn)[: plan.chunk].to(device)
                out = torch.empty_like(x)
                self.run(plan, x, out)
                torch.cuda.synchronize(device)
                self.check()
                difference = reference.compare(out.cpu(), want.roll(turn)[: plan.chunk])
                if difference.wrong:
                    raise SetupError(f"rank {rank}: {plan.algorithm} of {plan.chunk} {dtype} elements: {difference}")
        self.state.set_deadline(self.config.settings.timeout_s)

    # -- service

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Sum ``x`` over the ranks into ``out`` (may be ``x``): contiguous, same shape, supported dtype, numel > 0.

        Raises:
            PeerTimeout: an earlier call gave up on a peer; nothing was launched.
        """
        if self.state.words[0]:
            self.check()
        if torch._C._cuda_getDevice() == self._raw_device:
            self._launch(x, out, torch._C._cuda_getCurrentRawStream(self._raw_device))
        else:
            with torch.cuda.device(self._raw_device):
                self._launch(x, out, torch._C._cuda_getCurrentRawStream(self._raw_device))

    def check(self) -> None:
        """Raise ``PeerTimeout`` if a kernel gave up waiting for a peer."""
        expired, source, algorithm, buffer, channel = self.state.words[:5]
        if expired:
            raise PeerTimeout(
                f"rank {self.config.rank} waited in vain for rank {source} "
                f"({self.numbers.get(algorithm, algorithm)}, buffer {buffer}, channel {channel}); "
                "results since then are not valid. Close this communicator and build a new one."
            )

    def close(self) -> None:
        """Free everything. No kernel of this engine may be in flight, no graph with one replayed again."""
        memory, state = self.memory, self.state
        self.memory = self.state = None
        try:
            if memory is not None:
                memory.close()
        finally:
            if state is not None:
                state.close()

    # -- for subclasses

    def plan(self, numel: int, dtype: str) -> Plan:
        raise NotImplementedError

    def takes(self, numel: int, dtype: str) -> bool:
        """Whether a call of that size is this engine's; the same answer on all ranks."""
        return self.plan(numel, dtype).path == self.path

    def run(self, plan: Plan, x: torch.Tensor, out: torch.Tensor) -> None:
        """Launch ``plan`` on the current stream, whatever the tables would have picked."""
        raise NotImplementedError

    def _register(self, spec: KernelSpec, entry: str, artifact: Artifact, kernel) -> None:
        raise NotImplementedError

    def _bind(self) -> None:
        """Addresses are known: fill in argument blocks."""
        raise NotImplementedError

    def _verification_plans(self, numel: int, dtype: torch.dtype) -> list[Plan]:
        raise NotImplementedError

    def _launch(self, x: torch.Tensor, out: torch.Tensor, stream: int) -> None:
        raise NotImplementedError
