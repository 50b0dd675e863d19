"""``allreduce-jit tune`` with a stand-in for the clock: what it derives, keeps, refuses and hands to communicators."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers.fake_engines import fake_gpus, suite
from helpers.fakes import MACHINES, look
from helpers.kept import FACTS, ODD, TABLES
from helpers.schemas import violations

pytest.importorskip("hypothesis")
import hypothesis
from hypothesis import strategies as st

from allreduce_jit.cli import main as cli
from allreduce_jit.cli import tune
from allreduce_jit.communicator import Communicator
from allreduce_jit.engine.base import EngineConfig
from allreduce_jit.errors import InputError
from allreduce_jit.harness import ranks
from allreduce_jit.policy import measured_tables as tuned
from allreduce_jit.policy import nvlink
from allreduce_jit.policy.catalogue import WORLD_SIZES, nvlink_algorithms
from allreduce_jit.policy.operation import ITEMSIZE, all_reduce
from allreduce_jit.policy.tables import BLOCKS, KIB, MIB, NEVER, NVLINK_TABLES, STREAM_FROM, Band, bands_from_json, bands_to_json
from allreduce_jit.settings import Settings
from allreduce_jit.setup.ladder import climb

CPU = torch.device("cpu")
CACHE = "ALLREDUCE_JIT_CACHE_DIR"


def model(world_size, algorithm, dtype, nbytes, block):
    """µs of a made-up machine: one-shot starts sooner, two-shot sends less, streams overlap; one-shot hates fp32."""
    n = world_size
    start = {"one_shot": 1.5, "two_shot": 2.5, "two_shot_stream": 9.0}[algorithm]
    sent = (n - 1) * nbytes if algorithm == "one_shot" else 2 * (n - 1) / n * nbytes
    rate = {"one_shot": 400e3, "two_shot": 300e3, "two_shot_stream": 410e3}[algorithm]
    best = 64 if nbytes < MIB else 512
    slow = 2 if (dtype, algorithm) == ("float32", "one_shot") else 1
    return slow * (start + sent / rate) * (1 + 0.1 * (block != best))


class Clock:
    """In place of ``tune.Meter``."""

    staging_bytes = 32 << 20
    fingerprint = FACTS
    opened = 0

    def __init__(self, place, algorithm):
        assert Clock.opened == 0, "two engines at once take twice the staging memory"
        Clock.opened += 1
        self.world_size, self.algorithm, self.cache_dir = place.world_size, algorithm, Settings.from_env().cache_dir

    def __call__(self, dtype, nbytes, block):
        assert self.algorithm in tune.candidates(self.world_size, dtype, nbytes, self.staging_bytes)
        return model(self.world_size, self.algorithm, dtype, nbytes, block)

    def close(self):
        Clock.opened -= 1


def alone(world_size):
    """Rank 0 of many, the others answering as it does."""
    return SimpleNamespace(rank=0, world_size=world_size, gather=lambda value: [value] * world_size)


class NoV2:
    def __init__(self, place, algorithm):
        raise InputError("no NVLink")


# -- deriving


def times(world_size, dtype="bfloat16", us=model):
    return {
        size: {
            (name, block): us(world_size, name, dtype, size, block)
            for name in tune.candidates(world_size, dtype, size, 32 << 20)
            for block in BLOCKS
        }
        for size in tune.SIZES
    }


def test_edges_lie_where_the_fastest_changes_at_the_geometric_middle():
    measured = times(4)
    bands = tune.derive(4, measured)
    begin = 0
    for band in bands:
        inside = [size for size in measured if begin < size <= band.up_to]
        assert inside and all((band.algorithm, band.block) == min(measured[s], key=measured[s].get) for s in inside)
        if band.up_to != NEVER:
            size = inside[-1]
            assert band.up_to**2 <= size * (2 * size) < (band.up_to + 1) ** 2
        begin = band.up_to
    assert [(b.algorithm, b.block) for b in bands] == [("one_shot", 64), ("two_shot", 64), ("two_shot", 512),
                                                       ("two_shot_stream", 512)]  # fmt: skip


def test_each_dtype_has_its_own():
    assert [tune.derive(4, times(4, dtype))[0].algorithm for dtype in ITEMSIZE] == ["two_shot", "one_shot", "one_shot"]


@pytest.mark.parametrize(("gain", "bands"), [(0.0, 1), (0.019, 1), (0.03, 3)])
def test_a_tiny_gain_is_not_worth_a_band(gain, bands):
    measured = {size: {("one_shot", 64): 10.0, ("one_shot", 128): 11.0} for size in tune.SIZES}
    for size in tune.SIZES[5:8]:
        measured[size]["one_shot", 128] = 10.0 / (1 + gain)
    assert len(tune.derive(2, measured)) == bands


def test_of_equals_the_fastest():
    measured = {size: {("one_shot", block): 10 + block / 1000 for block in BLOCKS} for size in tune.SIZES}
    assert tune.derive(2, measured) == (Band(NEVER, "one_shot", 32),)


def test_no_way_back_to_an_algorithm_of_smaller_messages():
    measured = {s: {("one_shot", 64): 10.0, ("two_shot", 64): 20.0} for s in tune.SIZES}
    measured[tune.SIZES[3]]["two_shot", 64] = 1.0  # ten times as fast at one size, half as fast at all others
    assert tune.derive(4, measured) == (Band(NEVER, "one_shot", 64),)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_whatever_was_measured_makes_bands_that_keep_the_rules(world_size):
    @hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.randoms(use_true_random=False), st.sampled_from([4, 32, 1024]))
    def run(dice, staging_mb):
        measured = {
            size: {(name, block): dice.uniform(1, 3) for name in
                   tune.candidates(world_size, "float16", size, staging_mb << 20) for block in BLOCKS}
            for size in tune.SIZES
        }  # fmt: skip
        bands = tune.derive(world_size, measured)
        assert bands_from_json(world_size, bands_to_json(bands)) == bands
        if world_size == 2:  # one algorithm: nothing keeps it from the fastest
            for size, found in measured.items():
                band = next(band for band in bands if size <= band.up_to)
                assert found[band.algorithm, band.block] <= (1 + tune.MARGIN) * min(found.values())
        layout = nvlink.make_layout(world_size, staging_mb << 20, bands)
        for size in tune.SIZES:
            band = next(band for band in bands if size <= band.up_to)
            plan = nvlink.make_plan(all_reduce("float16", size // 2), world_size, bands, layout)
            assert (plan.algorithm, plan.block) == (band.algorithm, band.block), "there is room for what was measured"

    run()


def test_candidates_are_what_a_plan_can_pick():
    assert set(tune.candidates(4, "bfloat16", STREAM_FROM, 32 << 20)) == {"one_shot", "two_shot"}
    assert set(tune.candidates(4, "bfloat16", 2 * STREAM_FROM, 32 << 20)) == set(nvlink_algorithms(4))
    assert set(tune.candidates(4, "bfloat16", 64 * MIB, 32 << 20)) == {"two_shot_stream"}
    assert set(tune.candidates(2, "bfloat16", 64 * MIB, 4 << 20)) == {"one_shot"}


# -- rules


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_the_packages_tables_keep_the_rules(world_size):
    assert bands_from_json(world_size, bands_to_json(NVLINK_TABLES[world_size])) == NVLINK_TABLES[world_size]


def spoilt(i, **changes):
    bands = bands_to_json(ODD)
    bands[i] |= changes
    return bands


BAD_BANDS = [
    None, {}, [], "one_shot", [1], [{}], [bands_to_json(ODD)], bands_to_json(ODD)[:2],
    spoilt(0, more=1), spoilt(0, up_to=0), spoilt(0, up_to=-1), spoilt(0, up_to=1.5), spoilt(0, up_to=True),
    spoilt(0, up_to="1"), spoilt(0, up_to=None), spoilt(0, up_to=NEVER),
    spoilt(1, up_to=3 * KIB), spoilt(2, up_to=NEVER),
    spoilt(0, algorithm="two_shot_wide"), spoilt(0, algorithm=["one_shot"]), spoilt(0, algorithm="two_shot_stream"),
    spoilt(1, algorithm="two_shot_stream"), spoilt(2, algorithm="one_shot"), spoilt(0, algorithm=None),
    spoilt(0, block=0), spoilt(0, block=48), spoilt(0, block=1024), spoilt(0, block=64.0), spoilt(0, block="64"),
]  # fmt: skip


@pytest.mark.parametrize("value", BAD_BANDS, ids=lambda value: json.dumps(value)[:60])
def test_bands_that_break_a_rule_are_refused(value):
    with pytest.raises(ValueError, match="expected|none of|it takes"):
        bands_from_json(4, value)


def test_two_ranks_have_one_algorithm():
    with pytest.raises(ValueError, match="'two_shot' is none of one_shot"):
        bands_from_json(2, bands_to_json(ODD))


# -- on disk


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_kept_and_found_again(tmp_path, caplog):
    assert tuned.load(tmp_path, FACTS) is None
    file = tuned.save(tmp_path, FACTS, TABLES, microseconds={})
    found = tuned.load(tmp_path, FACTS)
    assert found["path"] == str(file) and tuned.tables_from_json(4, found["tables"]) == TABLES
    assert file.parent == tmp_path / "tuning" and os.listdir(file.parent) == [file.name]
    assert '"gpu": "NVIDIA H200"' in file.read_text() and '"up_to": 3072' in file.read_text()  # for human readers
    assert not warnings_of(caplog)


@pytest.mark.parametrize("fact", FACTS)
def test_another_machine_driver_or_version_has_another_table(tmp_path, fact):
    tuned.save(tmp_path, FACTS, TABLES)
    assert tuned.load(tmp_path, {**FACTS, fact: "other"}) is None


def test_no_gpu_has_none():
    assert tuned.fingerprint(look(MACHINES["cpu-ranks"], 0), 4) is None and tuned.load("/nowhere", None) is None


DAMAGE = {
    "truncated": lambda text: text[:-20],
    "empty": lambda text: "",
    "no text": lambda text: b"\xff\xfe\x00",
    "nested": lambda text: "[" * 100_000,
    "no object": lambda text: "[1]",
    "another format": lambda text: text.replace('"format": 1', '"format": 2'),
    "another machine": lambda text: text.replace("NVIDIA H200", "NVIDIA H20"),
    "no tables": lambda text: text.replace('"tables"', '"table"'),
    "a dtype missing": lambda text: text.replace('"float16"', '"float8"'),
    "bad block": lambda text: text.replace('"block": 256', '"block": 257'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_no_good_is_ignored_in_one_line(tmp_path, caplog, damage):
    file = tuned.save(tmp_path, FACTS, TABLES)
    after = DAMAGE[damage](file.read_text())
    assert after != file.read_text()
    file.write_bytes(after if isinstance(after, bytes) else after.encode())
    assert tuned.load(tmp_path, FACTS) is None
    (line,) = warnings_of(caplog)
    assert str(file) in line and "ignored" in line and "\n" not in line


def test_a_file_that_cannot_be_read_is_ignored(tmp_path, caplog):
    tuned.path(tmp_path, FACTS).mkdir(parents=True)
    assert tuned.load(tmp_path, FACTS) is None and len(warnings_of(caplog)) == 1


def test_a_write_that_fails_leaves_what_was_there(tmp_path, monkeypatch):
    file = tuned.save(tmp_path, FACTS, TABLES)
    before = file.read_text()

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        tuned.save(tmp_path, FACTS, {**TABLES, "float32": NVLINK_TABLES[4]})
    assert file.read_text() == before and os.listdir(file.parent) == [file.name]


# -- over ranks


def measures_and_keeps(place):
    """All ranks hold the same document; rank 0 has written the table; an engine built afterwards uses it."""
    document = tune.work(place, Clock)
    everyone = place.gather({**document, "seconds": 0})
    assert everyone == [everyone[0]] * place.world_size and document["ok"], document
    assert set(document["microseconds"]["float16"]["1M"]) == {
        f"{name}/{block}" for name in nvlink_algorithms(4) for block in BLOCKS
    }
    with fake_gpus(place.control):
        found = climb(place.control, CPU)
    assert found.tuning == document["path"] and tuned.tables_to_json(found.engine.config.tuned) == document["tables"]
    assert found.tuned["bfloat16"] == tune.derive(4, times(4))
    tuned.clear(Settings.from_env().cache_dir)
    place.barrier()


def without_v2(place):
    document = tune.work(place, NoV2)
    assert document == {"ok": False, "world_size": 4, "problem": "no NVLink"}
    assert tune.render(document) == "4 ranks: no NVLink"


def rank_0s_table_counts_for_all(place):
    """Every rank has a cache of its own here; only rank 0's is asked."""
    mine = os.environ[CACHE] + f"/{place.rank}"
    saved, os.environ[CACHE] = os.environ[CACHE], mine
    tables = TABLES if place.rank == 0 else dict.fromkeys(ITEMSIZE, NVLINK_TABLES[4])
    file = tuned.save(mine, FACTS, tables)
    with fake_gpus(place.control):
        found = climb(place.control, CPU)
        assert found.engine.config.tuned == found.tuned == TABLES
        assert found.tuning == place.gather(str(file))[0]
        with Communicator(place.control, CPU) as comm:
            assert comm.describe().tuning == found.tuning
        few = climb(place.control, CPU, max_ctas=16)
        assert few.tuned is few.tuning is few.engine.config.tuned is None
        given = climb(place.control, CPU, tables=dict.fromkeys(ITEMSIZE, ODD))
        assert given.engine.config.tuned == dict.fromkeys(ITEMSIZE, ODD) and given.tuning is None
        for rank in (0, 2):
            if place.rank == rank:
                os.environ["ALLREDUCE_JIT_TUNING"] = "off"
            off = climb(place.control, CPU)
            assert off.tuned is off.tuning is off.engine.config.tuned is None
            os.environ.pop("ALLREDUCE_JIT_TUNING", None)
    with fake_gpus(place.control, "a100-pcie-x4"), Communicator(place.control, CPU) as comm:
        assert comm.describe().tuning is None  # not V2
    if place.rank == 0:
        tuned.clear(mine)
    with fake_gpus(place.control), Communicator(place.control, CPU) as comm:
        assert comm.describe().tuning == "package"
    os.environ[CACHE] = saved


def what_rank_0_sends_is_checked_on_all_ranks(place):
    real = tuned.load
    for tables in (None, {}, {**tuned.tables_to_json(TABLES), "float16": spoilt(0, block=33)}):
        tuned.load = lambda *_, tables=tables: {"path": "/sent", "tables": tables}
        try:
            with fake_gpus(place.control):
                found = climb(place.control, CPU)
        finally:
            tuned.load = real
        assert place.gather((found.tuned, found.tuning, found.engine.config.tuned)) == [(None, None, None)] * 4


CASES = [measures_and_keeps, without_v2, rank_0s_table_counts_for_all, what_rank_0_sends_is_checked_on_all_ranks]


def test_four_ranks(tmp_path, monkeypatch):
    monkeypatch.setenv(CACHE, str(tmp_path))
    assert len(ranks.run(suite, CASES, cpu=4, deadline=200).value) == len(CASES)


def test_a_disk_that_is_full_is_a_problem_not_a_crash(tmp_path, monkeypatch):
    (tmp_path / "tuning").write_text("in the way")
    monkeypatch.setenv(CACHE, str(tmp_path))
    document = tune.work(alone(2), Clock)
    assert not document["ok"] and "could not be kept" in document["problem"] and document["tables"]
    assert document["problem"] in tune.render(document)
    assert "calls with a norm are not timed" in tune.render(document)


# -- engines


def test_an_engine_has_a_table_per_dtype_and_room_for_all():
    from allreduce_jit.engine.nvlink import NvlinkEngine

    config = EngineConfig(0, 4, torch.device("cuda", 0), "sm_90", True, False, Settings(), tuned=TABLES)
    engine = NvlinkEngine(config)
    assert list(engine.layout.regions) == list(nvlink_algorithms(4)) and engine.layout.nbytes <= 32 << 20
    shapes = {dtype: (p := engine.plan(all_reduce(dtype, 1000))) and (p.algorithm, p.block) for dtype in ITEMSIZE}
    assert shapes == {"float32": ("two_shot", 128), "float16": ("two_shot", 128), "bfloat16": ("one_shot", 64)}
    untouched = NvlinkEngine(replace(config, tuned=None))
    assert untouched.plan(all_reduce("float32", 1000)).algorithm == "one_shot"


# -- the command line


def test_one_run_for_every_number_of_gpus(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    started = []

    def here(work, meter, gpus, deadline):
        assert meter is tune.Meter and deadline == 600
        started.append(gpus)
        return ranks.Outcome(0, work(alone(gpus), NoV2 if gpus == 3 else Clock))

    monkeypatch.setattr(ranks, "run", here)
    assert cli.main(["tune"]) == 1  # three have no table
    out = capsys.readouterr().out
    assert started == [2, 3] and "3 ranks: no NVLink" in out and "communicators built from now on use it" in out
    (file,) = tuned.entries(tmp_path)
    assert str(file) in out and "one_shot" in out
    assert cli.main(["tune", "--gpus", "2", "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert document["ok"] and document["path"] == str(file) and started == [2, 3, 2]


def test_what_is_printed_keeps_to_the_schema(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path))
    document, none = tune.work(alone(4), Clock), tune.work(alone(4), NoV2)
    assert violations("tune", json.loads(json.dumps([document, none]))) == []
    assert violations("tune", [none | {"ok": True}]) and violations("tune", [document | {"tables": {"float16": [{"up_to": 5}]}}])


def test_torchruns_ranks_are_one_run(monkeypatch):
    torchrun = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in torchrun.items():
        monkeypatch.setenv(name, value)
    assert tune._world_sizes(None) == [None]


def test_without_gpus(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.main(["tune"]) == 2
    assert "this machine shows 1 CUDA GPU\n" in capsys.readouterr().err


def test_the_cache_commands_know_the_tables(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path))
    file = tuned.save(tmp_path, FACTS, TABLES)
    (file.parent / ".tmp-left").write_text("of a writer that died")
    (file.parent / "mine.txt").write_text("not ours")
    assert cli.main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    assert "\n1 table of allreduce-jit tune\n" in out and str(file) in out
    assert cli.main(["cache", "clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tables_removed"] == 1
    assert os.listdir(file.parent) == ["mine.txt"]
    assert cli.main(["cache", "clear"]) == 0
    assert "0 tables of allreduce-jit tune removed" in capsys.readouterr().out


# -- the meter, but for the GPU


def test_the_meter_times_the_plan_it_was_asked_for(monkeypatch):
    """On a stand-in engine: the plan's algorithm, block and size; private tables; closed at the end."""
    seen = {}
    place = SimpleNamespace(world_size=4, rank=0, device=CPU, control="control", synchronize=lambda: None,
                            gather=lambda value: [value])  # fmt: skip

    def fake_climb(group, device, highest, lowest, tables):
        layout = nvlink.make_layout(4, 32 << 20, tables["float16"])
        engine = SimpleNamespace(layout=layout, closed=0)
        engine.run = lambda spec, plan, x, out: seen.setdefault("calls", []).append((plan, x.dtype, x.numel(), out.numel()))
        engine.all_reduce = lambda x, out: seen.setdefault("barrier", []).append((x.numel(), out.numel()))
        engine.check = lambda: seen.setdefault("checked", True)
        engine.close = lambda: seen.setdefault("closed", True)
        seen["tables"] = tables
        return SimpleNamespace(engine=engine, settings=Settings(), capabilities=[look(MACHINES["h200-x4"], 0)])

    def replays(place, load, graph, repetitions, warmup, barrier):
        load.refill(), load.burst(), barrier()
        return [3.0, 1.0, 2.0]

    monkeypatch.setattr(tune, "climb", fake_climb)
    monkeypatch.setattr(tune.timing, "record", lambda load: "graph")
    monkeypatch.setattr(tune.timing, "replays", replays)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    meter = tune.Meter(place, "two_shot_stream")
    assert meter("float16", 1 << 20, 128) == 2.0
    assert {(p.algorithm, p.block, dtype, n, m) for p, dtype, n, m in seen["calls"]} == {
        ("two_shot_stream", 128, torch.float16, 1 << 19, 1 << 19)
    }
    meter.close()
    assert seen["barrier"] == [(1, 1)] and seen["checked"] and seen["closed"] and meter.fingerprint == FACTS
    assert [band.algorithm for band in seen["tables"]["float32"]] == ["one_shot", "one_shot", "two_shot", "two_shot_stream"]


def test_the_meter_says_why_there_is_no_v2(monkeypatch):
    reasons = (SimpleNamespace(text="no NVLink from 0 to 1"),)
    found = SimpleNamespace(engine=None, verdict=SimpleNamespace(reasons=reasons))
    monkeypatch.setattr(tune, "climb", lambda *_, **__: found)
    with pytest.raises(InputError, match="3 ranks cannot have it here: no NVLink from 0 to 1"):
        tune.Meter(SimpleNamespace(world_size=3, control=None, device=CPU), "two_shot")
