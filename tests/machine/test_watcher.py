"""The peer watcher, on real processes: who dies is told at once, once and by its rank, and nothing stays behind."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers import ROOT

from allreduce_jit.machine import watcher
from allreduce_jit.machine.probe import probe
from allreduce_jit.machine.process import Process, start_ticks
from allreduce_jit.machine.watcher import watch

LATENCY_S = 0.1  # on an idle machine; tests take the best of several, since this one may be busy


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def tasks():
    return len(os.listdir("/proc/self/task"))


def described(pid):
    """What the process would tell of itself."""
    return replace(Process.own(), pid=pid, started=start_ticks(pid))


@pytest.fixture
def sleepers():
    started = []

    def start(n=1):
        some = [subprocess.Popen(["sleep", "600"]) for _ in range(n)]
        started.extend(some)
        return some

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def told():
    return queue.Queue()


def nothing_more(told):
    with pytest.raises(queue.Empty):
        told.get(timeout=0.05)


@pytest.fixture(autouse=True)
def nothing_left():
    watcher._warned.clear()
    before = threading.active_count()
    yield
    assert watcher._loop is None and threading.active_count() == before


# -- death


@pytest.mark.parametrize("how", ["SIGKILL", "SIGTERM", "SIGSEGV"])
def test_a_killed_peer_is_named(sleepers, told, how):
    peers = sleepers(4)
    with watch({rank: described(p.pid) for rank, p in enumerate(peers)}, told.put) as handle:
        assert handle.watched == (0, 1, 2, 3) and not handle.refused
        nothing_more(told)
        for rank in (2, 0):
            os.kill(peers[rank].pid, getattr(signal, how))
            assert told.get(timeout=10) == rank
        nothing_more(told)


def test_a_normal_exit_and_a_zombie_that_nobody_reaps(told):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with watch({5: described(process.pid)}, told.put):
            process.stdin.close()
            assert told.get(timeout=10) == 5
            assert Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
            with watch({6: described(process.pid)}, told.put):
                assert told.get(timeout=10) == 6
    finally:
        process.wait()


def test_a_stranger_is_watched_like_a_child(told):
    """Ranks are started by a common parent: no rank is another's child."""
    parent = subprocess.Popen(
        [sys.executable, "-c", "import subprocess; p = subprocess.Popen(['sleep', '600']); print(p.pid, flush=True); p.wait()"],
        stdout=subprocess.PIPE,
    )
    grandchild = int(parent.stdout.readline())
    with watch({1: described(grandchild)}, told.put) as handle:
        assert handle.watched == (1,)
        os.kill(grandchild, signal.SIGKILL)
        assert told.get(timeout=10) == 1
    assert parent.wait(10) is not None
    parent.stdout.close()


def test_latency(sleepers):
    seconds = []
    for _ in range(5):
        (peer,) = sleepers()
        heard = threading.Event()
        with watch({1: described(peer.pid)}, lambda rank: heard.set()):
            start = time.perf_counter()
            peer.kill()
            assert heard.wait(10)
            seconds.append(time.perf_counter() - start)
    assert min(seconds) < LATENCY_S, seconds


def test_the_thread_sleeps(sleepers):
    def clock():
        (thread,) = [t for t in threading.enumerate() if t.name == "allreduce_jit watcher"]
        fields = Path(f"/proc/self/task/{thread.native_id}/status").read_text()
        return [line for line in fields.splitlines() if "ctxt_switches" in line]

    with watch({1: described(sleepers()[0].pid)}, print):
        time.sleep(0.2)
        before = clock()
        time.sleep(1.0)
        assert clock() == before


# -- identity


def test_dead_before_the_watch(told):
    process = subprocess.Popen(["sleep", "600"])
    peer = described(process.pid)
    process.kill()
    process.wait()
    with watch({3: peer}, told.put) as handle:
        assert handle.watched == (3,) and told.get(timeout=10) == 3


def test_a_process_id_in_use_again_is_a_death(sleepers, told):
    """Another process has the id of the peer, which therefore is dead."""
    (other,) = sleepers()
    peer = replace(described(other.pid), started=described(other.pid).started - 1)
    before = descriptors()
    with watch({3: peer}, told.put):
        assert told.get(timeout=10) == 3
    assert descriptors() == before


@pytest.mark.parametrize("field", ["boot", "namespaces"])
@pytest.mark.parametrize("value", ["", "another"])
def test_what_means_another_process_is_never_watched(sleepers, told, caplog, field, value):
    (peer,) = sleepers()
    foreign = replace(described(peer.pid), **{field: value})
    with watch({1: foreign, 2: foreign}, told.put) as handle:
        assert handle.watched == () and set(handle.refused) == {1, 2}
        peer.kill()
        nothing_more(told)
    assert len(caplog.records) == 1 and "by the deadline alone" in caplog.text


def test_another_pid_namespace_is_refused():
    """Two real namespaces: the same number, another process."""
    program = "import json, dataclasses; from allreduce_jit.machine.process import Process; print(json.dumps(dataclasses.asdict(Process.own())))"
    found = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", sys.executable, "-c", program],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    if found.returncode and "unshare" in found.stderr:
        pytest.skip(f"needs user namespaces: {found.stderr.strip()}")
    peer = Process.from_json(json.loads(found.stdout))
    assert peer.refusal(Process.own()) == "it lives in another namespace of process ids or of time"
    assert peer.boot == Process.own().boot and peer.pid != os.getpid()


def test_own_identity():
    own = Process.own()
    assert own.pid == os.getpid() and own.boot and own.started > 0 and own.refusal(own) is None
    assert Process.from_json(asdict(own)) == own


@pytest.mark.parametrize(
    "fields", [None, 3, {}, [1], {"pid": "1"}, {"pid": 0}, {"pid": True}, {"boot": None}, {"started": 1.5}, {"more": 1}]
)
def test_garbage_is_no_process(fields):
    if isinstance(fields, dict) and fields:
        fields = asdict(Process.own()) | fields
    with pytest.raises(ValueError, match="no process"):
        Process.from_json(fields)


def test_a_foreign_proc_is_no_proof(monkeypatch):
    monkeypatch.setattr(os, "readlink", lambda path: "1")
    assert Process.own().refusal(Process.own()) == "a process cannot prove its identity (no usable /proc)"


@pytest.mark.parametrize("text", ["", "\n"])
def test_hosts_that_cannot_tell_their_boot_are_not_one(monkeypatch, text):
    """Two hosts without a boot id look alike in everything else, namespaces of the first process included."""
    nameless = replace(Process.own(), boot="")
    assert nameless.refusal(nameless) == "a process cannot prove its identity (no usable /proc)"
    real = open
    monkeypatch.setattr("builtins.open", lambda path, *rest: io.StringIO(text) if "boot_id" in str(path) else real(path, *rest))
    own = Process.own()
    assert (own.boot, own.namespaces, own.started) == ("", "", -1) and own.refusal(own)
    assert probe("cpu").host.host_id is None and any("boot_id is empty" in problem for problem in probe("cpu").problems)


# -- refusals


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS, errno.EINVAL, errno.EMFILE])
def test_pidfd_refused(monkeypatch, sleepers, told, caplog, number):
    def refuse(pid):
        raise OSError(number, os.strerror(number))

    peers = sleepers(3)
    monkeypatch.setattr(os, "pidfd_open", refuse)
    before = descriptors()
    for _ in range(3):
        with watch({rank: described(p.pid) for rank, p in enumerate(peers)}, told.put) as handle:
            assert handle.refused == dict.fromkeys(range(3), f"pidfd_open: {errno.errorcode[number]}")
            assert watcher._loop is None
    assert len(caplog.records) == 1 and descriptors() == before


def test_no_thread_to_be_had(monkeypatch, sleepers, told):
    def refuse(self):
        raise RuntimeError("can't start new thread")

    before = descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with watch({1: described(sleepers()[0].pid)}, told.put) as handle:
            assert handle.watched == () and "can't start new thread" in handle.refused[1]
    assert descriptors() == before


def test_a_hidden_process_is_refused(monkeypatch, sleepers, told):
    (peer,) = sleepers()
    known, real = described(peer.pid), start_ticks

    def hidden(pid):
        if pid == peer.pid:
            raise FileNotFoundError("hidden")
        return real(pid)

    monkeypatch.setattr("allreduce_jit.machine.process.start_ticks", hidden)
    before = descriptors()
    with watch({1: known}, told.put) as handle:
        assert handle.refused == {1: "/proc does not show it: hidden"}
    assert descriptors() == before


# -- callbacks and closing


def test_a_callback_that_raises_stops_nobody(sleepers, told, caplog):
    peers = sleepers(2)

    def fail(rank):
        told.put(rank)
        raise ValueError("planted")

    with watch({rank: described(p.pid) for rank, p in enumerate(peers)}, fail):
        for rank in (1, 0):
            peers[rank].kill()
            assert told.get(timeout=10) == rank
    assert "planted" in caplog.text


def test_close_inside_the_callback(sleepers, told):
    before = descriptors()
    peers = sleepers(2)

    def close_it(rank):
        handle.close()
        told.put(rank)

    handle = watch({rank: described(p.pid) for rank, p in enumerate(peers)}, close_it)
    peers[0].kill()
    assert told.get(timeout=10) == 0
    peers[1].kill()
    nothing_more(told)
    handle.close()
    wait_for(lambda: tasks_named() == 0 and descriptors() == before)


def test_no_lock_is_held_across_a_callback(sleepers, told):
    """It opens, closes and forks, while another thread does the same."""
    peers = sleepers(3)

    def busy(rank):
        watch({9: described(peers[2].pid)}, print).close()
        helper = threading.Thread(target=lambda: watch({8: described(peers[2].pid)}, print).close())
        helper.start()
        helper.join(10)
        pid = os.fork()
        if not pid:
            os._exit(0)
        os.waitpid(pid, 0)
        told.put((rank, helper.is_alive()))

    with watch({1: described(peers[0].pid)}, busy), watch({2: described(peers[1].pid)}, told.put):
        peers[0].kill()
        assert told.get(timeout=20) == (1, False)
        peers[1].kill()
        assert told.get(timeout=10) == 2


def test_close_does_not_wait_for_a_callback_that_waits_for_the_closer(sleepers):
    (peer,) = sleepers()
    held, inside = threading.Event(), threading.Event()
    handle = watch({1: described(peer.pid)}, lambda rank: (inside.set(), held.wait(20)))
    peer.kill()
    assert inside.wait(10)
    start = time.monotonic()
    handle.close()
    assert time.monotonic() - start < 5
    held.set()
    wait_for(lambda: tasks_named() == 0)


def test_a_closed_watch_is_silent_and_others_go_on(sleepers, told):
    peers = sleepers(1)
    first = watch({1: described(peers[0].pid)}, lambda rank: told.put("closed"))
    second = watch({1: described(peers[0].pid)}, lambda rank: told.put("open"))
    first.close()
    first.close()
    peers[0].kill()
    assert told.get(timeout=10) == "open"
    nothing_more(told)
    second.close()


def test_many_cycles_leave_nothing(sleepers):
    peers = {rank: described(p.pid) for rank, p in enumerate(sleepers(3))}
    watch(peers, print).close()
    before = descriptors(), tasks()
    for turn in range(200):
        handle = watch(peers, print)
        if turn % 2:
            with watch(peers, print):
                handle.close()
        else:
            handle.close()
        assert descriptors() == before[0], turn
        wait_for(lambda: tasks() <= before[1])  # a joined thread may take a moment to leave the kernel, the first one as well


def test_a_closed_watch_keeps_nothing_alive(sleepers):
    class Owner:
        pass

    owner = Owner()
    handle = watch({1: described(sleepers()[0].pid)}, lambda rank, owner=owner: None)
    handle.close()
    gone = []
    weakref.finalize(owner, gone.append, True)
    del owner, handle
    gc.collect()
    assert gone == [True]


# -- fork and exit


def test_fork(sleepers, told):
    """The child inherits no descriptor, may watch by itself, and does not touch the parent's watch."""
    peers = sleepers(2)
    bare = descriptors()
    with watch({1: described(peers[0].pid)}, told.put) as handle:
        pid = os.fork()
        if not pid:
            code = 1
            try:
                assert descriptors() == bare and tasks() == 1 and watcher._loop is None
                handle.close()
                heard = queue.Queue()
                own = watch({7: described(peers[1].pid)}, heard.put)
                assert descriptors() == bare + 3
                os.kill(peers[1].pid, signal.SIGKILL)
                assert heard.get(timeout=10) == 7
                own.close()
                assert descriptors() == bare
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        assert os.waitpid(pid, 0)[1] == 0
        nothing_more(told)
        peers[0].kill()
        assert told.get(timeout=10) == 1


EXIT = """
import os, subprocess, sys, time
from dataclasses import replace
from allreduce_jit.machine import watcher
from allreduce_jit.machine.process import Process, start_ticks
peer = subprocess.Popen(["sleep", "5"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
handle = watcher.watch({1: replace(Process.own(), pid=peer.pid, started=start_ticks(peer.pid))}, print)
MORE
"""


@pytest.mark.parametrize(
    "more",
    [
        "",
        "peer.kill()",
        "import threading; threading.Thread(target=lambda: (time.sleep(0.3), peer.kill())).start()",
        "del handle",
    ],
)
def test_interpreter_exit_with_a_live_watch(more):
    program = EXIT.replace("MORE", f"{more}\nimport atexit\natexit.register(lambda: None)\nprint('end', flush=True)")
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-X", "dev", "-c", program], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.replace("1\n", "") == "end\n", (done.stdout, done.stderr)
    assert "Error" not in done.stderr and time.monotonic() - start < 30


def test_watch_open_and_closed_from_many_threads(sleepers):
    peers = {rank: described(p.pid) for rank, p in enumerate(sleepers(2))}
    failures = []

    def work():
        try:
            for _ in range(50):
                watch(peers, failures.append).close()
        except BaseException as e:  # noqa: BLE001
            failures.append(e)

    before = descriptors()
    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    wait_for(lambda: tasks_named() == 0 and descriptors() == before)


def tasks_named():
    return sum(thread.name == "allreduce_jit watcher" for thread in threading.enumerate())


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)
