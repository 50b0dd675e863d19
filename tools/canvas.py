"""Pictures as SVG text: a page of its own colours, light or dark as the reader's system is, and marks that name classes of one style.

The page is painted, so that a picture can be read on whatever lies behind it. No number is printed with more than one decimal, so the
same description gives the same bytes everywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

# Of light and of dark pages. Classes rather than variables, which not every renderer of SVG knows: those show the light one.
_LIGHT = {"page": "#fcfcfb", "ink": "#1c1c1a", "soft": "#63625d", "line": "#d8d7d1"}
_DARK = {"page": "#181817", "ink": "#f0efea", "soft": "#a9a8a1", "line": "#45453f"}
_LINES = (
    ["#63625d", "#2a6fd6", "#d9602b", "#12936a", "#b07d00", "#8453c9"],
    ["#a9a8a1", "#5b9cf2", "#f0824f", "#34bd8d", "#d9a41e", "#ab86e8"],
)
_AREAS = (
    ["#e9e8e3", "#d4e4fb", "#fbdccf", "#cdeee2", "#f6e7bd", "#e6dbf7"],
    ["#2e2e2b", "#1d3557", "#5a2d1a", "#123f31", "#4a3a0c", "#37275a"],
)
_TEXT = """text { font: 13px system-ui, sans-serif; } .soft { font-size: 12px; } .title { font-size: 15px; font-weight: 600; }
.name { font-weight: 600; } .code { font: 12px ui-monospace, monospace; } .middle { text-anchor: middle; } .end { text-anchor: end; }
.line, .arrow, .curve { fill: none; } .arrow { stroke-width: 1.3; } .dash { stroke-dasharray: 6 4; }"""


def _colours(of: dict[str, str], lines: Sequence[str], areas: Sequence[str]) -> str:
    found = [f"text, .tip {{ fill: {of['ink']}; }} .soft {{ fill: {of['soft']}; }} .page {{ fill: {of['page']}; }}"]
    found.append(f".line {{ stroke: {of['line']}; }} .arrow {{ stroke: {of['ink']}; }}")
    for i, (line, area) in enumerate(zip(lines, areas)):
        found.append(f".c{i} {{ stroke: {line}; }} .d{i} {{ fill: {line}; }} .f{i} {{ fill: {area}; stroke: {line}; }}")
    return "\n".join(found)


STYLE = (
    f"{_TEXT}\n{_colours(_LIGHT, _LINES[0], _AREAS[0])}\n"
    f"@media (prefers-color-scheme: dark) {{\n{_colours(_DARK, _LINES[1], _AREAS[1])}\n}}"
)
# A kind of box is a colour of the style.
KINDS = {"memory": 0, "push": 1, "wait": 4, "sum": 3, "gather": 5, "stop": 2}


class Canvas:
    """Collects marks; ``text`` ends it. Coordinates are pixels from the upper left corner."""

    def __init__(self, width: int, height: int, label: str):
        self.width, self.height = width, height
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
            f'aria-label="{escape(label)}">',
            f"<title>{escape(label)}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{width}" height="{height}" rx="8"/>',
        ]

    def write(self, x: float, y: float, text: str, css: str = "") -> None:
        """``css``: classes of the style, such as ``soft end``."""
        of = f' class="{css}"' if css else ""
        self._parts.append(f'<text x="{_n(x)}" y="{_n(y)}"{of}>{escape(text)}</text>')

    def box(self, x: float, y: float, width: float, height: float, colour: int, tip: str = "") -> None:
        inner = f"<title>{escape(tip)}</title>" if tip else ""
        self._parts.append(
            f'<rect x="{_n(x)}" y="{_n(y)}" width="{_n(width)}" height="{_n(height)}" rx="4" class="f{colour}">{inner}</rect>'
        )

    def line(self, points: Sequence[tuple[float, float]], css: str = "line") -> None:
        self._parts.append(f'<polyline points="{_points(points)}" class="{css}"/>')

    def curve(self, points: Sequence[tuple[float, float]], colour: int, width: float, dashed: bool = False) -> None:
        """A line of a plot."""
        dash = " dash" if dashed else ""
        self._parts.append(f'<polyline points="{_points(points)}" class="curve c{colour}{dash}" stroke-width="{_n(width)}"/>')

    def dot(self, x: float, y: float, radius: float, colour: int, tip: str) -> None:
        title = f"<title>{escape(tip)}</title>"
        self._parts.append(f'<circle cx="{_n(x)}" cy="{_n(y)}" r="{_n(radius)}" class="d{colour}">{title}</circle>')

    def arrow(self, x: float, y: float, to_x: float, to_y: float, css: str = "arrow") -> None:
        """A line with a tip at its end."""
        length = ((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5
        along, across = ((to_x - x) / length, (to_y - y) / length), ((y - to_y) / length, (to_x - x) / length)
        back = to_x - 8 * along[0], to_y - 8 * along[1]
        self.line([(x, y), back], css)
        tip = [(to_x, to_y), *((back[0] + side * across[0], back[1] + side * across[1]) for side in (3.5, -3.5))]
        self._parts.append(f'<polygon points="{_points(tip)}" class="tip"/>')

    def text(self) -> str:
        return "\n".join([*self._parts, "</svg>\n"])


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{_n(x)},{_n(y)}" for x, y in points)


def _n(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def wrapped(text: str, columns: int) -> list[str]:
    """Lines of whole words."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and len(lines[-1]) + len(word) >= columns:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines
