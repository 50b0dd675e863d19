"""The catalogue: every kernel module that a plan can pick, per path and world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WORLD_SIZES = range(2, 9)
DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
LEGACY_ALGORITHMS = ("one_shot", "two_shot")
ITEMSIZE = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class KernelSpec:
    """One compilation unit: a CUDA C++ file or a Triton function, with its compile-time constants.

    Attributes:
        name: unique name, also in the cache listing, e.g. ``two_shot_ws4``.
        language: ``cuda`` (NVRTC) or ``triton``.
        source: a file of ``kernels/cuda`` or a function of ``kernels/triton/p2p.py``.
        constants: members of the CUDA struct ``Config``, or Triton constexprs, by name.
        entries: names of the kernels inside.
        bodies: the CUDA device function that each entry runs; none where the source defines its kernels itself.
    """

    name: str
    language: str
    source: str
    constants: tuple[tuple[str, object], ...]
    entries: tuple[str, ...]
    bodies: tuple[str, ...] = ()


@dataclass(frozen=True)
class Algorithm:
    """A V2 algorithm: a CUDA C++ file with the constants that tell its forms apart.

    Attributes:
        source: a file of ``kernels/cuda``.
        number: its name in signatures and reports.
        buffers: slot arrays per source.
        parts: whether a thread has a packet of every rank's part, or just one.
        gathers: numbers of the buffers that hold sums; all others hold what is to be summed.
        packets: packets (of each part) per thread.
        stream: the launches of a call overlap.
        shared: how many buffers, the first ones, may lie over other algorithms' slots.
        inside: the algorithm whose last buffers, and whose epochs, are its own, too, where a communicator has both.
    """

    source: str
    number: int
    buffers: int
    parts: bool
    gathers: tuple[int, ...] = ()
    packets: int = 1
    stream: bool = False
    shared: int = 0
    inside: str | None = None


V2_ALGORITHMS = {
    "one_shot": Algorithm("one_shot.cu", 1, buffers=2, parts=False),
    "two_shot": Algorithm("two_shot.cu", 2, buffers=3, parts=True, gathers=(2,), inside="two_shot_stream"),
    "two_shot_stream": Algorithm("two_shot.cu", 3, buffers=5, parts=True, gathers=(4, 1), stream=True, shared=2),
    "one_shot_wide": Algorithm("one_shot.cu", 4, buffers=2, parts=False, packets=12),
    "two_shot_wide": Algorithm("two_shot.cu", 5, buffers=3, parts=True, gathers=(2,), packets=4),
    "two_shot_wide2": Algorithm("two_shot.cu", 6, buffers=3, parts=True, gathers=(2,), packets=2),
}


def v2_algorithms(world_size: int, narrow: bool = False) -> tuple[str, ...]:
    """From small to large messages. ``narrow``: those of a communicator that may use few multiprocessors.

    Two ranks have no use for two-shot: one-shot sends as many bytes, in one hop.
    """
    if narrow:
        # More packets a thread make up for fewer threads, as far as the registers go.
        return "one_shot", "one_shot_wide" if world_size == 2 else "two_shot_wide" if world_size <= 4 else "two_shot_wide2"
    return ("one_shot",) if world_size == 2 else ("one_shot", "two_shot", "two_shot_stream")


def catalogue(path: str, world_size: int, dtypes: Sequence[str] = tuple(DTYPES), narrow: bool = False) -> list[KernelSpec]:
    """All modules that ``path`` (``v2`` or ``legacy``) uses at ``world_size``.

    A CUDA module holds all dtypes at once (one compilation, one cubin); a Triton module holds one.
    """
    if path == "v2":
        return [cuda_module(name, world_size) for name in v2_algorithms(world_size, narrow)]
    if path == "legacy":
        return [
            triton_module(name, world_size, dtype, vector)
            for name in LEGACY_ALGORITHMS
            for dtype in dtypes
            for vector in (True, False)
        ]
    raise ValueError(f"no kernels for path {path!r}: expected 'v2' or 'legacy'")


def cuda_module(algorithm: str, world_size: int, virtual_ranks: bool = False, guarded: bool = True) -> KernelSpec:
    """``virtual_ranks`` builds the one-GPU form of ``entry.cuh`` that tests use; without ``guarded`` nothing watches over
    calls and waits, for a test that measures what that costs."""
    what = V2_ALGORITHMS[algorithm]
    constants: tuple[tuple[str, object], ...] = (
        ("WORLD_SIZE", world_size),
        ("PACKETS", what.packets),
        ("STREAM", int(what.stream)),
        ("GUARDED", int(guarded)),
        ("VIRTUAL_RANKS", int(virtual_ranks)),
    )
    forms = [(dtype, whole) for dtype in DTYPES for whole in (True, False)]
    entries = tuple(entry(algorithm, dtype, world_size, whole) for dtype, whole in forms)
    function = what.source.removesuffix(".cu")
    bodies = tuple(f"{function}<Config, {DTYPES[dtype].title()}, {str(whole).lower()}>" for dtype, whole in forms)
    suffix = ("_virtual" if virtual_ranks else "") + ("" if guarded else "_unguarded")
    return KernelSpec(f"{algorithm}_ws{world_size}{suffix}", "cuda", what.source, constants, entries, bodies)


def entry(algorithm: str, dtype: str, world_size: int, whole: bool) -> str:
    """Name of the V2 kernel; ``whole``: the tensors are made of whole, aligned 16-byte packets."""
    return f"{algorithm}_{DTYPES[dtype]}_ws{world_size}{'' if whole else '_ragged'}"


def triton_module(algorithm: str, world_size: int, dtype: str, vector: bool) -> KernelSpec:
    """``vector``: the user's tensors are 16-byte aligned and hold whole 16-byte packets."""
    name = f"legacy_{algorithm}_{DTYPES[dtype]}_ws{world_size}{'_vector' if vector else ''}"
    constants = (("WORLD", world_size), ("DTYPE", dtype), ("VECTOR", vector))
    return KernelSpec(name, "triton", f"legacy_{algorithm}", constants, (f"legacy_{algorithm}",))
