"""The plug-in for SGLang: its groups hold our all-reduce where one can run. Nothing of SGLang is imported before ``register`` is called.

Read in SGLang 0.5.23 (0.5.18 and 0.5.12 for what differs): ``GroupCoordinator.__init__`` calls ``dispatch_custom_allreduce(group=, device=)``,
without arguments in 0.5.12, and what that returns with ``group=`` and ``device=``; the result is its ``ca_comm``. An ``Exception`` there is
logged and swallowed, as are those of plug-ins and hooks, but no ``SystemExit``. docs/engines.md.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import pkgutil
import weakref
from collections.abc import Callable
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from ..errors import SettingsError
from ..settings import V2_SWITCH
from .engines import Group, line, switch
from .present import SGLANG_FUSION as FUSION
from .present import SGLANG_GROUP
from .sglang import AllReduceJit

ENGINE = "SGLang"
DISPATCH = "sglang.srt.distributed.device_communicators.custom_all_reduce.dispatch_custom_allreduce"
COORDINATOR = "sglang.srt.distributed.parallel_state.GroupCoordinator"
NORM = "flashinfer_allreduce_residual_rmsnorm"
NORM_TAKES = ("input_tensor", "residual", "weight", "eps")  # in this order, and use_attn_tp_group by any place

log = logging.getLogger("allreduce_jit")

# Of each CPU group that asked for an all-reduce: why it got none of ours, and the name of the class that SGLang would have built.
_asked: weakref.WeakKeyDictionary[Any, tuple[str | None, str]] = weakref.WeakKeyDictionary()
_groups: weakref.WeakKeyDictionary[AllReduceJit, Group] = weakref.WeakKeyDictionary()


def register() -> None:
    """Entry point of ``sglang.srt.plugins``: SGLang calls it once in every process, before any group exists.

    Raises:
        SystemExit: ``ALLREDUCE_JIT`` has a value that is none; or it is ``require``, and this SGLang has not what the plug-in holds on to.
    """
    try:
        if switch() == "off":
            return
    except SettingsError as e:
        _stop(str(e))
    problem = _moved()
    if problem is not None:
        _refuse(problem)
        return
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    hooks.HookRegistry.register(DISPATCH, dispatched, hooks.HookType.AROUND)
    hooks.HookRegistry.register(f"{COORDINATOR}.__init__", look_at, hooks.HookType.AFTER)
    if hasattr(pkgutil.resolve_name(COORDINATOR), "_can_use_flashinfer_allreduce"):
        hooks.HookRegistry.register(f"{COORDINATOR}._can_use_flashinfer_allreduce", flashinfer_first, hooks.HookType.AROUND)


def version() -> str:
    """That of SGLang, as it says."""
    return str(getattr(importlib.import_module("sglang"), "__version__", "of an unknown version"))


# -- hooks


def dispatched(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
    """AROUND ``dispatch_custom_allreduce``, whatever its arguments: what builds ours, and SGLang's where ours cannot run."""
    return functools.partial(build, original(*args, **kwargs))


def build(
    theirs: Callable[..., Any], group: dist.ProcessGroup, device: torch.device | str | int, *args: Any, **kwargs: Any
) -> Any:
    """Our all-reduce for ``group``, or what ``theirs`` builds with the same arguments. Collective."""
    name = getattr(theirs, "__name__", type(theirs).__name__)
    nnodes = _nodes()
    if nnodes > 1:
        # SGLang's own multi-node policy is left as it is, so its switch stays what the user made it.
        log.warning("Disabling %s because nnodes=%d (custom all-reduce v2 is intra-node only).", V2_SWITCH, nnodes)
        why = f"nnodes={nnodes}, and it is for the GPUs of one host"
    else:
        ours = AllReduceJit(group, device)
        if not ours.disabled:
            _asked[group] = None, name
            return ours
        why = ours.reason
        ours.close()
    if switch() == "require":
        _refuse(why)
    _asked[group] = why, name
    return theirs(group, device, *args, **kwargs) if args else theirs(group=group, device=device, **kwargs)


def look_at(result: None, coordinator: Any, *args: Any, **kwargs: Any) -> None:
    """AFTER ``GroupCoordinator.__init__``: what the group holds, as errors on the way there are swallowed."""
    if not getattr(coordinator, "use_custom_allreduce", False) or coordinator.world_size < 2:
        return
    held, name = getattr(coordinator, "ca_comm", None), getattr(coordinator, "unique_name", "of no name")
    first = coordinator.rank_in_group == 0
    why, theirs = _asked.pop(coordinator.cpu_group, (None, ""))
    if not isinstance(held, AllReduceJit):
        if why is None:
            what = "nothing" if held is None else f"a {type(held).__name__}"
            why = (
                f"it holds {what}: SGLang has not asked for it, another plug-in came between, or building it failed (see the log)"
            )
        _refuse(f"group {name}: {why}", loud=first)
        return
    _groups[held] = Group(name, held.communicator, functools.partial(_theirs, weakref.ref(coordinator)))
    fused = _fuse()
    if first:
        before = ["MSCCL++, for sizes that it takes"] if getattr(coordinator, "pymscclpp_comm", None) is not None else []
        if fused is not None:
            before.append("FlashInfer, in layers whose norm it fuses")
        text = line(
            ENGINE, version(), name, f"{held.communicator.path.value} ({held.reason})", fused or "ours, from V2's sizes", before
        )
        if theirs == "CustomAllReduceV2":
            text += "; fusions of SGLang that need its own CustomAllReduceV2 are off"
        log.info("%s", text)


def flashinfer_first(original: Callable[..., bool], coordinator: Any, input_: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
    """AROUND ``GroupCoordinator._can_use_flashinfer_allreduce``: not where ours takes the tensor."""
    held = getattr(coordinator, "ca_comm", None)
    if isinstance(held, AllReduceJit) and not held.disabled:
        # While a graph is traced sizes are symbols: the method is then found when it runs, and ours is asked there.
        if torch.compiler.is_compiling() or held.should_custom_ar(input_):
            return False
    return original(coordinator, input_, *args, **kwargs)


def normed(
    original: Callable[..., Any],
    input_tensor: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """AROUND ``flashinfer_allreduce_residual_rmsnorm``: one kernel of ours where it has one for these rows."""
    # Traced, it stays the operator that it is.
    if not torch.compiler.is_compiling() and not args:
        coordinator = _fusion().resolve_fusion_group(use_attn_tp_group=kwargs.get("use_attn_tp_group", True))[2]
        held = getattr(coordinator, "ca_comm", None)
        group = _groups.get(held) if isinstance(held, AllReduceJit) else None
        if group is not None and _fits(group, input_tensor, weight) and group.takes(input_tensor):
            # Rounded as FlashInfer does, whose calls with more rows stay.
            return group.add_rms_norm(input_tensor, residual, weight, eps)
    return original(input_tensor, residual, weight, eps, *args, **kwargs)


# -- internals


@functools.cache
def _fusion() -> Any:
    return importlib.import_module(FUSION)


def _fits(group: Group, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether such a call is one kernel of ours."""
    hidden = x.shape[-1] if x.dim() else 0
    wide = weight.dtype in (x.dtype, torch.float32)
    return wide and x.numel() > 0 and hidden > 0 and group.fuses(x.numel() // hidden, hidden, x.dtype)


def _theirs(coordinator: weakref.ref, x: torch.Tensor) -> torch.Tensor:
    held = coordinator()
    assert held is not None, "a group's calls end before the group"
    return held.all_reduce(x)


def _fuse() -> str | None:
    """Hook SGLang's fused operation, once there is a group that holds ours; or why not."""
    hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
    target = f"{FUSION}.{NORM}"
    try:
        module = importlib.import_module(FUSION)
        found = inspect.signature(getattr(module, NORM)).parameters
    except (AttributeError, ImportError, ValueError) as e:
        return f"not ours, as {target} is not there: {e}"
    if tuple(found)[: len(NORM_TAKES)] != NORM_TAKES or "use_attn_tp_group" not in found:
        return f"not ours, as {NORM} takes ({', '.join(found)})"
    if not callable(getattr(module, SGLANG_GROUP, None)):
        return f"not ours, as {FUSION} has no {SGLANG_GROUP}()"
    if target not in hooks.HookRegistry._patched:
        hooks.HookRegistry.register(target, normed, hooks.HookType.AROUND)
        hooks.HookRegistry.apply_hooks()  # those that were applied already are left alone
    return None if target in hooks.HookRegistry._patched else f"not ours, as {target} could not be hooked (see the log)"


def _moved() -> str | None:
    """What this SGLang lacks of what is hooked here."""
    try:
        hooks = importlib.import_module("sglang.srt.plugins.hook_registry")
        missing = [name for name in ("register", "apply_hooks", "_patched") if not hasattr(hooks.HookRegistry, name)]
        missing += [name for name in ("AROUND", "AFTER") if not hasattr(hooks.HookType, name)]
        if missing:
            return f"its hook registry has no {', '.join(missing)}"
        if not callable(pkgutil.resolve_name(DISPATCH)):
            return f"{DISPATCH} is not callable"
        if not isinstance(pkgutil.resolve_name(COORDINATOR), type):
            return f"{COORDINATOR} is no class"
    except (AttributeError, ImportError) as e:
        return f"it has moved what the plug-in holds on to: {e}"
    return None


def _nodes() -> int:
    """Machines of the job, as SGLang was told; 1 where it does not say: a group that spans machines is found out by its ranks."""
    for name in ("sglang.srt.runtime_context:get_parallel", "sglang.srt.server_args:get_global_server_args"):
        try:
            return int(pkgutil.resolve_name(name)().nnodes)
        except Exception as e:  # noqa: BLE001 - not published yet, or another version's: none of it is an error here
            log.debug("nnodes is not known from %s: %r", name, e)
    return 1


def _refuse(why: str, *, loud: bool = True) -> None:
    """Say why not; with ``ALLREDUCE_JIT=require`` the process ends."""
    text = f"allreduce_jit is not used in {ENGINE} {version()}: {why}"
    if switch() == "require":
        _stop(f"{text}; change that, or set ALLREDUCE_JIT=1 to go on without it")
    if loud:
        log.warning("%s", text)


def _stop(text: str) -> NoReturn:
    log.error("%s", text)
    raise SystemExit(text)
