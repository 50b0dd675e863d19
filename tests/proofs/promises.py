"""Sentences of protocol.md and docstrings about failures, as checks of the CPU twin: who hears of what, when, and what a stopped rank does.

Each takes (objects, edits, seed) as the checks of ``test_twin`` do, and raises ``twin.Failed``. ``Case`` is what they run: all-reduces, or
calls with a norm.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import twin
import twin_host
import twin_norm
from twin import Call, Failed, Program, World, cramped
from twin_host import HostCall
from twin_norm import NormCall, NormProgram

from allreduce_jit.abi import IN_PLACE, MAX_SHAPES, NUMEL_SHIFT, Control, Header, Report
from allreduce_jit.engine import failure
from allreduce_jit.engine.failure import Kind, abort_code
from allreduce_jit.policy import norm
from allreduce_jit.policy.catalogue import HOST_ALGORITHMS, NVLINK_ALGORITHMS
from allreduce_jit.policy.plan import HEADER_BYTES, PACKET, WARP

TICK = 8  # nanoseconds of a step
PATIENCE, LIMIT = 5_000_000, 3_000_000  # steps, and nanoseconds, of which a report counts millions
LONG_AGO = LIMIT // 2  # no stopped kernel takes so long
ROOM = 1500  # threads of a rank: later calls are in flight when the first one gives up
WORD = 0xFFFFFFFF


@dataclass(frozen=True)
class Case:
    """What is called: ``algorithm`` with the edits of a mutant, on ``world_size`` ranks."""

    algorithm: str = "one_shot"
    world_size: int = 3
    dtype: str = "float32"
    norm: twin_norm.Kernel | None = None
    epoch: int = 0

    @property
    def host(self) -> bool:
        """Whether data go through host memory."""
        return self.algorithm in HOST_ALGORITHMS

    def world(self, objects, edits) -> World:
        if self.host:
            return twin_host.world(objects, self.world_size, edits=edits, epoch=self.epoch)
        if self.norm:
            return twin_norm.world(objects, self.world_size, [self.norm], edits=edits, epoch=self.epoch)
        built = twin.build(objects, self.world_size, edits=edits)
        return World(built, self.world_size, relayout=cramped, epoch=self.epoch)

    def program(self, seed: int, calls: int = 1, **options) -> Program:
        if self.norm:
            return NormProgram(self.world_size, calls * [NormCall(self.norm, 2, plain=True, **options)], seed)
        if self.host:  # some chunks of each channel
            return Program(
                self.world_size, calls * [HostCall(self.algorithm, self.dtype, 700 * self.world_size + seed % 4, **options)], seed
            )
        # In one launch, but for a stream; whole packets, and not; some threads have all of their packets, some have not.
        what = NVLINK_ALGORITHMS[self.algorithm]
        numel = (512 if what.stream else 60 if what.packets == 1 else 4 * (WARP * what.packets - 20)) * self.world_size + seed % 4
        return Program(self.world_size, calls * [Call(self.algorithm, self.dtype, numel, **options)], seed)

    def signature(self, world: World, program: Program) -> tuple[int, int]:
        """What a rank tells of a call that is not in place: the low word, and the tag."""
        call = program.calls[0]
        numel, algorithm = call.spec.numel, world.plan(call).algorithm
        assert self.norm or algorithm == self.algorithm, "a world of this size has it not"
        return numel & WORD, failure.tag(algorithm, call.spec.dtype) | numel >> 32 << NUMEL_SHIFT


def need(condition: object, kind: str, text: object) -> None:
    if not condition:
        raise Failed(kind, str(text))


def heard(world: World, rank: int) -> int:
    """The word that stops that rank's kernels."""
    return int(world.staging(rank)[Header.abort.offset :][:4].view(torch.int32)) & WORD


def stop(world: World, rank: int, code: int) -> None:
    """As the rank's own process does, which tells its kernels, and on path host those that begin, too."""
    word = torch.tensor([code], dtype=torch.int32)
    world.staging(rank)[Header.abort.offset :][:4].view(torch.int32).copy_(word)
    if isinstance(world, twin_host.HostWorld):
        world.control(rank).abort = code


def report(world: World, rank: int) -> Report:
    return Report.from_buffer_copy(world.report_bytes(rank))


def run(world: World, program: Program, seed: int, **options) -> None:
    world.run(program, seed, complete=False, patience=PATIENCE, room=ROOM, tick=TICK, **options)


def took(world: World) -> int:
    """Nanoseconds of the last run."""
    return world.steps * TICK


def all_nan(case: Case, world: World, program: Program, rank: int, text: str) -> None:
    """Every element of every result of a rank is NaN; of what is quantized, and of the new residual, too."""
    for call, *buffers in program.steps:
        for pointer, buffer in zip(call.spec.pointers, buffers, strict=True):
            if (
                pointer.name in ("output", "norm", "residual_out")
                or pointer.name == "scale"
                and call.spec.epilogue.quant != "static"
            ):
                lost = buffer.of(world.arena(rank)).float().isnan()
                need(
                    lost.all(),
                    "bits",
                    f"{text}: rank {rank} has {int((~lost).sum())} of {lost.numel()} numbers in {pointer.name}",
                )


def slots_of(world: World) -> list[torch.Tensor]:
    return [world.staging(rank)[HEADER_BYTES:].clone() for rank in range(world.world_size)]


def signed(world: World) -> list[torch.Tensor]:
    return [world.staging(rank)[Header.signatures.offset :][: failure.SIGNED].clone() for rank in range(world.world_size)]


def same(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor], text: str) -> None:
    for rank, (old, new) in enumerate(zip(before, after, strict=True)):
        need(torch.equal(old, new), "pushed", f"{text} into the memory of rank {rank}")


# -- "The first thread to see it pass writes an abort code — kind, culprit, who found out — into its own header and those of all peers, and
# -- reports to host memory." "A rank that stopped waiting also stops pushing, in later kernels too."


def everybody_hears(objects, edits, seed, case: Case = Case(), culprit: int = 0, finder: int = 1):  # noqa: B008
    """One rank does not come, and one other alone has a limit: all ranks hear its word, the culprit as well, and each that called reports
    it, once, wholly. All results are NaN; nobody pushes from then on, by either of two checks; later kernels end at once."""
    code = abort_code(Kind.TIMEOUT, culprit, finder)
    with case.world(objects, edits) as world:
        n, others = case.world_size, [rank for rank in range(case.world_size) if rank != culprit]
        world.set_deadlines(0)
        world.set_deadlines(LIMIT, ranks=[finder])
        program = case.program(seed, 2)
        run(world, program, seed, skip=[culprit])
        need(took(world) >= LIMIT, "early", f"{took(world)} ns, of {LIMIT}")
        need([heard(world, r) for r in range(n)] == n * [code], "told", [hex(heard(world, r)) for r in range(n)])
        first = [report(world, rank) for rank in range(n)]
        need(not any(bytes(first[culprit])), "report", f"rank {culprit}, which did not call, reports")
        low, tag = case.signature(world, program)
        buffers = {_buffer(case, world, program)} if case.host else set(range(5))
        if not case.norm and not case.host and NVLINK_ALGORITHMS[case.algorithm].stream is False:
            buffers = {0, 1}
        for rank in others:
            seen = first[rank]
            need(seen.code == code, "report", f"rank {rank}: {seen.code:#x}")
            need(
                seen.tag == tag and seen.buffer in buffers and seen.channel == 0,
                "report",
                f"rank {rank}: {seen.tag:#x}, {seen.buffer}",
            )
            need(seen.waited_ms <= LIMIT // 1_000_000 + 1, "report", f"rank {rank} waited for {seen.waited_ms} ms")
            theirs = (*seen.mine, *seen.theirs)
            start = max(0, case.epoch - 4)
            known = (
                seen.sequence and seen.sequence == (start + 1) & WORD and tuple(seen.mine) == (low, tag) and not any(seen.theirs)
            )
            need(known or not seen.sequence and not any(theirs), "report", f"rank {rank}: call {seen.sequence}: {theirs}")
            all_nan(case, world, program, rank, "the rank that is waited for never came")
            need(not case.host or world.control(rank).abort == code, "told", f"kernels of rank {rank} that begin")
            need(
                (world.channels(rank)[: world.layout.channels, 1] == 1).all(), "told", f"a channel of rank {rank} is not stopped"
            )
            need(not any(world.control(rank).handshaken), "handshake", f"rank {rank} without rank {culprit}")
        need(
            first[finder].waited_ms >= LIMIT // 1_000_000 - 1, "report", f"rank {finder} waited for {first[finder].waited_ms} ms"
        )
        program.check(culprit, world.arena(culprit)[: program.end], calls=False)

        slots, signatures = slots_of(world), signed(world)
        world.set_deadlines(LIMIT)
        run(world, program, seed + 1, skip=[culprit])
        need(took(world) < LONG_AGO, "slow", f"kernels of a stopped rank took {took(world)} ns")
        same(slots, slots_of(world), "a stopped rank pushes")
        same(signatures, signed(world), "a stopped rank signs")
        for rank in others:
            all_nan(case, world, program, rank, "after the abort")
            need(bytes(report(world, rank)) == bytes(first[rank]), "report", f"rank {rank} reports again")

        # The abort word alone, as of a host that has just written it.
        for rank in others:
            world.channels(rank)[: world.layout.channels, 1] = 0
        run(world, program, seed + 2, skip=[culprit])
        same(slots, slots_of(world), "a rank with an abort word pushes")
        same(signatures, signed(world), "a rank with an abort word signs")
        for rank in others:
            all_nan(case, world, program, rank, "with an abort word")

        # The channels' words alone, as of a kernel that read the abort word before it came.
        for rank in others:
            stop(world, rank, 0)
            world.channels(rank)[: world.layout.channels, 1] = 1
        run(world, program, seed + 3, skip=[culprit])
        same(slots, slots_of(world), "a rank with stopped channels pushes")
        for rank in others:
            all_nan(case, world, program, rank, "with stopped channels")


def the_first_cause_counts(objects, edits, seed, case: Case = Case()):  # noqa: B008
    """A rank that was stopped for one reason does not tell another one, nor report it."""
    stopped = seed % case.world_size
    code = abort_code(Kind.ABORTED, stopped, stopped)
    with case.world(objects, edits) as world:
        world.set_deadlines(LIMIT)
        program = case.program(seed)
        stop(world, stopped, code)
        run(world, program, seed, skip=[rank for rank in range(case.world_size) if rank != stopped])
        need(took(world) < LONG_AGO, "slow", f"a stopped rank takes {took(world)} ns")
        seen = report(world, stopped)
        need(heard(world, stopped) == seen.code == code, "report", f"{seen.code:#x}")
        need(seen.buffer == seen.waited_ms == 0, "report", f"it waited {seen.waited_ms} ms for nothing, in buffer {seen.buffer}")
        for rank in range(case.world_size):
            need(rank == stopped or not heard(world, rank), "told", f"rank {rank} is told again what it is told by the host")
        all_nan(case, world, program, stopped, "stopped by its host")
        need(
            all((part == world.EMPTY & 0xFF).all() for part in slots_of(world)) and not any(map(torch.any, signed(world))),
            "pushed",
            "a stopped rank",
        )


def a_stopped_rank_believes_nothing(objects, edits, seed, case: Case = Case()):  # noqa: B008
    """A rank that was stopped before a call yields NaN, though all its peers come to it; and so do they, to whom it pushes nothing."""
    stopped = seed % case.world_size
    with case.world(objects, edits) as world:
        world.set_deadlines(LIMIT)
        program = case.program(seed)
        code = abort_code(Kind.ABORTED, stopped, stopped)
        stop(world, stopped, code)
        run(world, program, seed)
        need(not any(map(torch.any, _of_source(case, world, program, stopped))), "pushed", f"rank {stopped}, which was stopped")
        for rank in range(case.world_size):
            all_nan(case, world, program, rank, f"rank {stopped} was stopped")
            signs = rank == stopped or not any(world.control(rank).handshaken)  # to itself it may be alive
            need(signs, "handshake", f"rank {rank} with rank {stopped}, which was stopped")


def a_peer_tells(objects, edits, seed, case: Case = Case()):  # noqa: B008
    """A rank that is told by a peer, in its header alone, while it waits: it reports that, keeps it, and tells nobody again."""
    told = seed % case.world_size
    finder = (told + 1) % case.world_size
    code = abort_code(Kind.ABORTED, finder, finder)
    with case.world(objects, edits) as world:
        world.set_deadlines(0)
        program = case.program(seed)
        pokes = [(20_000, world.abort_word(told), code)]
        run(world, program, seed, skip=[rank for rank in range(case.world_size) if rank != told], pokes=pokes)
        need(heard(world, told) == report(world, told).code == code, "report", f"{report(world, told).code:#x}")
        need(not case.host or world.control(told).abort == code, "told", "kernels that begin are not told")
        for rank in range(case.world_size):
            need(rank == told or not heard(world, rank), "told", f"rank {rank} is told again what a peer has told")
        all_nan(case, world, program, told, "stopped by a peer")


def one_cause(objects, edits, seed, case: Case = Case(world_size=4)):  # noqa: B008
    """Two ranks do not come, and one alone has a limit: its threads miss different ones, and all ranks hear and report the same."""
    finder, lost = seed % case.world_size, [(seed + 1) % case.world_size, (seed + 2) % case.world_size]
    with case.world(objects, edits) as world:
        world.set_deadlines(0)
        world.set_deadlines(LIMIT, ranks=[finder])
        program = case.program(seed)
        run(world, program, seed, skip=lost)
        codes = [heard(world, rank) for rank in range(case.world_size)]
        need(
            len(set(codes)) == 1 and codes[0] in [abort_code(Kind.TIMEOUT, rank, finder) for rank in lost],
            "told",
            list(map(hex, codes)),
        )
        for rank in range(case.world_size):
            need(
                report(world, rank).code == (0 if rank in lost else codes[0]),
                "report",
                f"rank {rank}: {report(world, rank).code:#x}",
            )
            need(
                not case.host or rank in lost or world.control(rank).abort == codes[0],
                "told",
                f"kernels of rank {rank} that begin",
            )


def who_gives_up_reports(objects, edits, seed, case: Case = Case()):  # noqa: B008
    """A rank is stopped, by an earlier kernel or by its process in the midst of its only call, to which all come: every result of every rank
    is right or NaN, and whoever has NaN reports it."""
    rank, code = seed % case.world_size, abort_code(Kind.ABORTED, seed % case.world_size, seed % case.world_size)
    dice = random.Random(seed)
    with case.world(objects, edits) as world:
        run(world, case.program(seed), seed)
        whole = world.steps
    for turn in range(25):
        with case.world(objects, edits) as world:
            world.set_deadlines(LIMIT)
            program, words, step = case.program(seed), [], dice.randrange(whole)
            if turn:
                words = [world.abort_word(rank), *([world.near_abort_word(rank)] if case.host else [])]
            else:  # its guard hears of nothing
                world.channels(rank)[: world.layout.channels, 1] = 1
            run(world, program, seed + turn, pokes=[(step, word, code) for word in words])
            for each in range(case.world_size):
                program.check(each, world.arena(each)[: program.end], or_nan=True)
                lost = any(buffer.of(world.arena(each)).float().isnan().any() for buffer in _results(program))
                when = f"as of step {step}" if turn else "before"
                need(report(world, each).code or not lost, "report", f"rank {each} gave up, stopped {when}, and says nothing")


def _results(program: Program) -> list:
    return [
        buffer
        for call, *buffers in program.steps
        for pointer, buffer in zip(call.spec.pointers, buffers, strict=True)
        if pointer.name in ("output", "residual_out")
    ]


def what_was_settled_stays(objects, edits, seed, case: Case):
    """On path host a rank's threads settle in its own memory what stops it: what a peer tells a moment later is not reported."""
    rank, peer = seed % case.world_size, (seed + 1) % case.world_size
    settled, told = abort_code(Kind.TIMEOUT, peer, rank), abort_code(Kind.ABORTED, peer, peer)
    with case.world(objects, edits) as world:
        stop(world, rank, told)
        world.control(rank).abort = settled
        program = case.program(seed)
        run(world, program, seed, skip=[other for other in range(case.world_size) if other != rank])
        need(report(world, rank).code == world.control(rank).abort == settled, "report", f"{report(world, rank).code:#x}")
        need(heard(world, rank) == told, "told", f"{heard(world, rank):#x}")


# -- "The limit depends on the phase: until a shape of call is handshaken [...]; from then on ALLREDUCE_JIT_TIMEOUT, counted from that
# -- moment. Both limits live in device memory." 0: for ever.


def limits(objects, edits, seed, case: Case = Case()):  # noqa: B008
    """When rank 0 stops to wait for the last rank, and that it reports how long it waited."""
    last, host = case.world_size - 1, abort_code(Kind.ABORTED, 0, 0)

    def waited(
        deadline: int,
        grace: int,
        pokes: Sequence[tuple[int, int, int]] = (),
        *,
        stop: int = 0,
        first: Callable = lambda world: None,
    ):
        """(nanoseconds, milliseconds, code) of a wait; the host stops it after ``stop`` nanoseconds."""
        with case.world(objects, edits) as world:
            world.set_deadlines(0)
            world.set_deadlines(deadline, grace, ranks=[0])
            first(world)
            told = [(ns // TICK, world.control_address(0) + at, word) for ns, at, word in pokes]
            told += [(stop // TICK, world.abort_word(rank), host) for rank in range(last)] if stop else []
            run(world, case.program(seed), seed, skip=[last], pokes=told)
            return took(world), report(world, 0).waited_ms, report(world, 0).code

    flag, other = Control.handshaken.offset, Control.handshaken.offset + 4
    timeout = abort_code(Kind.TIMEOUT, last, 0)
    million = 1_000_000

    def is_about(got, ns: int, ms: int, code: int, text: str):
        # Who reports may be a thread that began a little later.
        need(ns - TICK < got[0] < ns + million and ms - 1 <= got[1] < ms + 2 and got[2] == code, "report", f"{text}: {got}")

    is_about(waited(2 * million, 5 * million), 5 * million, 5, timeout, "not handshaken")
    is_about(waited(5 * million, 2 * million), 2 * million, 2, timeout, "not handshaken, which is shorter")
    is_about(waited(3 * million, 9 * million, [(4 * million, flag, 1)]), 7 * million, 3, timeout, "handshaken meanwhile")
    is_about(waited(3 * million, 6 * million, [(million, other, 1)]), 6 * million, 6, timeout, "another shape is handshaken")
    is_about(waited(3 * million, 0, stop=6 * million), 6 * million, 6, host, "no grace: for ever")
    is_about(waited(0, 3 * million, [(million, flag, 1)], stop=6 * million), 6 * million, 5, host, "no deadline: for ever")
    lower = Control.grace_ns.offset
    is_about(waited(0, 9 * million, [(million, lower, 4 * million)]), 4 * million, 4, timeout, "another limit meanwhile")

    def handshaken(world):
        world.control(0).handshaken[0] = 1

    is_about(waited(2 * million, 5 * million, first=handshaken), 2 * million, 2, timeout, "handshaken before")

    def another(world):
        world.run(case.program(seed + 1), seed, room=ROOM)

    if not case.norm:  # whose program has one shape
        is_about(waited(2 * million, 5 * million, first=another), 5 * million, 5, timeout, "a second shape")


def guard_alone(objects, edits, seed, case: Case = Case(), lost: int = 1):  # noqa: B008
    """The signatures of one rank go astray, its data do not: guards miss it and tell the call's number, all sums are right. After calls
    whose signatures came, too: these are told of no more."""
    for before in (0, 2):
        with case.world(objects, edits) as world:
            if before:
                world.run(case.program(seed, before), seed, room=ROOM)
            _guards_alone(world, seed, case, lost, before)


def _guards_alone(world: World, seed: int, case: Case, lost: int, before: int) -> None:
    others = [rank for rank in range(case.world_size) if rank != lost]
    world.set_deadlines(LIMIT)
    program = case.program(seed)
    astray = twin.ARENA // 2  # in every rank's arena, behind the tensors
    away = world._offsets[0]["arena"] - world._offsets[0]["staging"] + astray
    bases = {f"staging_{rank}": world._base + world._offsets[rank]["staging"] + away for rank in range(case.world_size)}
    region = world.layout.regions[_region(case, world, program)]
    told = {lost: {**bases, "own": bases[f"staging_{lost}"], "slots": region.offset - away}}
    run(world, program, seed, told=told)
    finders = set()
    for rank in others:
        seen, code = report(world, rank), heard(world, rank)
        finders |= {code >> 16}
        need(code & 0xFFFF == abort_code(Kind.TIMEOUT, lost, 0) and code >> 16 in others, "told", f"rank {rank}: {code:#x}")
        if seen.code:
            low, tag = case.signature(world, program)
            wanted = (before + 1, low, tag, 0, 0, 0)
            got = (seen.sequence, *seen.mine, *seen.theirs, seen.buffer)
            need(got == wanted, "report", f"rank {rank}: {got}, not {wanted}")
        need(before or not any(world.control(rank).handshaken), "handshake", f"rank {rank} without the signature of rank {lost}")
        # The launches of a stream that follow find the abort word.
        program.check(rank, world.arena(rank)[: program.end], or_nan=case.algorithm == "two_shot_stream")
    need(any(report(world, rank).code for rank in finders), "report", "who found out does not report")


def data_alone(objects, edits, seed, case: Case = Case(), lost: int = 1):  # noqa: B008
    """The data of one rank go astray, its signatures do not: the shape is handshaken, so the deadline counts; the number of the call is
    not told by who does not know it; the buffer is."""
    others = [rank for rank in range(case.world_size) if rank != lost]
    with case.world(objects, edits) as world:
        world.set_deadlines(0)
        world.set_deadlines(LIMIT, 3 * LIMIT, ranks=others)
        program = case.program(seed)
        run(world, program, seed, told={lost: _data_astray(case, world, program, lost)})
        need(LIMIT <= took(world) < 2 * LIMIT, "report", f"waited for {took(world)} ns after the handshake, not {LIMIT}")
        for rank in others:
            code, seen = heard(world, rank), report(world, rank)
            need(code & 0xFFFF == abort_code(Kind.TIMEOUT, lost, 0) and code >> 16 in others, "told", f"rank {rank}: {code:#x}")
            need(seen.code & 0xFFFF == code & 0xFFFF, "report", f"rank {rank}: {seen.code:#x}")
            need(not seen.sequence and not any((*seen.mine, *seen.theirs)), "report", f"rank {rank} tells what it does not know")
            need(seen.buffer == _buffer(case, world, program), "report", f"rank {rank}: buffer {seen.buffer}")
            flags = list(world.control(rank).handshaken)
            need(flags == [1] + [0] * (MAX_SHAPES - 1), "handshake", f"rank {rank}: {sum(flags)} shapes")
            all_nan(case, world, program, rank, f"rank {lost} sent nothing")


def _data_astray(case: Case, world: World, program: Program, rank: int) -> dict[str, int]:
    """What that rank is told to have its slots, here and at its peers, behind everybody's tensors."""
    world.arena(rank)[twin.ARENA // 2 :].fill_(world.EMPTY & 0xFF)
    away = world._offsets[0]["arena"] - world._offsets[0]["staging"] + twin.ARENA // 2
    return {"slots": world.layout.regions[_region(case, world, program)].offset + away}


def _region(case: Case, world: World, program: Program) -> str:
    plan = world.plan(program.calls[0])
    return plan.algorithm.removesuffix("_norm") if plan.algorithm not in world.layout.regions else plan.algorithm


def _of_source(case: Case, world: World, program: Program, source: int) -> list[torch.Tensor]:
    """What is not empty of what this rank has written for others to read: at each of them, or on path host in its outbox."""
    name, n = _region(case, world, program), case.world_size
    region = world.layout.regions[name]
    if case.host:
        return [slots_of(world)[source] != world.EMPTY]
    buffers = NVLINK_ALGORITHMS[name].buffers
    found = []
    for owner in range(n):
        if owner != source:
            slots = world.staging(owner)[region.offset :][: buffers * (n - 1) * region.capacity * PACKET]
            found.append(slots.view(buffers, n - 1, -1)[:, source - (source > owner)] != world.EMPTY)
    return found


def _buffer(case: Case, world: World, program: Program) -> int:
    """What the first launch waits in: that of the epoch's parity; of a stream, one of the last two; on path host, the first phase."""
    if case.host:
        return 0
    return (case.epoch & 1) + 2 * NVLINK_ALGORITHMS[_region(case, world, program)].stream


# -- Signature: "Sequence number, number of elements, dtype and algorithm (and of a norm its parameters) [...] A difference stops the
# -- communicator on both sides. Whether the call is in place travels along for the report but is not compared."


def every_bit_is_compared(objects, edits, seed, case: Case = Case(), odd: int = 1):  # noqa: B008
    """One bit of one rank's signature differs: all hear, and those who found out tell both signatures and the number of the call."""
    low, tag = _own(objects, edits, case, seed)
    total = low | tag >> NUMEL_SHIFT << 32
    bits: list[Mapping[str, int]] = [{"total": total ^ 1 << bit} for bit in range(seed % 3, 48, 3)]
    bits += [{"tag": tag & 0xFFFF ^ 1 << bit} for bit in range(15)]
    if case.norm:
        told = case.program(seed).calls[0].spec
        bits += [{"parameters": _parameters(told) ^ 1 << bit} for bit in range(seed % 3, 64, 3)]
    whole = 0
    for fields in bits:
        with case.world(objects, edits) as world:
            whole += _one_differs(world, case, seed, odd, fields, (low, tag))
    # Of many ranks another thread of the guard is nearly always quicker.
    need(
        whole > len(bits) // 2 or case.world_size > 4,
        "report",
        f"of {len(bits)} mismatches, {whole} are told with both signatures",
    )


def _parameters(spec) -> int:
    return norm.signed(spec.epilogue, spec.hidden)


def _own(objects, edits, case: Case, seed: int) -> tuple[int, int]:
    with case.world(objects, edits) as world:
        return case.signature(world, case.program(seed))


def _one_differs(world: World, case: Case, seed: int, odd: int, fields: Mapping[str, int], own: tuple[int, int]) -> int:
    """How many ranks report both signatures."""
    world.set_deadlines(0)
    program, n = case.program(seed), case.world_size
    run(world, program, seed, told={odd: fields})
    low, tag = own
    total, small = fields.get("total", low | tag >> NUMEL_SHIFT << 32), fields.get("tag", tag & 0xFFFF)
    others, whole = (total & WORD, small | total >> 32 << NUMEL_SHIFT), 0
    for rank in range(n):
        code = heard(world, rank)
        kind, culprit, finder = code & 0xFF, code >> 8 & 0xFF, code >> 16
        need(kind == Kind.MISMATCH and (culprit == odd) != (finder == odd), "told", f"{fields}: rank {rank}: {code:#x}")
        seen = report(world, rank)
        need(seen.code & 0xFF in (0, Kind.MISMATCH), "report", f"{fields}: rank {rank}: {seen.code:#x}")
        if seen.code and seen.code >> 16 == rank:
            mine, theirs = (own, others) if rank != odd else (others, own)
            got = (seen.sequence, *seen.mine, *seen.theirs)
            # Another thread that was told to stop may report before the one that found out; it knows less, and the host reads the rest.
            less = [(0, 0, 0, 0, 0), (1, *mine, 0, 0)]
            need(got == (1, *mine, *theirs) or got in less, "report", f"{fields}: rank {rank}: {got}, not {mine}, {theirs}")
            whole += got not in less
        need(not any(world.control(rank).handshaken), "handshake", f"rank {rank}: {fields}")
    # A rank that had all it wanted before it was told has nothing to report; the odd one and another always do.
    need(sum(bool(report(world, rank).code) for rank in range(n)) >= 2, "report", f"{fields}: both sides tell")
    return whole


def a_mismatch_is_told_at_once(objects, edits, seed, case: Case = Case()):  # noqa: B008
    """One rank's call differs and another one never comes: those who called hear of the mismatch, though nobody has a limit."""
    odd, lost = seed % case.world_size, (seed + 1) % case.world_size
    with case.world(objects, edits) as world:
        world.set_deadlines(0)
        program = case.program(seed)
        run(world, program, seed, skip=[lost], told={odd: {"total": case.signature(world, program)[0] ^ 1}})
        for rank in range(case.world_size):
            code = heard(world, rank)
            told = code & 0xFF == Kind.MISMATCH and lost not in (code >> 8 & 0xFF, code >> 16)
            need(told, "told", f"rank {rank}: {code:#x}")
            need(rank == lost or report(world, rank).code & 0xFF == Kind.MISMATCH, "report", f"rank {rank}")


def alike_at_the_extremes(objects, edits, seed, case: Case = Case()):  # noqa: B008
    """Calls that are alike are no error, whatever their size, and whether in place or not; each rank's last two signatures can be read."""
    n = case.world_size
    for total in (1 << 32, (1 << 48) - 1, (1 << 32) - 1, 5 | 1 << 47):
        with case.world(objects, edits) as world:
            program = case.program(seed)
            start = max(0, case.epoch - 4)
            in_place = seed % n
            at = world._base + world._offsets[in_place]["arena"] + program.steps[0][1].start
            told = {rank: {"total": total} for rank in range(n)}
            told[in_place] |= {"output": at}
            run(world, program, seed, told=told)
            world.check_reports()
            for rank in range(n):
                control, of = world.control(rank), world.staging(rank)
                counts = (control.sequence, control.completed, control.entered)
                need(counts == 3 * ((start + 1) & WORD,), "counts", f"rank {rank}: {counts}")
                need(list(control.handshaken) == [1] + [0] * (MAX_SHAPES - 1), "handshake", f"rank {rank}")
                header = bytes(of[Header.signatures.offset :][: failure.SIGNED].numpy())
                for peer in range(n):
                    if peer == rank:
                        continue
                    tag = case.signature(world, program)[1] & 0xFFFF | (IN_PLACE if peer == in_place else 0)
                    want = ((start + 1) & WORD, total & WORD, tag | total >> 32 << NUMEL_SHIFT)
                    got = failure.last_signed(header, peer)
                    need(got == want, "signed", f"rank {rank} of rank {peer}: {got}, not {want}")
                    if case.norm:
                        word = failure.parameters(header, peer, want[0])
                        need(word == _parameters(program.calls[0].spec), "signed", f"rank {rank} of rank {peer}: {word}")


# -- "Concurrent use. Three counts: calls that entered, that were signed by all, and that completed."


def concurrent(objects, edits, seed, case: Case = Case()):  # noqa: B008
    """Another call is in flight on one rank: all hear that, and of whom; nobody waits. One that is complete already is no error."""
    rank = seed % case.world_size
    start = max(0, case.epoch - 4)
    for change, wrong in (({"entered": 1}, True), ({"sequence": 1}, True), ({"completed": -1}, True), ({"completed": 1}, False),
                          ({"entered": 3}, True), ({"completed": -9}, True)):  # fmt: skip
        with case.world(objects, edits) as world:
            world.set_deadlines(0)
            program = case.program(seed)
            for name, by in change.items():
                setattr(world.control(rank), name, (start + by) & WORD)
            # The guard may look when the call at hand has completed, which adds one: unless it cannot.
            stuck = {rank: _data_astray(case, world, program, rank)} if change == {"completed": -1} else {}
            run(world, program, seed, told=stuck)
            codes = [heard(world, r) for r in range(case.world_size)]
            if not wrong:
                need(
                    not any(codes) and not any(report(world, r).code for r in range(case.world_size)),
                    "report",
                    f"{change}: {codes}",
                )
                continue
            need(
                codes == case.world_size * [abort_code(Kind.CONCURRENT, rank, rank)], "told", f"{change}: {list(map(hex, codes))}"
            )
            need(took(world) < LONG_AGO, "slow", f"{change}: {took(world)} ns")
            seen, number = report(world, rank), (start + 1 + change.get("entered", 0)) & WORD
            need(seen.code == codes[rank], "report", f"{change}: {seen.code:#x}")
            if seen.sequence:
                got = (seen.sequence, *seen.mine, *seen.theirs, seen.waited_ms)
                need(got == (number, *case.signature(world, program), 0, 0, 0), "report", f"{change}: {got}")


NORMS = [
    twin_norm.kernel("one_shot", 1032, quant="token", keep_norm=True),
    twin_norm.kernel("two_shot", 520, rounding="U"),
    twin_norm.kernel("one_shot", 512, cluster=2, quant="group"),
]
ALGORITHMS = ("one_shot", "two_shot", "two_shot_stream")
WIDE = [Case("one_shot_wide", 2), Case("two_shot_wide", 3, "bfloat16"), Case("two_shot_wide2", 8, "float16")]
HOST = [Case("host_one_shot"), Case("host_two_shot", dtype="bfloat16"), Case("host_stream", 2, "float16")]


def cases(seed: int, worlds: Sequence[int] = (2, 3)) -> list[Case]:
    """Every algorithm that these world sizes have, of dtypes that take turns."""
    dtypes = ["float32", "bfloat16", "float16"]
    found = [Case(name, n) for n in worlds for name in ALGORITHMS[: 1 if n == 2 else None]]
    return [Case(case.algorithm, case.world_size, dtypes[(seed + i) % 3]) for i, case in enumerate(found)]


def places(check, worlds: Sequence[int]) -> Callable:
    """``check`` of an algorithm that the seed picks, for every place of a culprit, and a finder beside it."""

    def run_all(objects, edits, seed):
        dice = random.Random(seed)
        for case in cases(seed, worlds):
            for culprit in range(case.world_size):
                finder = dice.choice([rank for rank in range(case.world_size) if rank != culprit])
                check(objects, edits, seed + culprit, case, culprit, finder)

    return run_all
