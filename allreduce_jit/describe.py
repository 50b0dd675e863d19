"""What a communicator says of itself, ready for JSON."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from .policy import backends
from .policy.operation import DTYPES, ITEMSIZE, OpSpec, all_reduce
from .policy.plan import Plan
from .policy.verdict import Path, Reason

if TYPE_CHECKING:
    from .engine.fallback import TorchEngine
    from .routes import Routes
    from .setup.ladder import Ladder

T = TypeVar("T")

LARGEST = 1 << 30  # bytes up to which plans are asked for


def describe(ladder: Ladder, torch_engine: TorchEngine, routes: Routes, watched: Sequence[int], deterministic: bool) -> dict:
    """What was agreed and built, but for who and where this rank is."""
    engine, verdict = ladder.engine, ladder.verdict
    row = backends.of(verdict.path)

    def plan(spec: OpSpec) -> Plan:
        return routes.engine(spec).plan(spec)

    return {
        "path": verdict.path.value,
        "kernels_of": None if row is None else {"backend": row.name, "memory": row.memory},
        "backend": torch_engine.backend,
        "reasons": [{"code": r.code, "text": r.text, "rank": r.rank} for r in reasons(ladder, torch_engine)],
        "deterministic": deterministic or verdict.path in (Path.V2, Path.HOST) or len(ladder.processes) == 1,
        "tuning": (ladder.tuning or "package") if verdict.path is Path.V2 else None,
        "bands": [band for dtype in DTYPES for band in bands(dtype, plan)],
        "staging_bytes": engine.memory.nbytes if engine else 0,
        "device_bytes": engine.state.nbytes + (engine.memory.nbytes if row and row.memory == "device" else 0) if engine else 0,
        "watched": list(watched),
        "timings": {name: round(seconds, 4) for name, seconds in ladder.timings.items()},
        "kernels": {"compiled": engine.compiled, "cached": engine.cached} if engine else {"compiled": 0, "cached": 0},
    }


def reasons(ladder: Ladder, torch_engine: TorchEngine) -> list[Reason]:
    """Why this path, and why not NCCL where it was wanted."""
    problem = torch_engine.problem
    without = [Reason("no-nccl", f"NCCL cannot be set up: {problem}")] if problem else []
    return [*ladder.verdict.reasons, *without]


def bands(dtype: str, plan: Callable[[OpSpec], Plan]) -> list[dict]:
    """Ranges of sizes, in bytes, of all-reduces of ``dtype`` that run the same algorithm; both ends belong to the range, and the last one has no end (None)."""
    size = ITEMSIZE[dtype]

    def what(numel: int) -> tuple[str, str]:
        found = plan(all_reduce(dtype, numel))
        return found.path, found.algorithm

    return [
        {
            "dtype": dtype,
            "from_bytes": first * size,
            "to_bytes": None if last is None else last * size,
            "path": path,
            "algorithm": algorithm,
        }
        for first, last, (path, algorithm) in stretches(what, LARGEST // size)
    ]


def stretches(what: Callable[[int], T], last: int) -> Iterator[tuple[int, int | None, T]]:
    """(first, last, answer) for every stretch of 1 … ``last`` with one answer; the final one has no end (None).

    ``what`` must not come back to an answer that it has left, and no plan does.
    """
    first = 1
    while first <= last:
        answer = what(first)
        high = first  # the last number known to have the answer
        while high < last and what(min(2 * high, last)) == answer:
            high = min(2 * high, last)
        beyond = min(2 * high, last + 1)
        while beyond - high > 1:
            middle = (high + beyond) // 2
            high, beyond = (middle, beyond) if what(middle) == answer else (high, middle)
        yield first, (None if high == last else high), answer
        first = high + 1
