"""Litmus cases of the PTX memory model: those published, those that collectives rest on, and those of our kernels.

An instruction that is the name of a function of ``kernels/cuda/ptx.cuh`` means the PTX in that function, as it
stands there now; its operands are the result, if there is one, and the function's parameters. ``E`` is a word of a poisoned slot.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from helpers import ROOT
from ptx_model import INIT, Execution, Program, witness

PTX_CUH = ROOT / "kernels/cuda/ptx.cuh"
EMPTY = -1
INITIAL = INIT


def ptx_functions(text: str) -> dict[str, list[str]]:
    """Functions of ptx.cuh that touch memory or order accesses to it, and their instructions.

    In an instruction ``{1}`` is the function's first parameter, and so on, ``{0}`` what it returns; a vector counts as one operand.
    """
    found = {}
    for function in text.split("__device__ inline ")[1:]:
        name, parameters = re.match(r"[\w ]+?(\w+)\((.*?)\) \{", function, re.DOTALL).groups()
        names = re.findall(r"(\w+)(?: = \w+)?(?:,|$)", parameters)
        instructions = [instruction for asm in function.split("asm volatile(")[1:] if (instruction := parse_asm(asm, names))]
        if instructions:
            found[name] = instructions
    return found


def parse_asm(text: str, parameters: list[str]) -> str | None:
    """The instruction in an asm statement: behind a predicate, or in a loop until a wait is over. None if it is about registers only."""
    literals = re.match(r'\s*((?:"[^"]*"\s*)+)', text)
    code = "".join(re.findall(r'"([^"]*)"', literals[1])).replace("\\n", " ")
    found = re.match(
        r"(?:\{[^}]*@yes )?([a-z][\w.:]+)([^;]*);"
        r"|\{ \.reg \.pred complete; again: (\S+)( complete,[^;]*); @!complete bra again; \}$", code)  # fmt: skip
    if not found:
        return None
    mnemonic, operands = found[1] or found[3], found[2] if found[1] else found[4]
    if mnemonic.startswith(("mov.", "exit")):
        return None
    bound = re.findall(r'"[=+]?[rlfh]"\(\W*(\w+)', text[literals.end() :])
    operands = re.sub(r"\{(%\d+)[^}]*\}", r"\1", operands)
    places = [parameters.index(name) + 1 if name in parameters else 0 for name in bound]
    return mnemonic + re.sub(r"%(\d+)", lambda m: f"{{{places[int(m[1])]}}}", operands)


def expand(instruction: str, functions: Mapping[str, list[str]]) -> list[str]:
    """The PTX of an instruction of a case: of a function of ptx.cuh what is in it, with the operands in their places."""
    name, _, operands = instruction.partition(" ")
    if name not in functions:
        return [instruction]
    places = set(map(int, re.findall(r"{(\d)}", " ".join(functions[name]))))
    values = [operand.strip("[]") for operand in operands.split(", ") if operand]
    if 0 not in places:
        values.insert(0, "")
    if places | {0} != set(range(max(1, len(values)))):
        raise ValueError(f"{name} takes other operands than {operands}")
    return [text.format(*values) for text in functions[name]]


@dataclass(frozen=True)
class Case:
    """A program and an outcome that the model allows or forbids.

    Attributes:
        outcome: a condition over registers.
        threads: instructions by thread, separated by ``;``.
        verdict: ``allowed`` or ``forbidden``.
        init: memory before, by variable; zeros if not named.
        final: memory after, by word; anything if not named.
        vector: how many words of a 16-byte packet are modelled; two show all that four can.
        control: whether leaving a poll loop counts as a dependency.
        source: where the verdict is published.
    """

    name: str
    verdict: str
    outcome: str
    threads: Mapping[str, str]
    init: Mapping[str, int] = field(default_factory=dict)
    final: Mapping[str, int] = field(default_factory=dict)
    vector: int = 2
    control: bool = False
    source: str = ""

    def instructions(self) -> dict[str, list[str]]:
        return {thread: [i.strip() for i in text.split(";") if i.strip()] for thread, text in self.threads.items()}

    def functions(self, known) -> set[str]:
        """Functions of ptx.cuh that the case uses."""
        return {i.split(" ")[0] for text in self.instructions().values() for i in text} & set(known)

    def ptx(self, functions: Mapping[str, list[str]]) -> dict[str, list[str]]:
        """PTX instructions by thread."""
        return {
            thread: [ptx for i in text for ptx in expand(i.replace("E", str(EMPTY)), functions)]
            for thread, text in self.instructions().items()
        }


def solve(case: Case, functions: Mapping[str, list[str]], ptx: Mapping[str, list[str]] | None = None) -> Execution | None:
    """An execution of ``case`` (or of ``ptx`` in its place) with the outcome, or None."""
    program = Program(ptx or case.ptx(functions), case.init, case.vector, case.control)
    return witness(program, case.outcome.replace("E", str(EMPTY)), case.final)


def verdict(case: Case, functions: Mapping[str, list[str]], ptx: Mapping[str, list[str]] | None = None) -> str:
    return "forbidden" if solve(case, functions, ptx) is None else "allowed"


# Where a published case comes from: shape and verdict from the ISA, or a well-known shape (Maranget, Sarkar, Sewell,
# "A tutorial introduction to the ARM and POWER relaxed memory models"; Lustig et al.), its verdict derived by hand.
ISA, SHAPE, CLUSTER = "PTX ISA 8.10", "a well-known shape", "PTX ISA, barrier.cluster: the text and its examples"


def mp(send: str, receive: str, block: str = "") -> dict[str, str]:
    """Message passing between two GPUs, or within one."""
    return {"g0": send, ("g0:b1" if block else "g1"): receive}


PUBLISHED = [
    Case("MP+fences", "forbidden", "r == 1 and d == 0",
         mp("st.weak [x], 1; fence.acq_rel.sys; st.relaxed.sys [y], 1",
         "ld.relaxed.sys r, [y]; fence.acq_rel.sys; ld.weak d, [x]"),
         source=ISA),
    Case("MP+release+acquire", "forbidden", "r == 1 and d == 0",
         mp("st.weak [x], 1; st.release.sys [y], 1", "ld.acquire.sys r, [y]; ld.weak d, [x]"), source=SHAPE),
    Case("MP+release+acquire, gpu scope on one GPU", "forbidden", "r == 1 and d == 0",
         mp("st.weak [x], 1; st.release.gpu [y], 1", "ld.acquire.gpu r, [y]; ld.weak d, [x]", "b1"), source=SHAPE),
    Case("MP+relaxed", "allowed", "r == 1 and d == 0",
         mp("st.relaxed.sys [x], 1; st.relaxed.sys [y], 1", "ld.relaxed.sys r, [y]; ld.relaxed.sys d, [x]"),
         source=SHAPE),
    Case("MP+release sequence", "forbidden", "r == 2 and d == 0",
         mp("st.weak [x], 1; st.release.sys [y], 1; st.relaxed.sys [y], 2", "ld.acquire.sys r, [y]; ld.weak d, [x]"),
         source="PTX ISA 8.8"),
    Case("MP through a read-modify-write", "forbidden", "r == 2 and d == 0",
         {"g0": "st.weak [x], 1; st.release.sys [y], 1", "g1": "atom.add.relaxed.sys a, [y], 1",
          "g2": "ld.acquire.sys r, [y]; assume a == 1; ld.weak d, [x]"}, source="PTX ISA 8.9.2"),
    Case("SB+fence.sc", "forbidden", "a == 0 and b == 0",
         {"g0": "st.weak [x], 1; fence.sc.sys; ld.weak a, [y]", "g1": "st.weak [y], 1; fence.sc.sys; ld.weak b, [x]"},
         source=ISA),
    Case("SB+fence.acq_rel", "allowed", "a == 0 and b == 0",
         {"g0": "st.weak [x], 1; fence.acq_rel.sys; ld.weak a, [y]",
          "g1": "st.weak [y], 1; fence.acq_rel.sys; ld.weak b, [x]"},
         source=ISA),
    Case("LB", "allowed", "a == 1 and b == 1",
         {"g0": "ld.weak a, [x]; st.weak [y], 1", "g1": "ld.weak b, [y]; st.weak [x], 1"}, source=ISA),
    Case("LB+dependencies", "forbidden", "a != 0",
         {"g0": "ld.weak a, [x]; st.weak [y], a", "g1": "ld.weak b, [y]; st.weak [x], b"}, source=ISA),
    Case("LB+release+acquire", "forbidden", "a == 1 and b == 1",
         {"g0": "ld.relaxed.sys a, [x]; st.release.sys [y], 1", "g1": "ld.acquire.sys b, [y]; st.relaxed.sys [x], 1"},
         source=SHAPE),
    Case("CoRR", "forbidden", "a == 1 and b == 0",
         {"g0": "st.relaxed.sys [x], 1", "g1": "ld.relaxed.sys a, [x]; ld.relaxed.sys b, [x]"}, source=ISA),
    Case("CoRR, weak", "allowed", "a == 1 and b == 0",
         {"g0": "st.weak [x], 1", "g1": "ld.weak a, [x]; ld.weak b, [x]"}, source=SHAPE),
    Case("CoRR, gpu scope across GPUs", "allowed", "a == 1 and b == 0",
         {"g0": "st.relaxed.gpu [x], 1", "g1": "ld.relaxed.gpu a, [x]; ld.relaxed.gpu b, [x]"}, source=SHAPE),
    Case("CoRW", "forbidden", "a == 1", {"g0": "ld.weak a, [x]; st.weak [x], 1"}, source=SHAPE),
    Case("CoWR", "forbidden", "a == 0", {"g0": "st.weak [x], 1; ld.weak a, [x]"}, source=SHAPE),
    Case("CoWW", "forbidden", "True", {"g0": "st.weak [x], 1; st.weak [x], 2"}, final={"x": 1}, source=SHAPE),
    Case("IRIW+fence.sc", "forbidden", "a == 1 and b == 0 and c == 1 and d == 0",
         {"g0": "st.relaxed.sys [x], 1", "g1": "st.relaxed.sys [y], 1",
          "g2": "ld.relaxed.sys a, [x]; fence.sc.sys; ld.relaxed.sys b, [y]",
          "g3": "ld.relaxed.sys c, [y]; fence.sc.sys; ld.relaxed.sys d, [x]"}, source=SHAPE),
    Case("IRIW+acquire", "allowed", "a == 1 and b == 0 and c == 1 and d == 0",
         {"g0": "st.release.sys [x], 1", "g1": "st.release.sys [y], 1",
          "g2": "ld.acquire.sys a, [x]; ld.acquire.sys b, [y]",
          "g3": "ld.acquire.sys c, [y]; ld.acquire.sys d, [x]"}, source=SHAPE),
    Case("WRC", "forbidden", "a == 1 and b == 1 and c == 0",
         {"g0": "st.relaxed.sys [x], 1", "g1": "ld.relaxed.sys a, [x]; st.release.sys [y], 1",
          "g2": "ld.acquire.sys b, [y]; ld.relaxed.sys c, [x]"},
         source=SHAPE),
    Case("WRC+relaxed", "allowed", "a == 1 and b == 1 and c == 0",
         {"g0": "st.relaxed.sys [x], 1", "g1": "ld.relaxed.sys a, [x]; st.relaxed.sys [y], 1",
          "g2": "ld.relaxed.sys b, [y]; ld.relaxed.sys c, [x]"},
         source=SHAPE),
    Case("ISA2", "forbidden", "a == 1 and b == 1 and c == 0",
         {"g0": "st.weak [x], 1; st.release.sys [y], 1", "g1": "ld.acquire.sys a, [y]; st.release.sys [z], 1",
          "g2": "ld.acquire.sys b, [z]; ld.weak c, [x]"}, source=SHAPE),
    Case("2+2W", "allowed", "True",
         {"g0": "st.relaxed.sys [x], 1; st.relaxed.sys [y], 2", "g1": "st.relaxed.sys [y], 1; st.relaxed.sys [x], 2"},
         final={"x": 1, "y": 1}, source=SHAPE),
    Case("2+2W+fence.sc", "forbidden", "True",
         {"g0": "st.relaxed.sys [x], 1; fence.sc.sys; st.relaxed.sys [y], 2",
          "g1": "st.relaxed.sys [y], 1; fence.sc.sys; st.relaxed.sys [x], 2"},
         final={"x": 1, "y": 1}, source=SHAPE),
    Case("S", "forbidden", "a == 1",
         {"g0": "st.relaxed.sys [x], 2; st.release.sys [y], 1", "g1": "ld.acquire.sys a, [y]; st.relaxed.sys [x], 1"},
          final={"x": 2}, source=SHAPE),
    Case("R+fence.sc", "forbidden", "a == 0",
         {"g0": "st.relaxed.sys [x], 1; fence.sc.sys; st.relaxed.sys [y], 1",
          "g1": "st.relaxed.sys [y], 2; fence.sc.sys; ld.relaxed.sys a, [x]"},
         final={"y": 2}, source=SHAPE),
    Case("MP+atom", "forbidden", "a == 1 and d == 0",
         mp("st.weak [x], 42; st.release.gpu [y], 1",
            "atom.add.relaxed.gpu a, [y], 1; fence.acq_rel.gpu; ld.weak d, [x]", "b1"),
         source="PTX ISA 8.11.1"),
    Case("MP+red", "allowed", "d == 0",
         mp("st.weak [x], 42; st.release.gpu [y], 1",
            "red.add.relaxed.gpu [y], 1; fence.acq_rel.gpu; ld.weak d, [x]", "b1"),
         final={"y": 2}, source="PTX ISA 8.11.1"),
    Case("two increments", "forbidden", "a == 0 and b == 0",
         {"g0": "atom.add.relaxed.sys a, [x], 1", "g1": "atom.add.relaxed.sys b, [x], 1"}, source=ISA),
    Case("two increments, scopes too small", "allowed", "a == 0 and b == 0",
         {"g0": "atom.add.relaxed.cta a, [x], 1", "g0:b1": "atom.add.relaxed.gpu b, [x], 1"}, source=ISA),
    Case("LB+cluster barrier", "forbidden", "r == 1",
         {"g0:b0": "ld.shared::cluster.u32 r, [x]; barrier.cluster.arrive.aligned",
          "g0:b1": "barrier.cluster.wait.aligned; st.shared::cluster.u32 [x], 1"}, source=CLUSTER),
    Case("LB+fence and relaxed cluster barrier", "forbidden", "r == 1",
         {"g0:b0": "ld.shared::cluster.u32 r, [x]; fence.acq_rel.cluster; barrier.cluster.arrive.relaxed.aligned",
          "g0:b1": "barrier.cluster.wait.aligned; st.shared::cluster.u32 [x], 1"}, source=CLUSTER),
    Case("LB+relaxed cluster barrier", "allowed", "r == 1",
         {"g0:b0": "ld.shared::cluster.u32 r, [x]; barrier.cluster.arrive.relaxed.aligned",
          "g0:b1": "barrier.cluster.wait.aligned; st.shared::cluster.u32 [x], 1"}, source=CLUSTER),
]  # fmt: skip

# How collectives signal: what a flag orders and what it does not.
SIGNALS = [
    Case("data, barrier, release; acquire, barrier, read", "forbidden", "r == 1 and d == 0",
         {"g0:b0:t0": "st.weak [x], 1; bar.sync", "g0:b0:t1": "bar.sync; st.release.sys [y], 1",
          "g1:b0:t0": "ld.acquire.sys r, [y]; bar.sync", "g1:b0:t1": "bar.sync; ld.weak d, [x]"}),
    Case("release; relaxed poll, one acquire", "forbidden", "r == 1 and d == 0",
         mp("st.weak [x], 1; st.release.sys [y], 1", "ld.relaxed.sys r, [y]; ld.acquire.sys s, [y]; ld.weak d, [x]")),
    Case("release; relaxed poll", "allowed", "r == 1 and d == 0",
         mp("st.weak [x], 1; st.release.sys [y], 1", "ld.relaxed.sys r, [y]; ld.weak d, [x]")),
    Case("volatile flag", "allowed", "r == 1 and d == 0",
         mp("st.weak [x], 1; st.volatile [y], 1", "ld.volatile r, [y]; ld.weak d, [x]")),
    Case("gpu scope across GPUs", "allowed", "r == 1 and d == 0",
         mp("st.weak [x], 1; st.release.gpu [y], 1", "ld.acquire.gpu r, [y]; ld.weak d, [x]")),
    Case("fence in the data thread, flag from another", "allowed", "r == 1 and d == 0",
         {"g0:b0:t0": "st.weak [x], 1; fence.sc.sys; bar.sync", "g0:b0:t1": "bar.sync; st.relaxed.sys [y], 1",
          "g1": "ld.acquire.sys r, [y]; ld.weak d, [x]"}),
    Case("barrier, then fence in the flag thread", "forbidden", "r == 1 and d == 0",
         {"g0:b0:t0": "st.weak [x], 1; bar.sync", "g0:b0:t1": "bar.sync; fence.acq_rel.sys; st.relaxed.sys [y], 1",
          "g1": "ld.acquire.sys r, [y]; ld.weak d, [x]"}),
    Case("end barrier, relaxed: the reader sees the next value", "allowed", "r == 1 and d == 2",
         {"g0": "ld.relaxed.sys d, [x]; st.relaxed.sys [y], 1", "g1": "ld.relaxed.sys r, [y]; st.relaxed.sys [x], 2"},
          {"x": 1}),
    Case("end barrier, release and acquire", "forbidden", "r == 1 and d == 2",
         {"g0": "ld.relaxed.sys d, [x]; st.release.sys [y], 1", "g1": "ld.acquire.sys r, [y]; st.relaxed.sys [x], 2"},
          {"x": 1}),
    # g1 reads buffer x of epoch 1, then signals epoch 2; g0 overwrites x only after that signal.
    Case("two epoch buffers, start barrier only", "forbidden", "f == 1 and d != 1",
         {"g0": "st.weak [x], 1; st.release.sys [f0], 1; ld.acquire.sys g, [f1]; assume g == 2; st.weak [x], 3",
          "g1": "ld.acquire.sys f, [f0]; ld.weak d, [x]; st.release.sys [f1], 2"}),
    Case("data and flag in one 8-byte scalar", "forbidden", "r1 == 1 and r0 == 0",
         mp("st.relaxed.sys.u64 [x], 5 1", "ld.relaxed.sys.u64 r, [x]")),
    Case("two 8-byte halves, each with its flag", "forbidden", "r1 == 1 and s1 == 1 and (r0 == 0 or s0 == 0)",
         mp("st.relaxed.sys.u64 [x], 5 1; st.relaxed.sys.u64 [y], 6 1",
         "ld.relaxed.sys.u64 r, [x]; ld.relaxed.sys.u64 s, [y]")),
    Case("two words, one flag (LL128)", "allowed", "r1 == 1 and s0 == 0",
         mp("st.relaxed.sys.u64 [y], 6 6; st.relaxed.sys.u64 [x], 5 1",
         "ld.relaxed.sys.u64 r, [x]; ld.relaxed.sys.u64 s, [y]")),
    Case("a vector of four words, one flag", "allowed", "r3 == 1 and r0 == 0",
         mp("st.relaxed.sys.v4.u32 [x], 5 6 7 1", "ld.relaxed.sys.v4.u32 r, [x]"), vector=4),
    Case("a scalar of 16 bytes, one flag", "forbidden", "r3 == 1 and r0 == 0",
         mp("st.relaxed.sys.b128 [x], 5 6 7 1", "ld.relaxed.sys.b128 r, [x]")),
]  # fmt: skip

EMPTY_SLOT = {"slot": EMPTY}
TWO_EPOCHS_WRONG = "(p0, p1) != (1, 2) or q0 != E and q1 != E and (q0, q1) != (3, 4)"

# Our kernels. g0 is the receiver P, g1 the sender R of the packets in `slot`; packets the other way are in `back`.
OURS = [
    # kernels/cuda/packet.cuh
    Case("tensors: the output of one kernel is the input of the next", "forbidden", "d0 == 0 or d1 == 0",
         {"g0:k0": "st_global_v4 [x], 1", "g0:k1:b1": "griddepcontrol_wait; ld_global_v4 d, [x]"}),
    Case("tensors: read before the wait", "allowed", "d0 == 0",
         {"g0:k0": "griddepcontrol_launch_dependents; st_global_v4 [x], 1", "g0:k1:b1": "ld_global_v4 d, [x]"}),
    # kernels/cuda/epilogue/norm.cuh, row_exchange.cuh: t0 and t1 are two warps of a block, b0 and b1 blocks of a cluster
    Case("row: the sum of another warp's group", "forbidden", "s0 == 0",
         {"g0:b0:t0": "st_shared_u32 [row.0], 5; bar.sync",
          "g0:b0:t1": "st_shared_u32 [row.1], 6; bar.sync; ld_shared_v4 s, [row]"}),
    Case("row: the sum of another warp's group, without the barrier", "allowed", "s0 == 0",
         {"g0:b0:t0": "st_shared_u32 [row.0], 5", "g0:b0:t1": "st_shared_u32 [row.1], 6; ld_shared_v4 s, [row]"}),
    Case("row: the sum of a group of another block", "forbidden", "not initialized or s0 == 0",
         {"g0:b0:t0": "mbarrier_init [b], 4; barrier_cluster_arrive_relaxed",
          "g0:b0:t1": "barrier_cluster_wait; mbarrier_wait [b]; ld_shared_v4 s, [row]",
          "g0:b1": "barrier_cluster_wait; st_async_u32 [row.0], 5, [b]"}),
    Case("row: the sum of a group of another block, without the wait", "allowed", "initialized and s0 == 0",
         {"g0:b0:t0": "mbarrier_init [b], 4; barrier_cluster_arrive_relaxed",
          "g0:b0:t1": "barrier_cluster_wait; ld_shared_v4 s, [row]",
          "g0:b1": "barrier_cluster_wait; st_async_u32 [row.0], 5, [b]"}),
    Case("row: sums of two blocks, one of them its own", "forbidden", "not initialized or s0 == 0 or s1 == 0",
         {"g0:b0:t0": "mbarrier_init [b], 8; barrier_cluster_arrive_relaxed",
          "g0:b0:t1": "barrier_cluster_wait; st_async_u32 [row.1], 6, [b]; mbarrier_wait [b]; ld_shared_v4 s, [row]",
          "g0:b1": "barrier_cluster_wait; st_async_u32 [row.0], 5, [b]"}),
    Case("row: sums of two blocks, where the bytes of one are expected", "allowed", "initialized and s0 == 0",
         {"g0:b0:t0": "mbarrier_init [b], 4; barrier_cluster_arrive_relaxed",
          "g0:b0:t1": "barrier_cluster_wait; st_async_u32 [row.1], 6, [b]; mbarrier_wait [b]; ld_shared_v4 s, [row]",
          "g0:b1": "barrier_cluster_wait; st_async_u32 [row.0], 5, [b]"}),
    Case("row: what a block did before it sent does not come with its sum", "allowed", "initialized and s0 == 5 and d == 0",
         {"g0:b0:t0": "mbarrier_init [b], 4; barrier_cluster_arrive_relaxed",
          "g0:b0:t1": "barrier_cluster_wait; mbarrier_wait [b]; ld_shared_v4 s, [row]; ld_global_f32 d, [x]",
          "g0:b1": "barrier_cluster_wait; st_global_u32 [x], 1; st_async_u32 [row.0], 5, [b]"}),
    Case("row: a flag behind an asynchronous store tells nothing of it", "allowed", "initialized and r == 1 and s0 == 0",
         {"g0:b0:t0": "mbarrier_init [b], 4; barrier_cluster_arrive_relaxed",
          "g0:b0:t1": "barrier_cluster_wait; ld.acquire.cluster.u32 r, [y]; ld_shared_v4 s, [row]",
          "g0:b1": "barrier_cluster_wait; st_async_u32 [row.0], 5, [b]; st.release.cluster.u32 [y], 1"}),
    # An mbarrier is initialized before anybody else's complete-tx or wait.
    Case("row: an mbarrier is initialized when another block sends", "forbidden", "not initialized",
         {"g0:b0": "mbarrier_init [b], 4; barrier_cluster_arrive_relaxed",
          "g0:b1": "barrier_cluster_wait; st_async_u32 [row.0], 5, [b]"}),
    Case("row: an mbarrier without its fence", "allowed", "not initialized",
         {"g0:b0": "mbarrier.init.shared::cta.b64 [b], 1; mbarrier.arrive.expect_tx.shared::cta.b64 _, [b], 4; "
                   "barrier_cluster_arrive_relaxed",
          "g0:b1": "barrier_cluster_wait; st_async_u32 [row.0], 5, [b]"}),
    Case("row: an mbarrier without the cluster's barrier", "allowed", "not initialized",
         {"g0:b0": "mbarrier_init [b], 4", "g0:b1": "st_async_u32 [row.0], 5, [b]"}),
    Case("row: an mbarrier initialized after its block has arrived", "allowed", "not initialized",
         {"g0:b0": "barrier_cluster_arrive_relaxed; mbarrier_init [b], 4",
          "g0:b1": "barrier_cluster_wait; st_async_u32 [row.0], 5, [b]"}),
    Case("row: the fence is of the mbarrier alone", "allowed", "d == 0",
         {"g0:b0": "st_global_u32 [x], 1; mbarrier_init [b], 0; barrier_cluster_arrive_relaxed",
          "g0:b1": "barrier_cluster_wait; ld_global_f32 d, [x]"}),
    Case("row: what an earlier kernel quantized, and its scale", "forbidden", "q1 == 0 or s == 0",
         {"g0:k0": "st_global_v2 [q], 5 6; st_global_u32 [scale], 7",
          "g0:k1:b1": "griddepcontrol_wait; ld.global.v2.u32 q, [q]; ld_global_f32 s, [scale]"}),
    Case("row: a scale read before the wait", "allowed", "s == 0",
         {"g0:k0": "griddepcontrol_launch_dependents; st_global_u32 [scale], 7", "g0:k1:b1": "ld_global_f32 s, [scale]"}),
    # kernels/cuda/exchange.cuh, wait.cuh, failure.cuh
    Case("packet: one word does not prove another", "allowed", "p0 == 1 and p1 == E",
         {"g1": "st_relaxed_sys_v4 [slot], 1 2", "g0": "ld_relaxed_sys_v4 p, [slot]"}, EMPTY_SLOT),
    Case("poll: a packet that was seen stays", "forbidden", "p0 == 1 and q0 == E",
         {"g1": "st_relaxed_sys_v4 [slot], 1 2", "g0": "ld_relaxed_sys_v4 p, [slot]; ld_relaxed_sys_v4 q, [slot]"},
          EMPTY_SLOT),
    Case("poison: no packet is read twice", "forbidden", "p0 == 1 and q0 == 1",
         {"g1": "st_relaxed_sys_v4 [slot], 1",
          "g0:k0": "ld_relaxed_sys_v4 p, [slot]; st_relaxed_sys_v4 [slot], E",
          "g0:k1:b1": "griddepcontrol_wait; ld_relaxed_sys_v4 q, [slot]"},
         EMPTY_SLOT),
    Case("poison: without it a packet is read twice", "allowed", "p0 == 1 and q0 == 1",
         {"g1": "st_relaxed_sys_v4 [slot], 1", "g0:k0": "ld_relaxed_sys_v4 p, [slot]",
          "g0:k1:b1": "griddepcontrol_wait; ld_relaxed_sys_v4 q, [slot]"},
         EMPTY_SLOT),
    # The theorem: a packet that has arrived is the packet of this epoch, whole. No fence is needed for it.
    Case("packets of two epochs: none is mixed, stale or early", "forbidden", TWO_EPOCHS_WRONG,
         {"g0:k0": "ld_relaxed_sys_v4 p, [slot]; assume p0 != E and p1 != E; st_relaxed_sys_v4 [slot], E",
          "g0:k1:b1": "griddepcontrol_wait; st_relaxed_sys_v4 [back], 1",
          "g0:k2:b2": "griddepcontrol_wait; ld_relaxed_sys_v4 q, [slot]",
          "g1:k0": "st_relaxed_sys_v4 [slot], 1 2",
          "g1:k1:b1": "ld_relaxed_sys_v4 b, [back]; assume b0 != E and b1 != E",
          "g1:k2:b2": "griddepcontrol_wait; st_relaxed_sys_v4 [slot], 3 4"},
          {"slot": EMPTY, "back": EMPTY}, control=True),
    # The same for kernels that push before their griddepcontrol.wait: the last kernel runs once its predecessor has
    # triggered, which that does after its own wait. `back` is what two-shot gathers in the kernel after the poison.
    Case("packets of two epochs, pushed before the wait", "forbidden", TWO_EPOCHS_WRONG,
         {"g0:k0": "ld_relaxed_sys_v4 p, [slot]; assume p0 != E and p1 != E; st_relaxed_sys_v4 [slot], E",
          "g0:k1:b1": "griddepcontrol_wait; st_relaxed_sys_v4 [back], 1",
          "g0:k3:b2": "griddepcontrol_wait; ld_relaxed_sys_v4 q, [slot]",
          "g1:k0": "st_relaxed_sys_v4 [slot], 1 2",
          "g1:k1:b1": "ld_relaxed_sys_v4 b, [back]; assume b0 != E and b1 != E",
          "g1:k2": "griddepcontrol_wait; griddepcontrol_launch_dependents",
          "g1:k3:b2": "st_relaxed_sys_v4 [slot], 3 4"}, {"slot": EMPTY, "back": EMPTY}, control=True),
    # R pushes into a slot again after it heard from P that P's kernel, which poisoned the slot, is complete.
    Case("overwriting: the poison lands on the next packet", "allowed", "b0 == 1 and b1 == 1 and q0 == E",
         {"g0:k0": "st_relaxed_sys_v4 [slot], E", "g0:k1": "griddepcontrol_wait; st_relaxed_sys_v4 [back], 1",
          "g0:k2": "griddepcontrol_wait; ld_relaxed_sys_v4 q, [slot]",
          "g1": "ld_relaxed_sys_v4 b, [back]; assume b0 == 1 and b1 == 1; st_relaxed_sys_v4 [slot], 2"},
         {"slot": 1, "back": EMPTY}, {"slot.0": EMPTY}, control=True),
    Case("overwriting: fences in pusher and receiver", "forbidden", "b0 == 1",
         {"g0:k0": "st_relaxed_sys_v4 [slot], E",
          "g0:k1": "griddepcontrol_wait; fence_acq_rel_sys; st_relaxed_sys_v4 [back], 1",
          "g1": "ld_relaxed_sys_v4 b, [back]; assume b0 == 1; fence_acq_rel_sys; st_relaxed_sys_v4 [slot], 2"},
         {"slot": 1, "back": EMPTY}, {"slot.0": EMPTY}),
    Case("overwriting: a fence in the receiver alone", "allowed", "b0 == 1",
         {"g0:k0": "st_relaxed_sys_v4 [slot], E", "g0:k1": "griddepcontrol_wait; st_relaxed_sys_v4 [back], 1",
          "g1": "ld_relaxed_sys_v4 b, [back]; assume b0 == 1; fence_acq_rel_sys; st_relaxed_sys_v4 [slot], 2"},
         {"slot": 1, "back": EMPTY}, {"slot.0": EMPTY}, control=True),
    Case("overwriting: an acquire re-read in the receiver alone", "allowed", "b0 == 1",
         {"g0:k0": "st_relaxed_sys_v4 [slot], E", "g0:k1": "griddepcontrol_wait; st_relaxed_sys_v4 [back], 1",
          "g1": "ld_relaxed_sys_v4 b, [back]; assume b0 == 1; ld.acquire.sys.v4 c, [back]; "
                "st_relaxed_sys_v4 [slot], 2"},
         {"slot": 1, "back": EMPTY}, {"slot.0": EMPTY}, control=True),
    Case("overwriting: a fence after the poison, in another thread than the push", "allowed", "b0 == 1",
         {"g0:k0": "st_relaxed_sys_v4 [slot], E; fence_acq_rel_sys",
          "g0:k1": "griddepcontrol_wait; st_relaxed_sys_v4 [back], 1",
          "g1": "ld_relaxed_sys_v4 b, [back]; assume b0 == 1; fence_acq_rel_sys; st_relaxed_sys_v4 [slot], 2"},
         {"slot": 1, "back": EMPTY}, {"slot.0": EMPTY}, control=True),
    Case("overwriting: fence.sc after the poison and after the poll", "forbidden", "b0 == 1",
         {"g0:k0": "st_relaxed_sys_v4 [slot], E; fence.sc.sys",
          "g0:k1": "griddepcontrol_wait; st_relaxed_sys_v4 [back], 1",
          "g1": "ld_relaxed_sys_v4 b, [back]; assume b0 == 1; fence.sc.sys; st_relaxed_sys_v4 [slot], 2"},
         {"slot": 1, "back": EMPTY}, {"slot.0": EMPTY}),
    # The same chain: may P, still polling for the first packet, read the one that R pushes after it heard from P?
    Case("overwriting: a poll reads the packet of a later epoch", "forbidden", "p0 == 2",
         {"g0:k0": "ld_relaxed_sys_v4 p, [slot]; assume p0 != E",
          "g0:k1": "griddepcontrol_wait; st_relaxed_sys_v4 [back], 1",
          "g1": "st_relaxed_sys_v4 [slot], 1; ld_relaxed_sys_v4 b, [back]; assume b0 == 1; "
                "st_relaxed_sys_v4 [slot], 2"},
         {"slot": EMPTY, "back": EMPTY}, control=True),
    Case("overwriting: a poll reads a later packet, where leaving a loop is no dependency", "allowed", "p0 == 2",
         {"g0:k0": "ld_relaxed_sys_v4 p, [slot]; assume p0 != E",
          "g0:k1": "griddepcontrol_wait; st_relaxed_sys_v4 [back], 1",
          "g1": "st_relaxed_sys_v4 [slot], 1; ld_relaxed_sys_v4 b, [back]; assume b0 == 1; "
                "st_relaxed_sys_v4 [slot], 2"},
         {"slot": EMPTY, "back": EMPTY}),
    # The epoch word of a channel.
    Case("epoch: every lane reads the word before it is advanced", "forbidden", "e == 1",
         {"g0:b0:lane1": "ld_relaxed_gpu_u32 e, [epoch]; bar.warp.sync",
          "g0:b0:lane0": "bar.warp.sync; st_relaxed_gpu_u32 [epoch], 1"}),
    Case("epoch: a word that was seen stays", "forbidden", "e == 1 and f == 0",
         {"g0:b0": "st_relaxed_gpu_u32 [epoch], 1",
          "g0:b1": "ld_relaxed_gpu_u32 e, [epoch]; ld_relaxed_gpu_u32 f, [epoch]"}),
    Case("epoch: the next kernel reads the new word", "forbidden", "e == 0",
         {"g0:k0": "st_relaxed_gpu_u32 [epoch], 1", "g0:k1": "griddepcontrol_wait; ld_relaxed_gpu_u32 e, [epoch]"}),
    # Leaving a wait. `abort` is a word in the staging memory that peers write as well.
    Case("give up: the first cause counts", "forbidden", "a == 0 and b == 0",
         {"g0:b0": "atom_cas_relaxed_sys_u32 a, [abort], 0, 7", "g0:b1": "atom_cas_relaxed_sys_u32 b, [abort], 0, 8"}),
    Case("give up: one thread reports", "forbidden", "a == 0 and b == 0",
         {"g0:b0": "atom_exch_relaxed_gpu_u32 a, [reported], 1",
          "g0:b1": "atom_exch_relaxed_gpu_u32 b, [reported], 1"}),
    Case("give up: later kernels do not push", "forbidden", "abort == 0",
         {"g0:k0": "atom_cas_relaxed_sys_u32 a, [abort], 0, 7",
          "g0:k1:b1": "griddepcontrol_wait; ld_relaxed_gpu_u32 abort, [abort]"}),
    Case("give up: the next kernel knows, and its epoch, from one load", "forbidden", "n0 != 3 or n1 == 0",
         {"g0:k0:b0": "st_relaxed_gpu_u32 [channel.0], 3", "g0:k0:b1": "st_relaxed_gpu_u32 [channel.1], 1",
          "g0:k1": "griddepcontrol_wait; ld_relaxed_gpu_v2_u32 n, [channel]"}),
    # Kernels look at the word at device scope when they start: the boundary is there for what this GPU wrote.
    Case("give up: a peer's abort may be overlooked at device scope", "allowed", "a != 0 and b == 0",
         {"g1": "st_relaxed_sys_u32 [abort], 7", "g0": "ld_relaxed_gpu_u32 a, [abort]; ld_relaxed_gpu_u32 b, [abort]"}),
    Case("give up: a thread that saw a peer's abort sees it again", "forbidden", "a != 0 and b == 0",
         {"g1": "st_relaxed_sys_u32 [abort], 7", "g0": "ld_relaxed_sys_u32 a, [abort]; ld_relaxed_sys_u32 b, [abort]"}),
    Case("give up: the host sees a whole report", "forbidden", "expired == 1 and source == 0",
         {"g0": "st_relaxed_sys_u32 [source], 3; fence_acq_rel_sys; st_relaxed_sys_u32 [expired], 1",
          "host": "ld.acquire.sys expired, [expired]; ld.weak source, [source]"}),
    Case("deadline: the kernel sees what was copied before it, whole", "forbidden", "d0 != 7 or d1 != 8",
         {"g0:k0": "st.weak.u64 [deadline], 7 8", "g0:k1": "griddepcontrol_wait; ld_relaxed_gpu_u64 d, [deadline]"}),
    Case("deadline: whole, even if a strong store of this GPU changes it meanwhile", "forbidden", "d0 == 7 and d1 == 0",
         {"g0:b1": "st.relaxed.gpu.u64 [deadline], 7 8", "g0:b0": "ld_relaxed_gpu_u64 d, [deadline]"}),
    Case("deadline: torn, if the host changes it meanwhile (the scope does not include the host)", "allowed",
         "d0 == 7 and d1 == 0",
         {"host": "st.relaxed.sys.u64 [deadline], 7 8", "g0": "ld_relaxed_gpu_u64 d, [deadline]"}),
    # kernels/cuda/guard.cuh
    Case("signature: each half proves itself", "forbidden", "s1 == 9 and s0 != 5 or s3 == 9 and s2 != 6",
         {"g1": "st_relaxed_sys_v2_u64 [signature], 5 9 6 9", "g0": "ld_relaxed_sys_v2_u64 s, [signature]"}),
    Case("signature: one half does not prove the other", "allowed", "s1 == 9 and s2 != 6",
         {"g1": "st_relaxed_sys_v2_u64 [signature], 5 9 6 9", "g0": "ld_relaxed_sys_v2_u64 s, [signature]"}),
    # kernels/cuda/outbox.cuh, wire/phase.cuh: a slot in host memory is two halves of 8 bytes, payload and phase in each; phases 1, 0, 1, …
    Case("phase: each half proves itself", "forbidden", "s1 == 1 and s0 != 5 or s3 == 1 and s2 != 6",
         {"g1": "st_relaxed_sys_v2_u64 [slot], 5 1 6 1", "g0": "ld_relaxed_sys_v2_u64 s, [slot]"}),
    Case("phase: one half does not prove the other", "allowed", "s1 == 1 and s2 != 6",
         {"g1": "st_relaxed_sys_v2_u64 [slot], 5 1 6 1", "g0": "ld_relaxed_sys_v2_u64 s, [slot]"}),
    Case("phase: a slot does not go back, for a later kernel's thread either", "forbidden", "p1 == 1 and q1 == 0",
         {"g1": "st_relaxed_sys_v2_u64 [slot], 5 1 6 1", "g0:k0": "ld_relaxed_sys_v2_u64 p, [slot]",
          "g0:k1:b1": "griddepcontrol_wait; ld_relaxed_sys_v2_u64 q, [slot]"}),
    # The theorem: what has the phase of this use is of this use. Nothing is asked of the order of stores to different places.
    Case("phase: what arrives is of this use", "forbidden", "q1 == 0 and q0 != 7 or q3 == 0 and q2 != 8",
         {"g0:k0": "ld_relaxed_sys_v2_u64 p, [slot]; assume p1 == 1 and p3 == 1",
          "g0:k1:b1": "griddepcontrol_wait; st_relaxed_sys_v2_u64 [back], 1 1 1 1; ld_relaxed_sys_v2_u64 q, [slot]",
          "g1": "st_relaxed_sys_v2_u64 [slot], 5 1 6 1; ld_relaxed_sys_v2_u64 b, [back]; assume b1 == 1 and b3 == 1; "
                "st_relaxed_sys_v2_u64 [slot], 7 0 8 0"}, control=True),
    Case("phase: a reader that has left a use out may take the one before that for this one", "allowed", "q1 == 0 and q0 != 7",
         {"g1": "st_relaxed_sys_v2_u64 [slot], 5 1 6 1; st_relaxed_sys_v2_u64 [slot], 7 0 8 0",
          "g0": "ld_relaxed_sys_v2_u64 q, [slot]"}),
    # A chunk that is stored when the peer has answered is not what the peer read before it answered.
    Case("phase: nobody reads a chunk that its answer has yet to cause", "forbidden", "p1 == 0 and p0 == 7",
         {"g0:k0": "ld_relaxed_sys_v2_u64 p, [slot]; assume p0 != 0",
          "g0:k1:b1": "griddepcontrol_wait; st_relaxed_sys_v2_u64 [back], 1 1 1 1",
          "g1": "st_relaxed_sys_v2_u64 [slot], 5 1 6 1; ld_relaxed_sys_v2_u64 b, [back]; assume b1 == 1; "
                "st_relaxed_sys_v2_u64 [slot], 7 0 8 0"}, control=True),
    Case("in flight: of two calls at once, one sees the other", "forbidden", "a == 0 and b == 0",
         {"g0:b0": "atom_add_relaxed_gpu_u32 a, [entered], 1",
          "g0:b1": "atom_add_relaxed_gpu_u32 b, [entered], 1"}),
    # The model knows no order between the two but the one that the hardware gives: the first has had its answer.
    Case("in flight: tickets of two kernels, the first drawn before the second may start", "allowed", "a == 1 and b == 0",
         {"g0:k0": "atom_add_relaxed_gpu_u32 a, [entered], 1; griddepcontrol_launch_dependents",
          "g0:k1": "atom_add_relaxed_gpu_u32 b, [entered], 1"}),
    Case("in flight: the next kernel sees how many calls were signed and ended", "forbidden", "n0 != 7 or n1 != 8",
         {"g0:k0:b0": "st_relaxed_gpu_u32 [counts.0], 7", "g0:k0:b1": "st_relaxed_gpu_u32 [counts.1], 8",
          "g0:k1": "griddepcontrol_wait; ld_relaxed_gpu_v2_u32 n, [counts]"}),
    Case("in flight: a call that was seen to have ended stays so", "forbidden", "n1 == 8 and m1 == 0",
         {"g0:b1": "st_relaxed_gpu_u32 [counts.1], 8",
          "g0:b0": "ld_relaxed_gpu_v2_u32 n, [counts]; ld_relaxed_gpu_v2_u32 m, [counts]"}),
    # Work before griddepcontrol.wait in a kernel whose predecessor triggers only after its own wait: the predecessor's
    # predecessor has completed, but what it wrote is ordered only by a release fence before the trigger.
    Case("before the wait: input written two kernels earlier", "allowed", "d0 == 0",
         {"g0:k0": "st_global_v4 [x], 1", "g0:k1": "griddepcontrol_wait; griddepcontrol_launch_dependents",
          "g0:k2": "ld_global_v4 d, [x]"}),
    Case("before the wait: input written two kernels earlier, fence before the trigger", "forbidden", "d0 == 0",
         {"g0:k0": "st_global_v4 [x], 1",
          "g0:k1": "griddepcontrol_wait; fence.acq_rel.gpu; griddepcontrol_launch_dependents",
          "g0:k2": "ld_global_v4 d, [x]"}),
    Case("before the wait: the word that says to push no more", "allowed", "abort == 0",
         {"g0:k0": "atom_cas_relaxed_sys_u32 a, [abort], 0, 7",
          "g0:k1": "griddepcontrol_wait; griddepcontrol_launch_dependents",
          "g0:k2": "ld_relaxed_gpu_u32 abort, [abort]"}),
    Case("before the wait: the word that says to push no more, fence before the trigger", "forbidden", "abort == 0",
         {"g0:k0": "atom_cas_relaxed_sys_u32 a, [abort], 0, 7",
          "g0:k1": "griddepcontrol_wait; fence.acq_rel.gpu; griddepcontrol_launch_dependents",
          "g0:k2": "ld_relaxed_gpu_u32 abort, [abort]"}),
]  # fmt: skip

CASES = PUBLISHED + SIGNALS + OURS
