"""Process groups of the same ranks with another backend."""

from __future__ import annotations

import torch.distributed as dist


def has_backend(group: dist.ProcessGroup, what: str) -> bool:
    """``what``: ``cpu:`` for any CPU backend, ``cuda:nccl`` for that one."""
    return what in dist.get_backend_config(group)


def can_have_sibling(group: dist.ProcessGroup, backend: str) -> bool:
    """Whether its members alone can make one: NCCL splits it off a bound default group, which takes all ranks."""
    everyone = dist.get_world_size(group) == dist.get_world_size()
    return backend != "nccl" or everyone or dist.group.WORLD.bound_device_id is None


def sibling(group: dist.ProcessGroup, backend: str) -> dist.ProcessGroup:
    """The group of the same ranks with ``backend``, made at the first call; only the members of ``group`` call this.

    ``dist.new_group`` will not do. All ranks of the job have to call it; with ``use_local_synchronization`` its
    members find each other by a count of groups that need not be the same on all of them, and wait for ever if not.
    The name of ``group`` is the same on all. What is made stays: a group has threads and sockets of its own.
    It takes functions that torch keeps to itself; where they have changed, ``new_group`` has to do.
    """
    from torch.distributed import distributed_c10d as c10d

    name = f"{group.group_name}_allreduce_jit_{backend}"
    known = next((one for one, its_name in c10d._world.pg_names.items() if its_name == name), None)
    if known is not None:
        return known
    ranks = dist.get_process_group_ranks(group)
    try:
        made, _ = c10d._new_process_group_helper(
            len(ranks),
            dist.get_rank(group),
            ranks,
            dist.Backend(backend),
            c10d._get_default_store(),
            name,
            timeout=c10d._get_default_timeout(dist.Backend(backend)),
        )
    except (AttributeError, TypeError):
        return dist.new_group(ranks, backend=backend, use_local_synchronization=True)
    c10d._world.pg_group_ranks[made] = {rank: place for place, rank in enumerate(ranks)}
    return made
