"""The last step of the ladder: torch.distributed, with the same contract but its own rounding."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .errors import InputError


class TorchEngine:
    """``all_reduce`` by NCCL, or by gloo (through the host for CUDA tensors), or nothing to do at one rank.

    Bits: NCCL and gloo round in between and add in their own order; only kernels of ours promise more.
    """

    path = "torch.distributed"

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device, world_size: int, backend: str):
        self.group = group
        self.device = device
        self.world_size = world_size
        self.backend = backend
        self._through_host = device.type == "cuda" and backend != "nccl"
        self._warm = device.type != "cuda"

    def all_reduce(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Sum ``x`` over the ranks into ``out`` (may be ``x``), any dtype that the backend takes."""
        if self.world_size > 1 and self._through_host:
            self._reduce_through_host(x, out)
            return
        if self.world_size > 1 and not self._warm:
            self._refuse_capture("NCCL sets itself up in its first call", "call warmup() before the capture")
            self._warm = True
        if out.data_ptr() != x.data_ptr() or out.is_conj() != x.is_conj():
            out.copy_(x)
        if self.world_size > 1:
            dist.all_reduce(out, group=self.group)

    def _reduce_through_host(self, x: torch.Tensor, out: torch.Tensor) -> None:
        self._refuse_capture("this group all-reduces through the host (gloo)", "describe() says why; call it eagerly")
        host = x.cpu().resolve_conj()
        dist.all_reduce(host, group=self.group)
        out.copy_(host)

    def _refuse_capture(self, why: str, instead: str) -> None:
        if torch.cuda.is_current_stream_capturing():
            raise InputError(f"{self.device}: {why}, which a CUDA graph cannot capture: {instead}")
