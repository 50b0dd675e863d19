"""Other all-reduces that ``bench`` measures beside ours; none of them may use NVLink multicast."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..engine import reference
from ..harness.place import NO_MULTICAST, Place
from ..torch_private import backend_of, symmetric_memory

_T = TypeVar("_T")
_TRIAL_NUMEL = 1 << 14


class Unavailable(Exception):
    """This machine or this torch does not have the competitor, or it does not do this size."""


class Competitor:
    """One competitor.

    Attributes:
        name: as in ``--peers`` and in the table.
        modules: what has to be importable, on every rank, before any rank builds it.
        buffers: byte tensors, as many as inputs are wanted at once, in memory of its choice.
    """

    name = ""
    modules: tuple[str, ...] = ()

    def __init__(self, place: Place, count: int, nbytes: int):
        if place.device.type != "cuda":
            raise Unavailable("needs CUDA tensors")
        self.place = place
        self.buffers = self.allocate(count, nbytes)

    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        return [torch.empty(nbytes, dtype=torch.uint8, device=self.place.device) for _ in range(count)]

    def tensors(self, numel: int, dtype: torch.dtype) -> list[torch.Tensor]:
        """The first ``numel`` elements of every buffer."""
        return [buffer[: numel * dtype.itemsize].view(dtype) for buffer in self.buffers]

    def call(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum one of ``tensors``; returns where the sum is, which may be in place."""
        raise NotImplementedError

    def capture(self) -> AbstractContextManager[Any]:
        """Stands round the capture of a graph with calls."""
        return nullcontext()

    def close(self) -> None:
        self.buffers = []


class Nccl(Competitor):
    """``torch.distributed.all_reduce``."""

    name = "nccl"

    def __init__(self, place: Place, count: int, nbytes: int):
        if not dist.is_nccl_available():
            raise Unavailable("this torch has no NCCL")
        super().__init__(place, count, nbytes)

    def call(self, tensor: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(tensor)
        return tensor


class NcclSymmetric(Nccl):
    """The same, on buffers registered as a symmetric window."""

    name = "nccl_symm"

    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        # Registration needs a communicator, and NCCL makes it at the first collective.
        dist.all_reduce(torch.ones(1, device=self.place.device))
        self.backend = backend_of(_everyone(), self.place.device)
        if not hasattr(self.backend, "register_mem_pool"):
            raise Unavailable("this torch cannot register memory pools with NCCL")
        self.pool = torch.cuda.MemPool(self.backend.mem_allocator)
        with torch.cuda.use_mem_pool(self.pool):
            buffers = super().allocate(count, nbytes)
        # After the allocations: later ones would not become part of the window in every version.
        self.backend.register_mem_pool(self.pool, symm=True)
        return buffers

    def close(self) -> None:
        self.backend.deregister_mem_pool(self.pool)
        super().close()


class TorchOneShot(Competitor):
    """torch's symmetric memory, every rank reads all inputs."""

    name = "torch_one_shot"

    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        symmetric = symmetric_memory()
        if symmetric is None:
            raise Unavailable("this torch has no symmetric memory")
        self.group_name = _everyone().group_name
        buffers = [symmetric.empty(nbytes, dtype=torch.uint8, device=self.place.device) for _ in range(count)]
        for buffer in buffers:
            symmetric.rendezvous(buffer, self.group_name)
        return buffers

    def call(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.ops.symm_mem.one_shot_all_reduce(tensor, "sum", self.group_name)


class TorchTwoShot(TorchOneShot):
    """torch's symmetric memory, every rank reduces a part and writes it to all."""

    name = "torch_two_shot"

    def call(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.ops.symm_mem.two_shot_all_reduce_(tensor, "sum", self.group_name)


class Sglang(Competitor):
    """SGLang's ``CustomAllReduceV2``, which compiles its kernels at the first use; its own choice of algorithm.

    Its multicast follows torch's symmetric memory, where ``NO_MULTICAST`` switches it off.
    """

    name = "sglang"
    modules = ("sglang.srt.distributed.device_communicators.custom_all_reduce_v2",)
    LARGEST = 64 << 20  # of its buffers; by default they hold 16 MB

    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        kind = importlib.import_module(self.modules[0]).CustomAllReduceV2
        limit = "max_size" if "max_size" in inspect.signature(kind).parameters else "max_pull_size"  # by version
        self.reduce = kind(self.place.control, self.place.device, **{limit: min(nbytes, self.LARGEST)})
        if self.reduce.disabled:
            raise Unavailable("SGLang refuses this machine")
        if getattr(self.reduce, "has_multicast", False):
            raise Unavailable("it would use NVLink multicast")
        return super().allocate(count, nbytes)

    def call(self, tensor: torch.Tensor) -> torch.Tensor:
        if not self.reduce.should_custom_ar(tensor):
            raise Unavailable("SGLang leaves this size to NCCL")
        return self.reduce.custom_all_reduce(tensor)

    def capture(self) -> AbstractContextManager[Any]:
        return self.reduce.capture()

    def close(self) -> None:
        self.reduce.close()
        super().close()


class FlashInfer(Competitor):
    """FlashInfer's TensorRT-LLM all-reduce over peer memory; one-shot or two-shot, as it chooses.

    Its MNNVL form is left out: it stands on NVLink multicast.
    """

    name = "flashinfer"
    modules = ("flashinfer.comm",)
    LARGEST = 16 << 20  # each rank's workspace is three times as large, times the world size
    HIDDEN = 4096

    def allocate(self, count: int, nbytes: int) -> list[torch.Tensor]:
        n = self.place.world_size
        if n not in (2, 4, 8):
            raise Unavailable("FlashInfer sums over 2, 4 or 8 ranks")
        self.comm = importlib.import_module(self.modules[0])
        self.largest = min(nbytes, self.LARGEST)
        # Without use_symm_dev_mem the memory is torch's symmetric one, or CUDA IPC in older versions.
        create = self._plain("trtllm_create_ipc_workspace_for_all_reduce_fusion")
        tokens = max(1, -(-self.largest // (2 * self.HIDDEN)))
        self.handles, self.workspace = create(
            tp_rank=self.place.rank, tp_size=n, max_token_num=tokens, hidden_dim=self.HIDDEN, group=dist.group.WORLD
        )
        self.fusion = self._plain("trtllm_allreduce_fusion")
        unused = ("residual_in", "residual_out", "norm_out", "quant_out", "scale_out")
        unused += ("rms_gamma", "rms_eps", "scale_factor", "layout_code")
        self.fixed = dict.fromkeys(unused) | {
            "world_size": n,
            "world_rank": self.place.rank,
            "workspace_ptrs": self.workspace,
            "launch_with_pdl": True,
            "trigger_completion_at_end": False,  # the next kernel waits for this one by itself
            "fp32_acc": True,
            "use_oneshot": None,
            "pattern_code": self.comm.AllReduceFusionPattern.kAllReduce,
        }
        return super().allocate(count, nbytes)

    def _plain(self, name: str) -> Callable[..., Any]:
        """The function without the decorator that says it is deprecated, which costs time in every call."""
        function = getattr(self.comm, name)
        return getattr(function, "__wrapped__", function)

    def call(self, tensor: torch.Tensor) -> torch.Tensor:
        # The workspace is set up for 2-byte elements; one that is too small, or of another kind, would hang.
        if tensor.element_size() != 2 or tensor.nbytes > self.largest or tensor.numel() % 8:
            raise Unavailable(f"set up for whole 16-byte packets of fp16 or bf16 up to {self.LARGEST >> 20} MB")
        hidden = min(self.HIDDEN, tensor.numel() & -tensor.numel())
        out = torch.empty_like(tensor)
        tokens = tensor.numel() // hidden
        self.fusion(allreduce_in=tensor, allreduce_out=out, token_num=tokens, hidden_dim=hidden, **self.fixed)
        return out

    def close(self) -> None:
        destroy = getattr(self.comm, "trtllm_destroy_ipc_workspace_for_all_reduce_fusion", None)
        if destroy is not None:
            destroy(self.handles, dist.group.WORLD)
        super().close()


_KINDS = (Nccl, NcclSymmetric, TorchOneShot, TorchTwoShot, Sglang, FlashInfer)
COMPETITORS: dict[str, type[Competitor]] = {kind.name: kind for kind in _KINDS}


def _everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None  # harness.place has made it
    return group


def agreed(place: Place, step: Callable[[], _T]) -> tuple[_T | None, str | None]:
    """Run ``step`` on every rank: (its value, None) if all ranks could, else (None, why the first could not)."""
    value, trouble = None, None
    try:
        value = step()
    except Unavailable as reason:
        trouble = str(reason)
    except Exception as error:  # noqa: BLE001 - a competitor's failure is a cell in our table
        trouble = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    for rank, text in enumerate(place.gather(trouble)):
        if text is not None:
            return None, f"rank {rank}: {text}"
    return value, None


def open_competitors(
    place: Place, names: list[str], count: int, nbytes: int, kinds: Mapping[str, type[Competitor]] | None = None
) -> tuple[list[Competitor], dict[str, str]]:
    """Those of ``names`` that every rank has and that sum right, and why the others are missing; ``kinds``: what the names mean."""
    known = COMPETITORS if kinds is None else kinds
    ready: list[Competitor] = []
    missing: dict[str, str] = {}
    for name in names:
        competitor = None
        _, trouble = agreed(place, partial(_require, known[name]))
        if trouble is None:
            competitor, trouble = agreed(place, partial(known[name], place, count, max(nbytes, _TRIAL_NUMEL * 4)))
        if competitor is not None:
            _, trouble = agreed(place, partial(_trial, competitor))
        if trouble is not None:
            missing[name] = trouble
        elif competitor is not None:
            ready.append(competitor)
    return ready, missing


def _require(kind: type[Competitor]) -> None:
    """Import what it needs, before it begins to talk to the other ranks."""
    for name in kind.modules:
        package = name.split(".")[0]
        if importlib.util.find_spec(package) is None:
            raise Unavailable(f"{package} is not installed")
        importlib.import_module(name)
    os.environ.update(NO_MULTICAST)  # whatever the import has set


def _trial(competitor: Competitor) -> None:
    """One small sum that is exact in any order: one that is called wrongly must not look fast."""
    place, dtype = competitor.place, torch.bfloat16
    what: dict[str, Any] = {"kind": reference.INTEGERS}
    tensor = competitor.tensors(_TRIAL_NUMEL, dtype)[0]
    mine = reference.values(0, place.rank, _TRIAL_NUMEL, dtype, place.device, world_size=place.world_size, **what)
    want = reference.expected(0, place.world_size, _TRIAL_NUMEL, dtype, place.device, **what)
    tensor.copy_(mine)
    wrong = reference.compare(competitor.call(tensor), want).wrong
    if wrong:
        raise Unavailable(f"wrong sums in a trial call ({wrong} of {_TRIAL_NUMEL} elements)")


def require_right_sums(result: torch.Tensor, want: torch.Tensor, world_size: int) -> None:
    """Refuse sums that rounding does not explain: a competitor may add in its own order, but a wrong call must not look fast."""
    allowed = 16 * world_size * torch.finfo(want.dtype).eps  # the addends are below 4
    off = float((result.reshape(-1).float() - want.float()).abs().max())
    if not off <= allowed:
        raise Unavailable(f"wrong sums: off by up to {off:.3g}, and rounding explains {allowed:.3g}")
