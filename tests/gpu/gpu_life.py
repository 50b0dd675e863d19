"""What each rank does in ``test_gpus.py`` about ends and new beginnings; like ``gpu_work``, functions of a ``Place``."""

from __future__ import annotations

import ctypes
import gc
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
import torch.distributed as dist
from gpu_work import DTYPES, check, expect_path

import allreduce_jit
from allreduce_jit.communicator import Communicator
from allreduce_jit.engine import reference
from allreduce_jit.engine.memory import LocalState
from allreduce_jit.policy import nvlink
from allreduce_jit.policy.operation import all_reduce
from allreduce_jit.policy.verdict import Path

DEADLINE_S = 1.5
PATHS = (Path.V2, Path.LEGACY)


@contextmanager
def deadlines(seconds):
    names = ("ALLREDUCE_JIT_TIMEOUT", "ALLREDUCE_JIT_FIRST_TIMEOUT")
    os.environ.update(dict.fromkeys(names, str(seconds)))
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name)


def build(place, path, group=None):
    comm = Communicator(group or dist.group.WORLD, place.device, deterministic=True, highest=path)
    if comm.world_size > 1:
        expect_path(comm, path)
    return comm


def recovery(place, paths=PATHS):
    """The last rank skips a call. The others are told, drop the communicator without it, and build one without it."""
    victim = place.world_size - 1
    for path in paths:
        with deadlines(DEADLINE_S):
            comm = build(place, path)
        check(place, comm, 300_000, torch.bfloat16, 1)
        torch.cuda.synchronize()
        place.barrier()
        if place.rank != victim:
            comm.all_reduce(torch.ones(300_000, dtype=torch.bfloat16, device=place.device))
            torch.cuda.synchronize()
            with pytest.raises(allreduce_jit.PeerTimeoutError) as caught:
                comm.check()
            assert caught.value.ranks == (victim,), caught.value.ranks
            comm.close(local=True)
            group = dist.new_group(list(range(victim)), backend="gloo", use_local_synchronization=True)
            with build(place, path, group) as again:
                for seed in range(20):
                    check(place, again, 1 + 4999 * seed, DTYPES[seed % 3], seed, in_place=seed % 2 == 1)
        place.barrier()
        comm.close(local=True)


def aborted(place, paths=PATHS):
    """One rank's host stops everybody, in the midst of a call; later calls and replays end at once and are refused."""
    for path in paths:
        comm = build(place, path)
        x = reference.values(0, place.rank, 200_000, torch.bfloat16, place.device)
        graph = torch.cuda.CUDAGraph()
        with comm.capture(), torch.cuda.graph(graph):
            captured = comm.all_reduce(x)
        graph.replay()
        torch.cuda.synchronize()
        comm.check()
        place.barrier()
        started = time.monotonic()
        if place.rank:
            comm.all_reduce(x)
        else:
            time.sleep(0.3)
            with ThreadPoolExecutor(1) as another:
                another.submit(comm.abort).result()
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert time.monotonic() - started < 3, "no deadline was waited for"
        assert captured.isnan().any(), "the replay after an abort looks like a result"
        for _ in range(2):
            with pytest.raises(allreduce_jit.CommunicatorFailedError) as caught:
                comm.all_reduce(x)
            assert caught.value.ranks == (0,), caught.value
        place.barrier()
        comm.close()


def concurrent(place, paths=PATHS):
    """Two graphs of one communicator in flight on two streams that nobody ordered: an error on all ranks, not a wrong sum."""
    for path in paths:
        with deadlines(DEADLINE_S):
            comm = build(place, path)
        graphs = []
        for numel in (1000, 200_000):
            x = reference.values(0, place.rank, numel, torch.bfloat16, place.device)
            graph = torch.cuda.CUDAGraph()
            with comm.capture(), torch.cuda.graph(graph):
                out = comm.all_reduce(x)
            graph.replay()
            torch.cuda.synchronize()
            comm.check()
            graphs.append((graph, torch.cuda.Stream(place.device), x, out))
        place.barrier()
        if place.rank:
            time.sleep(0.3)  # so that rank 0 has both in flight
        for graph, stream, _, _ in graphs:
            with torch.cuda.stream(stream if place.rank == 0 else graphs[0][1]):
                graph.replay()
        torch.cuda.synchronize()
        place.barrier()
        with pytest.raises(allreduce_jit.CommunicatorFailedError) as caught:
            comm.check()
        assert type(caught.value) is allreduce_jit.ConcurrentUseError and caught.value.ranks == (0,), caught.value
        graphs.clear()
        place.barrier()
        comm.close(local=True)


def aborted_by_an_exception(place, paths=PATHS):
    """Who leaves a communicator's ``with`` by an exception stops the others' calls at once, whatever the deadline."""
    for path in paths:
        started, told = time.monotonic(), None
        try:
            with build(place, path) as comm:
                check(place, comm, 5000, torch.bfloat16, 1)
                torch.cuda.synchronize()
                place.barrier()
                if place.rank == 0:
                    time.sleep(0.3)
                    raise ZeroDivisionError
                comm.all_reduce(torch.ones(5000, dtype=torch.bfloat16, device=place.device))
                torch.cuda.synchronize()
                comm.check()
        except (ZeroDivisionError, allreduce_jit.CommunicatorFailedError) as e:
            told = e
        assert isinstance(told, ZeroDivisionError if place.rank == 0 else allreduce_jit.PoisonedError), told
        assert place.rank == 0 or told.ranks == (0,)
        assert time.monotonic() - started < 10
        place.barrier()


def skipped_and_extra_calls(place, paths=PATHS):
    """One rank makes a call less, or more, than the others: nobody takes a sum of different calls for a result."""
    odd = place.world_size - 1
    for path in paths:
        for calls in (1, 3):  # of the odd rank; 2 of all others, and each of another size
            with deadlines(DEADLINE_S):
                comm = build(place, path)
            check(place, comm, 5000, torch.float16, 1)
            torch.cuda.synchronize()
            place.barrier()
            started, mine = time.monotonic(), calls if place.rank == odd else 2
            try:
                for number in range(mine):
                    comm.all_reduce(torch.ones(1000 + number, dtype=torch.float16, device=place.device))
                torch.cuda.synchronize()
                comm.check()
                told = None
            except allreduce_jit.CommunicatorFailedError as e:
                told = e
            assert time.monotonic() - started < DEADLINE_S + 1
            # The side that made a call too many waits for the others; the others hear of it, at the next check at the latest.
            place.barrier()
            if told is None:
                with pytest.raises(allreduce_jit.CommunicatorFailedError) as caught:
                    comm.check()
                told = caught.value
            assert told.ranks, told
            place.barrier()
            comm.close()


def number_wraps(place):
    """Calls are numbered modulo 2^32: all algorithms, across the wrap."""
    with build(place, Path.V2) as comm:
        engine = comm._engine
        torch.cuda.synchronize()
        engine.side.write([engine.state.control + count for count in LocalState.COUNTS_AT], (1 << 32) - 7)
        place.barrier()
        seed = 0
        for name in list(engine.layout.regions) * 8:
            spec = all_reduce("bfloat16", 40_000)
            plan = nvlink.plan_of(name, 32, spec, comm.world_size, engine.layout)
            check(place, comm, 40_000, torch.bfloat16, seed, call=partial(engine.run, spec, plan))
            check(place, comm, 1001, torch.float32, seed)
            seed += 1
        torch.cuda.synchronize()
        comm.check()
        assert int.from_bytes(engine.side.read(engine.state.control, 4), "little") < 1 << 20
        place.barrier()


def cycles(place, count):
    """Communicators built, used, captured and closed: memory, descriptors, threads and shared memory stay what they were."""
    stream = torch.cuda.Stream(place.device)

    def census():
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(place.device)
        return {
            "device_bytes": total - free,
            "descriptors": len(os.listdir("/proc/self/fd")),
            "tasks": len(os.listdir("/proc/self/task")),
            "shared": len(os.listdir("/dev/shm")),
        }

    for turn in range(count):
        with build(place, Path.LEGACY if turn % 4 == 3 else Path.V2) as comm:
            check(place, comm, 1 + 997 * turn, DTYPES[turn % 3], turn)
            x = torch.ones(5000, device=place.device)
            graph = torch.cuda.CUDAGraph()
            with comm.capture(), torch.cuda.graph(graph, stream=stream):
                out = comm.all_reduce(x)
            graph.replay()
            assert (out == comm.world_size).all()
            del graph
            for _ in range(3):  # a graph of its own
                comm.all_reduce(x, out=out)
            assert (out == comm.world_size).all() and (comm._engine.c_calls or comm._engine._graph_cache.ready)
            place.barrier()
        place.barrier()
        if turn == 7:  # all kernels of both paths are loaded, which stay
            before = census()
    place.barrier()
    after = census()
    assert all(after[name] <= before[name] for name in ("descriptors", "tasks", "shared")), (before, after)
    # Other processes share the GPU's bookkeeping: a leak of staging memory would be 32 MiB a cycle.
    assert after["device_bytes"] - before["device_bytes"] <= 4 << 20, (before, after)


def captures(place, paths=PATHS):
    """The first call inside a capture; a capture that fails on one rank; memory given back under a live graph."""
    for path in paths:
        comm = build(place, path)
        x = reference.values(3, place.rank, 70_000, torch.bfloat16, place.device)
        want = reference.expected(3, comm.world_size, 70_000, torch.bfloat16, place.device)
        graph = torch.cuda.CUDAGraph()
        with comm.capture(), torch.cuda.graph(graph), ThreadPoolExecutor(1) as another:
            out = comm.all_reduce(x)
            # Both read device memory, as does who finds out during a capture that a peer has died.
            comm.check()
            another.submit(comm.check).result()
        failing = pytest.raises(ZeroDivisionError) if place.rank == 1 else nullcontext()
        spoilt = torch.cuda.CUDAGraph()
        with failing, comm.capture(), torch.cuda.graph(spoilt):
            comm.all_reduce(x)
            if place.rank == 1:
                raise ZeroDivisionError
        del spoilt  # replayed by nobody
        for turn in range(5):
            torch.empty(64 << 20, dtype=torch.uint8, device=place.device).random_()
            torch.cuda.empty_cache()  # what serving engines do when they go to sleep and wake up
            reference.poison(out)
            graph.replay()
            assert not reference.compare(out, want).wrong
            check(place, comm, 4321, torch.float16, turn)
        del graph
        torch.cuda.synchronize()
        place.barrier()
        comm.close()
        comm.close()


def group_gone(place):
    """``close`` after the group was destroyed, and without any close: garbage collection does it."""
    for close in (True, False):
        group = dist.new_group(backend="gloo")
        comm = build(place, Path.V2, group)
        check(place, comm, 1000, torch.bfloat16, 1)
        torch.cuda.synchronize()
        place.barrier()
        dist.destroy_process_group(group)
        check(place, comm, 1000, torch.bfloat16, 2)  # calls need no group
        torch.cuda.synchronize()
        place.barrier()
        if close:
            comm.close()
        del comm
        gc.collect()
        place.barrier()


class VirtualMemory:
    """An allocator for torch as serving engines bring along: memory mapped at fixed addresses, given back and made anew
    beneath them (``sleep``, ``wake``)."""

    def __init__(self, device):
        from cuda.bindings import driver

        from allreduce_jit.engine.driver import call

        self.driver, self.call = driver, call
        self.prop = driver.CUmemAllocationProp()
        self.prop.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self.prop.location.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self.prop.location.id = device.index
        flag = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self.granularity = int(call("cuMemGetAllocationGranularity", self.prop, flag))
        self.mapped = {}  # address -> (bytes, handle)
        pointer, size = ctypes.c_void_p, ctypes.c_ssize_t
        self._malloc = ctypes.CFUNCTYPE(pointer, size, ctypes.c_int, pointer)(self.malloc)
        self._free = ctypes.CFUNCTYPE(None, pointer, size, ctypes.c_int, pointer)(self.free)
        functions = (ctypes.cast(function, pointer).value for function in (self._malloc, self._free))
        self.pool = torch.cuda.MemPool(torch._C._cuda_customAllocator(*functions))

    def malloc(self, nbytes, device, stream):
        nbytes = -(-nbytes // self.granularity) * self.granularity
        address = int(self.call("cuMemAddressReserve", nbytes, 0, 0, 0))
        self.back(address, nbytes)
        return address

    def back(self, address, nbytes):
        handle = self.call("cuMemCreate", nbytes, self.prop, 0)
        self.call("cuMemMap", address, nbytes, 0, handle, 0)
        access = self.driver.CUmemAccessDesc()
        access.location, access.flags = self.prop.location, self.driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        self.call("cuMemSetAccess", address, nbytes, [access], 1)
        self.mapped[address] = nbytes, handle

    def drop(self, address):
        nbytes, handle = self.mapped[address]
        self.call("cuMemUnmap", address, nbytes)
        self.call("cuMemRelease", handle)
        return nbytes

    def free(self, address, nbytes, device, stream):
        self.call("cuMemAddressFree", address, self.drop(address))
        del self.mapped[address]

    def sleep(self):
        for address in self.mapped:
            self.drop(address)

    def wake(self):
        for address, (nbytes, _) in list(self.mapped.items()):
            self.back(address, nbytes)


def virtual_memory(place):
    """Tensors of an allocator of mapped memory, captured, given back while the engine sleeps, and replayed after it woke."""
    memory = VirtualMemory(place.device)
    for path in PATHS:
        comm = build(place, path)
        with torch.cuda.use_mem_pool(memory.pool):
            x = torch.empty(300_001, dtype=torch.bfloat16, device=place.device)
            out = torch.empty_like(x)
        assert memory.mapped
        graph = torch.cuda.CUDAGraph()
        with comm.capture(), torch.cuda.graph(graph):
            comm.all_reduce(x, out=out)
        for turn in range(3):
            x.copy_(reference.values(turn, place.rank, x.numel(), x.dtype, place.device))
            reference.poison(out)
            graph.replay()
            assert not reference.compare(out, reference.expected(turn, comm.world_size, x.numel(), x.dtype, place.device)).wrong
            torch.cuda.synchronize()
            memory.sleep()
            memory.wake()
        check(place, comm, 1000, torch.float32, 1)
        torch.cuda.synchronize()
        place.barrier()
        del graph, x, out
        comm.close()
