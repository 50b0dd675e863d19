"""The table of promises in docs/verification.md names tests and functions that exist, and every GPU test stands in it."""

from __future__ import annotations

import ast
import re

from helpers import ROOT, TESTS

RANKS = ("test_gpus.py", "test_host_gpus.py")  # of real ranks
TABLE = (ROOT / "docs/verification.md").read_text().split("\n## Promises, ")[1]


def functions(name: str) -> set[str]:
    tree = ast.parse((TESTS / "gpu" / name).read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_what_the_table_names_exists_and_is_run():
    tests = set().union(*map(functions, RANKS))
    source = "".join((TESTS / "gpu" / name).read_text() for name in RANKS)
    bodies = set().union(
        *(
            functions(name)
            for name in (
                "gpu_work.py",
                "gpu_life.py",
                "gpu_streams.py",
                "gpu_users.py",
                "gpu_fused.py",
                "gpu_tools.py",
                "gpu_install.py",
            )
        )
    )
    named = re.findall(r"`(test_\w+)`(?: \(([\w, ]+)\))?", TABLE)
    assert len(named) > 25
    for test, inside in named:
        assert test in tests, test
        for body in filter(None, re.split(r", ", inside)):
            assert body in bodies and re.search(rf'[":]{body}"', source), (test, body)


def test_every_gpu_test_keeps_a_promise():
    tests = set().union(*map(functions, RANKS))
    missing = {name for name in tests if name.startswith("test_") and f"`{name}`" not in TABLE}
    assert not missing
