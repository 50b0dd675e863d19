"""The floor under every all-reduce of this machine, measured: the shortest exchange, a hop, the rate of stores.

The speed of light, as this project uses the word, is what these three allow:
``t_flag + min((n-1) S / BW, t_hop + 2 (n-1)/n S / BW)`` for S bytes over n ranks: the bytes of one-shot in one
hop, or those of reduce-scatter and all-gather in two.
"""

from __future__ import annotations

import statistics
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..abi import FloorArgs
from ..errors import PeerTimeoutError, SetupError
from ..harness.place import Place
from ..policy.catalogue import KernelSpec
from . import host_floor, timing
from .competitors import agreed

EGRESS_BYTES = 256 << 20  # that each rank stores in one kernel: its start and end are half a percent of it
FLAGS = 200  # exchanges in one timed burst
REPLAYS = 15
WARMUP = 3
TIMEOUT_S = 2.0  # of one wait for a flag
FLAGS_BYTES = 4096  # the flags, in front of the data
ENTRIES = ("floor_empty", "floor_flag", "floor_store")


@dataclass(frozen=True)
class Floor:
    """Each is the slowest rank's median.

    Attributes:
        flag_us: µs of one flag to every peer and the wait for theirs, back to back, each kernel launched while
            the one before still runs (programmatic dependent launch, from sm_90 on).
        flag_serial_us: the same, each kernel launched when the one before is complete.
        empty_us: µs of a kernel that does nothing, launched as for ``flag_us``.
        empty_serial_us: the same, launched as for ``flag_serial_us``.
        egress_gbs: 16-byte stores of each rank to all its peers while they do the same, in 1e9 bytes per second.
    """

    flag_us: float
    flag_serial_us: float
    empty_us: float
    empty_serial_us: float
    egress_gbs: float

    @property
    def hop_us(self) -> float:
        """What one exchange adds to a kernel."""
        return self.flag_serial_us - self.empty_serial_us

    def sol_us(self, nbytes: int, world_size: int) -> float:
        """The speed of light of an all-reduce of ``nbytes`` over ``world_size`` ranks, in µs."""
        one_shot = (world_size - 1) * nbytes / self.egress_gbs / 1e3
        two_shot = self.hop_us + one_shot * 2 / world_size
        return self.flag_us + min(one_shot, two_shot)

    def to_json(self) -> dict[str, float]:
        return {**asdict(self), "hop_us": self.hop_us}


def module(world_size: int) -> KernelSpec:
    """The kernels; no engine uses them, so they are in no catalogue."""
    return KernelSpec(f"floor_ws{world_size}", "cuda", "floor.cu", (("WORLD_SIZE", world_size),), ENTRIES)


def measure(place: Place, communicator: Any) -> tuple[Floor | host_floor.HostFloor | None, str | None]:
    """The floor, or why there is none; the same answer on all ranks. Collective.

    Args:
        place: where this rank stands.
        communicator: over the same ranks; its path decides whether there is a floor, its ``all_reduce`` lines
            the GPUs up.
    """
    if place.device.type != "cuda":
        return None, "the ranks are on the CPU"
    path = communicator.path
    if path == "host":
        return host_floor.measure(place, communicator)
    if path != "v2":
        return None, f"measured on paths v2 and host, this is {path}"
    probe = _Probe(place, communicator)
    handle, trouble = agreed(place, probe.allocate)
    handles = place.gather(handle)
    result: Any = None
    for step in (lambda: probe.connect(handles), probe.capture, probe.time):
        if trouble is None:
            result, trouble = agreed(place, step)
    # No rank frees what another one may still write to: the last agreement came after everybody's last kernel.
    with suppress(Exception):
        probe.close()
    if trouble is not None:
        return None, trouble
    worst = [max(column) for column in zip(*place.gather(result))]
    return Floor(*worst[:4], egress_gbs=probe.egress_bytes / min(worst[4:]) / 1e3), None


class _Probe:
    """One rank's kernels and memory, in steps that all ranks take together."""

    def __init__(self, place: Place, communicator: Any):
        self.place, self.communicator = place, communicator
        n = place.world_size
        self.packets = EGRESS_BYTES // 16 // (n - 1)
        self.egress_bytes = self.packets * 16 * (n - 1)
        self.nbytes = FLAGS_BYTES + n * self.packets * 16
        self.memory: Any = None
        self.graphs: list[tuple[torch.cuda.CUDAGraph, int]] = []

    def allocate(self) -> str:
        """Build, load and allocate; returns the handle for the peers."""
        from ..engine.driver import load_module
        from ..engine.memory import StagingMemory
        from ..jit.cache import KernelCache
        from ..jit.compiler import build
        from ..settings import Settings

        torch.cuda.synchronize(self.place.device)  # the driver's calls need a context, and do not make one
        major, minor = torch.cuda.get_device_capability(self.place.device)
        self.pdl = major >= 9
        cache = KernelCache(Settings.from_env().cache_dir)
        artifact, _ = build(module(self.place.world_size), f"sm_{major}{minor}", cache)
        loaded = load_module(artifact.cubin)
        self.kernels = {name: loaded.kernel(name) for name in ENTRIES}
        self.state = torch.zeros(2, dtype=torch.int32, device=self.place.device)
        self.memory = StagingMemory(self.nbytes, self.place.rank)
        return self.memory.handle()

    def connect(self, handles: list[str]) -> None:
        self.memory.connect(handles)
        args = FloorArgs(
            state=self.state.data_ptr(),
            timeout_ns=int(TIMEOUT_S * 1e9),
            rank=self.place.rank,
            packets=self.packets,
        )
        n = self.place.world_size
        args.flags[:n] = self.memory.addresses
        args.data[:n] = [address + FLAGS_BYTES for address in self.memory.addresses]
        self.args = args

    def capture(self) -> None:
        """A graph per figure, in the order of ``Floor``; the stores with two grids, of which the faster counts."""
        from ..engine.driver import KernelLaunch

        sms = torch.cuda.get_device_properties(self.place.device).multi_processor_count
        for name, grid, block, pdl, calls in (
            ("floor_flag", 1, 32, self.pdl, FLAGS),
            ("floor_flag", 1, 32, False, FLAGS),
            ("floor_empty", 1, 32, self.pdl, FLAGS),
            ("floor_empty", 1, 32, False, FLAGS),
            ("floor_store", sms, 512, False, 1),
            ("floor_store", 2 * sms, 512, False, 1),
        ):
            launch = KernelLaunch(self.kernels[name], [self.args], grid, block, pdl=pdl)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                stream = torch.cuda.current_stream(self.place.device).cuda_stream
                for _ in range(calls):
                    launch(stream)
            self.graphs.append((graph, calls))

    def time(self) -> list[float]:
        """This rank's median of each graph, in µs per kernel."""
        barrier = timing.device_barrier(self.place, self.communicator)
        medians = []
        try:
            for graph, calls in self.graphs:
                samples = timing.replays_of(self.place, graph, calls, REPLAYS, WARMUP, barrier)
                medians.append(statistics.median(samples))
        finally:
            self.place.synchronize()  # whatever happened: nothing of ours may be in flight when others free memory
        epoch, expired = self.state.tolist()
        if expired:
            raise PeerTimeoutError(f"no flag from rank {expired - 1} within {TIMEOUT_S:g} s")
        replays = WARMUP + REPLAYS + timing.PRIMING
        if epoch != 2 * FLAGS * replays:
            raise SetupError(f"{epoch} exchanges counted, {2 * FLAGS * replays} launched")
        return medians

    def close(self) -> None:
        self.graphs.clear()
        if self.memory is not None:
            self.memory.close()
