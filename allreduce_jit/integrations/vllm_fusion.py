"""All-reduce + (add) RMSNorm (+ static FP8) of ours in place of FlashInfer's in vLLM's compiled graphs.

vLLM's ``AllReduceFusionPass`` finds ``vllm::all_reduce`` followed by ``vllm_ir::rms_norm`` or ``vllm_ir::fused_add_rms_norm`` and puts
FlashInfer's call there; ``PostGradPassManager.configure`` builds it where ``pass_config.fuse_allreduce_rms`` is on. Here another pass of the
same patterns takes its place. Read in vLLM 0.32.0 and 0.33.0, whose files are the same.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from ..errors import InputError
from ..norms import norm_family
from ..paths import Path
from ..version import __version__
from .engines import Group, group_of, log
from .present import VLLM_READ as READ
from .present import release_of

EPSILONS = (1e-5, 1e-6)  # those that vLLM's own pass looks for

_library = torch.library.Library("allreduce_jit_vllm", "DEF")
_library.define(
    "add_rms_norm(Tensor x, Tensor? residual, Tensor weight, float eps, int weight_bias, str group) -> (Tensor, Tensor)"
)
_library.define(
    "add_rms_norm_fp8(Tensor x, Tensor? residual, Tensor weight, Tensor scale, float eps, str group) -> (Tensor, Tensor)"
)


def _add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, weight_bias: int, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return group_of(group).add_rms_norm(x, residual, weight, eps, weight_bias=weight_bias)


def _add_rms_norm_fp8(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, scale: torch.Tensor, eps: float, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    return group_of(group).add_rms_norm_fp8(x, residual, weight, scale, eps)


def _fake(x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_fp8(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, *rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape)


for _key in ("CPU", "CUDA"):
    _library.impl("add_rms_norm", _add_rms_norm, _key)
    _library.impl("add_rms_norm_fp8", _add_rms_norm_fp8, _key)
torch.library.register_fake("allreduce_jit_vllm::add_rms_norm", _fake, lib=_library)
torch.library.register_fake("allreduce_jit_vllm::add_rms_norm_fp8", _fake_fp8, lib=_library)


def install(group: Group, config: Any, version: str) -> str | None:
    """Put our pass in place of FlashInfer's for graphs of ``group``; or say why not: then vLLM's stays."""
    passes = getattr(getattr(config, "compilation_config", None), "pass_config", None)
    if passes is None:
        return "no configuration of vLLM was set when the group was built"
    if not getattr(passes, "fuse_allreduce_rms", False):
        return "vLLM fuses no all-reduce with a norm here (pass_config.fuse_allreduce_rms)"
    if release_of(version) not in READ:
        read = ", ".join(f"{major}.{minor}" for major, minor in READ)
        return f"its pass was read in vLLM {read}, not in {version}"
    if group.comm.path is not Path.V2:
        return f"only the V2 path has kernels with a norm, and this is {group.comm.path.value}"
    try:
        manager: Any = importlib.import_module("vllm.compilation.passes.pass_manager")
        made = make_pass(group.name)
    except (AttributeError, ImportError) as e:
        return f"vLLM's passes are not what they were: {e}"
    if not isinstance(getattr(manager, "AllReduceFusionPass", None), type):
        return "this platform's pass manager has no AllReduceFusionPass"
    more = getattr(config, "additional_config", None)
    if not isinstance(more, dict):
        return "vLLM's additional_config is no dict, and its compile cache could not tell graphs with our calls from others"
    # vLLM keeps compiled graphs by a hash of its configuration, which this is a part of, and of none of its passes.
    more["allreduce_jit"] = cache_key(group.name)
    manager.AllReduceFusionPass = made
    return None


def cache_key(group: str) -> str:
    """What compiled graphs depend on: this module, and the name that their calls hold."""
    text = "\n".join((inspect.getsource(sys.modules[__name__]), __version__, group))
    return hashlib.sha256(text.encode()).hexdigest()


def make_pass(group: str) -> type:
    """The pass over graphs whose all-reduces are those of ``group``; built with vLLM's configuration.

    Raises:
        AttributeError, ImportError: vLLM lacks a name that it stands on.
    """
    from torch._inductor import pattern_matcher
    from vllm.compilation.passes.inductor_pass import enable_fake_mode
    from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass, VllmPatternMatcherPass

    for name in ("rms_norm", "fused_add_rms_norm"):
        getattr(importlib.import_module("vllm.ir.ops"), name)

    class AllReduceJitFusionPass(VllmPatternMatcherPass):
        """Matches what vLLM's ``AllReduceFusionPass`` matches, NVFP4 aside."""

        def __init__(self, config: Any):
            super().__init__(config)
            self.patterns: Any = pattern_matcher.PatternMatcherPass(pass_name="allreduce_jit_fusion_pass")
            self.disabled = True
            why = unfit(config)
            if why is not None:
                log.warning("all-reduces of this model are not fused with their norms: %s", why)
                return
            self._register()
            self.dump_patterns(config, self.patterns)
            self.disabled = False

        @enable_fake_mode
        def _register(self) -> None:
            for pattern in patterns(group, self.model_dtype, self.device):
                pattern_matcher.register_replacement(*pattern, pattern_matcher.fwd_only, self.patterns, extra_check=one_dtype)
                # It refuses a second pattern that differs from the first in a constant alone.
                pattern_matcher._seen_patterns.clear()

        def is_applicable_for_range(self, compile_range: Any) -> bool:
            # A call of more rows than the kernels take is an all-reduce and a norm: each call decides for itself.
            return not self.disabled

        @VllmInductorPass.time_and_log
        def __call__(self, graph: torch.fx.Graph) -> None:
            self.matched_count = self.patterns.apply(graph)
            VllmPatternMatcherPass.match_table[self.pass_name] += self.matched_count
            log.debug("%d all-reduces fused with their norms in group %s", self.matched_count, group)

        def uuid(self) -> str:
            return cache_key(group)

    return AllReduceJitFusionPass


def unfit(config: Any) -> str | None:
    """Why no norm of ours is one of the model's."""
    model = getattr(config, "model_config", None)
    if model is None:
        return "no model is configured"
    try:
        norm_family(model.dtype, model.get_hidden_size())
    except InputError as e:
        return str(e)
    return None


def patterns(group: str, dtype: torch.dtype, device: str | None) -> list[tuple[Callable, Callable, list[torch.Tensor]]]:
    """(what is looked for, what takes its place, tensors to trace both with), the more specific first."""
    from vllm.compilation.passes.fusion.matcher_utils import MatcherQuantFP8
    from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8StaticTensorSym

    def tensors(quantized: bool = False, residual: bool = True) -> list[torch.Tensor]:
        # Two arguments that are one tensor would be traced as one.
        rows = [torch.empty(5, 16, dtype=dtype, device=device) for _ in range(1 + residual)]
        return [*rows, torch.empty(16, dtype=dtype, device=device), *([quantize.inputs()[1]] if quantized else [])]

    quantize = MatcherQuantFP8(kFp8StaticTensorSym)
    found = []
    for eps in EPSILONS:
        found += [
            (*_quantized(group, eps, quantize), tensors(quantized=True, residual=False)),
            (*_quantized_add(group, eps, quantize), tensors(quantized=True)),
        ]
        for bias in (0, 1):
            search, replace = _added(group, eps, bias)
            found += [
                (*_alone(group, eps, bias), tensors(residual=False)),
                (search, replace, tensors()),
                # At the end of a graph nobody asks for the sum.
                (_norm_alone(search), _norm_alone(replace), tensors()),
            ]
    return found


def one_dtype(match: Any) -> bool:
    """Whether rows and weight of the matched norm are of one dtype: a weight in fp32 is Gemma's, which has a pattern of its own."""
    weights = {torch.ops.vllm_ir.rms_norm.default: 1, torch.ops.vllm_ir.fused_add_rms_norm.default: 2}
    for node in match.nodes:
        if node.target in weights:
            x, weight = node.args[0].meta["val"], node.args[weights[node.target]]
            biased = weight.op == "call_function" and weight in match.nodes
            return biased or x.dtype == weight.meta["val"].dtype
    return True


def _sum(x: torch.Tensor, group: str) -> torch.Tensor:
    return torch.ops.vllm.all_reduce(x, group_name=group)


def _gamma(weight: torch.Tensor, bias: int) -> torch.Tensor:
    return weight.float() + 1.0 if bias else weight


def _alone(group: str, eps: float, bias: int) -> tuple[Callable, Callable]:
    """Without a residual, as before the first layer's attention."""
    ir = importlib.import_module("vllm.ir.ops")

    def search(x, weight):
        total = _sum(x, group)
        return ir.rms_norm(total, _gamma(weight, bias), eps), total

    def replace(x, weight):
        return torch.ops.allreduce_jit_vllm.add_rms_norm(x, None, weight, eps, bias, group)

    return search, replace


def _added(group: str, eps: float, bias: int) -> tuple[Callable, Callable]:
    ir = importlib.import_module("vllm.ir.ops")

    def search(residual, x, weight):
        return ir.fused_add_rms_norm(_sum(x, group), residual, _gamma(weight, bias), eps)

    def replace(residual, x, weight):
        return torch.ops.allreduce_jit_vllm.add_rms_norm(x, residual, weight, eps, bias, group)

    return search, replace


def _norm_alone(both: Callable) -> Callable:
    return lambda residual, x, weight: both(residual, x, weight)[0]


def _quantized(group: str, eps: float, quantize: Callable) -> tuple[Callable, Callable]:
    ir = importlib.import_module("vllm.ir.ops")

    def search(x, weight, scale):
        total = _sum(x, group)
        return quantize(ir.rms_norm(total, weight, eps), scale)[0], total

    def replace(x, weight, scale):
        return torch.ops.allreduce_jit_vllm.add_rms_norm_fp8(x, None, weight, scale, eps, group)

    return search, replace


def _quantized_add(group: str, eps: float, quantize: Callable) -> tuple[Callable, Callable]:
    ir = importlib.import_module("vllm.ir.ops")

    def search(residual, x, weight, scale):
        norm, total = ir.fused_add_rms_norm(_sum(x, group), residual, weight, eps)
        return quantize(norm, scale)[0], total

    def replace(residual, x, weight, scale):
        return torch.ops.allreduce_jit_vllm.add_rms_norm_fp8(x, residual, weight, scale, eps, group)

    return search, replace
