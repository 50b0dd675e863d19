"""The kernel cache: whatever happens to its files, a load is right or it is no load, and nothing raises."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import multiprocessing
import os
import resource
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from helpers.kept import KEY, OTHER, SMALL, files

from allreduce_jit import abi
from allreduce_jit.jit import compiler, source
from allreduce_jit.jit.cache import Artifact, KernelCache, decode, encode
from allreduce_jit.jit.store import FileStore
from allreduce_jit.policy.catalogue import cuda_module, p2p_modules, triton_module


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.DEBUG, "allreduce_jit")
    return lambda: [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


@pytest.fixture
def no_compilers(monkeypatch):
    """Versions of compilers that this machine need not have."""
    monkeypatch.setattr(compiler, "_version", lambda language: f"{language} 1.0")


def stored(directory, key=KEY, artifact=SMALL):
    """A cache with one entry, and the entry's file."""
    before = set(files(directory))
    KernelCache(directory).put(key, artifact)
    (path,) = set(files(directory)) - before
    return path


def signed(head, cubin=b"\x7fELF"):
    """An entry that is intact as far as its digest goes."""
    body = (head if isinstance(head, bytes) else json.dumps(head).encode()) + b"\n" + cubin
    return hashlib.sha256(body).hexdigest().encode() + b"\n" + body


# -- intact


def test_what_goes_in_comes_out(tmp_path):
    for artifact in (SMALL, OTHER, replace(SMALL, cubin=b""), replace(SMALL, cubin=b"\n\n\0" * 1000, name="ü\n")):
        assert decode(encode(KEY, artifact)) == (KEY, artifact)
        stored(tmp_path / artifact.name.strip() / str(len(artifact.cubin)), KEY, artifact)
        cache = KernelCache(tmp_path / artifact.name.strip() / str(len(artifact.cubin)))
        assert cache.get(KEY) == artifact and cache.get("b" * 64) is None and cache.problem is None


def test_a_process_keeps_what_it_holds(tmp_path):
    cache = KernelCache(tmp_path / "here")
    cache.put(KEY, SMALL)
    shutil.rmtree(tmp_path / "here")
    assert cache.get(KEY) is SMALL


def test_no_directory():
    cache = KernelCache(None)
    assert cache.get(KEY) is None and cache.entries() == [] and cache.clear() == 0
    cache.put(KEY, SMALL)
    assert cache.get(KEY) is SMALL and "set ALLREDUCE_JIT_CACHE_DIR" in cache.problem


# -- damaged


def test_every_flipped_bit_is_seen():
    blob = encode(KEY, SMALL)
    for position in range(8 * len(blob)):
        flipped = bytearray(blob)
        flipped[position // 8] ^= 1 << position % 8
        with pytest.raises(ValueError):
            decode(bytes(flipped))


HEAD = {"key": KEY, **{k: v for k, v in asdict(SMALL).items() if k != "cubin"}}
FOREIGN = {
    "empty": b"",
    "one byte": b"\n",
    "text": b"hello, I am not a kernel\n" * 20,
    "a bare cubin": b"\x7fELF" + bytes(500),
    "zeros": bytes(4096),
    "another entry": encode("b" * 64, OTHER),
    "no header": signed(b""),
    "no JSON": signed(b"{"),
    "no text": signed(b"\xff\xfe"),
    "nested JSON": signed(b"[" * 100_000),
    "a list": signed([1, 2]),
    "null": signed(None),
    "a number": signed(5),
    "a string": signed("name"),
    "an older header": signed({k: v for k, v in HEAD.items() if k != "shared_bytes"}),
    "a newer header": signed({**HEAD, "clusters": 2}),
    "a header with a cubin": signed({**HEAD, "cubin": "x"}),
    "no key": signed({k: v for k, v in HEAD.items() if k != "key"}),
    "number for name": signed({**HEAD, "name": 5}),
    "null for arch": signed({**HEAD, "arch": None}),
    "text for threads": signed({**HEAD, "threads": "128"}),
    "fraction for threads": signed({**HEAD, "threads": 128.0}),
    "bool for threads": signed({**HEAD, "threads": True}),
    "list for shared_bytes": signed({**HEAD, "shared_bytes": [0]}),
}


def check_replaced(path, blob, log):
    """A file with ``blob`` in an entry's place: no load, no trouble, and room for the right one."""
    path.write_bytes(blob)
    root = path.parents[1]
    cache = KernelCache(root)
    assert cache.get(KEY) is None
    assert not path.exists()
    cache.put(KEY, SMALL)
    assert cache.problem is None and not log()
    assert KernelCache(root).get(KEY) == SMALL


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_files_are_replaced(tmp_path, warnings, what):
    check_replaced(stored(tmp_path), FOREIGN[what], warnings)


def test_every_truncation_is_replaced(tmp_path, warnings):
    path, blob = stored(tmp_path), encode(KEY, SMALL)
    for length in range(len(blob)):
        check_replaced(path, blob[:length], warnings)
    check_replaced(path, blob + b"\0", warnings)


def test_flipped_bits_on_disk_are_replaced(tmp_path, warnings):
    path, blob = stored(tmp_path), encode(KEY, SMALL)
    for position in range(0, len(blob), 5):
        check_replaced(path, blob[:position] + bytes([blob[position] ^ 0x10]) + blob[position + 1 :], warnings)


def test_the_right_header_is_read():
    """The damage above is damage: its undamaged form loads."""
    assert decode(signed(HEAD, SMALL.cubin)) == (KEY, SMALL)


def test_a_directory_in_the_place_of_a_file(tmp_path, warnings):
    path = stored(tmp_path)
    path.unlink()
    path.mkdir()
    cache = KernelCache(tmp_path)
    assert cache.get(KEY) is None
    cache.put(KEY, SMALL)
    assert cache.get(KEY) is SMALL and cache.problem is not None and len(warnings()) == 1


def test_build_compiles_again_after_damage(tmp_path, monkeypatch, no_compilers):
    compiled = []

    def front(spec, arch):
        compiled.append(spec.name)
        return Artifact(spec.name, arch, 0, 0, b"\x7fELF")

    monkeypatch.setattr(compiler, "_nvrtc", front)
    spec = cuda_module("one_shot", 2)
    for expected in (["one_shot_ws2"], ["one_shot_ws2"]):  # compiled the first time, then held on disk
        _, was_cached = compiler.build(spec, "sm_90", KernelCache(tmp_path))
        assert compiled == expected
    assert was_cached
    (path,) = files(tmp_path)
    path.write_bytes(path.read_bytes()[:-1])
    artifact, was_cached = compiler.build(spec, "sm_90", KernelCache(tmp_path))
    assert compiled == ["one_shot_ws2"] * 2 and not was_cached
    assert compiler.build(spec, "sm_90", KernelCache(tmp_path)) == (artifact, True)


# -- unusable directories


def check_memory_only(cache, log):
    for turn in range(3):
        key = f"{turn:064}"
        assert cache.get(key) is None
        cache.put(key, SMALL)
        assert cache.get(key) is SMALL
    assert cache.entries() == [] and cache.clear() == 0
    assert cache.problem and len(log()) == 1, log()
    assert "kernel cache" in log()[0] and str(cache.directory) in log()[0]


def a_file(tmp_path):
    (tmp_path / "file").write_text("x")
    return tmp_path / "file"


UNUSABLE = {
    "a file": a_file,
    "below a file": lambda tmp_path: a_file(tmp_path) / "sub",
    "in /proc": lambda tmp_path: Path("/proc/no/such"),
    "below /dev/null": lambda tmp_path: Path("/dev/null/cache"),
    "too long": lambda tmp_path: tmp_path / ("x" * 300),
    "a NUL in it": lambda tmp_path: tmp_path / "a\0b",
    "a loop of links": lambda tmp_path: (tmp_path / "loop").symlink_to("loop") or tmp_path / "loop",
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_unusable_directory(tmp_path, warnings, what):
    check_memory_only(KernelCache(UNUSABLE[what](tmp_path)), warnings)


@pytest.mark.skipif(os.geteuid() == 0, reason="needs a user whom permissions bind")
@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_permissions(tmp_path, warnings, mode):
    (tmp_path / "bare").mkdir(mode=mode)
    check_memory_only(KernelCache(tmp_path / "bare"), warnings)


ERRORS = [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO, errno.ESTALE]


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
@pytest.mark.parametrize("where", ["__init__", "__setitem__"])
def test_the_system_refuses(tmp_path, monkeypatch, warnings, where, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(FileStore, where, refuse)
    cache = KernelCache(tmp_path)
    check_memory_only(cache, warnings)
    assert os.strerror(code) in cache.problem


def test_one_warning_whatever_follows(tmp_path, monkeypatch, warnings):
    def refuse(*args, **kwargs):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    cache = KernelCache(tmp_path)
    for name in ("__setitem__", "get", "clear"):
        monkeypatch.setattr(FileStore, name, refuse)
    cache.put(KEY, SMALL)
    assert cache.get("b" * 64) is None
    cache.clear()
    assert len(warnings()) == 1


@pytest.mark.parametrize("code", ERRORS, ids=errno.errorcode.get)
def test_the_system_refuses_to_remove(tmp_path, monkeypatch, code):
    def refuse(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    path = stored(tmp_path)
    path.write_bytes(b"damage")
    cache = KernelCache(tmp_path)
    for name in ("__delitem__", "clear"):
        monkeypatch.setattr(FileStore, name, refuse)
    assert cache.get(KEY) is None and cache.clear() == 0


def test_a_read_only_directory_is_still_read(tmp_path, monkeypatch, warnings):
    """An image with kernels baked in: what is there is used, what is missing stays in memory."""
    stored(tmp_path)

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(FileStore, "__setitem__", refuse)
    cache = KernelCache(tmp_path)
    cache.put("b" * 64, OTHER)
    assert cache.get(KEY) == SMALL and cache.get("b" * 64) is OTHER
    assert "Read-only file system" in cache.problem and len(warnings()) == 1


def _full_disk(directory):
    """In a process of its own: no file may grow past 100 bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
    cache = KernelCache(directory)
    cache.put(KEY, SMALL)
    return cache.get(KEY) == SMALL, cache.problem, [str(path) for path in files(directory)]


def test_a_disk_that_is_full_in_mid_write(tmp_path):
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        held, problem, left = pool.submit(_full_disk, tmp_path).result()
    assert held and os.strerror(errno.EFBIG) in problem
    assert left == []  # no half-written file


@pytest.mark.parametrize("replacement", [None, "file"])
def test_directory_removed_midway(tmp_path, warnings, replacement):
    root = tmp_path / "cache"
    cache = KernelCache(root)
    cache.put(KEY, SMALL)
    shutil.rmtree(root)
    if replacement:
        root.write_text("x")
    assert cache.get("b" * 64) is None
    cache.put("b" * 64, OTHER)
    assert cache.get(KEY) is SMALL and cache.get("b" * 64) is OTHER
    if replacement:
        assert cache.problem and len(warnings()) == 1
    else:  # made anew
        assert cache.problem is None and KernelCache(root).get("b" * 64) == OTHER


# -- many processes

KEYS = [f"{k:064}" for k in range(3)]


def _versions(key):
    """What any writer may have stored: large, and different in every byte, so that a mixture would show."""
    return [Artifact(f"kernel_{key[-1]}", "sm_90", writer, 0, bytes([writer]) * 300_000) for writer in range(8)]


def _write_and_read(directory, writer, rounds):
    """Counts (loads, wrong loads, caches with a problem)."""
    loads = wrong = problems = 0
    for turn in range(rounds):
        cache = KernelCache(directory)  # nothing in memory
        for key in KEYS:
            if (turn + writer) % 2:
                cache.put(key, _versions(key)[writer])
                cache = KernelCache(directory)
            found = cache.get(key)
            if found is not None:
                loads += 1
                wrong += found not in _versions(key)
            problems += cache.problem is not None
        if writer == 0 and turn % 3 == 2:
            cache.clear()
            cache.entries()
        if writer == 1:
            for path in files(directory)[:1]:
                damage(path)
    return loads, wrong, problems


def damage(path):
    try:
        with open(path, "r+b") as file:
            file.seek(200_000)
            file.write(b"damage")
    except OSError:
        pass  # replaced or removed by another process


def test_eight_processes_at_once(tmp_path):
    with ProcessPoolExecutor(8, multiprocessing.get_context("spawn")) as pool:
        results = [pool.submit(_write_and_read, tmp_path, writer, 6) for writer in range(8)]
        loads, wrong, problems = map(sum, zip(*(result.result() for result in results), strict=True))
    assert loads > 20 and wrong == 0 and problems == 0
    cache = KernelCache(tmp_path)
    for key in KEYS:
        assert cache.get(key) in [None, *_versions(key)]


# -- size


def test_what_was_written_first_goes_first(tmp_path):
    store = FileStore(tmp_path, 1000)
    for age, key in enumerate("abcd"):
        store[key] = bytes(300)
        os.utime(store.path(key), (age, age))
    store["e"] = bytes(300)
    assert [key for key in "abcde" if store.get(key)] == ["c", "d", "e"]


def test_unfinished_writes_are_swept_once_they_are_old(tmp_path):
    store = FileStore(tmp_path, 1000)
    store["a"] = b"x"
    old, young = (store.path("a").parent / f".tmp-{name}" for name in ("old", "young"))
    for path in (old, young):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    store["b"] = b"y"
    assert young.exists() and not old.exists()
    store.clear()
    assert files(tmp_path) == []


# -- listing and clearing


def test_entries_and_clear(tmp_path):
    cache = KernelCache(tmp_path)
    assert cache.entries() == [] and cache.clear() == 0
    cache.put("b" * 64, OTHER)
    cache.put(KEY, SMALL)
    cache.put("c" * 64, replace(SMALL, arch="sm_100"))
    damaged = stored(tmp_path, "d" * 64)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    (tmp_path / "README").write_text("not ours")
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for ever
    assert cache.entries() == [("one_shot_ws2 sm_100", 52), ("one_shot_ws2 sm_90", 52), ("two_shot_ws2 sm_90", 10)]
    assert cache.clear() == 3
    assert cache.entries() == [] and files(tmp_path) == [tmp_path / "README"]
    assert cache.get(KEY) is None  # not from memory either
    cache.put(KEY, SMALL)
    assert KernelCache(tmp_path).entries() == [("one_shot_ws2 sm_90", 52)]


# -- keys


def test_keys_tell_modules_apart(monkeypatch, no_compilers):
    specs = [cuda_module("one_shot", n) for n in range(2, 9)] + [cuda_module("two_shot", 2), cuda_module("one_shot", 2, True)]
    keys = [compiler._key(spec, arch) for spec in specs for arch in ("sm_80", "sm_90", "sm_100")]
    assert len(set(keys)) == len(keys)
    assert keys == [compiler._key(spec, arch) for spec in specs for arch in ("sm_80", "sm_90", "sm_100")]
    monkeypatch.setattr(compiler, "_triton_source", lambda: "text")
    specs = p2p_modules(2)
    assert len({compiler._key(spec, "sm_90") for spec in specs}) == len(specs) == 12


def test_keys_change_with_constants_compiler_and_package(monkeypatch, no_compilers):
    spec = cuda_module("one_shot", 2)
    key = compiler._key(spec, "sm_90")
    assert compiler._key(replace(spec, constants=(("WORLD_SIZE", 2), ("DEBUG", 1))), "sm_90") != key
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_version", lambda language: "nvrtc 99.0")
        assert compiler._key(spec, "sm_90") != key
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "__version__", "99.0")
        assert compiler._key(spec, "sm_90") != key
    assert compiler._key(spec, "sm_90") == key


@pytest.mark.parametrize("name", ["one_shot.cu", "packet.cuh", "ptx.cuh", "wire/sentinel.cuh"])
def test_keys_change_with_the_source_and_what_it_includes(tmp_path, monkeypatch, no_compilers, name):
    import allreduce_jit.cuda_kernels as kernels

    copy = shutil.copytree(Path(kernels.__file__).parent, tmp_path / "cuda")
    monkeypatch.setattr(source.importlib.resources, "files", lambda package: copy)
    spec, other = cuda_module("one_shot", 2), cuda_module("two_shot", 2)

    def keys():
        compiler._cuda_source.cache_clear()
        return compiler._key(spec, "sm_90"), compiler._key(other, "sm_90")

    try:
        before = keys()
        assert keys() == before
        with open(copy / name, "a") as file:
            file.write("// another comment\n")
        after = keys()
    finally:
        compiler._cuda_source.cache_clear()
    assert after[0] != before[0]
    assert (after[1] != before[1]) == (name != "one_shot.cu")


@pytest.mark.parametrize(
    "spec", [cuda_module("one_shot", 2), triton_module("one_shot", 2, "float16", True)], ids=["cuda", "triton"]
)
def test_keys_change_with_the_abi(monkeypatch, no_compilers, spec):
    """A field that moves, moves for kernels too: none that was compiled before may be taken."""
    keys = set()
    try:
        for fields in (["epoch", "stopped"], ["stopped", "epoch"]):
            channel = type("Channel", (abi.Channel.__base__,), {"_fields_": [(name, abi.u32) for name in fields]})
            monkeypatch.setattr(abi, "Channel", channel)
            compiler._cuda_source.cache_clear()
            compiler._triton_source.cache_clear()
            keys.add(compiler._key(spec, "sm_90"))
    finally:
        compiler._cuda_source.cache_clear()
        compiler._triton_source.cache_clear()
    assert len(keys) == 2


def test_keys_change_with_the_triton_source(monkeypatch, no_compilers):
    keys = set()
    for text in ("one", "two"):
        monkeypatch.setattr(compiler, "_triton_source", lambda text=text: text)
        keys.add(compiler._key(triton_module("one_shot", 2, "float16", True), "sm_90"))
    assert len(keys) == 2
