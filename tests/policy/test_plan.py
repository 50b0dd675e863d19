"""Plans and layouts: what keeps every kernel inside its memory, for every size, dtype, world size and machine.

A property is a function of the planning functions and a case. The real ones must hold it for all cases;
one with a mistake planted must fail it, which shows that the property says something.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import count, pairwise
from types import SimpleNamespace

import pytest

pytest.importorskip("hypothesis")

import hypothesis
from hypothesis import strategies as st

from allreduce_jit.policy import nvlink, p2p
from allreduce_jit.policy.catalogue import WORLD_SIZES, entry, nvlink_algorithms, nvlink_modules
from allreduce_jit.policy.operation import DTYPES, ITEMSIZE, all_reduce
from allreduce_jit.policy.tables import BLOCKS, NEVER, NVLINK_TABLES, P2P_TABLES, STREAM_FROM, AlgorithmBand, Band, bands_to_json
from allreduce_jit.policy.tuning import KERNELS_UP_TO, LEGACY, V2
from allreduce_jit.settings import Settings

PACKET, WARP, HEADER = 16, 32, 4096
DEFAULT_STAGING = Settings().staging_mb << 20
BLOCK_BYTES, THREADS = 2048, 128  # of the P2P kernels
# Slot arrays that a kernel touches, as the comments above the kernels say: V2 has one per buffer and peer, legacy one
# per buffer and rank.
BUFFERS = {
    "one_shot": 2, "two_shot": 3, "two_shot_stream": 5, "one_shot_wide": 2, "two_shot_wide": 3, "two_shot_wide2": 3,
    "legacy_one_shot": 2, "legacy_two_shot": 4,
}  # fmt: skip
PACKETS = {"one_shot_wide": 12, "two_shot_wide": 4, "two_shot_wide2": 2}  # of a thread, where it is not one
STREAMS = {"two_shot_stream"}
SHARED = {"two_shot_stream": 2}  # buffers, the first ones, that may alias the slots of other algorithms
INSIDE = {"two_shot": "two_shot_stream"}  # whose last buffers and whose epochs are its own, too
RESIDENT = 264 * 512  # threads: two blocks on each of an H200's SMs


@dataclass(frozen=True)
class Case:
    world_size: int
    dtype: str
    numel: int
    staging: int
    nvlink: bool
    deterministic: bool
    max_ctas: int | None = None
    tuned: tuple[Band, ...] | None = None  # of this dtype
    other: tuple[Band, ...] | None = None  # of another dtype, which shares the staging memory
    legacy: tuple[AlgorithmBand, ...] | None = None  # of this dtype

    @property
    def spec(self):
        return all_reduce(self.dtype, self.numel)

    @property
    def nbytes(self):
        return self.numel * ITEMSIZE[self.dtype]


# Made once: hypothesis takes its time to check a strategy.
STAGING = st.just(DEFAULT_STAGING) | st.integers(4, 1024).map(lambda mb: mb << 20)
POWERS = st.builds(lambda e, d: max(1, 2**e + d), st.integers(0, 33), st.integers(-9, 9))
SIZES = st.integers(1, 5000) | POWERS | st.integers(1, 2**33) | st.none()  # None: near an edge of the tables
NEAR = st.tuples(st.integers(0, 999), st.integers(-40, 40))
MAX_CTAS = st.none() | st.none() | st.integers(2, 40) | st.integers(2, 3000)
CUTS = st.lists(st.integers(1, 1 << 30) | st.integers(8, 29).map(lambda e: 1 << e), max_size=6, unique=True)


@st.composite
def tables(draw, world_size):
    """Any bands that ``allreduce-jit tune`` could come back with, and many that it could not."""
    cuts = sorted(draw(CUTS))
    names = nvlink_algorithms(world_size)
    picked = sorted(draw(st.lists(st.integers(0, len(names) - 1), min_size=len(cuts) + 1, max_size=len(cuts) + 1)))
    bands = []
    for up_to, pick in zip([*cuts, NEVER], picked, strict=True):
        if names[pick] in STREAMS and (not bands or bands[-1].up_to < STREAM_FROM):
            pick -= 1
        bands.append(Band(up_to, names[pick], draw(st.sampled_from(BLOCKS))))
    return V2.bands_from_json(world_size, bands_to_json(tuple(bands)))  # they keep the rules


@st.composite
def legacy_tables(draw):
    cuts, names = sorted(draw(CUTS)), LEGACY.algorithms(2)
    picked = sorted(draw(st.lists(st.integers(0, len(names) - 1), min_size=len(cuts) + 1, max_size=len(cuts) + 1)))
    bands = [
        AlgorithmBand(up_to, names[min(pick, 1) if begin < KERNELS_UP_TO else pick])
        for begin, up_to, pick in zip([0, *cuts], [*cuts, NEVER], picked, strict=True)
    ]
    return LEGACY.bands_from_json(2, bands_to_json(tuple(bands)))  # they keep the rules


@st.composite
def cases(draw, world_sizes=WORLD_SIZES):
    n, dtype = draw(st.sampled_from(world_sizes)), draw(st.sampled_from(list(DTYPES)))
    staging, numel, max_ctas = draw(STAGING), draw(SIZES), draw(MAX_CTAS)
    tuned, other = (draw(st.none() | tables(n)) for _ in range(2))
    legacy = draw(st.none() | legacy_tables())
    case = Case(n, dtype, 1, staging, draw(st.booleans()), draw(st.booleans()), max_ctas, tuned, other, legacy)
    if numel is None:
        which, distance = draw(NEAR)
        edges = edges_of(case)
        numel = max(1, edges[which % len(edges)] // ITEMSIZE[dtype] + distance)
    # Of so few blocks a launch is short: no millions of them.
    return replace(case, numel=numel if max_ctas is None else min(numel, 1 << 24))


def edges_of(case):
    """Message sizes in bytes at which a plan changes its mind."""
    n, legacy_table = case.world_size, P2P_TABLES[case.world_size]
    measured = [min(band.up_to, 1 << 30) for band in case.legacy or ()]
    bands, layout = v2_memory(REAL, case)
    edges = [*measured, *(min(band.up_to, 1 << 30) for band in bands)]
    limits = legacy_table.two_shot_from, legacy_table.nvlink_limit, legacy_table.pcie_limit  # which may be never
    edges += [*(min(limit, 1 << 30) for limit in limits), case.staging // (6 * n)]
    full = [PACKET * region.capacity * parts_of(name, n) for name, region in layout.regions.items()]
    return edges + [launches * size for size in full for launches in (1, 2, 3, 4, 6, 7)]


def parts_of(algorithm, world_size):
    return 1 if algorithm.startswith("one_shot") else world_size


# What the properties judge: planning, and the launches that the engine makes of a plan.
REAL = SimpleNamespace(
    v2_bands=nvlink.make_bands, v2_layout=nvlink.make_layout, v2_plan=nvlink.make_plan, launches=nvlink.launches,
    legacy_layout=p2p.make_layout, legacy_plan=p2p.make_plan, legacy_part=p2p.part_of,
    legacy_launches=p2p.launches,
)  # fmt: skip


def hold(prop, functions=None, examples=300, world_sizes=WORLD_SIZES):
    """Judge ``functions`` (None: the real ones) by ``prop``; raises the AssertionError of a case that fails."""
    phases = list(hypothesis.Phase) if functions is None else [hypothesis.Phase.generate]
    functions = functions or REAL

    @hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, report_multiple_bugs=False,
        phases=phases,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )  # fmt: skip
    @hypothesis.given(cases(world_sizes))
    def run(case):
        prop(functions, case)

    run()


def v2_memory(f, case):
    """The bands of the case's dtype, and the layout that all dtypes share."""
    bands, other = (f.v2_bands(case.world_size, case.max_ctas, tuned) for tuned in (case.tuned, case.other))
    return bands, f.v2_layout(case.world_size, case.staging, (*bands, *other), case.max_ctas)


def v2(f, case):
    bands, layout = v2_memory(f, case)
    return layout, f.v2_plan(case.spec, case.world_size, bands, layout)


def launches(f, case):
    """Region, plan, and the launches of the call (first element, elements, blocks with the guard, last or not, buffers)."""
    layout, plan = v2(f, case)
    return layout.regions[plan.algorithm], plan, f.launches(plan, case.spec, case.world_size)


def packets_of(algorithm, numel, case):
    """Of the launch, or of each rank's part of it."""
    whole = -(-numel * ITEMSIZE[case.dtype] // PACKET)
    return -(-whole // parts_of(algorithm, case.world_size))


def legacy(f, case):
    layout = f.legacy_layout(case.world_size, case.staging)
    return layout, f.legacy_plan(case.spec, case.world_size, limits_of(case), layout, not case.deterministic)


def limits_of(case):
    return p2p.make_limits(case.world_size, case.nvlink, case.legacy)


def told(piece, *names):
    """What a launch is told besides its elements; 0 where it is not told."""
    arguments = dict(piece.arguments)
    return [arguments.get(name, 0) for name in names]


def region_bytes(name, region, world_size):
    if name.startswith("legacy"):
        return BUFFERS[name] * world_size * region.capacity
    return BUFFERS[name] * (world_size - 1) * region.capacity * PACKET


# -- properties of V2


def v2_regions_apart(f, case):
    bands, layout = v2_memory(f, case)
    assert set(layout.regions) >= {band.algorithm for band in bands}
    check_apart(layout, case)


def v2_aligned(f, case):
    layout, _ = v2(f, case)
    for region in layout.regions.values():
        assert region.offset % PACKET == 0  # and so is each slot: a slot is a packet


def v2_inside_the_slots(f, case):
    """The slots and epoch words of every warp that has a packet; warps past them touch nothing, on all ranks."""
    region, plan, found = launches(f, case)
    packets = PACKETS.get(plan.algorithm, 1)
    for piece in (found[0], found[-1]):
        channel = (packets_of(plan.algorithm, piece.numel, case) - 1) // (WARP * packets)  # the last one
        assert channel < region.channels
        assert channel * WARP * packets + WARP - 1 + WARP * (packets - 1) < region.capacity


def v2_covers(f, case):
    """Every element once, and every packet has a thread."""
    _, plan, found = launches(f, case)
    done = 0
    for i, piece in enumerate(found):
        assert piece.start == done and piece.numel > 0 and told(piece, "launch") == [i]
        done += piece.numel
        moving = piece.grid - (0 if plan.algorithm in STREAMS and i else 1)  # the guard's block moves nothing
        threads = plan.block * PACKETS.get(plan.algorithm, 1)
        assert (moving - 1) * threads < packets_of(plan.algorithm, piece.numel, case) <= moving * threads  # none is idle
    assert plan.path == "v2" and plan.grid * threads >= packets_of(plan.algorithm, found[0].numel, case)
    assert done == case.numel


def v2_whole_packets(f, case):
    """The next launch starts at an address as aligned as the first."""
    for piece in launches(f, case)[2]:
        assert piece.start * ITEMSIZE[case.dtype] % PACKET == 0


def v2_stream_ends_well(f, case):
    """Three buffers in turn lead from the first launch's to another one, that of the last launch (two_shot.cu)."""
    _, plan, found = launches(f, case)
    if plan.algorithm in STREAMS:
        assert len(found) % 3 != 1


def v2_stream_is_resident(f, case):
    """All blocks of a launch at once, or the next one could not begin while it runs."""
    _, plan, found = launches(f, case)
    if plan.algorithm in STREAMS:
        assert max(packets_of(plan.algorithm, piece.numel, case) for piece in found) <= RESIDENT


def v2_equal_launches(f, case):
    """Of as many packets each, but for what is lost to whole warps; where warps are so few that they decide, nothing is said."""
    _, plan, found = launches(f, case)
    unit = WARP * PACKETS.get(plan.algorithm, 1)
    each, packets = (packets_of(plan.algorithm, numel, case) for numel in (plan.chunk, case.numel))
    if each > 2 * unit * len(found):
        assert each * len(found) - packets < unit * len(found)


def v2_stream_buffers(f, case):
    """Of the launches of the case's call, and of calls that take the same plan in any number of launches."""
    _, plan, found = launches(f, case)
    check_buffers(plan, found)
    if plan.algorithm in STREAMS:
        unit = parts_of(plan.algorithm, case.world_size) * WARP * PACKET // ITEMSIZE[case.dtype]
        for number in range(2, 24):
            if number % 3 != 1:
                found = f.launches(replace(plan, chunk=unit), all_reduce(case.dtype, number * unit - 1), case.world_size)
                assert len(found) == number
                check_buffers(plan, found)


def v2_guards_pair_up(f, case):
    """What enters with a guard leaves before the next one; else two launches look like two calls (guard.cuh)."""
    _, plan, found = launches(f, case)
    inside = 0
    for piece in found:
        threads = plan.block * PACKETS.get(plan.algorithm, 1)
        entered = piece.grid - -(-packets_of(plan.algorithm, piece.numel, case) // threads)
        assert entered in (0, 1) and inside + entered == 1
        inside += entered - told(piece, "last")[0]
    assert inside == 0


def v2_blocks(f, case):
    _, plan = v2(f, case)
    assert plan.block % WARP == 0 and WARP <= plan.block <= 512


def v2_few_blocks(f, case):
    """Guard included, no launch has more than the communicator may occupy."""
    if case.max_ctas is not None:
        assert max(piece.grid for piece in launches(f, case)[2]) <= case.max_ctas


def v2_known_kernel(f, case):
    _, plan = v2(f, case)
    entries = {e for spec in nvlink_modules(case.world_size, few_sms=case.max_ctas is not None) for e in spec.entries}
    assert {entry(plan.algorithm, case.dtype, case.world_size, whole) for whole in (True, False)} <= entries


def v2_never_goes_back(f, case):
    """A larger message never takes the algorithm of smaller ones again."""
    order = nvlink_algorithms(case.world_size, few_sms=case.max_ctas is not None).index
    _, plan = v2(f, case)
    _, larger = v2(f, replace(case, numel=case.numel + max(1, case.numel // 3)))
    assert order(plan.algorithm) <= order(larger.algorithm)


def v2_splits_no_more_than_it_must(f, case):
    """Several launches only where no later band has the room for one, or where they overlap."""
    bands, layout = v2_memory(f, case)
    _, plan = v2(f, case)
    if plan.chunk == case.numel or plan.algorithm in STREAMS:
        return
    for band in bands:
        if case.nbytes <= band.up_to:
            room = layout.regions[band.algorithm].capacity
            assert packets_of(band.algorithm, case.numel, case) > room and band.algorithm not in STREAMS


def v2_takes_its_band(f, case):
    """Where one launch holds a message, or there is no other algorithm, its band decides, block and all."""
    bands, layout = v2_memory(f, case)
    band = next(band for band in bands if case.nbytes <= band.up_to)
    _, plan = v2(f, case)
    room = layout.regions[band.algorithm].capacity
    fits = packets_of(band.algorithm, case.numel, case) <= room
    if fits or band.algorithm in STREAMS or band.algorithm == bands[-1].algorithm:
        assert (plan.algorithm, plan.block) == (band.algorithm, band.block)


def v2_uses_its_memory(f, case):
    """A region could have a block's slots more only where its largest message, its share or the memory would not have it.

    Its share is a quarter of the memory for one-shot and a half for two-shot; the last one's is what the others leave, over which
    its shared buffers lie.
    """
    (bands, layout), n = v2_memory(f, case), case.world_size
    bands = (*bands, *f.v2_bands(n, case.max_ctas, case.other))
    owners, begin = [name for name in layout.regions if INSIDE.get(name) not in layout.regions], HEADER
    for name in owners:
        last, users = name == owners[-1], [name, *(user for user in layout.regions if INSIDE.get(user) == name)]
        step, buffers, shared = 512 * PACKETS.get(name, 1), BUFFERS[name], SHARED.get(name, 0)
        more, one = layout.regions[name].capacity + step, (n - 1) * PACKET
        largest = {user: max(band.up_to for band in bands if band.algorithm == user) for user in users}
        needed = [
            min(-(-size // (PACKET * parts_of(user, n))), RESIDENT if user in STREAMS else NEVER)
            for user, size in largest.items()
        ]
        share = case.staging // (4 if parts_of(name, n) == 1 else 2)
        assert more - 2 * step < max(needed), name  # nor is it a block larger than what is to fit
        assert last or (more - step) * buffers * one <= share, name
        assert (
            more - step >= max(needed)
            or not last
            and more * buffers * one > share
            or HEADER + more * buffers * one > case.staging
            or begin + more * (buffers - shared) * one > case.staging
            or case.max_ctas is not None
            and more > (case.max_ctas - 1) * step
        ), name
        begin = layout.regions[name].offset + buffers * one * layout.regions[name].capacity


def v2_repeats(f, case):
    assert v2(f, case) == v2(f, case)


# -- properties of legacy


def legacy_regions_apart(f, case):
    layout, _ = legacy(f, case)
    assert set(layout.regions) == {"legacy_one_shot", "legacy_two_shot"}
    check_apart(layout, case)


def legacy_aligned(f, case):
    layout, plan = legacy(f, case)
    for region in layout.regions.values():
        assert region.offset % PACKET == 0
        assert region.capacity % BLOCK_BYTES == 0 and region.channels == region.capacity // BLOCK_BYTES
    if plan.chunk < case.numel:  # the next launch starts at an address as aligned as the first
        assert plan.chunk * ITEMSIZE[case.dtype] % PACKET == 0


def legacy_launches_fit(f, case):
    """The first launch is the largest: it fills its slots, and has a program for each block."""
    layout, plan = legacy(f, case)
    if plan.path == "torch.distributed":
        return
    region, itemsize = layout.regions[plan.algorithm], ITEMSIZE[case.dtype]
    assert 1 <= plan.chunk <= case.numel and plan.block == THREADS
    assert 1 <= plan.grid <= region.channels and plan.grid * BLOCK_BYTES <= region.capacity
    if plan.algorithm == "legacy_one_shot":
        assert plan.chunk == case.numel  # whole in one launch
        assert plan.grid * BLOCK_BYTES >= plan.chunk * itemsize > (plan.grid - 1) * BLOCK_BYTES
    else:
        part = f.legacy_part(plan.chunk, itemsize, case.world_size)
        assert part * itemsize == plan.grid * BLOCK_BYTES
        assert case.world_size * part >= plan.chunk


def legacy_covers(f, case):
    """Every element once, in launches of a guard and a program for each block that goes to a peer."""
    layout, plan = legacy(f, case)
    if plan.path == "torch.distributed":
        return
    region, itemsize, done = layout.regions[plan.algorithm], ITEMSIZE[case.dtype], 0
    for piece in f.legacy_launches(plan, case.spec, case.world_size):
        assert piece.start == done and 0 < piece.numel <= plan.chunk and piece.start * itemsize % PACKET == 0
        done += piece.numel
        (part,) = told(piece, "part")
        if plan.algorithm == "legacy_two_shot":  # a part for each rank, of whole blocks, and no block that is nobody's
            assert part * itemsize == (piece.grid - 1) * BLOCK_BYTES
            assert part * case.world_size >= piece.numel > (part - BLOCK_BYTES // itemsize) * case.world_size
        else:
            assert (piece.grid - 1) * BLOCK_BYTES >= piece.numel * itemsize > (piece.grid - 2) * BLOCK_BYTES
        assert piece.grid - 1 <= min(plan.grid, region.channels)
    assert done == case.numel


def legacy_uses_its_memory(f, case):
    """One-shot has a third, two-shot the rest; what is left over is less than a block of each slot array."""
    layout, _ = legacy(f, case)
    one, two = (region_bytes(name, layout.regions[name], case.world_size) for name in ("legacy_one_shot", "legacy_two_shot"))
    assert two == 2 * one and case.staging - HEADER - one - two < 6 * case.world_size * BLOCK_BYTES


def legacy_takes_one_shot_while_it_is_small(f, case):
    """Below the table's size, as far as one launch holds it."""
    layout, plan = legacy(f, case)
    if plan.path == "legacy":
        small = case.nbytes < limits_of(case).two_shot_from
        fits = case.nbytes <= layout.regions["legacy_one_shot"].capacity
        assert plan.algorithm == ("legacy_one_shot" if small and fits else "legacy_two_shot")


def whole_numbers(f, case):
    """What is counted is counted in ``int``: kernels are launched with it."""
    (layout, plan), (old, legacy_plan) = v2(f, case), legacy(f, case)
    found = [plan, legacy_plan, layout, old, *layout.regions.values(), *old.regions.values()]
    found += f.launches(plan, case.spec, case.world_size)
    if legacy_plan.path == "legacy":
        found += f.legacy_launches(legacy_plan, case.spec, case.world_size)
    for record in found:
        values = [v for v in vars(record).values() if not isinstance(v, (str, dict, tuple))]
        assert {*map(type, values), *(type(v) for _, v in getattr(record, "arguments", ()))} == {int}, record


def legacy_hands_over(f, case):
    """To NCCL above the limit, and never when determinism was asked for."""
    _, plan = legacy(f, case)
    if case.legacy is None:
        table = P2P_TABLES[case.world_size]
        above = case.nbytes > (table.nvlink_limit if case.nvlink else table.pcie_limit)
    else:
        above = next(band for band in case.legacy if case.nbytes <= band.up_to).algorithm == "nccl"
    assert plan.path == ("torch.distributed" if above and not case.deterministic else "legacy")
    if plan.path == "torch.distributed":
        assert plan.chunk == case.numel and plan.algorithm == "nccl"


def legacy_takes_its_band(f, case):
    """The algorithm that was measured as the fastest, where one launch of it holds the call."""
    layout, plan = legacy(f, case)
    band = next((band for band in case.legacy or () if case.nbytes <= band.up_to), None)
    if band is not None and plan.path == "legacy" and band.algorithm != "nccl":
        fits = case.nbytes <= layout.regions["legacy_one_shot"].capacity
        assert plan.algorithm == (band.algorithm if fits else "legacy_two_shot")


def legacy_repeats(f, case):
    assert legacy(f, case) == legacy(f, case)


def check_apart(layout, case):
    """Nothing overlaps the header, outside, or over buffers that are another's alone, unless it may be shared itself."""
    assert all(region.offset >= 0 and region.capacity > 0 and region.channels > 0 for region in layout.regions.values())
    alone, channels = [], 0  # from where to where
    for name, region in layout.regions.items():
        nbytes = region_bytes(name, region, case.world_size)
        if INSIDE.get(name) in layout.regions:
            owner = layout.regions[INSIDE[name]]
            assert region.offset + nbytes == owner.offset + region_bytes(INSIDE[name], owner, case.world_size)
            assert replace(region, offset=0) == replace(owner, offset=0)
            continue
        alone.append((region.offset + nbytes // BUFFERS[name] * SHARED.get(name, 0), region.offset + nbytes))
        assert region.first_channel == channels
        channels += region.channels
    assert channels == layout.channels
    alone.sort()
    assert all(end <= begin for (_, end), (begin, _) in pairwise(alone))
    assert min(region.offset for region in layout.regions.values()) >= HEADER
    assert max(end for _, end in alone) == layout.nbytes <= case.staging


def check_buffers(plan, found):
    """What two_shot.cu asks of the host, in the order in which it says so."""
    scatters, gathers = zip(*(told(piece, "scatter", "gather") for piece in found))
    if plan.algorithm not in STREAMS:
        assert not any(scatters) and not any(gathers)
        return
    assert set(scatters) <= {0, 2, 3} and set(gathers) <= {1, 4}
    assert all(len({*three}) == 3 for three in zip(scatters, scatters[1:], scatters[2:], strict=False))
    assert all(one != other for one, other in pairwise(gathers))
    assert (scatters[0], scatters[-1], gathers[-1]) == (2, 3, 4)


# -- they hold


PROPERTIES = [
    v2_regions_apart, v2_aligned, v2_inside_the_slots, v2_covers, v2_whole_packets, v2_stream_ends_well,
    v2_stream_is_resident, v2_equal_launches, v2_stream_buffers, v2_guards_pair_up, v2_blocks, v2_few_blocks, v2_known_kernel, v2_never_goes_back,
    v2_splits_no_more_than_it_must, v2_takes_its_band, v2_uses_its_memory, v2_repeats,
    legacy_regions_apart, legacy_aligned, legacy_launches_fit, legacy_hands_over, legacy_takes_its_band, legacy_repeats,
    legacy_covers, legacy_uses_its_memory, legacy_takes_one_shot_while_it_is_small, whole_numbers,
]  # fmt: skip


def all_properties(f, case):
    for prop in PROPERTIES:
        prop(f, case)


@pytest.mark.long
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_hold(world_size):
    hold(all_properties, examples=5000 if os.environ.get("LONG") else 150, world_sizes=[world_size])


# -- and can fail


def mutant(name, change):
    """The planning functions with the result of ``name`` changed."""
    original = getattr(REAL, name)
    return replaced(name, lambda *args, **options: change(original(*args, **options)))


def replaced(name, function):
    return SimpleNamespace(**{**vars(REAL), name: function})


def first_band_only(spec, n, bands, layout):
    """As if every algorithm had the room for every message of its bands."""
    band = next(band for band in bands if spec.nbytes <= band.up_to)
    return nvlink.plan_of(band.algorithm, band.block, spec, n, layout)


def straight_to_the_last_band(spec, n, bands, layout):
    plan = first_band_only(spec, n, bands, layout)
    if plan.chunk < spec.numel:
        plan = nvlink.plan_of(bands[-1].algorithm, bands[-1].block, spec, n, layout)
    return plan


def deaf_to_the_stream(spec, n, bands, layout, most=RESIDENT):
    """Launches of a call that streams, as few as there can be."""
    plan = nvlink.make_plan(spec, n, bands, layout)
    parts, room = parts_of(plan.algorithm, n), layout.regions[plan.algorithm].capacity
    room = min(room, most) if plan.algorithm in STREAMS else room
    return replace(plan, chunk=min(spec.numel, room * parts * PACKET // ITEMSIZE[spec.dtype]))


def on_launches(change):
    def changed(plan, *rest):
        return [change(plan, piece) for piece in REAL.launches(plan, *rest)]

    return replaced("launches", changed)


def on_legacy_launches(change):
    return replaced("legacy_launches", lambda *args: [change(piece) for piece in REAL.legacy_launches(*args)])


def on_regions(*names, **changes):
    """Layouts with changed fields of the regions of ``names``, or of all."""

    def change(layout):
        fields = {k: (lambda r, k=k, c=c: c(getattr(r, k))) for k, c in changes.items()}
        regions = {
            n: replace(r, **{k: c(r) for k, c in fields.items()}) if n in (names or layout.regions) else r
            for n, r in layout.regions.items()
        }
        return replace(layout, regions=regions)

    return change


def moved(change):
    """The layouts with each region where ``change`` (name, region, bytes, the bytes in front of it) wants it."""

    def v2_layout(n, staging, *rest):
        layout = nvlink.make_layout(n, staging, *rest)
        regions, end = {}, HEADER
        for name, region in layout.regions.items():
            if INSIDE.get(name) not in layout.regions:
                size = region_bytes(name, region, n)
                regions[name] = replace(region, offset=change(name, region, size, end))
                end = regions[name].offset + size
        for name in layout.regions.keys() - regions.keys():
            owner, region = INSIDE[name], layout.regions[name]
            regions[name] = replace(region, offset=region.offset + regions[owner].offset - layout.regions[owner].offset)
        nbytes = max(r.offset + region_bytes(name, r, n) for name, r in regions.items())
        return replace(layout, regions=regions, nbytes=nbytes)

    return replaced("v2_layout", v2_layout)


def lower_stream(name, region, size, end):
    """By a packet, but not into the header."""
    return max(HEADER, region.offset - PACKET) if name in STREAMS else region.offset


def stream_with_a_buffer_more_over_others(name, region, size, end):
    return max(HEADER, end - 3 * size // 5) if name in STREAMS else region.offset


def stream_in_the_header(name, region, size, end):
    """All of its shared buffers over others', even if there is not so much of those."""
    return max(0, end - 2 * size // 5) if name in STREAMS else region.offset


def stream_behind_all_others(name, region, size, end):
    """As large as if it lay over them."""
    return end if name in STREAMS else region.offset


def on_buffers(change):
    """Launches of streams with the buffers that ``change`` (their number, a launch's place) picks."""

    def launches(plan, *rest):
        found = REAL.launches(plan, *rest)
        if plan.algorithm not in STREAMS:
            return found
        picked = [change(len(found), i, *told(piece, "scatter", "gather")) for i, piece in enumerate(found)]
        return [tell(piece, scatter=s, gather=g) for piece, (s, g) in zip(found, picked, strict=True)]

    return replaced("launches", launches)


def tell(piece, **arguments):
    return replace(piece, arguments=tuple((dict(piece.arguments) | arguments).items()))


def on_plan(**changes):
    return lambda plan: replace(plan, **{k: c(getattr(plan, k)) for k, c in changes.items()})


def swap_regions(layout):
    names = list(layout.regions)
    return replace(layout, regions=dict(zip(names, [layout.regions[n] for n in reversed(names)], strict=True)))


def drifting(name):
    calls = count()
    return mutant(name, on_plan(grid=lambda g: g + next(calls) % 2))


MUTANTS = [
    (v2_regions_apart, "capacity past the region", mutant("v2_layout", on_regions(capacity=lambda c: c + 512))),
    (v2_regions_apart, "regions of one another", mutant("v2_layout", swap_regions)),
    (v2_regions_apart, "regions at one place", mutant("v2_layout", on_regions(offset=lambda o: 0))),
    (v2_regions_apart, "another size of the whole", mutant("v2_layout", lambda x: replace(x, nbytes=x.nbytes + (1 << 20)))),
    (v2_regions_apart, "more than allowed", replaced("v2_layout", lambda n, staging, *rest: nvlink.make_layout(
        n, staging + (1 << 20), *rest))),
    (v2_regions_apart, "a stream one packet too low", moved(lower_stream)),
    (v2_regions_apart, "a stream with three buffers over others", moved(stream_with_a_buffer_more_over_others)),
    (v2_regions_apart, "a stream with its shared buffers in the header", moved(stream_in_the_header)),
    (v2_regions_apart, "a stream past the end", moved(stream_behind_all_others)),
    (v2_regions_apart, "two-shot beside its part of the stream", mutant("v2_layout", on_regions("two_shot", offset=lambda o: o + PACKET))),
    (v2_regions_apart, "two-shot with less room than the stream", mutant("v2_layout", on_regions("two_shot", capacity=lambda c: c - 512))),
    (v2_regions_apart, "two-shot with epochs of its own", mutant("v2_layout", on_regions("two_shot", first_channel=lambda c: c + 1))),
    (v2_regions_apart, "all epochs at one place", mutant("v2_layout", on_regions(first_channel=lambda c: 0))),
    (v2_regions_apart, "channels that nobody counts", mutant("v2_layout", lambda x: replace(x, channels=x.channels - 1))),
    (v2_aligned, "offset of 8 bytes", mutant("v2_layout", on_regions(offset=lambda o: o + 8))),
    (v2_regions_apart, "slots in the header", moved(lambda name, region, size, end: region.offset - HEADER)),
    (v2_inside_the_slots, "twice the capacity", replaced("v2_plan", lambda *args: nvlink.make_plan(
        *args[:-1], on_regions(capacity=lambda c: 2 * c)(args[-1])))),
    (v2_inside_the_slots, "everything in one launch", replaced("v2_plan", lambda spec, *rest: replace(
        nvlink.make_plan(spec, *rest), chunk=spec.numel))),
    (v2_inside_the_slots, "half the epoch words", mutant("v2_layout", on_regions(channels=lambda c: c // 2))),
    (v2_inside_the_slots, "room for half a channel", mutant("v2_layout", on_regions(capacity=lambda c: c - 16))),
    (v2_covers, "one block less", on_launches(lambda plan, piece: replace(piece, grid=piece.grid - 1))),
    (v2_covers, "one block more", on_launches(lambda plan, piece: replace(piece, grid=piece.grid + 1))),
    (v2_covers, "a guard in every launch of a stream", on_launches(lambda plan, piece: replace(
        piece, grid=piece.grid + (piece.start > 0 and plan.algorithm in STREAMS)))),
    (v2_covers, "an element forgotten", on_launches(lambda plan, piece: replace(piece, numel=max(1, piece.numel - 1)))),
    (v2_whole_packets, "launches of odd length", mutant("v2_plan", on_plan(chunk=lambda c: max(1, c - 1)))),
    (v2_stream_ends_well, "as few launches as possible", replaced("v2_plan", deaf_to_the_stream)),
    (v2_stream_is_resident, "launches as large as the slots allow", replaced("v2_plan", lambda *args: deaf_to_the_stream(*args, most=NEVER))),
    (v2_equal_launches, "all that there is room for, and the rest", replaced("v2_plan", deaf_to_the_stream)),
    (v2_stream_buffers, "always in one direction", on_buffers(lambda n, i, scatter, gather: ((2, 0, 3)[i % 3], gather))),
    (v2_stream_buffers, "in the other direction", on_buffers(lambda n, i, scatter, gather: (
        (2, 3, 0)[i % 3] if n % 3 == 0 else (2, 0, 3)[i % 3], gather))),
    (v2_stream_buffers, "two for all launches but the last", on_buffers(lambda n, i, scatter, gather: (
        3 if i == n - 1 else (2, 0)[i % 2], gather))),
    (v2_stream_buffers, "the first launch's buffer is a shared one", on_buffers(lambda n, i, scatter, gather: (
        (2 - scatter if scatter < 3 else 3), gather))),
    (v2_stream_buffers, "the last launch's buffer is a shared one", on_buffers(lambda n, i, scatter, gather: (
        (3 - scatter if scatter != 2 else 2), gather))),
    (v2_stream_buffers, "the other shared one", on_buffers(lambda n, i, scatter, gather: (scatter or 1, gather))),
    (v2_stream_buffers, "first and last launch swapped", on_buffers(lambda n, i, scatter, gather: (-scatter % 5, gather))),
    (v2_stream_buffers, "gathers counted from the front", on_buffers(lambda n, i, scatter, gather: (scatter, (4, 1)[i % 2]))),
    (v2_stream_buffers, "gathers shifted by a launch", on_buffers(lambda n, i, scatter, gather: (scatter, 5 - gather))),
    (v2_stream_buffers, "one for all gathers", on_buffers(lambda n, i, scatter, gather: (scatter, 4))),
    (v2_stream_buffers, "only the last gathers alone", on_buffers(lambda n, i, scatter, gather: (
        scatter, 4 if i == n - 1 else 1))),
    (v2_stream_buffers, "gathers through a buffer that scatters", on_buffers(lambda n, i, scatter, gather: (
        scatter, gather if gather == 4 else 2))),
    (v2_stream_buffers, "as few launches as possible", replaced("v2_plan", deaf_to_the_stream)),
    (v2_stream_buffers, "buffers for those that take turns by themselves", on_launches(lambda plan, piece: tell(
        piece, scatter=told(piece, "scatter")[0] if plan.algorithm in STREAMS else 1))),
    (v2_guards_pair_up, "only the call's last launch leaves", replaced("launches", lambda plan, spec, *rest: [
        tell(piece, last=piece.start + piece.numel == spec.numel) for piece in REAL.launches(plan, spec, *rest)])),
    (v2_guards_pair_up, "every launch leaves", on_launches(lambda plan, piece: tell(piece, last=1))),
    (v2_blocks, "not whole warps", mutant("v2_plan", on_plan(block=lambda b: b + 8))),
    (v2_blocks, "1024 threads", mutant("v2_plan", on_plan(block=lambda b: 2 * b))),
    (v2_few_blocks, "the guard forgotten", replaced("v2_layout", lambda n, staging, bands, max_ctas: nvlink.make_layout(
        n, staging, bands, max_ctas and max_ctas + 1))),
    (v2_few_blocks, "blocks of half the threads", mutant("v2_plan", on_plan(block=lambda b: max(32, b // 2)))),
    (v2_known_kernel, "no such kernel", mutant("v2_plan", on_plan(algorithm=lambda a: a + "_loop"))),
    (v2_known_kernel, "wide ones for all", replaced("v2_bands", lambda n, max_ctas, tuned: nvlink.make_bands(n, 9))),
    (v2_never_goes_back, "one-shot for odd grids",
     mutant("v2_plan", lambda p: replace(p, algorithm="one_shot") if p.grid % 2 else p)),
    (v2_splits_no_more_than_it_must, "nothing goes on to a later band", replaced("v2_plan", first_band_only)),
    (v2_takes_its_band, "always the last band", replaced("v2_plan", lambda spec, n, bands, layout:
        nvlink.make_plan(spec, n, bands[-1:] if spec.numel > 1 << 16 else bands, layout))),
    (v2_takes_its_band, "straight to the last band", replaced("v2_plan", straight_to_the_last_band)),
    (v2_takes_its_band, "blocks of the last band", replaced("v2_plan", lambda spec, n, bands, layout: replace(
        nvlink.make_plan(spec, n, bands, layout), block=bands[-1].block))),
    (v2_uses_its_memory, "a block's slots less", mutant("v2_layout", on_regions(capacity=lambda c: c - 512 if c > 512 else c))),
    (v2_uses_its_memory, "as if all messages were its", replaced("v2_layout", lambda n, staging, bands, max_ctas: nvlink.make_layout(
        n, staging, [replace(band, up_to=NEVER) for band in bands], max_ctas))),
    (v2_uses_its_memory, "the last one has a half, too", replaced("v2_layout", lambda n, staging, *rest: nvlink.make_layout(
        n, staging // 2, *rest))),
    (v2_repeats, "a counter in the grid", drifting("v2_plan")),
    (legacy_regions_apart, "a block too many", mutant("legacy_layout", on_regions(capacity=lambda c: c + BLOCK_BYTES))),
    (legacy_regions_apart, "regions at one place", mutant("legacy_layout", on_regions(offset=lambda o: 0))),
    (legacy_aligned, "slots of odd length", mutant("legacy_layout", on_regions(capacity=lambda c: c - 8))),
    (legacy_aligned, "chunks of odd length", mutant("legacy_plan", on_plan(chunk=lambda c: max(1, c - 1)))),
    (legacy_launches_fit, "half the slots", mutant("legacy_layout", on_regions(channels=lambda c: c // 2))),
    (legacy_launches_fit, "one program more", mutant("legacy_plan", on_plan(grid=lambda g: g + 1))),
    (legacy_launches_fit, "one program less", mutant("legacy_plan", on_plan(grid=lambda g: g - 1))),
    (legacy_launches_fit, "parts of half blocks", mutant("legacy_part", lambda p: p // 2)),
    (legacy_hands_over, "always legacy", mutant("legacy_plan", on_plan(path=lambda p: "legacy"))),
    (legacy_hands_over, "deaf to deterministic",
     replaced("legacy_plan", lambda *args: p2p.make_plan(*args[:-1], True))),
    (legacy_hands_over, "deaf to measurements",
     replaced("legacy_plan", lambda spec, n, limits, *more: p2p.make_plan(spec, n, p2p.make_limits(n, False), *more))),
    (legacy_takes_its_band, "two-shot a byte later",
     replaced("legacy_plan", lambda spec, n, limits, *more: p2p.make_plan(
         spec, n, replace(limits, two_shot_from=limits.two_shot_from + 512), *more))),
    (legacy_repeats, "a counter in the grid", drifting("legacy_plan")),
    (legacy_covers, "no guard", on_legacy_launches(lambda piece: replace(piece, grid=piece.grid - 1))),
    (legacy_covers, "a program too many", on_legacy_launches(lambda piece: replace(piece, grid=piece.grid + 1))),
    (legacy_covers, "an element forgotten", on_legacy_launches(lambda piece: replace(piece, numel=max(1, piece.numel - 1)))),
    (legacy_covers, "parts of half blocks", on_legacy_launches(lambda piece: tell(piece, part=told(piece, "part")[0] // 2))),
    (legacy_uses_its_memory, "half of it", replaced("legacy_layout", lambda n, staging: p2p.make_layout(n, staging // 2))),
    (legacy_takes_one_shot_while_it_is_small, "never", replaced("legacy_plan", lambda spec, n, limits, layout, *_: p2p.plan_of(
        "legacy_two_shot", spec, n, layout))),
    (whole_numbers, "a grid that was divided", mutant("v2_plan", on_plan(grid=float))),
    (whole_numbers, "parts that were divided", on_legacy_launches(lambda piece: tell(piece, part=told(piece, "part")[0] / 1))),
]  # fmt: skip


@pytest.mark.parametrize(("prop", "functions"), [m[::2] for m in MUTANTS], ids=[f"{m[0].__name__}: {m[1]}" for m in MUTANTS])
def test_fails_on_a_planted_mistake(prop, functions):
    with pytest.raises(AssertionError):
        hold(prop, functions, examples=1000)


def test_every_property_has_a_mistake_that_it_finds():
    assert {prop for prop, *_ in MUTANTS} == set(PROPERTIES)


# -- all ranks alike

DIGEST = """
import hashlib, sys
from allreduce_jit.policy import nvlink, p2p
from allreduce_jit.policy.operation import all_reduce
lines = []
for n in range(2, 9):
    for dtype in ("float32", "float16", "bfloat16"):
        for e in range(0, 34, 3):
            spec, bands = all_reduce(dtype, 2**e + 5), nvlink.make_bands(n, 16 if e % 2 else None)
            v2, old = nvlink.make_layout(n, 32 << 20, bands, 16 if e % 2 else None), p2p.make_layout(n, 32 << 20)
            lines.append(repr((v2, nvlink.make_plan(spec, n, bands, v2))))
            lines.append(repr((old, p2p.make_plan(spec, n, p2p.make_limits(n, True), old, e % 2 == 0))))
print(hashlib.sha256("".join(lines).encode()).hexdigest(), sorted({"torch", "cuda", "triton"} & set(sys.modules)))
"""


def test_ranks_agree_whatever_their_environment():
    outputs = []
    for rank in range(3):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONHASHSEED": str(rank + 1)}
        env["CUDA_VISIBLE_DEVICES"] = str(rank)
        outputs.append(subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=True).stdout)
    digest, modules = outputs[0].split(maxsplit=1)
    assert len(digest) == len(hashlib.sha256().hexdigest())
    assert modules.strip() == "[]"  # a plan that knows no torch and no CUDA cannot ask this rank's GPU
    assert len(set(outputs)) == 1


# -- the default, and the engines' own calls


def case_of(world_size, dtype="bfloat16", numel=1, staging_mb=32, **more):
    return Case(world_size, dtype, numel, staging_mb << 20, nvlink=True, deterministic=True, **more)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_default_staging_suffices(world_size):
    assert p2p.make_layout(world_size, DEFAULT_STAGING).nbytes <= DEFAULT_STAGING == 32 << 20
    used = [v2(REAL, case_of(world_size, numel=2**e)) for e in range(33)]
    assert all(layout.nbytes <= DEFAULT_STAGING for layout, _ in used)
    assert tuple(dict.fromkeys(plan.algorithm for _, plan in used)) == nvlink_algorithms(world_size)
    # The largest message of a band takes one launch: nobody has to go on to a later one.
    for band in NVLINK_TABLES[world_size]:
        _, plan = v2(REAL, case_of(world_size, numel=min(band.up_to, 1 << 30) // 2))
        assert (plan.algorithm, plan.block) == (band.algorithm, band.block)


def test_a_table_that_breaks_a_rule_is_told_which_and_where():
    """``tests/cli/test_tune.py`` has them all; here what is said, and the sizes at which a rule begins."""

    def entry(up_to, algorithm="one_shot", block=64):
        return {"up_to": up_to, "algorithm": algorithm, "block": block}

    order = "one_shot, two_shot, two_shot_stream"
    for value, told in (
        ([entry(NEVER), entry(None)], f"band 0 ends at {NEVER}: expected growing whole bytes, and null in the last band"),
        ([entry(4096), entry(4096), entry(None)], "band 1 ends at 4096: expected growing"),
        ([entry(None, "two")], f"band 0: algorithm 'two' is none of {order}"),
        ([entry(8), entry(16, "two_shot"), entry(None)], f"band 2: one_shot after two_shot: expected the order {order}"),
        (
            [entry(8), entry(1 << 20, "two_shot"), entry(1 << 21, "two_shot_stream"), entry(None)],
            f"band 3: one_shot after two_shot_stream: expected the order {order}",
        ),
        (
            [entry(65_535), entry(None, "two_shot_stream")],
            "band 1: two_shot_stream from 65535 bytes on: it takes messages above 65536",
        ),
        ([entry(None, block=33)], "band 0: blocks of 33 threads: expected one of (32, 64, 128, 256, 512)"),
    ):
        with pytest.raises(ValueError, match="^" + re.escape(told)):
            V2.bands_from_json(4, value)
    assert [band.up_to for band in V2.bands_from_json(4, [entry(65_536), entry(None, "two_shot_stream")])] == [65_536, NEVER]
    assert [band.up_to for band in V2.bands_from_json(4, [entry(NEVER - 1), entry(None)])] == [NEVER - 1, NEVER]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("nvlink", [False, True])
def test_nccl_takes_what_is_larger_than_the_limit_and_no_less(world_size, nvlink):
    """The same for two-shot, which begins at its size."""
    table, layout = P2P_TABLES[world_size], p2p.make_layout(world_size, 1 << 30)
    limits = p2p.make_limits(world_size, nvlink)
    limit = min(table.nvlink_limit if nvlink else table.pcie_limit, 1 << 30)
    for nbytes in (limit - 4, limit, limit + 4):
        plan = p2p.make_plan(all_reduce("float32", nbytes // 4), world_size, limits, layout, True)
        above = nbytes > (table.nvlink_limit if nvlink else table.pcie_limit)
        assert plan.path == ("torch.distributed" if above else "legacy")
        assert not above or (plan.algorithm, plan.grid, plan.block, plan.chunk) == (
            "nccl",
            0,
            0,
            nbytes // 4,
        )  # no kernel of ours
    for nbytes, small in ((table.two_shot_from - 4, True), (table.two_shot_from, False), (table.two_shot_from + 4, False)):
        plan = p2p.make_plan(all_reduce("float32", nbytes // 4), world_size, limits, layout, False)
        assert plan.algorithm == ("legacy_one_shot" if small else "legacy_two_shot")


def test_launches_of_legacy_follow_each_other():
    plan = p2p.plan_of("legacy_two_shot", all_reduce("float32", 2500), 2, p2p.make_layout(2, 4 << 20))
    found = p2p.launches(replace(plan, chunk=1000), all_reduce("float32", 2500), 2)
    assert [(piece.start, piece.numel) for piece in found] == [(0, 1000), (1000, 1000), (2000, 500)]


def test_whatever_the_memory_a_layout_stays_inside():
    """Where the last region takes all that is left, to the last block of slots."""
    for n in WORLD_SIZES:
        *before, last = nvlink_algorithms(n)
        for bands in (NVLINK_TABLES[n], (*(Band(STREAM_FROM, name, 64) for name in before), Band(NEVER, last, 64))):
            for staging in range(4 << 20, 1025 << 20, 1 << 20):
                check_apart(nvlink.make_layout(n, staging, bands), SimpleNamespace(world_size=n, staging=staging))


def test_each_region_has_its_share_and_the_last_one_the_rest():
    """Of any algorithms that lie beside each other: a quarter for one-shot, half for two-shot, if their messages want as much."""
    for names in (
        ("one_shot", "two_shot_wide", "two_shot_wide2"),
        ("two_shot_wide", "two_shot_wide2"),
        ("one_shot", "one_shot_wide"),
    ):
        for n, staging in ((3, 32 << 20), (8, 64 << 20)):
            for largest in (NEVER, 1 << 16):
                layout = nvlink.make_layout(n, staging, [Band(largest, name, 32) for name in names])
                check_apart(layout, SimpleNamespace(world_size=n, staging=staging))
                left = staging - HEADER
                for name in names:
                    block = 512 * PACKETS.get(name, 1) * BUFFERS[name] * (n - 1) * PACKET
                    taken = region_bytes(name, layout.regions[name], n)
                    share = min(left, staging // (4 if name.startswith("one_shot") else 2)) if name != names[-1] else left
                    if largest == NEVER or name == names[-1]:
                        assert share - block < taken <= share, (name, n)
                    else:
                        assert 0 < taken <= block + largest * BUFFERS[name] * (n - 1)
                    left -= taken


@pytest.mark.long
@pytest.mark.parametrize("world_size", WORLD_SIZES if os.environ.get("LONG") else (2, 5, 8))
@pytest.mark.parametrize("dtype", DTYPES)
def test_past_two_to_the_31_elements(world_size, dtype):
    for numel in (2**31 - 1, 2**31, 2**31 + 1, 2**32 + 3, 2**33):
        for staging_mb in (4, 32, 1024) if numel == 2**31 + 1 else (32, 1024):
            case = case_of(world_size, dtype, numel, staging_mb)
            all_properties(REAL, case)
            assert legacy(REAL, case)[1].algorithm == "legacy_two_shot"


def test_a_stream_can_always_end_well():
    """``nvlink.plan_of`` looks for equal launches whose number is not 1 modulo 3: there are some, whatever the message.

    With launches of k units (warps of packets), u units take ceil(u / k); that is 1 modulo 3 for k = 1 … 4 only if u
    is 1 modulo 36. No u up to 2^28, messages of 400 GB, fails for all k up to 32; the smallest region has more units.
    """
    numpy = pytest.importorskip("numpy")
    left = numpy.arange(37, 1 << 28, 36)
    for k in range(5, 33):
        left = left[(left % (3 * k) >= 1) & (left % (3 * k) <= k)]
    assert not left.size
    for world_size in WORLD_SIZES[1:]:
        for bands in (NVLINK_TABLES[world_size], tuple(Band(NEVER, name, 32) for name in nvlink_algorithms(world_size))):
            region = nvlink.make_layout(world_size, 4 << 20, bands).regions["two_shot_stream"]
            assert region.capacity >= 32 * WARP


@pytest.mark.parametrize("world_size", [3, 8])
@pytest.mark.parametrize("number", range(2, 12))
def test_a_stream_is_cut_into_equal_launches(world_size, number):
    """As few as there is room for, and one more where these would be 1 modulo 3."""
    case = case_of(world_size, "float32", number * RESIDENT * world_size * 4, staging_mb=1024)
    _, plan, found = launches(REAL, case)
    assert plan.algorithm == "two_shot_stream" and len(found) == (number + 1 if number % 3 == 1 else number)
    v2_equal_launches(REAL, case)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("max_ctas", [2, 3, 8, 64, 300])
def test_of_few_blocks_all_have_something_to_do(world_size, max_ctas):
    """The algorithm and the smallest block whose launch of ``max_ctas`` blocks, the guard's one of them, holds a message."""
    bands = nvlink.make_bands(world_size, max_ctas)
    names = nvlink_algorithms(world_size, few_sms=True)
    holds = {
        (name, block): (max_ctas - 1) * block * PACKETS.get(name, 1) * PACKET * parts_of(name, world_size)
        for name in names
        for block in BLOCKS
    }
    assert [band.up_to for band in bands] == sorted({band.up_to for band in bands}) and bands[-1].up_to == NEVER
    for edge in holds.values():
        for nbytes in (edge - 1, edge, edge + 1):
            band = next(band for band in bands if nbytes <= band.up_to)
            wanted = next((one for one in holds if nbytes <= holds[one]), (names[-1], BLOCKS[-1]))
            assert (band.algorithm, band.block) == wanted, nbytes


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_one_shot_of_legacy_ends_where_its_slots_do(world_size):
    layout = p2p.make_layout(world_size, 4 << 20)
    capacity = layout.regions["legacy_one_shot"].capacity
    assert capacity < P2P_TABLES[world_size].two_shot_from or world_size > 5
    for nbytes in (min(capacity, P2P_TABLES[world_size].two_shot_from - 4), capacity + 4):
        plan = p2p.make_plan(all_reduce("float32", nbytes // 4), world_size, p2p.make_limits(world_size, True), layout, False)
        assert plan.algorithm == ("legacy_one_shot" if nbytes <= capacity else "legacy_two_shot")
    for dtype, itemsize in ITEMSIZE.items():  # as while it is verified: several launches, of whole elements
        plan = p2p.plan_of("legacy_one_shot", all_reduce(dtype, capacity), world_size, layout)
        assert plan.chunk == capacity // itemsize and type(plan.chunk) is int and plan.grid * BLOCK_BYTES == capacity


def test_too_few_elements_for_a_stream_are_refused():
    layout = v2(REAL, case_of(4))[0]
    spec = all_reduce("float32", 4 * 32 * 4 + 1)
    assert nvlink.plan_of("two_shot_stream", 32, spec, 4, layout).chunk == 4 * 32 * 4
    with pytest.raises(ValueError, match="two_shot_stream of 512 float32 elements: too few"):
        nvlink.plan_of("two_shot_stream", 32, all_reduce("float32", 4 * 32 * 4), 4, layout)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("staging_mb", [4, 5, 6, 7, 8, 32, 1024])
@pytest.mark.parametrize("max_ctas", [None, 2, 3, 16, 64])
def test_verification_stays_inside_the_slots(world_size, staging_mb, max_ctas):
    """The calls that an engine makes while it is built take plans that no table picked."""
    from allreduce_jit.engine.nvlink import NvlinkEngine
    from allreduce_jit.engine.verify import VERIFY_BYTES

    engine = object.__new__(NvlinkEngine)
    engine.config = SimpleNamespace(world_size=world_size, max_ctas=max_ctas)
    case = case_of(world_size, staging_mb=staging_mb, max_ctas=max_ctas)
    engine.layout = v2(REAL, case)[0]
    for name, itemsize in ITEMSIZE.items():
        for numel in (VERIFY_BYTES // itemsize - 1, VERIFY_BYTES // itemsize):
            plans = engine.verification_plans(all_reduce(name, numel))
            assert [plan.algorithm for plan in plans] == list(engine.layout.regions)
            for plan in plans:
                fixed = replaced("v2_plan", lambda *_, plan=plan: plan)
                for prop in (
                    v2_inside_the_slots, v2_covers, v2_whole_packets, v2_stream_ends_well, v2_stream_buffers, v2_blocks,
                ):  # fmt: skip
                    prop(fixed, replace(case, dtype=name, numel=numel))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_legacy_launches_cover_the_tensor(world_size):
    """Where the launches of a plan begin, and with how many programs, whatever the plan."""

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(cases([world_size]))
    def run(case):
        case = replace(case, deterministic=True, numel=min(case.numel, 50 * case.staging // ITEMSIZE[case.dtype]))
        layout, plan = legacy(REAL, case)
        region, itemsize = layout.regions[plan.algorithm], ITEMSIZE[case.dtype]
        done = 0
        for piece in p2p.launches(plan, case.spec, world_size):
            assert piece.start == done and piece.numel > 0
            nbytes, moving = piece.numel * itemsize, piece.grid - 1  # without the guard
            assert moving <= region.channels
            if plan.algorithm == "legacy_two_shot":
                assert told(piece, "part")[0] * itemsize == moving * BLOCK_BYTES
                assert told(piece, "part")[0] * world_size >= piece.numel
            else:
                assert moving * BLOCK_BYTES >= nbytes > (moving - 1) * BLOCK_BYTES
            done += piece.numel
        assert done == case.numel

    run()
