"""The catalogue: every kernel module that a plan can pick, per path and world size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .operation import ALL_REDUCE, DTYPES, OpSpec

WORLD_SIZES = range(2, 9)
P2P_ALGORITHMS = ("one_shot", "two_shot")


@dataclass(frozen=True)
class KernelSpec:
    """One compilation unit: a CUDA C++ file or a Triton function, with its compile-time constants.

    Attributes:
        name: unique name, also in the cache listing, e.g. ``two_shot_ws4``.
        language: ``cuda`` (NVRTC) or ``triton``.
        source: a file of ``kernels/cuda`` or a function of ``kernels/triton``.
        constants: members of the CUDA struct ``Config``, or Triton constexprs, by name.
        entries: names of the kernels inside.
        bodies: the CUDA device function that each entry runs; none where the source defines its kernels itself.
        macro: what makes a kernel of an entry and its body (``entry.cuh``), and its arguments between the two.
    """

    name: str
    language: str
    source: str
    constants: tuple[tuple[str, object], ...]
    entries: tuple[str, ...]
    bodies: tuple[str, ...] = ()
    macro: tuple[object, ...] = ("ENTRY",)


@dataclass(frozen=True)
class Algorithm:
    """An algorithm of the NVLink kernels: a CUDA C++ file with the constants that tell its forms apart.

    Attributes:
        source: a file of ``kernels/cuda``.
        number: its name in signatures and reports.
        buffers: slot arrays per source.
        parts: whether a thread has a packet of every rank's part, or just one.
        gathers: numbers of the buffers that hold sums; all others hold what is to be summed.
        packets: packets (of each part) per thread.
        stream: the launches of a call overlap.
        aliased_buffers: how many buffers, the first ones, may alias other algorithms' slots.
        shares_buffers_with: the algorithm whose last buffers, and whose epochs, are this one's, too, where a communicator has
            both.
    """

    source: str
    number: int
    buffers: int
    parts: bool
    gathers: tuple[int, ...] = ()
    packets: int = 1
    stream: bool = False
    aliased_buffers: int = 0
    shares_buffers_with: str | None = None


NVLINK_ALGORITHMS = {
    "one_shot": Algorithm("one_shot.cu", 1, buffers=2, parts=False),
    "two_shot": Algorithm("two_shot.cu", 2, buffers=3, parts=True, gathers=(2,), shares_buffers_with="two_shot_stream"),
    "two_shot_stream": Algorithm("two_shot.cu", 3, buffers=5, parts=True, gathers=(4, 1), stream=True, aliased_buffers=2),
    "one_shot_wide": Algorithm("one_shot.cu", 4, buffers=2, parts=False, packets=12),
    "two_shot_wide": Algorithm("two_shot.cu", 5, buffers=3, parts=True, gathers=(2,), packets=4),
    "two_shot_wide2": Algorithm("two_shot.cu", 6, buffers=3, parts=True, gathers=(2,), packets=2),
}


@dataclass(frozen=True)
class HostAlgorithm:
    """An algorithm of the kernels whose staging memory is on the host.

    Attributes:
        source: a file of ``kernels/cuda``.
        number: its name in signatures and reports.
        parts: whether a rank sums a part of its own, or all.
        gathers: numbers of the phases in which sums come in.
        packets: packets of a lane in a chunk, 1 or 2.
        ahead: chunks that a channel stores before it has received the first one; of algorithms without parts.
        patient: whether a warp asks for its slot by one lane, once it was too early.
        pace: cycles from the first stores of a channel to those of the next one; 0: all at once, and the first poll as well.
        first_poll: cycles from a channel's first stores to its first poll.
        first_poll_per_channel: and so many more for each channel of the launch.
    """

    source: str
    number: int
    parts: bool = False
    gathers: tuple[int, ...] = ()
    packets: int = 1
    ahead: int = 1
    patient: bool = False
    pace: int = 0
    first_poll: int = 0
    first_poll_per_channel: int = 0

    def slots(self, world_size: int) -> int:
        """Of a channel."""
        return world_size if self.parts else 2 * self.ahead


HOST_ALGORITHMS = {
    # A slot of 512 bytes every 20 cycles is 51 GB/s at 1.98 GHz, as fast as stores get over PCIe 5.
    "host_one_shot": HostAlgorithm("host_one_shot.cu", 48, pace=20, first_poll=800, first_poll_per_channel=3),
    "host_stream": HostAlgorithm("host_one_shot.cu", 49, packets=2, ahead=2, patient=True),
    "host_two_shot": HostAlgorithm("host_two_shot.cu", 50, parts=True, gathers=(1,), patient=True),
}


def nvlink_algorithms(world_size: int, few_sms: bool = False) -> tuple[str, ...]:
    """From small to large messages. ``few_sms``: those of a communicator with ``max_ctas``.

    Two ranks have no use for two-shot: one-shot sends as many bytes, in one hop.
    """
    if few_sms:
        # More packets per thread make up for fewer threads, as far as the registers go.
        return "one_shot", "one_shot_wide" if world_size == 2 else "two_shot_wide" if world_size <= 4 else "two_shot_wide2"
    return ("one_shot",) if world_size == 2 else ("one_shot", "two_shot", "two_shot_stream")


def nvlink_modules(world_size: int, families: Sequence[OpSpec] = ALL_REDUCE, few_sms: bool = False) -> list[KernelSpec]:
    """All CUDA modules of all-reduces of ``families``: each holds all dtypes at once (one compilation, one cubin)."""
    names = nvlink_algorithms(world_size, few_sms) if families else ()
    return [cuda_module(name, world_size) for name in names]


def p2p_modules(world_size: int, families: Sequence[OpSpec] = ALL_REDUCE, arch: str | None = None) -> list[KernelSpec]:
    """All Triton modules of calls of ``families``: each holds one kernel of one dtype, the same for every ``arch``."""
    return [
        triton_module(name, world_size, family.dtype, vector)
        for name in P2P_ALGORITHMS
        for family in families
        for vector in (True, False)
    ]


def cuda_module(algorithm: str, world_size: int, virtual_ranks: bool = False, guarded: bool = True) -> KernelSpec:
    """``virtual_ranks`` builds the one-GPU form of ``entry.cuh`` that tests use; without ``guarded`` nothing watches over
    calls and waits, for a test that measures what that costs."""
    what = NVLINK_ALGORITHMS[algorithm]
    constants: tuple[tuple[str, object], ...] = (
        ("WORLD_SIZE", world_size),
        ("PACKETS", what.packets),
        ("STREAM", int(what.stream)),
        ("GUARDED", int(guarded)),
        ("VIRTUAL_RANKS", int(virtual_ranks)),
        ("HOST", 0),
    )
    return _cuda_module(algorithm, world_size, what.source, constants)


def _cuda_module(algorithm: str, world_size: int, source: str, constants: tuple[tuple[str, object], ...]) -> KernelSpec:
    """A module with a kernel of each dtype and form."""
    told = dict(constants)
    forms = [(dtype, whole) for dtype in DTYPES for whole in (True, False)]
    entries = tuple(entry(algorithm, dtype, world_size, whole) for dtype, whole in forms)
    function = source.removesuffix(".cu")
    bodies = tuple(f"{function}<Config, {DTYPES[dtype].title()}, {str(whole).lower()}>" for dtype, whole in forms)
    suffix = ("_virtual" if told["VIRTUAL_RANKS"] else "") + ("" if told["GUARDED"] else "_unguarded")
    return KernelSpec(f"{algorithm}_ws{world_size}{suffix}", "cuda", source, constants, entries, bodies)


def host_algorithms(world_size: int) -> tuple[str, ...]:
    """From small to large messages. Two ranks have no use for two-shot: one-shot moves as many bytes, in one hop."""
    return ("host_one_shot", "host_stream") if world_size == 2 else ("host_one_shot", "host_two_shot")


def host_modules(world_size: int, families: Sequence[OpSpec] = ALL_REDUCE, arch: str | None = None) -> list[KernelSpec]:
    """All CUDA modules of all-reduces of ``families`` through host memory, the same for every ``arch``."""
    return [host_module(name, world_size) for name in host_algorithms(world_size)] if families else []


def host_module(algorithm: str, world_size: int, virtual_ranks: bool = False, guarded: bool = True) -> KernelSpec:
    """As ``cuda_module``, of ``HOST_ALGORITHMS``."""
    what = HOST_ALGORITHMS[algorithm]
    constants: tuple[tuple[str, object], ...] = (
        ("WORLD_SIZE", world_size),
        ("PACKETS", what.packets),
        ("STREAM", 0),
        ("GUARDED", int(guarded)),
        ("VIRTUAL_RANKS", int(virtual_ranks)),
        ("HOST", 1),
        ("AHEAD", what.ahead),
        ("RING", what.slots(world_size)),
        ("PATIENT", int(what.patient)),
        ("PACE", what.pace),
        ("FIRST_POLL", what.first_poll),
        ("FIRST_POLL_PER_CHANNEL", what.first_poll_per_channel),
    )
    return _cuda_module(algorithm, world_size, what.source, constants)


def entry(algorithm: str, dtype: str, world_size: int, whole: bool) -> str:
    """Name of the CUDA kernel; ``whole``: the tensors are made of whole, aligned 16-byte packets."""
    return f"{algorithm}_{DTYPES[dtype]}_ws{world_size}{'' if whole else '_ragged'}"


def triton_module(algorithm: str, world_size: int, dtype: str, vector: bool) -> KernelSpec:
    """``vector``: the user's tensors are 16-byte aligned and hold whole 16-byte packets."""
    name = f"legacy_{algorithm}_{DTYPES[dtype]}_ws{world_size}{'_vector' if vector else ''}"
    constants = (("WORLD", world_size), ("DTYPE", dtype), ("VECTOR", vector))
    return KernelSpec(name, "triton", f"legacy_{algorithm}", constants, (f"legacy_{algorithm}",))
