"""One rank is killed, stopped or raises, in every phase and size: each of the others must be told, by name and in time.

Usage: python tools/kill_matrix.py GPUS [--kills 50] [--jobs 1] [--deadline 2] [--no-watcher] [--seed 0] [--json]

Survivors have a second where the death of the process can be noticed (killed, or gone after an exception), and the
deadline and a second where it cannot (stopped, or --no-watcher). Exit code 0 if all of them kept to it.
Every case has processes of its own, forked from one that has imported everything and not started CUDA.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import forked

DEEDS = ("SIGKILL", "SIGSTOP", "exception")
PHASES = ("eager", "replay", "capture", "construction", "close")
SIZES = {"small": 4 << 10, "large": 2 << 20, "streamed": 96 << 20}  # bytes: one-shot, two-shot, several launches
EXCHANGES = 5  # of a construction
NOTICE_S = 1.0
CALLS = 20  # of a graph
CLOSE_S = 10.0
PATIENCE_S = 20.0  # beyond the deadline, before a survivor counts as hanging
PRELOAD = [
    *forked.PRELOAD,
    "allreduce_jit.communicator",
    "allreduce_jit.engine.base",
    "allreduce_jit.engine.nvlink",
    "cuda.bindings.driver",
]


@dataclass(frozen=True)
class Case:
    """``moment``: the call, or the exchange of the construction, at which ``victim`` does it."""

    deed: str
    phase: str
    size: str
    victim: int
    moment: int


@dataclass(frozen=True)
class Job:
    """What all ranks are told. ``make``: ``module:function`` that makes the communicator from (group, device)."""

    case: Case | None
    world_size: int
    port: int
    device: str
    deadline_s: float
    watcher: bool
    make: str
    cache: str


class Planted(Exception):
    """What the victim raises."""


def cases(n: int, kills: int, seed: int) -> list[Case]:
    """``kills`` of them, every combination before any comes twice."""
    dice = random.Random(seed)
    found: list[Case] = []
    while len(found) < kills:
        for phase, deed, size in itertools.product(PHASES, DEEDS, SIZES):
            moment = dice.randrange(EXCHANGES) if phase == "construction" else dice.randrange(5, 60)
            found.append(Case(deed, phase, size, dice.randrange(n), moment))
    return found[:kills]


def init(group: Any, device: Any) -> Any:
    """The package's own; never NCCL's."""
    from allreduce_jit.communicator import Communicator

    return Communicator(group, device, deterministic=True)


def act(rank: int, pipe: Any, job: Job) -> None:
    """One rank: report ``("did", time)`` as the victim, else ``("told", story)`` and ``("closed", seconds)``."""
    import torch
    import torch.distributed as dist

    os.environ.update(
        GLOO_SOCKET_IFNAME="lo",
        ALLREDUCE_JIT_TIMEOUT=str(job.deadline_s),
        ALLREDUCE_JIT_FIRST_TIMEOUT=str(job.deadline_s),
        ALLREDUCE_JIT_SETUP_TIMEOUT=str(job.deadline_s + 1 if job.case and job.case.phase == "construction" else 60),
        ALLREDUCE_JIT_CACHE_DIR=job.cache,
    )
    if not job.watcher:
        os.pidfd_open = _refuse
    device = torch.device(job.device if job.device == "cpu" else f"cuda:{rank}")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.TCPStore("127.0.0.1", job.port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.world_size, timeout=timedelta(seconds=120))
    try:
        _play(rank, pipe, job, device)
    except Planted:
        pass  # the process ends; its communicator was closed on the way


def _refuse(pid: int, flags: int = 0) -> int:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


def _play(rank: int, pipe: Any, job: Job, device: Any) -> None:
    import torch
    import torch.distributed as dist

    from allreduce_jit.errors import AllReduceError
    from allreduce_jit.setup import exchange as agree

    module, name = job.make.split(":")
    make = getattr(importlib.import_module(module), name)
    case = job.case
    mine = case is not None and rank == case.victim

    def deed() -> None:
        pipe.send(("did", time.monotonic()))
        if case.deed == "exception":
            raise Planted
        os.kill(os.getpid(), getattr(signal, case.deed))

    if mine and case.phase == "construction":
        _before(agree._Exchange, "all_gather", case.moment, deed)
    try:
        comm = make(dist.group.WORLD, device)
    except AllReduceError as e:
        pipe.send(("told", _story(e, time.monotonic())))
        pipe.recv()
        return
    on_gpu = device.type == "cuda"
    synchronize = torch.cuda.synchronize if on_gpu else lambda: None
    with comm:
        x = torch.zeros(SIZES[case.size if case else "small"] // 2, dtype=torch.bfloat16, device=device)
        out = torch.empty_like(x)
        comm.all_reduce(x, out=out)
        synchronize()
        pipe.send(("ready", comm.path.value if on_gpu else "cpu"))
        pipe.recv()  # every rank is ready
        if case is None:
            return
        if mine and case.phase == "close":
            _before(comm._engine, "close", 0, deed)
        try:
            _calls(comm, x, out, case, deed if mine else None, synchronize)
        except AllReduceError as e:
            at, error = time.monotonic(), e
        else:  # the victim, closing
            return
        story = _story(error, at)
        synchronize()  # whatever is still queued has to end by itself
        story["device_s"] = time.monotonic() - at
        pipe.send(("told", story))
        pipe.recv()  # all have been told: who leaves earlier is one more that the others miss
        at = time.monotonic()
    pipe.send(("closed", time.monotonic() - at))


def _calls(comm: Any, x: Any, out: Any, case: Case, deed: Any, synchronize: Any) -> None:
    """Until an error says that a rank is missing; or until this rank's deed."""

    def call(count: int = 1) -> None:
        for _ in range(count):
            comm.all_reduce(x, out=out)

    if case.phase in ("replay", "capture"):

        def captured() -> None:
            call(CALLS // 2)
            if case.phase == "capture" and deed:
                deed()
            call(CALLS // 2)

        step = _captured(comm, captured, x.device.type == "cuda")
    else:
        step = call
    turn = 0
    while True:
        if deed and turn == case.moment:
            synchronize()
            if case.phase == "close":
                return
            deed()
        step()
        turn += 1
        comm.check()
        # As an engine does: a little ahead of the device. Who is missing is found out without waiting.
        if turn % 10 == 0:
            _drain(comm, x.device.type == "cuda")


def _drain(comm: Any, on_gpu: bool) -> None:
    """Until the device has caught up, asking for errors meanwhile."""
    if not on_gpu:
        return
    import torch

    done = torch.cuda.Event()
    done.record()
    while not done.query():
        comm.check()
        time.sleep(0.001)
    comm.check()


def _captured(comm: Any, work: Any, on_gpu: bool) -> Any:
    if not on_gpu:
        work()
        return work
    import torch

    graph = torch.cuda.CUDAGraph()
    with comm.capture(), torch.cuda.graph(graph):
        work()
    return graph.replay


def _before(owner: Any, name: str, nth: int, deed: Any) -> None:
    """Have the ``nth`` call of ``owner.name`` from now on do ``deed`` first."""
    real, left = getattr(owner, name), [nth]

    def burning(*args: Any) -> Any:
        left[0] -= 1
        if left[0] == -1:
            deed()
        return real(*args)

    setattr(owner, name, burning)


def _story(error: Exception, at: float) -> dict[str, Any]:
    ranks = getattr(error, "ranks", None)
    return {"error": type(error).__name__, "ranks": None if ranks is None else list(ranks), "at": at, "text": str(error)}


def limit_s(case: Case, job: Job) -> float:
    """How long survivors may take to know, from the deed on."""
    noticed = case.deed != "SIGSTOP" and (job.watcher or case.phase == "construction")
    deadline = job.deadline_s + (1 if case.phase == "construction" else 0)
    return NOTICE_S + (0.0 if noticed else deadline)


def trial(job: Job) -> dict[str, Any]:
    """One case (or, without one, a communicator built and closed); what came of it."""
    case, n = job.case, job.world_size
    began = time.monotonic()
    with forked.start(act, n, job) as ranks:
        everyone = set(range(n))
        if case is None or case.phase != "construction":
            ranks.collect(everyone, 1, 120)
            for rank in everyone:
                with suppress(OSError):
                    ranks.pipes[rank].send("go")
        first = 1 if case is None or case.phase != "construction" else 0
        if case is not None:
            survivors = everyone - {case.victim}
            ranks.collect(survivors, first + 1, job.deadline_s + PATIENCE_S)
            ranks.collect({case.victim}, first + 1, 5)
            for rank in survivors:
                with suppress(OSError):
                    ranks.pipes[rank].send("go")
            if case.phase != "construction":
                ranks.collect(survivors, first + 2, CLOSE_S)
        said = [story[first:] if case else story for story in ranks.said]
    seconds = round(time.monotonic() - began, 2)
    if case is None:
        return {"ok": all(story[:1] and story[0][0] == "ready" for story in said), "said": said, "seconds": seconds}
    return {**judge(case, job, said), "seconds": seconds}


def judge(case: Case, job: Job, said: list[list[Any]]) -> dict[str, Any]:
    """Whether every survivor was told who, in time."""
    limit = limit_s(case, job)
    row: dict[str, Any] = {**asdict(case), "limit_s": limit, "survivors": {}, "problems": []}
    did = [thing[1] for thing in said[case.victim] if thing[0] == "did"]
    if not did:
        row["problems"].append(f"the victim did nothing: {said[case.victim][-1:]}")
    for rank, story in enumerate(said):
        if rank == case.victim:
            continue
        told = [thing[1] for thing in story if thing[0] == "told"]
        if not told:
            row["problems"].append(f"rank {rank} was told nothing: {story[-1:]}")
            continue
        (found,) = told
        found["after_s"] = round(found.pop("at") - did[0], 3) if did else None
        closed = [thing[1] for thing in story if thing[0] == "closed"]
        found["closed_s"] = closed[0] if closed else None
        if not closed and case.phase != "construction":
            row["problems"].append(f"rank {rank} could not close within {CLOSE_S} s: {story[-1:]}")
        row["survivors"][rank] = found
        if found["ranks"] != [case.victim]:
            row["problems"].append(f"rank {rank} blames {found['ranks']}: {found['text']}")
        if did and found["after_s"] > limit:
            row["problems"].append(f"rank {rank} knew after {found['after_s']} s, {limit} s allowed")
    return {**row, "ok": not row["problems"]}


def matrix(
    n: int,
    kills: int,
    deadline_s: float,
    watcher: bool,
    seed: int,
    *,
    device: str = "cuda",
    make: str = f"{__name__}:init",
    chosen: list[Case] | None = None,
    show: Any = None,
    jobs: int = 1,
) -> dict[str, Any]:
    """All cases, ``jobs`` at a time. ``chosen``: these instead of ``kills`` of the table."""
    import torch.distributed as dist

    forked.server(PRELOAD)
    began = time.monotonic()
    rows = []
    with tempfile.TemporaryDirectory() as cache, ThreadPoolExecutor(jobs) as pool:

        def play(case: Case | None) -> dict[str, Any]:
            store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            return trial(Job(case, n, store.port, device, deadline_s, watcher, make, cache))

        first = play(None)  # fills the cache; and without it nothing else makes sense
        if not first["ok"]:
            return {"ok": False, "error": first["said"], "kills": 0, "failed": 0, "rows": []}
        for row in pool.map(play, chosen if chosen is not None else cases(n, kills, seed)):
            rows.append(row)
            if show:
                show(row)
    worst = {limit: max(times, default=None) for limit, times in _by_limit(rows).items()}
    return {
        "ok": all(row["ok"] for row in rows),
        "ranks": n,
        "deadline_s": deadline_s,
        "watcher": watcher,
        "kills": len(rows),
        "failed": sum(not row["ok"] for row in rows),
        "worst_s_by_limit": worst,
        "seconds": round(time.monotonic() - began, 1),
        "rows": rows,
    }


def _by_limit(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in rows:
        times = [told["after_s"] for told in row["survivors"].values() if told["after_s"] is not None]
        found.setdefault(str(row["limit_s"]), []).extend(times)
    return found


def line(row: dict[str, Any]) -> str:
    told = " ".join(f"{rank}:{s['error']}{s['ranks']}@{s['after_s']}s" for rank, s in row["survivors"].items())
    return (
        f"{'ok    ' if row['ok'] else 'FAILED'} {row['deed']:9} {row['phase']:12} {row['size']:8} rank {row['victim']} "
        f"limit {row['limit_s']:.1f}s  {told}  {'; '.join(row['problems'])}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gpus", type=int)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time, on the same GPUs")
    parser.add_argument("--deadline", type=float, default=2.0)
    parser.add_argument("--no-watcher", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    show = None if args.json else lambda row: print(line(row), flush=True)
    make = "kill_matrix:init"  # by its importable name: here the module is __main__
    found = matrix(args.gpus, args.kills, args.deadline, not args.no_watcher, args.seed, make=make, show=show, jobs=args.jobs)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        print({key: value for key, value in found.items() if key != "rows"})
    return 0 if found["ok"] else 1


if __name__ == "__main__":
    import kill_matrix  # what the ranks unpickle must not be __main__'s

    sys.exit(kill_matrix.main())
