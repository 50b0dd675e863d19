"""Staging memory on the host: shared between processes without a name, registered with the driver, given back."""

from __future__ import annotations

import multiprocessing
import os

import pytest
from helpers.fake_driver import FakeDriver, driver

from allreduce_jit.abi import Header
from allreduce_jit.engine import host_memory
from allreduce_jit.engine.host_memory import GRANULARITY, HostStaging
from allreduce_jit.errors import AllReduceError, SetupError
from allreduce_jit.machine import numa
from allreduce_jit.policy.plan import HEADER_BYTES

NBYTES = HEADER_BYTES + 5000


@pytest.fixture
def cuda(monkeypatch):
    """A GPU that sees host memory where the host does."""
    return FakeDriver(monkeypatch, host_memory, cuMemHostGetDevicePointer=lambda address, flags: driver.CUdeviceptr(address))


def group(n):
    made = [HostStaging(NBYTES, rank) for rank in range(n)]
    handles = [one.handle() for one in made]
    for one in made:
        one.connect(handles)
    return made


def maps():
    with open("/proc/self/maps") as f:
        return [line for line in f if "memfd:allreduce_jit" in line]


def files():
    return sorted(
        os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}")
    )


def test_all_ranks_see_one_memory_each(cuda):
    ranks = group(3)
    assert all(os.fstat(one._fd).st_mode & 0o777 == 0o600 and not os.get_inheritable(one._fd) for one in ranks)
    assert all(one.nbytes % GRANULARITY == 0 and one.nbytes >= NBYTES for one in ranks)
    for rank, one in enumerate(ranks):
        assert len(set(one.addresses)) == 3 and one.peek(rank, 0, one.nbytes) == bytes(one.nbytes)
    ranks[0].poke(2, Header.abort.offset, 0x01020304)
    for one in ranks:
        assert one.peek(2, Header.abort.offset, 4) == bytes([4, 3, 2, 1]) and one.peek(1, Header.abort.offset, 4) == bytes(4)
    for one in ranks:
        one.close()


def test_closing_gives_everything_back(cuda):
    before, open_files = maps(), files()
    ranks = group(2)
    assert len(maps()) == len(before) + 4  # each maps its own and its peer's
    registered = [entry[1] for entry in cuda.named("cuMemHostRegister")]
    for one in ranks:
        one.close()
        one.close()
    assert sorted(entry[1] for entry in cuda.named("cuMemHostUnregister")) == sorted(registered) and len(registered) == 4
    assert maps() == before and files() == open_files
    assert ranks[0].peek(1, 0, 8) == bytes(8)  # from a thread that comes late
    ranks[0].poke(1, 0, 1)


def test_what_the_driver_refuses_is_told_and_leaves_nothing(cuda):
    before, open_files = maps(), files()
    cuda.fails["cuMemHostRegister"] = AllReduceError("cuMemHostRegister: CUDA_ERROR_NOT_SUPPORTED")
    with pytest.raises(AllReduceError, match="NOT_SUPPORTED"):
        HostStaging(NBYTES, 0)
    assert maps() == before and files() == open_files and not cuda.named("cuMemHostUnregister")


def test_no_memory_is_an_error_and_no_fault_later(cuda, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space"):
        HostStaging(NBYTES, 0)


def test_another_file_than_the_peers_is_refused(cuda):
    one, other = HostStaging(NBYTES, 0), HostStaging(NBYTES, 1)
    pid, fd, device, inode = other.handle().split()
    with pytest.raises(SetupError, match="rank 0 finds another file at /proc/.* than the memory of rank 1"):
        one.connect([one.handle(), f"{pid} {one.handle().split()[1]} {device} {inode}"])
    with pytest.raises(SetupError, match="rank 0 cannot open the shared memory of rank 1"):
        one.connect([one.handle(), f"{pid} 99999 {device} {inode}"])
    one.close()
    other.close()


def _owner(pipe):
    class Driver:
        def call(self, name, *args):
            return driver.CUdeviceptr(args[0]) if name == "cuMemHostGetDevicePointer" else None

    host_memory.call = Driver().call
    staging = HostStaging(NBYTES, 1)
    staging.poke(1, HEADER_BYTES, 0xABCD)
    pipe.send(staging.handle())
    pipe.recv()


def test_the_memory_of_a_process_that_is_killed_stays_until_the_last_one_closes(cuda):
    """And then there is nothing left: it never had a name."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_owner, args=(theirs,))
    process.start()
    handle = ours.recv()
    one = HostStaging(NBYTES, 0)
    one.connect([one.handle(), handle])
    process.kill()
    process.join()
    assert one.peek(1, HEADER_BYTES, 4) == (0xABCD).to_bytes(4, "little")
    one.poke(1, Header.abort.offset, 1)
    one.close()
    assert not maps()
    assert not [name for name in os.listdir("/dev/shm") if "allreduce" in name]


# -- near a GPU


def test_cpus_near_a_gpu(tmp_path):
    (tmp_path / "0000:1a:00.0").mkdir()
    (tmp_path / "0000:1a:00.0/local_cpulist").write_text("0-2,8\n")
    assert numa.cpus_near("0000:1A:00.0", tmp_path) == {0, 1, 2, 8}
    assert numa.cpus_near("00000000:1A:00.0", tmp_path) == {0, 1, 2, 8}  # NVML's domains are longer
    assert numa.cpus_near("0000:3D:00.0", tmp_path) == set()
    (tmp_path / "0000:1a:00.0/local_cpulist").write_text("?\n")
    assert numa.cpus_near("0000:1A:00.0", tmp_path) == set()


def test_a_thread_runs_there_meanwhile_if_it_may(monkeypatch):
    before = os.sched_getaffinity(0)
    first = min(before)
    monkeypatch.setattr(numa, "cpus_near", lambda bus_id: {first, 10**6})
    with numa.running_near("0000:1A:00.0"):
        assert os.sched_getaffinity(0) == {first}
    assert os.sched_getaffinity(0) == before
    monkeypatch.setattr(numa, "cpus_near", lambda bus_id: {10**6})
    with numa.running_near("0000:1A:00.0"), numa.running_near(None):
        assert os.sched_getaffinity(0) == before
