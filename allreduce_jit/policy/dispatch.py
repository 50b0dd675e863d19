"""From what all ranks know and want to the path that all of them take, with the reason for every step down.

The ladder is V2 (NVRTC, full NVLink) → legacy (Triton, peer access) → torch.distributed. ``decide`` is pure: given
the same gathered values it answers the same on every rank. What only shows when a path is built (a kernel that does
not compile, a transfer that does not verify) lowers the verdict later, through the same ``Reason``.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, MutableMapping, Sequence
from itertools import permutations
from typing import TypeVar

from ..errors import InputError
from ..machine.probe import Capabilities
from ..settings import V2_SWITCH, Settings, parse_switch
from .verdict import CODES, Path, Reason, Verdict

logger = logging.getLogger("allreduce_jit")
Caps = Sequence[Capabilities]
Wishes = Sequence[Settings]
T = TypeVar("T")

_FABRIC = {"not_started": "not started", "in_progress": "still being set up"}  # of those that are to come up


def decide(
    caps: Caps,
    settings: Wishes,
    supported_world_sizes: Collection[int] = range(2, 9),
    nnodes: int = 1,
) -> Verdict:
    """The path of a group, from the gathered ``Capabilities`` and ``Settings`` of all its ranks, in rank order.

    Args:
        caps: one per rank.
        settings: one per rank; the most cautious one counts for all.
        supported_world_sizes: numbers of ranks there are kernels for.
        nnodes: machines of the job as the engine counts them.

    Raises:
        InputError: the arguments do not describe a group. No machine makes it raise.
    """
    if not caps or len(caps) != len(settings):
        raise InputError(f"decide needs one Capabilities and one Settings a rank, got {len(caps)} and {len(settings)}")
    if not supported_world_sizes:
        raise InputError("supported_world_sizes is empty: the configuration was not loaded before the check")
    backend = "gloo" if _no_cuda(caps) or _same_gpu(caps) else "nccl"
    always = _rules_out_kernels(caps, settings, supported_world_sizes, nnodes)
    if always:
        return Verdict(Path.TORCH, (always,), None, backend)
    not_v2 = _rules_out_v2(caps, settings)
    if not_v2 is None:
        why = Reason("full-nvlink", f"NVLink and peer access between all {len(caps)} GPUs")
        return Verdict(Path.V2, (why,), True, backend)
    not_legacy = _no_p2p(caps) or _first(
        caps, "no-triton", lambda c: f"has no Triton{_problem(c, 'software.triton')}", _lacks("triton")
    )
    if not_legacy is None:
        return Verdict(Path.LEGACY, (not_v2,), _no_full_nvlink(caps) is None, backend)
    reasons = (not_v2,) if not_v2.code == not_legacy.code else (not_v2, not_legacy)
    return Verdict(Path.TORCH, reasons, None, backend)


def apply_multi_node_policy(nnodes: int, environ: MutableMapping[str, str] = os.environ) -> None:
    """Switch V2 off in ``environ`` for a job that spans machines; warns if the switch was set and not off.

    Call it once, after all other environment handling and before anything that concerns CUDA graphs.
    """
    if nnodes <= 1:
        return
    if V2_SWITCH in environ and parse_switch(V2_SWITCH, environ[V2_SWITCH]):
        logger.warning("Disabling %s because nnodes=%d (custom all-reduce v2 is intra-node only).", V2_SWITCH, nnodes)
    environ[V2_SWITCH] = "0"


def _rules_out_kernels(caps: Caps, settings: Wishes, sizes: Collection[int], nnodes: int) -> Reason | None:
    """What rules out V2 and legacy alike. The order matters: a later check may rely on the earlier ones."""
    if len(caps) == 1:
        return Reason("world-size-1", CODES["world-size-1"], 0)
    return (
        _first(settings, "path-forced", "has ALLREDUCE_JIT_PATH=torch", lambda s: s.path == "torch")
        or _spans_nodes(caps, nnodes)
        or _no_cuda(caps)
        or _first(caps, "rocm", "has a torch built for ROCm", lambda c: c.software.hip)
        or _first(caps, "no-gpu", lambda c: f"has no {c.device}{_problem(c, 'driver')}", lambda c: c.gpu is None)
        or _same_gpu(caps)
        or _first(caps, "mig", lambda c: f"runs on a MIG instance ({c.gpu.name})", lambda c: c.gpu.mig)
        or _first(caps, "vgpu", lambda c: f"runs on a virtual GPU ({c.gpu.name})", _is_vgpu)
        or _differs(caps, "pid-namespace", "PID namespace", lambda c: c.host.pid_namespace, "host.namespace(pid)")
        or _differs(caps, "ipc-namespace", "IPC namespace", lambda c: c.host.ipc_namespace, "host.namespace(ipc)")
        or _world_size(len(caps), sizes)
        or _first(caps, "compute-capability", lambda c: f"has a GPU older than sm_80 ({c.gpu.name})", _is_old)
        or _differs(caps, "mixed-gpus", "compute capability", lambda c: "{}.{}".format(*c.gpu.compute_capability))
    )


def _rules_out_v2(caps: Caps, settings: Wishes) -> Reason | None:
    return (
        _first(settings, "v2-switched-off", f"has {V2_SWITCH} off", lambda s: not s.use_v2)
        or _first(settings, "path-forced", "has ALLREDUCE_JIT_PATH=legacy", lambda s: s.path == "legacy")
        or _first(caps, "fabric-not-ready", lambda c: f"has an NVSwitch fabric that is {_FABRIC[c.fabric]}", _fabric_is_down)
        or _no_full_nvlink(caps)
        or _no_p2p(caps)
        or _first(caps, "no-nvrtc", lambda c: f"has no NVRTC{_problem(c, 'software.nvrtc')}", _lacks("nvrtc"))
    )


def _is_vgpu(c: Capabilities) -> bool:
    return c.gpu.virtualization in ("vgpu", "host-vgpu", "host-vsga")


def _is_old(c: Capabilities) -> bool:
    return c.gpu.compute_capability < (8, 0)


def _lacks(program: str) -> Callable[[Capabilities], bool]:
    return lambda c: getattr(c.software, program) is None


def _fabric_is_down(c: Capabilities) -> bool:
    return c.fabric in _FABRIC  # unknown or not_supported: no such fabric to wait for


def _first(ranks: Sequence[T], code: str, text: str | Callable[[T], str], bad: Callable[[T], object]) -> Reason | None:
    """The first rank that is ``bad``; ``text`` follows the words "rank N"."""
    for rank, one in enumerate(ranks):
        if bad(one):
            return Reason(code, f"rank {rank} {text if isinstance(text, str) else text(one)}", rank)
    return None


def _differs(caps: Caps, code: str, what: str, key: Callable[[Capabilities], str | None], source: str = "") -> Reason | None:
    """The first rank whose ``key`` is unknown (no ground to assume the best) or not that of rank 0.

    ``source`` is what the probe asked for it.
    """
    mine = key(caps[0])

    def text(c: Capabilities) -> str:
        if key(c) is None:
            return f"cannot tell its {what}{_problem(c, source)}"
        return f"has {what} {key(c)}, rank 0 has {mine}"

    return _first(caps, code, text, lambda c: key(c) is None or key(c) != mine)


def _spans_nodes(caps: Caps, nnodes: int) -> Reason | None:
    if nnodes > 1:
        return Reason("spans-nodes", f"the job has nnodes={nnodes}")
    return _differs(caps, "spans-nodes", "host", lambda c: c.host.host_id, "host.boot_id")


def _no_cuda(caps: Caps) -> Reason | None:
    def undriven(c: Capabilities) -> bool:
        return c.gpu is None and c.software.cuda_driver is None and not c.software.hip

    return _first(caps, "cpu", "has its tensors on the CPU", lambda c: c.device == "cpu") or _first(
        caps, "no-driver", lambda c: f"has no CUDA driver{_problem(c, 'driver')}", undriven
    )


def _same_gpu(caps: Caps) -> Reason | None:
    """Other UUIDs are other GPUs, but for slices of one: they share its bus id, on a host that is known or by its name."""
    owner: dict[object, int] = {}
    for rank, c in enumerate(caps):
        if c.gpu is None:
            continue
        names: list[object] = [c.gpu.uuid]
        if c.gpu.mig:
            names.append((c.host.host_id or c.host.hostname, c.gpu.pci_bus_id))
        for name in names:
            if owner.setdefault(name, rank) != rank:
                return Reason("same-gpu", f"rank {rank} uses the GPU of rank {owner[name]} ({c.gpu.uuid})", rank)
    return None


def _world_size(size: int, sizes: Collection[int]) -> Reason | None:
    if size in sizes:
        return None
    return Reason("world-size", f"{size} ranks; there are kernels for {', '.join(map(str, sorted(sizes)))}")


def _lacking(caps: Caps, fact: str) -> list[tuple[int, int]]:
    """The ordered pairs of ranks whose link is not known to have ``fact``."""
    pairs = permutations(range(len(caps)), 2)
    return [(i, j) for i, j in pairs if not getattr(caps[i].link_to(caps[j].gpu.uuid), fact, None)]


def _no_full_nvlink(caps: Caps) -> Reason | None:
    missing = _lacking(caps, "nvlink")
    if not missing:
        return None
    rank, peer = missing[0]
    if len(missing) == len(caps) * (len(caps) - 1):
        return Reason("no-nvlink", "no two GPUs of the group are known to be joined by NVLink")
    link = caps[rank].link_to(caps[peer].gpu.uuid)
    known = "has no NVLink" if link is not None and link.nvlink is False else "is not known to have NVLink"
    return Reason("partial-nvlink", f"rank {rank} {known} to rank {peer}; some pairs have it", rank)


def _no_p2p(caps: Caps) -> Reason | None:
    missing = _lacking(caps, "p2p_access")
    if not missing:
        return None
    rank, peer = missing[0]
    link = caps[rank].link_to(caps[peer].gpu.uuid)
    if link is not None and link.p2p_access is False:
        return Reason("no-p2p", f"rank {rank} has no peer access to the GPU of rank {peer}", rank)
    text = f"rank {rank} cannot tell whether it reaches the GPU of rank {peer}{_problem(caps[rank], 'nvml')}"
    return Reason("no-p2p", text, rank)


def _problem(c: Capabilities, source: str) -> str:
    """What the probe noted about ``source``, as a parenthesis."""
    return next((f" ({problem})" for problem in c.problems if source and problem.startswith(source)), "")
