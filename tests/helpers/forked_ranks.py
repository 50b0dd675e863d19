"""Ranks that are forked from the test's own process: a real gloo group in tenths of a second, where spawned ones take seconds to import torch."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

DIED = "died"  # what a rank answers that ended without an answer


def ranks(folder: Any, count: int, work: Callable[..., Any], *args: Any, deadline: float = 20.0) -> list[Any]:
    """``work(rank, *args)`` on ``count`` ranks, the default group being up over gloo; what each returned or raised, in rank order.

    Both have to be such as can be pickled. A rank that has not answered by ``deadline`` (seconds) is killed and answers ``DIED``.
    """
    context = multiprocessing.get_context("fork")
    until, children = time.monotonic() + deadline, []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_rank, args=(theirs, f"{folder}/store", rank, count, work, args))
        process.start()
        theirs.close()
        children.append((process, ours))
    answers = []
    for process, pipe in children:
        answer: Any = DIED
        with suppress(EOFError):
            if pipe.poll(max(0.0, until - time.monotonic())):
                answer = pipe.recv()
        answers.append(answer)
    for process, _ in children:
        process.join(max(0.1, min(5.0, until - time.monotonic())))
        if process.is_alive():
            process.kill()
            process.join()
    return answers


def _rank(pipe: Any, store: str, rank: int, count: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    try:
        where = dist.FileStore(store, count)
        dist.init_process_group("gloo", store=where, rank=rank, world_size=count, timeout=timedelta(seconds=60))
        where.add("up", 1)
        while where.add("up", 0) < count:  # who ends now is missed by nobody who still connects
            time.sleep(0.005)
        answer = work(rank, *args)
    except Exception as e:
        answer = e
    try:
        pipe.send(answer)
    except Exception:
        pipe.send(traceback.format_exc())
    os._exit(0)  # no destructors: with a peer gone, they may wait


def on_one_rank(folder, work, *args):
    """What ``work`` returned, in a process of its own: what a test leaves of gloo may not survive a fork of the next one."""
    answer = ranks(folder, 1, work, *args)[0]
    if isinstance(answer, Exception):
        raise answer
    return answer
