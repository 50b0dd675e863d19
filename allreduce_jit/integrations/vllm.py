"""The plug-in for vLLM: its tensor-parallel group asks our kernels first. Nothing of vLLM is imported before ``register`` is called.

Read in vLLM 0.32.0 and 0.33.0: a ``GroupCoordinator`` resolves the class that ``current_platform.get_device_communicator_cls()`` names
and builds it with keyword arguments; its all-reduces, those of ``torch.ops.vllm.all_reduce`` included, are that object's
``all_reduce(input_)``; its ``destroy()`` comes before the process groups are gone. docs/engines.md.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from typing import Any

import torch

from ..errors import InputError, SetupError
from ..norms import norm_family
from ..paths import Path
from ..policy.operation import OpSpec
from . import vllm_fusion
from .engines import Group, line, log, speak_through, switch

ENGINE = "vLLM"
NAME = "AllReduceJit"  # and the name of the class that is extended
_MARK = "_allreduce_jit"  # of what was wrapped already
_OLDEST_WITH_E4M3 = (8, 9)


def register() -> None:
    """Entry point of ``vllm.general_plugins``: vLLM calls it once in every process, before any group exists.

    Raises:
        SettingsError: ``ALLREDUCE_JIT`` has a value that is none.
        SetupError: ``ALLREDUCE_JIT=require``, and this vLLM has not what the plug-in holds on to.
    """
    if switch() == "off":
        return
    speak_through("vllm")
    platforms = importlib.import_module("vllm.platforms")
    state = importlib.import_module("vllm.distributed.parallel_state")
    platform = type(getattr(platforms, "current_platform", None))
    problem = _moved(platform, state)
    if problem is not None:
        _refuse(problem)
        return
    _name_ours(platform)
    _look_afterwards(state)


def version() -> str:
    """That of vLLM, as it says."""
    return str(getattr(importlib.import_module("vllm"), "__version__", "of an unknown version"))


def class_over(base: type) -> type | str:
    """The subclass of a device communicator whose group asks us first, the same at every call; or why there can be none."""
    problem = _unlike_a_communicator(base)
    return problem if problem is not None else _class_over(base)


# -- installation


def _moved(platform: type, state: Any) -> str | None:
    """What this vLLM lacks of what is wrapped here."""
    name = "get_device_communicator_cls"
    if not callable(getattr(platform, name, None)):
        return f"{platform.__name__} has no {name}()"
    if _needed(getattr(platform, name)):
        return f"{platform.__name__}.{name} takes {inspect.signature(getattr(platform, name))}"
    for name in ("initialize_model_parallel", "get_tp_group"):
        if not callable(getattr(state, name, None)):
            return f"{state.__name__} has no {name}()"
    return None


def _name_ours(platform: type) -> None:
    """``get_device_communicator_cls`` names our subclass of the class that it named."""
    original = platform.get_device_communicator_cls  # type: ignore[attr-defined]
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def name(cls: type) -> str:
        theirs = original()
        found = class_over(_resolved(theirs))
        if isinstance(found, str):
            _refuse(found)
            return theirs
        return f"{found.__module__}.{found.__qualname__}"

    del name.__wrapped__  # it is bound, so the signature that it has is not this one's
    setattr(name, _MARK, True)
    platform.get_device_communicator_cls = classmethod(name)  # type: ignore[attr-defined]


def _look_afterwards(state: Any) -> None:
    """Once the groups exist, see what the tensor-parallel one holds: another plug-in may have had the last word."""
    original = state.initialize_model_parallel
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def initialize(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        group = state.get_tp_group()
        held = getattr(group, "device_communicator", None)
        if getattr(group, "world_size", 1) > 1 and not isinstance(held, Asks):
            _refuse(f"the tensor-parallel group holds a {type(held).__name__}, none of ours: another plug-in has replaced it")
        return found

    setattr(initialize, _MARK, True)
    state.initialize_model_parallel = initialize


def _resolved(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _needed(function: Any) -> list[str]:
    """Arguments without a default, but for ``self`` and those that take any number."""
    parameters = inspect.signature(function).parameters.values()
    return [
        p.name
        for p in parameters
        if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name != "self"
    ]


def _unlike_a_communicator(base: Any) -> str | None:
    """What of a device communicator's contract ``base`` does not keep."""
    if not isinstance(base, type):
        return f"the device communicator is a {type(base).__name__}, not a class"
    for name, arguments in (("all_reduce", 1), ("destroy", 0)):
        method = getattr(base, name, None)
        if not callable(method):
            return f"{base.__name__} has no {name}()"
        if len(_needed(method)) != arguments:
            return f"{base.__name__}.{name} takes {inspect.signature(method)}"
    parameters = inspect.signature(base.__init__).parameters
    missing = [name for name in ("cpu_group", "device", "unique_name") if name not in parameters]
    open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return f"{base.__name__} is built without {', '.join(missing)}" if missing and not open_ended else None


def _refuse(why: str, *, loud: bool = True) -> None:
    """Say why not; with ``ALLREDUCE_JIT=require`` an error."""
    text = f"allreduce_jit is not used in {ENGINE} {version()}: {why}"
    if switch() == "require":
        raise SetupError(f"{text}; change that, or set ALLREDUCE_JIT=1 to go on without it")
    if loud:
        log.warning("%s", text)


# -- the device communicator


class Asks:
    """What is put before a device communicator of vLLM. Groups that are not tensor-parallel are as without it."""

    _group: Group | None = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if str(self.unique_name).split(":")[0] == "tp":  # type: ignore[attr-defined]
            self._group = _join(self, kwargs)

    def all_reduce(self, input_: torch.Tensor) -> torch.Tensor:
        group = self._group
        if group is not None and group.takes(input_):
            return group.all_reduce(input_)
        return super().all_reduce(input_)  # type: ignore[misc]

    def destroy(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.close()
        super().destroy()  # type: ignore[misc]


@functools.cache
def _class_over(base: type) -> type:
    name = NAME + base.__name__
    made = type(
        name, (Asks, base), {"__module__": __name__, "__qualname__": name, "__doc__": f"``{base.__name__}`` behind our kernels."}
    )
    globals()[name] = made  # where vLLM looks it up by its name
    return made


def _join(held: Any, arguments: dict[str, Any]) -> Group | None:
    """The group's calls, or None where all of them stay with vLLM. Collective."""
    name, first = str(held.unique_name), held.rank_in_group == 0
    state = importlib.import_module("vllm.distributed.parallel_state")
    stateless = arguments.get("tcp_store_group") is not None or arguments.get("global_ranks") is not None
    why = None
    if held.world_size < 2:
        return None
    if not getattr(state, "_ENABLE_CUSTOM_ALL_REDUCE", True):
        why = "custom all-reduce is switched off (--disable-custom-all-reduce)"
    elif stateless:
        why = "the group is stateless, as elastic expert parallelism makes them, and torch.distributed knows nothing of it"
    if why is not None:
        _refuse(f"group {name}: {why}", loud=first)
        return None
    config = _config()
    theirs = functools.partial(_theirs, held)
    group = Group.over(name, held.cpu_group, held.device, theirs, _families(config, held.device))
    if group.comm.path is Path.TORCH:
        why = group.comm.reason
        group.close()
        _refuse(f"group {name}: {why}", loud=first)
        return None
    refusal = vllm_fusion.install(group, config, version())
    fuses = bool(getattr(_passes(config), "fuse_allreduce_rms", False))
    if first:
        ours = f"{group.comm.path.value} takes all-reduces first ({group.comm.reason})"
        fused = "ours in place of FlashInfer's" if refusal is None else f"not ours, as {refusal}"
        before = ["FlashInfer, in layers whose norm it fuses"] if fuses and refusal is not None else []
        log.info("%s", line(ENGINE, version(), name, ours, fused, before))
    return group


def _theirs(held: Any, x: torch.Tensor) -> torch.Tensor:
    return super(Asks, held).all_reduce(x)  # type: ignore[misc]


def _config() -> Any:
    """vLLM's configuration, where one is set while groups are built; workers do."""
    try:
        return pkgutil.resolve_name("vllm.config:get_current_vllm_config_or_none")()
    except (AttributeError, ImportError):  # another version's: then it goes without what the configuration would tell
        return None


def _passes(config: Any) -> Any:
    return getattr(getattr(config, "compilation_config", None), "pass_config", None)


def _families(config: Any, device: torch.device) -> list[OpSpec]:
    """Calls with a norm that the model will make, so that the first of them may be captured."""
    model = getattr(config, "model_config", None)
    if model is None or not getattr(_passes(config), "fuse_allreduce_rms", False):
        return []
    quants = ["none"]
    e4m3 = device.type != "cuda" or torch.cuda.get_device_capability(device) >= _OLDEST_WITH_E4M3
    if getattr(model, "quantization", None) is not None and e4m3:
        quants.append("static")
    try:
        hidden = model.get_hidden_size()
        return [norm_family(model.dtype, hidden, quant=q, residual=residual) for q in quants for residual in (True, False)]
    except InputError as e:  # a model of another hidden size or dtype: its layers are not fused
        log.debug("no kernels with a norm: %s", e)
        return []
