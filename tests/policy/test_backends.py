"""The table of backends: each row in itself, and that another row is a rung everywhere without any other edit."""

from __future__ import annotations

import enum
import json
import pkgutil
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path as File
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.fake_engines import FakeEngine, fake_gpus, suite
from helpers.fakes import MACHINES, look_all

from allreduce_jit.cli import doctor, warmup
from allreduce_jit.cli import main as cli
from allreduce_jit.communicator import Communicator
from allreduce_jit.harness import ranks
from allreduce_jit.machine.probe import Software
from allreduce_jit.paths import Path
from allreduce_jit.policy import backends
from allreduce_jit.policy.backends import BACKENDS, TRITON, Backend
from allreduce_jit.policy.catalogue import nvlink_modules, p2p_modules
from allreduce_jit.policy.checks import COMMON, Group, first_rank
from allreduce_jit.policy.dispatch import decide
from allreduce_jit.policy.verdict import CODES, Reason
from allreduce_jit.settings import PATHS, VARIABLES, Settings
from allreduce_jit.setup import ladder

NVLINK, PCIE, NO_P2P = (tuple(look_all(MACHINES[name])) for name in ("h200-x4", "a100-pcie-x4", "rtx4090-x2"))
ROOT = next(folder for folder in File(__file__).parents if (folder / "pyproject.toml").exists())


# -- the rows there are


def test_every_path_but_the_last_has_a_row():
    assert [row.path for row in BACKENDS] == list(Path)[:-1] and list(Path)[-1] is Path.TORCH
    assert [row.name for row in BACKENDS] == ["nvlink", "p2p", "host"]
    assert [backends.of(path) for path in Path] == [*BACKENDS, None]


def test_the_variable_takes_every_path_below_the_highest():
    assert PATHS == ("auto", *(path.short for path in list(Path)[1:])) == ("auto", "legacy", "host", "torch")
    row = next(line for line in (ROOT / "docs/environment.md").read_text().splitlines() if "`ALLREDUCE_JIT_PATH`" in line)
    assert ", ".join(f"`{choice}`" for choice in PATHS) in row


@pytest.mark.parametrize("row", BACKENDS, ids=lambda row: row.name)
def test_row(row):
    assert pkgutil.resolve_name(row.engine).path == row.path.value
    assert row.toolchain.fact in [field.name for field in fields(Software)]
    assert row.switch is None or row.switch in VARIABLES
    assert not set(row.requires) & set(COMMON)
    assert row.unwanted("of this") == Reason("v2-switched-off" if row.path is Path.V2 else "path-forced", "of this")
    assert all(reason.code in CODES for reason in row.possible(2))


def test_a_path_that_was_left_gives_its_reason_and_no_check_of_its_own():
    left = Reason("verify-failed", "rank 2: wrong", 2)
    found = decide(NVLINK, [Settings()] * 4, left={Path.V2: left})
    assert (found.path, found.reasons, found.full_nvlink) == (Path.LEGACY, (left,), True)
    found = decide(NVLINK, [Settings()] * 4, left=dict.fromkeys(Path, left))
    assert (found.path, found.reasons, found.full_nvlink) == (Path.TORCH, (left, left, left), None)
    found = decide(NO_P2P, [Settings()] * 2, left={Path.V2: left})
    assert [reason.code for reason in found.reasons] == ["verify-failed", "no-p2p"]


# -- one row more


class Third(str, enum.Enum):
    """The name that the row would have in ``Path``."""

    RELAY = "relay"
    __str__, short = Path.__str__, Path.short


class RelayEngine(FakeEngine):
    def __init__(self, config):
        super().__init__("relay", config, dist.group.WORLD, {})


def shared_memory(group: Group):
    return first_rank(group.caps, "map-failed", "has no shared memory", lambda c: not c.host.shm_bytes)


def relay_modules(world_size, families, arch):
    return [SimpleNamespace(name=f"relay_ws{world_size}", families=families)]


RELAY = Backend("relay", Third.RELAY, (shared_memory,), TRITON, relay_modules, f"{__name__}:RelayEngine", memory="host")


@contextmanager
def one_row_more():
    with mock.patch.object(backends, "BACKENDS", (*BACKENDS[:2], RELAY)):
        yield


@pytest.fixture
def third():
    with one_row_more():
        yield


def codes(verdict):
    return [reason.code for reason in verdict.reasons]


def test_decide(third):
    found = decide(NO_P2P, [Settings()] * 2)
    assert (found.path, codes(found), found.full_nvlink, found.backend) == (Third.RELAY, ["no-nvlink", "no-p2p"], False, "nccl")
    assert decide(NVLINK, [Settings()] * 4).path is Path.V2 and decide(PCIE, [Settings()] * 4).path is Path.LEGACY
    poor = [NO_P2P[0], replace(NO_P2P[1], host=replace(NO_P2P[1].host, shm_bytes=0))]
    found = decide(poor, [Settings()] * 2)
    assert (found.path, codes(found)) == (Path.TORCH, ["no-nvlink", "no-p2p", "map-failed"])
    assert found.reasons[2] == Reason("map-failed", "rank 1 has no shared memory", 1)
    no_triton = [replace(c, software=replace(c.software, triton=None)) for c in NVLINK]
    found = decide(no_triton, [Settings(use_v2=False)] * 4)
    assert (found.path, codes(found)) == (Path.TORCH, ["v2-switched-off", "no-triton"])  # said once, though of two rungs
    mig = [replace(c, gpu=replace(c.gpu, mig=True)) for c in NO_P2P]
    assert codes(decide(mig, [Settings()] * 2)) == ["mig"]


@pytest.mark.parametrize(
    ("wishes", "path", "rank"),
    [
        (["auto", "auto", "relay", "auto"], "relay", 2),
        (["auto", "legacy", "auto", "relay"], "relay", 3),
        (["auto", "relay", "legacy", "auto"], "relay", 1),
        (["auto", "legacy", "legacy", "auto"], "legacy", 1),
        (["legacy", "relay", "auto", "torch"], "torch.distributed", 3),
    ],
)
def test_the_lowest_wish_of_any_rank_counts_and_is_told(third, wishes, path, rank):
    found = decide(NVLINK, [Settings(path=wish) for wish in wishes])
    assert (found.path.value, codes(found)) == (path, ["path-forced"])
    assert found.reasons[0].text == f"rank {rank} has ALLREDUCE_JIT_PATH={path.partition('.')[0]}"


def test_doctor(third, monkeypatch):
    found = iter(NO_P2P)
    cache = SimpleNamespace(entries=list, problem=None)
    document = doctor.examine(lambda device: next(found), None, lambda directory: cache, 2, File("/nonexistent"))
    assert document.verdict.path == "relay" and doctor.exit_code(document) == 0
    assert not [problem for problem in document.problems if problem.startswith("no-p2p")]  # a path runs all the same
    assert "would run    relay, else torch.distributed over nccl, for 2 ranks" in doctor.render(document)
    monkeypatch.setattr(doctor, "_importable", lambda module: module != "triton")
    (problem,) = doctor.examine(None, None, lambda directory: cache, 0, File("/nonexistent")).problems
    assert problem == "triton is not installed: nothing compiles the kernels of legacy, relay"


def test_warmup(third, monkeypatch, capsys):
    monkeypatch.setattr(warmup, "_open", lambda: SimpleNamespace(directory="/cache", problem=None))

    def kernels(*options):
        args = cli._parser().parse_args(["warmup", "--arch", "sm_90", "--world-size", "2", "--json", *options])
        warmup.run(args, build=lambda spec, arch, cache: (b"", False))
        return [kernel["name"] for kernel in json.loads(capsys.readouterr().out)["kernels"]]

    names = [spec.name for spec in (*nvlink_modules(2), *p2p_modules(2))]
    assert kernels() == [*names, "relay_ws2"] and kernels("--path", "relay") == ["relay_ws2"]


def test_command_line_without_the_row(capsys):
    with pytest.raises(SystemExit):
        cli._parser().parse_args(["warmup", "--path", "relay"])
    assert "invalid choice: 'relay'" in capsys.readouterr().err


real_engine_class = ladder._engine_class


@contextmanager
def fake_gpus_and_a_third_row(place, machine, fails=None):
    """Fake engines, but for the third row's: that one the ladder finds by the name in the row."""
    with fake_gpus(place.control, machine, fails) as built, one_row_more():
        fake = ladder._engine_class
        choose = lambda row: real_engine_class(row) if row is RELAY else fake(row)  # noqa: E731
        with mock.patch.object(ladder, "_engine_class", choose):
            yield built


def it_is_built_where_it_is_the_best(place):
    with fake_gpus_and_a_third_row(place, "rtx4090-x2") as built:
        comm = Communicator(place.control, torch.device("cpu"))
        assert isinstance(comm._engine, RelayEngine) and not built and comm.path is Third.RELAY
        described = comm.describe()
        assert described.path.value == "relay" and {band.path for band in described.bands} == {"relay"}
        assert [reason.code for reason in described.reasons] == ["no-nvlink", "no-p2p"]
        assert comm.all_reduce(torch.ones(3)).tolist() == [2.0] * 3 and comm._engine.sums == 1
        comm.close()


def it_is_built_where_those_above_fail(place):
    fails = {(path, "load"): RuntimeError("planted") for path in ("v2", "legacy")}
    with fake_gpus_and_a_third_row(place, "h200-x4", fails) as built:
        found = ladder.climb(place.control, torch.device("cpu"))
        assert [engine.path for engine in built] == ["v2", "legacy"] and all(engine.closed for engine in built)
        assert (found.verdict.path, codes(found.verdict)) == (Third.RELAY, ["build-failed"] * 2)
        assert isinstance(found.engine, RelayEngine) and found.verdict.full_nvlink and found.engine.config.nvlink


def it_can_be_the_only_one_that_is_wanted(place):
    cpu = torch.device("cpu")
    with fake_gpus_and_a_third_row(place, "h200-x4") as built:
        found = ladder.climb(place.control, cpu, highest=Third.RELAY)
        assert (found.verdict.path, codes(found.verdict)) == (Third.RELAY, ["v2-switched-off", "path-forced"]) and not built
        assert {reason.text for reason in found.verdict.reasons} == {"the caller asked for the relay kernels"}
    with fake_gpus_and_a_third_row(place, "rtx4090-x2") as built:
        found = ladder.climb(place.control, cpu, lowest=Path.LEGACY)
        assert (found.verdict.path, found.engine) == (Path.TORCH, None) and not built


CASES = [it_is_built_where_it_is_the_best, it_is_built_where_those_above_fail, it_can_be_the_only_one_that_is_wanted]


def test_two_ranks():
    assert len(ranks.run(suite, CASES, cpu=2, deadline=100).value) == len(CASES)
