"""What the command line is given in place of a communicator; it sums over gloo."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as dist

from allreduce_jit import norms
from allreduce_jit.describe import Band, CommunicatorReport, KernelCounts
from allreduce_jit.paths import Path
from allreduce_jit.policy.verdict import Reason


@dataclass
class Fake:
    """What ``init`` hands out, over gloo; ``bug`` plants a fault."""

    device: torch.device
    path: str = "torch.distributed"
    bug: str = ""

    def __enter__(self):
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        return self

    def __exit__(self, *_):
        self.close()

    def all_reduce(self, x, out=None):
        result = self._ordered(x) if self.path == "v2" else self._gloo(x)
        if self.bug == "wrong element" and self.rank == 1 and x.numel() == 1021:
            result[1000] += 1
        if self.bug == "write past the end" and out is not None and out.storage_offset():
            torch.empty(0, dtype=x.dtype).set_(out.untyped_storage()).fill_(0)
        if self.bug == "input spoilt" and x.numel():
            x[0] = 77
        return result if out is None else out.copy_(result)

    def _gloo(self, x):
        total = x.clone()
        dist.all_reduce(total)
        return total

    def _ordered(self, x):
        everyone = [torch.empty(x.shape, dtype=x.dtype) for _ in range(self.world_size)]
        dist.all_gather(everyone, x.contiguous())
        if self.bug == "reverse order":
            everyone.reverse()
        return sum((t.float() for t in everyone[1:]), everyone[0].float()).to(x.dtype)

    def all_reduce_add_rms_norm(self, x, residual, weight, eps, **how):
        return self._normed(norms.add_rms_norm, x, residual, weight, eps, **how)

    def all_reduce_add_rms_norm_fp8(self, x, residual, weight, eps, **how):
        return self._normed(norms.add_rms_norm_fp8, x, residual, weight, eps, **how)

    def _normed(self, norm, x, residual, weight, eps, **how):
        kept = None if residual is None else residual.clone()
        total = x if self.bug == "sum of this rank alone" else self.all_reduce(x)
        if self.bug == "weight of another row" and self.rank == 1:
            weight = weight.roll(1)
        results = norm(total, residual, weight, eps, **how)
        if self.bug == "residual left out" and kept is not None and x.shape[0] == 3:
            results[-1 if norm is norms.add_rms_norm else 2].sub_(kept)
        if self.bug == "scale of another row" and how.get("scales") == "token" and self.rank == 1:
            results[1].copy_(results[1].roll(1, 0))
        if self.bug == "norm's input spoilt" and x.numel():
            x[0, 0] = 77
        return results

    def plan_norm(self, rows, family):
        return self.plan(rows * family.hidden, family.dtype)

    @contextmanager
    def capture(self):
        yield

    def warmup(self):
        pass

    check = close = warmup

    def plan(self, numel, dtype):
        name = f"rank {self.rank}'s" if self.bug == "plans differ" else "fake"
        return SimpleNamespace(path=self.path, algorithm=name, grid=1, block=32)

    def describe(self):
        return CommunicatorReport(
            path=Path(self.path),
            kernels_of=None,
            backend="gloo",
            reasons=(Reason("cpu", "rank 0 has its tensors on the CPU", 0),),
            deterministic=self.path == "v2",
            tuning=None,
            bands=(Band("float32", 0, 4096, self.path, "fake"),),
            staging_bytes=0,
            device_bytes=0,
            watched=(),
            timings={},
            kernels=KernelCounts(0, 0),
            c_calls=False,
            operations=(),
            rank=self.rank,
            world_size=self.world_size,
            device=str(self.device),
        )
