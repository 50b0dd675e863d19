"""V2's engine without a GPU: the launches of a call, which flag a shape of call has, and what kernels are given."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from helpers.fake_launch import FakeLaunch

from allreduce_jit.abi import MAX_SHAPES
from allreduce_jit.engine import nvlink as engine_module
from allreduce_jit.engine.base import EngineConfig
from allreduce_jit.engine.nvlink import NvlinkEngine
from allreduce_jit.policy import nvlink
from allreduce_jit.policy.catalogue import NVLINK_ALGORITHMS, entry, nvlink_algorithms
from allreduce_jit.policy.operation import ITEMSIZE, all_reduce
from allreduce_jit.policy.plan import PACKET, Plan
from allreduce_jit.settings import Settings


@pytest.fixture(params=[2, 4])
def engine(request, monkeypatch):
    n = request.param
    monkeypatch.setattr(engine_module, "KernelLaunch", FakeLaunch)
    FakeLaunch.fired = []
    one = NvlinkEngine(EngineConfig(1, n, torch.device("cuda", 1), "sm_90", True, False, Settings(staging_mb=4)))
    one.state = SimpleNamespace(channels=1 << 30, control=13, report=14)
    one.memory = SimpleNamespace(addresses=[1000 * (rank + 1) for rank in range(n)])
    names = [entry(name, dtype, n, whole) for name in nvlink_algorithms(n) for dtype in ITEMSIZE for whole in (True, False)]
    one._kernels = {name: name for name in names}
    return one


def launched(engine, numel, dtype="bfloat16", source=1 << 40, target=1 << 41):
    FakeLaunch.fired = []
    engine.prepared(all_reduce(dtype, numel)).bind((source, target), 7)
    return [flat(one) for one in FakeLaunch.fired]


def flat(fired):
    """What was launched, and the fields of its argument block beside it."""
    (args,) = fired.arguments
    about = {name: getattr(fired, name) for name in ("kernel", "grid", "block", "stream")}
    fields = {name: getattr(args, name) for name, _ in args._fields_ if name != "staging"}
    return SimpleNamespace(**about, **fields)


@pytest.mark.parametrize(("algorithm", "chunk", "numel", "found"), [
    # 8 bf16 elements a packet; a block of 64 threads and the guard's
    ("one_shot", 512, 512, [(0, 512, 2)]),
    ("one_shot", 513, 513, [(0, 513, 3)]),
    ("one_shot", 512, 1025, [(0, 512, 2), (512, 512, 2), (1024, 1, 2)]),
    ("one_shot_wide", 12288, 6145, [(0, 6145, 3)]),
    ("two_shot", 2048, 2056, [(0, 2048, 2), (2048, 8, 2)]),
    ("two_shot_wide2", 4096, 4096, [(0, 4096, 2)]),
    ("two_shot_stream", 2048, 4104, [(0, 2048, 2), (2048, 2048, 1), (4096, 8, 1)]),  # one guard for all of them
])  # fmt: skip
def test_launches(algorithm, chunk, numel, found):
    pieces = nvlink.launches(Plan("v2", algorithm, 0, 64, chunk), all_reduce("bfloat16", numel), 4)
    assert [(piece.start, piece.numel, piece.grid) for piece in pieces] == found


@pytest.mark.parametrize("buffers", [
    [(2, 1), (3, 4)],
    [(2, 4), (0, 1), (3, 4)],
    [(2, 4), (3, 1), (0, 4), (2, 1), (3, 4)],
    [(2, 1), (0, 4), (3, 1), (2, 4), (0, 1), (3, 4)],
])  # fmt: skip
def test_buffers_of_a_stream(buffers):
    spec = all_reduce("bfloat16", 2048 * len(buffers))
    pieces = [dict(piece.arguments) for piece in nvlink.launches(Plan("v2", "two_shot_stream", 0, 64, 2048), spec, 4)]
    assert [(piece["scatter"], piece["gather"]) for piece in pieces] == buffers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("numel", [1, 5000, 1 << 20, (1 << 22) + 3, 1 << 25])
def test_kernels_are_given_their_part(engine, numel, dtype):
    fired, spec = launched(engine, numel, dtype), all_reduce(dtype, numel)
    plan = engine.plan(spec)
    region, itemsize, done = engine.layout.regions[plan.algorithm], ITEMSIZE[dtype], 0
    whole = numel * itemsize % PACKET == 0
    assert {one.kernel for one in fired} == {entry(plan.algorithm, dtype, engine.config.world_size, whole)}
    for one in fired:
        assert (one.input, one.output) == ((1 << 40) + done * itemsize, (1 << 41) + done * itemsize)
        assert (one.slots, one.capacity, one.rank, one.block) == (region.offset, region.capacity, 1, plan.block)
        assert one.own == 2000  # rank 1's
        assert (one.total, one.channels) == (numel, (1 << 30) + 8 * region.first_channel)
        assert (one.stream, one.control, one.report) == (7, 13, 14)
        done += one.numel
    assert done == numel
    pieces = [dict(piece.arguments) for piece in nvlink.launches(plan, spec, engine.config.world_size)]
    assert [{name: getattr(one, name) for name in piece} for one, piece in zip(fired, pieces, strict=True)] == pieces


@pytest.mark.parametrize("numel", [1, 5000, (1 << 23) + 8, 1 << 25])
def test_the_guard_sees_calls_enter_and_leave(engine, numel):
    """What enters with a guard leaves before the next one: else the guard takes two launches for two calls."""
    fired, n = launched(engine, numel), engine.config.world_size
    plan = engine.plan(all_reduce("bfloat16", numel))
    parts, inside = 1 if "one_shot" in plan.algorithm else n, 0
    for one in fired:
        moving = -(-one.numel * 2 // (PACKET * parts * plan.block * NVLINK_ALGORITHMS[plan.algorithm].packets))
        guarded = one.grid - moving
        assert guarded == (not NVLINK_ALGORITHMS[plan.algorithm].stream or one.launch == 0)
        if guarded:
            assert inside == 0
            inside += 1
        inside -= one.last
    assert inside == 0


def test_tensors_off_a_packets_border_take_the_ragged_kernel(engine):
    for source, target in ((2, 0), (0, 8)):
        fired = launched(engine, 1 << 16, source=(1 << 40) + source, target=(1 << 41) + target)
        assert fired and all(one.kernel.endswith("_ragged") for one in fired)
    assert not any(one.kernel.endswith("_ragged") for one in launched(engine, 1 << 16))


def test_explicit_plans_have_the_flag_of_no_shape(engine):
    spec = all_reduce("bfloat16", 999)
    call = engine.prepare(spec, nvlink.plan_of("one_shot", 32, spec, engine.config.world_size, engine.layout), shape_id=0)
    assert {launch.arguments[0].shape_id for launch, *_ in call.unaligned} == {0}
    assert min(one.shape_id for one in launched(engine, 1)) == 1


def test_flags_of_shapes_stay_apart_and_inside_control(engine):
    """More shapes than flags: they are handed out anew, and no two shapes that are remembered share one."""
    live = {}
    for numel in range(1, 3 * MAX_SHAPES):
        (config,) = {one.shape_id for one in launched(engine, numel)}
        assert 1 <= config < MAX_SHAPES
        if len(engine._prepared) < len(live):
            live.clear()
        assert config not in live.values()
        live[numel] = config
        assert len(engine._prepared) == len(live) < MAX_SHAPES
    (again,) = {one.shape_id for one in launched(engine, numel)}
    assert again == live[numel]  # the same shape, the same flag
    other = launched(engine, numel, "float16")[0].shape_id
    assert other not in live.values()
