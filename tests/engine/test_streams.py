"""Calls on several streams, eager and captured: which of them wait for which, over a stand-in of the driver."""

from __future__ import annotations

import pytest
from helpers.fake_driver import FakeDriver, capture_info

from allreduce_jit.engine import streams
from allreduce_jit.engine.streams import MAX_CAPTURES, PER_THREAD, StreamOrder
from allreduce_jit.errors import AllReduceError


class Gpu:
    """What is ordered after what: every call on a stream is a number, and a call sees those that it waits for."""

    def __init__(self, monkeypatch):
        self.capturing: dict[int, int] = {}  # stream -> capture
        self.fake = FakeDriver(
            monkeypatch, streams,
            cuStreamGetCaptureInfo=lambda stream: capture_info(self.capturing.get(int(stream))),
            cuEventRecord=self.record, cuStreamWaitEvent=self.wait, cuStreamGetPriority=lambda stream: -int(stream == 13),
        )  # fmt: skip
        self.order = StreamOrder()
        self.thread = 0
        self.after: dict[tuple, set[int]] = {}  # of a stream: the calls that its next one comes after
        self.events: dict[int, set[int]] = {}
        self.calls = 0

    def place(self, stream):
        """A stream as the driver tells them apart; in a capture its work belongs to that."""
        stream = int(stream)
        return (stream, self.thread) if stream == PER_THREAD else (stream, self.capturing.get(stream))

    def record(self, event, stream):
        if int(stream) in self.capturing:
            self.events[int(event)] = {("captured", self.capturing[int(stream)]), *self.after.get(self.place(stream), ())}
        else:
            self.events[int(event)] = set(self.after.get(self.place(stream), ()))

    def wait(self, stream, event, flags):
        found = self.events.get(int(event), set())
        assert all(mark == ("captured", self.capturing.get(int(stream))) for mark in found if isinstance(mark, tuple)), (
            "isolation"
        )
        self.after.setdefault(self.place(stream), set()).update(mark for mark in found if not isinstance(mark, tuple))

    def call(self, stream, thread=0):
        """One call as the engine makes it; the calls that it comes after."""
        self.thread = thread
        if stream in self.capturing:
            self.order.enter_captured(stream)
        elif stream != self.order.last:
            self.order.enter(stream)
        self.calls += 1
        seen = self.after.setdefault(self.place(stream), set())
        found = set(seen)
        seen.add(self.calls)
        if stream == PER_THREAD:
            self.order.leave_per_thread()
        return found


@pytest.fixture
def gpu(monkeypatch):
    return Gpu(monkeypatch)


def test_every_call_waits_for_all_before_it(gpu):
    for number, stream in enumerate((5, 5, 9, 9, 5, 0, 9, 0, 0, 13, 5)):
        assert gpu.call(stream) == set(range(1, number + 1))
    assert gpu.order.priority == 0


def test_nothing_is_recorded_while_the_stream_stays_the_same(gpu):
    gpu.call(5)
    before = len(gpu.fake.log)
    for _ in range(5):
        gpu.call(5)
    assert len(gpu.fake.log) == before


def test_streams_of_one_capture_are_ordered_and_no_other(gpu):
    gpu.call(5)
    gpu.capturing = {5: 33, 9: 33, 7: 34}
    assert gpu.call(5) == set() and gpu.call(9) == {2} and gpu.call(7) == set() and gpu.call(5) == {2, 3}


def test_a_capture_between_eager_calls_leaves_their_order(gpu):
    """The last eager call is remembered though captured ones came since, on its stream or on others."""
    for captured in (9, 5):
        first = gpu.calls + 1
        gpu.call(5)
        gpu.capturing = {captured: 50 + captured}
        gpu.call(captured)
        gpu.capturing = {}
        assert first in gpu.call(7) and first in gpu.call(9)


def test_captures_in_turn_are_kept_apart(gpu):
    gpu.capturing = {5: 1, 6: 1, 7: 2, 8: 2}
    assert [gpu.call(stream) for stream in (5, 7, 6, 8, 5)] == [set(), set(), {1}, {2}, {1, 3}]


def test_captures_are_forgotten(gpu):
    for number in range(1, 5 * MAX_CAPTURES):
        gpu.capturing = {5: number}
        gpu.call(5)
    assert len(gpu.order._captures) <= MAX_CAPTURES


def test_the_default_streams_of_threads_are_different_streams(gpu):
    """They have one handle, which means another stream in each thread."""
    for number, (stream, thread) in enumerate(
        [(PER_THREAD, 0), (PER_THREAD, 1), (PER_THREAD, 1), (5, 0), (PER_THREAD, 0), (0, 1)]
    ):
        assert gpu.call(stream, thread) == set(range(1, number + 1))


def test_an_error_loses_no_order(gpu):
    gpu.call(5)
    for name in ("cuEventRecord", "cuStreamWaitEvent", "cuStreamGetPriority"):
        gpu.fake.fails = {name: AllReduceError("planted")}
        with pytest.raises(AllReduceError, match="planted"):
            gpu.order.enter(13)
        assert (gpu.order.last, gpu.order.priority) == (5, 0)
    gpu.fake.fails = {}
    assert gpu.call(9) == {1}


def test_priority_is_that_of_the_last_stream(gpu):
    gpu.call(13)
    assert gpu.order.priority == -1
    gpu.call(5)
    assert gpu.order.priority == 0


def test_events_are_made_once_and_given_back(gpu):
    for stream in (5, 9, 5, 9):
        gpu.call(stream)
    assert len(gpu.fake.named("cuEventCreate")) == 2
    gpu.order.close()
    created = {int(event) for event in (gpu.order._eager, gpu.order._captured)}
    assert {entry[1] for entry in gpu.fake.named("cuEventDestroy")} == created


@pytest.mark.parametrize("planted", ["no event", "the last stream of all", "handles alone"])
def test_planted_mistakes_are_found(gpu, monkeypatch, planted):
    if planted == "no event":
        monkeypatch.setattr(gpu.order, "enter", lambda stream: setattr(gpu.order, "last", stream))
        assert gpu.call(5) == set() and gpu.call(9) != {1}
    elif planted == "the last stream of all":  # captured calls taken for the last
        real = gpu.order.enter_captured
        monkeypatch.setattr(gpu.order, "enter_captured", lambda stream: (real(stream), setattr(gpu.order, "last", stream)))
        gpu.call(5)
        gpu.capturing = {9: 1}
        gpu.call(9)
        gpu.capturing = {}
        assert 1 not in gpu.call(7)
    else:
        monkeypatch.setattr(gpu.order, "leave_per_thread", lambda: setattr(gpu.order, "last", PER_THREAD))
        gpu.call(PER_THREAD, 0)
        assert gpu.call(PER_THREAD, 1) == set()
