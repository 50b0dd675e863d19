"""Waits on the driver or NCCL that may have no end, with an end."""

from __future__ import annotations

import threading
from collections.abc import Callable


def within(seconds: float, work: Callable[[], object], what: str) -> bool:
    """Whether ``work`` came to its end in time; if not, it goes on in a thread that keeps no process alive.

    Raises what ``work`` raises in time.
    """
    raised: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as e:  # noqa: BLE001 - it belongs to the caller
            raised.append(e)

    thread = threading.Thread(target=run, name=f"allreduce_jit {what}", daemon=True)
    thread.start()
    thread.join(seconds)
    if raised:
        raise raised[0]
    return not thread.is_alive()
