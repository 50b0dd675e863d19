"""The V2 kernels themselves on the CPU (twin.py): bits under every schedule, ThreadSanitizer, planted bugs."""

import os
import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

import twin
from allreduce_jit import reference
from allreduce_jit.kernel import ALGORITHMS, DTYPES
from twin import Call, Failed, Program, World

pytestmark = pytest.mark.skipif(twin.missing() is not None, reason=str(twin.missing()))

WORLDS = range(2, 9)
# ThreadSanitizer's share: collectives, and how many of 100 each world size gets (a large world is much slower).
COLLECTIVES = int(os.environ.get("TWIN_COLLECTIVES", "2000"))
SHARES = {2: 34, 3: 28, 4: 20, 5: 8, 6: 4, 7: 3, 8: 3}


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    return tmp_path_factory.mktemp("twin")


def mixed(dice: random.Random, count: int, largest: int, kinds=(reference.RANDOM,), chains: bool = True) -> list[Call]:
    """Sizes (up to 2**largest elements), dtypes, algorithms, grids and alignments that change from call to call."""
    calls: list[Call] = []
    for _ in range(count):
        in_place, algorithm = dice.random() < 0.3, dice.choice([*ALGORITHMS, None])
        if calls and chains and dice.random() < 0.4:
            calls.append(replace(calls[-1], algorithm=algorithm, chained=True, in_place=in_place))
            continue
        numel = int(2 ** dice.uniform(0, largest)) if dice.random() < 0.97 else 0
        grids = dice.choice([1, 2, 132])
        calls.append(Call(algorithm, dice.choice(list(DTYPES)), numel, dice.choice(kinds), dice.randint(0, 3), in_place, False, grids))
    return calls


# -- the kernels are right


@pytest.mark.parametrize("world_size", WORLDS)
def test_sizes(objects, world_size):
    """Every dtype and algorithm, from nothing to a few MB in several launches, aligned and not, in place and not."""
    dice = random.Random(world_size)
    with World(twin.build(objects, world_size), world_size) as world:
        for dtype in DTYPES:
            calls = [
                Call(algorithm, dtype, numel, offset=dice.randint(0, 1) * dice.randint(1, 7), in_place=dice.random() < 0.5)
                for algorithm in (*ALGORITHMS, None)
                for numel in [0, 1, world_size - 1, 7, 8, 9, 255, 256, 257, 4095, 20_001]
            ]
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
                    reference.as_bits(x.of(arena)).copy_(patterns.roll(turn * rank) if turn or not rank else torch.zeros_like(patterns))
                want = reference.ordered_sum([x.of(arena) for arena in program.before])
                for before, after in zip(program.before, program.after, strict=True):
                    x.of(after).copy_(x.of(before))
                    out.of(after).copy_(want)
                world.run(program, seed=turn, room=512, jitter=0.01, sleep=0)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("pdl", [True, False], ids=["pdl", "no_pdl"])
def test_a_long_life(objects, world_size, pdl):
    """Everything changes from call to call on one communicator, many calls are in flight, ranks and threads dawdle."""
    dice = random.Random(world_size)
    with World(twin.build(objects, world_size), world_size, pdl=pdl) as world:
        for seed in range(3):
            calls = mixed(dice, 40, 12 - world_size // 2, [reference.RANDOM, reference.SPECIALS])
            program = Program(world_size, calls, seed)
            for jitter in (0.01, 0.2):
                world.run(program, seed, room=dice.choice([64, 200, 600]), jitter=jitter, sleep=dice.choice([0, 0.001, 0.005]))
        assert world.collectives == 240


@pytest.mark.parametrize("epoch", [2**31 - 1, 2**31, 2**32 - 2, 2**32 - 1])
def test_epoch_words_wrap(objects, epoch):
    dice = random.Random(epoch)
    with World(twin.build(objects, 3), 3, epoch=epoch) as world:
        for seed in range(3):
            world.run(Program(3, mixed(dice, 20, 10), seed), seed)


# -- and end when a peer does not come


PATIENCE = 8_000_000


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_an_absent_rank_is_named(objects, world_size, algorithm):
    absent(objects, (), 0, world_size, algorithm)


def absent(objects, edits, seed, world_size=3, algorithm="one_shot"):
    """The last rank does not call: the others report it and yield NaN. When it comes at last, they push nothing more:
    what it reads is their first call, or nothing."""
    last = world_size - 1
    with World(twin.build(objects, world_size, edits=edits), world_size) as world:
        world.set_deadline(20_000)
        first = Program(world_size, [Call(algorithm, "float32", 100)], seed)
        world.run(first, seed, skip=[last], complete=False, patience=PATIENCE)
        number = ALGORITHMS.index(algorithm) + 1
        for rank in range(last):
            if world.report(rank)[:4] != [1, last, number, 0]:
                raise Failed("report", f"rank {rank}: {world.report(rank)}")
            _, _, out = first.steps[0]
            if not out.of(world.arena(rank)).isnan().any():
                raise Failed("bits", f"rank {rank} believes in a sum without rank {last}")
        later = Program(world_size, 3 * [Call(algorithm, "float32", 100)], seed)
        # Its first call is the others' second: it gets what they sent in their first.
        expected = Program(world_size, [Call(algorithm, "float32", 100)], seed)
        late = expected.steps[0][1].of(expected.before[last])
        for _, x, _ in later.steps:
            x.of(later.before[last]).copy_(late)
        world.run(later, seed + 1, complete=False, patience=PATIENCE)
        _, _, want = expected.steps[0]
        for i, (_, _, out) in enumerate(later.steps):
            got, right = out.of(world.arena(last)), want.of(expected.after[last])
            if algorithm == "one_shot" and i == 0:
                difference = reference.compare(got, right)
            else:
                difference = reference.compare(got, torch.where(got.isnan(), got, right))
                if not got.isnan().any():
                    raise Failed("bits", f"rank {last} believes in call {i}")
            if difference.wrong:
                raise Failed("bits", f"rank {last}, call {i}: {difference}")


def host_poisons(objects, edits, seed):
    """The host of one rank sets the poison word at some moment: every element everywhere is right, or NaN."""
    dice = random.Random(seed)
    with World(twin.build(objects, 3, edits=edits), 3) as world:
        world.set_deadline(20_000)
        program = Program(3, mixed(dice, 12, 8, chains=False), seed)
        poke = (dice.randrange(20_000), world.control(1), 1)
        world.run(program, seed, complete=False, pokes=[poke], patience=PATIENCE)
        for rank in range(3):
            program.check(rank, world.arena(rank)[: program.end], or_nan=True)
        return sum(bool(world.report(rank)[0]) for rank in range(3))


def test_a_rank_that_its_host_stops(objects):
    assert sum(host_poisons(objects, (), seed) for seed in range(10)) > 5  # the others gave up in most of them


# -- ThreadSanitizer


def test_no_data_race(objects, record_property):
    """``TWIN_COLLECTIVES`` collectives over all world sizes, without a report."""

    def share(world_size):
        dice, total = random.Random(world_size), COLLECTIVES * SHARES[world_size] // 100
        with World(twin.build(objects, world_size, tsan=True), world_size, pdl=world_size % 4 != 1) as world:
            seed = 0
            while world.collectives < total:
                if seed % 8 == 0:
                    program = Program(world_size, mixed(dice, min(40, total), 7), seed)
                world.run(program, seed, jitter=dice.choice([0.01, 0.05, 0.2]), patience=2_000_000)
                seed += 1
            return world.collectives

    for world_size in WORLDS:
        twin.build(objects, world_size, tsan=True)
    with ThreadPoolExecutor(2) as pool:
        counts = list(pool.map(share, reversed(WORLDS)))
    record_property("twin", f"ThreadSanitizer: {sum(counts)} collectives, no report")
    assert sum(counts) >= COLLECTIVES * 99 // 100


# -- planted bugs: each is a small change of the sources, caught by a check that the sources pass


def run_mixed(objects, edits, seed, *, tsan=False, world_size=3, kinds=(reference.RANDOM,), **options):
    dice = random.Random(seed)
    with World(twin.build(objects, world_size, tsan, edits), world_size, **options) as world:
        program = Program(world_size, mixed(dice, 40, 8, kinds), seed)
        for turn in range(2):
            world.run(program, 100 * seed + turn, jitter=0.1, sleep=0.002)


CHECKS = {
    "mixed calls": run_mixed,
    "special values": lambda *args, **kw: run_mixed(*args, kinds=[reference.SPECIALS], **kw),
    "ThreadSanitizer": lambda *args, **kw: run_mixed(*args, tsan=True, **kw),
    "absent rank": absent,
    "host stops a rank": host_poisons,
}
SEEDS = 6

SYNC = "    __syncwarp();  // every lane has read the epoch\n"
WAIT = "    griddepcontrol_wait();\n"
PARITY = "    const u32 parity = ld_relaxed_gpu_u32(epoch) & 1;\n"
EPOCH = "    if (lane == 0) st_relaxed_gpu_u32(epoch, parity ^ 1);\n"
ANY = {"bits", "overwritten", "hang", "slots"}  # what a race of packets can end in

# name: check, how it may show, edits
BUGS = {
    "one parity": ("mixed calls", ANY, [("one_shot.cu", PARITY, PARITY.replace("& 1", "& 0"))]),
    "the epoch is not flipped": ("mixed calls", ANY, [("two_shot.cu", "st_relaxed_gpu_u32(epoch, parity ^ 1)", "st_relaxed_gpu_u32(epoch, parity)")]),
    "no __syncwarp before the epoch is written, one-shot": ("mixed calls", ANY, [("one_shot.cu", SYNC, "")]),
    "no __syncwarp before the epoch is written, two-shot": ("mixed calls", ANY, [("two_shot.cu", SYNC, "")]),
    "epoch read before griddepcontrol_wait": (
        "mixed calls", ANY, [("one_shot.cu", WAIT, ""), ("one_shot.cu", PARITY, PARITY + WAIT)]),
    "no griddepcontrol_wait": ("ThreadSanitizer", {"race", *ANY}, [("two_shot.cu", WAIT, "")]),
    "input read before griddepcontrol_wait": (
        "ThreadSanitizer", {"race"},
        [("one_shot.cu", WAIT, "    Packet own = in.load(index);\n" + WAIT), ("one_shot.cu", "    Packet own = in.load(index);\n    bool", "    bool")]),
    "slots are not poisoned again": ("mixed calls", ANY, [("one_shot.cu", "    poison(a, parity, index);\n", "")]),
    "the gather's slots are not poisoned again": ("mixed calls", ANY, [("two_shot.cu", "    poison(a, GATHER, index);\n", "")]),
    "poison before the packets are read": (
        "mixed calls", ANY,
        [("two_shot.cu", "    receive(a, TWO_SHOT, GATHER, index, ok, v);\n", "    poison(a, GATHER, index);\n    receive(a, TWO_SHOT, GATHER, index, ok, v);\n")]),
    "packets go into the neighbour's slot": (
        "mixed calls", ANY | {"crash"}, [("staging.cuh", "slot(a, to, buffer, a.rank, index), p)", "slot(a, to, buffer, a.rank, index ^ 1), p)")]),
    "packets go into another source's slot": (
        "mixed calls", ANY, [("staging.cuh", "slot(a, to, buffer, a.rank, index), p)", "slot(a, to, buffer, to, index), p)")]),
    "gather and scatter share slots": ("mixed calls", ANY, [("two_shot.cu", "GATHER = 2;", "GATHER = 1;")]),
    "ranks are summed downwards": (
        "mixed calls", {"bits"}, [("packet.cuh", "T::unpack(v[rank].w[i], x);", "T::unpack(v[N - rank].w[i], x);")]),
    "the sum begins with zero": (
        "special values", {"bits"}, [("packet.cuh", "T::unpack(v[0].w[i], acc);", "T::unpack(v[0].w[i], acc); for (float &f : acc) f += 0.0f;")]),
    "every addition is rounded": (
        "mixed calls", {"bits"},
        [("packet.cuh", "acc[e] += x[e];\n", "acc[e] += x[e];\n            T::unpack(T::pack(acc), acc);\n")]),
    "the own addend is forgotten": ("mixed calls", {"bits"}, [("one_shot.cu", "    insert(v, a.rank, own);\n", "    insert(v, a.rank, ZEROS);\n")]),
    "the tail read is one too long": (
        "mixed calls", {"bits", "guard"}, [("packet.cuh", "if (first + i < numel) p.w", "if (first + i <= numel) p.w"),
                                           ("packet.cuh", "if (first + i < numel) x[", "if (first + i <= numel) x[")]),
    "the tail is one too short": ("mixed calls", {"bits"}, [("packet.cuh", "if (first + i < numel) x[", "if (first + i + 1 < numel) x[")]),
    "whole packets past the end": (
        "mixed calls", {"guard", "bits"}, [("packet.cuh", "if (aligned && first + ELEMENTS<T> <= numel) {\n            st", "if (aligned && first < numel) {\n            st")]),
    "a rank whose part is empty skips the channel": (
        "mixed calls", ANY, [("two_shot.cu", "if (index - lane >= part) return;", "if (index - lane >= part || a.rank * part >= Tensor<T>::packets(a.numel)) return;")]),
    "padding lanes do not push": ("mixed calls", ANY, [("two_shot.cu", "        if (ok) push(a, (a.rank + k) % WORLD_SIZE, parity,", "        if (ok && inside) push(a, (a.rank + k) % WORLD_SIZE, parity,")]),
    "a payload may look like the sentinel": ("special values", ANY | {"foreign poison"}, [("staging.cuh", "min(p.w[i], EMPTY - 1)", "min(p.w[i], EMPTY)")]),
    "one word of a packet counts as all": (
        "mixed calls", {"bits", "slots", "overwritten"}, [("staging.cuh", "p.w[0] != EMPTY && p.w[1] != EMPTY && p.w[2] != EMPTY && p.w[3] != EMPTY", "p.w[0] != EMPTY")]),
    "packets are stored weakly": ("ThreadSanitizer", {"race"}, [("staging.cuh", "st_relaxed_sys_v4(slot(a, to,", "st_global_v4(slot(a, to,")]),
    "packets are polled weakly": ("ThreadSanitizer", {"race"}, [("staging.cuh", "if (missing >> s & 1) v[s] = ld_relaxed_sys_v4(", "if (missing >> s & 1) v[s] = ld_global_v4(")]),
    "the report is signalled without a fence": ("absent rank", {"early report"}, [("staging.cuh", "        fence_acq_rel_sys();\n", "")]),
    "the report is signalled before it is written": (
        "absent rank", {"early report"},
        [("staging.cuh", "        st_relaxed_sys_u32(a.report + 4,", "        st_relaxed_sys_u32(a.report, 1);\n        st_relaxed_sys_u32(a.report + 4,")]),
    "nobody looks at the clock": ("absent rank", {"hang"}, [("staging.cuh", "spins % 64 == 0 && give_up", "spins == 0 && give_up")]),
    "who gave up keeps pushing": ("absent rank", {"overwritten", "bits"}, [("one_shot.cu", "    bool ok = alive(a);\n", "    bool ok = true;\n")]),
    "a sum with missing addends is sent": (
        "host stops a rank", {"bits", "overwritten"}, [("two_shot.cu", "        if (ok) push(a, (a.rank + k) % WORLD_SIZE, GATHER,", "        push(a, (a.rank + k) % WORLD_SIZE, GATHER,"),
                                        ("staging.cuh", "for (u32 s = 0; s < WORLD_SIZE; s++) v[s] = NOTHING;", "for (u32 s = 0; s < WORLD_SIZE; s++) v[s] = ZEROS;")]),
    "completion is signalled before the last store": (
        "mixed calls", {"race", *ANY}, [("driver.cpp", "if (next.drained < next.grid) break;", "if (next.triggered < next.grid) break;")]),
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


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(objects, bug, record_property):
    check, kinds, edits = BUGS[bug]
    failure = first_failure(CHECKS[check], objects, edits)
    assert failure is not None, f"{bug}: not caught by {check}"
    assert failure.kind in kinds, f"{bug}: {failure}"
    record_property("twin", f"planted: {bug}: caught by {check} ({failure.kind})")


def sharing(layout):
    """Both algorithms in the slots of the first."""
    regions = {name: replace(region, offset=0) for name, region in layout.regions.items()}
    return replace(layout, regions=regions)


def test_planted_shared_slots_are_caught(objects, record_property):
    failure = first_failure(run_mixed, objects, (), relayout=sharing)
    assert failure is not None and failure.kind in ANY
    record_property("twin", f"planted: two algorithms share slots: caught by mixed calls ({failure.kind})")


def test_a_stale_edit_is_an_error():
    with pytest.raises(twin.StaleEdit, match="one_shot.cu holds 0 times"):
        twin.sources([("one_shot.cu", "no such text", "")])
