"""Plans of the NVLink kernels (path V2): (OpSpec, world size) -> algorithm, grid, block, launches. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from .catalogue import NVLINK_ALGORITHMS, nvlink_algorithms
from .operation import ITEMSIZE, OpSpec
from .plan import HEADER_BYTES, MAX_BLOCK, PACKET, WARP, Launch, Layout, Plan, Region, ceil_div
from .tables import BLOCKS, NEVER, NVLINK_TABLES, Band, Bands

# Launches of a stream overlap, if each is resident at once: two blocks of 512 threads on each of 132 SMs.
RESIDENT_PACKETS = 264 * MAX_BLOCK
_STREAM_SCATTERS = (2, 0, 3)  # the first launch's in an even epoch, one that may alias other slots, the last launch's


def make_bands(world_size: int, max_ctas: int | None = None, tuned: Bands | None = None) -> Bands:
    """Which algorithm takes which sizes: ``tuned``, else the table of this package.

    Args:
        max_ctas: blocks that a communicator may occupy; one of them is the guard.
    """
    if max_ctas is None:
        return tuned or NVLINK_TABLES[world_size]
    bands: list[Band] = []
    for name in nvlink_algorithms(world_size, few_sms=True):
        what = NVLINK_ALGORITHMS[name]
        for block in BLOCKS:  # the smallest that make do with these blocks: so all of them have something to do
            most = (max_ctas - 1) * block * what.packets * PACKET * (world_size if what.parts else 1)
            if not bands or most > bands[-1].up_to:
                bands.append(Band(most, name, block))
    return *bands[:-1], replace(bands[-1], up_to=NEVER)


def make_layout(world_size: int, staging_bytes: int, bands: Iterable[Band], max_ctas: int | None = None) -> Layout:
    """A region for every algorithm of ``bands`` (of all tables there are), together at most ``staging_bytes``.

    Each is as large as its largest message, but no more than a quarter (one-shot) or half (two-shot) of the memory; the
    last one gets the rest, as far as it has use for it, and its aliased buffers overlap the others' slots. An algorithm that
    shares another one's buffers has a part of its region, whose capacity is the larger of what the two request.
    """
    bands = tuple(bands)
    used = {band.algorithm for band in bands}
    names = [name for name in NVLINK_ALGORITHMS if name in used]

    def requested_capacity(name: str) -> int:
        what, largest = NVLINK_ALGORITHMS[name], max(band.up_to for band in bands if band.algorithm == name)
        parts, step = world_size if what.parts else 1, MAX_BLOCK * what.packets
        packets = ceil_div(NEVER if name == names[-1] else largest, PACKET * parts * step) * step
        return min(packets, RESIDENT_PACKETS) if what.stream else packets

    owners = [name for name in names if NVLINK_ALGORITHMS[name].shares_buffers_with not in used]
    regions, offset, channels = {}, HEADER_BYTES, 0
    for owner in owners:
        algorithm = NVLINK_ALGORITHMS[owner]
        sharing = [name for name in names if NVLINK_ALGORITHMS[name].shares_buffers_with == owner]
        one = (world_size - 1) * PACKET  # bytes of one buffer per packet of capacity; of all, and of those not aliased:
        every, alone = algorithm.buffers * one, (algorithm.buffers - algorithm.aliased_buffers) * one
        step = MAX_BLOCK * algorithm.packets
        room = min((staging_bytes - HEADER_BYTES) // every, (staging_bytes - offset) // alone)
        room = min(room, max(map(requested_capacity, (owner, *sharing))))
        if owner != owners[-1]:
            room = min(room, staging_bytes // (2 if algorithm.parts else 4) // every)
        if max_ctas is not None:
            room = min(room, (max_ctas - 1) * step)
        capacity = room // step * step
        offset = max(HEADER_BYTES, offset - (every - alone) * capacity)
        region = Region(offset, capacity, capacity // (WARP * algorithm.packets), channels)
        regions[owner] = region
        for name in sharing:
            others = algorithm.buffers - NVLINK_ALGORITHMS[name].buffers
            regions[name] = replace(region, offset=offset + others * one * capacity)
        offset += every * capacity
        channels += region.channels
    return Layout({name: regions[name] for name in names}, offset, channels)


def make_plan(spec: OpSpec, world_size: int, bands: Bands, layout: Layout) -> Plan:
    """The plan of a call with at least one element.

    A call that needs several launches goes to the next algorithm, if there is one: it streams, or has more room.
    """
    nbytes, plan = spec.nbytes, None
    for band in bands:
        if nbytes <= band.up_to and (plan is None or band.algorithm != plan.algorithm):
            plan = plan_of(band.algorithm, band.block, spec, world_size, layout)
            if plan.chunk == spec.numel or NVLINK_ALGORITHMS[band.algorithm].stream:
                break
    assert plan is not None  # the last band has no end
    return plan


def plan_of(algorithm: str, block: int, spec: OpSpec, world_size: int, layout: Layout) -> Plan:
    """The plan that runs ``algorithm`` in blocks of ``block`` threads: equal launches where one does not hold all.

    Raises:
        ValueError: too few elements for an algorithm that streams, which takes two launches at least.
    """
    what = NVLINK_ALGORITHMS[algorithm]
    parts = world_size if what.parts else 1
    packets = ceil_div(spec.nbytes, PACKET * parts)
    room = layout.regions[algorithm].capacity
    count = ceil_div(packets, min(room, RESIDENT_PACKETS) if what.stream else room)
    unit = WARP * what.packets
    if what.stream and count % 3 == 1:
        count += 1  # the protocol's condition, see two_shot.cu
    each = ceil_div(ceil_div(packets, count), unit) * unit
    while what.stream and ceil_div(packets, each) % 3 == 1:  # rounding changed their number
        each -= unit
        if each == 0:
            raise ValueError(f"{algorithm} of {spec.numel} {spec.dtype} elements: too few for two launches")
    chunk = each * parts * PACKET // ITEMSIZE[spec.dtype]
    return Plan("v2", algorithm, ceil_div(each, block * what.packets), block, min(spec.numel, chunk))


def launches(plan: Plan, spec: OpSpec, world_size: int) -> list[Launch]:
    """The launches of a call. Those of a stream share one guard, a block of the first; all others have their own.

    Arguments of each: ``launch``, its number; ``last``, whether it ends what a guard began; ``scatter`` and ``gather``, the
    buffers that a launch of a stream uses (the others take turns by themselves).
    """
    algorithm = NVLINK_ALGORITHMS[plan.algorithm]
    threads = plan.block * algorithm.packets
    starts = range(0, spec.numel, plan.chunk)
    turn = 1 if len(starts) % 3 == 0 else 2  # in the direction in which the last launch meets the last buffer
    found = []
    for i, start in enumerate(starts):
        numel = min(plan.chunk, spec.numel - start)
        packets = ceil_div(numel * ITEMSIZE[spec.dtype], PACKET * (world_size if algorithm.parts else 1))
        guard = 0 if algorithm.stream and start else 1
        arguments = {"launch": i, "last": int(not algorithm.stream or start + numel == spec.numel)}
        if algorithm.stream:
            arguments |= {"scatter": _STREAM_SCATTERS[i * turn % 3], "gather": algorithm.gathers[(len(starts) - 1 - i) % 2]}
        found.append(Launch(start, numel, ceil_div(packets, threads) + guard, tuple(arguments.items())))
    return found
