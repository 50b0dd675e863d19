"""``install`` on CPU ranks: which calls are taken, which are left as they were, and that torch is what it was afterwards."""

from __future__ import annotations

import contextlib
import functools
import json
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from helpers.fake_engines import LIMIT, fake_gpus, raised, suite
from helpers.wrapper import Wrapper
from torch.distributed import all_reduce as imported_long_ago
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.utils._python_dispatch import TorchDispatchMode

import allreduce_jit
from allreduce_jit.errors import InputError, SetupError
from allreduce_jit.harness import ranks
from allreduce_jit.integrations import installed, interception
from allreduce_jit.integrations.installed import LEFT
from allreduce_jit.torch_private import functional_collective

SUM, MAX = dist.ReduceOp.SUM, dist.ReduceOp.MAX


def torch_as_it_is():
    function = dist.all_reduce
    cells = [cell.cell_contents for cell in function.__closure__]
    keys = [
        torch._C._dispatch_has_kernel_for_dispatch_key(f"_c10d_functional::{name}", key)
        for name in ("all_reduce", "all_reduce_")
        for key in ("CPU", "CUDA")
    ]
    return function, cells, dist.destroy_process_group, dist.distributed_c10d.destroy_process_group, keys


@contextlib.contextmanager
def taking(place, machine="h200-x4", **how):
    """An installation over ``place.control`` on a machine with kernels; yields it and its engine."""
    before = torch_as_it_is()
    with fake_gpus(place.control, machine) as built:
        installation = allreduce_jit.install(place.control, "cpu", **{"compiled": False, **how})
        yield installation, built[0]
        place.barrier()
        allreduce_jit.uninstall()
        allreduce_jit.uninstall()
        assert torch_as_it_is() == before and built[0].closed


def mine(place, *shape, dtype=torch.float32):
    return torch.full(shape, place.rank + 1, dtype=dtype)


def total(place):
    return sum(range(1, place.world_size + 1))


def counted(installation, **more):
    """The counts since last time."""
    found = installation.describe()
    news = {kind: n for kind, n in {**found.taken, **found.left}.items() if n}
    for counts in (installation.taken, installation.left):
        counts.update(dict.fromkeys(counts, 0))
    return news


def eager(place):
    group, want = place.control, total(place)
    with taking(place) as (installation, engine):
        assert installation.routes == {"eager": "taken", "functional": "taken", "compiled": "not probed"}
        assert engine.sums == 0 and not counted(installation)  # probes are calls of nobody
        assert allreduce_jit.install(group) is installation and json.dumps(installation.describe().to_dict())
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for call in (
                lambda x: dist.all_reduce(x, group=group),
                lambda x: dist.all_reduce(x, SUM, group),
                lambda x: dist.distributed_c10d.all_reduce(tensor=x, op=SUM, group=group, async_op=False),
                lambda x: imported_long_ago(x, group=group),
            ):
                x = mine(place, 5, 7, dtype=dtype)
                for _ in range(2):  # unknown and known
                    address = x.fill_(place.rank + 1).data_ptr()
                    assert call(x) is None and x.data_ptr() == address and bool((x == want).all())
        assert counted(installation) == {"eager": 24} and engine.sums == 24
        x = mine(place, 9)
        work = dist.all_reduce(x, group=group, async_op=True)
        assert isinstance(work, dist.Work) and work.wait() is True and work.is_completed() and work.is_success()
        assert bool((x == want).all()) and work.result()[0] is x and work.get_future().wait()[0] is x and work.exception() is None
        x = mine(place, 9)
        dist.all_reduce(x[3:6], group=group)  # a view, at any address
        assert x.tolist() == [place.rank + 1] * 3 + [want] * 3 + [place.rank + 1] * 3
        # Autograd is left alone, as by torch.
        weight = torch.ones(4, requires_grad=True)
        y = weight * (place.rank + 1)
        dist.all_reduce(y, group=group)
        y.sum().backward()
        assert bool((y == want).all()) and weight.grad.tolist() == [place.rank + 1.0] * 4
        with torch.inference_mode():
            z = mine(place, 9)
            dist.all_reduce(z, group=group)
            assert bool((z == want).all())
        assert counted(installation) == {"eager": 4}


def under_modes(place):
    """A default device is a mode that makes the call again; others see the call, and the probe says that they would."""
    with torch.device("cpu"), taking(place) as (installation, engine):
        assert installation.routes["eager"] == "taken"
        x = mine(place, 3)
        dist.all_reduce(x, group=place.control)
        assert bool((x == total(place)).all()) and engine.sums == 1 and counted(installation) == {"eager": 1, "mode": 1}
    if place.rank == 0:  # on one rank alone, and nobody waits for it
        with Counting() as mode, taking(place) as (installation, engine):
            assert installation.routes["eager"].startswith("off: ranks differ") and LEFT["mode"] in installation.routes["eager"]
        assert mode.seen == 0
    else:
        with taking(place) as (installation, engine):
            assert installation.routes["eager"].startswith("off: ranks differ")


class Counting(TorchDispatchMode):
    seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += "allreduce" in str(function)
        return function(*args, **(kwargs or {}))


def left(place):
    """Everything else goes where it went: results and errors are torch's own."""
    group, want = place.control, total(place)
    other = dist.new_group(backend="gloo")
    with taking(place) as (installation, engine):
        assert set(LEFT) == set(installation.left)
        for dtype in (torch.int32, torch.float64, torch.complex64):
            x = mine(place, 3, dtype=dtype)
            dist.all_reduce(x, group=group)
            assert bool((x == want).all())
        assert counted(installation) == {"dtype": 3}
        x = mine(place, 3)
        dist.all_reduce(x, MAX, group)
        assert x.tolist() == [place.world_size] * 3 and counted(installation) == {"op": 1}
        dist.all_reduce(torch.empty(0), group=group)
        assert counted(installation) == {"empty": 1}
        x = torch.arange(16.0).view(4, 4).t()
        dist.all_reduce(x, group=group)
        assert torch.equal(x, place.world_size * torch.arange(16.0).view(4, 4).t())
        assert counted(installation) == {"layout": 1}
        dist.all_reduce(torch.ones(3, device="meta"), group=group)
        assert counted(installation) == {"device": 1}
        raised(TypeError, lambda: dist.all_reduce([1, 2], group=group))
        raised(Exception, lambda: dist.all_reduce(Wrapper(torch.ones(3)), group=group))
        parameter = torch.nn.Parameter(mine(place, 3))
        dist.all_reduce(parameter, group=group)
        assert bool((parameter == want).all()) and counted(installation) == {"kind of tensor": 3}
        with Counting() as mode:
            dist.all_reduce(mine(place, 3), group=group)
        assert mode.seen == 1 and counted(installation) == {"mode": 1}
        x, y = mine(place, 3), mine(place, 3)
        with dist._coalescing_manager(group=group, async_ops=True) as manager:
            dist.all_reduce(x, group=group)
            dist.all_reduce(y, group=group)
        manager.wait()
        assert x.tolist() == y.tolist() == [want] * 3 and counted(installation) == {"coalesced": 2}
        # Of other groups nothing is counted, nor taken.
        x = mine(place, 3)
        for this in (other, None):
            dist.all_reduce(x, group=this)
            dist.all_reduce(x, MAX, this)
            x = funcol.all_reduce(x, "sum", this or dist.group.WORLD) + 0
        assert bool((x == want * place.world_size**3).all()) and not counted(installation) and engine.sums == 0
        with mock.patch.object(dist.distributed_c10d, "_rank_not_in_group", lambda group: True), pytest.warns(UserWarning):
            assert dist.all_reduce(mine(place, 3).int(), group=group) is None
    dist.destroy_process_group(other)


def sizes_without_a_kernel(place):
    """What legacy hands over to NCCL is the program's NCCL's."""
    with taking(place, "a100-pcie-x4") as (installation, engine):
        for numel, kind in ((LIMIT - 1, "eager"), (LIMIT, "no kernel"), (LIMIT - 1, "eager")):
            x = mine(place, numel)
            dist.all_reduce(x, group=place.control)
            assert bool((x == total(place)).all()) and counted(installation) == {kind: 1}
        assert engine.sums == 2


def functional(place):
    group, want = place.control, total(place)
    with taking(place) as (installation, engine):
        x = mine(place, 6, 4)
        y = funcol.all_reduce(x, "sum", group)
        assert bool((y + 0 == want).all()) and bool((x == place.rank + 1).all())
        name, ops = group.group_name, torch.ops._c10d_functional
        z = ops.all_reduce_(x, "sum", name)
        ops.wait_tensor(z)
        assert z is x and bool((x == want).all())
        assert counted(installation) == {"functional": 2} and engine.sums == 2
        weight = mine(place, 4).requires_grad_()
        funcol.all_reduce(weight * 1, "sum", group).sum()
        ints, odd = funcol.all_reduce(mine(place, 3).int(), "sum", group), funcol.all_reduce(mine(place, 4, 4).t(), "sum", group)
        most = funcol.all_reduce(mine(place, 3), "max", group)
        assert bool((ints + 0 == want).all()) and bool((odd + 0 == want).all()) and (most + 0).tolist() == [place.world_size] * 3
        assert counted(installation) == {"functional": 1, "dtype": 1, "layout": 1, "op": 1}
        raised(RuntimeError, lambda: ops.all_reduce(x, "sum", "no such group"))
        mesh = init_device_mesh("cpu", (place.world_size,))
        shared = DTensor.from_local(mine(place, 4), mesh, [Partial()]).redistribute(placements=[Replicate()])
        assert bool((shared.to_local() == want).all()) and not counted(installation)  # a mesh has the default group


def program(group, x):
    dist.all_reduce(x, group=group)
    y = funcol.all_reduce(x * 2, "sum", group) + 1
    z = x.int()
    dist.all_reduce(z, op=MAX, group=group)
    return y, z


def compiled(place, backend):
    want = total(place)
    with taking(place, compiled=True) as (installation, engine):
        assert installation.routes == dict.fromkeys(("eager", "functional", "compiled"), "taken")
        torch._dynamo.reset()
        graph = torch.compile(functools.partial(program, place.control), fullgraph=True, backend=backend)
        for numel in (300, 500):
            x = mine(place, numel)
            y, z = graph(x)
            assert bool((x == want).all()) and bool((y == 2 * want * place.world_size + 1).all()) and bool((z == want).all())
        assert counted(installation) == {"functional": 4, "op": 2} and engine.sums == 4
        torch._dynamo.reset()
        graph = torch.compile(functools.partial(program, place.control), fullgraph=True, backend=backend)
    x = mine(place, 300)  # a graph compiled with an installation, or traced after it, is torch's
    y, _ = graph(x)
    assert bool((x == want).all()) and bool((y == 2 * want * place.world_size + 1).all())


def compiled_by_aot(place):
    compiled(place, "aot_eager")


def compiled_by_inductor(place):
    compiled(place, "inductor")


def groups_of_the_same_ranks(place):
    want, n = total(place), place.world_size
    with taking(place, same_ranks=True) as (installation, engine):
        mesh = init_device_mesh("cpu", (1, n), mesh_dim_names=("dp", "tp"))
        late = dist.new_group(backend="gloo")
        for group, ours in ((late, True), (None, True), (mesh.get_group("tp"), True), (mesh.get_group("dp"), False)):
            x, size = mine(place, 3), dist.get_world_size(group)
            dist.all_reduce(x, group=group)
            assert bool((x == (want if size == n else place.rank + 1)).all())
            y = funcol.all_reduce(x, "sum", group or dist.group.WORLD)
            assert bool((y + 0 == x * size).all())
            assert counted(installation) == ({"eager": 1, "functional": 1} if ours else {})
        shared = DTensor.from_local(mine(place, 4), mesh["tp"], [Partial()]).redistribute(placements=[Replicate()])
        assert bool((shared.to_local() == want).all()) and counted(installation) == {"functional": 1}
        # One of its own for a group that was served.
        own = allreduce_jit.install(late, "cpu", compiled=False)
        dist.all_reduce(mine(place, 3), group=late)
        assert counted(own) == {"eager": 1} and not counted(installation)
        allreduce_jit.uninstall(late)
        dist.all_reduce(mine(place, 3), group=late)
        assert not own.describe().installed and counted(installation) == {"eager": 1} and not counted(own)
        place.barrier()
        dist.destroy_process_group(late)
        assert installation.describe().installed
        with contextlib.suppress(RuntimeError):  # whatever torch makes of a group that it has destroyed
            dist.all_reduce(mine(place, 3), group=late)
        assert not counted(installation)


def destroyed_groups(place):
    """A group that is destroyed is not installed any more, and calls over it are torch's errors."""
    group = dist.new_group(backend="gloo")
    before = torch_as_it_is()
    with fake_gpus(group) as built:
        installation = allreduce_jit.install(group, "cpu", compiled=False)
        name = group.group_name
        dist.all_reduce(mine(place, 3), group=group)
        dist.barrier(group=group)
        dist.destroy_process_group(group)
        assert built[0].closed and not installation.describe().installed and torch_as_it_is() == before
        assert counted(installation) == {"eager": 1}
        with contextlib.suppress(RuntimeError):
            dist.all_reduce(mine(place, 3), group=group)
        assert not counted(installation)
        raised(RuntimeError, lambda: torch.ops._c10d_functional.all_reduce(mine(place, 3), "sum", name))


def without_kernels(place):
    """On gloo alone every call is left, and the report says why."""
    before = torch_as_it_is()
    for group in (None, place.control):
        installation = allreduce_jit.install(group, compiled=False)
        assert installation.routes["eager"] == installation.routes["functional"] == f"left: {LEFT['no kernel']}"
        assert "CPU" in installation.reason or place.world_size == 1
        for call in (
            lambda x: dist.all_reduce(x, group=group),
            lambda x: funcol.all_reduce(x, "sum", group or dist.group.WORLD) + 0,
        ):
            x = mine(place, 3)
            y = call(x)
            assert bool(((x if y is None else y) == total(place)).all())
        assert counted(installation) == {"no kernel": 2}
        allreduce_jit.uninstall(group)
    assert torch_as_it_is() == before


def other_threads_run_on(place):
    """While a call is torch's own. A backend may wait in it for a thread of its own that wants the GIL, to free a tensor: gloo with two
    groups hung there."""
    large = torch.zeros(48 << 20)  # which the functional operator copies before it returns
    allreduce_jit.install(place.control, compiled=False)
    found = []
    for op in ("sum", "max"):  # nobody's of ours: no kernel, another operation
        for group in (place.control, dist.group.WORLD):
            done = funcol.all_reduce(large, op, group)
            funcol.wait_tensor(done)
            stop, gaps = threading.Event(), [0.0]

            def watch(stop=stop, gaps=gaps):
                last = time.perf_counter()
                while not stop.is_set():
                    time.sleep(1e-3)
                    now = time.perf_counter()
                    gaps[0], last = max(gaps[0], now - last), now

            thread = threading.Thread(target=watch)
            thread.start()
            time.sleep(0.02)
            gaps[0], start = 0.0, time.perf_counter()
            with torch.no_grad():
                done = functional_collective("all_reduce")(large, op, group.group_name)
            took = time.perf_counter() - start
            stop.set()
            thread.join()
            funcol.wait_tensor(done)
            found.append((gaps[0], took))
    allreduce_jit.uninstall()
    assert any(gap < took / 2 for gap, took in found), found


def routes_that_are_shut(place):
    """Where one rank's torch is another one, a route is off on all; where none is left, nothing is installed."""
    before = torch_as_it_is()
    with fake_gpus(place.control):
        inner = dist.all_reduce.__wrapped__
        if place.rank == 0:
            dist.all_reduce.__wrapped__ = print
        installation = allreduce_jit.install(place.control, "cpu", compiled=False)
        dist.all_reduce.__wrapped__ = inner
        assert installation.routes["eager"].startswith("off: rank 0: not reached: torch.distributed.all_reduce of torch")
        assert installation.routes["functional"] == "taken"
        x = mine(place, 3)
        dist.all_reduce(x, group=place.control)
        assert bool((x == total(place)).all()) and not counted(installation)
        assert bool((funcol.all_reduce(x, "sum", place.control) + 0 == x * place.world_size).all())
        assert counted(installation) == {"functional": 1}
        place.barrier()
        allreduce_jit.uninstall()
        last = place.world_size - 1
        with mock.patch.object(interception, "knows_calls", lambda: "moved" if place.rank == last else None):
            raised(SetupError, lambda: allreduce_jit.install(place.control, "cpu"), f"rank {place.rank}", f"rank {last}", "moved")
        assert torch_as_it_is() == before and not installed._installations
        with mock.patch.object(interception, "functional_collective", side_effect=AttributeError("no all_reduce")):
            installation = allreduce_jit.install(place.control, "cpu")
        assert installation.routes["eager"] == "taken" and "no all_reduce" in installation.routes["functional"]
        assert installation.routes["compiled"].startswith("off")
        place.barrier()
        allreduce_jit.uninstall()
        if place.rank == 0:
            raised(InputError, lambda: allreduce_jit.install(dist.GroupMember.NON_GROUP_MEMBER))
    assert torch_as_it_is() == before


@pytest.mark.parametrize("n", [2, 3])
def test_calls(n):
    cases = [eager, under_modes, left, sizes_without_a_kernel, functional, groups_of_the_same_ranks, destroyed_groups]
    ranks.run(suite, cases, cpu=n, deadline=300)


@pytest.mark.parametrize("n", [1, 2])
def test_without_kernels(n):
    ranks.run(suite, [without_kernels, other_threads_run_on], cpu=n, deadline=200)


def test_routes():
    ranks.run(suite, [routes_that_are_shut, compiled_by_aot], cpu=2, deadline=300)


@pytest.mark.programs
def test_inductor():
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception:
        pytest.skip("needs a C++ compiler, as inductor does on the CPU")
    ranks.run(suite, [compiled_by_inductor], cpu=2, deadline=400)
