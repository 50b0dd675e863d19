"""The ladder and its stages, rank by rank: what each is told, builds, closes and answers. ``test_ladder`` has real processes for it."""

from __future__ import annotations

import logging
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")

from helpers import threaded_ranks  # noqa: E402
from helpers.fake_engines import STAGES  # noqa: E402
from helpers.fakes import MACHINES, look  # noqa: E402
from helpers.kept import FACTS, HOST_TABLES_KEPT, ODD, TABLES  # noqa: E402
from helpers.threaded_ranks import BARE, device_of, on, ranks  # noqa: E402

from allreduce_jit.errors import CommunicatorFailedError, InputError, PeerTimeoutError, SettingsError  # noqa: E402
from allreduce_jit.machine.process import Process  # noqa: E402
from allreduce_jit.norms import norm_family  # noqa: E402
from allreduce_jit.policy import backends, measured_tables  # noqa: E402
from allreduce_jit.policy.operation import ALL_REDUCE, DTYPES, OpSpec  # noqa: E402
from allreduce_jit.policy.verdict import Path, Reason  # noqa: E402
from allreduce_jit.setup import ladder  # noqa: E402
from allreduce_jit.setup.ladder import climb, survey  # noqa: E402
from allreduce_jit.setup.stages import Stages, StepDown  # noqa: E402

CODES = dict.fromkeys(("construct", "compile", "load", "allocate"), "build-failed") | {
    "connect": "map-failed",
    "verify": "verify-failed",
}
NORM = norm_family("bfloat16", 256)
PLANTED = RuntimeError("planted")


def climbed(count=4, rank_says=lambda rank: {}, **arguments):
    """What ``climb`` gave on each rank; ``rank_says``: arguments that only it has."""
    return ranks(count, lambda group: climb(group, device_of(group.rank), **(arguments | rank_says(group.rank))))


def agreed(found):
    """(path, codes, ranks to blame), the same on all ranks."""
    for one in found:
        if isinstance(one, BaseException):
            raise one
        assert one.verdict == found[0].verdict and one.without == found[0].without
        assert (one.engine is None) == (one.stages is None) == (one.verdict.path is Path.TORCH)
    reasons = found[0].verdict.reasons
    return found[0].verdict.path, [r.code for r in reasons], [r.rank for r in reasons]


def failing(who, *stages, path="v2", error=PLANTED):
    return {rank: {(path, stage): error for stage in stages} for rank in who}


def messages(found):
    return {f"{type(e).__name__}: {e}" for e in found}


# -- from top to bottom


def test_a_climb_builds_the_highest_rung_on_every_rank(tmp_path):
    settings = {rank: replace(BARE, cache_dir=tmp_path / f"{rank}", setup_timeout_s=40.0 + rank) for rank in range(4)}
    with on(settings=settings) as built:
        found = ranks(4, lambda group: (climb(group, device_of(group.rank)), group.exchanges))
    assert agreed([one for one, _ in found]) == (Path.V2, ["full-nvlink"], [None])
    for rank, (one, exchanges) in enumerate(found):
        (engine,) = built[rank]
        assert one.engine is engine and engine.events == list(STAGES) and engine.devices == [device_of(rank)] * len(STAGES)
        assert engine.families == list(ALL_REDUCE)
        assert engine.given == [
            ("compile", tmp_path / f"{rank}", [*ALL_REDUCE]),
            *((at, [*ALL_REDUCE]) for at in ("load", "verify")),
        ]
        assert {seconds for _, seconds in exchanges} == {40.0 + rank} and len(exchanges) == 5
        assert set(one.timings) == {"probe_s", "build_s", "map_s", "verify_s", "total_s"}
        total = one.timings.pop("total_s")
        assert total == pytest.approx(sum(one.timings.values())) and 0 < total < 60 and min(one.timings.values()) > 0
        assert (one.tuned, one.tuning, one.without, one.measured) == (None, None, None, {})
        assert one.processes == [Process.own()] * 4 and one.settings == settings[rank]
        assert one.stages.group.rank == rank and one.stages.timeout_s == 40.0 + rank and one.stages.timings is one.timings
        assert one.stages.cache_dir == tmp_path / f"{rank}" and one.stages.device == device_of(rank)


def test_what_an_engine_is_told():
    with on(settings={2: replace(BARE, staging_mb=17), 3: replace(BARE, pdl=False)}) as built:
        agreed(climbed(deterministic=True, max_ctas=9))
    with on("a100-pcie-x4") as below:
        assert agreed(climbed())[0] is Path.LEGACY
    for machine, engines, told in (
        ("h200-x4", built, ("sm_90", True, True, 9)),
        ("a100-pcie-x4", below, ("sm_80", False, False, None)),
    ):
        caps = [look(MACHINES[machine], rank) for rank in range(4)]
        for rank in range(4):
            config = engines[rank][0].config
            assert (config.rank, config.world_size, config.device) == (rank, 4, device_of(rank))
            assert (config.arch, config.nvlink, config.deterministic, config.max_ctas) == told and config.tuned is None
            assert config.bus_ids == tuple(c.gpu.pci_bus_id for c in caps) and len(set(config.bus_ids)) == 4
    assert {engines[0].config.settings.staging_mb for engines in built.values() if engines} == {17}
    assert [built[rank][0].config.settings.pdl for rank in range(4)] == [True, True, True, False]  # what need not be the same


@pytest.mark.parametrize("stage", STAGES)
def test_whatever_fails_on_whichever_rank_all_take_the_next_rung(stage):
    for who in ({0}, {2}, {1, 3}, {0, 1, 2, 3}):
        with on(fails=failing(who, stage)) as built:
            found = climbed()
        blamed = min(who)
        assert agreed(found) == (Path.LEGACY, [CODES[stage]], [blamed])
        assert found[0].verdict.reasons[0].text == f"rank {blamed}: RuntimeError: planted"
        for rank, one in enumerate(found):
            first, second = built[rank]
            assert one.engine is second and second.path == "legacy" and not second.closed
            alive = not (stage == "construct" and rank in who)
            assert first.closed == alive and first.devices == [device_of(rank)] * len(first.events)


def test_below_the_last_rung_there_is_no_engine():
    fails = {rank: {("v2", "load"): PLANTED, ("legacy", "connect"): PLANTED, ("host", "verify"): PLANTED} for rank in (1, 3)}
    with on(fails=fails) as built:
        found = climbed()
    assert agreed(found) == (Path.TORCH, ["build-failed", "map-failed", "verify-failed"], [1, 1, 1])
    assert found[0].verdict.full_nvlink is None and found[0].verdict.backend == "nccl"
    assert [[engine.closed for engine in built[rank]] for rank in range(4)] == [[1, 1, 1]] * 4
    assert "total_s" in found[0].timings


def test_who_waited_in_vain_is_not_to_blame():
    late = PeerTimeoutError("waited for rank 2")
    assert isinstance(late, CommunicatorFailedError)
    fails = failing({0, 1, 3}, "verify", error=late) | failing({2}, "verify")
    with on(fails=fails):
        assert agreed(climbed()) == (Path.LEGACY, ["verify-failed"], [2])
    with on(fails=failing({1, 3}, "verify", error=late)):
        assert agreed(climbed()) == (Path.LEGACY, ["verify-failed"], [1])


def test_a_close_that_fails_is_told_and_keeps_nobody_from_the_next_rung(caplog):
    with on(fails=failing({0}, "load", "close") | failing({2}, "close", error=OSError("busy"))) as built:
        found = climbed()
    assert agreed(found) == (Path.LEGACY, ["build-failed"], [0])
    told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING and "release" in record.msg]
    assert sorted(told) == [
        "cpu:0: could not release everything: RuntimeError: planted",
        "cpu:2: could not release everything: OSError: busy",
    ]
    assert built[2][0].devices[-1] == device_of(2)


def test_what_is_no_exception_of_the_programs_ends_the_climb_and_leaves_nothing_open():
    with on(fails=failing(range(4), "connect", error=KeyboardInterrupt())) as built:
        assert {type(one) for one in climbed()} == {KeyboardInterrupt}
    assert [[engine.closed for engine in built[rank]] for rank in range(4)] == [[1]] * 4


# -- what the caller wants


def test_no_rung_above_the_highest_or_below_the_lowest_is_tried():
    with on() as built:
        found = climbed(highest=Path.LEGACY)
        assert agreed(found) == (Path.LEGACY, ["v2-switched-off"], [None])
        assert found[0].verdict.reasons[0].text == "the caller asked for the legacy kernels"
        assert found[0].verdict.full_nvlink is True and [engine.path for engine in built[0]] == ["legacy"]
    with on() as built:
        assert agreed(climbed(highest=Path.HOST))[:2] == (Path.HOST, ["v2-switched-off", "path-forced"])
        assert [engine.path for engine in built[0]] == ["host"]
    with on() as built:
        assert agreed(climbed(highest=Path.V2, lowest=Path.V2))[0] is Path.V2
    with on(fails=failing({1}, "load")) as built:
        found = climbed(lowest=Path.V2)
        assert agreed(found) == (Path.TORCH, ["build-failed"], [1]) and len(built[0]) == 1
    with on(fails=failing({1}, "connect")) as built:
        assert agreed(climbed(lowest=Path.LEGACY))[0] is Path.LEGACY
    with on("a100-pcie-x4") as built:
        found = climbed(lowest=Path.V2)
        assert agreed(found)[0] is Path.TORCH and not built[0] and found[0].verdict.full_nvlink is None
        assert agreed(climbed(highest=Path.LEGACY, lowest=Path.LEGACY))[0] is Path.LEGACY


DIFFERENT = {
    "deterministic": (False, True),
    "highest": (Path.V2, Path.LEGACY),
    "lowest": (Path.HOST, Path.LEGACY),
    "max_ctas": (8, 9),
    "families": (ALL_REDUCE, ALL_REDUCE[:1]),
    "operations": ((), (NORM,)),
}


@pytest.mark.parametrize("name", DIFFERENT)
def test_callers_that_ask_for_different_things_are_told_so_on_every_rank(name):
    first, other = DIFFERENT[name]
    for odd in (1, 2):
        with on() as built:
            found = climbed(rank_says=lambda rank, odd=odd: {name: other if rank == odd else first})
            assert {type(e) for e in found} == {InputError} and len(messages(found)) == 1
            (text,) = messages(found)
            own, of_rank_0 = re.fullmatch(
                f"InputError: rank {odd} asks for (.*), rank 0 for (.*): ask alike on all ranks", text
            ).groups()
            assert own != of_rank_0 and all(f"'{name}': " in each for each in (own, of_rank_0)) and not any(built.values())


def test_ranks_of_different_versions_do_not_build_together(monkeypatch):
    with on():
        real = threaded_ranks.Group.all_gather

        def older(group, payload, timeout_s):
            if group.rank == 1 and "request" in payload:
                assert payload["request"]["package"] == ladder.__version__
                payload = payload | {"request": payload["request"] | {"package": "0.0.1"}}
            return real(group, payload, timeout_s)

        monkeypatch.setattr(threaded_ranks.Group, "all_gather", older)
        assert {type(e) for e in climbed()} == {InputError}


def test_further_operations_are_built_with_the_first_ones_where_a_rung_has_them():
    asked = [NORM, OpSpec("norm", "bfloat16", NORM.shape, NORM.epilogue)]  # the second one no rung has
    with on() as built:
        found = climbed(operations=asked)
    assert agreed(found)[0] is Path.V2 and found[0].without is None and len(built[0]) == 1
    assert built[0][0].families == [*ALL_REDUCE, NORM]
    with on("a100-pcie-x4") as built:
        assert agreed(climbed(operations=asked))[0] is Path.LEGACY
    assert built[0][0].families == list(ALL_REDUCE) and len(built[0]) == 1


def test_operations_that_fail_cost_only_themselves():
    """The rung is built again without them, and the reason is kept; if that fails too, its own reason counts."""

    class Refuses(threaded_ranks.Engine):
        def verify(self, families):
            if NORM in families and self.config.rank == 3:
                raise PLANTED
            super().verify(families)

    with on() as built, pytest.MonkeyPatch.context() as patch:
        patch.setattr(threaded_ranks, "Engine", Refuses)
        found = climbed(operations=[NORM])
        assert agreed(found) == (Path.V2, ["full-nvlink"], [None])
        assert found[1].without == Reason("verify-failed", "rank 3: RuntimeError: planted", 3)
        assert [engine.closed for engine in built[1]] == [1, 0] and built[1][1].families == list(ALL_REDUCE)
    with on(fails=failing({2}, "load")) as built:
        found = climbed(operations=[NORM])
    assert agreed(found) == (Path.LEGACY, ["build-failed"], [2]) and found[0].without is None
    assert [engine.path for engine in built[0]] == ["v2", "v2", "legacy"]


def test_only_the_families_that_are_asked_for_are_built():
    with on() as built:
        found = climbed(families=ALL_REDUCE[:1])
    assert agreed(found)[0] is Path.V2 and built[0][0].families == [ALL_REDUCE[0]]
    assert {tuple(what) for _, *_, what in built[0][0].given} == {ALL_REDUCE[:1]}


# -- the survey


def surveyed(count=4, **arguments):
    return ranks(count, lambda group: survey(group, device_of(group.rank), **arguments))


def test_a_survey_builds_nothing_and_tells_every_rank_the_same():
    with on() as built:
        found = surveyed(request={"a": 1})
    assert not any(built.values())
    for one in found:
        assert one.verdict == found[0].verdict and one.verdict.path is Path.V2
        assert one.capabilities == [look(MACHINES["h200-x4"], rank) for rank in range(4)]
        assert one.wishes == [replace(BARE, cache_dir=one.wishes[0].cache_dir)] * 4 and 0 < one.timings["probe_s"] < 60
        assert list(one.timings) == ["probe_s"] and one.engine is None and one.stages is None


def test_one_ranks_wish_counts_for_all():
    with on(settings={1: replace(BARE, path="legacy", pdl=False)}):
        found = surveyed()
    assert [one.path for one in found[0].wishes] == ["auto", "legacy", "auto", "auto"]
    assert [one.pdl for one in found[0].wishes] == [True] * 4  # nothing else of what a rank's environment says
    assert found[3].verdict.path is Path.LEGACY and found[3].verdict.reasons[0].rank == 1
    with on(settings={2: replace(BARE, use_v2=False)}):
        assert [one.verdict.reasons[0].code for one in surveyed()] == ["v2-switched-off"] * 4
        assert [one.verdict.path for one in surveyed(use_v2=True)] == [Path.V2] * 4
    with on():
        found = ranks(4, lambda group: survey(group, device_of(group.rank), False if group.rank == 3 else None))
        assert [(one.verdict.path, one.verdict.reasons[0].rank) for one in found] == [(Path.LEGACY, 3)] * 4


def test_the_smallest_staging_memory_is_everyones():
    with on(settings={rank: replace(BARE, staging_mb=64 - rank) for rank in range(4)}):
        assert [one.settings.staging_mb for one in surveyed()] == [61] * 4


class Silent(Exception):
    def __str__(self):
        return ""


@pytest.mark.parametrize(
    ("problem", "told"),
    [(SettingsError("ALLREDUCE_JIT_X=1"), "ALLREDUCE_JIT_X=1"), (OSError("odd"), "odd"), (Silent(), "Silent()")],
)
def test_an_environment_that_is_wrong_on_one_rank_is_an_error_on_all(problem, told):
    with on(settings={2: problem, 3: SettingsError("of another one")}) as built:
        assert messages(climbed()) == {f"SettingsError: rank 2: {told}"} and not any(built.values())
        assert messages(ranks(4, ladder.v2_is_on)) == {f"SettingsError: rank 2: {told}"}


def test_who_has_a_wrong_environment_waits_as_long_as_by_default():
    with on(settings={1: SettingsError("wrong")}):
        found = ranks(2, lambda group: (pytest.raises(SettingsError, survey, group, device_of(0)), group.exchanges))
    assert [[seconds for _, seconds in exchanges] for _, exchanges in found] == [[BARE.setup_timeout_s]] * 2


def test_whether_v2_is_on_takes_every_rank():
    for off in ({}, {0}, {3}, {1, 2}):
        with on(settings={rank: replace(BARE, use_v2=False, setup_timeout_s=7.0) for rank in off}):
            found = ranks(4, lambda group: (ladder.v2_is_on(group), group.exchanges[0][1]))
        assert [answer for answer, _ in found] == [not off] * 4
        assert [seconds for _, seconds in found] == [7.0 if rank in off else BARE.setup_timeout_s for rank in range(4)]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("capabilities", None), ("capabilities", {}), ("process", None), ("process", {"pid": 0}), ("staging_mb", None),
        ("staging_mb", "much"), ("choice", {"colour": "red"}), ("choice", None),
    ],
)  # fmt: skip
def test_a_rank_that_speaks_of_itself_in_other_words_is_named(monkeypatch, name, value):
    real = threaded_ranks.Group.all_gather

    def odd(group, payload, timeout_s):
        return real(group, payload | ({name: value} if group.rank == 1 else {}), timeout_s)

    monkeypatch.setattr(threaded_ranks.Group, "all_gather", odd)
    with on():
        (text,) = messages(surveyed(2))
    assert text.startswith("InputError: rank 1 describes itself in words that this version does not know: ")
    assert text.endswith(")") and "Error(" in text  # and what was wrong with them


# -- tables that were measured


def kept(tmp_path, count=4):
    return {rank: replace(BARE, cache_dir=tmp_path / f"{rank}") for rank in range(count)}


def test_rank_0s_tables_count_for_all_ranks_by_path(tmp_path):
    settings = kept(tmp_path)
    v2 = measured_tables.save(tmp_path / "0", FACTS, TABLES)
    caps = look(MACHINES["h200-x4"], 0)
    host = measured_tables.save(tmp_path / "0", measured_tables.fingerprint(caps, 4, Path.HOST), HOST_TABLES_KEPT)
    measured_tables.save(tmp_path / "1", FACTS, dict.fromkeys(DTYPES, ODD))  # nobody's business
    with on(settings=settings) as built:
        for one in climbed():
            assert (one.tuned, one.tuning) == (TABLES, str(v2)) and one.engine.config.tuned == TABLES
            assert set(one.measured) == {Path.V2, Path.HOST} and one.measured[Path.HOST] == ladder.Measured(
                HOST_TABLES_KEPT, str(host)
            )
        for one in climbed(highest=Path.HOST):
            assert (one.tuned, one.tuning) == (HOST_TABLES_KEPT, str(host)) and one.engine.config.tuned == HOST_TABLES_KEPT
        for one in climbed(highest=Path.LEGACY):
            assert one.tuned is one.tuning is one.engine.config.tuned is None
        for one in climbed(max_ctas=9):  # measured without a limit
            assert one.tuned is one.tuning is one.engine.config.tuned is None and one.measured == {}
        given = dict.fromkeys(DTYPES, ODD)
        for one in climbed(highest=Path.V2, tables=given):
            assert one.tuned == one.engine.config.tuned == given and one.tuning is None and set(one.measured) == {Path.V2}
        for one in climbed(tables=given, max_ctas=9):
            assert one.tuned == given
        for who in (0, 3):
            settings[who], before = replace(settings[who], tuning=False), settings[who]
            for one in climbed():
                assert one.tuned is one.engine.config.tuned is None and one.measured == {}
            settings[who] = before
    assert built[0]


def test_only_rank_0_looks_for_tables_and_only_where_it_wants_them(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(measured_tables, "load_all", lambda *args: asked.append(args) or {})
    settings = kept(tmp_path)
    with on(settings=settings):
        assert [one.measured for one in surveyed()] == [{}] * 4
        assert asked == [(tmp_path / "0", look(MACHINES["h200-x4"], 0), 4)]
        settings[0] = replace(settings[0], tuning=False)
        surveyed()
        assert len(asked) == 1


@pytest.mark.parametrize("tables", [None, {}, {"float16": []}, "nonsense"])
def test_a_table_of_rank_0s_that_is_no_good_costs_no_other_one(tmp_path, monkeypatch, caplog, tables):
    good = {"path": "/host", "tables": measured_tables.tables_to_json(HOST_TABLES_KEPT)}
    for bad in ({"path": "/v2", "tables": tables}, {"tables": good["tables"]}, {"path": "/v2"}, 7):
        caplog.clear()
        monkeypatch.setattr(measured_tables, "load_all", lambda *_, bad=bad: {"v2": bad, "host": good})
        with on(settings=kept(tmp_path)):
            found = surveyed()
        assert [one.measured for one in found] == [{Path.HOST: ladder.Measured(HOST_TABLES_KEPT, "/host")}] * 4
        told = [record.getMessage() for record in caplog.records if "tuned table" in record.msg]
        assert len(told) == 4 and all(text.startswith("rank 0's tuned table of path v2 is ignored: ") for text in told)
        assert not any(text.endswith(": None") for text in told)


def test_a_table_of_rank_0s_has_to_be_one_for_so_many_ranks(monkeypatch, caplog):
    """Two ranks have no two-shot."""
    of_four = {"v2": {"path": "/v2", "tables": measured_tables.tables_to_json(TABLES)}}
    monkeypatch.setattr(measured_tables, "load_all", lambda *_: of_four)
    with on():
        assert [set(one.measured) for one in surveyed(4)] == [{Path.V2}] * 4
        assert [one.measured for one in surveyed(2)] == [{}] * 2
    assert "'two_shot' is none of one_shot" in caplog.text


# -- stages


def stages_of(group, timings=None):
    return Stages(group, device_of(group.rank), None, 60.0, {} if timings is None else timings)


def test_kernels_of_a_live_engine():
    """Agreed as at first; a failure leaves the engine open and what it had, with one reason on all ranks."""
    more = [OpSpec("all_reduce", "float8_e4m3fn")]

    def work(group):
        found = climb(group, device_of(group.rank))
        engine, before, said = found.engine, dict(found.timings), len(group.exchanges)
        found.stages.build_kernels(engine, more)
        assert engine.families == [*ALL_REDUCE, *more] and engine.events == [*STAGES, "compile", "load", "verify"]
        assert engine.given[-3:] == [("compile", None, more), ("load", more), ("verify", more)]
        assert {name for name in before if found.timings[name] > before[name]} == {"build_s", "verify_s"}
        assert {seconds for _, seconds in group.exchanges[said:]} == {BARE.setup_timeout_s}
        found.stages.build_kernels(engine, more)
        assert engine.families == [*ALL_REDUCE, *more]  # each once
        wanted = more if group.rank == 1 else [ALL_REDUCE[0]]
        with pytest.raises(InputError) as caught:
            found.stages.build_kernels(engine, wanted)
        assert str(caught.value) == (f"rank 1 asks for the kernels of {[asdict(more[0])]}, rank 0 for {[asdict(ALL_REDUCE[0])]}")
        for stage in ("compile", "load", "verify"):
            engine.fails = {("v2", stage): PLANTED} if group.rank == 2 else {}
            with pytest.raises(StepDown) as step:
                found.stages.build_kernels(engine, [OpSpec("all_reduce", "float64")])
            assert step.value.reason == Reason(CODES[stage], "rank 2: RuntimeError: planted", 2)
        assert engine.families == [*ALL_REDUCE, *more] and not engine.closed
        return True

    with on():
        assert ranks(4, work) == [True] * 4


def test_whatever_device_is_the_default_one_stages_have_the_cpu():
    def work(group):
        with torch.device("meta"):
            found = climb(group, device_of(group.rank))
            assert torch.empty(0).device.type == "meta"
        return found

    with on():
        assert agreed(ranks(2, work))[0] is Path.V2  # the stand-in engine looks at it in every stage


def test_seconds_of_stages_add_up():
    def work(group):
        timings = {"a": 5.0}
        stages = stages_of(group, timings)
        assert stages._run("a", "build-failed", lambda: group.rank) == [0, 1]
        assert 5.0 < timings["a"] < 6.0
        stages._run("b", "build-failed", lambda: None)
        assert 0 < timings["b"] < 1 and set(timings) == {"a", "b"}
        return True

    with on():
        assert ranks(2, work) == [True] * 2


# -- which engine


def test_each_rung_has_the_engine_of_its_row():
    for row in backends.BACKENDS:
        found = ladder._engine_class(row)
        assert f"{found.__module__}:{found.__name__}" == row.engine
    with pytest.raises((AttributeError, ImportError)):
        ladder._engine_class(SimpleNamespace(engine="allreduce_jit.engine.nvlink:Nonsense"))
