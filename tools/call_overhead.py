"""What our ways into an all-reduce cost the host, beside a call of the communicator itself: operators, and ``install``.

Usage: python tools/call_overhead.py [--gpus N | --cpu N] [--numel 4096] [--calls 2000] [--turns 20]

Prints JSON: µs of host time a call, each figure the least of ``turns`` that are measured in turn, on rank 0:
 - ``operators``: ``comm.all_reduce``, in place and with ``op=``, and the operator over it, in place and not, and an operator that does
   nothing: torch's dispatcher, which is most of the difference;
 - ``install``: ``dist.all_reduce`` taken by us over ``comm.all_reduce``, and left (another dtype, another operation) before and after
   ``install``; the same of the functional operator.
On a machine without kernels no call is taken. Then (``"stand_in": true``) the communicator is one that copies nothing and sums nothing,
and what calls are left to costs nothing either: it is the ways that are measured, not what lies at their end.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import allreduce_jit
from allreduce_jit.communicator import Communicator
from allreduce_jit.harness import ranks
from allreduce_jit.integrations import installed, interception, operators

SLEEP_EVERY = 256  # calls, so that no queue of launches fills up and the host waits for the device


def _idle(place: Any, calls: dict[str, Callable[[], Any]], times: int, turns: int) -> dict[str, float]:
    """Least µs a call of each, with no launch that waits for room."""
    least = dict.fromkeys(calls, float("inf"))
    for _ in range(turns):
        for name, call in calls.items():
            spent = 0
            for start in range(0, times, SLEEP_EVERY):
                count = min(SLEEP_EVERY, times - start)
                begin = time.perf_counter_ns()
                for _ in range(count):
                    call()
                spent += time.perf_counter_ns() - begin
                place.synchronize()
            least[name] = min(least[name], spent / times / 1e3)
        place.barrier()
    return {name: round(us, 3) for name, us in least.items()}


_kept = torch.library.Library("allreduce_jit_overhead", "DEF")  # an operator goes with its library


def _nothing() -> Callable[[torch.Tensor, str], torch.Tensor]:
    """An operator whose kernel hands back what it was handed, to see what torch's dispatcher takes."""
    made = torch.empty(1)
    _kept.define("nothing(Tensor x, str name) -> Tensor")
    _kept.impl("nothing", lambda x, name: made, "CompositeExplicitAutograd")
    return torch.ops.allreduce_jit_overhead.nothing.default


def work(place: Any, numel: int, times: int, turns: int) -> dict[str, Any]:
    with torch.inference_mode(), ExitStack() as stack:
        x = torch.ones(numel, dtype=torch.bfloat16, device=place.device)
        comm = stack.enter_context(allreduce_jit.init(device=place.device))
        stand_in = not comm.takes(numel, x.dtype)
        if stand_in:
            for owner, name, value in (
                (Communicator, "takes", lambda self, numel, dtype: True),
                (type(comm._torch), "all_reduce", lambda self, x, out, *others: None),
            ):
                stack.enter_context(mock.patch.object(owner, name, value))
            comm._routes._calls.clear()
        name = operators.register_communicator(comm)
        op, op_, nothing = torch.ops.allreduce_jit.all_reduce.default, torch.ops.allreduce_jit.all_reduce_.default, _nothing()
        by_operator = _idle(
            place,
            {
                "comm.all_reduce(x)": lambda: comm.all_reduce(x),
                "all_reduce": lambda: op(x, name),
                "comm.all_reduce(x, out=x)": lambda: comm.all_reduce(x, x),
                "comm.all_reduce_(x)": lambda: comm.all_reduce_(x),
                "comm.all_reduce(x, op=SUM)": lambda: comm.all_reduce(x, op=dist.ReduceOp.SUM),
                "all_reduce_": lambda: op_(x, name),
                "nothing": lambda: nothing(x, name),
            },
            times,
            turns,
        )
        return {"device": str(place.device), "stand_in": stand_in, "operators": by_operator} | _installed(
            place, stack, comm, x, times, turns, stand_in
        )


def _installed(place: Any, stack: Any, comm: Any, x: Any, times: int, turns: int, stand_in: bool) -> dict[str, Any]:
    """``stand_in``: what ``dist.all_reduce`` wraps is an empty function, whose time is that of the call alone."""
    functional = torch.ops._c10d_functional.all_reduce_.default
    group, other = dist.group.WORLD, torch.ones(x.numel(), dtype=torch.int32, device=x.device)
    maximum = dist.ReduceOp.MAX
    left = {
        "dtype": lambda: dist.all_reduce(other, group=group),
        "op": lambda: dist.all_reduce(x, maximum, group),
        "default group, op": lambda: dist.all_reduce(x, maximum),
    }
    cell = interception._Cell()
    assert cell.cell is not None, cell.problem
    original = cell.cell.cell_contents
    if stand_in:

        def all_reduce(tensor, op=None, group=None, async_op=False):
            return None

        cell.cell.cell_contents = all_reduce
        dist.all_reduce.__wrapped__ = all_reduce
    try:
        before = _idle(place, left, times, turns)
        name = group.group_name
        installation = installed.install(group, place.device, compiled=False)
        mine = installation.comm
        taken = {
            "comm.all_reduce(x, out=x)": lambda: mine.all_reduce(x, x),
            "dist.all_reduce": lambda: dist.all_reduce(x, group=group),
            "dist.all_reduce, default group": lambda: dist.all_reduce(x),
            "functional in place": lambda: functional(x, "sum", name),
        }
        found = {"left_before": before, "left": _idle(place, left, times, turns), "taken": _idle(place, taken, times, turns)}
        counted = installation.describe().to_dict()
        installed.uninstall()
    finally:
        cell.cell.cell_contents = dist.all_reduce.__wrapped__ = original
    over = {f"left, {kind}": found["left"][kind] - us for kind, us in before.items()}
    direct = found["taken"]["comm.all_reduce(x, out=x)"]
    over |= {f"taken, {way}": us - direct for way, us in found["taken"].items() if us != direct}
    return {"install": found, "over_us": {kind: round(us, 3) for kind, us in over.items()}, "counted": counted}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=int)
    where.add_argument("--cpu", type=int)
    parser.add_argument("--numel", type=int, default=4096)
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--turns", type=int, default=20)
    options = parser.parse_args()
    outcome = ranks.run(work, options.numel, options.calls, options.turns, gpus=options.gpus, cpu=options.cpu)
    if outcome.rank == 0:
        print(json.dumps(outcome.value, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
