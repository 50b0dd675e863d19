"""The harness of the policy's mutants: how a change is named, and that what is written about mutants is about the present sources."""

from __future__ import annotations

import json
import re

import policy_mutants
import pytest
from policy_mutants import EXPLAINED, KINDS, KNOWN, MODULES, ROOT, VERDICTS, classify


@pytest.mark.parametrize(
    ("before", "after", "kind", "left_out"),
    [
        ("if a < b:", "if a <= b:", "comparison", False),
        ("if a == b:", "if a != b:", "comparison", False),
        ("x = a + b", "x = a - b", "operator swapped", False),
        ("x += a", "x -= a", "operator swapped", False),
        ("x = a // b", "x = a / b", "operator swapped", False),
        ("x = f(2)", "x = f(3)", "constant by one", False),
        ("x = f(a, b)", "x = f(a, None)", "argument dropped", False),
        ("x = f(a, b)", "x = f(a, )", "argument dropped", False),
        ("x = f(a)", "x = None", "value dropped", False),
        ("x = a if b else c", "x = a if (b) and False else c", "condition forced", False),
        ("x = a if b else c", "x = a if (b) or True else c", "condition forced", False),
        ("return a and b", "return a or b", "and, or, not, in, is", False),
        ("if not a:", "if a:", "and, or, not, in, is", False),
        ("if a in b:", "if a not in b:", "and, or, not, in, is", False),
        ("f(True)", "f(False)", "and, or, not, in, is", False),
        ("break", "return", "loop left", False),
        ('Reason("no-p2p", x)', 'Reason("XXno-p2pXX", x)', "text or name", False),
        ('raise E("a sentence for people")', 'raise E("XXa sentence for peopleXX")', "text or name", True),
    ],
)
def test_kinds(before, after, kind, left_out):
    assert classify([before], [after]) == (kind, left_out) and kind in KINDS


def test_what_is_explained_is_in_the_sources():
    """A reason for a change of a line that is gone says nothing."""
    by_reason = json.loads(EXPLAINED.read_text())
    ids = [id for entries in by_reason.values() for id in entries]
    assert ids and len(ids) == len(set(ids)) and set(ids) == set(policy_mutants.explained())
    for reason, entries in by_reason.items():
        assert len(reason) > 20 and entries
        for id, change in entries.items():
            module, _, lines = change.partition(": ")
            before, _, after = lines.partition("  =>  ")
            source = " ".join(line.strip() for line in (ROOT / f"allreduce_jit/{module}.py").read_text().splitlines())
            assert module in MODULES and before in source and before != after, (id, change)


def test_the_table_of_the_document_is_that_of_the_run():
    """``tests/policy/mutants_verdicts.json``, which a run writes, and docs/verification.md."""
    verdicts = json.loads(VERDICTS.read_text())
    text = (ROOT / "docs/verification.md").read_text()
    for module, kinds in verdicts.items():
        counts = [sum(kind.get(outcome, 0) for kind in kinds.values()) for outcome in KNOWN]
        assert module in MODULES and set(kinds) <= set(KINDS)
        row = re.search(rf"^\| {module} \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|", text, re.MULTILINE)
        assert row and [int(n) for n in row.groups()] == [sum(counts), *counts], module
