"""The engines as far as they go without a GPU: shared compilation, loading, argument blocks."""

from types import SimpleNamespace

import pytest
import torch

from allreduce_jit import engine as engines
from allreduce_jit.cache import KernelCache
from allreduce_jit.engine import EngineConfig
from allreduce_jit.kernel import ALGORITHMS, DTYPES, catalogue
from allreduce_jit.settings import Settings


class FakeModule:
    loaded: list[bytes] = []

    def __init__(self, cubin):
        assert cubin.startswith(b"\x7fELF")
        FakeModule.loaded.append(cubin)

    def kernel(self, name):
        return f"kernel {name}"


def make(cls, rank, world_size):
    return cls(EngineConfig(rank, world_size, torch.device("cuda", rank), "sm_90", 132, True, False, Settings()))


def built(cls, world_size, monkeypatch):
    """The engines of all ranks after loading what all ranks compiled."""
    monkeypatch.setattr(engines, "Module", FakeModule)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    FakeModule.loaded = []
    ranks = [make(cls, rank, world_size) for rank in range(world_size)]
    cache = KernelCache(None)
    shares = [one.compile(cache) for one in ranks]
    count = len(catalogue(cls.path, world_size))
    assert sum(one.compiled for one in ranks) == sum(map(len, shares)) == count  # each module once
    for one in ranks:
        one.load(shares)
    assert len(FakeModule.loaded) == count * world_size
    assert len(set(FakeModule.loaded)) == count  # every rank runs the same machine code
    return ranks


def test_v2_ranks_share_the_work(monkeypatch):
    pytest.importorskip("cuda.bindings.nvrtc")
    from allreduce_jit.v2 import V2Engine

    for one in built(V2Engine, 3, monkeypatch):
        names = {f"{algorithm}_{dtype}_ws3" for algorithm in ALGORITHMS for dtype in DTYPES.values()}
        assert one._kernels == {name: f"kernel {name}" for name in names}


def test_legacy_ranks_share_the_work(monkeypatch):
    pytest.importorskip("triton")
    from allreduce_jit.legacy import LegacyEngine

    for one in built(LegacyEngine, 2, monkeypatch):
        kinds = {(f"legacy_{a}", dtype, vector) for a in ALGORITHMS for dtype in DTYPES for vector in (True, False)}
        assert set(one._kernels) == kinds


def test_v2_arguments_point_into_every_ranks_region():
    from allreduce_jit.v2 import V2Engine

    one = make(V2Engine, 1, 3)
    one.state = SimpleNamespace(epochs={"one_shot": 11, "two_shot": 12}, control=13, report=14)
    one.memory = SimpleNamespace(addresses=[1000, 2000, 3000])
    one._bind()
    for algorithm, region in one.layout.regions.items():
        args = one._args[algorithm]
        assert list(args.staging) == [1000 + region.offset, 2000 + region.offset, 3000 + region.offset, 0, 0, 0, 0, 0]
        assert (args.epochs, args.control, args.report) == (one.state.epochs[algorithm], 13, 14)
        assert (args.rank, args.capacity) == (1, region.capacity)


def test_a_report_names_the_rank():
    from allreduce_jit.errors import PeerTimeout
    from allreduce_jit.v2 import V2Engine

    one = make(V2Engine, 1, 3)
    one.state = SimpleNamespace(words=[0, 0, 0, 0, 0])
    one.check()
    one.state.words = [1, 2, 1, 0, 77]
    with pytest.raises(PeerTimeout, match="rank 1 waited in vain for rank 2 .one_shot, buffer 0, channel 77."):
        one.check()
