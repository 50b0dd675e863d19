"""What a terminal can do and a file cannot: colours, a width to keep to, a line of progress that is overwritten."""

from __future__ import annotations

import os
import sys
import textwrap
import time
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

RED, GREEN, YELLOW, BOLD = "31", "32", "33", "1"
_LEAST_COLUMNS = 40
_SURE_S, _SURE = 2.0, 0.02  # seconds and share of the work after which what is left can be told


def columns(stream: Any) -> int | None:
    """How many columns ``stream`` has; None if it is no terminal, and nothing needs to fit."""
    if not stream.isatty():
        return None
    try:
        found = int(os.environ.get("COLUMNS", ""))
    except ValueError:
        found = 0
    if found <= 0:
        try:
            found = os.get_terminal_size(stream.fileno()).columns
        except (OSError, ValueError):  # a stand-in for a terminal
            found = 80
    return max(found or 80, _LEAST_COLUMNS)  # 0: the terminal does not know


def coloured(stream: Any) -> bool:
    """Whether colours are shown there: on a terminal, unless NO_COLOR says something or TERM is ``dumb``."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def paint(text: str, colour: str) -> str:
    """``text`` in a colour, if stdout shows colours."""
    return f"\033[{colour}m{text}\033[0m" if coloured(sys.stdout) else text


def verdict(good: bool, word: str, otherwise: str = "FAILED") -> str:
    """``word`` in green, or ``otherwise`` in red."""
    return paint(word, GREEN) if good else paint(otherwise, RED)


def painted(text: str, colours: Mapping[str, str]) -> str:
    """``text`` with the beginnings of lines that ``colours`` names in their colours."""

    def line(text: str) -> str:
        found = next((start for start in colours if text.startswith(start)), "")
        return paint(found, colours[found]) + text[len(found) :] if found else text

    return "\n".join(map(line, text.split("\n")))


def wrapped(text: str, indent: int) -> str:
    """``text`` with lines that fit stdout's terminal: what is too much for one goes on below, ``indent`` columns in.

    Words stay whole, and so do paths. What is no terminal gets the lines as they are.
    """
    room = columns(sys.stdout)
    if room is None:
        return text

    wrap = textwrap.TextWrapper(room, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap.fill(line) if len(line) > room else line for line in text.split("\n"))


class Progress:
    """One line on stderr's terminal that is overwritten, with an estimate of what is left; silent where ``wanted`` is not so, as
    on all ranks but one, and where stderr is no terminal."""

    def __init__(self, wanted: bool = True):
        self._live, self._began = wanted and sys.stderr.isatty(), time.monotonic()

    def __call__(self, text: str, done: float | None = None) -> None:
        """``done``: the share of all work that lies behind, from 0 to 1; None = nobody knows."""
        if self._live:
            room, left = (columns(sys.stderr) or 80) - 1, remaining(time.monotonic() - self._began, done)
            print(f"\r\033[K{text[: room - len(left)]}{left}", end="", file=sys.stderr, flush=True)

    def done(self) -> None:
        """Take the line away."""
        self("")


def remaining(elapsed_s: float, done: float | None) -> str:
    """``, about 3 min left``; nothing as long as that would be a guess."""
    if done is None or done < _SURE or elapsed_s < _SURE_S:
        return ""
    seconds = elapsed_s * (1 - min(done, 1.0)) / done
    for limit, size, name in ((100, 1, "s"), (100 * 60, 60, "min"), (1e9, 3600, "h")):
        if seconds < limit:
            return f", about {max(1, round(seconds / size))} {name} left"
    return ""


def shares(costs: Sequence[float]) -> list[float]:
    """Of steps that cost so much, which share of the whole lies behind when each begins."""
    total = sum(costs) or 1.0
    return [behind / total for behind in accumulate([0.0, *costs])][: len(costs)]
