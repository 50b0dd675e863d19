"""What can go wrong, as few exceptions as callers can tell apart.

All derive from ``AllReduceError``, and every name is what is wrong and then ``Error``. There are two kinds. A call that was refused
launched nothing, and the communicator is as it was: the classes right below the base, which are also ``ValueError`` or ``TypeError``
where Python would raise one. ``CommunicatorFailedError`` and those below it say that a communicator has stopped on all of its ranks.

Each message says what happened, on which rank or device, and what to do.
A machine that cannot run a path is no error: that is a ``Reason`` (see ``policy.verdict``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .deprecation import deprecated
from .records import OPTIONAL, Record


class AllReduceError(RuntimeError):
    """Base of everything this package raises on purpose."""


class SettingsError(AllReduceError, ValueError):
    """An environment variable or option has an unknown name or a bad value."""


class InputError(AllReduceError, ValueError):
    """The tensors or the group handed in cannot be used; nothing was launched."""


class InputTypeError(AllReduceError, TypeError):
    """An argument is not of the type that the call takes; nothing was launched."""


class ClosedError(AllReduceError):
    """The communicator was closed before this call."""


class SetupError(AllReduceError):
    """This rank could not build a path; all ranks step down together and say so."""


class CompileError(SetupError):
    """A kernel did not compile; the message carries the compiler's log."""


class NotDeterministicError(AllReduceError):
    """``deterministic=True`` and only torch.distributed, whose bits differ, could run this call."""


@dataclass(frozen=True)
class SignedCall(Record):
    """What a rank told its peers of a call.

    Attributes:
        sequence: the call's number on that communicator; None where the report has it.
        numel: elements.
        dtype: their type, as torch names it; ``?``: no valid one.
        algorithm: what ran; ``?``: no valid one.
        in_place: whether input and output were one tensor.
        norm: of a call with a norm, the options that it told of; else None.
    """

    sequence: int | None = field(default=None, metadata=OPTIONAL, kw_only=True)
    numel: int
    dtype: str
    algorithm: str
    in_place: bool
    norm: Mapping[str, Any] | None = field(default=None, metadata=OPTIONAL, kw_only=True)


@dataclass(frozen=True)
class RankReport(Record):
    """What is known of one rank after a failure.

    Attributes:
        rank: which one.
        alive: whether its process lives; None: unknown.
        last_call: the last call that the reporting rank heard of; None: of none, or it is that rank itself.
    """

    rank: int
    alive: bool | None
    last_call: SignedCall | None


@dataclass(frozen=True)
class FailureReport(Record):
    """The facts about a failure, as one rank has them. None: not known, or (path torch.distributed) not to be known.

    Attributes:
        kind: ``timeout``, ``lost``, ``mismatch``, ``concurrent``, ``abort`` or ``connection``; None of a failure while ranks were agreeing.
        culprit: the rank to blame.
        found_by: the rank that found out.
        rank: the rank that reports.
        sequence: number of the call.
        algorithm, dtype: of the call.
        phase: ``exchange``, ``scatter`` or ``gather``.
        channel: the warp or program that waited.
        waited_ms: how long it did, in ms.
        ranks: what is known of each rank, in their order.
        mine, theirs: of calls that differ, what this rank and the culprit signed.
    """

    kind: str | None = None
    culprit: int | None = None
    found_by: int | None = None
    rank: int | None = None
    sequence: int | None = None
    algorithm: str | None = None
    dtype: str | None = None
    phase: str | None = None
    channel: int | None = None
    waited_ms: int | None = None
    ranks: tuple[RankReport, ...] = ()
    mine: SignedCall | None = field(default=None, metadata=OPTIONAL)
    theirs: SignedCall | None = field(default=None, metadata=OPTIONAL)

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> FailureReport:
        """Of what ``to_dict`` makes."""
        parts: dict[str, Any] = {name: SignedCall(**facts[name]) for name in ("mine", "theirs") if facts.get(name)}
        if "ranks" in facts:
            calls = [(one, one["last_call"]) for one in facts["ranks"]]
            parts["ranks"] = tuple(RankReport(**{**one, "last_call": call and SignedCall(**call)}) for one, call in calls)
        return cls(**{**facts, **parts})


class CommunicatorFailedError(AllReduceError):
    """A communicator stopped on all of its ranks; results of kernels since then are NaN. Base of the causes below.

    Attributes:
        ranks: who caused it, as far as is known.
        report: the facts: who found out, sequence number and signature of the call, phase, ms waited, and per rank the last call heard
            of and whether its process lives.
    """

    ranks: tuple[int, ...]
    report: FailureReport

    def __init__(self, message: str, ranks: tuple[int, ...] = (), report: FailureReport | Mapping[str, Any] | None = None):
        super().__init__(message)
        self.ranks = ranks
        self.report = report if isinstance(report, FailureReport) else FailureReport.of(report or {})


class PeerTimeoutError(CommunicatorFailedError):
    """A peer did not take part in a call before the deadline, though nothing says that it died."""


class PeerLostError(CommunicatorFailedError):
    """A peer's process has ended."""


class CallMismatchError(CommunicatorFailedError):
    """Ranks came to one call with another size, dtype or algorithm; both signatures are in the report."""


class ConcurrentUseError(CommunicatorFailedError):
    """Two calls of one rank were in flight at once: replayed graphs, or graph and eager, on two streams."""


class PoisonedError(CommunicatorFailedError):
    """The communicator was stopped before (by ``abort``, or by a failure that was already raised)."""


# -- as they were called before

RENAMED = {
    name.removesuffix("Error"): name
    for name in (
        "CommunicatorFailedError",
        "PeerTimeoutError",
        "PeerLostError",
        "CallMismatchError",
        "ConcurrentUseError",
        "PoisonedError",
    )
}


def __getattr__(name: str) -> Any:
    if name not in RENAMED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    deprecated(f"the name {name}", f"the exception is called {RENAMED[name]}")
    return globals()[RENAMED[name]]
