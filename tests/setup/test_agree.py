"""The JSON exchange between real processes over gloo."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from helpers.forked_ranks import on_one_rank, ranks  # noqa: E402

from allreduce_jit.errors import InputError, InputTypeError  # noqa: E402
from allreduce_jit.setup.exchange import all_gather_json, require_cpu_group  # noqa: E402

RANKS = 3


def payload(rank: int) -> dict:
    return {"rank": rank, "text": "ü" * 5000 * rank, "nested": [None, True, 1.5, {"big": 2**70}], "empty": {}}


def outcome(call, *args):
    try:
        return call(*args)
    except (InputError, InputTypeError) as e:
        return f"{type(e).__name__}: {e}"


@contextmanager
def spy():
    """Whether each tensor that reaches the backend was made in inference mode."""
    seen, real = [], (dist.isend, dist.irecv)

    def see(call):
        return lambda tensor, **where: seen.append(tensor.is_inference()) or call(tensor, **where)

    dist.isend, dist.irecv = map(see, real)
    yield seen
    dist.isend, dist.irecv = real


def worker(rank: int) -> dict:
    results: dict = {}
    results["default"] = all_gather_json(None, payload(rank))
    results["world"] = all_gather_json(dist.group.WORLD, payload(rank))
    with torch.inference_mode(), spy() as seen:
        results["inference"] = all_gather_json(None, payload(rank))
    results["inference tensors"] = seen
    results["after inference"] = all_gather_json(None, payload(rank))
    with torch.device("meta"):
        results["default device"] = all_gather_json(None, payload(rank))
    results["falsy"] = all_gather_json(None, [None, 0, ""][rank])
    pair = dist.new_group([0, 2], backend="gloo")
    results["subgroup"] = outcome(all_gather_json, pair, payload(rank))
    alone = [dist.new_group([r], backend="gloo") for r in range(RANKS)]
    results["alone"] = all_gather_json(alone[rank], payload(rank))
    results["unwritable"] = outcome(all_gather_json, None, {1, 2} if rank == 1 else payload(rank))
    results["all unwritable"] = outcome(all_gather_json, None, {rank})
    for size in (1, 16_374, 16_375, 16_376, 16_377, 3_000_000):  # around what the first message holds, quotes counted
        texts = [str(r) * size for r in range(RANKS)]
        texts[1] = "short"
        assert all_gather_json(None, texts[rank]) == texts, size
    results["still in step"] = all_gather_json(None, rank)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("agree"), RANKS, worker)


@pytest.mark.parametrize("where", ["default", "world", "inference", "after inference", "default device"])
def test_all_ranks_hold_all_payloads_in_rank_order(results, where):
    assert [r[where] for r in results] == [[payload(rank) for rank in range(RANKS)]] * RANKS


def test_falsy_values_survive(results):
    assert [r["falsy"] for r in results] == [[None, 0, ""]] * RANKS


def test_subgroup(results):
    assert results[0]["subgroup"] == results[2]["subgroup"] == [payload(0), payload(2)]
    assert results[1]["subgroup"] == "InputError: this rank is not a member of the group (global rank 1): its members alone call"
    assert [r["alone"] for r in results] == [[payload(rank)] for rank in range(RANKS)]


def test_a_payload_that_is_not_json_fails_on_all_ranks_and_hangs_none(results):
    assert [r["unwritable"] for r in results] == ["InputError: rank 1 of the group handed in no JSON value"] * RANKS
    assert [r["all unwritable"] for r in results] == ["InputError: rank 0 of the group handed in no JSON value"] * RANKS
    assert [r["still in step"] for r in results] == [list(range(RANKS))] * RANKS


def of_backends(rank):
    world, config = dist.group.WORLD, ""
    for group in (world, None):
        require_cpu_group(group)
    nccl = str(dist.distributed_c10d.BackendConfig(dist.Backend("nccl")))
    dist.get_backend_config = lambda group: config
    for config in ("cpu:gloo,cuda:nccl", "cpu:mpi"):
        require_cpu_group(world)
    config = nccl
    for call in (require_cpu_group, lambda group: all_gather_json(group, {})):
        with pytest.raises(InputError, match="group must not be an NCCL group: pass a gloo group"):
            call(world)
    config = "cuda:other"
    with pytest.raises(InputError, match="without a CPU backend"):
        require_cpu_group(world)
    return "done"


def test_backends(tmp_path):
    assert on_one_rank(tmp_path, of_backends) == "done"


def test_no_inference_tensor_reaches_the_backend(results):
    for seen in (r["inference tensors"] for r in results):
        assert len(seen) >= 2 * (RANKS - 1) and not any(seen)


def of_what_is_no_group(rank):
    for thing in (object(), 3, "WORLD"):
        with pytest.raises(InputTypeError, match="must be a torch.distributed process group"):
            require_cpu_group(thing)
    with pytest.raises(InputError, match="not a member"):
        require_cpu_group(dist.GroupMember.NON_GROUP_MEMBER)
    return "done"


def test_what_is_no_group(tmp_path):
    assert on_one_rank(tmp_path, of_what_is_no_group) == "done"


def test_without_torch_distributed():
    assert not dist.is_initialized()
    with pytest.raises(InputError, match="init_process_group"):
        all_gather_json(None, {})
