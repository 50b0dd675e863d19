"""SGLang and FlashInfer as competitors, against stand-ins with the signatures of their releases."""

import os
import sys
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest
import torch

from allreduce_jit.bench import competitors
from allreduce_jit.bench.competitors import FlashInfer, Sglang, Unavailable

PLACE = SimpleNamespace(rank=1, world_size=4, device=torch.device("cpu"), control="control")


def built(kind, nbytes=1 << 20):
    """The competitor on CPU buffers, which its constructor would refuse."""
    competitor = object.__new__(kind)
    competitor.place = PLACE
    competitor.buffers = competitor.allocate(2, nbytes)
    return competitor


class Reduce:
    """``CustomAllReduceV2`` of SGLang, newer ones; takes up to its ``max_size``."""

    disabled, has_multicast = False, False

    def __init__(self, group, device, max_size=16 << 20, *, max_pull_size=None, max_push_size=None):
        assert (group, device, max_pull_size, max_push_size) == (PLACE.control, PLACE.device, None, None)
        self.max_size, self.closed = max_size, False

    def should_custom_ar(self, tensor):
        return tensor.nbytes <= self.max_size

    def custom_all_reduce(self, tensor):
        return tensor * 4

    def capture(self):
        return nullcontext(self)

    def close(self):
        self.closed = True


class OlderReduce(Reduce):
    def __init__(self, group, device, max_pull_size=None, max_push_size=None):
        super().__init__(group, device, max_pull_size)


def sglang(monkeypatch, kind):
    module = ModuleType(Sglang.modules[0])
    module.CustomAllReduceV2 = kind
    parts = Sglang.modules[0].split(".")
    for i in range(1, len(parts)):
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), ModuleType(".".join(parts[:i])))
    monkeypatch.setitem(sys.modules, Sglang.modules[0], module)


@pytest.mark.parametrize("kind", [Reduce, OlderReduce])
@pytest.mark.parametrize(("nbytes", "limit"), [(1 << 20, 1 << 20), (1 << 30, 64 << 20)])
def test_sglang(monkeypatch, kind, nbytes, limit):
    sglang(monkeypatch, kind)
    monkeypatch.setattr(competitors.Competitor, "allocate", lambda *_: [torch.ones(64, dtype=torch.uint8)])
    competitor = built(Sglang, nbytes)
    assert competitor.reduce.max_size == limit
    (x,) = competitor.tensors(32, torch.bfloat16)
    assert torch.equal(competitor.call(x), x * 4)
    with competitor.capture() as captured:
        assert captured is competitor.reduce
    competitor.reduce.max_size = 1
    with pytest.raises(Unavailable, match="leaves this size"):
        competitor.call(x)
    competitor.close()
    assert competitor.reduce.closed


@pytest.mark.parametrize(("what", "reason"), [("disabled", "refuses"), ("has_multicast", "multicast")])
def test_sglang_refused(monkeypatch, what, reason):
    sglang(monkeypatch, type("Refusing", (Reduce,), {what: True}))
    with pytest.raises(Unavailable, match=reason):
        built(Sglang)


@pytest.fixture
def flashinfer(monkeypatch):
    """``flashinfer.comm`` of 0.2 to 0.7: what it was called with ends up in ``calls``."""
    module, calls = ModuleType("flashinfer.comm"), []

    def create(tp_rank, tp_size, max_token_num, hidden_dim, use_fp32_lamport=False, group=None, create_metadata=False,
               comm_backend=None, use_symm_dev_mem=False):  # fmt: skip
        calls.append(("create", tp_rank, tp_size, max_token_num * hidden_dim * 2, use_symm_dev_mem))
        return "handles", "workspace"

    def fusion(allreduce_in, world_size, world_rank, token_num, hidden_dim, workspace_ptrs, launch_with_pdl,
               trigger_completion_at_end, fp32_acc, pattern_code, use_oneshot, allreduce_out, residual_in,
               residual_out, norm_out, quant_out, scale_out, rms_gamma, rms_eps, scale_factor, layout_code,
               metadata=None):  # fmt: skip
        calls.append(("fusion", token_num, hidden_dim, workspace_ptrs, pattern_code))
        allreduce_out.copy_(allreduce_in * world_size)

    def deprecated(*_, **__):
        raise AssertionError("called through the decorator")

    deprecated.__wrapped__ = fusion
    module.trtllm_create_ipc_workspace_for_all_reduce_fusion = create
    module.trtllm_allreduce_fusion = deprecated
    module.trtllm_destroy_ipc_workspace_for_all_reduce_fusion = lambda handles, group: calls.append(("destroy", handles))
    module.AllReduceFusionPattern = SimpleNamespace(kAllReduce=0)
    monkeypatch.setitem(sys.modules, "flashinfer", ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.comm", module)
    return calls


@pytest.mark.parametrize(("numel", "shape"), [(512, (1, 512)), (24, (3, 8)), (1 << 15, (8, 4096))])
def test_flashinfer(flashinfer, numel, shape):
    competitor = built(FlashInfer)
    assert flashinfer.pop() == ("create", 1, 4, 1 << 20, False)
    x = competitor.tensors(numel, torch.bfloat16)[0].fill_(1)
    assert torch.equal(competitor.call(x), x * 4) and x[0] == 1
    assert flashinfer.pop() == ("fusion", *shape, "workspace", 0)
    competitor.close()
    assert flashinfer.pop() == ("destroy", "handles")


@pytest.mark.parametrize(("numel", "dtype"), [(1 << 20, torch.bfloat16), (512, torch.float32), (7, torch.float16)])
def test_flashinfer_is_not_given_what_would_hang_it(flashinfer, numel, dtype):
    competitor = built(FlashInfer)
    with pytest.raises(Unavailable, match="16-byte packets"):
        competitor.call(torch.ones(numel, dtype=dtype))
    assert [call[0] for call in flashinfer] == ["create"]


def test_flashinfer_knows_three_world_sizes(flashinfer, monkeypatch):
    monkeypatch.setattr(PLACE, "world_size", 3)
    with pytest.raises(Unavailable, match="2, 4 or 8"):
        built(FlashInfer)
    assert flashinfer == []


def test_what_an_import_sets_is_set_back(flashinfer, monkeypatch):
    for name in competitors.NO_MULTICAST:
        monkeypatch.setenv(name, "changed")
    competitors._require(SimpleNamespace(modules=()))
    assert {name: os.environ[name] for name in competitors.NO_MULTICAST} == competitors.NO_MULTICAST
