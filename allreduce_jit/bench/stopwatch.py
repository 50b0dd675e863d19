"""Time ours and the competitors of one row in turns, in CUDA graphs or eagerly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..harness import terminal
from ..harness.place import Place
from . import timing
from .competitors import Competitor, agreed

_ROW = 16 << 20  # bytes: what a row takes beside its data, for the estimate of what is left
_TURNS = 3  # of us and each competitor: what drifts during a row drifts for all


@dataclass(frozen=True)
class Prepared:
    """What to time, its graph if there is one, and why this row is not done, if so; the same on all ranks."""

    load: timing.Workload
    graph: Any = None
    trouble: str | None = None


class Stopwatch:
    """What benchmarks have in common. Every method is collective.

    Args:
        options: with ``iters``, ``warmup`` and ``mode`` (``graph``, ``eager`` or ``both``).
    """

    competitors: list[Competitor]

    def __init__(self, place: Place, communicator: Any, options: Any):
        self.place, self.communicator, self.options = place, communicator, options
        self.progress = terminal.Progress(place.rank == 0)
        self._behind = 0.0  # share of the rows that are done
        self.barrier = timing.device_barrier(place, communicator)

    def all_rows(
        self, row: Callable[..., dict[str, Any]], steps: Sequence[tuple[Any, ...]], nbytes: Callable[..., int]
    ) -> list[dict[str, Any]]:
        """``row(*step)`` of every step; ``nbytes(*step)`` tells how long each takes beside the others."""
        found = []
        for step, self._behind in zip(steps, terminal.shares([_ROW + nbytes(*step) for step in steps])):
            found.append(row(*step))
        return found

    def announce(self, text: str) -> None:
        """Say which row is measured now, and about how long all of them still take."""
        self.progress(text, self._behind)

    def modes(self) -> list[str]:
        """What was asked for, but eager alone where nothing can be captured."""
        if not timing.capturable(self.place, self.communicator):
            return ["eager"]
        return ["graph", "eager"] if self.options.mode == "both" else [self.options.mode]

    def recorded(self, mode: str, loads: Mapping[str, timing.Workload]) -> dict[str, Prepared]:
        """Ours, ready to be timed."""
        capture = self.communicator.capture
        return {name: Prepared(load, timing.record(load, capture) if mode == "graph" else None) for name, load in loads.items()}

    def prepared(self, mode: str, competitor: Competitor, load: timing.Workload, trial: Callable[[], None]) -> Prepared:
        """A competitor's, ready to be timed if all ranks came through ``trial``."""
        graph = None
        _, trouble = agreed(self.place, trial)
        if trouble is None and mode == "graph":
            graph, trouble = agreed(self.place, lambda: timing.record(load, competitor.capture))
        return Prepared(load, graph, trouble)

    def timed(
        self, mode: str, ours: Mapping[str, Prepared], theirs: Mapping[str, Prepared]
    ) -> tuple[dict[str, timing.Timing], dict[str, Any]]:
        """Ours; and of every competitor its timing as JSON, or the reason why there is none."""
        samples: dict[str, list[float]] = {name: [] for name in ours}
        others: dict[str, list[float]] = {name: [] for name in theirs}
        reasons = {name: one.trouble for name, one in theirs.items()}
        for counts in self._turns():
            for name, one in ours.items():
                samples[name] += self._samples(mode, one, counts)
            for name, one in theirs.items():
                if reasons[name] is None:
                    more, reasons[name] = agreed(self.place, partial(self._samples, mode, one, counts))
                    others[name] += more or []
        summary = {name: timing.slowest(self.place, mine) for name, mine in samples.items()}
        cells = {
            name: {"reason": reasons[name]} if reasons[name] else asdict(timing.slowest(self.place, times))
            for name, times in others.items()
        }
        return summary, cells

    def _turns(self) -> Iterator[tuple[int, int]]:
        """(timed bursts, bursts of warm-up) of every turn."""
        iters, turns = self.options.iters, min(_TURNS, self.options.iters)
        for turn in range(turns):
            yield iters * (turn + 1) // turns - iters * turn // turns, -(-self.options.warmup // turns)

    def _samples(self, mode: str, one: Prepared, counts: tuple[int, int]) -> list[float]:
        if mode == "eager":
            return timing.eager(self.place, one.load, *counts, self.barrier)
        return timing.replays(self.place, one.load, one.graph, *counts, self.barrier)

    def close(self) -> None:
        for competitor in self.competitors:
            agreed(self.place, competitor.close)
