"""Calls of one communicator on several streams, eager and captured, in the same order on all ranks: every result is right and
no two calls meet. ``ALL_CALLS`` of each form; like ``gpu_work``, functions of a ``Place``."""

from __future__ import annotations

import itertools
import os
import threading
from contextlib import contextmanager

import torch
import torch.distributed as dist
from gpu_work import expect_path

from allreduce_jit.communicator import Communicator
from allreduce_jit.engine import reference
from allreduce_jit.engine.streams import PER_THREAD

ALL_CALLS = int(os.environ.get("STREAM_CALLS", "3000"))
SIZES = (1024, 300_001)  # a small one and one that takes long: if nothing orders them, they meet
KINDS = 8  # different inputs of each size
CAPTURE_EVERY = 500


class Traffic:
    """Calls with inputs taken in turn and new outputs, each compared on the stream that it ran on."""

    def __init__(self, place, path):
        self.place = place
        self.comm = Communicator(dist.group.WORLD, place.device, deterministic=True, highest=path)
        expect_path(self.comm, path)
        self.data = {
            numel: [
                [
                    reference.values(seed, place.rank, numel, torch.bfloat16, place.device),
                    reference.expected(seed, place.world_size, numel, torch.bfloat16, place.device),
                ]
                for seed in range(KINDS)
            ]
            for numel in SIZES
        }
        self.wrong = [torch.zeros((), dtype=torch.int64, device=place.device) for _ in range(16)]
        torch.cuda.synchronize()
        place.barrier()

    def call(self, number, slot):
        """Call ``number`` of all, on the current stream, which counts its wrong elements in ``slot``."""
        x, want = self.data[SIZES[number % len(SIZES)]][number // len(SIZES) % KINDS]
        self.check(self.comm.all_reduce(x), want, slot)

    def check(self, result, want, slot):
        self.wrong[slot].add_((result.view(torch.int16) != want.view(torch.int16)).sum())

    @contextmanager
    def judged(self, what):
        """The body's calls complete, and are right."""
        yield
        torch.cuda.synchronize()
        self.comm.check()
        wrong = sum(int(count) for count in self.wrong)
        assert not wrong, f"rank {self.place.rank}, {what}: {wrong} wrong elements"
        self.place.barrier()


def in_turn(traffic, streams):
    """One thread, streams in turn."""
    for number in range(ALL_CALLS):
        slot = number % len(streams)
        with torch.cuda.stream(streams[slot]):
            traffic.call(number, slot)


def captured_between(traffic, streams):
    """Between eager calls on two streams, calls on a third one and a branch of it are captured, and replayed."""
    third, branch = (torch.cuda.Stream(traffic.place.device) for _ in range(2))
    x, want = traffic.data[SIZES[0]][0]
    graphs = []
    for number in range(ALL_CALLS):
        if number % CAPTURE_EVERY == 10:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=third):
                branch.wait_stream(third)
                results = []
                for stream in (third, branch, third):
                    with torch.cuda.stream(stream):
                        results.append(traffic.comm.all_reduce(x))
                third.wait_stream(branch)
            graphs.append((graph, results))
        slot = number % 2
        with torch.cuda.stream(streams[slot]):
            traffic.call(number, slot)
        if graphs and number % 100 == 50:
            # Who replays a graph beside eager calls orders them: that is all it takes.
            for stream in streams:
                third.wait_stream(stream)
            graph, results = graphs[-1]
            with torch.cuda.stream(third):
                graph.replay()
                for result in results:
                    traffic.check(result, want, 2)
            for stream in streams:
                stream.wait_stream(third)
    torch.cuda.synchronize()
    graphs.clear()


def by_threads(traffic, streams):
    """A thread for each stream; they take turns in the same order on all ranks."""
    turn, errors, condition = itertools.count(), [], threading.Condition()
    state = [next(turn)]

    def run(me):
        try:
            torch.cuda.set_device(traffic.place.device)
            with torch.cuda.stream(streams[me]):
                while True:
                    with condition:
                        condition.wait_for(lambda: state[0] % len(streams) == me or errors or state[0] >= ALL_CALLS, 60)
                        if errors or state[0] >= ALL_CALLS:
                            return
                        number = state[0]
                        traffic.call(number, me)
                        state[0] = next(turn)
                        condition.notify_all()
        except BaseException as e:
            errors.append(e)
            with condition:
                condition.notify_all()

    threads = [threading.Thread(target=run, args=(me,)) for me in range(len(streams))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    if errors:
        raise errors[0]
    assert state[0] == ALL_CALLS


def every_form(place, path):
    """All of the above: plain streams, priorities, the default stream, and the default streams of two threads."""
    device = place.device
    side = [torch.cuda.Stream(device) for _ in range(2)]
    least, most = torch.cuda.Stream.priority_range()
    priorities = [torch.cuda.Stream(device, priority=priority) for priority in (least, most)]
    default = torch.cuda.default_stream(device)
    per_thread = torch.cuda.ExternalStream(PER_THREAD, device)
    traffic = Traffic(place, path)
    for form, streams in (
        (in_turn, side),
        (in_turn, [*priorities, side[0]]),
        (in_turn, [default, side[0], per_thread]),
        (captured_between, side),
        (by_threads, side),
        (by_threads, [per_thread, per_thread]),
        (by_threads, [default, priorities[1]]),
    ):
        with traffic.judged(f"{form.__name__} on {len(streams)} streams, {path.value}"):
            form(traffic, streams)
    traffic.comm.close()
