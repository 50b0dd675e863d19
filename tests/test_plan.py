"""Plans and layouts: what keeps every kernel inside its memory, for every size, dtype, world size and machine.

A property is a function of the planning functions and a case. The real ones must hold it for all cases;
one with a mistake planted must fail it, which shows that the property says something.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import count
from types import SimpleNamespace

import pytest

pytest.importorskip("hypothesis")

import hypothesis
from hypothesis import strategies as st

from allreduce_jit import plan as planning
from allreduce_jit.kernel import DTYPES, ITEMSIZE, WORLD_SIZES, catalogue
from allreduce_jit.settings import Settings
from allreduce_jit.tuning import LEGACY_TABLES, V2_TABLES

PACKET = 16
DEFAULT_STAGING = Settings().staging_mb << 20
BLOCK_BYTES, THREADS = 2048, 128  # legacy.py's; any would do
ORDER = ("one_shot", "two_shot")
# Buffers of a kernel, with slots for every source in each: what the headers of the kernels say that they touch.
BUFFERS = {"one_shot": 2, "two_shot": 3, "legacy_one_shot": 2, "legacy_two_shot": 4}


@dataclass(frozen=True)
class Case:
    world_size: int
    dtype: str
    numel: int
    sm_count: int
    staging: int
    nvlink: bool
    deterministic: bool

    @property
    def nbytes(self):
        return self.numel * ITEMSIZE[self.dtype]


# Made once: hypothesis takes its time to check a strategy.
SM_COUNTS = st.sampled_from([132, 148]) | st.integers(1, 200)
STAGING = st.just(DEFAULT_STAGING) | st.integers(4, 1024).map(lambda mb: mb << 20)
POWERS = st.builds(lambda e, d: max(1, 2**e + d), st.integers(0, 33), st.integers(-9, 9))
SIZES = st.integers(1, 5000) | POWERS | st.integers(1, 2**33) | st.none()  # None: near an edge of the tables
NEAR = st.tuples(st.integers(0, 999), st.integers(-40, 40))


@st.composite
def cases(draw, world_sizes=WORLD_SIZES):
    n, dtype = draw(st.sampled_from(world_sizes)), draw(st.sampled_from(list(DTYPES)))
    sm_count, staging, numel = draw(SM_COUNTS), draw(STAGING), draw(SIZES)
    if numel is None:
        which, distance = draw(NEAR)
        edges = edges_of(n, sm_count, staging)
        numel = max(1, edges[which % len(edges)] // ITEMSIZE[dtype] + distance)
    return Case(n, dtype, numel, sm_count, staging, draw(st.booleans()), draw(st.booleans()))


def edges_of(n, sm_count, staging):
    """Message sizes in bytes at which a plan changes its mind."""
    edges = [min(V2_TABLES[n].two_shot_from, 1 << 30), LEGACY_TABLES[n].two_shot_from]
    edges += [LEGACY_TABLES[n].nvlink_limit, LEGACY_TABLES[n].pcie_limit, staging // (6 * n), staging // 6]
    threads = [region.capacity for region in planning.v2_layout(n, staging).regions.values()]
    return edges + [PACKET * t * m for t in [*threads, 32 * sm_count, 512 * sm_count] for m in (1, n, 2 * n)]


def hold(prop, functions=planning, examples=300, world_sizes=WORLD_SIZES):
    """Judge ``functions`` by ``prop``; raises the AssertionError of a case that fails."""

    @hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, report_multiple_bugs=False,
        phases=[hypothesis.Phase.generate] if functions is not planning else list(hypothesis.Phase),
    )  # fmt: skip
    @hypothesis.given(cases(world_sizes))
    def run(case):
        prop(functions, case)

    run()


def v2(f, case):
    layout = f.v2_layout(case.world_size, case.staging)
    return layout, f.v2_plan(case.world_size, case.dtype, case.numel, case.sm_count, layout)


def legacy(f, case, block_bytes=BLOCK_BYTES):
    layout = f.legacy_layout(case.world_size, case.staging, block_bytes)
    args = (layout, block_bytes, THREADS, case.nvlink, case.deterministic)
    return layout, f.legacy_plan(case.world_size, case.dtype, case.numel, *args)


def region_bytes(name, region, world_size):
    return BUFFERS[name] * world_size * region.capacity * (1 if name.startswith("legacy") else PACKET)


# -- properties of V2


def v2_regions_apart(f, case):
    layout, _ = v2(f, case)
    assert set(layout.regions) == set(ORDER)
    check_apart(layout, case)


def v2_aligned(f, case):
    layout, _ = v2(f, case)
    for region in layout.regions.values():
        assert region.offset % PACKET == 0  # and so is each slot: a slot is a packet


def v2_inside_the_slots(f, case):
    """Threads that have a packet: those past them are idle channels, which touch nothing."""
    layout, plan = v2(f, case)
    region = layout.regions[plan.algorithm]
    assert -(-packets_of_a_launch(plan, case) // 32) <= region.channels
    assert -(-packets_of_a_launch(plan, case) // 32) * 32 <= region.capacity


def v2_covers(f, case):
    _, plan = v2(f, case)
    assert plan.path == "v2" and 1 <= plan.chunk <= case.numel
    packets = packets_of_a_launch(plan, case)
    assert (plan.grid - 1) * plan.block < packets <= plan.grid * plan.block  # and no block has nothing to do
    if plan.chunk < case.numel:  # the next launch starts at an address as aligned as the first
        assert plan.chunk * ITEMSIZE[case.dtype] % PACKET == 0


def packets_of_a_launch(plan, case):
    """One per thread: of the chunk, or of each rank's part of it."""
    parts = 1 if plan.algorithm == "one_shot" else case.world_size
    return -(-(-(-plan.chunk * ITEMSIZE[case.dtype] // PACKET)) // parts)


def v2_blocks(f, case):
    _, plan = v2(f, case)
    assert plan.block % 32 == 0 and 32 <= plan.block <= 512


def v2_known_kernel(f, case):
    _, plan = v2(f, case)
    entries = {entry for spec in catalogue("v2", case.world_size) for entry in spec.entries}
    assert f"{plan.algorithm}_{DTYPES[case.dtype]}_ws{case.world_size}" in entries


def v2_never_goes_back(f, case):
    """A larger message never takes the algorithm of smaller ones again."""
    _, plan = v2(f, case)
    _, larger = v2(f, replace(case, numel=case.numel + max(1, case.numel // 3)))
    assert ORDER.index(plan.algorithm) <= ORDER.index(larger.algorithm)


def v2_repeats(f, case):
    assert v2(f, case) == v2(f, case)


# -- properties of legacy


def legacy_regions_apart(f, case):
    layout, _ = legacy(f, case)
    assert set(layout.regions) == {"legacy_one_shot", "legacy_two_shot"}
    check_apart(layout, case)


def legacy_aligned(f, case):
    layout, plan = legacy(f, case)
    for region in layout.regions.values():
        assert region.offset % PACKET == 0
        assert region.capacity % BLOCK_BYTES == 0 and region.channels == region.capacity // BLOCK_BYTES
    if plan.chunk < case.numel:  # the next launch starts at an address as aligned as the first
        assert plan.chunk * ITEMSIZE[case.dtype] % PACKET == 0


def legacy_launches_fit(f, case):
    """The first launch is the largest: it fills its slots, and has a program for each block."""
    layout, plan = legacy(f, case)
    if plan.path == "torch.distributed":
        return
    region, itemsize = layout.regions[plan.algorithm], ITEMSIZE[case.dtype]
    assert 1 <= plan.chunk <= case.numel and plan.block == THREADS
    assert 1 <= plan.grid <= region.channels and plan.grid * BLOCK_BYTES <= region.capacity
    if plan.algorithm == "legacy_one_shot":
        assert plan.chunk == case.numel  # whole in one launch
        assert plan.grid * BLOCK_BYTES >= plan.chunk * itemsize > (plan.grid - 1) * BLOCK_BYTES
    else:
        part = f.legacy_part(case.world_size, plan.chunk, BLOCK_BYTES // itemsize)
        assert part * itemsize == plan.grid * BLOCK_BYTES
        assert case.world_size * part >= plan.chunk


def legacy_hands_over(f, case):
    """To NCCL above the limit, and never when determinism was asked for."""
    _, plan = legacy(f, case)
    table = LEGACY_TABLES[case.world_size]
    above = case.nbytes > (table.nvlink_limit if case.nvlink else table.pcie_limit)
    assert plan.path == ("torch.distributed" if above and not case.deterministic else "legacy")
    if plan.path == "torch.distributed":
        assert plan.chunk == case.numel


def legacy_repeats(f, case):
    assert legacy(f, case) == legacy(f, case)


def check_apart(layout, case):
    assert all(region.offset >= 0 and region.capacity > 0 and region.channels > 0 for region in layout.regions.values())
    end = 0
    for name, region in sorted(layout.regions.items(), key=lambda item: item[1].offset):
        assert region.offset >= end
        end = region.offset + region_bytes(name, region, case.world_size)
    assert end <= layout.nbytes <= case.staging


# -- they hold


PROPERTIES = [
    v2_regions_apart, v2_aligned, v2_inside_the_slots, v2_covers, v2_blocks, v2_known_kernel,
    v2_never_goes_back, v2_repeats, legacy_regions_apart, legacy_aligned, legacy_launches_fit, legacy_hands_over,
    legacy_repeats,
]  # fmt: skip


def all_properties(f, case):
    for prop in PROPERTIES:
        prop(f, case)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_all_hold(world_size):
    hold(all_properties, examples=5000 if os.environ.get("LONG") else 400, world_sizes=[world_size])


# -- and can fail


def mutant(name, change):
    """The planning functions with the result of ``name`` changed."""
    original = getattr(planning, name)
    return SimpleNamespace(**{**vars(planning), name: lambda *args: change(original(*args))})


def on_regions(**changes):
    def change(layout):
        fields = {k: (lambda r, k=k, c=c: c(getattr(r, k))) for k, c in changes.items()}
        regions = {n: replace(r, **{k: c(r) for k, c in fields.items()}) for n, r in layout.regions.items()}
        return replace(layout, regions=regions)

    return change


def on_plan(**changes):
    return lambda plan: replace(plan, **{k: c(getattr(plan, k)) for k, c in changes.items()})


def swap_regions(layout):
    names = list(layout.regions)
    return replace(layout, regions=dict(zip(names, [layout.regions[n] for n in reversed(names)], strict=True)))


def drifting(name):
    calls = count()
    return mutant(name, on_plan(grid=lambda g: g + next(calls) % 2))


MUTANTS = [
    (v2_regions_apart, "capacity past the region", mutant("v2_layout", on_regions(capacity=lambda c: c + 512))),
    (v2_regions_apart, "regions of one another", mutant("v2_layout", swap_regions)),
    (v2_regions_apart, "regions at one place", mutant("v2_layout", on_regions(offset=lambda o: 0))),
    (v2_regions_apart, "more than allowed", mutant("v2_layout", lambda x: replace(x, nbytes=x.nbytes + (1 << 20)))),
    (v2_aligned, "offset of 8 bytes", mutant("v2_layout", on_regions(offset=lambda o: o + 8))),
    (v2_inside_the_slots, "twice the capacity",
     SimpleNamespace(**{**vars(planning), "v2_plan": lambda *args: planning.v2_plan(
         *args[:-1], on_regions(capacity=lambda c: 2 * c)(args[-1]))})),
    (v2_inside_the_slots, "everything in one launch",
     SimpleNamespace(**{**vars(planning), "v2_plan": lambda n, dtype, numel, *rest: replace(
         planning.v2_plan(n, dtype, numel, *rest), chunk=numel)})),
    (v2_inside_the_slots, "half the epoch words", mutant("v2_layout", on_regions(channels=lambda c: c // 2))),
    (v2_covers, "one block less", mutant("v2_plan", on_plan(grid=lambda g: g - 1))),
    (v2_covers, "one block more", mutant("v2_plan", on_plan(grid=lambda g: g + 1))),
    (v2_covers, "launches of odd length", mutant("v2_plan", on_plan(chunk=lambda c: max(1, c - 1)))),
    (v2_blocks, "not whole warps", mutant("v2_plan", on_plan(block=lambda b: b + 8))),
    (v2_blocks, "1024 threads", mutant("v2_plan", on_plan(block=lambda b: 2 * b))),
    (v2_known_kernel, "no such kernel", mutant("v2_plan", on_plan(algorithm=lambda a: a + "_loop"))),
    (v2_never_goes_back, "one-shot for odd grids",
     mutant("v2_plan", lambda p: replace(p, algorithm="one_shot") if p.grid % 2 else p)),
    (v2_repeats, "a counter in the grid", drifting("v2_plan")),
    (legacy_regions_apart, "a block too many", mutant("legacy_layout", on_regions(capacity=lambda c: c + BLOCK_BYTES))),
    (legacy_regions_apart, "regions at one place", mutant("legacy_layout", on_regions(offset=lambda o: 0))),
    (legacy_aligned, "slots of odd length", mutant("legacy_layout", on_regions(capacity=lambda c: c - 8))),
    (legacy_aligned, "chunks of odd length", mutant("legacy_plan", on_plan(chunk=lambda c: max(1, c - 1)))),
    (legacy_launches_fit, "half the slots", mutant("legacy_layout", on_regions(channels=lambda c: c // 2))),
    (legacy_launches_fit, "one program more", mutant("legacy_plan", on_plan(grid=lambda g: g + 1))),
    (legacy_launches_fit, "one program less", mutant("legacy_plan", on_plan(grid=lambda g: g - 1))),
    (legacy_launches_fit, "parts of half blocks", mutant("legacy_part", lambda p: p // 2)),
    (legacy_hands_over, "always legacy", mutant("legacy_plan", on_plan(path=lambda p: "legacy"))),
    (legacy_hands_over, "deaf to deterministic",
     SimpleNamespace(**{**vars(planning), "legacy_plan": lambda *args: planning.legacy_plan(*args[:-1], False)})),
    (legacy_repeats, "a counter in the grid", drifting("legacy_plan")),
]  # fmt: skip


@pytest.mark.parametrize(("prop", "functions"), [m[::2] for m in MUTANTS], ids=[f"{m[0].__name__}: {m[1]}" for m in MUTANTS])
def test_fails_on_a_planted_mistake(prop, functions):
    with pytest.raises(AssertionError):
        hold(prop, functions, examples=1000)


def test_every_property_has_a_mistake_that_it_finds():
    assert {prop for prop, *_ in MUTANTS} == set(PROPERTIES)


# -- all ranks alike

DIGEST = """
import hashlib, sys
from allreduce_jit import plan as p
lines = []
for n in range(2, 9):
    for dtype in ("float32", "float16", "bfloat16"):
        for e in range(0, 34, 3):
            v2, old = p.v2_layout(n, 32 << 20), p.legacy_layout(n, 32 << 20, 2048)
            lines.append(repr((v2, p.v2_plan(n, dtype, 2**e + 5, 132, v2))))
            lines.append(repr((old, p.legacy_plan(n, dtype, 2**e + 5, old, 2048, 128, True, e % 2 == 0))))
print(hashlib.sha256("".join(lines).encode()).hexdigest(), sorted({"torch", "cuda", "triton"} & set(sys.modules)))
"""


def test_ranks_agree_whatever_their_environment():
    outputs = []
    for rank in range(3):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "PYTHONHASHSEED": str(rank + 1)}
        env["CUDA_VISIBLE_DEVICES"] = str(rank)
        outputs.append(subprocess.run([sys.executable, "-c", DIGEST], env=env, capture_output=True, text=True, check=True).stdout)
    digest, modules = outputs[0].split(maxsplit=1)
    assert len(digest) == len(hashlib.sha256().hexdigest())
    assert modules.strip() == "[]"  # a plan that knows no torch and no CUDA cannot ask this rank's GPU
    assert len(set(outputs)) == 1


# -- the default, and the engines' own calls


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("sm_count", [78, 108, 132, 148])
def test_default_staging_suffices(world_size, sm_count):
    layout = planning.v2_layout(world_size, DEFAULT_STAGING)
    assert layout.nbytes <= DEFAULT_STAGING == 32 << 20
    assert planning.legacy_layout(world_size, DEFAULT_STAGING, BLOCK_BYTES).nbytes <= DEFAULT_STAGING
    used = [planning.v2_plan(world_size, "bfloat16", 2**e, sm_count, layout).algorithm for e in range(33)]
    assert used[0] == "one_shot" and used[-1] == ("one_shot" if world_size == 2 else "two_shot")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_past_two_to_the_31_elements(world_size, dtype):
    for numel in (2**31 - 1, 2**31, 2**31 + 1, 2**32 + 3, 2**33):
        for staging_mb in (4, 32, 1024):
            case = Case(world_size, dtype, numel, 132, staging_mb << 20, nvlink=True, deterministic=True)
            for prop in PROPERTIES:
                prop(planning, case)
            assert legacy(planning, case)[1].algorithm == "legacy_two_shot"


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("staging_mb", [4, 5, 6, 7, 8, 32, 1024])
def test_verification_stays_inside_the_slots(world_size, staging_mb):
    """The calls that an engine makes while it is built take plans that no table picked."""
    from allreduce_jit.engine import TORCH_DTYPES, VERIFY_BYTES
    from allreduce_jit.v2 import V2Engine

    engine = object.__new__(V2Engine)
    engine.config = SimpleNamespace(world_size=world_size)
    engine.layout = planning.v2_layout(world_size, staging_mb << 20)
    for name, dtype in TORCH_DTYPES.items():
        numel = VERIFY_BYTES // dtype.itemsize - 1
        plans = engine._verification_plans(numel, dtype)
        assert {plan.algorithm for plan in plans} == set(ORDER)
        for plan in plans:
            case = Case(world_size, name, numel, 1, staging_mb << 20, nvlink=True, deterministic=True)
            packets = packets_of_a_launch(plan, case)
            assert packets <= min(engine.layout.regions[plan.algorithm].capacity, plan.grid * plan.block)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_v2_launches_cover_the_tensor(world_size):
    """The loop over launches of the engine itself, without a GPU."""
    from allreduce_jit.v2 import Args, _fire

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(cases([world_size]))
    def run(case):
        case = replace(case, numel=min(case.numel, 50 * case.staging // ITEMSIZE[case.dtype]))
        itemsize, args, launches = ITEMSIZE[case.dtype], Args(), []
        x, out = (
            SimpleNamespace(data_ptr=lambda b=b: b, numel=lambda: case.numel, element_size=lambda: itemsize)
            for b in (1 << 40, 1 << 41)
        )
        chunk = v2(planning, case)[1].chunk
        _fire(args, lambda stream: launches.append((args.input, args.output, args.numel)), chunk, x, out, 0)
        done = 0
        for launch in launches:
            assert launch == ((1 << 40) + done * itemsize, (1 << 41) + done * itemsize, min(chunk, case.numel - done))
            done += launch[2]
        assert done == case.numel

    run()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_legacy_launches_cover_the_tensor(world_size):
    """The loop over launches of the engine itself, without a GPU."""
    pytest.importorskip("triton")
    from allreduce_jit.engine import TORCH_DTYPES
    from allreduce_jit.legacy import BLOCK_BYTES, LegacyEngine

    @hypothesis.settings(max_examples=100, deadline=None, derandomize=True, database=None)
    @hypothesis.given(cases([world_size]), st.sampled_from([0, 2, 4, 8, 16]), st.sampled_from([0, 2, 4, 8, 16]))
    def run(case, source, target):
        case = replace(case, deterministic=True, numel=min(case.numel, 50 * case.staging // ITEMSIZE[case.dtype]))
        layout, plan = legacy(planning, case, BLOCK_BYTES)
        region, itemsize, launches = layout.regions[plan.algorithm], ITEMSIZE[case.dtype], []

        def prepared(algorithm, dtype, vector, grid):
            names = ("x", "out", "numel", "part") if algorithm == "legacy_two_shot" else ("x", "out", "numel")
            arguments = {name: SimpleNamespace(value=None) for name in names}

            def launch(stream):
                values = {name: argument.value for name, argument in arguments.items()}
                launches.append(SimpleNamespace(algorithm=algorithm, vector=vector, grid=grid, **values))

            return arguments, launch

        subject = object.__new__(LegacyEngine)
        subject.config, subject._prepared = SimpleNamespace(world_size=world_size), prepared
        bases = [(1 << 40) + offset // itemsize * itemsize for offset in (source, target)]
        common = {"dtype": TORCH_DTYPES[case.dtype], "numel": lambda: case.numel}
        x, out = (SimpleNamespace(data_ptr=lambda b=b: b, **common) for b in bases)
        subject._run(plan, x, out, 0)

        done = 0
        for launch in launches:
            assert launch.algorithm == plan.algorithm and launch.numel > 0
            assert [launch.x, launch.out] == [base + done * itemsize for base in bases]
            nbytes = launch.numel * itemsize
            assert launch.vector == all(v % PACKET == 0 for v in (launch.x, launch.out, nbytes))
            assert launch.grid <= region.channels
            if plan.algorithm == "legacy_two_shot":
                assert launch.part * itemsize == launch.grid * BLOCK_BYTES
                assert launch.part * world_size >= launch.numel
            else:
                assert launch.grid * BLOCK_BYTES >= nbytes
            done += launch.numel
        assert done == case.numel

    run()
