"""The sentence that ends ``doctor``: what to do next, out of what it found."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..paths import Path

if TYPE_CHECKING:
    from .doctor import DoctorReport, VerdictReport

# Reasons that somebody can remove, by code, with how; and those that are what the machine is, with what that means.
_REMEDIES = {
    "path-forced": "unset ALLREDUCE_JIT_PATH, which keeps the faster paths out",
    "v2-switched-off": "set SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2=1, or unset it, for the faster path",
    "no-driver": "install the NVIDIA driver, or start the container with its GPUs (--gpus all)",
    "no-gpu": "let this process see the GPUs (CUDA_VISIBLE_DEVICES, the container's devices) and check them with nvidia-smi",
    "same-gpu": "give each rank a GPU of its own: torch.cuda.set_device(local rank) before init",
    "mig": "switch MIG off for GPUs that are to work together, as instances have no peers",
    "pid-namespace": "start all ranks in one PID namespace (one container, or --pid=host)",
    "ipc-namespace": "start all ranks in one IPC namespace (one container, or --ipc=host)",
    "fabric-not-ready": "start nvidia-fabricmanager, or wait until nvidia-smi shows the fabric as completed",
    "no-nvrtc": "install what compiles the kernels: pip install cuda-core nvidia-cuda-nvrtc",
    "no-triton": "install Triton: pip install triton",
    "build-failed": "read the reason above: the rank that it names could not compile, load or allocate",
    "no-host-memory": "use a driver that maps pinned host memory (in a virtual machine or WSL, a newer one), or leave it to NCCL",
    "no-shared-memory": "let processes make shared memory (memfd_create), which a container's seccomp profile may forbid",
    "map-failed": "read the reason above, and see that all ranks share PID and IPC namespaces",
    "verify-failed": "have the link between these GPUs checked (IOMMU and ACS settings, nvidia-smi nvlink -e): data was lost on it",
    "no-nccl": "use a build of torch that has NCCL, or free GPU memory for it",
}
_FACTS = {
    "full-nvlink": "nothing is in the way",
    "world-size-1": "with one GPU there is nothing to reduce over, and nothing to do",
    "cpu": "without a GPU all-reduces go through gloo, and there is nothing to do",
    "rocm": "the kernels are for NVIDIA GPUs, so that torch.distributed is what ROCm has",
    "spans-nodes": "NCCL is the engine between machines: use one communicator for the GPUs of each",
    "vgpu": "virtual GPUs have no peers: only whole GPUs can run the kernels",
    "world-size": "there are no kernels for so many ranks: 2 to 8 have them",
    "compute-capability": "the kernels need GPUs from sm_80 (A100) on",
    "mixed-gpus": "the kernels need GPUs of one kind: leave the others out of the group",
    "no-nvlink": "without NVLink this is the fastest path of this machine",
    "partial-nvlink": "with NVLink between some pairs only this is the fastest path; groups within a pair are faster",
    "no-p2p": "the GPUs cannot reach each other's memory: see whether a virtual machine, IOMMU or ACS keeps them apart",
    "has-p2p": "the GPUs reach each other, which NCCL makes use of: what kept the kernels from it stands above",
}


def next_step(report: DoctorReport, settings_valid: bool) -> str:
    """One sentence for what ``doctor`` found; what can be mended goes before what cannot."""
    problems, verdict = report.problems, report.verdict
    if not settings_valid:
        return "Correct the variable that the first problem names (docs/environment.md lists all), and run doctor again."
    if verdict is None:
        return "Mend what the first problem names, which kept doctor from a decision, and run it again."
    if report.gpu_present and not report.simulated_ranks:
        return "Install a CUDA build of torch, or let this process see the GPUs (CUDA_VISIBLE_DEVICES)."
    codes = [reason.code for reason in verdict.reasons]
    found = next((_REMEDIES[code] for code in codes if code in _REMEDIES), None)
    if found is None and problems and report.gpu_present:
        found = f"all-reduces would run on path {verdict.path}, but mend what the first problem names"
    if found is None:
        found = next(_FACTS[code] for code in (*codes, "full-nvlink") if code in _FACTS)
        found += "; allreduce-jit selftest checks every bit"
    return f"{found[0].upper()}{found[1:]}."


def estimates(verdict: VerdictReport, ranks: int) -> list[str]:
    """What the package's table of the path that would run was not measured for."""
    if verdict.tuning != "package":
        return []
    if verdict.path == Path.LEGACY.value and not verdict.full_nvlink:
        what = "from which sizes on calls are two-shot, and go to NCCL, is an estimate on PCIe"
    elif verdict.path == Path.HOST.value and ranks > 2:
        what = f"which algorithm runs which size is an estimate for {ranks} ranks, as it was measured for 2"
    else:
        return []
    return [f"{what}; allreduce-jit tune measures it here"]


def known() -> set[str]:
    """Codes of reasons that there is a sentence for."""
    return {*_REMEDIES, *_FACTS}
