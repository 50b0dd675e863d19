"""Ranks that are threads of the test's own process, under the real ladder, exchange of fields and stages: no socket, no process, so a climb
takes milliseconds. Engines, machines, settings and the way that messages take are stand-ins."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from allreduce_jit.settings import Settings
from allreduce_jit.setup import exchange, ladder

from .fake_engines import FakeEngine
from .fakes import MACHINES, look

PATIENCE_S = 3.0  # with a rank that does not come to an exchange
BARE = Settings(cache_dir=None)
_here = threading.local()  # ``rank``, and ``device`` while one is current


class Group:
    """What a rank has in place of a process group. ``exchanges``: what it handed in and how long it was ready to wait."""

    def __init__(self, rank: int, said: list[str], barrier: threading.Barrier):
        self.rank, self.said, self.barrier = rank, said, barrier
        self.exchanges: list[tuple[Any, float]] = []

    def all_gather(self, payload: Any, timeout_s: float) -> list[Any]:
        self.exchanges.append((payload, timeout_s))
        self.said[self.rank] = json.dumps(payload)
        self.barrier.wait()
        found = [json.loads(text) for text in self.said]
        self.barrier.wait()
        return found


def ranks(count: int, work: Callable[[Group], Any]) -> list[Any]:
    """What ``work`` returned or raised on each of ``count`` ranks."""
    said, barrier, answers = [""] * count, threading.Barrier(count, timeout=PATIENCE_S), [None] * count

    def run(rank: int) -> None:
        _here.rank = rank
        try:
            answers[rank] = work(Group(rank, said, barrier))
        except BaseException as e:  # noqa: BLE001 - the test is told
            answers[rank] = e

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


class Engine(FakeEngine):
    """Notes which device was current in each stage, and what it was given."""

    def __init__(self, *args: Any):
        self.devices: list[Any] = []
        self.given: list[Any] = []
        super().__init__(*args)

    def _stage(self, name: str) -> None:
        self.devices.append(getattr(_here, "device", None))
        super()._stage(name)

    def compile(self, cache: Any, families: Any) -> list[str]:
        self.given.append(("compile", cache.directory, [*families]))
        return super().compile(cache, families)

    def load(self, shares: Any, families: Any) -> None:
        self.given.append(("load", [*families]))
        super().load(shares, families)

    def verify(self, families: Any) -> None:
        self.given.append(("verify", [*families]))
        super().verify(families)


class _Current:
    def __init__(self, device: Any):
        self.device = device

    def __enter__(self) -> None:
        self.before, _here.device = getattr(_here, "device", None), self.device

    def __exit__(self, *_: Any) -> None:
        _here.device = self.before


def device_of(rank: int) -> torch.device:
    return torch.device("cpu", rank)


@contextmanager
def on(machine: str = "h200-x4", *, fails=None, settings=None, change=lambda rank, caps: caps):
    """``ranks`` find themselves on ``machine``, each with the device ``device_of`` it; yields the engines that each builds.

    Args:
        fails: rank -> {(path, stage): exception}.
        settings: rank -> ``Settings``, or the exception that reading them raises.
        change: of what a rank's probe found.
    """
    fails, settings = fails or {}, settings or {}
    built: dict[int, list[Engine]] = {rank: [] for rank in range(8)}

    def from_env() -> Settings:
        found = settings.get(_here.rank, BARE)
        if isinstance(found, BaseException):
            raise found
        return found

    def engine(path, config):
        one = Engine.__new__(Engine)
        built[_here.rank].append(one)
        one.__init__(path.value, config, None, fails.get(_here.rank, {}))
        return one

    with ExitStack() as stack:
        for owner, name, value in (
            (ladder, "probe", lambda device: change(_here.rank, look(MACHINES[machine], device.index))),
            (ladder, "_engine_class", lambda row: partial(engine, row.path)),
            (Settings, "from_env", from_env),
            (exchange, "all_gather_json", lambda group, payload, timeout_s: group.all_gather(payload, timeout_s)),
            (dist, "get_rank", lambda group: group.rank),
            (dist, "get_world_size", lambda group: len(group.said)),
            (torch.cuda, "device", _Current),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield built
