"""The kernels of path host themselves on the CPU (twin.py): bits under every schedule, ThreadSanitizer, planted bugs."""

import os
import random
import re

import pytest
import torch
import twin
import twin_host
from twin import Failed, Program
from twin_host import HostCall, mixed, narrow

from allreduce_jit.abi import Report
from allreduce_jit.engine import reference
from allreduce_jit.engine.failure import Kind, abort_code
from allreduce_jit.engine.verify import VERIFY_BYTES, several_launches
from allreduce_jit.jit import source
from allreduce_jit.policy import host
from allreduce_jit.policy.catalogue import HOST_ALGORITHMS
from allreduce_jit.policy.operation import DTYPES, ITEMSIZE, all_reduce
from allreduce_jit.policy.plan import HEADER_BYTES, PACKET

pytestmark = pytest.mark.skipif(twin.missing() is not None, reason=str(twin.missing()))

BUFFER = Report.buffer.offset // 4
LONG = bool(os.environ.get("LONG"))
WORLDS = range(2, 9) if LONG else (2, 3, 4)
PATIENCE, DEADLINE = 20_000_000, 200_000  # steps
# ThreadSanitizer's share: collectives, and how many of 100 each world size gets (3 and more are at least ten times slower).
SHARES = {2: 80, 3: 10, 4: 6, 5: 1, 6: 1, 7: 1, 8: 1}
COLLECTIVES = int(os.environ.get("TWIN_COLLECTIVES", "2000")) // 2


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """What was compiled; one folder for all of xdist's workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "twin"
    folder.mkdir(exist_ok=True)
    return folder


# -- the kernels are right


@pytest.mark.parametrize("world_size", WORLDS)
def test_sizes(objects, world_size):
    """Every dtype and algorithm, from nothing to many chunks of each channel, aligned and not, in place and not."""
    dice = random.Random(world_size)
    with twin_host.world(objects, world_size) as world:
        for dtype in DTYPES:
            calls = [
                HostCall(algorithm, dtype, numel, offset=dice.randint(0, 1) * dice.randint(1, 7), in_place=dice.random() < 0.5,
                         block=dice.choice([32, 64]), channels=dice.choice([2, 3]))
                for algorithm in (*twin_host.algorithms(world_size), None)
                for numel in [0, 1, world_size - 1, 8, 123, 124, 125, 247, 248, 249, 496, 503, 505, 4095, 20_000 // world_size]
            ]  # fmt: skip
            dice.shuffle(calls)
            world.run(Program(world_size, calls, seed=1), seed=world_size, room=dice.choice([96, 256]))


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("options", [{}, {"pdl": False}, {"max_ctas": 2}], ids=str)
def test_a_long_life(objects, world_size, options):
    """Everything changes from call to call on one communicator, many calls are in flight, ranks and threads dawdle."""
    dice = random.Random(world_size)
    with twin_host.world(objects, world_size, **options) as world:
        for seed in range(2):
            program = Program(world_size, mixed(dice, world_size, 30, 12, [reference.RANDOM, reference.SPECIALS]), seed)
            for jitter in (0.01, 0.2):
                world.run(program, seed, room=dice.choice([64, 200, 600]), jitter=jitter, sleep=dice.choice([0, 0.001, 0.005]))
        assert world.collectives == 120


@pytest.mark.parametrize("world_size", WORLDS)
def test_what_construction_runs(objects, world_size):
    """The plans that every new communicator is verified with, with all of its channels."""
    with twin_host.world(objects, world_size, relayout=lambda layout, n: layout) as world:
        spec = all_reduce("bfloat16", VERIFY_BYTES // ITEMSIZE["bfloat16"])
        several = several_launches(world.engines[0], spec)
        plans = [*world.engines[0].verification_plans(spec), several, several]
        world.plan = lambda call: plans[call.algorithm]
        calls = [HostCall(i, "bfloat16", spec.numel) for i in range(len(plans))]
        world.run(Program(world_size, calls, 4), 5, room=256, jitter=0.01, sleep=0)


@pytest.mark.parametrize("epoch", [2**31 - 64, 2**32 - 64, 2**32 - 16])
def test_counts_of_chunks_wrap(objects, epoch):
    for seed in range(3):
        wrap(objects, (), seed, epoch)


def wrap(objects, edits, seed, epoch=2**32 - 64):
    """From a count at which all slots are as they are at 0."""
    with twin_host.world(objects, 3, edits=edits, epoch=epoch) as world:
        world.run(Program(3, mixed(random.Random(epoch + seed), 3, 20, 11), seed), seed)


def many(objects, edits, seed):
    """As many channels as chunks, 300 of each: one-shot of 150 KB."""
    numel = 300 * host.chunk_packets("host_one_shot") * PACKET // 4
    with twin_host.world(objects, 2, edits=edits, relayout=lambda layout, n: layout) as world:
        world.run(Program(2, 2 * [HostCall("host_one_shot", "float32", numel, channels=320)], seed), seed, room=256)


def test_many_channels(objects):
    many(objects, (), 0)


# -- and end when a peer does not come


def test_phases_have_the_numbers_that_reports_are_read_by():
    numbered()


def numbered():
    (found,) = re.findall(r"SCATTER = (\d+), GATHER = (\d+);", source.files()["host_two_shot.cu"])
    scatter, gather = map(int, found)
    assert (scatter, (gather,)) == (0, HOST_ALGORITHMS["host_two_shot"].gathers)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("algorithm", ["host_one_shot", "host_stream", "host_two_shot"])
def test_an_absent_rank_is_named(objects, world_size, algorithm):
    if algorithm in twin_host.algorithms(world_size):
        absent(objects, (), 0, world_size, algorithm)


def absent(objects, edits, seed, world_size=3, algorithm="host_one_shot"):
    """The last rank does not call: the others say so, yield NaN, and store nothing more. When it comes at last, it gets
    the right sum or NaN."""
    last = world_size - 1
    with twin_host.world(objects, world_size, edits=edits) as world:
        world.set_deadlines(DEADLINE)
        # Later calls are in flight already when the first one gives up.
        program = Program(world_size, 4 * [HostCall(algorithm, "float32", 1000 * world_size)], seed)

        def run(turn, **options):
            world.run(program, seed + turn, complete=False, patience=PATIENCE, room=600, **options)
            for rank in range(world_size):
                program.check(rank, world.arena(rank)[: program.end], or_nan=True, calls=rank not in options.get("skip", ()))

        run(0, skip=[last])
        for rank in range(last):
            code = world.report(rank)[0]
            if code & 0xFFFF != abort_code(Kind.TIMEOUT, last, 0) or code >> 16 >= last:
                raise Failed("report", f"rank {rank}: {code:#x}")
            if world.report(rank)[BUFFER]:  # no first sum has come, so nobody waits in a later phase
                raise Failed("report", f"rank {rank} waits in phase {world.report(rank)[BUFFER]}")
            if not all(out.of(world.arena(rank)).isnan().any() for _, _, out in program.steps):
                raise Failed("bits", f"rank {rank} believes in a sum without rank {last}")
        before = [world.staging(rank)[HEADER_BYTES:].clone() for rank in range(last)]
        run(1, skip=[last])
        run(2)
        if not all(torch.equal(outbox, world.staging(rank)[HEADER_BYTES:]) for rank, outbox in enumerate(before)):
            raise Failed("pushed", "somebody who gave up still stores")


def host_stops(objects, edits, seed):
    """The process of one rank stops all, as ``HostEngine`` does, at some moment: every element everywhere is right, or NaN, and reported."""
    dice = random.Random(seed)
    with twin_host.world(objects, 3, edits=edits) as world:
        world.set_deadlines(DEADLINE)
        program = Program(3, mixed(dice, 3, 12, 11, chains=False), seed)
        code, step = abort_code(Kind.ABORTED, 1, 1), dice.randrange(20_000)
        words = [*(world.abort_word(rank) for rank in (1, 0, 2)), world.near_abort_word(1)]
        pokes = [(step + 10 * i, word, code) for i, word in enumerate(words)]
        world.run(program, seed, complete=False, pokes=pokes, patience=PATIENCE)
        for rank in range(3):
            program.check(rank, world.arena(rank)[: program.end], or_nan=True)
            if world.report(rank)[0] not in (0, code):
                raise Failed("report", f"rank {rank}: {world.report(rank)[0]:#x}")
            if not world.report(rank)[0] and any(out.of(world.arena(rank)).isnan().any() for _, _, out in program.steps):
                raise Failed("report", f"rank {rank} gave up and says nothing")
        return sum(bool(world.report(rank)[0]) for rank in range(3))


def test_a_rank_that_its_process_stops(objects):
    assert sum(host_stops(objects, (), seed) for seed in range(10)) > 5  # the others gave up in most of them


def mismatch(objects, edits, seed):
    """One rank passes another size, dtype or algorithm: all stop, and those who found out say so."""
    call = HostCall("host_one_shot", "float32", 100)
    other = [HostCall("host_one_shot", "float32", 90), HostCall("host_one_shot", "float16", 100),
             HostCall("host_two_shot", "float32", 100)][seed % 3]  # fmt: skip
    with twin_host.world(objects, 3, edits=edits) as world:
        world.set_deadlines(DEADLINE)
        world.run(Program(3, [call], seed), seed, complete=False, instead={1: other}, patience=PATIENCE)
        codes = [world.report(rank)[0] for rank in range(3)]
        if sum(code & 0xFF == Kind.MISMATCH for code in codes) < 2:
            raise Failed("report", f"{other}: {codes}")


@pytest.mark.parametrize("seed", range(6))
def test_calls_that_differ_are_an_error(objects, seed):
    mismatch(objects, (), seed)


# -- ThreadSanitizer


@pytest.mark.long
@pytest.mark.parametrize("world_size", (2, 3, 5, 8) if LONG else (2, 3))
def test_no_data_race(objects, record_property, world_size):
    dice, total = random.Random(world_size), -(-COLLECTIVES * SHARES[world_size] // 100)
    with twin_host.world(objects, world_size, tsan=True, pdl=world_size % 4 != 1) as world:
        seed = 0
        while world.collectives < total:
            if seed % 8 == 0:
                program = Program(world_size, mixed(dice, world_size, min(40, total), 9), seed)
            world.run(program, seed, jitter=dice.choice([0.01, 0.05, 0.2]))
            seed += 1
        record_property("shown", f"ThreadSanitizer, path host, {world_size} ranks: {world.collectives} collectives, no report")


# -- planted bugs: each is a small change of the sources, caught by a check that the sources pass


def run_mixed(objects, edits, seed, *, tsan=False, world_size=3, kinds=(reference.RANDOM,), only=(), **options):
    dice = random.Random(seed)
    with twin_host.world(objects, world_size, tsan=tsan, edits=edits, **options) as world:
        program = Program(world_size, mixed(dice, world_size, 40, 11, kinds, only=only), seed)
        for turn in range(2):
            world.run(program, 100 * seed + turn, room=128 if tsan else 300, jitter=0.1, sleep=0.002)


def variant(**options):
    return lambda objects, edits, seed, **more: run_mixed(objects, edits, seed, **options, **more)


CHECKS = {
    "mixed calls": run_mixed,
    "streamed calls": variant(only=["host_stream"]),
    "one-shot calls": variant(only=["host_one_shot"]),
    "two-shot calls": variant(only=["host_two_shot"]),
    "special values": variant(kinds=[reference.SPECIALS]),
    "ThreadSanitizer": variant(tsan=True),
    "absent rank": absent,
    "a process stops its rank": host_stops,
    "calls differ": mismatch,
    "many channels": many,
    "counts wrap": wrap,
}
SEEDS = 6
ANY = {"bits", "hang", "report", "guard"}
WAIT = "    griddepcontrol_wait();\n"
VOTE = "all_sync(~0u, !(Config::GUARDED && aborted | u32(state >> 32)))"
STORED = "            store(done + AHEAD, next);\n"
RECEIVED = "            came = outbox.template receive<false>(number % RING, peers, Channel::Wire::of(number / RING), 0);\n"
NEAR = "a.control + offsetof(Control, abort) : a.own"

# name: check, how it may show, edits
BUGS = {
    "the phase does not change": ("mixed calls", ANY, [("wire/phase.cuh", "return use & 1 ? 0 : BIT;", "return use ? BIT : BIT;")]),
    "half a packet counts as all": ("mixed calls", ANY, [("wire/phase.cuh", "((p.w[1] ^ phase) | (p.w[3] ^ phase))", "(p.w[1] ^ phase)")]),
    "one packet of a lane counts as both": ("streamed calls", ANY, [("outbox.cuh", "u[j][k] = ld_relaxed_sys_v2_u64(from[j] + k * (WARP * 16));", "u[j][k] = ld_relaxed_sys_v2_u64(from[j] + k * (WARP * 16));"), ("outbox.cuh", "for (u32 k = FIRST; k < PACKETS; k++) all &=", "for (u32 k = FIRST; k < 1; k++) all &=")]),
    "the last lane's packet is not waited for": ("mixed calls", ANY, [("outbox.cuh", "        return !all;\n    }\n};", "        return !all && threadIdx.x % WARP != Wire::LAST;\n    }\n};")]),
    "a lane does not wait for its warp": ("mixed calls", {*ANY, "apart"}, [("outbox.cuh", "if (!any_sync(~0u, pending<0>(from, u, phase))) break;", "if (!pending<0>(from, u, phase)) break;")]),
    "displaced bits are lost": ("mixed calls", {"bits"}, [("wire/phase.cuh", "(bits[0][k] >> lane << 31)", "0")]),
    "displaced bits of halves are swapped": ("mixed calls", {"bits"}, [("wire/phase.cuh", "(bits[0][k] >> lane << 31)", "(bits[1][k] >> lane << 31)")]),
    "displaced bits are another lane's": ("mixed calls", {"bits"}, [("wire/phase.cuh", "(bits[1][k] >> lane << 31)", "(bits[1][k] >> (lane ^ 1) << 31)")]),
    "all lanes have data": ("mixed calls", {"bits"}, [("partition/chunks.cuh", "DATA = Phase<Config::PACKETS>::DATA", "DATA = Phase<Config::PACKETS>::DATA + 1")]),
    "a ring has one slot": ("one-shot calls", ANY, [("host_one_shot.cu", "outbox.store(number % RING, p, Channel::Wire::of(number / RING))", "outbox.store(0, p, Channel::Wire::of(number))"), ("host_one_shot.cu", "receive<false>(number % RING, peers, Channel::Wire::of(number / RING), 0)", "receive<false>(0, peers, Channel::Wire::of(number), 0)")]),
    "a ring is as long as what is ahead": ("streamed calls", ANY, [("host_one_shot.cu", "RING = Config::RING;", "RING = Config::RING / 2;"), ("host_one_shot.cu", "2 * AHEAD <= RING", "AHEAD <= RING")]),
    "a chunk is stored before the one ahead was received": ("streamed calls", ANY, [("host_one_shot.cu", STORED, ""), ("host_one_shot.cu", RECEIVED, STORED + RECEIVED)]),
    "the first poll comes two seconds later": ("one-shot calls", {"pause"}, [("host_one_shot.cu", "turn + Config::FIRST_POLL", "turn - Config::FIRST_POLL")]),
    "the first poll of many channels comes two seconds later": ("many channels", {"pause"}, [("host_one_shot.cu", "Config::FIRST_POLL + Config", "Config::FIRST_POLL - Config")]),
    "another channel counts a call as complete": ("mixed calls", {"handshake", *ANY}, [("partition/chunks.cuh", "(all - 1) % channels", "(all + 1) % channels")]),
    "the count does not go on": ("mixed calls", ANY, [("outbox.cuh", "number + uses); }", "number + 0 * uses); }")]),
    "the count goes on by one": ("mixed calls", ANY, [("host_one_shot.cu", "uses.advance(count)", "uses.advance(1)")]),
    "the count is read before griddepcontrol_wait": ("mixed calls", ANY, [("host_one_shot.cu", WAIT, ""), ("host_one_shot.cu", "    uses.load(aborted);\n", "    uses.load(aborted);\n" + WAIT)]),
    "no griddepcontrol_wait": ("ThreadSanitizer", {"race", *ANY}, [("host_two_shot.cu", WAIT, "")]),
    "lanes find out by themselves whether they were stopped": (
        "absent rank", {"apart", "bits"}, [("outbox.cuh", VOTE, VOTE.replace("all_sync(~0u, ", "(__syncwarp(), "))]),
    "counts of another algorithm": ("mixed calls", {"handshake", *ANY}, [("outbox.cuh", "a.channels + channel *", "a.channels - channel *")]),
    "a count's highest bit stops a rank": ("counts wrap", {"handshake", *ANY, "pushed"}, [("outbox.cuh", "aborted | u32(state >> 32)", "aborted | u32(state >> 31)")]),
    "lanes go backwards": ("mixed calls", {"header"}, [("outbox.cuh", "(SLOTS * Wire::SLOT) + lane * 16)", "(SLOTS * Wire::SLOT) - lane * 16)")]),
    "slots of another channel": ("mixed calls", ANY, [("outbox.cuh", "u64(channel) * (SLOTS * Wire::SLOT)", "u64(channel / 2) * (SLOTS * Wire::SLOT)")]),
    "sums go into a slot to be summed": ("two-shot calls", ANY, [("host_two_shot.cu", "outbox.store(a.rank, result, phase);", "outbox.store((a.rank + 1) % WORLD_SIZE, result, phase);")]),
    "sums are read where others are to be summed": ("two-shot calls", ANY, [("host_two_shot.cu", "receive<true>(0, peers, phase, GATHER)", "receive<false>(a.rank, peers, phase, GATHER)")]),
    "the next chunk goes out before the sums have come": ("two-shot calls", ANY, [("host_two_shot.cu", "            came = outbox.template receive<true>(0, peers, phase, GATHER);\n", "            for (u32 j = 0; j < PEERS<Config> && done + 1 < count; j++) outbox.store(target<Config>(a, j), theirs[j], phase ^ Channel::Wire::BIT);\n            came = outbox.template receive<true>(0, peers, phase, GATHER);\n")]),
    "parts of another rank": ("two-shot calls", ANY, [("host_two_shot.cu", "out.store(chunks.at(done, 0, source_at(j, a.rank)), peers[j][0]);", "out.store(chunks.at(done, 0, (source_at(j, a.rank) + 1) % WORLD_SIZE), peers[j][0]);")]),
    "packets are stored weakly": ("ThreadSanitizer", {"scope", "race"}, [("outbox.cuh", "st_relaxed_sys_v2_u64(a.own + offset", "st_global_v4(a.own + offset")]),
    "packets are polled weakly": ("ThreadSanitizer", {"scope", "race", "hang"}, [("outbox.cuh", "u[j][k] = ld_relaxed_sys_v2_u64(", "u[j][k] = ld_global_v4(")]),
    "the own addend is another chunk's": ("streamed calls", {"bits"}, [("host_one_shot.cu", "own[i + 1][k] : next[k];", "own[i][k] : next[k];")]),
    "who gave up keeps storing": ("absent rank", {"pushed", "bits"}, [("outbox.cuh", "aborted | u32(state >> 32)", "aborted & !aborted")]),
    "channels are not told": ("absent rank", {"pushed", "bits"}, [("failure.cuh", "for (u32 c = 0; c < channels; c++)", "for (u32 c = 0; c < 0 * channels; c++)"), ("failure.cuh", NEAR, "a.control + offsetof(Control, abort) + 4 : a.own")]),
    "what a peer told is overlooked": ("a process stops its rank", {"report", "bits"}, [("failure.cuh", "0, told ? told : code);", "0, told ? code : code);"), ("failure.cuh", "if (before == 0 && told) before = told;", "")]),
    "results of who gave up are left as they are": ("absent rank", {"bits"}, [("host_one_shot.cu", "out.store(chunks.at(done, k), splat(0xFFFFFFFFu));", "{}")]),
    "the slow path sees nothing come": ("mixed calls", {"handshake", "report"}, [("outbox.cuh", "    return !wait.missing;\n", "    return wait.since && !wait.missing;\n")]),
    "kernels that begin look into host memory": ("mixed calls", {"scope"}, [("failure.cuh", NEAR, "a.own + offsetof(Header, abort) : a.own")]),
    "calls never end": ("mixed calls", {"handshake", "report", "in flight"}, [("host_one_shot.cu", "if (came && lane == 0) counter.publish();", "")]),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_the_sources_pass_every_check(objects, check):
    for seed in range(SEEDS):
        CHECKS[check](objects, (), seed)


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS if LONG else list(BUGS)[::5])  # each is compiled anew
def test_planted_bug_is_caught(objects, bug, record_property):
    check, kinds, edits = BUGS[bug]
    failure = None
    for seed in range(SEEDS):
        try:
            CHECKS[check](objects, edits, seed)
        except Failed as found:
            failure = found
            break
    assert failure is not None, f"{bug}: not caught by {check}"
    assert failure.kind in kinds, f"{bug}: {failure}"
    record_property("shown", f"planted, path host: {bug}: caught by {check} ({failure.kind})")


def test_planted_shared_slots_are_caught(objects, record_property):
    def sharing(layout, world_size):
        layout = narrow(layout, world_size)
        for name, region in layout.regions.items():
            layout.regions[name] = type(region)(HEADER_BYTES, region.capacity, region.channels, region.first_channel)
        return layout

    failure = None
    for seed in range(SEEDS):
        try:
            run_mixed(objects, (), seed, relayout=sharing)
        except Failed as found:
            failure = found
            break
    assert failure is not None and failure.kind in ANY
    record_property("shown", f"planted, path host: algorithms share slots: caught by mixed calls ({failure.kind})")
