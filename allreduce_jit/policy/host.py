"""Plans of the kernels whose staging memory is on the host (path host): (OpSpec, world size) -> algorithm, grid, block, launches. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from .catalogue import HOST_ALGORITHMS, host_algorithms
from .operation import ITEMSIZE, OpSpec
from .plan import HEADER_BYTES, PACKET, WARP, Launch, Layout, Plan, Region, ceil_div
from .tables import KIB, MIB, NEVER, Band

CHANNELS = {"host_one_shot": 1024, "host_stream": 512, "host_two_shot": 512}  # of each algorithm
LAUNCH_BYTES = 1 << 30  # of one launch, which counts elements and packets in 32 bits


@dataclass(frozen=True)
class HostBand(Band):
    """Messages of up to ``up_to`` bytes run ``algorithm``, in at most ``channels`` warps, in blocks of ``block`` threads."""

    channels: int


HostBands = tuple[HostBand, ...]  # by growing size; the last one has no end


def _bands(one_shot_up_to: int) -> HostBands:
    return HostBand(one_shot_up_to, "host_one_shot", 64, 1024), HostBand(NEVER, "host_two_shot", 128, 512)


# Of two ranks: measured. Of more: estimated. One-shot reads (n-1) S bytes, two-shot 2 (n-1) / n S in one hop (2 us) more, at 50 GB/s.
HOST_TABLES: dict[int, HostBands] = {
    2: (
        HostBand(384 * KIB, "host_one_shot", 64, 1024),
        HostBand(2 * MIB, "host_stream", 128, 96),
        HostBand(NEVER, "host_stream", 128, 128),
    ),
    3: _bands(128 * KIB),
    4: _bands(64 * KIB),
    5: _bands(40 * KIB),
    6: _bands(32 * KIB),
    7: _bands(24 * KIB),
    8: _bands(20 * KIB),
}


def chunk_packets(algorithm: str) -> int:
    """Packets of data that a warp sends at once; one more of its slot is the wire's (kernels/cuda/wire/phase.cuh)."""
    return WARP * HOST_ALGORITHMS[algorithm].packets - 1


def channel_bytes(algorithm: str, world_size: int) -> int:
    """Of a channel's slots in an outbox."""
    what = HOST_ALGORITHMS[algorithm]
    return what.slots(world_size) * WARP * what.packets * PACKET


def make_layout(world_size: int, staging_bytes: int) -> Layout:
    """A region for every algorithm; ``Region.capacity`` is the slots of a channel."""
    names = host_algorithms(world_size)
    wanted = sum(CHANNELS[name] * channel_bytes(name, world_size) for name in names)
    share = min(1.0, (staging_bytes - HEADER_BYTES) / wanted)
    regions, offset, first = {}, HEADER_BYTES, 0
    for name in names:
        channels = int(CHANNELS[name] * share)
        regions[name] = Region(offset, HOST_ALGORITHMS[name].slots(world_size), channels, first)
        offset += channels * channel_bytes(name, world_size)
        first += channels
    return Layout(regions, offset, first)


def make_plan(spec: OpSpec, world_size: int, bands: HostBands, layout: Layout, max_ctas: int | None = None) -> Plan:
    """The plan of a call with at least one element."""
    band = next(band for band in bands if spec.nbytes <= band.up_to)
    return plan_of(band.algorithm, band.block, band.channels, spec, world_size, layout, max_ctas)


def plan_of(
    algorithm: str, block: int, channels: int, spec: OpSpec, world_size: int, layout: Layout, max_ctas: int | None = None
) -> Plan:
    """The plan that runs ``algorithm`` in at most ``channels`` warps, which take turns where there are more chunks.

    Args:
        max_ctas: blocks that a communicator may occupy; one of them is the guard.
    """
    parts = world_size if HOST_ALGORITHMS[algorithm].parts else 1
    per_launch = LAUNCH_BYTES // PACKET // parts * parts * PACKET // ITEMSIZE[spec.dtype]
    chunk = min(spec.numel, per_launch)
    chunks = ceil_div(ceil_div(chunk * ITEMSIZE[spec.dtype], PACKET * parts), chunk_packets(algorithm))
    warps = block // WARP
    blocks = min(ceil_div(chunks, warps), min(channels, layout.regions[algorithm].channels) // warps)
    if max_ctas is not None:
        blocks = min(blocks, max_ctas - 1)
    return Plan("host", algorithm, max(1, blocks), block, chunk)


def launches(plan: Plan, spec: OpSpec) -> list[Launch]:
    """The launches of a call, each with a guard: all have the same grid, whatever is left for the last one."""
    starts = range(0, spec.numel, plan.chunk)
    told = ("last", 1)
    return [
        Launch(start, min(plan.chunk, spec.numel - start), plan.grid + 1, (("launch", i), told)) for i, start in enumerate(starts)
    ]
