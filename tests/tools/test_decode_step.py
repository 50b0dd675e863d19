"""The decode step on CPU ranks: what it measures, and that it sees fused calls that do something else."""

import decode_step
import pytest
from decode_step import Options
from helpers.fake_communicator import Fake

from allreduce_jit.bench import competitors
from allreduce_jit.harness import ranks

SMALL = Options((1, 3), 2, 64, 4, 2, 96, 8, 1, 2, ("gloo",), head_dim=16)
BUGS = ("weight of another row", "sum of this rank alone")


class Gloo(competitors.Nccl):
    name = "gloo"

    def __init__(self, place, count, nbytes):
        self.place = place
        self.buffers = self.allocate(count, nbytes)


def of(bug):
    def init(group=None, device=None, operations=()):
        assert [family.hidden for family in operations] == [64]
        return Fake(device, "torch.distributed", bug)

    return init


def everything(place):
    competitors.COMPETITORS = {"gloo": Gloo}
    documents = {"clean": decode_step.work(place, SMALL)}
    documents |= {bug: decode_step.work(place, SMALL, of(bug)) for bug in BUGS}
    model = decode_step.Model(place, SMALL)
    model.begin(3)
    shapes = {name: tuple(weight.shape) for name, weight in model.layers[1].items()}
    sums = [float(model.embedded.sum()), float(model.layers[0]["norms"].sum()), float(model.layers[0]["o"].sum())]
    return documents, shapes, place.gather(sums)


@pytest.fixture(scope="module")
def found():
    return ranks.run(everything, cpu=2, deadline=150).value


def test_every_variant_is_measured(found):
    document = found[0]["clean"]
    assert document["ok"] and document["fused_calls"] == 4 and document["unavailable"] == {}
    assert [row["batch"] for row in document["batches"]] == [1, 3]
    for row in document["batches"]:
        assert list(row["us"]) == ["triton", "torch", "unfused", "fused", "gloo"] and not row["reasons"]
        fastest = row["fastest_without_communication"]
        assert fastest in decode_step.ALONE and row["ratio"][fastest] == 1 == min(
            row["ratio"][name] for name in decode_step.ALONE
        )
        assert row["ratio"]["fused"] == pytest.approx(row["us"]["fused"] / row["us"][fastest], rel=1e-3)
        assert (row["fused_differs"], row["finite"], row["same_on_all_ranks"]) == (0, True, True)


@pytest.mark.parametrize("bug", BUGS)
def test_other_bits_are_seen(found, bug):
    document = found[0][bug]
    assert not document["ok"] and all(row["fused_differs"] > 0 for row in document["batches"])
    assert not any(row["same_on_all_ranks"] for row in document["batches"])


def test_the_shapes_of_a_rank(found):
    _, shapes, sums = found
    assert shapes == {"qkv": (4 * 16, 64), "o": (64, 32), "up": (96, 64), "down": (64, 48), "norms": (2, 64)}
    assert sums[0][:2] == sums[1][:2] and sums[0][2] != sums[1][2]  # its own weights, everybody's embeddings and norms


def test_by_default_it_is_llama_3_8b():
    options, where = decode_step.parsed([])
    assert (options.batches, options.layers, where["deadline"]) == ((1, 8, 32, 128), 32, 300.0)
    weights = options.hidden * (options.head_dim * (2 * options.heads + 2 * options.kv_heads) + 3 * options.intermediate)
    assert options.layers * weights == 6_979_321_856  # 8.03e9, embeddings and head not counted
