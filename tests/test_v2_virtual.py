"""The V2 kernels with 2 to 8 virtual ranks on one GPU, every bit."""

import random
from dataclasses import replace

import pytest
import torch

from allreduce_jit import reference
from allreduce_jit.kernel import ALGORITHMS
from allreduce_jit.plan import WARP, v2_shape

pytestmark = pytest.mark.gpus(1)

RESIDENT_THREADS = 512  # of a multiprocessor, at any world size (__launch_bounds__ in entry.cuh)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(scope="module", params=range(2, 9))
def world(request):
    from virtual import VirtualWorld

    torch.zeros(1, device="cuda")  # makes the context current
    world = VirtualWorld(request.param)
    world.set_deadline(20)
    return world


def plan_of(world, algorithm, numel, dtype):
    """The grid a real plan would take, in launches small enough to be resident for all ranks at once."""
    name, regions = str(dtype).removeprefix("torch."), world.layout.regions
    resident = world.sm_count * RESIDENT_THREADS
    capped = {a: replace(r, capacity=min(r.capacity, resident // WARP * WARP)) for a, r in regions.items()}
    return v2_shape(algorithm, world.world_size, name, numel, world.sm_count, replace(world.layout, regions=capped))


def check(world, algorithm, numel, dtype, seed, *, kind=reference.RANDOM, offset=0, in_place=False):
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
    plan = plan_of(world, algorithm, numel, dtype)
    for start in range(0, numel, plan.chunk):
        piece = slice(start, start + plan.chunk)
        world.all_reduce(algorithm, [x[piece] for x in inputs], [out[piece] for out in outs], plan.grid, plan.block)
    for rank, out in enumerate(outs):
        difference = reference.compare(out, want)
        assert not difference.wrong, f"{algorithm} {numel} {dtype} rank {rank} of {n}: {difference}"
    assert not world.report.any()
    return -(-numel // plan.chunk)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(world, algorithm, dtype):
    launches = set()
    for seed, numel in enumerate([1, 2, 3, 7, 8, 9, 255, 256, 257, 4095, 65536, 99_991, 1 << 20, (1 << 22) + 5]):
        launches.add(check(world, algorithm, numel, dtype, seed))
        check(world, algorithm, numel, dtype, seed, in_place=True, offset=1)
    assert 1 in launches and max(launches) > 1
    assert world.fully_poisoned()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(world, algorithm, dtype):
    for numel in (1000, 300_000):
        check(world, algorithm, numel, dtype, 5, kind=reference.SPECIALS)


def test_mixed_calls(world):
    """Sizes, dtypes, algorithms and grids back to back: the epochs of the channels must never mix."""
    dice = random.Random(world.world_size)
    for seed in range(150):
        algorithm, dtype = dice.choice(ALGORITHMS), dice.choice(DTYPES)
        numel = int(2 ** dice.uniform(0, 18))
        check(world, algorithm, numel, dtype, seed, offset=dice.randint(0, 3))
    assert world.fully_poisoned()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_missing_rank_ends_the_wait_and_is_named(world, algorithm):
    from virtual import VirtualWorld

    broken = VirtualWorld(world.world_size)
    broken.set_deadline(0.2)
    last = world.world_size - 1
    inputs = [reference.values(0, rank, 5000, torch.bfloat16, "cuda") for rank in range(world.world_size)]
    outs = [torch.zeros_like(x) for x in inputs]
    plan = plan_of(broken, algorithm, 5000, torch.bfloat16)
    broken.all_reduce(algorithm, inputs, outs, plan.grid, plan.block, skip=(last,))
    assert broken.report[:last, 0].tolist() == [1] * last
    assert broken.report[:last, 1].tolist() == [last] * last
    assert not broken.report[last].any()
    for out in outs[:last]:
        assert bool(out.isnan().any())
    # A poisoned rank ends at once and pushes nothing more: the late one must not read two epochs mixed.
    before = broken.staging[last].clone()
    for name in ALGORITHMS:
        plan = plan_of(broken, name, 5000, torch.bfloat16)
        broken.all_reduce(name, inputs, outs, plan.grid, plan.block, skip=(last,))
        assert bool(outs[0].isnan().all())
    assert torch.equal(before, broken.staging[last])
