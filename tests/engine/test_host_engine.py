"""The engine of path host without a GPU: where it puts its memory, who is told of an abort, what it reads of its peers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from helpers.fake_driver import FakeDriver, driver

from allreduce_jit.abi import Control, Header, Signature
from allreduce_jit.engine import host as engine_module
from allreduce_jit.engine import host_memory
from allreduce_jit.engine.failure import Kind, abort_code, tag
from allreduce_jit.engine.failure import Signature as Signed
from allreduce_jit.engine.host import HostEngine
from allreduce_jit.errors import PeerTimeoutError, PoisonedError
from allreduce_jit.policy.operation import all_reduce
from allreduce_jit.settings import Settings

CONTROL = 1 << 20  # where it would be


class Side:
    def __init__(self):
        self.written = []

    def write(self, addresses, word):
        self.written += [(address, word) for address in addresses]

    def read(self, address, nbytes):
        assert address == CONTROL and nbytes == 4, "headers are read by the process itself"
        return (7).to_bytes(4, "little")


@pytest.fixture
def engines(monkeypatch):
    """Those of three ranks in one process, connected."""
    FakeDriver(monkeypatch, host_memory, cuMemHostGetDevicePointer=lambda address, flags: driver.CUdeviceptr(address))
    made = []
    for rank in range(3):
        config = SimpleNamespace(
            tuned=None,
            rank=rank, world_size=3, device=SimpleNamespace(index=0), arch="sm_90", deterministic=True, max_ctas=None,
            settings=Settings(staging_mb=4, c_calls=False), bus_ids=(),
        )  # fmt: skip
        engine = HostEngine(config)
        engine.memory, engine.side = engine._staging(), Side()
        engine.state = SimpleNamespace(words=[0] * 16, control=CONTROL, channels=CONTROL + 4096, report=1)
        made.append(engine)
    handles = [engine.memory.handle() for engine in made]
    for engine in made:
        engine.memory.connect(handles)
    yield made
    for engine in made:
        engine.memory.close()


def headers(engine):
    return [engine._read_header(rank, Header.abort.offset, 4) for rank in range(3)]


def test_an_abort_reaches_all_headers_and_its_own_kernels(engines):
    engines[1].abort()
    code = abort_code(Kind.ABORTED, 1, 1)
    for engine in engines:
        assert headers(engine) == [code.to_bytes(4, "little")] * 3
    assert engines[1].side.written == [(CONTROL + Control.abort.offset, code)]
    assert not engines[0].side.written  # its kernels meet the word in their header
    for engine in engines:
        with pytest.raises(PoisonedError, match="rank 1 aborted this communicator"):
            engine.check()


def test_a_death_stops_those_who_live(engines):
    engines[0].lost(2)
    code = abort_code(Kind.LOST, 2, 0).to_bytes(4, "little")
    assert headers(engines[0]) == [code, code, bytes(4)]  # nobody is at home
    engines[1].check()  # calls that were complete stay so


def test_a_timeout_of_a_peer_is_heard_of_with_what_ranks_signed_last(engines):
    call = tag("host_stream", "bfloat16")
    for source in (0, 2):
        signature = Signature(numel=5000, sequence=6, tag=call, sequence_again=6)
        at = Header.signatures.offset + 16 * source
        for i, word in enumerate((signature.numel, signature.sequence, signature.tag, signature.sequence_again)):
            engines[1].memory.poke(1, at + 4 * i, word)
    engines[0].memory.poke(1, Header.abort.offset, abort_code(Kind.TIMEOUT, 1, 0))
    with pytest.raises(
        PeerTimeoutError, match="rank 0 timed out waiting for rank 1.*Rank 2 last signed call 6: host_stream"
    ) as caught:
        engines[1].check()
    assert caught.value.ranks == (1,)


def test_what_a_kernel_reported_names_the_phase():
    assert Signed.decode(10, tag("host_two_shot", "float16")) == Signed(10, "float16", "host_two_shot", False)


def test_launches_are_told_of_outboxes(engines, monkeypatch):
    told = []

    class Launch:
        def __init__(self, kernel, arguments, grid, block, pdl=False):
            told.append((kernel, arguments[0], grid, block, pdl))

    monkeypatch.setattr(engine_module, "KernelLaunch", Launch)
    engine = engines[2]
    engine._kernels = {name: name for module in engine._modules([all_reduce("float32")]) for name in module.entries}
    spec = all_reduce("float32", 1_000_001)
    engine.prepare(spec, engine.plan(spec), shape_id=3)
    for kernel, args, grid, block, pdl in told:
        assert kernel.startswith("host_two_shot_fp32_ws3") and grid > 1 and block % 32 == 0 and pdl
        assert list(args.staging[:3]) == engine.memory.addresses and args.own == engine.memory.addresses[2]
        assert (args.rank, args.total, args.shape_id, args.last) == (2, 1_000_001, 3, 1)
        assert args.slots == engine.layout.regions["host_two_shot"].offset
        assert args.channels == CONTROL + 4096 + 8 * engine.layout.regions["host_two_shot"].first_channel
    assert {kernel.endswith("_ragged") for kernel, *_ in told} == {True, False}


@pytest.mark.parametrize(("world_size", "near"), [(2, "b"), (3, "a")])
def test_an_outbox_lies_near_its_only_reader_or_its_writer(monkeypatch, world_size, near):
    asked = []
    monkeypatch.setattr(engine_module, "HostStaging", lambda nbytes, rank, bus_id: asked.append((rank, bus_id)))
    config = SimpleNamespace(
        tuned=None,
        rank=0, world_size=world_size, device=SimpleNamespace(index=0), arch="sm_80", deterministic=True, max_ctas=None,
        settings=Settings(staging_mb=4, c_calls=False), bus_ids=("a", "b", "c")[:world_size],
    )  # fmt: skip
    engine = HostEngine(config)
    engine._staging()
    assert asked == [(0, near)] and not engine._pdl
