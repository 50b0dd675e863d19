"""The CUDA driver calls that this package makes, checked. Imported only once a GPU path is chosen."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from cuda.bindings import driver

from .errors import AllReduceError


def call(name: str, *args):
    """Call ``cuda.bindings.driver.<name>``; returns its outputs (none, one, or a tuple).

    Raises:
        AllReduceError: with the call's name and CUDA's own words.
    """
    error, *out = getattr(driver, name)(*args)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise AllReduceError(f"{name}: {describe(error)}")
    return out[0] if len(out) == 1 else tuple(out) or None


def describe(error) -> str:
    _, text = driver.cuGetErrorString(error)
    return f"{error.name} ({text.decode() if text else 'no description'})"


class Module:
    """A loaded cubin. Never unloaded: a captured graph may still hold its kernels."""

    def __init__(self, cubin: bytes):
        self._module = call("cuModuleLoadData", cubin)

    def kernel(self, name: str):
        return call("cuModuleGetFunction", self._module, name.encode())


class Launch:
    """One kernel with its grid and argument block, ready to be launched again and again.

    ``arguments`` are ctypes values; the launch reads what they hold at that moment.
    """

    def __init__(self, kernel, arguments: Sequence[ctypes._SimpleCData | ctypes.Structure], grid: int, block: int,
                 shared_bytes: int = 0, pdl: bool = False, ranks: int = 1):
        self._kernel = kernel
        self._keep = arguments
        self._pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        self._address = ctypes.addressof(self._pointers)
        self._shape = (grid, ranks, block, shared_bytes)
        self._attributes = []
        if pdl:
            self._attributes.append(_attribute("PROGRAMMATIC_STREAM_SERIALIZATION", "programmaticStreamSerializationAllowed"))
        if ranks > 1:
            self._attributes.append(_attribute("COOPERATIVE", "cooperative"))
        self._configs: dict[int, driver.CUlaunchConfig] = {}

    def __call__(self, stream: int) -> None:
        config = self._configs.get(stream)
        if config is None:
            config = self._configs[stream] = self._config(stream)
        error = driver.cuLaunchKernelEx(config, self._kernel, self._address, 0)[0]
        if error:
            raise AllReduceError(f"kernel launch: {describe(error)}")

    def _config(self, stream: int) -> driver.CUlaunchConfig:
        if len(self._configs) > 64:  # streams come and go; keep no more than a few
            self._configs.clear()
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.blockDimX, config.sharedMemBytes = self._shape
        config.gridDimZ = config.blockDimY = config.blockDimZ = 1
        config.hStream = driver.CUstream(stream)
        config.attrs = self._attributes
        config.numAttrs = len(self._attributes)
        return config


def _attribute(name: str, field: str) -> driver.CUlaunchAttribute:
    attribute = driver.CUlaunchAttribute()
    attribute.id = getattr(driver.CUlaunchAttributeID, f"CU_LAUNCH_ATTRIBUTE_{name}")
    setattr(attribute.value, field, 1)
    return attribute
