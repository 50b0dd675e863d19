"""What each rank does in ``test_gpus.py``: functions of a ``ranks.Place`` that raise when something is wrong."""

from __future__ import annotations

import importlib
import os
import random
import time
from contextlib import closing
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
import torch.distributed as dist

import allreduce_jit
from allreduce_jit.bench import bench as benchmark
from allreduce_jit.bench import competitors, table, timing
from allreduce_jit.bench import html as bench_page
from allreduce_jit.bench import speed_of_light as light
from allreduce_jit.cli import soak, tune
from allreduce_jit.communicator import Communicator
from allreduce_jit.engine import graph_cache as replay
from allreduce_jit.engine import nvlink as engine_module
from allreduce_jit.engine import reference
from allreduce_jit.engine.driver import Graph
from allreduce_jit.engine.graph_cache import SHORTS
from allreduce_jit.policy import host, nvlink
from allreduce_jit.policy import measured_tables as tuned
from allreduce_jit.policy.catalogue import NVLINK_ALGORITHMS, nvlink_algorithms
from allreduce_jit.policy.operation import ITEMSIZE
from allreduce_jit.policy.operation import all_reduce as all_reduce_spec
from allreduce_jit.policy.tuning import V2
from allreduce_jit.policy.verdict import Path
from allreduce_jit.routes import spec_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SIZES = [0, 1, 2, 3, 7, 8, 9, 63, 64, 65, 511, 512, 4095, 4097, 32_768, 99_991, 262_144, 1_000_003, (1 << 22) + 1, 1 << 24]


def check(place, comm, numel, dtype, seed, *, kind=reference.RANDOM, offset=0, in_place=False, call=None, ranks=None):
    """One all-reduce of fresh data, every bit. ``ranks``: world size of the data, default the communicator's."""
    n = comm.world_size if ranks is None else ranks
    storage = torch.empty(numel + offset, dtype=dtype, device=place.device)
    reference.poison(storage)
    x = storage[offset:]
    x.copy_(reference.values(seed, comm.rank, numel, dtype, place.device, kind=kind))
    out = x if in_place else torch.empty_like(x)
    if not in_place:
        reference.poison(out)
    call(x, out) if call else comm.all_reduce(x, out=out)
    difference = reference.compare(out, reference.expected(seed, n, numel, dtype, place.device, kind=kind))
    assert not difference.wrong, f"rank {comm.rank}: {numel} {dtype} offset {offset} in place {in_place}: {difference}"


def expect_path(comm, path):
    assert comm.path is path, f"{comm.path.value}, wanted {path.value}: {comm.reason}"


def sizes(place, path, max_numel=1 << 28):
    """Sizes from 0 to 1 GB, all dtypes, odd, misaligned, in place; what torch.distributed takes is exact data."""
    with allreduce_jit.init(device=place.device) as comm:
        expect_path(comm, path)
        assert comm.describe().staging_bytes <= 32 << 20
        for dtype in DTYPES:
            for seed, numel in enumerate([*SIZES, min(max_numel, (1 << 30) // dtype.itemsize)]):
                ours = comm.plan(numel, dtype).path != Path.TORCH.value
                kind = reference.RANDOM if ours else reference.INTEGERS
                check(place, comm, numel, dtype, seed, kind=kind)
                check(place, comm, numel, dtype, seed + 100, kind=kind, offset=1, in_place=True)
                if ours:
                    check(place, comm, numel, dtype, seed + 200, kind=reference.SPECIALS, offset=3)
        comm.check()


def algorithms(place):
    """Every algorithm at every size, whatever the plan would pick: the same bits."""
    with allreduce_jit.init(device=place.device, deterministic=True) as comm:
        expect_path(comm, Path.V2)
        engine = comm._engine
        dice = random.Random(7)
        for seed in range(200):
            dtype, name = dice.choice(DTYPES), dice.choice(list(engine.layout.regions))
            numel = int(2 ** dice.uniform(14 if NVLINK_ALGORITHMS[name].stream else 0, 23))
            block = dice.choice([32, 64, 128, 512])
            spec = all_reduce_spec(str(dtype).removeprefix("torch."), numel)
            plan = nvlink.plan_of(name, block, spec, comm.world_size, engine.layout)
            check(place, comm, numel, dtype, seed, offset=dice.randint(0, 2), call=partial(engine.run, spec, plan))
        if comm.rank == 0:
            time.sleep(0.2)  # a late rank
        check(place, comm, 5000, torch.bfloat16, 1)


def host_algorithms(place):
    """Every algorithm of path host at every size, in any number of channels: the same bits."""
    with allreduce_jit.init(device=place.device, deterministic=True) as comm:
        expect_path(comm, Path.HOST)
        engine, dice = comm._engine, random.Random(7)
        assert engine.memory.nbytes <= 32 << 20
        for seed in range(200):
            dtype, name = dice.choice(DTYPES), dice.choice(list(engine.layout.regions))
            numel, block, channels = int(2 ** dice.uniform(0, 22)), dice.choice([32, 64, 128, 512]), dice.choice([16, 64, 512])
            spec = all_reduce_spec(str(dtype).removeprefix("torch."), numel)
            plan = host.plan_of(name, block, max(channels, block // 32), spec, comm.world_size, engine.layout)
            check(place, comm, numel, dtype, seed, offset=dice.randint(0, 2), call=partial(engine.run, spec, plan))
        if comm.rank == 0:
            time.sleep(0.2)  # a late rank
        check(place, comm, 5000, torch.bfloat16, 1)
    with allreduce_jit.init(device=place.device, max_ctas=4) as comm:
        expect_path(comm, Path.HOST)
        assert comm.plan(1 << 24, torch.bfloat16).grid <= 3
        check(place, comm, 1_000_001, torch.bfloat16, 2)


def nothing_is_left(place):
    """A communicator of path host has no name in the file system, and none of its memory is mapped once it is closed."""

    def mapped():
        with open("/proc/self/maps") as f:
            return sum("memfd:allreduce_jit" in line for line in f)

    before = set(os.listdir("/dev/shm"))
    for _ in range(3):
        with allreduce_jit.init(device=place.device) as comm:
            expect_path(comm, Path.HOST)
            check(place, comm, 1000, torch.bfloat16, 1)
            assert mapped() == place.world_size
            assert not [name for name in set(os.listdir("/dev/shm")) - before if "allreduce" in name]
        assert mapped() == 0


def few_blocks(place):
    """``max_ctas``: no launch has more blocks, none starts before the one before has ended, and the bits are the same."""
    grids = []

    class Noted(engine_module.KernelLaunch):
        def __init__(self, kernel, arguments, grid, *more, **options):
            super().__init__(kernel, arguments, grid, *more, **options)
            grids.append((grid, self.pdl))

    saved, engine_module.KernelLaunch = engine_module.KernelLaunch, Noted
    try:
        for max_ctas in (2, 16):
            with allreduce_jit.init(device=place.device, max_ctas=max_ctas, deterministic=True) as comm:
                expect_path(comm, Path.V2)
                for seed, numel in enumerate([*SIZES, (1 << 26) // 2]):
                    check(place, comm, numel, DTYPES[seed % 3], seed, offset=seed % 2)
                comm.check()
            assert grids and all(grid <= max_ctas and not pdl for grid, pdl in grids), max(grids)
            grids.clear()
    finally:
        engine_module.KernelLaunch = saved


def legacy_chunks(place):
    """deterministic=True never leaves the legacy kernels: large tensors take several launches."""
    with Communicator(dist.group.WORLD, place.device, deterministic=True, highest=Path.LEGACY) as comm:
        expect_path(comm, Path.LEGACY)
        for numel in (10, 30_000_001):
            for dtype in DTYPES:
                check(place, comm, numel, dtype, numel)
                check(place, comm, numel, dtype, numel, offset=1)


def graphs(place, path):
    """Several graphs on one communicator, replayed at once and in turn, inputs freed or overwritten in between."""
    with allreduce_jit.init(device=place.device) as comm:
        expect_path(comm, path)
        captured = []
        stream = torch.cuda.Stream(place.device)
        for numel, dtype in [(100, torch.bfloat16), (50_000, torch.float16), (700_001, torch.float32)]:
            exact = comm.plan(numel, dtype).path == Path.TORCH.value  # not in its bits: integers then
            kind = reference.INTEGERS if exact else reference.RANDOM
            static = reference.values(0, comm.rank, numel, dtype, place.device, kind=kind)
            graph = torch.cuda.CUDAGraph()
            with comm.capture(), torch.cuda.graph(graph, stream=stream):
                temporary = static * 1  # lives in the graph's pool and is reused by later captures
                first = comm.all_reduce(temporary)
                second = comm.all_reduce(static)
                comm.all_reduce(first, out=first)
            captured.append((graph, static, first, second, numel, dtype, kind))
        for turn in range(6):
            for graph, static, first, second, numel, dtype, kind in captured[:: 1 if turn % 2 else -1]:
                seed = turn + 10
                torch.empty(1 << 20, device=place.device).normal_()  # the allocator hands freed memory out again
                static.copy_(reference.values(seed, comm.rank, numel, dtype, place.device, kind=kind))
                graph.replay()
                check(place, comm, 777, dtype, seed)  # an eager call in between
                want = reference.expected(seed, comm.world_size, numel, dtype, place.device, kind=kind)
                twice = reference.ordered_sum([want] * comm.world_size)
                for result, right in ((second, want), (first, twice)):
                    difference = reference.compare(result, right)
                    assert not difference.wrong, f"rank {comm.rank} turn {turn} {numel} {dtype}: {difference}"
        torch.cuda.synchronize()
        captured.clear()


def repeated(place, path, many_launches=False, in_c=False):
    """Eager calls that come again: between streams, captures and replays of the same calls, with new tensors, and with more addresses than
    there are graphs. ``many_launches``: whether the largest takes so many that it is a graph. ``in_c``: whether those of one launch are
    made in C; otherwise they are graphs."""
    shapes = [(1, torch.float32), (4096, torch.bfloat16), (99_991, torch.float16), (524_288, torch.bfloat16),
              (600_001, torch.bfloat16), (16_000_000, torch.bfloat16)]  # fmt: skip
    chosen = mock.patch.dict(os.environ, ALLREDUCE_JIT_C_CALLS="on" if in_c else "off")
    with chosen, allreduce_jit.init(device=place.device, deterministic=True) as comm:
        expect_path(comm, path)
        assert comm.describe().c_calls is in_c
        ready, graph = comm._engine._graph_cache.ready, torch.cuda.CUDAGraph()
        verified = set(ready)
        side, urgent = torch.cuda.Stream(place.device), torch.cuda.Stream(place.device, priority=-1)
        # Every second pair lies off a packet's border.
        pairs = [[torch.empty(numel + 1, dtype=dtype, device=place.device)[i % 2 :][:numel] for _ in range(2)]
                 for i, (numel, dtype) in enumerate(shapes * 2)]  # fmt: skip

        def all_reduce():
            for x, out in pairs:
                comm.all_reduce(x, out=out)
            for x, out in pairs:
                comm.all_reduce(out, out=out)

        for turn in range(12):
            for i, (x, out) in enumerate(pairs):
                x.copy_(reference.values(turn + i, comm.rank, x.numel(), x.dtype, place.device))
                reference.poison(out)
            if turn == 5:
                with comm.capture(), torch.cuda.graph(graph):
                    all_reduce()
            if turn in (7, 10):
                graph.replay()
            else:
                stream = (torch.cuda.current_stream(), side, urgent)[turn % 3]
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    all_reduce()
                torch.cuda.current_stream().wait_stream(stream)
            for i, (x, out) in enumerate(pairs):
                want = reference.expected(turn + i, comm.world_size, x.numel(), x.dtype, place.device)
                difference = reference.compare(out, reference.ordered_sum([want] * comm.world_size))
                assert not difference.wrong, f"rank {comm.rank} turn {turn} {x.numel()} {x.dtype}: {difference}"
        again = set(ready) - verified
        graphs = 2 * sum(comm._engine.prepared(spec_of(x.numel(), x.dtype)).as_graph for x, _ in pairs)
        assert in_c or len(again) == graphs >= 16
        assert any(len(call.aligned) > 1 for call, *_ in again) is many_launches
        x = reference.values(1, comm.rank, 5000, torch.bfloat16, place.device)
        want = reference.expected(1, comm.world_size, 5000, torch.bfloat16, place.device)
        for _ in range(5):  # the same memory again and again
            assert not reference.compare(comm.all_reduce(x), want).wrong
        assert in_c or len(set(ready) - verified) > len(again)
        with torch.cuda.device((place.device.index + 1) % torch.cuda.device_count()):  # whatever the current device is
            new = comm.all_reduce(x)
        assert new.device == x.device and not reference.compare(new, want).wrong

        def small():
            return {call for call in ready if len(call[0].aligned) == 1}

        def occupied():
            torch.cuda.synchronize()
            free, total = torch.cuda.mem_get_info(place.device)
            return total - free

        x = torch.zeros(8 * 3 * SHORTS, dtype=torch.bfloat16, device=place.device)
        out, known, before = torch.empty_like(x), small(), None
        for seed in range(4):
            x.copy_(reference.values(seed, comm.rank, x.numel(), x.dtype, place.device))
            want = reference.expected(seed, comm.world_size, x.numel(), x.dtype, place.device)
            reference.poison(out)
            for source, target in zip(x.split(8), out.split(8), strict=True):
                for _ in range(seed + 1):  # as kernels, then by graphs that are aimed, then by ready ones, too
                    comm.all_reduce(source, out=target)
            assert not reference.compare(out, want).wrong
            before = before or occupied()  # torch has loaded all that this needs
        assert in_c or len(small()) == SHORTS and not known & small()
        assert occupied() == before, (occupied(), before)
        comm.check()


def groups(place):
    """Subgroups at once, and several communicators on one group."""
    halves = [list(range(0, place.world_size // 2)), list(range(place.world_size // 2, place.world_size))]
    halves = [h for h in halves if len(h) > 1]
    made = [dist.new_group(h) for h in halves]
    comms = [allreduce_jit.init(device=place.device) for _ in range(2)]
    for members, group in zip(halves, made, strict=True):
        if place.rank in members:
            comms.append(allreduce_jit.init(group, place.device))
    for seed in range(40):
        for index, comm in enumerate(comms):
            expect_path(comm, Path.V2)
            check(place, comm, 1 + 997 * seed * (index + 1), DTYPES[seed % 3], seed)
    for comm in comms:
        comm.close()
        comm.close()


def siblings(place):
    """What a group lacks is made: NCCL beside gloo for calls without a kernel, gloo beside NCCL to agree over."""
    for backend in ("gloo", "nccl"):
        group = dist.new_group(backend=backend)
        with allreduce_jit.init(group, place.device) as comm:
            expect_path(comm, Path.V2)
            assert comm.describe().backend == "nccl"
            check(place, comm, 1000, torch.bfloat16, 1)
            whole = comm.all_reduce(torch.full((5,), place.rank, dtype=torch.int64, device=place.device))
            assert whole.tolist() == [sum(range(place.world_size))] * 5


def bad_input(place):
    """An error on the calling rank, nothing launched, and the communicator stays usable."""
    with allreduce_jit.init(device=place.device, deterministic=True) as comm:
        x = torch.ones(8, device=place.device, dtype=torch.bfloat16)
        other = torch.device("cuda", (place.device.index + 1) % place.world_size)
        wrong = [
            lambda: comm.all_reduce([1.0]),
            lambda: comm.all_reduce(torch.ones(8)),
            lambda: comm.all_reduce(x.to(other)),
            lambda: comm.all_reduce(torch.ones(8, device=place.device, requires_grad=True)),
            lambda: comm.all_reduce(x.to(torch.int32)),
            lambda: comm.all_reduce(x, out=x[:4]),
            lambda: comm.all_reduce(x[:4], out=x[1:5]),
            lambda: comm.all_reduce(x, out=torch.ones(8)),
        ]
        for number, call in enumerate(wrong):
            if number % place.world_size == place.rank:  # on one rank only: the others are not involved
                try:
                    call()
                except allreduce_jit.AllReduceError as e:
                    assert str(e)
                else:
                    raise AssertionError(f"bad input {number} was taken")
        check(place, comm, 1000, torch.bfloat16, 3)
    try:
        comm.all_reduce(x)
    except allreduce_jit.ClosedError:
        pass
    else:
        raise AssertionError("a closed communicator took a tensor")
    with allreduce_jit.init(device=place.device) as comm:
        total = comm.all_reduce(torch.full((5,), place.rank, dtype=torch.int64, device=place.device))
        assert total.tolist() == [sum(range(place.world_size))] * 5
        transposed = torch.arange(12.0, device=place.device).view(3, 4).t()
        assert torch.equal(comm.all_reduce(transposed), transposed * place.world_size)


def dropin(place, name, disabled):
    cls = allreduce_jit.dispatch_custom_allreduce(place.control, place.device)
    assert cls.__name__ == name, cls
    ar = cls(place.control, place.device, max_size=1 << 20)
    assert ar.disabled is disabled, ar.reason
    x = reference.values(1, place.rank, 5001, torch.bfloat16, place.device, kind=reference.INTEGERS)
    copy = x.clone()
    want = reference.expected(1, place.world_size, 5001, torch.bfloat16, place.device, kind=reference.INTEGERS)
    assert ar.should_custom_ar(x) is not disabled
    assert not ar.should_custom_ar(torch.empty(1 << 20, device=place.device))
    assert not ar.should_custom_ar(x.to(torch.int32))
    if not disabled:
        with ar.capture(), ar.capture():
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = ar.custom_all_reduce(x)
        graph.replay()
        assert torch.equal(captured, want)
    assert torch.equal(ar.custom_all_reduce(x), want)
    assert torch.equal(x, copy)
    torch.cuda.synchronize()
    ar.close()
    ar.close()
    assert not ar.should_custom_ar(x)


def without_nvlink(place):
    """Forced capability: NVLink denied, so legacy takes over, captured and replayed."""
    from allreduce_jit.setup import ladder

    real = ladder.probe

    def denied(device):
        caps = real(device)
        return replace(caps, links=tuple(replace(link, nvlink=False) for link in caps.links))

    ladder.probe = denied
    try:
        dropin(place, "CustomAllreduce", False)
        with allreduce_jit.init(device=place.device) as comm:
            expect_path(comm, Path.LEGACY)
            assert comm.describe().reasons[0].code == "no-nvlink"
        graphs(place, Path.LEGACY)
    finally:
        ladder.probe = real


def failures_step_down(place):
    """One rank that cannot build, map or verify takes all of them down one step, with the reason."""
    from allreduce_jit import errors
    from allreduce_jit.engine import base as engine

    for name, code in (
        ("compile", "build-failed"),
        ("allocate", "build-failed"),
        ("connect", "map-failed"),
        ("verify", "verify-failed"),
    ):
        original = getattr(engine_module.NvlinkEngine, name)

        def fail(self, *args, original=original):
            if self.config.rank == 1:
                raise errors.SetupError("planted")
            return original(self, *args)

        setattr(engine_module.NvlinkEngine, name, fail)
        saved, engine.VERIFY_SECONDS = engine.VERIFY_SECONDS, 1.0
        try:
            with allreduce_jit.init(device=place.device) as comm:
                expect_path(comm, Path.LEGACY)
                first = comm.describe().reasons[0]
                assert (first.code, first.rank) == (code, 1) or name == "verify", first
                check(place, comm, 1000, torch.float16, 5)
        finally:
            setattr(engine_module.NvlinkEngine, name, original)
            engine.VERIFY_SECONDS = saved


def late_peer(place, paths=(Path.V2, Path.LEGACY)):
    """A rank that skips a call: the others are told who, within the deadline, and a new communicator works."""
    os.environ["ALLREDUCE_JIT_TIMEOUT"] = "1.5"
    for highest in paths:
        comm = Communicator(dist.group.WORLD, place.device, deterministic=True, highest=highest)
        expect_path(comm, highest)
        x = reference.values(0, place.rank, 300_000, torch.bfloat16, place.device)
        comm.all_reduce(x)
        torch.cuda.synchronize()
        place.barrier()
        if place.rank != 1:
            started = time.monotonic()
            comm.all_reduce(x)
            torch.cuda.synchronize()
            waited = time.monotonic() - started
            assert 1.0 < waited < 4.0, waited
            for attempt in (comm.check, lambda: comm.all_reduce(x)):
                try:
                    attempt()
                except allreduce_jit.CommunicatorFailedError as e:
                    kind = allreduce_jit.PeerTimeoutError if attempt == comm.check else allreduce_jit.PoisonedError
                    assert isinstance(e, kind) and e.ranks == (1,), (e, e.ranks)
                else:
                    raise AssertionError("nobody was told")
        place.barrier()
        comm.close()
    os.environ.pop("ALLREDUCE_JIT_TIMEOUT")
    with allreduce_jit.init(device=place.device) as comm:
        check(place, comm, 300_000, torch.bfloat16, 9)


def mismatch(place, paths=(Path.V2, Path.LEGACY)):
    """Calls that differ between ranks are an error on all of them, in size or dtype, and a new communicator works."""
    deadline = 1.5
    os.environ["ALLREDUCE_JIT_TIMEOUT"] = os.environ["ALLREDUCE_JIT_FIRST_TIMEOUT"] = str(deadline)
    for highest in paths:
        for numel, dtype in ((2999, torch.bfloat16), (3000, torch.float16)):  # rank 1's; as many bytes in the second
            with Communicator(dist.group.WORLD, place.device, deterministic=True, highest=highest) as comm:
                expect_path(comm, highest)
                check(place, comm, 3000, torch.bfloat16, 1)
                other = place.rank == 1
                x = torch.ones(numel if other else 3000, dtype=dtype if other else torch.bfloat16, device=place.device)
                torch.cuda.synchronize()
                place.barrier()
                started = time.monotonic()
                comm.all_reduce(x)
                torch.cuda.synchronize()
                waited = time.monotonic() - started
                assert waited < deadline + 1, waited
                try:
                    comm.check()
                except allreduce_jit.CallMismatchError as e:
                    assert 1 in e.ranks, (e, e.ranks)
                except allreduce_jit.PeerTimeoutError as e:
                    assert e.ranks == ((0,) if other else (1,)), (e, e.ranks)
                else:
                    raise AssertionError(f"{highest.value}: rank {place.rank} was not told of {numel} {dtype} on rank 1")
                place.barrier()  # nobody unmaps what others may still write to
    for name in ("ALLREDUCE_JIT_TIMEOUT", "ALLREDUCE_JIT_FIRST_TIMEOUT"):
        os.environ.pop(name)
    with allreduce_jit.init(device=place.device) as comm:
        check(place, comm, 300_000, torch.bfloat16, 9)


def same_gpu(place):
    """Two ranks on one GPU: gloo through the host."""
    with allreduce_jit.init(place.control, "cuda:0") as comm:
        expect_path(comm, Path.TORCH)
        assert comm.describe().reasons[0].code == "same-gpu"
        assert comm.describe().backend == "gloo"
        x = torch.full((1000,), place.rank + 1.0, device="cuda:0")
        assert torch.equal(comm.all_reduce(x), torch.full_like(x, sum(range(1, place.world_size + 1))))


def floor(place):
    """The shortest exchange and the rate of stores are those of NVLink, whichever generation."""
    with allreduce_jit.init(device=place.device) as comm:
        expect_path(comm, Path.V2)
        found, trouble = light.measure(place, comm)
    assert trouble is None, trouble
    assert place.gather(found) == [found] * place.world_size
    assert 0.5 < found.flag_us < 10 and 0.1 < found.hop_us < 10, found
    assert 0.1 < found.empty_us < found.flag_us and found.empty_serial_us < found.flag_serial_us < 20, found
    assert 50 < found.egress_gbs < 1000, found


def missing_flag(place):
    """A rank that launches nothing: the others' waits end, and so do all exchanges behind them."""
    saved, light.TIMEOUT_S = light.TIMEOUT_S, 0.5
    try:
        with allreduce_jit.init(device=place.device) as comm:
            probe = light._Probe(place, comm)
            probe.connect(place.gather(probe.allocate()))
            probe.capture()
            place.barrier()
            started = time.monotonic()
            if place.rank != 1:
                for graph, _ in probe.graphs:
                    graph.replay()
            torch.cuda.synchronize()
            waited, state = time.monotonic() - started, probe.state.tolist()
            place.barrier()
            probe.close()
        assert state == [0, 0] if place.rank == 1 else state[1] == 2 and 0.4 < waited < 2.0, (state, waited)
    finally:
        light.TIMEOUT_S = saved


def bench(place):
    """A short run with every peer that is here: rows beside their floor, and the page of it."""
    options = benchmark.Options(1 << 10, 4 << 20, 64, 4, 1, "bfloat16", True, "both", tuple(competitors.COMPETITORS), 0)
    document = benchmark.work(place, options, None)
    assert document["ok"] and document["peers"]["nccl"] is None, document["peers"]
    assert [row["mode"] for row in document["rows"]] == ["graph"] * 3 + ["eager"] * 3
    for row in document["rows"]:
        assert row["p50_us"] > 0.8 * row["sol_us"], row  # nobody is faster than light, but for the noise
        assert row["peers"]["nccl"]["p50_us"] > row["sol_us"], row
    assert "ours / SoL" in bench_page.page([document]) and "xSoL" in table.render(document)


def soaked(place, in_c=False):
    """A round of a soak; its eager calls come again, so almost all that are made in Python are launched as graphs."""
    launched = []

    class Noted(Graph):
        def __init__(self, *args):
            super().__init__(*args)
            launch = self.launch
            self.launch = lambda: (launched.append(self), launch())[1]

    replay.Graph = Noted
    try:
        ledger = soak.work(place, soak.Options(1, None, None, seed=0, gemm=True, nccl=False, stalls=True), None)
    finally:
        replay.Graph = Graph
    assert ledger["ok"] and ledger["calls"]["graph"] > 0, ledger
    assert in_c or len(launched) > 0.9 * ledger["calls"]["eager"], (len(launched), ledger["calls"])


def plan_is_fastest(place, margin=0.15):
    """At no size is the plan slower than another algorithm of ours by more than ``margin``, in two measurements."""
    slow = _slower_than_another(place, [1 << shift for shift in range(10, 27, 2)], margin)
    if slow:  # the clock is noisy
        slow = _slower_than_another(place, list(slow), margin)
    assert not slow, "\n".join(slow.values())


def _slower_than_another(place, sizes, margin):
    """Size in bytes -> what was found, where the plan loses; bf16, CUDA graphs, other algorithms with their best blocks."""
    name, planned, best = "bfloat16", {}, {}
    with allreduce_jit.init(device=place.device) as comm:
        expect_path(comm, Path.V2)
        staging, barrier = comm._ladder.settings.staging_mb << 20, timing.device_barrier(place, comm)
        for size in sizes:
            numel = size // 2
            inputs = [reference.values(i, place.rank, numel, torch.bfloat16, place.device) for i in range(timing.ROTATE)]
            out = torch.empty_like(inputs[0])
            load = timing.Workload(lambda x, out=out: comm.all_reduce(x, out=out), inputs, [])
            graph = timing.record(load, comm.capture)
            samples = timing.replays(place, load, graph, tune.REPLAYS, tune.WARMUP, barrier)
            planned[size] = comm.plan(numel, torch.bfloat16), timing.slowest(place, samples).p50_us
            del graph, load, inputs, out
        comm.check()
    for algorithm in nvlink_algorithms(place.world_size):
        with closing(tune.Meter(place, V2, algorithm)) as meter:
            for size in sizes:
                if algorithm in V2.candidates(place.world_size, name, size, staging):
                    tried = V2.choices(place.world_size, algorithm)
                    best[size, algorithm] = min((meter(name, size, choice), choice[1]) for choice in tried)
    slow = {}
    for (size, algorithm), (us, block) in best.items():
        plan, ours = planned[size]
        if algorithm != plan.algorithm and ours > (1 + margin) * us:
            slow[size] = (
                f"{size} bytes, {place.world_size} ranks: the plan's {plan.algorithm}/{plan.block} takes {ours:.2f} µs, "
                f"{algorithm}/{block} {us:.2f}"
            )
    return slow


def tuned_table(place, path=Path.V2):
    """``tune`` on these GPUs: a table that keeps the rules, that new communicators use, and the same bits as before."""
    saved = tune.SIZES
    tune.SIZES = saved[::4]
    try:
        document = tune.work(place, tune.Meter)
    finally:
        tune.SIZES = saved
    assert document["ok"] and document["rung"] == path.value, document
    for dtype, by_size in document["microseconds"].items():
        for size, us in by_size.items():
            assert us and all(0 < one < 1e6 for one in us.values()), (dtype, size, us)
    with allreduce_jit.init(device=place.device, deterministic=True) as comm:
        expect_path(comm, path)
        assert comm.describe().tuning == document["path"]
        assert tuned.tables_to_json(comm._ladder.tuned) == document["tables"]
        for seed, numel in enumerate(SIZES[1:]):
            check(place, comm, numel, DTYPES[seed % 3], seed, offset=seed % 2)
    with allreduce_jit.init(device=place.device) as comm:
        for dtype, bands in (
            comm._ladder.tuned.items() if path is not Path.V2 else ()
        ):  # which may have too little room for a band
            for size in tune.SIZES:  # what was found is what runs, NCCL on legacy too
                band = next(band for band in bands if size <= band.up_to)
                plan = comm.plan(size // ITEMSIZE[dtype], getattr(torch, dtype))
                assert plan.algorithm == band.algorithm, (dtype, size, plan, band)
                if path is Path.HOST:
                    assert plan.block == band.block and plan.grid * plan.block <= 32 * band.channels, (dtype, size, plan, band)
                x = torch.ones(size // ITEMSIZE[dtype], dtype=getattr(torch, dtype), device=place.device)
                assert bool((comm.all_reduce(x) == place.world_size).all()), (dtype, size, plan)


def suite(place, names):
    """Several of the above, or of another module (``module:function``), in one set of processes; they tell which failed."""
    for name, args in names:
        module, _, function = name.rpartition(":")
        try:
            getattr(importlib.import_module(module or __name__), function)(place, *args)
        except BaseException as e:
            e.add_note(f"in {name}{args}") if hasattr(e, "add_note") else None
            raise
        torch.cuda.synchronize()
        place.barrier()
    return [name for name, _ in names]
