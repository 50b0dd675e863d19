"""What a call runs: (world size, dtype, bytes) -> algorithm, grid, block. Pure: no torch, no CUDA.

Every input of a plan is the same on all ranks (the multiprocessor count is the smallest of the group), so
all ranks choose alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from .kernel import ITEMSIZE
from .tuning import LEGACY_TABLES, PIPELINED_BLOCKS_PER_SM, RESIDENT_THREADS, V2_TABLES

PACKET = 16
WARP = 32
MAX_BLOCK = 512
MAX_THREADS = 1 << 18


@dataclass(frozen=True)
class Region:
    """The part of a rank's staging memory that belongs to one algorithm.

    Attributes:
        offset: its first byte.
        capacity: size of a slot array, one per (phase, parity, source): packets for V2, bytes for legacy.
        channels: how many channels have an epoch word.
        block: threads per block where the algorithm needs one value for all calls, else 0.
    """

    offset: int
    capacity: int
    channels: int
    block: int = 0


@dataclass(frozen=True)
class Layout:
    """Staging memory of a rank: one region per algorithm, and the size of the whole in bytes."""

    regions: dict[str, Region]
    nbytes: int


@dataclass(frozen=True)
class Plan:
    """One call.

    Attributes:
        path: ``v2``, ``legacy`` or ``torch.distributed``.
        algorithm: kernel name without dtype and world size; for torch.distributed the backend.
        grid: blocks of the (first) launch.
        block: threads per block.
        chunk: elements of one launch; a larger tensor takes several.
    """

    path: str
    algorithm: str
    grid: int
    block: int
    chunk: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def v2_layout(world_size: int, staging_bytes: int, sm_count: int) -> Layout:
    """Regions of one-shot, two-shot and pipelined; together at most ``staging_bytes``."""
    shares = [int(share * staging_bytes) // PACKET * PACKET for share in V2_TABLES[world_size].shares]
    sources = 2 * world_size * PACKET  # bytes per slot, over both parities and all sources
    one = min(MAX_THREADS, shares[0] // sources // MAX_BLOCK * MAX_BLOCK)
    two = min(MAX_THREADS, shares[1] // (2 * sources) // MAX_BLOCK * MAX_BLOCK)
    # Flags of the pipelined kernel lie behind its slots: one word per block and source.
    blocks = sm_count * PIPELINED_BLOCKS_PER_SM
    slots = (shares[2] - blocks * world_size * 4) // (2 * sources)
    block = max(WARP, min(MAX_BLOCK, slots // blocks // WARP * WARP))
    blocks = min(blocks, slots // block)
    regions, end = {}, 0
    for name, capacity, channels, fixed, nbytes in (
        ("one_shot", one, one // WARP, 0, one * sources),
        ("two_shot", two, two // WARP, 0, two * 2 * sources),
        ("pipelined", blocks * block, blocks, block, blocks * (block * 2 * sources + world_size * 4)),
    ):
        regions[name] = Region(end, capacity, channels, fixed)
        end += ceil_div(nbytes, 256) * 256
    return Layout(regions, end)


def v2_plan(world_size: int, dtype: str, numel: int, sm_count: int, layout: Layout) -> Plan:
    """The V2 plan of ``numel`` > 0 elements of ``dtype`` (``float32``, ``float16``, ``bfloat16``)."""
    table = V2_TABLES[world_size]
    nbytes = numel * ITEMSIZE[dtype]
    algorithm = "one_shot" if table.two_shot_from is None or nbytes < table.two_shot_from else "two_shot"
    for name in (algorithm, "two_shot"):
        threads = ceil_div(v2_packets(name, world_size, dtype, numel), WARP) * WARP
        fits = min(layout.regions[name].capacity, sm_count * RESIDENT_THREADS[world_size])
        if nbytes < table.pipelined_from and threads <= fits:
            return v2_shape(name, world_size, dtype, numel, sm_count, layout)
    return v2_shape("pipelined", world_size, dtype, numel, sm_count, layout)


def v2_packets(algorithm: str, world_size: int, dtype: str, numel: int) -> int:
    """Packets that the threads of a grid share: of the whole tensor, or of a rank's part."""
    packets = ceil_div(numel * ITEMSIZE[dtype], PACKET)
    return packets if algorithm == "one_shot" else ceil_div(packets, world_size)


def v2_shape(algorithm: str, world_size: int, dtype: str, numel: int, sm_count: int, layout: Layout) -> Plan:
    """Grid of ``algorithm``, one packet a thread; pipelined takes the blocks there are and loops.

    The smallest block that needs no more blocks than multiprocessors spreads a small message widest.
    """
    packets = v2_packets(algorithm, world_size, dtype, numel)
    region = layout.regions[algorithm]
    if algorithm == "pipelined":
        return Plan("v2", algorithm, min(region.channels, ceil_div(packets, region.block)), region.block, numel)
    block = WARP
    while block < MAX_BLOCK and ceil_div(packets, block) > sm_count:
        block *= 2
    return Plan("v2", algorithm, ceil_div(packets, block), block, numel)


def legacy_layout(world_size: int, staging_bytes: int, block_bytes: int) -> Layout:
    """One-shot gets a third, two-shot (two phases) the rest; capacities are bytes of a slot."""
    capacity = staging_bytes // (6 * world_size) // block_bytes * block_bytes
    channels = capacity // block_bytes
    offset = 2 * world_size * capacity
    regions = {
        "legacy_one_shot": Region(0, capacity, channels),
        "legacy_two_shot": Region(offset, capacity, channels),
    }
    return Layout(regions, 3 * offset)


def legacy_plan(world_size: int, dtype: str, numel: int, layout: Layout, block_bytes: int, threads: int,
                nvlink: bool, deterministic: bool) -> Plan:
    """The legacy plan of ``numel`` > 0 elements; above the size where NCCL is expected to win, NCCL's.

    ``deterministic`` never hands over: what exceeds the staging memory takes several launches.
    """
    table = LEGACY_TABLES[world_size]
    nbytes = numel * ITEMSIZE[dtype]
    if not deterministic and nbytes > (table.nvlink_limit if nvlink else table.pcie_limit):
        return Plan("torch.distributed", "nccl", 0, 0, numel)
    small = nbytes < table.two_shot_from and nbytes <= layout.regions["legacy_one_shot"].capacity
    algorithm = "legacy_one_shot" if small else "legacy_two_shot"
    return legacy_shape(algorithm, world_size, dtype, numel, layout, block_bytes, threads)


def legacy_shape(algorithm: str, world_size: int, dtype: str, numel: int, layout: Layout, block_bytes: int,
                 threads: int) -> Plan:
    """``algorithm`` for ``numel`` elements: one program per block of the tensor, or of a rank's part."""
    itemsize = ITEMSIZE[dtype]
    if algorithm == "legacy_one_shot":
        chunk = min(numel, layout.regions["legacy_one_shot"].capacity // itemsize)
        return Plan("legacy", algorithm, ceil_div(chunk * itemsize, block_bytes), threads, chunk)
    chunk = min(numel, world_size * layout.regions["legacy_two_shot"].capacity // itemsize)
    part = legacy_part(world_size, chunk, block_bytes // itemsize)
    return Plan("legacy", algorithm, part * itemsize // block_bytes, threads, chunk)


def legacy_part(world_size: int, numel: int, block: int) -> int:
    """Elements of a rank's part in two-shot: whole blocks of ``block`` elements."""
    return ceil_div(ceil_div(numel, world_size), block) * block
