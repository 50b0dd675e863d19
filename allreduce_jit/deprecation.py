"""The one way to say that something will go: to whoever uses it, once for each place."""

from __future__ import annotations

import inspect
import warnings
from types import FrameType

_PACKAGE = __name__.partition(".")[0]
_PASSED_THROUGH = (_PACKAGE, "importlib")  # on the way from who uses a name to where it was


def deprecated(what: str, instead: str) -> None:
    """Warn of ``what``, at the line outside of this package that led here; ``instead`` says what to write there.

    The filters of warnings decide whether it is seen: by default in ``__main__`` and under pytest, once for each line.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_back is not None and _passed_through(frame):
        frame = frame.f_back
    assert frame is not None, "CPython tells frames"
    warnings.warn_explicit(
        f"{what} is deprecated and will go in a later version: {instead}",
        DeprecationWarning,
        frame.f_code.co_filename,
        frame.f_lineno,
        module=frame.f_globals.get("__name__"),
        registry=frame.f_globals.setdefault("__warningregistry__", {}),
    )


def _passed_through(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in _PASSED_THROUGH
