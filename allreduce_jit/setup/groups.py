"""Process groups of the same ranks with a CPU backend."""

from __future__ import annotations

import weakref
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist

from ..errors import SettingsError
from ..settings import Settings
from ..torch_private import new_gloo_group, shared_store
from .exchange import TIMEOUT_S, missing

_made: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()  # siblings by name; torch holds them


def has_backend(group: dist.ProcessGroup, what: str) -> bool:
    """``what``: ``cpu:`` for any CPU backend, ``cuda:nccl`` for that one."""
    return what in dist.get_backend_config(group)


def gloo_sibling(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The gloo group of the same ranks, made at the first call; only the members of ``group`` call this.

    ``dist.new_group`` will not do. All ranks of the job have to call it; with ``use_local_synchronization`` its
    members find each other by a count of groups that need not be the same on all of them, and wait for ever if not.
    The name of ``group`` is the same on all. What is made stays: a group has threads and sockets of its own.
    Raises ``PeerTimeoutError`` where a rank does not come within ``Settings.setup_timeout_s``.
    It takes functions that torch keeps to itself; where they have changed, ``new_group`` has to do.
    """
    name = f"{group.group_name}_allreduce_jit_gloo"
    made = _made.get(name)
    if made is not None and _alive(made):
        return made
    ranks, place, store = dist.get_process_group_ranks(group), dist.get_rank(group), shared_store(group)
    timeout = _setup_timeout(dist.default_pg_timeout)
    store.set(f"{name}/{place}", "here")
    try:
        made = new_gloo_group(ranks, place, store, name, timeout, dist.default_pg_timeout)
    except RuntimeError as e:
        raise missing(place, dict.fromkeys(_absent(store, name, len(ranks)), e), timeout.total_seconds()) from e
    if made is None:
        made = cast(dist.ProcessGroup, dist.new_group(ranks, backend="gloo", use_local_synchronization=True))
    _made[name] = made
    return made


def _alive(group: dist.ProcessGroup) -> bool:
    """Whether torch still knows it: it may have been destroyed, alone or with all others."""
    try:
        return dist.get_rank(group) >= 0
    except ValueError:
        return False


def _absent(store: dist.Store, name: str, world_size: int) -> list[int]:
    try:
        return [rank for rank in range(world_size) if not store.check([f"{name}/{rank}"])]
    except RuntimeError:  # it went with the rank that served it
        return []


def _setup_timeout(usual: timedelta) -> timedelta:
    try:
        seconds = Settings.from_env().setup_timeout_s
    except SettingsError:  # the survey tells all ranks
        seconds = TIMEOUT_S
    return timedelta(seconds=seconds) if seconds else usual
