"""What set-up proves of the staging memory: every slot is used, and one that is damaged is found."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from allreduce_jit.engine import verify
from allreduce_jit.engine.base import EngineConfig
from allreduce_jit.engine.nvlink import NvlinkEngine
from allreduce_jit.errors import SetupError
from allreduce_jit.policy.catalogue import NVLINK_ALGORITHMS
from allreduce_jit.policy.nvlink import RESIDENT_PACKETS, launches
from allreduce_jit.policy.operation import all_reduce
from allreduce_jit.policy.plan import PACKET
from allreduce_jit.settings import Settings

WORLDS = range(2, 9)
CPU = torch.device("cpu")


def engine(kind, world_size, staging_mb=32, max_ctas=None):
    settings = replace(Settings(), staging_mb=staging_mb)
    return kind(EngineConfig(1, world_size, CPU, "sm_90", True, True, settings, max_ctas))


@pytest.mark.parametrize("max_ctas", [None, 2, 16])
@pytest.mark.parametrize("staging_mb", [4, 32, 1024])
@pytest.mark.parametrize("world_size", WORLDS)
def test_two_calls_of_each_full_plan_use_every_slot_of_v2(world_size, staging_mb, max_ctas):
    one = engine(NvlinkEngine, world_size, staging_mb, max_ctas)
    plans = list(one.full_plans())
    assert [plan.algorithm for _, plan in plans] == list(one.layout.regions)
    for spec, plan in plans:
        what, region, used = NVLINK_ALGORITHMS[plan.algorithm], one.layout.regions[plan.algorithm], set()
        for turn in range(2):
            for piece in launches(plan, spec, world_size):
                packets = piece.numel * 4 // PACKET // (world_size if what.parts else 1)
                # Of each part: all channels are active, up to the last slot that any launch has.
                assert packets == (min(region.capacity, RESIDENT_PACKETS) if what.stream else region.capacity)
                if what.stream:
                    scatter, gather = (dict(piece.arguments)[name] for name in ("scatter", "gather"))
                    used |= {scatter ^ (turn & scatter >> 1), gather}  # as two_shot.cu has it
                else:
                    used |= {turn, *what.gathers}
        assert used == set(range(what.buffers)), plan
        assert max_ctas is None or plan.grid < max_ctas


@pytest.mark.parametrize("staging_mb", [4, 32])
@pytest.mark.parametrize("world_size", WORLDS)
def test_two_calls_of_each_full_plan_use_every_slot_of_legacy(world_size, staging_mb):
    pytest.importorskip("triton")
    from allreduce_jit.engine.p2p import P2PEngine
    from allreduce_jit.policy.p2p import BLOCK_BYTES, part_of

    one = engine(P2PEngine, world_size, staging_mb)
    plans = list(one.full_plans())
    assert [plan.algorithm for _, plan in plans] == list(one.layout.regions)
    for spec, plan in plans:
        assert plan.chunk == spec.numel  # one launch, and as many programs as there are blocks of slots
        part = part_of(spec.numel, 4, world_size) if plan.algorithm == "legacy_two_shot" else spec.numel
        assert part * 4 == one.layout.regions[plan.algorithm].capacity == plan.grid * BLOCK_BYTES


@pytest.mark.parametrize("max_ctas", [2, 3, 16])
@pytest.mark.parametrize("world_size", WORLDS)
def test_set_up_keeps_to_few_blocks_as_well(world_size, max_ctas):
    one = engine(NvlinkEngine, world_size, 32, max_ctas)
    for numel in (verify.VERIFY_BYTES // 4, verify.VERIFY_BYTES // 4 - 1):
        spec = all_reduce("float32", numel)
        for plan in one.verification_plans(spec):
            for changed in (plan, replace(plan, chunk=numel // verify.LAUNCHES)):
                assert all(piece.grid <= max_ctas for piece in launches(changed, spec, world_size)), plan


def summed(world_size, numel, seed):
    parts = [torch.empty(numel) for _ in range(world_size)]
    for rank, part in enumerate(parts):
        verify._fill(part, rank, seed)
    return parts, sum(parts[1:], parts[0])


@pytest.mark.parametrize("world_size", [2, 5, 8])
def test_the_pattern_tells_places_ranks_and_calls_apart(world_size):
    one = SimpleNamespace(config=SimpleNamespace(rank=1, world_size=world_size))
    numel = 2 * verify.CHUNK + 37
    parts, right = summed(world_size, numel, 1)
    verify._compare(one, right, 1, "a call")
    for seed in (0, 2):
        with pytest.raises(SetupError, match=r"rank 1: a call, 2097189 float32 elements: \d+ wrong"):
            verify._compare(one, right, seed, "a call")
    # Four bytes that stayed away, came from elsewhere, came twice: whatever the place, and whatever the distance.
    dice = torch.Generator().manual_seed(3)
    for distance in (1, 4, 1 << 10, 1 << 18, 1 << 20, verify.CHUNK + 5):
        at = torch.randint(0, numel - distance, (5,), generator=dice)
        assert len(at.unique()) == 5
        for wrong in (
            torch.zeros(5),
            right[at] - parts[-1][at],
            right[at + distance],
            right[at] - parts[0][at] + parts[0][at + distance],
        ):
            damaged = right.clone()
            damaged[at] = wrong
            with pytest.raises(SetupError, match=": 5 wrong"):
                verify._compare(one, damaged, 1, "a call")
    assert not torch.equal(parts[0], parts[1]) and float(torch.stack(parts).abs().max()) < 1 << 20
    assert (torch.stack(parts).double().sum(0) == right.double()).all()  # exact, in any order


@pytest.mark.parametrize("damage", [None, "first", "last"])
def test_a_slot_that_damages_what_passes_is_found(monkeypatch, damage):
    """Calls are summed here, but for what passes through the first or the last slot of some algorithm."""
    one, calls = engine(NvlinkEngine, 4), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(one, "check", lambda: None)

    def run(spec, plan, x, out):
        turn = sum(name == plan.algorithm for name in calls)
        calls.append(plan.algorithm)
        out.copy_(summed(4, x.numel(), turn)[1])
        if damage and plan.algorithm == "two_shot_stream" and turn == 1:
            out[0 if damage == "first" else -1] += 1

    monkeypatch.setattr(one, "run", run)
    if damage is None:
        verify._slots(one)
        assert calls == [name for name in one.layout.regions for _ in range(2)]
    else:
        with pytest.raises(SetupError, match="two_shot_stream through all of its slots.*: 1 wrong"):
            verify._slots(one)
