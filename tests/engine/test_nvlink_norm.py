"""V2's calls with a norm without a GPU: what their launches are told, which kernels a family has, and that verification finds what is wrong."""

from __future__ import annotations

import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from helpers.fake_launch import FakeLaunch

from allreduce_jit.engine import norm_reference, nvlink_norm, reference, verify_norm
from allreduce_jit.engine.base import EngineConfig
from allreduce_jit.engine.nvlink import NvlinkEngine
from allreduce_jit.errors import SetupError
from allreduce_jit.norms import norm_family
from allreduce_jit.policy.norm import QUANTS, read_signed, signed
from allreduce_jit.policy.norm_forms import NORM_ALGORITHMS
from allreduce_jit.policy.nvlink_norm import APART
from allreduce_jit.policy.operation import all_reduce
from allreduce_jit.settings import Settings

ADDRESSES = {"input": 1 << 40, "output": 2 << 40, "residual": 3 << 40, "weight": 4 << 40, "residual_out": 5 << 40, "scale": 6 << 40, "norm": 7 << 40}  # fmt: skip


def make(world_size=2, device="cuda:1", arch="sm_90", max_ctas=None, staging_mb=4):
    config = EngineConfig(1, world_size, torch.device(device), arch, True, True, Settings(staging_mb=staging_mb), max_ctas)
    one = NvlinkEngine(config)
    one.state = SimpleNamespace(channels=1 << 30, control=13, report=14, words=[0] * 16)
    one.memory = SimpleNamespace(addresses=[1000 * (rank + 1) for rank in range(world_size)])
    return one


def ready(one, family):
    """With the kernels of ``family``, by their names."""
    for spec in one._modules([family]):
        for name in spec.entries:
            one._register(spec, name, None, name)
    one.families.append(family)


@pytest.fixture
def fired(monkeypatch):
    monkeypatch.setattr(nvlink_norm, "KernelLaunch", FakeLaunch)
    FakeLaunch.fired = []
    return FakeLaunch.fired


def spec_of(rows, family, **more):
    return replace(family, shape=(rows, family.hidden), epilogue=replace(family.epilogue, **more))


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 4096), (3, 3584), (700, 4096), (1500, 2944)])
def test_kernels_are_given_their_rows(fired, world_size, quant, rows, hidden):
    one, family = make(world_size), norm_family("bfloat16", hidden, "U", quant, weight="float32", with_norm=True)
    ready(one, family)
    strides = (1, rows) if quant == "group" else (0, 0)
    spec = spec_of(rows, family, eps=1e-5, scale_strides=strides)
    assert one.takes(spec)
    plan = one.plan(spec)
    one.prepared(spec).bind([ADDRESSES[pointer.name] for pointer in spec.pointers], 7)
    region, done = one.layout.regions[NORM_ALGORITHMS[plan.algorithm].region], 0
    assert rows < 700 or len(fired) > 1
    for i, launch in enumerate(fired):
        (args,) = launch.arguments
        call, row = args.call, {"none": 2, "static": 1}.get(quant, 1) * hidden
        assert (call.input, args.residual, args.residual_out) == tuple(
            ADDRESSES[name] + done * 2 * hidden for name in ("input", "residual", "residual_out")
        )
        assert (call.output, args.weight) == (ADDRESSES["output"] + done * row, ADDRESSES["weight"])
        step = {"none": None, "static": 0, "token": 4, "group": 4}[quant]
        assert args.scale == (0 if step is None else ADDRESSES["scale"] + done * step)
        assert args.norm == (0 if quant == "none" else ADDRESSES["norm"] + done * 2 * hidden)
        assert (args.scale_row, args.scale_group) == (1, rows if quant == "group" else 0)
        assert struct.pack("<f", args.eps) == struct.pack("<f", 1e-5)
        assert args.parameters == signed(spec.epilogue, hidden)
        assert (call.slots, call.capacity, call.rank, call.own, call.total) == (
            region.offset,
            region.capacity,
            1,
            2000,
            rows * hidden,
        )
        assert (call.channels, call.launch, call.last) == ((1 << 30) + 8 * region.first_channel, i, 1)
        assert call.tag & 0xFF == NORM_ALGORITHMS[plan.algorithm].number
        assert launch.kernel.startswith(f"{plan.algorithm}_k{plan.form.packets}_c{plan.form.cluster}_{hidden}_bf16_u")
        assert (launch.grid, launch.block, launch.pdl) == ((call.numel // hidden + 1) * plan.form.cluster, plan.block, True)
        done += call.numel // hidden
    assert done == rows


def test_absent_tensors_are_null(fired):
    one, family = make(), norm_family("float16", 256, residual=False)
    ready(one, family)
    spec = spec_of(2, family)
    one.prepared(spec).bind([ADDRESSES[pointer.name] for pointer in spec.pointers], 7)
    (args,) = fired[0].arguments
    assert (args.residual, args.norm, args.scale) == (0, 0, 0) and args.residual_out == ADDRESSES["residual_out"]


def test_scales_may_lie_anywhere(fired):
    """The tensors begin at whole packets; scales are read and written by the word, and have the same kernels."""
    one, family = make(), norm_family("bfloat16", 256, "R", "static")
    ready(one, family)
    spec = spec_of(2, family)
    addresses = [ADDRESSES[pointer.name] + 4 * (pointer.name == "scale") for pointer in spec.pointers]
    one.prepared(spec).bind(addresses, 7)
    assert fired[0].arguments[0].scale == ADDRESSES["scale"] + 4


def test_only_families_that_are_built_are_taken(fired):
    one, family = make(), norm_family("bfloat16", 4096)
    assert not one.takes(spec_of(1, family))
    ready(one, family)
    assert one.takes(spec_of(1, family)) and one.takes(spec_of(5000, family, eps=1e-3))
    assert not one.takes(spec_of(1, norm_family("bfloat16", 4104)))
    assert not one.takes(spec_of(1, norm_family("bfloat16", 4096, "H")))
    few = make(max_ctas=4)
    ready(few, family)
    assert few.takes(spec_of(24, family)) and not few.takes(spec_of(25, family))  # 3 rows a launch, 8 launches
    assert few.plan(spec_of(25, family)).algorithm == APART


def test_clusters_where_the_gpu_has_them():
    family = norm_family("bfloat16", 8192)
    for arch, max_ctas, found in (("sm_90", None, {1, 8}), ("sm_80", None, {1}), ("sm_90", 16, {1})):
        assert {plan.form.cluster for plan in make(arch=arch, max_ctas=max_ctas).verification_plans(spec_of(3, family))} == found


def test_what_is_signed_can_be_read():
    family = norm_family("bfloat16", 2944, "H", "group", weight="float32", weight_bias=1, with_norm=True)
    word = signed(replace(family.epilogue, eps=1e-6), 2944)
    assert 0 <= word < 1 << 64
    assert read_signed(word) == {
        "hidden": 2944, "rounding": "H", "eps": 1e-6, "residual": True, "fp32 weight": True, "weight_bias": 1,
        "quantization": "group", "norm kept": True,
    }  # fmt: skip
    changed = [{"eps": 1.1e-6}, {"rounding": "U"}, {"quant": "token"}, {"residual": False}, {"weight": "bfloat16"}, {"weight_bias": 0},
               {"keep_norm": False}]  # fmt: skip
    words = {signed(replace(family.epilogue, **{"eps": 1e-6, **change}), 2944) for change in changed}
    assert len(words | {word, signed(replace(family.epilogue, eps=1e-6), 3072)}) == len(changed) + 2
    assert read_signed((1 << 64) - 1)["rounding"] == "?"  # of another version: no error


# -- verification, with ranks that are summed here


class Ready:
    """In place of ``PreparedCall``."""

    def __init__(self, engine, spec, plan):
        self.engine, self.spec, self.plan = engine, spec, plan
        self.aligned = [(FakeLaunch("any", [], plan.grid, plan.block, cluster=plan.form.cluster),)]

    def __call__(self, *tensors):
        self.engine.computed(self.spec, self.plan, tensors)


class Summed(NvlinkEngine):
    """Runs calls as its kernels should, but for what ``damage`` does to them."""

    damage = staticmethod(lambda plan, spec, tensors: None)

    def prepare(self, spec, plan, shape_id):
        return Ready(self, spec, plan)

    def computed(self, spec, plan, tensors):
        self.ran[plan] = self.ran.get(plan, 0) + 1
        inputs = [verify_norm._input(spec, rank) for rank in range(self.config.world_size)]
        orders = [verify_norm.turned(spec, [x, *tensors[1:]], turn)[0] for x in inputs for turn in range(verify_norm.ROWS)]
        mine = [torch.equal(x.view(torch.int16), tensors[0].view(torch.int16)) for x in orders].index(True)
        self.orders.append(mine % verify_norm.ROWS)
        total = reference.ordered_sum(orders[mine % verify_norm.ROWS :: verify_norm.ROWS])
        norm_reference.run(replace(spec, operation="norm"), [total, *tensors[1:]])
        self.damage(plan, spec, tensors)

    def check(self):
        pass


@pytest.fixture
def summed(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)

    def make(world_size=4, **more):
        one = Summed(EngineConfig(1, world_size, torch.device("cpu"), "sm_90", True, True, Settings(), **more))
        one.ran, one.orders, one.clusters = {}, [], set()
        one._graph_cache = SimpleNamespace(make=lambda launch: one.clusters.add(launch.cluster))
        return one

    return make


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_form_is_verified(summed, world_size, quant):
    one = summed(world_size)
    family = norm_family("bfloat16", 8192, "R", quant, with_norm=True)
    verify_norm.verify_norms(one, family)
    forms = {plan.form for plan in one.ran}
    bands = one._norm_bands(family)
    assert forms == {band.form for band in bands} and len(forms) >= 2
    assert all(times >= 2 * 3 for times in one.ran.values())  # as a kernel and from graphs
    assert one.clusters == {form.cluster for form in forms}  # before they are launched, that of each size
    kernels = [order for order, last in zip(one.orders, [None, *one.orders]) if order != last]
    assert len(kernels) == 2 * len(forms) + 2  # no two runs in a row have the same data, but for repeated calls
    few = summed(world_size, max_ctas=3)
    verify_norm.verify_norms(few, family)
    assert few.ran and all((plan.rows + 1) * plan.form.cluster <= 3 for plan in few.ran)


@pytest.mark.parametrize("which", ["output", "residual_out", "scale", "norm"])
@pytest.mark.parametrize("form", [0, -1])
def test_a_wrong_result_is_found(summed, which, form):
    one = summed()
    family = norm_family("bfloat16", 8192, "U", "token", with_norm=True)
    plans = one.verification_plans(spec_of(verify_norm.ROWS, family))

    def damage(plan, spec, tensors):
        if plan == plans[form]:
            names = [pointer.name for pointer in spec.pointers]
            bits = tensors[names.index(which)][-1:].view(torch.uint8)
            bits[..., 0] ^= 1

    one.damage = damage
    with pytest.raises(SetupError, match=rf"rank 1: {plans[form].algorithm} in blocks .*3x8192 bfloat16: {which}: "):
        verify_norm.verify_norms(one, family)


def test_all_reduces_have_no_part_in_it():
    one = make()
    assert [spec.name for spec in one._modules([all_reduce("bfloat16"), norm_family("bfloat16", 64)])] == [
        "one_shot_ws2",
        "one_shot_norm_k1_c1_64_bf16_r_ws2",
    ]
