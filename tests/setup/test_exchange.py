"""Promises of the exchange, each between ranks that are forked: a real gloo, in tenths of a second."""

from __future__ import annotations

import gc
import os
import signal
import struct
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
dist = pytest.importorskip("torch.distributed")

from helpers.forked_ranks import DIED, ranks  # noqa: E402

from allreduce_jit.errors import AllReduceError, PeerTimeoutError  # noqa: E402
from allreduce_jit.setup import exchange  # noqa: E402
from allreduce_jit.setup.exchange import all_gather_fields, all_gather_json, missing  # noqa: E402

FIRST = 16 << 10  # bytes of the first message, 8 of which are the length
TAG = 0x0A11


def outcome(call, *args):
    """What came of it, how long it took, and whom an error names."""
    started = time.monotonic()
    try:
        result, named, cause = call(*args), None, None
    except AllReduceError as e:
        result, named, cause = f"{type(e).__name__}: {e}", getattr(e, "ranks", None), type(e.__cause__)
    return {"result": result, "ranks": named, "cause": cause, "took": time.monotonic() - started}


def of_sizes(rank):
    found = []
    for size in (0, FIRST - 11, FIRST - 10, FIRST - 9, 3 * FIRST):  # what JSON makes of a text is longer by its quotes
        texts = [f"{size}" * 2, "x" * size, [rank, ("a", None)]]
        found.append(all_gather_json(None, texts[rank]) == ["00" if not size else f"{size}" * 2, "x" * size, [2, ["a", None]]])
    return found


def test_all_payloads_in_rank_order_of_any_size(tmp_path):
    assert ranks(tmp_path, 3, of_sizes) == [[True] * 5] * 3


def in_a_subgroup(rank):
    """Ranks of the group, not of the job: 2 and 0 of three."""
    pair = dist.new_group([0, 2], backend="gloo")
    return outcome(all_gather_json, pair, f"global {rank}")["result"] if rank != 1 else None


def test_ranks_are_those_of_the_group(tmp_path):
    assert ranks(tmp_path, 3, in_a_subgroup) == [["global 0", "global 2"], None, ["global 0", "global 2"]]


def with_a_missing_rank(rank, absent, timeout_s, folder):
    """``absent`` takes no part: it is there until the others are done, or, without a ``folder``, gone."""
    if rank == absent:
        for other in {0, 1, 2} - {absent} if folder else ():
            wait_for(folder / f"{other} is done")
        return None
    found = outcome(all_gather_json, None, rank, timeout_s)
    if folder:
        (folder / f"{rank} is done").touch()
    return found


@pytest.mark.parametrize("absent", [0, 1, 2])
def test_who_does_not_answer_in_time_is_named_and_nobody_else(tmp_path, absent):
    for rank, found in enumerate(ranks(tmp_path, 3, with_a_missing_rank, absent, 1.0, tmp_path)):
        if rank != absent:
            assert found["ranks"] == (absent,), found
            assert found["result"].startswith(
                f"PeerTimeoutError: rank {rank} waited 1 s (ALLREDUCE_JIT_SETUP_TIMEOUT) for rank {absent} "
            )
            assert "cannot be used any more: start again with a new one" in found["result"]
            assert 0.9 < found["took"] < 3.5 and issubclass(found["cause"], RuntimeError)


def alone_in_a_group_of_four(rank, folder):
    if rank:
        return wait_for(folder / "done")
    found = outcome(all_gather_json, None, rank, 0.2)
    (folder / "done").touch()
    return found


def test_nobody_waits_longer_than_the_deadline_however_many_are_missing(tmp_path):
    found = ranks(tmp_path, 4, alone_in_a_group_of_four, tmp_path)[0]
    assert found["ranks"] == (1, 2, 3) and 0.15 < found["took"] < 1.0  # not a second more, nor that for each


def test_who_is_gone_is_named_at_once(tmp_path):
    """Long before the time is up; a survivor that heard of it ends as well, so the others may name it, too."""
    left = [found for found in ranks(tmp_path, 3, with_a_missing_rank, 1, 50.0, None) if found]
    assert len(left) == 2 and any(found["ranks"] == (1,) for found in left), left
    for found in left:
        assert issubclass(found["cause"], RuntimeError)  # what torch said of it
        assert "PeerTimeoutError" in found["result"] and "lost the connection to rank" in found["result"] and found["took"] < 20


def late(rank, timeout_s, seconds):
    if rank == 1:
        time.sleep(seconds)
    return outcome(all_gather_json, None, f"of {rank}", timeout_s)


def test_a_rank_that_is_late_is_waited_for(tmp_path):
    for limit in (20.0, 0):  # 0: for ever
        folder = tmp_path / f"{limit}"
        folder.mkdir()
        assert [found["result"] for found in ranks(folder, 2, late, limit, 0.7)] == [["of 0", "of 1"]] * 2


def among_strangers(rank, length, body):
    """Rank 1 speaks no protocol of ours: a length, and whatever it is of."""
    if rank == 0:
        return outcome(all_gather_json, None, "mine", 5.0)
    block = (struct.pack("<q", length) + body).ljust(FIRST, b"\0")
    dist.send(torch.frombuffer(bytearray(block), dtype=torch.uint8), 0, tag=TAG)
    dist.recv(torch.empty(FIRST, dtype=torch.uint8), 0, tag=TAG)
    time.sleep(0.3)
    return None


@pytest.mark.parametrize(
    "length, body, told",
    [
        (-1, b"", "sent no exchange of this package (a length of -1)"),
        (1 << 62, b"", "sent no exchange of this package (a length of 4611686018427387904)"),
        ((1 << 30) + 1, b"", "sent no exchange of this package (a length of 1073741825)"),
        (0, b"", "handed in no JSON value"),
        (5, b"what?", "sent 5 bytes that are no JSON"),
        (4, b"\xff\xfe\xfd\xfc", "sent 4 bytes that are no JSON"),
    ],
)
def test_what_is_no_exchange_of_ours_is_refused_and_its_sender_named(tmp_path, length, body, told):
    found = ranks(tmp_path, 2, among_strangers, length, body)[0]
    assert found["result"].startswith(f"InputError: rank 1 of the group {told}"), found


def of_a_stranger_and_a_friend(rank, folder):
    """Rank 0 refuses what rank 1 sends; rank 2, which comes after that, still gets what rank 0 had sent."""
    if rank == 0:
        found = outcome(all_gather_json, None, "of 0", 20.0)["result"]
        gc.collect()
        (folder / "refused").touch()
        wait_for(folder / "got")
        return found
    if rank == 1:
        return among_strangers_to_all(folder)
    block = torch.empty(FIRST, dtype=torch.uint8)
    dist.send(torch.frombuffer(bytearray((struct.pack("<q", 3) + b'"2"').ljust(FIRST, b"\0")), dtype=torch.uint8), 0, tag=TAG)
    wait_for(folder / "refused")
    dist.recv(block, 0, tag=TAG)
    (folder / "got").touch()
    return bytes(block.numpy()[8:14])


def among_strangers_to_all(folder):
    dist.send(torch.frombuffer(bytearray(struct.pack("<q", -7).ljust(FIRST, b"\0")), dtype=torch.uint8), 0, tag=TAG)
    wait_for(folder / "got")


def test_what_was_sent_before_a_refusal_still_arrives(tmp_path):
    first, _, third = ranks(tmp_path, 3, of_a_stranger_and_a_friend, tmp_path)
    assert first == "InputError: rank 1 of the group sent no exchange of this package (a length of -7)" and third == b'"of 0"'


def of_no_json(rank):
    """Rank 1's payload is none; all must hear of it, and the group is as good as before."""
    first = outcome(all_gather_json, None, {1} if rank == 1 else 1)
    seen, real = [], (dist.isend, dist.irecv)
    dist.isend, dist.irecv = (
        lambda tensor, _call=call, **where: seen.append(tensor.is_inference()) or _call(tensor, **where) for call in real
    )
    with torch.inference_mode():
        inside = all_gather_json(None, rank)
    return first["result"], inside, set(seen)


def test_a_payload_that_is_no_json_fails_everywhere_and_the_group_goes_on(tmp_path):
    told = "InputError: rank 1 of the group handed in no JSON value"
    assert ranks(tmp_path, 3, of_no_json) == [(told, [0, 1, 2], {False})] * 3  # nor does an inference tensor reach gloo's threads


def of_fields_in_time(rank, folder):
    """In a group of ranks 0 and 1 alone, of which one does not come."""
    pair = dist.new_group([0, 1], backend="gloo")
    if rank:
        return wait_for(folder / "done")
    found = outcome(all_gather_fields, pair, {"a": rank}, 0.5)
    (folder / "done").touch()
    return found


def test_objects_too_are_of_a_group_and_have_a_deadline(tmp_path):
    first, _, third = ranks(tmp_path, 3, of_fields_in_time, tmp_path)
    assert first["ranks"] == (1,) and first["took"] < 2.5 and third is None
    assert "waited 0.5 s" in first["result"]


def of_fields(rank):
    alike = all_gather_fields(None, {"a": rank, "b": None}, 5.0)
    other = outcome(all_gather_fields, None, {"a": rank} if rank == 1 else {"a": rank, "b": None}, 5.0)["result"]
    if rank == 1:
        all_gather_json(None, ["a", "b"], 5.0)
        return alike, None, None
    return alike, other, outcome(all_gather_fields, None, {"a": 0, "b": 1}, 5.0)["result"]


def test_objects_with_other_fields_are_another_exchange(tmp_path):
    for rank, (alike, *refused) in enumerate(ranks(tmp_path, 2, of_fields)):
        assert alike == [{"a": 0, "b": None}, {"a": 1, "b": None}]
        for text in refused if rank == 0 else []:
            assert text.startswith("InputError: rank 1 takes part in another exchange than this one (a, b)"), text


def gone_and_late(rank, folder):
    """Rank 1 is gone; rank 2 comes once rank 0 has noticed that, whose process lives on."""
    if rank == 1:
        return None
    if rank == 2:
        wait_for(folder / "noticed")
    found = outcome(all_gather_json, None, rank, 30.0)
    gc.collect()
    (folder / ("noticed" if rank == 0 else "both")).touch()
    wait_for(folder / "both")
    return found


def wait_for(file):
    while not file.exists():
        time.sleep(0.005)


def test_who_is_merely_late_is_not_blamed_for_one_that_is_gone_nor_blames_who_noticed(tmp_path):
    first, _, second = ranks(tmp_path, 3, gone_and_late, tmp_path)
    assert first["ranks"] == second["ranks"] == (1,), (first, second)
    assert max(first["took"], second["took"]) < 20


LARGE = "x" * (24 << 20)  # more than sockets hold


def while_one_is_stopped(rank, folder):
    """Rank 1 says how much it has to say and is gone while rank 2 is stopped, amid what it and rank 0 tell each other. Rank 0 hears of
    it first, and wakes rank 2 up."""
    if rank == 1:
        for peer in (0, 2, 3):
            head = (struct.pack("<q", 2 * FIRST) + b"[").ljust(FIRST, b" ")
            dist.send(torch.frombuffer(bytearray(head), dtype=torch.uint8), peer, tag=TAG)
        for peer in (0, 2, 3):
            dist.recv(torch.empty(FIRST, dtype=torch.uint8), peer, tag=TAG)
        wait_for(folder / "stopped")
        while Path(f"/proc/{(folder / 'stopped').read_text()}/stat").read_text().rpartition(") ")[2][0] != "T":
            time.sleep(0.005)
        return None
    if rank == 2:
        real, calls = exchange._Exchange._wait, []

        def stopped(self, works):
            calls.append(works)
            if len(calls) == 2:  # what did not fit into first messages, all of which have arrived
                for sends in self.sends.values():
                    sends[0][0].wait()
                (folder / "to be stopped").write_text(f"{os.getpid()}")
                (folder / "to be stopped").rename(folder / "stopped")
                os.kill(os.getpid(), signal.SIGSTOP)
            real(self, works)

        exchange._Exchange._wait = stopped
    found = outcome(all_gather_json, None, LARGE[: 3 * FIRST] if rank == 3 else LARGE, 15.0)
    gc.collect()
    if rank == 0:
        os.kill(int((folder / "stopped").read_text()), signal.SIGCONT)
    (folder / f"{rank} is done").touch()
    for other in (0, 2, 3):
        wait_for(folder / f"{other} is done")
    return found["ranks"]


def test_who_hears_first_that_a_rank_is_gone_takes_back_nothing_and_refuses_nothing(tmp_path):
    """So the others blame the same rank, not that one."""
    first, _, stopped, _ = ranks(tmp_path, 4, while_one_is_stopped, tmp_path)
    assert first == stopped == (1,)


def of_at_most(rank, folder, size):
    """Rank 0 takes 100 bytes at most, of which two are quotes."""
    if rank == 0:
        exchange._MOST = 100
    found = outcome(all_gather_json, None, "x" * size if rank else "")["result"]
    if rank:
        wait_for(folder / "judged")
    (folder / "judged").touch()
    return found


def test_the_largest_payload_is_one(tmp_path):
    for size in (98, 99):
        folder = tmp_path / f"{size}"
        folder.mkdir()
        found = ranks(folder, 2, of_at_most, folder, size)
        if size == 98:
            assert found == [["", "x" * 98]] * 2
        else:
            assert found[0] == "InputError: rank 1 of the group sent no exchange of this package (a length of 101)"


def of_what_is_no_group(rank):
    """The default group is a good one, the one that is handed in is not."""
    other, real = dist.new_group([0], backend="gloo"), dist.get_backend_config
    dist.get_backend_config = lambda group: "cuda:other" if group is other else real(group)
    return [
        outcome(call, group, *rest)["result"]
        for call, *rest in ((exchange.require_cpu_group,), (all_gather_json, 1))
        for group in (3, other)
    ]


def test_the_group_that_is_handed_in_is_the_one_that_is_judged(tmp_path):
    found = ranks(tmp_path, 1, of_what_is_no_group)[0]
    no_group = "InputTypeError: group must be a torch.distributed process group, not int"
    no_cpu = "InputError: group must not be a group without a CPU backend (cuda:other): pass a gloo group of the same ranks"
    assert found[::2] == [no_group] * 2 and all(text.startswith(no_cpu) for text in found[1::2])


def alone(rank):
    given = [exchange.require_group(None) is dist.group.WORLD, exchange.require_group(dist.group.WORLD) is dist.group.WORLD]
    group = dist.new_group([0], backend="gloo")
    found = all_gather_json(group, {"a": (1, 2)}), all_gather_json(None, "default")
    dist.destroy_process_group(group)
    return given, found, outcome(exchange.require_group, group)["result"], outcome(all_gather_json, None, {1})["result"]


def test_one_rank_and_groups_that_are_gone(tmp_path):
    given, found, destroyed, bad = ranks(tmp_path, 1, alone)[0]
    assert given == [True, True] and found == ([{"a": [1, 2]}], ["default"])
    assert destroyed == "InputError: the group is not known to torch.distributed: was it destroyed?"
    assert bad == "InputError: rank 0 of the group handed in no JSON value"


def test_who_is_missing_is_said():
    problems = {2: RuntimeError("b"), 0: RuntimeError("a")}
    error = missing(1, problems, None)
    assert isinstance(error, PeerTimeoutError) and error.ranks == (0, 2) and error.__cause__ is problems[0]
    assert str(error).startswith("rank 1 lost the connection to ranks 0, 2 while ranks were agreeing")
    assert str(missing(0, {3: RuntimeError()}, 2.5)).startswith(
        "rank 0 waited 2.5 s (ALLREDUCE_JIT_SETUP_TIMEOUT) for rank 3 while"
    )
    nobody = missing(0, {}, 1.0)
    assert nobody.ranks == () and nobody.__cause__ is None and " for some rank while" in str(nobody)


def test_the_answer_of_a_rank_that_died_is_told_apart(tmp_path):
    """The stand-in's own promise."""

    def work(rank):
        import os

        dist.barrier()
        if rank == 1:
            os._exit(3)
        return rank

    assert ranks(tmp_path, 2, work) == [0, DIED]
