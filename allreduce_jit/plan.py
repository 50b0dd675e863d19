"""What a call runs: (world size, dtype, bytes) -> algorithm, grid, block. Pure: no torch, no CUDA.

Every input of a plan is the same on all ranks (the multiprocessor count is the smallest of the group), so
all ranks choose alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from .kernel import ITEMSIZE
from .tuning import LEGACY_TABLES, V2_TABLES

PACKET = 16
WARP = 32
MAX_BLOCK = 512
ONE_SHOT_BUFFERS = 2  # kernels/cuda: one per parity
TWO_SHOT_BUFFERS = 3  # and one for the gather


@dataclass(frozen=True)
class Region:
    """The part of a rank's staging memory that belongs to one algorithm.

    Attributes:
        offset: its first byte.
        capacity: size of a slot array, one per (buffer, source): packets for V2, bytes for legacy.
        channels: how many channels have an epoch word.
    """

    offset: int
    capacity: int
    channels: int


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
        grid: blocks of a launch.
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


def v2_layout(world_size: int, staging_bytes: int) -> Layout:
    """Regions of one-shot and two-shot; together at most ``staging_bytes``."""
    share = int(V2_TABLES[world_size].one_shot_share * staging_bytes)
    slot = world_size * PACKET  # bytes per packet of capacity and buffer
    one = share // (ONE_SHOT_BUFFERS * slot) // MAX_BLOCK * MAX_BLOCK
    two = (staging_bytes - share) // (TWO_SHOT_BUFFERS * slot) // MAX_BLOCK * MAX_BLOCK
    end = one * ONE_SHOT_BUFFERS * slot
    regions = {"one_shot": Region(0, one, one // WARP), "two_shot": Region(end, two, two // WARP)}
    return Layout(regions, end + two * TWO_SHOT_BUFFERS * slot)


def v2_plan(world_size: int, dtype: str, numel: int, sm_count: int, layout: Layout) -> Plan:
    """The V2 plan of ``numel`` > 0 elements of ``dtype`` (``float32``, ``float16``, ``bfloat16``)."""
    nbytes = numel * ITEMSIZE[dtype]
    algorithm = "one_shot" if nbytes < V2_TABLES[world_size].two_shot_from else "two_shot"
    return v2_shape(algorithm, world_size, dtype, numel, sm_count, layout)


def v2_shape(algorithm: str, world_size: int, dtype: str, numel: int, sm_count: int, layout: Layout) -> Plan:
    """Grid of ``algorithm``, one packet (of each part) a thread, and equal launches where one does not hold all.

    The smallest block that needs no more blocks than multiprocessors spreads a small message widest.
    """
    parts = 1 if algorithm == "one_shot" else world_size
    packets = ceil_div(numel * ITEMSIZE[dtype], PACKET * parts)
    launches = ceil_div(packets, layout.regions[algorithm].capacity)
    packets = ceil_div(ceil_div(packets, launches), WARP) * WARP
    block = WARP
    while block < MAX_BLOCK and ceil_div(packets, block) > sm_count:
        block *= 2
    chunk = numel if launches == 1 else packets * parts * PACKET // ITEMSIZE[dtype]
    return Plan("v2", algorithm, ceil_div(packets, block), block, chunk)


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
