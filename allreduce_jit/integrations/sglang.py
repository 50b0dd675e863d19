"""The classes and functions that SGLang's ``custom_all_reduce`` callers use, over the same ladder.

Names and contract follow sgl-project/sglang PRs #24363, #24729, #24742 and #25650.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Collection, Iterator

import torch
import torch.distributed as dist

from ..communicator import Communicator
from ..inputs import as_device
from ..paths import Path
from ..policy.tables import NVLINK_TABLES, two_shot_above
from ..setup.exchange import require_cpu_group
from ..setup.ladder import survey, v2_is_on

log = logging.getLogger("allreduce_jit")

# World size -> bytes from which two-shot runs; filled by _maybe_init_config, keys are the supported world sizes.
THRESHOLD_2_SHOT_MAP: dict[int, int] = {}
_config_lock = threading.Lock()

UNLIMITED = 1 << 62


def _maybe_init_config() -> None:
    """Fill ``THRESHOLD_2_SHOT_MAP``, once and completely: nobody sees a part of it."""
    with _config_lock:
        if not THRESHOLD_2_SHOT_MAP:
            THRESHOLD_2_SHOT_MAP.update({n: two_shot_above(bands) for n, bands in NVLINK_TABLES.items()})


def can_use_custom_all_reduce_with_nvlink(
    group: dist.ProcessGroup, device: torch.device | str | int, supported_world_size: Collection[int], cls_name: str
) -> bool | None:
    """Whether kernels can run for ``group``, and on full NVLink. Collective.

    Args:
        group: a CPU-capable group (gloo), not an NCCL group.
        device: this rank's device.
        supported_world_size: world sizes that the caller has kernels for.
        cls_name: who asks, for the log.

    Returns:
        None: impossible (the log says why); False: possible, but not all pairs have NVLink; True: full NVLink.

    Raises:
        InputError: ``group`` is an NCCL group.
    """
    require_cpu_group(group)
    if dist.get_world_size(group) not in supported_world_size:
        log.info("%s: world size %d is not among %s", cls_name, dist.get_world_size(group), sorted(supported_world_size))
        return None
    verdict = survey(group, as_device(device), use_v2=True).verdict
    if verdict.path not in (Path.V2, Path.LEGACY):  # SGLang asks for what goes from GPU to GPU
        log.info("%s is not possible: %s", cls_name, "; ".join(r.text for r in verdict.reasons))
        return None
    return bool(verdict.full_nvlink)


def can_use_custom_all_reduce_v2(group: dist.ProcessGroup, device: torch.device | str | int) -> bool:
    """Whether ``CustomAllReduceV2`` can run for ``group``, whatever the environment's switch says. Collective."""
    _maybe_init_config()
    require_cpu_group(group)
    if dist.get_world_size(group) not in THRESHOLD_2_SHOT_MAP:
        return False
    return survey(group, as_device(device), use_v2=True).verdict.path is Path.V2


def dispatch_custom_allreduce(group: dist.ProcessGroup, device: torch.device | str | int) -> type:
    """The all-reduce class for ``group``: ``CustomAllReduceV2`` where it can run, else ``CustomAllreduce``. Collective.

    The switch ``SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2`` (default on) turns V2 off. It is forced off for jobs that
    span machines: call ``apply_multi_node_policy(nnodes)`` after all other handling of the environment.
    On ROCm: AITER's class if ``aiter`` is importable, else ``CustomAllreduce``.

    Raises:
        SettingsError: on every rank, when the environment of any rank is wrong.
        InputError: ``group`` is an NCCL group.
    """
    if torch.version.hip is not None:
        try:
            from aiter.dist.device_communicators.custom_all_reduce import CustomAllreduce as AiterCustomAllreduce
        except ImportError as e:
            log.debug("[AR] no AITER: %s", e)
            return CustomAllreduce
        return AiterCustomAllreduce
    if v2_is_on(group) and can_use_custom_all_reduce_v2(group, device):
        log.debug("[AR] Using CustomAllReduceV2 (JIT-compiled)")
        return CustomAllReduceV2
    return CustomAllreduce


class _CustomAllReduce:
    """What all three classes share. Construction is collective and never raises for "not possible here".

    Args:
        group: a CPU-capable group (gloo), not an NCCL group.
        device: this rank's device.
        max_size: bytes up to which ``should_custom_ar`` says yes; None = wherever the plan has a kernel.

    Attributes:
        disabled: no kernel can run here; the log says why, once. All methods still work.
    """

    # Of the table of backends; None: any.
    _rung: Path | None

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device | str | int,
        max_size: int | None = None,
        max_ctas: int | None = None,
    ):
        require_cpu_group(group)
        self.group = group
        self.device = as_device(device)
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self.max_size = UNLIMITED if max_size is None else int(max_size)
        self._comm = Communicator(
            group, self.device, highest=self._rung, lowest=self._rung, create_groups=False, max_ctas=max_ctas
        )
        self.disabled = self._comm.path is Path.TORCH
        if self.disabled and self.rank == 0:
            log.warning("%s is disabled: %s", type(self).__name__, self.reason)

    @property
    def reason(self) -> str:
        """Why this object's path is what it is."""
        return self._comm.reason

    @property
    def communicator(self) -> Communicator:
        """What runs the calls."""
        return self._comm

    def should_custom_ar(self, tensor: torch.Tensor) -> bool:
        """Whether a kernel of this class should take ``tensor``: cheap, the same on all ranks for a shape and dtype."""
        if self.disabled or tensor.device != self.device:
            return False
        numel = tensor.numel()
        return numel * tensor.element_size() <= self.max_size and self._comm.takes(max(numel, 1), tensor.dtype)

    def custom_all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks in a new tensor. Works when disabled, through ``group``."""
        return self._comm.all_reduce(tensor)

    @contextlib.contextmanager
    def capture(self) -> Iterator[None]:
        """Round graph captures; may be nested, works when disabled or closed, and exchanges nothing."""
        yield

    def close(self) -> None:
        """Release everything; idempotent, also after the process group is gone."""
        self.disabled = True
        self.group = None  # see Communicator.close
        self._comm.close()


class CustomAllReduceV2(_CustomAllReduce):
    """Drop-in for SGLang's class of this name, whose arguments it takes; see ``_CustomAllReduce`` for the contract.

    Of upstream's surface (0.5.23) it has what its callers of plain all-reduces use: the constructor, ``disabled``, ``group``, ``device``,
    ``rank``, ``world_size``, ``max_size``, ``max_pull_size``, ``max_push_size``, ``pull_enabled``, ``should_custom_ar``,
    ``custom_all_reduce``, ``capture``, ``close``. It has none of what other kernels of SGLang reach into: ``obj``, ``config``,
    ``override_algo``, ``supports_push``, ``reserve_push_capacity``, ``uses_one_shot_push``, ``uses_two_shot_push``,
    ``uncap_pull_thresholds``, and what registers the inputs of graphs, as nothing has to be.

    Args:
        group, device: as of ``_CustomAllReduce``.
        max_size: bytes up to which it takes calls; None: wherever the plan has a kernel (upstream: 16 MB).
        max_pull_size, max_push_size: the same for calls that upstream pulls or pushes; None: ``max_size``. All of ours push, so the
            larger of both counts; it is a bound on calls, not a size of memory (that is ``ALLREDUCE_JIT_STAGING_MB``).
        max_pull_blocks: 0, as ``max_pull_size=0``, is upstream's push-only instance: ``max_push_size`` alone counts. Other values have no
            effect, as no kernel pulls.
        max_push_blocks: thread blocks that move data; one more watches.
    """

    _rung = Path.V2

    def __init__(
        self,
        group: dist.ProcessGroup,
        device: torch.device | str | int,
        max_size: int | None = None,
        *,
        max_pull_size: int | None = None,
        max_push_size: int | None = None,
        max_pull_blocks: int | None = None,
        max_push_blocks: int | None = None,
    ):
        _maybe_init_config()
        either = UNLIMITED if max_size is None else int(max_size)
        self.pull_enabled = max_pull_blocks != 0 and max_pull_size != 0
        self.max_push_size = either if max_push_size is None else int(max_push_size)
        self.max_pull_size = 0 if not self.pull_enabled else either if max_pull_size is None else int(max_pull_size)
        largest = max(self.max_pull_size, self.max_push_size)
        super().__init__(group, device, largest, None if max_push_blocks is None else max(int(max_push_blocks), 1) + 1)


class CustomAllreduce(_CustomAllReduce):
    """Legacy drop-in: Triton kernels over any peer-to-peer memory; see ``_CustomAllReduce`` for the contract."""

    _rung = Path.LEGACY

    def __init__(self, group: dist.ProcessGroup, device: torch.device | str | int, max_size: int | None = None):
        super().__init__(group, device, max_size)


class AllReduceJit(_CustomAllReduce):
    """What the plug-in puts into SGLang's groups: the best rung there is. SGLang takes whatever is named or derived like its own
    ``CustomAllReduceV2`` for that class, and reaches into it; this is neither."""

    _rung = None

    def __init__(self, group: dist.ProcessGroup, device: torch.device | str | int):
        super().__init__(group, device)

    def should_custom_ar(self, tensor: torch.Tensor) -> bool:
        """As above, of contiguous tensors: in traced graphs results have the strides of what was summed."""
        return tensor.is_contiguous() and super().should_custom_ar(tensor)
