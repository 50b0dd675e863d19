"""Eager calls of one launch, made in C (eager.c) where that extension was built, which takes a C compiler once; a wheel brings it.

It saves the host what Python and ctypes cost a call, and does nothing that ``communicator.py`` and ``prepared.py`` do not: it declines
whatever is unusual, and they go on.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..inputs import NO_ADDRESS
from ..torch_private import current_device, current_raw_stream
from .driver import address_of, failure

_eager: Any
try:
    _eager = importlib.import_module("._eager", __package__)
except ImportError:  # not built
    _eager = None

if TYPE_CHECKING:
    from .prepared import Binding, PreparedCall
    from .protocol import EagerCall

BUILT = _eager is not None


def eager_call(
    call: PreparedCall, matches: Callable[[torch.Tensor], bool], empty: Callable[[], torch.Tensor]
) -> EagerCall | None:
    """``call`` in C (``BUILT``), for tensors that ``matches`` says yes to, if they are plain; ``empty`` makes such a one. None: not in C.

    Calls of several launches stay in Python: the host's part is small there, and graphs make it smaller.
    """
    engine = call.engine
    if len(call.aligned) != 1 or len(call.unaligned) != 1:
        return None
    (aligned,), (unaligned,) = call.aligned, call.unaligned
    if any(x_offset or out_offset or rest for _, _, x_offset, _, out_offset, rest in (aligned, unaligned)):
        return None  # another operation than an all-reduce
    forms = [_form(binding) for binding in (aligned, unaligned)]
    return _eager.make(
        *(torch.Tensor, torch.strided, matches, empty, torch.Tensor.data_ptr),
        *(current_device, engine._raw_device, current_raw_stream),
        *(engine, engine._streams, engine._lock.acquire, engine._lock.release, _failed),
        *(call.spec.nbytes, NO_ADDRESS, ctypes.addressof(engine.state.words)),
        *(address_of("cuLaunchKernelEx"), address_of("cuStreamIsCapturing")),
        *(addresses for addresses, _ in forms),
        (call, forms),
    )


def _form(binding: Binding) -> tuple[tuple[int, ...], object]:
    """Addresses of the arguments for input and output, and of what a launch takes; and what has to live as long."""
    launch, x, _, out, _, _ = binding
    config, stream = launch.config_of_its_own()
    addresses = ctypes.addressof(x), ctypes.addressof(out), stream, ctypes.addressof(config), launch.kernel, launch.pointers
    return addresses, (binding, config)


def _failed(error: int) -> None:
    raise failure("kernel launch", error)
