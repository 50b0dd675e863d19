"""What can go wrong, as few exceptions as callers can tell apart.

Each message says what happened, on which rank or device, and what to do.
A machine that cannot run a path is no error: that is a ``Reason`` (see ``dispatch``).
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


class PeerTimeout(AllReduceError):
    """A peer did not take part in a call before the deadline; the communicator is poisoned."""
