"""An SGLang without SGLang: modules with the names, signatures and habits of 0.5.23 that the plug-in holds on to.

``test_real_sglang`` compares ``SIGNATURES`` with the real package where that is installed.
"""

from __future__ import annotations

import enum
import functools
import importlib.metadata
import logging
import pkgutil
import types
from collections import defaultdict
from contextlib import contextmanager
from types import SimpleNamespace

import torch
import torch.distributed as dist

from .fake_vllm import standing_in

log = logging.getLogger("sglang.fake")

# As in ``fake_vllm``; of SGLang 0.5.23.
SIGNATURES = {
    "sglang.srt.plugins.hook_registry:HookRegistry.register": "target hook hook_type= source=",
    "sglang.srt.plugins.hook_registry:HookRegistry.apply_hooks": "",
    "sglang.srt.plugins:load_plugins": "",
    "sglang.srt.distributed.device_communicators.custom_all_reduce:dispatch_custom_allreduce": "group device",
    "sglang.srt.distributed.device_communicators.custom_all_reduce_v2:CustomAllReduceV2.__init__": (
        "self group device max_size= max_pull_size= max_push_size= max_pull_blocks= max_push_blocks="
    ),
    "sglang.srt.distributed.parallel_state:GroupCoordinator._can_use_flashinfer_allreduce": "self input_",
    "sglang.srt.distributed.parallel_state:GroupCoordinator._resolve_outplace_all_reduce_method": (
        "self input_ should_use_pymscclpp_allreduce="
    ),
    "sglang.srt.distributed.parallel_state:GroupCoordinator.all_reduce": "self input_",
    "sglang.srt.layers.flashinfer_comm_fusion:resolve_fusion_group": "use_attn_tp_group",
    "sglang.srt.layers.flashinfer_comm_fusion:flashinfer_allreduce_residual_rmsnorm": (
        "input_tensor residual weight eps= max_token_num= use_oneshot= trigger_completion_at_end= fp32_acc= use_attn_tp_group="
    ),
}


class HookType(enum.Enum):
    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"
    REPLACE = "replace"


def registry():
    """A registry of its own, as each process has one: an exception of a target is logged and the others are hooked."""

    class HookRegistry:
        _hooks = defaultdict(list)
        _patched = set()

        @classmethod
        def register(cls, target, hook, hook_type=HookType.AFTER, *, source=None):
            cls._hooks[target].append((hook_type, hook, source))

        @classmethod
        def apply_hooks(cls):
            for target, hooks in sorted(cls._hooks.items()):
                if target in cls._patched:
                    continue
                try:
                    owner, _, name = target.rpartition(".")
                    where = pkgutil.resolve_name(owner)
                    wrapped = getattr(where, name)
                    for kind, hook, _ in hooks:
                        wrapped = wrap(wrapped, hook, kind)
                    setattr(where, name, wrapped)
                    cls._patched.add(target)
                except Exception:
                    log.exception("Failed to apply hooks to %s", target)

    return HookRegistry


def wrap(original, hook, kind):
    @functools.wraps(original)
    def wrapper(*args, **kwargs):
        if kind is HookType.AROUND:
            return hook(original, *args, **kwargs)
        assert kind is HookType.AFTER
        result = original(*args, **kwargs)
        modified = hook(result, *args, **kwargs)
        return result if modified is None else modified

    return wrapper


class Upstream:
    """SGLang's own class: sums, and takes whatever is contiguous."""

    def __init__(
        self,
        group,
        device,
        max_size=1 << 24,
        *,
        max_pull_size=None,
        max_push_size=None,
        max_pull_blocks=None,
        max_push_blocks=None,
    ):
        self.group, self.device, self.disabled, self.calls = group, device, False, 0

    def should_custom_ar(self, inp):
        return not self.disabled and inp.is_contiguous()

    def custom_all_reduce(self, input):
        self.calls += 1
        out = input.clone()
        dist.all_reduce(out, group=self.group)
        return out


class GroupCoordinator:
    """The part of ``__init__`` that builds ``ca_comm``, and the choice of a method; FlashInfer comes first where it can."""

    def __init__(self, cpu_group, group_name="tp", use_custom_allreduce=True, arguments=("group", "device"), mscclpp=None):
        from sglang.srt.distributed.device_communicators.custom_all_reduce import dispatch_custom_allreduce

        self.unique_name, self.cpu_group, self.device = f"{group_name}:0", cpu_group, torch.device("cpu")
        self.world_size, self.rank_in_group = dist.get_world_size(cpu_group), dist.get_rank(cpu_group)
        self.use_custom_allreduce, self.pymscclpp_comm, self.ca_comm = use_custom_allreduce, mscclpp, None
        self.flashinfer = 0
        if use_custom_allreduce and self.world_size > 1:
            try:
                given = {"group": self.cpu_group, "device": self.device}
                made = dispatch_custom_allreduce(**{name: given[name] for name in arguments})
                self.ca_comm = made(group=self.cpu_group, device=self.device)
            except Exception as e:
                log.warning("Setup Custom allreduce failed with %s", e)

    def _can_use_flashinfer_allreduce(self, input_):
        return input_.dtype is torch.bfloat16

    def _resolve_outplace_all_reduce_method(self, input_, should_use_pymscclpp_allreduce=None):
        return "ca" if self.ca_comm is not None and not self.ca_comm.disabled and self.ca_comm.should_custom_ar(input_) else None

    def all_reduce(self, input_):
        if self.world_size == 1:
            return input_
        if self._can_use_flashinfer_allreduce(input_):
            self.flashinfer += 1
        elif self._resolve_outplace_all_reduce_method(input_) == "ca":
            return self.ca_comm.custom_all_reduce(input_)
        dist.all_reduce(input_, group=self.cpu_group)
        return input_


@contextmanager
def fake_sglang(version="0.5.23", nnodes=1, upstream="CustomAllReduceV2", change=lambda modules: None):
    """``import sglang`` finds this; yields its modules by name.

    Args:
        upstream: the name of the class that SGLang would choose.
        change: applied to the modules, to make them those of another version.
    """
    names = [
        "sglang",
        "sglang.srt",
        "sglang.srt.plugins",
        "sglang.srt.plugins.hook_registry",
        "sglang.srt.runtime_context",
        "sglang.srt.distributed",
        "sglang.srt.distributed.parallel_state",
        "sglang.srt.distributed.device_communicators",
        "sglang.srt.distributed.device_communicators.custom_all_reduce",
        "sglang.srt.distributed.device_communicators.custom_all_reduce_v2",
        "sglang.srt.layers",
        "sglang.srt.layers.flashinfer_comm_fusion",
    ]
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    made = type(upstream, (Upstream,), {})
    modules["sglang"].__version__ = version
    hooks = modules["sglang.srt.plugins.hook_registry"]
    hooks.HookRegistry, hooks.HookType = registry(), HookType
    modules["sglang.srt.runtime_context"].get_parallel = lambda: SimpleNamespace(nnodes=nnodes)
    modules["sglang.srt.distributed.parallel_state"].GroupCoordinator = type(
        "GroupCoordinator", (GroupCoordinator,), dict(vars(GroupCoordinator))
    )
    modules["sglang.srt.distributed.device_communicators.custom_all_reduce_v2"].CustomAllReduceV2 = made

    def dispatch_custom_allreduce(group, device):
        return made

    modules["sglang.srt.distributed.device_communicators.custom_all_reduce"].dispatch_custom_allreduce = dispatch_custom_allreduce
    fusion = modules["sglang.srt.layers.flashinfer_comm_fusion"]
    fusion.groups, fusion.calls = {}, 0

    def resolve_fusion_group(*, use_attn_tp_group):
        group = fusion.groups[use_attn_tp_group]
        return group.world_size, group.rank_in_group, group

    def flashinfer_allreduce_residual_rmsnorm(
        input_tensor,
        residual,
        weight,
        eps=1e-6,
        max_token_num=2048,
        use_oneshot=None,
        trigger_completion_at_end=False,
        fp32_acc=True,
        use_attn_tp_group=True,
    ):
        fusion.calls += 1
        return None, None

    fusion.resolve_fusion_group = resolve_fusion_group
    fusion.flashinfer_allreduce_residual_rmsnorm = flashinfer_allreduce_residual_rmsnorm

    def load_plugins():
        """As SGLang: every exception of a plug-in is logged, then the hooks are applied."""
        for point in importlib.metadata.entry_points(group="sglang.srt.plugins"):
            try:
                point.load()()
            except Exception:
                log.exception("Failed to execute general plugin: %s", point.name)
        if hasattr(hooks.HookRegistry, "apply_hooks"):
            hooks.HookRegistry.apply_hooks()

    modules["sglang.srt.plugins"].load_plugins = load_plugins
    change(modules)
    with standing_in(modules):
        yield modules
