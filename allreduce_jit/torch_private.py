"""Every name that torch keeps to itself and we use: what is relied upon, how that is checked, and what public names do instead.

Nothing else in the package touches such a name (``test_torch_private`` keeps that). A torch that lacks one, or in which it is not
what it was, works all the same, slower. Names are chosen at import, not per call.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import timedelta
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

_C: Any = torch._C  # no stub tells of all its names

# -- the current device and stream
#
# Checked: they are there, as in every CUDA build since torch 2.0. torch's public functions below are made of the same names, and
# an engine's verification proves what it does with streams and captures before it serves a call.


def _public_raw_stream(device: int) -> int:
    return torch.cuda.current_stream(device).cuda_stream


current_device: Callable[[], int] = getattr(_C, "_cuda_getDevice", None) or torch.cuda.current_device
"""Index of the current CUDA device, without the check whether CUDA was set up."""

current_raw_stream: Callable[[int], int] = getattr(_C, "_cuda_getCurrentRawStream", None) or _public_raw_stream
"""The driver's handle of the current stream of a device; a stream object takes longer to make than all else in a call."""

stream_is_capturing: Callable[[], bool] = (
    getattr(_C, "_cuda_isCurrentStreamCapturing", None) or torch.cuda.is_current_stream_capturing
)
"""Whether the current stream is being captured into a CUDA graph."""


# -- tensors


def _tensor_check() -> Callable[[torch.Tensor], Callable[[torch.Tensor], bool]] | None:
    try:
        guards: Any = _C._dynamo.guards.TensorGuards

        def check_of(x: torch.Tensor) -> Callable[[torch.Tensor], bool]:
            return guards(x, dynamic_dims_sizes=None, dynamic_dims_strides=None).check

        x, z = torch.empty(2, 3), torch.empty(2, 3, dtype=torch.complex64)
        of_x, of_z, of_imag = map(check_of, (x, z, z.imag))
        yes = of_x(x) and of_x(torch.empty(2, 3)) and of_z(z) and of_imag(z.imag)
        others = (
            x.double(),
            x[:1],
            x.view(3, 2),
            x.view(6),
            torch.empty(3, 2).t(),
            x.to("meta"),
            torch.empty_like(x, requires_grad=True),
        )
        no = not any(map(of_x, others)) and not of_z(z.conj()) and not of_imag(z.conj().imag)  # the last one is negated
        return check_of if yes and no else None
    except Exception:  # noqa: BLE001 - no public names: whatever has become of them
        return None


tensor_check = _tensor_check()
"""``tensor_check(x)(y)``: whether two plain tensors agree in dtype, device, sizes, strides, bits for conjugation and negation, and
neither requires grad; in one call of torch's compiler (``TensorGuards``). False negatives are possible (in another inference
mode), false positives are not. Undefined for tensors that do not hold their sizes and strides themselves.

Checked by comparing tensors that differ in each of these. None where that fails: then every call takes the full checks.
"""


@functools.cache
def quick_empty(kind: str) -> Callable[[Sequence[int], Sequence[int], torch.dtype], torch.Tensor] | None:
    """``(shape, strides, dtype)`` -> an uninitialised tensor on the current device of ``kind`` (``cuda``, ``cpu``), by what code
    of torch's compiler calls (``_empty_strided_cuda``): quicker than ``torch.empty``.

    Checked by making one. None where it is not as ordered: ``torch.empty`` does the same.
    """
    try:
        make = getattr(_C._dynamo.guards, f"_empty_strided_{kind}")
        made = make((2, 3), (3, 1), torch.bfloat16)
        facts = type(made), made.layout, tuple(made.shape), made.stride(), made.dtype, made.device.type, made.requires_grad
        return make if facts == (torch.Tensor, torch.strided, (2, 3), (3, 1), torch.bfloat16, kind, False) else None
    except Exception:  # noqa: BLE001 - no public name: whatever has become of it
        return None


class _WithoutOverrides(TorchFunctionMode):
    """The public way to ``without_overrides``: every function gets the tensors without their classes."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        bare = (torch.Tensor.as_subclass(x, torch.Tensor) if isinstance(x, torch.Tensor) else x for x in args)
        return func(*bare, **(kwargs or {}))


def _without_overrides() -> Callable[[], AbstractContextManager[Any]]:
    class Overridden(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise NotImplementedError

    try:
        private: Any = _C.DisableTorchFunctionSubclass
        with private():
            torch.empty(2).as_subclass(Overridden).untyped_storage()
        return private
    except Exception:  # noqa: BLE001 - no public name: whatever has become of it
        return _WithoutOverrides


without_overrides = _without_overrides()
"""A context in which functions of tensors see the tensors themselves, whatever ``__torch_function__`` of their classes makes of
them. Checked with a class that refuses every function."""


# -- process groups


def shared_store(group: dist.ProcessGroup) -> dist.Store:
    """A key-value store that all ranks of ``group`` share: that of the default group, which torch gives no public name; where it
    is not there, the group's own."""
    try:
        return dist.distributed_c10d._get_default_store()
    except AttributeError:
        return group.get_group_store()


def new_gloo_group(
    ranks: list[int], place: int, store: dist.Store, name: str, connect_timeout: timedelta, timeout: timedelta
) -> dist.ProcessGroup | None:
    """A gloo group of ``ranks`` (of the default group), called by its members alone, who find each other by ``name``.

    Relied upon is what ``dist.new_group`` itself is made of. Checked: all names are there and the constructor takes these
    arguments. Otherwise None, with nothing begun: ``dist.new_group`` with ``use_local_synchronization`` has to do.

    Args:
        place: this rank's index in ``ranks``.
        store: shared by all ``ranks``.
        connect_timeout: how long to wait for the others here.
        timeout: that of the group's collectives.

    Raises:
        RuntimeError: a rank has not come in time.
    """
    c10d: Any = dist.distributed_c10d
    try:
        helper, set_timeout, ranks_of_groups = c10d._new_process_group_helper, c10d._set_pg_timeout, c10d._world.pg_group_ranks
        arguments = len(ranks), place, ranks, dist.Backend("gloo"), store, name
        inspect.signature(helper).bind(*arguments, timeout=connect_timeout)
        inspect.signature(set_timeout).bind(timeout, None)
    except (AttributeError, TypeError):
        return None
    made, _ = helper(*arguments, timeout=connect_timeout)
    if timeout != connect_timeout:
        set_timeout(timeout, made)
    ranks_of_groups[made] = {rank: index for index, rank in enumerate(ranks)}
    return made


# -- calls of others' programs, for ``install``


def default_group() -> dist.ProcessGroup | None:
    """The default group, or None. The public name, ``dist.group.WORLD``, asks twice and makes a string of an error on the way."""
    return dist.distributed_c10d._world.default_pg


def group_name_of(group: dist.ProcessGroup) -> str | None:
    """The name by which functional collectives know ``group``; None once it is destroyed."""
    return dist.distributed_c10d._world.pg_names.get(group)


def group_named(name: str) -> dist.ProcessGroup:
    """The group that functional collectives know by ``name``. Raises ``RuntimeError``: there is none."""
    find: Any = dist.distributed_c10d._resolve_process_group  # some versions have a type of their own for a name
    return find(name)


def coalescing() -> dict:
    """The groups that collect calls now, to make them together later: always the same dictionary, which is nearly always empty."""
    return dist.distributed_c10d._world.pg_coalesce_state


function_modes: Callable[[], int] = getattr(_C, "_len_torch_function_stack", lambda: 0)
operator_modes: Callable[[], int] = getattr(_C, "_len_torch_dispatch_stack", lambda: 0)
"""How many modes are active that mean to see calls of torch's functions, or of its operators (tracers, counters)."""


def knows_calls() -> str | None:
    """Why the names above cannot be relied upon, found out by using them; None if they can."""
    try:
        group = default_group()
        known = group is None or (group_name_of(group) == group.group_name and group_named(group.group_name) is group)
        before = function_modes()
        with TorchFunctionMode():
            counted = function_modes() - before == 1 and operator_modes() >= 0
        return None if known and coalescing() is coalescing() and counted else "groups or modes are told in another way"
    except Exception as e:  # noqa: BLE001 - no public names: whatever has become of them
        return f"{type(e).__name__}: {e}"


def functional_collective(name: str) -> Any:
    """An operator of torch's functional collectives, which graphs of ``torch.compile`` call. Raises ``AttributeError``: there is none."""
    return getattr(torch.ops._c10d_functional, name).default


FUNCTIONAL_COLLECTIVES = "_c10d_functional"
"""Their namespace."""

BEFORE_BACKENDS = "BackendSelect"
"""The dispatch key of kernels that calls of any device come to, after autograd and before the device's own kernel."""


def to_backends(keys: Any) -> Any:
    """Of the dispatch keys of a call, those behind ``BEFORE_BACKENDS``."""
    return keys & _C._dispatch_keyset_full_after(_C.DispatchKey.BackendSelect)


# -- for measurements


def backend_of(group: dist.ProcessGroup, device: torch.device) -> Any:
    """The backend object that runs a group's collectives on ``device``, for what only it can do; None where torch does not tell."""
    ask: Any = getattr(group, "_get_backend", None)
    return None if ask is None else ask(device)


def symmetric_memory() -> ModuleType | None:
    """torch's symmetric memory, the module with ``empty`` and ``rendezvous``; None where it is not there."""
    try:
        from torch.distributed import _symmetric_memory as module
    except ImportError:
        return None
    return module if hasattr(module, "empty") and hasattr(module, "rendezvous") else None


_FILL_BYTES, _FILL_CYCLES = 256 << 20, 60_000  # what one fill takes at least: 30 µs at 2 GHz


def _fill_for(cycles: int) -> None:
    waste = torch.empty(_FILL_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(1 + cycles // _FILL_CYCLES):
        waste.fill_(0)


keep_gpu_busy: Callable[[int], None] = getattr(torch.cuda, "_sleep", None) or _fill_for
"""Keep the current stream busy for about so many cycles of the GPU's clock, or longer. Checked: it is there; otherwise memory is
filled for as long."""
