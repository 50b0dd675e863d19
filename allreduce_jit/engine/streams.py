"""The order of one communicator's calls on different streams.

Calls share slots and epochs, so a call on another stream than the one before waits for it by an event. A graph that is
replayed is ordered by whoever replays it; the guard finds out if it is not.
"""

from __future__ import annotations

from cuda.bindings import driver

from .driver import call

PER_THREAD = 2  # CU_STREAM_PER_THREAD: one handle for the default streams of all threads
MAX_CAPTURES = 16  # under way at once, of one communicator
_NO_TIMING = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING.value


def capture_of(stream: int) -> int | None:
    """The id of the capture that ``stream`` is part of, unique in this process; None if it is in none."""
    # Bindings answer with an enum and a cuuint64_t, which compares by identity: plain values from here on.
    status, number = call("cuStreamGetCaptureInfo", stream)[:2]
    return None if int(status) == 0 else int(number)  # CU_STREAM_CAPTURE_STATUS_NONE


class StreamOrder:
    """Not for two threads at once: calls are made under their engine's lock.

    A stream is told by its handle, so a stream that is destroyed must have no call in flight. A capture that begins on a
    stream must find no call in flight there either (``torch.cuda.graph`` waits for the device first): nothing outside of
    the capture could wait for it.

    Attributes:
        last: the stream of the last call outside of captures; None: the next call has to be ordered, whatever its stream.
        priority: of that stream.
    """

    def __init__(self) -> None:
        self.last: int | None = None
        self.priority = 0
        self._captures: dict[int | None, int] = {}  # capture -> stream of its last call
        # One for each side: what is recorded in a capture is an edge of its graph, and no event for others.
        self._eager = call("cuEventCreate", _NO_TIMING)
        self._captured = call("cuEventCreate", _NO_TIMING)

    def enter(self, stream: int) -> None:
        """Have ``stream``, which is in no capture, wait for the last call."""
        priority = call("cuStreamGetPriority", stream)
        if self.last is not None and not (self.last and capture_of(self.last)):  # the default stream is never captured
            call("cuEventRecord", self._eager, self.last)
        call("cuStreamWaitEvent", stream, self._eager, 0)
        self.last, self.priority = (None if stream == PER_THREAD else stream), priority

    def leave_per_thread(self) -> None:
        """Record the call just made on the per-thread default stream, which only its own thread can name."""
        call("cuEventRecord", self._eager, PER_THREAD)

    def enter_captured(self, stream: int) -> None:
        """Have ``stream``, which is in a capture, wait for the last call of that capture: an edge of its graph."""
        capture = capture_of(stream)
        before = self._captures.pop(capture, stream)
        if before != stream:
            call("cuEventRecord", self._captured, before)
            call("cuStreamWaitEvent", stream, self._captured, 0)
        while len(self._captures) >= MAX_CAPTURES:  # the oldest is over long ago
            del self._captures[next(iter(self._captures))]
        self._captures[capture] = stream

    def close(self) -> None:
        call("cuEventDestroy", self._eager)
        call("cuEventDestroy", self._captured)
