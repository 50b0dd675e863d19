"""``allreduce-jit tune`` with a stand-in for the clock: what it derives, keeps, refuses and hands to communicators."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from helpers.fake_engines import FakeEngine, fake_gpus, raised, suite
from helpers.fakes import MACHINES, look
from helpers.kept import FACTS, HOST_FACTS, HOST_TABLES_KEPT, LEGACY_FACTS, ODD, TABLES
from helpers.schemas import violations

pytest.importorskip("hypothesis")
import hypothesis
from hypothesis import strategies as st

from allreduce_jit.cli import main as cli
from allreduce_jit.cli import tune
from allreduce_jit.communicator import Communicator
from allreduce_jit.engine.base import EngineConfig
from allreduce_jit.engine.fallback import TorchEngine
from allreduce_jit.errors import InputError
from allreduce_jit.harness import ranks
from allreduce_jit.policy import backends, host, nvlink, p2p
from allreduce_jit.policy import measured_tables as tuned
from allreduce_jit.policy.catalogue import WORLD_SIZES, nvlink_algorithms
from allreduce_jit.policy.host import HOST_TABLES
from allreduce_jit.policy.operation import ITEMSIZE, all_reduce
from allreduce_jit.policy.tables import BLOCKS, KIB, MIB, NEVER, NVLINK_TABLES, P2P_TABLES, AlgorithmBand, Band, bands_to_json
from allreduce_jit.policy.tuning import HOST, LEGACY, V2
from allreduce_jit.settings import Settings
from allreduce_jit.setup.ladder import climb

CPU = torch.device("cpu")
CACHE = "ALLREDUCE_JIT_CACHE_DIR"


def model(world_size, dtype, nbytes, algorithm, block):
    """µs of a made-up machine: one-shot starts sooner, two-shot sends less, streams overlap; one-shot hates fp32."""
    n = world_size
    start = {"one_shot": 1.5, "two_shot": 2.5, "two_shot_stream": 9.0}[algorithm]
    sent = (n - 1) * nbytes if algorithm == "one_shot" else 2 * (n - 1) / n * nbytes
    rate = {"one_shot": 400e3, "two_shot": 300e3, "two_shot_stream": 410e3}[algorithm]
    best = 64 if nbytes < MIB else 512
    slow = 2 if (dtype, algorithm) == ("float32", "one_shot") else 1
    return slow * (start + sent / rate) * (1 + 0.1 * (block != best))


def host_model(world_size, dtype, nbytes, algorithm, block, channels):
    """The same through host memory: more channels cost more to start, and fewer cannot have as many bytes on their way."""
    first = algorithm == "host_one_shot"
    moved = (world_size - 1) * nbytes if first else 2 * (world_size - 1) / world_size * nbytes
    slow = 2 if (dtype, first) == ("float32", True) else 1
    return slow * (2.5 if first else 6.0 + channels / 500) + moved / min(50e3, channels * 400.0)


def legacy_model(world_size, dtype, nbytes, algorithm):
    """The same over PCIe: two-shot sends less, NCCL has the best rate; fp32 never pays there."""
    start, sent, rate = {
        "legacy_one_shot": (9.0, world_size - 1, 20e3),
        "legacy_two_shot": (16.0, 2 * (world_size - 1) / world_size, 20e3),
        "nccl": (40.0, 2 * (world_size - 1) / world_size, 10e3 if dtype == "float32" else 24e3),
    }[algorithm]
    return start + sent * nbytes / rate


class Clock:
    """In place of ``tune.Meter``."""

    staging_bytes = 32 << 20
    opened = 0
    of, fingerprint, model = V2, FACTS, staticmethod(model)

    @classmethod
    def tunable(cls, place):
        assert Clock.opened == 0
        return cls.of

    def __init__(self, place, tunable, algorithm):
        assert Clock.opened == 0, "two engines at once take twice the staging memory"
        assert tunable is self.of
        Clock.opened += 1
        self.world_size, self.algorithm, self.cache_dir = place.world_size, algorithm, Settings.from_env().cache_dir

    def __call__(self, dtype, nbytes, choice):
        assert self.algorithm in self.of.candidates(self.world_size, dtype, nbytes, self.staging_bytes)
        assert choice in self.of.choices(self.world_size, self.algorithm)
        return self.model(self.world_size, dtype, nbytes, *choice)

    def close(self):
        Clock.opened -= 1


class HostClock(Clock):
    of, fingerprint, model = HOST, HOST_FACTS, staticmethod(host_model)


class LegacyClock(Clock):
    of, fingerprint, model = LEGACY, LEGACY_FACTS, staticmethod(legacy_model)


CLOCKS = {V2: Clock, LEGACY: LegacyClock, HOST: HostClock}
EACH = pytest.mark.parametrize("tunable", CLOCKS, ids=lambda tunable: tunable.path.short)


def alone(world_size):
    """Rank 0 of many, the others answering as it does."""
    return SimpleNamespace(rank=0, world_size=world_size, gather=lambda value: [value] * world_size)


class NoTables:
    @staticmethod
    def tunable(place):
        raise InputError("no tables")


# -- deriving


def tried(tunable, world_size, dtype, size, staging_bytes=32 << 20):
    names = tunable.candidates(world_size, dtype, size, staging_bytes)
    return [choice for name in names for choice in tunable.choices(world_size, name)]


def times(tunable, world_size, dtype="bfloat16"):
    us = CLOCKS[tunable].model
    return {size: {c: us(world_size, dtype, size, *c) for c in tried(tunable, world_size, dtype, size)} for size in tune.SIZES}


def derived(world_size, times, tunable=V2):
    return tune.derive(tunable, world_size, times)


def test_edges_lie_where_the_fastest_changes_at_the_geometric_middle():
    measured = times(V2, 4)
    bands = derived(4, measured)
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
    assert [derived(4, times(V2, 4, dtype))[0].algorithm for dtype in ITEMSIZE] == ["two_shot", "one_shot", "one_shot"]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_bands_of_path_host_are_the_fastest_of_a_model(world_size):
    """Whose best number of channels grows with the size, within what the package's table has for the algorithm and beyond."""
    for dtype in ITEMSIZE:
        measured = times(HOST, world_size, dtype)
        bands = derived(world_size, measured, HOST)
        assert len({band.algorithm for band in bands}) == 2 and all(type(band) is host.HostBand for band in bands)
        for size, found in measured.items():
            band = next(band for band in bands if size <= band.up_to)
            us = found[band.algorithm, band.block, band.channels]
            assert us <= (1 + 2 * tune.MARGIN) * min(found.values()), (size, band)
    one_shot_ends = {
        dtype: max(b.up_to for b in derived(4, times(HOST, 4, dtype), HOST) if b.algorithm == "host_one_shot")
        for dtype in ITEMSIZE
    }
    assert one_shot_ends["float32"] < one_shot_ends["bfloat16"]


def test_bands_of_legacy_are_where_two_shot_and_nccl_take_over():
    """A made-up machine has one-shot up to 93 KB of 4 ranks and NCCL from 2 MB on; fp32 stays with two-shot."""
    tables = {dtype: derived(4, times(LEGACY, 4, dtype), LEGACY) for dtype in ITEMSIZE}
    names = {dtype: [band.algorithm for band in bands] for dtype, bands in tables.items()}
    assert names == dict.fromkeys(ITEMSIZE, ["legacy_one_shot", "legacy_two_shot", "nccl"]) | {
        "float32": ["legacy_one_shot", "legacy_two_shot"]
    }
    crossing = 7.0 / (3 - 1.5) * 20e3  # where one-shot and two-shot take as long
    hand_over = 24.0 / (1.5 / 20e3 - 1.5 / 24e3)
    for bands in tables.values():
        assert crossing / 2 <= bands[0].up_to <= crossing * 2
    assert hand_over / 2 <= tables["bfloat16"][1].up_to <= hand_over * 2
    assert p2p.make_limits(4, False, tables["bfloat16"]) == p2p.Limits(
        *(band.up_to + i for band, i in zip(tables["bfloat16"], (1, 0)))
    )


@pytest.mark.parametrize(("gain", "bands"), [(0.0, 1), (0.019, 1), (0.03, 3)])
def test_a_tiny_gain_is_not_worth_a_band(gain, bands):
    measured = {size: {("one_shot", 64): 10.0, ("one_shot", 128): 11.0} for size in tune.SIZES}
    for size in tune.SIZES[5:8]:
        measured[size]["one_shot", 128] = 10.0 / (1 + gain)
    assert len(derived(2, measured)) == bands


def test_of_equals_the_fastest():
    measured = {size: {("one_shot", block): 10 + block / 1000 for block in BLOCKS} for size in tune.SIZES}
    assert derived(2, measured) == (Band(NEVER, "one_shot", 32),)


def test_no_way_back_to_an_algorithm_of_smaller_messages():
    measured = {s: {("one_shot", 64): 10.0, ("two_shot", 64): 20.0} for s in tune.SIZES}
    measured[tune.SIZES[3]]["two_shot", 64] = 1.0  # ten times as fast at one size, half as fast at all others
    assert derived(4, measured) == (Band(NEVER, "one_shot", 64),)


@EACH
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_whatever_was_measured_makes_bands_that_keep_the_rules(world_size, tunable):
    @hypothesis.settings(max_examples=30, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.randoms(use_true_random=False), st.sampled_from([4, 32, 1024]))
    def run(dice, staging_mb):
        staging_bytes = staging_mb << 20
        measured = {
            size: {choice: dice.uniform(1, 3) for choice in tried(tunable, world_size, "float16", size, staging_bytes)}
            for size in tune.SIZES
        }
        bands = derived(world_size, measured, tunable)
        assert tunable.bands_from_json(world_size, bands_to_json(bands)) == bands
        if len(tunable.algorithms(world_size)) == 1:  # nothing keeps it from the fastest
            for size, found in measured.items():
                band = next(band for band in bands if size <= band.up_to)
                assert found[band.algorithm, band.block] <= (1 + tune.MARGIN) * min(found.values())
        if tunable is LEGACY:  # test_plan has its plans of any bands
            return
        policy = {V2: nvlink, HOST: host}[tunable]
        layout = (
            nvlink.make_layout(world_size, staging_bytes, bands) if tunable is V2 else host.make_layout(world_size, staging_bytes)
        )
        for size in tune.SIZES:
            band = next(band for band in bands if size <= band.up_to)
            plan = policy.make_plan(all_reduce("float16", size // 2), world_size, bands, layout)
            assert (plan.algorithm, plan.block) == (band.algorithm, band.block), "there is room for what was measured"

    run()


# -- on disk


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_kept_and_found_again(tmp_path, caplog):
    assert tuned.load(tmp_path, FACTS) is None
    file = tuned.save(tmp_path, FACTS, TABLES, microseconds={})
    found = tuned.load(tmp_path, FACTS)
    assert found["path"] == str(file) and tuned.tables_from_json(V2, 4, found["tables"]) == TABLES
    assert file.parent == tmp_path / "tuning" and os.listdir(file.parent) == [file.name]
    assert '"gpu": "NVIDIA H200"' in file.read_text() and '"up_to": 3072' in file.read_text()  # for human readers
    assert not warnings_of(caplog)


def test_paths_have_files_of_their_own(tmp_path, caplog):
    """V2's is where it was before there were others: its fingerprint names no path."""
    assert "path" not in FACTS and HOST_FACTS == {"path": "host", **tuned.fingerprint(look(MACHINES["l40s-x4-vm"], 0), 4)}
    caps = look(MACHINES["h200-x4"], 0)
    mine = tuned.fingerprint(caps, 4, HOST.path)
    files = {"v2": tuned.save(tmp_path, FACTS, TABLES), "host": tuned.save(tmp_path, mine, HOST_TABLES_KEPT)}
    found = tuned.load_all(tmp_path, caps, 4)
    assert {path: one["path"] for path, one in found.items()} == {path: str(file) for path, file in files.items()}
    assert tuned.tables_from_json(HOST, 4, found["host"]["tables"]) == HOST_TABLES_KEPT
    files["v2"].write_text(files["host"].read_text())  # a name that is V2's, and what is in it is not
    assert tuned.load_all(tmp_path, caps, 4).keys() == {"host"} and "ignored" in warnings_of(caplog)[0]
    files["host"].write_text(files["host"].read_text().replace('"channels": 96', '"channels": 4096'))
    assert tuned.load_all(tmp_path, caps, 4) == {}
    assert "4096 channels: expected multiples of 4, the warps of a block, up to 512" in warnings_of(caplog)[-1]


@pytest.mark.parametrize("fact", FACTS)
def test_another_machine_driver_or_version_has_another_table(tmp_path, fact):
    tuned.save(tmp_path, FACTS, TABLES)
    assert tuned.load(tmp_path, {**FACTS, fact: "other"}) is None


def test_no_gpu_has_none():
    caps = look(MACHINES["cpu-ranks"], 0)
    assert (
        tuned.fingerprint(caps, 4) is None and tuned.load("/nowhere", None) is None and tuned.load_all("/nowhere", caps, 4) == {}
    )


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
    "another path": lambda text: text.replace('"fingerprint": {', '"fingerprint": {"path": "host",'),
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
    assert found.tuned["bfloat16"] == derived(4, times(V2, 4)) and document["rung"] == "v2"
    tuned.clear(Settings.from_env().cache_dir)
    place.barrier()


def measures_path_host(place):
    """Where the ladder ends there; V2's table and path host's do not know of each other."""
    document = tune.work(place, HostClock)
    assert document["ok"] and document["rung"] == "host" and document["fingerprint"]["path"] == "host", document
    assert place.gather(document["tables"]) == [document["tables"]] * 4
    for machine, path in (("l40s-x4-vm", document["path"]), ("a100-pcie-x4", None), ("h200-x4", None)):
        with fake_gpus(place.control, machine):
            found = climb(place.control, CPU)
        assert found.tuning == path, machine
    with fake_gpus(place.control, "l40s-x4-vm"):
        found = climb(place.control, CPU)
        assert tuned.tables_to_json(found.engine.config.tuned) == document["tables"]
        assert found.engine.config.tuned["bfloat16"] == derived(4, times(HOST, 4), HOST)
        assert climb(place.control, CPU, max_ctas=16).tuned is None
        with Communicator(place.control, CPU) as comm:
            assert comm.describe().tuning == document["path"]
        os.environ["ALLREDUCE_JIT_TUNING"] = "off"
        with Communicator(place.control, CPU) as comm:
            assert comm.describe().tuning == "package"
        del os.environ["ALLREDUCE_JIT_TUNING"]
    tuned.clear(Settings.from_env().cache_dir)
    place.barrier()


def measures_legacy(place):
    """Where the ladder ends there: other sizes go to NCCL, and NCCL is set up if any dtype has some."""
    document = tune.work(place, LegacyClock)
    assert document["ok"] and document["rung"] == "legacy" and document["fingerprint"]["path"] == "legacy", document
    with fake_gpus(place.control, "a100-pcie-x4"):
        found = climb(place.control, CPU)
        assert found.tuning == document["path"] and tuned.tables_to_json(found.engine.config.tuned) == document["tables"]
        assert [band["algorithm"] for band in document["tables"]["float32"]] == ["legacy_one_shot", "legacy_two_shot"]
        with Communicator(place.control, CPU) as comm:
            assert comm.describe().tuning == document["path"]
    tuned.clear(Settings.from_env().cache_dir)
    place.barrier()


def nccl_is_set_up_before_a_capture_if_any_dtype_needs_it(place):
    """The first call that goes there may be captured, and NCCL's first collective must not be."""
    for handed in ((), ("float16",), ("float32", "float16", "bfloat16")):
        takes = FakeEngine.takes
        FakeEngine.takes = lambda self, spec, handed=handed: spec.dtype not in handed
        try:
            with fake_gpus(place.control, "l40s-x4"), mock.patch.object(TorchEngine, "connect") as connect:
                with Communicator(place.control, CPU):
                    assert connect.called == bool(handed), handed
        finally:
            FakeEngine.takes = takes


def without_tables(place):
    document = tune.work(place, NoTables)
    assert document == {"ok": False, "world_size": 4, "problem": "no tables"}
    assert tune.render(document) == "4 ranks: no tables"


def the_path_to_measure_is_where_the_ladder_ends(place):
    v2_fails = {("v2", "compile"): OSError("no compiler today")} if place.rank == 1 else {}
    for machine, fails, expected in (("h200-x4", {}, V2), ("l40s-x4-vm", {}, HOST), ("a100-pcie-x4", {}, LEGACY),
                                     ("h200-x4", v2_fails, LEGACY)):  # fmt: skip
        with fake_gpus(place.control, machine, fails) as built:
            assert tune.Meter.tunable(place) is expected
        assert built and all(engine.closed for engine in built)
    os.environ["ALLREDUCE_JIT_PATH"] = "torch"
    with fake_gpus(place.control) as built:
        words = "nothing to tune: 4 ranks take path torch.distributed here", "ALLREDUCE_JIT_PATH=torch"
        raised(InputError, lambda: tune.Meter.tunable(place), *words)
    os.environ.pop("ALLREDUCE_JIT_PATH")
    assert not built


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
        assert comm.describe().tuning == "package"  # legacy has tables of its own
    if place.rank == 0:
        tuned.clear(mine)
    with fake_gpus(place.control), Communicator(place.control, CPU) as comm:
        assert comm.describe().tuning == "package"
    os.environ[CACHE] = saved


def what_rank_0_sends_is_checked_on_all_ranks(place):
    real = tuned.load
    good = tuned.tables_to_json(TABLES)
    for tables in (None, {}, good | {"float16": [good["float16"][0] | {"block": 33}, *good["float16"][1:]]}):
        tuned.load = lambda *_, tables=tables: {"path": "/sent", "tables": tables}
        try:
            with fake_gpus(place.control):
                found = climb(place.control, CPU)
        finally:
            tuned.load = real
        assert place.gather((found.tuned, found.tuning, found.engine.config.tuned)) == [(None, None, None)] * 4


CASES = [
    measures_and_keeps,
    measures_path_host,
    measures_legacy,
    nccl_is_set_up_before_a_capture_if_any_dtype_needs_it,
    without_tables,
    the_path_to_measure_is_where_the_ladder_ends,
    rank_0s_table_counts_for_all,
    what_rank_0_sends_is_checked_on_all_ranks,
]


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


def test_as_text():
    document = {
        "ok": True, "world_size": 4, "rung": "host", "problem": None, "path": "/f.json", "fingerprint": HOST_FACTS,
        "tables": tuned.tables_to_json(HOST_TABLES_KEPT), "microseconds": {}, "seconds": 1.25,
    }  # fmt: skip
    text = tune.render(document)
    head, columns, *rows = [" ".join(line.split()) for line in text.splitlines()]
    assert head.startswith("4 ranks, path host, NVIDIA L40S, driver ")
    assert columns == "dtype from byte to byte algorithm block channels"
    assert "float32 1 10000 host_one_shot 32 64" in rows and "float32 10001 host_two_shot 128 96" in [
        row.replace(" - ", " ") for row in rows
    ]
    assert "norm" not in text and "kept in /f.json" in text


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


def test_path_hosts_engine_has_a_table_per_dtype():
    from allreduce_jit.engine.host import HostEngine

    config = EngineConfig(0, 4, torch.device("cuda", 0), "sm_90", False, False, Settings(), tuned=HOST_TABLES_KEPT)
    engine = HostEngine(config)
    plans = {dtype: engine.plan(all_reduce(dtype, 1 << 20)) for dtype in ITEMSIZE}
    warps = {dtype: (plan.algorithm, plan.grid * plan.block // 32) for dtype, plan in plans.items()}
    assert warps == {"float32": ("host_two_shot", 96), "float16": ("host_one_shot", 256), "bfloat16": ("host_two_shot", 512)}
    assert HostEngine(replace(config, tuned=None)).bands == dict.fromkeys(ITEMSIZE, HOST_TABLES[4])


def test_legacys_engine_hands_over_what_was_measured():
    """The sizes of each dtype, but where nothing may be handed over."""
    from allreduce_jit.engine.p2p import P2PEngine

    bands = {"float32": (AlgorithmBand(NEVER, "legacy_two_shot"),), "float16": (AlgorithmBand(80 * KIB, "legacy_one_shot"),
             AlgorithmBand(4 * MIB, "legacy_two_shot"), AlgorithmBand(NEVER, "nccl"))}  # fmt: skip
    config = EngineConfig(0, 4, torch.device("cuda", 0), "sm_80", False, False, Settings(), tuned=bands)

    def picked(engine, dtype, nbytes):
        plan = engine.plan(all_reduce(dtype, nbytes // ITEMSIZE[dtype]))
        return plan.path, plan.algorithm

    engine, alone = P2PEngine(config), P2PEngine(replace(config, deterministic=True))
    assert picked(engine, "float32", 1024) == picked(engine, "float32", 64 * MIB) == ("legacy", "legacy_two_shot")
    assert picked(engine, "float16", 80 * KIB) == ("legacy", "legacy_one_shot")
    assert picked(engine, "float16", 80 * KIB + 2) == picked(engine, "float16", 4 * MIB) == ("legacy", "legacy_two_shot")
    assert picked(engine, "float16", 4 * MIB + 2) == ("torch.distributed", "nccl")
    assert picked(alone, "float16", 64 * MIB) == ("legacy", "legacy_two_shot")
    assert picked(engine, "bfloat16", P2P_TABLES[4].pcie_limit + 2) == ("torch.distributed", "nccl"), "the package's"


# -- the command line


def test_one_run_for_every_number_of_gpus(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    started = []

    def here(work, meter, gpus, deadline):
        assert meter is tune.Meter and deadline == 600
        started.append(gpus)
        return ranks.Outcome(0, work(alone(gpus), NoTables if gpus == 3 else Clock))

    monkeypatch.setattr(ranks, "run", here)
    assert cli.main(["tune"]) == 1  # three have no table
    out = capsys.readouterr().out
    assert started == [2, 3] and "3 ranks: no tables" in out and "communicators built from now on use it" in out
    (file,) = tuned.entries(tmp_path)
    assert str(file) in out and "one_shot" in out
    assert cli.main(["tune", "--gpus", "2", "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert document["ok"] and document["path"] == str(file) and started == [2, 3, 2]


def test_what_is_printed_keeps_to_the_schema(monkeypatch, tmp_path):
    monkeypatch.setenv(CACHE, str(tmp_path))
    document, legacy, host, none = (tune.work(alone(4), meter) for meter in (Clock, LegacyClock, HostClock, NoTables))
    assert violations("tune", json.loads(json.dumps([document, legacy, host, none]))) == []
    assert violations("tune", [legacy | {"rung": "v2"}]) and violations("tune", [document | {"rung": "legacy"}])
    assert {choice.count("/") for found in host["microseconds"].values() for us in found.values() for choice in us} == {2}
    del host["tables"]["float16"][0]["channels"]
    assert violations("tune", [host]), "a band of path host has channels"
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


@pytest.fixture
def meter_of(monkeypatch):
    """Builds a meter on a stand-in engine, of 4 ranks; what happened is in ``seen``."""
    seen = {"calls": [], "timed": 0}
    place = SimpleNamespace(world_size=4, rank=0, device=CPU, control="control", synchronize=lambda: None,
                            gather=lambda value: [value])  # fmt: skip

    def fake_climb(group, device, highest, lowest, tables):
        assert highest is lowest
        of = backends.of(highest).tunable
        layouts = {V2: lambda: nvlink.make_layout(4, 32 << 20, tables["float16"]), HOST: lambda: host.make_layout(4, 32 << 20),
                   LEGACY: lambda: p2p.make_layout(4, 32 << 20)}  # fmt: skip
        engine = SimpleNamespace(layout=layouts[of](), path=highest.value)
        engine.run = lambda spec, plan, x, out: seen["calls"].append((plan, x.dtype, x.numel(), out.numel()))
        engine.all_reduce = lambda x, out: seen.setdefault("barrier", []).append((x.numel(), out.numel()))
        engine.check = lambda: seen.setdefault("checked", True)
        engine.close = lambda: seen.setdefault("closed", True)
        seen["tables"] = tables
        machine = {V2: "h200-x4", HOST: "l40s-x4-vm", LEGACY: "a100-pcie-x4"}[of]
        return SimpleNamespace(engine=engine, settings=Settings(), capabilities=[look(MACHINES[machine], 0)])

    def replays(place, load, graph, repetitions, warmup, barrier):
        seen["timed"] += 1
        load.refill(), load.burst(), barrier()
        return [3.0, 1.0, 2.0]

    monkeypatch.setattr(tune, "climb", fake_climb)
    monkeypatch.setattr(tune.timing, "record", lambda load: "graph")
    monkeypatch.setattr(tune.timing, "replays", replays)
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.inference_mode(False))
    return lambda tunable, algorithm: (tune.Meter(place, tunable, algorithm), seen)


def test_the_meter_times_the_plan_it_was_asked_for(meter_of):
    """The plan's algorithm, block and size; private tables; closed at the end."""
    meter, seen = meter_of(V2, "two_shot_stream")
    assert meter("float16", 1 << 20, ("two_shot_stream", 128)) == 2.0
    assert {(p.algorithm, p.block, dtype, n, m) for p, dtype, n, m in seen["calls"]} == {
        ("two_shot_stream", 128, torch.float16, 1 << 19, 1 << 19)
    }
    meter.close()
    assert seen["barrier"] == [(1, 1)] and seen["checked"] and seen["closed"] and meter.fingerprint == FACTS
    assert [band.algorithm for band in seen["tables"]["float32"]] == ["one_shot", "one_shot", "two_shot", "two_shot_stream"]


def test_the_meter_of_path_host(meter_of):
    """As many blocks as the channels asked for make; choices that make one plan are one measurement."""
    meter, seen = meter_of(HOST, "host_two_shot")
    for channels in (64, 96, 512):
        meter("bfloat16", 1 << 20, ("host_two_shot", 128, channels))
    assert [plan.grid for plan in dict.fromkeys(plan for plan, *_ in seen["calls"])] == [16, 24, 128] and seen["timed"] == 3
    for channels in (64, 96, 512):
        assert meter("bfloat16", 1 << 10, ("host_two_shot", 128, channels)) == 2.0
    assert seen["timed"] == 4, "1 KB is one chunk of each part"
    meter("float16", 1 << 10, ("host_two_shot", 128, 64))
    assert seen["timed"] == 5, "another dtype is another call"
    assert meter.fingerprint == HOST_FACTS
    assert [band.algorithm for band in seen["tables"]["float32"]] == ["host_one_shot", "host_two_shot"]


def test_the_meter_of_legacy_times_nccl_as_communicators_call_it(meter_of, monkeypatch):
    """Through the same engine, set up before the capture, closed before the kernels' engine; a refusal where it cannot be set up."""
    meter, seen = meter_of(LEGACY, "nccl")
    events, problem = [], None

    def torch_engine(group, device, ladder, *, deterministic, may_have_nccl):
        assert (group, device, deterministic, may_have_nccl) == ("control", CPU, False, True) and ladder.engine is meter.engine
        call = lambda x, out: events.append(("call", x.numel(), out.numel(), x is out))  # noqa: E731
        return SimpleNamespace(connect=lambda: events.append("connect"), all_reduce=call, problem=problem,
                               close=lambda: events.append(("close", "closed" in seen)))  # fmt: skip

    monkeypatch.setattr(tune.service, "torch_engine", torch_engine)
    assert meter("float16", 1 << 20, ("nccl",)) == meter("float16", 1 << 19, ("nccl",)) == 2.0
    assert events[0] == "connect" and set(events[1:]) == {("call", 1 << 19, 1 << 19, False), ("call", 1 << 18, 1 << 18, False)}
    assert not seen["calls"] and seen["barrier"] == [(1, 1)] * 2 and meter.fingerprint == LEGACY_FACTS
    meter("float16", 1 << 20, ("legacy_two_shot",))
    assert seen["calls"] and seen["calls"][0][0].algorithm == "legacy_two_shot"
    meter.close()
    assert events[-1] == ("close", False) and seen["closed"]
    problem, (meter, _) = "rank 1: no memory", meter_of(LEGACY, "nccl")
    with pytest.raises(InputError, match="beside NCCL, which cannot be set up: rank 1: no memory"):
        meter("float16", 1 << 20, ("nccl",))


def test_the_meter_says_why_there_is_no_engine(monkeypatch):
    reasons = (SimpleNamespace(text="no NVLink from 0 to 1"),)
    found = SimpleNamespace(engine=None, verdict=SimpleNamespace(reasons=reasons))
    monkeypatch.setattr(tune, "climb", lambda *_, **__: found)
    with pytest.raises(InputError, match="3 ranks cannot have path v2 here: no NVLink from 0 to 1"):
        tune.Meter(SimpleNamespace(world_size=3, control=None, device=CPU), V2, "two_shot")
