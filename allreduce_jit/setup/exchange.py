"""One exchange of JSON values between all ranks of a group, over its CPU backend.

Point to point rather than ``all_gather``: a rank that does not answer can then be named, one that is merely late
in another pair's exchange cannot be blamed, and nobody waits longer than the deadline.
"""

from __future__ import annotations

import json
import struct
import time
import weakref
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from ..errors import InputError, InputTypeError, PeerTimeoutError

if TYPE_CHECKING:
    import torch.distributed as dist

TIMEOUT_S = 300.0
_FOREVER_S = 10 * 365 * 86400.0
_TAG = 0x0A11  # apart from whatever the caller sends over the same group
_HEAD = struct.Struct("<q")
_FIRST = 16 << 10  # bytes of the first message: the length, and as much of the payload as fits
_MOST = 1 << 30

# What exchanges that failed here left under way, by group. A peer that comes later must still get our messages, and
# gloo may close the connection of a receive that is dropped: the peer is to blame whom we blame, not us.
_under_way: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()


def require_group(group: Any) -> dist.ProcessGroup:
    """The group that is meant; refuses what is no group of this rank.

    Args:
        group: a ``torch.distributed`` process group, or None for the default one.

    Raises:
        InputError: this rank is not in the group, the group was destroyed, or torch.distributed is not initialised.
        InputTypeError: ``group`` is no process group.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise InputError("torch.distributed is not initialised: call torch.distributed.init_process_group first")
    if group is None:
        group = dist.group.WORLD
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise InputError(f"this rank is not a member of the group (global rank {dist.get_rank()}): its members alone call")
    if not isinstance(group, dist.ProcessGroup):
        raise InputTypeError(f"group must be a torch.distributed process group, not {type(group).__name__}")
    try:
        dist.get_rank(group)
    except ValueError as e:
        raise InputError("the group is not known to torch.distributed: was it destroyed?") from e
    return group


def require_cpu_group(group: Any) -> None:
    """Refuse a group that cannot carry CPU tensors, and all that ``require_group`` refuses."""
    import torch.distributed as dist

    require_group(group)
    backends = dist.get_backend_config(group)
    if "cpu:" not in backends:
        kind = "an NCCL group" if "nccl" in backends else f"a group without a CPU backend ({backends})"
        raise InputError(
            f'group must not be {kind}: pass a gloo group of the same ranks, torch.distributed.new_group(ranks, backend="gloo")'
        )


def all_gather_json(group: Any, payload: Any, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """The payloads of all ranks, in group-rank order; every rank of the group must call it.

    Args:
        group: a CPU-capable process group, or None for the default one.
        payload: what ``json`` can write; tuples arrive as lists.
        timeout_s: seconds to wait for the other ranks; 0 = for ever. Backends other than gloo may wait longer.

    Raises:
        InputError: see ``require_cpu_group``; or some rank's payload is not JSON, and then on all ranks.
        PeerTimeoutError: a rank is gone, or did not answer in time; ``ranks`` names all that are known to be missing
            by then, those among them that gave up earlier and left. The group cannot be used any more.
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
        parts = _Exchange(group, timeout_s).all_gather(data)
    bad = [rank for rank, part in enumerate(parts) if not part]
    if bad:
        raise InputError(f"rank {bad[0]} of the group handed in no JSON value") from problem
    return [_parse(rank, part) for rank, part in enumerate(parts)]


def all_gather_fields(group: Any, payload: dict[str, object], timeout_s: float) -> list[dict]:
    """As ``all_gather_json``, of objects: each with the fields of ours, or it is an ``InputError``."""
    answers = all_gather_json(group, payload, timeout_s)
    for rank, answer in enumerate(answers):
        if not isinstance(answer, dict) or answer.keys() != payload.keys():
            raise InputError(
                f"rank {rank} takes part in another exchange than this one ({', '.join(payload)}): "
                "do all ranks run the same version and make the same calls?"
            )
    return answers


def _parse(rank: int, part: bytes) -> Any:
    try:
        return json.loads(part)
    except (ValueError, RecursionError) as e:
        raise InputError(f"rank {rank} of the group sent {len(part)} bytes that are no JSON: {e}") from e


class _Exchange:
    """Every rank sends all that it has to say before it waits for anyone: no rank's silence is another's fault."""

    def __init__(self, group: Any, timeout_s: float):
        import torch.distributed as dist

        self.group = dist.group.WORLD if group is None else group
        self.rank = dist.get_rank(group)
        self.peers = [rank for rank in range(dist.get_world_size(group)) if rank != self.rank]
        self.timeout_s = timeout_s
        self.end = time.monotonic() + (timeout_s or _FOREVER_S)
        self.sends: dict[int, list[Any]] = {rank: [] for rank in self.peers}
        self.receives: list[Any] = []
        self.problems: dict[int, Exception] = {}

    def all_gather(self, data: bytes) -> list[bytes]:
        first, rest = data[: _FIRST - _HEAD.size], data[_FIRST - _HEAD.size :]
        block = (_HEAD.pack(len(data)) + first).ljust(_FIRST, b"\0")
        arrived = self._receive(dict.fromkeys(self.peers, _FIRST), (block, rest))
        lengths = {rank: _HEAD.unpack_from(part)[0] for rank, part in arrived.items()}
        for rank, length in lengths.items():
            if not 0 <= length <= _MOST:
                _under_way[self.group] = self.sends, self.receives
                raise InputError(f"rank {rank} of the group sent no exchange of this package (a length of {length})")
        left = {rank: length - (_FIRST - _HEAD.size) for rank, length in lengths.items()}
        tails = self._receive({rank: size for rank, size in left.items() if size > 0}, ())
        self._wait(self.sends)
        parts = {rank: arrived[rank][_HEAD.size :][:length] + tails.get(rank, b"") for rank, length in lengths.items()}
        return [data if rank == self.rank else parts[rank] for rank in range(len(parts) + 1)]

    def _receive(self, sizes: Mapping[int, int], messages: tuple[bytes, ...]) -> dict[int, bytes]:
        """``sizes`` bytes from each rank; ``messages`` go to all peers first."""
        import torch
        import torch.distributed as dist

        def empty(size: int) -> torch.Tensor:
            return torch.empty(size, dtype=torch.uint8, device="cpu")

        buffers = {rank: empty(size) for rank, size in sizes.items()}
        outgoing = [torch.frombuffer(bytearray(text), dtype=torch.uint8) for text in messages if text]
        waits: dict[int, list[Any]] = {}
        for rank in self.peers:
            try:
                for tensor in outgoing:
                    self.sends[rank].append((dist.isend(tensor, group=self.group, group_dst=rank, tag=_TAG), tensor))
                if rank in buffers:
                    received = buffers[rank]
                    waits[rank] = [(dist.irecv(received, group=self.group, group_src=rank, tag=_TAG), received)]
                    self.receives += waits[rank]
            except RuntimeError as e:
                self.problems[rank] = e
        self._wait(waits)
        return {rank: bytes(buffer.numpy()) for rank, buffer in buffers.items()}

    def _wait(self, works: Mapping[int, list[Any]]) -> None:
        """One after the other, until all of ``works`` are done or one has failed, and then for no other: of a rank that is gone we
        hear once those before it have answered."""
        for rank, pending in works.items():
            if self.problems and time.monotonic() < self.end:
                break  # a rank is gone: the rest may be late for good reasons
            try:
                for work, _ in pending:
                    work.wait(timedelta(seconds=max(0.001, self.end - time.monotonic())))
            except RuntimeError as e:
                self.problems[rank] = e
        if self.problems:
            expired = time.monotonic() >= self.end
            _under_way[self.group] = self.sends, self.receives
            raise missing(self.rank, self.problems, self.timeout_s if expired else None)


def missing(me: int, problems: Mapping[int, Exception], waited_s: float | None) -> PeerTimeoutError:
    """What to raise on rank ``me``: ``problems`` by rank, known at once (None) or after ``waited_s`` seconds."""
    ranks = tuple(sorted(problems))
    names = ("rank " if len(ranks) == 1 else "ranks ") + ", ".join(map(str, ranks)) if ranks else "some rank"
    how = "lost the connection to" if waited_s is None else f"waited {waited_s:g} s (ALLREDUCE_JIT_SETUP_TIMEOUT) for"
    error = PeerTimeoutError(
        f"rank {me} {how} {names} while ranks were agreeing: killed, stuck, or gone its own way? "
        "This process group cannot be used any more: start again with a new one.",
        ranks,
    )
    error.__cause__ = problems[ranks[0]] if ranks else None
    return error
