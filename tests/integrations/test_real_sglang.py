"""The plug-in inside the real SGLang, on the CPU: found by its entry point, in its groups, in its fused operation.

Run where an SGLang is installed (``make engines``; docs/engines.md). The kernels are stand-ins that sum over gloo. For tensors on the CPU
SGLang's public ``all_reduce`` passes its custom all-reduce by, and the registered operator has no CPU kernel: what they call is tested.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import os
import pkgutil
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from helpers.fake_engines import fake_gpus, raised, suite

from allreduce_jit.harness import ranks
from allreduce_jit.integrations import sglang_plugin as plugin
from allreduce_jit.integrations.sglang import AllReduceJit, CustomAllReduceV2
from allreduce_jit.norms import add_rms_norm

pytestmark = pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs the package sglang")
HIDDEN = 128


class Theirs:
    """What SGLang would have built, in its place: the real classes need a GPU."""

    disabled = True

    def __init__(self, group, device):
        self.group = group


def theirs(*args, **kwargs):
    return Theirs


@contextmanager
def log_of(name="allreduce_jit"):
    records, handler, logger = [], logging.Handler(), logging.getLogger(name)
    handler.emit = lambda record: records.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)


@contextmanager
def started(place, machine="h200-x4", nnodes=1, **env):
    """SGLang's plug-ins loaded by SGLang, and a group of its; yields it, the engines built and what was logged."""
    from sglang.srt.distributed.device_communicators import custom_all_reduce
    from sglang.srt.plugins import load_plugins

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"ALLREDUCE_JIT": "1", **env}))
        if not getattr(custom_all_reduce.dispatch_custom_allreduce, "__wrapped__", None):
            custom_all_reduce.dispatch_custom_allreduce = theirs  # before it is wrapped: the real one asks for a GPU
        load_plugins()
        built = stack.enter_context(fake_gpus(place.control, machine))
        stack.enter_context(mock.patch.object(plugin, "_nodes", lambda: nnodes))
        log = stack.enter_context(log_of())
        group = coordinator(place)
        yield group, built, log


def coordinator(place):
    """With every switch off but ``use_custom_allreduce``, however they are called in this version."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    parameters = inspect.signature(GroupCoordinator).parameters
    given = {name: False for name in parameters if name.startswith("use_")}
    given |= {"group_ranks": [list(range(place.world_size))], "local_rank": place.rank, "torch_distributed_backend": "gloo"}
    return GroupCoordinator(**given | {"use_custom_allreduce": True, "group_name": "tp"})


def sums(place):
    with started(place) as (group, (engine,), log):
        held = group.ca_comm
        assert type(held) is AllReduceJit and not held.disabled
        assert group._resolve_outplace_all_reduce_method(torch.ones(8)) == "ca"
        x = torch.arange(64.0).view(4, 16) + place.rank
        found = group._all_reduce_out_place(x, "auto")
        assert torch.equal(found, torch.arange(64.0).view(4, 16) * 2 + 1) and engine.sums == 1
        assert group._resolve_outplace_all_reduce_method(torch.ones(8, dtype=torch.int64)) is None
        lines = [text for text in log if " in SGLang " in text]
        assert len(lines) == (place.rank == 0) and all("group tp:" in text and "before us: nothing" in text for text in lines), (
            log
        )
        held.close()


def not_like_upstreams(place):
    """SGLang's own checks tell ours from its class, into which its other kernels reach."""
    from sglang.srt.distributed.device_communicators import custom_all_reduce_v2

    theirs = custom_all_reduce_v2.CustomAllReduceV2
    assert not issubclass(AllReduceJit, theirs) and AllReduceJit.__name__ != theirs.__name__
    # The drop-in of that name takes what theirs takes.
    names = list(inspect.signature(theirs).parameters)
    assert list(inspect.signature(CustomAllReduceV2).parameters) == names
    for name in ("should_custom_ar", "custom_all_reduce"):
        assert list(inspect.signature(getattr(AllReduceJit, name)).parameters)[0] == "self"
        assert len(inspect.signature(getattr(theirs, name)).parameters) == 2


def refused(place):
    with started(place, machine="no-driver") as (group, built, log):
        assert not built and type(group.ca_comm) is Theirs
        refusals = [text for text in log if "is not used in SGLang" in text]
        assert len(refusals) == (place.rank == 0), log
    with started(place, nnodes=2) as (group, built, log):
        assert not built and type(group.ca_comm) is Theirs
        assert [text for text in log if text.startswith("Disabling SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2 because nnodes=2")]
    with started(place, SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2="0") as (group, built, log):
        assert [engine.path for engine in built] == ["legacy"] and type(group.ca_comm) is AllReduceJit

    def required():
        with started(place, machine="no-driver", ALLREDUCE_JIT="require"):
            pass

    raised(SystemExit, required, "is not used in SGLang", "ALLREDUCE_JIT=1")


def swallowed(place):
    """An error while ours is built is SGLang's to swallow; the group is looked at afterwards."""
    broken = mock.Mock(side_effect=RuntimeError("planted"))
    with mock.patch.object(plugin, "build", broken), started(place) as (group, built, log):
        assert group.ca_comm is None and broken.called
        refusals = [text for text in log if "is not used in SGLang" in text and "holds nothing" in text]
        assert len(refusals) == (place.rank == 0), log


def fused(place):
    from sglang.srt.layers import flashinfer_comm_fusion as fusion

    with started(place) as (group, (engine,), log):
        where = mock.patch.object(fusion, "resolve_fusion_group", lambda *, use_attn_tp_group: (2, place.rank, group))
        size = mock.patch.object(fusion, "resolve_fusion_world_size", lambda *, use_attn_tp_group: 2)
        with where, size:
            generator = torch.Generator().manual_seed(7)
            x = torch.randn(2, 4, HIDDEN, generator=generator).bfloat16()[place.rank]
            residual = torch.randn(4, HIDDEN, generator=generator).bfloat16()
            weight = torch.randn(HIDDEN, generator=generator).bfloat16()
            arguments = {"input_tensor": x, "residual": residual, "weight": weight, "eps": 1e-5}
            norm, total = fusion.flashinfer_allreduce_residual_rmsnorm(**arguments, max_token_num=2048, use_attn_tp_group=True)
            want = add_rms_norm(group.ca_comm.custom_all_reduce(x), residual, weight, 1e-5)
            assert torch.equal(norm, want[0]) and torch.equal(total, want[1]) and engine.norms == 1
            # More rows than one kernel takes: SGLang's own operator, which is there on GPUs alone.
            many = torch.ones(40, HIDDEN, dtype=torch.bfloat16)
            arguments |= {"input_tensor": many, "residual": many}
            raised(NotImplementedError, lambda: fusion.flashinfer_allreduce_residual_rmsnorm(**arguments), "sglang::flashinfer")
            assert engine.norms == 1
        with mock.patch.object(group, "_fi_workspace_hint", "attn_tp"):
            assert group._can_use_flashinfer_allreduce(torch.ones(8)) is False


CASES = [sums, not_like_upstreams, refused, swallowed, fused]


def test_two_ranks():
    assert len(ranks.run(suite, CASES, cpu=2, deadline=500).value) == len(CASES)


def test_what_the_stand_in_says_of_it():
    from helpers.fake_sglang import SIGNATURES
    from helpers.fake_vllm import arguments

    for name, found in SIGNATURES.items():
        assert arguments(pkgutil.resolve_name(name)) == found, name
