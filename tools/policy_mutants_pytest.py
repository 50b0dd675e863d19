"""Plug-in of pytest for ``tools/policy_mutants.py``: tests as mutmut runs them, hundreds of times over, in forks of one process."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections import Counter
from pathlib import Path

import pytest

WORK = Path(os.environ["POLICY_MUTANTS"])
REACHED = WORK / "reached"  # by processes that the test at hand forked
KILLERS = WORK / "killers"  # tests that failed, one a line
SLOW = ("test_setup_fire.py", "test_ladder.py")  # start processes for seconds and more: for ``--wide``
DEADLINE_S = 8.0  # of ranks that a test forks, and that a mutant may let wait for ever: they take one or two
PLANTED = "planted"  # in names of tests that want to see a property fail: they do with a mutant, too

_wanted: set[str] = set()  # of the tests that mutmut names: it takes long to collect hundreds by name


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(args) -> None:
    names = [arg for arg in args if "::" in arg]
    _wanted.clear()
    _wanted.update(names)
    args[:] = [arg for arg in args if "::" not in arg] + sorted({name.partition("::")[0] for name in names})


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    """First those that killed a mutant just now, for the next one is of the same function; then the quickest, as mutmut knows them."""
    if forked := sys.modules.get("helpers.forked_ranks"):
        forked.ranks.__kwdefaults__["deadline"] = DEADLINE_S
    file = WORK / "mutants/mutmut-stats.json"
    took = json.loads(file.read_text())["duration_by_test"] if file.exists() else {}
    left = [item for item in items if item.path.name in SLOW or PLANTED in item.name]
    config.hook.pytest_deselected(items=left)
    chosen = [item for item in items if item not in left and (not _wanted or item.nodeid in _wanted)]
    recent = Counter(KILLERS.read_text().splitlines()[-20:] if KILLERS.exists() else [])
    items[:] = sorted(chosen, key=lambda item: (-recent[item.nodeid], took.get(item.nodeid, 0.0)))


def pytest_runtest_logreport(report) -> None:
    if report.failed:
        with KILLERS.open("a") as file:
            file.write(f"{report.nodeid}\n")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item) -> None:
    """What processes that a test forked have reached, the test has."""
    from mutmut.state import state

    if REACHED.exists():
        state()._stats |= set(REACHED.read_text().split())
        REACHED.unlink()


def pytest_configure() -> None:
    """Ranks that torch starts are forked, which takes a tenth of the time, and write down which functions they reach. Who kills
    a mutant need not find the smallest example."""
    import torch.multiprocessing
    from hypothesis.internal.conjecture.shrinker import Shrinker
    from mutmut.mutation import trampoline

    Shrinker.shrink = lambda self: None  # type: ignore[method-assign]
    torch.multiprocessing.spawn = functools.partial(torch.multiprocessing.start_processes, start_method="fork")

    here, record = os.getpid(), trampoline.record_trampoline_hit

    def noted(name: str, caller: str | None = None) -> None:
        record(name, caller)
        if os.getpid() != here:
            with REACHED.open("a") as file:
                file.write(f"{name}\n")

    trampoline.record_trampoline_hit = noted
