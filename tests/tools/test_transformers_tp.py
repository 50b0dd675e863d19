"""Hugging Face transformers with ``tp_plan="auto"`` over gloo: every all-reduce of the model is taken, and the tokens are the same."""

from __future__ import annotations

import json
import subprocess
import sys
from unittest import mock

import pytest
import torch.distributed as dist
import transformers_tp
from helpers import ROOT
from helpers.fake_engines import FakeEngine, fake_gpus, suite

from allreduce_jit.harness import ranks

pytest.importorskip("transformers", reason="needs transformers")
pytest.importorskip("accelerate", reason="needs accelerate, which transformers asks for where a model is split")

SMALL = {"layers": 2, "hidden": 256, "intermediate": 512, "heads": 8, "kv_heads": 2, "vocabulary": 500, "batch": 2}
SMALL |= {"prompt": 5, "new_tokens": 9, "turns": 1}
ROW_WISE = 4  # all-reduces of a step: one behind attention and one behind the MLP of each layer


def with_kernels(place):
    with fake_gpus(dist.group.WORLD) as built:
        found = transformers_tp.work(place, transformers_tp.Options(**SMALL))
        steps = 2 + SMALL["new_tokens"]
        assert found["ok"] and found["different_tokens"] > 3, found
        taken = found["installed"]["taken"]
        assert taken["eager"] >= ROW_WISE * steps and not found["installed"]["left"], found["installed"]
        assert built[0].sums == sum(taken.values())


def wrong_sums(place):
    """The comparison of tokens sees them."""
    right = FakeEngine.all_reduce

    def wrong(self, x, out):
        right(self, x, out)
        out.neg_()

    with fake_gpus(dist.group.WORLD), mock.patch.object(FakeEngine, "all_reduce", wrong):
        found = transformers_tp.work(place, transformers_tp.Options(**SMALL))
    assert not found["ok"] and found["first_difference"][0] == 1, found["first_difference"]


@pytest.mark.programs
def test_tokens():
    ranks.run(suite, [with_kernels, wrong_sums], cpu=2, deadline=300)


@pytest.mark.programs
def test_under_torchrun():
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    done = subprocess.run([*launcher, ROOT / "tools/transformers_tp.py", *options], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] and found["ranks"] == 2 and found["tokens_per_s"].keys() == {"torch.distributed", "installed"}
