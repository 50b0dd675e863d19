"""What ``bench --op add-rms-norm`` measures beside ours: FlashInfer's fused kernels, and others' all-reduces with our norm kernel behind."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from . import competitors
from .competitors import Competitor, FlashInfer, Unavailable
from .norm_calls import EPS, Given, NormKind

# Patterns of AllReduceFusionPattern by what the norm is quantized to; none has fp32 scales by the group.
_PATTERNS = {
    "none": "kARResidualRMSNorm",
    "static": "kARResidualRMSNormFP8Quant",
    "token": "kARResidualRMSNormDynamicFP8Quant",
}


class FlashInferOneShot(FlashInfer):
    """FlashInfer's all-reduce with residual, norm and quantization in one kernel, every rank summing all."""

    name = "flashinfer_one_shot"
    LARGEST = 32 << 20
    use_oneshot = True

    def fused(self, kind: NormKind, tensor: torch.Tensor, given: Given, outs: Mapping[str, torch.Tensor]) -> None:
        """The call with the results in ``outs``; the residual that is given stays what it is."""
        rows, hidden = tensor.shape
        pattern = getattr(self.comm.AllReduceFusionPattern, _PATTERNS.get(kind.quant, ""), None)
        if pattern is None:
            raise Unavailable(f"this FlashInfer has no pattern for quantization {kind.quant!r}")
        if given.residual is None or tensor.element_size() != 2 or tensor.nbytes > self.largest:
            raise Unavailable(f"set up for fp16 or bf16 with a residual, up to {self.LARGEST >> 20} MB")
        if not self.use_oneshot and rows <= self.place.world_size:
            raise Unavailable(f"two-shot takes more than {self.place.world_size} rows")
        quantized = kind.quant != "none"
        how = self.fixed | {
            "pattern_code": pattern,
            "use_oneshot": self.use_oneshot,
            "residual_in": given.residual,
            "residual_out": outs["residual_out"],
            "norm_out": None if quantized else outs["out"],
            "quant_out": outs["out"] if quantized else None,
            "scale_out": outs.get("scale_out"),
            "rms_gamma": given.weight,
            "rms_eps": EPS,
            "scale_factor": given.scale,
        }
        self.fusion(allreduce_in=tensor, allreduce_out=None, token_num=rows, hidden_dim=hidden, **how)


class FlashInferTwoShot(FlashInferOneShot):
    """The same, every rank summing a part."""

    name = "flashinfer_two_shot"
    use_oneshot = False


def kinds() -> dict[str, type[Competitor]]:
    """By name; in place of FlashInfer's all-reduce both of its fused forms."""
    plain = {name: kind for name, kind in competitors.COMPETITORS.items() if kind is not FlashInfer}
    return {**plain, FlashInferOneShot.name: FlashInferOneShot, FlashInferTwoShot.name: FlashInferTwoShot}


def names(peers: tuple[str, ...]) -> list[str]:
    """What ``--peers`` names."""
    fused = [FlashInferOneShot.name, FlashInferTwoShot.name]
    return [name for peer in peers for name in (fused if peer == FlashInfer.name else [peer])]


def call(competitor: Competitor, kind: NormKind, tensor: torch.Tensor, given: Given, outs: Mapping[str, torch.Tensor]) -> None:
    """All-reduce and norm by ``competitor``, or its all-reduce and our norm kernel; ``tensor`` (rows, hidden) is one of its own."""
    if isinstance(competitor, FlashInferOneShot):
        competitor.fused(kind, tensor, given, outs)
    else:
        kind.twin(competitor.call(tensor).view(tensor.shape), given, outs)()
