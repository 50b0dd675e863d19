"""The tables that ``plan`` reads. Tuning changes speed only, never a bit of a result.

Measured on H200 where docs/performance.md says so, otherwise estimated from bytes on the wire.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
NEVER = 1 << 62


@dataclass(frozen=True)
class V2Table:
    """When V2 switches algorithms, for one world size.

    Attributes:
        two_shot_from: bytes from which two-shot beats one-shot.
        one_shot_share: share of the staging memory that one-shot gets; the rest is two-shot's.
    """

    two_shot_from: int
    one_shot_share: float


V2_TABLES = {
    2: V2Table(NEVER, 0.95),  # one-shot sends no more bytes than two-shot, and in one hop
    3: V2Table(768 * KIB, 0.2),
    4: V2Table(384 * KIB, 0.1),
    5: V2Table(192 * KIB, 0.1),
    6: V2Table(144 * KIB, 0.1),
    7: V2Table(128 * KIB, 0.1),
    8: V2Table(96 * KIB, 0.1),
}


@dataclass(frozen=True)
class LegacyTable:
    """The same for the legacy path.

    Attributes:
        two_shot_from: bytes from which two-shot runs.
        nvlink_limit: bytes above which NCCL is expected to win on NVLink.
        pcie_limit: the same where some pair has no NVLink.
    """

    two_shot_from: int
    nvlink_limit: int
    pcie_limit: int


LEGACY_TABLES = {
    2: LegacyTable(1 * MIB, 8 * MIB, 512 * KIB),
    3: LegacyTable(512 * KIB, 8 * MIB, 512 * KIB),
    4: LegacyTable(256 * KIB, 8 * MIB, 512 * KIB),
    5: LegacyTable(192 * KIB, 8 * MIB, 256 * KIB),
    6: LegacyTable(128 * KIB, 8 * MIB, 256 * KIB),
    7: LegacyTable(128 * KIB, 8 * MIB, 256 * KIB),
    8: LegacyTable(128 * KIB, 8 * MIB, 256 * KIB),
}
