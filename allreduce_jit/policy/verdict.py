"""The answer of ``dispatch.decide`` as values: the path, and the reason for every step down to it."""

from __future__ import annotations

from dataclasses import dataclass

from ..paths import Path
from ..settings import V2_SWITCH

# Every code a Reason may carry; codes are stable, texts are not.
CODES = {
    "full-nvlink": "V2 is possible: NVLink and peer access between all GPUs of the group",
    "world-size-1": "one rank: the all-reduce is the identity",
    "path-forced": "ALLREDUCE_JIT_PATH on some rank, or the caller, allows nothing higher",
    "v2-switched-off": f"{V2_SWITCH} is off on some rank, or the caller wants no V2",
    "spans-nodes": "the group spans machines, or some rank cannot tell its own: there NCCL is the engine",
    "cpu": "a rank's device is the CPU",
    "rocm": "torch was built for ROCm",
    "no-driver": "no CUDA driver can be loaded",
    "no-gpu": "the driver has no such GPU or cannot identify it",
    "same-gpu": "two ranks share one GPU, which NCCL refuses as well",
    "mig": "a GPU is a MIG instance: these have no peers",
    "vgpu": "a GPU is a virtual one",
    "pid-namespace": "ranks live in different PID namespaces (or in unknown ones)",
    "ipc-namespace": "ranks live in different IPC namespaces (or in unknown ones)",
    "world-size": "there are no kernels for this number of ranks",
    "compute-capability": "a GPU is older than sm_80",
    "mixed-gpus": "the GPUs differ in compute capability",
    "fabric-not-ready": "the NVSwitch fabric is not up at some GPU",
    "no-nvlink": "no two GPUs of the group are joined by NVLink",
    "partial-nvlink": "some pairs of GPUs are joined by NVLink and some are not",
    "no-p2p": "some GPU cannot access the memory of another, or nobody could tell",
    "has-p2p": "the GPUs can reach each other's memory, and NCCL does: host memory would be slower for large messages",
    "no-host-memory": "a GPU, or its driver, cannot map pinned host memory",
    "no-shared-memory": "a rank cannot make memory that others can map",
    "no-nvrtc": "NVRTC is missing, or cuda-core, through which it is called",
    "no-triton": "Triton is missing",
    "build-failed": "a rank could not build the path",
    "map-failed": "a rank could not map the staging memory of another",
    "no-nccl": "NCCL could not be set up on some rank: gloo all-reduces through the host",
    "verify-failed": "a transfer between two GPUs lost or changed data",
}


@dataclass(frozen=True)
class Reason:
    """Why a rung was taken or left: a stable ``code`` of ``CODES``, a sentence, and the rank that caused it."""

    code: str
    text: str
    rank: int | None = None

    def __post_init__(self) -> None:
        if self.code not in CODES:
            raise ValueError(f"unknown reason code {self.code!r}; valid: {', '.join(CODES)}")


@dataclass(frozen=True)
class Verdict:
    """The answer for the whole group.

    Attributes:
        path: the highest rung that every rank can take.
        reasons: one per step down, highest first (one alone where it rules out all kernels);
            for the highest rung the one that says why it is possible.
        full_nvlink: None where the path is torch.distributed, else whether all pairs have NVLink.
        backend: what torch.distributed uses for calls that no kernel takes: ``nccl`` or ``gloo``.
    """

    path: Path
    reasons: tuple[Reason, ...]
    full_nvlink: bool | None
    backend: str
