"""What users' programs do to a communicator: tensors without memory, allocators that sleep, GPUs that are full, peers that die
in calls of NCCL, links that damage what lies far. Like ``gpu_work``, functions of a ``Place``."""

from __future__ import annotations

import os
import signal
import time
from contextlib import contextmanager

import torch
import torch.distributed as dist
from gpu_life import DEADLINE_S, PATHS, VirtualMemory, build, deadlines
from gpu_work import check, expect_path

import allreduce_jit
from allreduce_jit.communicator import Communicator
from allreduce_jit.engine import base as engine
from allreduce_jit.engine import reference
from allreduce_jit.policy.verdict import Path


def without_memory(place):
    """Every tensor without data is an error, and the CUDA context lives."""
    from torch._subclasses import FakeTensorMode
    from torch.distributed.tensor import DTensor, Shard, init_device_mesh

    mesh = init_device_mesh("cuda", (place.world_size,))
    for path in PATHS:
        with Communicator(dist.group.WORLD, place.device, highest=path) as comm:
            expect_path(comm, path)
            good = reference.values(1, place.rank, 4096, torch.bfloat16, place.device)
            freed = good.clone()
            makers = [
                lambda: torch._to_functional_tensor(good.clone()),
                lambda: FakeTensorMode().from_tensor(good),
                lambda: DTensor.from_local(good, mesh, [Shard(0)]),
                lambda: freed,
            ]
            for repeat in range(2):
                for make in makers:
                    comm.all_reduce(freed) if repeat == 0 else None  # its likeness is known
                    if make is makers[-1]:
                        freed.untyped_storage().resize_(0)
                    for call in (
                        lambda t: comm.all_reduce(t),
                        lambda t: comm.all_reduce(t, out=t),
                        lambda t: comm.all_reduce(good, out=t),
                    ):
                        try:
                            call(make())
                        except allreduce_jit.InputError:
                            pass
                        else:
                            raise AssertionError(f"a tensor without memory was taken, {path.value}")
                check(place, comm, 4096, torch.bfloat16, 2)
                torch.cuda.synchronize()
                comm.check()


def allocator_that_sleeps(place):
    """Built while the caller's allocator is torch's, and that allocator is emptied: nothing of ours was in it."""
    memory = VirtualMemory(place.device)
    torch.cuda.empty_cache()
    for path in PATHS:
        with torch.cuda.use_mem_pool(memory.pool):
            comm = build(place, path)
        static = reference.values(5, place.rank, 5000, torch.bfloat16, place.device)
        want = reference.expected(5, place.world_size, 5000, torch.bfloat16, place.device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = comm.all_reduce(static)
        torch.cuda.synchronize()
        for turn in range(2):
            memory.sleep()
            memory.wake()
            place.barrier()
            check(place, comm, 5000, torch.bfloat16, turn)
            check(place, comm, 3_000_001, torch.float32, turn)
            reference.poison(out)
            graph.replay()
            assert not reference.compare(out, want).wrong
        torch.cuda.synchronize()
        comm.check()
        place.barrier()
        del graph
        comm.close()


@contextmanager
def full_gpu(device):
    """All but a few MiB of its memory is taken."""
    from cuda.bindings import driver

    torch.cuda.empty_cache()
    held, size = [], 8 << 30
    while size >= 1 << 20:
        free, _ = torch.cuda.mem_get_info(device)
        error, address = driver.cuMemAlloc(size) if free > size + (4 << 20) else (driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY, None)
        if error != driver.CUresult.CUDA_SUCCESS:
            size //= 2
        else:
            held.append(address)
    try:
        yield
    finally:
        for address in held:
            driver.cuMemFree(address)


def memory_is_full(place):
    """One rank has no memory for staging: all step down, to a rung that works, and say so."""
    os.environ["ALLREDUCE_JIT_SETUP_TIMEOUT"] = "20"
    started = time.monotonic()
    try:
        if place.rank == 1:
            with full_gpu(place.device):
                comm = allreduce_jit.init(device=place.device)
                place.barrier()
        else:
            comm = allreduce_jit.init(device=place.device)
            place.barrier()
    finally:
        del os.environ["ALLREDUCE_JIT_SETUP_TIMEOUT"]
    took = time.monotonic() - started
    assert took < 60, took
    codes = [reason.code for reason in comm.describe().reasons]
    assert place.gather(codes) == [codes] * place.world_size and codes[0] == "build-failed", codes
    if comm.path is Path.TORCH:
        check(place, comm, 5000, torch.float32, 1, kind=reference.INTEGERS)
    torch.cuda.synchronize()
    place.barrier()
    comm.close()
    with allreduce_jit.init(device=place.device) as again:  # as soon as there is room
        expect_path(again, Path.V2)
        check(place, again, 5000, torch.float32, 2)
        torch.cuda.synchronize()
        place.barrier()
    return f"{comm.path.value}, {codes}, {took:.1f} s"


def damaged_packets(place):
    """Any one packet that does not arrive as it was sent, near or far in any slots: verification finds it, and all step down.

    The sender changes it, which is what the receiver would see of a slot that damages what passes. That calls go through every
    slot is a matter of plans (``test_verify``).
    """
    run = engine.KernelEngine.run
    try:
        for highest in PATHS:
            for part in (0.0, 0.2, 0.37, 0.5, 0.77, 0.9, 1.0):
                calls = []

                def damaged(self, spec, plan, x, out, calls=calls, part=part):
                    if self.config.rank == 0 and x.numel() > 1 << 17:
                        calls.append(plan.algorithm)
                        if len(calls) == 2:
                            x[int(part * (x.numel() - 1))] += 1
                    run(self, spec, plan, x, out)

                engine.KernelEngine.run = damaged
                with Communicator(dist.group.WORLD, place.device, highest=highest, lowest=highest) as comm:
                    codes = [reason.code for reason in comm.describe().reasons]
                    assert comm.path is Path.TORCH and "verify-failed" in codes, (highest, part, comm.reason)
                    assert len(calls) == 2 * (place.rank == 0)
    finally:
        engine.KernelEngine.run = run
    with allreduce_jit.init(device=place.device) as comm:
        expect_path(comm, Path.V2)
        check(place, comm, 5000, torch.float32, 2)


def nccl_and_a_dead_peer(place, path):
    """A peer is killed while a call that NCCL has taken is under way; the survivors hear of it and close in seconds."""
    victim = place.world_size - 1
    with deadlines(DEADLINE_S):
        os.environ["ALLREDUCE_JIT_PATH"] = {"v2": "auto", "legacy": "legacy"}.get(path, "torch")
        comm = allreduce_jit.init(device=place.device)
    expect_path(comm, Path(path))
    x = torch.ones(1 << 22, dtype=torch.int32, device=place.device)  # no kernel's dtype
    assert (comm.all_reduce(x) == place.world_size).all()
    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        captured = comm.all_reduce(x)
    graph.replay()
    assert (captured == place.world_size).all()
    torch.cuda.synchronize()
    place.barrier()
    if place.rank == victim:
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    comm.all_reduce(x)  # waits for the dead
    time.sleep(2)
    kinds = []
    for attempt in (comm.check, lambda: comm.all_reduce(x), lambda: comm.all_reduce(x)):
        try:
            attempt()
            kinds.append("accepted")
        except allreduce_jit.CommunicatorFailedError as e:
            kinds.append(f"{type(e).__name__} {e.ranks}")
    started = time.monotonic()
    comm.close(local=True)
    closed = time.monotonic() - started
    torch.cuda.synchronize()  # nothing of ours spins any more
    lost = f"PeerLostError ({victim},)"
    good = kinds[0] == lost and kinds[1].startswith("PoisonedError") and kinds[2].startswith("PoisonedError") and closed < 5
    # The survivor's new start, alone here, and the context lives.
    y = torch.ones(1000, device=place.device)
    good = good and float((y + y).sum()) == 2000
    print(
        f"told {path}: {kinds}, closed in {closed:.2f} s" if good else f"BAD {path}: {kinds}, closed in {closed:.2f} s",
        flush=True,
    )
    os._exit(0)
