"""Hugging Face transformers with tensor parallelism, with and without ``allreduce_jit.install``: the same tokens, and how many a second.

Usage: torchrun --nproc-per-node 2 tools/transformers_tp.py [--layers 4] [--batch 1] [--new-tokens 64] [--turns 3]
   or: python tools/transformers_tp.py [--gpus N | --cpu N] ...

A Llama with random weights, by default of an 8B's shape but for the number of layers and the vocabulary, is saved by rank 0 and loaded by
all with ``tp_plan="auto"``. Each turn generates with torch.distributed alone (NCCL, or gloo on the CPU) and then with one line more.
Prints JSON; the exit code is 1 if tokens differ, between the two or between the ranks. With two ranks a sum has one rounding on either way;
with more, NCCL rounds in between, and tokens of an equal score may change places: then see ``first_difference``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch

import allreduce_jit
from allreduce_jit.harness import ranks, report


@dataclass(frozen=True)
class Options:
    """The model, and how much to generate."""

    layers: int = 4
    hidden: int = 4096
    intermediate: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 32_000
    batch: int = 1
    prompt: int = 32
    new_tokens: int = 64
    turns: int = 3


def random_model(options: Options, folder: str) -> None:
    """Save a model of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
        initializer_range=2 * options.hidden**-0.5,  # large enough for tokens to depend on what layers compute
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
        dtype="bfloat16",
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def load(folder: str) -> Any:
    """Split over the ranks of the default group."""
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # newer versions have tp_plan within distributed_config, too
        return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.bfloat16).eval()


def generate(place: Any, model: Any, prompt: torch.Tensor, new_tokens: int) -> tuple[list[list[int]], float]:
    """Tokens, greedily, and the seconds that they took."""
    place.synchronize()
    place.barrier()
    start = time.perf_counter()
    with torch.no_grad():
        made = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False
        )
    place.synchronize()
    return made[:, prompt.shape[1] :].tolist(), time.perf_counter() - start


def work(place: Any, options: Options) -> dict[str, Any]:
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    # As torchrun sets them, for transformers to know its rank where processes were started in another way.
    os.environ.update(RANK=str(place.rank), LOCAL_RANK=str(place.rank), WORLD_SIZE=str(place.world_size))
    folder = place.gather(tempfile.mkdtemp() if place.rank == 0 else None)[0]
    try:
        if place.rank == 0:
            random_model(options, folder)
        place.barrier()
        model = load(folder)
        place.barrier()
    finally:
        if place.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(1, options.vocabulary, (options.batch, options.prompt), generator=generator).to(place.device)
    generate(place, model, prompt, options.new_tokens)  # what is made ready once
    tokens, seconds, counts = [], {"torch.distributed": [], "installed": []}, {}
    for _ in range(options.turns):
        made, took = generate(place, model, prompt, options.new_tokens)
        tokens.append(made)
        seconds["torch.distributed"].append(took)
        installation = allreduce_jit.install(device=place.device, same_ranks=True, compiled=False)  # the one line more
        generate(place, model, prompt, 2)
        made, took = generate(place, model, prompt, options.new_tokens)
        tokens.append(made)
        seconds["installed"].append(took)
        counts = installation.describe().to_dict()
        place.synchronize()
        place.barrier()
        allreduce_jit.uninstall()
    everyone = place.gather(tokens)
    first = everyone[0][0]
    differing = (
        [turn, rank, row, column]
        for rank, found in enumerate(everyone)
        for turn, made in enumerate(found)
        for row, (these, those) in enumerate(zip(made, first))
        for column, (this, that) in enumerate(zip(these, those))
        if this != that
    )
    difference = next(differing, None)
    count = options.batch * options.new_tokens
    rates = {name: round(count / min(times), 2) for name, times in seconds.items()}
    return {
        "ok": difference is None,
        "first_difference": difference,
        "different_tokens": len({token for row in first for token in row}),
        "tokens_per_s": rates,
        "ratio": round(rates["installed"] / rates["torch.distributed"], 3),
        "installed": counts,
        "ranks": place.world_size,
        "transformers": transformers.__version__,
        "model": options.__dict__,
        "machine": report.machine(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--gpus", type=int)
    where.add_argument("--cpu", type=int)
    for name, default in Options().__dict__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    given = vars(parser.parse_args())
    gpus, cpu = given.pop("gpus"), given.pop("cpu")
    outcome = ranks.run(work, Options(**given), gpus=gpus, cpu=cpu)
    return outcome.conclude(True, str)


if __name__ == "__main__":
    sys.exit(main())
