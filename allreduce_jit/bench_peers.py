"""Other all-reduces that ``bench`` measures beside ours; none of them may use NVLink multicast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from . import reference
from .place import Place

_T = TypeVar("_T")
_TRIAL_NUMEL = 1 << 14


class Unavailable(Exception):
    """This machine or this torch does not have the peer."""


class Peer:
    """One competitor.

    Attributes:
        name: as in ``--peers`` and in the table.
        buffers: byte tensors, as many as inputs are wanted at once; where they live is the peer's affair.
    """

    name = ""

    def __init__(self, place: Place, count: int, nbytes: int):
        if place.device.type != "cuda":
            raise Unavailable("needs CUDA tensors")
        self.place = place
        self.buffers = self.allocate(count, nbytes)

    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        return [torch.empty(nbytes, dtype=torch.uint8, device=self.place.device) for _ in range(count)]

    def tensors(self, numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """The first ``numel`` elements of every buffer."""
        return [buffer[: numel * dtype.itemsize].view(dtype) for buffer in self.buffers]

    def call(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum one of ``tensors``; returns where the sum is, which may be in place."""
        raise NotImplementedError

    def close(self) -> None:
        self.buffers = []


class Nccl(Peer):
    """``torch.distributed.all_reduce``."""

    name = "nccl"

    def __init__(self, place: Place, count: int, nbytes: int):
        if not dist.is_nccl_available():
            raise Unavailable("this torch has no NCCL")
        super().__init__(place, count, nbytes)

    def call(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor


class NcclSymmetric(Nccl):
    """The same, on buffers registered as a symmetric window."""

    name = "nccl_symm"

    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        # Registration needs a communicator, and NCCL makes it at the first collective.
        dist.all_reduce(torch.ones(1, device=self.place.device))
        self.backend = dist.group.WORLD._get_backend(self.place.device)
        if not hasattr(self.backend, "register_mem_pool"):
            raise Unavailable("this torch cannot register memory pools with NCCL")
        self.pool = torch.cuda.MemPool(self.backend.mem_allocator)
        with torch.cuda.use_mem_pool(self.pool):
            buffers = super().allocate(count, nbytes)
        # After the allocations: later ones would not become part of the window in every version.
        self.backend.register_mem_pool(self.pool, symm=True)
        return buffers

    def close(self) -> None:
        self.backend.deregister_mem_pool(self.pool)
        super().close()


class TorchOneShot(Peer):
    """torch's symmetric memory, every rank reads all inputs."""

    name = "torch_one_shot"

    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        from torch.distributed import _symmetric_memory as symmetric

        buffers = [symmetric.empty(nbytes, dtype=torch.uint8, device=self.place.device) for _ in range(count)]
        for buffer in buffers:
            symmetric.rendezvous(buffer, dist.group.WORLD.group_name)
        return buffers

    def call(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.ops.symm_mem.one_shot_all_reduce(tensor, "sum", dist.group.WORLD.group_name)


class TorchTwoShot(TorchOneShot):
    """torch's symmetric memory, every rank reduces a part and writes it to all."""

    name = "torch_two_shot"

    def call(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.ops.symm_mem.two_shot_all_reduce_(tensor, "sum", dist.group.WORLD.group_name)


PEERS: dict[str, type[Peer]] = {kind.name: kind for kind in (Nccl, NcclSymmetric, TorchOneShot, TorchTwoShot)}


def agreed(place: Place, step: Callable[[], _T]) -> tuple[_T | None, str | None]:
    """Run ``step`` on every rank: (its value, None) if all ranks could, else (None, why the first could not)."""
    value, trouble = None, None
    try:
        value = step()
    except Unavailable as reason:
        trouble = str(reason)
    except Exception as error:  # noqa: BLE001 - a competitor's failure is a cell in our table
        trouble = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for rank, text in enumerate(place.gather(trouble)):
        if text is not None:
            return None, f"rank {rank}: {text}"
    return value, None


def open_peers(place: Place, names: list[str], count: int, nbytes: int) -> tuple[list[Peer], dict[str, str]]:
    """Those of ``names`` that every rank has and that sum right, and why the others are missing."""
    ready, missing = [], {}
    for name in names:
        peer, trouble = agreed(place, lambda: PEERS[name](place, count, max(nbytes, _TRIAL_NUMEL * 4)))
        if peer is not None:
            _, trouble = agreed(place, lambda: _trial(peer))
        if trouble is None:
            ready.append(peer)
        else:
            missing[name] = trouble
    return ready, missing


def _trial(peer: Peer) -> None:
    """One small sum that is exact in any order: a peer that is called wrongly must not look fast."""
    place, dtype = peer.place, torch.bfloat16
    what: dict[str, Any] = {"kind": reference.INTEGERS}
    tensor = peer.tensors(_TRIAL_NUMEL, dtype)[0]
    mine = reference.values(0, place.rank, _TRIAL_NUMEL, dtype, place.device, world_size=place.world_size, **what)
    want = reference.expected(0, place.world_size, _TRIAL_NUMEL, dtype, place.device, **what)
    tensor.copy_(mine)
    wrong = reference.compare(peer.call(tensor), want).wrong
    if wrong:
        raise Unavailable(f"wrong sums in a trial call ({wrong} of {_TRIAL_NUMEL} elements)")
