"""NCCL for the calls that no kernel takes: a communicator of our own, as only such a one may be aborted.

A kernel of NCCL waits for a dead peer for ever, and nothing on its GPU can be freed then. So a death, ``abort`` and
``close`` end it here, and whatever the caller does with groups of its own goes on.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.distributed as dist

from .bounded import within

log = logging.getLogger("allreduce_jit")

ABORT_S = 5.0


class Nccl:
    """Made by ``setup.nccl.connect``. In-place sums on the current stream, which a CUDA graph may capture."""

    def __init__(self, backend: Any, device: torch.device):
        self._backend = backend
        self._device = device
        self._last: torch.cuda.Event | None = None  # after the last eager call
        self._captured = False  # calls are in graphs, whose replays nobody tells us of

    def all_reduce(self, x: torch.Tensor) -> None:
        backend = self._backend
        if backend is None:
            raise RuntimeError("this NCCL communicator was aborted")
        options: Any = dist.AllreduceOptions()
        options.reduceOp = dist.ReduceOp.SUM
        options.asyncOp = False
        work = backend.allreduce([torch.view_as_real(x) if x.is_complex() else x], options)
        if work is not None:
            work.wait()
        if torch.cuda.is_current_stream_capturing():
            self._captured = True
        else:
            self._last = self._last or torch.cuda.Event()
            self._last.record()

    def completed(self) -> bool:
        """Whether no call can be in flight. From any thread."""
        from .driver import beside_captures

        with torch.cuda.device(self._device), beside_captures():
            return not self._captured and (self._last is None or self._last.query())

    def abort(self) -> None:
        """End what is in flight and release everything, talking to nobody. Idempotent, bounded, from any thread."""
        backend, self._backend = self._backend, None
        if backend is not None and not within(ABORT_S, backend.abort, "NCCL abort"):
            log.warning("NCCL did not abort its communicator within %g s", ABORT_S)
