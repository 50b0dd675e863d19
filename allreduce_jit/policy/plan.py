"""What a call runs: (world size, dtype, bytes) -> algorithm, grid, block, launches. Pure: no torch, no CUDA.

Every input of a plan is the same on all ranks, so all ranks choose alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .catalogue import ITEMSIZE, V2_ALGORITHMS, v2_algorithms
from .tables import BLOCKS, LEGACY_TABLES, NEVER, V2_TABLES, Band, Bands

PACKET = 16
WARP = 32
MAX_BLOCK = 512
HEADER_BYTES = 4096  # Header of kernels/cuda/staging.cuh, before the slots
# Launches of a stream overlap, if each is resident at once: two blocks of 512 threads on each of 132 multiprocessors.
RESIDENT_PACKETS = 264 * MAX_BLOCK


@dataclass(frozen=True)
class Region:
    """The part of a rank's staging memory that belongs to one algorithm.

    Attributes:
        offset: its first byte.
        capacity: size of a slot array, one per (buffer, source): packets for V2, bytes for legacy.
        channels: how many channels have an epoch word.
        first_channel: number of the first of them among those of all regions.
    """

    offset: int
    capacity: int
    channels: int
    first_channel: int


@dataclass(frozen=True)
class Layout:
    """What a rank keeps for its calls.

    Attributes:
        regions: one per algorithm.
        nbytes: size of the staging memory.
        channels: of all regions together.
    """

    regions: dict[str, Region]
    nbytes: int
    channels: int


@dataclass(frozen=True)
class Plan:
    """One call.

    Attributes:
        path: ``v2``, ``legacy`` or ``torch.distributed``.
        algorithm: kernel name without dtype and world size; for torch.distributed the backend.
        grid: blocks of a launch that move data; a guard may come on top.
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


def v2_bands(world_size: int, max_ctas: int | None = None, tuned: Bands | None = None) -> Bands:
    """Which algorithm takes which sizes: ``tuned``, else the table of this package.

    Args:
        max_ctas: blocks that a communicator may occupy; one of them is the guard.
    """
    if max_ctas is None:
        return tuned or V2_TABLES[world_size]
    bands: list[Band] = []
    for name in v2_algorithms(world_size, narrow=True):
        what = V2_ALGORITHMS[name]
        for block in BLOCKS:  # the smallest that make do with these blocks: so all of them have something to do
            most = (max_ctas - 1) * block * what.packets * PACKET * (world_size if what.parts else 1)
            if not bands or most > bands[-1].up_to:
                bands.append(Band(most, name, block))
    return *bands[:-1], replace(bands[-1], up_to=NEVER)


def v2_layout(world_size: int, staging_bytes: int, bands: Iterable[Band], max_ctas: int | None = None) -> Layout:
    """A region for every algorithm of ``bands`` (of all tables there are), together at most ``staging_bytes``.

    Each is as large as its largest message, but no more than a quarter (one-shot) or half (two-shot) of the memory; the
    last one gets the rest, as far as it has use for it, and lies with its shared buffers over the others. An algorithm
    inside another one has a part of its region, which is as large as either of them wants.
    """
    bands = tuple(bands)
    used = {band.algorithm for band in bands}
    names = [name for name in V2_ALGORITHMS if name in used]

    def wish(name: str) -> int:
        what, largest = V2_ALGORITHMS[name], max(band.up_to for band in bands if band.algorithm == name)
        parts, step = world_size if what.parts else 1, MAX_BLOCK * what.packets
        packets = ceil_div(NEVER if name == names[-1] else largest, PACKET * parts * step) * step
        return min(packets, RESIDENT_PACKETS) if what.stream else packets

    owners = [name for name in names if V2_ALGORITHMS[name].inside not in used]
    regions, offset, channels = {}, HEADER_BYTES, 0
    for owner in owners:
        algorithm = V2_ALGORITHMS[owner]
        guests = [name for name in names if V2_ALGORITHMS[name].inside == owner]
        one = (world_size - 1) * PACKET  # bytes of one buffer per packet of capacity; of all, and of those not shared:
        every, alone = algorithm.buffers * one, (algorithm.buffers - algorithm.shared) * one
        step = MAX_BLOCK * algorithm.packets
        room = min((staging_bytes - HEADER_BYTES) // every, (staging_bytes - offset) // alone)
        room = min(room, max(map(wish, (owner, *guests))))
        if owner != owners[-1]:
            room = min(room, staging_bytes // (2 if algorithm.parts else 4) // every)
        if max_ctas is not None:
            room = min(room, (max_ctas - 1) * step)
        capacity = room // step * step
        offset = max(HEADER_BYTES, offset - (every - alone) * capacity)
        region = Region(offset, capacity, capacity // (WARP * algorithm.packets), channels)
        regions[owner] = region
        for guest in guests:
            others = algorithm.buffers - V2_ALGORITHMS[guest].buffers
            regions[guest] = replace(region, offset=offset + others * one * capacity)
        offset += every * capacity
        channels += region.channels
    return Layout({name: regions[name] for name in names}, offset, channels)


def v2_plan(world_size: int, dtype: str, numel: int, bands: Bands, layout: Layout) -> Plan:
    """The V2 plan of ``numel`` > 0 elements of ``dtype`` (``float32``, ``float16``, ``bfloat16``).

    What needs several launches goes to the next algorithm, if there is one: it streams, or has more room.
    """
    nbytes, plan = numel * ITEMSIZE[dtype], None
    for band in bands:
        if nbytes <= band.up_to and (plan is None or band.algorithm != plan.algorithm):
            plan = v2_shape(band.algorithm, band.block, world_size, dtype, numel, layout)
            if plan.chunk == numel or V2_ALGORITHMS[band.algorithm].stream:
                break
    assert plan is not None  # the last band has no end
    return plan


def v2_shape(algorithm: str, block: int, world_size: int, dtype: str, numel: int, layout: Layout) -> Plan:
    """``algorithm`` for ``numel`` elements in blocks of ``block`` threads: equal launches where one does not hold all.

    Raises:
        ValueError: too few elements for an algorithm that streams, which takes two launches at least.
    """
    what = V2_ALGORITHMS[algorithm]
    parts = world_size if what.parts else 1
    packets = ceil_div(numel * ITEMSIZE[dtype], PACKET * parts)
    room = layout.regions[algorithm].capacity
    launches = ceil_div(packets, min(room, RESIDENT_PACKETS) if what.stream else room)
    unit = WARP * what.packets
    if what.stream and launches % 3 == 1:
        launches += 1  # the protocol's condition, see two_shot.cu
    each = ceil_div(ceil_div(packets, launches), unit) * unit
    while what.stream and ceil_div(packets, each) % 3 == 1:  # rounding changed their number
        each -= unit
        if each == 0:
            raise ValueError(f"{algorithm} of {numel} {dtype} elements: too few for two launches")
    chunk = each * parts * PACKET // ITEMSIZE[dtype]
    return Plan("v2", algorithm, ceil_div(each, block * what.packets), block, min(numel, chunk))


def legacy_layout(world_size: int, staging_bytes: int, block_bytes: int) -> Layout:
    """One-shot gets a third, two-shot (two phases) the rest; capacities are bytes of a slot."""
    capacity = (staging_bytes - HEADER_BYTES) // (6 * world_size) // block_bytes * block_bytes
    channels = capacity // block_bytes
    one_shot = 2 * world_size * capacity
    regions = {
        "legacy_one_shot": Region(HEADER_BYTES, capacity, channels, 0),
        "legacy_two_shot": Region(HEADER_BYTES + one_shot, capacity, channels, channels),
    }
    return Layout(regions, HEADER_BYTES + 3 * one_shot, 2 * channels)


def legacy_plan(
    world_size: int, dtype: str, numel: int, layout: Layout, block_bytes: int, threads: int, nvlink: bool, deterministic: bool
) -> Plan:
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


def legacy_shape(algorithm: str, world_size: int, dtype: str, numel: int, layout: Layout, block_bytes: int, threads: int) -> Plan:
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
