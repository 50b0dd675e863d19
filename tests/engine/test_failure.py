"""What a communicator's end is made into: every kind, on the rank that found out and on one that was told."""

from __future__ import annotations

import json
import struct
from dataclasses import replace

import pytest

from allreduce_jit.abi import DTYPE_SHIFT
from allreduce_jit.engine.failure import (
    LEGACY_NUMBERS,
    SIGNATURES,
    SIGNED,
    Kind,
    Signature,
    abort_code,
    explain,
    heard,
    parameters,
    tag,
)
from allreduce_jit.errors import (
    CallMismatchError,
    CommunicatorFailedError,
    ConcurrentUseError,
    PeerLostError,
    PeerTimeoutError,
    PoisonedError,
)
from allreduce_jit.policy.catalogue import HOST_ALGORITHMS, NVLINK_ALGORITHMS
from allreduce_jit.policy.norm import Norm, signed
from allreduce_jit.policy.norm_forms import NORM_ALGORITHMS
from allreduce_jit.policy.operation import DTYPES

ALGORITHMS = [*NVLINK_ALGORITHMS, *NORM_ALGORITHMS, *HOST_ALGORITHMS, *LEGACY_NUMBERS]
IN_PLACE = 1 << 15


def header(*signed):
    """Signatures as kernels write them: (source, sequence, numel, tag), or with another sequence in the second half."""
    raw = bytearray(SIGNATURES)
    for source, sequence, numel, word, *second in signed:
        place = ((sequence & 1) * 8 + source) * 16
        struct.pack_into("<4I", raw, place, numel & 0xFFFFFFFF, sequence, word | numel >> 32 << 16, *second or [sequence])
    return bytes(raw)


def words(code=0, sequence=7, call="two_shot", dtype="bfloat16", buffer=0, channel=5, waited_ms=1500, mine=(0, 0), theirs=(0, 0)):
    """``Report`` of a kernel."""
    return [code, sequence, tag(call, dtype), buffer, channel, waited_ms, *mine, *theirs]


def why(code, report=None, rank=1, signed=(None, None, None, None), dead=(), known=True, told=(None, None)):
    alive = (lambda r: r not in dead) if known else (lambda r: None)
    return explain(report or words(code), code, rank, signed, alive, told)


def header_of_norm(source, sequence, numel, algorithm, word, second=None):
    """A header with the signature of a call with a norm, and what it tells besides; ``second``: of another call."""
    raw = bytearray(SIGNED)
    raw[:SIGNATURES] = header((source, sequence, numel, tag(algorithm, "bfloat16")))
    again = sequence if second is None else second
    struct.pack_into("<4I", raw, SIGNATURES + ((sequence & 1) * 8 + source) * 16, word & 0xFFFFFFFF, again, word >> 32, again)
    return bytes(raw)


# -- signatures


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_signature_comes_back_as_it_was_signed(algorithm, dtype):
    for numel in (1, 0xFFFFFFFF, 1 << 32, (1 << 40) + 3):
        for in_place in (False, True):
            raw = header((2, 9, numel, tag(algorithm, dtype) | IN_PLACE * in_place))
            want = Signature(numel, dtype, algorithm, in_place)
            assert heard(raw, 4) == [None, None, (9, want), None]
            assert str(want) == f"{algorithm} of {numel} {dtype}{' in place' if in_place else ''}"


def test_no_two_calls_share_a_tag():
    tags = [tag(algorithm, dtype) for algorithm in ALGORITHMS for dtype in DTYPES]
    assert len(set(tags)) == len(tags) and all(0 < t < IN_PLACE for t in tags)


def test_a_signature_of_another_version_is_no_error():
    for dtype in range(len(DTYPES), 16):
        raw = header((0, 1, 5, 0xFE | dtype << DTYPE_SHIFT))
        assert heard(raw, 2)[0] == (1, Signature(5, "?", "?", False))


@pytest.mark.parametrize(
    ("first", "second", "last"),
    [(1, 2, 2), (2, 3, 3), (0x7FFFFFFF, 0x80000000, 0x80000000), (0xFFFFFFFE, 0xFFFFFFFF, 0xFFFFFFFF), (0xFFFFFFFF, 0, 0)],
)
def test_the_later_of_two_counts_also_where_numbers_wrap(first, second, last):
    signed = [(3, first, 10, tag("one_shot", "float32")), (3, second, 20, tag("one_shot", "float32"))]
    for order in (signed, signed[::-1]):
        sequence, signature = heard(header(*order), 4)[3]
        assert (sequence, signature.numel) == (last, 20)


def test_half_a_signature_is_none():
    """Its halves carry two sequence numbers: the rank was signing when somebody looked."""
    t = tag("one_shot", "float32")
    assert heard(header((0, 4, 10, t, 2)), 2) == [None, None]
    assert heard(header((0, 3, 9, t), (0, 4, 10, t, 2)), 2)[0][0] == 3
    assert heard(bytes(SIGNATURES), 8) == [None] * 8


# -- causes


def test_a_timeout_of_ones_own():
    error = why(abort_code(Kind.TIMEOUT, 2, 1))
    assert type(error) is PeerTimeoutError and error.ranks == (2,)
    assert (
        "rank 1: rank 1 timed out after 1.5 s waiting for rank 2 in call 7 (two_shot, bfloat16, scatter); its process lives"
        in str(error)
    )
    report = error.report.to_dict()
    told = {"kind": "timeout", "culprit": 2, "found_by": 1, "rank": 1, "sequence": 7, "channel": 5, "waited_ms": 1500}
    told |= {"algorithm": "two_shot", "dtype": "bfloat16", "phase": "scatter"}
    assert {k: report[k] for k in told} == told
    assert json.loads(json.dumps(report)) == report


def test_how_long_it_waited_is_told_in_seconds():
    code = abort_code(Kind.TIMEOUT, 2, 1)
    for ms, told in ((40, "0.0 s"), (1_960, "2.0 s"), (600_000, "600.0 s"), (86_400_000, "86400.0 s")):
        assert f"timed out after {told} waiting" in str(why(code, words(code, waited_ms=ms)))


def test_a_timeout_of_somebody_elses():
    """The call that this rank was in is not the one of which it was told."""
    error = why(abort_code(Kind.TIMEOUT, 2, 3))
    assert type(error) is PeerTimeoutError and error.ranks == (2,)
    assert "rank 1: rank 3 timed out waiting for rank 2; its process lives (rank 3 told rank 1)" in str(error)
    assert "call 7" not in str(error) and error.report.sequence == 7


@pytest.mark.parametrize("by", [1, 3])
def test_a_timeout_on_a_dead_rank_is_its_loss(by):
    error = why(abort_code(Kind.TIMEOUT, 2, by), dead=[2])
    assert type(error) is PeerLostError and error.ranks == (2,) and "its process is dead" in str(error)
    assert [r.alive for r in error.report.ranks] == [True, True, False, True]
    assert type(why(abort_code(Kind.TIMEOUT, 2, by), dead=[0])) is PeerTimeoutError


def test_whether_the_culprit_lives_may_be_unknown():
    error = why(abort_code(Kind.TIMEOUT, 2, 1), known=False)
    assert type(error) is PeerTimeoutError and "may live or not" in str(error) and error.report.ranks[2].alive is None


def test_a_lost_rank():
    code = abort_code(Kind.LOST, 3, 1)
    error = why(code, dead=[3])
    assert type(error) is PeerLostError and error.ranks == (3,) and "the process of rank 3 has ended in call 7" in str(error)
    error = why(code, report=[0] * 10, dead=[3])  # before any kernel noticed
    assert type(error) is PeerLostError and "in call" not in str(error)
    assert error.report.sequence is error.report.algorithm is error.report.phase is None
    assert "(rank 0 told rank 1)" in str(why(abort_code(Kind.LOST, 3, 0), dead=[3]))


def test_a_mismatch_of_ones_own():
    mine, theirs = (12, tag("one_shot", "float16") | IN_PLACE), (6, tag("one_shot", "bfloat16") | 1 << 16)
    code = abort_code(Kind.MISMATCH, 2, 1)
    error = why(code, words(code, call="one_shot", mine=mine, theirs=theirs))
    assert type(error) is CallMismatchError and error.ranks == (2, 1)
    assert "call 7 is one_shot of 12 float16 in place on rank 1, but one_shot of 4294967302 bfloat16 on rank 2" in str(error)
    assert error.report.mine.to_dict() == {"numel": 12, "dtype": "float16", "algorithm": "one_shot", "in_place": True}
    assert error.report.theirs.to_dict() == {
        "numel": (1 << 32) + 6,
        "dtype": "bfloat16",
        "algorithm": "one_shot",
        "in_place": False,
    }
    report = error.report.to_dict()  # and all that is told of any failure
    assert (report["kind"], report["culprit"], report["found_by"], report["sequence"]) == ("mismatch", 2, 1, 7)
    assert [r["rank"] for r in report["ranks"]] == [0, 1, 2, 3]


def test_a_mismatch_of_others():
    error = why(abort_code(Kind.MISMATCH, 2, 0))
    assert (
        type(error) is CallMismatchError
        and error.ranks == (2, 0)
        and error.report.mine is None
        and "mine" not in error.report.to_dict()
    )
    assert "rank 0 and rank 2 came to one call with different signatures (rank 0 told rank 1)" in str(error)


# -- calls with a norm

NORM = Norm("R", "none", True, "bfloat16", 0, 2.0**-17)


@pytest.mark.parametrize("algorithm", NORM_ALGORITHMS)
def test_what_a_norm_signed_besides_comes_back(algorithm):
    word = signed(NORM, 4096)
    raw = header_of_norm(2, 9, 12 * 4096, algorithm, word)
    assert parameters(raw, 2, 9) == word
    assert parameters(raw, 2, 8) is parameters(raw, 2, 7) is parameters(raw, 1, 9) is parameters(raw[:SIGNATURES], 2, 9) is None
    assert parameters(header_of_norm(2, 9, 12 * 4096, algorithm, word, second=7), 2, 9) is None  # of an earlier call
    assert parameters(bytes(SIGNED), 0, 0) is None
    sequence, found = heard(raw, 4)[2]
    assert (sequence, str(found)) == (9, f"{algorithm} of 12x4096 bfloat16")
    # Without it, elements are all that is known. An all-reduce has none, whatever an earlier call left there.
    assert str(heard(raw[:SIGNATURES], 4)[2][1]) == f"{algorithm} of 49152 bfloat16"
    left = header((2, 9, 100, tag("one_shot", "bfloat16"))) + raw[SIGNATURES:]
    assert heard(left, 4)[2][1] == Signature(100, "bfloat16", "one_shot", False)


@pytest.mark.parametrize(("change", "hidden", "mine", "theirs"), [
    ({}, 2048, "hidden 4096", "hidden 2048"),
    ({"eps": 2.0**-10}, 4096, f"eps {2.0**-17:.6g}", f"eps {2.0**-10:.6g}"),
    ({"rounding": "H"}, 4096, "rounding R", "rounding H"),
    ({"residual": False}, 4096, "residual True", "residual False"),
    ({"weight": "float32"}, 4096, "fp32 weight False", "fp32 weight True"),
    ({"weight_bias": 1}, 4096, "weight_bias 0", "weight_bias 1"),
    ({"quant": "token", "keep_norm": True}, 4096, "quantization none, norm kept False", "quantization token, norm kept True"),
])  # fmt: skip
def test_norms_that_differ(change, hidden, mine, theirs):
    """Their elements, dtype and algorithm may be the same: the message says in what they differ, and in nothing else."""
    code, numel = abort_code(Kind.MISMATCH, 2, 1), 12 * 4096
    both = (numel, tag("one_shot_norm", "bfloat16"))
    told = signed(NORM, 4096), signed(replace(NORM, **change), hidden)
    error = why(code, words(code, call="one_shot_norm", mine=both, theirs=both), told=told)
    rows = numel // hidden
    assert type(error) is CallMismatchError and error.ranks == (2, 1)
    assert (
        f"call 7 is one_shot_norm of 12x4096 bfloat16 with {mine} on rank 1, "
        f"but one_shot_norm of {rows}x{hidden} bfloat16 with {theirs} on rank 2." in str(error)
    )
    assert error.report.mine.norm["hidden"] == 4096 and error.report.theirs.norm["hidden"] == hidden
    assert json.loads(json.dumps(error.report.to_dict())) == error.report.to_dict()


def test_a_norm_beside_an_all_reduce():
    code = abort_code(Kind.MISMATCH, 2, 1)
    mine, theirs = (8192, tag("one_shot_norm", "bfloat16")), (8192, tag("one_shot", "bfloat16"))
    error = why(code, words(code, call="one_shot_norm", mine=mine, theirs=theirs), told=(signed(NORM, 4096), 5))
    assert "is one_shot_norm of 2x4096 bfloat16 on rank 1, but one_shot of 8192 bfloat16 on rank 2" in str(error)
    assert error.report.theirs.norm is None


@pytest.mark.parametrize("by", [1, 2])
def test_concurrent_use(by):
    error = why(abort_code(Kind.CONCURRENT, by, by))
    assert type(error) is ConcurrentUseError and error.ranks == (by,)
    assert f"rank {by} had two calls of one communicator in flight" in str(error)
    assert ("told rank 1" in str(error)) == (by != 1)


@pytest.mark.parametrize("by", [1, 2])
def test_abort(by):
    error = why(abort_code(Kind.ABORTED, by, by), report=[0] * 10)
    assert type(error) is PoisonedError and f"rank {by} aborted this communicator" in str(error) and error.ranks == (by,)


def test_every_kind_is_explained_and_says_what_next():
    for kind in Kind:
        error = why(abort_code(kind, 7, 6), signed=[None] * 8, rank=0)
        assert isinstance(error, CommunicatorFailedError) and error.report.kind == kind.name.lower()
        assert "close this communicator and build a new one" in str(error) and str(error).startswith("rank 0: ")


def test_the_last_calls_of_all_are_listed():
    t = tag("two_shot", "float16")
    signed = heard(header((0, 8, 100, t), (2, 7, 90, t | IN_PLACE)), 4)
    error = why(abort_code(Kind.TIMEOUT, 2, 1), signed=signed)
    assert (
        "Rank 0 last signed call 8: two_shot of 100 float16. Rank 2 last signed call 7: two_shot of 90 float16 in place."
        in str(error)
    )
    calls = [r.last_call and r.last_call.sequence for r in error.report.ranks]
    assert calls == [8, None, 7, None] and error.report.ranks[2].last_call.in_place is True


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_phases(algorithm):
    """Buffers are numbered as the kernels number them. What sends a whole message once has one phase."""
    once = "one_shot" in algorithm or algorithm == "host_stream"
    gathers = (1, 4) if "two_shot_stream" in algorithm else (1,) if algorithm == "host_two_shot" else (2, 3)  # 3: legacy's alone
    known = NVLINK_ALGORITHMS.get(algorithm.removesuffix("_norm")) or HOST_ALGORITHMS.get(algorithm)
    for buffer in range(2 if once else getattr(known, "buffers", 2) if known else 4):
        code = abort_code(Kind.TIMEOUT, 2, 1)
        phase = why(code, words(code, call=algorithm, buffer=buffer)).report.phase
        assert phase == ("exchange" if once else "gather" if buffer in gathers else "scatter")
