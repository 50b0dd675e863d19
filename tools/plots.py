"""Plots of committed runs (docs/benchmarks): latency, multiples of the speed of light, and calls with a norm."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from canvas import Canvas, wrapped

from allreduce_jit.bench.html import Series, _Scale, _ticks
from allreduce_jit.harness.report import format_size

BENCHMARKS = Path(__file__).parents[1] / "docs" / "benchmarks"
ON_TWO = "2026-11-30-2xH200.json"
BY_RANKS = {2: ON_TWO, 3: "2026-11-22-3xH200.json", 4: "2026-11-22-4xH200.json"}
NORMS = "2026-11-29-2xH200-norms.json"
NORM_RUN = "allreduce-jit bench --op add-rms-norm --gpus 2 --graph --peers nccl,torch_two_shot --json"
NAMES = {
    "nccl": "NCCL",
    "nccl_symm": "NCCL, registered window",
    "torch_one_shot": "torch symmetric memory, one-shot",
    "torch_two_shot": "torch symmetric memory, two-shot",
}
WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM = 920, 450, 58, 34, 66


def _run(name: str) -> dict:
    return json.loads((BENCHMARKS / name).read_text(encoding="utf-8"))


def _graphs(name: str) -> list[dict]:
    return [row for row in _run(name)["rows"] if row["mode"] == "graph"]


def latency() -> str:
    """Time a call over its size on 2 GPUs, beside others and the speed of light."""
    rows = _graphs(ON_TWO)
    series = [Series("speed of light (SoL)", 0, [(row["bytes"], row["sol_us"]) for row in rows], dashed=True)]
    for i, (name, words) in enumerate(NAMES.items()):
        series.append(Series(words, i + 2, [(row["bytes"], row["peers"][name]["p50_us"]) for row in rows]))
    series.append(Series("allreduce_jit", 1, [(row["bytes"], row["p50_us"]) for row in rows]))
    title = "Time of an all-reduce, µs: 2 H200s over NVLink, bf16, in CUDA graphs; less is better"
    note = f"Median of the replays, then the slowest rank. Run of {ON_TWO[:10]}: docs/benchmarks/{ON_TWO}"
    return _plot(title, "bytes a rank", "µs", series, note)


def ratio() -> str:
    """Time a call as a multiple of the speed of light, by number of GPUs."""
    series = []
    for ranks, name in BY_RANKS.items():
        series.append(Series(f"{ranks} GPUs", ranks - 1, [(row["bytes"], row["sol_ratio"]) for row in _graphs(name)]))
    title = "Time of an all-reduce over the speed of light of the same run: 2, 3 and 4 H200s, bf16, in CUDA graphs"
    dates = ", ".join(f"{ranks} GPUs {name[:10]}" for ranks, name in BY_RANKS.items())
    note = f"1 is the least time that flag, hop and plain stores allow; large calls store better than that. Runs: {dates}"
    return _plot(title, "bytes a rank", "× SoL", series, note, one=True)


def norms() -> str:
    """Calls with residual and RMSNorm behind the sum, over the number of rows."""
    document = _run(NORMS)
    rows = [row for row in document[NORM_RUN] if row["hidden"] == 4096]
    series = [Series("SoL of the all-reduce alone", 0, [(row["rows"], row["sol_us"]) for row in rows], dashed=True)]
    for colour, name in ((2, "nccl"), (5, "torch_two_shot")):
        points = [(row["rows"], row["peers"][name]["p50_us"]) for row in rows]
        series.append(Series(f"{NAMES[name]}, then a norm", colour, points))
    for colour, field, words in (
        (4, "unfused", "allreduce_jit, apart"),
        (3, "all_reduce", "all-reduce alone"),
        (1, "fused", "fused"),
    ):
        series.append(Series(words, colour, [(row["rows"], row[field]["p50_us"]) for row in rows]))
    title = "All-reduce, residual and RMSNorm, µs: rows of 4096 bf16, 2 H200s, in CUDA graphs; less is better"
    note = f"Median of the replays, then the slowest rank. Run of {NORMS[:10]} at {document['commit']}: docs/benchmarks/{NORMS}"
    return _plot(title, "rows", "µs", series, note, sizes=False)


def _plot(title: str, across: str, up: str, series: Sequence[Series], note: str, one: bool = False, sizes: bool = True) -> str:
    """A plot with logarithmic axes and a legend; ``sizes``: the points' first halves are bytes."""
    legend = _legend(series)
    top = 64 + 20 * len(legend)
    picture = Canvas(WIDTH, HEIGHT, title)
    picture.write(16, 26, title, "title")
    for j, row in enumerate(legend):
        for at, s in row:
            y = 46 + 20 * j
            picture.curve([(at, y), (at + 24, y)], s.colour, 3, s.dashed)
            picture.write(at + 30, y + 4, s.name, "soft")
    sides = [a for s in series for a, _ in s.points]
    values = [b for s in series for _, b in s.points] + [1.0] * one
    x = _Scale(min(sides), max(sides), LEFT, WIDTH - RIGHT)
    y = _Scale(min(values) / 1.1, max(values) * 1.1, HEIGHT - BOTTOM, top)
    for value in _ticks(y.low, y.high):
        picture.line([(LEFT, y(value)), (WIDTH - RIGHT, y(value))])
        picture.write(LEFT - 8, y(value) + 4, f"{value:g}", "soft end")
    known = sorted(set(sides))
    for side in known[:: -(-len(known) // 12)]:
        picture.write(x(side), HEIGHT - BOTTOM + 17, format_size(side) if sizes else str(side), "soft middle")
    if one:
        picture.line([(LEFT, y(1)), (WIDTH - RIGHT, y(1))], "arrow dash")
    picture.write(LEFT - 8, top - 12, up, "soft end")
    picture.write(WIDTH - 16, HEIGHT - BOTTOM + 34, across, "soft end")
    for s in series:
        heavy = 3 if s.colour == 1 and not one else 1.8
        picture.curve([(x(a), y(b)) for a, b in s.points], s.colour, heavy, s.dashed)
        for a, b in s.points:
            where = format_size(a) if sizes else f"{a} rows"
            picture.dot(x(a), y(b), heavy, s.colour, f"{s.name}, {where}: {b:.4g} {up}")
    for j, line in enumerate(wrapped(note, 120)):
        picture.write(16, HEIGHT - 22 + 15 * j, line, "soft")
    return picture.text()


def _legend(series: Sequence[Series]) -> list[list[tuple[float, Series]]]:
    """Rows of (x, series), wrapped at the picture's width."""
    rows: list[list[tuple[float, Series]]] = [[]]
    at = 16.0
    for s in series:
        wide = 52 + 6.6 * len(s.name)
        if rows[-1] and at + wide > WIDTH:
            rows.append([])
            at = 16.0
        rows[-1].append((at, s))
        at += wide
    return rows
