"""What stands beside a kernel engine: torch.distributed for calls that no kernel takes, and the watch over the peers."""

from __future__ import annotations

import contextlib
import logging
import weakref
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..engine.fallback import TorchEngine
from ..machine.watcher import Watch, watch
from . import nccl

if TYPE_CHECKING:
    from ..engine.protocol import Engine
    from .ladder import Ladder


def torch_engine(
    group: dist.ProcessGroup, device: torch.device, ladder: Ladder, *, deterministic: bool, may_have_nccl: bool
) -> TorchEngine:
    """The engine of calls that no kernel takes; NCCL is set up by the first of them, or ahead by ``connect``.

    Args:
        group: CPU-capable.
        may_have_nccl: whether NCCL may be set up over these ranks.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    connect, backend = None, ladder.verdict.backend
    if backend == "nccl" and world_size > 1 and not deterministic:  # else it would never be called
        if may_have_nccl:
            connect = partial(nccl.connect, group, device, ladder.settings.setup_timeout_s)
        else:
            backend = "gloo"
    return TorchEngine(group, device, rank, world_size, backend, connect, alone=ladder.engine is None)


def watch_peers(ladder: Ladder, rank: int, engines: Sequence[Engine]) -> Watch:
    """Have ``engines`` told when a peer's process ends."""
    # The watch must not keep alive what closes it.
    references = [weakref.ref(engine) for engine in engines]

    def on_death(peer: int) -> None:
        for reference in references:
            engine = reference()
            if engine is not None:
                engine.lost(peer)

    peers = {peer: process for peer, process in enumerate(ladder.processes) if peer != rank}
    # Ranks of several hosts are what torch.distributed is for, so that one cannot be watched is no news there.
    watching = watch(peers, on_death, logging.WARNING if ladder.engine is not None else logging.DEBUG)
    if ladder.engine is not None:
        ladder.engine.watched = watching.watched
    return watching


def release(engines: Sequence[Engine], device: torch.device) -> None:
    """Free what ``engines`` hold, once the calls on ``device`` have ended."""
    with contextlib.ExitStack() as stack:
        waits = any(engine.uses_device for engine in engines)
        if waits:
            stack.enter_context(torch.cuda.device(device))
        for engine in engines:
            stack.callback(engine.close)
        if waits:
            torch.cuda.synchronize()
