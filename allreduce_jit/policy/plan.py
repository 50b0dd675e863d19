"""What a call runs, as values: a plan, its launches, and where they find their slots. Pure: no torch, no CUDA.

``nvlink`` and ``p2p`` make them, each for its kernels. Every input of a plan is the same on all ranks, so all ranks choose alike.
"""

from __future__ import annotations

from ctypes import sizeof
from dataclasses import dataclass

from ..abi import Header

PACKET = 16
WARP = 32
MAX_BLOCK = 512
HEADER_BYTES = sizeof(Header)  # in the staging memory, before the slots


@dataclass(frozen=True)
class Region:
    """The part of a rank's staging memory that belongs to one algorithm.

    Attributes:
        offset: its first byte.
        capacity: size of a slot array, one per (buffer, source): packets for NVLink, bytes for P2P.
        channels: how many channels have an epoch word.
        first_channel: number of the first of them among those of all regions.
    """

    offset: int
    capacity: int
    channels: int
    first_channel: int


@dataclass(frozen=True)
class Layout:
    """What a rank keeps for its calls.

    Attributes:
        regions: one per algorithm.
        nbytes: size of the staging memory.
        channels: of all regions together.
    """

    regions: dict[str, Region]
    nbytes: int
    channels: int


@dataclass(frozen=True)
class Plan:
    """One call.

    Attributes:
        path: ``v2``, ``legacy`` or ``torch.distributed``.
        algorithm: kernel name without dtype and world size; for torch.distributed the backend.
        grid: blocks of a launch that move data; a guard may come on top.
        block: threads per block.
        chunk: elements of one launch; a larger tensor takes several.
    """

    path: str
    algorithm: str
    grid: int
    block: int
    chunk: int


@dataclass(frozen=True)
class Launch:
    """One kernel launch of a call.

    Attributes:
        start: its first element.
        numel: number of its elements.
        grid: blocks, a guard included.
        arguments: what the kernel is told besides, by name.
    """

    start: int
    numel: int
    grid: int
    arguments: tuple[tuple[str, int], ...] = ()


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)
