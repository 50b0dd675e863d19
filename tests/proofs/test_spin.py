"""The protocols of V2 and host, all interleavings of them: the models in ``spin/`` checked by Spin. LONG=1 adds larger ones."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

MODEL = Path(__file__).parent / "spin/allreduce.pml"
ROWS = Path(__file__).parent / "spin/norm.pml"
HOST = Path(__file__).parent / "spin/host.pml"

pytestmark = [
    pytest.mark.skipif(not shutil.which("spin"), reason="needs spin (Debian's package of that name)"),
    pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc"),
]
needs_long = pytest.mark.skipif(not os.environ.get("LONG"), reason="needs LONG=1")


def check(folder: Path, quickly: bool = False, model: Path = MODEL, **options) -> tuple[str, int]:
    """Search the whole state space. Returns the first error found, or "", and the number of states.

    ``quickly``: for an error that is found soon, compile without optimization."""
    flags = [f"-D{name}={value}" for name, value in options.items()]
    run = {"cwd": folder, "capture_output": True, "text": True}
    generated = subprocess.run(["spin", "-a", *flags, model], **run)
    assert (folder / "pan.c").exists(), generated.stdout
    subprocess.run(["gcc", "-O0" if quickly else "-O1", "-w", "-DSAFETY", "-DCOLLAPSE", "-o", "pan", "pan.c"], check=True, **run)
    text = subprocess.run(["./pan", "-m100000", "-w22"], **run).stdout
    errors = re.search(r"errors: (\d+)\n", text)
    assert errors and "max search depth too small" not in text and "out of memory" not in text, text
    assert "Search not completed" not in text or errors[1] != "0", text
    error = re.search(r"pan:1: (.*)", text)
    assert bool(error) == (errors[1] != "0")
    return error[1] if error else "", int(re.search(r"(\d+) states, stored", text)[1])


@pytest.mark.long
@pytest.mark.parametrize(
    ("least", "options"),
    [
        (10_000, {}),  # 27 sequences of three calls: one-shot, two-shot, idle
        # one-shot, two-shot, streams of 2, 3 or 5 launches: 11 forms a call
        pytest.param(2_000_000, {"STREAMS": 1}, marks=needs_long),
        pytest.param(3_000_000, {"FAILURES": 1}, marks=needs_long),
        pytest.param(1_700_000, {"STREAMS": 1, "FAILURES": 1, "N": 3, "CALLS": 2, "LENGTH": 3}, marks=needs_long),
        (800, {"N": 2}),
        pytest.param(10_000_000, {"STREAMS": 1, "FAILURES": 1, "N": 3, "CALLS": 2}, marks=needs_long),
    ],
    ids=str,
)
def test_the_protocols_hold(tmp_path, least, options):
    error, states = check(tmp_path, **options)
    assert error == ""
    assert states >= least  # fewer: the model lost a part of what it is to cover


STREAMED = {"STREAMS": 1, "N": 2}  # three calls of two ranks: 100,000 states
ONE_SHOT, TWO_SHOT, GATHERED, ALONE = (0, 1), (2, 3), 4, (5, 6)  # buffers


def pairs(every: Iterable, *quick: tuple) -> list:
    return [pytest.param(*pair, marks=[] if pair in quick else needs_long) for pair in every]


@pytest.mark.parametrize(("middle", "other"), pairs(itertools.permutations(ONE_SHOT + ALONE, 2), ONE_SHOT, (5, 0)))
def test_middle_and_other_may_lie_over_those_of_one_shot(tmp_path, middle, other):
    error, states = check(tmp_path, quickly=True, **STREAMED, MIDDLE=middle, OTHER=other)
    assert error == ""
    assert states >= 100_000


OVERWRITTEN = r"assertion violated \(slot.*==0\)"
TOO_EARLY = r"assertion violated .*waited\[peer\]"  # overwritten if MIDDLE and OTHER lay elsewhere
HANGS = r"invalid end state"


@pytest.mark.parametrize(
    ("found", "options"),
    [
        (OVERWRITTEN, {"MUTANT": "ONE_PARITY"}),
        (OVERWRITTEN, {"MUTANT": "SCATTER_WITHOUT_PARITY"}),
        (OVERWRITTEN, {"MUTANT": "NO_POISON"}),
        (OVERWRITTEN, {"MUTANT": "PUSH_BEFORE_WAIT"}),
        (HANGS, {"MUTANT": "STALE_EPOCH"}),
        (OVERWRITTEN, {"MUTANT": "SHARED_SLOTS"}),
        (OVERWRITTEN, {"MUTANT": "SILENT_RANK"}),
        (OVERWRITTEN, {"MUTANT": "GATHER_FIRST"}),
        (OVERWRITTEN, {"MUTANT": "POISON_AFTER_KERNEL"}),
        (HANGS, {"MUTANT": "IDLE_ADVANCES"}),
        (OVERWRITTEN, {"MUTANT": "WRONG_PARITY"}),
        (OVERWRITTEN, {"MUTANT": "TRIGGER_FIRST", "STREAMS": 1}),
        (OVERWRITTEN, {"MUTANT": "TRIGGER_AFTER_WAIT", "STREAMS": 1}),
        (OVERWRITTEN, {"MUTANT": "NOBODY_ACTIVE", "STREAMS": 1}),
        (OVERWRITTEN, {"MUTANT": "ONE_DIRECTION", **STREAMED}),
        (OVERWRITTEN, {"MUTANT": "GATHER_FROM_FRONT", **STREAMED}),
        (TOO_EARLY, {"MUTANT": "GATHER_FROM_FRONT", **STREAMED, "ANYWHERE": 1}),
        (OVERWRITTEN, {"MUTANT": "STREAM_ADVANCES", **STREAMED}),
        (OVERWRITTEN, {**STREAMED, "FIRST": 2, "LAST": 3}),  # whatever the parity
        (OVERWRITTEN, {**STREAMED, "MIDDLE": "FIRST"}),  # two scatter buffers
        (OVERWRITTEN, {**STREAMED, "MIDDLE": "LAST"}),
        (OVERWRITTEN, {**STREAMED, "OTHER": "FINAL"}),  # one gather buffer
        (OVERWRITTEN, {**STREAMED, "OTHER": "MIDDLE"}),
        (OVERWRITTEN, {**STREAMED, "LENGTH": 4}),  # 1 modulo 3 launches
        (OVERWRITTEN, {"MUTANT": "KEEPS_PUSHING", "FAILURES": 1}),
        (OVERWRITTEN, {"MUTANT": "REJOINS", "FAILURES": 1}),
        (HANGS, {"MUTANT": "NO_DEADLINE", "FAILURES": 1}),
    ],
    ids=str,
)
def test_a_planted_mistake_is_found(tmp_path, found, options):
    error, _ = check(tmp_path, quickly=True, **{"ANYWHERE": 0, **options})
    assert re.match(found, error)


# Two-shot gathers only after it heard from the peer, so LAST over that buffer would do no harm.
@pytest.mark.parametrize(
    ("buffer", "over"),
    pairs(
        [*itertools.product(("FIRST", "LAST", "FINAL"), ONE_SHOT), ("FIRST", GATHERED), *itertools.product(["FINAL"], TWO_SHOT)],
        *[("FIRST", ONE_SHOT[1]), ("FIRST", GATHERED), ("LAST", ONE_SHOT[0]), ("FINAL", ONE_SHOT[0]), ("FINAL", TWO_SHOT[1])],
    ),
)
def test_first_last_and_final_lie_nowhere_else(tmp_path, buffer, over):
    middle, other = ALONE
    options = STREAMED | {buffer: over, "MIDDLE": middle, "OTHER": other, "ANYWHERE": 0}
    error, _ = check(tmp_path, quickly=True, **options)
    assert re.match(OVERWRITTEN, error)


# -- rows: warps that wait for each other


@pytest.mark.long
@pytest.mark.parametrize(
    ("least", "options"),
    [
        (9_000, {"FAILURES": 0}),
        (130_000, {"FAILURES": 0, "N": 3, "CALLS": 2}),
        (1_700_000, {"CALLS": 2}),
        pytest.param(5_000_000, {}, marks=needs_long),
    ],
    ids=str,
)
def test_rows_end_and_are_right_or_nan(tmp_path, least, options):
    error, states = check(tmp_path, model=ROWS, **options)
    assert error == ""
    assert states >= least


@pytest.mark.parametrize(
    ("found", "mutant", "options"),
    [
        (HANGS, "LEAVES", {}),
        (HANGS, "LEAVES_AT_ONCE", {}),
        (r"assertion violated \(?met", "NO_BARRIER", {"FAILURES": 0}),
        (r"assertion violated .*nan", "FORGETS", {}),
        (HANGS, "NO_DEADLINE", {}),
        (OVERWRITTEN, "ONE_PARITY", {"FAILURES": 0}),
        (OVERWRITTEN, "NO_POISON", {"FAILURES": 0}),
        (OVERWRITTEN, "PUSHES_ON", {}),
        (HANGS, "STALE_PARITY", {"FAILURES": 0}),
    ],
)
def test_a_planted_mistake_of_rows_is_found(tmp_path, found, mutant, options):
    error, _ = check(tmp_path, quickly=True, model=ROWS, MUTANT=mutant, **options)
    assert re.match(found, error)


# -- through host memory


@pytest.mark.parametrize(
    ("least", "options"),
    [
        (280_000, {"N": 3}),
        (100_000, {"N": 2, "AHEAD": 2, "MOST": 5}),
        (150_000, {"N": 3, "TWO_SHOT": 1}),
        (160_000, {"N": 2, "FAILURES": 1}),
        pytest.param(500_000, {"N": 2, "CALLS": 3, "FAILURES": 1}, marks=needs_long),
        pytest.param(500_000, {"N": 3, "MOST": 2, "FAILURES": 1}, marks=needs_long),
        pytest.param(500_000, {"N": 2, "AHEAD": 2, "MOST": 5, "FAILURES": 1}, marks=needs_long),
        pytest.param(500_000, {"N": 3, "MOST": 2, "TWO_SHOT": 1, "FAILURES": 1}, marks=needs_long),
        pytest.param(500_000, {"N": 4, "MOST": 2, "TWO_SHOT": 1}, marks=needs_long),
    ],
    ids=str,
)
def test_outboxes_are_written_when_all_have_read_them(tmp_path, least, options):
    error, states = check(tmp_path, model=HOST, **options)
    assert error == ""
    assert states >= least


UNREAD, OTHER_CHUNK = r"assertion violated \(got\[", r"assertion violated \(slot\["


@pytest.mark.parametrize(
    ("found", "options"),
    [
        (OTHER_CHUNK, {"MUTANT": "ONE_PHASE", "N": 2}),
        (OTHER_CHUNK, {"MUTANT": "ONE_PHASE", "TWO_SHOT": 1}),
        (UNREAD, {"MUTANT": "STORES_FIRST", "N": 2}),
        (HANGS, {"MUTANT": "COUNTS_CALLS", "N": 2}),
        (HANGS, {"MUTANT": "COUNTS_CALLS", "TWO_SHOT": 1}),
        (UNREAD, {"N": 2, "AHEAD": 2, "MOST": 5, "RING": 3}),  # twice as many slots as are ahead, no fewer
        (UNREAD, {"N": 2, "RING": 1}),
        (UNREAD, {"MUTANT": "GATHERS_LATE", "TWO_SHOT": 1}),
        (UNREAD, {"MUTANT": "SUMS_EARLY", "TWO_SHOT": 1}),
        (OTHER_CHUNK, {"MUTANT": "STORES_ON", "FAILURES": 1}),
        (HANGS, {"MUTANT": "NO_DEADLINE", "N": 2, "FAILURES": 1}),
    ],
    ids=str,
)
def test_a_planted_mistake_of_outboxes_is_found(tmp_path, found, options):
    error, _ = check(tmp_path, quickly=True, model=HOST, **options)
    assert re.match(found, error)


@pytest.mark.parametrize(
    ("model", "test", "at"),
    [
        (MODEL, test_a_planted_mistake_is_found, 1),
        (ROWS, test_a_planted_mistake_of_rows_is_found, None),
        (HOST, test_a_planted_mistake_of_outboxes_is_found, 1),
    ],
)
def test_every_mutant_of_the_model_is_tried(model, test, at):
    names = re.search(r"Planted mistakes.*?\*/\n(.*?)#ifndef MUTANT", model.read_text(), re.S)[1]
    mutants = set(re.findall(r"#define (\w+)", names)) - {"NONE"}
    parameters = next(mark for mark in test.pytestmark if mark.name == "parametrize").args[1]
    tried = {each[1] if at is None else each[at].get("MUTANT") for each in parameters}
    assert mutants == tried - {None}
