"""The kernels that all-reduce and normalize, on the CPU (twin.py): bits under every schedule, failures, ThreadSanitizer, planted bugs."""

import os
import random
import re
import subprocess
from dataclasses import replace

import pytest
import torch
import twin
import twin_norm
from twin import Call, Failed
from twin_norm import NormCall, NormProgram, kernel, mixed

from allreduce_jit.engine import norm_reference
from allreduce_jit.engine.failure import Kind, abort_code
from allreduce_jit.engine.norm_reference import E4M3
from allreduce_jit.engine.verify_norm import ROWS
from allreduce_jit.jit import source
from allreduce_jit.policy.catalogue import NVLINK_ALGORITHMS
from allreduce_jit.policy.norm_forms import NORM_ALGORITHMS, norm_bands
from allreduce_jit.policy.plan import HEADER_BYTES

pytestmark = pytest.mark.skipif(twin.missing() is not None, reason=str(twin.missing()))

# make test and make proofs have minutes for these; LONG=2, by hand, has an hour.
LONG, PROOFS = os.environ.get("LONG") == "2", bool(os.environ.get("LONG"))
WORLDS = range(2, 9) if LONG else (2, 3, 4, 8)
COLLECTIVES = int(os.environ.get("TWIN_COLLECTIVES", "2000")) // 20  # ThreadSanitizer's share


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    """What was compiled; one folder for all of xdist's workers."""
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "twin"
    folder.mkdir(exist_ok=True)
    return folder


# What a kernel can be told, each value at least once; ends of rows within a packet group, within a part, and parts that are empty.
OPTIONS = [
    (64, "bfloat16", 1, 1, {}),
    (72, "float16", 1, 1, {"rounding": "U", "weight": "float32", "weight_bias": 1}),
    (256, "float32", 1, 1, {"rounding": "H", "residual": False, "quant": "token"}),
    (256, "bfloat16", 1, 1, {"quant": "static", "keep_norm": True}),
    (256, "float16", 1, 2, {"rounding": "H", "quant": "group", "weight_bias": 1}),
    (520, "bfloat16", 1, 1, {"rounding": "H", "weight": "float32", "residual": False, "quant": "static"}),
    (1024, "bfloat16", 1, 4, {"rounding": "U", "quant": "token"}),
    (1152, "float32", 2, 2, {"quant": "group", "keep_norm": True}),
    (2048, "bfloat16", 1, 4, {"weight": "float32"}),
    (2304, "bfloat16", 1, 8, {"quant": "group"}),
    (2560, "float16", 4, 1, {"rounding": "U", "quant": "group", "residual": False, "weight": "float32"}),
    (2880, "bfloat16", 1, 1, {}),
    (2880, "bfloat16", 2, 1, {"quant": "token", "keep_norm": True}),
    (2880, "float32", 2, 1, {"rounding": "U", "weight_bias": 1}),
]


def kernels(world_size: int, every: int = 1):
    """``every`` n-th of all; of two ranks, one-shot alone can be asked for."""
    found = [
        kernel(algorithm, hidden, dtype, packets, cluster, **norm)
        for algorithm in ("one_shot", "two_shot")[: 1 + (world_size > 2)]
        for hidden, dtype, packets, cluster, norm in OPTIONS
    ]
    return found[world_size % every :: every]


def bare(world_size):
    return ("one_shot", "two_shot")[: 1 + (world_size > 2)]


# -- the kernels are right


@pytest.mark.parametrize("world_size", WORLDS)
def test_bits(objects, world_size):
    """Everything changes from call to call, and all-reduces use the same slots in between; several calls are in flight."""
    dice, chosen = random.Random(world_size), kernels(world_size, 1 if LONG else 3)
    calls: list[NormCall | Call] = []
    with twin_norm.world(objects, world_size, chosen, bare=bare(world_size), pdl=world_size != 4) as world:
        for seed in range(3 if LONG else 1):
            program = NormProgram(world_size, mixed(dice, chosen, 40 if LONG else 80 // world_size, bare(world_size)), seed)
            for jitter in (0.01, 0.2) if LONG else (0.05,):
                world.run(program, seed, room=dice.choice([64, 1500]), jitter=jitter, sleep=dice.choice([0, 0.001]))
            calls += program.calls
    if LONG:
        assert {call.chained for call in calls} == {call.in_place for call in calls} == {False, True}
        assert {call.kernel for call in calls if isinstance(call, NormCall)} == set(chosen)


def test_every_option_is_tried():
    """By all world sizes of the short form together."""
    tried = [each for world_size in WORLDS for each in kernels(world_size, 3)]
    for name, values in (("rounding", "RUH"), ("quant", ("none", "static", "token", "group")), ("residual", (True, False)),
                         ("weight_bias", (0, 1)), ("keep_norm", (False, True))):  # fmt: skip
        for algorithm in NORM_ALGORITHMS:
            assert {getattr(each.family.epilogue, name) for each in tried if each.form.algorithm == algorithm} == set(values), (
                name
            )
    assert {each.family.hidden for each in tried} == {options[0] for options in OPTIONS}
    assert {(each.form.packets > 1, each.form.cluster > 1) for each in tried} == {(a, b) for a in (0, 1) for b in (0, 1)}


@pytest.mark.parametrize("world_size", WORLDS if LONG else (2, 4))
def test_what_plans_choose(objects, world_size):
    """The forms of the table, clusters among them, each called once for all, as new kernels are verified; then as calls choose them."""
    families = [kernel("one_shot", hidden, dtype).family for hidden, dtype in ((4352, "bfloat16"), (256, "float32"))]
    one_shot_up_to = 2048  # of the twin's communicators
    forms = {
        twin_norm.Kernel(family, band.form): None
        for family in families
        for band in norm_bands(family, world_size, one_shot_up_to)
    }
    with twin_norm.world(objects, world_size, list(forms), warps=64) as world:
        for family in families:
            spec = NormCall(family, ROWS).spec
            plans = world.engines[0].verification_plans(spec)
            assert {plan.form for plan in plans} == {each.form for each in forms if each.family == family}
            calls = [NormCall(twin_norm.Kernel(family, plan.form), ROWS) for plan in plans for _ in range(2)]
            calls += [NormCall(family, rows, in_place=rows % 2 == 0) for rows in (1, 2, 3, 5, 17)]
            world.run(NormProgram(world_size, calls, 1), 2, room=2048, jitter=0.01, sleep=0)
    assert {(each.form.packets, each.form.cluster) for each in forms} == (
        {(1, 1), (1, 4), (2, 1)} if world_size == 2 else {(1, 1)}
    )


@pytest.mark.parametrize("epoch", [2**31 - 1, 2**32 - 1])
def test_epoch_words_wrap(objects, epoch):
    dice, chosen = random.Random(epoch), [kernel("one_shot", 1032, packets=2), kernel("two_shot", 256)]
    with twin_norm.world(objects, 3, chosen, bare=bare(3), epoch=epoch) as world:
        for seed in range(2):
            world.run(NormProgram(3, mixed(dice, chosen, 20, bare(3)), seed), seed)


def test_e4m3_as_torch_has_it(tmp_path):
    """Of the shim: all patterns of bf16, and all neighbours in fp32 of the middles between two numbers."""
    patterns = (torch.arange(1 << 16, dtype=torch.int32) << 16).view(torch.float32)
    numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).float()
    middles = (numbers[1:] + numbers[:-1]) / 2
    near = torch.cat([(middles.view(torch.int32) + i).view(torch.float32) for i in (-1, 0, 1)])
    values = torch.cat([patterns, near, -near, torch.tensor([447.9, 448.1, 464.0, 464.1, 1e30])])
    values = torch.cat([values, torch.zeros(len(values) % 2)])
    (tmp_path / "main.cpp").write_text(
        '#include "shim.hpp"\n#include <cstdio>\nint main() { float f[2]; while (fread(f, 8, 1, stdin)) {'
        " const u32 q = cvt_rn_satfinite_e4m3x2_f32(f[1], f[0]); fwrite(&q, 2, 1, stdout); } }\n"
    )
    subprocess.run([twin.COMPILER, "-std=c++17", "-O1", "-I", twin.HERE, "main.cpp", "-o", "main"], cwd=tmp_path, check=True)
    done = subprocess.run(tmp_path / "main", input=values.numpy().tobytes(), capture_output=True, check=True)
    got = torch.frombuffer(bytearray(done.stdout), dtype=torch.uint8)
    want = values.clamp(-448, 448).to(E4M3)
    assert torch.equal(got.view(E4M3).float().isnan(), want.float().isnan())
    numbers = ~want.float().isnan()
    assert torch.equal(got[numbers], want.view(torch.uint8)[numbers])


# -- and end when a peer does not come


def test_the_buffer_of_sums_has_the_number_that_reports_are_read_by():
    numbered()


def numbered():
    (found,) = re.findall(r"GATHER = (\d+);", source.files()["two_shot_norm.cu"])
    assert (int(found),) == NVLINK_ALGORITHMS["two_shot"].gathers


PATIENCE, DEADLINE = 20_000_000, 200_000  # steps
LOST = [
    kernel("one_shot", 1032, quant="token", keep_norm=True),
    kernel("one_shot", 2304, "float32", 2, quant="group"),
    kernel("one_shot", 2048, packets=1, cluster=4, quant="token"),
    kernel("two_shot", 2880, rounding="U"),
    kernel("two_shot", 2304, "float16", 2, quant="static"),
    kernel("two_shot", 3072, cluster=2, quant="group", keep_norm=True),
]


@pytest.mark.parametrize("which", range(len(LOST)))
def test_an_absent_rank_is_named(objects, which):
    absent(objects, (), which)


def absent(objects, edits, seed, chosen=LOST):
    """The last rank does not call: the others say so, yield rows of NaN, and push nothing more. When it comes at last, it gets the
    right rows, or NaN."""
    chosen = chosen[seed % len(chosen)]
    with twin_norm.world(objects, 3, [chosen], edits=edits) as world:
        world.set_deadlines(DEADLINE)
        # Later calls are in flight already when the first one gives up.
        program = NormProgram(3, 3 * [NormCall(chosen, 3, plain=True)], seed)

        def run(turn, **options):
            world.run(program, seed + turn, complete=False, patience=PATIENCE, room=1500, **options)
            for rank in range(3):
                called = rank not in options.get("skip", ())
                program.check(rank, world.arena(rank)[: program.end], or_nan=True, calls=called)
                if called and program.check_rows(world.arena(rank)) != 9 and 2 in options.get("skip", ()):
                    raise Failed("bits", f"rank {rank} believes in a row without rank 2")

        run(0, skip=[2])
        for rank in range(2):
            code = world.report(rank)[0]
            if code & 0xFFFF != abort_code(Kind.TIMEOUT, 2, 0) or code >> 16 >= 2:
                raise Failed("report", f"rank {rank}: {code:#x}")
        before = world.staging(2)[HEADER_BYTES:].clone()
        run(1, skip=[2])
        if not torch.equal(before, world.staging(2)[HEADER_BYTES:]):
            raise Failed("pushed", "somebody still pushes to rank 2")
        run(2)


def host_stops(objects, edits, seed, chosen=LOST):
    """The host of one rank sets its abort word at some moment: every row everywhere is right, or NaN, and reported; nobody waits for ever.
    Returns how many ranks gave up, and in how many rows."""
    dice = random.Random(seed)
    chosen = chosen[seed % len(chosen)]
    with twin_norm.world(objects, 3, [chosen], edits=edits) as world:
        world.set_deadlines(DEADLINE)
        calls = [NormCall(chosen, dice.randint(1, 5), plain=True, in_place=dice.random() < 0.4) for _ in range(8)]
        program = NormProgram(3, calls, seed)
        poke = (dice.randrange(60_000), world.abort_word(1), abort_code(Kind.ABORTED, 1, 1))
        world.run(program, seed, complete=False, pokes=[poke], patience=PATIENCE, room=dice.choice([64, 1500]))
        lost = 0
        for rank in range(3):
            program.check(rank, world.arena(rank)[: program.end], or_nan=True)
            rows = program.check_rows(world.arena(rank))
            if rows and not world.report(rank)[0]:
                raise Failed("report", f"rank {rank} gave up {rows} rows and says nothing")
            lost += rows
        return sum(bool(world.report(rank)[0]) for rank in range(3)), lost / (3 * sum(call.rows for call in calls))


def test_a_rank_that_its_host_stops(objects):
    ranks, lost = zip(*(host_stops(objects, (), seed) for seed in range((2 if LONG else 1) * len(LOST))))
    assert sum(ranks) > len(ranks)  # the others gave up in most of them
    assert len([share for share in lost if 0 < share < 1]) > (3 if LONG else 0)  # calls were cut short in the midst


ONE = kernel("one_shot", 256)
OTHERS = [
    NormCall(kernel("one_shot", 128), 8),
    NormCall(ONE, 4, eps=2e-5),
    NormCall(kernel("one_shot", 256, rounding="U"), 4),
    NormCall(kernel("one_shot", 256, weight_bias=1), 4),
    NormCall(ONE, 3),
    Call("one_shot", "bfloat16", 1024, block=256),
    NormCall(kernel("two_shot", 256), 4),
]


def differ(objects, edits, seed, others=OTHERS):
    """One rank's call differs, of the first ones in its parameters alone: all stop, and those who found out say so."""
    other = others[seed % len(others)]
    chosen = [ONE, *([other.kernel] if isinstance(other, NormCall) else [])]
    with twin_norm.world(objects, 3, chosen, bare=["one_shot"], edits=edits) as world:
        world.set_deadlines(DEADLINE)
        program = NormProgram(3, [NormCall(ONE, 4)], seed)
        world.run(program, seed, complete=False, instead={1: other}, patience=PATIENCE)
        codes = [world.report(rank)[0] for rank in range(3)]
        # A rank that had all it wanted before it was told has nothing to report; the odd one and another always do.
        if sum(code & 0xFF == Kind.MISMATCH for code in codes) < 2:
            raise Failed("report", f"{other}: {codes}")


@pytest.mark.parametrize("seed", range((2 if LONG else 1) * len(OTHERS)))
def test_calls_that_differ_are_an_error(objects, seed):
    differ(objects, (), seed)


# -- ThreadSanitizer


@pytest.mark.long
@pytest.mark.parametrize("world_size", WORLDS if LONG else (2, 3) if PROOFS else (3,))
def test_no_data_race(objects, record_property, world_size):
    """A twentieth of ``TWIN_COLLECTIVES`` over all world sizes, without a report."""
    dice, total = random.Random(world_size), COLLECTIVES * {2: 80, 3: 14}.get(world_size, 2) // 100
    # Few threads, which are what takes time.
    chosen = [
        kernel("one_shot", 1032, quant="token"),
        kernel("one_shot", 512, cluster=2, quant="group"),
        kernel("one_shot", 768, packets=2, rounding="H"),
        kernel("two_shot", 1032, packets=2, quant="token", keep_norm=True),
        kernel("two_shot", 1024, cluster=2),
    ]
    chosen = chosen[: None if world_size > 2 else 3]
    with twin_norm.world(objects, world_size, chosen, bare=bare(world_size), tsan=True) as world:
        seed = 0
        while world.collectives < total:
            program = NormProgram(world_size, mixed(dice, chosen, 20, bare(world_size), most=2), seed)
            world.run(program, seed, room=64 if world_size > 2 else 128, jitter=dice.choice([0.01, 0.05, 0.2]))
            seed += 1
        record_property(
            "shown", f"ThreadSanitizer, {world_size} ranks: {world.collectives} collectives, most with a norm, no report"
        )


# -- planted bugs: each is a small change of the sources, caught by a check that the sources pass


def run_mixed(objects, edits, seed, chosen, *, world_size=3, tsan=False, pdl=True, most=5, count=30, **options):
    dice = random.Random(seed)
    with twin_norm.world(objects, world_size, chosen, bare=bare(world_size), edits=edits, tsan=tsan, pdl=pdl) as world:
        program = NormProgram(world_size, mixed(dice, chosen, count, bare(world_size), most=most, **options), seed)
        for turn in range(2):
            world.run(program, 100 * seed + turn, room=128 if tsan else 900, jitter=0.1, sleep=0.002)


def least(objects, edits, seed):
    """A row of whose squares the mean is just below half of the least number that there is, and no eps: what pads the sums adds nothing."""
    chosen = kernel("one_shot", 1032, "float32", residual=False)
    with twin_norm.world(objects, 3, [chosen], edits=edits) as world:
        program = NormProgram(3, [NormCall(chosen, 1, eps=0.0, plain=True)], seed)
        call, x, *others = program.steps[0]
        for rank, arena in enumerate(program.before):
            x.of(arena).zero_()
            if rank == seed % 3:
                x.of(arena)[:2] = torch.tensor([2.0**-70, 2.0**-74])
        row = x.of(program.before[seed % 3])
        for before, after in zip(program.before, program.after, strict=True):
            after.copy_(before)
            norm_reference.run(replace(call.spec, operation="norm"), [row.clone(), *(buffer.of(after) for buffer in others)])
        world.run(program, seed, room=900)


def variant(*chosen, check=run_mixed, **options):
    return lambda objects, edits, seed: check(objects, edits, seed, list(chosen), **options)


CHECKS = {
    "one-shot": variant(kernel("one_shot", 2568), kernel("one_shot", 1032, quant="token")),
    "one-shot, two packets": variant(kernel("one_shot", 512, packets=2), kernel("one_shot", 256), most=3),
    "two-shot": variant(kernel("two_shot", 2568, rounding="U"), kernel("two_shot", 256)),
    "two-shot, two packets": variant(kernel("two_shot", 1536, packets=2, quant="static"), most=3),
    "numbers": variant(
        kernel("one_shot", 520, "float32", quant="token"), kernel("one_shot", 640, "float32", packets=2, rounding="H"),
        kernel("one_shot", 640, quant="group", keep_norm=True, weight="float32", weight_bias=1),
        kernel("one_shot", 256, residual=False, quant="token"), plain=True),
    # Blocks that begin late do so when others are at work: these have no earlier launch to wait for.
    "clusters": variant(kernel("one_shot", 512, cluster=2, quant="token"), kernel("one_shot", 1024, cluster=4), pdl=False, most=3),
    "ThreadSanitizer": variant(
        kernel("one_shot", 512, packets=2), kernel("one_shot", 512), kernel("two_shot", 512), tsan=True, most=2, count=15),
    "ThreadSanitizer, clusters": variant(kernel("one_shot", 512, cluster=2, quant="token"), pdl=False, tsan=True, most=2, count=10),
    "least numbers": least,
    "absent rank": absent,
    "host stops a rank": host_stops,
    "calls differ": differ,
    "parameters differ": variant(*OTHERS[:4], check=differ),
}  # fmt: skip
SEEDS = 6

ANY = {"bits", "overwritten", "hang", "slots", "report", "foreign poison"}  # what a mix-up of packets can end in
ONE_SHOT, TWO_SHOT, NORM = "one_shot_norm.cu", "two_shot_norm.cu", "epilogue/norm.cuh"
ROW, WARPS_OF = "row_exchange.cuh", "warp_exchange.cuh"
WAIT, PREPARE = "    griddepcontrol_wait();\n", "    epilogue.prepare();\n"
ADVANCE = "if (alive && rows.lane == k) Epoch"
POISON = "    if (came) hop.poison();\n"
SCATTERED = "    bool came = !any_sync(~0u, !alive) && scatter.wait("
PUSHED = "    for (u32 k = 0; k < PACKETS; k++) gather.push(k, sums[k], came);\n"
STORED = "st_global_v4(residual_out + rows.at(part, k) * 16ull, rounded);\n"
TAKE = "for (u32 lanes = 1; lanes < WARP; lanes *= 2) group = __fadd_rn"
SQUARES = "square[e] = __fadd_rn(square[e], square[e + step]);"
MAXIMUM = "m = max_u32(m, largest(norm[i]));\n            scale = token_scale(m);"

# name: check, how it may show, edits
BUGS = {
    "no barrier before the row is summed": ("one-shot", {"bits"}, [(ROW, "            __syncthreads();\n", "            __syncwarp();\n")]),
    "no barrier before the row is summed, seen as a race": ("ThreadSanitizer", {"race", "bits"}, [(ROW, "            __syncthreads();\n", "            __syncwarp();\n")]),
    "who gives up leaves before the barrier": ("host stops a rank", {"hang", "apart"}, [("failure.cuh", "if constexpr (Epilogue::WAITED_FOR) return came;", "if (!came) exit_thread();\n    if constexpr (Epilogue::WAITED_FOR) return came;")]),
    "who was stopped leaves before the barrier": ("host stops a rank", {"hang", "apart", "bits"}, [
        (ONE_SHOT, "if (!alive) give_up<Config, Epilogue>(a, typename Hop::Nothing(), Wait());", "if (!alive) return give_up<Config, Epilogue>(a, typename Hop::Nothing(), Wait());"),
        (TWO_SHOT, "if (!alive) give_up<Config, Epilogue>(a, typename Hop::Nothing(), Wait());", "if (!alive) return give_up<Config, Epilogue>(a, typename Hop::Nothing(), Wait());")]),
    "who gives up has zeros": ("absent rank", {"bits"}, [(ONE_SHOT, "sums[k] = splat(~0u);", "sums[k] = splat(0);")]),
    "who gives up pushes on": ("host stops a rank", {"foreign poison"}, [(TWO_SHOT, PUSHED, PUSHED.replace("came", "true"))]),
    "who gives up has gathered": ("host stops a rank", {"bits"}, [(TWO_SHOT, "came ? peers[k][j] : splat(~0u)", "came ? peers[k][j] : splat(0)")]),
    "who gives up counts on": ("absent rank", {"overwritten", "pushed", "bits"}, [(ONE_SHOT, "alive &= epoch.alive;", "alive &= epoch.alive || true;")]),
    "residual and weight read before griddepcontrol_wait": ("ThreadSanitizer", {"race", "bits"}, [(ONE_SHOT, PREPARE, ""), (ONE_SHOT, WAIT, PREPARE + WAIT)]),
    "input read before griddepcontrol_wait": ("ThreadSanitizer", {"race", *ANY}, [(TWO_SHOT, WAIT, ""), (TWO_SHOT, "    bool alive = true;\n", WAIT + "    bool alive = true;\n")]),
    "one-shot's slots are not poisoned again": ("one-shot", ANY, [(ONE_SHOT, POISON, POISON.replace("came", "came && a.rank > 9"))]),
    "scatter's slots are not poisoned again": ("two-shot", ANY, [(TWO_SHOT, "    if (came) scatter.poison();\n", "")]),
    "gather's slots are not poisoned again": ("two-shot", ANY, [(TWO_SHOT, "    if (came) gather.poison();\n", "")]),
    "the new residual of another row": ("one-shot", {"crash", "bits", "guard"}, [(NORM, "st_global_v4(residual_out + rows.at(part, k) * 16ull, rounded)", "st_global_v4(residual_out + (rows.at(part, k) + Partition::ROW) * 16ull, rounded)")]),
    "the new residual is the norm's input before rounding": ("numbers", {"crash", "bits"}, [(NORM, "a.residual_out + row, weight_at", "a.residual + row, weight_at")]),
    "only the first channel's epoch ends": ("one-shot, two packets", ANY, [(ONE_SHOT, ADVANCE, "if (alive && rows.lane == 0 && k == 0) Epoch")]),
    "only the first channel's epoch ends, two-shot": ("two-shot, two packets", ANY, [(TWO_SHOT, ADVANCE, "if (alive && rows.lane == 0 && k == 0) Epoch")]),
    "the first channel's parity is all channels'": ("one-shot, two packets", ANY, [(ONE_SHOT, "hop.choose(k, epoch.parity);", "hop.choose(k, k ? hop.buffer[0] : epoch.parity);")]),
    "scatter and gather share slots": ("two-shot", ANY, [(TWO_SHOT, "GATHER = 2;", "GATHER = 1;")]),
    "gathered before what is scattered came": ("two-shot", ANY, [(TWO_SHOT, SCATTERED, "    for (u32 k = 0; k < PACKETS; k++) gather.push(k, Wire::encode(own[k]), alive);\n" + SCATTERED), (TWO_SHOT, PUSHED, "        {}\n")]),
    "groups are added in another order": ("numbers", {"bits"}, [(NORM, "__fadd_rn(groups.f[0], groups.f[1]), __fadd_rn(groups.f[2], groups.f[3])", "__fadd_rn(groups.f[0], groups.f[2]), __fadd_rn(groups.f[1], groups.f[3])")]),
    "lanes are added in another order": ("numbers", {"bits"}, [(NORM, TAKE, "for (u32 lanes = WARP / 2; lanes; lanes /= 2) group = __fadd_rn")]),
    "elements of a packet are added in another order": ("numbers", {"bits"}, [(NORM, SQUARES, "square[e] = __fadd_rn(square[e ^ (step == 1 && e % 4 == 2)], square[e + step]);")]),
    "squares are contracted": ("numbers", {"bits"}, [(NORM, SQUARES, "square[e] = step == 1 ? __builtin_fmaf(v.f[e], v.f[e], square[e + 1]) : __fadd_rn(square[e], square[e + step]);")]),
    "the mean is contracted with eps": ("numbers", {"bits"}, [(NORM, "__fadd_rn(__fmul_rn(total(), 1.f / Config::HIDDEN), eps)", "__builtin_fmaf(total(), 1.f / Config::HIDDEN, eps)")]),
    "the mean is a quotient": ("numbers", {"bits"}, [(NORM, "__fmul_rn(total(), 1.f / Config::HIDDEN)", "__fdiv_rn(total(), float(Config::HIDDEN))")]),
    "a bias of 0 is not added": ("one-shot", {"bits"}, [(NORM, "for (u32 e = 0; e < E; e++) w.f[e] = __fadd_rn(w.f[e], float(", "for (u32 e = 0; Config::WEIGHT_BIAS && e < E; e++) w.f[e] = __fadd_rn(w.f[e], float(")]),
    "the scale of what is not rounded": ("one-shot", {"bits"}, [
        (NORM, "    float scale;             // of a static quantization\n", "    float scale;\n    Values<T> exact[COUNT];\n"), (NORM, "norm[i] = y.rounded();", "norm[i] = y.rounded(), exact[i] = y;"),
        (NORM, MAXIMUM, "for (u32 e = 0; e < E; e++) m = max_u32(m, __float_as_uint(exact[i].f[e]) & 0x7FFFFFFFu);\n            scale = token_scale(m);")]),
    "a group's scale from half of it": ("numbers", {"bits"}, [(NORM, "for (u32 lanes = 1; lanes < LANES; lanes *= 2) m = max_u32", "for (u32 lanes = 1; lanes < LANES / 2; lanes *= 2) m = max_u32")]),
    "divided by the scale": ("numbers", {"bits"}, [(NORM, "__fmul_rn(v.f[e + 1], inverse), __fmul_rn(v.f[e], inverse)", "__fdiv_rn(v.f[e + 1], scale), __fdiv_rn(v.f[e], e < E ? scale : inverse)")]),
    "what follows the row is read as its end": ("one-shot", {"crash", "bits"}, [(NORM, "return exists ? ld_global_v4(tensor + packet * 16ull) : splat(0);", "return ld_global_v4(tensor + packet * 16ull * (1 + 0 * exists));"), (NORM, "rows.exists(part, k) ? square[0] : 0.f", "square[0]")]),
    "what follows the row is written": ("one-shot", {"crash", "bits", "guard"}, [("partition/rows.cuh", "return WHOLE || (warp * PACKETS + k < PART && at(part, k) < ROW); }", "return WHOLE || (warp * PACKETS + k < PART && at(part, k) <= ROW); }")]),
    "places that nobody fills are read": ("one-shot", {"bits"}, [(ROW, "if (USED != WORDS && first + i >= USED) words.w[i] = 0;", "{}")]),
    "parameters are not compared": ("parameters differ", {"report"}, [("guard.cuh", "if (!kind && (more.w[0] | u64(more.w[2]) << 32) != parameters) kind = MISMATCH;", "{}")]),
    "parameters are compared before they have come": ("one-shot", {"handshake", "report"}, [("guard.cuh", "arrived(signature, sequence) && (differ(signature, call) || arrived(parameters, sequence));", "arrived(signature, sequence) || (differ(signature, call) && arrived(parameters, sequence));")]),
    "launches may overlap before the ticket is drawn": ("one-shot", {"handshake", "in flight", *ANY}, [("guard.cuh", "    u32 entered = 0;\n", "    griddepcontrol_launch_dependents();\n    u32 entered = 0;\n")]),
    "calls never end": ("one-shot", {"handshake", "report", "in flight"}, [(ONE_SHOT, "    if (rows.lane == 0) counter.publish();\n", "")]),
    "the guard does not wait": ("one-shot", {"handshake", *ANY}, [("guard.cuh", WAIT, "")]),
    "sent before the other blocks have begun": ("clusters", {"shared memory"}, [(NORM, "        cluster_wait<CLUSTER>();\n", ""), (NORM, STORED, STORED + "        cluster_wait<CLUSTER>();\n")]),
    "a cluster's row is summed before all sums have come": ("clusters", {"bits", "shared memory"}, [(ROW, "            mbarrier_wait(address);\n", "")]),
    "a cluster's row is summed before all sums have come, seen as a race": ("ThreadSanitizer, clusters", {"race", "bits", "shared memory"}, [(ROW, "            mbarrier_wait(address);\n", "")]),
    "a sum more is not waited for": ("clusters", {"bits", "shared memory"}, [(ROW, "mbarrier_init(address, 4 * USED)", "mbarrier_init(address, 4 * USED - 4)")]),
    "a cluster's blocks see their own sums": ("clusters", {"hang", "shared memory", "bits"}, [(ROW, "mapa(address, lane % CLUSTER)", "mapa(address, (blockIdx.x + 0 * lane) % CLUSTER)")]),
    "a lane's packets are enough for its warp": ("one-shot", {"bits", "overwritten", "foreign poison"}, [(WARPS_OF, "pending = any_sync(~0u, arrival.pending());", "pending = all_sync(~0u, arrival.pending());")]),
    "only the last packet is looked at": ("one-shot, two packets", {"bits", *ANY}, [(WARPS_OF, "arrival(u[0][0])", "arrival(u[PACKETS - 1][0])")]),
    "who gives up does not tell its warp": ("host stops a rank", {"apart", "hang", "bits"}, [(WARPS_OF, "if (any_sync(~0u, !came)) return", "if (!came) return")]),
    "a memory barrier behind what there is": ("clusters", {"shared memory"}, [(NORM, "if (Config::QUANT == PER_TOKEN) maxima.init(", "maxima.init(")]),
    "sums are padded with ones": ("least numbers", {"bits"}, [(ROW, "first + i >= USED) words.w[i] = 0;", "first + i >= USED) words.w[i] = 1;")]),
    "a row's maximum is its first warp's": ("numbers", {"bits"}, [(NORM, "m = max_u32(max_u32(warps.w[0], warps.w[1]), max_u32(warps.w[2], warps.w[3]));", "m = warps.w[0];")]),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
def test_the_sources_pass_every_check(objects, check):
    for seed in range(SEEDS if LONG else 1):
        CHECKS[check](objects, (), seed)


def first_failure(check, objects, edits) -> Failed | None:
    for seed in range(SEEDS):
        try:
            check(objects, edits, seed)
        except Failed as failure:
            return failure
    return None


@pytest.mark.long
@pytest.mark.parametrize("bug", BUGS if LONG else list(BUGS)[:: 3 if PROOFS else 8])  # each is compiled anew
def test_planted_bug_is_caught(objects, bug, record_property):
    check, kinds, edits = BUGS[bug]
    failure = first_failure(CHECKS[check], objects, edits)
    assert failure is not None, f"{bug}: not caught by {check}"
    assert failure.kind in kinds, f"{bug}: {failure}"
    record_property("shown", f"planted: {bug}: caught by {check} ({failure.kind})")
