"""One process per rank: join those that torchrun started, or start our own, which end with this one."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
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

from ..errors import AllReduceError, InputError, SetupError
from . import report
from .place import Seat, joined

_MAX_GPUS = 8
_CPU_RANKS = 4
_GRACE_S = 2.0  # after a first failure, for the other ranks to report theirs
_EXIT_S = 15.0  # after the last result, for processes to end by themselves
_PR_SET_PDEATHSIG = 1
_FILES, _FILES_PER_RANK = 64, 8  # that a process opens, rounded up: its own, and those that connect it to a peer
_LIMITS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN, errno.ENOSPC)


class RanksFailedError(AllReduceError):
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
        RanksFailedError: a rank raised, died, or did not finish in time; the message names it.
        InputError: there are not that many GPUs, or torchrun's variables do not fit.
        SetupError: a limit of the system does not let so many ranks start.
    """
    seat = Seat.from_env()
    if seat is not None:
        return _join(work, args, seat, _seat_device(seat, gpus, cpu), deadline)
    return _spawn(work, args, _devices(gpus, cpu), deadline)


def on_gpus(gpus: int | None, cpu: int | None) -> bool:
    """Whether ``run`` would use GPUs."""
    seat = Seat.from_env()
    return (_devices(gpus, cpu)[0] if seat is None else _seat_device(seat, gpus, cpu)) != "cpu"


def _seat_device(seat: Seat, gpus: int | None, cpu: int | None) -> str:
    wanted = cpu if gpus is None else gpus
    if wanted not in (None, seat.world_size):
        raise InputError(f"{wanted} ranks wanted, torchrun started {seat.world_size}: leave --gpus and --cpu away")
    present = 0 if cpu is not None else torch.cuda.device_count()
    if gpus is not None and not present:
        raise InputError(f"--gpus {gpus}: this machine shows 0 CUDA GPUs (--cpu N: ranks on the CPU)")
    return f"cuda:{seat.local_rank % present}" if present else "cpu"


def _devices(gpus: int | None, cpu: int | None) -> list[str]:
    present = torch.cuda.device_count()
    if gpus is not None and not 1 <= gpus <= present:
        raise InputError(f"--gpus {gpus}: this machine shows {report.counted(present, 'CUDA GPU')} (--cpu N: ranks on the CPU)")
    if gpus is None and cpu is None and present >= 2:
        gpus = min(present, _MAX_GPUS)
    if gpus is not None:
        return [f"cuda:{i}" for i in range(gpus)]
    return ["cpu"] * (_CPU_RANKS if cpu is None else cpu)


def _join(work: Callable[..., Any], args: tuple[Any, ...], seat: Seat, device: str, deadline: float) -> Outcome:
    watchdog = threading.Timer(deadline, _expire, (seat.rank, deadline))
    watchdog.daemon = True
    watchdog.start()
    try:
        with joined(torch.device(device), deadline) as place:
            value = work(place, *args)
    except Exception as error:
        limit = _limit(error)
        if limit is None:
            raise
        raise SetupError(f"rank {seat.rank}: {limit}") from error
    watchdog.cancel()
    return Outcome(seat.rank, value)


def _expire(rank: int, deadline: float) -> None:
    os.write(2, f"rank {rank} did not finish within {deadline:g} s; stopped\n".encode())
    os._exit(1)


def _spawn(work: Callable[..., Any], args: tuple[Any, ...], devices: list[str], deadline: float) -> Outcome:
    end = time.monotonic() + deadline
    _require_files(len(devices))
    children: list[_Child] = []
    try:
        try:
            # The parent serves the store on a port of the kernel's choice: concurrent runs cannot meet.
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            job = _Job(os.getpid(), devices, store.port, deadline)
            _start(children, job, work, args)
        except (OSError, dist.DistError) as e:
            raise SetupError(f"{len(devices)} ranks cannot be started here: {e}") from e
        values = _collect(children, end, deadline)
        for child in children:
            child.process.join(_EXIT_S)
        return Outcome(0, values[0])
    finally:
        _kill(children)


def _require_files(ranks: int) -> None:
    """A process that runs out of descriptors fails wherever it happens to be, and takes long to do so."""
    allowed, wanted = resource.getrlimit(resource.RLIMIT_NOFILE)[0], _FILES + _FILES_PER_RANK * ranks
    if 0 <= allowed < wanted:
        raise SetupError(f"a process may open {allowed} files here, {ranks} ranks need up to {wanted}: raise `ulimit -n`")


def _start(children: list[_Child], job: _Job, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Start a process per device, each of which is in ``children`` before it runs."""
    context = torch.multiprocessing.get_context("spawn")
    for rank in range(len(job.devices)):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_child, args=(theirs, job, rank, work, args), name=f"rank {rank}")
        children.append(_Child(rank, process, ours))
        process.start()
        theirs.close()


def _child(pipe: connection.Connection, job: _Job, rank: int, work: Callable[..., Any], args: tuple[Any, ...]) -> None:
    _die_with(job.parent)
    try:
        # One host: its name need not resolve. An empty value is none to gloo as well.
        os.environ["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME") or "lo"
        device, world_size = torch.device(job.devices[rank]), len(job.devices)
        if device.type == "cpu":
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // world_size))
        store = dist.TCPStore("127.0.0.1", job.port, is_master=False)
        with joined(device, job.deadline, store=store, rank=rank, world_size=world_size) as place:
            pipe.send((True, work(place, *args)))
    except BaseException as error:  # noqa: BLE001 - the parent must hear of it
        pipe.send((False, _described(error)))
        # No destructors: with a peer gone, tearing a process group down can wait for ever.
        os._exit(1)


def _described(error: BaseException) -> str:
    """One sentence for what was raised on purpose, and for the machine's limits; else the traceback."""
    if isinstance(error, AllReduceError):
        return f"{type(error).__name__}: {error}"
    return _limit(error) or traceback.format_exc()


def _limit(error: BaseException) -> str | None:
    """What ran out, if that is what ``error`` means."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return f"out of memory, which smaller tensors (--max-bytes) or fewer ranks take less of: {text}"
    return text if isinstance(error, OSError) and error.errno in _LIMITS else None


def _die_with(parent: int) -> None:
    """Be killed when the parent is, and stand in an own session, so that Ctrl-C reaches the parent alone."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _collect(children: list[_Child], end: float, deadline: float) -> dict[int, Any]:
    pending: dict[Any, _Child] = {child.pipe: child for child in children}
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
        raise RanksFailedError(_message(failed, unfinished, deadline), failed, unfinished)
    return values


def _receive(child: _Child) -> tuple[bool, Any]:
    try:
        return child.pipe.recv()
    except EOFError:
        child.process.join(_GRACE_S)
        code = child.process.exitcode
        how = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        if code == -signal.SIGKILL:
            how += ", by someone or by the system for want of memory"
        return False, f"died without a word ({how})"


def _message(failed: dict[int, str], unfinished: list[int], deadline: float) -> str:
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
