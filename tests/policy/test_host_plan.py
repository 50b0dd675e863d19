"""Plans of path host as properties, each of which has a planted mistake that it must find."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from allreduce_jit.policy import host
from allreduce_jit.policy.catalogue import HOST_ALGORITHMS, WORLD_SIZES, entry, host_algorithms, host_modules
from allreduce_jit.policy.host import HOST_TABLES, HostBand
from allreduce_jit.policy.operation import ITEMSIZE, all_reduce
from allreduce_jit.policy.plan import HEADER_BYTES, PACKET, WARP
from allreduce_jit.policy.tables import BLOCKS, NEVER, bands_to_json
from allreduce_jit.policy.tuning import HOST

MIB = 1 << 20


def layout_is_sound(world_size, staging_bytes, layout):
    end = HEADER_BYTES
    channels = []
    for name, region in sorted(layout.regions.items(), key=lambda item: item[1].offset):
        assert region.offset >= end and region.offset % 512 == 0, "regions lie apart, slots on borders of their own"
        assert region.capacity == HOST_ALGORITHMS[name].slots(world_size) and 64 <= region.channels <= host.CHANNELS[name]
        slot = WARP * HOST_ALGORITHMS[name].packets * PACKET
        end = region.offset + region.channels * region.capacity * slot
        assert {type(n) for n in vars(region).values()} == {int}
        channels += range(region.first_channel, region.first_channel + region.channels)
    assert end == layout.nbytes <= staging_bytes
    assert sorted(channels) == list(range(layout.channels)), "a count for each channel, and no two share one"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("staging_mb", [4, 5, 32, 1024])
def test_layouts(world_size, staging_mb):
    layout_is_sound(world_size, staging_mb * MIB, host.make_layout(world_size, staging_mb * MIB))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_channels_where_there_is_room_and_a_share_of_each_algorithm_s_where_there_is_not(world_size):
    everything = host.make_layout(world_size, 32 * MIB)
    assert {name: region.channels for name, region in everything.regions.items()} == {
        name: host.CHANNELS[name] for name in host_algorithms(world_size)
    }
    assert host.make_layout(world_size, everything.nbytes) == everything
    for less in (1, HEADER_BYTES, (everything.nbytes - HEADER_BYTES) // 2, everything.nbytes * 3 // 4):
        layout = host.make_layout(world_size, everything.nbytes - less)
        layout_is_sound(world_size, everything.nbytes - less, layout)
        share = (everything.nbytes - less - HEADER_BYTES) / (everything.nbytes - HEADER_BYTES)
        for name, region in layout.regions.items():
            assert share * host.CHANNELS[name] - 1 < region.channels <= share * host.CHANNELS[name]


def test_a_planted_layout_is_found():
    layout = host.make_layout(3, 32 * MIB)
    name = list(layout.regions)[1]
    for change in ({"offset": layout.regions[name].offset - 512}, {"capacity": 2}, {"first_channel": 0}):
        regions = layout.regions | {name: replace(layout.regions[name], **change)}
        with pytest.raises(AssertionError):
            layout_is_sound(3, 32 * MIB, replace(layout, regions=regions))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_tables(world_size):
    bands = HOST_TABLES[world_size]
    assert bands[-1].up_to == NEVER and [band.up_to for band in bands] == sorted({band.up_to for band in bands})
    names = host_algorithms(world_size)
    order = [names.index(band.algorithm) for band in bands]
    assert order == sorted(order) and set(order) == set(range(len(names))), "each is used, from small to large messages"
    for band in bands:
        assert band.block % WARP == 0 and 0 < band.block <= 512 and band.channels <= host.CHANNELS[band.algorithm]
        assert band.channels * WARP % band.block == 0


def plan_is_sound(plan, launches, spec, world_size, layout, max_ctas):
    what = HOST_ALGORITHMS[plan.algorithm]
    parts = world_size if what.parts else 1
    warps = plan.block // WARP
    assert 1 <= plan.grid and plan.grid * warps <= max(warps, layout.regions[plan.algorithm].channels), "a channel for each warp"
    assert max_ctas is None or plan.grid + 1 <= max_ctas
    covered = 0
    for piece in launches:
        assert piece.start == covered and 0 < piece.numel <= plan.chunk < 1 << 31 and piece.grid == plan.grid + 1
        assert piece.start * ITEMSIZE[spec.dtype] % PACKET == 0, "whole packets stay aligned"
        assert piece.arguments == (("launch", launches.index(piece)), ("last", 1))
        covered += piece.numel
    assert covered == spec.numel
    first = -(-launches[0].numel * ITEMSIZE[spec.dtype] // (PACKET * parts))
    assert (plan.grid - 1) * warps * host.chunk_packets(plan.algorithm) < first, "no block without a chunk"


@st.composite
def tables(draw, world_size):
    """Any bands that a file of ``allreduce-jit tune`` may hold."""
    cuts = sorted(draw(st.lists(st.integers(1, 1 << 30), max_size=4, unique=True)))
    names, bands, first = host_algorithms(world_size), [], 0
    for up_to in [*cuts, NEVER]:
        first = draw(st.integers(first, len(names) - 1))
        block = draw(st.sampled_from(BLOCKS))
        channels = draw(st.integers(1, host.CHANNELS[names[first]] * WARP // block)) * block // WARP
        bands.append(HostBand(up_to, names[first], block, channels))
    return HOST.bands_from_json(world_size, bands_to_json(tuple(bands)))  # they keep the rules


@st.composite
def cases(draw):
    world_size, dtype = draw(st.sampled_from(WORLD_SIZES)), draw(st.sampled_from(list(ITEMSIZE)))
    numel = int(2 ** draw(st.floats(0, 32)))
    bands = draw(st.just(HOST_TABLES[world_size]) | tables(world_size))
    return world_size, all_reduce(dtype, numel), draw(st.sampled_from([None, 2, 3, 16])), draw(st.sampled_from([4, 32])), bands


@hypothesis_settings(max_examples=300, deadline=None)
@given(case=cases())
def test_plans(case):
    world_size, spec, max_ctas, staging_mb, bands = case
    layout = host.make_layout(world_size, staging_mb * MIB)
    plan = host.make_plan(spec, world_size, bands, layout, max_ctas)
    assert plan.path == "host" and plan == host.make_plan(spec, world_size, bands, layout, max_ctas)
    band = next(band for band in bands if spec.nbytes <= band.up_to)
    assert (plan.algorithm, plan.block) == (band.algorithm, band.block) and plan.grid * plan.block // WARP <= band.channels
    plan_is_sound(plan, host.launches(plan, spec), spec, world_size, layout, max_ctas)
    entries = {name for module in host_modules(world_size) for name in module.entries}
    assert {entry(plan.algorithm, spec.dtype, world_size, whole) for whole in (True, False)} <= entries


def as_wide_as_there_is_work(plan, spec, world_size, layout, channels, max_ctas):
    """A warp for each chunk, or all warps that there may be: of the plan, of the memory, of the communicator (less the guard)."""
    what = HOST_ALGORITHMS[plan.algorithm]
    parts, slot, warps = world_size if what.parts else 1, WARP * what.packets, plan.block // WARP
    packets = -(-plan.chunk * ITEMSIZE[spec.dtype] // (PACKET * parts))
    chunks = -(-packets // (slot - 1))  # one packet of a slot is the wire's
    most = min(channels, layout.regions[plan.algorithm].channels) // warps
    if max_ctas is not None:
        most = min(most, max_ctas - 1)
    assert plan.grid == max(1, min(-(-chunks // warps), most))
    assert {type(n) for n in (plan.grid, plan.block, plan.chunk)} == {int}


@hypothesis_settings(max_examples=300, deadline=None, derandomize=True)
@given(case=cases(), block=st.sampled_from([32, 64, 128, 512]), channels=st.sampled_from([16, 128, 256, 1024]))
def test_all_warps_that_have_work_take_part(case, block, channels):
    world_size, spec, max_ctas, staging_mb, _ = case
    layout = host.make_layout(world_size, staging_mb * MIB)
    for algorithm in layout.regions:
        plan = host.plan_of(algorithm, block, channels, spec, world_size, layout, max_ctas)
        as_wide_as_there_is_work(plan, spec, world_size, layout, channels, max_ctas)
        if plan.grid > 1:
            with pytest.raises(AssertionError):
                narrow = replace(plan, grid=plan.grid - 1)
                as_wide_as_there_is_work(narrow, spec, world_size, layout, channels, max_ctas)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_a_band_ends_with_its_largest_message(world_size):
    bands = (host.HostBand(4096, "host_one_shot", 64, 16), host.HostBand(8192, "host_one_shot", 32, 8))
    bands = (*bands, host.HostBand(NEVER, host_algorithms(world_size)[-1], 128, 256))
    layout = host.make_layout(world_size, 32 * MIB)
    for nbytes, band in ((4, 0), (4096, 0), (4100, 1), (8192, 1), (8196, 2), (1 << 20, 2)):
        plan = host.make_plan(all_reduce("float32", nbytes // 4), world_size, bands, layout)
        assert (plan.algorithm, plan.block) == (bands[band].algorithm, bands[band].block), nbytes


def test_planted_plans_are_found():
    layout = host.make_layout(2, 32 * MIB)
    spec = all_reduce("bfloat16", 5_000_000)
    plan = host.make_plan(spec, 2, HOST_TABLES[2], layout)
    launches = host.launches(plan, spec)
    plan_is_sound(plan, launches, spec, 2, layout, None)
    wrong = [
        (replace(plan, grid=100_000), launches),
        (replace(plan, grid=0), launches),
        (plan, launches[:-1]),
        (plan, [replace(launches[0], grid=plan.grid)]),
        (plan, [replace(launches[0], numel=5), replace(launches[0], start=5, numel=spec.numel - 5)]),
    ]
    for changed, pieces in wrong:
        with pytest.raises((AssertionError, IndexError)):
            plan_is_sound(changed, pieces, spec, 2, layout, None)
    small = all_reduce("bfloat16", 100)
    plan = host.make_plan(small, 2, HOST_TABLES[2], layout)
    with pytest.raises(AssertionError):
        plan_is_sound(replace(plan, grid=2), [replace(host.launches(plan, small)[0], grid=3)], small, 2, layout, None)
