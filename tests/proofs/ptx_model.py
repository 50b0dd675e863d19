"""An axiomatic checker of the PTX memory consistency model, for programs of a dozen instructions.

Source: PTX ISA, chapter "Memory Consistency Model" (sections 8.2-8.10), and the note on release fences before
``griddepcontrol.launch_dependents``; Lustig, Sahasrabuddhe, Giroux, "A Formal Analysis of the NVIDIA PTX Memory
Consistency Model", ASPLOS 2019, for the form of the axioms.

``witness`` enumerates which write every read may read from, the orders of ``fence.sc`` and the coherence orders,
and looks for one execution that fulfils the axioms and the condition asked about.

A program is a dict from thread to instructions. A thread is named ``gpu[:kK][:bB][:anything]``: kernel K (default 0)
of the GPU's one stream, block B (default 0); a thread of the host is a GPU of its own. Instructions:

    ld.relaxed.sys r, [x]      st.release.gpu [x], 1      atom.exch.relaxed.gpu r, [x], 1      fence.acq_rel.sys
    bar.sync                   bar.warp.sync              griddepcontrol.wait                  assume r != 0
    barrier.cluster.arrive.release                        barrier.cluster.wait.acquire
    mbarrier.init [b], 1       mbarrier.arrive.expect_tx _, [b], 4              fence.mbarrier_init.release.cluster
    st.async.shared::cluster.mbarrier::complete_tx::bytes.u32 [x], 1, [b]
    mbarrier.try_wait.parity.acquire.cluster complete, [b], 0

The blocks of a kernel are those of one cluster. State spaces and types in a mnemonic may be left out. A vector access is one access per element, in no order, and
a scalar of 8 or 16 bytes is one access of several words. Register ``r`` of several words is ``r0``, ``r1``, ...;
memory ``x`` is ``x.0``, ``x.1``, ...
``assume`` is the end of a poll loop: only executions in which it holds count.

Clusters (PTX ISA, barrier.cluster): an arrival with release synchronizes with the wait; a relaxed one does not, but a release
fence before it does, as in the example there. ``fence.mbarrier_init`` (membar/fence) is such a fence for earlier ``mbarrier.init`` of
its thread and for nothing else.

Memory barriers (PTX ISA, mbarrier and st.async), in their first phase:

- ``mbarrier.init`` is a weak write of the object, every other operation on the object reads it. One that may read what was there
  before is undefined: ``initialized`` is a register, 0 if there is such an operation. Nobody who waits learns anything then.
- A phase is complete when as many have arrived as ``init`` says and as many bytes have been stored as are expected. The order of
  these operations does not count, nor does their scope: they are atomic. ``try_wait`` is the end of a loop around it: executions in which the
  phase does not become complete do not count. Of parity 1 it is true at once.
- An arrival (release, of scope cta unless it says otherwise) synchronizes with the ``try_wait`` (acquire) that sees the phase complete.
- ``st.async`` is a weak store and a complete-tx, which is a release of cluster scope. Both come after what its thread did before,
  and before nothing of it. The ISA says of the complete-tx of bulk copies that it is a release of the instruction's own accesses alone, not
  of what the thread did before (8.9.1.1); of ``st.async`` it does not say more, so the same is taken for granted here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations, product

INIT = -1  # as a write to read from: the value that memory had before


@dataclass
class Event:
    """One operation of the model: a scalar memory access, a fence, a barrier or a kernel boundary."""

    thread: str
    step: int  # position of its instruction in the thread
    # ld, st, atom, fence, bar, arrive and awaited (of a cluster), wait, trigger, assume;
    # of an mbarrier: init, init_fence, signal (an arrival), complete (complete-tx), observe (try_wait)
    kind: str
    order: str = "weak"  # weak, relaxed, acquire, release, acq_rel, sc
    scope: str = ""
    words: tuple[str, ...] = ()  # the 4-byte words accessed
    registers: tuple[str, ...] = ()
    operand: tuple[str, ...] = ()  # of a store, per word: an expression over registers; of assume: the condition
    add: bool = False  # an atomic addition; otherwise an exchange, or a comparison with `expected` and exchange
    expected: str = ""
    red: bool = False  # a reduction: forms no acquire pattern (8.11.1)
    asynchronous: bool = False  # not in program order before anything
    number: int = 0  # init: arrivals of a phase; signal: bytes expected with it; complete: bytes; observe: parity

    reads = property(lambda self: self.kind in ("ld", "atom", *OPERATIONS))
    writes = property(lambda self: self.kind in ("st", "atom", "init"))
    strong = property(lambda self: self.order != "weak")


OPERATIONS = ("signal", "complete", "observe")  # on an mbarrier that is initialized
ORDERS = ("relaxed", "acquire", "release", "acq_rel", "sc")
SCOPES = ("cta", "cluster", "gpu", "sys")
KINDS = ("ld", "st", "atom", "red", "fence")
TYPES = {"u32", "b32", "f32", "u64", "b64", "b128", "v2", "v4"}
SPACES = {"global", "shared", "shared::cta", "shared::cluster"}
KNOWN = {*KINDS, *ORDERS, *SCOPES, *TYPES, *SPACES, "weak", "volatile", "exch", "cas", "add"}


def parse_instruction(thread: str, step: int, text: str, vector: int = 4) -> list[Event]:
    """The events of one instruction. Vectors longer than ``vector`` are cut: all their elements are alike."""
    mnemonic, _, operands = text.strip().partition(" ")
    if mnemonic == "assume":
        return [Event(thread, step, "assume", operand=(operands,))]
    if mnemonic in ("bar.sync", "bar.warp.sync"):
        return [Event(thread, step, "bar")]
    if mnemonic.startswith("griddepcontrol."):
        return [Event(thread, step, {"wait": "wait", "launch_dependents": "trigger"}[mnemonic.split(".")[1]])]
    parts = mnemonic.split(".")
    if parts[:2] == ["barrier", "cluster"]:
        kind, order = {"arrive": ("arrive", "release"), "wait": ("awaited", "acquire")}[parts[2]]
        return [Event(thread, step, kind, next((p for p in parts if p in ORDERS), order), "cluster")]
    if mnemonic == "fence.mbarrier_init.release.cluster":
        return [Event(thread, step, "init_fence", "release", "cluster")]
    if parts[0] == "mbarrier" or parts[:2] == ["st", "async"]:
        return parse_mbarrier(thread, step, parts, operands)
    kind = parts[0]
    if kind not in KINDS:
        raise ValueError(f"not in the model: {text}")
    # A volatile operation is a relaxed one of system scope (8.4.2).
    order = next((p for p in parts if p in ORDERS), "weak")
    scope = next((p for p in parts if p in SCOPES), "")
    if "volatile" in parts:
        order, scope = "relaxed", "sys"
    if unknown := set(parts) - KNOWN:
        raise ValueError(f"not in the model: {sorted(unknown)} of {text}")
    if (order != "weak") != bool(scope):
        raise ValueError(f"strong operations have a scope, and no others: {text}")
    if kind == "fence":
        return [Event(thread, step, kind, order, scope)]

    match = re.fullmatch(r"(?:(\w+), )?\[([\w.]+)\](?:, (.+))?", operands)
    if not match or (kind in ("ld", "atom")) != bool(match[1]) or (kind != "ld") != bool(match[3]):
        raise ValueError(f"malformed: {text}")
    register, address, value = match.groups()
    if kind == "red":
        unseen = f"{thread} {step}"
        return [Event(thread, step, "atom", order, scope, (address,), (unseen,), (value,), "add" in parts, red=True)]
    if "cas" in parts:
        expected, _, value = value.partition(", ")
        return [Event(thread, step, kind, order, scope, (address,), (register,), (value,), expected=expected)]
    elements = next((min(n, vector) for n in (2, 4) if f"v{n}" in parts), 1)
    size = 4 if "b128" in parts else 2 if {"u64", "b64"} & set(parts) else 1  # words of a scalar
    total = elements * size
    names = [f"{address}.{i}" if total > 1 else address for i in range(total)]
    registers = [f"{register}{i}" if total > 1 else register for i in range(total)]
    values = (value or "").split(" ") if value and " " in value else [value or ""] * total
    return [
        Event(thread, step, kind, order, scope, tuple(names[i : i + size]),
              tuple(registers[i : i + size]) if register else (), tuple(values[i : i + size]) if value else (),
              "add" in parts)
        for i in range(0, total, size)
    ]  # fmt: skip


MBARRIER = {
    ("mbarrier", "init"): ("init", "weak", "", r"\[(?P<b>\w+)\], (?P<number>\d+)"),
    ("mbarrier", "arrive", "expect_tx"): ("signal", "release", "cta", r"_, \[(?P<b>\w+)\], (?P<number>\d+)"),
    ("mbarrier", "try_wait", "parity"): ("observe", "acquire", "cta", r"\w+, \[(?P<b>\w+)\], (?P<number>[01])"),
    ("st", "async"): ("complete", "release", "cluster", r"\[(?P<x>[\w.]+)\], (?P<value>\w+), \[(?P<b>\w+)\]"),
}


def parse_mbarrier(thread: str, step: int, parts: Sequence[str], operands: str) -> list[Event]:
    """The events of an instruction about an mbarrier. Its orders and scopes, if it names none, are those of the ISA."""
    prefix = next((p for p in MBARRIER if tuple(parts[: len(p)]) == p), None)
    if prefix is None:
        raise ValueError(f"not in the model: {'.'.join(parts)}")
    kind, order, scope, form = MBARRIER[prefix]
    known = {*SPACES, "b64"} | ({"relaxed", order, *SCOPES} if kind in ("signal", "observe") else set())
    if kind == "complete":
        known = {"weak", "shared::cluster", "mbarrier::complete_tx::bytes", "u32", "b32"}
    match = re.fullmatch(form, operands)
    if set(parts[len(prefix) :]) - known or not match:
        raise ValueError(f"not in the model: {'.'.join(parts)} {operands}")
    word = (match["b"],)
    if kind == "init":
        return [Event(thread, step, kind, words=word, operand=("1",), number=int(match["number"]))]
    operation = Event(
        thread, step, kind, next((p for p in parts if p in ORDERS), order), next((p for p in parts if p in SCOPES), scope),
        word, (f"{thread} {step}",),
    )  # fmt: skip
    if kind == "complete":
        operation.asynchronous, operation.number = True, 4
        store = Event(thread, step, "st", words=(match["x"],), operand=(match["value"],), asynchronous=True)
        return [store, operation]
    operation.number = int(match["number"])
    return [operation]


@dataclass
class Program:
    threads: Mapping[str, Sequence[str]]
    init: Mapping[str, int] = field(default_factory=dict)  # by variable; 0 if not named
    vector: int = 2
    # Whether the end of a poll loop counts as a dependency of what is executed only after it, in later kernels too.
    # The ISA speaks of "chains of instruction dependencies" and does not say whether control is one.
    control: bool = False

    def __post_init__(self):
        self.events: list[Event] = []
        for thread, instructions in self.threads.items():
            for step, text in enumerate(instructions):
                self.events += parse_instruction(thread, step, text, self.vector)
        self.n = len(self.events)
        self.pairs = [(a, b) for a in range(self.n) for b in range(self.n) if a != b]
        self.place = {}
        for thread in self.threads:
            parts = thread.split(":")
            number = {p[0]: int(p[1:]) for p in parts[1:] if re.fullmatch(r"[kb]\d+", p)}
            self.place[thread] = (parts[0], number.get("k", 0), number.get("b", 0))
        self.accesses = [i for i, e in enumerate(self.events) if e.words]
        for a, b in combinations(self.accesses, 2):
            if set(self.events[a].words) & set(self.events[b].words) and self.events[a].words != self.events[b].words:
                raise ValueError(f"accesses of different sizes overlap: {self.events[a].words}, {self.events[b].words}")
        self.objects = {e.words for e in self.events if e.kind in ("init", *OPERATIONS)}
        self.inits = {e.words: i for i, e in enumerate(self.events) if e.kind == "init"}
        if any(e.words in self.objects and e.kind not in ("init", *OPERATIONS) for e in self.events):
            raise ValueError("an mbarrier is accessed as if it were memory")
        if set(self.inits) != self.objects or sum(e.kind == "init" for e in self.events) != len(self.objects):
            raise ValueError("every mbarrier is initialized once")
        self.strong = {(a, b) for a, b in self.pairs if self._morally_strong(a, b)}
        self.po = {(a, b) for a, b in self.pairs if self._program_order(a, b)}
        self.boundaries = {(a, b) for a, b in self.pairs if self._boundary(a, b)}
        # Synchronization of one access, not of what comes before it: of mbarrier.init through its fence.
        self.alone = {
            (a, y) for a in self.inits.values() for f, y in self.pairs
            if self.events[f].kind == "init_fence" and (a, f) in self.po and self._through_cluster(f, y)
        }  # fmt: skip

    def _program_order(self, a: int, b: int) -> bool:
        x, y = self.events[a], self.events[b]
        return x.thread == y.thread and x.step < y.step and not x.asynchronous

    def _number(self, a: int) -> int:
        """How many operations of its kind its thread did before."""
        x = self.events[a]
        return sum(e.kind == x.kind and e.thread == x.thread and e.step < x.step for e in self.events)

    def _through_cluster(self, a: int, b: int) -> bool:
        """Whether ``b`` is the wait of a cluster's barrier at which the thread of ``a`` arrives after ``a``, or is that arrival."""
        x, y = self.events[a], self.events[b]
        if y.kind != "awaited" or y.order != "acquire" or self.place[x.thread][:2] != self.place[y.thread][:2]:
            return False
        return any(
            e.kind == "arrive" and (i == a or (a, i) in self.po) and self._number(i) == self._number(b)
            for i, e in enumerate(self.events)
        )  # fmt: skip

    def _includes(self, a: Event, b: Event) -> bool:
        """Whether the scope of ``a`` includes the thread of ``b``."""
        mine, other = self.place[a.thread], self.place[b.thread]
        return {
            "sys": True, "gpu": mine[0] == other[0], "cluster": mine[:2] == other[:2], "cta": mine == other,
        }.get(a.scope, False)  # fmt: skip

    def _morally_strong(self, a: int, b: int) -> bool:
        x, y = self.events[a], self.events[b]
        if x.words and y.words and x.words != y.words:
            return False
        if x.thread == y.thread and not (x.asynchronous or y.asynchronous):
            return True
        return x.strong and y.strong and self._includes(x, y) and self._includes(y, x)

    def _boundary(self, a: int, b: int) -> bool:
        """Synchronization that does not depend on the execution: barriers and kernel boundaries."""
        x, y = self.events[a], self.events[b]
        (gpu, kernel, block), (gpu2, kernel2, block2) = self.place[x.thread], self.place[y.thread]
        if x.kind == y.kind == "bar" and x.thread != y.thread:
            return (gpu, kernel, block) == (gpu2, kernel2, block2) and self._number(a) == self._number(b)
        releases = x.kind in ("arrive", "fence") and x.order in ("release", "acq_rel", "sc")
        if releases and self._through_cluster(a, b) and (a, b) in self.strong:
            return True
        if gpu != gpu2:
            return False
        # Every earlier kernel of the stream has completed, and its memory operations are performed and visible.
        if y.kind == "wait" and kernel < kernel2:
            return True
        # A release fence before griddepcontrol.launch_dependents synchronizes with the start of the dependent grid.
        return (
            x.kind == "fence" and x.scope in ("gpu", "sys") and x.order in ("release", "acq_rel", "sc")
            and kernel + 1 == kernel2
            and any(e.kind == "trigger" and e.thread == x.thread and e.step > x.step for e in self.events)
        )  # fmt: skip


@dataclass
class Execution:
    """An execution that fulfils the axioms: registers, and for each (read, word) the write that it reads from."""

    registers: dict[str, int]
    reads_from: dict[tuple[int, int], int]


def closure(n: int, pairs) -> list[int]:
    """Transitive closure, as a bit set of successors for each of ``n`` nodes."""
    after = [0] * n
    for a, b in pairs:
        after[a] |= 1 << b
    for k in range(n):
        for a in range(n):
            if after[a] >> k & 1:
                after[a] |= after[k]
    return after


def witness(program: Program, condition: str, final: Mapping[str, int] | None = None) -> Execution | None:
    """An execution after which ``condition`` (over registers) holds and memory is ``final``, if there is one."""
    for registers, rf in candidates(program):
        if eval(condition, {}, registers) and consistent(program, rf, values_written(program, registers), final or {}):
            return Execution(registers, rf)
    return None


def values_written(program: Program, registers: Mapping[str, int]) -> dict[tuple[int, int], int]:
    """The value of each (write, word)."""
    writes = [(i, e) for i, e in enumerate(program.events) if e.writes]
    return {(i, w): written(e, w, registers) for i, e in writes for w in range(len(e.words))}


def written(e: Event, w: int, registers: Mapping[str, int]) -> int:
    """A comparison that fails counts as a write of what was there."""
    value = eval(e.operand[w], {}, dict(registers))
    if e.add:
        return registers[e.registers[w]] + value
    if e.expected and registers[e.registers[w]] != int(e.expected):
        return registers[e.registers[w]]
    return value


def candidates(program: Program) -> Iterator[tuple[dict[str, int], dict[tuple[int, int], int]]]:
    """All ways to read (registers, reads-from) that fulfil No Thin Air and every ``assume``."""
    events = program.events
    reads = [(i, w) for i in program.accesses if events[i].reads for w in range(len(events[i].words))]
    sources = [
        [INIT, *(j for j in program.accesses if j != i and events[j].writes and events[j].words == events[i].words)]
        for i, _ in reads
    ]
    assumptions = [e for e in events if e.kind == "assume"]
    names = {r: i for i, e in enumerate(events) for r in e.registers}

    def mentioned(text: str) -> set[str]:
        return set(re.findall(r"\b[a-z]\w*\b", text)) & set(names)

    depends: dict[int, set[int]] = {i: set() for i in range(program.n)}  # on these reads
    for i, e in enumerate(events):
        if e.writes:
            for text in e.operand:
                depends[i] |= {names[r] for r in mentioned(text)}
            if e.kind == "atom":
                depends[i].discard(i)
    if program.control:
        launches = {
            (a, b) for a, b in program.pairs if events[a].kind == "trigger"
            for (gpu, kernel, _), later in [(program.place[events[a].thread], program.place[events[b].thread])]
            if later[:2] == (gpu, kernel + 1)
        }  # fmt: skip
        order = closure(program.n, program.po | program.boundaries | launches)
        for a, assumption in enumerate(events):
            if assumption.kind == "assume":
                for b in program.accesses:
                    if events[b].writes and order[a] >> b & 1:
                        depends[b] |= {names[r] for r in mentioned(assumption.operand[0])}

    for choice in product(*sources):
        rf = dict(zip(reads, choice, strict=True))
        edges = {(source, i) for (i, _), source in rf.items() if source != INIT}
        edges |= {(read, i) for i in depends for read in depends[i]}
        after = closure(program.n, edges)
        if any(after[i] >> i & 1 for i in range(program.n)):
            continue  # a value out of thin air
        registers: dict[str, int] = {}
        for i in sorted(program.accesses, key=lambda i: sum(after[j] >> i & 1 for j in range(program.n))):
            if events[i].reads:
                for w, register in enumerate(events[i].registers):
                    source = rf[i, w]
                    registers[register] = (
                        program.init.get(events[i].words[w].split(".")[0], 0) if source == INIT
                        else written(events[source], w, registers)
                    )  # fmt: skip
        if program.objects:
            operations = [(i, e) for i, e in enumerate(events) if e.kind in OPERATIONS]
            registers["initialized"] = int(all(rf[i, 0] == program.inits[e.words] for i, e in operations))
        if all(eval(e.operand[0], {}, dict(registers)) for e in assumptions):
            yield registers, rf


def consistent(program: Program, rf, values, final) -> bool:
    """Whether some phases, some order of the fence.sc operations and some coherence order fulfil the axioms."""
    sc = [i for i, e in enumerate(program.events) if e.order == "sc"]
    for phases, order in product(list(phases_seen(program, rf)), permutations(sc)):
        fence_order = {(a, b) for a, b in combinations(order, 2) if (a, b) in program.strong}
        base, causality = causality_order(program, rf, fence_order, phases)
        if any((b, a) in fence_order for a in sc for b in sc if base[a] >> b & 1):
            continue  # Fence-SC
        if any((a, a) in causality for a in program.accesses):
            continue
        locations = {program.events[i].words for i in program.accesses}
        if all(coherent(program, words, rf, causality, values, final) for words in locations):
            return True
    return False


def phases_seen(program: Program, rf) -> Iterator[set[tuple[int, int]]]:
    """All ways in which every try_wait can see its phase complete: pairs of an operation that completed it and the try_wait."""
    choices = []
    for wait in (i for i in program.accesses if program.events[i].kind == "observe"):
        words = program.events[wait].words
        operations = [i for i in program.accesses if program.events[i].words == words and program.events[i].kind in OPERATIONS]
        if program.events[wait].number == 1 or any(rf[i, 0] == INIT for i in operations):
            choices.append([()])
            continue
        signals = [i for i in operations if program.events[i].kind == "signal"]
        completions = [i for i in operations if program.events[i].kind == "complete"]
        choices.append([
            tuple((i, wait) for i in (*some, *done))
            for some in combinations(signals, program.events[program.inits[words]].number)
            for n in range(len(completions) + 1) for done in combinations(completions, n)
            if sum(program.events[i].number for i in some) == sum(program.events[i].number for i in done)
        ])  # fmt: skip
    for choice in product(*choices):
        yield {pair for pairs in choice for pair in pairs}


def causality_order(program: Program, rf, fence_order, phases):
    """Base causality order (8.9.5) as bit sets of successors, and causality order as pairs of accesses."""
    events, n = program.events, program.n
    observation = {(source, i) for (i, _), source in rf.items() if source != INIT and (source, i) in program.strong}
    # W -> atom -> R: through read-modify-writes, which read what they replace.
    observed = closure(n, observation)
    synchronizes = set()
    for write in program.accesses:
        for read in program.accesses:
            if not (events[write].writes and observed[write] >> read & 1):
                continue
            for x in release_patterns(program, write):
                synchronizes |= {(x, y) for y in acquire_patterns(program, read) if (x, y) in program.strong}
    alone = set(program.alone)
    for operation, wait in phases:
        acquires = acquire_patterns(program, wait)
        if events[operation].kind == "complete":
            stores = [i for i in program.accesses if events[i].asynchronous and events[i].kind == "st"
                      and (events[i].thread, events[i].step) == (events[operation].thread, events[operation].step)]  # fmt: skip
            alone |= {(store, y) for store in stores for y in acquires if (operation, y) in program.strong}
        else:
            releases = release_patterns(program, operation)
            synchronizes |= {(x, y) for x in releases for y in acquires if (x, y) in program.strong}
    base = closure(n, program.po | program.boundaries | synchronizes | fence_order)
    for a, after in [(a, 1 << b | base[b]) for a, b in alone]:
        base[a] |= after
    preserved = {
        (a, b) for a in program.accesses for b in program.accesses
        if base[a] >> b & 1 and events[a].words == events[b].words
    }  # fmt: skip
    causality = set(preserved)
    for a in program.accesses:
        for z in program.accesses:
            if observed[a] >> z & 1:
                causality |= {(a, b) for b in program.accesses if (z, b) in preserved}
    return base, causality


def release_patterns(program: Program, write: int) -> list[int]:
    """The first operations of the release patterns (8.8) that end in ``write``."""
    found = []
    for i, e in enumerate(program.events):
        releases = e.order in ("release", "acq_rel", "sc")
        if releases and (i == write or ((i, write) in program.po and program.events[write].strong)):
            if e.kind == "fence" or ((e.writes or e.kind == "signal") and e.words == program.events[write].words):
                found.append(i)
    return found


def acquire_patterns(program: Program, read: int) -> list[int]:
    """The last operations of the acquire patterns (8.8) that begin with ``read``."""
    found = []
    for i, e in enumerate(program.events):
        acquires = e.order in ("acquire", "acq_rel", "sc") and not program.events[read].red
        if acquires and (i == read or ((read, i) in program.po and program.events[read].strong)):
            if e.kind == "fence" or (e.reads and e.words == program.events[read].words):
                found.append(i)
    return found


def coherent(program: Program, words, rf, causality, values, final) -> bool:
    """Whether one location has a coherence order that fulfils the axioms on it."""
    events, strong = program.events, program.strong
    here = [i for i in program.accesses if events[i].words == words]
    writes = [i for i in here if events[i].writes]
    reads = [i for i in here if events[i].reads]
    # Writes in a race are not related: 8.9.6.
    related = {(a, b) for a in writes for b in writes if a != b and {(a, b), (b, a)} & (strong | causality)}
    seen = set()
    for order in permutations(writes):
        direct = {(a, b) for a, b in combinations(order, 2) if (a, b) in related}
        if frozenset(direct) in seen:
            continue
        seen.add(frozenset(direct))
        after = closure(program.n, direct)
        co = {(a, b) for a in writes for b in writes if after[a] >> b & 1} | {(INIT, b) for b in writes}
        if fulfils_axioms(events, here, reads, writes, rf, co, strong, causality, len(words)) and all(
            any(
                values.get((a, w), program.init.get(word.split(".")[0], 0)) == final[word]
                for a in (writes or [INIT]) if not any((a, b) in co for b in writes)
            )
            for w, word in enumerate(words) if word in final
        ):  # fmt: skip
            return True
    return False


def fulfils_axioms(events, here, reads, writes, rf, co, strong, causality, size) -> bool:
    sources = {r: [rf[r, w] for w in range(size)] for r in reads}
    overtaken = {(r, w) for r in reads for w in writes if r != w and any((source, w) in co for source in sources[r])}
    # Coherence
    if any((a, b) in causality and (a, b) not in co for a in writes for b in writes if a != b):
        return False
    # Causality
    if any((r, source) in causality for r in reads for source in sources[r]):
        return False
    if any((w, r) in causality for r, w in overtaken):
        return False
    # Atomicity: of single copies, and of read-modify-writes
    if any(w in sources[r] and (r, w) in strong for r, w in overtaken):
        return False
    if any(events[a].kind == "atom" and (a, w) in strong and (w, a) in co for a, w in overtaken):
        return False
    # Sequential consistency per location, of operations that are morally strong in pairs
    same = {(a, b) for a in here for b in here if events[a].thread == events[b].thread}
    po = {(a, b) for a, b in same if events[a].step < events[b].step and not events[a].asynchronous}
    communication = co | overtaken | {(source, r) for r in reads for source in sources[r]}
    return not cycle_in_a_clique(here, po | (communication & strong), strong)


def cycle_in_a_clique(nodes, step, strong) -> bool:
    def extend(path):
        for b in nodes:
            if (path[-1], b) in step:
                if b == path[0]:
                    return True
                if b > path[0] and b not in path and all((a, b) in strong for a in path) and extend([*path, b]):
                    return True
        return False

    return any(extend([a]) for a in nodes)
