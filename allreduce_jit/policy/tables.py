"""The tables that ``plan`` reads. Tuning changes speed only, never a bit of what a kernel of ours returns.

Measured on H200 at 2 to 4 ranks (docs/performance.md). At 5 to 8 estimated: one-shot sends (n-1) S bytes and two-shot
2 (n-1) / n S in one hop more, so they change places at S ~ 1 / ((n-1) (1 - 2/n)), on from where they do at 3 and 4.
Two-shot goes as far as one launch of it does: to 8 MiB at 3 and 4 ranks, to 7 at more.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20
NEVER = 1 << 62
BLOCKS = (32, 64, 128, 256, 512)
STREAM_FROM = 64 * KIB  # an algorithm that streams takes two launches at least, of a warp of packets each


@dataclass(frozen=True)
class AlgorithmBand:
    """Messages of up to ``up_to`` bytes run ``algorithm``."""

    up_to: int
    algorithm: str


@dataclass(frozen=True)
class Band(AlgorithmBand):
    """The same, in blocks of ``block`` threads."""

    block: int


Bands = tuple[Band, ...]  # by growing size; the last one has no end


def _bands(one_shot_up_to: int, two_shot_up_to: int) -> Bands:
    return (
        Band(16 * KIB, "one_shot", 64),
        Band(one_shot_up_to, "one_shot", 32),
        Band(two_shot_up_to, "two_shot", 32),
        Band(NEVER, "two_shot_stream", 512),
    )


NVLINK_TABLES: dict[int, Bands] = {
    2: (Band(128 * KIB, "one_shot", 64), Band(8 * MIB, "one_shot", 128), Band(NEVER, "one_shot", 512)),
    3: _bands(384 * KIB, 8 * MIB),
    4: _bands(192 * KIB, 8 * MIB),
    5: _bands(112 * KIB, 7 * MIB),
    6: _bands(80 * KIB, 7 * MIB),
    7: _bands(64 * KIB, 7 * MIB),
    8: _bands(48 * KIB, 7 * MIB),
}


def bands_to_json(bands: tuple[AlgorithmBand, ...]) -> list[dict[str, object]]:
    return [{**vars(band), "up_to": None if band.up_to == NEVER else band.up_to} for band in bands]


def two_shot_above(bands: Bands) -> int:
    """Largest message in bytes that one-shot takes."""
    return max(band.up_to for band in bands if band.algorithm == "one_shot")


@dataclass(frozen=True)
class P2PTable:
    """The same for the legacy path, where ``allreduce-jit tune`` has measured nothing.

    Attributes:
        two_shot_from: bytes from which two-shot runs.
        nvlink_limit: bytes above which NCCL is expected to win on NVLink.
        pcie_limit: the same where some pair has no NVLink.

    Measured at 2 ranks on NVLink, beside NCCL at its best (docs/performance.md): there NCCL wins nowhere, once the copy before
    its in-place call counts. Estimated otherwise.
    """

    two_shot_from: int
    nvlink_limit: int
    pcie_limit: int


P2P_TABLES = {
    2: P2PTable(1 * MIB, NEVER, 512 * KIB),
    3: P2PTable(512 * KIB, 8 * MIB, 512 * KIB),
    4: P2PTable(256 * KIB, 8 * MIB, 512 * KIB),
    5: P2PTable(192 * KIB, 8 * MIB, 256 * KIB),
    6: P2PTable(128 * KIB, 8 * MIB, 256 * KIB),
    7: P2PTable(128 * KIB, 8 * MIB, 256 * KIB),
    8: P2PTable(128 * KIB, 8 * MIB, 256 * KIB),
}
