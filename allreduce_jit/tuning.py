"""The tables that ``plan`` reads. Tuning changes speed only, never a bit of a result.

Measured on H200 where docs/performance.md says so, otherwise estimated from bytes on the wire.
"""

from __future__ import annotations

from dataclasses import dataclass

KIB = 1 << 10
MIB = 1 << 20


@dataclass(frozen=True)
class V2Table:
    """When V2 switches algorithms, for one world size.

    Attributes:
        two_shot_from: bytes from which two-shot beats one-shot; None = never (one-shot sends no more).
        pipelined_from: bytes from which pipelined beats both.
        shares: parts of the staging memory for one-shot, two-shot and pipelined; they sum up to one.
    """

    two_shot_from: int | None
    pipelined_from: int
    shares: tuple[float, float, float]


_SHARES = (0.15, 0.5, 0.35)

V2_TABLES = {
    2: V2Table(None, 4 * MIB, (0.25, 0.5, 0.25)),
    3: V2Table(768 * KIB, 4 * MIB, _SHARES),
    4: V2Table(256 * KIB, 4 * MIB, _SHARES),
    5: V2Table(192 * KIB, 4 * MIB, _SHARES),
    6: V2Table(144 * KIB, 4 * MIB, _SHARES),
    7: V2Table(128 * KIB, 4 * MIB, _SHARES),
    8: V2Table(96 * KIB, 4 * MIB, _SHARES),
}

# Threads that a multiprocessor holds at once (__launch_bounds__ in entry.cuh).
RESIDENT_THREADS = {n: 1024 if n <= 4 else 512 for n in range(2, 9)}
# Blocks of the pipelined kernel per multiprocessor: one computes while another waits for its flags.
PIPELINED_BLOCKS_PER_SM = 2


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
