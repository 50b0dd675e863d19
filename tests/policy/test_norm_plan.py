"""Plans of calls with a norm: every packet has one thread, rows share no slots, launches stay inside their memory, for every shape.

As in test_plan: a property judges the planning functions; the real ones hold it, one with a mistake planted fails it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest

pytest.importorskip("hypothesis")

import hypothesis
from hypothesis import strategies as st

from allreduce_jit.norms import norm_family
from allreduce_jit.policy import backends, norm_forms, nvlink, nvlink_norm
from allreduce_jit.policy.catalogue import WORLD_SIZES
from allreduce_jit.policy.norm import Norm
from allreduce_jit.policy.norm_catalogue import modules, norm_module
from allreduce_jit.policy.norm_forms import Form, norm_bands
from allreduce_jit.policy.nvlink_norm import APART, MOST_LAUNCHES, NormPlan
from allreduce_jit.policy.operation import DTYPES, ITEMSIZE, OpSpec
from allreduce_jit.policy.plan import Plan
from allreduce_jit.policy.tables import NEVER, NVLINK_TABLES, Band, two_shot_above
from allreduce_jit.settings import Settings

PACKET, WARP = 16, 32
DEFAULT_STAGING = Settings().staging_mb << 20
REGION = {"one_shot_norm": "one_shot", "two_shot_norm": "two_shot"}  # whose slots and epochs are used


@dataclass(frozen=True)
class Case:
    world_size: int
    dtype: str
    rows: int
    hidden: int
    staging: int = DEFAULT_STAGING
    clusters: bool = True
    max_ctas: int | None = None
    bare: tuple[Band, ...] | None = None  # of the all-reduce of this dtype, as tuned

    @property
    def spec(self):
        return OpSpec("all_reduce_norm", self.dtype, (self.rows, self.hidden), Norm(weight=self.dtype))

    @property
    def row_packets(self):
        return self.hidden * ITEMSIZE[self.dtype] // PACKET


TUNED = [
    (Band(1 << 13, "one_shot", 64), Band(NEVER, "two_shot", 32)),
    (Band(NEVER, "two_shot", 32),),
    (Band(1 << 20, "one_shot", 32), Band(NEVER, "two_shot_stream", 512)),
]
HIDDEN = st.integers(8, 2048).map(lambda n: 8 * n) | st.sampled_from([64, 2880, 3584, 4096, 5120, 6144, 7168, 8192, 16384])
ROWS = st.integers(1, 40) | st.integers(1, 40_000)


@st.composite
def cases(draw):
    n = draw(st.sampled_from(WORLD_SIZES))
    bare = draw(st.none() | st.sampled_from(TUNED)) if n > 2 else None
    staging = draw(st.just(DEFAULT_STAGING) | st.integers(4, 64).map(lambda mb: mb << 20))
    max_ctas = draw(st.none() | st.integers(2, 300))
    dtype = draw(st.sampled_from(list(DTYPES)))
    return Case(n, dtype, draw(ROWS), draw(HIDDEN), staging, draw(st.booleans()), max_ctas, bare if max_ctas is None else None)


REAL = SimpleNamespace(
    bands=nvlink_norm.make_bands, plan=nvlink_norm.make_plan, launches=nvlink_norm.launches,
    warps=Form.warps, slots=Form.slots,
)  # fmt: skip


def memory(case):
    bare = nvlink.make_bands(case.world_size, case.max_ctas, case.bare)
    return bare, nvlink.make_layout(case.world_size, case.staging, bare, case.max_ctas)


def planned(f, case):
    """Layout, plan, and the launches unless it goes apart."""
    bare, layout = memory(case)
    bands = f.bands(case.spec.family, case.world_size, bare, layout, case.clusters, case.max_ctas)
    plan = f.plan(case.spec, case.world_size, bands, layout, case.max_ctas)
    return layout, plan, [] if plan.algorithm == APART else f.launches(plan, case.spec)


def threads(plan, case):
    """(block of the row, warp, k, part) -> group of the row, as kernels/cuda/partition/rows.cuh has it: of all warps."""
    form, parts = plan.form, case.world_size if plan.algorithm == "two_shot_norm" else 1
    groups = -(-case.row_packets // WARP)
    part_groups = -(-groups // parts)
    warps = plan.block // WARP
    for block in range(form.cluster):
        for warp in range(warps):
            for k in range(form.packets):
                for part in range(parts):
                    inside = (block * warps + warp) * form.packets + k
                    group = part * part_groups + inside
                    yield (block, warp, k, part), group if inside < part_groups and group < groups else None


def every_group_once(f, case):
    _, plan, found = planned(f, case)
    if found:
        groups = [group for _, group in threads(plan, case) if group is not None]
        assert sorted(groups) == list(range(-(-case.row_packets // WARP)))


def every_row_once(f, case):
    """In whole rows, all blocks of each in one launch, with a guard's cluster before them."""
    _, plan, found = planned(f, case)
    done = 0
    for i, piece in enumerate(found):
        rows = piece.numel // case.hidden
        assert piece.start == done * case.hidden and piece.numel == rows * case.hidden > 0
        assert piece.grid == (rows + 1) * plan.form.cluster
        assert dict(piece.arguments) == {"launch": i, "last": 1}
        done += rows
    assert not found or done == case.rows
    if found:
        assert plan.path == "v2" and plan.chunk == plan.rows * case.hidden and plan.grid == plan.rows * plan.form.cluster


def inside_the_slots(f, case):
    """No two warps of a launch share a channel, and all are in the region: slots as well as epoch words."""
    layout, plan, found = planned(f, case)
    if found:
        assert REGION[plan.algorithm] in layout.regions
        region = layout.regions[REGION[plan.algorithm]]
        rows = max(piece.numel for piece in found) // case.hidden
        warps = rows * plan.form.cluster * plan.block // WARP  # of the largest launch: a warp owns `packets` channels in a row
        channels = warps * plan.form.packets
        assert channels <= region.channels and channels * WARP <= region.capacity


def launches_are_alike(f, case):
    """As few as there is room for, none a row shorter than it must be."""
    _, plan, found = planned(f, case)
    if found:
        rows = [piece.numel // case.hidden for piece in found]
        assert max(rows) == rows[0] == -(-case.rows // len(rows))
        assert set(rows[:-1]) <= {rows[0]}


def few_blocks(f, case):
    _, plan, found = planned(f, case)
    if case.max_ctas is not None:
        assert all(piece.grid <= case.max_ctas for piece in found) and len(found) <= MOST_LAUNCHES
        assert not found or plan.form.cluster == 1


def blocks(f, case):
    _, plan, found = planned(f, case)
    if found:
        assert WARP <= plan.block <= 1024 and plan.form.fits(case.spec.family, case.world_size) and plan.block % WARP == 0
        assert plan.form.cluster in ((1, 2, 4, 8) if case.clusters else (1,))


def known_kernel(f, case):
    """What the engine compiles of this family is what plans pick, and the entry's own numbers are the plan's."""
    bare, layout = memory(case)
    bands = nvlink_norm.make_bands(case.spec.family, case.world_size, bare, layout, case.clusters, case.max_ctas)
    _, plan, found = planned(f, case)
    if found:
        assert plan.form in {band.form for band in bands}
        macro, cluster, warps, _ = norm_module(plan.form, case.spec.family, case.world_size).macro
        assert (macro, cluster, 32 * warps) == ("NORM_ENTRY", plan.form.cluster, plan.block)


def takes_its_band(f, case):
    """The table decides, where one launch holds the call; a later form only where an earlier one takes several launches."""
    bare, layout = memory(case)
    bands = nvlink_norm.make_bands(case.spec.family, case.world_size, bare, layout, case.clusters, case.max_ctas)
    _, plan, found = planned(f, case)
    if not bands:
        assert not found
    if found:
        later = [band for band in bands if case.rows <= band.up_to] or [bands[-1]]
        holds = [
            band
            for band in later
            if nvlink_norm.plan_of(band.form, case.spec, case.world_size, layout, case.max_ctas).rows == case.rows
        ]
        assert plan.form == (holds or later[-1:])[0].form


def goes_apart_for_want_of_room(f, case):
    layout, plan, found = planned(f, case)
    if plan.algorithm == APART:
        assert not found and plan.chunk == case.spec.numel
        if case.max_ctas is None:  # no region holds a row
            n, family = case.world_size, case.spec.family
            for band in norm_bands(family, n, clusters=False):
                region = layout.regions.get(REGION[band.form.algorithm])
                assert case.bare or region is None or band.form.slots(family, n) > region.capacity
        else:
            region = layout.regions["one_shot"]
            rows = min(case.max_ctas - 1, region.capacity // (-(-case.row_packets // WARP) * WARP))
            assert rows * MOST_LAUNCHES < case.rows


PROPERTIES = [every_group_once, every_row_once, inside_the_slots, launches_are_alike, few_blocks, blocks, known_kernel, takes_its_band,
              goes_apart_for_want_of_room]  # fmt: skip


def hold(prop, functions=REAL, examples=250):
    phases = list(hypothesis.Phase) if functions is REAL else [hypothesis.Phase.generate]

    @hypothesis.settings(
        max_examples=examples, deadline=None, derandomize=True, database=None, report_multiple_bugs=False, phases=phases,
        suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.data_too_large],
    )  # fmt: skip
    @hypothesis.given(cases())
    def run(case):
        prop(functions, case)

    run()


@pytest.mark.parametrize("prop", PROPERTIES, ids=lambda prop: prop.__name__)
def test_property(prop):
    hold(prop)


# -- planted mistakes


def mutant(name, change):
    """The real functions, the answer of one changed."""
    real = getattr(REAL, name)
    return SimpleNamespace(**{**vars(REAL), name: lambda *args: change(real(*args))})


def on_plan(**fields):
    """Every plan that is none apart, with changed fields."""
    return mutant(
        "plan",
        lambda plan: replace(plan, **{k: f(plan) for k, f in fields.items()}) if isinstance(plan, NormPlan) else plan,
    )


def on_launches(change):
    return mutant("launches", lambda found: [change(piece) for piece in found])


def deaf_to_room(spec, world_size, bands, layout, max_ctas):
    plan = nvlink_norm.make_plan(spec, world_size, bands, layout, max_ctas)
    if not isinstance(plan, NormPlan):
        return plan
    return replace(plan, rows=spec.rows, grid=spec.rows * plan.form.cluster, chunk=spec.numel)


def in_full_launches(spec, world_size, bands, layout, max_ctas):
    plan = nvlink_norm.make_plan(spec, world_size, bands, layout, max_ctas)
    if not isinstance(plan, NormPlan) or plan.rows == spec.rows:
        return plan
    rows = nvlink_norm._most_rows(plan.form, spec, world_size, layout, max_ctas)
    return replace(plan, rows=rows, grid=rows * plan.form.cluster, chunk=rows * spec.hidden)


def other(**functions):
    return SimpleNamespace(**{**vars(REAL), **functions})


MISTAKES = [
    (every_group_once, "a warp too few", on_plan(block=lambda p: max(WARP, p.block - WARP))),
    (every_group_once, "packets of another form", on_plan(form=lambda p: replace(p.form, packets=2 * p.form.packets, cluster=max(1, p.form.cluster // 4)))),
    (every_row_once, "a row forgotten", on_launches(lambda piece: replace(piece, numel=max(1, piece.numel - 64)))),
    (every_row_once, "no guard", on_launches(lambda piece: replace(piece, grid=piece.grid - 1))),
    (every_row_once, "a guard of one block before clusters", mutant("launches", lambda found: [
        replace(piece, grid=piece.grid - 3) if piece.grid % 4 == 0 else piece for piece in found])),
    (every_row_once, "only the last launch leaves", on_launches(lambda piece: replace(piece, arguments=(("launch", 0), ("last", 0))))),
    (inside_the_slots, "everything in one launch", other(plan=deaf_to_room)),
    (inside_the_slots, "the other algorithm's slots", on_plan(
        algorithm=lambda p: "one_shot_norm", form=lambda p: replace(p.form, packets=4 * p.form.packets))),
    (launches_are_alike, "full launches and a rest", other(plan=in_full_launches)),
    (few_blocks, "the guard forgotten", other(plan=lambda spec, n, bands, layout, max_ctas: nvlink_norm.make_plan(
        spec, n, bands, layout, max_ctas and max_ctas + 1))),
    (few_blocks, "clusters all the same", on_plan(form=lambda p: replace(p.form, cluster=2))),
    (blocks, "half a warp", on_plan(block=lambda p: p.block - 16)),
    (blocks, "clusters on every GPU", on_plan(form=lambda p: replace(p.form, cluster=4))),
    (known_kernel, "a form of its own", on_plan(form=lambda p: replace(p.form, packets=16))),
    (known_kernel, "another block", on_plan(block=lambda p: p.block + WARP)),
    (takes_its_band, "always the last form", other(plan=lambda spec, n, bands, *rest: nvlink_norm.make_plan(spec, n, bands[-1:], *rest))),
    (takes_its_band, "always the first form", other(plan=lambda spec, n, bands, *rest: nvlink_norm.make_plan(
        spec, n, [replace(band, up_to=NEVER) for band in bands[:1]], *rest))),
    (goes_apart_for_want_of_room, "always apart", other(plan=lambda spec, n, bands, *rest: nvlink_norm.make_plan(spec, n, (), *rest))),
    (goes_apart_for_want_of_room, "apart from two launches on", other(plan=lambda spec, n, bands, layout, max_ctas: (
        lambda plan: plan if plan.chunk == spec.numel else nvlink_norm.make_plan(spec, n, (), layout, max_ctas))(
            nvlink_norm.make_plan(spec, n, bands, layout, max_ctas)))),
]  # fmt: skip


@pytest.mark.parametrize(("prop", "functions"), [m[::2] for m in MISTAKES], ids=[f"{m[0].__name__}: {m[1]}" for m in MISTAKES])
def test_fails_on_a_planted_mistake(prop, functions):
    with pytest.raises(AssertionError):
        hold(prop, functions, examples=1000)


def test_every_property_has_a_mistake_that_it_finds():
    assert {prop for prop, *_ in MISTAKES} == set(PROPERTIES)


# -- the table and the catalogue


@pytest.mark.parametrize(("world_size", "dtype", "hidden", "found"), [
    (2, "bfloat16", 64, [(NEVER, "one_shot_norm", 1, 1)]),
    (2, "bfloat16", 2048, [(NEVER, "one_shot_norm", 1, 1)]),
    (2, "bfloat16", 4096, [(64, "one_shot_norm", 1, 4), (264, "one_shot_norm", 1, 1), (NEVER, "one_shot_norm", 2, 1)]),
    (2, "bfloat16", 8192, [(64, "one_shot_norm", 1, 8), (132, "one_shot_norm", 1, 1), (NEVER, "one_shot_norm", 2, 1)]),
    (2, "float32", 16384, [(64, "one_shot_norm", 1, 8), (132, "one_shot_norm", 1, 4), (NEVER, "one_shot_norm", 2, 4)]),
    (4, "bfloat16", 4096, [(24, "one_shot_norm", 1, 4), (NEVER, "two_shot_norm", 1, 1)]),
    (4, "bfloat16", 512, [(192, "one_shot_norm", 1, 1), (NEVER, "two_shot_norm", 1, 1)]),
    (8, "float32", 16384, [(NEVER, "two_shot_norm", 1, 2)]),
])  # fmt: skip
def test_table(world_size, dtype, hidden, found):
    bands = norm_bands(norm_family(dtype, hidden), world_size)
    assert [(band.up_to, band.form.algorithm, band.form.packets, band.form.cluster) for band in bands] == found
    plain = norm_bands(norm_family(dtype, hidden), world_size, clusters=False)
    assert {band.form.cluster for band in plain} == {1}


# Of bf16 rows: around each number of groups of a warp, which is all that a form depends on, and the ends.
WIDTHS = sorted({64, 16384, *(h for n in range(1, 65) for h in (256 * n - 8, 256 * n, 256 * n + 8) if 64 <= h <= 16384)})


def test_every_size_has_a_form():
    for world_size in WORLD_SIZES:
        for dtype in DTYPES:
            for hidden in WIDTHS:
                for clusters in (True, False):
                    bands = norm_bands(norm_family(dtype, hidden), world_size, clusters=clusters)
                    assert bands[-1].up_to == NEVER and [b.up_to for b in bands] == sorted({b.up_to for b in bands})
                    assert all(one.form != next.form for one, next in pairwise(bands))


def forms():
    """Every form that could be asked for, and whose block a multiprocessor holds, with its family and number of ranks."""
    for world_size in WORLD_SIZES:
        for hidden in (64, 256, 264, 2880, 4096, 6144, 8192, 12288, 16384):
            for dtype in ("bfloat16", "float32"):
                family = norm_family(dtype, hidden)
                for algorithm in REGION:
                    for packets in (1, 2, 4, 8):
                        for cluster in (1, 2, 4, 8):
                            yield Form(algorithm, packets, cluster), family, world_size


def test_a_multiprocessor_is_to_have_the_registers_for_as_many_blocks_as_fit():
    """16 at most, and one at least; two where forms of 80 registers have them with a few spilled."""
    seen = set()
    for form, family, world_size in forms():
        threads, registers = WARP * form.warps(family, world_size), form.registers(world_size)
        assert form.fits(family, world_size) == (threads <= 1024 and threads * registers <= 65536)
        fitting = [blocks for blocks in range(1, 17) if blocks * threads * registers <= 65536]
        spilled = [2] if registers == 80 and 2 * threads * 64 <= 65536 else []
        found = form.blocks(family, world_size)
        assert type(found) is int and found == max([1, *fitting, *spilled]), (form, family)
        seen.add((found, bool(spilled) and 2 not in fitting))
    assert {(1, False), (2, True), (2, False), (16, False)} <= seen


def test_registers_of_a_thread():
    """What ptxas needs so as not to spill (``test_compile_norm``): more of more packets, of more ranks, and of parts of each."""
    one = {n: [Form("one_shot_norm", packets, 1).registers(n) for packets in (1, 2, 4, 8)] for n in WORLD_SIZES}
    two = {n: {Form("two_shot_norm", packets, 1).registers(n) for packets in (1, 2, 4, 8)} for n in WORLD_SIZES}
    assert one == {2: [64, 80, 128, 128]} | dict.fromkeys((3, 4), [64, 128, 128, 128]) | dict.fromkeys((5, 6, 7, 8), [128] * 4)
    assert two == dict.fromkeys((2, 3, 4), {128}) | dict.fromkeys((5, 6, 7, 8), {255})


def test_warps_and_slots_hold_a_row():
    """Its groups, or each rank's part of them, with less than a round of groups to spare."""
    for form, family, world_size in forms():
        groups = norm_forms.groups(family)
        assert groups == -(-family.hidden * ITEMSIZE[family.dtype] // (WARP * PACKET))
        each = -(-groups // (world_size if form.algorithm == "two_shot_norm" else 1))
        warps = form.warps(family, world_size)
        held = form.cluster * form.packets
        assert warps * held >= each > (warps - 1) * held and form.slots(family, world_size) == WARP * warps * held


def test_which_algorithm_takes_how_many_rows():
    """One-shot as many as an all-reduce of their bytes is one-shot for, of two ranks all; the table's forms, with what it takes to fit."""
    for world_size in WORLD_SIZES:
        for dtype in DTYPES:
            for hidden in (64, 2048, 2176, 4096, 4224, 8192, 16384):
                family = norm_family(dtype, hidden)
                row = hidden * ITEMSIZE[dtype]
                for up_to in (None, 0, row - 1, row, 5 * row + 1, 100 * row, NEVER):
                    limit = up_to if up_to is not None else two_shot_above(NVLINK_TABLES[world_size])
                    for clusters in (True, False):
                        bands = norm_bands(family, world_size, up_to, clusters)
                        check_bands(bands, family, world_size, row, limit, clusters)


def check_bands(bands, family, world_size, row, limit, clusters):
    begin, rule = 0, next(rule for rule in norm_forms.NORM_RULES[world_size] if norm_forms.groups(family) >= rule.groups)
    asked = [form for form in rule.forms if clusters or form[2] == 1]
    for band in bands:
        for rows in {begin + 1, min(begin + 2, band.up_to), band.up_to}:
            one_shot = world_size == 2 or rows * row <= limit
            assert band.form.algorithm == ("one_shot_norm" if one_shot else "two_shot_norm"), (bands, rows)
            wanted = next(form for form in asked if rows <= form[0]) if one_shot else asked[-1]
            _, packets, cluster = wanted
            assert band.form.fits(family, world_size) or not clusters, (bands, rows)
            if Form(band.form.algorithm, packets, cluster).fits(family, world_size):
                assert (band.form.packets, band.form.cluster) == (packets, cluster)
            else:  # blocks of a row first, then packets of a thread
                smaller = [
                    form
                    for p in (1, 2, 4, 8)
                    for c in ((1, 2, 4, 8) if clusters else (1,))
                    if p >= packets and c >= cluster and (p, c) < (band.form.packets, band.form.cluster)
                    and (form := Form(band.form.algorithm, p, c)).fits(family, world_size)
                ]  # fmt: skip
                assert not smaller and band.form.packets >= packets and band.form.cluster >= cluster
        begin = band.up_to


def test_where_no_form_fits_the_largest_is_taken(monkeypatch):
    monkeypatch.setattr(norm_forms, "REGISTERS", 1)
    for clusters in (True, False):
        for band in norm_bands(norm_family("bfloat16", 8192), 2, clusters=clusters):
            assert (band.form.packets, band.form.cluster) == (8, 8 if clusters else 1)


def test_bands_are_the_tables_where_there_is_room():
    """Without clusters where blocks are few; none of an algorithm without a region, or whose launch has no block beside its guard."""
    family = norm_family("bfloat16", 4096)
    for world_size in WORLD_SIZES:
        bare = nvlink.make_bands(world_size)
        layout = nvlink.make_layout(world_size, DEFAULT_STAGING, bare)
        for clusters in (True, False):
            for max_ctas in (None, 2, 9, 300):
                want = norm_bands(family, world_size, two_shot_above(bare), clusters and max_ctas is None)
                assert nvlink_norm.make_bands(family, world_size, bare, layout, clusters, max_ctas) == want
        assert nvlink_norm.make_bands(family, world_size, bare, layout, True, 1) == ()
    four = nvlink.make_layout(4, DEFAULT_STAGING, nvlink.make_bands(4))
    for some in ((Band(1 << 20, "one_shot", 32), Band(NEVER, "two_shot", 32)), (Band(NEVER, "two_shot", 32),)):
        for bands in (some, tuple(reversed(some))):  # a table of this dtype, while another dtype's has regions for all
            found = nvlink_norm.make_bands(family, 4, bands, four, True)
            assert found == norm_bands(family, 4, 1 << 20 if len(some) == 2 else 0)
    for gone in ("one_shot", "two_shot"):
        less = replace(four, regions={name: region for name, region in four.regions.items() if name != gone})
        found = nvlink_norm.make_bands(family, 4, nvlink.make_bands(4), less, True)
        assert found and found == tuple(band for band in norm_bands(family, 4) if REGION[band.form.algorithm] != gone)


def test_a_call_that_goes_apart_has_no_blocks():
    spec = Case(4, "bfloat16", 5, 4096).spec
    layout = memory(Case(4, "bfloat16", 1, 64))[1]
    assert nvlink_norm.make_plan(spec, 4, (), layout) == Plan("v2", APART, 0, 0, 5 * 4096)


def test_the_last_row_of_a_band_is_its_own():
    for world_size, hidden in ((2, 8192), (2, 4096), (4, 4096), (8, 2048)):
        family = norm_family("bfloat16", hidden)
        _, layout = memory(Case(world_size, "bfloat16", 1, hidden))
        bands = nvlink_norm.make_bands(family, world_size, nvlink.make_bands(world_size), layout, True)
        assert len(bands) > 1
        for band, following in pairwise(bands):
            for rows, want in ((band.up_to, band), (band.up_to + 1, following)):
                plan = nvlink_norm.make_plan(Case(world_size, "bfloat16", rows, hidden).spec, world_size, bands, layout)
                assert plan.form == want.form and plan.rows == rows


def test_as_many_launches_as_are_allowed_and_no_more():
    """With few blocks: a guard, and a row a block; from 9 launches on a call goes apart. Without a limit there is no such end."""
    _, layout = memory(Case(4, "bfloat16", 1, 4096))
    bands = nvlink_norm.make_bands(norm_family("bfloat16", 4096), 4, nvlink.make_bands(4), layout, True, 4)
    for rows in (1, 2, 3, 4, 7, 8 * 3 - 1, 8 * 3, 8 * 3 + 1, 1000):
        case = Case(4, "bfloat16", rows, 4096)
        plan = nvlink_norm.make_plan(case.spec, 4, bands, layout, 4)
        assert (plan.algorithm == APART) == (rows > 3 * MOST_LAUNCHES)
        if plan.algorithm != APART:
            assert len(nvlink_norm.launches(plan, case.spec)) == -(-rows // 3)
    many = Case(4, "bfloat16", 1 << 20, 4096).spec
    assert len(nvlink_norm.launches(nvlink_norm.make_plan(many, 4, bands, layout), many)) > MOST_LAUNCHES


def test_no_two_kernels_share_a_name():
    families = [
        norm_family(dtype, 256, rounding, quant, residual=residual, weight=weight, weight_bias=bias, with_norm=kept)
        for dtype in DTYPES
        for rounding in "RUH"
        for quant in ("none", "static", "token", "group")
        for residual in (True, False)
        for weight in dict.fromkeys((dtype, "float32"))
        for bias in (0, 1)
        for kept in ((True, False) if quant != "none" else (False,))
    ]
    specs = [spec for n in (2, 4) for spec in modules(n, [*families, norm_family("bfloat16", 264)])]
    assert len({spec.name for spec in specs}) == len(specs) == len(set(specs))
    assert all(spec.entries == (spec.name,) and spec.name.isidentifier() for spec in specs)


def test_modules_of_a_path():
    family = norm_family("bfloat16", 8192)
    names = [spec.name for spec in backends.modules("v2", 2, [family])]
    assert names == [f"one_shot_norm_{form}_8192_bf16_r_ws2" for form in ("k1_c8", "k1_c1", "k2_c1")]
    assert [spec.name for spec in backends.modules("v2", 2, [family], "sm_80")] == names[1:]
    assert backends.modules("legacy", 2, [family]) == []  # which has none
    assert set(backends.modules("v2", 2)) & set(backends.modules("v2", 2, [family])) == set()


def test_no_room_for_a_row_is_refused():
    layout = memory(Case(2, "bfloat16", 1, 64))[1]
    tiny = replace(layout, regions={"one_shot": replace(layout.regions["one_shot"], capacity=31)})
    spec = Case(2, "bfloat16", 1, 64).spec
    with pytest.raises(ValueError, match="no room for a row of 64 bfloat16"):
        nvlink_norm.plan_of(Form("one_shot_norm", 1, 1), spec, 2, tiny)
    assert norm_forms.groups(spec) == 1
