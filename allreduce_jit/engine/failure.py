"""Why a communicator stopped: what its kernels left behind, as exceptions that name the culprit. Pure."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace

from .. import abi
from ..abi import CULPRIT_SHIFT, DTYPE_SHIFT, FINDER_SHIFT, IN_PLACE, NUMEL_SHIFT, Kind
from ..errors import (
    CallMismatchError,
    CommunicatorFailedError,
    ConcurrentUseError,
    PeerLostError,
    PeerTimeoutError,
    PoisonedError,
)
from ..policy.catalogue import HOST_ALGORITHMS, NVLINK_ALGORITHMS
from ..policy.norm import read_signed
from ..policy.norm_forms import NORM_ALGORITHMS
from ..policy.operation import DTYPES

# Bytes of the staging memory; what calls with a norm sign besides lies right behind.
SIGNATURES_AT, SIGNATURES = abi.Header.signatures.offset, abi.Header.signatures.size
SIGNED = SIGNATURES + abi.Header.parameters.size
LEGACY_NUMBERS = {"legacy_one_shot": 32, "legacy_two_shot": 33}
_NUMBERS = {name: what.number for name, what in (NVLINK_ALGORITHMS | NORM_ALGORITHMS | HOST_ALGORITHMS).items()} | LEGACY_NUMBERS
_ALGORITHMS = {number: name for name, number in _NUMBERS.items()}
_Signatures = abi.Signature * abi.MAX_RANKS * 2


def abort_code(kind: Kind, culprit: int, by: int) -> int:
    """``culprit``: the rank to blame; ``by``: the rank that found out."""
    return kind | culprit << CULPRIT_SHIFT | by << FINDER_SHIFT


@dataclass(frozen=True)
class Signature:
    """What a call says of itself to the other ranks (kernels/cuda/guard.cuh).

    ``parameters``: of a call with a norm, what it tells of that (``policy.norm.signed``), where it is known.
    """

    numel: int
    dtype: str
    algorithm: str
    in_place: bool
    parameters: int | None = None

    @classmethod
    def decode(cls, low: int, tag: int) -> Signature:
        number = tag >> DTYPE_SHIFT & 15
        dtype = list(DTYPES)[number] if number < len(DTYPES) else "?"
        numel = low | tag >> NUMEL_SHIFT << 32
        return cls(numel, dtype, _ALGORITHMS.get(tag & 0xFF, "?"), bool(tag & IN_PLACE))

    @property
    def norm(self) -> dict[str, object]:
        """What it tells of its norm."""
        return {} if self.parameters is None else read_signed(self.parameters)

    def report(self) -> dict[str, object]:
        """Ready for JSON."""
        fields: dict[str, object] = asdict(self)
        del fields["parameters"]
        return fields | ({} if self.parameters is None else {"norm": self.norm})

    def __str__(self) -> str:
        hidden = self.parameters is not None and self.parameters & 0xFFFF
        size = f"{self.numel // hidden}x{hidden}" if hidden else self.numel
        return f"{self.algorithm} of {size} {self.dtype}{' in place' if self.in_place else ''}"

    def told_apart(self, other: Signature) -> str:
        """The same, and in what its norm differs from the other one's."""
        differ = [f"{name} {value}" for name, value in self.norm.items() if other.norm.get(name, value) != value]
        return f"{self}{' with ' + ', '.join(differ) if differ else ''}"


def tag(algorithm: str, dtype: str) -> int:
    """What kernels are given to sign with, besides the number of elements."""
    return _NUMBERS[algorithm] | list(DTYPES).index(dtype) << DTYPE_SHIFT


def last_signed(header: bytes, rank: int) -> tuple[int, int, int] | None:
    """(sequence number, low word, tag) of the last call that ``rank`` signed in the ``SIGNATURES`` bytes of a header."""
    both = [row[rank] for row in _Signatures.from_buffer_copy(header)]
    signed = [(s.sequence, s.numel, s.tag) for s in both if s.tag and s.sequence == s.sequence_again]
    # Sequence numbers wrap: of two neighbours the later one is ahead by one.
    if len(signed) == 2 and (signed[0][0] + 1) & 0xFFFFFFFF == signed[1][0]:
        signed.reverse()
    return signed[0] if signed else None


def parameters(header: bytes, rank: int, sequence: int) -> int | None:
    """What ``rank`` signed besides for call ``sequence``, in the ``SIGNED`` bytes of a header; None: nothing."""
    if len(header) < SIGNED:
        return None
    found = _Signatures.from_buffer_copy(header, SIGNATURES)[sequence & 1][rank]
    return found.numel | found.tag << 32 if sequence and found.sequence == found.sequence_again == sequence else None


def heard(header: bytes, world_size: int) -> list[tuple[int, Signature] | None]:
    """The last call that each rank signed, out of a header (its ``SIGNATURES`` or ``SIGNED`` bytes); None: never, or oneself."""
    signed = [last_signed(header, rank) for rank in range(world_size)]
    return [
        last and (last[0], with_parameters(Signature.decode(*last[1:]), parameters(header, rank, last[0])))
        for rank, last in enumerate(signed)
    ]


def with_parameters(signature: Signature, word: int | None) -> Signature:
    """``signature`` of a call that told ``word`` besides, if it is one that does."""
    return replace(signature, parameters=word) if signature.algorithm in NORM_ALGORITHMS else signature


def explain(
    words: Sequence[int],
    code: int,
    rank: int,
    signed: Sequence[tuple[int, Signature] | None],
    alive: Callable[[int], bool | None],
    told: tuple[int | None, int | None] = (None, None),
) -> CommunicatorFailedError:
    """The exception for an abort ``code``.

    Args:
        told: what this rank and the culprit told besides of a call in which they differ, as ``parameters`` has it.
        words: of an ``abi.Report``; all zero if no kernel of this rank has noticed yet.
        signed: ``heard`` of this rank's header.
        alive: whether a rank's process lives; None = unknown.
    """
    seen = abi.Report.from_buffer_copy((ctypes.c_uint32 * len(words))(*words))
    kind, culprit, by = Kind(code & 0xFF), code >> CULPRIT_SHIFT & 0xFF, code >> FINDER_SHIFT & 0xFF
    call = Signature.decode(0, seen.tag) if seen.tag else None
    phase = _phase(call.algorithm, seen.buffer) if call else None
    report = {
        "kind": kind.name.lower(),
        "culprit": culprit,
        "found_by": by,
        "rank": rank,
        "sequence": seen.sequence if call else None,
        "algorithm": call.algorithm if call else None,
        "dtype": call.dtype if call else None,
        "phase": phase,
        "channel": seen.channel,
        "waited_ms": seen.waited_ms,
        "ranks": [
            {"rank": r, "alive": alive(r), "last_call": s and {"sequence": s[0], **s[1].report()}} for r, s in enumerate(signed)
        ],
    }
    where = f" in call {seen.sequence} ({call.algorithm}, {call.dtype}, {phase})" if call and by == rank else ""
    hearsay = "" if by == rank else f" (rank {by} told rank {rank})"
    lives = {True: "lives", False: "is dead", None: "may live or not"}[alive(culprit)]
    error: type[CommunicatorFailedError] = PeerTimeoutError
    if kind is Kind.TIMEOUT:
        waited = f" after {seen.waited_ms / 1000:.1f} s" if by == rank else ""
        text = f"rank {by} timed out{waited} waiting for rank {culprit}{where}; its process {lives}"
        if alive(culprit) is False:
            error = PeerLostError
    elif kind is Kind.LOST:
        error, text = PeerLostError, f"the process of rank {culprit} has ended{where}"
    elif kind is Kind.MISMATCH:
        error, text = CallMismatchError, f"rank {by} and rank {culprit} came to one call with different signatures"
        if by == rank:
            both = zip((seen.mine, seen.theirs), told)
            mine, theirs = (with_parameters(Signature.decode(*words), word) for words, word in both)
            report |= {"mine": mine.report(), "theirs": theirs.report()}
            text = f"call {seen.sequence} is {mine.told_apart(theirs)} on rank {rank}, "
            text += f"but {theirs.told_apart(mine)} on rank {culprit}"
    elif kind is Kind.CONCURRENT:
        error = ConcurrentUseError
        text = f"rank {culprit} had two calls of one communicator in flight at once: order their streams, or use two"
    else:
        error, text = PoisonedError, f"rank {by} aborted this communicator"
    last = "".join(f" Rank {r} last signed call {s[0]}: {s[1]}." for r, s in enumerate(signed) if s)
    text = f"rank {rank}: {text}{hearsay}.{last} Results since then are NaN; close this communicator and build a new one."
    ranks = (culprit, by) if kind is Kind.MISMATCH else (culprit,)
    return error(text, ranks, report)


def _phase(algorithm: str, buffer: int) -> str:
    if "one_shot" in algorithm or algorithm in HOST_ALGORITHMS and not HOST_ALGORITHMS[algorithm].parts:
        return "exchange"
    if algorithm in NORM_ALGORITHMS:
        algorithm = NORM_ALGORITHMS[algorithm].region
    known = NVLINK_ALGORITHMS.get(algorithm) or HOST_ALGORITHMS.get(algorithm)
    gathers = known.gathers if known else (2, 3)  # legacy's
    return "gather" if buffer in gathers else "scatter"
