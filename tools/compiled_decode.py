"""A decode loop under ``torch.compile``: tokens per second with torch.distributed's all-reduce, torch's two-shot, and ours.

Usage: python tools/compiled_decode.py [--gpus N | --cpu N] [--batches 1,8,32] [--modes default,reduce-overhead] [--steps 64]

The model is that of ``decode_step.py`` (Llama 3 8B's shape, random weights) with an embedding and a head: each step's tokens are the next
one's input. It is compiled as a whole (``fullgraph``), once for each way of its all-reduces:
 - ``torch.distributed``: functional collectives (NCCL on GPUs), on a group of its own;
 - ``installed``: the same, on the group of ``allreduce_jit.install``;
 - ``torch_two_shot``: ``torch.ops.symm_mem.two_shot_all_reduce_out`` from a buffer of symmetric memory, into which it is copied;
 - ``fused``: ``torch.ops.allreduce_jit.all_reduce_add_rms_norm``, the norm with it. The others leave the norm to the compiler.
``modes`` are torch.compile's; ``reduce-overhead`` records CUDA graphs. All are measured in turn; the figure is the best turn of the slowest
rank. The exit code is 1 if ranks have different tokens, or ``installed`` others than ``torch.distributed`` on two ranks, where a sum has
one rounding either way; ``first_difference`` tells where the first other token is (``fused`` rounds the norm in another place).
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import asdict, dataclass
from typing import Any

import decode_step
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
import torch.nn.functional as F

import allreduce_jit
from allreduce_jit.bench.competitors import TorchTwoShot, open_competitors
from allreduce_jit.bench.norm_calls import EPS
from allreduce_jit.harness import ranks, report, terminal
from allreduce_jit.integrations.operators import register_communicator

WARMUP = 4  # steps; CUDA graphs are recorded in the second and replayed from the third on
DTYPE = decode_step.DTYPE


@dataclass(frozen=True)
class Options:
    """The model, all ranks together, and how to measure it; ``backend``: of torch.compile, ``context``: tokens of the cache."""

    batches: tuple[int, ...] = (1, 8, 32)
    modes: tuple[str, ...] = ("default", "reduce-overhead")
    layers: int = 32
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    intermediate: int = 14336
    context: int = 64
    vocabulary: int = 32_000
    steps: int = 64
    turns: int = 3
    backend: str = "inductor"
    head_dim: int = 128

    @property
    def model(self) -> decode_step.Options:
        names = ("batches", "layers", "hidden", "heads", "kv_heads", "intermediate", "context", "turns", "head_dim")
        return decode_step.Options(**{name: getattr(self, name) for name in names}, replays=0, peers=())


class Decoder(torch.nn.Module):
    """tokens [batch] -> the next tokens. ``finish(part, residual, weight) -> (norm, sum)`` is what variants differ in."""

    def __init__(self, model: decode_step.Model, vocabulary: int):
        super().__init__()
        self.heads, self.width = model.heads, model.options.head_dim
        hidden = model.options.hidden
        for i, layer in enumerate(model.layers):
            for name, weight in layer.items():
                self.register_buffer(f"{name}{i}", weight)
        self.layers = len(model.layers)
        words = torch.empty(2, vocabulary, hidden, dtype=DTYPE, device=model.device)
        words.normal_(generator=model.shared)
        self.register_buffer("embedding", words[0])
        self.register_buffer("head", words[1] * hidden**-0.5)
        for i, name in enumerate(("keys", "values")):
            self.register_buffer(name, model.cache[i])

    def finish(self, part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        raise NotImplementedError

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        residual = F.embedding(tokens, self.embedding)
        norm = F.rms_norm(residual, residual.shape[-1:], eps=EPS)
        for i in range(self.layers):
            layer = {name: getattr(self, f"{name}{i}") for name in ("qkv", "o", "up", "down", "norms")}
            query = F.linear(norm, layer["qkv"])[:, : self.heads * self.width].view(-1, self.heads, 1, self.width)
            attended = F.scaled_dot_product_attention(query, self.keys, self.values).view(-1, self.heads * self.width)
            norm, residual = self.finish(F.linear(attended, layer["o"]), residual, layer["norms"][0])
            gate, up = F.linear(norm, layer["up"]).chunk(2, dim=-1)
            norm, residual = self.finish(F.linear(F.silu(gate) * up, layer["down"]), residual, layer["norms"][1])
        return F.linear(norm, self.head).argmax(-1)


class Functional(Decoder):
    """``group_name``: of the process group."""

    def __init__(self, model: decode_step.Model, vocabulary: int, group: dist.ProcessGroup):
        super().__init__(model, vocabulary)
        self.group_name = group.group_name

    def finish(self, part, residual, weight):
        total = funcol.all_reduce(part, "sum", self.group_name) + residual
        return F.rms_norm(total, total.shape[-1:], weight, EPS), total


_symmetric: dict[str, torch.Tensor] = {}  # symmetric memory by the name of its group


@torch.library.custom_op("allreduce_jit_compiled_decode::two_shot", mutates_args=())
def two_shot(part: torch.Tensor, group_name: str) -> torch.Tensor:
    """torch's own, which cannot be traced by itself (torch 2.11 has no fake implementation of it), and in a compiled graph would be given
    other memory than it needs."""
    buffer, out = _symmetric[group_name][: part.numel()].view_as(part), torch.empty_like(part)
    buffer.copy_(part)
    torch.ops.symm_mem.two_shot_all_reduce_out(buffer, "sum", group_name, out)
    return out


@two_shot.register_fake
def _(part: torch.Tensor, group_name: str) -> torch.Tensor:
    return torch.empty_like(part)


class TwoShot(Functional):
    """Through symmetric memory."""

    def finish(self, part, residual, weight):
        total = two_shot(part, self.group_name) + residual
        return F.rms_norm(total, total.shape[-1:], weight, EPS), total


class Fused(Decoder):
    """``name``: of the communicator."""

    def __init__(self, model: decode_step.Model, vocabulary: int, name: str):
        super().__init__(model, vocabulary)
        self.comm_name = name

    def finish(self, part, residual, weight):
        return torch.ops.allreduce_jit.all_reduce_add_rms_norm(part, residual, weight, EPS, self.comm_name)


def decoded(place: Any, step: Any, first: torch.Tensor, steps: int) -> tuple[list[list[int]], float]:
    """Tokens by the step, and seconds."""
    place.synchronize()
    place.barrier()
    tokens, kept = first, []
    start = time.perf_counter()
    with torch.no_grad():
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            tokens = step(tokens).clone()  # the output of a CUDA graph is overwritten by the next replay
            kept.append(tokens)
    place.synchronize()
    seconds = time.perf_counter() - start
    return torch.stack(kept).tolist(), seconds


def work(place: Any, options: Options) -> dict[str, Any]:
    """One rank's part; every rank returns the same."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 1000
    other = dist.new_group()
    assert other is not None
    installation = allreduce_jit.install(device=place.device, compiled=False)
    family = allreduce_jit.norm_family(DTYPE, options.hidden)
    with allreduce_jit.init(device=place.device, operations=[family]) as comm:
        name = register_communicator(comm, "compiled_decode")
        comm.warmup()
        peers, missing = open_competitors(
            place,
            ("torch_two_shot",),
            1,
            max(options.batches) * options.hidden * DTYPE.itemsize,
            {"torch_two_shot": TorchTwoShot},
        )
        if peers:
            _symmetric[peers[0].group_name] = peers[0].tensors(max(options.batches) * options.hidden, DTYPE)[0]
        model, progress, rows = decode_step.Model(place, options.model), terminal.Progress(place.rank == 0), []
        for batch in options.batches:
            model.begin(batch)
            makers = {
                "torch.distributed": lambda: Functional(model, options.vocabulary, other),
                "installed": lambda: Functional(model, options.vocabulary, dist.group.WORLD),
                "fused": lambda: Fused(model, options.vocabulary, name),
            }
            if peers:
                makers["torch_two_shot"] = lambda: TwoShot(model, options.vocabulary, dist.group.WORLD)
            for mode in options.modes:
                progress(f"compiled decode: batch {batch}, {mode}")
                rows.append({"batch": batch, "mode": mode} | measured(place, options, mode, batch, makers, model))
        progress.done()
        comm.check()
        # Graphs go before the communicators whose kernels they hold.
        torch._dynamo.reset()
        place.synchronize()
        place.barrier()
        taken = installation.describe()
        allreduce_jit.uninstall()
    _symmetric.clear()
    for peer in peers:
        peer.close()
    return {
        "ok": all(
            row["same_on_all_ranks"] and (place.world_size > 2 or row["first_difference"]["installed"] is None) for row in rows
        ),
        "machine": report.machine(),
        "path": taken["path"],
        "installed": taken,
        "world_size": place.world_size,
        "options": asdict(options),
        "unit": f"tokens a second: best of {options.turns} turns of {options.steps} steps",
        "unavailable": missing,
        "rows": rows,
    }


def measured(place: Any, options: Options, mode: str, batch: int, makers: dict[str, Any], model: Any) -> dict[str, Any]:
    how = {} if options.backend != "inductor" or mode == "default" else {"mode": mode}
    steps, state = {}, model.shared.get_state()
    first = torch.randint(options.vocabulary, (batch,), generator=torch.Generator().manual_seed(batch)).to(place.device)
    for name, make in makers.items():
        model.shared.set_state(state)  # the same embedding and head
        steps[name] = torch.compile(make(), fullgraph=True, backend=options.backend, **how)
        decoded(place, steps[name], first, WARMUP)
    tokens: dict[str, Any] = {}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.turns):
        for name, step in steps.items():
            tokens[name], took = decoded(place, step, first, options.steps)
            seconds[name].append(max(place.gather(took)))
    everyone = place.gather(tokens)
    rates = {name: round(batch * options.steps / min(times), 1) for name, times in seconds.items()}
    want = tokens["torch.distributed"]
    return {
        "tokens_per_s": rates,
        "ratio": {name: round(rate / rates["torch.distributed"], 3) for name, rate in rates.items()},
        "first_difference": {
            name: next((i for i, (a, b) in enumerate(zip(made, want, strict=True)) if a != b), None)
            for name, made in tokens.items()
        },
        "different_tokens": len({token for step in want for token in step}),
        "same_on_all_ranks": all(one == everyone[0] for one in everyone),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=int)
    where.add_argument("--cpu", type=int)
    parser.add_argument("--deadline", type=float, default=600.0)
    for name, default in asdict(Options()).items():
        kind = type(default)
        if kind is tuple:
            inner = type(default[0])
            kind = lambda text, inner=inner: tuple(map(inner, text.split(",")))  # noqa: E731
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default)
    given = vars(parser.parse_args())
    where_to = {name: given.pop(name) for name in ("gpus", "cpu", "deadline")}
    return ranks.run(work, Options(**given), **where_to).conclude(True, str)


if __name__ == "__main__":
    sys.exit(main())
