"""The catalogue: every kernel module that a plan can pick, per path and world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WORLD_SIZES = range(2, 9)
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
CUDA_ALGORITHMS = ("one_shot", "two_shot", "pipelined")
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class KernelSpec:
    """One compilation unit: a CUDA C++ file or a Triton function, with its compile-time constants.

    Attributes:
        name: unique name, also in the cache listing, e.g. ``two_shot_ws4``.
        language: ``cuda`` (NVRTC) or ``triton``.
        source: a file of ``kernels/cuda`` or a function of ``kernels/triton/legacy.py``.
        constants: macros, or Triton constexprs, by name.
        entries: names of the kernels inside.
    """

    name: str
    language: str
    source: str
    constants: tuple[tuple[str, object], ...]
    entries: tuple[str, ...]


def catalogue(path: str, world_size: int, dtypes: Sequence[str] = tuple(DTYPES)) -> list[KernelSpec]:
    """All modules that ``path`` (``v2`` or ``legacy``) uses at ``world_size``.

    A CUDA module holds all dtypes at once (one compilation, one cubin); a Triton module holds one.
    """
    if path == "v2":
        return [cuda_module(name, world_size) for name in CUDA_ALGORITHMS]
    if path == "legacy":
        return [
            triton_module(name, world_size, dtype, vector)
            for name in ("one_shot", "two_shot")
            for dtype in dtypes
            for vector in (True, False)
        ]
    raise ValueError(f"no kernels for path {path!r}: expected 'v2' or 'legacy'")


def cuda_module(algorithm: str, world_size: int, virtual_ranks: bool = False) -> KernelSpec:
    """``virtual_ranks`` builds the one-GPU form of ``entry.cuh`` that tests use."""
    entries = tuple(f"{algorithm}_{short}_ws{world_size}" for short in DTYPES.values())
    constants: tuple[tuple[str, object], ...] = (("WORLD_SIZE", world_size),)
    if virtual_ranks:
        constants += (("VIRTUAL_RANKS", 1),)
    suffix = "_virtual" if virtual_ranks else ""
    return KernelSpec(f"{algorithm}_ws{world_size}{suffix}", "cuda", f"{algorithm}.cu", constants, entries)


def triton_module(algorithm: str, world_size: int, dtype: str, vector: bool) -> KernelSpec:
    """``vector``: the user's tensors are 16-byte aligned and hold whole 16-byte packets."""
    name = f"legacy_{algorithm}_{DTYPES[dtype]}_ws{world_size}{'_vector' if vector else ''}"
    constants = (("WORLD", world_size), ("DTYPE", dtype), ("VECTOR", vector))
    return KernelSpec(name, "triton", f"legacy_{algorithm}", constants, (f"legacy_{algorithm}",))
