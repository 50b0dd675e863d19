"""What is different where the output is a terminal: colours, width, progress. Terminals are real ones (pty)."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from helpers import ROOT

from allreduce_jit.harness import report, terminal


class Screen(io.StringIO):
    def isatty(self):
        return True


def use(monkeypatch, stdout, stderr):
    """Streams for what is tested; pytest puts its own into ``sys`` when a test begins."""
    for module in (terminal, report):
        monkeypatch.setattr(module, "sys", SimpleNamespace(stdout=stdout, stderr=stderr))


@pytest.fixture
def screen(monkeypatch):
    """A terminal of 60 columns for stdout and stderr that shows colours."""
    found = Screen()
    use(monkeypatch, found, found)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return found


def test_colours_are_for_terminals_that_want_them(screen, monkeypatch):
    assert terminal.verdict(True, "OK") == "\033[32mOK\033[0m" and terminal.verdict(False, "OK") == "\033[31mFAILED\033[0m"
    monkeypatch.setenv("NO_COLOR", "")  # as if it were not set
    assert terminal.paint("x", terminal.RED) != "x"
    monkeypatch.setenv("NO_COLOR", "0")  # any value
    assert terminal.paint("x", terminal.RED) == "x"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert terminal.paint("x", terminal.RED) == "x"
    monkeypatch.setenv("TERM", "xterm")
    use(monkeypatch, io.StringIO(), screen)
    assert terminal.paint("x", terminal.RED) == "x"


def test_only_beginnings_of_lines_are_painted(screen):
    painted = terminal.painted("note  a PROBLEM b\nPROBLEM x", {"PROBLEM ": terminal.RED})
    assert painted == "note  a PROBLEM b\n\033[31mPROBLEM \033[0mx"


def test_lines_are_wrapped_below_what_they_say(screen, monkeypatch):
    long = "PROBLEM      " + "word " * 20 + "/a/path/that-is-not-broken/" + "x" * 60
    lines = terminal.wrapped(f"short\n{long}", 13).split("\n")
    assert lines[0] == "short" and lines[1].startswith("PROBLEM      word") and len(lines) > 3
    assert all(
        line.startswith(" " * 13 + "word") or line.lstrip().startswith("/a/path/that-is-not-broken/x") for line in lines[2:]
    )
    assert all(len(line) <= 60 for line in lines[:-1]) and " ".join(" ".join(lines[1:]).split()) == " ".join(long.split())
    use(monkeypatch, io.StringIO(), screen)
    assert terminal.wrapped(long, 13) == long


def test_wide_tables_become_several_with_their_keys(screen, monkeypatch):
    headers = [f"column {i}" for i in range(9)]
    rows = [[f"{i}{j}" * 3 for j in range(9)] for i in range(1, 4)]
    blocks = report.table(headers, rows, keys=2).split("\n\n")
    assert len(blocks) > 1 and all(len(line) <= 60 for block in blocks for line in block.split("\n"))
    seen = []
    for block in blocks:
        lines = [re.split(r" {2,}", line.strip()) for line in block.split("\n")]
        assert len(lines) == 5 and lines[0][:2] == headers[:2] and [line[:2] for line in lines[2:]] == [row[:2] for row in rows]
        seen += lines[0][2:]
    assert seen == headers[2:]
    use(monkeypatch, io.StringIO(), screen)
    assert "\n\n" not in report.table(headers, rows, keys=2)


def test_a_column_that_is_wider_than_the_terminal_is_shown_all_the_same(screen):
    wide = report.table(("k", "a", "b"), [("1", "x" * 99, "y" * 99)]).split("\n\n")
    assert [block.split("\n")[2].split() for block in wide] == [["1", "x" * 99], ["1", "y" * 99]]


# -- progress


@pytest.mark.parametrize(
    ("elapsed", "done", "text"),
    [
        (10.0, 0.5, ", about 10 s left"),
        (30.0, 0.25, ", about 90 s left"),
        (60.0, 0.1, ", about 9 min left"),
        (3600.0, 0.25, ", about 3 h left"),
        (10.0, 1.0, ", about 1 s left"),
        (10.0, 1.5, ", about 1 s left"),
        (1.0, 0.5, ""),  # too early to tell
        (10.0, 0.01, ""),
        (10.0, None, ""),
    ],
)
def test_what_is_left(elapsed, done, text):
    assert terminal.remaining(elapsed, done) == text


def test_shares():
    assert terminal.shares([1, 1, 2]) == [0.0, 0.25, 0.5]
    assert terminal.shares([]) == [] and terminal.shares([0, 0]) == [0.0, 0.0]


def test_progress_is_one_line_that_fits_and_goes_away(screen, monkeypatch):
    clock = iter([100.0, 101.0, 110.0, 111.0])
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))
    progress = terminal.Progress()
    progress("begins", 0.0)
    progress("x" * 100, 0.5)
    progress.done()
    first, second, last = screen.getvalue().split("\r\033[K")[1:]
    assert first == "begins" and last == ""
    assert second.endswith("x, about 10 s left") and len(second) == 59  # the last column would wrap


def test_no_progress_on_other_ranks_and_into_files(screen, monkeypatch):
    terminal.Progress(False)("x")
    file = io.StringIO()
    use(monkeypatch, screen, file)
    terminal.Progress()("x")
    assert screen.getvalue() == file.getvalue() == ""


def on_a_terminal(arguments, **variables):
    """What a command writes to a terminal of 80 columns, all of it."""
    ours, theirs = pty.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "TERM": "xterm", "NO_COLOR": "", **variables}
    command = [sys.executable, "-m", "allreduce_jit", *arguments.split()]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, cwd="/")
    os.close(theirs)
    text, end = b"", time.monotonic() + 200
    while time.monotonic() < end:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # the other side has gone
            break
        if not part:
            break
        text += part
    os.close(ours)
    assert process.wait(20) == 0
    return text.decode().replace("\r\n", "\n")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return {"ALLREDUCE_JIT_CACHE_DIR": str(tmp_path_factory.mktemp("cache"))}


def test_selftest_on_a_terminal(cache):
    text = on_a_terminal("selftest --cpu 2 --max-bytes 64 --deadline 150", **cache)
    assert "\r\033[Kselftest: 0 el fp32, wrong so far: 0\r\033[K" in text
    assert re.search(r"\033\[32mPASSED\033\[0m: [\d,]+ elements checked", text)
    tables = [block for block in text.split("\n\n") if re.search(r"^-+  -", block, re.M)]
    assert len(tables) >= 2 and all(len(line) <= 80 for block in tables for line in block.split("\n"))


def test_doctor_on_a_terminal(cache):
    text = on_a_terminal("doctor", **cache)
    plain = re.sub(r"\033\[\d*m", "", text)
    long = [line for line in plain.split("\n") if len(line) > 80 and " " in line.strip()]  # a path is one word, and stays whole
    assert plain != text and not long and "\033[1madvice \033[0m" in text
    assert "\033" not in on_a_terminal("doctor", **cache, NO_COLOR="1")
