"""Where a rank stands: its number, its device, and a way to agree with the others."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist

from ..errors import InputError, SetupError

# Neither ours nor competitors use NVLink multicast.
NO_MULTICAST = {"NCCL_NVLS_ENABLE": "0", "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1", "NVSHMEM_DISABLE_NVLS": "1"}

_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Seat:
    """What torchrun says about one process: its number in the job and on this machine, and how many there are."""

    rank: int
    local_rank: int
    world_size: int

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Seat | None:
        """Read ``env`` (default ``os.environ``) as torch does: empty is unset. None: torchrun did not start this process.

        ``WORLD_SIZE`` and ``MASTER_*`` alone say nothing about a process, and are also set by others.

        Raises:
            InputError: a variable is missing, or its value cannot be.
        """
        env = os.environ if env is None else env
        found = {name: env.get(name, "").strip() for name in _TORCHRUN}
        if not found["RANK"] and not found["LOCAL_RANK"]:
            return None
        missing = [name for name in _TORCHRUN if not found[name]]
        if missing:
            named = "RANK" if found["RANK"] else "LOCAL_RANK"
            raise InputError(
                f"{named} is set, but not {', '.join(missing)}: torchrun sets {', '.join(_TORCHRUN)}; "
                "start this with torchrun, or unset RANK and LOCAL_RANK"
            )
        size = _whole("WORLD_SIZE", found["WORLD_SIZE"], 1, 1 << 20)
        rank, local = (_whole(name, found[name], 0, size - 1, f" (WORLD_SIZE={size})") for name in ("RANK", "LOCAL_RANK"))
        _whole("MASTER_PORT", found["MASTER_PORT"], 0, 65535)
        return cls(rank, local, size)


def _whole(name: str, text: str, least: int, most: int, why: str = "") -> int:
    if text.isdecimal() and len(text) < 20 and least <= int(text) <= most:
        return int(text)
    raise InputError(f"{name}={text!r}: expected a whole number from {least} to {most}{why}, as torchrun sets it")


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

    Raises:
        SetupError: the ranks did not find each other.
    """
    os.environ.update(NO_MULTICAST)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Our deadline names the ranks that did not finish, so torch's timeout has to come later.
    timeout = timedelta(seconds=deadline + 60)
    try:
        dist.init_process_group(backend, timeout=timeout, **where)
        control = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))  # of which every rank is a member
    except RuntimeError as e:  # torch's DistErrors, and gloo's errors that are no more than this
        what = str(e).partition("\n")[0]
        raise SetupError(
            f"torch.distributed could not connect the ranks: {what}; where they meet is up to MASTER_ADDR and "
            "MASTER_PORT (torchrun sets them) and GLOO_SOCKET_IFNAME"
        ) from e
    yield Place(dist.get_rank(), dist.get_world_size(), device, control)
    dist.destroy_process_group()
