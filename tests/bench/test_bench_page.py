"""The page of ``bench --html``, from documents that were measured and from ones made up here."""

import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest
from helpers import ROOT
from hypothesis import given
from hypothesis import strategies as st

from allreduce_jit.bench import bench, table
from allreduce_jit.bench import html as bench_page
from allreduce_jit.bench import speed_of_light as floor

RECORDED = ROOT / "docs" / "benchmarks" / "2026-11-21-4xH200.json"
H200 = floor.Floor(flag_us=1.51, flag_serial_us=1.91, empty_us=0.54, empty_serial_us=0.81, egress_gbs=352.0)
VOID = {"meta", "line", "circle", "polyline"}


class Reader(HTMLParser):
    """Checks that tags are balanced, and collects what the page shows."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.attributes, self.cells, self.titles = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)
        if self.open[-2:] == ["g", "title"]:
            self.titles.append(data)


@pytest.fixture
def recorded():
    """Documents from before there was a floor."""
    return bench._read(RECORDED)


@pytest.fixture
def with_floor(recorded):
    document = recorded[1]
    document["floor"] = H200.to_json()
    for row in document["rows"]:
        row["sol_us"] = H200.sol_us(row["bytes"], 4)
        row["sol_ratio"] = row["p50_us"] / row["sol_us"]
        row["with_out"] = {"p50_us": 7.25, "p99_us": 7.5} if row["mode"] == "eager" else None
    return document


def test_recorded_documents_are_found(recorded):
    assert [d["communicator"]["world_size"] for d in recorded] == [2, 4]


def test_old_documents_render(recorded):
    text = bench_page.page(recorded)
    shown = Reader(text)
    assert shown.tags.count("h2") == 2
    assert shown.tags.count("svg") == 2 * 2 * 2  # documents, modes, plots
    assert shown.tags.count("table") == 2 * 2
    assert "no SoL: not measured" in text and "ours / SoL" not in text
    for document in recorded:
        assert "no SoL: not measured" in table.render(document)
        for row in document["rows"]:
            assert f"{row['p50_us']:.2f}" in shown.cells
            assert f"{row['peers']['nccl']['p99_us']:.2f}" in shown.cells


def test_nothing_comes_from_outside(recorded):
    text = bench_page.page(recorded)
    assert "<script" not in text and "@import" not in text and "url(" not in text
    assert not [value for name, value in Reader(text).attributes if name in ("src", "href") or "//" in (value or "")]
    assert "prefers-color-scheme: dark" in text


def test_speed_of_light_and_ratios(with_floor):
    text = bench_page.page([with_floor])
    shown = Reader(text)
    assert "t_flag 1.51" in text and "t_hop 1.10" in text and "BW 352.0 GB/s" in text
    rows = [row for row in with_floor["rows"] if row["mode"] == "graph"]
    for row in rows:
        assert f"{row['sol_us']:.2f}" in shown.cells and f"{row['sol_ratio']:.2f}" in shown.cells
    first = rows[0]
    best = min(cell["p50_us"] for cell in first["peers"].values())
    assert f"ours, 1K: {first['p50_us']:.4g} µs" in shown.titles
    assert f"SoL, 1K: {first['sol_us']:.4g} µs" in shown.titles
    assert f"ours / SoL, 1K: {first['sol_ratio']:.4g} ×" in shown.titles
    assert f"ours / best competitor, 1K: {first['p50_us'] / best:.4g} ×" in shown.titles
    assert "7.25" in shown.cells


def test_every_measured_time_is_a_mark_inside_its_plot(with_floor):
    text = bench_page.page([with_floor])
    times = sum(2 + len(row["peers"]) for row in with_floor["rows"])  # ours, SoL, peers
    ratios = 2 * len(with_floor["rows"])
    assert len(Reader(text).titles) == times + ratios
    for x, y in re.findall(r'<circle cx="([^"]*)" cy="([^"]*)"', text):
        assert bench_page.LEFT <= float(x) <= bench_page.WIDTH - bench_page.RIGHT
        assert bench_page.TOP <= float(y) <= bench_page.HEIGHT - bench_page.BOTTOM


def test_what_is_missing_is_said(with_floor):
    with_floor["peers"]["flashinfer"] = "rank 0: flashinfer is not installed"
    with_floor["rows"][0]["peers"]["nccl"] = {"reason": "rank 1: <too> large"}
    text = bench_page.page([with_floor])
    shown = Reader(text)
    assert "flashinfer: unavailable: rank 0: flashinfer is not installed" in text
    assert ("title", "rank 1: <too> large") in shown.attributes and "<too>" not in text


def test_one_size_and_no_peer(with_floor):
    del with_floor["rows"][1:], with_floor["floor"]
    row = with_floor["rows"][0]
    row.update(peers={}, sol_us=None, sol_ratio=None)
    with_floor["peers"] = {}
    text = bench_page.page([with_floor])
    assert "Nothing to compare with." in text and len(Reader(text).titles) == 1


def test_ticks():
    assert bench_page._ticks(1.3, 600) == [2, 5, 10, 20, 50, 100, 200, 500]
    assert bench_page._ticks(1.1, 5000) == [3, 10, 30, 100, 300, 1000, 3000]
    assert bench_page._ticks(0.23, 1.3) == [0.4, 0.6, 0.8, 1, 1.2]
    assert bench_page._ticks(0.87, 1.16) == [0.9, 0.95, 1, 1.05, 1.1, 1.15]  # once 29 of them


@given(low=st.floats(1e-4, 1e5), wide=st.floats(1e-3, 1e7))
def test_ticks_are_few_and_round(low, wide):
    """At least two on any axis, round, rising and within it; no two of them so near that their labels would collide."""
    high = low * (1 + wide)
    ticks = bench_page._ticks(low, high)
    places = [bench_page._Scale(low, high, 0, bench_page.HEIGHT - bench_page.TOP - bench_page.BOTTOM)(tick) for tick in ticks]
    assert 2 <= len(ticks) <= 10 and low <= ticks[0] and ticks[-1] <= high
    assert min(b - a for a, b in zip(places, places[1:])) > 31.9
    steps = {f"{b - a:.5g}" for a, b in zip(ticks, ticks[1:])}
    assert {f"{tick:.9e}".rstrip("0")[:2] for tick in ticks} <= {"1.", "2.", "3.", "5."} or (
        len(steps) == 1 and steps.pop().strip("0.")[0] in "125"
    )


def test_the_document_stays_json(with_floor):
    assert json.loads(json.dumps(with_floor)) == with_floor


# -- in a browser

LOOK = """<script>
const texts = [...document.querySelectorAll("svg text")].map(text => text.getBoundingClientRect());
const apart = (a, b) => a.right <= b.left || b.right <= a.left || a.bottom <= b.top || b.bottom <= a.top;
const svgs = [...document.querySelectorAll("svg")].map(svg => [...svg.querySelectorAll("text")].map(t => t.getBoundingClientRect()));
document.title = JSON.stringify({
  wide: document.documentElement.scrollWidth, window: innerWidth, dark: getComputedStyle(document.body).backgroundColor,
  smallest: Math.min(...texts.map(box => box.height)),
  collide: svgs.flatMap(boxes => boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => !apart(a, b)))).length,
  outside: texts.filter(box => box.left < 0 || box.right > innerWidth).length,
  tables: [...document.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length,
});
</script>"""
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on PATH")
    return found


@pytest.mark.programs
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200], ids=["phone", "desktop"])
def test_in_a_browser(browser, width, dark, tmp_path):
    """Nothing to complain of on the console; the page is as wide as its window, plots can be read, tables scroll within it."""
    documents = bench._read(ROOT / "docs/benchmarks/2026-11-22-4xH200-third.json")
    documents += bench._read(ROOT / "docs/benchmarks/2026-11-28-2xH200-legacy.json")
    file = tmp_path / "page.html"
    file.write_text(bench_page.page(documents).replace("</body>", LOOK + "</body>"), encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", f"--user-data-dir={tmp_path}"]
    command += [
        f"--window-size={width},900",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        "--dump-dom",
        str(file),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert "CONSOLE" not in done.stderr, done.stderr
    seen = json.loads(html.unescape(re.findall(r"<title>(.*?)</title>", done.stdout)[0]))
    assert seen["window"] == width and seen["wide"] <= width
    assert seen["smallest"] >= 10 and seen["collide"] == 0 and seen["outside"] == 0
    assert seen["tables"] > 0 or width > 1000
    assert seen["dark"] == ("rgb(24, 24, 23)" if dark else "rgb(252, 252, 251)")
