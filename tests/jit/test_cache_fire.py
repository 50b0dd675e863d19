"""The kernel cache under fire: writers killed at every step, errors from every call, many processes, full disks."""

from __future__ import annotations

import builtins
import errno
import hashlib
import io
import itertools
import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from helpers import ROOT

from allreduce_jit.jit import cache as cache_module
from allreduce_jit.jit import compiler, store
from allreduce_jit.jit.cache import Artifact, KernelCache, decode, encode
from allreduce_jit.jit.store import FileStore
from allreduce_jit.machine import files as cache_files
from allreduce_jit.policy.catalogue import cuda_module

LONG = os.environ.get("LONG") == "1"
KEY = "a" * 64
OLD = Artifact("one_shot_ws2", "sm_90", 128, 2048, b"\x7fELF old" * 20)
NEW = replace(OLD, cubin=b"\x7fELF new" * 30)
WATCHED = {store.__file__, cache_module.__file__, cache_files.__file__, __file__}


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.DEBUG, "allreduce_jit")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


class InTwo:
    """A file that is written in two halves, with a step between them."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.file.close()

    def write(self, blob):
        self.file.write(blob[: len(blob) // 2])
        self.file.flush()
        self.file.write(blob[len(blob) // 2 :])
        self.file.flush()


def at_step(k, deed, work):
    """Run ``work``; at its ``k``-th step (a line or a return of the cache's code) do ``deed``. Whether it came to that."""
    left, fdopen, done = [k], os.fdopen, []

    def trace(frame, event, arg):
        if frame.f_code.co_filename not in WATCHED:
            return None
        if left[0] == 0 and not done:
            done.append(True)
            sys.settrace(None)
            deed()
            sys.settrace(trace)
        left[0] -= 1
        return trace

    os.fdopen = lambda *args: InTwo(fdopen(*args))
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(None)
        os.fdopen = fdopen
    return bool(done)


def killed_at(k, work):
    """Whether a child that runs ``work`` lived to be killed at its ``k``-th step."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            at_step(k, lambda: os.kill(os.getpid(), signal.SIGKILL), work)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), status
    return status == signal.SIGKILL


def every_step(trial):
    """``trial(k)`` for all k until it says that there was no such step."""
    k = next(k for k in itertools.count() if not trial(k))
    assert k > 15, "too few steps to mean anything"


# -- a writer that is killed


def test_a_writer_killed_at_every_step_of_a_first_write(tmp_path, warnings):
    def trial(k):
        root = tmp_path / str(k)
        killed = killed_at(k, lambda: KernelCache(root).put(KEY, NEW))
        cache = KernelCache(root)
        assert cache.get(KEY) in ((None, NEW) if killed else (NEW,)), k
        cache.put(KEY, OLD)
        assert KernelCache(root).get(KEY) == OLD and cache.problem is None
        return killed

    every_step(trial)
    assert not warnings()


def test_a_writer_killed_at_every_step_of_a_replacement(tmp_path, warnings):
    """There is always one of the two: never nothing, never a mixture."""

    def trial(k):
        KernelCache(tmp_path).put(KEY, OLD)
        killed = killed_at(k, lambda: KernelCache(tmp_path).put(KEY, NEW))
        assert KernelCache(tmp_path).get(KEY) in ((OLD, NEW) if killed else (NEW,)), k
        assert [bytes_ for _, bytes_ in KernelCache(tmp_path).entries()] in ([len(OLD.cubin)], [len(NEW.cubin)])
        return killed

    every_step(trial)
    for path in tmp_path.rglob(".tmp-*"):
        os.utime(path, (0, 0))
    KernelCache(tmp_path).put(KEY, NEW)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1  # what the dead left is swept
    assert not warnings()


def test_a_writer_killed_while_it_makes_room_or_clears(tmp_path):
    def trial(work):
        def once(k):
            shutil.rmtree(tmp_path)
            for key in "abcd":
                FileStore(tmp_path, 1 << 20)[key] = bytes(300)
            killed = killed_at(k, work)
            left = FileStore(tmp_path, 1 << 20)
            assert all(left.get(key) in (None, bytes(300)) for key in "abcde"), k
            return killed

        return once

    every_step(trial(lambda: FileStore(tmp_path, 700).__setitem__("e", bytes(300))))
    every_step(trial(lambda: FileStore(tmp_path, 700).clear()))


def test_the_steps_would_catch_a_writer_in_place(tmp_path, monkeypatch):
    """A planted bug: written where it is read from."""

    def write(path, top, blob):
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC), "wb") as file:
            file.write(blob)

    monkeypatch.setattr(cache_files, "write", write)
    lost = 0
    for k in range(200):
        KernelCache(tmp_path).put(KEY, OLD)
        if not killed_at(k, lambda: KernelCache(tmp_path).put(KEY, NEW)):
            break
        lost += KernelCache(tmp_path).get(KEY) is None
    assert lost


# -- a directory that goes away


@pytest.mark.parametrize("work", ["put", "get", "entries", "clear"])
def test_directory_deleted_at_every_step(tmp_path, warnings, work):
    root = tmp_path / "cache"
    calls = {
        "put": lambda cache: cache.put(KEY, NEW),
        "get": lambda cache: cache.get(KEY),
        "entries": lambda cache: cache.entries(),
        "clear": lambda cache: cache.clear(),
    }

    def trial(k):
        KernelCache(root).put(KEY, OLD)
        cache = KernelCache(root)
        reached = at_step(k, lambda: shutil.rmtree(root, ignore_errors=True), lambda: calls[work](cache))
        assert KernelCache(root).get(KEY) in (None, OLD, NEW)
        if work == "put":
            assert cache.get(KEY) is NEW
        cache.put(KEY, OLD)
        assert KernelCache(root).get(KEY) == OLD, k  # it is made anew, and goes on being used
        return reached

    for k in itertools.count():
        if not trial(k):
            break
    assert k > 3 and not warnings()


# -- errors of the operating system

CALLS = ["os.mkdir", "os.open", "os.fdopen", "os.replace", "os.unlink", "os.stat", "os.scandir", "os.listdir", "io.open"]
ERRORS = ["ENOSPC", "EROFS", "EACCES", "EPERM", "EIO", "EDQUOT", "EMFILE", "ESTALE", "ENOENT", "ENOTDIR", "EISDIR", "ELOOP"]


@pytest.mark.parametrize("when", ["always", "once"])
@pytest.mark.parametrize("name", CALLS)
def test_every_call_may_fail_in_every_way(tmp_path, monkeypatch, caplog, name, when):
    module = {"os": os, "io": io}[name.split(".")[0]]
    real = getattr(module, name.split(".")[1])
    for number, error in enumerate(ERRORS):
        root = tmp_path / error
        KernelCache(root).put(KEY, OLD)
        left = [0]

        def fail(*args, **kwargs):
            path = str(args[0]) if args else ""
            relative = {"dir_fd", "src_dir_fd"} & kwargs.keys()  # to a directory of ours
            if str(tmp_path) not in path and not relative and not isinstance(args[0] if args else None, int):
                return real(*args, **kwargs)
            left[0] -= 1
            if when == "always" or left[0] == -1:
                raise OSError(getattr(errno, error), os.strerror(getattr(errno, error)), path)
            return real(*args, **kwargs)

        for nth in range(4 if when == "once" else 1):
            left[0] = nth
            with monkeypatch.context() as patch:
                patch.setattr(module, name.split(".")[1], fail)
                if name == "io.open":
                    patch.setattr(builtins, "open", fail)
                caplog.clear()
                cache = KernelCache(root)
                assert cache.get(KEY) in (None, OLD, NEW)
                cache.put(KEY, NEW)
                assert cache.get(KEY) is NEW
                assert cache.get("b" * 64) is None
                cache.entries()
                cache.clear()
            assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) <= 1, (error, caplog.text)
            assert KernelCache(root).get(KEY) in (None, OLD, NEW)


IN_NAMESPACE = """
import logging, os, sys
from allreduce_jit.jit.cache import Artifact, KernelCache
root, what = sys.argv[1:]
messages = []
logging.getLogger("allreduce_jit").addHandler(type("H", (logging.Handler,), {"emit": lambda s, r: messages.append(r)})())
some = [Artifact(f"kernel_{i}", "sm_90", 0, 0, bytes([i]) * 9000) for i in range(20)]
cache = KernelCache(root)
if what == "full":
    for i, one in enumerate(some):
        cache.put(f"{i:064}", one)
else:
    cache.put(f"{0:064}", some[0])
    if what == "read-only":
        os.system(f"mount -o remount,ro {root}")
    else:  # another user's
        os.chmod(root, 0o755)
        os.setgid(65534), os.setuid(65534)
    cache = KernelCache(root)
    cache.put(f"{1:064}", some[1])
assert all(cache.get(f"{i:064}") in (None, one) for i, one in enumerate(some))
fresh = KernelCache(root)
held = [i for i, one in enumerate(some) if fresh.get(f"{i:064}") is not None]
assert all(fresh.get(f"{i:064}") == some[i] for i in held)
assert not [name for _, _, names in os.walk(root) for name in names if name.startswith(".tmp")]
fresh.entries(), fresh.clear()
print(len(held), len([m for m in messages if m.levelno >= logging.WARNING]), cache.problem)
"""


@pytest.mark.parametrize(
    ("what", "error"), [("full", errno.ENOSPC), ("read-only", errno.EROFS), ("another user's", errno.EACCES)]
)
def test_a_real_file_system_that_refuses(tmp_path, what, error):
    """A tmpfs of 64 KB in a namespace of its own; no monkeypatches."""
    mount = f"mount -t tmpfs -o size=64k none {tmp_path} && exec {sys.executable} - {tmp_path} '{what.replace(chr(39), '')}'"
    space = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*space, "mount", "-t", "tmpfs", "none", str(tmp_path)], capture_output=True).returncode:
        pytest.skip("needs mount namespaces")
    if what == "another user's" and os.geteuid():
        pytest.skip("needs root, to become another user")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if what == "another user's" and not parent.stat().st_mode & 0o001:
            parent.chmod(parent.stat().st_mode | 0o011)
    done = subprocess.run([*space, "sh", "-c", mount], input=IN_NAMESPACE, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    held, warned, problem = done.stdout.split(maxsplit=2)
    assert int(held) >= (what != "another user's") and os.strerror(error) in problem, done.stdout  # files are private
    assert 1 <= int(warned) <= 2, done.stdout  # one for each cache that was used


# -- damage in every field


def test_every_bit_of_every_field(tmp_path, warnings):
    """On disk, read by a fresh cache: header fields one after the other, then the cubin."""
    small = replace(OLD, cubin=b"\x7fELF")
    KernelCache(tmp_path).put(KEY, small)
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    blob = encode(KEY, small)
    assert all(str(value).encode() in blob for value in asdict(small).values() if value != small.cubin)
    for position in range(8 * len(blob)):
        flipped = bytearray(blob)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert KernelCache(tmp_path).get(KEY) is None and not path.exists(), position
    path.write_bytes(blob)
    assert KernelCache(tmp_path).get(KEY) == small and not warnings()


def test_a_listing_survives_what_a_load_survives(tmp_path):
    KernelCache(tmp_path).put(KEY, OLD)
    (path,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    for body in (b"[" * 100_000 + b"\n", b"\xff\n", b"{}\n"):
        path.write_bytes(hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
        assert KernelCache(tmp_path).entries() == []
        assert KernelCache(tmp_path).clear() == 0
        KernelCache(tmp_path).put(KEY, OLD)


def test_entries_of_other_versions_and_gpus_in_each_others_places(tmp_path, monkeypatch, warnings):
    found = {}
    monkeypatch.setattr(compiler, "_version", lambda language: f"{language} 1.0")
    for version, arch in itertools.product(("1.0", "2.0"), ("sm_80", "sm_90", "sm_100")):
        monkeypatch.setattr(compiler, "__version__", version)
        key = compiler._key(cuda_module("one_shot", 2), arch)
        root = tmp_path / version / arch
        KernelCache(root).put(key, Artifact("one_shot_ws2", arch, 0, 0, f"{version} {arch}".encode()))
        (path,) = [path for path in root.rglob("*") if path.is_file()]
        found[version, arch] = key, path.read_bytes()
    assert len({key for key, _ in found.values()}) == len(found)
    for (here, (key, _)), (there, (_, blob)) in itertools.product(found.items(), found.items()):
        store_ = FileStore(tmp_path / "mixed", 1 << 20)
        store_[key] = blob
        loaded = KernelCache(tmp_path / "mixed").get(key)
        assert loaded == (decode(blob)[1] if here == there else None), (here, there)
    assert not warnings()


# -- many processes, cold


def _cold(root, me, rounds, barrier, results):
    wrong = problems = hits = 0
    for turn in range(rounds):
        barrier.wait(120)
        here = KernelCache(root / str(turn))
        for k in range(4):
            key = f"{(k + me) % 4:064}"
            right = Artifact(f"kernel_{key[-1]}", "sm_90", 0, 0, bytes([int(key[-1]) + 1]) * 200_000)
            found = here.get(key)
            hits += found is not None
            wrong += found not in (None, right)
            here.put(key, right)
            wrong += KernelCache(root / str(turn)).get(key) != right
        problems += here.problem is not None
    results.put((wrong, problems, hits))


def test_eight_processes_on_a_cold_cache(tmp_path):
    context, rounds = multiprocessing.get_context("spawn"), 100 if LONG else 8
    barrier, results = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_cold, args=(tmp_path, me, rounds, barrier, results)) for me in range(8)]
    for process in processes:
        process.start()
    found = [results.get(timeout=600) for _ in processes]
    for process in processes:
        process.join(60)
    wrong, problems, hits = map(sum, zip(*found))
    assert wrong == 0 and problems == 0
    assert 0 < hits < 8 * rounds * 4  # they did meet
    assert all(len(KernelCache(tmp_path / str(turn)).entries()) == 4 for turn in range(rounds))
    assert not list(tmp_path.rglob(".tmp-*"))
