"""torch.distributed under our contract: NCCL set up by all ranks or by none, a peer's death told as on any other path."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch
import torch.distributed as dist
from helpers.fake_engines import FakeNccl, fake_gpus, raised, suite

import allreduce_jit
from allreduce_jit.engine.bounded import within
from allreduce_jit.engine.fallback import TorchEngine
from allreduce_jit.errors import CommunicatorFailedError, InputError, PeerLostError, PeerTimeoutError, PoisonedError
from allreduce_jit.harness import ranks
from allreduce_jit.policy.verdict import Path, Reason
from allreduce_jit.setup import nccl

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.fixture
def capturing(monkeypatch):
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    return capturing


class Stuck(FakeNccl):
    """NCCL whose last call has not ended."""

    aborted = 0

    def completed(self):
        return False

    def abort(self):
        self.aborted += 1


def on_nccl(group, kind=FakeNccl, **more):
    made = kind(group)
    engine = TorchEngine(group, CUDA, 0, 2, "nccl", lambda: (made, None), **more)
    return engine, made


def test_in_a_capture(group, capturing):
    """What cannot be captured says so before anything is launched, and what to do."""
    x, out = torch.ones(3), torch.zeros(3)
    over_nccl, _ = on_nccl(group)
    host = TorchEngine(group, CUDA, 0, 2, "gloo")
    capturing[0] = True
    for _ in range(2):
        raised(InputError, lambda: over_nccl.all_reduce(x, out), "cuda:0", "CUDA graph", "call warmup() before the capture")
        raised(InputError, lambda: host.all_reduce(x, out), "cuda:0", "through the host (gloo)", "CUDA graph", "describe()")
    assert not out.any()
    capturing[0] = False
    for engine in (over_nccl, host):
        engine.all_reduce(x, out.zero_())
        assert torch.equal(out, x)
    capturing[0] = True
    over_nccl.all_reduce(x, out.zero_())  # it has been set up by now
    assert torch.equal(out, x)
    raised(InputError, lambda: host.all_reduce(x, out), "cuda:0")


def test_nccl_that_cannot_be_set_up_leaves_gloo(group, capturing, caplog):
    tries = []
    engine = TorchEngine(group, CUDA, 0, 2, "nccl", lambda: tries.append(1) or (None, "rank 1: OutOfMemoryError: none left"))
    for _ in range(3):
        out = torch.zeros(3)
        engine.all_reduce(torch.ones(3), out)
        assert out.tolist() == [1.0] * 3
    assert (engine.backend, engine.problem) == ("gloo", "rank 1: OutOfMemoryError: none left") and len(tries) == 1
    assert "gloo all-reduces through the host instead: rank 1: OutOfMemoryError" in caplog.text


@pytest.mark.parametrize(("kind", "alone", "told"), [(FakeNccl, True, True), (FakeNccl, False, False), (Stuck, False, True)])
def test_a_death_ends_nccl_and_is_told(group, capturing, kind, alone, told):
    """Beside kernels that say which calls were hurt, calls of NCCL that had completed stay valid."""
    engine, made = on_nccl(group, kind, alone=alone)
    x = torch.ones(3)
    engine.all_reduce(x, x)
    engine.check()
    engine.lost(1)
    if told:
        lost = raised(PeerLostError, engine.check, "rank 0: the process of rank 1 has ended", "build a new one")
        assert lost.ranks == (1,) and lost.report.culprit == 1 and lost.report.ranks[1].alive is False
    else:
        engine.check()
    kinds = []
    for _ in range(2):
        with pytest.raises(CommunicatorFailedError) as caught:
            engine.all_reduce(x, x)
        kinds.append(type(caught.value))
        assert caught.value.ranks == (1,)
    assert kinds == ([PoisonedError] * 2 if told else [PeerLostError, PoisonedError]) and x.tolist() == [1.0] * 3
    if kind is Stuck:
        end = time.monotonic() + 10
        while not made.aborted and time.monotonic() < end:
            time.sleep(0.01)
        assert made.aborted == 1


def test_a_death_before_nccl_is_there(group, capturing):
    made = Stuck(group)
    engine = TorchEngine(group, CUDA, 0, 2, "nccl", lambda: (engine.lost(1), (made, None))[1])
    engine.connect()
    assert made.aborted == 1
    raised(PeerLostError, engine.check)


def test_abort_and_close(group, capturing):
    engine, made = on_nccl(group, Stuck)
    engine.connect()
    engine.abort()
    assert made.aborted == 1
    raised(PoisonedError, engine.check, "rank 0 aborted")
    raised(PoisonedError, lambda: engine.all_reduce(torch.ones(2), torch.ones(2)))
    engine.close()
    engine.close()
    assert not engine.uses_device


def test_words_of_torch_for_bad_arguments_stay(group, monkeypatch):
    engine = TorchEngine(group, CPU, 0, 2, "gloo")
    x = torch.ones(3)

    def fails(*arguments, **more):
        raise RuntimeError("Invalid scalar type")

    monkeypatch.setattr(dist, "all_reduce", fails)
    with pytest.raises(RuntimeError, match="^Invalid scalar type$"):
        engine.all_reduce(x, x)
    engine.check()
    for text, kind in (("[gloo/transport/tcp/pair.cc:538] Connection closed by peer [127.0.0.1]:9", CommunicatorFailedError),
                       ("Timed out waiting 1000ms for recv operation to complete", PeerTimeoutError)):  # fmt: skip
        engine = TorchEngine(group, CPU, 0, 2, "gloo")
        monkeypatch.setattr("allreduce_jit.engine.fallback._WATCHER_S", 0.05)

        def lost(*arguments, text=text, **more):
            raise RuntimeError(text)

        monkeypatch.setattr(dist, "all_reduce", lost)
        found = raised(kind, lambda engine=engine: engine.all_reduce(x, x), "rank 0", text, "does not name")
        assert type(found) is kind and found.ranks == ()
        raised(kind, engine.check)
        raised(PoisonedError, lambda engine=engine: engine.all_reduce(x, x))


def test_within():
    assert within(5, lambda: None, "nothing")
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 / 0, "fails")
    release = threading.Event()
    started = time.monotonic()
    assert not within(0.05, lambda: release.wait(20), "late") and time.monotonic() - started < 5
    release.set()


# -- real ranks


def nccl_by_all_or_none(place):
    """Whatever happens to NCCL on some rank, all ranks have it or none has, and all know why."""
    one = nccl._Attempt
    saved, lacking = one._sum, nccl._lacking
    aborted = []

    class Backend:
        def abort(self):
            aborted.append(1)

    def works(self):
        self.backend = Backend()

    def fails(self):
        self._problem = "RuntimeError: NCCL error: out of memory"

    def waits(self):  # for a rank that does not come
        self.backend = Backend()
        time.sleep(20)

    def connect(deeds, timeout_s=10.0):
        one._sum = deeds.get(place.rank, works)
        started = time.monotonic()
        made, why = nccl.connect(place.control, CPU, timeout_s)
        assert place.gather(why) == [why] * place.world_size and (made is None) == (why is not None)
        return why, time.monotonic() - started

    try:
        nccl._lacking = lambda device: None
        assert connect({})[0] is None
        for who in range(place.world_size):
            others = dict.fromkeys(set(range(place.world_size)) - {who}, waits)
            why, took = connect({who: fails} | others)
            assert why == f"rank {who}: RuntimeError: NCCL error: out of memory" and took < 5, (why, took)
        why, took = connect(dict.fromkeys(range(place.world_size), waits), timeout_s=1.0)
        assert "NCCL did not connect within 1 s (ALLREDUCE_JIT_SETUP_TIMEOUT)" in why and took < 8, (why, took)
        end = time.monotonic() + 10
        while len(aborted) < place.world_size and time.monotonic() < end:
            time.sleep(0.01)
        assert len(aborted) == place.world_size  # of those that had begun
        nccl._lacking = lambda device: "OutOfMemoryError: CUDA out of memory" if place.rank == 1 else None
        assert connect({})[0] == "rank 1: OutOfMemoryError: CUDA out of memory"  # and nobody began
    finally:
        one._sum, nccl._lacking = saved, lacking


def without_nccl_legacy_keeps_all(place):
    from unittest import mock

    with (
        fake_gpus(place.control, "a100-pcie-x4") as built,
        mock.patch.object(nccl, "connect", lambda *args: (None, "rank 2: none left")),
    ):
        with allreduce_jit.init(place.control, "cpu") as comm:
            assert comm.path is Path.LEGACY and comm.describe().backend == "gloo"
            assert comm.describe().reasons[-1] == Reason("no-nccl", "NCCL cannot be set up: rank 2: none left")
            assert "NCCL cannot be set up" in comm.reason
            assert comm.takes(1 << 24, torch.float32) and not built[0].hands_over
            assert comm.all_reduce(torch.ones(3, dtype=torch.int64)).tolist() == [place.world_size] * 3


CASES = [nccl_by_all_or_none, without_nccl_legacy_keeps_all]


def test_three_ranks():
    assert len(ranks.run(suite, CASES, cpu=3, deadline=120).value) == len(CASES)


def a_peer_dies(place, when):
    """The last rank is killed; what the others are told, by a call and by ``check``."""
    victim = place.world_size - 1
    comm = allreduce_jit.init(device="cpu")
    assert comm.all_reduce(torch.ones(3)).tolist() == [place.world_size] * 3
    assert comm.describe().watched == tuple(rank for rank in range(place.world_size) if rank != place.rank)
    place.barrier()
    if place.rank == victim:
        if when == "in a call":
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    if when == "before a call":
        end = time.monotonic() + 10
        while not comm._torch.dead and time.monotonic() < end:
            time.sleep(0.01)
        assert raised(PeerLostError, comm.check).ranks == (victim,)
        raised(PoisonedError, lambda: comm.all_reduce(torch.ones(3)))
    else:
        lost = raised(
            PeerLostError,
            lambda: comm.all_reduce(torch.ones(1000)),
            f"rank {place.rank}",
            f"the process of rank {victim} has ended",
        )
        assert lost.ranks == (victim,) and isinstance(lost.__cause__, RuntimeError)
        assert raised(PeerLostError, comm.check) is lost
        assert raised(PoisonedError, lambda: comm.all_reduce(torch.ones(3))).ranks == (victim,)
    started = time.monotonic()
    comm.close(local=True)
    assert time.monotonic() - started < 5
    print("told", flush=True)
    os._exit(0)


@pytest.mark.parametrize("when", ["in a call", "before a call"])
def test_a_peer_that_dies_on_path_torch(when, capfd):
    with pytest.raises(ranks.RanksFailedError) as caught:  # of which the survivors leave in good order, saying so
        ranks.run(a_peer_dies, when, cpu=3, deadline=60)
    deaths = {rank: text for rank, text in caught.value.failed.items()}
    assert "SIGKILL" in deaths[2] and all("exit code 0" in deaths[rank] for rank in (0, 1) if rank in deaths), deaths
    assert capfd.readouterr().out.count("told") == 2
