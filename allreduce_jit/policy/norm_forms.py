"""Forms of the NVLink kernels that normalize the rows of the sum, and the table that picks them: for each hidden size which algorithm, how
many packets a thread, how many blocks a row. Pure; tuning changes speed only, never a bit of a result.

A row's packets form groups of a warp, one packet a lane. One-shot has all groups of a row, two-shot a part of them per rank: slice r
*of every row* is rank r's. A warp has ``packets`` neighbouring groups (of each part), a block the groups of a row, a cluster shares them.
"""

from __future__ import annotations

from dataclasses import dataclass

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
        """Registers that a thread needs, so that nothing is spilled."""
        if self.parts:  # a packet of each rank's part
            return 128 if world_size <= 4 else 255
        return 64 if self.packets == 1 and world_size <= 4 else 128

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
    """Calls of up to ``rows`` rows, of ``groups`` groups or more: so many packets a thread at least, so many blocks a row."""

    rows: int
    groups: int
    packets: int
    cluster: int


# Of one-shot: the first one that applies, per world size. Measured on 2 H200s (docs/performance.md): one multiprocessor that pushes a long
# row takes longer than a cluster of them needs to meet, as long as there are few rows. In two-shot a block pushes a part of a row.
_ALL = (Rule(32, 17, 1, 8), Rule(NEVER, 0, 1, 1))
NORM_RULES = dict.fromkeys(range(2, 9), _ALL)


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
    last_of_one_shot = min(one_shot_up_to // (family.hidden * ITEMSIZE[family.dtype]), NEVER)
    if world_size == 2:  # has no use for two-shot
        last_of_one_shot = NEVER
    rules = [rule for rule in NORM_RULES[world_size] if groups(family) >= rule.groups and (clusters or rule.cluster == 1)]
    bands: list[NormBand] = []
    for up_to in sorted({*(rule.rows for rule in rules), last_of_one_shot, NEVER} - {0}):
        if up_to <= last_of_one_shot:
            form = _form("one_shot_norm", next(rule for rule in rules if up_to <= rule.rows), family, world_size, clusters)
        else:
            form = _form("two_shot_norm", rules[-1], family, world_size, clusters)
        if bands and bands[-1].form == form:
            bands.pop()
        bands.append(NormBand(up_to, form))
    return tuple(bands)


def _form(algorithm: str, rule: Rule, family: OpSpec, world_size: int, clusters: bool) -> Form:
    """The rule's, with as many blocks a row, or packets a thread where there are no clusters, as it takes for a block to fit."""
    found = [
        Form(algorithm, packets, cluster)
        for packets in PACKETS
        for cluster in (CLUSTERS if clusters else (1,))
        if packets >= rule.packets and cluster >= rule.cluster
    ]
    return next((form for form in found if form.fits(family, world_size)), found[-1])
