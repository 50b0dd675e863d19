"""The compiled decode loop on CPU ranks: every way of its all-reduces, the same tokens, and that it sees when they are not."""

from __future__ import annotations

import compiled_decode
import pytest
import torch
from compiled_decode import Options

from allreduce_jit.harness import ranks

SMALL = Options(
    batches=(1, 3), modes=("default",), layers=2, hidden=64, heads=4, kv_heads=2, intermediate=96, context=8, vocabulary=100, steps=5,
    turns=2, backend="aot_eager", head_dim=16,
)  # fmt: skip
WAYS = {"torch.distributed", "installed", "fused"}


def everything(place):
    clean = compiled_decode.work(place, SMALL)
    whole, compiled_decode.Functional = compiled_decode.Functional, Other
    try:
        return clean, compiled_decode.work(place, SMALL)
    finally:
        compiled_decode.Functional = whole


class Other(compiled_decode.Functional):
    """Calls on the group that is installed add something."""

    def finish(self, part, residual, weight):
        if self.group_name == torch.distributed.group.WORLD.group_name:
            part = part + 1
        return super().finish(part, residual, weight)


@pytest.fixture(scope="module")
def found():
    return ranks.run(everything, cpu=2, deadline=300).value


def test_every_way_is_measured_and_has_the_same_tokens(found):
    document, _ = found
    assert document["ok"] and document["unavailable"].keys() == {"torch_two_shot"}
    assert [(row["batch"], row["mode"]) for row in document["rows"]] == [(1, "default"), (3, "default")]
    for row in document["rows"]:
        assert row["tokens_per_s"].keys() == WAYS and min(row["tokens_per_s"].values()) > 0
        assert row["first_difference"]["installed"] is None and row["same_on_all_ranks"]
        assert row["different_tokens"] > row["batch"]  # of which others could differ
        assert row["ratio"]["torch.distributed"] == 1
    assert document["path"] == "torch.distributed"


def test_other_tokens_are_seen(found):
    _, document = found
    assert not document["ok"]
    assert any(row["first_difference"]["installed"] is not None for row in document["rows"])
