"""What a call runs: (world size, dtype, bytes) -> algorithm, grid, block. Pure: no torch, no CUDA.

Every input of a plan is the same on all ranks (the multiprocessor count is the smallest of the group), so
all ranks choose alike.
"""

from __future__ import annotations

from dataclasses import dataclass

from .kernel import ITEMSIZE
from .tuning import LEGACY_TABLES, RESIDENT_THREADS, V2_TABLES

PACKET = 16
WARP = 32
MAX_BLOCK = 512
MAX_THREADS = 1 << 18


@dataclass(frozen=True)
class Layout:
    """Staging memory of a rank: the slots of one-shot, then those of two-shot.

    Attributes:
        one_shot_capacity: slots per (parity, source): for V2 packets = threads, for legacy bytes.
        two_shot_capacity: slots per (phase, parity, source), in the same unit.
        two_shot_offset: byte offset of two-shot's slots.
        nbytes: size of the whole.
    """

    one_shot_capacity: int
    two_shot_capacity: int
    two_shot_offset: int
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


def v2_layout(world_size: int, staging_bytes: int) -> Layout:
    """Largest capacities whose slots fit into ``staging_bytes``."""
    share = V2_TABLES[world_size].one_shot_share

    def capacity(nbytes: float, phases: int) -> int:
        per_thread = phases * 2 * world_size * PACKET
        return min(MAX_THREADS, int(nbytes) // per_thread // MAX_BLOCK * MAX_BLOCK)

    one = capacity(staging_bytes * share, 1)
    two = capacity(staging_bytes * (1 - share), 2)
    offset = one * 2 * world_size * PACKET
    return Layout(one, two, offset, offset + two * 4 * world_size * PACKET)


def v2_plan(world_size: int, dtype: str, numel: int, sm_count: int, layout: Layout) -> Plan:
    """The V2 plan of ``numel`` > 0 elements of ``dtype`` (``float32``, ``float16``, ``bfloat16``)."""
    packets = ceil_div(numel * ITEMSIZE[dtype], PACKET)
    threshold = V2_TABLES[world_size].two_shot_from
    if threshold is None or packets * PACKET < threshold:
        return v2_shape("one_shot", packets, numel, world_size, sm_count, layout.one_shot_capacity)
    part = ceil_div(packets, world_size)
    return v2_shape("two_shot", part, numel, world_size, sm_count, layout.two_shot_capacity)


def v2_shape(algorithm: str, packets: int, numel: int, world_size: int, sm_count: int, capacity: int) -> Plan:
    """Grid for ``packets`` per part: one packet a thread while all threads are resident, else a loop.

    The smallest block that needs no more blocks than multiprocessors spreads a small message widest.
    """
    threads = ceil_div(packets, WARP) * WARP
    resident = min(capacity, sm_count * RESIDENT_THREADS[world_size])
    if threads > resident:
        return Plan("v2", algorithm + "_loop", resident // MAX_BLOCK, MAX_BLOCK, numel)
    block = WARP
    while block < MAX_BLOCK and ceil_div(threads, block) > sm_count:
        block *= 2
    return Plan("v2", algorithm, ceil_div(threads, block), block, numel)


def legacy_layout(world_size: int, staging_bytes: int, block_bytes: int) -> Layout:
    """One-shot gets a third, two-shot (two phases) the rest; capacities are bytes of a slot."""
    capacity = staging_bytes // (6 * world_size) // block_bytes * block_bytes
    offset = 2 * world_size * capacity
    return Layout(capacity, capacity, offset, 3 * offset)


def legacy_plan(world_size: int, dtype: str, numel: int, layout: Layout, block_bytes: int, threads: int,
                nvlink: bool, deterministic: bool) -> Plan:
    """The legacy plan of ``numel`` > 0 elements; above the size where NCCL is expected to win, NCCL's.

    ``deterministic`` never hands over: what exceeds the staging memory takes several launches.
    """
    table = LEGACY_TABLES[world_size]
    nbytes = numel * ITEMSIZE[dtype]
    if not deterministic and nbytes > (table.nvlink_limit if nvlink else table.pcie_limit):
        return Plan("torch.distributed", "nccl", 0, 0, numel)
    small = nbytes < table.two_shot_from and nbytes <= layout.one_shot_capacity
    algorithm = "legacy_one_shot" if small else "legacy_two_shot"
    return legacy_shape(algorithm, world_size, dtype, numel, layout, block_bytes, threads)


def legacy_shape(algorithm: str, world_size: int, dtype: str, numel: int, layout: Layout, block_bytes: int,
                 threads: int) -> Plan:
    """``algorithm`` for ``numel`` elements: one program per block of the tensor, or of a rank's part."""
    itemsize = ITEMSIZE[dtype]
    if algorithm == "legacy_one_shot":
        chunk = min(numel, layout.one_shot_capacity // itemsize)
        return Plan("legacy", algorithm, ceil_div(chunk * itemsize, block_bytes), threads, chunk)
    chunk = min(numel, world_size * layout.two_shot_capacity // itemsize)
    part = legacy_part(world_size, chunk, block_bytes // itemsize)
    return Plan("legacy", algorithm, part * itemsize // block_bytes, threads, chunk)


def legacy_part(world_size: int, numel: int, block: int) -> int:
    """Elements of a rank's part in two-shot: whole blocks of ``block`` elements."""
    return ceil_div(ceil_div(numel, world_size), block) * block
