"""The V2 kernels with 2 to 8 virtual ranks on one GPU, every bit."""

import random
from dataclasses import replace

import pytest
import torch

from allreduce_jit.engine import reference
from allreduce_jit.engine.failure import Kind, tag
from allreduce_jit.engine.memory import LocalState
from allreduce_jit.policy import nvlink
from allreduce_jit.policy.catalogue import NVLINK_ALGORITHMS
from allreduce_jit.policy.operation import all_reduce
from allreduce_jit.policy.plan import WARP

pytestmark = pytest.mark.gpus(1)

RESIDENT_THREADS = 512  # of a multiprocessor, at any world size (__launch_bounds__ in entry.cuh)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COUNTS = [at // 4 for at in LocalState.COUNTS_AT]  # words of Control
SEQUENCE, _, ENTERED = COUNTS


@pytest.fixture(scope="module", params=range(2, 9))
def world(request):
    from virtual import VirtualWorld

    torch.zeros(1, device="cuda")  # makes the context current
    world = VirtualWorld(request.param)
    world.set_deadlines(20)
    return world


def plan_of(world, algorithm, numel, dtype, block=128):
    """A plan whose launches are small enough to be resident for all ranks at once, guards included."""
    name, what, regions = str(dtype).removeprefix("torch."), NVLINK_ALGORITHMS[algorithm], world.layout.regions
    resident = (world.sm_count * RESIDENT_THREADS - block) * what.packets
    unit = WARP * what.packets
    capped = {a: replace(r, capacity=min(r.capacity, resident // unit * unit)) for a, r in regions.items()}
    return nvlink.plan_of(algorithm, block, all_reduce(name, numel), world.world_size, replace(world.layout, regions=capped))


def check(world, algorithm, numel, dtype, seed, *, kind=reference.RANDOM, offset=0, in_place=False, block=128):
    n = world.world_size
    inputs = []
    for rank in range(n):
        storage = torch.empty(numel + offset, dtype=dtype, device="cuda")
        reference.poison(storage)
        inputs.append(storage[offset:].copy_(reference.values(seed, rank, numel, dtype, "cuda", kind=kind)))
    want = reference.ordered_sum(inputs)
    outs = inputs if in_place else [torch.empty_like(x) for x in inputs]
    if not in_place:
        for out in outs:
            reference.poison(out)
    plan = plan_of(world, algorithm, numel, dtype, block)
    world.all_reduce(plan, inputs, outs)
    for rank, out in enumerate(outs):
        difference = reference.compare(out, want)
        assert not difference.wrong, f"{algorithm} {numel} {dtype} rank {rank} of {n}: {difference}"
    assert not world.report.any()
    assert all(len(set(local[COUNTS].tolist())) == 1 for local in world.local), "in flight after the call"
    return -(-numel // plan.chunk)


def each_algorithm(world):
    return list(world.layout.regions)


def least(world, algorithm):
    """Elements from which ``algorithm`` can run: a stream takes two launches."""
    return 2 * WARP * world.world_size * 8 if NVLINK_ALGORITHMS[algorithm].stream else 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(world, dtype):
    for algorithm in each_algorithm(world):
        launches = set()
        for seed, numel in enumerate([1, 2, 3, 7, 8, 9, 255, 256, 257, 4095, 65536, 99_991, 1 << 20, (1 << 22) + 5]):
            if numel < least(world, algorithm):
                continue
            launches.add(check(world, algorithm, numel, dtype, seed))
            check(world, algorithm, numel, dtype, seed, in_place=True, offset=1, block=64)
        assert NVLINK_ALGORITHMS[algorithm].stream or 1 in launches
        assert max(launches) > 1 and all(n % 3 != 1 for n in launches if NVLINK_ALGORITHMS[algorithm].stream)
    assert world.fully_poisoned()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(world, dtype):
    for algorithm in each_algorithm(world):
        for numel in (10_000, 300_000):
            check(world, algorithm, numel, dtype, 5, kind=reference.SPECIALS)
            check(world, algorithm, numel + 1, dtype, 5, kind=reference.SPECIALS)


def test_mixed_calls(world):
    """Sizes, dtypes, algorithms and grids back to back: the epochs of the channels must never mix."""
    dice = random.Random(world.world_size)
    for seed in range(150):
        algorithm, dtype = dice.choice(each_algorithm(world)), dice.choice(DTYPES)
        numel = max(least(world, algorithm), int(2 ** dice.uniform(0, 18)))
        check(world, algorithm, numel, dtype, seed, offset=dice.randint(0, 3), block=dice.choice([32, 96, 256, 512]))
    assert world.fully_poisoned()


@pytest.fixture
def broken(world):
    from virtual import VirtualWorld

    broken = VirtualWorld(world.world_size)
    broken.set_deadlines(0.2)
    return broken


def call(world, algorithm, numel=20_000, dtype=torch.bfloat16, **how):
    inputs = [reference.values(0, rank, numel, dtype, "cuda") for rank in range(world.world_size)]
    outs = [torch.zeros_like(x) for x in inputs]
    world.all_reduce(plan_of(world, algorithm, numel, dtype), inputs, outs, **how)
    return outs


def codes(world):
    """(kind, culprit) as every rank reports it."""
    return [(code & 0xFF, code >> 8 & 0xFF) for code in world.report[:, 0].tolist()]


def test_missing_rank_ends_the_wait_and_is_named(world, broken):
    last = world.world_size - 1
    for algorithm in each_algorithm(world):
        broken.revive()
        broken.silence(last)
        for out in call(broken, algorithm)[:last]:
            assert bool(out.isnan().any())
        assert codes(broken)[:last] == [(Kind.TIMEOUT, last)] * last
        # A stopped rank ends at once and pushes nothing more: the late one must not read two epochs mixed.
        before = broken.staging[last].clone()
        for name in each_algorithm(world):
            assert all(bool(out.isnan().all()) for out in call(broken, name))
        changed = broken.staging[last][before != broken.staging[last]]
        assert bool((changed == -1).all())  # by the late one itself


def test_first_call_of_a_shape_has_more_time(world, broken):
    broken.set_deadlines(0.01, 0.4)
    broken.silence(0)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call(broken, "one_shot")
    end.record()
    end.synchronize()
    assert 390 < start.elapsed_time(end) < 2000
    assert codes(broken)[1:] == [(Kind.TIMEOUT, 0)] * (world.world_size - 1)


def test_different_signatures_stop_everybody(world, broken):
    last = world.world_size - 1
    for algorithm in each_algorithm(world):
        fresh = type(broken)(world.world_size)
        fresh.set_deadlines(5)
        call(fresh, algorithm)
        assert not fresh.report.any()
        call(fresh, algorithm, tags={last: tag(algorithm, "float16")})
        assert all(kind == Kind.MISMATCH for kind, _ in codes(fresh)), codes(fresh)
        # Culprit or the one who found out: the difference is always one with the last rank.
        assert all(last in (code >> 8 & 0xFF, code >> 16 & 0xFF) for code in fresh.report[:, 0].tolist())


def test_two_calls_in_flight_are_noticed(world, broken):
    """As if an earlier call of rank 0 had begun, and not been signed yet; had been signed, and not ended."""
    for words in ([ENTERED], [SEQUENCE, ENTERED]):
        fresh = type(broken)(world.world_size)
        fresh.set_deadlines(5)
        for local in fresh.local:
            local[COUNTS] = 5
        fresh.local[0][words] += 1
        if SEQUENCE in words:  # signed by all
            for local in fresh.local[1:]:
                local[COUNTS] += 1
        call(fresh, "one_shot")
        assert codes(fresh)[0] == (Kind.CONCURRENT, 0)
