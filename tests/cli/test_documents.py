"""What commands print with ``--json`` is what docs/schemas says."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
from helpers import ROOT
from helpers.schemas import SCHEMAS, violations

from allreduce_jit.cli import main as cli
from allreduce_jit.harness import ranks

RUNS = {
    "doctor": "doctor",
    "selftest": "selftest --cpu 2 --max-bytes 64 --deadline 200",
    "soak": "soak --cpu 2 --calls 1 --max-bytes 64 --op both --deadline 200",
    "bench": "bench --cpu 2 -b 64 -e 64 -n 1 -w 0 --deadline 200",
    "bench with a norm": "bench --cpu 2 --op add-rms-norm --rows 1 --hidden 64 -n 1 -w 0 --deadline 200",
    "cache path": "cache path",
    "cache list": "cache list",
    "cache clear": "cache clear",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module", params=RUNS)
def printed(request, folder):
    """Name of the schema, and the document of a real run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ALLREDUCE_JIT_CACHE_DIR", folder)
        out = io.StringIO()
        with contextlib.redirect_stdout(out):  # pytest's own capturing is of one test each
            assert cli.main([*RUNS[request.param].split(), "--json"]) in (0, 1)
        return request.param.split()[0], json.loads(out.getvalue())


def test_document(printed):
    assert violations(*printed) == []


def test_nothing_else_is_taken_for_one(printed):
    """A field more, a field less: both are found, so the schema says what there is."""
    name, document = printed
    assert violations(name, document | {"unheard_of": 1})
    for key in document:
        less = {other: value for other, value in document.items() if other != key}
        # Of `cache`, what is left may be another action's.
        assert violations(name, less) or (name == "cache" and less.keys() == {"directory", "problem"}), key
    for key in document.keys() & {"rows", "kernels", "entries"}:
        for changed in ({"unheard_of": 1}, {"path": 3, "name": 3}):
            row = document[key][0] if document[key] else {}
            assert violations(name, document | {key: [row | changed]}), (key, changed)


def test_a_command_that_fails(monkeypatch, capsys):
    def fail(*_, **__):
        raise ranks.RanksFailedError("rank 1 failed", {1: "why"}, [])

    monkeypatch.setattr(ranks, "run", fail)
    for command in ("selftest", "soak", "bench"):
        assert cli.main([command, "--json", "--cpu", "2"]) == 1
        assert violations(command, json.loads(capsys.readouterr().out)) == []
    assert cli.main(["warmup", "--arch", "sm_90", "--op", "add-rms-norm", "--hidden", "100", "--json"]) == 2
    assert violations("warmup", json.loads(capsys.readouterr().out)) == []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert cli.main(["tune", "--json"]) == 2
    assert violations("tune", json.loads(capsys.readouterr().out)) == []


def test_documents_of_gpus():
    """Of H200s, kept from when they were measured."""
    saved = json.loads((ROOT / "docs/benchmarks/2026-11-28-2xH200-legacy.json").read_text(encoding="utf-8"))
    assert saved["legacy"]["communicator"]["path"] == "legacy" and violations("bench", saved["legacy"]) == []
    assert violations("bench", [saved["legacy"]] * 2) == []
    saved["legacy"]["rows"][0]["p50_us"] = "fast"
    assert violations("bench", saved["legacy"])


def test_schemas_are_schemas_and_every_command_has_one():
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema, 4.18 or later")
    for name, schema in SCHEMAS.items():
        jsonschema.Draft202012Validator.check_schema(schema)
        assert schema["$id"] == f"{name}.json" and schema["title"]
    (commands,) = (action for action in cli._parser()._actions if action.dest == "command")
    assert set(commands.choices) | {"common"} == set(SCHEMAS)
