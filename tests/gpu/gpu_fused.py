"""What each rank does in ``test_gpus.py`` with calls that normalize the sum: every bit against the reference on the CPU."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist

import allreduce_jit
from allreduce_jit.communicator import Communicator
from allreduce_jit.engine import norm_reference, reference
from allreduce_jit.engine.graph_cache import SHORTS
from allreduce_jit.norms import norm_family
from allreduce_jit.policy.norm import Norm
from allreduce_jit.policy.nvlink_norm import APART, plan_of
from allreduce_jit.policy.verdict import Path

PATHS = Path.V2, Path.LEGACY, Path.TORCH
SHARED = 1000  # instead of a rank: what all ranks have alike


@dataclass(frozen=True)
class Case:
    """One kind of call."""

    dtype: torch.dtype = torch.bfloat16
    hidden: int = 4096
    rounding: str = "R"
    quant: str = "none"
    residual: bool = True
    wide_weight: bool = False
    weight_bias: int = 0
    with_norm: bool = False
    column_major: bool = False

    @property
    def family(self):
        return norm_family(
            self.dtype, self.hidden, self.rounding, self.quant, residual=self.residual, weight=self.weight_dtype,
            weight_bias=self.weight_bias, with_norm=self.with_norm,
        )  # fmt: skip

    @property
    def weight_dtype(self):
        return torch.float32 if self.wide_weight else self.dtype


CASES = [
    Case(), Case(hidden=8192), Case(hidden=2880), Case(hidden=16384), Case(torch.float16, 5120, "U"), Case(torch.float32, 7168),
    Case(torch.float32, 16384, "H"), Case(hidden=64, rounding="H"), Case(torch.float16, 72, residual=False),
    Case(hidden=3584, residual=False, wide_weight=True, weight_bias=1), Case(torch.float16, 6144, "H", wide_weight=True),
    Case(quant="static"), Case(hidden=8192, quant="token", with_norm=True), Case(torch.float16, 2880, "U", "token"),
    Case(hidden=7168, quant="group"), Case(torch.float32, 4096, "R", "group", column_major=True, with_norm=True),
    Case(torch.float16, 5120, "H", "static", wide_weight=True, weight_bias=1),
]  # fmt: skip


class Call:
    """One call with fresh data, and what it must give."""

    def __init__(self, case: Case, rows: int, seed: int, world_size: int, rank: int, device: torch.device, kind=reference.RANDOM):
        self.case, self.rows, self.world_size = case, rows, world_size
        shape, numel = (rows, case.hidden), rows * case.hidden
        inputs = [
            reference.values(seed, r, numel, case.dtype, kind=kind, world_size=world_size).view(shape) for r in range(world_size)
        ]
        self.x = inputs[rank].to(device)
        shared = [reference.values(seed, SHARED + i, numel, case.dtype, kind=kind).view(shape) for i in range(1)]
        self.residual = shared[0].to(device) if case.residual else None
        weight = reference.values(seed, SHARED + 9, case.hidden, case.dtype).to(case.weight_dtype)
        self.weight, self.scale = weight.to(device), torch.tensor([0.03], device=device) if case.quant == "static" else None
        norm = Norm(case.rounding, case.quant, weight_bias=case.weight_bias, eps=1e-5)
        total = reference.ordered_sum(inputs)
        eps32 = torch.tensor(1e-5, dtype=torch.float32).item()
        scale = None if self.scale is None else self.scale.cpu()
        found = norm_reference.normed(total, shared[0] if case.residual else None, weight, replace(norm, eps=eps32), scale)
        self.want = [found.norm, found.residual_out]
        if case.quant != "none":
            self.want = [found.quantized, found.scale, found.residual_out, *([found.norm] if case.with_norm else [])]

    def run(self, comm, **outs):
        how = {"rounding": self.case.rounding, "weight_bias": self.case.weight_bias, **outs}
        if self.case.quant == "none":
            return comm.all_reduce_add_rms_norm(self.x, self.residual, self.weight, 1e-5, **how)
        return comm.all_reduce_add_rms_norm_fp8(
            self.x, self.residual, self.weight, 1e-5, scale=self.scale, scales=self.case.quant, column_major=self.case.column_major,
            with_norm=self.case.with_norm, **how,
        )  # fmt: skip

    def check(self, results, what=""):
        for i, (found, want) in enumerate(zip(results, self.want, strict=True)):
            difference = reference.compare(found.cpu().contiguous().view(-1), want.contiguous().view(-1))
            assert not difference.wrong, f"{what} {self.case} {self.rows} rows, result {i}: {difference}"


def bits(place, path):
    """Every kind of call, eager, again (from a graph of the engine's), in place, captured and replayed at once."""
    rung = {} if path is Path.TORCH else {"highest": path, "lowest": path}  # which has none, and is forced by the environment
    with Communicator(dist.group.WORLD, place.device, operations=[case.family for case in CASES], **rung) as comm:
        assert comm.path is path, comm.reason
        for seed, case in enumerate(CASES):
            fused = comm.plan_norm(3, case.family).algorithm != APART
            assert fused == (path is Path.V2), (case, comm.plan_norm(3, case.family))
            kind = reference.INTEGERS if path is Path.TORCH else reference.RANDOM  # whose sums have other bits
            for rows in (0, 1, 3, 40, 257):
                call = Call(case, rows, seed, comm.world_size, comm.rank, place.device, kind)
                for turn in range(3 if rows == 3 else 1):
                    call.check(call.run(comm), f"{path} turn {turn}")
            call = Call(case, 5, seed + 50, comm.world_size, comm.rank, place.device, kind)
            if comm.describe().backend != "gloo":
                graph = torch.cuda.CUDAGraph()
                with comm.capture(), torch.cuda.graph(graph):
                    captured = call.run(comm)
                for _ in range(3):
                    for tensor in captured:
                        tensor.view(torch.uint8).fill_(0x5A) if tensor.is_contiguous() else tensor.fill_(-5)
                    if case.quant == "static":
                        captured[1].copy_(torch.tensor([0.03]))
                    graph.replay()
                    call.check(captured, f"{path} replayed")
            if case.quant == "none":
                outs = {"out": call.x} | ({"residual_out": call.residual} if case.residual else {})
                call.check(call.run(comm, **outs), f"{path} in place")
        comm.check()


def specials(place):
    """Zeros, infinities, NaNs, subnormals: rows with a NaN are NaN, the others are not."""
    with allreduce_jit.init(device=place.device) as comm:
        for seed, case in enumerate(
            (Case(), Case(torch.float16, 2880, "H"), Case(torch.float32, 256), Case(quant="token", hidden=512))
        ):
            call = Call(case, 9, seed, comm.world_size, comm.rank, place.device, reference.SPECIALS)
            call.check(call.run(comm))
        comm.check()


def forms(place):
    """Every form of a kernel that a table may pick, at any number of rows: the same bits."""
    with allreduce_jit.init(device=place.device, operations=[case.family for case in CASES]) as comm:
        engine, dice = comm._engine, random.Random(3)
        for seed in range(80):
            case = dice.choice([case for case in CASES if case.quant == "none"])
            call = Call(case, dice.choice((1, 2, 7, 33, 130)), seed, comm.world_size, comm.rank, place.device)
            spec = replace(case.family, shape=(call.rows, case.hidden), epilogue=replace(case.family.epilogue, eps=1e-5))
            plan = dice.choice(engine.verification_plans(spec))
            plan = plan_of(plan.form, spec, comm.world_size, engine.layout)
            norm, total = torch.empty_like(call.x), torch.empty_like(call.x)
            tensors = {"input": call.x, "output": norm, "residual": call.residual, "weight": call.weight, "residual_out": total}
            engine.run(spec, plan, *(tensors[pointer.name] for pointer in spec.pointers))
            call.check((norm, total), str(plan))
        comm.check()


def among_all_reduces(place):
    """Calls with and without a norm in turn, in the same slots, without any wait between them."""
    with allreduce_jit.init(device=place.device, operations=[Case().family, Case(hidden=8192).family]) as comm:
        dice, made = random.Random(11), []
        calls = [Call(Case(hidden=h), rows, i, comm.world_size, comm.rank, place.device)
                 for i, (h, rows) in enumerate(((4096, 1), (4096, 64), (8192, 2), (8192, 100)))]  # fmt: skip
        sizes = [100, 5000, 70_000, 1 << 20]
        plain = [reference.values(70, comm.rank, size, torch.bfloat16, place.device) for size in sizes]
        wants = [reference.expected(70, comm.world_size, size, torch.bfloat16, place.device) for size in sizes]
        for _ in range(400):
            i = dice.randrange(4)
            made.append((i, calls[i].run(comm)) if dice.random() < 0.6 else (i, comm.all_reduce(plain[i])))
        for i, results in made:
            if isinstance(results, tuple):
                calls[i].check(results)
            else:
                assert not reference.compare(results, wants[i]).wrong
        comm.check()


def again(place):
    """Calls with the same tensors, which the engine launches as graphs: of clusters and of blocks, and all-reduces in turn with them: more
    calls than one kind of them has graphs for."""
    with allreduce_jit.init(device=place.device, operations=[Case().family, Case(hidden=8192).family]) as comm:
        calls = [Call(Case(hidden=h), rows, i, comm.world_size, comm.rank, place.device)
                 for i, (h, rows) in enumerate(((4096, 1), (4096, 100), (8192, 2), (4096, 8)))]  # fmt: skip
        assert {comm.plan_norm(call.rows, call.case.family).form.cluster > 1 for call in calls} == {False, True}
        outs = [[{name: torch.empty_like(call.x) for name in ("out", "residual_out")} for _ in range(24)] for call in calls]
        plain = [reference.values(70, comm.rank, 4096, torch.bfloat16, place.device) for _ in range(24)]
        want = reference.expected(70, comm.world_size, 4096, torch.bfloat16, place.device)
        for turn in range(6):
            sums = [torch.empty_like(x) for x in plain]
            for call, places in zip(calls, outs, strict=True):
                for names, x, total in zip(places, plain, sums, strict=True):
                    for _ in range(2):  # the second from a graph
                        call.run(comm, **names)
                        comm.all_reduce(x, out=total)
            assert not any(reference.compare(total, want).wrong for total in sums)
            for call, places in zip(calls, outs, strict=True):
                for names in places:
                    call.check((names["out"], names["residual_out"]), f"turn {turn}")
                    for tensor in names.values():
                        tensor.fill_(float("nan"))
        assert len(comm._engine._graph_cache.ready) > SHORTS
        comm.check()


def few_blocks(place):
    """``max_ctas``: fused as long as the rows fit, apart beyond; the same bits."""
    with allreduce_jit.init(device=place.device, max_ctas=8, operations=[Case().family]) as comm:
        for rows, apart in ((1, False), (40, False), (400, True)):
            assert (comm.plan_norm(rows, Case().family).algorithm == APART) == apart
            call = Call(Case(), rows, rows, comm.world_size, comm.rank, place.device)
            call.check(call.run(comm))
        comm.check()


def large(place):
    """More rows than the staging memory holds at once."""
    with allreduce_jit.init(device=place.device, operations=[Case().family]) as comm:
        rows = 3000
        assert comm.plan_norm(rows, Case().family).chunk < rows * 4096
        call = Call(Case(), rows, 1, comm.world_size, comm.rank, place.device)
        call.check(call.run(comm))
        comm.check()


def ends(place):
    """A rank that does not come, one that asks for another norm, and an abort: nobody hangs, results are NaN, the culprit is named."""
    os.environ["ALLREDUCE_JIT_TIMEOUT"] = os.environ["ALLREDUCE_JIT_FIRST_TIMEOUT"] = "1.5"
    last = place.world_size - 1
    try:
        for trouble in ("missing", "eps", "abort"):
            comm = allreduce_jit.init(device=place.device, operations=[Case().family, Case(hidden=8192).family])
            call = Call(Case(hidden=8192), 20, 5, comm.world_size, comm.rank, place.device)
            call.check(call.run(comm))
            torch.cuda.synchronize()
            place.barrier()
            started, results = time.monotonic(), None
            if trouble == "eps":
                eps = 1e-5 if place.rank < last else 2e-5
                comm.all_reduce_add_rms_norm(call.x, call.residual, call.weight, eps)
            elif trouble == "missing":
                results = call.run(comm) if place.rank < last else None
            elif place.rank < last:
                results = call.run(comm)
            else:
                time.sleep(0.3)
                comm.abort()
            torch.cuda.synchronize()
            assert time.monotonic() - started < 4, trouble
            if place.rank < last or trouble != "missing":
                with pytest.raises(allreduce_jit.CommunicatorFailedError) as caught:
                    comm.check()
                    comm.all_reduce(call.x)
                if trouble == "eps":
                    assert isinstance(caught.value, allreduce_jit.CallMismatchError) and "eps" in str(caught.value), caught.value
                else:
                    assert caught.value.ranks == (last,), caught.value
            if results is not None:
                assert results[0].isnan().all() and results[1].isnan().any(), trouble
            place.barrier()
            comm.close(local=True)
    finally:
        for name in ("ALLREDUCE_JIT_TIMEOUT", "ALLREDUCE_JIT_FIRST_TIMEOUT"):
            os.environ.pop(name)
    with allreduce_jit.init(device=place.device) as comm:
        call = Call(Case(), 3, 9, comm.world_size, comm.rank, place.device)
        call.check(call.run(comm))
