"""The legacy kernels' protocol and numbers, on the kernels themselves: see legacy_ranks."""

import dataclasses
import random

import numpy as np
import pytest
import torch

import legacy_ranks
from legacy_ranks import Call, Scenario

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
        for dtype in DTYPES for algorithm in ALGORITHMS for numel in [next(sizes)]
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
    world = rng.choice([2, 3, 4, 5])
    calls = [
        Call(rng.choice(ALGORITHMS), rng.choice(DTYPES), rng.choice([1, 2, 65, 256, 333, 600]),
             rng.choice(["normal", "specials", "bits"]), rng.random() < 0.5, rng.choice([0, 0, 1, 3]))
        for _ in range(12)
    ]
    slow = rng.choice([None, rng.randrange(world)])
    right(stage.run(Scenario(world, calls, seed, jitter=0.2, slow=slow)))


# Waits that end.


@pytest.mark.parametrize("algorithm, world, absent", [
    ("one_shot", 2, 1), ("one_shot", 4, 2), ("two_shot", 2, 0), ("two_shot", 3, 1)])
def test_an_absent_rank_is_named(stage, algorithm, world, absent):
    """All others give up in the first phase, name it, and later calls end at once, push nothing and yield NaN."""
    calls = 4 * [Call(algorithm, "float32", 40)]
    outcome = stage.run(Scenario(world, calls, absent=absent, deadline=150))
    survivors = [rank for rank in range(world) if rank != absent]
    number = {"one_shot": 3, "two_shot": 4}[algorithm]
    assert [outcome.reports[rank] for rank in survivors] == len(survivors) * [[1, absent, number, 1]]
    assert all(outcome.poisoned[rank] and outcome.all_nan[rank] for rank in survivors)
    # One block from each survivor, of the first call's first phase and of no later one.
    assert outcome.pushed[absent] <= len(survivors) * Scenario(world, calls).block_bytes


def test_a_rank_that_dies_between_the_phases_is_named(stage):
    outcome = stage.run(Scenario(3, [Call("two_shot", "float32", 40)], dies=1, deadline=150))
    assert [outcome.reports[rank] for rank in (0, 2)] == 2 * [[1, 1, 4, 2]]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_poisoned_rank_says_nothing_and_believes_nothing(stage, algorithm):
    """It pushes nothing, so its peers give up on it, and yields NaN though all their data is there. No report: the
    host that set the flag knows why."""
    outcome = stage.run(Scenario(2, [Call(algorithm, "float16", 100)], poisoned=0, slow=0, deadline=150))
    assert outcome.all_nan == [True, True]
    assert outcome.reports[0][0] == 0 and outcome.reports[1][:2] == [1, 0]


def test_no_deadline_no_report(stage):
    """A deadline of 0 means none: a rank that is very late is waited for."""
    right(stage.run(Scenario(2, [Call("one_shot", "float32", 200)], slow=1, deadline=0)))


# Planted bugs. Each is one change of the source, and each must be caught by the scenario that the source itself passes.


def scenario(name: str) -> Scenario:
    mixed = [Call(algorithm, "float32", 150) for algorithm in ALGORITHMS]
    unmixed = [Call(algorithm, "float32", 50) for algorithm in ALGORITHMS for _ in range(4)]
    patience = 150
    return {
        "repeated": Scenario(3, 3 * mixed, deadline=patience),
        "one rank slow": Scenario(2, unmixed, slow=1, deadline=patience),
        "specials": Scenario(2, [Call(a, "float16", 300, "specials") for a in ALGORITHMS], deadline=patience),
        "rounding": Scenario(4, [Call(a, "bfloat16", 150) for a in ALGORITHMS], deadline=patience),
        "torn": Scenario(3, 3 * mixed, jitter=1.0, deadline=patience),
        "absent": Scenario(3, mixed, absent=1, deadline=100),
    }[name]


BUGS = {
    "read data is not poisoned": (
        "repeated", "tl.store(pointers, tl.full([BLOCK], -1, WORD), mask=source != rank)",
        "tl.store(pointers, tl.full([BLOCK], -1, WORD), mask=rank < 0)"),
    "one parity": (
        "one rank slow", "parity.to(tl.int64) * WORLD * capacity", "parity.to(tl.int64) * 0"),
    "the epoch is not flipped": ("one rank slow", "parity ^ 1)", "parity)"),
    "a payload may look like the sentinel": ("specials", "tl.where(bits == -1, -2, bits)", "bits"),
    "negative numbers are remapped too": ("specials", "tl.where(bits == -1, -2, bits)",
                                              "tl.where(bits < -512, -2, bits)"),
    "ranks are summed downwards": ("repeated", "blocks[source].to(DTYPE", "blocks[WORLD - source].to(DTYPE"),
    "the sum begins with zero": (
        "specials", "blocks[0].to(DTYPE, bitcast=True).to(tl.float32)",
        "blocks[0].to(DTYPE, bitcast=True).to(tl.float32) + 0.0"),
    "every addition is rounded": (
        "rounding", "    return _encode(total.to(DTYPE)",
        "        total = total.to(DTYPE).to(tl.float32)\n    return _encode(total.to(DTYPE)"),
    "the tail is one too long": ("repeated", "offsets < numel", "offsets <= numel"),
    "the tail is one too short": ("repeated", "offsets < numel", "offsets < numel - 1"),
    "any element counts as all": ("torn", "tl.max(2 * late + stop)", "tl.min(2 * late + stop)"),
    "zeros are not sent": ("repeated", "mask=stop == 0", "mask=(stop == 0) & (bits != 0)"),
    "both phases use the same slots": ("one rank slow", "gather = scatter + 2 * WORLD * capacity", "gather = scatter"),
    "the own addend is forgotten": ("repeated", "other=mine", "other=0"),
    "nobody looks at the clock": ("absent", "looks % _CHECK_EVERY == 0", "looks < 0"),
}


def test_the_source_itself_passes_where_bugs_are_planted(stage):
    for name in sorted({name for name, _, _ in BUGS.values()} - {"absent"}):
        right(stage.run(dataclasses.replace(scenario(name), deadline=20_000)))


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(stage, tmp_path, bug):
    name, correct, wrong = BUGS[bug]
    source = legacy_ranks.source().read_text()
    assert correct in source
    mutant = tmp_path / "legacy.py"
    mutant.write_text(source.replace(correct, wrong))
    assert any(catches(stage, name, str(mutant), seed) for seed in range(4))  # a race may need more than one try


def catches(stage, name: str, mutant: str, seed: int) -> bool:
    planted = dataclasses.replace(scenario(name), source=mutant, seed=seed)
    try:
        return bool(stage.run(planted, timeout=4 if name == "absent" else 30).wrong)
    except TimeoutError:
        return True
