"""Ranks that start in milliseconds: forked from a process that has imported everything and started nothing."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from typing import Any

PRELOAD = ["torch", "torch.distributed", "torch.distributed.distributed_c10d", "allreduce_jit", "allreduce_jit.setup.ladder"]


@dataclass
class Ranks:
    """Processes that run ``work(rank, pipe, *args)``; what each sends on its pipe is its story.

    Attributes:
        processes: by rank.
        pipes: our ends, by rank.
        said: what each rank has sent so far.
    """

    processes: list[Any]
    pipes: list[connection.Connection]
    said: list[list[Any]] = field(default_factory=list)

    def collect(self, ranks: set[int], count: int, seconds: float) -> None:
        """Until each of ``ranks`` has said ``count`` things or ended, at most ``seconds``."""
        end = time.monotonic() + seconds
        open_ = set(ranks)
        while open_ and time.monotonic() < end:
            waiting = {self.pipes[rank]: rank for rank in open_ if len(self.said[rank]) < count}
            if not waiting:
                return
            for pipe in connection.wait(list(waiting), timeout=max(0.0, end - time.monotonic())):
                rank = waiting[pipe]
                try:
                    self.said[rank].append(pipe.recv())
                except (EOFError, OSError):
                    open_.discard(rank)

    def kill(self) -> None:
        """All of them, and wait for their ends; they are children of the server, so only ``sentinel`` tells."""
        for process in self.processes:
            process.kill()
        for process, pipe in zip(self.processes, self.pipes):
            process.join()
            process.close()
            pipe.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.kill()


def server(preload: list[str] = PRELOAD) -> Any:
    """The context to start from; its server imports ``preload`` once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(preload)
    return context


def start(work: Any, n: int, *args: Any) -> Ranks:
    """``work`` must be importable; an exception of it is sent as its traceback."""
    context = server()
    found = Ranks([], [], [[] for _ in range(n)])
    try:
        for rank in range(n):
            ours, theirs = context.Pipe()
            process = context.Process(target=_run, args=(work, rank, theirs, args), name=f"rank {rank}", daemon=True)
            found.pipes.append(ours)
            found.processes.append(process)
            process.start()
            theirs.close()
    except BaseException:
        found.processes = [process for process in found.processes if process.pid is not None]
        found.kill()
        raise
    return found


def _run(work: Any, rank: int, pipe: connection.Connection, args: tuple[Any, ...]) -> None:
    try:
        work(rank, pipe, *args)
    except BaseException:  # noqa: BLE001
        with suppress(OSError):
            pipe.send(("failed", traceback.format_exc()))
    pipe.close()
    os._exit(0)
