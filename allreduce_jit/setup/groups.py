"""Process groups of the same ranks with a CPU backend."""

from __future__ import annotations

from datetime import timedelta

import torch.distributed as dist

from ..errors import SettingsError
from ..settings import Settings
from .exchange import TIMEOUT_S, missing


def has_backend(group: dist.ProcessGroup, what: str) -> bool:
    """``what``: ``cpu:`` for any CPU backend, ``cuda:nccl`` for that one."""
    return what in dist.get_backend_config(group)


def gloo_sibling(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The gloo group of the same ranks, made at the first call; only the members of ``group`` call this.

    ``dist.new_group`` will not do. All ranks of the job have to call it; with ``use_local_synchronization`` its
    members find each other by a count of groups that need not be the same on all of them, and wait for ever if not.
    The name of ``group`` is the same on all. What is made stays: a group has threads and sockets of its own.
    Raises ``PeerTimeout`` where a rank does not come within ``Settings.setup_timeout_s``.
    It takes functions that torch keeps to itself; where they have changed, ``new_group`` has to do.
    """
    from torch.distributed import distributed_c10d as c10d

    name = f"{group.group_name}_allreduce_jit_gloo"
    known = next((one for one, its_name in c10d._world.pg_names.items() if its_name == name), None)
    if known is not None:
        return known
    ranks = dist.get_process_group_ranks(group)
    store, place = c10d._get_default_store(), dist.get_rank(group)
    usual = c10d._get_default_timeout(dist.Backend("gloo"))
    timeout = _setup_timeout(usual)
    store.set(f"{name}/{place}", "here")
    try:
        made, _ = c10d._new_process_group_helper(len(ranks), place, ranks, dist.Backend("gloo"), store, name, timeout=timeout)
        if timeout != usual:
            c10d._set_pg_timeout(usual, made)  # that of its collectives
    except (AttributeError, TypeError):
        return dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    except RuntimeError as e:
        raise missing(place, dict.fromkeys(_absent(store, name, len(ranks)), e), timeout.total_seconds()) from e
    c10d._world.pg_group_ranks[made] = {rank: place for place, rank in enumerate(ranks)}
    return made


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
