"""What is promised of failures, on the CPU twin (``promises.py``): on every world size, for every place of a culprit; and mutants of the
kernels' failure paths, each caught by the promise that it breaks."""

from __future__ import annotations

import os

import promises
import pytest
import twin
from promises import Case, cases
from twin import Failed

from allreduce_jit.policy.catalogue import HOST_ALGORITHMS

pytestmark = pytest.mark.skipif(twin.missing() is not None, reason=str(twin.missing()))

# make test and make proofs have minutes for these; LONG=2, by hand, has longer.
LONG, PROOFS = os.environ.get("LONG") == "2", bool(os.environ.get("LONG"))
WORLDS = range(2, 9) if LONG else (2, 3)
FEW = (2, 3, 4, 8) if LONG else (2, 3)
NORMS = [Case(kernel.form.algorithm, 3, norm=kernel) for kernel in promises.NORMS]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """What was compiled; one folder for all of xdist's workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "twin"
    folder.mkdir(exist_ok=True)
    return folder


def of_all(worlds):
    """Every algorithm on these world sizes, of three ranks the norms, and what goes through host memory."""
    return [*(case for i, n in enumerate(worlds) for case in cases(i, [n])), *NORMS, *promises.WIDE, *promises.HOST]


def name(case: Case) -> str:
    return f"{case.algorithm}-{case.world_size}-{case.norm.form.cluster if case.norm else case.dtype}"


@pytest.mark.long
@pytest.mark.parametrize("case", of_all(WORLDS), ids=name)
def test_everybody_hears(objects, case):
    """Whoever is missing, and whoever finds out."""
    n = case.world_size
    for culprit in range(n):
        finders = [rank for rank in range(n) if rank != culprit]
        for finder in finders if LONG or n == 3 and not case.norm else finders[culprit % (n - 1) :][:1]:
            promises.everybody_hears(objects, (), culprit + 8 * finder, case, culprit, finder)


@pytest.mark.parametrize("case", of_all(FEW), ids=name)
def test_the_first_cause_counts(objects, case):
    for seed in range(case.world_size):
        promises.the_first_cause_counts(objects, (), seed, case)


@pytest.mark.parametrize("case", [*cases(0, [2]), *cases(1, [3]), *NORMS[: 3 if LONG else 1], promises.HOST[0]], ids=name)
def test_limits(objects, case):
    promises.limits(objects, (), 1, case)


@pytest.mark.parametrize("case", of_all(FEW), ids=name)
def test_a_peer_tells(objects, case):
    for seed in range(case.world_size):
        promises.a_peer_tells(objects, (), seed, case)


@pytest.mark.parametrize("case", [*cases(0, [3]), *NORMS, *promises.HOST], ids=name)
def test_who_gives_up_reports(objects, case):
    promises.who_gives_up_reports(objects, (), 0, case)


@pytest.mark.parametrize("algorithm", [*promises.ALGORITHMS, *HOST_ALGORITHMS])
def test_one_cause(objects, algorithm):
    for seed in range(8 if LONG else 4):
        promises.one_cause(objects, (), seed, Case(algorithm, 4))


@pytest.mark.parametrize("case", promises.HOST, ids=name)
def test_what_was_settled_stays(objects, case):
    for seed in range(case.world_size):
        promises.what_was_settled_stays(objects, (), seed, case)


@pytest.mark.parametrize("case", of_all(FEW), ids=name)
def test_signatures_alone_go_astray(objects, case):
    for lost in range(case.world_size):
        promises.guard_alone(objects, (), lost, case, lost)


@pytest.mark.parametrize("case", of_all(FEW), ids=name)
def test_a_stopped_rank_believes_nothing(objects, case):
    for seed in range(case.world_size):
        promises.a_stopped_rank_believes_nothing(objects, (), seed, case)


@pytest.mark.parametrize("case", [*of_all(FEW), *(Case(each, epoch=5) for each in promises.ALGORITHMS)], ids=name)
def test_data_alone_go_astray(objects, case):
    for lost in range(case.world_size):
        promises.data_alone(objects, (), lost, case, lost)


@pytest.mark.long
@pytest.mark.parametrize("case", of_all(FEW), ids=name)
def test_every_bit_of_a_signature_is_compared(objects, case):
    """A third of the bits of the number of elements, and of a norm's parameters, in each of three runs."""
    for seed in range(3 if LONG else 1):
        promises.every_bit_is_compared(objects, (), seed, case, odd=seed % case.world_size)


@pytest.mark.parametrize("case", [case for case in of_all(FEW) if case.world_size > 2], ids=name)
def test_a_mismatch_is_told_at_once(objects, case):
    for seed in range(case.world_size):
        promises.a_mismatch_is_told_at_once(objects, (), seed, case)


@pytest.mark.parametrize("case", [*of_all(FEW), Case(epoch=2**32 - 1), Case(epoch=3), Case(epoch=2**31)], ids=name)
def test_alike_at_the_extremes(objects, case):
    promises.alike_at_the_extremes(objects, (), 1, case)


@pytest.mark.parametrize("case", [*of_all(FEW), Case(epoch=2**32 - 1), Case(epoch=4), Case(epoch=2**31 + 3)], ids=name)
def test_concurrent_use(objects, case):
    for seed in range(case.world_size):
        promises.concurrent(objects, (), seed, case)


# -- planted mistakes: small changes that all other checks let pass, or whose consequence is another one

CAS = "a.own + offsetof(Header, abort), 0, code);"
BROADCAST = "j < PEERS<Config> && before == 0; j++"
SINCE = "since == 0 || (since & 1) != handshaken"
HOST, FOUR = promises.HOST[:1], [Case("host_one_shot", 4), Case("host_two_shot", 4)]

# name: promise, how it may show, edits, and cases, if not of V2
BUGS = {
    "one peer fewer is told": (promises.everybody_hears, {"told", "hang"}, [("failure.cuh", BROADCAST, "j < PEERS<Config> - 1 && before == 0; j++")]),
    "the culprit is not told": (promises.everybody_hears, {"told", "hang"}, [
        ("failure.cuh", "        st_relaxed_sys_u32(a.staging[source_at(j, a.rank)]", "        if (source_at(j, a.rank) != culprit) st_relaxed_sys_u32(a.staging[source_at(j, a.rank)]")]),
    "one does not stop oneself": (promises.everybody_hears, {"told", "hang"}, [("failure.cuh", CAS, "a.own + offsetof(Header, reserved), 0, code);")]),
    "who was told tells on": (promises.the_first_cause_counts, {"told"}, [("failure.cuh", BROADCAST, "j < PEERS<Config>; j++")]),
    "the last channel is not stopped": (promises.everybody_hears, {"told", "pushed"}, [("failure.cuh", "c < channels; c++", "c + 1 < channels; c++")]),
    "a stopped rank signs": (promises.everybody_hears, {"pushed"}, [("guard.cuh", "    if (!aborted) st_relaxed_sys_v2_u64(to, Packet", "    st_relaxed_sys_v2_u64(to, Packet")]),
    "the limit does not begin anew with the handshake": (promises.limits, {"report"}, [("wait.cuh", SINCE, "since == 0")]),
    "the limit begins anew at every look": (promises.limits, {"report", "hang"}, [("wait.cuh", SINCE, "since == 0 || since + 1000000 < now")]),
    "no limit is one of zero": (promises.limits, {"report"}, [("wait.cuh", "(limit && now >= since + limit)", "(now >= since + limit)")]),
    "deadline and grace are swapped": (promises.limits, {"report"}, [("wait.cuh", "(handshaken ? offsetof", "(!handshaken ? offsetof")]),
    "the flag of the first shape is every shape's": (promises.limits, {"report"}, [("wait.cuh", "offsetof(Control, handshaken) + 4 * a.shape_id", "offsetof(Control, handshaken) + 4")]),
    "who waits for a signature waits for ever": (promises.guard_alone, {"hang"}, [("guard.cuh", "while (kind && !wait.expired(a))", "while (kind && !ld_relaxed_sys_u32(a.own))")]),
    "handshaken with one signature": (promises.guard_alone, {"handshake"}, [("guard.cuh", "if (all_signed && !handshaken)", "if ((all_signed || true) && !handshaken)")]),
    "the guard does not tell the number of the call": (promises.guard_alone, {"report"}, [("guard.cuh", "wait.waited_ns, sequence, call", "wait.waited_ns, 0, call")]),
    "who waits for data tells a number": (promises.data_alone, {"report"}, [("failure.cuh", "wait.culprit(a), wait.buffer, wait.waited_ns)", "wait.culprit(a), wait.buffer, wait.waited_ns, 1)")]),
    "the buffer is not told": (promises.data_alone, {"report"}, [("failure.cuh", "    wait.buffer = buffer;\n", "    wait.buffer = buffer + 1;\n")]),
    "the upper half of the number of elements is left out": (promises.every_bit_is_compared, {"told", "report"}, [("guard.cuh", "u32(a.total >> 32) << NUMEL_SHIFT", "u32(a.total >> 33) << NUMEL_SHIFT")]),
    "dtypes are not compared": (promises.every_bit_is_compared, {"told", "hang"}, [
        ("guard.cuh", "else if (!kind && (other ^ call) & ~(u64(IN_PLACE) << 32))", "else if (!kind && (other ^ call) & ~(u64(IN_PLACE | 0xF00) << 32))")]),
    "in place is compared": (promises.alike_at_the_extremes, {"handshake", "report"}, [
        ("guard.cuh", "else if (!kind && (other ^ call) & ~(u64(IN_PLACE) << 32))", "else if (!kind && (other ^ call))")]),
    "in place is not told": (promises.alike_at_the_extremes, {"signed"}, [("guard.cuh", "(a.input == a.output ? IN_PLACE : 0)", "0")]),
    "calls that have not ended are overlooked": (promises.concurrent, {"told", "hang"}, [("guard.cuh", ">> 32) - (sequence - 1)) >= 0", ">> 32) - (sequence - 1)) >= -1")]),
    "calls that are not signed are overlooked": (promises.concurrent, {"told", "hang"}, [("guard.cuh", "u32(signed_completed) == sequence - 1 &&", "sequence &&")]),
    "a call that ended before its guard looks is one too many": (promises.concurrent, {"report", "hang"}, [("guard.cuh", ">> 32) - (sequence - 1)) >= 0", ">> 32) - (sequence - 1)) == 0")]),
    "a rank blames its neighbour for its own two calls": (promises.concurrent, {"told"}, [("guard.cuh", "kind = CONCURRENT, culprit = a.rank;", "kind = CONCURRENT;")]),
    "a stopped rank receives on": (promises.a_stopped_rank_believes_nothing, {"bits"}, [
        ("one_shot.cu", "if (!epoch.alive) return give_up<Config, Epilogue, typename Partition::Share>(a, partition, Wait());", "")]),
    "a kernel that gives up waits for none before it": (
        promises.everybody_hears, {"unordered"}, [("failure.cuh", "    griddepcontrol_wait();  // an overlapping", "    // an overlapping")], [Case("two_shot_stream")]),
    "the report is taken beside its place": (promises.everybody_hears, {"guard", "report"}, [("failure.cuh", "a.control + offsetof(Control, reported)", "a.control - offsetof(Control, reported)")]),
    "a channel more than there are is stopped": (promises.everybody_hears, {"guard"}, [("failure.cuh", "c < channels; c++", "c <= channels; c++")]),
    "who was told by a peer tells on": (promises.a_peer_tells, {"told"}, [("failure.cuh", BROADCAST, "j < PEERS<Config>; j++")]),
    "path host: kernels that begin are told another word": (
        promises.everybody_hears, {"told", "guard", "report"}, [("failure.cuh", "offsetof(Control, abort), 0, told", "offsetof(Control, unused), 0, told")], HOST),
    "path host: its own header is not told": (promises.everybody_hears, {"told", "hang"}, [("failure.cuh", "if (before == 0) st_relaxed_sys_u32(a.own", "if (before != 0) st_relaxed_sys_u32(a.own")], HOST),
    "path host: what a peer tells later is reported": (promises.what_was_settled_stays, {"report"}, [("failure.cuh", "if (before == 0 && told) before", "if (told) before")], HOST),
    "path host: each thread settles for itself": (promises.one_cause, {"told", "report"}, [("failure.cuh", "told ? told : code);", "told);")], FOUR),
    "who finds its rank stopped gives up in silence": (promises.who_gives_up_reports, {"report"}, [
        ("one_shot_norm.cu", "    if (!alive) give_up<Config, Epilogue>(a, typename Hop::Nothing(), Wait());\n", "")], NORMS[:1]),
    "whose channels an earlier kernel has stopped gives up in silence": (promises.who_gives_up_reports, {"report"}, [
        ("two_shot_norm.cu", "    if (!alive) give_up<Config, Epilogue>(a, typename Hop::Nothing(), Wait());\n", "")], NORMS[1:2]),
    "path host: who gives up sends sums": (promises.who_gives_up_reports, {"bits"}, [
        ("host_two_shot.cu", "SCATTER);\n            if (!came) break;\n", "SCATTER);\n")], promises.HOST[1:2]),
    "a stopped rank pushes sums": (promises.a_stopped_rank_believes_nothing, {"pushed"}, [
        ("two_shot.cu", "if (!epoch.alive) return give_up<Config, Epilogue, typename Partition::Share>(a, partition, Wait());", "")], [Case("two_shot")]),
    "a mismatch is told when all others have signed": (promises.a_mismatch_is_told_at_once, {"hang"}, [
        ("guard.cuh", "    if (kind) stop<Config>(", "    all_sync(LANES, true);\n    if (kind) stop<Config>(")]),
    "NaN for the first packet of a thread alone": (promises.everybody_hears, {"bits"}, [("epilogue/store.cuh", "part < Share::COUNT && share.has(k)", "part < 1 && share.has(k)")]),
}  # fmt: skip


@pytest.mark.parametrize("bug", BUGS if LONG else list(BUGS)[:: 2 if PROOFS else 4])  # each is compiled anew
def test_planted_mistake_breaks_its_promise(objects, bug, record_property):
    promise, kinds, edits, *where = BUGS[bug]
    failure = first_failure(promise, objects, edits, *where)
    assert failure is not None, f"{bug}: {promise.__name__} is kept"
    assert failure.kind in kinds, f"{bug}: {failure}"
    record_property("shown", f"planted: {bug}: breaks {promise.__name__} ({failure.kind})")


def first_failure(promise, objects, edits, where=()) -> Failed | None:
    for case in where or (Case(), Case("two_shot"), Case(world_size=2)):
        for seed in range(4) if promise is promises.one_cause else [1]:
            try:
                promise(objects, edits, seed, case)
            except Failed as failure:
                return failure
    return None
