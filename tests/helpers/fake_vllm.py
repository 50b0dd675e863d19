"""A vLLM without vLLM: modules with the names, signatures and habits of 0.33.0 that the plug-in holds on to.

``test_real_vllm`` compares ``SIGNATURES`` with the real package where that is installed.
"""

from __future__ import annotations

import importlib.metadata
import sys
import types
from contextlib import contextmanager

import torch
import torch.distributed as dist

# module:object -> its arguments, those with a default marked by "="; as vLLM 0.32.0 and 0.33.0 have them.
SIGNATURES = {
    "vllm.distributed.device_communicators.cuda_communicator:CudaCommunicator.__init__": (
        "self cpu_group device= device_group= unique_name= global_ranks= global_world_size= tcp_store_group= use_all2all="
    ),
    "vllm.distributed.device_communicators.cuda_communicator:CudaCommunicator.all_reduce": "self input_",
    "vllm.distributed.device_communicators.cuda_communicator:CudaCommunicator.destroy": "self",
    "vllm.distributed.parallel_state:GroupCoordinator.all_reduce": "self input_",
    "vllm.distributed.parallel_state:GroupCoordinator._all_reduce_out_place": "self input_",
    "vllm.distributed.parallel_state:GroupCoordinator.destroy": "self",
    "vllm.distributed.parallel_state:get_tp_group": "",
    "vllm.config:get_current_vllm_config_or_none": "",
    "vllm.plugins:load_general_plugins": "",
}


def arguments(function):
    """The form that ``SIGNATURES`` has."""
    import inspect

    found = inspect.signature(function).parameters.values()
    return " ".join(p.name + "=" * (p.default is not p.empty) for p in found)


class DeviceCommunicatorBase:
    """What is below every device communicator: sums in place, over the group."""

    def __init__(
        self,
        cpu_group,
        device=None,
        device_group=None,
        unique_name="",
        global_ranks=None,
        global_world_size=None,
        use_all2all=False,
    ):
        self.device = device or torch.device("cpu")
        self.cpu_group, self.device_group, self.unique_name = cpu_group, device_group, unique_name
        self.rank = self.rank_in_group = dist.get_rank(cpu_group)
        self.world_size = dist.get_world_size(cpu_group)

    def all_reduce(self, input_):
        dist.all_reduce(input_, group=self.device_group)
        return input_

    def destroy(self):
        pass


class CudaCommunicator(DeviceCommunicatorBase):
    """Sums into a new tensor, and counts."""

    def __init__(
        self,
        cpu_group,
        device=None,
        device_group=None,
        unique_name="",
        global_ranks=None,
        global_world_size=None,
        tcp_store_group=None,
        use_all2all=False,
    ):
        super().__init__(cpu_group, device, device_group, unique_name, global_ranks, global_world_size, use_all2all=use_all2all)
        self.calls, self.destroyed = 0, False

    def all_reduce(self, input_):
        self.calls += 1
        return super().all_reduce(input_.clone())

    def destroy(self):
        self.destroyed = True
        super().destroy()


class GroupCoordinator:
    """Builds what the platform names, with keywords, if there are two ranks or more."""

    def __init__(self, cpu_group, unique_name, platform, **more):
        self.cpu_group, self.unique_name = cpu_group, unique_name
        self.world_size, self.rank_in_group = dist.get_world_size(cpu_group), dist.get_rank(cpu_group)
        self.device_communicator = None
        if self.world_size > 1:
            module, _, name = platform.get_device_communicator_cls().rpartition(".")
            self.device_communicator = getattr(sys.modules[module], name)(
                cpu_group=cpu_group,
                device=torch.device("cpu"),
                device_group=cpu_group,
                unique_name=unique_name,
                use_all2all=False,
                **more,
            )

    def all_reduce(self, input_):
        return input_ if self.world_size == 1 else self._all_reduce_out_place(input_)

    def _all_reduce_out_place(self, input_):
        return self.device_communicator.all_reduce(input_)

    def destroy(self):
        if self.device_communicator is not None:
            self.device_communicator.destroy()


@contextmanager
def standing_in(modules):
    """These are what ``import`` finds, and nothing else of ``sys.modules`` is put back: compiled modules load once."""
    kept = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextmanager
def fake_vllm(cpu_group, version="0.33.0", communicator=CudaCommunicator, config=None, custom_all_reduce=True, more=None):
    """``import vllm`` finds this; yields what a worker does: load the plug-ins, make the groups.

    Args:
        cpu_group: of the ranks that are the tensor-parallel group.
        communicator: the class that the platform names.
        config: what ``get_current_vllm_config_or_none`` finds.
        more: arguments that the communicator is built with beside vLLM's usual ones.
    """
    home = "vllm.distributed.device_communicators.cuda_communicator"
    names = ["vllm", "vllm.platforms", "vllm.config", "vllm.plugins", "vllm.distributed", "vllm.distributed.parallel_state"]
    names += ["vllm.distributed.device_communicators", home]
    names += ["vllm.compilation", "vllm.compilation.passes", "vllm.compilation.passes.pass_manager"]
    modules = {name: types.ModuleType(name) for name in names}
    for name, module in modules.items():
        module.__path__ = []
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(modules[parent], child, module)
    vllm, state = modules["vllm"], modules["vllm.distributed.parallel_state"]
    vllm.__version__ = version
    modules[home].CudaCommunicator = communicator

    class CudaPlatformBase:
        @classmethod
        def get_device_communicator_cls(cls):
            return f"{home}.CudaCommunicator"

    class NvmlCudaPlatform(CudaPlatformBase):
        pass

    modules["vllm.platforms"].current_platform = NvmlCudaPlatform()
    modules["vllm.config"].get_current_vllm_config_or_none = lambda: config
    state._ENABLE_CUSTOM_ALL_REDUCE = custom_all_reduce
    state.GroupCoordinator = GroupCoordinator
    groups = {}

    def initialize_model_parallel(
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        prefill_context_model_parallel_size=1,
        decode_context_model_parallel_size=1,
        backend=None,
    ):
        platform = modules["vllm.platforms"].current_platform
        for name in ("tp:0", "pp:0"):
            groups[name] = GroupCoordinator(cpu_group, name, platform, **(more or {}))

    state.initialize_model_parallel = initialize_model_parallel
    state.get_tp_group = lambda: groups["tp:0"]

    def load_general_plugins():
        """As vLLM: what fails to load is logged, what a plug-in raises is not caught."""
        for point in importlib.metadata.entry_points(group="vllm.general_plugins"):
            if point.name == "allreduce_jit":
                point.load()()

    modules["vllm.plugins"].load_general_plugins = load_general_plugins

    def start():
        load_general_plugins()
        state.initialize_model_parallel(dist.get_world_size(cpu_group))
        return groups

    vllm.start = start
    with standing_in(modules):
        yield vllm
        for group in groups.values():
            group.destroy()
