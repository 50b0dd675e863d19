"""The cache between users: everyone is served what root or he himself keeps, nobody what somebody else may have written.

As root sets users up: each test's users are processes that gave root's rights away.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.kept import FACTS, KEY, OTHER, SMALL, TABLES, files

from allreduce_jit.cli import main as cli
from allreduce_jit.jit.cache import KernelCache
from allreduce_jit.jit.store import FileStore
from allreduce_jit.policy import measured_tables as tuned

ROOT, ALICE, BOB = 0, 65534, 12345
SECOND = "b" * 64
needs_users = pytest.mark.skipif(os.geteuid() != 0, reason="needs root (CAP_SETUID, CAP_CHOWN) to act as several users")


def as_user(uid, work, umask=0o022):
    """What ``work`` returns, as JSON, in a process of that user; its failures are failures here."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.umask(umask)
            if uid:
                os.setgroups([])
                os.setgid(uid)
                os.setuid(uid)
            answer = {"returned": work()}
        except BaseException:  # noqa: BLE001
            answer = {"failed": traceback.format_exc()}
        os.write(into, json.dumps(answer).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out) as stream:
        answer = json.loads(stream.read())
    os.waitpid(pid, 0)
    assert "failed" not in answer, answer["failed"]
    return answer["returned"]


@pytest.fixture
def place():
    """A directory that all users can reach, which those of pytest are not."""
    path = Path(tempfile.mkdtemp(prefix="allreduce_jit_users_"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def fill(cache):
    """Two kernels and a table."""
    KernelCache(cache).put(KEY, SMALL)
    KernelCache(cache).put(SECOND, OTHER)
    tuned.save(cache, FACTS, TABLES)


def look(cache):
    """Which of them count, and what ``cache list`` would explain."""
    opened = KernelCache(cache)
    found = [opened.get(KEY) == SMALL, opened.get(SECOND) == OTHER, tuned.load(cache, FACTS) is not None]
    return found, dict(opened.refused() + tuned.refused(cache)), opened.problem


def entry(cache, key=KEY):
    return FileStore(cache, 1 << 20).path(key)


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


@needs_users
@pytest.mark.parametrize(
    ("umask", "file", "directory"), [(0o022, 0o644, 0o755), (0o002, 0o644, 0o755), (0o027, 0o640, 0o750), (0o077, 0o600, 0o700)]
)
def test_modes_are_those_of_the_umask(place, umask, file, directory):
    """But that no group may write: what it may is not read."""
    cache = place / "cache"
    as_user(ROOT, lambda: fill(cache), umask)
    assert {mode(path) for path in files(cache)} == {file}
    assert {mode(path) for path in (cache, *cache.rglob("*")) if path.is_dir()} == {directory}
    assert as_user(ROOT, lambda: look(cache)) == [[True] * 3, {}, None]


@needs_users
@pytest.mark.parametrize("directory_mode", [0o755, 0o555, 0o711])
def test_what_root_has_warmed_up_serves_everyone(place, directory_mode):
    """An image: its directory cannot be written by the user who runs there, and with 711 not even be listed."""
    cache = place / "cache"
    as_user(ROOT, lambda: fill(cache))
    for path in (cache, *cache.iterdir()):
        path.chmod(directory_mode)
    for user in (ROOT, ALICE, BOB):
        found, refused, problem = as_user(user, lambda: look(cache))
        assert found == [True] * 3 and problem is None
        assert not refused or directory_mode == 0o711

    def write():
        opened = KernelCache(cache)
        opened.put("c" * 64, SMALL)
        return opened.get("c" * 64) == SMALL, opened.get(KEY) == SMALL, opened.problem

    held, served, problem = as_user(ALICE, write)
    assert held and served and "Permission denied" in problem


@needs_users
def test_an_entry_that_cannot_be_read_is_missed_alone(place):
    cache = place / "cache"
    as_user(ROOT, lambda: fill(cache))
    entry(cache).chmod(0o600)
    found, refused, problem = as_user(ALICE, lambda: look(cache))
    assert found == [False, True, True] and problem is None
    assert list(refused) == [str(entry(cache))] and "Permission denied" in refused[str(entry(cache))]
    tuned.path(cache, FACTS).chmod(0o600)
    assert as_user(ALICE, lambda: look(cache))[0] == [False, True, False]
    entry(cache).parent.chmod(0o700)
    found, refused, problem = as_user(ALICE, lambda: look(cache))
    assert found == [False, True, False] and problem is None and str(entry(cache).parent) in refused


SPOIL = {
    "an entry of another user": (lambda cache: os.chown(entry(cache), BOB, BOB), [False, True, True], "belongs to user 12345"),
    "an entry that its group may write": (lambda cache: entry(cache).chmod(0o664), [False, True, True], "its group may write"),
    "an entry that all may write": (lambda cache: entry(cache).chmod(0o646), [False, True, True], "everybody may write"),
    "its directory of another user": (lambda cache: os.chown(entry(cache).parent, BOB, BOB), [False, True, True], "belongs to"),
    "its directory that a group may write": (
        lambda cache: entry(cache).parent.chmod(0o775),
        [False, True, True],
        "chmod -R go-w",
    ),
    "the tables' directory": (lambda cache: (cache / "tuning").chmod(0o777), [True, True, False], "its group and everybody may"),
    "a table of another user": (lambda cache: os.chown(tuned.path(cache, FACTS), BOB, -1), [True, True, False], "belongs to"),
    "the cache directory of another user": (lambda cache: os.chown(cache, BOB, BOB), [False] * 3, "set ALLREDUCE_JIT_CACHE_DIR"),
    "a cache directory that its group may write": (lambda cache: cache.chmod(0o775), [False] * 3, "chmod -R go-w"),
    "a cache directory that all may write": (lambda cache: cache.chmod(0o777), [False] * 3, "chmod -R go-w"),
}


@needs_users
@pytest.mark.parametrize("owner", [ROOT, ALICE])
@pytest.mark.parametrize("what", SPOIL)
def test_what_others_may_have_written_does_not_count(place, what, owner):
    cache = place / "cache"
    cache.mkdir()
    os.chown(cache, owner, owner)
    as_user(owner, lambda: fill(cache))
    assert as_user(ALICE, lambda: look(cache)) == [[True] * 3, {}, None]
    spoil, expected, why = SPOIL[what]
    spoil(cache)
    found, refused, problem = as_user(ALICE, lambda: look(cache))
    assert found == expected and refused and all(why in reason for reason in refused.values()), refused
    assert (problem is not None) == (expected == [False] * 3)
    if problem:
        assert why in problem and str(cache) in problem


@needs_users
def test_root_is_not_served_by_a_user(place):
    cache = place / "cache"
    cache.mkdir()
    os.chown(cache, ALICE, ALICE)
    as_user(ALICE, lambda: fill(cache))
    assert as_user(ALICE, lambda: look(cache)) == [[True] * 3, {}, None]
    for user in (ROOT, BOB):
        found, _, problem = as_user(user, lambda: look(cache))
        assert found == [False] * 3 and "belongs to user 65534" in problem


@needs_users
def test_users_who_share_a_sticky_directory(place):
    """As below /tmp: none can replace another's, so everyone has his own, and root's."""
    cache = place / "cache"
    cache.mkdir()
    cache.chmod(0o1777)
    as_user(ALICE, lambda: KernelCache(cache).put(KEY, SMALL))
    as_user(ROOT, lambda: KernelCache(cache).put(SECOND, OTHER))
    assert as_user(ALICE, lambda: look(cache))[::2] == [[True, True, False], None]
    found, refused, problem = as_user(BOB, lambda: look(cache))
    assert found == [False, True, False] and problem is None and list(refused) == [str(entry(cache))]


@needs_users
def test_users_who_share_a_directory_clear_and_sweep_what_is_theirs(place):
    """What another left there, unfinished writes among it, is in nobody's way."""
    cache = place / "cache"
    cache.mkdir()
    cache.chmod(0o1777)
    as_user(ROOT, lambda: fill(cache))
    for key in (KEY, SECOND):
        entry(cache, key).parent.chmod(0o1777)
        left = entry(cache, key).parent / ".tmp-left"
        left.write_text("of a writer that died")
        os.utime(left, (0, 0))

    def write_and_clear():
        opened = KernelCache(cache)
        for key in "abcd":
            opened.put(key, SMALL)
        return opened.problem, len(opened.entries()), opened.clear(), len(opened.entries())

    assert as_user(ALICE, write_and_clear) == [None, 6, 4, 2]
    assert as_user(ROOT, lambda: KernelCache(cache).clear()) == 2 and files(cache) == [tuned.path(cache, FACTS)]


@needs_users
def test_links_that_lead_nowhere(place):
    cache = place / "cache"
    as_user(ROOT, lambda: fill(cache))
    for target in (entry(cache), place / "none"):  # a loop, and nothing
        entry(cache).unlink()
        entry(cache).symlink_to(target)
        found, refused, problem = as_user(ALICE, lambda: look(cache))
        assert found == [False, True, True] and problem is None
        assert [Path(file) for file in refused] == ([entry(cache)] if target == entry(cache) else [])


LINKS = {
    "to what root keeps elsewhere": (lambda kept: None, ROOT, True),
    "to what others may write": (lambda kept: kept.chmod(0o666), ROOT, False),
    "to a directory that others may write": (lambda kept: kept.parent.chmod(0o777), ROOT, False),
    "to another user's": (lambda kept: os.chown(kept, BOB, BOB), ROOT, False),
    "by another user": (lambda kept: None, BOB, False),
}


@needs_users
@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("what", LINKS)
def test_links(place, what, folder):
    """Of an entry, or of the directory with it; in a sticky cache directory, where others can make links."""
    spoil, owner, counts = LINKS[what]
    cache, elsewhere = place / "cache", place / "elsewhere"
    as_user(ROOT, lambda: fill(cache))
    cache.chmod(0o1777)
    moved, target = (entry(cache).parent, elsewhere) if folder else (entry(cache), elsewhere / "entry")
    target.parent.mkdir(exist_ok=True)
    shutil.move(moved, target)
    moved.symlink_to(target)
    os.lchown(moved, owner, owner)
    kept = elsewhere / (entry(cache).name if folder else "entry")
    spoil(kept)
    assert as_user(ALICE, lambda: look(cache))[0] == [counts, True, True]


@needs_users
def test_a_link_to_the_cache_directory(place):
    as_user(ROOT, lambda: fill(place / "real"))
    (place / "cache").symlink_to(place / "real")
    assert as_user(ALICE, lambda: look(place / "cache"))[::2] == [[True] * 3, None]
    (place / "real").chmod(0o777)
    assert as_user(ALICE, lambda: look(place / "cache"))[0] == [False] * 3


@pytest.mark.parametrize("below", [False, True])
def test_nothing_is_written_where_it_would_not_be_read(tmp_path, caplog, below):
    cache = tmp_path / "cache"
    spoilt = entry(cache).parent if below else cache
    spoilt.mkdir(parents=True, exist_ok=True)
    spoilt.chmod(0o775)
    caplog.set_level(logging.WARNING, "allreduce_jit")
    opened = KernelCache(cache)
    for artifact in (SMALL, OTHER):
        opened.put(KEY, artifact)
        assert opened.get(KEY) == artifact
    assert files(cache) == [] and len(caplog.records) == 1 and f"chmod -R go-w {spoilt}" in opened.problem
    spoilt.chmod(0o755)
    opened = KernelCache(cache)
    opened.put(KEY, SMALL)
    assert KernelCache(cache).get(KEY) == SMALL and opened.problem is None


def test_a_table_is_not_written_where_it_would_not_be_read(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(OSError, match="its group and everybody may write"):
        tuned.save(tmp_path, FACTS, TABLES)
    assert files(tmp_path) == []


def test_the_listing_names_what_does_not_count(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ALLREDUCE_JIT_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o755)
    fill(tmp_path)
    KernelCache(tmp_path).put("c" * 64, replace(SMALL, arch="sm_100"))
    entry(tmp_path).chmod(0o666)
    entry(tmp_path, SECOND).write_bytes(b"damage")
    tuned.path(tmp_path, FACTS).chmod(0o664)
    assert cli.main(["cache", "list", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in document["entries"]] == ["one_shot_ws2 sm_100"] and document["tables"] == []
    refused = {one["file"]: one["why"] for one in document["refused"]}
    assert refused.keys() == {str(entry(tmp_path)), str(entry(tmp_path, SECOND)), str(tuned.path(tmp_path, FACTS))}
    assert "chmod go-w" in refused[str(entry(tmp_path))] and refused[str(entry(tmp_path, SECOND))] == "digest mismatch"
    assert cli.main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    assert all(f"not used: {file}: {why}" in out for file, why in refused.items()) and "0 tables" in out


def test_a_link_elsewhere_is_written_through(tmp_path):
    """A cache directory whose parts lie on another disk goes on being used."""
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o755)
    (tmp_path / "disk").mkdir(mode=0o755)
    entry(cache).parent.symlink_to(tmp_path / "disk")
    KernelCache(cache).put(KEY, SMALL)
    assert KernelCache(cache).get(KEY) == SMALL and len(files(tmp_path / "disk")) == 1
