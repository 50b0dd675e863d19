"""What calls are given: devices, and the tensors that an all-reduce takes, refuses or has to pack first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
import torch.distributed as dist

from .errors import InputError, InputTypeError
from .torch_private import quick_empty, tensor_check, without_overrides

# Below are offsets into storages that have been freed under their tensors, to which torch gives no address: tensors that are
# like earlier ones in all else. The driver gives no memory there.
NO_ADDRESS = 1 << 32
_SUM = dist.ReduceOp.SUM


def never_matches(x: torch.Tensor) -> bool:
    """The guard of no tensor."""
    return False


def as_device(device: torch.device | str | int | None) -> torch.device:
    """``cpu``, or a CUDA device with its index. None is the current CUDA device, or the CPU; an int a CUDA index.

    A CUDA device need not exist: that is for the ladder to say, on all ranks.
    """
    present = torch.cuda.is_available()
    if device is None:
        device = "cuda" if present else "cpu"
    try:
        device = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as e:
        raise InputError(f"device {device!r}: expected a torch.device, cuda, cuda:<index>, an index, or cpu") from e
    if device.type not in ("cuda", "cpu"):
        raise InputError(f"device {device} is neither a CUDA device nor the CPU")
    if device.type == "cpu":
        return torch.device("cpu")  # tensors on cpu:0 say cpu
    if device.index is None:
        return torch.device("cuda", torch.cuda.current_device() if present else 0)
    return device


# Wrappers around tensors: what a user calls to get at the tensor inside.
_UNWRAPPED_BY = {"to_local": "a distributed tensor: pass its to_local()", "trigger_wait": "a pending result: pass its wait()"}


def memory_problem(x: torch.Tensor) -> str | None:
    """Why kernels cannot use the memory of ``x``, a strided tensor; None if a storage on its device holds all of its elements.

    Fake and functional tensors, wrapper subclasses (DTensor) and the arguments of functorch's transforms have an address, but
    none of theirs; a storage may have been freed under its tensor (``resize_``).
    """
    if x.numel() == 0:
        return None
    try:
        with without_overrides():
            storage = x.untyped_storage()
            if storage.device != x.device:
                return f"a {type(x).__name__} whose storage is on {storage.device}: it has no data"
            last = x.storage_offset() + sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
            needed, present = (last + 1) * x.element_size(), storage.nbytes()
            if present < needed or not storage.data_ptr():
                return f"a tensor of which the storage has {present} bytes and {needed} are needed: was it freed or resized?"
    except RuntimeError:  # NotImplementedError among them
        known = (why for method, why in _UNWRAPPED_BY.items() if hasattr(type(x), method))
        return next(
            known, f"a {type(x).__name__} without storage of its own, as wrappers and tracers make: pass the tensor inside"
        )
    return None


def require_sum(op: object, rank: int) -> None:
    """Refuse an ``op`` that is not the sum. The sum is None, ``"sum"`` in any case, and torch's ``ReduceOp.SUM``.

    What another library calls its operations is not compared with anything: their ``==`` may mean anything.
    """
    if op is None or op is _SUM:
        return
    kinds = dist.ReduceOp.RedOpType
    if isinstance(op, str):
        name = str.upper(op)  # a plain one, also of an enumeration's member
    elif isinstance(op, kinds):
        name = op.name
    elif isinstance(op, dist.ReduceOp):  # made of a kind, maybe with a factor
        name = next((name for name, kind in kinds.__members__.items() if op == kind), "?")
    else:
        raise InputTypeError(
            f"rank {rank}: op must be None, 'sum' or torch.distributed.ReduceOp.SUM, not {type(op).__name__}: leave it away"
        )
    if name == "SUM":
        return
    instead = "divide the sum by world_size" if name == "AVG" else "use torch.distributed.all_reduce for it"
    raise InputError(f"rank {rank}: op={name[:40]}: these kernels sum and do nothing else: {instead}")


def said_by(rank: int | None) -> str:
    """How a message begins: with the rank, or (a call of this process alone) with nothing."""
    return "" if rank is None else f"rank {rank}: "


def raise_no_memory(tensors: Sequence[torch.Tensor], rank: int | None, operation: str = "all_reduce") -> NoReturn:
    """Say which of a call's tensors (input, output, others) has no memory, one of them having an address where there is none."""
    x, out, *others = tensors
    by = said_by(rank)
    if problem := memory_problem(x):
        raise InputError(f"{by}{operation} was given {problem}")
    for name, tensor in (("out", out), *((f"argument {i}", other) for i, other in enumerate(others, 2))):
        if problem := memory_problem(tensor):
            raise InputError(f"{by}{name} is {problem}")
    addresses = ", ".join(f"{tensor.data_ptr():#x}" for tensor in tensors)
    raise InputError(f"{by}{operation} was given tensors at addresses {addresses}, where the driver gives no memory")


def accepted(
    x: torch.Tensor, out: torch.Tensor | None, device: torch.device, index: int, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What an all-reduce of ``x`` into ``out``, or a new tensor, reads; what it writes; and what its caller gets, into which the latter
    is to be copied if it is another. Refuses what cannot be."""
    check_input(x, device, index, rank)
    dense = x.is_contiguous() and not x.is_neg()
    if out is None:
        source = x if dense else packed(x)
        target = torch.empty_like(x) if dense else source
        return source, target, target
    if (out is not x or not dense) and not check_output(x, out, dense, rank):
        source = packed(x)
        return source, source, out
    return x, out, out


def check_input(
    x: object, device: torch.device, index: int, rank: int | None, operation: str = "all_reduce", name: str = "the tensor"
) -> None:
    """Refuse what is no strided tensor with memory on ``device`` (``index`` as ``Tensor.get_device`` has it), or requires grad.
    ``name``: what the operation calls it."""
    if (
        not isinstance(x, torch.Tensor)
        or x.get_device() != index
        or x.is_meta
        or x.layout is not torch.strided
        or (x.requires_grad and torch.is_grad_enabled())
        or memory_problem(x) is not None
    ):
        _refuse_input(x, device, rank, operation, name)


def _refuse_input(x: object, device: torch.device, rank: int | None, operation: str, name: str) -> NoReturn:
    by, given = said_by(rank), "" if name == "the tensor" else f" as {name}"
    if not isinstance(x, torch.Tensor):
        raise InputTypeError(f"{by}{operation} takes a torch.Tensor{given}, not {type(x).__name__}")
    if x.device != device:
        other = "the input" if rank is None else "this communicator"
        raise InputError(f"{by}{name} is on {x.device}, {other} on {device}: move the tensor")
    if x.layout is not torch.strided:
        raise InputError(f"{by}layout {x.layout}{given}: {operation} takes strided tensors; use to_dense()")
    if problem := memory_problem(x):
        raise InputError(f"{by}{operation} was given{given} {problem}")
    raise InputError(
        f"{by}{name} requires grad and {operation} is not differentiable: detach it, or call it under torch.no_grad()"
    )


def plain(x: object) -> bool:
    """Whether ``x`` is a tensor that holds its sizes and strides itself: no parameter or other subclass, sparse, nested, ..."""
    return type(x) is torch.Tensor and x.layout is torch.strided and not x.is_nested


def tensor_guard(x: torch.Tensor) -> Callable[[torch.Tensor], bool]:
    """Tells whether a plain tensor (and only such: the process ends where strides cannot be had) is like ``x``: with the same
    dtype, device, sizes, strides, and bits for conjugation and negation, without grad. One call of torch's, where looking at each
    of them costs as much as a launch.

    A no may be wrong (in another inference mode), a yes is not.
    """
    if tensor_check is None or x.requires_grad or not plain(x):
        return never_matches
    return tensor_check(x)


def maker(x: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Makes uninitialised tensors with the shape, strides and dtype of ``x``, which is dense and on the current device."""
    quick = quick_empty(x.device.type)
    if quick is None:
        return functools.partial(torch.empty_strided, tuple(x.shape), x.stride(), dtype=x.dtype, device=x.device)
    return functools.partial(quick, tuple(x.shape), x.stride(), x.dtype)


def check_output(x: torch.Tensor, out: torch.Tensor, dense: bool, rank: int) -> bool:
    """Refuse an ``out`` that does not fit ``x``; whether both can be used as they are (``dense``: ``x`` can)."""
    if (
        not isinstance(out, torch.Tensor)
        or out.shape != x.shape
        or out.dtype is not x.dtype
        or out.get_device() != x.get_device()
        or out.is_meta  # which has the CPU's number
        or out.layout is not x.layout
        or (out.requires_grad and torch.is_grad_enabled())
    ):
        _refuse_output(x, out, rank)
    if problem := memory_problem(out):
        raise InputError(f"rank {rank}: out is {problem}")
    if not out.is_contiguous():
        if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
            raise InputError(f"rank {rank}: out is an expanded tensor, whose elements share memory: clone it")
        return False
    # Where one of the two is strided, the sum passes through a copy and no overlap can spoil it.
    if dense and 0 < abs(x.data_ptr() - out.data_ptr()) < x.nbytes:
        raise InputError(f"rank {rank}: out overlaps the input without being the same view: pass out=x, or separate memory")
    return dense and not out.is_neg()


def _refuse_output(x: torch.Tensor, out: object, rank: int) -> NoReturn:
    if not isinstance(out, torch.Tensor):
        operation = isinstance(out, (str, dist.ReduceOp, dist.ReduceOp.RedOpType))
        hint = ": an operation is passed by name, op=" if operation else ""
        raise InputTypeError(f"rank {rank}: out must be a torch.Tensor, not {type(out).__name__}{hint}")
    if out.requires_grad and torch.is_grad_enabled():
        raise InputError(f"rank {rank}: out requires grad: detach it, or call under torch.no_grad()")
    raise InputError(
        f"rank {rank}: out is {tuple(out.shape)} {out.dtype} {out.layout} on {out.device}, "
        f"the input {tuple(x.shape)} {x.dtype} {x.layout} on {x.device}: they must agree"
    )


def packed(x: torch.Tensor) -> torch.Tensor:
    """A contiguous copy that holds the values which ``x`` stands for (views may be strided, or negated)."""
    return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)
