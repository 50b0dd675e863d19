"""The floor under every all-reduce through host memory, measured: exchanges of packets there, and both directions of the bus at once."""

from __future__ import annotations

import itertools
import math
import statistics
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from ..abi import FloorArgs
from ..errors import PeerTimeoutError
from ..harness.place import Place
from ..policy.catalogue import HOST_ALGORITHMS, KernelSpec
from . import timing
from .competitors import agreed

SIZES = tuple(1 << shift for shift in range(10, 21, 2))  # bytes of exchanges of packets
BOTH_BYTES, TURNS = 2 << 20, 8  # that each rank stores, and loads, in one kernel, so many times
CALLS = {True: 100, False: 10}  # of an exchange in one timed burst: up to 64 KB, beyond
BLOCKS = (128, 512)  # threads; of each figure the fastest counts
REPLAYS, WARMUP = 8, 2
TIMEOUT_S = 2.0  # of one wait
FLAGS_BYTES = 4096  # in front of the data
WARP_BYTES = 32 * 16  # of an exchange
MOST_BLOCKS = SIZES[-1] // 16 // min(BLOCKS)
ENTRIES = ("floor_empty", "floor_flag", "floor_store", "floor_packets", "floor_both")


@dataclass(frozen=True)
class HostFloor:
    """Each is the slowest rank's median.

    Attributes:
        flag_us: µs of one flag to every peer through host memory and the wait for theirs, as ``speed_of_light.Floor`` has it.
        packets_us: of each of ``SIZES``, µs of an exchange of so many bytes in 16-byte packets that prove their own arrival.
        both_gbs: what a GPU stores to host memory while it loads as much from there, all ranks at once, in 1e9 bytes per second.
    """

    flag_us: float
    packets_us: tuple[float, ...]
    both_gbs: float

    def sol_us(self, nbytes: int, world_size: int) -> float:
        """What stands for the speed of light of an all-reduce of ``nbytes``, in µs: up to the largest of ``SIZES`` an exchange of
        packets, which nobody sums (between two sizes, a line of their logarithms); beyond, the bytes that come in, at ``both_gbs``."""
        if nbytes <= SIZES[0]:
            return self.packets_us[0]
        if nbytes <= SIZES[-1]:
            high = next(i for i, size in enumerate(SIZES) if nbytes <= size)
            share = math.log(nbytes / SIZES[high - 1]) / math.log(SIZES[high] / SIZES[high - 1])
            return self.packets_us[high - 1] ** (1 - share) * self.packets_us[high] ** share
        return self.flag_us + 2 * (world_size - 1) / world_size * nbytes / self.both_gbs / 1e3

    def to_json(self) -> dict[str, Any]:
        return {
            "flag_us": self.flag_us,
            "packets_us": {str(size): us for size, us in zip(SIZES, self.packets_us)},
            "both_gbs": self.both_gbs,
        }


def module(world_size: int) -> KernelSpec:
    """The kernels; no engine uses them, so they are in no catalogue."""
    constants = (("WORLD_SIZE", world_size), ("TURNS", TURNS))
    return KernelSpec(f"floor_host_ws{world_size}", "cuda", "floor_host.cu", constants, ENTRIES)


def measure(place: Place, communicator: Any) -> tuple[HostFloor | None, str | None]:
    """The floor, or why there is none; the same answer on all ranks. Collective; see ``speed_of_light.measure``."""
    probe = _Probe(place, communicator)
    handle, trouble = agreed(place, probe.allocate)
    handles = place.gather(handle)
    result: Any = None
    for step in (lambda: probe.memory.connect(handles), probe.time):
        if trouble is None:
            result, trouble = agreed(place, step)
    # No rank frees what another one may still write to: the last agreement came after everybody's last kernel.
    with suppress(Exception):
        probe.close()
    if trouble is not None:
        return None, trouble
    flag, both, *packets = (max(column) for column in zip(*place.gather(result)))
    return HostFloor(flag, tuple(packets), BOTH_BYTES * TURNS / both / 1e3), None


def _pace(nbytes: int) -> tuple[int, int]:
    """The pace of one-shot, for an exchange of so many bytes: cycles from a warp's stores to the next one's, and to its first poll."""
    ours = HOST_ALGORITHMS["host_one_shot"]
    return ours.pace, ours.first_poll + ours.first_poll_per_channel * (nbytes // WARP_BYTES)


def _shapes(sms: int) -> list[tuple[int, int]]:
    """Grids and blocks of ``floor_both``, of which the fastest counts: which one that is differs by machine."""
    return [(-(-sms // 2), 128), (sms, 128), (sms, 512)]


class _Probe:
    """One rank's kernels and memory, in steps that all ranks take together."""

    def __init__(self, place: Place, communicator: Any):
        self.place, self.communicator = place, communicator
        self.memory: Any = None
        self.states: list[torch.Tensor] = []

    def allocate(self) -> str:
        """Build, load and allocate; returns the handle for the peers."""
        from ..engine.driver import load_module
        from ..engine.host_memory import HostStaging
        from ..jit.cache import KernelCache
        from ..jit.compiler import build
        from ..settings import Settings

        torch.cuda.synchronize(self.place.device)  # the driver's calls need a context, and do not make one
        major, minor = torch.cuda.get_device_capability(self.place.device)
        self.pdl = major >= 9
        artifact, _ = build(module(self.place.world_size), f"sm_{major}{minor}", KernelCache(Settings.from_env().cache_dir))
        loaded = load_module(artifact.cubin)
        self.kernels = {name: loaded.kernel(name) for name in ENTRIES}
        exchanges = len(SIZES) * len(BLOCKS) * 2
        self.memory = HostStaging(FLAGS_BYTES + exchanges * SIZES[-1] + BOTH_BYTES, self.place.rank)
        return self.memory.handle()

    def time(self) -> list[float]:
        """This rank's medians, in µs per kernel: a flag, both directions, an exchange of each of ``SIZES``."""
        sms = torch.cuda.get_device_properties(self.place.device).multi_processor_count
        try:
            flag = self._median("floor_flag", 0, 1, 32, 0, 100)
            # No two kernels share data: epochs begin at 1, and what another one left would look like a peer's.
            at = FLAGS_BYTES
            packets = []
            for nbytes in SIZES:
                times = []
                for block, pace in itertools.product(BLOCKS, ((0, 0), _pace(nbytes))):
                    count = nbytes // 16
                    calls = CALLS[nbytes <= 64 << 10]
                    times.append(self._median("floor_packets", at, -(-count // block), min(block, count), count, calls, pace))
                    at += SIZES[-1]
                packets.append(min(times))
            both = min(self._median("floor_both", at, grid, block, BOTH_BYTES // 16, 4) for grid, block in _shapes(sms))
        finally:
            self.place.synchronize()  # whatever happened: nothing of ours may be in flight when others free memory
        expired = [int(state[1::2].max()) for state in self.states]
        if any(expired):
            raise PeerTimeoutError(f"no packet from rank {max(expired) - 1} within {TIMEOUT_S:g} s")
        return [flag, both, *packets]

    def _median(
        self, name: str, data: int, grid: int, block: int, packets: int, calls: int, pace: tuple[int, int] = (0, 0)
    ) -> float:
        """Of a graph of ``calls`` kernels; ``data``: where it lies in everybody's memory; ``pace``: of ``FloorArgs``, and the first poll."""
        from ..engine.driver import KernelLaunch

        state = torch.zeros(2 * MOST_BLOCKS, dtype=torch.int32, device=self.place.device)
        self.states.append(state)
        args = FloorArgs(state=state.data_ptr(), timeout_ns=int(TIMEOUT_S * 1e9), rank=self.place.rank, packets=packets)
        args.pace, args.first_poll = pace
        n = self.place.world_size
        args.flags[:n] = self.memory.addresses
        args.data[:n] = [address + data for address in self.memory.addresses]
        launch = KernelLaunch(self.kernels[name], [args], grid, block, pdl=self.pdl)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            stream = torch.cuda.current_stream(self.place.device).cuda_stream
            for _ in range(calls):
                launch(stream)
        barrier = timing.device_barrier(self.place, self.communicator)
        return statistics.median(timing.replays_of(self.place, graph, calls, REPLAYS, WARMUP, barrier))

    def close(self) -> None:
        if self.memory is not None:
            self.memory.close()
