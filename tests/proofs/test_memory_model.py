"""What the PTX memory model says of the accesses that our kernels make: ``ptx_model``, ``litmus``, ``ptx.cuh``."""

from __future__ import annotations

import re

import litmus
import pytest
from litmus import CASES, OURS, PTX_CUH, PUBLISHED, SIGNALS, Case, ptx_functions, solve, verdict
from ptx_model import Program, witness

SOURCE = PTX_CUH.read_text()
FUNCTIONS = ptx_functions(SOURCE)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_verdict(case):
    assert verdict(case, FUNCTIONS) == case.verdict


def test_the_published_cases_have_both_verdicts():
    for cases in (PUBLISHED, SIGNALS, OURS):
        assert {case.verdict for case in cases} == {"allowed", "forbidden"}
    assert all(case.source for case in PUBLISHED)
    assert len({case.name for case in CASES}) == len(CASES)


# -- every ordering counts


def without(instructions, thread, step, replacement=()):
    """The program with one instruction replaced by others, or by none."""
    return {**instructions, thread: [*instructions[thread][:step], *replacement, *instructions[thread][step + 1 :]]}


def orderings_removed(case):
    """Programs that lack one fence, barrier, wait, release or acquire of the case."""
    threads = case.ptx(FUNCTIONS)
    for thread, text in threads.items():
        for step, instruction in enumerate(text):
            mnemonic, _, operands = instruction.partition(" ")
            if mnemonic.startswith("fence.sc"):
                yield instruction, without(threads, thread, step, [mnemonic.replace("sc", "acq_rel", 1)])
            elif mnemonic.startswith(("fence", "bar.", "barrier.cluster", "griddepcontrol.wait")):
                yield instruction, without(threads, thread, step)
            elif {"acquire", "release"} & set(mnemonic.split(".")):
                relaxed = re.sub("acquire|release", "relaxed", mnemonic)
                yield instruction, without(threads, thread, step, [f"{relaxed} {operands}"])


def strength_removed(case):
    """Programs with a weak access in place of a strong one, or a dependency or the program order cut."""
    threads = case.ptx(FUNCTIONS)
    for thread, text in threads.items():
        for step, instruction in enumerate(text):
            mnemonic, _, operands = instruction.partition(" ")
            parts = mnemonic.split(".")
            if parts[0] in ("ld", "st") and "relaxed" in parts:
                weak = [p for p in parts if p not in ("relaxed", "gpu", "sys")]
                yield without(threads, thread, step, [f"{'.'.join(weak)} {operands}"])
            if parts[0] in ("atom", "red"):
                yield without(threads, thread, step, [f"{re.sub('gpu|sys', 'cta', mnemonic)} {operands}"])
            if parts[0] == "st" and re.search(r", [a-z]\w*$", operands):
                yield without(threads, thread, step, [f"{mnemonic} {re.sub(r', .*', ', 1', operands)}"])
            if step:
                yield {**threads, thread: [*text[: step - 1], text[step], text[step - 1], *text[step + 1 :]]}


@pytest.mark.parametrize("case", [c for c in CASES if c.verdict == "forbidden"], ids=lambda case: case.name)
def test_each_ordering_of_a_forbidden_case_is_needed(case):
    weaker = list(orderings_removed(case))
    for instruction, threads in weaker:
        assert verdict(case, FUNCTIONS, threads) == "allowed", f"still forbidden without {instruction}"
    if not weaker:  # coherence or atomicity alone
        assert "allowed" in [verdict(case, FUNCTIONS, threads) for threads in strength_removed(case)]


# -- the cases and ptx.cuh


def test_every_function_of_ptx_cuh_has_a_case():
    assert uncovered(SOURCE) == set()
    new = """
__device__ inline u32 ld_acquire_sys_u32(u64 address) {
    u32 v;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(address) : "memory");
    return v;
}
"""
    assert uncovered(SOURCE + new) == {"ld_acquire_sys_u32"}


def uncovered(source: str) -> set[str]:
    functions = ptx_functions(source)
    # Nothing in asm escapes the parser but arithmetic, which is not volatile, clocks and what only
    # holds the compiler or the assembler, or ends the thread.
    others = re.findall(r'%%globaltimer|%%clock|setp\.eq|asm volatile\(""|"exit;"', source)
    assert sum(map(len, functions.values())) == len(re.findall(r"asm volatile", source)) - len(others)
    return set(functions) - {name for case in CASES for name in case.functions(functions)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_named_after_their_instruction(name):
    """The state space, always global, is left out of strong ones; the type of vectors and atomics as well. Of barriers what is usual, of
    what concerns an mbarrier all but the operation; a loop around try_wait is a wait."""
    mnemonic = FUNCTIONS[name][0].split(" ")[0]
    parts = [part for part in re.split("::|[.]", mnemonic) if part not in ("global", "u32", "b32", "u64", "aligned")]
    if parts[0] == "barrier":
        parts = [part for part in parts if part != {"arrive": "release", "wait": "acquire"}[parts[2]]]
    if "mbarrier" in parts:
        parts = [parts[0], parts[1].removeprefix("try_")]
    words = [word for word in name.split("_") if word not in ("global", "u32", "u64")]
    assert "_".join(words) == "_".join(parts)


def test_nothing_but_ptx_cuh_has_instructions_of_its_own():
    for path in PTX_CUH.parent.rglob("*.cu*"):
        if path != PTX_CUH:
            # An empty asm only holds the compiler.
            other = r"\basm volatile\(\"[^\"]|\bvolatile \w|__ld\w+|__st\w+|\batomic\w+\(|__threadfence"
            assert not re.search(other, path.read_text()), path


def weaker_forms(mnemonic: str):
    if re.search(r"\.relaxed\.(gpu|sys)", mnemonic):
        weak, narrow = re.sub(r"\.relaxed\.(gpu|sys)", "", mnemonic), re.sub("gpu|sys", "cta", mnemonic)
        yield weak if mnemonic[:2] in ("ld", "st") else narrow
    if mnemonic.startswith(("ld.relaxed.sys", "st.relaxed.sys", "fence.acq_rel.sys")):
        yield mnemonic.replace("sys", "gpu")
    if mnemonic.startswith("barrier.cluster.arrive"):
        yield mnemonic.replace("arrive.relaxed", "wait.acquire")
    if mnemonic.startswith("barrier.cluster.wait"):
        yield mnemonic.replace("acquire", "relaxed")
    if mnemonic.startswith("fence.mbarrier_init"):
        yield "fence.acq_rel.cta"
    if mnemonic.startswith("mbarrier.try_wait"):
        yield mnemonic.replace("acquire", "relaxed")
        yield mnemonic.replace("acquire.cluster", "acquire.cta")
        yield mnemonic.replace("acquire.cluster.", "")  # of the same scope
    if mnemonic.startswith("griddepcontrol"):
        yield "griddepcontrol.launch_dependents" if mnemonic.endswith("wait") else "griddepcontrol.wait"
    if mnemonic.startswith("ld.global"):
        yield mnemonic.replace("global", "global.nc")


def weakened():
    for name, instructions in FUNCTIONS.items():
        for instruction in instructions:
            mnemonic = instruction.split(" ")[0]
            for weaker in weaker_forms(mnemonic):
                yield name, mnemonic, weaker


def verdicts_of(name: str, functions) -> list[str]:
    """Of our cases with the function."""

    def verdict_or_refusal(case):
        try:
            return verdict(case, functions)
        except ValueError:
            return "not in the model"

    return [verdict_or_refusal(case) for case in OURS if name in case.functions(FUNCTIONS)]


@pytest.mark.parametrize(("name", "mnemonic", "weaker"), list(weakened()))
def test_a_weaker_instruction_in_ptx_cuh_changes_a_verdict(name, mnemonic, weaker):
    source, n = re.subn(rf"(?<![\w.]){re.escape(mnemonic)}(?![\w.:])", weaker, SOURCE)
    functions = ptx_functions(source)
    assert n == 1 and functions[name] == [i.replace(mnemonic, weaker) for i in FUNCTIONS[name]]
    assert verdicts_of(name, functions) != verdicts_of(name, FUNCTIONS)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("mbarrier_init", 'asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");', ""),
        ("mbarrier_init", "[%0], 1;", "[%0], 2;"),  # nobody else arrives
        ("mbarrier_wait", "[%0], 0;", "[%0], 1;"),  # the phase before the first is over
        ("st_async_u32", '"r"(v), "r"(barrier)', '"r"(barrier), "r"(v)'),
    ],
)
def test_a_wrong_operand_or_a_missing_fence_in_ptx_cuh_changes_a_verdict(name, old, new):
    assert SOURCE.count(old) == 1
    assert verdicts_of(name, ptx_functions(SOURCE.replace(old, new))) != verdicts_of(name, FUNCTIONS)


def test_a_wait_for_an_mbarrier_is_a_loop():
    once = SOURCE.replace("@!complete bra again; ", "")
    assert once != SOURCE
    assert "mbarrier_wait" in FUNCTIONS and "mbarrier_wait" not in ptx_functions(once)


# -- the checker itself


def test_an_outcome_that_is_allowed_comes_with_its_execution():
    case = next(case for case in CASES if case.name == "MP+relaxed")
    execution = solve(case, FUNCTIONS)
    assert execution.registers == {"r": 1, "d": 0}
    assert sorted(execution.reads_from.values()) == [litmus.INITIAL, 1]


def test_the_outcomes_that_must_be_possible_are():
    """A checker that forbids too much would make every verdict 'forbidden' easy."""
    for case in CASES:
        anything = Case(case.name, "allowed", "True", case.threads, case.init, vector=case.vector)
        assert solve(anything, FUNCTIONS) is not None


@pytest.mark.parametrize(
    "text",
    ["ld.relaxed r, [x]", "ld.sys r, [x]", "st.relaxed.sys [x]", "ld.global.nc.u32 r, [x]",
     "red.max.relaxed.sys [x], 1",
     "fence.proxy.async", "st.relaxed.grid [x], 1", "ld.weak [x]", "cp.async.bulk [x], 1",
     "mbarrier.inval [b]", "mbarrier.init [b]", "st.async.release.sys.u32 [x], 1", "fence.mbarrier_init.acquire.cluster",
     "mbarrier.try_wait.parity complete, [b], 2", "barrier.cluster.sync"],
)  # fmt: skip
def test_what_the_model_does_not_know_is_refused(text):
    with pytest.raises((ValueError, KeyError)):
        Program({"g0": [text]})


@pytest.mark.parametrize(
    ("text", "why"),
    [("st.shared.u32 [b], 1", "as if it were memory"), ("mbarrier.init.shared.b64 [b], 1", "initialized once")],
)
def test_other_accesses_to_an_mbarrier_are_refused(text, why):
    with pytest.raises(ValueError, match=why):
        Program({"g0": ["mbarrier.init.shared::cta.b64 [b], 1", text]})


@pytest.mark.parametrize(
    ("arrivals", "bytes_expected", "possible"),
    [(1, 4, True), (1, 0, True), (2, 4, False), (1, 8, False)],
)
def test_a_phase_is_complete_with_its_arrivals_and_bytes(arrivals, bytes_expected, possible):
    """With one arrival and one word that is sent: of a wait for more there is no execution."""
    init = f"mbarrier.init.b64 [b], {arrivals}"
    arrive = f"mbarrier.arrive.expect_tx.b64 _, [b], {bytes_expected}"
    send = "st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [x], 1, [b]"
    wait = "mbarrier.try_wait.parity.acquire.cluster.b64 complete, [b], 0"
    program = Program({"g0": [init, arrive, send, wait]})
    assert (witness(program, "initialized") is not None) == possible


@pytest.mark.parametrize(
    ("arrive", "waiting", "expected"),
    [
        ("", "b0:t1", "forbidden"),
        (".release.cluster", "b1", "forbidden"),
        ("", "b1", "allowed"),
        (".relaxed.cta", "b0:t1", "allowed"),
    ],
)
def test_an_arrival_at_an_mbarrier_is_a_release_of_its_scope(arrive, waiting, expected):
    """Also of what came before it. (In the model any block may wait, which the ISA allows to that of the mbarrier only.)"""
    start = "mbarrier.init.b64 [b], 1; barrier.cluster.arrive; st.shared.u32 [x], 1; mbarrier.arrive.expect_tx"
    wait = "barrier.cluster.wait; mbarrier.try_wait.parity.acquire.cluster.b64 complete, [b], 0; ld.shared.u32 d, [x]"
    threads = {"g0:b0:t0": f"{start}{arrive}.b64 _, [b], 0", f"g0:{waiting}": wait}
    assert verdict(Case("an arrival", expected, "not initialized or d == 0", threads), {}) == expected


def test_mixed_sizes_are_refused():
    with pytest.raises(ValueError, match="different sizes"):
        Program({"g0": ["st.relaxed.sys.u64 [x], 1"], "g1": ["ld.relaxed.sys.v2.u32 r, [x]"]})
