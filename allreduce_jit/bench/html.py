"""The HTML page of ``allreduce-jit bench``: a pure function of its JSON documents, older ones without a floor included.

One file without scripts and without anything from outside: plots are inline SVG, colours follow the reader's light
or dark scheme, and every mark has its figure as a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from html import escape
from typing import Any

from ..harness import report

WIDTH, HEIGHT = 860, 420
LEFT, RIGHT, TOP, BOTTOM = 66, 30, 46, 62  # so that labels are apart at the size that a phone needs
APART = 32 / (HEIGHT - TOP - BOTTOM)  # least distance of two labels, of the height of a plot
SLOTS = {"nccl": 2, "nccl_symm": 3, "torch_one_shot": 4, "torch_two_shot": 5, "sglang": 6, "flashinfer": 7}
_EAGER = {"with out=": "with_out", "ever new addresses": "ever_new", "the same with out=": "ever_new_with_out"}
_STYLE = """
:root { color-scheme: light dark; --page: #fcfcfb; --ink: #1c1c1a; --soft: #63625d; --line: #e2e1dc; --c0: #63625d;
  --c1: #2a6fd6; --c2: #d9602b; --c3: #12936a; --c4: #b07d00; --c5: #8453c9; --c6: #cc3f78; --c7: #0f8ca3; }
@media (prefers-color-scheme: dark) { :root { --page: #181817; --ink: #f0efea; --soft: #a9a8a1; --line: #383835;
  --c0: #a9a8a1; --c1: #5b9cf2; --c2: #f0824f; --c3: #34bd8d; --c4: #d9a41e; --c5: #ab86e8; --c6: #ee6d9e;
  --c7: #37b6cd; } }
body { background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
  max-width: 1000px; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.25rem; margin-top: 2.5rem; } h3 { font-size: 1rem; margin-top: 1.8rem; }
p, li { color: var(--soft); overflow-wrap: anywhere; } ul { padding-left: 1.2rem; }
figure { margin: .6rem 0; } figcaption { color: var(--soft); }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.grid { stroke: var(--line); } .one { stroke: var(--soft); stroke-dasharray: 2 4; }
.key { display: inline-block; margin-right: 1.1rem; white-space: nowrap; }
.key i { display: inline-block; width: 1.3em; border-top: 3px solid; vertical-align: middle; margin-right: .4em; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { border-bottom: 1px solid var(--line); padding: .2rem .6rem; text-align: right; white-space: nowrap; }
td:first-child, th:first-child { text-align: left; } td.best { font-weight: 700; }
@media (max-width: 600px) { body { margin: 1rem auto; } svg text { font-size: 24px; } }
"""


@dataclass(frozen=True)
class Series:
    """One line: its name, its colour's number, and (bytes, value) in rising order of bytes."""

    name: str
    colour: int
    points: list[tuple[int, float]]
    dashed: bool = False


def page(documents: Iterable[dict[str, Any]]) -> str:
    """The page for documents of ``bench --json``, one section each."""
    sections = "\n".join(map(_section, documents))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>allreduce_jit: all-reduce times</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f"<h1>allreduce_jit: all-reduce times</h1>\n{sections}\n</body>\n</html>\n"
    )


def _section(document: dict[str, Any]) -> str:
    facts, options = document["communicator"], document.get("options", {})
    floor = document.get("floor", {})
    notes = [
        report.headline(document["machine"]),
        f"path {facts['path']}; {'; '.join(report.reasons(facts['reasons']))}",
        f"{document['unit']}; NVLink multicast {document['multicast']}",
        f"wrong elements: {document['wrong']}" + ("" if options.get("check", True) else " (not checked)"),
    ]
    if "both_gbs" in floor:
        notes.append(
            "SoL: an exchange of 16-byte packets through host memory up to 1 MB, beyond t_flag "
            f"{floor['flag_us']:.2f} µs + 2(n−1)/n·S/BW with BW {floor['both_gbs']:.1f} GB/s in and out at once, measured in this run"
        )
    elif "flag_us" in floor:
        notes.append(
            f"SoL, the speed of light: t_flag {floor['flag_us']:.2f} µs + min((n−1)·S/BW, t_hop "
            f"{floor['hop_us']:.2f} µs + 2(n−1)/n·S/BW) with BW {floor['egress_gbs']:.1f} GB/s, measured in this run"
        )
    else:
        notes.append(f"no SoL: {floor.get('reason', 'not measured')}")
    notes += [f"{name}: unavailable: {why}" for name, why in document["peers"].items() if why is not None]
    names = [name for name, why in document["peers"].items() if why is None]
    rows = document["rows"]
    dtype = rows[0]["dtype"] if rows else ""
    parts = [f"<h2>{facts['world_size']} ranks, {escape(dtype)}</h2>", "<ul>"]
    parts += [f"<li>{escape(note)}</li>" for note in notes]
    parts.append("</ul>")
    for mode in dict.fromkeys(row["mode"] for row in rows):
        parts.append(_mode(mode, [row for row in rows if row["mode"] == mode], names))
    return "\n".join(parts)


def _mode(mode: str, rows: list[dict[str, Any]], names: list[str]) -> str:
    rows = sorted(rows, key=lambda row: row["bytes"])
    ours = Series("ours", 1, _points(rows, lambda row: row["p50_us"]))
    light = Series("SoL", 0, _points(rows, lambda row: row.get("sol_us")), dashed=True)
    competitors = [
        Series(name, SLOTS.get(name, 2 + i % 6), _points(rows, lambda row, name=name: _time(row, name)))
        for i, name in enumerate(names)
    ]
    ratios = [
        Series("ours / SoL", 1, _points(rows, lambda row: row.get("sol_ratio"))),
        Series("ours / best competitor", 2, _points(rows, _to_best_competitor)),
    ]
    return "\n".join(
        [
            f"<h3>{escape(mode)}: time per call</h3>",
            _figure([light, *competitors, ours], "µs", "time per call in µs (p50) over the size of the message"),
            f"<h3>{escape(mode)}: ratios</h3>",
            _figure(ratios, "×", "time of ours as a multiple; 1 is equal, less is faster", one=True),
            f"<h3>{escape(mode)}: figures in µs</h3>",
            _table(rows, names),
        ]
    )


def _points(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float | None]) -> list[tuple[int, float]]:
    pairs = ((row["bytes"], value(row)) for row in rows)
    return [(nbytes, found) for nbytes, found in pairs if found]


def _time(row: dict[str, Any], name: str) -> float | None:
    return row["peers"].get(name, {}).get("p50_us")


def _to_best_competitor(row: dict[str, Any]) -> float | None:
    times = [cell["p50_us"] for cell in row["peers"].values() if cell.get("p50_us")]
    return row["p50_us"] / min(times) if times else None


def _figure(series: list[Series], unit: str, caption: str, one: bool = False) -> str:
    """A log-log plot of the series that have points, with a legend; ``one`` marks the value 1."""
    series = [s for s in series if s.points]
    if not series:
        return "<p>Nothing to compare with.</p>"
    sizes = [nbytes for s in series for nbytes, _ in s.points]
    values = [value for s in series for _, value in s.points] + [1.0] * one
    x = _Scale(min(sizes), max(sizes), LEFT, WIDTH - RIGHT)
    y = _Scale(min(values) / 1.15, max(values) * 1.15, HEIGHT - BOTTOM, TOP)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">']
    for value in _ticks(y.low, y.high):
        at = y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{value:g}</text>')
    known = sorted(set(sizes))
    for nbytes in known[:: -(-len(known) // 12)]:
        parts.append(
            f'<text x="{x(nbytes):.1f}" y="{HEIGHT - BOTTOM + 26}" text-anchor="middle">{report.format_size(nbytes)}</text>'
        )
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 4}" text-anchor="end">bytes</text>')
    parts.append(f'<text x="{LEFT - 8}" y="{TOP - 26}" text-anchor="end">{unit}</text>')
    if one:
        parts.append(f'<line class="one" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(1):.1f}" y2="{y(1):.1f}"/>')
    parts += [_line(s, x, y, unit) for s in series]
    keys = (f'<span class="key"><i style="{_key(s)}"></i>{escape(s.name)}</span>' for s in series)
    return f"<figure>{''.join(keys)}\n{''.join(parts)}</svg>\n<figcaption>{escape(caption)}</figcaption></figure>"


def _line(s: Series, x: _Scale, y: _Scale, unit: str) -> str:
    at = [(x(nbytes), y(value), nbytes, value) for nbytes, value in s.points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _, _ in at)
    width, colour = (3 if s.colour == 1 else 1.8), f"var(--c{s.colour})"
    dashes = ' stroke-dasharray="6 4"' if s.dashed else ""
    parts = [f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"{dashes}/>']
    for a, b, nbytes, value in at:
        text = f"{s.name}, {report.format_size(nbytes)}: {value:.4g} {unit}"
        # The small dot is seen, the large clear one is what a pointer finds.
        parts.append(f'<g><title>{escape(text)}</title><circle cx="{a:.1f}" cy="{b:.1f}" r="{width}" fill="{colour}"/>')
        parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="9" fill="transparent"/></g>')
    return "".join(parts)


def _key(s: Series) -> str:
    return f"border-top-color: var(--c{s.colour}); border-top-style: {'dashed' if s.dashed else 'solid'}"


class _Scale:
    """A logarithmic axis: values ``low`` … ``high`` to pixels ``start`` … ``end``."""

    def __init__(self, low: float, high: float, start: float, end: float):
        if low == high:  # a single size stands in the middle
            low, high = low / 2, high * 2
        self.low, self.high, self._start, self._end = low, high, start, end

    def __call__(self, value: float) -> float:
        part = math.log(value / self.low) / math.log(self.high / self.low)
        return self._start + part * (self._end - self._start)


def _ticks(low: float, high: float) -> list[float]:
    """Round values from ``low`` to ``high``, at least two, as many as have room for their labels on a logarithmic axis:

    1, 2, 5, 10 …, or fewer of each decade on a long axis; even steps on a short one.
    """
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    grids = [[s * 10.0**d for d in decades for s in of_each] for of_each in ((1, 2, 5), (1, 3), (1,))]
    grids += [[10.0**d for d in decades if d % every == 0] for every in range(2, len(decades))]
    finest = math.floor(math.log10((high - low) * APART)) - 1
    for step in (s * 10.0**d for d in range(finest, finest + 3) for s in (1, 2, 5)):
        grids.append([i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)])
    shown = [[float(f"{value:.12g}") for value in grid if low <= value <= high] for grid in grids]
    room = math.log(high / low) * APART
    return max((found for found in shown if all(math.log(b / a) >= room for a, b in zip(found, found[1:]))), key=len)


def _table(rows: list[dict[str, Any]], names: list[str]) -> str:
    light = any(row.get("sol_us") for row in rows)
    eager = [(head, field) for head, field in _EAGER.items() if any(row.get(field) for row in rows)]
    heads = ["size", "algorithm", "ours p50", "p99", *(head for head, _ in eager)]
    heads += ["SoL", "ours / SoL"] if light else []
    heads += [head for name in names for head in (f"{name} p50", "p99")] + ["wrong"]
    lines = [f"<tr>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>"]
    for row in rows:
        best = min([row["p50_us"], *filter(None, (_time(row, name) for name in names))])
        cells = [f"<td>{report.format_size(row['bytes'])}</td>", f"<td>{escape(row['algorithm'])}</td>"]
        cells += [_cell(row["p50_us"], best), _cell(row["p99_us"])]
        cells += [_cell((row.get(field) or {}).get("p50_us")) for _, field in eager]
        cells += [_cell(row.get("sol_us")), _cell(row.get("sol_ratio"))] if light else []
        for name in names:
            cell = row["peers"].get(name, {})
            cells += [_cell(cell.get("p50_us"), best, cell.get("reason", "")), _cell(cell.get("p99_us"))]
        cells.append(f"<td>{'not checked' if row['wrong'] is None else row['wrong']}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="scroll"><table>{"".join(lines)}</table></div>'


def _cell(value: float | None, best: float | None = None, reason: str = "") -> str:
    if value is None:
        return f'<td title="{escape(reason)}">–</td>' if reason else "<td>–</td>"
    return f"<td{' class=best' if value == best else ''}>{value:.2f}</td>"
