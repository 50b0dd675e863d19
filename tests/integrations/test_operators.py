"""torch.library operators on CPU ranks: their values, what torch's own checks say of them, graphs of every shape, what is refused."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers.fake_engines import fake_gpus, raised, suite
from torch._subclasses import FakeTensorMode

import allreduce_jit
from allreduce_jit.engine import reference
from allreduce_jit.errors import ClosedError, InputError, InputTypeError
from allreduce_jit.harness import ranks
from allreduce_jit.integrations.operators import OPERATORS, register_communicator

HIDDEN, EPS = 256, 1e-5
OPS = torch.ops.allreduce_jit
E4M3 = torch.float8_e4m3fn


def tensor(seed, rank, *shape):
    return reference.values(seed, rank, torch.Size(shape).numel(), torch.bfloat16).view(shape)


def samples(name, rank):
    """operator → calls of it: (positional, by name)."""
    x, residual, weight = tensor(1, rank, 4, HIDDEN), tensor(2, 9, 4, HIDDEN), tensor(3, 9, HIDDEN)
    deep, scale = tensor(4, rank, 2, 3, HIDDEN), torch.tensor([0.25])
    given, bare = (x, residual, weight), (deep, None, weight.float())

    def outs(like, dtype=None):
        return torch.empty_like(like, dtype=dtype), torch.empty_like(like)

    how = {"weight_bias": 1, "rounding": "H"}
    return {
        "all_reduce": [((x, name), {}), ((x.t(), name), {}), ((x[:0], name), {}), ((x.int(), name), {})],
        "all_reduce_": [((x.clone(), name), {}), ((x.clone().t(), name), {})],
        "all_reduce_add_rms_norm": [((*given, EPS, name), {}), ((*bare, EPS, name), how)],
        "all_reduce_add_rms_norm_": [((x.clone(), residual.clone(), weight, EPS, name), how)],
        "all_reduce_add_rms_norm_out": [((*given, EPS, name, *outs(x)), {}), ((*bare, EPS, name, *outs(deep)), how)],
        "all_reduce_add_rms_norm_fp8_static": [((*given, scale, EPS, name), {}), ((*bare, scale, EPS, name), how)],
        "all_reduce_add_rms_norm_fp8": [
            ((*given, EPS, name), {}),
            ((*bare, EPS, name, "token"), how),
            ((*given, EPS, name, "group"), how),
            ((*bare, EPS, name, "group"), {"column_major": True}),
        ],
        "all_reduce_add_rms_norm_fp8_out": [
            ((*given, scale, EPS, name, "static", *outs(x, E4M3)), {}),
            ((*given, None, EPS, name, "token", *outs(x, E4M3), torch.empty(4, 1), torch.empty_like(x)), how),
        ],
    }


def checked_by_torch(place):
    """``opcheck``: schema against what is mutated, fake tensors against real ones, graphs with fixed and with any shapes."""
    with allreduce_jit.init(device="cpu") as comm:
        name = register_communicator(comm)
        calls = samples(name, place.rank)
        assert calls.keys() == OPERATORS.keys()
        for operator, them in calls.items():
            op = getattr(OPS, operator).default
            # What compares tensors there for the schema's check knows no e4m3.
            checks = ["test_autograd_registration", "test_faketensor", "test_aot_dispatch_static", "test_aot_dispatch_dynamic"]
            checks += [] if "fp8" in operator else ["test_schema"]
            for given, how in them:
                done = torch.library.opcheck(op, given, how, test_utils=checks)
                assert set(done.values()) == {"SUCCESS"} and len(done) == len(checks), (operator, done)


def same(found, want):
    return len(found) == len(want) and all(
        a.dtype is b.dtype and a.shape == b.shape and a.stride() == b.stride() and torch.equal(a.float(), b.float())
        for a, b in zip(found, want)
    )


def values(place):
    """What the methods of the communicator return; over engines that take calls with a norm, too."""
    with fake_gpus(place.control) as built, allreduce_jit.init(place.control, "cpu") as comm:
        name = register_communicator(comm, "tp:0")
        assert name == "tp:0" and register_communicator(comm, "tp:0") == name
        norm = comm.all_reduce_add_rms_norm
        fp8 = comm.all_reduce_add_rms_norm_fp8
        calls = samples(name, place.rank)
        for (x, _), _ in calls["all_reduce"]:
            assert same([OPS.all_reduce(x, name)], [comm.all_reduce(x)])
        for (x, _), _ in calls["all_reduce_"]:
            want = comm.all_reduce(x)
            assert OPS.all_reduce_(x, name) is None and torch.equal(x, want)
        for (x, residual, weight, eps, _), how in calls["all_reduce_add_rms_norm"]:
            assert same(OPS.all_reduce_add_rms_norm(x, residual, weight, eps, name, **how), norm(x, residual, weight, eps, **how))
        for (x, residual, weight, eps, _), how in calls["all_reduce_add_rms_norm_"]:
            want = norm(x, residual, weight, eps, **how)
            assert OPS.all_reduce_add_rms_norm_(x, residual, weight, eps, name, **how) is None and same((x, residual), want)
        for (*given, eps, _, out, total), how in calls["all_reduce_add_rms_norm_out"]:
            OPS.all_reduce_add_rms_norm_out(*given, eps, name, out, total, **how)
            assert same((out, total), norm(*given, eps, **how))
        for (*given, scale, eps, _), how in calls["all_reduce_add_rms_norm_fp8_static"]:
            found = OPS.all_reduce_add_rms_norm_fp8_static(*given, scale, eps, name, **how)
            assert same(found, fp8(*given, eps, scale=scale, **how)[::2])
        for (x, residual, weight, eps, _, *scales), how in calls["all_reduce_add_rms_norm_fp8"]:
            found = OPS.all_reduce_add_rms_norm_fp8(x, residual, weight, eps, name, *scales, **how)
            assert same(found, fp8(x, residual, weight, eps, scales=(scales or ["token"])[0], **how))
        for (x, residual, weight, scale, eps, _, scales, *outs), how in calls["all_reduce_add_rms_norm_fp8_out"]:
            OPS.all_reduce_add_rms_norm_fp8_out(x, residual, weight, scale, eps, name, scales, *outs, **how)
            want = fp8(x, residual, weight, eps, scale=scale, scales=scales, with_norm=len(outs) > 2, **how)
            out, total, *others = outs
            assert same([out, total, *others], [want[0], want[2], *([want[1], want[3]] if others else [])])
        assert built[0].norms > 0


def layer(x, residual, weight, name):
    y = OPS.all_reduce(x * 2, name)
    norm, total = OPS.all_reduce_add_rms_norm(y, residual, weight, EPS, name)
    z = norm + 1
    OPS.all_reduce_(z, name)
    kept = z.clone()
    OPS.all_reduce_add_rms_norm_(z, total, weight, EPS, name)
    quantized, scales, last = OPS.all_reduce_add_rms_norm_fp8(z, total, weight, EPS, name, "group", column_major=True)
    return z, kept, total, quantized.float(), scales + 1, last


def graphs(place, backend):
    """One graph for all numbers of rows, and nothing in it is address 0: kernels refuse such tensors."""
    with fake_gpus(place.control), allreduce_jit.init(place.control, "cpu") as comm:
        name = register_communicator(comm)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
        for seed, rows in enumerate((4, 7, 3)):
            given = tensor(seed, place.rank, rows, HIDDEN), tensor(seed, 9, rows, HIDDEN), tensor(seed, 8, HIDDEN)
            mine = [one.clone() for one in given]
            assert same(compiled(*mine, name), layer(*given, name)) and same(mine, given), rows
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def graphs_of_aot(place):
    graphs(place, "aot_eager")


def graphs_of_inductor(place):
    graphs(place, "inductor")


def refusals(place):
    x = torch.ones(4, HIDDEN)
    comm = allreduce_jit.init(device="cpu")
    name = register_communicator(comm)
    assert name == "comm0"
    with allreduce_jit.init(device="cpu") as other:
        assert register_communicator(other) == "comm1"
        raised(InputError, lambda: register_communicator(other, "comm0"), f"rank {place.rank}", "another communicator")
        raised(InputError, lambda: register_communicator(other, ""), "some letters")
        raised(InputTypeError, lambda: register_communicator(other, 3), "string")
    raised(InputTypeError, lambda: register_communicator("comm0"), "str")
    raised(ClosedError, lambda: register_communicator(other))
    raised(ClosedError, lambda: OPS.all_reduce(x, "comm1"), "closed")
    raised(InputError, lambda: OPS.all_reduce(x, "tp"), "'tp'", "comm0", "register_communicator")
    raised(InputError, lambda: OPS.all_reduce(x.to_sparse(), name), "to_dense")
    raised(InputError, lambda: OPS.all_reduce_add_rms_norm(x, x[:1], x[0], EPS, name), "residual")
    raised(InputError, lambda: OPS.all_reduce_add_rms_norm_fp8(x, x, x[0], EPS, name, "static"), "_fp8_static")
    # Without a derivative, as the communicator's own method; in graphs it is told when they are traced.
    weight = torch.ones(HIDDEN, requires_grad=True)
    for call in (
        lambda t: OPS.all_reduce(t * 1, name),
        lambda t: OPS.all_reduce_(t * 1, name),
        lambda t: OPS.all_reduce_add_rms_norm(x, x, t, EPS, name),
    ):
        raised(InputError, lambda call=call: call(weight), "requires grad")
        for how in ({"fullgraph": True}, {}):
            torch._dynamo.reset()
            compiled = torch.compile(call, backend="aot_eager", **how)
            raised(RuntimeError, lambda compiled=compiled: compiled(weight), "requires grad and operators")
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(call, backend="aot_eager", fullgraph=True)(weight)
            call(weight)
    # Autograd hears of what was overwritten.
    kept = weight.exp()
    with torch.no_grad():
        OPS.all_reduce_(kept, name)
    raised(RuntimeError, lambda: kept.sum().backward(), "modified by an inplace operation")
    # Tensors without memory never come to a kernel.
    with FakeTensorMode():
        assert OPS.all_reduce(torch.ones(3, 5).t(), "nobody").stride() == (3, 1)
    assert OPS.all_reduce(torch.ones(3, device="meta"), "nobody").is_meta
    with torch.inference_mode():
        y = torch.ones(5)
        OPS.all_reduce_(y, name)
        assert y.tolist() == [place.world_size] * 5
    # Names hold nothing, and are free again.
    comm.close()
    raised(ClosedError, lambda: OPS.all_reduce(x, name))
    with allreduce_jit.init(device="cpu") as again:
        assert register_communicator(again) == "comm0"
        del comm
        gc.collect()
        assert OPS.all_reduce(x, "comm0")[0, 0] == place.world_size


@pytest.mark.parametrize("n", [1, 2])
def test_operators(n):
    cases = [checked_by_torch, refusals]
    assert ranks.run(suite, cases, cpu=n, deadline=300).value == [case.__name__ for case in cases]


def test_values_and_graphs():
    cases = [values, graphs_of_aot]
    assert ranks.run(suite, cases, cpu=2, deadline=300).value == [case.__name__ for case in cases]


@pytest.mark.programs
def test_graphs_of_inductor():
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        pytest.skip("needs a C++ compiler, as inductor does on the CPU")
    ranks.run(suite, [graphs_of_inductor], cpu=2, deadline=400)
