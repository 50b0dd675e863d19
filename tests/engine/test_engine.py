"""The engines as far as they go without a GPU: shared compilation, argument blocks, launches, failures."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from helpers.cubins import needs_nvrtc, needs_triton
from helpers.fake_driver import FakeDriver, capture_info
from helpers.fake_launch import FakeLaunch

from allreduce_jit import abi
from allreduce_jit.abi import MAX_SHAPES
from allreduce_jit.engine import base as engines
from allreduce_jit.engine import prepared, streams
from allreduce_jit.engine.base import EngineConfig, KernelEngine
from allreduce_jit.engine.failure import SIGNATURES, SIGNATURES_AT, SIGNED, Kind, abort_code, tag
from allreduce_jit.errors import AllReduceError, CallMismatchError, InputError, PeerLostError, PeerTimeoutError, PoisonedError
from allreduce_jit.jit import compiler
from allreduce_jit.jit.cache import Artifact, KernelCache
from allreduce_jit.policy.catalogue import P2P_ALGORITHMS, entry, nvlink_algorithms, nvlink_modules, p2p_modules
from allreduce_jit.policy.norm import Norm, signed
from allreduce_jit.policy.operation import ALL_REDUCE, DTYPES
from allreduce_jit.policy.operation import all_reduce as all_reduce_spec
from allreduce_jit.policy.plan import HEADER_BYTES, Layout, Plan
from allreduce_jit.settings import Settings

BASES = [1 << 32, 2 << 32, 3 << 32]


class FakeModule:
    loaded: list[bytes] = []

    def __init__(self, cubin):
        assert cubin.startswith(b"\x7fELF")
        FakeModule.loaded.append(cubin)

    def kernel(self, name):
        return f"kernel {name}"


def config(rank, world_size, **changes):
    return EngineConfig(rank, world_size, torch.device("cuda", rank), "sm_90", True, False, Settings(), **changes)


def built(cls, world_size, monkeypatch, **changes):
    """The engines of all ranks after loading what all ranks compiled."""
    monkeypatch.setattr(engines, "load_module", FakeModule)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    FakeModule.loaded = []
    ranks = [cls(config(rank, world_size, **changes)) for rank in range(world_size)]
    cache = KernelCache(None)
    shares = [one.compile(cache) for one in ranks]
    count = len(ranks[0]._modules(ALL_REDUCE))
    assert sum(one.compiled for one in ranks) == sum(map(len, shares)) == count  # each module once
    for one in ranks:
        one.load(shares)
    assert len(FakeModule.loaded) == count * world_size
    assert len(set(FakeModule.loaded)) == count  # every rank runs the same machine code
    return ranks


@needs_nvrtc
@pytest.mark.parametrize("max_ctas", [None, 8])
def test_v2_ranks_share_the_work(monkeypatch, max_ctas):
    from allreduce_jit.engine.nvlink import NvlinkEngine

    for one in built(NvlinkEngine, 3, monkeypatch, max_ctas=max_ctas):
        algorithms = nvlink_algorithms(3, few_sms=max_ctas is not None)
        names = {entry(algorithm, dtype, 3, whole) for algorithm in algorithms for dtype in DTYPES for whole in (True, False)}
        assert one._kernels == {name: f"kernel {name}" for name in names}
        assert set(one.layout.regions) == set(algorithms)


@needs_triton
def test_legacy_ranks_share_the_work(monkeypatch):
    """With a stand-in of the compiler, which takes a second for each kernel: ``test_compile.py`` compiles them all."""
    from allreduce_jit.engine.p2p import P2PEngine

    monkeypatch.setattr(
        compiler, "_triton", lambda spec, arch: Artifact(spec.name, arch, 128, 0, b"\x7fELF" + spec.name.encode())
    )
    for one in built(P2PEngine, 2, monkeypatch):
        assert one._modules(ALL_REDUCE) == p2p_modules(2) and not one._missing(ALL_REDUCE) and not one.families
        kinds = {(f"legacy_{a}", dtype, vector) for a in P2P_ALGORITHMS for dtype in DTYPES for vector in (True, False)}
        assert set(one._kernels) == kinds


# -- launches


@pytest.fixture
def current(monkeypatch):
    """The stream that is current on this rank's device."""
    current = SimpleNamespace(stream=77, capturing=False)
    monkeypatch.setattr(prepared, "current_raw_stream", lambda device: current.stream)
    monkeypatch.setattr(prepared, "stream_is_capturing", lambda: current.capturing)
    return current


def bound(cls, module, monkeypatch, deterministic=False):
    """The engine of rank 1 of 3, its kernels and memory made up, ready to launch."""
    monkeypatch.setattr(module, "KernelLaunch", FakeLaunch)
    one = cls(replace(config(1, 3), deterministic=deterministic))
    FakeDriver(monkeypatch, streams)
    one._streams = streams.StreamOrder()
    one.state = SimpleNamespace(channels=1 << 30, control=13, report=14, table=15, words=[0] * 16)
    one.memory = SimpleNamespace(addresses=BASES)
    return one


class Tensor(SimpleNamespace):
    """As much of a tensor as a launch looks at."""

    def numel(self):
        return self.size

    def data_ptr(self):
        return self.address


X, OUT = 1 << 40, 1 << 41


def fire(one, numel, dtype, source=X, target=OUT):
    FakeLaunch.fired = []
    one.all_reduce(Tensor(size=numel, dtype=dtype, address=source), Tensor(size=numel, dtype=dtype, address=target))
    assert {launch.stream for launch in FakeLaunch.fired} == {77}
    return FakeLaunch.fired


def test_v2_launches(monkeypatch, current):
    from allreduce_jit.engine import nvlink

    one = bound(nvlink.NvlinkEngine, nvlink, monkeypatch)
    one._kernels = {e: e for spec in nvlink_modules(3) for e in spec.entries}
    seen = set()
    for config, numel in enumerate((8, 100_000, 30_000_000), 1):
        for dtype in (torch.bfloat16, torch.float32)[: 1 if config > 1 else 2]:
            plan = one.plan(all_reduce_spec(str(dtype).removeprefix("torch."), numel))
            region = one.layout.regions[plan.algorithm]
            fired = fire(one, numel, dtype)
            args = [launch.arguments[0] for launch in fired]
            assert sum(a.numel for a in args) == numel and {a.total for a in args} == {numel}
            assert [a.launch for a in args] == list(range(len(args)))
            for launch, a in zip(fired, args, strict=True):
                done = sum(b.numel for b in args[: a.launch]) * dtype.itemsize
                assert (a.input, a.output) == (X + done, OUT + done)
                assert [*a.staging] == [*BASES, 0, 0, 0, 0, 0] and a.own == BASES[1] and a.slots == region.offset >= HEADER_BYTES
                assert (a.channels, a.control, a.report) == ((1 << 30) + 8 * region.first_channel, 13, 14)
                assert (a.rank, a.capacity, a.tag) == (1, region.capacity, tag(plan.algorithm, str(dtype)[6:]))
                assert launch.kernel == entry(plan.algorithm, str(dtype)[6:], 3, True) and launch.pdl
            seen.add(args[0].shape_id)
            assert args[-1].last and fire(one, numel, dtype) and len(one._prepared) == len(seen)  # nothing is prepared twice
            assert all(launch.kernel.endswith("_ragged") for launch in fire(one, numel, dtype, source=X + 4))
    assert seen == {1, 2, 3, 4}


def legacy_values(launch, algorithm):
    """The kernel's arguments by name."""
    from allreduce_jit.triton_kernels.p2p import signature

    names = [name for name, kind in signature(algorithm).items() if kind != "constexpr"]
    values = [argument.value for argument in launch.arguments]
    scratch = launch.arguments[len(names) :]
    assert [ctypes.sizeof(argument) for argument in scratch] == [8, 8] and not any(values[len(names) :])
    return dict(zip(names, values))


@pytest.mark.parametrize(("numel", "algorithm"), [(1000, "one_shot"), (1003, "one_shot"), (10_000_003, "two_shot")])
def test_legacy_launches(monkeypatch, current, numel, algorithm):
    pytest.importorskip("triton")
    from allreduce_jit.engine import p2p
    from allreduce_jit.policy.p2p import BLOCK_BYTES

    algorithm = f"legacy_{algorithm}"
    one = bound(p2p.P2PEngine, p2p, monkeypatch, deterministic=True)
    one._kernels = {(f"legacy_{a}", d, v): ((d, v), 1024) for a in P2P_ALGORITHMS for d in DTYPES for v in (True, False)}
    region = one.layout.regions[algorithm]
    fired = fire(one, numel, torch.float16)
    values = [legacy_values(launch, algorithm) for launch in fired]
    assert sum(v["numel"] for v in values) == numel and (len(fired) > 1) == (numel > 10_000_000)
    done = 0
    for launch, v in zip(fired, values, strict=True):
        assert (v["x"], v["out"]) == (X + 2 * done, OUT + 2 * done)
        done += v["numel"]
        assert launch.kernel == ("float16", v["numel"] % 8 == 0) and not launch.pdl
        assert (v["table"], v["staging"], v["slots"]) == (15, BASES[1], region.offset)
        assert region.offset >= HEADER_BYTES
        assert (v["epoch"], v["control"], v["report"]) == ((1 << 30) + 4 * region.first_channel, 13, 14)
        assert (v["rank"], v["tag"], v["total"], v["shape_id"]) == (1, tag(algorithm, "float16"), numel, 1)
        block = BLOCK_BYTES // 2
        if algorithm == "legacy_two_shot":
            assert v["part"] % block == 0 and 3 * v["part"] >= v["numel"] > 3 * (v["part"] - block)
            data = v["part"] // block
        else:
            data = -(-v["numel"] // block)
        assert launch.grid == data + 1 and data * BLOCK_BYTES <= v["capacity"] == region.capacity
    assert len(fire(one, numel, torch.float16)) == len(fired) and len(one._prepared) == 1
    assert {launch.kernel for launch in fire(one, numel, torch.float16, source=X + 2)} == {("float16", False)}


class Plain(KernelEngine):
    """An engine whose launches are recorded as (elements, shape_id, stream)."""

    path = "v2"

    def __init__(self, rank=0, world_size=3):
        super().__init__(config(rank, world_size), Layout({}, 0, 0))
        self.log = []

    def plan(self, spec):
        return Plan("v2", "one_shot", 1, 32, spec.numel)

    def prepare(self, spec, plan, shape_id):
        pointers = [(ctypes.c_uint64(), 0)] * 2
        launches = [prepared.binding(partial(self._launch, spec.numel, shape_id), pointers)]
        return prepared.PreparedCall(self, spec, launches, launches)

    def _launch(self, numel, shape_id, stream):
        self.log.append((numel, shape_id, stream))


def test_every_shape_has_a_flag_of_its_own(one):
    for numel in [*range(1, MAX_SHAPES + 10), 5]:
        all_reduce(one, numel)
    first = one.log[: MAX_SHAPES - 1]
    assert [shape_id for _, shape_id, _ in first] == [*range(1, MAX_SHAPES)]  # 0 is the verification's
    assert [shape_id for _, shape_id, _ in one.log[MAX_SHAPES - 1 :]] == [*range(1, 12)]
    assert len(one._prepared) < MAX_SHAPES


# -- failures


class Side:
    """The side channel: stores are recorded, the header's signatures are made up."""

    def __init__(self):
        self.stored = []
        self.told = 0  # this rank's abort word
        self.signatures = bytearray(SIGNED)
        self.peers = bytearray(SIGNED)  # any peer's

    def sign(self, rank, sequence, numel, algorithm="one_shot", dtype="float32"):
        at = ((sequence & 1) * 8 + rank) * 16
        struct.pack_into("<4I", self.signatures, at, numel, sequence, tag(algorithm, dtype), sequence)

    def write(self, addresses, word):
        self.stored += [(address, word) for address in addresses]
        if BASES[1] in addresses:
            self.told = word

    def read(self, address, nbytes):
        if (address, nbytes) == (BASES[1], 4):
            return self.told.to_bytes(4, "little")
        assert address - SIGNATURES_AT in BASES and nbytes == SIGNED
        return bytes(self.signatures if address == BASES[1] + SIGNATURES_AT else self.peers)


@pytest.fixture
def one(monkeypatch, current):
    """Rank 1 of 3."""
    one = Plain(rank=1)
    one.side, one.memory = Side(), SimpleNamespace(addresses=BASES)
    one.state = SimpleNamespace(words=[0] * 16)
    current.stream = 5
    one.driver = FakeDriver(monkeypatch, streams)
    one._streams = streams.StreamOrder()
    return one


def all_reduce(one, numel=4):
    x = Tensor(size=numel, dtype=torch.float32, address=X)
    one.all_reduce(x, x)


@pytest.mark.parametrize("start", [0, 4])
@pytest.mark.parametrize("bad", ["input", "output"])
def test_memory_that_was_freed_is_no_address(one, bad, start):
    """Of a tensor whose storage is gone torch makes an address of the offset alone."""
    gone = torch.ones(12)[start:]
    gone.untyped_storage().resize_(0)
    assert gone.data_ptr() == 4 * start
    fine = SimpleNamespace(data_ptr=lambda: X)
    call = one.prepared(all_reduce_spec("float32", gone.numel()))
    with pytest.raises(InputError, match=f"rank 1: .*storage has 0 bytes and {48} are needed"):
        call(*((gone, gone) if bad == "input" else (Like(gone), gone)))
    assert not one.log
    call(fine, fine)
    assert len(one.log) == 1


class Like:
    """A tensor with memory, like another one."""

    def __init__(self, x):
        self._x = torch.ones_like(torch.empty(x.shape))

    def __getattr__(self, name):
        return getattr(self._x, name)

    def data_ptr(self):
        return X


def stopped(one, kind, culprit, by=1, *, sequence=7, algorithm="one_shot", buffer=0):
    """A kernel of rank 1 has reported."""
    one.state.words[:8] = [abort_code(kind, culprit, by), sequence, tag(algorithm, "float32"), buffer, 3, 1500, 0, 0]


def test_nothing_is_wrong(one):
    one.check()
    all_reduce(one)
    assert len(one.log) == 1 and not one.side.stored and not one.driver.named("cuEventRecord")


def test_a_report_is_raised_once_and_refers_to_itself_afterwards(one):
    one.side.sign(0, 7, 12)
    one.side.sign(2, 6, 10)
    stopped(one, Kind.TIMEOUT, 2)
    with pytest.raises(PeerTimeoutError, match=r"rank 1 timed out after 1.5 s waiting for rank 2 in call 7") as first:
        one.check()
    assert first.value.ranks == (2,) and [r.last_call and r.last_call.sequence for r in first.value.report.ranks] == [
        7,
        None,
        6,
    ]
    with pytest.raises(PeerTimeoutError) as again:
        one.check()
    assert again.value is first.value
    with pytest.raises(PoisonedError, match="waiting for rank 2") as later:
        all_reduce(one)
    assert later.value.ranks == (2,) and later.value.report == first.value.report and later.value.__cause__ is first.value
    assert not one.log


def test_the_next_call_raises_the_cause_if_nobody_has(one):
    stopped(one, Kind.MISMATCH, 0)
    one.state.words[6:10] = [12, tag("one_shot", "float32"), 10, tag("one_shot", "float32")]
    with pytest.raises(CallMismatchError, match="one_shot of 12 float32 on rank 1, but one_shot of 10 float32 on rank 0"):
        all_reduce(one)
    with pytest.raises(PoisonedError):
        all_reduce(one)


@pytest.mark.parametrize("own", [True, False])
def test_their_signature_is_read_from_the_header_where_the_report_lacks_it(one, own):
    """A thread that was told to stop may take the report before the one that has compared signatures (test_failure_promises.py: it does)."""
    for memory, source, numel in ((one.side.peers, 1, 12), (one.side.signatures, 2, 10)):
        struct.pack_into("<4I", memory, (8 + source) * 16, numel, 7, tag("one_shot", "float32"), 7)
    stopped(one, Kind.MISMATCH, 2)
    one.state.words[1], one.state.words[6:10] = 7, [12 * own, tag("one_shot", "float32") * own, 0, 0]
    with pytest.raises(CallMismatchError, match="call 7 is one_shot of 12 float32 on rank 1, but one_shot of 10 float32 on rank 2"):
        one.check()


def test_what_norms_differ_in_is_read_from_both_headers(one):
    """Kernels report elements and tags; the rest is still there, of this very call."""
    ours, theirs = (signed(Norm(eps=eps), 64) for eps in (1.0, 2.0))
    call = [128, tag("one_shot_norm", "float32")]
    for memory, source, word in ((one.side.peers, 1, ours), (one.side.signatures, 2, theirs)):
        struct.pack_into("<4I", memory, SIGNATURES + (8 + source) * 16, word & 0xFFFFFFFF, 7, word >> 32, 7)
    stopped(one, Kind.MISMATCH, 2)
    one.state.words[1], one.state.words[6:10] = 7, call * 2
    with pytest.raises(CallMismatchError) as caught:
        one.check()
    words = "one_shot_norm of 2x64 float32 with eps 1.0 on rank 1, but one_shot_norm of 2x64 float32 with eps 2.0 on rank 2"
    assert words in str(caught.value)


def test_abort_reaches_everybody_oneself_first(one):
    one.abort()
    code = abort_code(Kind.ABORTED, 1, 1)
    assert one.side.stored == [(BASES[1], code), (BASES[0], code), (BASES[2], code)]
    with pytest.raises(PoisonedError, match="rank 1 aborted this communicator"):
        one.check()
    with pytest.raises(PoisonedError):
        all_reduce(one)


def test_a_rank_that_calls_no_more_is_told_what_its_peers_waited_for(one):
    one.side.sign(0, 8, 12)
    one.side.told = abort_code(Kind.TIMEOUT, 1, 0)
    all_reduce(one)  # reads no device memory: the kernel meets the word
    with pytest.raises(
        PeerTimeoutError, match=r"rank 0 timed out waiting for rank 1.*rank 0 told rank 1.*Rank 0 last signed call 8"
    ) as e:
        one.check()
    assert e.value.ranks == (1,)
    with pytest.raises(PoisonedError):
        all_reduce(one)


def test_the_dead_are_not_written_to_and_calls_that_completed_stay_valid(one):
    one.lost(2)
    code = abort_code(Kind.LOST, 2, 1)
    assert one.side.stored == [(BASES[1], code), (BASES[0], code)]
    one.check()  # no kernel was stopped
    with pytest.raises(PeerLostError, match="the process of rank 2 has ended") as e:
        all_reduce(one)
    assert e.value.ranks == (2,) and not one.log
    with pytest.raises(PoisonedError):
        all_reduce(one)


def test_the_first_to_die_is_to_blame(one):
    """Others may end because of it."""
    one.lost(2)
    stored = list(one.side.stored)
    one.lost(0)
    assert one.side.stored == stored
    with pytest.raises(PeerLostError, match="the process of rank 2 has ended") as e:
        all_reduce(one)
    assert e.value.ranks == (2,) and [r.alive for r in e.value.report.ranks] == [False, True, False]


def test_abort_of_what_was_closed(one):
    del one.side, one.memory
    one.abort()


@pytest.mark.parametrize(
    ("watched", "dead", "kind", "words"),
    [
        ((), False, PeerTimeoutError, "may live or not"),
        ((0, 2), False, PeerTimeoutError, "lives"),
        ((0, 2), True, PeerLostError, "is dead"),
    ],
)
def test_what_is_known_of_the_culprit(one, watched, dead, kind, words):
    one.watched = watched
    if dead:
        one.lost(0)
    stopped(one, Kind.TIMEOUT, 0)
    with pytest.raises(kind, match=f"its process {words}") as e:
        one.check()
    assert [r.alive for r in e.value.report.ranks] == [not dead if watched else None, True, True if watched else None]


# -- two streams


def test_another_stream_waits_for_the_one_before(one, current):
    for stream in (5, 5, 9, 9, 5):
        current.stream = stream
        all_reduce(one)
    assert [stream for *_, stream in one.log] == [5, 5, 9, 9, 5]
    records = [entry[2] for entry in one.driver.named("cuEventRecord")]
    assert records == [5, 9] and [entry[1] for entry in one.driver.named("cuStreamWaitEvent")] == [5, 9, 5]


def test_captured_calls_are_ordered_in_their_capture(one, current):
    captures = {5: 33, 9: 33}
    one.driver.answers["cuStreamGetCaptureInfo"] = lambda stream: capture_info(captures.get(int(stream)))
    current.stream = 7
    all_reduce(one)
    current.capturing = True
    for current.stream in (5, 9):
        all_reduce(one)
    assert [entry[2] for entry in one.driver.named("cuEventRecord")] == [5]
    current.capturing, captures = False, {}
    current.stream = 4
    all_reduce(one)
    assert [entry[2] for entry in one.driver.named("cuEventRecord")] == [5, 7]  # eager calls after eager ones
    assert [stream for *_, stream in one.log] == [7, 5, 9, 4]


def test_calls_on_a_default_stream_of_a_thread_are_recorded_there(one, current):
    current.stream = streams.PER_THREAD
    for _ in range(2):
        all_reduce(one)
    assert [entry[2] for entry in one.driver.named("cuEventRecord")] == [streams.PER_THREAD] * 2
    assert len(one.driver.named("cuStreamWaitEvent")) == 2


def test_a_launch_hands_over_what_its_arguments_hold_at_that_moment(monkeypatch):
    pytest.importorskip("cuda.bindings.driver")
    from allreduce_jit.engine import driver

    seen = []

    @ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
    def launch_kernel(config, kernel, arguments, extra):
        config = driver._Config.from_address(config)
        attributes = [(config.attributes[i].id, config.attributes[i].value[0]) for i in range(config.count)]
        first, second = (ctypes.c_void_p * 2).from_address(arguments)
        values = ctypes.c_uint64.from_address(first).value, ctypes.c_int32.from_address(second).value
        shape = [*config.grid], [*config.block], config.shared_bytes
        seen.append((shape, attributes, config.stream, kernel, values, extra))
        return 0 if kernel == 1 << 46 else 1

    # As the driver's own: an address, of which ctypes knows no more.
    address = ctypes.cast(launch_kernel, ctypes.c_void_p).value
    monkeypatch.setattr(driver, "_entry", {"cuLaunchKernelEx": ctypes.CFUNCTYPE(ctypes.c_int)(address)}.get)
    x, count = ctypes.c_uint64(1 << 47), ctypes.c_int32(-3)
    launch = driver.KernelLaunch(1 << 46, [x, count], 5, 64, 128, pdl=True, ranks=2)
    shape = [5, 2, 1], [64, 1, 1], 128
    launch(7 << 40)
    x.value, count.value = 9, 11
    launch(7 << 40)
    launch(0)
    attributes = [(6, 1), (2, 1)]  # programmatic serialisation, cooperative
    assert seen == [
        (shape, attributes, 7 << 40, 1 << 46, (1 << 47, -3), None),
        (shape, attributes, 7 << 40, 1 << 46, (9, 11), None),
        (shape, attributes, None, 1 << 46, (9, 11), None),
    ]
    monkeypatch.setattr(driver, "describe", lambda error: f"error {int(error)}")
    with pytest.raises(AllReduceError, match="kernel launch: error 1"):
        driver.KernelLaunch(1 << 45, [x, count], 1, 32)(0)


def test_a_module_is_loaded_once_for_each_context(monkeypatch):
    """Modules stay, so that communicators that come and go must not bring new ones each time."""
    pytest.importorskip("cuda.bindings.driver")
    from allreduce_jit.engine import driver

    calls, context = [], 7

    def load(cubin):
        calls.append(cubin)
        return driver.driver.CUmodule(1)

    FakeDriver(monkeypatch, driver, cuCtxGetCurrent=lambda: driver.driver.CUcontext(context), cuModuleLoadData=load)
    monkeypatch.setattr(driver, "_modules", {})
    first = driver.load_module(b"one")
    assert driver.load_module(b"one") is first and driver.load_module(b"two") is not first
    assert calls == [b"one", b"two"]
    context = 8
    assert driver.load_module(b"one") is not first and calls == [b"one", b"two", b"one"]


def test_the_side_channel_may_be_used_while_a_graph_is_captured(monkeypatch):
    """A thread in the default mode is refused what the side channel needs, and spoils the capture."""
    pytest.importorskip("cuda.bindings.driver")
    from cuda.bindings import driver

    from allreduce_jit.engine import driver as calls
    from allreduce_jit.engine import memory

    modes, host = driver.CUstreamCaptureMode, ctypes.create_string_buffer(memory.SideChannel.NBYTES)
    here = SimpleNamespace(mode=modes.CU_STREAM_CAPTURE_MODE_GLOBAL, contexts=0, copied=0)

    def exchange(mode):
        here.mode, before = mode, here.mode
        return before

    def push(context):
        here.contexts += 1

    def pop():
        here.contexts -= 1
        return driver.CUcontext(7)

    def copied(*arguments):
        if here.mode is not modes.CU_STREAM_CAPTURE_MODE_RELAXED or here.contexts != 1:
            raise AllReduceError("operation not permitted when stream is capturing")
        here.copied += len(arguments) > 1

    FakeDriver(
        monkeypatch, memory, calls, cuThreadExchangeStreamCaptureMode=exchange, cuCtxPushCurrent=push, cuCtxPopCurrent=pop,
        cuMemcpyDtoHAsync=copied, cuMemcpyHtoDAsync=copied, cuStreamSynchronize=copied,
        cuMemHostAlloc=lambda nbytes, flags: ctypes.addressof(host),
    )  # fmt: skip
    side = memory.SideChannel()
    side.write([1, 2], 5)
    assert side.read(1, 4) == (5).to_bytes(4, "little") and here.copied == 3
    with pytest.raises(ZeroDivisionError):
        side._run(lambda: 1 / 0)
    assert (here.mode, here.contexts) == (modes.CU_STREAM_CAPTURE_MODE_GLOBAL, 0)  # as before, whatever happened


@pytest.mark.parametrize("channel_bytes", [4, 8])
def test_local_state_has_its_channels_behind_the_control_block(monkeypatch, channel_bytes):
    pytest.importorskip("cuda.bindings.driver")
    from cuda.bindings import driver

    from allreduce_jit.engine import memory

    report, start, stored = ctypes.create_string_buffer(memory.REPORT_BYTES), 1 << 40, []

    def copy(address, source, nbytes):
        stored.append((address, ctypes.string_at(source, nbytes)))

    fake = FakeDriver(monkeypatch, memory, cuMemAlloc=lambda nbytes: driver.CUdeviceptr(start),
                      cuMemHostAlloc=lambda nbytes, flags: ctypes.addressof(report), cuMemcpyHtoD=copy)  # fmt: skip
    calls = fake.log
    state = memory.LocalState(501_003, channel_bytes)
    assert state.channels == start + ctypes.sizeof(abi.Control)
    assert state.control + state.nbytes >= state.channels + 501_003 * channel_bytes and ("cuMemAlloc", state.nbytes) in calls
    # All zero, then how many channels there are, for whoever tells them all.
    cleared, told = [call[1:] for call in calls if call[0] == "cuMemsetD32"]
    assert cleared == (start, 0, state.nbytes // 4) and told == (start + abi.Control.channels.offset, 501_003, 1)
    # Nothing that kernels rely on is the caller's allocator's, which may take it back while an engine sleeps.
    state.store_table(BASES)
    assert stored == [(state.table, struct.pack("<8Q", *BASES, *[0] * 5))] and state.table % 8 == 0
    stored.clear()
    state.set_deadlines(1.5, 600)
    assert stored == [(start + abi.Control.deadline_ns.offset, struct.pack("<2Q", 1_500_000_000, 600_000_000_000))]
