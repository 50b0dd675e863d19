"""Forms of the NVLink kernels that normalize the rows of the sum, and the table that picks them: for each hidden size which algorithm, how
many packets a thread, how many blocks a row. Pure; tuning changes speed only, never a bit of a result.

A row's packets form groups of a warp, one packet a lane. One-shot has all groups of a row, two-shot a part of them per rank: slice r
*of every row* is rank r's. A warp has ``packets`` neighbouring groups (of each part), a block the groups of a row, a cluster shares them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from .operation import ITEMSIZE, OpSpec
from .plan import PACKET, WARP, ceil_div
from .tables import NEVER, NVLINK_TABLES, two_shot_above

GROUP_BYTES = WARP * PACKET
PACKETS, CLUSTERS = (1, 2, 4, 8), (1, 2, 4, 8)
REGISTERS = 65536  # of a multiprocessor


@dataclass(frozen=True)
class NormAlgorithm:
    """
    Attributes:
        source: a file of ``kernels/cuda``.
        number: its name in signatures and reports.
        region: the algorithm of an all-reduce whose slots and epochs are this one's, too, with one packet per thread.
        parts: whether a thread has packets of every rank's part, or just of one.
    """

    source: str
    number: int
    region: str
    parts: bool


NORM_ALGORITHMS = {
    "one_shot_norm": NormAlgorithm("one_shot_norm.cu", 7, "one_shot", parts=False),
    "two_shot_norm": NormAlgorithm("two_shot_norm.cu", 8, "two_shot", parts=True),
}


@dataclass(frozen=True)
class Form:
    """What tells the kernels of a family apart.

    Attributes:
        algorithm: a name of ``NORM_ALGORITHMS``.
        packets: of a thread (of each part).
        cluster: blocks that share a row.
    """

    algorithm: str
    packets: int
    cluster: int

    def warps(self, family: OpSpec, world_size: int) -> int:
        """Of a block."""
        parts = world_size if self.parts else 1
        return ceil_div(ceil_div(groups(family), parts), self.cluster * self.packets)

    @property
    def parts(self) -> bool:
        return NORM_ALGORITHMS[self.algorithm].parts

    def registers(self, world_size: int) -> int:
        """Registers of a thread, so that nothing is spilled."""
        if self.parts:  # a packet of each rank's part
            return 128 if world_size <= 4 else 255
        if self.packets == 1 and world_size <= 4:
            return 64
        return 80 if self.packets <= 2 and world_size == 2 else 128

    def blocks(self, family: OpSpec, world_size: int) -> int:
        """Blocks that a multiprocessor is to have the registers for, 16 at most."""
        threads, registers = WARP * self.warps(family, world_size), self.registers(world_size)
        # With few blocks it idles while one meets: two share it where 64 registers, with a little spilled, allow them to.
        least = 2 if registers == 80 and threads * 64 * 2 <= REGISTERS else 1
        return min(max(least, REGISTERS // (registers * threads)), 16)

    def fits(self, family: OpSpec, world_size: int) -> bool:
        """Whether a multiprocessor has the registers for a block."""
        return WARP * self.warps(family, world_size) <= min(1024, REGISTERS // self.registers(world_size))

    def slots(self, family: OpSpec, world_size: int) -> int:
        """Of a row, per (buffer, source)."""
        return self.cluster * self.warps(family, world_size) * self.packets * WARP


def groups(family: OpSpec) -> int:
    """Of a row."""
    return ceil_div(family.hidden * ITEMSIZE[family.dtype], GROUP_BYTES)


@dataclass(frozen=True)
class Rule:
    """Forms of one-shot for rows of at least ``groups`` groups: (calls of up to so many rows, packets of a thread, blocks of a row)."""

    groups: int
    forms: tuple[tuple[int, int, int], ...]


# Per world size: the first rule that applies. Measured on 2 H200s (docs/performance.md). Few rows: several multiprocessors push and normalize
# a row sooner than one. Of two ranks, more rows than 132 multiprocessors hold at once (each 32 warps of 64 registers a thread): two packets
# a thread, in fewer registers each. The form of many rows is that of two-shot, too, where a block pushes a part of a row.
_ONE = Rule(0, ((NEVER, 1, 1),))
NORM_RULES = {
    2: (
        Rule(32, ((64, 1, 8), (132, 1, 1), (NEVER, 2, 1))),
        Rule(17, ((64, 1, 4), (132, 1, 1), (NEVER, 2, 1))),
        Rule(9, ((64, 1, 4), (264, 1, 1), (NEVER, 2, 1))),
        _ONE,
    ),
    **dict.fromkeys(range(3, 9), (Rule(32, ((64, 1, 8), (NEVER, 1, 1))), Rule(9, ((64, 1, 4), (NEVER, 1, 1))), _ONE)),
}


@dataclass(frozen=True)
class NormBand:
    """Calls of up to ``up_to`` rows run ``form``."""

    up_to: int
    form: Form


def norm_bands(family: OpSpec, world_size: int, one_shot_up_to: int | None = None, clusters: bool = True) -> tuple[NormBand, ...]:
    """By growing numbers of rows; the last one has no end.

    Args:
        one_shot_up_to: bytes up to which an all-reduce is one-shot; None: those of the package's table.
        clusters: whether the GPU has them.
    """
    if one_shot_up_to is None:
        one_shot_up_to = two_shot_above(NVLINK_TABLES[world_size])
    row = family.hidden * ITEMSIZE[family.dtype]
    last_of_one_shot = NEVER if world_size == 2 else one_shot_up_to // row  # two ranks have no use for two-shot
    rule = next(rule for rule in NORM_RULES[world_size] if groups(family) >= rule.groups)
    forms = [(rows, packets, cluster) for rows, packets, cluster in rule.forms if clusters or cluster == 1]
    bands: list[NormBand] = []
    for up_to in sorted({*(rows for rows, *_ in forms), last_of_one_shot, NEVER} - {0}):
        algorithm = "one_shot_norm" if up_to <= last_of_one_shot else "two_shot_norm"
        _, packets, cluster = next(form for form in forms if up_to <= form[0]) if algorithm == "one_shot_norm" else forms[-1]
        form = _fitting(Form(algorithm, packets, cluster), family, world_size, clusters)
        if bands and bands[-1].form == form:
            bands.pop()
        bands.append(NormBand(up_to, form))
    return tuple(bands)


def _fitting(least: Form, family: OpSpec, world_size: int, clusters: bool) -> Form:
    """``least``, with as many blocks a row, or packets a thread where there are no clusters, as it takes for a block to fit."""
    found = [
        replace(least, packets=packets, cluster=cluster)
        for packets in PACKETS
        for cluster in (CLUSTERS if clusters else (1,))
        if packets >= least.packets and cluster >= least.cluster
    ]
    return next((form for form in found if form.fits(family, world_size)), found[-1])
