"""Forks of the test's own process, whose garbage must not be collected in the child."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Iterator


@contextlib.contextmanager
def frozen() -> Iterator[None]:
    """For the parent, around a fork: the child inherits objects that no collection looks at.

    What earlier tests left behind may have threads, which the child has not: the destructor of a gloo group waits there for ever. Before the
    fork, for Python's own handlers run first in the child, and what they allocate may start a collection.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def fork() -> int:
    """``os.fork()``, whose child collects only what it makes itself."""
    gc.freeze()
    pid = os.fork()
    if pid:
        gc.unfreeze()
    return pid
