"""The V2 kernels themselves on the CPU (twin.py): bits under every schedule, ThreadSanitizer, planted bugs."""

import os
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch
import twin
from twin import Call, Failed, Program, World, cramped

from allreduce_jit.abi import Report
from allreduce_jit.engine import reference
from allreduce_jit.engine.failure import Kind, abort_code
from allreduce_jit.engine.verify import LAUNCHES, VERIFY_BYTES, several_launches
from allreduce_jit.policy import nvlink
from allreduce_jit.policy.catalogue import NVLINK_ALGORITHMS
from allreduce_jit.policy.nvlink import launches
from allreduce_jit.policy.operation import DTYPES, ITEMSIZE, all_reduce
from allreduce_jit.policy.plan import HEADER_BYTES

pytestmark = pytest.mark.skipif(twin.missing() is not None, reason=str(twin.missing()))

LONG = bool(os.environ.get("LONG"))
WORLDS = range(2, 9)
FEW_WORLDS = WORLDS if LONG else (2, 3, 5, 8)
LAYOUTS = [cramped, partial(cramped, under="one_shot")]  # what a stream's buffers alias
# ThreadSanitizer's share: collectives, and how many of 100 each world size gets (3 and more are at least ten times slower).
COLLECTIVES = int(os.environ.get("TWIN_COLLECTIVES", "2000"))
SHARES = {2: 80, 3: 10, 4: 6, 5: 1, 6: 1, 7: 1, 8: 1}


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """What was compiled; one folder for all of xdist's workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "twin"
    folder.mkdir(exist_ok=True)
    return folder


def mixed(dice: random.Random, world_size: int, count: int, largest: int, kinds=(reference.RANDOM,), *, chains: bool = True,
          only: Sequence[str] = ()) -> list[Call]:  # fmt: skip
    """Sizes (up to 2**largest elements, more for streams), dtypes, algorithms and alignments that change from call to
    call. ``only``: these algorithms."""
    calls: list[Call] = []
    for _ in range(count):
        in_place = dice.random() < 0.3
        algorithm = dice.choice(only or [*twin.algorithms(world_size), None])
        stream = algorithm is not None and NVLINK_ALGORITHMS[algorithm].stream
        if calls and chains and dice.random() < 0.4:
            calls.append(replace(calls[-1], algorithm=algorithm, chained=True, in_place=in_place))
            continue
        numel = int(2 ** dice.uniform(0, largest)) if dice.random() < 0.97 else 0
        if stream:
            numel = dice.randint(1, 10) * 128 * world_size - dice.choice([0, 0, dice.randint(1, 99)])
        offset, block = dice.choice([0, 0, 1, 2, 3]), dice.choice([32, 64])
        calls.append(Call(algorithm, dice.choice(list(DTYPES)), numel, dice.choice(kinds), offset, in_place, False, block))
    return calls


# -- the kernels are right


@pytest.mark.long
@pytest.mark.parametrize("world_size", WORLDS if LONG else (2, 3, 8))
def test_sizes(objects, world_size):
    """Every dtype and algorithm, from nothing to a few MB in several launches, aligned and not, in place and not."""
    dice = random.Random(world_size)
    with World(twin.build(objects, world_size), world_size) as world:
        for dtype in DTYPES:
            calls = [
                Call(algorithm, dtype, numel, offset=dice.randint(0, 1) * dice.randint(1, 7), in_place=dice.random() < 0.5,
                     block=dice.choice([32, 128, 512]))
                for algorithm in (*twin.algorithms(world_size), None)
                for numel in [0, 1, world_size - 1, 8, 9, 255, 256, 4095, 20_000]
            ]  # fmt: skip
            dice.shuffle(calls)
            world.run(Program(world_size, calls, seed=1), seed=world_size, room=dice.choice([64, 256]))
        large = [Call(None, "float32", (1 << 19) + 5), Call(None, "bfloat16", (1 << 17) + 3, offset=1)]
        for call in large:
            world.run(Program(world_size, [call], seed=2), seed=3, jitter=0.01, sleep=0.0001)


def test_every_16_bit_pattern_and_every_rounding(objects):
    """All patterns of 16 bits, and sums of pairs of them, which round in every way: as torch does."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    with World(twin.build(objects, 2), 2) as world:
        for dtype in ("float16", "bfloat16"):
            for turn in (0, 1, 12_345, 40_503):
                program = Program(2, [Call("one_shot", dtype, 1 << 16)], seed=0)
                _, x, out = program.steps[0]
                for rank, arena in enumerate(program.before):
                    reference.as_bits(x.of(arena)).copy_(
                        patterns.roll(turn * rank) if turn or not rank else torch.zeros_like(patterns)
                    )
                want = reference.ordered_sum([x.of(arena) for arena in program.before])
                for before, after in zip(program.before, program.after, strict=True):
                    x.of(after).copy_(x.of(before))
                    out.of(after).copy_(want)
                world.run(program, seed=turn, room=512, jitter=0.01, sleep=0)


@pytest.mark.long
@pytest.mark.parametrize("world_size", FEW_WORLDS)
@pytest.mark.parametrize("options", [{}, {"pdl": False}, {"max_ctas": 3}], ids=str)
def test_a_long_life(objects, world_size, options):
    """Everything changes from call to call on one communicator, many calls are in flight, ranks and threads dawdle."""
    dice = random.Random(world_size)
    with World(twin.build(objects, world_size), world_size, relayout=dice.choice(LAYOUTS), **options) as world:
        for seed in range(2):
            calls = mixed(dice, world_size, 30, 10 - world_size // 2, [reference.RANDOM, reference.SPECIALS])
            program = Program(world_size, calls, seed)
            for jitter in (0.01, 0.2):
                world.run(program, seed, room=dice.choice([64, 200, 600]), jitter=jitter, sleep=dice.choice([0, 0.001, 0.005]))
        assert world.collectives == 120


@pytest.mark.long
@pytest.mark.parametrize("world_size", FEW_WORLDS)
@pytest.mark.parametrize("options", [{}, {"max_ctas": 3}], ids=str)
def test_what_construction_runs(objects, world_size, options):
    """The plans that every new communicator is verified with."""
    with World(twin.build(objects, world_size), world_size, **options) as world:
        for dtype in DTYPES if LONG else ["bfloat16"]:
            spec = all_reduce(dtype, VERIFY_BYTES // ITEMSIZE[dtype])
            several = several_launches(world.engines[0], spec)
            assert len(launches(several, spec, world_size)) == LAUNCHES
            plans = [*world.engines[0].verification_plans(spec), several, several]
            world.plan = lambda call, plans=plans: plans[call.algorithm]
            world.run(
                Program(world_size, [Call(i, dtype, spec.numel) for i in range(len(plans))], 4), 5, room=256, jitter=0.01, sleep=0
            )


@pytest.mark.parametrize("epoch", [2**31 - 1, 2**31, 2**32 - 1])
def test_epoch_words_wrap(objects, epoch):
    dice = random.Random(epoch)
    with World(twin.build(objects, 3), 3, epoch=epoch, relayout=cramped) as world:
        for seed in range(3):
            world.run(Program(3, mixed(dice, 3, 20, 9), seed), seed)


# -- and end when a peer does not come


PATIENCE, DEADLINE = 20_000_000, 200_000  # steps
WAITED_MS = Report.waited_ms.offset // 4


@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot", "two_shot_stream"])
@pytest.mark.parametrize("world_size", [3, 5])
def test_an_absent_rank_is_named(objects, world_size, algorithm):
    absent(objects, (), 0, world_size, algorithm)


def absent(objects, edits, seed, world_size=3, algorithm="one_shot"):
    """The last rank does not call: the others say so, yield NaN, and push nothing more. When it comes at last, it gets
    the right sum or NaN."""
    last = world_size - 1
    with World(twin.build(objects, world_size, edits=edits), world_size, relayout=cramped) as world:
        world.set_deadlines(DEADLINE)
        # Later calls are in flight already when the first one gives up.
        program = Program(world_size, 4 * [Call(algorithm, "float32", 400 * world_size)], seed)

        def run(turn, **options):
            world.run(program, seed + turn, complete=False, patience=PATIENCE, room=600, **options)
            for rank in range(world_size):
                program.check(rank, world.arena(rank)[: program.end], or_nan=True, calls=rank not in options.get("skip", ()))

        run(0, skip=[last])
        for rank in range(last):
            code = world.report(rank)[0]
            if code & 0xFFFF != abort_code(Kind.TIMEOUT, last, 0) or code >> 16 >= last:
                raise Failed("report", f"rank {rank}: {code:#x}")
            if not all(out.of(world.arena(rank)).isnan().any() for _, _, out in program.steps):
                raise Failed("bits", f"rank {rank} believes in a sum without rank {last}")
        before = world.staging(last)[HEADER_BYTES:].clone()
        run(1, skip=[last])
        if not torch.equal(before, world.staging(last)[HEADER_BYTES:]):
            raise Failed("pushed", f"somebody still pushes to rank {last}")
        run(2)


def phases(objects, edits, seed):
    """A peer that has not come to this shape of call is waited for longer than one that did before."""
    deadline, grace = 1_000_000, 3_000_000  # the report counts milliseconds
    for met in (False, True):
        with World(twin.build(objects, 2, edits=edits), 2, relayout=cramped) as world:
            world.set_deadlines(deadline, grace)
            program = Program(2, [Call("one_shot", "float32", 100)], seed)
            if met:
                world.run(program, seed, patience=PATIENCE)
            world.run(program, seed + 1, skip=[1], complete=False, patience=PATIENCE)
            waited_ms = world.report(0)[WAITED_MS]
            if not 0 <= waited_ms - (deadline if met else grace) // 1_000_000 < 2:
                raise Failed("report", f"met {met}: waited for {waited_ms} ms")


def test_the_deadline_depends_on_the_phase(objects):
    phases(objects, (), 0)


def host_stops(objects, edits, seed):
    """The host of one rank sets its abort word at some moment: every element everywhere is right, or NaN, and reported."""
    dice = random.Random(seed)
    with World(twin.build(objects, 3, edits=edits), 3, relayout=cramped) as world:
        world.set_deadlines(DEADLINE)
        program = Program(3, mixed(dice, 3, 12, 9, chains=False), seed)
        poke = (dice.randrange(20_000), world.abort_word(1), abort_code(Kind.ABORTED, 1, 1))
        world.run(program, seed, complete=False, pokes=[poke], patience=PATIENCE)
        for rank in range(3):
            program.check(rank, world.arena(rank)[: program.end], or_nan=True)
            if not world.report(rank)[0] and any(out.of(world.arena(rank)).isnan().any() for _, _, out in program.steps):
                raise Failed("report", f"rank {rank} gave up and says nothing")
        return sum(bool(world.report(rank)[0]) for rank in range(3))


def test_a_rank_that_its_host_stops(objects):
    assert sum(host_stops(objects, (), seed) for seed in range(10)) > 5  # the others gave up in most of them


def mismatch(objects, edits, seed):
    """One rank passes another size, dtype or algorithm: all stop, and those who found out say so."""
    other = [Call("one_shot", "float32", 90), Call("one_shot", "float16", 100), Call("two_shot", "float32", 100)][seed % 3]
    with World(twin.build(objects, 3, edits=edits), 3) as world:
        world.set_deadlines(DEADLINE)
        world.run(
            Program(3, [Call("one_shot", "float32", 100)], seed), seed, complete=False, instead={1: other}, patience=PATIENCE
        )
        codes = [world.report(rank)[0] for rank in range(3)]
        # A rank that had all it wanted before it was told has nothing to report; the odd one and another always do.
        if sum(code & 0xFF == Kind.MISMATCH for code in codes) < 2:
            raise Failed("report", f"{other}: {codes}")


@pytest.mark.parametrize("seed", range(9))
def test_calls_that_differ_are_an_error(objects, seed):
    mismatch(objects, (), seed)


# -- ThreadSanitizer


@pytest.mark.long
@pytest.mark.parametrize("world_size", WORLDS)
def test_no_data_race(objects, record_property, world_size):
    """``TWIN_COLLECTIVES`` collectives over all world sizes, without a report."""
    dice, total = random.Random(world_size), -(-COLLECTIVES * SHARES[world_size] // 100)
    with World(twin.build(objects, world_size, tsan=True), world_size, relayout=cramped, pdl=world_size % 4 != 1) as world:
        seed = 0
        while world.collectives < total:
            if seed % 8 == 0:
                program = Program(world_size, mixed(dice, world_size, min(40, total), 5), seed)
            world.run(program, seed, jitter=dice.choice([0.01, 0.05, 0.2]))
            seed += 1
        record_property("shown", f"ThreadSanitizer, {world_size} ranks: {world.collectives} collectives, no report")
        assert world.collectives >= total


# -- planted bugs: each is a small change of the sources, caught by a check that the sources pass


def run_mixed(objects, edits, seed, *, tsan=False, world_size=3, kinds=(reference.RANDOM,), only=(), **options):
    dice, options = random.Random(seed), {"relayout": LAYOUTS[seed % 2], **options}
    with World(twin.build(objects, world_size, tsan, edits), world_size, **options) as world:
        program = Program(world_size, mixed(dice, world_size, 40, 8, kinds, only=only), seed)
        for turn in range(2):
            # Room for several launches of one rank at a time; ThreadSanitizer slows down with threads.
            world.run(program, 100 * seed + turn, room=128 if tsan else 300, jitter=0.1, sleep=0.002)


def variant(**options):
    return lambda objects, edits, seed, **more: run_mixed(objects, edits, seed, **options, **more)


CHECKS = {
    "mixed calls": run_mixed,
    "one-shot calls": variant(only=["one_shot"]),
    "two-shot calls": variant(only=["two_shot"]),
    "streamed calls": variant(only=["two_shot_stream"]),
    "special values": variant(kinds=[reference.SPECIALS]),
    "ThreadSanitizer": variant(tsan=True),
    "absent rank": absent,
    "host stops a rank": host_stops,
    "calls differ": mismatch,
    "phases": phases,
}
SEEDS = 6

SYNC = "        __syncwarp();  // every lane has read the epoch; to reconverge after the loops below would take 0.1 us\n"
WAIT = "    griddepcontrol_wait();\n"
STATE = "    epoch.load(aborted);\n"
LOAD = "    for (u32 k = 0; k < PACKETS; k++) own[k] = Wire::encode(in.load(partition.at(rank, k)));\n"
GATHERED = "        gather.wait(k, peers, [] {});\n"
PUSH = "st_relaxed_sys_v4(slots.to[j] + offset + k * WARP * 16, p, alive);"
VOTE = "    const bool all_signed = all_sync("
STORED = "    if (lane == 0) st_relaxed_gpu_u32(control + offsetof(Control, sequence), sequence);\n"
SIGNED = "(signature.w[1] == sequence) & (signature.w[3] == sequence)"
CODE = "st_relaxed_sys_u32(a.report + offsetof(Report, code), code);"
TAG = "    st_relaxed_sys_u32(a.report + offsetof(Report, tag), a.tag);\n"
TICKET = "if (lane == 0) entered = atom_add_relaxed_gpu_u32(a.control + offsetof(Control, entered), 1);"
ANY = {"bits", "overwritten", "hang", "slots", "report", "foreign poison"}  # what a mix-up of packets can end in

# name: check, how it may show, edits
BUGS = {
    "one parity": ("mixed calls", ANY, [("exchange.cuh", "u32(state) & 1", "u32(state) & 0")]),
    "the epoch is not flipped": ("mixed calls", ANY, [("exchange.cuh", "epoch), parity ^ 1)", "epoch), parity)")]),
    "no __syncwarp before the epoch is written, one-shot": ("one-shot calls", ANY, [("exchange.cuh", SYNC, "")]),
    "no __syncwarp before the epoch is written, two-shot": ("two-shot calls", ANY, [("exchange.cuh", SYNC, "")]),
    "epoch read before griddepcontrol_wait": ("mixed calls", ANY, [("one_shot.cu", WAIT, ""), ("one_shot.cu", STATE, STATE + WAIT)]),
    "input read before griddepcontrol_wait": ("ThreadSanitizer", {"race"}, [("one_shot.cu", WAIT, ""), ("one_shot.cu", LOAD, LOAD + WAIT)]),
    "no griddepcontrol_wait in a call's first launch": ("ThreadSanitizer", {"race", *ANY}, [("two_shot.cu", "if (!follows) griddepcontrol_wait();", "")]),
    "no griddepcontrol_wait in the launches that follow": ("streamed calls", {"unordered", *ANY}, [("two_shot.cu", "if (follows) griddepcontrol_wait();", "")]),
    "a stream has two scatter buffers": ("streamed calls", ANY, [("two_shot.cu", "STREAM ? a.scatter ^", "STREAM ? (a.scatter ? a.scatter : 2) ^")]),
    "a stream has one gather buffer": ("streamed calls", ANY, [("two_shot.cu", "STREAM ? a.gather", "STREAM ? 4")]),
    "a stream begins with the same buffer in every epoch": ("mixed calls", ANY, [("two_shot.cu", "a.scatter ^ (epoch.parity & a.scatter >> 1)", "a.scatter")]),
    "a stream flips the epoch": ("mixed calls", ANY, [("two_shot.cu", "if (!STREAM && lane == 0)", "if ((!STREAM || a.last) && lane == 0)")]),
    "a stream's launches start at once": ("streamed calls", ANY, [("two_shot.cu", "if (!STREAM) griddepcontrol_launch_dependents();", "griddepcontrol_launch_dependents();")]),
    "gather and scatter share slots": ("mixed calls", ANY, [("two_shot.cu", "STREAM ? a.gather : 2", "STREAM ? a.gather : 1")]),
    "one-shot's slots are not poisoned again": ("mixed calls", ANY, [("one_shot.cu", "        exchange.poison(k);\n", "")]),
    "scatter's slots are not poisoned again": ("mixed calls", ANY, [("two_shot.cu", "        scatter.poison(k);\n", "")]),
    "gather's slots are not poisoned again": ("mixed calls", ANY, [("two_shot.cu", "        gather.poison(k);\n", "")]),
    "slots are poisoned before they are read": ("mixed calls", ANY, [("two_shot.cu", GATHERED, "        gather.poison(k);\n" + GATHERED)]),
    "packets go into the neighbour's slot": ("mixed calls", ANY, [("slots.cuh", "a.capacity + index) * 16;", "a.capacity + (index ^ 1)) * 16;")]),
    "packets go into another source's slot": ("mixed calls", ANY, [("slots.cuh", "u64(place_of(a.rank, peer))", "u64(PEERS<Config> - 1 - place_of(a.rank, peer))")]),
    "ranks are summed downwards": ("mixed calls", {"bits"}, [("packet.cuh", "(peers[0]).w", "(peers[WORLD_SIZE - 2]).w"), ("packet.cuh", "(peers[turn])", "(peers[WORLD_SIZE - 2 - turn])")]),
    "the own addend comes last": ("mixed calls", {"bits"}, [("packet.cuh", "turn == 1 ? rank <= 1 : rank == turn;", "rank < WORLD_SIZE && turn == WORLD_SIZE - 1;")]),
    "the sum begins with zero": (
        "special values", {"bits"}, [("packet.cuh", "T::unpack(Wire::decode(peers[0]).w[i], acc);", "T::unpack(Wire::decode(peers[0]).w[i], acc); for (float &f : acc) f += 0.0f;")]),
    "every addition is rounded": (
        "mixed calls", {"bits"}, [("packet.cuh", "acc[e] += x[e];\n", "acc[e] += x[e];\n            T::unpack(T::pack(acc), acc);\n")]),
    "the own addend is forgotten": ("mixed calls", {"bits"}, [("one_shot.cu", "sum<T, Wire>(peers, own[k], rank)", "sum<T, Wire>(peers, splat(0), rank)")]),
    "the tail is one too long": (
        "mixed calls", {"crash", "bits", "guard"}, [("packet.cuh", "+ i < numel)\n", "+ i <= numel)\n")]),
    "the tail is one too short": ("mixed calls", {"bits"}, [("packet.cuh", "+ i < numel)\n", "+ i + 1 < numel)\n")]),
    "shapes are handshaken backwards": ("mixed calls", {"handshake", "report"}, [("guard.cuh", "+ a.shape_id * 4ull", "- a.shape_id * 4ull")]),
    "an element behind the tensor is read": ("mixed calls", {"crash"}, [("packet.cuh", "if ((first + packet) * ELEMENTS<T> + i < numel) p.w", "p.w")]),
    "a packet behind the tensor is read": ("mixed calls", {"crash"}, [("packet.cuh", "        if (first + packet >= packets) return splat(0);\n", "")]),
    "padding is not zeros": ("mixed calls", {"bits", "guard"}, [("packet.cuh", "+ i < numel) p.w", "+ i + 1 < numel) p.w")]),
    "a rank whose part is empty skips the channel": (
        "mixed calls", {"handshake", *ANY}, [("two_shot.cu", "if (partition.idle(lane)) return;", "if (partition.idle(lane) || a.rank * partition.part >= partition.packets) return;")]),
    "padding lanes do not push": (
        "mixed calls", ANY, [("two_shot.cu", "theirs[k][j], epoch.alive);", "theirs[k][j], epoch.alive && partition.has(k));")]),
    "a payload may look like the sentinel": ("special values", ANY, [("wire/sentinel.cuh", "min_u32(p.w[i], WORD - 1)", "min_u32(p.w[i], WORD)")]),
    "one word of a packet counts as all": (
        "mixed calls", ANY, [("wire/sentinel.cuh", "max_u32(max_u32(p.w[0], p.w[1]), max_u32(p.w[2], p.w[3]))", "p.w[0]")]),
    "packets are stored weakly": ("ThreadSanitizer", {"race", "scope"}, [("exchange.cuh", PUSH, "if (alive) st_global_v4(slots.to[j] + offset + k * WARP * 16, p);")]),
    "packets are polled weakly": ("ThreadSanitizer", {"race", "scope"}, [("wait.cuh", "u[j] = ld_relaxed_sys_v4(", "u[j] = ld_global_v4(")]),
    "the report is signalled without a fence": ("absent rank", {"early report"}, [("failure.cuh", "    fence_acq_rel_sys();\n", "")]),
    "the report is signalled before it is written": (
        "absent rank", {"early report"},
        [("failure.cuh", TAG, f"    {CODE}\n{TAG}")]),
    "the deadline is never checked": (
        "absent rank", {"hang"}, [("wait.cuh", "limit && now >= since + limit", "limit == 1")]),
    "the clock runs from its beginning": ("absent rank", {"report"}, [("wait.cuh", "since == 0 || (since & 1) != handshaken", "since == 0 && handshaken")]),
    "no shape is handshaken": ("phases", {"handshake", "report"}, [("guard.cuh", "if (all_signed && !handshaken)", "if (!all_signed && !handshaken)")]),
    "epoch words of another algorithm": ("mixed calls", {"handshake", "guard", *ANY}, [("exchange.cuh", "a.channels + channel *", "a.channels - channel *")]),
    "launches may overlap before the ticket is drawn": ("mixed calls", {"handshake", *ANY}, [("guard.cuh", "    u32 entered = 0;\n", "    griddepcontrol_launch_dependents();\n    u32 entered = 0;\n")]),
    "what the kernel before has stopped is overlooked": ("absent rank", {"pushed", "overwritten"}, [("exchange.cuh", "aborted | u32(state >> 32)", "aborted")]),
    "channels are not told": ("absent rank", {"pushed", "overwritten"}, [("failure.cuh", "for (u32 c = 0; c < channels; c++)", "for (u32 c = 0; c < 0 * channels; c++)")]),
    "the slow path sees nothing come": ("mixed calls", {"handshake", "report"}, [("wait.cuh", "return !missing;", "return since && !missing;")]),
    "who gave up keeps pushing": ("absent rank", {"overwritten", "pushed"}, [("exchange.cuh", "aborted | u32(state >> 32)", "aborted & !aborted")]),
    "the first signature is numbered 0": ("mixed calls", {"handshake", "bits", "report"}, [
        ("guard.cuh", "entered) + 1;", "entered);"), ("guard.cuh", "u32(signed_completed) == sequence - 1 &&", "u32(signed_completed) == sequence &&"),
        ("guard.cuh", ">> 32) - (sequence - 1))", ">> 32) - sequence)"),
        ("guard.cuh", "offsetof(Control, sequence), sequence);", "offsetof(Control, sequence), sequence + 1);")]),
    "the sequence number is stored before every lane has read it": ("mixed calls", {"handshake", *ANY}, [("guard.cuh", VOTE, STORED + VOTE)]),
    "signatures have one parity": ("mixed calls", ANY, [("guard.cuh", "to += (sequence & 1) *", "to += 0 *"), ("guard.cuh", "from += (sequence & 1) *", "from += 0 *")]),
    "half a signature counts as all": ("mixed calls", {"handshake", "bits", "report"}, [("guard.cuh", SIGNED, "signature.w[1] == sequence")]),
    "the guard does not wait": ("mixed calls", {"handshake", *ANY}, [("guard.cuh", WAIT, "")]),
    "sizes are not compared": ("calls differ", {"report"}, [("guard.cuh", "(other ^ call) & ~(u64(IN_PLACE) << 32)", "(other ^ call) >> 32 & ~IN_PLACE")]),
    "calls never end": ("mixed calls", {"handshake", "report", "in flight"}, [("one_shot.cu", "    if (lane == 0) counter.publish();\n", "")]),
    "every launch of a stream ends a call": ("streamed calls", {"report", "in flight"}, [("guard.cuh", "a.last && last_channel ?", "last_channel ?")]),
    "calls that begin are not counted": ("mixed calls", {"handshake", "in flight", "report"}, [("guard.cuh", TICKET, "")]),
    "completion is signalled before the last store": ("mixed calls", {"unordered", *ANY}, [("driver.cpp", "next.drained < next.grid", "next.triggered < next.grid")]),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_the_sources_pass_every_check(objects, check):
    for seed in range(SEEDS):
        CHECKS[check](objects, (), seed)


def first_failure(check, objects, edits, **options) -> Failed | None:
    for seed in range(SEEDS):
        try:
            check(objects, edits, seed, **options)
        except Failed as failure:
            return failure
    return None


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS if LONG else list(BUGS)[::3])  # each is compiled anew
def test_planted_bug_is_caught(objects, bug, record_property):
    check, kinds, edits = BUGS[bug]
    failure = first_failure(CHECKS[check], objects, edits)
    assert failure is not None, f"{bug}: not caught by {check}"
    assert failure.kind in kinds, f"{bug}: {failure}"
    record_property("shown", f"planted: {bug}: caught by {check} ({failure.kind})")


def sharing(layout, world_size):
    """All algorithms in the slots of the first."""
    layout = cramped(layout, world_size)
    regions = {name: replace(region, offset=HEADER_BYTES) for name, region in layout.regions.items()}
    return replace(layout, regions=regions)


def test_planted_shared_slots_are_caught(objects, record_property):
    failure = first_failure(run_mixed, objects, (), relayout=sharing)
    assert failure is not None and failure.kind in ANY
    record_property("shown", f"planted: two algorithms share slots: caught by mixed calls ({failure.kind})")


@pytest.mark.parametrize(
    ("scatters", "gathers"), [((0, 2, 3), (4, 1)), ((2, 3, 0), (4, 1)), ((2, 0, 3), (1, 4))], ids=["first", "last", "sums"]
)
def test_planted_shared_buffer_of_a_stream_is_caught(objects, monkeypatch, record_property, scatters, gathers):
    """A buffer that must not alias other slots changes places with one that may."""
    stream = replace(NVLINK_ALGORITHMS["two_shot_stream"], gathers=gathers)
    monkeypatch.setattr(nvlink, "_STREAM_SCATTERS", scatters)
    monkeypatch.setitem(NVLINK_ALGORITHMS, "two_shot_stream", stream)
    check = variant(only=["two_shot_stream", "one_shot"], relayout=partial(cramped, under="one_shot"))
    failure = first_failure(check, objects, ())
    assert failure is not None and failure.kind in ANY
    record_property("shown", f"planted: {scatters}, {gathers} of a stream: caught by calls that take turns ({failure.kind})")


def test_a_stale_edit_is_an_error():
    with pytest.raises(twin.StaleEdit, match="one_shot.cu holds 0 times"):
        twin.sources([("one_shot.cu", "no such text", "")])
