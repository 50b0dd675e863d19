"""All-reduces with a norm through a communicator, on CPU ranks: bits, the forms of a call, when kernels are built, what differs, what is refused."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.fake_engines import MOST_ROWS, fake_gpus, raised, suite

import allreduce_jit
from allreduce_jit.engine import norm_reference, reference
from allreduce_jit.errors import ClosedError, InputError, InputTypeError
from allreduce_jit.harness import ranks
from allreduce_jit.norms import norm_family
from allreduce_jit.policy.operation import ALL_REDUCE, all_reduce
from allreduce_jit.policy.verdict import Path

HIDDEN = 256
SHAPES = [(1, HIDDEN), (3, HIDDEN), (2, 3, HIDDEN), (HIDDEN,), (MOST_ROWS + 1, HIDDEN), (5, 72)]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tensor(seed, rank, shape, dtype):
    return reference.values(seed, rank, torch.Size(shape).numel(), dtype).view(shape)


def same(a, b):
    return a.shape == b.shape and a.dtype is b.dtype and not reference.compare(a.reshape(-1), b.reshape(-1)).wrong


def apart(comm, x, residual, weight, quant=None, **how):
    """What a call has to equal: the all-reduce, then the twin."""
    total = comm.all_reduce(x)
    if quant is None:
        return allreduce_jit.add_rms_norm(total, residual, weight, 1e-5, **how)
    return allreduce_jit.add_rms_norm_fp8(total, residual, weight, 1e-5, scales=quant, **how)


def check_calls(comm, dtypes=DTYPES, shapes=SHAPES):
    for seed, (dtype, shape) in enumerate((d, s) for d in dtypes for s in shapes):
        x, weight = tensor(seed, comm.rank, shape, dtype), tensor(seed, 9, shape[-1:], dtype)
        before, residual = x.clone(), tensor(seed, 8, shape, dtype)
        for rounding in "RUH":
            for other in (residual, None):
                want = apart(comm, x, other, weight, rounding=rounding, weight_bias=1)
                found = comm.all_reduce_add_rms_norm(x, other, weight, 1e-5, rounding=rounding, weight_bias=1)
                assert len(found) == 2 and all(map(same, found, want)), (dtype, shape, rounding)
        assert same(x, before) and same(residual, tensor(seed, 8, shape, dtype))
        want = apart(comm, x, residual, weight.float())
        # In place; into memory that is neither dense nor aligned.
        mine, kept = x.clone(), residual.clone()
        found = comm.all_reduce_add_rms_norm(mine, kept, weight.float(), 1e-5, out=mine, residual_out=kept)
        assert found[0] is mine and found[1] is kept and all(map(same, found, want))
        outs = [torch.zeros((*shape, 2), dtype=dtype)[..., 1] for _ in range(2)]
        found = comm.all_reduce_add_rms_norm(x, residual, weight.float(), 1e-5, out=outs[0], residual_out=outs[1])
        assert found[0] is outs[0] and all(map(same, found, want))
        odd = torch.empty(x.numel() + 1, dtype=dtype)[1:].view(shape).copy_(x)
        assert all(map(same, comm.all_reduce_add_rms_norm(odd, residual, weight.float(), 1e-5), want))
        scale = torch.tensor([0.25])
        for quant in ("static", "token", "group"):
            if quant == "group" and shape[-1] % 128:
                continue
            how = {"scale": scale} if quant == "static" else {}
            for kept in (False, True):
                want = apart(comm, x, residual, weight, quant, with_norm=kept, **how)
                found = comm.all_reduce_add_rms_norm_fp8(x, residual, weight, 1e-5, scales=quant, with_norm=kept, **how)
                assert len(found) == 3 + kept and all(map(same, found, want)), (dtype, shape, quant, kept)
            mine = x.clone()
            found = comm.all_reduce_add_rms_norm_fp8(
                mine, residual, weight, 1e-5, scales=quant, with_norm=True, norm_out=mine, **how
            )
            assert found[3] is mine and all(map(same, found, want))


def over_gloo(place):
    """The norm of what torch.distributed sums, whose bits are its own."""
    with allreduce_jit.init(device="cpu") as comm:
        assert comm.path is Path.TORCH
        check_calls(comm)
        x, residual, weight = (
            tensor(1, comm.rank, (4, HIDDEN), torch.bfloat16),
            tensor(1, 8, (4, HIDDEN), torch.bfloat16),
            torch.ones(HIDDEN),
        )
        total = x.clone()
        dist.all_reduce(total)
        want = norm_reference.normed(
            total, residual, weight, replace(norm_family("bfloat16", HIDDEN).epilogue, eps=1e-6, weight="float32")
        )
        norm, kept = comm.all_reduce_add_rms_norm(x, residual, weight)
        assert same(norm, want.norm) and same(kept, want.residual_out)
        assert comm.describe().operations == ()
        plan = comm.plan_norm(4, norm_family("bfloat16", HIDDEN))
        assert (plan.path, plan.algorithm) == ("torch.distributed", "apart")


def over_legacy(place):
    """The exact sum, then a norm of its own: also where calls are promised to be deterministic."""
    for deterministic in (False, True):
        with (
            fake_gpus(place.control, "a100-pcie-x4") as built,
            allreduce_jit.init(
                place.control, "cpu", deterministic=deterministic, operations=[norm_family("bfloat16", HIDDEN)]
            ) as comm,
        ):
            assert comm.path is Path.LEGACY and built[0].families == list(ALL_REDUCE)
            check_calls(comm, [torch.bfloat16])
            assert built[0].norms == 0 and comm.describe().operations == ()
            assert comm.plan_norm(2, norm_family("bfloat16", HIDDEN)).algorithm == "apart"


def over_v2(place):
    with fake_gpus(place.control) as built, allreduce_jit.init(place.control, "cpu") as comm:
        (engine,) = built
        check_calls(comm)
        assert engine.norms > 100
        described = comm.describe().to_dict()
        assert json.loads(json.dumps(described)) == described
        assert place.gather(described["operations"]) == [described["operations"]] * place.world_size
        assert len(described["operations"]) == len(engine.families) - len(ALL_REDUCE) == len({*map(str, described["operations"])})
        assert {about["path"] for about in described["operations"]} == {"v2"}
        family = norm_family("bfloat16", HIDDEN, weight_bias=1)
        assert [comm.plan_norm(rows, family).algorithm for rows in (0, MOST_ROWS, MOST_ROWS + 1)] == [
            "none",
            "one_shot_norm",
            "apart",
        ]
        norms, sums = engine.norms, engine.sums
        for rows in (MOST_ROWS, MOST_ROWS + 1, 0):
            x = torch.ones(rows, HIDDEN, dtype=torch.bfloat16)
            comm.all_reduce_add_rms_norm(x, x.clone(), x.new_ones(HIDDEN), weight_bias=1)
        assert (engine.norms - norms, engine.sums - sums) == (1, 1)  # fused, apart, and nothing of no rows


def built_when_first_called(place):
    """Once per family, on all ranks together, and not by calls that go apart or have no rows."""
    with fake_gpus(place.control) as built, allreduce_jit.init(place.control, "cpu") as comm:
        (engine,) = built

        def call(rows, hidden=HIDDEN, **how):
            x = torch.ones(rows, hidden)
            return comm.all_reduce_add_rms_norm(x, x.clone(), torch.ones(hidden), **how)

        verified = engine.events.count("verify")
        call(0), call(MOST_ROWS + 1)
        assert engine.events.count("verify") == verified
        call(1), call(2), call(3, eps=1e-3)
        assert engine.events.count("verify") == verified + 1
        call(1, 2 * HIDDEN), call(1, rounding="H")
        assert engine.events.count("verify") == verified + 3
        want = [norm_family("float32", HIDDEN), norm_family("float32", 2 * HIDDEN), norm_family("float32", HIDDEN, "H")]
        assert engine.families == [*ALL_REDUCE, *want]


def asked_for_at_init(place):
    families = [norm_family("bfloat16", HIDDEN), norm_family("bfloat16", HIDDEN, "R", "token")]
    with fake_gpus(place.control) as built, allreduce_jit.init(place.control, "cpu", operations=[*families, families[0]]) as comm:
        (engine,) = built
        assert engine.families == [*ALL_REDUCE, *families] and engine.events.count("verify") == 1
        x = torch.ones(2, HIDDEN, dtype=torch.bfloat16)
        with capturing():
            comm.all_reduce_add_rms_norm(x, x.clone(), x.new_ones(HIDDEN))
        assert engine.norms == 1 and engine.events.count("verify") == 1
        (first, second) = comm.describe().operations
        assert first.to_dict() == {
            "operation": "all_reduce_norm", "dtype": "bfloat16", "hidden": HIDDEN, "rounding": "R", "quantization": "none",
            "residual": True, "weight": "bfloat16", "weight_bias": 0, "norm": True, "path": "v2", "reason": None,
        }  # fmt: skip
        assert (second.quantization, second.norm) == ("token", False)


def asked_for_differently(place):
    family = norm_family("bfloat16", HIDDEN + 8 * (place.rank == 1))
    with fake_gpus(place.control) as built:
        raised(
            InputError, lambda: allreduce_jit.init(place.control, "cpu", operations=[family]), "rank 1 asks for", "264", "alike"
        )
        more = [family] if place.rank else []
        raised(InputError, lambda: allreduce_jit.init(place.control, "cpu", operations=more), "rank 1 asks for", "alike")
        assert not built


def what_cannot_be_asked_for(place):
    family = norm_family("bfloat16", HIDDEN)
    for kind, wrong in (
        (InputTypeError, family),
        (InputTypeError, "bfloat16"),
        (InputTypeError, ["bfloat16"]),
        (InputTypeError, 3),
        (InputError, [all_reduce("bfloat16")]),
        (InputError, [replace(family, operation="norm")]),
        (InputError, [replace(family, shape=(3, HIDDEN))]),
        (InputError, [replace(family, shape=None)]),
    ):
        raised(kind, lambda wrong=wrong: allreduce_jit.init(device="cpu", operations=wrong), "operations", "norm_family")


@contextmanager
def capturing():
    """A communicator believes that its stream is being captured."""
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True):
        yield


def not_in_a_capture(place):
    """What is not built yet is not built then; nothing is exchanged, so ranks can go on."""
    with fake_gpus(place.control) as built, allreduce_jit.init(place.control, "cpu") as comm:
        x = torch.ones(2, HIDDEN)
        comm._norms.device = torch.device("cuda", 0)
        with capturing():
            call = lambda: comm._norms._prepared(replace(norm_family("float32", HIDDEN), shape=(2, HIDDEN)))  # noqa: E731
            raised(
                InputError,
                call,
                f"rank {place.rank}: the kernels of this call are not built yet",
                "init(operations=",
                "once before",
            )
        assert built[0].families == list(ALL_REDUCE)
        comm._norms.device = torch.device("cpu")
        comm.all_reduce_add_rms_norm(x, x.clone(), torch.ones(HIDDEN))
        with capturing():
            comm.all_reduce_add_rms_norm(x, x.clone(), torch.ones(HIDDEN))
        assert built[0].norms == 2


def a_family_that_cannot_be_built(place):
    """In service, and at ``init``: its calls go apart on all ranks, and the rung stays."""
    broken = {("v2", "compile"): RuntimeError("planted")} if place.rank == 1 else {}
    x, family = torch.ones(2, HIDDEN), norm_family("float32", HIDDEN)
    with fake_gpus(place.control) as built, allreduce_jit.init(place.control, "cpu") as comm:
        built[0].fails = broken
        for _ in range(2):
            found = comm.all_reduce_add_rms_norm(x, x.clone(), torch.ones(HIDDEN), 1e-5)
            assert all(map(same, found, apart(comm, x, x, torch.ones(HIDDEN))))
        assert built[0].norms == 0 and built[0].events.count("compile") == 2  # tried once
        (about,) = comm.describe().operations
        assert (about.path, about.reason) == ("apart", "rank 1: RuntimeError: planted")
        assert comm.plan_norm(2, family).algorithm == "apart"

    class Fails(dict):
        """Of families with a norm alone: the first engine, which is built with them."""

        def __contains__(self, key):
            return key in broken and len(engines) == 1

    with (
        fake_gpus(place.control, fails=Fails(broken)) as engines,
        allreduce_jit.init(place.control, "cpu", operations=[family]) as comm,
    ):
        assert comm.path is Path.V2 and [engine.closed for engine in engines] == [1, 0]
        found = comm.all_reduce_add_rms_norm(x, x.clone(), torch.ones(HIDDEN), 1e-5)
        assert all(map(same, found, apart(comm, x, x, torch.ones(HIDDEN)))) and engines[1].norms == 0
        (about,) = comm.describe().operations
        assert (about.path, about.reason) == ("apart", "rank 1: RuntimeError: planted")


def refused(place):
    """On one rank alone: the others are not left waiting, as nothing is exchanged."""
    with fake_gpus(place.control) as built, allreduce_jit.init(place.control, "cpu") as comm:
        x, weight = torch.ones(2, HIDDEN), torch.ones(HIDDEN)
        if place.rank == 1:
            raised(
                InputError,
                lambda: comm.all_reduce_add_rms_norm(x, x, weight, residual_out=x),
                "rank 1",
                "all_reduce_add_rms_norm",
                "overlaps",
            )
            raised(
                InputError, lambda: comm.all_reduce_add_rms_norm_fp8(x, None, weight, scales="tensor"), "rank 1", "_fp8", "scales"
            )
        built[0].fails = {}
        comm.all_reduce_add_rms_norm(x, None, weight)
        assert built[0].norms == 1
        raised(ClosedError, lambda: (comm.close(), comm.all_reduce_add_rms_norm(x, None, weight)), "closed")
        raised(ClosedError, lambda: comm.all_reduce_add_rms_norm_fp8(x, None, weight, scales="token"), "closed")
        raised(ClosedError, lambda: comm.plan_norm(1, norm_family("float32", HIDDEN)), "closed")


CASES = [over_gloo, over_legacy, over_v2, built_when_first_called, asked_for_at_init, asked_for_differently, what_cannot_be_asked_for,
         not_in_a_capture, a_family_that_cannot_be_built, refused]  # fmt: skip


def test_two_ranks():
    assert len(ranks.run(suite, CASES, cpu=2, deadline=200).value) == len(CASES)


def alone(place):
    """One rank: what the twin does."""
    with allreduce_jit.init(device="cpu", deterministic=True, operations=[norm_family("bfloat16", HIDDEN)]) as comm:
        check_calls(comm, [torch.bfloat16])
        with mock.patch.object(comm._torch, "all_reduce", side_effect=AssertionError("nothing to reduce")):
            x = torch.ones(2, HIDDEN)
            comm.all_reduce_add_rms_norm(x, None, torch.ones(HIDDEN))
            comm.all_reduce_add_rms_norm_fp8(x, None, torch.ones(HIDDEN), scales="token")
        assert torch.equal(x, torch.ones(2, HIDDEN))


def test_one_rank():
    ranks.run(alone, cpu=1, deadline=60)


@pytest.mark.parametrize("mistake", ["norm of its own input", "sum in the input"])
def test_the_comparison_finds_planted_mistakes(mistake):
    """What the calls are compared with tells an all-reduce left away, and a sum that spoils the input."""
    with pytest.raises(ranks.RanksFailedError, match="AssertionError"):
        ranks.run(wrong, mistake, cpu=2, deadline=60)


def wrong(place, mistake):
    from allreduce_jit import fused

    real = fused.run_local

    def run(spec, tensors, max_ctas=None):
        if mistake == "sum in the input":
            norms.last.copy_(tensors[0])
        real(spec, (norms.last, *tensors[1:]) if mistake == "norm of its own input" else tensors, max_ctas)

    with allreduce_jit.init(device="cpu") as comm:
        norms = comm._norms
        through = norms._apart

        def remembering(spec, *tensors):
            norms.last = tensors[0]
            through(spec, *tensors)

        norms._apart = remembering
        with mock.patch.object(fused, "run_local", run):
            check_calls(comm, [torch.float32], [(3, HIDDEN)])
