"""What the PTX memory model says of the accesses that our kernels make: ``ptx_model``, ``litmus``, ``ptx.cuh``."""

from __future__ import annotations

import re

import litmus
import pytest
from litmus import CASES, OURS, PTX_CUH, PUBLISHED, SIGNALS, Case, ptx_functions, solve, verdict
from ptx_model import Program

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
    threads = case.instructions()
    for thread, text in threads.items():
        for step, instruction in enumerate(text):
            name, _, operands = instruction.partition(" ")
            mnemonic = FUNCTIONS.get(name, name)
            if mnemonic.startswith("fence.sc"):
                yield instruction, without(threads, thread, step, [mnemonic.replace("sc", "acq_rel", 1)])
            elif mnemonic.startswith(("fence", "bar.", "griddepcontrol.wait")):
                yield instruction, without(threads, thread, step)
            elif {"acquire", "release"} & set(mnemonic.split(".")):
                relaxed = re.sub("acquire|release", "relaxed", mnemonic)
                yield instruction, without(threads, thread, step, [f"{relaxed} {operands}"])


def strength_removed(case):
    """Programs with a weak access in place of a strong one, or a dependency or the program order cut."""
    threads = case.instructions()
    for thread, text in threads.items():
        for step, instruction in enumerate(text):
            name, _, operands = instruction.partition(" ")
            parts = FUNCTIONS.get(name, name).split(".")
            if parts[0] in ("ld", "st") and "relaxed" in parts:
                weak = [p for p in parts if p not in ("relaxed", "gpu", "sys")]
                yield without(threads, thread, step, [f"{'.'.join(weak)} {operands}"])
            if parts[0] in ("atom", "red"):
                narrow = re.sub("gpu|sys", "cta", FUNCTIONS.get(name, name))
                yield without(threads, thread, step, [f"{narrow} {operands}"])
            if parts[0] == "st" and re.search(r", [a-z]\w*$", operands):
                yield without(threads, thread, step, [f"{name} {re.sub(r', .*', ', 1', operands)}"])
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
    # Nothing in asm escapes the parser but arithmetic, which is not volatile, the clock and what only
    # holds the compiler or the assembler, or ends the thread.
    others = re.findall(r'%%globaltimer|setp\.eq|asm volatile\(""|"exit;"', source)
    assert len(functions) == len(re.findall(r"asm volatile", source)) - len(others)
    return set(functions) - {name for case in CASES for name in case.functions(functions)}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_named_after_their_instruction(name):
    """The state space, always global, is left out of strong ones; the type of vectors and atomics as well. Of barriers what all have."""
    parts = [part for part in re.split("::|[.]", FUNCTIONS[name]) if part not in ("global", "u32", "b32", "u64", "aligned")]
    if parts[0] == "barrier":
        parts.remove({"arrive": "release", "wait": "acquire"}[parts[2]])
    words = [word for word in name.split("_") if word not in ("global", "u32", "u64")]
    assert "_".join(words) == "_".join(parts)


def test_nothing_but_ptx_cuh_has_instructions_of_its_own():
    for path in PTX_CUH.parent.rglob("*.cu*"):
        if path != PTX_CUH:
            # An empty asm only holds the compiler.
            other = r"\basm volatile\(\"[^\"]|\bvolatile \w|__ld\w+|__st\w+|\batomic\w+\(|__threadfence"
            assert not re.search(other, path.read_text()), path


def weaker_forms(mnemonic: str):
    if ".relaxed" in mnemonic:
        weak, narrow = re.sub(r"\.relaxed\.(gpu|sys)", "", mnemonic), re.sub("gpu|sys", "cta", mnemonic)
        yield weak if mnemonic[:2] in ("ld", "st") else narrow
    if mnemonic.startswith(("ld.relaxed.sys", "st.relaxed.sys", "fence.acq_rel.sys")):
        yield mnemonic.replace("sys", "gpu")
    if mnemonic.startswith("barrier.cluster.arrive"):
        yield mnemonic.replace("release", "relaxed")
    if mnemonic.startswith("griddepcontrol"):
        yield "griddepcontrol.launch_dependents" if mnemonic.endswith("wait") else "griddepcontrol.wait"
    if mnemonic.startswith("ld.global"):
        yield mnemonic.replace("global", "global.nc")


@pytest.mark.parametrize(
    ("name", "weaker"), [(name, weaker) for name, mnemonic in FUNCTIONS.items() for weaker in weaker_forms(mnemonic)]
)
def test_a_weaker_instruction_in_ptx_cuh_changes_a_verdict(name, weaker):
    source = SOURCE.replace(f'"{FUNCTIONS[name]}', f'"{weaker}')
    functions = ptx_functions(source)
    assert functions[name] == weaker

    def verdict_or_refusal(case):
        try:
            return verdict(case, functions)
        except ValueError:
            return "not in the model"

    cases = [case for case in OURS if name in case.functions(FUNCTIONS)]
    assert [verdict_or_refusal(case) for case in cases] != [case.verdict for case in cases]


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
     "fence.proxy.async", "st.relaxed.cluster [x], 1", "ld.weak [x]", "cp.async.bulk [x], 1"],
)  # fmt: skip
def test_what_the_model_does_not_know_is_refused(text):
    with pytest.raises((ValueError, KeyError)):
        Program({"g0": [text]})


def test_mixed_sizes_are_refused():
    with pytest.raises(ValueError, match="different sizes"):
        Program({"g0": ["st.relaxed.sys.u64 [x], 1"], "g1": ["ld.relaxed.sys.v2.u32 r, [x]"]})
