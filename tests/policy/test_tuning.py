"""What ``allreduce-jit tune`` can measure of each path, and which bands are refused, whoever wrote them."""

from __future__ import annotations

import json

import pytest
from helpers.kept import HOST_ODD, ODD

from allreduce_jit.policy import host
from allreduce_jit.policy.catalogue import WORLD_SIZES, nvlink_algorithms
from allreduce_jit.policy.host import HOST_TABLES
from allreduce_jit.policy.operation import ITEMSIZE
from allreduce_jit.policy.tables import KIB, MIB, NEVER, STREAM_FROM, bands_to_json
from allreduce_jit.policy.tuning import HOST, V2

SIZES = [1 << shift for shift in range(0, 31)]
EACH = pytest.mark.parametrize("tunable", [V2, HOST], ids=lambda tunable: tunable.path.short)


@EACH
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_packages_tables_keep_the_rules(world_size, tunable):
    bands = tunable.package[world_size]
    assert tunable.bands_from_json(world_size, bands_to_json(bands)) == bands


@EACH
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_what_is_tried_keeps_the_rules_and_holds_what_the_package_has(world_size, tunable):
    names = tunable.algorithms(world_size)
    for name in names:
        assert len(set(tunable.choices(world_size, name))) == len(tunable.choices(world_size, name)) > 3
        for choice in tunable.choices(world_size, name):
            assert choice[0] == name and tunable.unfit(tunable.band(NEVER, *choice), STREAM_FROM) is None
        bands = tunable.bands_for(world_size, name)
        assert bands[-1].algorithm == name and bands[-1].up_to == NEVER and {band.algorithm for band in bands} <= set(names)
    for band in tunable.package[world_size]:
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
        *(spoilt(bands, 0, block=block) for block in (0, 48, 1024, 64.0, "64", True, None)), *(without(bands, key) for key in one[0]),
    ]  # fmt: skip


BAD = {
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
    for channels in (4, 96, host.CHANNELS["host_two_shot"]):
        assert HOST.bands_from_json(4, spoilt(HOST_ODD, 1, channels=channels))[1].channels == channels


def test_which_algorithms_there_are_is_up_to_the_world_size():
    with pytest.raises(ValueError, match="'two_shot' is none of one_shot"):
        V2.bands_from_json(2, bands_to_json(ODD))
    with pytest.raises(ValueError, match="'host_two_shot' is none of host_one_shot, host_stream"):
        HOST.bands_from_json(2, bands_to_json(HOST_ODD))
