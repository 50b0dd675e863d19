"""How the API behaves: ``op=``, names, values that describe, exceptions, and what is deprecated."""

from __future__ import annotations

import enum
import inspect
import json
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import FrozenInstanceError, dataclass, is_dataclass

import numpy
import pytest
import torch
import torch.distributed as dist
from helpers import ROOT
from helpers.fake_engines import fake_gpus, raised, suite

import allreduce_jit
from allreduce_jit import errors
from allreduce_jit.deprecation import deprecated
from allreduce_jit.errors import FailureReport, InputError, InputTypeError
from allreduce_jit.harness import ranks
from allreduce_jit.inputs import require_sum
from allreduce_jit.machine.probe import Capabilities, probe
from allreduce_jit.policy.verdict import Reason
from allreduce_jit.records import Record, plain

KINDS = dist.ReduceOp.RedOpType


class Named(str, enum.Enum):
    """Another library's: a str that is equal to nothing."""

    SUM = "sum"
    MAX = "max"

    __hash__ = str.__hash__

    def __eq__(self, other):
        raise AssertionError("compared with what another library made")


SUMS = [None, "sum", "SUM", "Sum", dist.ReduceOp.SUM, KINDS.SUM, dist.ReduceOp(KINDS.SUM), Named.SUM]
OTHERS = [*(kind for name, kind in KINDS.__members__.items() if name != "SUM"), dist.ReduceOp(KINDS.MAX), "max", "mean", "", Named.MAX]  # fmt: skip


class Hostile:
    """Of another library: whatever it is compared with, it agrees or raises."""

    def __eq__(self, other):
        raise AssertionError("compared with what another library made")

    def __bool__(self):
        raise AssertionError("asked whether it is true")


NONSENSE = [0, 1, True, b"sum", object(), Hostile(), torch.ones(2), numpy.zeros(2), ["sum"], sum, torch.sum]


# -- op=


def ways(place):
    """Every sum, every other operation, on every path; in place and not."""
    for machine in ("h200-x4", "a100-pcie-x4", None):
        with fake_gpus(place.control, machine) if machine else warnings.catch_warnings():
            with allreduce_jit.init(place.control, "cpu") as comm:
                for op in SUMS:
                    x = torch.arange(5, dtype=torch.float32)
                    want = x * comm.world_size
                    assert torch.equal(comm.all_reduce(x, op=op), want) and x[1] == 1
                    out = torch.empty_like(x)
                    assert comm.all_reduce(x, out, op) is out and torch.equal(out, want)
                    assert comm.all_reduce_(x, op=op) is x and torch.equal(x, want)
                    assert comm.all_reduce_(x) is x and torch.equal(x, want * comm.world_size)
                x = torch.ones(3)
                for op in OTHERS:
                    for call in (lambda: comm.all_reduce(x, op=op), lambda: comm.all_reduce_(x, op=op)):
                        raised(InputError, call, f"rank {place.rank}: op=", "sum and do nothing else")
                for op in NONSENSE:
                    raised(InputTypeError, lambda: comm.all_reduce(x, op=op), f"rank {place.rank}: op must be", type(op).__name__)
                # Where torch's own call has ``op``.
                for op in (dist.ReduceOp.SUM, dist.ReduceOp(KINDS.SUM), "sum"):
                    raised(InputTypeError, lambda: comm.all_reduce(x, op), f"rank {place.rank}", "passed by name, op=")
                assert torch.equal(x, torch.ones(3)) and comm.all_reduce(x)[0] == comm.world_size  # nothing was launched


def test_op_on_every_path():
    assert ranks.run(suite, [ways], cpu=2, deadline=240).value == ["ways"]


def test_what_to_do_instead():
    with pytest.raises(InputError, match="op=AVG: .* divide the sum by world_size"):
        require_sum(dist.ReduceOp.AVG, 0)
    with pytest.raises(InputError, match="op=MAX: .* use torch.distributed.all_reduce for it"):
        require_sum("max", 0)
    with pytest.raises(InputError, match=r"^.{1,150}$"):
        require_sum("x" * 1000, 0)


# -- exceptions

EXCEPTIONS = [
    value for name in allreduce_jit.__all__ if inspect.isclass(value := getattr(allreduce_jit, name)) and issubclass(value, Exception)
]  # fmt: skip


def test_one_scheme_of_names():
    defined = [value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, Exception)]
    assert {*defined} == {*EXCEPTIONS} and len(EXCEPTIONS) == 14
    for kind in EXCEPTIONS:
        assert kind.__name__.endswith("Error") and issubclass(kind, allreduce_jit.AllReduceError) and kind.__doc__
    # All others that the package raises derive from these, or are a part of its inside.
    for path in (ROOT / "allreduce_jit").rglob("*.py"):
        for name, base in re.findall(r"^class (\w+)\((\w+)\):", path.read_text(), re.M):
            assert base not in {kind.__name__ for kind in EXCEPTIONS} or name.endswith("Error"), (path, name)


@pytest.mark.parametrize("kind", EXCEPTIONS)
def test_exceptions_survive_a_pickle(kind):
    made = (
        kind("told", (1,), {"kind": "lost", "culprit": 1}) if issubclass(kind, errors.CommunicatorFailedError) else kind("told")
    )
    again = pickle.loads(pickle.dumps(made))
    assert type(again) is kind and str(again) == "told" and vars(again) == vars(made)


def test_old_names():
    assert list(errors.RENAMED) == [
        "CommunicatorFailed", "PeerTimeout", "PeerLost", "CallMismatch", "ConcurrentUse", "Poisoned"
    ]  # fmt: skip
    for module in (allreduce_jit, errors):
        for old, new in errors.RENAMED.items():
            with pytest.warns(DeprecationWarning, match=rf"the name {old} is deprecated .* called {new}") as caught:
                assert getattr(module, old) is getattr(errors, new)
            assert [one.filename for one in caught] == [__file__]
    assert not {*errors.RENAMED} & {*allreduce_jit.__all__, *dir(allreduce_jit)}
    for module in (allreduce_jit, errors):
        with pytest.raises(AttributeError, match="no attribute 'PeerGone'"):
            module.PeerGone  # noqa: B018


def test_programs_with_old_names_and_dictionaries_run():
    """As they were written before, in a process of its own, whose filters show what is deprecated in its main program."""
    program = """
import allreduce_jit
from allreduce_jit import PeerLost, PeerTimeout
import os, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
with allreduce_jit.init(device="cpu") as comm:
    try:
        raise allreduce_jit.PeerLostError("gone", (2,), {"kind": "lost", "culprit": 2})
    except PeerLost as e:
        print(e.report["culprit"], e.ranks)
    for _ in range(3):
        about = comm.describe()["path"], comm.describe()["reasons"][0]["code"]
    print(*about)
dist.destroy_process_group()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.splitlines() == ["2 (2,)", "torch.distributed world-size-1"], done.stderr
    told = re.findall(r"^<string>:(\d+): DeprecationWarning: (.*)", done.stderr, re.M)
    assert [int(line) for line, _ in told] == [3, 3, 10, 12, 12], done.stderr
    assert told[2][1].startswith("FailureReport['culprit'] is deprecated") and told[2][1].endswith("write .culprit")


def test_we_use_nothing_that_is_deprecated():
    """Not on import, and not in a program's whole life; the tests of commands and of the front say the same under this filter."""
    program = """
import warnings
warnings.filterwarnings("error", category=DeprecationWarning, message=".*will go in a later version")
import importlib, pkgutil, allreduce_jit
for module in pkgutil.walk_packages(allreduce_jit.__path__, "allreduce_jit."):
    if not module.name.endswith("__main__") and "kernels" not in module.name:
        importlib.import_module(module.name)
from allreduce_jit.cli import doctor
from allreduce_jit import errors
print(len(doctor.render(doctor.examine(gpu_count=0)).splitlines()) > 5)
try:
    errors.PeerLost
except DeprecationWarning:
    print("filtered")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["True", "filtered"], done.stderr


def test_no_document_and_no_program_of_ours_uses_old_names():
    old = re.compile(rf"\b({'|'.join(errors.RENAMED)})\b|describe\(\)\[|\.report\[")
    written = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "tools").glob("*.py"), *(ROOT / "allreduce_jit").rglob("*.py")]  # fmt: skip
    history = {"docs/performance.md", "docs/log.md", "docs/benchmarks/README.md"}  # of runs: as it was said then
    renamed = {"allreduce_jit/errors.py"}
    for path in written:
        name = str(path.relative_to(ROOT))
        if name not in history | renamed:
            assert not old.search(path.read_text()), (name, old.search(path.read_text()))


# -- deprecation


def test_a_warning_for_each_place():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            deprecated("this", "write that")
        for _ in range(3):
            deprecated("this", "write that")  # another line
    assert len(caught) == 2 and len({one.lineno for one in caught}) == 2
    assert {one.filename for one in caught} == {__file__}
    assert str(caught[0].message) == "this is deprecated and will go in a later version: write that"


# -- values that describe


@dataclass(frozen=True)
class Inner(Record):
    many: tuple[int, ...]


@dataclass(frozen=True)
class Outer(Record):
    path: allreduce_jit.Path
    inner: Inner
    reasons: tuple[Reason, ...]
    by_name: dict


OUTER = Outer(allreduce_jit.Path.V2, Inner((1, 2)), (Reason("cpu", "why", 0),), {"a": Inner(())})
AS_DICT = {
    "path": "v2",
    "inner": {"many": [1, 2]},
    "reasons": [{"code": "cpu", "text": "why", "rank": 0}],
    "by_name": {"a": {"many": []}},
}


def test_to_dict_is_plain_all_the_way_down():
    made = OUTER.to_dict()
    assert made == AS_DICT and type(made["path"]) is str and json.loads(json.dumps(made)) == made
    assert plain((1, [None, True], {"x": 2.5})) == [1, [None, True], {"x": 2.5}]
    with pytest.raises(FrozenInstanceError):
        OUTER.path = "legacy"
    assert OUTER  # truth asks for no length, and warns of nothing


READS = {
    "record[name]": (lambda r: r["path"], "v2"),
    "what is in it is a dictionary, too": (lambda r: r["reasons"][0]["code"], "cpu"),
    "get": (lambda r: (r.get("path"), r.get("nothing"), r.get("nothing", 3)), ("v2", None, 3)),
    "in": (lambda r: ("path" in r, "nothing" in r), (True, False)),
    "iteration": (list, list(AS_DICT)),
    "keys": (lambda r: list(r.keys()), list(AS_DICT)),
    "values": (lambda r: list(r.values()), list(AS_DICT.values())),
    "items": (lambda r: dict(r.items()), AS_DICT),
    "dict()": (dict, AS_DICT),
    "**": (lambda r: {**r}, AS_DICT),
    "|": (lambda r: (r | {"path": 0}, {"path": 0} | r), (AS_DICT | {"path": 0}, AS_DICT)),
}


@pytest.mark.parametrize("way", READS)
def test_reading_a_record_as_the_dictionary_it_was(way):
    read, want = READS[way]
    with pytest.warns(DeprecationWarning, match="^Outer") as caught:
        assert read(OUTER) == want
    assert {one.filename for one in caught} == {__file__}
    with warnings.catch_warnings(record=True) as once:
        warnings.simplefilter("default")
        for _ in range(4):
            read(OUTER)
    assert 1 <= len(once) == len({str(one.message) for one in once})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert OUTER.path == "v2" and OUTER.to_dict()["path"] == "v2"  # attributes are no such thing


def test_a_key_that_is_none_is_an_error_as_before():
    with pytest.warns(DeprecationWarning), pytest.raises(KeyError, match="nothing"):
        OUTER["nothing"]


def records():
    """All classes of records in the package."""
    from allreduce_jit.cli import doctor
    from allreduce_jit.integrations import engines, installed, present

    assert doctor and engines and installed and present
    found, rest = set(), [Record]
    while rest:
        rest += (more := rest.pop().__subclasses__())
        found |= {kind for kind in more if kind.__module__.startswith("allreduce_jit")}
    return sorted(found, key=lambda kind: kind.__name__)


def test_records_are_documented_and_typed():
    """A frozen dataclass each, whose docstring names every attribute."""
    assert len(records()) >= 17
    for kind in records():
        assert is_dataclass(kind) and kind.__dataclass_params__.frozen and kind.__doc__, kind
        missing = set(kind.__dataclass_fields__) - set(re.findall(r"\w+", kind.__doc__))
        assert not missing, (kind, missing)
        assert all(field.type for field in kind.__dataclass_fields__.values())


def test_a_probe_and_its_old_names():
    caps = probe("cpu")
    with pytest.warns(DeprecationWarning, match=r"Capabilities.to_json\(\) is deprecated .* to_dict\(\)") as caught:
        old = caps.to_json()
    assert old == caps.to_dict() == json.loads(json.dumps(old)) and caught[0].filename == __file__
    with pytest.warns(DeprecationWarning, match=r"from_json\(\) is deprecated"):
        assert Capabilities.from_json(old) == caps
    assert Capabilities.from_dict(old) == caps


SIGNED = {"numel": 4, "dtype": "float16", "algorithm": "one_shot", "in_place": False}
FACTS = {
    "kind": "mismatch", "culprit": 1, "found_by": 0, "rank": 0, "sequence": 7, "algorithm": "one_shot", "dtype": "float16",
    "phase": "exchange", "channel": 2, "waited_ms": 0,
    "ranks": [{"rank": 0, "alive": True, "last_call": None}, {"rank": 1, "alive": None, "last_call": {"sequence": 7, **SIGNED}}],
    "mine": SIGNED, "theirs": SIGNED | {"norm": {"hidden": 64}},
}  # fmt: skip


def test_reports_of_failures():
    error = allreduce_jit.CallMismatchError("told", (1,), FACTS)
    report = error.report
    assert report.to_dict() == FACTS and FailureReport.of(report.to_dict()) == report
    assert report.culprit == 1 and report.ranks[1].last_call.sequence == 7 and report.theirs.norm == {"hidden": 64}
    assert report.mine.norm is None and "norm" not in report.mine.to_dict() and "sequence" not in report.mine.to_dict()
    assert allreduce_jit.PoisonedError("again", error.ranks, report).report is report
    nothing = allreduce_jit.PeerTimeoutError("told").report
    assert nothing == FailureReport() and nothing.to_dict()["kind"] is None and "mine" not in nothing.to_dict()
    with pytest.raises(TypeError, match="brand_new"):
        FailureReport.of({"brand_new": 1})
