"""``allreduce-jit soak`` on CPU ranks: it counts, it is exact, and it finds the calls that went wrong."""

from __future__ import annotations

import json
import os
import random
from types import SimpleNamespace

import pytest
import torch
from helpers.fake_communicator import Fake

from allreduce_jit import norms
from allreduce_jit.cli import bursts, norm_bursts, soak
from allreduce_jit.cli import main as cli
from allreduce_jit.cli.ledger import resources
from allreduce_jit.engine.graph_cache import SHORTS
from allreduce_jit.errors import InputError, PeerTimeoutError

CPU = SimpleNamespace(device=torch.device("cpu"), rank=0, world_size=1, gather=lambda value: [value])
FLOATS = ("float32", "float16", "bfloat16")


class Flawed(Fake):
    """Something is wrong with the calls ``at`` on rank 1 alone: ``bug`` says what."""

    at = (57, 58, 131)
    count = 0
    before = None

    def all_reduce(self, x, out=None):
        number, self.count = self.count, self.count + 1
        kept = x.clone()
        result = super().all_reduce(x, out)
        if self.rank == 1 and number in self.at:
            if self.bug == "wrong element":
                result[-1] += 1
            elif self.bug == "not written":
                result.copy_(kept) if out is not x else result.fill_(0)
            elif self.bug == "stale":
                result.copy_(self.before.to(result.dtype).repeat(result.numel())[: result.numel()])
            elif self.bug == "lost":
                raise PeerTimeoutError("rank 1 timed out waiting for rank 0")
        self.before = result[:1].clone()
        return result


def wrong_element(group=None, device=None):
    return Flawed(device, "torch.distributed", "wrong element")


def not_written(group=None, device=None):
    return Flawed(device, "torch.distributed", "not written")


def stale(group=None, device=None):
    return Flawed(device, "torch.distributed", "stale")


def lost(group=None, device=None):
    one = Flawed(device, "torch.distributed", "lost")
    one.at = (39,)  # the last call of the first burst, so that all ranks have made the same calls
    return one


class FlawedNorms(Fake):
    """The same of calls with a norm. The first 8 are one of each kind."""

    at = (20, 21, 60)
    count = 0
    before = None

    def _normed(self, norm, x, residual, weight, eps, **how):
        number, self.count = self.count, self.count + 1
        wrong = self.rank == 1 and number in self.at
        if wrong and self.bug == "row of zeros":
            weight = torch.zeros_like(weight)
        results = super()._normed(norm, x, residual, weight, eps, **how)
        total = results[1 if norm is norms.add_rms_norm else 2]
        if wrong and self.bug == "wrong element":
            total[-1, -1] += 64
        elif wrong and self.bug == "stale":
            total.copy_(self.before.to(total.dtype).expand_as(total))
        self.before = total[:1, :1].clone()
        return results


def wrong_norm_element(group=None, device=None, operations=()):
    return FlawedNorms(device, "torch.distributed", "wrong element")


def row_of_zeros(group=None, device=None, operations=()):
    return FlawedNorms(device, "torch.distributed", "row of zeros")


def stale_norm(group=None, device=None, operations=()):
    return FlawedNorms(device, "torch.distributed", "stale")


def soaked(capsys, *options, init=None):
    code = cli.main(["soak", "--json", "--cpu", "2", "--deadline", "200", *options], init=init)
    return code, json.loads(capsys.readouterr().out)


def test_a_clean_run(capsys):
    code, ledger = soaked(capsys, "--calls", "150", "--stalls", "--seed", "5")
    assert code == 0 and ledger["ok"] and ledger["wrong"] == ledger["hangs"] == 0 and not ledger["failures"]
    total = ledger["calls"]["total"]
    assert 150 <= total < 200 and ledger["calls"] == {"total": total, "eager": total}
    assert sum(ledger["kinds"].values()) == total and len(ledger["kinds"]) == 3
    assert ledger["elements"] > 10 * total and ledger["latency_us"]["p99.9"] >= ledger["latency_us"]["median"] > 0
    # Bursts of 40 on the CPU: the first one does not count, nor the first call of any.
    assert ledger["latency_us"]["samples"] == (total // 40 - 1) * 39
    for found in ledger["resources"]:
        assert found[-1]["descriptors"] <= found[0]["descriptors"] + 2


@pytest.mark.parametrize("op", ["add-rms-norm", "both"])
def test_a_clean_run_with_norms(capsys, op):
    code, ledger = soaked(capsys, "--calls", "300", "--op", op)
    assert code == 0 and ledger["ok"] and ledger["wrong"] == 0 and not ledger["failures"]
    kinds = [str(kind) for kind in norm_bursts.kinds(CPU)]
    others = {f"gloo {name}" for name in FLOATS} if op == "both" else set()
    assert set(ledger["kinds"]) == {f"apart {kind}" for kind in kinds} | others
    assert sum(ledger["kinds"].values()) == ledger["calls"]["total"] >= 300 and ledger["elements"] > 300 * 64


@pytest.mark.parametrize("init", [wrong_norm_element, row_of_zeros, stale_norm])
def test_planted_bugs_of_norms_are_located(capsys, init):
    code, ledger = soaked(capsys, "--calls", "100000", "--op", "add-rms-norm", init=init)
    assert code == 1 and not ledger["ok"] and ledger["hangs"] == 0
    assert {failure["call"] for failure in ledger["failures"]} == {20, 21}  # the first round ends it
    kinds = norm_bursts.kinds(CPU)
    dice = random.Random("0/0")
    calls = [*norm_bursts.one_of_each(kinds), *norm_bursts.draw(dice, soak.FEW, 1 << 20, 16 << 10, kinds)]
    shuffled = calls[8:]
    dice.shuffle(shuffled)
    for failure in ledger["failures"]:
        call = [*calls[:8], *shuffled][failure["call"]]
        where = {"rank": 1, "numel": call.numel, "dtype": str(call.kind), "in_place": call.in_place, "kind": "eager"}
        assert where.items() <= failure.items()
        assert failure["wrong"] == 1 if init is wrong_norm_element else failure["wrong"] > 0.5 * call.numel
    assert ledger["wrong"] == sum(failure["wrong"] for failure in ledger["failures"])


def test_seconds_end_a_run(capsys):
    code, ledger = soaked(capsys, "--seconds", "0.5")
    assert code == 0 and ledger["ok"] and ledger["seconds"] >= 0.5


@pytest.mark.parametrize("init", [wrong_element, not_written, stale])
def test_planted_bugs_are_located(capsys, init):
    code, ledger = soaked(capsys, "--calls", "100000", init=init)
    assert code == 1 and not ledger["ok"] and ledger["wrong"] and ledger["hangs"] == 0
    assert ledger["calls"]["total"] < 200  # it ends with the round
    assert {failure["call"] for failure in ledger["failures"]} == {57, 58}
    calls = first_calls(2)
    for failure in ledger["failures"]:
        call = calls[failure["call"]]
        assert failure["rank"] == 1 and failure["kind"] == "eager"
        assert (failure["numel"], failure["in_place"]) == (call.numel, call.in_place)
        assert failure["dtype"] == str(call.dtype).removeprefix("torch.")
        assert failure["wrong"] == 1 if init is wrong_element else failure["wrong"] > 0.8 * call.numel
    assert ledger["wrong"] == sum(failure["wrong"] for failure in ledger["failures"])


def first_calls(n):
    """The calls of the first ``n`` rounds with the defaults of the CPU."""
    return [call for turn in range(n) for call in bursts.draw(random.Random(f"0/{turn}"), soak.FEW, 1 << 20, 16 << 10)]


def test_a_lost_peer_ends_the_run_and_is_told(capsys):
    code, ledger = soaked(capsys, "--calls", "100000", init=lost)
    assert code == 1 and ledger["hangs"] == 1 and not ledger["ok"]
    assert ledger["errors"] == ["rank 1: PeerTimeoutError: rank 1 timed out waiting for rank 0"]


def test_text(capsys):
    assert cli.main(["soak", "--cpu", "2", "--calls", "100000", "--deadline", "200"], init=wrong_element) == 1
    text = capsys.readouterr().out
    assert "rank 1: call 57 (eager," in text and text.rstrip().endswith("FAILED")


def test_load_needs_gpus(capsys):
    for option in ("--gemm", "--nccl"):
        code, document = soaked(capsys, option)
        assert code == 2 and "need GPUs" in document["error"]


def test_seconds_beyond_the_deadline_are_refused_at_once(capsys):
    code, document = soaked(capsys, "--seconds", "200")
    assert code == 2 and document["error"] == "--seconds 200 would be ended by --deadline 200: raise --deadline"


def test_more_ranks_than_stale_sums_can_be_told_apart_for_are_refused():
    with pytest.raises(InputError, match="17 ranks: .* up to 16"):
        soak.work(SimpleNamespace(world_size=17, device=torch.device("cpu")), None, None)


def test_resources_without_proc(monkeypatch):
    def missing(folder):
        raise FileNotFoundError(folder)

    monkeypatch.setattr(os, "listdir", missing)
    assert resources(SimpleNamespace(device=torch.device("cpu"))) == {}


def test_eager_calls_come_again_before_they_are_forgotten():
    assert soak.FEW <= SHORTS


# -- the data, without processes


@pytest.mark.parametrize("n", range(1, 9))
@pytest.mark.parametrize("dtype", bursts.DTYPES.values(), ids=str)
def test_sums_are_exact_and_tell_calls_apart(n, dtype):
    """In any order of adding; a contribution of one to 16 calls ago changes the sum of every element."""
    calls = [bursts.Call(50, dtype, False, 50 * i) for i in range(60)]
    flats = [bursts.FlatBuffers(SimpleNamespace(world_size=n, rank=r, device="cpu"), calls, dtype, 3) for r in range(n)]
    phase = torch.zeros((), dtype=torch.int16)
    for flat in flats:
        flat.fill(phase)
    inputs = torch.stack([flat.x for flat in flats])
    exact = inputs.double().sum(0)
    assert exact.abs().max() <= bursts.LARGEST_SUM and inputs.unique().numel() > 17 - (n == 8)
    rounded = torch.zeros(inputs.shape[1], dtype=dtype)
    for row in reversed(inputs):
        rounded = rounded + row
    errors, clean = torch.zeros((), dtype=torch.int64), torch.tensor(True)
    for flat in flats:
        flat.y.copy_(rounded)
        flat.compare(errors, clean)
    assert not errors and torch.equal(rounded.double(), exact)
    sums = exact.view(60, 50)
    parts = inputs.double().view(n, 60, 50)
    for age in range(1, 17):
        for stale_ranks in range(1, n + 1):
            mixed = parts.clone()
            mixed[:stale_ranks, age:] = parts[:stale_ranks, :-age]
            assert (mixed.sum(0)[age:] != sums[age:]).all(), (age, stale_ranks)


def test_sizes():
    calls = [call for turn in range(30) for call in bursts.draw(random.Random(turn), 200, 1 << 22, 1 << 16)]
    sizes = [call.numel * call.dtype.itemsize for call in calls]
    assert min(call.numel for call in calls) == 1 and max(sizes) <= 1 << 16 and max(sizes) > 60_000
    small = sum(size < 256 for size in sizes) / len(sizes)
    assert 0.3 < small < 0.6  # half of the exponents
    assert {call.in_place for call in calls} == {True, False} and len({call.dtype for call in calls}) == 3
    assert 0.1 < sum(call.offset * call.dtype.itemsize % 16 != 0 for call in calls) / len(calls) < 0.4
    for turn in range(30):
        ends = dict.fromkeys(bursts.DTYPES.values(), 0)
        for call in bursts.draw(random.Random(turn), 200, 1 << 22, 1 << 16):
            assert call.offset >= ends[call.dtype]
            ends[call.dtype] = call.offset + call.numel


@pytest.mark.parametrize("kind", norm_bursts.kinds(CPU), ids=str)
def test_calls_with_a_norm_are_told_apart(kind):
    """Right results pass, in place or not; what is left of one to 16 calls ago, or any element that nobody wrote, does not."""
    calls = [norm_bursts.NormCall(kind, 2, i % 3 == 0, 2 * i) for i in range(40)]
    flat = calls[0].buffers(CPU, calls, 3)
    phase, errors, clean = torch.zeros((), dtype=torch.int16), torch.zeros((), dtype=torch.int64), torch.tensor(True)
    alone = SimpleNamespace(all_reduce_add_rms_norm=norms.add_rms_norm, all_reduce_add_rms_norm_fp8=norms.add_rms_norm_fp8)

    def turn(*skipped):
        errors.zero_()
        flat.bad.zero_()
        flat.fill(phase)
        for call in calls:
            if call not in skipped:
                flat.bound(alone, call)()
        flat.compare(errors, clean)
        return int(errors), dict(flat.found())

    assert turn() == (0, {})
    phase.add_(5)
    assert turn() == (0, {})
    written = sum(out.numel() for out in flat.outs.values()) // 40
    for call in calls[:2]:
        wrong, found = turn(call)
        assert found == {calls.index(call): wrong} and 0.9 * written < wrong <= written
    turn()
    kept = flat.outs["residual_out"].clone()
    for age in range(1, 17):
        flat.outs["residual_out"][2 * age :] = kept[: -2 * age]
        flat.bad.zero_()
        flat.compare(errors, clean)
        assert dict(flat.found()).keys() == set(range(age, 40))
        flat.outs["residual_out"].copy_(kept)


def test_numbers_of_rows():
    kinds = norm_bursts.kinds(CPU)
    calls = [call for turn in range(30) for call in norm_bursts.draw(random.Random(turn), 200, 1 << 22, 1 << 16, kinds)]
    assert {call.kind for call in calls} == set(kinds) and {call.in_place for call in calls} == {True, False}
    assert min(call.rows for call in calls) == 1
    assert 60_000 < max(call.numel * call.kind.torch_dtype.itemsize for call in calls) <= 1 << 16
    for turn in range(30):
        ends = dict.fromkeys(kinds, 0)
        for call in norm_bursts.draw(random.Random(turn), 200, 1 << 22, 1 << 16, kinds):
            assert call.first == ends[call.kind]
            ends[call.kind] += call.rows
