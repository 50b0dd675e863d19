"""Plans of the P2P kernels (path legacy): (OpSpec, world size) -> algorithm, grid, launches. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from .operation import ITEMSIZE, OpSpec
from .plan import HEADER_BYTES, Launch, Layout, Plan, Region, ceil_div
from .tables import P2P_TABLES, AlgorithmBand

BLOCK_BYTES = 2048  # what one program sends to one peer in one phase: 16 bytes per thread
NUM_WARPS = 4
THREADS = 32 * NUM_WARPS
NCCL = "nccl"  # in the place of an algorithm: the call is torch.distributed's


@dataclass(frozen=True)
class Limits:
    """Of the messages of a dtype.

    Attributes:
        two_shot_from: bytes from which two-shot runs.
        nccl_above: bytes above which NCCL is faster, a copy before its call in place included.
    """

    two_shot_from: int
    nccl_above: int


def make_limits(world_size: int, nvlink: bool, tuned: tuple[AlgorithmBand, ...] | None = None) -> Limits:
    """Those of ``tuned``, else of this package's table.

    Args:
        nvlink: all pairs of GPUs have it.
        tuned: bands of one-shot, two-shot and NCCL, in this order, of which some may be missing. If two-shot is, they do not tell
            where it overtakes one-shot, which communicators need that hand nothing over: that is left to the package's table,
            but for sizes at which one-shot was the fastest of all.
    """
    table = P2P_TABLES[world_size]
    if tuned is None:
        return Limits(table.two_shot_from, table.nvlink_limit if nvlink else table.pcie_limit)
    ends = {band.algorithm: band.up_to for band in tuned}
    two_shot_from = ends.get("legacy_one_shot", 0) + 1
    if "legacy_two_shot" not in ends:
        two_shot_from = max(two_shot_from, table.two_shot_from)
    # Without NCCL among them there is no end, as the last one has none.
    return Limits(two_shot_from, max((end for name, end in ends.items() if name != NCCL), default=0))


def make_layout(world_size: int, staging_bytes: int) -> Layout:
    """One-shot gets a third, two-shot (two phases) the rest; capacities are bytes of a slot."""
    capacity = (staging_bytes - HEADER_BYTES) // (6 * world_size) // BLOCK_BYTES * BLOCK_BYTES
    channels = capacity // BLOCK_BYTES
    one_shot = 2 * world_size * capacity
    regions = {
        "legacy_one_shot": Region(HEADER_BYTES, capacity, channels, 0),
        "legacy_two_shot": Region(HEADER_BYTES + one_shot, capacity, channels, channels),
    }
    return Layout(regions, HEADER_BYTES + 3 * one_shot, 2 * channels)


def make_plan(spec: OpSpec, world_size: int, limits: Limits, layout: Layout, hands_over: bool) -> Plan:
    """The plan of a call with at least one element.

    Args:
        hands_over: calls above the size from which NCCL is faster are NCCL's; else what exceeds the staging memory takes
            several launches.
    """
    if hands_over and spec.nbytes > limits.nccl_above:
        return plan_of(NCCL, spec, world_size, layout)
    small = spec.nbytes < limits.two_shot_from and spec.nbytes <= layout.regions["legacy_one_shot"].capacity
    return plan_of("legacy_one_shot" if small else "legacy_two_shot", spec, world_size, layout)


def plan_of(algorithm: str, spec: OpSpec, world_size: int, layout: Layout) -> Plan:
    """The plan that runs ``algorithm``: one program per block of the tensor, or of a rank's part."""
    if algorithm == NCCL:
        return Plan("torch.distributed", NCCL, 0, 0, spec.numel)
    itemsize, capacity = ITEMSIZE[spec.dtype], layout.regions[algorithm].capacity
    if algorithm == "legacy_one_shot":
        chunk = min(spec.numel, capacity // itemsize)
        return Plan("legacy", algorithm, ceil_div(chunk * itemsize, BLOCK_BYTES), THREADS, chunk)
    chunk = min(spec.numel, world_size * capacity // itemsize)
    return Plan("legacy", algorithm, part_of(chunk, itemsize, world_size) * itemsize // BLOCK_BYTES, THREADS, chunk)


def part_of(numel: int, itemsize: int, world_size: int) -> int:
    """Elements of a rank's part in two-shot: whole blocks."""
    block = BLOCK_BYTES // itemsize
    return ceil_div(ceil_div(numel, world_size), block) * block


def launches(plan: Plan, spec: OpSpec, world_size: int) -> list[Launch]:
    """The launches of a call, each with a guard. Arguments of each: ``part``, the elements of a rank's part (for two-shot)."""
    itemsize = ITEMSIZE[spec.dtype]
    found = []
    for start in range(0, spec.numel, plan.chunk):
        numel = min(plan.chunk, spec.numel - start)
        part = part_of(numel, itemsize, world_size)
        sent = part if plan.algorithm == "legacy_two_shot" else numel  # to each peer
        found.append(Launch(start, numel, 1 + ceil_div(sent * itemsize, BLOCK_BYTES), (("part", part),)))
    return found
