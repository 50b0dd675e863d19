"""From what all ranks know and want to the path that all of them take, with the reason for every step down.

The ladder is the table ``backends.BACKENDS``, and torch.distributed below it. ``decide`` is pure: given the same gathered
values it answers the same on every rank. What only shows when a path is built (a kernel that does not compile, a transfer
that does not verify) is handed in, and lowers the verdict through the same ``Reason``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping, MutableMapping, Sequence

from ..errors import InputError
from ..machine.probe import Capabilities
from ..paths import Path
from ..settings import V2_SWITCH, Settings, parse_switch
from . import backends, checks
from .checks import Group, unmet
from .verdict import Reason, Verdict

logger = logging.getLogger("allreduce_jit")


def decide(
    caps: Sequence[Capabilities],
    settings: Sequence[Settings],
    supported_world_sizes: Collection[int] = range(2, 9),
    nnodes: int = 1,
    left: Mapping[Path, Reason] | None = None,
) -> Verdict:
    """The path of a group, from the gathered ``Capabilities`` and ``Settings`` of all its ranks, in rank order.

    Args:
        caps: one per rank.
        settings: one per rank; the most cautious one counts for all.
        supported_world_sizes: numbers of ranks there are kernels for.
        nnodes: machines of the job as the engine counts them.
        left: paths that are possible and that all ranks leave nevertheless, with the reason of each.

    Raises:
        InputError: the arguments do not describe a group. No machine makes it raise.
    """
    if not caps or len(caps) != len(settings):
        raise InputError(f"decide needs one Capabilities and one Settings a rank, got {len(caps)} and {len(settings)}")
    if not supported_world_sizes:
        raise InputError("supported_world_sizes is empty: the configuration was not loaded before the check")
    group = Group(caps, settings, supported_world_sizes, nnodes, left or {})
    backend = "nccl" if unmet((checks.has_cuda, checks.gpu_each), group) is None else "gloo"
    always = unmet(checks.COMMON, group)
    if always:
        return Verdict(Path.TORCH, (always,), None, backend)
    steps: list[Reason] = []
    for row in backends.BACKENDS:
        if left and row.path in left:
            steps.append(left[row.path])
            continue
        obstacle = row.obstacle(group)
        if obstacle is None:
            return Verdict(row.path, tuple(steps) or row.possible(len(caps)), checks.full_nvlink(group) is None, backend)
        if obstacle.code not in [step.code for step in steps]:  # what rules out several rungs is told once
            steps.append(obstacle)
    return Verdict(Path.TORCH, tuple(steps), None, backend)


def apply_multi_node_policy(nnodes: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Switch V2 off in ``environ`` for a job that spans machines; warns if the switch was set and not off.

    Call it once, after all other environment handling and before anything that concerns CUDA graphs.
    """
    if nnodes <= 1:
        return
    if V2_SWITCH in environ and parse_switch(V2_SWITCH, environ[V2_SWITCH]):
        logger.warning("Disabling %s because nnodes=%d (custom all-reduce v2 is intra-node only).", V2_SWITCH, nnodes)
    environ[V2_SWITCH] = "0"
