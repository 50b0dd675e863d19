"""What the all-reduces and norms of a decode step cost: a model of Llama 3 8B's shape, split over ranks, a CUDA graph a step.

Usage: python tools/decode_step.py [--gpus N | --cpu N] [--batches 1,8,32,128] [--peers nccl,torch_two_shot,flashinfer | none]

Prints JSON: µs a step of each variant, all measured in turn in one run, and their ratios to the faster one of the two steps that leave
communication out (``triton`` and ``torch``: what makes their norms, in kernels of their own):
 - ``fused``: all-reduce, residual and norm in one call of ours, ``unfused`` in two;
 - others: their all-reduce and our norm kernel, but for flashinfer_*, which are fused.
Weights are random, scaled so that values stay finite. Attention is a stand-in, the same in all variants: one query over a small cache
that all layers share, to which nothing is added. The exit code is 1 if ``fused`` and ``unfused`` differ in a bit on any rank,
or the ranks from each other.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import allreduce_jit
from allreduce_jit.bench import fused_competitors, timing
from allreduce_jit.bench.competitors import agreed, open_competitors
from allreduce_jit.bench.norm_calls import EPS, Given, NormKind
from allreduce_jit.engine import reference
from allreduce_jit.harness import ranks, report, terminal

ALONE = ("triton", "torch")  # without communication
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Options:
    """The model, all ranks together, and how to measure it; ``context``: tokens of the cache, ``turns`` of ``replays`` each."""

    batches: tuple[int, ...]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    context: int
    turns: int
    replays: int
    peers: tuple[str, ...]
    head_dim: int = 128


class Model:
    """The weights of one rank, and the step."""

    def __init__(self, place: Any, options: Options):
        n = place.world_size
        if options.heads % n or options.kv_heads % n or options.intermediate % n:
            raise allreduce_jit.InputError(f"{n} ranks do not divide heads and intermediate size")
        self.options, self.device, self.heads = options, place.device, options.heads // n
        width, hidden, inner = options.head_dim, options.hidden, options.intermediate // n
        generator = torch.Generator(place.device).manual_seed(place.rank)
        shared = torch.Generator(place.device).manual_seed(1000)

        def matrix(rows: int, columns: int, fan_in: int) -> torch.Tensor:
            made = torch.empty(rows, columns, dtype=DTYPE, device=place.device)
            return made.normal_(0, fan_in**-0.5, generator=generator)

        self.layers = [
            {
                "qkv": matrix((self.heads + 2 * options.kv_heads // n) * width, hidden, hidden),
                "o": matrix(hidden, self.heads * width, options.heads * width),
                "up": matrix(2 * inner, hidden, hidden),
                "down": matrix(hidden, inner, options.intermediate),
                "norms": torch.empty(2, hidden, dtype=DTYPE, device=place.device).normal_(1, 0.1, generator=shared),
            }
            for _ in range(options.layers)
        ]
        self.generator, self.shared = generator, shared

    def begin(self, batch: int) -> None:
        """The cache, and the token embeddings and their norm, which are the same on all ranks."""
        shape = 2, batch, self.heads, self.options.context, self.options.head_dim
        self.cache = torch.empty(shape, dtype=DTYPE, device=self.device).normal_(generator=self.generator)
        shape = batch, self.options.hidden
        self.embedded = torch.empty(shape, dtype=DTYPE, device=self.device).normal_(generator=self.shared)
        self.normed = F.rms_norm(self.embedded, shape[-1:], eps=EPS)

    def step(self, variant: Variant) -> None:
        """Leaves the last norm and the last sum in ``variant.norm`` and ``variant.sum``."""
        width, heads = self.options.head_dim, self.heads
        norm, residual = self.normed, self.embedded
        for layer in self.layers:
            query = F.linear(norm, layer["qkv"])[:, : heads * width].view(-1, heads, 1, width)
            attended = F.scaled_dot_product_attention(query, *self.cache).view(-1, heads * width)
            torch.mm(attended, layer["o"].t(), out=variant.parts[0])
            variant.finish(variant.parts[0], residual, layer["norms"][0])
            norm, residual = variant.norm, variant.sum
            gate, up = F.linear(norm, layer["up"]).chunk(2, dim=-1)
            torch.mm(F.silu(gate) * up, layer["down"].t(), out=variant.parts[1])
            variant.finish(variant.parts[1], residual, layer["norms"][1])


class Variant:
    """How a step all-reduces and norms. ``finish(part, residual, weight)`` fills ``norm`` and ``sum``, which may be the residual."""

    def __init__(self, shape: tuple[int, int], device: torch.device, parts: list[torch.Tensor] | None = None):
        def empty() -> torch.Tensor:
            return torch.empty(shape, dtype=DTYPE, device=device)

        self.parts = parts or [empty(), empty()]  # of this rank's, to be summed
        self.norm, self.sum = empty(), empty()
        self.capture: Callable[[], Any] = nullcontext
        self.finish: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]

    @property
    def outs(self) -> dict[str, torch.Tensor]:
        return {"out": self.norm, "residual_out": self.sum}


def variants(model: Model, communicator: Any, competitors: list[Any], batch: int) -> dict[str, Variant]:
    """By name, ours first."""
    shape, device = (batch, model.options.hidden), model.device
    kind = NormKind("bfloat16", model.options.hidden)
    names = (*ALONE, "unfused", "fused")
    made = {name: Variant(shape, device) for name in names}

    def triton(part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        kind.twin(part, Given(residual, weight, None), made["triton"].outs)()

    def by_torch(part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        total = torch.add(part, residual, out=made["torch"].sum)
        made["torch"].norm = F.rms_norm(total, shape[-1:], weight, EPS)

    def unfused(part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        communicator.all_reduce(part, out=part)
        kind.twin(part, Given(residual, weight, None), made["unfused"].outs)()

    def fused(part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> None:
        kind.fused(communicator, part, Given(residual, weight, None), made["fused"].outs)()

    for name, finish in zip(names, (triton, by_torch, unfused, fused)):
        made[name].finish = finish
        made[name].capture = communicator.capture
    for competitor in competitors:
        parts = [tensor.view(shape) for tensor in competitor.tensors(batch * model.options.hidden, DTYPE)]
        made[competitor.name] = one = Variant(shape, device, parts)
        one.capture = competitor.capture

        def theirs(part: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, one=one, competitor=competitor) -> None:
            fused_competitors.call(competitor, kind, part, Given(residual, weight, None), one.outs)

        one.finish = theirs
    return made


def work(place: Any, options: Options, init: Callable[..., Any] | None = None) -> dict[str, Any]:
    """One rank's part; every rank returns the same."""
    families = [NormKind("bfloat16", options.hidden).family]
    progress = terminal.Progress(place.rank == 0)
    with (init or allreduce_jit.init)(device=place.device, operations=families) as communicator:
        communicator.warmup()
        model = Model(place, options)
        largest = max(options.batches) * options.hidden * DTYPE.itemsize
        names = fused_competitors.names(options.peers)
        competitors, missing = open_competitors(place, names, 2, largest, fused_competitors.kinds())
        rows = []
        for batch in options.batches:
            progress(f"decode step: batch {batch}")
            rows.append(measured(place, model, communicator, competitors, batch))
        progress.done()
        for competitor in competitors:
            agreed(place, competitor.close)
        return {
            "ok": all(row["fused_differs"] == 0 and row["finite"] and row["same_on_all_ranks"] for row in rows),
            "machine": report.machine(),
            "path": communicator.describe().path.value,
            "world_size": place.world_size,
            "options": dataclasses.asdict(options),
            "fused_calls": 2 * options.layers,
            "unit": "µs a step: median and 99th percentile of each rank, then the slowest rank",
            "unavailable": missing,
            "batches": rows,
        }


def measured(place: Any, model: Model, communicator: Any, competitors: list[Any], batch: int) -> dict[str, Any]:
    model.begin(batch)
    ways = variants(model, communicator, competitors, batch)
    captured = timing.capturable(place, communicator)
    steps: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    for name, variant in ways.items():
        steps[name], trouble = agreed(place, lambda variant=variant: prepared(model, variant, captured, place))
        if trouble is not None:
            reasons[name] = trouble
    missing = [name for name in (*ALONE, "unfused", "fused") if name in reasons]
    if missing:
        raise allreduce_jit.SetupError(f"{missing[0]}: {reasons[missing[0]]}")
    barrier, samples = timing.device_barrier(place, communicator), {name: [] for name in ways if name not in reasons}
    for _ in range(model.options.turns):
        for name, mine in samples.items():
            if captured:
                mine += timing.replays_of(place, steps[name], 1, model.options.replays, 2, barrier)
            else:
                mine += [eager(place, model, ways[name]) for _ in range(model.options.replays)]
    times = {name: timing.slowest(place, mine) for name, mine in samples.items()}
    alone = min((times[name].p50_us, name) for name in ALONE)
    communicator.check()
    return {
        "batch": batch,
        "us": {name: round(found.p50_us, 2) for name, found in times.items()},
        "p99_us": {name: round(found.p99_us, 2) for name, found in times.items()},
        "fastest_without_communication": alone[1],
        "ratio": {name: round(found.p50_us / alone[0], 4) for name, found in times.items()},
        "plan": communicator.plan_norm(batch, NormKind("bfloat16", model.options.hidden).family).algorithm,
        "reasons": reasons,
        **checked(place, model, ways, steps),
    }


def prepared(model: Model, variant: Variant, captured: bool, place: Any) -> torch.cuda.CUDAGraph | None:
    """A graph of one step, which has run once eagerly."""
    model.step(variant)
    place.synchronize()
    if not captured:
        return None
    graph = torch.cuda.CUDAGraph()
    with variant.capture(), torch.cuda.graph(graph):
        model.step(variant)
    return graph


def eager(place: Any, model: Model, variant: Variant) -> float:
    place.barrier()
    start = time.perf_counter()
    model.step(variant)
    place.synchronize()
    return (time.perf_counter() - start) * 1e6


def checked(place: Any, model: Model, ways: dict[str, Variant], steps: dict[str, Any]) -> dict[str, Any]:
    """One more step of both of ours: elements of norm and sum in which they differ, and whether all ranks have the same bits."""
    for name in ("fused", "unfused"):
        reference.poison(ways[name].norm)
        reference.poison(ways[name].sum)
        steps[name].replay() if steps[name] is not None else model.step(ways[name])
    place.synchronize()
    pairs = [(ways["fused"].outs[name], ways["unfused"].outs[name]) for name in ways["fused"].outs]
    differs = sum(reference.compare(*pair).wrong for pair in pairs)
    finite = all(bool(tensor.isfinite().all()) for pair in pairs for tensor in pair)
    bits = [
        int(reference.as_bits(fused).long().mul(torch.arange(1, fused.shape[1] + 1, device=fused.device)).sum())
        for fused, _ in pairs
    ]
    everyone = place.gather((differs, finite, bits))
    return {
        "fused_differs": sum(one[0] for one in everyone),
        "finite": all(one[1] for one in everyone),
        "same_on_all_ranks": len({tuple(one[2]) for one in everyone}) == 1,
    }


def parsed(arguments: list[str] | None = None) -> tuple[Options, dict[str, Any]]:
    """What to measure, and where, for ``ranks.run``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=int)
    where.add_argument("--cpu", type=int)
    numbers = lambda text: tuple(map(int, text.split(",")))  # noqa: E731
    names = lambda text: tuple(name for name in text.split(",") if name != "none")  # noqa: E731
    parser.add_argument("--batches", type=numbers, default=(1, 8, 32, 128))
    parser.add_argument("--peers", type=names, default=("nccl", "torch_two_shot", "flashinfer"))
    for name, default in (
        ("layers", 32),
        ("hidden", 4096),
        ("heads", 32),
        ("kv-heads", 8),
        ("intermediate", 14336),
        ("context", 64),
        ("turns", 3),
        ("replays", 15),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--deadline", type=float, default=300.0)
    found = vars(parser.parse_args(arguments))
    where_to = {name: found.pop(name) for name in ("gpus", "cpu", "deadline")}
    return Options(**found), where_to


def main() -> int:
    options, where = parsed()
    outcome = ranks.run(work, options, **where)
    if outcome.rank == 0:
        print(json.dumps(outcome.value, indent=1))
    return 0 if outcome.value["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
