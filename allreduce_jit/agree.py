"""One exchange of JSON values between all ranks of a group, over its CPU backend."""

from __future__ import annotations

import ctypes
import json
from typing import Any

from .errors import InputError, InputTypeError


def require_group(group: Any) -> None:
    """Refuse what is no group of this rank.

    Args:
        group: a ``torch.distributed`` process group, or None for the default one.

    Raises:
        InputError: this rank is not in the group, the group was destroyed, or torch.distributed is not initialised.
        InputTypeError: ``group`` is no process group.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise InputError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise InputError(f"this rank is not a member of the group (global rank {dist.get_rank()}): its members alone call")
    if group is not None and not isinstance(group, dist.ProcessGroup):
        raise InputTypeError(f"group must be a torch.distributed process group, not {type(group).__name__}")
    try:
        dist.get_rank(group)
    except ValueError as e:
        raise InputError("the group is not known to torch.distributed: was it destroyed?") from e


def require_cpu_group(group: Any) -> None:
    """Refuse a group that cannot carry CPU tensors, and all that ``require_group`` refuses."""
    import torch.distributed as dist

    require_group(group)
    backends = dist.get_backend_config(group)
    if "cpu:" not in backends:
        kind = "an NCCL group" if "nccl" in backends else f"a group without a CPU backend ({backends})"
        raise InputError(
            f"group must not be {kind}: pass a gloo group of the same ranks, "
            'torch.distributed.new_group(ranks, backend="gloo")'
        )


def all_gather_json(group: Any, payload: Any) -> list[Any]:
    """The payloads of all ranks, in group-rank order; every rank of the group must call it.

    Args:
        group: a CPU-capable process group, or None for the default one.
        payload: what ``json`` can write; tuples arrive as lists.

    Raises:
        InputError: see ``require_cpu_group``; or some rank's payload is not JSON, and then on all ranks.
    """
    import torch

    require_cpu_group(group)
    try:
        data, problem = json.dumps(payload).encode(), None
    except (TypeError, ValueError) as e:
        data, problem = b"", e  # takes part all the same: the others wait for this rank
    # gloo writes from a thread of its own, which is not in the caller's inference mode: tensors made in that mode
    # may refuse the write (pytorch#126032), depending on torch's version.
    with torch.inference_mode(False), torch.no_grad():
        parts = _gather_bytes(group, data)
    bad = [rank for rank, part in enumerate(parts) if not part]
    if bad:
        raise InputError(f"rank {bad[0]} of the group handed in no JSON value") from problem
    return [json.loads(part) for part in parts]


def _gather_bytes(group: Any, data: bytes) -> list[bytes]:
    """Lengths first, then the bytes padded to the longest: the ranks' sizes differ."""
    import torch
    import torch.distributed as dist

    ranks = range(dist.get_world_size(group))
    length = torch.tensor([len(data)], dtype=torch.int64, device="cpu")
    lengths = [torch.zeros_like(length) for _ in ranks]
    dist.all_gather(lengths, length, group=group)
    sizes = [int(n) for n in lengths]
    longest = max(sizes)
    if longest == 0:
        return [b"" for _ in ranks]
    mine = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
    parts = [torch.empty_like(mine) for _ in ranks]
    dist.all_gather(parts, mine, group=group)
    return [ctypes.string_at(part.data_ptr(), size) for part, size in zip(parts, sizes)]
