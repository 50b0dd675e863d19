"""What kernels require: checks over all ranks of a group, each None where it is met, else the reason why it is not.

Every backend requires ``COMMON``; rows of ``backends`` name what they require beside it. Where a fact is not known, nothing good
is assumed of it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import TYPE_CHECKING, TypeVar

from ..paths import Path
from ..settings import Settings
from .verdict import CODES, Reason

if TYPE_CHECKING:  # the command line's --help imports this module, and has no use for a probe
    from ..machine.probe import Capabilities, Gpu, Link

T = TypeVar("T")

# Of fabrics that are to come up.
_FABRIC: dict[str | None, str] = {"not_started": "not started", "in_progress": "still being set up"}


@dataclass(frozen=True)
class Group:
    """What a decision is made from; the same on every rank.

    Attributes:
        caps: one per rank, in rank order.
        settings: one per rank.
        world_sizes: numbers of ranks there are kernels for.
        nnodes: machines of the job as the engine counts them.
        left: paths that all ranks have left, with the reason of each.
    """

    caps: Sequence[Capabilities]
    settings: Sequence[Settings]
    world_sizes: Collection[int]
    nnodes: int = 1
    left: Mapping[Path, Reason] = field(default_factory=dict)

    @property
    def gpus(self) -> list[Gpu]:
        """One per rank, once ``has_gpu`` is met."""
        return [c.gpu for c in self.caps if c.gpu is not None]

    def link(self, rank: int, peer: int) -> Link | None:
        """What ``rank`` knows of its link to ``peer``, once ``has_gpu`` is met."""
        return self.caps[rank].link_to(self.gpus[peer].uuid)


Check = Callable[[Group], "Reason | None"]


def unmet(checks: Iterable[Check], group: Group) -> Reason | None:
    """Of the first check that is not met. The order counts: a check may rely on those before it."""
    return next((reason for reason in (check(group) for check in checks) if reason), None)


def first_rank(ranks: Sequence[T], code: str, text: str | Callable[[T], str], bad: Callable[[T], object]) -> Reason | None:
    """The first rank that is ``bad``; ``text`` follows the words "rank N"."""
    for rank, one in enumerate(ranks):
        if bad(one):
            return Reason(code, f"rank {rank} {text if isinstance(text, str) else text(one)}", rank)
    return None


def problem(c: Capabilities, source: str) -> str:
    """What the probe noted about ``source``, as a parenthesis."""
    return next((f" ({found})" for found in c.problems if source and found.startswith(source)), "")


# -- for every path with kernels


def several_ranks(group: Group) -> Reason | None:
    return Reason("world-size-1", CODES["world-size-1"], 0) if len(group.caps) == 1 else None


def kernels_allowed(group: Group) -> Reason | None:
    return first_rank(group.settings, "path-forced", "has ALLREDUCE_JIT_PATH=torch", lambda s: s.path == "torch")


def one_node(group: Group) -> Reason | None:
    if group.nnodes > 1:
        return Reason("spans-nodes", f"the job has nnodes={group.nnodes}")
    return _differs(group, "spans-nodes", "host", lambda c: c.host.host_id, "host.boot_id")


def has_cuda(group: Group) -> Reason | None:
    def undriven(c: Capabilities) -> bool:
        return c.gpu is None and c.software.cuda_driver is None and not c.software.hip

    return first_rank(group.caps, "cpu", "has its tensors on the CPU", lambda c: c.device == "cpu") or first_rank(
        group.caps, "no-driver", lambda c: f"has no CUDA driver{problem(c, 'driver')}", undriven
    )


def not_rocm(group: Group) -> Reason | None:
    return first_rank(group.caps, "rocm", "has a torch built for ROCm", lambda c: c.software.hip)


def has_gpu(group: Group) -> Reason | None:
    return first_rank(group.caps, "no-gpu", lambda c: f"has no {c.device}{problem(c, 'driver')}", lambda c: c.gpu is None)


def gpu_each(group: Group) -> Reason | None:
    """Other UUIDs are other GPUs, but for slices of one: they share its bus id, on a host that is known or by its name."""
    owner: dict[object, int] = {}
    for rank, c in enumerate(group.caps):
        if c.gpu is None:
            continue
        names: list[object] = [c.gpu.uuid]
        if c.gpu.mig:
            names.append((c.host.host_id or c.host.hostname, c.gpu.pci_bus_id))
        for name in names:
            if owner.setdefault(name, rank) != rank:
                return Reason("same-gpu", f"rank {rank} uses the GPU of rank {owner[name]} ({c.gpu.uuid})", rank)
    return None


def no_mig(group: Group) -> Reason | None:
    return first_rank(group.gpus, "mig", lambda gpu: f"runs on a MIG instance ({gpu.name})", lambda gpu: gpu.mig)


def no_vgpu(group: Group) -> Reason | None:
    def virtual(gpu: Gpu) -> bool:
        return gpu.virtualization in ("vgpu", "host-vgpu", "host-vsga")

    return first_rank(group.gpus, "vgpu", lambda gpu: f"runs on a virtual GPU ({gpu.name})", virtual)


def one_pid_namespace(group: Group) -> Reason | None:
    return _differs(group, "pid-namespace", "PID namespace", lambda c: c.host.pid_namespace, "host.namespace(pid)")


def one_ipc_namespace(group: Group) -> Reason | None:
    return _differs(group, "ipc-namespace", "IPC namespace", lambda c: c.host.ipc_namespace, "host.namespace(ipc)")


def known_world_size(group: Group) -> Reason | None:
    size = len(group.caps)
    if size in group.world_sizes:
        return None
    return Reason("world-size", f"{size} ranks; there are kernels for {', '.join(map(str, sorted(group.world_sizes)))}")


def sm_80(group: Group) -> Reason | None:
    def old(gpu: Gpu) -> bool:
        return gpu.compute_capability < (8, 0)

    return first_rank(group.gpus, "compute-capability", lambda gpu: f"has a GPU older than sm_80 ({gpu.name})", old)


def same_architecture(group: Group) -> Reason | None:
    found = ["{}.{}".format(*gpu.compute_capability) for gpu in group.gpus]
    text = f"has compute capability {{}}, rank 0 has {found[0]}".format
    return first_rank(found, "mixed-gpus", text, lambda one: one != found[0])


COMMON: tuple[Check, ...] = (
    several_ranks,
    kernels_allowed,
    one_node,
    has_cuda,
    not_rocm,
    has_gpu,
    gpu_each,
    no_mig,
    no_vgpu,
    one_pid_namespace,
    one_ipc_namespace,
    known_world_size,
    sm_80,
    same_architecture,
)


# -- for some of them


def fabric_ready(group: Group) -> Reason | None:
    """Unknown or not supported: there is no such fabric to wait for."""
    text = "has an NVSwitch fabric that is {}".format
    return first_rank(group.caps, "fabric-not-ready", lambda c: text(_FABRIC[c.fabric]), lambda c: c.fabric in _FABRIC)


def full_nvlink(group: Group) -> Reason | None:
    ranks, missing = len(group.caps), _lacking(group, "nvlink")
    if not missing:
        return None
    rank, peer = missing[0]
    if len(missing) == ranks * (ranks - 1):
        return Reason("no-nvlink", "no two GPUs of the group are known to be joined by NVLink")
    link = group.link(rank, peer)
    known = "has no NVLink" if link is not None and link.nvlink is False else "is not known to have NVLink"
    return Reason("partial-nvlink", f"rank {rank} {known} to rank {peer}; some pairs have it", rank)


def peer_access(group: Group) -> Reason | None:
    missing = _lacking(group, "p2p_access")
    if not missing:
        return None
    rank, peer = missing[0]
    link = group.link(rank, peer)
    if link is not None and link.p2p_access is False:
        return Reason("no-p2p", f"rank {rank} has no peer access to the GPU of rank {peer}", rank)
    text = f"rank {rank} cannot tell whether it reaches the GPU of rank {peer}{problem(group.caps[rank], 'nvml')}"
    return Reason("no-p2p", text, rank)


def no_better_way(group: Group) -> Reason | None:
    """That GPUs cannot reach each other, or somebody wants no way on which they would, or it failed when it was tried.

    Otherwise NCCL goes there, faster than host memory is for all but small messages."""
    if any(s.path == Path.HOST.short for s in group.settings) or _lacking(group, "p2p_access"):
        return None
    if any(reason.code in ("path-forced", "map-failed", "verify-failed") for reason in group.left.values()):
        return None
    return Reason("has-p2p", CODES["has-p2p"])


def host_memory(group: Group) -> Reason | None:
    """That a GPU can read and write memory of this process which is pinned after it was allocated."""

    def text(gpu: Gpu) -> str:
        if gpu.maps_host_memory is None:
            return f"cannot tell whether {gpu.name} can map host memory that is registered with it"
        return f"has a GPU or a driver that cannot map host memory which is registered with it ({gpu.name})"

    return first_rank(group.gpus, "no-host-memory", text, lambda gpu: not gpu.maps_host_memory)


def shared_memory(group: Group) -> Reason | None:
    """Ranks of one host and PID namespace (``COMMON``) share memory through /proc. How much is left, only trying tells."""

    def text(c: Capabilities) -> str:
        return f"cannot make memory to share (memfd_create){problem(c, 'host.memfd')}"

    return first_rank(group.caps, "no-shared-memory", text, lambda c: not c.host.memfd)


def _differs(group: Group, code: str, what: str, key: Callable[[Capabilities], str | None], source: str) -> Reason | None:
    """The first rank whose ``key`` is unknown (no ground to assume the best) or not that of rank 0.

    ``source`` is what the probe asked for it.
    """
    mine = key(group.caps[0])

    def text(c: Capabilities) -> str:
        if key(c) is None:
            return f"cannot tell its {what}{problem(c, source)}"
        return f"has {what} {key(c)}, rank 0 has {mine}"

    return first_rank(group.caps, code, text, lambda c: key(c) is None or key(c) != mine)


def _lacking(group: Group, fact: str) -> list[tuple[int, int]]:
    """The ordered pairs of ranks whose link is not known to have ``fact``."""
    return [pair for pair in permutations(range(len(group.caps)), 2) if not getattr(group.link(*pair), fact, None)]
