"""What can go wrong, as few exceptions as callers can tell apart.

Each message says what happened, on which rank or device, and what to do.
A machine that cannot run a path is no error: that is a ``Reason`` (see ``policy.verdict``).
"""


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


class CommunicatorFailed(AllReduceError):
    """A communicator stopped on all of its ranks; results of kernels since then are NaN. Base of the causes below.

    Attributes:
        ranks: who caused it, as far as is known.
        report: the facts, ready for JSON: who found out, sequence number and signature of the call, phase, ms waited,
            and per rank the last call heard of and whether its process lives.
    """

    def __init__(self, message: str, ranks: tuple[int, ...] = (), report: dict | None = None):
        super().__init__(message)
        self.ranks = ranks
        self.report = report or {}


class PeerTimeout(CommunicatorFailed):
    """A peer did not take part in a call before the deadline, though nothing says that it died."""


class PeerLost(CommunicatorFailed):
    """A peer's process has ended."""


class CallMismatch(CommunicatorFailed):
    """Ranks came to one call with another size, dtype or algorithm; both signatures are in the report."""


class ConcurrentUse(CommunicatorFailed):
    """Two calls of one rank were in flight at once: replayed graphs, or graph and eager, on two streams."""


class Poisoned(CommunicatorFailed):
    """The communicator was stopped before (by ``abort``, or by a failure that was already raised)."""
