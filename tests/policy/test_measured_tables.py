"""Tables of ``allreduce-jit tune`` on disk: which file, what is in it, what is refused and why. ``tests/cli/test_tune.py`` has their making."""

from __future__ import annotations

import json
import logging
import re

import pytest
from helpers.fakes import MACHINES, look
from helpers.kept import FACTS, HOST_FACTS, HOST_TABLES_KEPT, ODD, TABLES

from allreduce_jit.machine import files
from allreduce_jit.policy import measured_tables as tables
from allreduce_jit.policy.operation import DTYPES
from allreduce_jit.policy.tables import NVLINK_TABLES
from allreduce_jit.policy.tuning import HOST, V2


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


# -- which file


def test_what_was_kept_is_found_by_its_name_for_good(tmp_path):
    """The name follows from the facts, in whatever order they come; another name would lose all tables that there are."""
    facts = {"gpu": "NVIDIA H200", "world_size": 4, "driver": "570.1"}
    for order in (facts, dict(sorted(facts.items())), dict(reversed(facts.items()))):
        assert tables.path(tmp_path, order) == tmp_path / "tuning" / "4d6dc7e3c6774135f22b4cf881d83e90.json"
    names = {tables.path(tmp_path, FACTS | {fact: "other"}).name for fact in (*FACTS, "new")}
    assert len(names) == len(FACTS) + 1 and all(re.fullmatch(r"[0-9a-f]{32}\.json", name) for name in names)


def test_facts_are_those_of_the_machine():
    caps = look(MACHINES["h200-x4"], 0)
    assert tables.fingerprint(caps, 3) == {
        "gpu": "NVIDIA H200", "arch": "sm_90", "world_size": 3, "gpus": 4, "full_nvlink": True,
        "driver": caps.software.driver, "package": tables.__version__,
    }  # fmt: skip
    assert not tables.fingerprint(look(MACHINES["a100-pcie-x4"], 0), 4)["full_nvlink"]
    assert tables.tunable_of(FACTS) is V2 and tables.tunable_of(HOST_FACTS) is HOST


def test_without_a_directory_there_is_no_file():
    for call in (lambda: tables.path(None, FACTS), lambda: tables.save(None, FACTS, TABLES)):
        with pytest.raises(FileNotFoundError, match=re.escape(files.NO_DIRECTORY)):
            call()
    assert tables.load(None, FACTS) is None
    assert (tables.entries(None), tables.refused(None), tables.clear(None)) == ([], [], 0)


# -- what is in it


def test_a_file_holds_all_that_was_given_line_by_line_for_human_readers(tmp_path):
    file = tables.save(tmp_path, FACTS, TABLES, seconds=1.5, microseconds={"a": 1})
    want = {"format": 1, "fingerprint": FACTS, "tables": tables.tables_to_json(TABLES), "seconds": 1.5, "microseconds": {"a": 1}}
    assert json.loads(file.read_text()) == want
    lines = file.read_text().splitlines()
    assert lines[:2] == ["{", ' "format": 1,'] and file.read_text().endswith("}\n") and '  "gpu": "NVIDIA H200",' in lines


# -- what is refused, and why


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d | {"format": 2}, "expected an object with format 1"),
        (lambda d: [d], "expected an object with format 1"),
        (lambda d: d | {"fingerprint": {"gpu": "another"}}, f"it is for {{'gpu': 'another'}}, this is {FACTS}"),
        (lambda d: {k: v for k, v in d.items() if k != "fingerprint"}, f"it is for None, this is {FACTS}"),
        (lambda d: d | {"tables": []}, "expected tables for float32, float16, bfloat16"),
        (lambda d: d | {"tables": {**d["tables"], "float8": []}}, "expected tables for float32, float16, bfloat16"),
    ],
)
def test_a_table_that_does_not_count_is_ignored_and_says_why(tmp_path, caplog, change, why):
    file = tables.save(tmp_path, FACTS, TABLES)
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    assert tables.load(tmp_path, FACTS) is None
    assert warnings_of(caplog) == [f"the tuned table {file} is ignored: {why}"]


def test_bands_are_judged_by_the_ranks_and_the_path_that_they_are_for(tmp_path, caplog):
    two = FACTS | {"world_size": 2}  # two ranks have no two-shot
    file = tables.save(tmp_path, two, TABLES)
    assert tables.load(tmp_path, two) is None and "'two_shot' is none of one_shot" in warnings_of(caplog)[0]
    tables.save(tmp_path, two, dict.fromkeys(DTYPES, NVLINK_TABLES[2]))
    assert tables.load(tmp_path, two)["path"] == str(file)
    with pytest.raises(ValueError, match="'two_shot' is none of one_shot"):
        tables.tables_from_json(V2, 2, tables.tables_to_json(TABLES))
    tables.save(tmp_path, HOST_FACTS, TABLES)
    assert tables.load(tmp_path, HOST_FACTS) is None


def test_no_facts_have_no_table(tmp_path):
    tables.path(tmp_path, FACTS).parent.mkdir()
    tables.path(tmp_path, None).write_text("whatever is there")
    assert tables.load(tmp_path, None) is None
    assert tables.load_all(tmp_path, look(MACHINES["cpu-ranks"], 0), 4) == {}


# -- all of them


def crowd(tmp_path):
    """Two good tables and two that no machine would take, between them one that goes while one looks."""
    good = [tables.save(tmp_path, FACTS, TABLES), tables.save(tmp_path, HOST_FACTS, HOST_TABLES_KEPT)]
    folder = good[0].parent
    (folder / "00.json").write_text("no JSON")
    (folder / "01.json").symlink_to(folder / "gone")
    (folder / "zz.json").write_text('{"format": 7}')
    (folder / "mine.txt").write_text("not ours")
    return folder, sorted([*good, folder / "00.json", folder / "01.json", folder / "zz.json"])


def test_files_that_no_machine_takes_are_told_with_the_reason(tmp_path):
    assert (tables.entries(tmp_path), tables.refused(tmp_path)) == ([], [])
    folder, every = crowd(tmp_path)
    assert tables.entries(tmp_path) == every
    (first, why), (last, other) = tables.refused(tmp_path)
    assert (first, last) == (str(folder / "00.json"), str(folder / "zz.json"))
    assert why.startswith("Expecting value") and other == "expected an object with format 1"


def test_a_directory_that_cannot_be_listed_is_told_itself(tmp_path):
    (tmp_path / "tuning").write_text("in the way")
    ((what, why),) = tables.refused(tmp_path)
    assert what == str(tmp_path / "tuning") and "Not a directory" in why and what in why
    assert tables.entries(tmp_path) == []


def test_all_go_but_what_is_not_ours(tmp_path, caplog):
    assert tables.clear(tmp_path) == 0
    folder, every = crowd(tmp_path)
    (folder / f"{files.TEMPORARY}left").write_text("of a writer that died")
    assert tables.clear(tmp_path) == len(every) and [file.name for file in folder.iterdir()] == ["mine.txt"]
    assert tables.clear(tmp_path) == 0 and not warnings_of(caplog)


def test_what_cannot_go_is_told_and_not_counted(tmp_path, caplog):
    folder, every = crowd(tmp_path)
    (folder / "50.json").mkdir()
    assert tables.clear(tmp_path) == len(every)
    (text,) = warnings_of(caplog)
    assert text.startswith(f"the tuned table {folder / '50.json'} cannot be removed: ") and "irectory" in text


def test_a_table_that_somebody_else_removed_is_no_trouble(tmp_path, caplog, monkeypatch):
    file = tables.save(tmp_path, FACTS, dict.fromkeys(DTYPES, ODD))
    real = tables.entries
    monkeypatch.setattr(
        tables, "entries", lambda folder: [*real(folder), *([file.with_name("gone.json")] if file.exists() else [])]
    )
    tables.clear(tmp_path)
    assert not file.exists() and not warnings_of(caplog)
