"""KernelSpec + architecture -> cubin. Nothing else in the package knows a compiler."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.resources
import logging
import os
import re
import sys
import tempfile
from functools import cache as memoise
from pathlib import Path

from . import __version__
from .cache import Artifact, KernelCache
from .errors import CompileError
from .kernel import ITEMSIZE, KernelSpec

log = logging.getLogger("allreduce_jit")

TRITON_ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.M)


def build(spec: KernelSpec, arch: str, cache: KernelCache) -> tuple[Artifact, bool]:
    """The compiled module for ``arch`` (``sm_90``, ...), and whether it came from the cache.

    Needs no GPU and no driver.

    Raises:
        CompileError: the compiler is missing or refuses the source; the message holds its log.
    """
    front = {"cuda": _nvrtc, "triton": _triton}[spec.language]
    try:
        key = _key(spec, arch)
        artifact = cache.get(key)
        if artifact is not None:
            return artifact, True
        artifact = front(spec, arch)
    except CompileError:
        raise
    except Exception as e:  # noqa: BLE001 - compilers raise what they like
        message = str(e).rstrip("\0 \n")  # NVRTC's log ends in a NUL
        raise CompileError(f"{spec.name} for {arch}: {type(e).__name__}: {message}") from e
    cache.put(key, artifact)
    return artifact, False


def _key(spec: KernelSpec, arch: str) -> str:
    text = _cuda_source(spec.source) if spec.language == "cuda" else _triton_source()
    parts = (__version__, repr(spec), arch, _version(spec.language), text)  # the version: for options set here
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@memoise
def _version(language: str) -> str:
    try:
        if language == "cuda":
            return f"nvrtc {_nvrtc_version()}"
        from importlib.metadata import version

        return f"triton {version('triton')}"
    except Exception as e:  # noqa: BLE001
        raise CompileError(f"no {'NVRTC' if language == 'cuda' else 'Triton'} on this machine: {e}") from e


def _nvrtc_version() -> str:
    from cuda.bindings import nvrtc

    try:
        _, major, minor = nvrtc.nvrtcVersion()
    except Exception:  # noqa: BLE001 - which one depends on cuda-python's version
        # It looks in the interpreter's own site folders alone; what is loaded already it takes from anywhere.
        if not _load_nvrtc_of_a_wheel():
            raise
        _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


def _load_nvrtc_of_a_wheel() -> bool:
    """Load NVRTC from where ``PYTHONPATH`` or ``.pth`` files have packages: the newest of the first folder with any."""
    for folder in sys.path:
        for library in sorted(Path(folder).glob("nvidia/*/lib/libnvrtc.so.*"), key=lambda path: path.name, reverse=True):
            for builtins in library.parent.glob("libnvrtc-builtins.so.*"):  # which not every NVRTC finds beside itself
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
            return True
    return False


@memoise
def _cuda_source(filename: str) -> str:
    """The file with its includes put in place, each once: NVRTC then needs no include path."""
    seen: set[str] = set()

    def expand(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = importlib.resources.files("allreduce_jit.cuda_kernels").joinpath(name).read_text()
        text = text.replace("#pragma once\n", "")
        return _INCLUDE.sub(lambda m: expand(m[1]), text)

    return expand(filename)


def _nvrtc(spec: KernelSpec, arch: str) -> Artifact:
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name=spec.source, arch=arch, std="c++17", define_macro=[(k, str(v)) for k, v in spec.constants]
    )
    cubin = Program(_cuda_source(spec.source), "c++", options).compile("cubin").code
    return Artifact(spec.name, arch, 0, 0, bytes(cubin))


@memoise
def _triton_source() -> str:
    return importlib.resources.files("allreduce_jit.triton_kernels").joinpath("legacy.py").read_text()


def _triton(spec: KernelSpec, arch: str) -> Artifact:
    # Triton's own disk cache races on shared homes; ours replaces it.
    with tempfile.TemporaryDirectory(prefix="allreduce_jit_triton_") as private:
        saved = os.environ.get("TRITON_CACHE_DIR")
        os.environ["TRITON_CACHE_DIR"] = private
        try:
            return _triton_compile(spec, arch)
        finally:
            os.environ.pop("TRITON_CACHE_DIR")
            if saved is not None:
                os.environ["TRITON_CACHE_DIR"] = saved


def _triton_compile(spec: KernelSpec, arch: str) -> Artifact:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .triton_kernels import legacy

    # Triton's LLVM does not refuse an architecture that it does not know: it aborts the process.
    if arch not in TRITON_ARCHS:
        raise CompileError(f"Triton is not known to compile for {arch}, only for {', '.join(TRITON_ARCHS)}")
    constants = dict(spec.constants)
    constants["BLOCK"] = legacy.BLOCK_BYTES // ITEMSIZE[constants["DTYPE"]]
    constants["DTYPE"] = getattr(triton.language, constants["DTYPE"])
    constants["INTERPRET"] = False
    source = ASTSource(
        getattr(legacy, spec.source), signature=legacy.signature(spec.source), constexprs=constants
    )
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": legacy.NUM_WARPS, "maxnreg": legacy.MAX_REGISTERS})
    meta = compiled.metadata
    return Artifact(spec.name, arch, 32 * meta.num_warps, meta.shared, compiled.asm["cubin"])
