"""The legacy kernels' protocol and numbers, on the kernels themselves: see legacy_ranks."""

import dataclasses
import os
import random
import shutil
from collections.abc import Sequence

import legacy_ranks
import numpy as np
import pytest
import torch
from legacy_ranks import Call, Scenario

from allreduce_jit import abi
from allreduce_jit.engine.failure import explain, heard
from allreduce_jit.errors import CallMismatchError, ConcurrentUseError, PeerLostError, PeerTimeoutError, PoisonedError

WORLDS = range(2, 9)
DTYPES = tuple(legacy_ranks.WORDS)
ALGORITHMS = tuple(legacy_ranks.KERNELS)

triton = pytest.importorskip("triton")


@pytest.fixture(scope="module")
def stage():
    stage = legacy_ranks.Stage()
    yield stage
    stage.close()


def right(outcome: legacy_ranks.Outcome) -> None:
    assert outcome.wrong == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_reference_rounds_as_torch_does(dtype):
    values = np.random.default_rng(0).integers(0, 2**32, 100_000, dtype=np.uint64).astype(np.uint32).view(np.float32)
    values = values[~np.isnan(values)]
    rounded = torch.from_numpy(values).to(getattr(torch, dtype))
    with np.errstate(over="ignore"):
        bits = legacy_ranks.narrow(values, dtype)
    assert np.array_equal(bits, rounded.view(torch.uint16).numpy())
    assert np.array_equal(legacy_ranks.widen(bits, dtype), rounded.float().numpy())


@pytest.mark.parametrize("world", WORLDS)
def test_every_world_dtype_and_algorithm(stage, world):
    """Odd sizes, sizes below the world size, several blocks, in place and not: the exact bits, nothing left behind."""
    sizes = iter(random.Random(world).sample([1, world - 1, 127, 128, 301, 515], 6))
    calls = [
        Call(algorithm, dtype, numel, in_place=bool(numel % 3), offset=numel % 2)
        for dtype in DTYPES
        for algorithm in ALGORITHMS
        for numel in [next(sizes)]
    ]
    right(stage.run(Scenario(world, calls, seed=world, block_bytes=512)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("data", ["specials", "bits"])
def test_zeros_infinities_subnormals_and_nans(stage, dtype, data):
    calls = [Call(algorithm, dtype, 700, data) for algorithm in ALGORITHMS]
    right(stage.run(Scenario(3, calls, seed=7)))


@pytest.mark.parametrize("seed", range(5))
def test_a_long_life_under_random_delays(stage, seed):
    """Sizes, dtypes and algorithms change from call to call; ranks pause, stores are torn, one rank may dawdle."""
    rng = random.Random(seed)
    world = rng.choice([2, 3, 4])
    calls = [
        Call(
            rng.choice(ALGORITHMS),
            rng.choice(DTYPES),
            rng.choice([1, 2, 65, 256, 333, 600]),
            rng.choice(["normal", "specials", "bits"]),
            rng.random() < 0.5,
            rng.choice([0, 0, 1, 3]),
        )
        for _ in range(12)
    ]
    slow = rng.choice([None, rng.randrange(world)])
    right(stage.run(Scenario(world, calls, seed, jitter=0.2, slow=slow)))


# Waits that end.


def explained(outcome: legacy_ranks.Outcome, rank: int, alive=lambda rank: None):
    """What the host of a rank makes of its report."""
    words = outcome.reports[rank]
    signed = heard(bytes.fromhex(outcome.signatures[rank]), len(outcome.reports))
    return explain(words, words[0], rank, signed, alive)


@pytest.mark.parametrize(
    "algorithm, world, absent", [("one_shot", 2, 1), ("one_shot", 4, 2), ("two_shot", 2, 0), ("two_shot", 3, 1)]
)
def test_an_absent_rank_is_named(stage, algorithm, world, absent):
    """All others give up, name it, and later calls end at once, push nothing and yield NaN."""
    calls = 4 * [Call(algorithm, "float32", 40)]
    outcome = stage.run(Scenario(world, calls, absent=absent, deadline=150))
    survivors = [rank for rank in range(world) if rank != absent]
    for rank in survivors:
        error = explained(outcome, rank)
        assert type(error) is PeerTimeoutError and error.ranks == (absent,), error
        assert outcome.aborted[rank] and outcome.all_nan[rank]
    told = {outcome.reports[rank][0] for rank in survivors}
    finders = [explained(outcome, rank) for rank in survivors if outcome.reports[rank][0] >> 16 == rank]
    assert finders and len(told) == len(finders)  # who was told repeats it
    for error in finders:
        report = error.report
        assert (report.sequence, report.algorithm, report.dtype) == (1, f"legacy_{algorithm}", "float32")
        assert 150 <= report.waited_ms < 150 + abi.POLLS  # from the first look at the clock on
        assert report.channel == 0  # of the handshake, which fails before the first channel waits
    assert outcome.aborted[absent] in told
    # One block from each survivor, of the first call's first phase and of no later one.
    assert outcome.pushed[absent] <= len(survivors) * Scenario(world, calls).block_bytes


def test_a_rank_that_dies_between_the_phases_is_named(stage):
    outcome = stage.run(Scenario(3, [Call("two_shot", "float32", 40)], dies=1, deadline=150))
    for rank in (0, 2):
        error = explained(outcome, rank, alive=lambda rank: rank != 1)
        assert type(error) is PeerLostError and error.ranks == (1,) and error.report.phase == "gather", error
        assert outcome.all_nan[rank]
        assert [one.last_call.sequence for one in error.report.ranks if one.last_call] == [1, 1]


def test_the_channel_that_waited_is_reported(stage):
    """A rank that dies in its first channel has pushed that one's data; its peers wait in the second one."""
    outcome = stage.run(Scenario(3, [Call("one_shot", "float32", 150)], dies=1, deadline=150))
    errors = [explained(outcome, rank, alive=lambda rank: rank != 1) for rank in (0, 2)]
    assert [(type(error), error.ranks) for error in errors] == 2 * [(PeerLostError, (1,))]
    finders = [error.report for rank, error in zip((0, 2), errors) if error.report.found_by == rank]
    assert finders and all((found.phase, found.channel) == ("exchange", 1) for found in finders), finders


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_an_aborted_rank_says_nothing_and_believes_nothing(stage, algorithm):
    """It signs and pushes nothing, so its peers give up on it, and yields NaN though all their data is there."""
    outcome = stage.run(Scenario(2, [Call(algorithm, "float16", 100)], aborted=0, slow=0, deadline=150))
    assert outcome.all_nan == [True, True]
    error = explained(outcome, 0)
    assert type(error) is PoisonedError and error.report.waited_ms == 0, error
    error = explained(outcome, 1)
    assert type(error) is PeerTimeoutError and error.ranks == (0,) and error.report.ranks[0].last_call is None


def test_who_is_late_is_named_though_another_call_differs(stage):
    """The last rank to come decides; what differs among those that came is another rank's news."""
    calls = [Call("one_shot", "float32", 40)]
    outcome = stage.run(Scenario(3, calls, absent=1, differs=[2, {"numel": 39}], deadline=100, hasty=0))
    error = explained(outcome, 0)
    assert type(error) is PeerTimeoutError and error.ranks == (1,), error


BEYOND_32_BITS = (1 << 32, 3 << 33, 1 << 47)  # the last one: the highest bit that a signature has for it


@pytest.mark.parametrize("others", BEYOND_32_BITS)
def test_numbers_of_elements_are_compared_beyond_32_bits(stage, others):
    calls = 2 * [Call("one_shot", "float16", 40)]
    outcome = stage.run(Scenario(2, calls, differs=[1, {"others": others}], deadline=3000))
    for rank in range(2):
        assert type(explained(outcome, rank)) is CallMismatchError


@pytest.mark.parametrize("slow", [0, 1])
def test_each_rank_compares_for_itself(stage, slow):
    """Who finds a call that differs is who looks first: the other one is told."""
    outcome = stage.run(Scenario(2, [Call("one_shot", "float16", 40)], differs=[0, {"numel": 39}], slow=slow, deadline=20_000))
    for rank in range(2):
        error = explained(outcome, rank)
        assert type(error) is CallMismatchError and error.report.found_by == 1 - slow, error
        assert set(error.ranks) == {0, 1}


def test_the_grace_is_over_for_a_shape_and_for_no_other(stage):
    """The second shape's first call has been handshaken: its second one has a deadline, the third shape's first has none."""
    two, one = Call("two_shot", "float32", 150), Call("one_shot", "float32", 150)
    outcome = stage.run(Scenario(2, [two, two, one], leaves=1, deadline=100, grace=0))
    error = explained(outcome, 0)
    assert type(error) is PeerTimeoutError and error.report.sequence == 2, error


def test_what_arrives_as_time_runs_out_counts(stage):
    """A rank that has signed by the last look is there, though the clock says that it is late; so is its data."""
    right(stage.run(Scenario(2, [Call("one_shot", "float32", 40)], just=1, grace=abi.POLLS - 1)))
    for algorithm in ALGORITHMS:
        right(stage.run(Scenario(2, [Call(algorithm, "float32", 40)], hesitates=1, deadline=abi.POLLS - 1, grace=0)))


def test_no_deadline_no_report(stage):
    """A deadline of 0 means none: a rank that is very late is waited for."""
    right(stage.run(Scenario(2, [Call("one_shot", "float32", 200)], slow=1, late=1, deadline=0)))


@pytest.mark.parametrize("how", [{"numel": 39}, {"dtype": "bfloat16"}, {"algorithm": "two_shot"}])
@pytest.mark.parametrize("world", [2, 3])
def test_calls_that_differ_are_named(stage, world, how):
    outcome = stage.run(Scenario(world, [Call("one_shot", "float16", 40)], differs=[1, how], deadline=3000))
    for rank in range(world):
        error = explained(outcome, rank)
        assert type(error) is CallMismatchError and 1 in error.ranks, error
        if error.report.found_by == rank:
            mine, theirs = error.report.mine.to_dict(), error.report.theirs.to_dict()
            differing = {name for name in mine if mine[name] != theirs[name]}
            assert differing == set(how) and mine["dtype"] in ("float16", "bfloat16")
            assert str(how.get("numel", 40)) in str(error)
    assert any(explained(outcome, rank).report.found_by == rank for rank in range(world))


def test_one_rank_in_place_and_the_other_not(stage):
    """That is no difference of calls; each rank tells of its own."""
    for calls, how in (
        (2 * [Call("two_shot", "float16", 40, in_place=True)], None),
        (2 * [Call("two_shot", "float16", 40)], [1, {"in_place": True}]),
        ([Call("one_shot", "float16", 40), Call("one_shot", "float16", 40, in_place=True)], [1, {"in_place": False}]),
    ):
        outcome = stage.run(Scenario(2, calls, differs=how))
        right(outcome)
    last = [heard(bytes.fromhex(outcome.signatures[rank]), 2)[1 - rank][1] for rank in range(2)]  # of the other one
    assert [call.in_place for call in last] == [False, True]


# Planted bugs. Each is one change of the source, and each must be caught by a scenario in which all is right with the
# source itself.


def scenario(name: str) -> Scenario:
    mixed = [Call(algorithm, "float32", 150) for algorithm in ALGORITHMS]
    unmixed = [Call(algorithm, "float32", 50) for algorithm in ALGORITHMS for _ in range(4)]
    same = 3 * [Call("one_shot", "float32", 150)]
    return {
        "repeated": Scenario(3, 3 * mixed),
        "one rank slow": Scenario(2, unmixed, slow=1),
        "specials": Scenario(2, [Call(a, "float16", 300, "specials") for a in ALGORITHMS]),
        "rounding": Scenario(4, [Call(a, "bfloat16", 150) for a in ALGORITHMS]),
        "torn": Scenario(3, 3 * mixed, jitter=1.0),
        "absent": Scenario(3, mixed, absent=1, deadline=100),
        "absent, one rank hasty": Scenario(3, mixed, absent=1, deadline=100, hasty=0),
        "late at first": Scenario(2, same, late=1, deadline=100, grace=100_000),
        "late at first, 8 ranks": Scenario(8, same[:1], late=7, looked=100, behind=5, deadline=100, grace=100_000),
        "gone after the first": Scenario(2, same, leaves=1, deadline=100, grace=0),
        "differing": Scenario(2, [Call("one_shot", "float16", 40)], differs=[1, {"dtype": "bfloat16"}]),
        "first half last": Scenario(3, same, halved=[1, 0]),
        "second half last": Scenario(3, same, halved=[1, 1]),
        "busy": Scenario(2, same, busy=1),
        "stopped midway": Scenario(2, [Call("one_shot", "float32", 150)], stopped=0, deadline=300),
    }[name]


def all_report(kind: type, culprit: int, ranks: Sequence[int]):
    def judge(outcome: legacy_ranks.Outcome) -> bool:
        if not all(outcome.reports[rank][0] for rank in ranks):
            return False
        errors = [explained(outcome, rank) for rank in ranks]
        return all(type(error) is kind and culprit in error.ranks for error in errors)

    return judge


RIGHT = {
    "absent": all_report(PeerTimeoutError, 1, [0, 2]),
    "absent, one rank hasty": all_report(PeerTimeoutError, 1, [0, 2]),
    "gone after the first": all_report(PeerTimeoutError, 1, [0]),
    "differing": all_report(CallMismatchError, 1, [0, 1]),
    "busy": all_report(ConcurrentUseError, 1, [0, 1]),
    "stopped midway": all_report(PoisonedError, 0, [0]),
}

BUGS = {
    "read data is not poisoned": (
        "repeated",
        "tl.store(pointers, tl.full([BLOCK], -1, WORD), mask=source != rank)",
        "tl.store(pointers, tl.full([BLOCK], -1, WORD), mask=rank < 0)",
    ),
    "one parity": ("one rank slow", "parity * WORLD + rank", "rank"),
    "the epoch is not flipped": ("one rank slow", "parity ^ 1)", "parity)"),
    "a payload may look like the sentinel": ("specials", "tl.where(bits == -1, -2, bits)", "bits"),
    "negative numbers are remapped too": ("specials", "tl.where(bits == -1, -2, bits)", "tl.where(bits < -512, -2, bits)"),
    "ranks are summed downwards": ("repeated", "blocks[source].to(DTYPE", "blocks[WORLD - source].to(DTYPE"),
    "the sum begins with zero": (
        "specials",
        "blocks[0].to(DTYPE, bitcast=True).to(tl.float32)",
        "blocks[0].to(DTYPE, bitcast=True).to(tl.float32) + 0.0",
    ),
    "every addition is rounded": (
        "rounding",
        "    return encode(total.to(DTYPE)",
        "        total = total.to(DTYPE).to(tl.float32)\n    return encode(total.to(DTYPE)",
    ),
    "the tail is one too long": ("repeated", "offsets < numel", "offsets <= numel"),
    "the tail is one too short": ("repeated", "offsets < numel", "offsets < numel - 1"),
    "any element counts as all": ("torn", "tl.max(4 * late + stop)", "tl.min(4 * late + stop)"),
    "zeros are not sent": ("repeated", "bits, mask=stop == 0", "bits, mask=(stop == 0) & (bits != 0)"),
    "both phases use the same slots": ("one rank slow", "gather = 2 + parity", "gather = parity"),
    "the own addend is forgotten": ("repeated", "other=mine", "other=0"),
    "the deadline is never checked": ("absent", "polls % CHECK_EVERY == 0", "polls < 0"),
    "peers are not told": ("absent, one rank hasty", "if before == 0:", "if before < 0:"),
    "nobody hears of it": ("absent, one rank hasty", "stop | stopped(staging) |", "stop |"),
    "no grace": ("late at first", "tl.where(handshaken != 0, _DEADLINE, _GRACE)", "_DEADLINE"),
    "grace without end": ("gone after the first", "tl.where(handshaken != 0, _DEADLINE, _GRACE)", "_GRACE"),
    "no shape is handshaken": (
        "gone after the first",
        "HANDSHAKEN + shape_id, tl.int32), 1",
        "HANDSHAKEN + shape_id, tl.int32), 0",
    ),
    "signatures are not compared": (
        "differing",
        "differ = (low != first) | (((high ^ second) & ~_IN_PLACE) != 0)",
        "differ = threads < 0",
    ),
    "one parity of signatures": ("one rank slow", "(sequence & 1) * _RANKS", "(sequence & 0) * _RANKS"),
    "the clock does not start again at the handshake": (
        "late at first",
        "(began == 0) | (handshaken != handshaken_before)",
        "began == 0",
    ),
    "the dtype is not signed": ("differing", "number | tag |", "number |"),
    "the first half of a signature is believed before it came": ("first half last", "low >> 32 != first >> 32", "low < 0"),
    "the second half of a signature is believed before it came": (
        "second half last",
        "(high >> 32 != first >> 32)",
        "(high < 0)",
    ),
    "calls are not counted": ("repeated", "tl.int32)) + 1  # from 1", "tl.int32)) + 0  # from 1"),
    "calls in flight are not looked at": ("busy", "in_flight > 0, _CONCURRENT", "in_flight > 9, _CONCURRENT"),
    "a look goes astray": (
        "repeated",
        "_load_signatures(staging + parity, sources, others, first, second, stop)\n    polls",
        "_load_signatures(staging - parity, sources, others, first, second, stop)\n    polls",
    ),
    "blocks begin before their slots": (
        "repeated",
        "(channel * BLOCK + tl.arange(0, BLOCK))\n    return tl.multiple_of(tl.max",
        "(channel * BLOCK - tl.arange(0, BLOCK))\n    return tl.multiple_of(tl.max",
    ),
    "the first look is for one rank's signature alone": (
        "late at first, 8 ranks",
        "sources, others, first, second, stop)\n    polls",
        "others, sources, first, second, stop)\n    polls",
    ),
    "the code is stored before the rest of the report": (
        "differing",
        "tl.store(words + _TAG, tag)",
        "tl.store(words, code)\n        tl.store(words + _TAG, tag)",
    ),
    "nobody leaves": ("repeated", "-1, sem=", "0, sem="),
    "who finds itself stopped says nothing": ("stopped midway", "if verdict > 1:", "if verdict > 3:"),
}


SCENARIOS = sorted({name for name, _, _ in BUGS.values()})


@pytest.mark.long
@pytest.mark.parametrize("name", SCENARIOS if os.environ.get("LONG") else [name for name in SCENARIOS if "8 ranks" not in name])
def test_the_source_itself_passes_where_bugs_are_planted(stage, name):
    assert fails(stage.run(scenario(name)), name) is None


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS if os.environ.get("LONG") else list(BUGS)[::6])  # each starts processes anew
def test_planted_bug_is_caught(stage, tmp_path, bug):
    name, correct, wrong = BUGS[bug]
    mutant = shutil.copytree(legacy_ranks.source(), tmp_path / "mutant", ignore=shutil.ignore_patterns("__pycache__"))
    wronged = [path for path in mutant.glob("*.py") if correct in path.read_text()]
    assert wronged
    for path in wronged:
        path.write_text(path.read_text().replace(correct, wrong))
    assert any(catches(stage, name, str(mutant), seed) for seed in range(4))  # a race may need more than one try


def fails(outcome: legacy_ranks.Outcome, name: str) -> object:
    """What is wrong with the outcome of a scenario, or None."""
    if name in RIGHT:
        return None if RIGHT[name](outcome) else (outcome.reports, outcome.aborted)
    return outcome.wrong or None


def catches(stage, name: str, mutant: str, seed: int) -> bool:
    planted = scenario(name)
    planted = dataclasses.replace(planted, source=mutant, seed=seed, deadline=min(planted.deadline, 150))
    try:
        return fails(stage.run(planted, timeout=10 if name in RIGHT else 30), name) is not None
    except TimeoutError:
        return True
    except AssertionError as found:
        if "not theirs" in str(found) or "changed after" in str(found):
            return True
        raise
