"""The kernels of path host with 2 to 8 virtual ranks on one GPU, through pinned host memory, every bit."""

import random
from dataclasses import replace

import pytest
import torch

from allreduce_jit.abi import Control, Header
from allreduce_jit.engine import reference
from allreduce_jit.engine.failure import Kind, abort_code, tag
from allreduce_jit.engine.memory import LocalState
from allreduce_jit.policy import host
from allreduce_jit.policy.catalogue import HOST_ALGORITHMS, host_algorithms, host_module
from allreduce_jit.policy.operation import all_reduce
from allreduce_jit.policy.plan import HEADER_BYTES, WARP, Layout, Region

pytestmark = pytest.mark.gpus(1)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
COUNTS = [at // 4 for at in LocalState.COUNTS_AT]  # words of Control
SEQUENCE, _, ENTERED = COUNTS
BLOCK = 64


def make_world(world_size):
    from virtual import VirtualWorld

    class HostWorld(VirtualWorld):
        """Outboxes in pinned memory, of every algorithm, the stream included whatever the world size."""

        EMPTY = 0

        def _algorithms(self, staging_bytes):
            regions, offset, first = {}, HEADER_BYTES, 0
            names = list(dict.fromkeys([*host_algorithms(world_size), "host_stream"]))
            for name in names:
                regions[name] = Region(offset, HOST_ALGORITHMS[name].slots(world_size), 256, first)
                offset, first = offset + 256 * host.channel_bytes(name, world_size), first + 256
            return Layout(regions, offset, first), [host_module(name, world_size, virtual_ranks=True) for name in names]

        def _memory(self, words):
            return torch.zeros(words, dtype=torch.int32).pin_memory()

        def _launches(self, plan, spec):
            return host.launches(plan, spec)

        def silence(self, rank):
            """As if ``rank`` had died."""
            self.local[rank][Control.abort.offset // 4] = abort_code(Kind.ABORTED, rank, rank)
            self.staging[rank][Header.abort.offset // 4] = abort_code(Kind.ABORTED, rank, rank)

    world = HostWorld(world_size)
    world.set_deadlines(20)
    return world


@pytest.fixture(scope="module", params=range(2, 9))
def world(request):
    torch.zeros(1, device="cuda")  # makes the context current
    return make_world(request.param)


def plan_of(world, algorithm, numel, dtype, block=BLOCK, channels=256):
    """A plan whose blocks are resident for all ranks at once, guards included."""
    most = (world.sm_count - 1) * block // WARP
    spec = all_reduce(str(dtype).removeprefix("torch."), numel)
    return host.plan_of(algorithm, block, max(block // WARP, min(channels, most)), spec, world.world_size, world.layout)


def check(world, algorithm, numel, dtype, seed, *, kind=reference.RANDOM, offset=0, in_place=False, block=BLOCK, channels=256):
    n, inputs = world.world_size, []
    for rank in range(n):
        storage = torch.empty(numel + offset, dtype=dtype, device="cuda")
        reference.poison(storage)
        inputs.append(storage[offset:].copy_(reference.values(seed, rank, numel, dtype, "cuda", kind=kind)))
    want = reference.ordered_sum(inputs)
    outs = inputs if in_place else [torch.empty_like(x) for x in inputs]
    if not in_place:
        for out in outs:
            reference.poison(out)
    world.all_reduce(plan_of(world, algorithm, numel, dtype, block, channels), inputs, outs)
    for rank, out in enumerate(outs):
        difference = reference.compare(out, want)
        assert not difference.wrong, f"{algorithm} {numel} {dtype} rank {rank} of {n}: {difference}"
    assert not world.report.any()
    assert all(len(set(local[COUNTS].tolist())) == 1 for local in world.local), "in flight after the call"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes(world, dtype):
    for algorithm in world.layout.regions:
        for seed, numel in enumerate([1, 2, 3, 7, 8, 9, 247, 248, 249, 503, 505, 4095, 65536, 99_991, (1 << 20) + 5]):
            check(world, algorithm, numel, dtype, seed)
            check(world, algorithm, numel, dtype, seed, in_place=True, offset=1, channels=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values(world, dtype):
    for algorithm in world.layout.regions:
        for numel in (10_000, 300_001):
            check(world, algorithm, numel, dtype, 5, kind=reference.SPECIALS)


def test_mixed_calls(world):
    """Sizes, dtypes, algorithms and grids back to back: the counts of the channels must never mix."""
    dice = random.Random(world.world_size)
    for seed in range(150):
        algorithm, dtype = dice.choice(list(world.layout.regions)), dice.choice(DTYPES)
        numel, block = int(2 ** dice.uniform(0, 17)), dice.choice([32, 64, 128])
        check(world, algorithm, numel, dtype, seed, offset=dice.randint(0, 3), block=block, channels=dice.choice([4, 32, 256]))


def call(world, algorithm, numel=20_000, dtype=torch.bfloat16, **how):
    inputs = [reference.values(0, rank, numel, dtype, "cuda") for rank in range(world.world_size)]
    outs = [torch.zeros_like(x) for x in inputs]
    world.all_reduce(plan_of(world, algorithm, numel, dtype), inputs, outs, **how)
    return outs


def codes(world):
    """(kind, culprit) as every rank reports it."""
    return [(code & 0xFF, code >> 8 & 0xFF) for code in world.report[:, 0].tolist()]


def test_missing_rank_ends_the_wait_and_is_named(world):
    last = world.world_size - 1
    for algorithm in world.layout.regions:
        broken = make_world(world.world_size)
        broken.set_deadlines(0.2)
        broken.silence(last)
        for out in call(broken, algorithm)[:last]:
            assert bool(out.isnan().any())
        assert codes(broken)[:last] == [(Kind.TIMEOUT, last)] * last
        # A stopped rank ends at once and stores nothing more: the late one must not read two calls mixed.
        before = [staging[HEADER_BYTES // 4 :].clone() for staging in broken.staging]
        for name in broken.layout.regions:
            assert all(bool(out.isnan().all()) for out in call(broken, name))
        assert all(torch.equal(was, staging[HEADER_BYTES // 4 :]) for was, staging in zip(before, broken.staging))


def test_different_signatures_stop_everybody(world):
    last = world.world_size - 1
    fresh = make_world(world.world_size)
    fresh.set_deadlines(5)
    call(fresh, "host_one_shot")
    assert not fresh.report.any()
    call(fresh, "host_one_shot", tags={last: tag("host_one_shot", "float16")})
    assert all(kind == Kind.MISMATCH for kind, _ in codes(fresh)), codes(fresh)
    assert all(last in (code >> 8 & 0xFF, code >> 16 & 0xFF) for code in fresh.report[:, 0].tolist())


def test_two_calls_in_flight_are_noticed(world):
    """As if an earlier call of rank 0 had begun, and not been signed yet."""
    fresh = make_world(world.world_size)
    fresh.set_deadlines(5)
    for local in fresh.local:
        local[COUNTS] = 5
    fresh.local[0][[ENTERED]] += 1
    call(fresh, "host_one_shot")
    assert codes(fresh)[0] == (Kind.CONCURRENT, 0)


def test_a_slot_too_few_is_found():
    """A planted mistake: outboxes of two algorithms overlap."""
    torch.zeros(1, device="cuda")
    world = make_world(3)
    world.set_deadlines(0.5)
    regions = {name: replace(region, offset=HEADER_BYTES) for name, region in world.layout.regions.items()}
    world.layout = replace(world.layout, regions=regions)
    with pytest.raises(AssertionError):
        for seed in range(20):
            for algorithm in world.layout.regions:
                check(world, algorithm, 30_000 + seed, torch.bfloat16, seed)
