"""Eager calls that come again are launched as graphs: which, when, with what; and that they end."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from helpers.fake_driver import FakeDriver, capture_info
from helpers.fake_launch import FakeLaunch

from allreduce_jit.abi import Args
from allreduce_jit.engine import driver, nvlink, prepared, streams, verify
from allreduce_jit.engine import graph_cache as replay
from allreduce_jit.engine.base import EngineConfig
from allreduce_jit.engine.graph_cache import FEWEST, LARGEST, LONGS, MOST, SHORTS, repeats_as_graph
from allreduce_jit.engine.nvlink import NvlinkEngine
from allreduce_jit.errors import AllReduceError
from allreduce_jit.policy.catalogue import entry, nvlink_algorithms
from allreduce_jit.policy.operation import ALL_REDUCE, ITEMSIZE, all_reduce
from allreduce_jit.settings import Settings

X, OUT, ELSEWHERE = 1 << 40, 1 << 41, 1 << 42
ALL = SHORTS + LONGS
PLAIN = FakeLaunch("any", [Args()], 1, 32)


def what(launch, arguments):
    """The kernel, and from where to where."""
    (args,) = arguments
    return launch.kernel, args.numel, args.input, args.output


def log(first=0):
    """What the GPU would run, in order: launches, and what ``FakeGraph`` notes among them."""
    fired = FakeLaunch.fired[first:]
    return [one if isinstance(one, tuple) else ("kernel", *what(one, one.arguments), one.stream) for one in fired]


class FakeGraph:
    """As the driver has it: what the arguments held when it was aimed, and clusters that stay once a kernel had them."""

    alive = error = 0
    refuses = False

    def __init__(self, launches, stream):
        self.kernels, self.stream, self.what = len(launches), stream, None
        self.cluster = launches[0].cluster
        FakeGraph.alive += 1

    def update(self, launches):
        if self.refuses:
            raise AllReduceError("graph update: not supported")
        assert 1 <= len(launches) <= self.kernels and (len(launches) == 1) == (self.kernels == 1)
        assert {launch.cluster for launch in launches} == {self.cluster}
        self.what = [what(launch, launch.held()) for launch in launches]
        FakeLaunch.fired.append(("aim",))

    def launch(self):
        FakeLaunch.fired += [("graph", *what, self.stream.value or 0) for what in self.what]
        return self.error

    def close(self):
        FakeGraph.alive -= 1


@pytest.fixture
def here(monkeypatch):
    """Rank 1 of 4, and its current stream."""
    monkeypatch.setattr(nvlink, "KernelLaunch", FakeLaunch)
    monkeypatch.setattr(replay, "Graph", FakeGraph)
    FakeLaunch.fired, FakeGraph.alive = [], 0
    one = NvlinkEngine(EngineConfig(1, 4, torch.device("cuda", 1), "sm_90", True, False, Settings(c_calls=False)))
    one.state = SimpleNamespace(channels=1 << 30, control=13, report=14, words=[0] * 16)
    one.memory = SimpleNamespace(addresses=[1000 * (rank + 1) for rank in range(4)])
    one._kernels = {e: e for a in nvlink_algorithms(4) for d in ITEMSIZE for w in (True, False) for e in [entry(a, d, 4, w)]}
    here = SimpleNamespace(engine=one, stream=0, capturing=False, asked=0, priority={})

    def capturing():
        here.asked += 1
        return here.capturing

    monkeypatch.setattr(prepared, "current_raw_stream", lambda device: here.stream)
    monkeypatch.setattr(prepared, "stream_is_capturing", capturing)
    FakeDriver(monkeypatch, streams, cuStreamGetCaptureInfo=lambda stream: capture_info(None),
               cuStreamGetPriority=lambda stream: here.priority.get(stream, 0))  # fmt: skip
    one._streams = streams.StreamOrder()
    one.families = list(ALL_REDUCE)
    one._graph_cache.make(PLAIN)
    assert FakeGraph.alive == ALL
    return here


def ran(here, numel=512, source=X, target=OUT, dtype=torch.bfloat16):
    """What one call ran."""
    before = len(FakeLaunch.fired)
    x, out = (SimpleNamespace(numel=lambda: numel, dtype=dtype, data_ptr=lambda at=at: at) for at in (source, target))
    here.engine.all_reduce(x, out)
    return log(before)


def kinds(found):
    return [kind for kind, *_ in found]


KERNEL, AIMED, AGAIN = ["kernel"], ["aim", "graph"], ["graph"]
FIRST = [KERNEL, AIMED, AGAIN]


def test_small_calls_that_come_again_are_graphs(here):
    found = [ran(here) for _ in range(4)]
    assert [kinds(f) for f in found] == [*FIRST, AGAIN]
    assert {f[-1][1:] for f in found} == {("one_shot_bf16_ws4", 512, X, OUT, 0)}
    # Anything else is another one, and all of them are known afterwards.
    others = [
        {"target": ELSEWHERE},
        {"source": ELSEWHERE},
        {"numel": 520},
        {"dtype": torch.float16},
        {"source": X + 2},
        {"target": X},
    ]
    for other in others:
        assert [kinds(ran(here, **other)) for _ in range(3)] == FIRST
    assert kinds(ran(here)) == AGAIN
    ((_, kernel, *addresses),) = ran(here, source=X + 2)
    assert (kernel, *addresses) == ("one_shot_bf16_ws4_ragged", 512, X + 2, OUT, 0)
    ((_, _, *values),) = ran(here, target=X)
    assert values == [512, X, X, 0]


@pytest.mark.parametrize(("nbytes", "found"), [(LARGEST, FIRST), (LARGEST + 16, [KERNEL] * 3)])
def test_calls_of_one_large_launch_are_kernels(here, nbytes, found):
    assert [kinds(ran(here, nbytes // 2)) for _ in range(3)] == found


def of_launches(here, *counts):
    """The numbers of bf16 elements that take so many launches."""
    found = {}
    for megabytes in range(16, 2000, 4):
        numel = megabytes << 19
        found.setdefault(len(here.engine.prepared(all_reduce("bfloat16", numel)).aligned), numel)
    return [found[count] for count in counts]


def test_calls_of_many_launches_are_graphs_of_all_of_them(here):
    counts = FEWEST + 1, FEWEST + 2, MOST - 1, MOST  # streams never take 3 i + 1
    for count, numel in zip(counts, of_launches(here, *counts)):
        first, second, third = (ran(here, numel) for _ in range(3))
        assert (
            kinds(first) == ["kernel"] * count and kinds(second) == ["aim", *kinds(third)] and kinds(third) == ["graph"] * count
        )
        assert [what[1:] for what in first] == [what[1:] for what in third] == [what[1:] for what in second[1:]]
        assert sum(what[2] for what in first) == numel
        # With other addresses it is another call, and this one is what it was.
        other = [ran(here, numel, target=ELSEWHERE) for _ in range(3)][-1]
        assert kinds(other) == kinds(third) and {what[4] - ELSEWHERE for what in other} == {what[4] - OUT for what in third}
        assert ran(here, numel) == third
        assert [kinds(ran(here, numel, source=X + 2)) for _ in range(3)] == [kinds(f) for f in (first, second, third)]


def test_large_calls_take_turns_with_the_same_graphs(here):
    (numel,) = of_launches(here, MOST)
    as_kernels = [what[1:] for what in ran(here, numel)]
    small = [ran(here) for _ in range(3)][-1]
    for turn in range(2):
        for i in range(LONGS + 2):
            found = [ran(here, numel, source=X + 16 * i, target=ELSEWHERE) for _ in range(3)]
            assert [calls[0][0] for calls in found] == ["kernel", "aim", "graph"]
            for calls in found:
                launched = [what[1:] for what in calls if what != ("aim",)]
                assert launched == [(k, n, x + 16 * i, out - OUT + ELSEWHERE, s) for k, n, x, out, s in as_kernels]
            assert len(here.engine._graph_cache.ready) == 1 + (LONGS if turn else min(i + 1, LONGS))
    assert FakeGraph.alive == ALL and ran(here) == small  # which have graphs of their own


def test_which_calls_are_replayed(here):
    assert repeats_as_graph(1, LARGEST) and not repeats_as_graph(1, LARGEST + 1) and not repeats_as_graph(2, 100)
    assert not repeats_as_graph(FEWEST - 1, 1 << 27) and repeats_as_graph(FEWEST, 1 << 27)
    assert repeats_as_graph(MOST, 1 << 30) and not repeats_as_graph(MOST + 1, 1 << 30)
    for count, numel in zip((2, FEWEST - 1, MOST + 2), of_launches(here, 2, FEWEST - 1, MOST + 2)):
        assert [kinds(ran(here, numel)) for _ in range(3)] == [["kernel"] * count] * 3


def test_a_large_call_that_cannot_be_launched_is_told(here, monkeypatch):
    (numel,) = of_launches(here, MOST)
    for _ in range(3):
        ran(here, numel)
    monkeypatch.setattr(driver, "describe", lambda error: f"error {int(error)}")
    monkeypatch.setattr(FakeGraph, "error", 700)
    with pytest.raises(AllReduceError, match="graph launch: error 700"):
        ran(here, numel)


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
    assert streams == [0, 7, 7, 9, 0, 7] and kinds(log()) == ["kernel", "aim"] + ["graph"] * 5


def test_streams_of_a_priority_keep_it(here):
    """The kernels of a graph have that of their node."""
    here.priority = {9: -5}
    for here.stream, kind in (
        (9, KERNEL),
        (9, KERNEL),
        (7, KERNEL),
        (7, AIMED),
        (9, KERNEL),
        (7, AGAIN),
        (0, AGAIN),
        (9, KERNEL),
    ):
        assert kinds(ran(here)) == kind


def test_a_stopped_communicator_replays_nothing(here):
    assert [kinds(ran(here)) for _ in range(3)] == FIRST
    here.engine._refuse = lambda: 1 / 0
    for stop in (lambda: here.engine.state.words.__setitem__(0, 5), lambda: setattr(here.engine, "_stopped", True)):
        stop()
        with pytest.raises(ZeroDivisionError):
            ran(here)
        here.engine.state.words[0] = 0
    assert len(log()) == sum(map(len, FIRST))


def test_ever_new_calls_take_turns_with_the_same_graphs(here):
    """What a graph was aimed at before is not found there any more."""
    for turn in range(2):
        for i in range(SHORTS + 1):
            found = [ran(here, source=X + 16 * i) for _ in range(3)]
            assert [kinds(f) for f in found] == FIRST and {f[-1][3] for f in found} == {X + 16 * i}
            assert len(here.engine._graph_cache.ready) == (SHORTS if turn else min(i + 1, SHORTS))
    assert [kinds(ran(here, source=X + 16 * i)) for i in range(1, SHORTS + 1)] == [AGAIN] * SHORTS
    assert FakeGraph.alive == ALL
    for i in range(3 * SHORTS):  # addresses that do not come again take nobody's
        assert kinds(ran(here, target=ELSEWHERE + 16 * i)) == KERNEL and len(here.engine._graph_cache._seen) <= SHORTS
    assert [kinds(ran(here, source=X + 16 * i)) for i in range(1, SHORTS + 1)] == [AGAIN] * SHORTS
    del here.engine.memory, here.engine.state
    here.engine.close()
    assert FakeGraph.alive == 0


class Prepared:
    """Of launches in clusters of ``cluster`` blocks."""

    def __init__(self, cluster, launches=1):
        self.launches = [FakeLaunch(f"cluster {cluster}", [Args()], 8, 64, cluster=cluster) for _ in range(launches)]

    def bind(self, addresses):
        return [(launch,) for launch in self.launches]


def test_kernels_with_clusters_have_graphs_of_their_own(here):
    """A graph that was updated to a kernel with clusters would run any other in such clusters, its guard in each of their blocks."""
    cache, sizes = here.engine._graph_cache, (1, 4, 8)
    prepared = {cluster: Prepared(cluster) for cluster in sizes}
    assert [cache.assign((prepared[4], -1)) for _ in range(3)] == [None] * 3
    for cluster in sizes:
        cache.make(prepared[cluster].launches[0])
    assert FakeGraph.alive == 3 * SHORTS + LONGS
    for i in range(SHORTS + 5):  # the fake refuses a graph of other clusters
        for cluster in sizes:
            call = prepared[cluster], i
            assert cache.assign(call) is None
            assert cache.assign(call) is cache.ready[call] and cache.ready[call].cluster == cluster
    assert len(cache.ready) == 3 * SHORTS
    several = Prepared(4, FEWEST), 0
    assert cache.assign(several) is None and cache.assign(several) is None and several not in cache.ready
    cache.close()
    assert FakeGraph.alive == 0


def test_many_calls_in_turn_do_not_take_the_graphs_from_each_other(here):
    first = [[kinds(ran(here, source=X + 16 * i)) for i in range(SHORTS)] for _ in range(3)]
    assert first == [[kind] * SHORTS for kind in FIRST]
    for _ in range(5):
        assert [kinds(ran(here, source=X + 16 * i)) for i in range(3 * SHORTS)] == [AGAIN] * SHORTS + [KERNEL] * 2 * SHORTS


@pytest.mark.parametrize("most", [3, SHORTS + 3])
def test_where_graphs_cannot_be_made_calls_are_kernels(here, monkeypatch, caplog, most):
    made = []

    def make(launches, stream):
        if len(made) == most:
            raise AllReduceError("cuGraphInstantiate: out of memory")
        made.append(FakeGraph(launches, stream))
        return made[-1]

    here.engine._graph_cache.close()
    here.engine._graph_cache = replay.GraphCache()
    monkeypatch.setattr(replay, "Graph", make)
    here.engine._graph_cache.make(PLAIN)
    here.engine._graph_cache.make(PLAIN)  # once is enough
    assert len(made) == most and not FakeGraph.alive
    assert [kinds(ran(here)) for _ in range(3)] == [KERNEL] * 3
    (record,) = caplog.records
    assert record.getMessage().endswith("takes longer: cuGraphInstantiate: out of memory")


@pytest.mark.parametrize("can", [True, False], ids=["graphs", "no graphs"])
def test_what_verification_launches(here, monkeypatch, caplog, can):
    """Both forms of every kernel; then a call of several launches and a small one, as callers have them: all of it twice."""
    one, made = here.engine, []

    def make(launches, stream):
        made.append(len(launches))
        if not can:
            raise AllReduceError("cuGraphInstantiate: out of memory")
        return FakeGraph(launches, stream)

    one._graph_cache.close()
    one._graph_cache = replay.GraphCache()
    one.config = replace(one.config, device=torch.device("cpu"))
    one.state.set_deadlines = lambda usual, first: None
    monkeypatch.setattr(replay, "Graph", make)
    monkeypatch.setattr(one, "check", lambda: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(verify, "_streams", lambda engine: None)
    monkeypatch.setattr(verify, "_slots", lambda engine: None)
    monkeypatch.setattr(verify.reference, "compare", lambda got, want: SimpleNamespace(wrong=0))  # nothing was summed
    one.verify()
    assert made == ([1] * SHORTS + [MOST] * LONGS if can else [1]) and len(caplog.records) == (not can)
    for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        whole = verify.VERIFY_BYTES // dtype.itemsize
        mine = [(kind, *what) for kind, *what in log() if what and f"_{name}_" in what[0]]
        forms = {f"{a}_{name}_ws4{form}" for a in ("one_shot", "two_shot", "two_shot_stream") for form in ("", "_ragged")}
        assert {what[1] for what in mine if what[0] == "kernel"} == forms
        several = [what for what in mine if what[2] == whole // verify.LAUNCHES]
        assert len(several) == 2 * 3 * verify.LAUNCHES and {what[1] for what in several} == {f"two_shot_stream_{name}_ws4"}
        small = [what for what in mine if what[1] == f"one_shot_{name}_ws4" and what[2] == whole]
        assert len(small) == 2 * (1 + 3)  # the kernel by itself, and the call three times
        for what in several, small:
            assert any(kind == "graph" for kind, *_ in what) is can


def test_a_graph_that_cannot_be_aimed_loses_no_call(here, monkeypatch, caplog):
    assert [kinds(ran(here)) for _ in range(3)] == FIRST
    monkeypatch.setattr(FakeGraph, "refuses", True)
    assert kinds(ran(here)) == AGAIN
    assert [ran(here, 520) for _ in range(3)] == [[("kernel", "one_shot_bf16_ws4", 520, X, OUT, 0)]] * 3
    assert kinds(ran(here)) == KERNEL and not FakeGraph.alive and len(caplog.records) == 1


def test_a_graph_that_cannot_be_launched_is_told(here, monkeypatch):
    assert [kinds(ran(here)) for _ in range(3)] == FIRST
    monkeypatch.setattr(driver, "describe", lambda error: f"error {int(error)}")
    monkeypatch.setattr(FakeGraph, "error", 700)
    with pytest.raises(AllReduceError, match="graph launch: error 700"):
        ran(here)
    monkeypatch.setattr(FakeGraph, "error", 0)
    assert kinds(ran(here)) == AGAIN


def test_a_graph_is_what_the_arguments_held_when_it_was_aimed(monkeypatch):
    modes = driver.driver.CUstreamCaptureMode
    log, here = [], SimpleNamespace(mode=modes.CU_STREAM_CAPTURE_MODE_GLOBAL, fails=None, node=98)

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
        ctypes.c_void_p.from_address(node).value = here.node = here.node + 1
        log.append(("add", graph, *of_node(parameters)))
        return int(here.fails == "add")

    def link(graph, before, after, edge, count):
        assert count == 1 and here.mode is modes.CU_STREAM_CAPTURE_MODE_RELAXED
        ends = (ctypes.c_void_p.from_address(end).value for end in (before, after))
        log.append(("link", graph, *ends, edge and ctypes.string_at(edge, 8)))
        return int(here.fails == "link")

    def aim(graph, node, parameters):
        log.append(("aim", graph, node, *of_node(parameters)))
        return int(here.fails == "aim")

    def enable(graph, node, whether):
        log.append(("enable", graph, node, whether))
        return int(here.fails == "enable")

    def launch(graph, stream):
        log.append(("launch", graph, stream))
        return int(here.fails == "launch")

    entries, kept = {"cuLaunchKernelEx": lambda *arguments: 0}, []
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    for name, function, types in (
        ("cuGraphAddKernelNode_v2", add, (pointer, pointer, pointer, size, pointer)),
        ("cuGraphAddDependencies_v2", link, (pointer, pointer, pointer, pointer, size)),
        ("cuGraphExecKernelNodeSetParams_v2", aim, (pointer, pointer, pointer)),
        ("cuGraphNodeSetEnabled", enable, (pointer, pointer, ctypes.c_uint)),
        ("cuGraphLaunch", launch, (pointer, pointer)),
    ):  # as the driver's own: addresses, of which ctypes knows no more
        kept.append(ctypes.CFUNCTYPE(ctypes.c_int, *types)(function))
        entries[name] = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.cast(kept[-1], pointer).value)
    monkeypatch.setattr(driver, "call", call)
    monkeypatch.setattr(driver, "_entry", entries.get)
    monkeypatch.setattr(driver, "describe", lambda error: f"error {int(error)}")
    args, others, stream = Args(input=1 << 47, output=5, numel=9), Args(input=6, output=1 << 46, numel=8), pointer()
    first = driver.KernelLaunch(driver.driver.CUfunction(1 << 46), [args], 17, 64, pdl=True)
    second = driver.KernelLaunch(driver.driver.CUfunction(3 << 45), [others], 3, 32, shared_bytes=1024)
    graph = driver.Graph([first], stream)
    as_first = 1 << 46, [17, 1, 1, 64, 1, 1], 0, (1 << 47, 5, 9)
    assert log == [("cuGraphCreate", 0), ("add", 77, *as_first), ("cuGraphInstantiate", 77, 0)]
    assert here.mode is modes.CU_STREAM_CAPTURE_MODE_GLOBAL
    log.clear()
    graph.update([second])
    assert graph.launch() == 0
    stream.value, args.input = 7 << 40, 1 << 44
    graph.update([first])
    assert graph.launch() == 0
    assert log == [
        ("aim", 1 << 45, 99, 3 << 45, [3, 1, 1, 32, 1, 1], 1024, (6, 1 << 46, 8)),
        ("launch", 1 << 45, None),
        ("aim", 1 << 45, 99, 1 << 46, [17, 1, 1, 64, 1, 1], 0, (1 << 44, 5, 9)),
        ("launch", 1 << 45, 7 << 40),
    ]
    here.fails = "aim"
    with pytest.raises(AllReduceError, match="graph update: error 1"):
        graph.update([first])
    here.fails = "launch"
    assert graph.launch() == 1
    log.clear()
    graph.close()
    assert log == [("cuGraphExecDestroy", 1 << 45), ("cuGraphDestroy", 77)]
    here.fails = None
    # Three in a row: who is a dependent launch may start early (cuda.h: port 1 of a kernel, type 1), others may not.
    here.node = 98
    log.clear()
    row = driver.Graph([second, first, second], stream)
    assert [entry[2:] for entry in log if entry[0] == "link"] == [(99, 100, b"\1\0\1" + bytes(5)), (100, 101, None)]
    # Those that are not needed are left out, until they are.
    aimed = ("aim", 99, 1 << 46), ("aim", 100, 3 << 45), ("aim", 101, 1 << 46)
    for launches, changed in ((3, ()), (1, ((100, 0), (101, 0))), (2, ((100, 1),)), (3, ((101, 1),))):
        log.clear()
        row.update([first, second, first][:launches])
        found = [(entry[0], *entry[2:4]) for entry in log]
        assert found == [*(("enable", *change) for change in changed), *aimed[:launches]]
    with pytest.raises(ValueError):  # no launch of a call is ever lost
        row.update([first] * 4)
    here.fails = "enable"
    with pytest.raises(AllReduceError, match="graph update: error 1"):
        row.update([first])
    for here.fails in ("cuGraphInstantiate", "add", "link"):  # nothing is left behind
        with pytest.raises(AllReduceError):
            driver.Graph([first, second], stream)
        assert log[-1] == ("cuGraphDestroy", 77) and here.mode is modes.CU_STREAM_CAPTURE_MODE_GLOBAL


def test_a_driver_without_an_entry_is_told(monkeypatch):
    driver._entry.cache_clear()
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: object())
    with pytest.raises(AllReduceError, match="cuGraphAddDependencies_v2: this driver is too old"):
        driver._entry("cuGraphAddDependencies_v2")
