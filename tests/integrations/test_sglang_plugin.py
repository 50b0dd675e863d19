"""The plug-in for SGLang over a stand-in of SGLang: what its groups hold, what is said, and what an SGLang that has moved gets."""

from __future__ import annotations

import os
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from helpers import fake_sglang, fake_vllm
from helpers.fake_engines import MOST_ROWS, fake_gpus, logged, raised, suite

from allreduce_jit.harness import ranks
from allreduce_jit.integrations import sglang_plugin as plugin
from allreduce_jit.integrations.sglang import AllReduceJit
from allreduce_jit.norms import add_rms_norm
from allreduce_jit.settings import V2_SWITCH

HIDDEN = 64
STATE = "sglang.srt.distributed.parallel_state"
FUSION = "sglang.srt.layers.flashinfer_comm_fusion"
CUSTOM = "sglang.srt.distributed.device_communicators.custom_all_reduce"


def said(records, *words):
    return [text for _, text in records if all(word in text for word in words)]


@contextmanager
def started(place, value="1", machine="h200-x4", env=None, **sglang):
    """Plug-ins loaded; yields SGLang's modules, the engines built, the log."""
    plugin._fusion.cache_clear()
    with mock.patch.dict(os.environ, env or {}):
        for name in ("ALLREDUCE_JIT", V2_SWITCH):
            if name not in (env or {}):
                os.environ.pop(name, None)
        if value is not None:
            os.environ["ALLREDUCE_JIT"] = value
        with fake_gpus(place.control, machine) as built, fake_sglang.fake_sglang(**sglang) as modules, logged() as log:
            modules["sglang.srt.plugins"].load_plugins()
            yield modules, built, log


def group_of(modules, place, **options):
    return modules[STATE].GroupCoordinator(place.control, **options)


# -- on every rank


def off(place):
    for value in (None, "no"):
        with started(place, value, env={"ALLREDUCE_JIT_TYPO": "1"}) as (modules, built, log):
            assert type(group_of(modules, place).ca_comm).__name__ == "CustomAllReduceV2" and not built and not log
    with started(place) as (modules, built, log):
        os.environ["ALLREDUCE_JIT"] = "sglang"
        raised(SystemExit, plugin.register, "ALLREDUCE_JIT='sglang'", "require")


def ours(place):
    with started(place) as (modules, (*before,), log):
        assert not before
    with started(place) as (modules, built, log):
        group = group_of(modules, place)
        (engine,) = built
        assert type(group.ca_comm) is AllReduceJit
        x = torch.arange(24.0).view(4, 6) + place.rank
        assert torch.equal(group.all_reduce(x), torch.arange(24.0).view(4, 6) * 2 + 1) and engine.sums == 1
        # FlashInfer would have come first, and does where ours declines.
        half = x.bfloat16()
        assert torch.equal(group.all_reduce(half), torch.arange(24.0).view(4, 6).bfloat16() * 2 + 1)
        assert (engine.sums, group.flashinfer) == (2, 0)
        group.all_reduce(half.clone().t())
        assert (engine.sums, group.flashinfer) == (2, 1)
        assert group.all_reduce(torch.ones(2, dtype=torch.int64)).tolist() == [2, 2] and engine.sums == 2
        assert len(said(log, "in SGLang 0.5.23, group tp:0: v2", "before us: nothing", "its own CustomAllReduceV2 are off")) == (
            place.rank == 0
        )
        group_of(modules, place, use_custom_allreduce=False)  # which asks for none
        assert len(said(log, "in SGLang")) == (place.rank == 0)
        group.ca_comm.close()
    with started(place, upstream="CustomAllreduce") as (modules, built, log):
        group = group_of(modules, place, mscclpp=object())
        lines = said(log, "before us: MSCCL++")
        assert len(lines) == (place.rank == 0) and not said(log, "are off")
        group.ca_comm.close()


def switch_and_nodes(place):
    """SGLang's switch turns V2 off, and legacy runs; a job that spans machines is SGLang's, with the warning."""
    with started(place, env={V2_SWITCH: "0"}) as (modules, built, log):
        group = group_of(modules, place)
        assert [engine.path for engine in built] == ["legacy"] and type(group.ca_comm) is AllReduceJit
        group.ca_comm.close()
    with started(place, nnodes=2, env={V2_SWITCH: "1"}) as (modules, built, log):
        group = group_of(modules, place)
        assert not built and type(group.ca_comm).__name__ == "CustomAllReduceV2" and os.environ[V2_SWITCH] == "1"
        assert said(log, f"Disabling {V2_SWITCH} because nnodes=2 (custom all-reduce v2 is intra-node only).")
        assert len(said(log, "is not used in SGLang", "nnodes=2")) == (place.rank == 0)
    with started(place, "require", nnodes=2) as (modules, built, log):
        raised(SystemExit, lambda: group_of(modules, place), "nnodes=2")


def refused(place):
    for machine in ("no-driver", "a100-vgpu-x2"):
        with started(place, machine=machine) as (modules, built, log):
            group = group_of(modules, place)
            assert type(group.ca_comm).__name__ == "CustomAllReduceV2" and not built
            assert group.all_reduce(torch.ones(3)).tolist() == [2.0] * 3 and group.ca_comm.calls == 1
            assert len(said(log, "is not used in SGLang 0.5.23: group tp:0: ")) == (place.rank == 0)
        with started(place, "require", machine) as (modules, built, log):
            raised(SystemExit, lambda: group_of(modules, place), "is not used in SGLang 0.5.23", "set ALLREDUCE_JIT=1")


def what_is_swallowed(place):
    """SGLang goes on after an error while ours is built, or with what another plug-in put there; it is said, or required."""
    for value in ("1", "require"):
        with mock.patch.object(plugin, "build", mock.Mock(side_effect=RuntimeError("planted"))):
            with started(place, value) as (modules, built, log):
                if value == "require":
                    raised(SystemExit, lambda: group_of(modules, place), "it holds nothing", "see the log")
                else:
                    assert group_of(modules, place).ca_comm is None
                    assert len(said(log, "it holds nothing")) == (place.rank == 0)
    with started(place) as (modules, built, log):
        modules[CUSTOM].dispatch_custom_allreduce = lambda group, device: fake_sglang.Upstream
        group_of(modules, place)
        assert len(said(log, "it holds a Upstream", "another plug-in")) == (place.rank == 0)


def fused(place):
    with started(place) as (modules, built, log):
        group = group_of(modules, place)
        (engine,), fusion = built, modules[FUSION]
        other = mock.Mock(world_size=2, rank_in_group=place.rank, ca_comm=None)
        fusion.groups = {True: group, False: other}
        generator = torch.Generator().manual_seed(5)
        x = torch.randn(place.world_size, 4, HIDDEN, generator=generator).bfloat16()[place.rank].contiguous()
        residual, weight = (
            torch.randn(4, HIDDEN, generator=generator).bfloat16(),
            torch.randn(HIDDEN, generator=generator).bfloat16(),
        )
        total = group.ca_comm.custom_all_reduce(x)
        call = fusion.flashinfer_allreduce_residual_rmsnorm
        kept = residual.clone()
        found = call(input_tensor=x, residual=residual, weight=weight, eps=1e-5, max_token_num=2048, use_attn_tp_group=True)
        want = add_rms_norm(total, residual, weight, 1e-5)
        assert all(torch.equal(a, b) for a, b in zip(found, want)) and torch.equal(residual, kept)
        assert (engine.norms, fusion.calls) == (1, 0)
        found = call(x, residual, weight.float())  # weights of Gemma
        want = add_rms_norm(total, residual, weight.float(), 1e-6)
        assert all(torch.equal(a, b) for a, b in zip(found, want)) and engine.norms == 2
        # SGLang's own: another group, more rows than a kernel takes, no such kernel, no rows, arguments by place.
        many, narrow = torch.ones(MOST_ROWS + 1, HIDDEN).bfloat16(), torch.ones(2, 32).bfloat16()
        for declined in (
            lambda: call(x, residual, weight, use_attn_tp_group=False),
            lambda: call(many, many, weight),
            lambda: call(x, residual, weight.half()),
            lambda: call(x[:0], residual[:0], weight),
            lambda: call(x, residual, weight, 1e-6, 2048, None, False, True, True),
            lambda: call(narrow, narrow, torch.ones(32).bfloat16()),
        ):
            calls = fusion.calls
            assert declined() == (None, None) and fusion.calls == calls + 1 and engine.norms == 2
        group.ca_comm.close()
        assert call(x, residual, weight) == (None, None)
        again = group_of(modules, place)  # hooked once
        fusion.groups[True] = again
        call(x, residual, weight)
        assert built[1].norms == 1
        again.ca_comm.close()


def fused_where_it_has_moved(place):
    """The all-reduce is ours, the fused operation stays SGLang's, and the line says why."""

    def no_groups(modules):
        del modules[FUSION].resolve_fusion_group

    def other_arguments(modules):
        modules[FUSION].flashinfer_allreduce_residual_rmsnorm = lambda x, residual, weight, eps: (None, None)

    def nothing(modules):
        del modules[FUSION].flashinfer_allreduce_residual_rmsnorm

    def no_flashinfer(modules):
        del modules[STATE].GroupCoordinator._can_use_flashinfer_allreduce

    for change, why in ((no_groups, "no resolve_fusion_group()"), (other_arguments, "takes (x, residual, weight, eps)"),
                        (nothing, "is not there")):  # fmt: skip
        with started(place, change=change) as (modules, built, log):
            group = group_of(modules, place)
            assert type(group.ca_comm) is AllReduceJit
            assert len(said(log, "not ours, as", why, "before us: FlashInfer, in layers")) == (place.rank == 0), (why, log)
            group.ca_comm.close()

    def older(modules):
        """0.5.12: nothing is handed to the dispatch, and there is no such method."""
        modules[CUSTOM].dispatch_custom_allreduce = lambda: fake_sglang.Upstream

    with started(place, version="0.5.12", change=older) as (modules, built, log):
        group = group_of(modules, place, arguments=())
        assert type(group.ca_comm) is AllReduceJit and len(said(log, "in SGLang 0.5.12, group tp:0: v2")) == (place.rank == 0)
        group.ca_comm.close()


CASES = [off, ours, switch_and_nodes, refused, what_is_swallowed, fused, fused_where_it_has_moved]


def test_two_ranks():
    assert len(ranks.run(suite, CASES, cpu=2, deadline=200).value) == len(CASES)


# -- in this process: an SGLang that has moved


def without(module, *path):
    def change(modules):
        owner = modules[module]
        for name in path[:-1]:
            owner = getattr(owner, name)
        delattr(owner, path[-1])

    return change


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (without("sglang.srt.plugins.hook_registry", "HookRegistry", "_patched"), "its hook registry has no _patched"),
        (without("sglang.srt.plugins.hook_registry", "HookRegistry"), "it has moved what the plug-in holds on to"),
        (without(CUSTOM, "dispatch_custom_allreduce"), "it has moved what the plug-in holds on to"),
        (without(STATE, "GroupCoordinator"), "it has moved what the plug-in holds on to"),
        (lambda modules: setattr(modules[STATE], "GroupCoordinator", len), "GroupCoordinator is no class"),
    ],
)
@pytest.mark.parametrize("value", ["1", "require"])
def test_an_sglang_that_has_moved(change, why, value):
    with mock.patch.dict(os.environ, {"ALLREDUCE_JIT": value}), fake_sglang.fake_sglang("0.9.0", change=change), logged() as log:
        if value == "require":
            with pytest.raises(SystemExit, match="is not used in SGLang 0.9.0") as caught:
                plugin.register()
            assert why in str(caught.value) and said(log, why)
        else:
            plugin.register()
            assert len(said(log, "is not used in SGLang 0.9.0", why)) == 1


def test_nodes_that_sglang_does_not_tell():
    with fake_sglang.fake_sglang(nnodes=3):
        assert plugin._nodes() == 3

    def silent(modules):
        modules["sglang.srt.runtime_context"].get_parallel = lambda: (_ for _ in ()).throw(RuntimeError("not published"))

    with fake_sglang.fake_sglang(nnodes=3, change=silent):
        assert plugin._nodes() == 1


def test_the_stand_ins_have_the_signatures_they_say():
    import pkgutil

    with fake_sglang.fake_sglang():
        for name, arguments in fake_sglang.SIGNATURES.items():
            assert fake_vllm.arguments(pkgutil.resolve_name(name)) == arguments, name
