"""Norms without an all-reduce on a CUDA device: the kernel of kernels/triton, and how it is launched."""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from ..errors import CompileError
from ..inputs import NO_ADDRESS, raise_no_memory
from ..jit.cache import KernelCache
from ..jit.compiler import build
from ..policy import local_norm
from ..policy.catalogue import KernelSpec
from ..policy.operation import OpSpec
from ..settings import Settings
from ..torch_private import current_device, current_raw_stream
from . import driver, norm_reference

log = logging.getLogger("allreduce_jit")

MAX_CALLS = 4096  # that are remembered
_CTYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}

Key = tuple[int, OpSpec, "int | None"]
_lock = threading.Lock()
_calls: dict[Key, _LocalCall | None] = {}  # None: torch's operations do it
_untold = True


class _LocalCall:
    """Calls of one ``OpSpec`` on one device. Not for two threads at once."""

    def __init__(self, spec: OpSpec, device: int, max_ctas: int | None):
        norm = spec.epilogue
        assert norm is not None, "an operation with a norm"
        kernel, threads, shared_bytes = _kernel(local_norm.module(spec), device)
        known = {
            "rows": spec.rows,
            "hidden": spec.hidden,
            "inverse": 1 / spec.hidden,
            "eps": norm.eps,
            "weight_bias": norm.weight_bias,
            "weight_is_fp32": norm.weight == "float32",
            "scale_row": norm.scale_strides[0] if norm.quant == "group" else 1,
            "scale_group": norm.scale_strides[1],
        }
        values = {name: _CTYPES[kind](known.get(name, 0)) for name, kind in local_norm.ARGUMENTS.items()}
        self._addresses = [values[pointer.name] for pointer in spec.pointers]
        # Triton's two trailing scratch pointers.
        arguments = [*values.values(), ctypes.c_uint64(0), ctypes.c_uint64(0)]
        self._launch = driver.KernelLaunch(kernel, arguments, local_norm.grid(spec.rows, max_ctas), threads, shared_bytes)

    def __call__(self, tensors: Sequence[torch.Tensor], stream: int) -> None:
        for argument, tensor in zip(self._addresses, tensors, strict=True):
            argument.value = address = tensor.data_ptr()
            if address < NO_ADDRESS:
                raise_no_memory(tensors, None, "add_rms_norm")
        self._launch(stream)


def run(spec: OpSpec, tensors: Sequence[torch.Tensor], max_ctas: int | None = None) -> None:
    """Launch a call with at least one row on the current stream of the current device, where its tensors are; arguments as for
    ``norm_reference.run``, whose bits these are. All tensors but scales begin at multiples of 16 bytes.

    Without Triton, torch's operations do it.
    """
    device = current_device()
    with _lock:
        key = device, spec, max_ctas
        if key not in _calls:
            if len(_calls) >= MAX_CALLS:
                _calls.clear()
            _calls[key] = _make(spec, device, max_ctas)
        call = _calls[key]
        if call is not None:
            call(tensors, current_raw_stream(device))
            return
    norm_reference.run(spec, tensors)


def _make(spec: OpSpec, device: int, max_ctas: int | None) -> _LocalCall | None:
    global _untold
    try:
        return _LocalCall(spec, device, max_ctas)
    except CompileError as e:
        if _untold:
            log.warning("norms without an all-reduce are made of torch's operations, the same bits and slower: %s", e)
            _untold = False
        return None


@cache
def _kernel(module: KernelSpec, device: int) -> tuple[Any, int, int]:
    """(kernel, threads of a block, its shared memory) in the current context."""
    major, minor = torch.cuda.get_device_capability(device)
    artifact, _ = build(module, f"sm_{major}{minor}", _cubins())
    with driver.beside_captures():
        kernel = driver.load_module(artifact.cubin).kernel(module.entries[0])
        driver.call("cuFuncGetAttribute", driver.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_NUM_REGS, kernel)  # loads it now
    return kernel, artifact.threads, artifact.shared_bytes


@cache
def _cubins() -> KernelCache:
    return KernelCache(Settings.from_env().cache_dir)
