"""What ``allreduce-jit tune`` can measure of each path, and which bands are refused, whoever wrote them."""

from __future__ import annotations

import json

import pytest
from helpers.kept import HOST_ODD, ODD

from allreduce_jit.policy import host, p2p
from allreduce_jit.policy.catalogue import WORLD_SIZES, nvlink_algorithms
from allreduce_jit.policy.host import HOST_TABLES
from allreduce_jit.policy.operation import ITEMSIZE
from allreduce_jit.policy.tables import KIB, MIB, NEVER, NVLINK_TABLES, P2P_TABLES, STREAM_FROM, AlgorithmBand, bands_to_json
from allreduce_jit.policy.tuning import HOST, KERNELS_UP_TO, LEGACY, V2

SIZES = [1 << shift for shift in range(0, 31)]
EACH = pytest.mark.parametrize("tunable", [V2, LEGACY, HOST], ids=lambda tunable: tunable.path.short)
PACKAGE = {V2: NVLINK_TABLES, HOST: HOST_TABLES}


@pytest.mark.parametrize("tunable", PACKAGE, ids=lambda tunable: tunable.path.short)
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_packages_tables_keep_the_rules(world_size, tunable):
    bands = PACKAGE[tunable][world_size]
    assert tunable.bands_from_json(world_size, bands_to_json(bands)) == bands


@EACH
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_what_is_tried_keeps_the_rules_and_holds_what_the_package_has(world_size, tunable):
    names = tunable.algorithms(world_size)
    for name in names:
        assert (
            len(set(tunable.choices(world_size, name)))
            == len(tunable.choices(world_size, name))
            > (0 if tunable is LEGACY else 3)
        )
        for choice in tunable.choices(world_size, name):
            assert choice[0] == name and tunable.unfit(tunable.band(NEVER, *choice), STREAM_FROM) is None
        bands = tunable.private(world_size, name)
        assert bands == tunable.bands_from_json(world_size, bands_to_json(bands)) or tunable is V2  # which streams anything then
        assert tunable is not V2 or bands[-1].algorithm == name
    for band in PACKAGE[tunable][world_size] if tunable in PACKAGE else ():
        assert tuple(vars(band).values())[1:] in tunable.choices(world_size, band.algorithm)


@EACH
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_there_is_a_way_through_all_sizes(world_size, tunable):
    """Each size has an algorithm to try, and none that comes back once it was left."""
    names = tunable.algorithms(world_size)
    for dtype, itemsize in ITEMSIZE.items():
        seen = [set(tunable.candidates(world_size, dtype, size, 32 * MIB)) for size in SIZES if size >= itemsize]
        assert all(seen) and names[-1] in seen[-1] and names[0] in seen[0]
        for name in names:
            tried = "".join(str(int(name in found)) for found in seen)
            assert "1" in tried and "101" not in tried and len(tried.strip("0").split("0")) == 1


def test_candidates_are_what_a_plan_can_pick():
    assert set(V2.candidates(4, "bfloat16", STREAM_FROM, 32 << 20)) == {"one_shot", "two_shot"}
    assert set(V2.candidates(4, "bfloat16", 2 * STREAM_FROM, 32 << 20)) == set(nvlink_algorithms(4))
    assert set(V2.candidates(4, "bfloat16", 64 * MIB, 32 << 20)) == {"two_shot_stream"}
    assert set(V2.candidates(2, "bfloat16", 64 * MIB, 4 << 20)) == {"one_shot"}


def test_one_shot_among_many_ranks_is_not_tried_where_it_would_take_minutes():
    assert set(HOST.candidates(8, "bfloat16", 512 * KIB, 32 << 20)) == {"host_one_shot", "host_two_shot"}
    assert set(HOST.candidates(8, "bfloat16", 64 * MIB, 32 << 20)) == {"host_two_shot"}
    assert set(HOST.candidates(2, "bfloat16", 1 * KIB, 32 << 20)) == {"host_one_shot"}


def test_legacy_is_tried_beside_nccl_where_set_up_makes_no_calls():
    small, large = ("legacy_one_shot", "legacy_two_shot"), ("legacy_two_shot", "nccl")
    found = {size: tuple(LEGACY.candidates(4, "float32", size, 32 * MIB)) for size in (64 * KIB, 128 * KIB, MIB, 2 * MIB)}
    assert found == {64 * KIB: small, 128 * KIB: (*small, "nccl"), MIB: (*small, "nccl"), 2 * MIB: large}
    calls_of_set_up = 16_000 * 4  # engine/verify._streams, whose calls have to be the kernels'
    assert calls_of_set_up <= KERNELS_UP_TO


def test_channels_tried_on_path_host():
    found = {name: sorted({channels for _, _, channels in HOST.choices(4, name)}) for name in HOST.algorithms(4)}
    assert found == {"host_one_shot": [64, 96, 128, 192, 256, 512, 1024], "host_two_shot": [64, 96, 128, 192, 256, 512]}
    assert {block for _, block, _ in HOST.choices(4, "host_two_shot")} == {HOST_TABLES[4][-1].block}


def spoilt(bands, i, **changes):
    found = bands_to_json(bands)
    found[i] |= changes
    return found


def without(bands, key):
    return [{name: value for name, value in band.items() if name != key} for band in bands_to_json(bands)]


def bad_everywhere(bands, name):
    """Of bands that are good but for one thing, by what is wrong with it; ``name``: of an algorithm that is not the first one."""
    one = bands_to_json(bands)
    return [
        None, {}, [], "one_shot", [1], [{}], [one], one[:-1],
        spoilt(bands, 0, more=1), spoilt(bands, 0, up_to=0), spoilt(bands, 0, up_to=-1), spoilt(bands, 0, up_to=1.5),
        spoilt(bands, 0, up_to=True), spoilt(bands, 0, up_to="1"), spoilt(bands, 0, up_to=None), spoilt(bands, 0, up_to=NEVER),
        spoilt(bands, -1, up_to=NEVER), spoilt(bands, 0, algorithm="two_shot_wide"), spoilt(bands, 0, algorithm=[name]),
        spoilt(bands, 0, algorithm=None), [one[0] | {"algorithm": name}, one[-1] | {"algorithm": one[0]["algorithm"]}],
        *(spoilt(bands, 0, block=block) for block in (0, 48, 1024, 64.0, "64", True, None)),
        *(without(bands, key) for key in one[0]),
    ]  # fmt: skip


LEGACY_ODD = (
    AlgorithmBand(1000, "legacy_one_shot"), AlgorithmBand(90 * KIB, "legacy_two_shot"), AlgorithmBand(NEVER, "nccl")
)  # fmt: skip
BAD = {
    LEGACY: [
        *bad_everywhere(LEGACY_ODD, "legacy_two_shot"),
        spoilt(LEGACY_ODD, 1, up_to=64 * KIB - 1), spoilt(LEGACY_ODD, 0, algorithm="nccl"), spoilt(LEGACY_ODD, 0, block=128),
        spoilt(LEGACY_ODD, 0, algorithm="one_shot"), bands_to_json(ODD), [bands_to_json(LEGACY_ODD)[-1]],
    ],
    V2: [
        *bad_everywhere(ODD, "two_shot"), spoilt(ODD, 1, up_to=3 * KIB), spoilt(ODD, 0, algorithm="two_shot_stream"),
        spoilt(ODD, 1, algorithm="two_shot_stream"), spoilt(ODD, 0, algorithm="host_one_shot"), bands_to_json(HOST_ODD),
    ],
    HOST: [
        *bad_everywhere(HOST_ODD, "host_two_shot"), spoilt(HOST_ODD, 0, algorithm="host_stream"), bands_to_json(ODD),
        *(spoilt(HOST_ODD, 1, channels=channels) for channels in (0, -4, 3, 4.0, "64", None, True, 94, 516, 1 << 40)),
        spoilt(HOST_ODD, 0, channels=1025), spoilt(HOST_ODD, 0, block=512, channels=8),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("tunable", "value"),
    [pytest.param(t, value, id=f"{t.path.short}-{json.dumps(value)[:60]}") for t, values in BAD.items() for value in values],
)
def test_bands_that_break_a_rule_are_refused(tunable, value):
    with pytest.raises(ValueError, match="expected|none of|it takes"):
        tunable.bands_from_json(4, value)


def test_good_bands_next_to_the_bad_ones_are_taken():
    assert V2.bands_from_json(4, bands_to_json(ODD)) == ODD
    assert HOST.bands_from_json(4, bands_to_json(HOST_ODD)) == HOST_ODD
    assert LEGACY.bands_from_json(4, bands_to_json(LEGACY_ODD)) == LEGACY_ODD
    for channels in (4, 96, host.CHANNELS["host_two_shot"]):
        assert HOST.bands_from_json(4, spoilt(HOST_ODD, 1, channels=channels))[1].channels == channels


def bands_of_legacy(*ends):
    return tuple(AlgorithmBand(end, name) for end, name in zip(ends, LEGACY.algorithms(4), strict=True) if end is not None)


@pytest.mark.parametrize(("ends", "two_shot_from", "nccl_above"), [
    ((1000, 90_000, NEVER), 1001, 90_000),
    ((1000, NEVER, None), 1001, NEVER),
    ((NEVER, None, None), NEVER + 1, NEVER),
    ((None, NEVER, None), 1, NEVER),
    ((None, 90_000, NEVER), 1, 90_000),
    ((90_000, None, NEVER), P2P_TABLES[4].two_shot_from, 90_000),  # the package's, as nothing was found of it
    ((500_000, None, NEVER), 500_001, 500_000),
])  # fmt: skip
def test_what_bands_of_legacy_say_to_its_plans(ends, two_shot_from, nccl_above):
    bands = bands_of_legacy(*ends)
    assert LEGACY.bands_from_json(4, bands_to_json(bands)) == bands
    for nvlink in (True, False):
        assert p2p.make_limits(4, nvlink, bands) == p2p.Limits(two_shot_from, nccl_above)


def test_where_no_kernel_of_legacy_was_the_fastest_every_call_is_nccls():
    """Set-up would refuse such bands, as its own calls have to be the kernels'."""
    for n, table in P2P_TABLES.items():
        assert p2p.make_limits(n, True, (AlgorithmBand(NEVER, "nccl"),)) == p2p.Limits(table.two_shot_from, 0)


def test_without_a_measurement_legacy_has_the_packages_limits():
    for n, table in P2P_TABLES.items():
        assert p2p.make_limits(n, True) == p2p.Limits(table.two_shot_from, table.nvlink_limit)
        assert p2p.make_limits(n, False) == p2p.Limits(table.two_shot_from, table.pcie_limit)


def test_which_algorithms_there_are_is_up_to_the_world_size():
    with pytest.raises(ValueError, match="'two_shot' is none of one_shot"):
        V2.bands_from_json(2, bands_to_json(ODD))
    with pytest.raises(ValueError, match="'host_two_shot' is none of host_one_shot, host_stream"):
        HOST.bands_from_json(2, bands_to_json(HOST_ODD))
