"""A rank that dies, stalls or sends garbage at any step of the construction exchange: an error on the others that
names it, in time, and nothing of theirs left behind. Real processes over gloo, the real ladder over fake engines."""

from __future__ import annotations

import gc
import json
import os
import signal
import struct
import threading
import time
from contextlib import nullcontext, suppress
from datetime import timedelta
from unittest import mock

import forked
import pytest
import torch
import torch.distributed as dist
from helpers.fake_engines import fake_gpus

from allreduce_jit.errors import AllReduceError, InputError, PeerTimeoutError
from allreduce_jit.policy.verdict import Path
from allreduce_jit.setup import exchange as agree
from allreduce_jit.setup import groups, ladder

CPU = torch.device("cpu")
N = 3
EXCHANGES = ("survey", "compile", "allocate", "connect", "verify")
# Of each exchange with two peers: nothing said; one peer told; its answer asked for; all told.
OPERATIONS = 2 * (N - 1)
LAST = OPERATIONS * (len(EXCHANGES) - 1)
DEADLINE_S = 1.5
SLACK_S = 8.0  # this machine stalls
ENTERED, LEFT = "entered", "left"
LONG = os.environ.get("LONG") == "1"


def census():
    """Descriptors, shared memory and threads of this process."""
    gc.collect()
    shm = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "tasks": len(os.listdir("/proc/self/task")),
        "shm": shm,
    }


def grown(before, after):
    """What there is more of now."""
    more = {key: (before[key], after[key]) for key in ("descriptors", "threads", "tasks") if after[key] > before[key]}
    mine = {name for name in after["shm"] - before["shm"] if str(os.getpid()) in name or "allreduce" in name}
    return more | ({"shm": mine} if mine else {})


def settled(before, seconds=5.0):
    """Threads that have ended may take a moment to go."""
    end = time.monotonic() + seconds
    while grown(before, census()) and time.monotonic() < end:
        time.sleep(0.02)
    return grown(before, census())


def join(rank, port, n=N, prefix="first"):
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.PrefixStore(prefix, dist.TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=n, timeout=timedelta(seconds=600))


def climb_once():
    with fake_gpus(dist.group.WORLD) as built:
        found = ladder.climb(dist.group.WORLD, CPU)
    return found, built


class Fuse:
    """Calls ``deed`` before the ``at``-th operation (isend or irecv) of this rank."""

    def __init__(self, at, deed):
        self.left, self.deed = at, deed
        for name in ("isend", "irecv"):
            setattr(dist, name, self.burn(getattr(dist, name)))

    def burn(self, call):
        def burning(*args, **kwargs):
            if self.left == 0:
                self.deed()
            self.left -= 1
            return call(*args, **kwargs)

        return burning


def scene(rank, pipe, port, victim, at, deed, timeout_s):
    """One rank: a healthy climb, then one in which ``victim`` does ``deed`` to itself at operation ``at``."""
    os.environ["ALLREDUCE_JIT_SETUP_TIMEOUT"] = "60"
    bare = census()
    join(rank, port)
    assert climb_once()[0].verdict.path is Path.V2
    before = census()
    pipe.send(ENTERED)
    pipe.recv()  # all ranks are here; a barrier of gloo's would not survive the victim's death right after it
    os.environ["ALLREDUCE_JIT_SETUP_TIMEOUT"] = str(timeout_s)
    if rank == victim:
        Fuse(at, lambda: os.kill(os.getpid(), deed))
    start = time.monotonic()
    try:
        found, _ = climb_once()
        story = ("climbed", found.verdict.path.value)
    except AllReduceError as e:
        story = (type(e).__name__, getattr(e, "ranks", None), str(e))
        chain = e.__cause__ is not None
    seconds = time.monotonic() - start
    left = settled(before)
    closed = story[0] == "climbed" or chain
    pipe.send(story)
    pipe.recv()  # who takes its group down earlier is missing, too, for those who come later
    # The process lives on: the survivors build anew without the victim.
    os.environ["ALLREDUCE_JIT_SETUP_TIMEOUT"] = "60"
    dist.destroy_process_group()
    after_group = settled(bare)
    survivors = [r for r in range(N) if r != victim]
    join(survivors.index(rank), port, len(survivors), "second")
    again = climb_once()[0].verdict.path.value
    pipe.send((LEFT, story, seconds, left, closed, after_group, again))


def play(cases, limit):
    """``cases``: (victim, at, signal), several at a time; yields (case, stories of the survivors)."""
    width = 5
    for first in range(0, len(cases), width):
        running = []
        try:
            for victim, at, deed in cases[first : first + width]:
                store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
                ranks = forked.start(scene, N, store.port, victim, at, deed, DEADLINE_S)
                running.append(((victim, at, deed), ranks, store))
            for case, ranks, _ in running:
                survivors = set(range(N)) - {case[0]}
                for count, waiting in ((1, set(range(N))), (2, survivors)):
                    ranks.collect(waiting, count, limit)
                    for rank in waiting:
                        with suppress(OSError):
                            ranks.pipes[rank].send("go on")
                ranks.collect(survivors, 3, limit)
                yield case, [ranks.said[rank] for rank in sorted(survivors)]
        finally:
            for _, ranks, _ in running:
                ranks.kill()


def check(case, stories, fastest, slowest, most):
    victim, at, _ = case
    where = f"victim {victim} in {EXCHANGES[at // OPERATIONS]}, operation {at % OPERATIONS}"
    for said in stories:
        assert len(said) == 3 and said[2][0] == LEFT, (where, said)
        _, story, seconds, left, closed, after_group, again = said[2]
        if story[0] == "climbed" and at > LAST:
            continue  # it had heard from everyone; that a rank is dead will show at its first all-reduce
        # A survivor that is an exchange ahead may miss the victim and who has given up on the victim already.
        assert story[0] == "PeerTimeoutError" and victim in story[1] and len(story[1]) <= most, (where, story)
        assert "while ranks were agreeing" in story[2], story
        assert fastest <= seconds < slowest, (where, seconds)
        assert not left and closed and not after_group, (where, left, after_group)
        assert again == "v2", where
    assert at > LAST or (victim,) in [said[1][1] for said in stories], (where, stories)


def spread():
    """(victim, operation) over all operations, or one of each exchange, another one each time."""
    everything = [(at % N, at) for at in range(OPERATIONS * len(EXCHANGES))]
    return everything if LONG else [everything[e * OPERATIONS + e % OPERATIONS] for e in range(len(EXCHANGES))]


@pytest.mark.long
def test_a_rank_that_is_killed_at_any_step():
    """Known by the connection, at once but for one that waits for somebody else first."""
    cases = [(victim, at, signal.SIGKILL) for victim, at in spread()]
    for case, stories in play(cases, 60):
        check(case, stories, 0.0, DEADLINE_S + SLACK_S, most=N - 1)
    assert {at // OPERATIONS for _, at, _ in cases} == set(range(len(EXCHANGES)))


@pytest.mark.long
def test_a_rank_that_stalls_at_any_step():
    """Known at the deadline, and not before."""
    cases = [(victim, at, signal.SIGSTOP) for victim, at in spread()]
    for case, stories in play(cases, 60):
        # The others are told up to one exchange apart.
        check(case, stories, DEADLINE_S - 0.1, 2 * DEADLINE_S + SLACK_S, most=N - 1)


def late(rank, pipe, port):
    """Slow, but within the deadline: nobody is blamed."""
    os.environ["ALLREDUCE_JIT_SETUP_TIMEOUT"] = "20"
    join(rank, port)
    if rank == 1:
        Fuse(OPERATIONS, lambda: time.sleep(2 * DEADLINE_S))
    pipe.send(climb_once()[0].verdict.path.value)


def test_a_rank_that_is_late_is_waited_for():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with forked.start(late, N, store.port) as ranks:
        ranks.collect(set(range(N)), 1, 60)
        assert ranks.said == [["v2"]] * N


# -- garbage

GARBAGE = {
    "no JSON": b"\x7fELF\0\0",
    "no text": b"\xff\xfe\xfd",
    "a list": b"[1, 2]",
    "a number": b"5",
    "no fields": b"{}",
    "other fields": b'{"problem": null, "what": 1}',
    "a bomb": b"[" * 200_000,
    "nothing": b"",
}
LENGTHS = (-1, 1 << 60)
FIELDS = {
    "capabilities": ({}, 5, None, {"gpu": 3}),
    "choice": ({"use_v2": True, "unknown": 1}, None, 7),
    "staging_mb": (None, "many", []),
    "process": (None, {"pid": "1"}, 3),
}


def garble(exchange, what):
    """Instead of this rank's payload in the ``exchange``-th exchange, ``what``: bytes, a length, or changed fields."""
    real, left = agree._Exchange.all_gather, [exchange]

    def all_gather(self, data):
        left[0] -= 1
        if left[0] != -1:
            return real(self, data)
        if isinstance(what, bytes):
            return real(self, what)
        if isinstance(what, dict):
            return real(self, json.dumps({**json.loads(data), **what}).encode())
        with mock.patch.object(agree, "_HEAD") as head:
            head.size, head.pack = 8, lambda length: struct.pack("<q", what)
            head.unpack_from = struct.Struct("<q").unpack_from
            return real(self, data)

    return mock.patch.object(agree._Exchange, "all_gather", all_gather)


def garbled(rank, pipe, port, cases):
    os.environ["ALLREDUCE_JIT_SETUP_TIMEOUT"] = "20"
    join(rank, port)
    climb_once()
    before = census()
    for victim, exchange, what in cases:
        start = time.monotonic()
        try:
            with garble(exchange, what) if rank == victim else nullcontext():
                story = ("climbed", climb_once()[0].verdict.path.value)
        except AllReduceError as e:
            story = (type(e).__name__, str(e))
        pipe.send((story, time.monotonic() - start))
        dist.barrier()
        assert climb_once()[0].verdict.path is Path.V2  # the group is as good as before
    pipe.send(settled(before))


def test_garbage_at_any_step():
    cases = [(e % N, e, what) for e in range(len(EXCHANGES)) for what in GARBAGE.values()]
    cases += [(1, 0, {name: value}) for name, values in FIELDS.items() for value in values]
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with forked.start(garbled, N, store.port, cases) as ranks:
        ranks.collect(set(range(N)), len(cases) + 1, 120)
    for rank, said in enumerate(ranks.said):
        assert len(said) == len(cases) + 1, (rank, said[-1:])
        assert said[-1] == {}, said[-1]
        for (victim, exchange, what), (story, seconds) in zip(cases, said):
            where = rank, victim, EXCHANGES[exchange], what[:30] if isinstance(what, bytes) else what, story
            assert story[0] == "InputError" and f"rank {victim}" in story[1] and seconds < SLACK_S, where


def garbled_length(rank, pipe, port, exchange, length):
    """No message can follow it: the group is lost, but at once, and the one that sent it hears at the deadline."""
    os.environ["ALLREDUCE_JIT_SETUP_TIMEOUT"] = str(DEADLINE_S)
    join(rank, port)
    try:
        with garble(exchange, length) if rank == 1 else nullcontext():
            climb_once()
    except (InputError, PeerTimeoutError) as e:
        pipe.send((type(e).__name__, str(e)))
        pipe.recv()


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("exchange", [0, 2])
def test_an_absurd_length(exchange, length):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with forked.start(garbled_length, N, store.port, exchange, length) as ranks:
        ranks.collect(set(range(N)), 1, 60)
        for rank in (0, 2):
            ((kind, text),) = ranks.said[rank]
            assert kind == "InputError" and f"rank 1 of the group sent no exchange of this package (a length of {length}" in text
        assert ranks.said[1][0][0] == "PeerTimeoutError"


def nonsense_results(rank, pipe, port):
    """JSON of the right form with a result that is none: an agreed step down, on all ranks."""
    os.environ["ALLREDUCE_JIT_SETUP_TIMEOUT"] = "20"
    join(rank, port)
    for exchange in (1, 2):
        with garble(exchange, {"result": 17}) if rank == 2 else nullcontext():
            pipe.send([reason.code for reason in climb_once()[0].verdict.reasons])


def test_a_result_that_is_none_is_a_step_down():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with forked.start(nonsense_results, N, store.port) as ranks:
        ranks.collect(set(range(N)), 2, 60)
    assert ranks.said == [[["build-failed"], ["map-failed"]]] * N


# -- making a group


def siblings(rank, pipe, port, victim, deed):
    os.environ["ALLREDUCE_JIT_SETUP_TIMEOUT"] = "3"
    join(rank, port)
    before = census()
    dist.barrier()
    if rank == victim:
        os.kill(os.getpid(), deed)
    start = time.monotonic()
    try:
        groups.gloo_sibling(dist.group.WORLD)
        story = ("made",)
    except PeerTimeoutError as e:
        story = ("PeerTimeoutError", e.ranks, str(e))
    pipe.send((story, time.monotonic() - start, settled(before)))


@pytest.mark.parametrize("deed", [signal.SIGKILL, signal.SIGSTOP])
@pytest.mark.parametrize("victim", [0, 2])
def test_a_rank_missing_where_a_group_is_made(victim, deed):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with forked.start(siblings, N, store.port, victim, deed) as ranks:
        ranks.collect(set(range(N)) - {victim}, 1, 60)
    for rank in set(range(N)) - {victim}:
        ((story, seconds, left),) = ranks.said[rank]
        assert story[:2] == ("PeerTimeoutError", (victim,)), story
        assert seconds < 3 + SLACK_S and not left, (seconds, left)
