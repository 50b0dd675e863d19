"""Where users call it: operators in compiled graphs, ``install``, and transformers. Like ``gpu_work``, functions of a ``Place``."""

from __future__ import annotations

import gc

import compiled_decode
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import transformers_tp
from gpu_work import expect_path

import allreduce_jit
from allreduce_jit.engine import reference
from allreduce_jit.integrations.operators import register_communicator
from allreduce_jit.policy.verdict import Path

HIDDEN, EPS = 1024, 1e-5
OPS = torch.ops.allreduce_jit
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MODES = None, "reduce-overhead"


def tensor(place, seed, rank, *shape):
    return reference.values(seed, rank, torch.Size(shape).numel(), torch.bfloat16, place.device).view(shape)


def layer(x, residual, weight, name):
    y = OPS.all_reduce(x * 2, name)
    norm, total = OPS.all_reduce_add_rms_norm(y, residual, weight, EPS, name)
    z = norm + 1
    OPS.all_reduce_(z, name)
    kept = z.clone()
    OPS.all_reduce_add_rms_norm_(z, total, weight, EPS, name)
    quantized, scales, last = OPS.all_reduce_add_rms_norm_fp8(z, total, weight, EPS, name, "group", column_major=True)
    return z, kept, total, quantized.float(), scales + 1, last


def same(found, want):
    return all(a.shape == b.shape and a.stride() == b.stride() and torch.equal(a, b) for a, b in zip(found, want, strict=True))


def operators(place):
    """torch's own checks, and the bits of eager calls in graphs of inductor: of any number of rows, and as CUDA graphs."""
    with allreduce_jit.init(device=place.device) as comm:
        expect_path(comm, Path.V2)
        name = register_communicator(comm, "compiled")
        x, residual, weight = tensor(place, 1, place.rank, 4, HIDDEN), tensor(place, 2, 9, 4, HIDDEN), tensor(place, 3, 9, HIDDEN)
        for operator, given in (
            (OPS.all_reduce, (x.t(), name)),
            (OPS.all_reduce_, (x.clone(), name)),
            (OPS.all_reduce_add_rms_norm, (x, residual, weight, EPS, name)),
            (OPS.all_reduce_add_rms_norm_, (x.clone(), residual.clone(), weight, EPS, name)),
            (OPS.all_reduce_add_rms_norm_out, (x, None, weight, EPS, name, torch.empty_like(x), torch.empty_like(x))),
        ):
            done = torch.library.opcheck(operator.default, given)
            assert set(done.values()) == {"SUCCESS"}, (operator, done)
        for mode in MODES:
            torch._dynamo.reset()
            compiled = torch.compile(layer, fullgraph=True, mode=mode, dynamic=mode is None)
            for seed, rows in enumerate((4, 7, 130) if mode is None else (8, 8, 8, 8, 5, 5, 5)):
                given = tensor(place, seed, place.rank, rows, HIDDEN), tensor(place, seed, 9, rows, HIDDEN), weight
                with torch.no_grad():
                    want = layer(*(one.clone() for one in given), name)
                    found = compiled(*given, name)
                assert same(found, want), (mode, rows)
                del found
            torch.cuda.synchronize()
            comm.check()
        replayed(place)
        del compiled
        drop_graphs()
        place.barrier()


def replayed(place):
    """What the last program above left: CUDA graphs were recorded, rather than left aside with a warning."""
    counted = torch._dynamo.utils.counters["inductor"]
    assert counted["cudagraph_skips"] == 0, counted


def drop_graphs():
    torch._dynamo.reset()
    gc.collect()
    torch.cuda.synchronize()


def program(x):
    dist.all_reduce(x)
    return funcol.all_reduce(x * 2, "sum", dist.group.WORLD) + 1


def installed(place):
    """Calls of torch.distributed, on every route: our bits where a kernel takes them, NCCL's results elsewhere."""
    n, device = place.world_size, place.device
    installation = allreduce_jit.install(device=device)
    assert installation.path is Path.V2, installation.reason
    assert installation.routes == dict.fromkeys(("eager", "functional", "compiled"), "taken"), installation.routes
    for seed, dtype in enumerate(DTYPES):
        want = reference.expected(seed, n, 5000, dtype, device)
        for call in (lambda x: dist.all_reduce(x), lambda x: dist.all_reduce(x, async_op=True).wait()):
            x = reference.values(seed, place.rank, 5000, dtype, device)
            call(x)
            assert not reference.compare(x, want).wrong, dtype
        x = reference.values(seed, place.rank, 5000, dtype, device)
        assert not reference.compare(funcol.wait_tensor(funcol.all_reduce(x, "sum", dist.group.WORLD)), want).wrong, dtype
    assert installation.taken == {"eager": 6, "functional": 3} and not installation.describe().left
    # A handle orders any stream behind the call, which may wait for a late rank.
    side, x = torch.cuda.Stream(), torch.full((1 << 20,), 1.0, device=device)
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000 * (place.rank + 1))
        work = dist.all_reduce(x, async_op=True)
    early = work.is_completed()
    work.wait()
    y = x + 0
    assert not early and bool((y == n).all()) and work.is_completed()
    for dtype, op, result in ((torch.int32, dist.ReduceOp.SUM, sum(range(n))), (torch.float32, dist.ReduceOp.MAX, n - 1)):
        z = torch.full((100,), place.rank, dtype=dtype, device=device)
        dist.all_reduce(z, op=op)
        assert bool((z == result).all())
    assert installation.describe().left == {"dtype": 1, "op": 1}
    static, graph = torch.ones(3000, device=device), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        dist.all_reduce(static)
        again = funcol.all_reduce(static, "sum", dist.group.WORLD) + 0
    for value in (1.0, 3.0):
        static.fill_(value)
        graph.replay()
        assert bool((static == n * value).all()) and bool((again == n * n * value).all())
    for mode in MODES:
        torch._dynamo.reset()
        compiled = torch.compile(program, fullgraph=True, mode=mode)
        for turn in range(4):
            x = torch.full((2048,), float(turn), device=device)
            with torch.no_grad():
                y = compiled(x)
            assert bool((x == n * turn).all()) and bool((y == 2 * n * n * turn + 1).all()), (mode, turn)
            del y
        assert not {"mode", "kind of tensor", "layout"} & installation.describe().left.keys()
    torch.cuda.synchronize()
    installation.comm.check()
    del compiled, graph
    drop_graphs()
    place.barrier()
    allreduce_jit.uninstall()
    x = torch.ones(100, device=device)
    dist.all_reduce(x)
    assert bool((x == n).all()) and installation.taken["functional"] > 3


def decoded(place):
    """A compiled model, its CUDA graphs among them: the same tokens by functional collectives that are taken, and with fused calls."""
    options = compiled_decode.Options(
        batches=(1, 9),
        layers=2,
        hidden=1024,
        heads=24,
        kv_heads=24,
        intermediate=1536,
        context=16,
        vocabulary=500,
        steps=8,
        turns=1,
    )
    document = compiled_decode.work(place, options)
    assert document["ok"], document["rows"]
    assert document["path"] == "v2" and document["installed"]["taken"]["functional"] > 0 and not document["installed"]["left"]
    for row in document["rows"]:
        assert {"torch.distributed", "installed", "fused"} <= row["tokens_per_s"].keys() and row["different_tokens"] > 3, row
    return document["unavailable"]


def transformers(place):
    """The same tokens; and on more than two ranks, where NCCL rounds in between, that every all-reduce is taken."""
    options = transformers_tp.Options(layers=2, hidden=1024, intermediate=2048, heads=16, new_tokens=24, turns=1)
    found = transformers_tp.work(place, options)
    taken, left = found["installed"]["taken"], found["installed"]["left"]
    assert taken["eager"] >= 2 * options.layers * options.new_tokens and not left, found["installed"]
    assert found["different_tokens"] > 3 and (found["ok"] or place.world_size > 2), found["first_difference"]
    return f"tokens per second {found['tokens_per_s']}"
