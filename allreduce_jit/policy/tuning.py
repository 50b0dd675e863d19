"""What ``allreduce-jit tune`` can measure of a path, and what of the bands that come of it plans and kernels rely on. Pure.

A choice is all of a band but its end: (algorithm, threads of a block), on path host (algorithm, threads of a block, channels), on
legacy (algorithm,), of which NCCL is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from ..paths import Path
from . import host, nvlink, p2p
from .catalogue import NVLINK_ALGORITHMS, host_algorithms, nvlink_algorithms
from .host import HOST_TABLES, HostBand
from .operation import ITEMSIZE, OpSpec, all_reduce
from .plan import MAX_BLOCK, WARP, Layout, Plan
from .tables import BLOCKS, KIB, NEVER, NVLINK_TABLES, STREAM_FROM, AlgorithmBand, Band, Bands

CHANNEL_COUNTS = (64, 96, 128, 192, 256, 512, 1024)  # that are tried on path host
REACH = 32  # how many times smaller or larger than in the package's table messages of an algorithm are tried on path host
KERNELS_UP_TO = 64 * KIB  # bytes; of what is smaller, and set-up makes such calls, NCCL takes none on legacy

AnyBands = tuple[AlgorithmBand, ...]
Choice = tuple[Any, ...]


@dataclass(frozen=True, eq=False)
class Tunable:
    """A path with tables.

    Attributes:
        path: that has them.
        band: the class of its bands.
        algorithms: (world size) -> those of its bands, from small to large messages.
        choices: (world size, algorithm) -> what is tried.
        takes: (algorithm, call, world size, bytes of staging memory) -> whether a plan could give such a call to it.
        unfit: (a band, where it begins) -> what of it plans or kernels could not do; None: nothing. It has a known algorithm.
        plan: (choice, call, world size, layout) -> the plan that runs it.
        private: (world size, algorithm) -> the bands of an engine that measures it, so that it has room for that.
        note: what more there is to say of a table; empty: nothing.
    """

    path: Path
    band: type[AlgorithmBand]
    algorithms: Callable[[int], tuple[str, ...]]
    choices: Callable[[int, str], list[Choice]]
    takes: Callable[[str, OpSpec, int, int], bool]
    unfit: Callable[[Any, int], str | None]
    plan: Callable[[Choice, OpSpec, int, Layout], Plan]
    private: Callable[[int, str], AnyBands]
    note: str = ""

    @property
    def columns(self) -> list[str]:
        """Names of what a choice is made of."""
        return [field.name for field in fields(self.band)][1:]

    def candidates(self, world_size: int, dtype: str, nbytes: int, staging_bytes: int) -> Iterator[str]:
        """Algorithms that a plan could give a message of ``nbytes``."""
        spec = all_reduce(dtype, nbytes // ITEMSIZE[dtype])
        return (name for name in self.algorithms(world_size) if self.takes(name, spec, world_size, staging_bytes))

    def bands_from_json(self, world_size: int, value: object) -> AnyBands:
        """What ``bands_to_json`` wrote, held against all that plans and kernels rely on.

        Raises:
            ValueError: what is wrong with it.
        """
        if not isinstance(value, list) or not value:
            raise ValueError(f"expected a list of bands, got {value!r}")
        expected, names = [field.name for field in fields(self.band)], self.algorithms(world_size)
        bands: list[AlgorithmBand] = []
        for i, entry in enumerate(value):
            if not isinstance(entry, dict) or entry.keys() != set(expected):
                raise ValueError(f"band {i} is {entry!r}: expected {', '.join(expected[:-1])} and {expected[-1]}")
            up_to, name = entry["up_to"], entry["algorithm"]
            begin = bands[-1].up_to if bands else 0
            last = i == len(value) - 1
            if up_to is not None if last else type(up_to) is not int or not begin < up_to < NEVER:
                raise ValueError(f"band {i} ends at {up_to!r}: expected growing whole bytes, and null in the last band")
            if name not in names:
                raise ValueError(f"band {i}: algorithm {name!r} is none of {', '.join(names)}")
            if bands and names.index(name) < names.index(bands[-1].algorithm):
                raise ValueError(f"band {i}: {name} after {bands[-1].algorithm}: expected the order {', '.join(names)}")
            band = self.band(NEVER if last else up_to, *(entry[column] for column in self.columns))
            if problem := self.unfit(band, begin):
                raise ValueError(f"band {i}: {problem}")
            bands.append(band)
        return tuple(bands)


def _block_unfit(block: object) -> str | None:
    return None if type(block) is int and block in BLOCKS else f"blocks of {block!r} threads: expected one of {BLOCKS}"


# -- path V2


def _v2_takes(name: str, spec: OpSpec, world_size: int, staging_bytes: int) -> bool:
    """All but the last have to hold it in one launch."""
    names = nvlink_algorithms(world_size)
    if NVLINK_ALGORITHMS[name].stream and spec.nbytes <= STREAM_FROM:
        return False
    bands = (Band(spec.nbytes, name, MAX_BLOCK), Band(NEVER, names[-1], MAX_BLOCK))
    layout = nvlink.make_layout(world_size, staging_bytes, bands)
    return name == names[-1] or nvlink.plan_of(name, MAX_BLOCK, spec, world_size, layout).chunk == spec.numel


def _v2_unfit(band: Band, begin: int) -> str | None:
    if NVLINK_ALGORITHMS[band.algorithm].stream and begin < STREAM_FROM:
        return f"{band.algorithm} from {begin} bytes on: it takes messages above {STREAM_FROM}"
    return _block_unfit(band.block)


def _v2_private(world_size: int, name: str) -> Bands:
    """All room is the algorithm's, but for that of those before it in the package's table."""
    order = nvlink_algorithms(world_size).index
    before = [band for band in NVLINK_TABLES[world_size] if order(band.algorithm) < order(name)]
    return (*before, Band(NEVER, name, MAX_BLOCK))


V2 = Tunable(
    path=Path.V2,
    band=Band,
    algorithms=nvlink_algorithms,
    choices=lambda world_size, name: [(name, block) for block in BLOCKS],
    takes=_v2_takes,
    unfit=_v2_unfit,
    plan=lambda choice, *call: nvlink.plan_of(*choice, *call),
    private=_v2_private,
    note="calls with a norm are not timed: of this table, they take from which size on they are two-shot",
)


# -- path host


def _host_choices(world_size: int, name: str) -> list[Choice]:
    """In blocks as the package's table has them."""
    known = [band for band in HOST_TABLES[world_size] if band.algorithm == name]
    counts = sorted({*CHANNEL_COUNTS, *(band.channels for band in known)})
    found = [HostBand(0, name, block, channels) for block in sorted({band.block for band in known}) for channels in counts]
    return [(name, band.block, band.channels) for band in found if _host_unfit(band, 0) is None]


def _host_takes(name: str, spec: OpSpec, world_size: int, staging_bytes: int) -> bool:
    """Any algorithm can run any call; one-shot among many ranks would take minutes over large ones."""
    table = HOST_TABLES[world_size]
    begins = [0, *(band.up_to for band in table)]
    mine = [i for i, band in enumerate(table) if band.algorithm == name]
    return begins[mine[0]] // REACH < spec.nbytes <= table[mine[-1]].up_to * REACH


def _host_unfit(band: HostBand, begin: int) -> str | None:
    if problem := _block_unfit(band.block):
        return problem
    most, step = host.CHANNELS[band.algorithm], band.block // WARP
    if type(band.channels) is not int or not step <= band.channels <= most or band.channels % step:
        return f"{band.channels!r} channels: expected multiples of {step}, the warps of a block, up to {most}"
    return None


HOST = Tunable(
    path=Path.HOST,
    band=HostBand,
    algorithms=host_algorithms,
    choices=_host_choices,
    takes=_host_takes,
    unfit=_host_unfit,
    plan=lambda choice, *call: host.plan_of(*choice, *call),
    private=lambda world_size, name: HOST_TABLES[world_size],  # there is room for all
)


# -- path legacy


def _legacy_takes(name: str, spec: OpSpec, world_size: int, staging_bytes: int) -> bool:
    """One-shot has to hold it in one launch."""
    if name == p2p.NCCL:
        return spec.nbytes > KERNELS_UP_TO
    capacity = p2p.make_layout(world_size, staging_bytes).regions[name].capacity
    return name != "legacy_one_shot" or spec.nbytes <= capacity


def _legacy_unfit(band: AlgorithmBand, begin: int) -> str | None:
    if band.algorithm == p2p.NCCL and begin < KERNELS_UP_TO:
        return f"{band.algorithm} from {begin} bytes on: it takes messages above {KERNELS_UP_TO}"
    return None


LEGACY = Tunable(
    path=Path.LEGACY,
    band=AlgorithmBand,
    algorithms=lambda world_size: ("legacy_one_shot", "legacy_two_shot", p2p.NCCL),
    choices=lambda world_size, name: [(name,)],
    takes=_legacy_takes,
    unfit=_legacy_unfit,
    plan=lambda choice, *call: p2p.plan_of(*choice, *call),
    private=lambda world_size, name: (AlgorithmBand(NEVER, "legacy_two_shot"),),
    note="of sizes that are NCCL's the bits are NCCL's; deterministic=True leaves it none",
)
