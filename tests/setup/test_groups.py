"""The gloo group beside a group without one: whose it is, that it is one for good, and who is named when it cannot be made."""

from __future__ import annotations

import os
import time

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from helpers.forked_ranks import on_one_rank, ranks  # noqa: E402

from allreduce_jit.errors import PeerTimeoutError  # noqa: E402
from allreduce_jit.setup import exchange, groups  # noqa: E402

TIMEOUT = "ALLREDUCE_JIT_SETUP_TIMEOUT"


def of_a_pair(rank):
    """Ranks 2 and 0 of three, in this order; rank 1 takes no part in making the sibling."""
    pair = dist.new_group([2, 0], backend="gloo")
    if rank == 1:
        return None
    made = groups.gloo_sibling(pair)
    x = torch.tensor([10.0 ** dist.get_rank(made)])
    dist.all_reduce(x, group=made)
    store = groups.shared_store(pair)
    here = [store.check([f"{pair.group_name}_allreduce_jit_gloo/{place}"]) for place in range(3)]
    return (
        made is not pair and groups.gloo_sibling(pair) is made,
        dist.get_process_group_ranks(made) == dist.get_process_group_ranks(pair),
        dist.get_rank(made) == dist.get_rank(pair),
        x.item(),
        here,
        groups.has_backend(made, "cpu:"),
    )


def test_a_sibling_has_the_same_ranks_and_only_they_make_it(tmp_path):
    found = ranks(tmp_path, 3, of_a_pair)
    assert found == [
        (True, True, True, 11.0, [True, True, False], True),
        None,
        (True, True, True, 11.0, [True, True, False], True),
    ]


def with_two_that_do_not_come(rank, folder):
    os.environ[TIMEOUT] = "0.4"
    if rank in (1, 3):
        while len(list(folder.glob("* is done"))) < 2:
            time.sleep(0.01)
        return None
    started = time.monotonic()
    try:
        groups.gloo_sibling(dist.group.WORLD)
    except PeerTimeoutError as e:
        (folder / f"{rank} is done").touch()
        return e.ranks, str(e).partition(" while ")[0], isinstance(e.__cause__, RuntimeError), time.monotonic() - started


def test_who_does_not_come_is_named(tmp_path):
    found = ranks(tmp_path, 4, with_two_that_do_not_come, tmp_path)
    for rank in (0, 2):
        who, text, caused, seconds = found[rank]
        assert who == (1, 3) and text == f"rank {rank} waited 0.4 s ({TIMEOUT}) for ranks 1, 3" and caused
        assert 0.3 < seconds < 4


# -- alone, in a process of its own: what a test leaves of gloo may not survive a fork of the next one


def destroyed_and_not(rank):
    world = dist.group.WORLD
    made, other = groups.gloo_sibling(world), groups.gloo_sibling(dist.new_group([0], backend="gloo"))
    found = [groups.gloo_sibling(world) is made, made is not world, groups._alive(made), other not in (made, world)]
    dist.destroy_process_group(made)
    found.append(not groups._alive(made))
    again = groups.gloo_sibling(world)
    return [*found, again is not made and groups._alive(again)]


def test_a_sibling_is_one_for_good_unless_it_is_destroyed(tmp_path):
    assert on_one_rank(tmp_path, destroyed_and_not) == [True] * 6


def how_long(rank):
    world, seen, found = dist.group.WORLD, [], []
    groups.new_gloo_group = lambda *args: seen.append(args) or world
    for text in ("7", "0", "soon"):
        os.environ[TIMEOUT] = text
        groups._made.clear()
        assert groups.gloo_sibling(world) is world
        *where, connect, usual = seen.pop()
        assert where == [[0], 0, groups.shared_store(world), f"{world.group_name}_allreduce_jit_gloo"]
        assert usual == dist.default_pg_timeout
        found.append(connect.total_seconds())
    return found


def test_it_waits_for_ranks_as_long_as_set_up_does_and_for_messages_as_long_as_torch_does(tmp_path):
    """A wrong setting, of which the survey tells all ranks, counts as none."""
    assert on_one_rank(tmp_path, how_long) == [7, dist.default_pg_timeout.total_seconds(), exchange.TIMEOUT_S]


def without_private_names(rank):
    world, seen = dist.group.WORLD, []
    groups.new_gloo_group = lambda *args: None
    dist.new_group = lambda *args, **more: seen.append((args, more)) or world
    return groups.gloo_sibling(world) is world and groups.gloo_sibling(world) is world and seen


def test_a_torch_without_those_names_makes_one_as_anybody_would(tmp_path):
    assert on_one_rank(tmp_path, without_private_names) == [(([0],), {"backend": "gloo", "use_local_synchronization": True})]


class Gone:
    """A store whose server has ended."""

    def set(self, key, value):
        self.told = key, value

    def check(self, keys):
        raise RuntimeError("connection reset")


def of_a_store_that_went(rank):
    def fails(*args):
        raise RuntimeError("no such rank")

    store = Gone()
    groups.shared_store, groups.new_gloo_group = {dist.group.WORLD: store}.get, fails
    try:
        groups.gloo_sibling(dist.group.WORLD)
    except PeerTimeoutError as e:
        return (
            e.ranks,
            " for some rank while" in str(e),
            store.told == (f"{dist.group.WORLD.group_name}_allreduce_jit_gloo/0", "here"),
        )


def test_a_store_that_went_with_its_rank_names_nobody(tmp_path):
    assert on_one_rank(tmp_path, of_a_store_that_went) == ((), True, True)


def test_backends_of_a_group(monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", {"a": "cpu:gloo,cuda:gloo", "b": "cuda:nccl"}.get)
    assert groups.has_backend("a", "cpu:") and not groups.has_backend("a", "cuda:nccl")
    assert groups.has_backend("b", "cuda:nccl") and not groups.has_backend("b", "cpu:")
