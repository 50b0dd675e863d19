"""The pictures of the documents are what their descriptions, the code and the committed runs say now; if not: ``python tools/draw.py``."""

from __future__ import annotations

import ast
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import draw
import plots
import pytest
import structure
import timelines
from helpers import ROOT

import allreduce_jit
from allreduce_jit.policy import backends, checks
from allreduce_jit.policy.verdict import CODES

PICTURES = ROOT / "docs" / "pictures"
ARCHITECTURE = (ROOT / "docs/architecture.md").read_text()
NEW = draw.pictures()


def words(name):
    """All text of a picture."""
    return "\n".join(element.text or "" for element in ElementTree.fromstring(NEW[name]).iter() if element.tag.endswith("}text"))


def test_no_picture_is_missing_or_left_over():
    assert {path.name for path in PICTURES.glob("*.svg")} == set(NEW)
    assert len(NEW) == 8


@pytest.mark.parametrize("name", NEW)
def test_committed_pictures_are_true(name):
    assert (PICTURES / name).read_text() == NEW[name], "make pictures"


@pytest.mark.parametrize("name", NEW)
def test_pictures_can_be_read_anywhere(name):
    """A page of its own, light and dark; nothing from outside, no scripts; every mark on the page; a title for those who hear it."""
    root = ElementTree.fromstring(NEW[name])
    width, height = float(root.get("width")), float(root.get("height"))
    assert root.get("viewBox") == f"0 0 {width:g} {height:g}" and root.get("aria-label")
    assert "prefers-color-scheme: dark" in NEW[name] and not re.search(r"<script|href=|url\(|var\(", NEW[name])
    for element in root.iter():
        for x, y in (("x", "y"), ("cx", "cy")):
            if element.get(x) is not None and element.tag.split("}")[1] in ("text", "rect", "circle"):
                assert 0 <= float(element.get(x)) <= width and 0 <= float(element.get(y)) <= height, element.attrib


@pytest.mark.parametrize("document", [ROOT / "README.md", *(ROOT / "docs").glob("*.md")], ids=lambda path: path.name)
def test_shown_pictures_exist(document):
    for text, target in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", document.read_text()):
        assert text and (document.parent / target).is_file(), target


def test_every_picture_is_shown():
    shown = "".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    assert not [name for name in NEW if f"pictures/{name})" not in shown]


# -- timelines


GOOD = "title T\nlanes a, b\nall 0-1 push p\nall 1-3 wait w\nexchange 1 2"


def test_a_timeline():
    found = timelines.read(GOOD)
    assert found.boxes == [(0, 0, 1, "push", "p"), (1, 0, 1, "push", "p"), (0, 1, 3, "wait", "w"), (1, 1, 3, "wait", "w")]
    assert found.arrows == [(0, 1, 1, 2, ""), (1, 1, 0, 2, "")]


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (GOOD.replace("exchange 1 2", "exchange 2 1"), "no arrow"),  # back in time
        (GOOD.replace("exchange 1 2", "exchange 1 4"), "no arrow"),  # to where nothing waits
        (GOOD.replace("1-3", "0.5-3"), "overlap"),
        (GOOD.replace("all 1-3 wait w", "0 1-3 wait w").replace("all 0-1", "0 0-1"), "no boxes"),
        (GOOD.replace("wait w", "nap w"), "expected kinds"),
        (GOOD + "\nmerry christmas", "begins no line"),
        (
            "title T\nlaunches two_shot_stream 4 bfloat16 4",
            "no call has 4 launches",
        ),  # the protocol's condition: never 1 modulo 3
    ],
)
def test_what_cannot_be_is_not_drawn(bad, why):
    with pytest.raises(ValueError, match=why):
        timelines.read(bad)


def test_buffers_of_the_stream_are_the_planned_ones(monkeypatch):
    text = (PICTURES / "stream.txt").read_text()
    asides = timelines.read(text).asides
    scatters, gathers = zip(*(aside.split(", ") for aside in asides))
    assert len(asides) == 5 and len(set(scatters)) == 3 and set(gathers) == {"1", "4"}
    assert scatters[0] != scatters[-1]  # a call must not begin with the buffer that the last one ended with
    monkeypatch.setattr(timelines.nvlink, "_STREAM_SCATTERS", (0, 2, 3))
    assert timelines.draw(timelines.read(text)) != NEW["stream.svg"]


# -- the ladder


def test_the_ladder_has_every_code():
    shown = set(re.findall(r"[a-z0-9-]+", words("ladder.svg")))
    assert set(CODES) <= shown
    steps = {code for row in backends.BACKENDS for code in structure.from_rung(row)}
    assert set(CODES) - {*steps, *structure.for_all()} == {"full-nvlink", "no-nccl"}


def test_a_new_requirement_is_a_new_picture(monkeypatch):
    legacy = replace(backends.BACKENDS[1], requires=(checks.fabric_ready, checks.peer_access))
    monkeypatch.setattr(backends, "BACKENDS", (backends.BACKENDS[0], legacy))
    assert "fabric-not-ready" in structure.from_rung(legacy) and structure.ladder() != NEW["ladder.svg"]


# -- the house


def test_the_house_has_every_room_once():
    package = Path(allreduce_jit.__file__).parent
    there = {path.stem for path in package.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    rooms = [name for names, _ in structure.rooms(ARCHITECTURE) for name in names]
    assert len(rooms) == len(set(rooms)) and set(rooms) == there - {"__init__", "__main__"}


def test_no_room_imports_one_above():
    floors = {name: floor for floor, (names, _) in enumerate(structure.rooms(ARCHITECTURE)) for name in names}
    package = Path(allreduce_jit.__file__).parent
    seen = 0
    for path in package.rglob("*.py"):
        here = path.relative_to(package).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level and here[0] in floors:
                base = here[: len(here) - node.level]
                target = (*base, *(node.module or node.names[0].name).split("."))[0]
                assert floors.get(target, floors[here[0]]) >= floors[here[0]], (here, target)
                seen += 1
    assert seen > 100


def test_a_house_without_a_drawing():
    with pytest.raises(ValueError, match="no drawing"):
        structure.rooms("# Architecture\n")
    with pytest.raises(ValueError, match="four spaces"):
        structure.rooms("```\ncli bench\n```")


# -- plots


def test_plots_show_the_committed_figures():
    """Every point has its figure as a tooltip; two of them, and how many there are, against the documents of the runs."""
    run = plots._run(plots.ON_TWO)
    rows = [row for row in run["rows"] if row["mode"] == "graph"]
    assert len(rows) == 19 and rows[0]["bytes"] == 1024
    latency = NEW["latency.svg"]
    assert latency.count("<circle") == len(rows) * 6
    assert f"allreduce_jit, 1K: {rows[0]['p50_us']:.4g} µs" in latency
    assert f"NCCL, 256M: {rows[-1]['peers']['nccl']['p50_us']:.4g} µs" in latency
    assert f"4 GPUs, 1M: {next(r['sol_ratio'] for r in plots._graphs(plots.BY_RANKS[4]) if r['bytes'] == 1 << 20):.4g} × SoL" in NEW["ratio.svg"]  # fmt: skip
    assert "fused, 1 rows: 1.842 µs" in NEW["norms.svg"]


@pytest.mark.parametrize("name", ["latency.svg", "ratio.svg", "norms.svg"])
def test_plots_have_units_and_legend(name):
    text = words(name)
    assert ("× SoL" if name == "ratio.svg" else "µs") in text.splitlines()
    assert ("rows" if name == "norms.svg" else "bytes a rank") in text.splitlines()
    legend = {"latency.svg": 6, "ratio.svg": 3, "norms.svg": 6}[name]
    assert NEW[name].count('class="curve') == 2 * legend
    ticks = [line for line in text.splitlines() if re.fullmatch(r"[\d.]+", line)]
    assert len(ticks) >= 3
    assert "bf16" in text and "H200" in text and re.search(r"202\d-\d\d-\d\d", text)
