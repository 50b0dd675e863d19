"""The tables that ``plan`` reads. Tuning changes speed only, never a bit of a result.

Measured on H200 at 2, 3 and 4 ranks (docs/performance.md), estimated from bytes on the wire at 5 to 8.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
NEVER = 1 << 62


@dataclass(frozen=True)
class Band:
    """Messages of up to ``up_to`` bytes run ``algorithm`` in blocks of ``block`` threads."""

    up_to: int
    algorithm: str
    block: int


Bands = tuple[Band, ...]  # by growing size; the last one has no end


def _two_shot_from(nbytes: int) -> Bands:
    return (
        Band(nbytes, "one_shot", 64),
        Band(4 * MIB, "two_shot", 32),
        Band(NEVER, "two_shot_stream", 512),
    )


V2_TABLES: dict[int, Bands] = {
    2: (Band(128 * KIB, "one_shot", 64), Band(8 * MIB, "one_shot", 128), Band(NEVER, "one_shot", 512)),
    3: _two_shot_from(512 * KIB),
    4: _two_shot_from(192 * KIB),
    5: _two_shot_from(128 * KIB),
    6: _two_shot_from(96 * KIB),
    7: _two_shot_from(80 * KIB),
    8: _two_shot_from(64 * KIB),
}


def two_shot_above(bands: Bands) -> int:
    """Largest message in bytes that one-shot takes."""
    return max(band.up_to for band in bands if band.algorithm == "one_shot")


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
