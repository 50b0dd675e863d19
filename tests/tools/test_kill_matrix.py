"""The kill matrix itself, with stand-ins on the CPU: it passes who tells in time, and fails who does not."""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import kill_matrix
import pytest
import torch
import torch.distributed as dist
from helpers.fake_engines import fake_gpus
from kill_matrix import DEEDS, PHASES, Case, matrix

from allreduce_jit import errors
from allreduce_jit.machine import watcher
from allreduce_jit.setup import ladder


class StandIn:
    """Sums over gloo; knows the dead by the watcher, and the stopped at the deadline."""

    path = SimpleNamespace(value="cpu")

    def __init__(self, group, flaw=""):
        with fake_gpus(group):
            self.processes = ladder.climb(group, torch.device("cpu")).processes
        self.rank, self.dead, self.flaw = dist.get_rank(group), [], flaw
        peers = {rank: process for rank, process in enumerate(self.processes) if rank != self.rank}
        self.watch = watcher.watch(peers, self.dead.append)
        self._engine = SimpleNamespace(close=self.watch.close)
        self.deadline_s = 60.0  # until the first success

    def all_reduce(self, x, out):
        self.check()
        start = time.monotonic()
        try:
            dist.all_reduce(out.copy_(x)[:8], async_op=True).wait(timedelta(seconds=self.deadline_s))
        except RuntimeError:
            if self.watch.watched:
                while not self.dead and time.monotonic() < start + self.deadline_s:
                    time.sleep(0.01)
            else:
                time.sleep(max(0.0, start + self.deadline_s - time.monotonic()))
            self.fail(self.dead or [rank for rank in range(len(self.processes)) if self.gone(rank)])
        self.deadline_s = float(os.environ["ALLREDUCE_JIT_TIMEOUT"])

    def gone(self, rank):
        try:
            return Path(f"/proc/{self.processes[rank].pid}/stat").read_text().rpartition(")")[2].split()[0] in "TZX"
        except OSError:
            return True

    def check(self):
        if self.dead:
            self.fail(self.dead)

    def fail(self, ranks):
        if self.flaw == "late":
            time.sleep(2.5)
        if self.flaw == "silent":
            time.sleep(600)
        error = errors.PeerTimeoutError(f"lost {ranks}")
        error.ranks = (self.rank,) if self.flaw == "wrong" else tuple(ranks)
        raise error

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self._engine.close()


def good(group, device):
    return StandIn(group)


def wrong(group, device):
    return StandIn(group, "wrong")


def late(group, device):
    return StandIn(group, "late")


def silent(group, device):
    return StandIn(group, "silent")


def played(make, chosen, n=3, **more):
    options = {"deadline_s": 1.0, "watcher": True, "seed": 0, **more}
    return matrix(n, 0, device="cpu", make=f"test_kill_matrix:{make}", chosen=chosen, **options)


@pytest.fixture(autouse=True)
def slow_machine(monkeypatch):
    """Its CPUs are shared: it takes longer to run a survivor than to notice a death."""
    monkeypatch.setattr(kill_matrix, "NOTICE_S", 4.0)
    monkeypatch.setattr(kill_matrix, "PATIENCE_S", 5.0)


def test_every_combination_is_in_the_table():
    table = kill_matrix.cases(4, 50, 0)
    combinations = {(case.deed, case.phase, case.size) for case in table}
    assert len(table) == 50 and len(combinations) == len(DEEDS) * len(PHASES) * len(kill_matrix.SIZES)
    assert {case.victim for case in table} == {0, 1, 2, 3}


def test_who_tells_passes():
    chosen = [Case(deed, phase, "small", i % 3, 3) for i, (deed, phase) in enumerate(
        [("SIGKILL", "eager"), ("SIGSTOP", "replay"), ("exception", "capture"), ("SIGKILL", "construction"),
         ("SIGSTOP", "construction"), ("exception", "close"), ("SIGKILL", "close")])]  # fmt: skip
    found = played("good", chosen, jobs=2)
    assert [(row["deed"], row["phase"]) for row in found["rows"]] == [(case.deed, case.phase) for case in chosen]
    assert found["ok"], "\n".join(map(kill_matrix.line, found["rows"]))
    assert found["kills"] == len(chosen) and found["failed"] == 0
    for row in found["rows"]:
        assert len(row["survivors"]) == 2


def test_without_the_watcher_the_deadline_counts():
    found = played("good", [Case("SIGKILL", "eager", "small", 1, 3)], watcher=False)
    assert found["ok"], found["rows"]
    assert found["rows"][0]["limit_s"] == 5.0
    assert all(told["after_s"] >= 0.9 for told in found["rows"][0]["survivors"].values())


@pytest.mark.parametrize(("make", "words"), [("wrong", "blames"), ("silent", "was told nothing")])
def test_who_does_not_tell_fails(make, words):
    found = played(make, [Case("SIGKILL", "eager", "small", 1, 3)])
    assert not found["ok"] and found["failed"] == 1
    assert len(found["rows"][0]["problems"]) == 2 and all(words in text for text in found["rows"][0]["problems"])


def test_who_is_late_fails(monkeypatch):
    monkeypatch.setattr(kill_matrix, "NOTICE_S", 1.0)
    found = played("late", [Case("SIGKILL", "eager", "small", 1, 3)])
    assert not found["ok"] and all("allowed" in text for text in found["rows"][0]["problems"])
