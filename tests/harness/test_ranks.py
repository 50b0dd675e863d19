"""Processes per rank: results come back, failures are told and end in time, and nobody is left behind."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import ROOT, TESTS

from allreduce_jit.errors import AllReduceError, InputError, SetupError
from allreduce_jit.harness import ranks
from allreduce_jit.harness.place import NO_MULTICAST, Seat

# For programs that import this file.
PROGRAMS = os.pathsep.join(map(str, (ROOT, TESTS, Path(__file__).parent)))


def note(folder, place):
    """Leave a file that names this process, so that the test can look for it afterwards."""
    Path(folder, str(place.rank)).write_text(str(os.getpid()))
    place.barrier()


def alive(folder):
    """Processes noted in ``folder`` that still run."""
    pids = [int(path.read_text()) for path in Path(folder).iterdir()]
    assert pids, "no rank got as far as its work"
    return [pid for pid in pids if Path(f"/proc/{pid}/stat").exists() and state(pid) != "Z"]


def state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return "Z"


def add_up(place, start):
    total = torch.tensor([start + place.rank])
    dist.all_reduce(total)
    return {
        "sum": total.item(),
        "ranks": place.gather(place.rank),
        "device": str(place.device),
        "multicast": {name: os.environ.get(name) for name in NO_MULTICAST},
    }


def crash(place, folder):
    note(folder, place)
    if place.rank == 1:
        raise ValueError("the reason it crashed")
    time.sleep(600)


def vanish(place, folder):
    note(folder, place)
    if place.rank == 1:
        os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(600)


def hang(place, folder):
    note(folder, place)
    if place.rank == 1:
        # With children of its own, and deaf to everything that can be ignored.
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        Path(folder, "child").write_text(str(child.pid))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(600)
    return place.rank


def greedy(place):
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    torch.empty(1 << 50, dtype=torch.uint8)


def unpicklable(place):
    return lambda: place.rank


def test_work_runs_once_per_rank_and_rank_0s_result_returns():
    outcome = ranks.run(add_up, 10, cpu=3)
    assert outcome.rank == 0
    assert outcome.value == {
        "sum": 33,
        "ranks": [0, 1, 2],
        "device": "cpu",
        "multicast": {name: ("1" if "DISABLE" in name else "0") for name in NO_MULTICAST},
    }


def test_a_crash_is_told_with_its_traceback_and_ends_the_others(tmp_path):
    start = time.monotonic()
    with pytest.raises(ranks.RanksFailedError) as caught:
        ranks.run(crash, tmp_path, cpu=2, deadline=100)
    assert time.monotonic() - start < 60
    assert "rank 1 failed" in str(caught.value) and "ValueError: the reason it crashed" in str(caught.value)
    assert "in crash" in caught.value.failed[1]
    assert caught.value.unfinished == [0] and "rank 0 had not finished" in str(caught.value)
    assert alive(tmp_path) == []


def test_a_rank_that_dies_without_a_word_is_named(tmp_path):
    with pytest.raises(ranks.RanksFailedError, match="rank 1 failed") as caught:
        ranks.run(vanish, tmp_path, cpu=2, deadline=100)
    assert "SIGSEGV" in caught.value.failed[1]
    assert alive(tmp_path) == []


def test_a_hang_ends_at_the_deadline_and_is_named(tmp_path):
    deadline = 30  # a slow machine takes 15 s to start two ranks
    start = time.monotonic()
    with pytest.raises(ranks.RanksFailedError, match=rf"^rank 1 did not finish within {deadline} s") as caught:
        ranks.run(hang, tmp_path, cpu=2, deadline=deadline)
    assert deadline <= time.monotonic() - start < deadline + 5
    assert (caught.value.failed, caught.value.unfinished) == ({}, [1])
    assert len(list(tmp_path.iterdir())) == 3
    assert alive(tmp_path) == []


def test_out_of_memory_is_one_sentence(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # is as good as none to gloo
    with pytest.raises(ranks.RanksFailedError, match=f"(?s)out of memory.*{1 << 50} bytes") as caught:
        ranks.run(greedy, cpu=1, deadline=100)
    assert "Traceback" not in str(caught.value)


def test_what_is_told_of_an_exception():
    def told(error):
        try:
            raise error
        except BaseException as caught:
            return ranks._described(caught)

    assert told(InputError("say what")) == "InputError: say what"
    assert told(OSError(errno.EMFILE, "Too many open files")) == "[Errno 24] Too many open files"
    assert told(MemoryError()).endswith(": MemoryError")
    assert told(OSError(errno.ENOENT, "a slip of ours")).startswith("Traceback")
    assert told(ValueError("a slip of ours")).startswith("Traceback")


def test_too_few_descriptors_are_told_before_anything_starts(monkeypatch):
    monkeypatch.setattr(ranks, "_start", None)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (32, before[1]))
    try:
        with pytest.raises(SetupError, match="may open 32 files here, 2 ranks need up to 80: raise `ulimit -n`"):
            ranks.run(add_up, 0, cpu=2)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_process_that_cannot_be_started_is_told(monkeypatch):
    def refuse(*_):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr("multiprocessing.popen_spawn_posix.Popen", refuse)
    with pytest.raises(SetupError, match="2 ranks cannot be started here: .*Resource temporarily unavailable"):
        ranks.run(add_up, 0, cpu=2)


def test_a_result_that_cannot_be_sent_is_a_failure_not_a_hang():
    with pytest.raises(ranks.RanksFailedError, match="pickle"):
        ranks.run(unpicklable, cpu=1, deadline=100)


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGKILL])
def test_nobody_outlives_the_parent(tmp_path, end):
    program = "from test_ranks import hang; from allreduce_jit.harness import ranks; ranks.run(hang, {!r}, cpu=2)"
    folder, errors = tmp_path / "noted", tmp_path / "stderr"
    folder.mkdir()
    env = {**os.environ, "PYTHONPATH": PROGRAMS}
    with errors.open("w") as stderr:
        parent = subprocess.Popen([sys.executable, "-c", program.format(str(folder))], env=env, stderr=stderr)
    try:
        wait_for(lambda: (folder / "child").exists())
        parent.send_signal(end)
        parent.wait(timeout=100)
        if end == signal.SIGINT:
            assert alive(folder) == []
            assert errors.read_text().count("KeyboardInterrupt") == 1, errors.read_text()
        else:
            wait_for(lambda: all(state(int((folder / str(rank)).read_text())) == "Z" for rank in range(2)))
    finally:
        parent.kill()
        stop(folder / "child")


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.05)


def stop(note_file):
    if note_file.exists() and state(int(note_file.read_text())) != "Z":
        os.kill(int(note_file.read_text()), signal.SIGKILL)


def test_two_runs_at_once_do_not_meet():
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(ranks.run, add_up, start, cpu=2) for start in (1, 100)]
        assert [run.result(timeout=100).value["sum"] for run in runs] == [3, 201]


def test_under_torchrun_its_ranks_are_used(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from test_ranks import add_up; from allreduce_jit.harness import ranks\n"
        "o = ranks.run(add_up, 5)\n"
        "open(f'{__file__}.{o.rank}', 'w').write(str(o.value['sum']))\n"
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = {**os.environ, "PYTHONPATH": PROGRAMS}
    subprocess.run(launch, env=env, check=True, timeout=100, capture_output=True)
    assert [Path(f"{script}.{rank}").read_text() for rank in range(2)] == ["11", "11"]


def test_under_torchrun_the_deadline_ends_the_process(tmp_path):
    program = (
        "import time, threading; from allreduce_jit.harness import ranks\n"
        "def work(place): time.sleep(600)\n"
        "ranks.run(work, deadline=3)"
    )
    where = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    env = {**os.environ, **where, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, timeout=60)
    assert done.returncode == 1
    assert b"rank 0 did not finish within 3 s" in done.stderr


TORCHRUN = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("changes", "seat"),
    [
        ({}, Seat(1, 1, 2)),
        ({"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16"}, Seat(9, 1, 16)),
        ({"RANK": " 1 "}, Seat(1, 1, 2)),  # torch reads them with int()
        ({"RANK": "", "LOCAL_RANK": ""}, None),
    ],
)
def test_what_torchrun_sets(changes, seat):
    assert Seat.from_env({**TORCHRUN, **changes}) == seat


def test_without_a_rank_the_other_variables_mean_nothing():
    assert Seat.from_env({}) is None
    assert Seat.from_env({"WORLD_SIZE": "x", "MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *((name, "") for name in TORCHRUN),
        *((name, text) for name in ("RANK", "LOCAL_RANK") for text in ("x", "-1", "2", "1.0", "²", "9" * 5000)),
        *(("WORLD_SIZE", text) for text in ("0", "-2", "two", "1" * 30)),
        *(("MASTER_PORT", text) for text in ("-1", "65536", "http")),
    ],
)
def test_what_torchrun_never_sets_is_named(name, value, monkeypatch):
    for key, text in {**TORCHRUN, name: value}.items():
        monkeypatch.setenv(key, text)
    for call in (lambda: ranks.run(add_up, 0), lambda: ranks.on_gpus(None, None)):
        with pytest.raises(InputError, match=rf"\b{name}\b"):
            call()


def test_torchrun_decides_how_many_ranks_there_are(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match="3 ranks wanted, torchrun started 2"):
        ranks.run(add_up, 0, cpu=3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match="--gpus 2: this machine shows 0 CUDA GPUs"):
        ranks.run(add_up, 0, gpus=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert ranks.on_gpus(None, None) and ranks.on_gpus(2, None) and not ranks.on_gpus(None, 2)


def test_ranks_that_cannot_connect_are_one_sentence():
    program = (
        "from allreduce_jit.harness import ranks\nfrom allreduce_jit.errors import SetupError\n"
        "try: ranks.run(print, deadline=60)\nexcept SetupError as e: print(e)"
    )
    env = {**os.environ, **TORCHRUN, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "0"}
    env |= {"PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "none0"}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, timeout=60, text=True)
    assert done.stdout.startswith("torch.distributed could not connect the ranks: ") and "none0" in done.stdout, done.stderr
    assert done.stdout.rstrip().endswith("GLOO_SOCKET_IFNAME") and done.stdout.count("\n") == 1


def test_more_gpus_than_there_are_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match="--gpus 3: this machine shows 2 CUDA GPUs"):
        ranks.run(add_up, 0, gpus=3)


@pytest.mark.parametrize(
    ("present", "gpus", "cpu", "devices"),
    [
        (0, None, None, ["cpu"] * 4),
        (1, None, None, ["cpu"] * 4),
        (2, None, None, ["cuda:0", "cuda:1"]),
        (16, None, None, [f"cuda:{i}" for i in range(8)]),
        (4, 3, None, ["cuda:0", "cuda:1", "cuda:2"]),
        (4, None, 2, ["cpu"] * 2),
    ],
)
def test_devices(monkeypatch, present, gpus, cpu, devices):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: present)
    assert ranks._devices(gpus, cpu) == devices


def test_failure_is_one_of_our_errors():
    assert issubclass(ranks.RanksFailedError, AllReduceError)
