"""What guards, signatures and deadlines cost: each kernel with and without them, in one run.

Usage: python tools/safety_cost.py GPUS [--json]. Without them a missing rank hangs the kernels: the run has a deadline.
"""

from __future__ import annotations

import argparse
import json
import statistics

import torch

import allreduce_jit
from allreduce_jit.engine import reference
from allreduce_jit.engine.driver import KernelLaunch, load_module
from allreduce_jit.engine.prepared import PreparedCall
from allreduce_jit.harness import ranks
from allreduce_jit.jit.cache import KernelCache
from allreduce_jit.jit.compiler import build
from allreduce_jit.policy.catalogue import NVLINK_ALGORITHMS, cuda_module, entry
from allreduce_jit.routes import spec_of

SIZES = (1 << 10, 64 << 10, 1 << 20)
CALLS, ROUNDS = 200, 15


def unguarded(engine, plan, spec):
    """A call of ``engine``, of kernels that nothing watches over: without the guard's block."""
    world_size = engine.config.world_size
    bare = cuda_module(plan.algorithm, world_size, guarded=False)
    module = load_module(build(bare, engine.config.arch, KernelCache(None))[0].cubin)
    kernel = module.kernel(entry(plan.algorithm, spec.dtype, world_size, whole=True))
    ((launch, *pointers),) = engine.prepare(spec, plan, shape_id=0).aligned
    assert not NVLINK_ALGORITHMS[plan.algorithm].stream
    launch = KernelLaunch(kernel, launch.arguments, launch.grid - 1, plan.block, pdl=engine._pdl)
    return PreparedCall(engine, spec, [(launch, *pointers)], [])


def work(place):
    rows = []
    with allreduce_jit.init(device=place.device) as comm:
        engine, dtype = comm._engine, torch.bfloat16
        for nbytes in SIZES:
            numel = nbytes // 2
            plan = comm.plan(numel, dtype)
            inputs = [reference.values(i, place.rank, numel, dtype, place.device) for i in range(4)]
            want = reference.expected(0, place.world_size, numel, dtype, place.device)
            out = torch.empty_like(inputs[0])
            graphs = {}
            spec = spec_of(numel, dtype)
            calls = {"with": engine.prepare(spec, plan, shape_id=0), "without": unguarded(engine, plan, spec)}
            for name, call in calls.items():
                call.run(inputs[0], out)
                torch.cuda.synchronize()
                assert reference.compare(out, want).wrong == 0, (name, nbytes)
                graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[name]):
                    for i in range(CALLS):
                        call.run(inputs[i % 4], out)
            samples = {name: [] for name in graphs}
            for _ in range(ROUNDS):  # in turn, so that a change of clocks meets both
                for name, graph in graphs.items():
                    place.barrier()
                    graph.replay()  # lines the ranks up
                    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                    start.record()
                    graph.replay()
                    end.record()
                    end.synchronize()
                    samples[name].append(start.elapsed_time(end) * 1e3 / CALLS)
            medians = {name: max(place.gather(statistics.median(found))) for name, found in samples.items()}
            rows.append(
                {
                    "bytes": nbytes,
                    "algorithm": plan.algorithm,
                    **{f"{k}_us": v for k, v in medians.items()},
                    "cost": medians["with"] / medians["without"] - 1,
                }
            )
        comm.check()
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("gpus", type=int)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    outcome = ranks.run(work, gpus=options.gpus, deadline=60)
    if options.json:
        print(json.dumps({"gpus": options.gpus, "rows": outcome.value}, indent=1))
    else:
        for row in outcome.value:
            print(
                f"{row['bytes']:>9} {row['algorithm']:<10} with {row['with_us']:.3f} µs  without {row['without_us']:.3f} µs  "
                f"cost {row['cost']:+.1%}"
            )
