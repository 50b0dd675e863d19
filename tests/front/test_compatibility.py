"""docs/compatibility.md is true of the recorded runs, the package's requirements, the tests, and the sentences of the other pages."""

from __future__ import annotations

import ast
import json
import re

import pytest
from helpers import ROOT, TESTS

from allreduce_jit.policy.tables import NVLINK_TABLES

PAGE = (ROOT / "docs/compatibility.md").read_text()
STATUSES = ("measured", "virtual ranks", "on the CPU", "compiled only", "expected")
GPUS_TABLE, VERSIONS_TABLE, ENGINES_TABLE = "GPUs, links, ranks, paths", "Python, torch, Triton, CUDA", "Engines"
PROMISES_TABLE = "What sentences promise"
USERS = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/start").glob("*.md")])]  # fmt: skip
OF_RUNS = {"docs/performance.md", "docs/log.md"}  # figures and trials: every line names its run


def tables(heading):
    """Rows of the tables below a heading of the page, as lists of cells."""
    section = re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", PAGE, re.S | re.M)[1]
    found = re.findall(r"^\|[^\n]*\|\n\|[-|]+\|\n((?:\|[^\n]*\|\n)+)", section + "\n", re.M)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in body.strip().split("\n")] for body in found]


# -- what has run


def walk(value):
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    for part in value if isinstance(value, list) else ():
        yield from walk(part)


RUNS = {path.name: json.loads(path.read_text()) for path in sorted((ROOT / "docs/benchmarks").glob("*.json"))}


def fingerprints(run):
    return [part for part in walk(run) if "gpus" in part and "versions" in part]


def communicators(run):
    """(path, world size) of each communicator in it."""
    return {(part["path"], part["world_size"]) for part in walk(run) if "path" in part and "world_size" in part}


NAMED = {"v2": "V2", "legacy": "legacy", "host": "host", "torch.distributed": "torch.distributed"}


def ranks_of(cell):
    first, dash, last = cell.partition("–")
    return set(range(int(first), int(last) + 1)) if dash else {int(n) for n in cell.split(", ")}


def check_gpus(rows, runs):
    """What is wrong with the table of GPUs."""
    seen = {name.removeprefix("NVIDIA ") for run in runs.values() for print_ in fingerprints(run) for name in print_["gpus"]}
    wrong, measured = [], set()
    for gpu, _, ranks, paths, status, by in rows:
        if status not in STATUSES:
            wrong.append(f"{status}: no status")
        if status in ("measured", "virtual ranks") and gpu.split(" ")[0] not in seen:
            wrong.append(f"{gpu}: {status}, and no run is of it")
        cited = [name for name in re.findall(r"\(benchmarks/([\w.-]+\.json)\)", by)]
        ran = {one for name in cited for one in communicators(runs[name])}
        if status == "measured":
            path = paths.partition(",")[0]
            measured |= {(path, n) for n in ranks_of(ranks)}
            if cited and not {(path, n) for n in ranks_of(ranks)} <= {(NAMED[path], n) for path, n in ran}:
                wrong.append(f"{gpu}, {ranks} ranks, {paths}: not in {cited}")
            if not cited and not re.search(r"`test_\w+`", by):
                wrong.append(f"{gpu}, {ranks} ranks, {paths}: measured by nothing")
        elif ran:
            wrong.append(f"{gpu}, {ranks} ranks: {status}, though {cited} ran")
    every = {(NAMED[path], n) for run in runs.values() for path, n in communicators(run) if n > 1}
    wrong += [f"{path} on {n} ranks ran, and no row says so" for path, n in sorted(every - measured)]
    return wrong


def test_gpus_and_ranks_are_those_of_the_runs():
    ((*rows,),) = tables(GPUS_TABLE)
    assert len(rows) > 15 and len(RUNS) > 20 and check_gpus(rows, RUNS) == []
    plain = [set(ranks_of(row[2])) for row in rows if row[0].startswith("H200") and row[3] == "V2"]
    assert set.union(*plain) == set(NVLINK_TABLES) and sum(map(len, plain)) == len(NVLINK_TABLES)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (["H200 (sm_90)", "5, 6, 7, 8", "V2", "virtual ranks"], {4: "measured"}, "measured by nothing"),
        (["H200 (sm_90)", "4", "V2", "measured"], {0: "H100 (sm_90)"}, "no run is of it"),
        (["H200 (sm_90)", "4", "V2", "measured"], {2: "4, 5"}, "not in"),
        (["H200 (sm_90)", "3, 4", "legacy", "measured"], {4: "expected"}, "though"),
        (["H200 (sm_90)", "2", "torch.distributed", "measured"], {4: "works"}, "no status"),
    ],
)
def test_planted_mistakes_of_the_table_of_gpus(old, new, told):
    (rows,) = tables(GPUS_TABLE)
    (row,) = [row for row in rows if [row[0], *row[2:5]] == old]
    for column, text in new.items():
        row[column] = text
    assert any(told in problem for problem in check_gpus(rows, RUNS))


def test_virtual_ranks_and_architectures_are_those_of_the_tests():
    for name in ("test_v2_virtual.py", "test_norm_virtual.py"):
        assert "params=range(2, 9)" in (TESTS / "gpu" / name).read_text()
    (text,) = re.findall(r"^ARCHS = (\(.*\))$", (TESTS / "proofs/test_compile.py").read_text(), re.M)
    (rows,) = tables(GPUS_TABLE)
    compiled = {arch for row in rows if row[4] == "compiled only" for arch in re.findall(r"sm_\d+", row[0])}
    measured = {arch for row in rows if row[4] == "measured" for arch in re.findall(r"sm_\d+", row[0])}
    assert measured == {"sm_90"} and compiled | measured == set(ast.literal_eval(text)) and not compiled & measured


def test_measured_versions_are_those_of_the_runs():
    (rows,) = tables(VERSIONS_TABLE)
    measured = [tuple(row[:-1]) for row in rows if row[-1].startswith("measured")]
    names, found = ("python", "torch", "triton", "cuda-bindings", "cuda-core"), set()
    for name, run in RUNS.items():
        assert fingerprints(run), name
        for machine in fingerprints(run):
            ran = [machine["versions"].get(version) for version in names] + [machine["cuda"], machine["driver"]]
            # Runs of scripts of the day note less.
            same = [row for row in measured if all(a == b or a is None for a, b in zip(ran, row, strict=True))]
            assert same, (name, ran)
            found |= set(same)
    assert found == set(measured)


def test_versions_on_the_cpu_are_those_that_other_pages_name():
    (rows,) = tables(VERSIONS_TABLE)
    (row,) = [row for row in rows if row[-1].startswith("on the CPU")]
    shown = re.search(r"^versions +(.*)$", (ROOT / "docs/doctor.md").read_text(), re.M)[1]
    known = dict(part.split(" ") for part in shown.split(", "))
    assert [known[name] for name in ("python", "torch", "triton", "cuda-bindings", "cuda-core")] == row[:5]
    assert f'"torch=={row[1].removesuffix("+cpu")}"' in (ROOT / "setup.sh").read_text()


def test_requirements_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    required = re.findall(r'^    "([^"]+)",$', re.search(r"^dependencies = \[(.*?)^\]", project, re.S | re.M)[1], re.M)
    assert "asks for: " + ", ".join(f"`{one}`" for one in required) + "." in PAGE
    (rows,) = tables(VERSIONS_TABLE)
    pythons = re.findall(r"Programming Language :: Python :: (3\.\d+)", project)
    assert rows[-2][0] == ", ".join(pythons) and rows[-1][0] == f"{pythons[0]} to {pythons[-1]}"
    bounds = dict(re.match(r"([\w-]+)>=([\d.]+)", one).groups() for one in required if ">=" in one)
    wanted = [f"{bounds['torch']} or later", f"{bounds['cuda-python']} or later", f"{bounds['cuda-core']} or later, below 2"]
    assert [rows[-1][column] for column in (1, 3, 4)] == wanted
    for version in (row[0] for row in rows[:2]):
        assert re.match(r"3\.\d+", version)[0] in pythons
    (matrix,) = re.findall(r"python: \[(.*)\]", (ROOT / ".github/workflows/ci.yml").read_text())
    assert re.findall(r'"([\d.]+)"', matrix) == pythons


def test_engines_are_those_that_their_page_has():
    (rows,) = tables(ENGINES_TABLE)
    page = (ROOT / "docs/engines.md").read_text()
    versions = re.findall(r"^\| (vLLM|SGLang) ([\d.]+) \| .*? \| (yes|no)\b", page, re.M)
    run = dict(re.findall(r"^(vllm|sglang)_wheel=\"[\w-]+==([\d.]+)\"", (ROOT / "tools/engines.sh").read_text(), re.M))
    told = {(title, version): row[1] for row in rows for title in ("vLLM", "SGLang") if row[0].startswith(title) for version in re.findall(r"\d+\.\d+\.\d+", row[0])}  # fmt: skip
    assert {(title, version) for title, version, _ in versions} == set(told) and len(told) > 5
    for title, version, on_cpu in versions:
        assert told[title, version].startswith("on the CPU" if on_cpu == "yes" else "expected"), (title, version)
        assert (on_cpu == "yes") == (run[title.lower()] == version)
    assert "**No plug-in has run in an engine on a GPU.**" in PAGE and "**No line of this page has run on a GPU yet.**" in page


# -- tests that documents name

FUNCTIONS = {
    node.name
    for path in TESTS.rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.FunctionDef)
}
FILES = {path.stem for path in TESTS.rglob("*.py")}


def missing_tests(text):
    """Tests that a document names and that are not there."""
    named = set(re.findall(r"\btest_\w+", text))
    paths = set(re.findall(r"`(tests/[\w/.]+\.py)`", text))
    bodies = {body for inside in re.findall(r"`test_\w+` \(([\w, ]+)\)", text) for body in inside.split(", ")}
    gone = {name for name in named if name not in FUNCTIONS | FILES} | {path for path in paths if not (ROOT / path).exists()}
    return gone | {body for body in bodies if "_" in body and body not in FUNCTIONS}


@pytest.mark.parametrize("page", [*USERS, "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"])
def test_tests_that_documents_name_exist(page):
    assert missing_tests((ROOT / page).read_text()) == set()


def test_a_test_that_is_gone_would_be_noticed():
    assert missing_tests("see `test_that_was_removed`, `tests/front/test_gone.py`, `test_v2` (removed_body, sizes)") == {
        "test_that_was_removed",
        "test_gone",
        "tests/front/test_gone.py",
        "removed_body",
    }


# -- sentences

WORDS = re.compile(r"\b(never|always|any|every|everywhere|anywhere|anything)\b|\b2[-–]8\b|\b[25] to 8\b", re.I)


def sentences(text):
    """Those that promise something by their words: of paragraphs, items and rows of tables, without examples and headings."""
    text = re.sub(r"```.*?```|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.S)
    for block in re.split(r"\n\s*\n|\n(?=\s*(?:[-*|#>]|\d+\.) ?)", text):
        block = " ".join(block.split())
        for sentence in [block] if block.startswith("|") else re.split(r"(?<=[.;:]) (?=[A-Z`*\[(])", block):
            if WORDS.search(sentence) and not sentence.startswith("#"):
                yield sentence


def promises():
    phrases, pages = tables(PROMISES_TABLE)
    return phrases, {row[0] for row in pages}, pages


def without_status(page, text, phrases):
    mine = [row[1] for row in phrases if row[0] == page]
    return [sentence for sentence in sentences(text) if not any(phrase in sentence for phrase in mine)]


@pytest.mark.parametrize("page", USERS)
def test_sentences_have_a_status(page):
    phrases, whole_pages, _ = promises()
    text = (ROOT / page).read_text()
    flat = " ".join(text.split())
    for row in phrases:
        if row[0] == page:
            assert row[1] in flat, f"{page} does not say: {row[1]}"
    if page not in whole_pages | OF_RUNS:
        assert without_status(page, text, phrases) == []


def test_rows_of_promises_have_a_status_and_what_keeps_them():
    phrases, _, pages = promises()
    assert len(phrases) > 50 and {row[0] for row in [*phrases, *pages]} <= set(USERS)
    for row in [*phrases, *pages]:
        status, by = row[-2:]
        assert any(word in status for word in STATUSES) or status.startswith(("definition", "says", "this page")), row
        nothing_to_test = status.startswith(("definition", "expected"))
        assert nothing_to_test or re.search(r"`tests?[_/]\w+|\(benchmarks/", by), row


def test_a_sentence_without_a_status_would_be_noticed():
    phrases, *_ = promises()
    readme = (ROOT / "README.md").read_text()
    assert without_status("README.md", readme + "\n\nIt never fails. It works.\n", phrases) == ["It never fails."]
    dropped = [row for row in phrases if row[1] not in ("2–8 GPUs, NVLink between all of them", "never on 5 to 8 GPUs")]
    assert len(dropped) == len(phrases) - 2
    (row,) = without_status("README.md", readme, dropped)
    assert row.startswith("| 2–8 GPUs")


def test_readme_says_of_every_row_what_has_run():
    table = re.search(
        r"^\| your machine \| what runs \| status \|\n\|[-|]+\|\n((?:\|.*\n)+)", (ROOT / "README.md").read_text(), re.M
    )[1]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table.strip().split("\n")]
    assert [re.search(r"\*\*(.*?)\*\*", row[1])[1] for row in rows] == list(NAMED.values())
    for row in rows:
        assert "measured on" in row[2]
    assert "never on 5 to 8 GPUs" in rows[0][2]
    assert f"tested for {len(list((TESTS / 'helpers/machines').glob('*.json')))} machines" in rows[3][2]
    assert "(docs/compatibility.md)" in (ROOT / "README.md").read_text()
