"""KernelSpec + architecture -> cubin. Nothing else in the package knows a compiler."""

from __future__ import annotations

import hashlib
import importlib.resources
import logging
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache as memoise

from .. import abi
from ..errors import CompileError
from ..machine import toolchain
from ..policy import p2p
from ..policy.catalogue import KernelSpec
from ..version import __version__
from . import source, triton_process
from .cache import Artifact, KernelCache

log = logging.getLogger("allreduce_jit")

TRITON_ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_120")
_importing = threading.Lock()  # cuda.core fails where several threads import it at once


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


def workers(sharing: int = 1) -> int:
    """How many modules this process compiles at a time, being one of ``sharing`` that do so on this machine."""
    return max(1, len(os.sched_getaffinity(0)) // sharing)


def build_all(jobs: Sequence[tuple[KernelSpec, str]], cache: KernelCache, sharing: int = 1) -> list[tuple[Artifact, bool]]:
    """``build`` of every (module, architecture), several at a time."""
    with ThreadPoolExecutor(min(workers(sharing), len(jobs)) or 1) as pool:
        return list(pool.map(lambda job: build(job[0], job[1], cache), jobs))


def _key(spec: KernelSpec, arch: str) -> str:
    text = _cuda_source(spec) if spec.language == "cuda" else _triton_source()
    parts = (__version__, repr(spec), arch, _version(spec.language), text)  # the version: for options set here
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@memoise
def _version(language: str) -> str:
    name = {"cuda": "NVRTC", "triton": "Triton"}[language]
    try:
        version = toolchain.nvrtc() if language == "cuda" else toolchain.triton()
    except Exception as e:  # noqa: BLE001
        raise CompileError(f"no {name} on this machine: {e}") from e
    if version is None:
        raise CompileError(f"no {name} on this machine: there is no package {language} in {', '.join(map(str, sys.path))}")
    return f"{name.lower()} {version}"


@memoise
def _cuda_source(spec: KernelSpec) -> str:
    return source.unit(spec, source.expand(spec.source, source.files()))


def _nvrtc(spec: KernelSpec, arch: str) -> Artifact:
    with _importing:
        from cuda.core import Program, ProgramOptions

    options = ProgramOptions(name=spec.source, arch=arch, std="c++17")
    cubin = Program(_cuda_source(spec), "c++", options).compile("cubin").code
    return Artifact(spec.name, arch, 0, 0, bytes(cubin))


@memoise
def _triton_source() -> str:
    folder = importlib.resources.files("allreduce_jit.triton_kernels")
    kernels = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".py"))
    # And all offsets and constants, which they take from the modules of which headers and plans are made.
    shared = [*abi.headers().values(), f"{p2p.BLOCK_BYTES} {p2p.NUM_WARPS}"]
    policy = importlib.resources.files("allreduce_jit.policy")
    shared += [policy.joinpath(name).read_text() for name in ("norm.py", "local_norm.py")]
    return "".join([*(folder.joinpath(name).read_text() for name in kernels), *shared])


def _triton(spec: KernelSpec, arch: str) -> Artifact:
    # Triton's LLVM does not refuse an architecture that it does not know: it aborts the process.
    if arch not in TRITON_ARCHS:
        raise CompileError(f"Triton is not known to compile for {arch}, only for {', '.join(TRITON_ARCHS)}")
    return triton_process.compile(spec, arch)
