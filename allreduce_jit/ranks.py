"""One process per rank: join the ones that torchrun started, or start our own and never leave one behind."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist

from .errors import AllReduceError, InputError
from .place import joined

_MAX_GPUS = 8
_CPU_RANKS = 4
_GRACE_S = 2.0  # after a first failure, for the other ranks to tell theirs
_EXIT_S = 15.0  # after the last result, for processes to end by themselves
_PR_SET_PDEATHSIG = 1


class RanksFailed(AllReduceError):
    """Not every rank came to its end; all of them were stopped.

    Attributes:
        failed: rank → traceback or manner of death.
        unfinished: ranks that had neither failed nor finished.
    """

    def __init__(self, message: str, failed: dict[int, str], unfinished: list[int]):
        super().__init__(message)
        self.failed, self.unfinished = failed, unfinished


@dataclass(frozen=True)
class Outcome:
    """What ``run`` hands back: ``value`` is what the work returned on ``rank`` (0 unless torchrun started us)."""

    rank: int
    value: Any

    def conclude(self, as_json: bool, render: Callable[[Any], str]) -> int:
        """Print the value, on rank 0 alone; returns the exit code, 0 if the value says ``ok``."""
        if self.rank == 0:
            print(json.dumps(self.value, indent=2) if as_json else render(self.value))
        return 0 if self.value["ok"] else 1


@dataclass(frozen=True)
class _Job:
    parent: int
    devices: list[str]
    port: int
    deadline: float


@dataclass(frozen=True)
class _Child:
    rank: int
    process: Any
    pipe: connection.Connection


def run(
    work: Callable[..., Any], *args: Any, gpus: int | None = None, cpu: int | None = None, deadline: float = 600.0
) -> Outcome:
    """Run ``work(place, *args)`` once per rank, the default process group being up.

    Under torchrun this process is one of the ranks. Otherwise ``gpus`` (or ``cpu``) processes are started;
    neither given: one per CUDA GPU if there are at least two (8 at most), else 4 ranks on the CPU.
    ``work``, its arguments and what it returns must be picklable.

    Args:
        work: importable function; its first argument is the rank's ``Place``.
        gpus: ranks to start, each on its own GPU.
        cpu: ranks to start on the CPU.
        deadline: seconds until every process is killed.

    Raises:
        RanksFailed: a rank raised, died, or did not finish in time; the message names it.
        InputError: there are not that many GPUs.
    """
    if {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys():
        return _join(work, args, deadline)
    return _spawn(work, args, _devices(gpus, cpu), deadline)


def _devices(gpus: int | None, cpu: int | None) -> list[str]:
    present = torch.cuda.device_count()
    if gpus is not None and not 1 <= gpus <= present:
        raise InputError(f"{gpus} GPUs wanted, this machine shows {present} CUDA GPUs (--cpu N: ranks on the CPU)")
    if gpus is None and cpu is None and present >= 2:
        gpus = min(present, _MAX_GPUS)
    if gpus is not None:
        return [f"cuda:{i}" for i in range(gpus)]
    return ["cpu"] * (_CPU_RANKS if cpu is None else cpu)


def _join(work: Callable[..., Any], args: tuple[Any, ...], deadline: float) -> Outcome:
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    present = torch.cuda.device_count()
    device = torch.device("cuda", local % present) if present else torch.device("cpu")
    watchdog = threading.Timer(deadline, _expire, (rank, deadline))
    watchdog.daemon = True
    watchdog.start()
    with joined(device, deadline) as place:
        value = work(place, *args)
    watchdog.cancel()
    return Outcome(rank, value)


def _expire(rank: int, deadline: float) -> None:
    os.write(2, f"rank {rank} did not finish within {deadline:g} s; stopped\n".encode())
    os._exit(1)


def _spawn(work: Callable[..., Any], args: tuple[Any, ...], devices: list[str], deadline: float) -> Outcome:
    end = time.monotonic() + deadline
    # The parent serves the store on a port of the kernel's choice: concurrent runs cannot meet.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    job = _Job(os.getpid(), devices, store.port, deadline)
    context = torch.multiprocessing.get_context("spawn")
    children: list[_Child] = []
    try:
        for rank in range(len(devices)):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(theirs, job, rank, work, args), name=f"rank {rank}")
            children.append(_Child(rank, process, ours))
            process.start()
            theirs.close()
        values = _collect(children, end, deadline)
        for child in children:
            child.process.join(_EXIT_S)
        return Outcome(0, values[0])
    finally:
        _kill(children)


def _child(pipe: connection.Connection, job: _Job, rank: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _die_with(job.parent)
    try:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one host: its name need not resolve
        device, world_size = torch.device(job.devices[rank]), len(job.devices)
        if device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
        store = dist.TCPStore("127.0.0.1", job.port, is_master=False)
        with joined(device, job.deadline, store=store, rank=rank, world_size=world_size) as place:
            pipe.send((True, work(place, *args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
        # No destructors: with a peer gone, tearing a process group down can wait for ever.
        os._exit(1)


def _die_with(parent: int) -> None:
    """Be killed when the parent is, and stand in an own session, so that Ctrl-C reaches the parent alone."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _collect(children: list[_Child], end: float, deadline: float) -> dict[int, Any]:
    pending = {child.pipe: child for child in children}
    values: dict[int, Any] = {}
    failed: dict[int, str] = {}
    while pending:
        ready = connection.wait(list(pending), timeout=max(0.0, end - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            child = pending.pop(pipe)
            fine, value = _receive(child)
            (values if fine else failed)[child.rank] = value
            if not fine:
                end = min(end, time.monotonic() + _GRACE_S)
    if failed or pending:
        unfinished = sorted(child.rank for child in pending.values())
        raise RanksFailed(_story(failed, unfinished, deadline), failed, unfinished)
    return values


def _receive(child: _Child) -> tuple[bool, Any]:
    try:
        return child.pipe.recv()
    except EOFError:
        child.process.join(_GRACE_S)
        code = child.process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return False, f"died without a word ({how})"


def _story(failed: dict[int, str], unfinished: list[int], deadline: float) -> str:
    if not failed:
        return f"{_names(unfinished)} did not finish within {deadline:g} s; all ranks were stopped"
    lines = [f"rank {rank} failed:\n{text.rstrip()}" for rank, text in failed.items()]
    if unfinished:
        lines.append(f"{_names(unfinished)} had not finished and were stopped")
    return "\n".join(lines)


def _names(ranks: list[int]) -> str:
    return ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks))


def _kill(children: list[_Child]) -> None:
    started = [child for child in children if child.process.pid is not None]
    for child in started:
        # The session first, for what the rank itself started; the rank alone if it has no session yet.
        for kill in (os.killpg, os.kill):
            with suppress(ProcessLookupError):
                if child.process.exitcode is None:
                    kill(child.process.pid, signal.SIGKILL)
    for child in started:
        child.process.join()
