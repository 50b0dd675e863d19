"""Forms of the NVLink kernels that normalize the rows of the sum, and the table that picks them: for each hidden size which algorithm, how
many packets a thread, how many blocks a row. Pure; tuning changes speed only, never a bit of a result.

A row's packets form groups of a warp, one packet a lane. One-shot has all groups of a row, two-shot a part of them per rank: slice r
*of every row* is rank r's. A warp has ``packets`` neighbouring groups (of each part), a block the groups of a row, a cluster shares them.
"""

from __future__ import annotations

from dataclasses import dataclass

from .operation import ITEMSIZE, OpSpec
from .plan import MAX_BLOCK, PACKET, WARP, ceil_div
from .tables import NEVER, NVLINK_TABLES, two_shot_above

GROUP_BYTES = WARP * PACKET
MOST_WARPS = MAX_BLOCK // WARP  # of a block
PACKETS = (1, 2, 4, 8)


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
        parts = world_size if NORM_ALGORITHMS[self.algorithm].parts else 1
        return ceil_div(ceil_div(groups(family), parts), self.cluster * self.packets)

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


# The first one that applies, per world size.
_ALL = (Rule(4, 16, 1, 4), Rule(NEVER, 0, 1, 1))
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
        rule = next(rule for rule in rules if up_to <= rule.rows)
        form = _form("one_shot_norm" if up_to <= last_of_one_shot else "two_shot_norm", rule, family, world_size)
        if bands and bands[-1].form == form:
            bands.pop()
        bands.append(NormBand(up_to, form))
    return tuple(bands)


def _form(algorithm: str, rule: Rule, family: OpSpec, world_size: int) -> Form:
    """The rule's, with as many packets a thread as let a block hold its share of a row."""
    least = (count for count in PACKETS if count >= rule.packets)
    forms = (Form(algorithm, count, rule.cluster) for count in least)
    return next(form for form in forms if form.warps(family, world_size) <= MOST_WARPS)
