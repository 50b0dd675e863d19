"""NCCL set up by all ranks or by none, whatever fails on whichever rank."""

from __future__ import annotations

import threading
import time
import weakref
from typing import Any

import torch
import torch.distributed as dist

from ..engine.nccl import Nccl
from ..torch_private import shared_store
from .exchange import all_gather_json

_POLL_S = 0.05
_made: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()  # how many for a group, so that names differ


def connect(group: dist.ProcessGroup, device: torch.device, timeout_s: float) -> tuple[Nccl | None, str | None]:
    """NCCL over the ranks of ``group``, once it has summed on all of them; or None and why not. Collective.

    Args:
        group: a CPU-capable group, to agree over.
        device: this rank's GPU.
        timeout_s: seconds to wait for the other ranks; 0 = for ever.

    Raises:
        PeerTimeoutError: a rank is gone.
    """
    everyone = all_gather_json(group, {"problem": _lacking(device), "made": _made.get(group, 0)}, timeout_s)
    number = max(answer["made"] for answer in everyone)
    _made[group] = number + 1
    problem = _first(everyone)
    if problem is not None:
        return None, problem
    attempt = _Attempt(group, device, f"{group.group_name}_allreduce_jit_nccl_{number}")
    mine = attempt.run(timeout_s)
    problem = _first(all_gather_json(group, {"problem": mine, "told": attempt.told}, timeout_s))
    if problem is None:
        return Nccl(attempt.backend, device), None
    if attempt.backend is not None:
        threading.Thread(target=Nccl(attempt.backend, device).abort, daemon=True).start()
    return None, problem


def _lacking(device: torch.device) -> str | None:
    """Why this rank cannot even begin; asked first, so that none waits for it in NCCL."""
    if not dist.is_nccl_available():
        return "this torch has no NCCL"
    try:
        torch.ones(1, device=device)
    except RuntimeError as e:  # out of memory
        return f"{type(e).__name__}: {_line(e)}"
    return None


def _first(answers: list[dict]) -> str | None:
    """The problem of the rank that had one of its own, rather than of one that was told."""
    failed = [rank for rank, answer in enumerate(answers) if answer["problem"]]
    if not failed:
        return None
    cause = min(failed, key=lambda rank: bool(answers[rank].get("told")))
    return f"rank {cause}: {answers[cause]['problem']}"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]


class _Attempt:
    """NCCL's first collective, in a thread: a rank that waits in it for one that failed hears of that through the store."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device, name: str):
        store: Any = shared_store(group)
        self.group, self.device, self.name = group, device, name
        # A store of its own connection: a wait in one holds up all others that share it.
        self.board = dist.PrefixStore(f"{name}_board", store.clone())
        self.store = dist.PrefixStore(name, store.clone())
        self.backend: Any = None
        self.told = False
        self._problem: str | None = None

    def run(self, timeout_s: float) -> str | None:
        """Why it failed, here or elsewhere (``told``)."""
        thread = threading.Thread(target=self._sum, name="allreduce_jit NCCL", daemon=True)
        thread.start()
        end = time.monotonic() + (timeout_s or float("inf"))
        while thread.is_alive():
            thread.join(_POLL_S)
            if thread.is_alive() and self.board.check(["failed"]):
                self.told = True
                return "another rank could not connect"
            if time.monotonic() > end:
                self._problem = f"NCCL did not connect within {timeout_s:g} s (ALLREDUCE_JIT_SETUP_TIMEOUT)"
                break
        if self._problem is not None:
            self.board.set("failed", "1")
        return self._problem

    def _sum(self) -> None:
        try:
            options: Any = dist.ProcessGroupNCCL.Options()
            options.global_ranks_in_group = dist.get_process_group_ranks(self.group)
            options.group_name = self.name
            rank, world_size = dist.get_rank(self.group), dist.get_world_size(self.group)
            with torch.cuda.device(self.device):
                self.backend = dist.ProcessGroupNCCL(self.store, rank, world_size, options)
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    one = torch.ones(1, device=self.device)
                    Nccl(self.backend, self.device).all_reduce(one)
                    stream.synchronize()
                    if one.item() != world_size:
                        raise RuntimeError(f"the sum of {world_size} ones is {one.item()}")
        except Exception as e:  # noqa: BLE001 - whatever it is, the peers must hear of it
            self._problem = f"{type(e).__name__}: {_line(e)}"
