"""Where a rank stands: its number, its device, and a way to agree with the others."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# NVLink multicast is never wanted here, neither from us nor from what we compare with.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}


@dataclass(frozen=True)
class Place:
    """Where one rank stands.

    Attributes:
        rank: this process's rank in the default process group.
        world_size: number of ranks.
        device: the device of this rank's tensors; already the current one.
        control: a gloo group of all ranks, for agreement.
    """

    rank: int
    world_size: int
    device: torch.device
    control: dist.ProcessGroup

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, in rank order, on every rank."""
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, value, group=self.control)
        return everyone

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def joined(device: torch.device, deadline: float, **where: Any) -> Iterator[Place]:
    """Make ``device`` the current one and bring the process groups up; taken down again unless the body raises.

    Args:
        device: of this rank.
        deadline: seconds after which the run is given up anyway.
        where: ``store``, ``rank`` and ``world_size`` of the group; none of them under torchrun.
    """
    os.environ.update(NO_MULTICAST)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Ours is the deadline that tells the story, so torch's has to come later.
    timeout = timedelta(seconds=deadline + 60)
    dist.init_process_group(backend, timeout=timeout, **where)
    control = dist.new_group(backend="gloo", timeout=timeout)
    yield Place(dist.get_rank(), dist.get_world_size(), device, control)
    dist.destroy_process_group()
