"""Small eager calls are launched as graphs: which, when, with what; and that they end."""

from __future__ import annotations

import ctypes
import struct
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from allreduce_jit import driver, replay, v2
from allreduce_jit import engine as engines
from allreduce_jit.engine import EngineConfig
from allreduce_jit.errors import AllReduceError
from allreduce_jit.kernel import ITEMSIZE, entry, v2_algorithms
from allreduce_jit.replay import GRAPHS, LARGEST
from allreduce_jit.settings import Settings
from allreduce_jit.v2 import Args, V2Engine

X, OUT, ELSEWHERE = 1 << 40, 1 << 41, 1 << 42


class FakeLaunch:
    """Notes what the GPU would run: the kernel, from where to where, on which stream."""

    log: list[tuple] = []

    def __init__(self, kernel, arguments, grid, block, pdl):
        (self.args,), self.kernel = arguments, kernel

    def what(self):
        return self.kernel, self.args.numel, self.args.input, self.args.output

    def __call__(self, stream):
        self.log.append(("kernel", *self.what(), stream))


class FakeGraph:
    """As the driver has it: what the arguments held when it was aimed."""

    alive = 0
    refuses = False

    def __init__(self, launch, stream):
        self.stream, self.what = stream, None
        FakeGraph.alive += 1

    def aim(self, launch):
        if self.refuses:
            raise AllReduceError("graph update: not supported")
        self.what = launch.what()
        FakeLaunch.log.append(("aim",))

    def __call__(self):
        FakeLaunch.log.append(("graph", *self.what, self.stream.value or 0))

    def close(self):
        FakeGraph.alive -= 1


@pytest.fixture
def here(monkeypatch):
    """Rank 1 of 4, and its current stream."""
    monkeypatch.setattr(v2, "Launch", FakeLaunch)
    monkeypatch.setattr(replay, "Graph", FakeGraph)
    FakeLaunch.log, FakeGraph.alive = [], 0
    one = V2Engine(EngineConfig(1, 4, torch.device("cuda", 1), "sm_90", True, False, Settings()))
    one.state = SimpleNamespace(channels=1 << 30, control=13, report=14, words=[0] * 16)
    one.memory = SimpleNamespace(addresses=[1000 * (rank + 1) for rank in range(4)])
    one._kernels = {e: e for a in v2_algorithms(4) for d in ITEMSIZE for w in (True, False) for e in [entry(a, d, 4, w)]}
    here = SimpleNamespace(engine=one, stream=0, capturing=False, asked=0, priority={})

    def capturing():
        here.asked += 1
        return here.capturing

    monkeypatch.setattr(engines, "_current_stream", lambda device: here.stream)
    monkeypatch.setattr(engines, "_capturing", capturing)
    answers = {"cuStreamGetCaptureInfo": lambda stream: (0, 0), "cuStreamGetPriority": lambda stream: here.priority.get(stream, 0)}
    monkeypatch.setattr(engines, "call", lambda name, *args: answers.get(name, lambda *args: None)(*args))
    one._replays.make(None)
    return here


def ran(here, numel=512, source=X, target=OUT, dtype=torch.bfloat16):
    """What one call ran."""
    before = len(FakeLaunch.log)
    x, out = (SimpleNamespace(numel=lambda: numel, dtype=dtype, data_ptr=lambda at=at: at) for at in (source, target))
    here.engine.all_reduce(x, out)
    return FakeLaunch.log[before:]


def kinds(found):
    return [kind for kind, *_ in found]


KERNEL, AIMED, AGAIN = ["kernel"], ["aim", "graph"], ["graph"]
FIRST = [KERNEL, AIMED, AGAIN]


def test_small_calls_that_come_again_are_graphs(here):
    found = [ran(here) for _ in range(4)]
    assert [kinds(f) for f in found] == [*FIRST, AGAIN]
    assert {f[-1][1:] for f in found} == {("one_shot_bf16_ws4", 512, X, OUT, 0)}
    # Anything else is another one, and all of them are known afterwards.
    others = [{"target": ELSEWHERE}, {"source": ELSEWHERE}, {"numel": 520}, {"dtype": torch.float16}, {"source": X + 2}, {"target": X}]
    for other in others:
        assert [kinds(ran(here, **other)) for _ in range(3)] == FIRST
    assert kinds(ran(here)) == AGAIN
    ((_, kernel, *addresses),) = ran(here, source=X + 2)
    assert (kernel, *addresses) == ("one_shot_bf16_ws4_ragged", 512, X + 2, OUT, 0)
    ((_, _, *values),) = ran(here, target=X)
    assert values == [512, X, X, 0]


@pytest.mark.parametrize(("nbytes", "found"), [(LARGEST, FIRST), (LARGEST + 16, [KERNEL] * 3)])
def test_large_calls_are_kernels(here, nbytes, found):
    assert [kinds(ran(here, nbytes // 2)) for _ in range(3)] == found


def test_calls_of_several_launches_are_kernels(here, monkeypatch):
    monkeypatch.setattr(engines, "LARGEST", 1 << 30)
    for _ in range(3):
        found = ran(here, 32 << 20)
        assert len(found) > 1 and set(kinds(found)) == {"kernel"}


def test_a_capture_takes_kernels(here):
    here.stream, here.capturing = 7, True
    assert [kinds(ran(here)) for _ in range(3)] == [KERNEL] * 3
    here.capturing = False
    assert [kinds(ran(here)) for _ in range(3)] == FIRST
    here.capturing = True
    assert ran(here) == [("kernel", "one_shot_bf16_ws4", 512, X, OUT, 7)]
    # The default stream cannot be captured: nobody asks.
    here.stream, here.asked = 0, 0
    assert kinds(ran(here)) == AGAIN and not here.asked


def test_graphs_are_launched_on_the_current_stream(here):
    streams = [ran(here)[-1][-1] for here.stream in (0, 7, 7, 9, 0, 7)]
    assert streams == [0, 7, 7, 9, 0, 7] and kinds(FakeLaunch.log) == ["kernel", "aim"] + ["graph"] * 5


def test_streams_of_a_priority_keep_it(here):
    """The kernels of a graph have that of their node."""
    here.priority = {9: -5}
    for here.stream, kind in ((9, KERNEL), (9, KERNEL), (7, KERNEL), (7, AIMED), (9, KERNEL), (7, AGAIN), (0, AGAIN), (9, KERNEL)):
        assert kinds(ran(here)) == kind


def test_a_stopped_communicator_replays_nothing(here):
    assert [kinds(ran(here)) for _ in range(3)] == FIRST
    here.engine._refuse = lambda: 1 / 0
    for stop in (lambda: here.engine.state.words.__setitem__(0, 5), lambda: setattr(here.engine, "_stopped", True)):
        stop()
        with pytest.raises(ZeroDivisionError):
            ran(here)
        here.engine.state.words[0] = 0
    assert len(FakeLaunch.log) == sum(map(len, FIRST))


def test_ever_new_calls_take_turns_with_the_same_graphs(here):
    """What a graph was aimed at before is not found there any more."""
    for turn in range(2):
        for i in range(GRAPHS + 1):
            found = [ran(here, source=X + 16 * i) for _ in range(3)]
            assert [kinds(f) for f in found] == FIRST and {f[-1][3] for f in found} == {X + 16 * i}
            assert len(here.engine._replays.ready) == (GRAPHS if turn else min(i + 1, GRAPHS))
    assert [kinds(ran(here, source=X + 16 * i)) for i in range(1, GRAPHS + 1)] == [AGAIN] * GRAPHS
    assert FakeGraph.alive == GRAPHS
    for i in range(3 * GRAPHS):  # addresses that do not come again take nobody's
        assert kinds(ran(here, target=ELSEWHERE + 16 * i)) == KERNEL and len(here.engine._replays._seen) <= GRAPHS
    assert [kinds(ran(here, source=X + 16 * i)) for i in range(1, GRAPHS + 1)] == [AGAIN] * GRAPHS
    here.engine.memory = here.engine.state = None
    here.engine.close()
    assert FakeGraph.alive == 0


def test_many_calls_in_turn_do_not_take_the_graphs_from_each_other(here):
    first = [[kinds(ran(here, source=X + 16 * i)) for i in range(GRAPHS)] for _ in range(3)]
    assert first == [[kind] * GRAPHS for kind in FIRST]
    for _ in range(5):
        assert [kinds(ran(here, source=X + 16 * i)) for i in range(3 * GRAPHS)] == [AGAIN] * GRAPHS + [KERNEL] * 2 * GRAPHS


def test_where_graphs_cannot_be_made_calls_are_kernels(here, monkeypatch, caplog):
    made = []

    def make(launch, stream):
        if len(made) == 3:
            raise AllReduceError("cuGraphInstantiate: out of memory")
        made.append(FakeGraph(launch, stream))
        return made[-1]

    here.engine._replays.close()
    monkeypatch.setattr(replay, "Graph", make)
    here.engine._replays.make(None)
    assert len(made) == 3 and not FakeGraph.alive
    assert [kinds(ran(here)) for _ in range(3)] == [KERNEL] * 3
    (record,) = caplog.records
    assert record.getMessage().endswith("takes the host longer: cuGraphInstantiate: out of memory")


def test_a_graph_that_cannot_be_aimed_loses_no_call(here, monkeypatch, caplog):
    assert [kinds(ran(here)) for _ in range(3)] == FIRST
    monkeypatch.setattr(FakeGraph, "refuses", True)
    assert kinds(ran(here)) == AGAIN
    assert [ran(here, 520) for _ in range(3)] == [[("kernel", "one_shot_bf16_ws4", 520, X, OUT, 0)]] * 3
    assert kinds(ran(here)) == KERNEL and not FakeGraph.alive and len(caplog.records) == 1


def test_a_graph_is_what_the_arguments_held_when_it_was_aimed(monkeypatch):
    modes = driver.driver.CUstreamCaptureMode
    log, here = [], SimpleNamespace(mode=modes.CU_STREAM_CAPTURE_MODE_GLOBAL, fails=None)

    def call(name, *args):
        if name == "cuThreadExchangeStreamCaptureMode":
            here.mode, before = args[0], here.mode
            return before
        assert here.mode is modes.CU_STREAM_CAPTURE_MODE_RELAXED  # else whoever captures beside this would be spoilt
        log.append((name, *args))
        if here.fails == name:
            raise AllReduceError(f"{name}: planted")
        return {"cuGraphCreate": 77, "cuGraphInstantiate": 1 << 45}.get(name)

    def of_node(node):
        """The parameters, read as the header of CUDA 12 and 13 lays them out."""
        kernel, *shape, shared, arguments, extra, library, context = struct.unpack("@P3I3IIPPPP", ctypes.string_at(node, 72))
        held = Args.from_buffer_copy(ctypes.string_at(ctypes.c_void_p.from_address(arguments).value, ctypes.sizeof(Args)))
        assert not (extra or library or context)
        return kernel, shape, shared, (held.input, held.output, held.numel)

    def add(node, graph, after, count, parameters):
        assert not after and not count and here.mode is modes.CU_STREAM_CAPTURE_MODE_RELAXED
        ctypes.c_void_p.from_address(node).value = 99
        log.append(("add", graph, *of_node(parameters)))
        return int(here.fails == "add")

    def aim(graph, node, parameters):
        log.append(("aim", graph, node, *of_node(parameters)))
        return int(here.fails == "aim")

    def launch(graph, stream):
        log.append(("launch", graph, stream))
        return int(here.fails == "launch")

    entries, kept = {"cuLaunchKernelEx": lambda *arguments: 0}, []
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, function, types in (
        ("cuGraphAddKernelNode_v2", add, (pointer, pointer, pointer, size, pointer)),
        ("cuGraphExecKernelNodeSetParams_v2", aim, (pointer, pointer, pointer)),
        ("cuGraphLaunch", launch, (pointer, pointer)),
    ):  # as the driver's own: addresses, of which ctypes knows no more
        kept.append(ctypes.CFUNCTYPE(ctypes.c_int, *types)(function))
        entries[name] = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.cast(kept[-1], pointer).value)
    monkeypatch.setattr(driver, "call", call)
    monkeypatch.setattr(driver, "_entry", entries.get)
    monkeypatch.setattr(driver, "describe", lambda error: f"error {int(error)}")
    args, others, stream = Args(input=1 << 47, output=5, numel=9), Args(input=6, output=1 << 46, numel=8), pointer()
    first = driver.Launch(driver.driver.CUfunction(1 << 46), [args], 17, 64, pdl=True)
    second = driver.Launch(driver.driver.CUfunction(3 << 45), [others], 3, 32, shared_bytes=1024)
    graph = driver.Graph(first, stream)
    assert log == [("cuGraphCreate", 0), ("add", 77, 1 << 46, [17, 1, 1, 64, 1, 1], 0, (1 << 47, 5, 9)), ("cuGraphInstantiate", 77, 0)]
    assert here.mode is modes.CU_STREAM_CAPTURE_MODE_GLOBAL
    log.clear()
    graph.aim(second)
    graph()
    stream.value, args.input = 7 << 40, 1 << 44
    graph.aim(first)
    graph()
    assert log == [
        ("aim", 1 << 45, 99, 3 << 45, [3, 1, 1, 32, 1, 1], 1024, (6, 1 << 46, 8)),
        ("launch", 1 << 45, None),
        ("aim", 1 << 45, 99, 1 << 46, [17, 1, 1, 64, 1, 1], 0, (1 << 44, 5, 9)),
        ("launch", 1 << 45, 7 << 40),
    ]
    for here.fails, do, words in (("aim", lambda: graph.aim(first), "graph update: error 1"), ("launch", graph, "graph launch: error 1")):
        with pytest.raises(AllReduceError, match=words):
            do()
    log.clear()
    graph.close()
    assert log == [("cuGraphExecDestroy", 1 << 45), ("cuGraphDestroy", 77)]
    for here.fails in ("cuGraphInstantiate", "add"):  # nothing is left behind
        with pytest.raises(AllReduceError):
            driver.Graph(first, stream)
        assert log[-1] == ("cuGraphDestroy", 77) and here.mode is modes.CU_STREAM_CAPTURE_MODE_GLOBAL
