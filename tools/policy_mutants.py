"""Mutation testing of the pure policy, of set-up and of failures: which small changes of the sources does no test notice?

Usage: python tools/policy_mutants.py [--only MODULE ...] [--no-run] [--wide] [--write]

mutmut (``pip install -e ".[mutation]"``) makes the mutants and runs each against the tests that reach its function, the quickest first, in
forks of one process. What it knows is kept in ``build/policy-mutants``: a run that was stopped goes on where it was, and a function that
changed is judged anew. ``--wide`` runs what survived against the slower tests that concern its module. Exits with 1 if a mutant survives
that ``tests/policy/mutants_explained.json`` does not explain. docs/verification.md says what is left out.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import tokenize
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = ROOT / "build/policy-mutants"
EXPLAINED = ROOT / "tests/policy/mutants_explained.json"
VERDICTS = ROOT / "tests/policy/mutants_verdicts.json"

_POLICY = "plan nvlink nvlink_norm p2p host dispatch tables checks verdict operation norm_forms backends measured_tables".split()
_SETUP = "exchange stages ladder groups".split()
MODULES = (*(f"policy/{name}" for name in _POLICY), *(f"setup/{name}" for name in _SETUP), "engine/failure")

QUICK = ("tests/policy", "tests/setup", "tests/engine/test_failure.py", "tests/cli/test_tune.py")
WIDE = {
    "policy": ("tests/engine", "tests/machine", "tests/front/test_communicator.py", "tests/cli/test_cli.py", "tests/jit"),
    "setup": ("tests/setup", "tests/front/test_communicator.py"),
    "engine": ("tests/engine", "tests/proofs/test_failure_promises.py"),
}
KINDS = (
    "value dropped",
    "argument dropped",
    "condition forced",
    "comparison",
    "operator swapped",
    "and, or, not, in, is",
    "constant by one",
    "text or name",
    "loop left",
    "call swapped",
)
KILLED, EQUIVALENT, SURVIVED, LEFT_OUT, UNKNOWN = "killed", "equivalent", "survived", "left out", "not run"
KNOWN = (KILLED, EQUIVALENT, SURVIVED)
_OUTCOMES = {None: UNKNOWN, 0: SURVIVED, 5: SURVIVED, 33: SURVIVED, 34: LEFT_OUT}  # mutmut's exit codes; all others: killed
_SKIPPED = 34

TABLES = ("x__bands",)  # run when their module is imported, and make tables of speed alone

_COMPARISONS = {"<", "<=", ">", ">=", "==", "!="}
_WORDS = {"and", "or", "not", "in", "is"}

CONFIGURATION = """
[tool.mutmut]
source_paths = ["allreduce_jit"]
only_mutate = {only}
also_copy = ["kernels", "tools", "docs", "README.md", "typings"]
pytest_add_cli_args = ["-p", "policy_mutants_pytest", "-p", "no:xdist", "-p", "no:cacheprovider", "--hypothesis-seed=0"]
pytest_add_cli_args_test_selection = {tests}
use_git_change_detection = false
track_dependencies = false
timeout_constant = 5.0

[tool.pytest.ini_options]
pythonpath = ["tests", "tools"]
timeout = 60
markers = ["gpus(n)", "long", "programs"]
"""


@dataclass(frozen=True)
class Mutant:
    """One change.

    Attributes:
        name: mutmut's, which numbers the mutants of a function.
        module: as in ``MODULES``.
        id: of module, function and change: the same while these are.
        change: the lines that differ, before and after.
        kind: of ``KINDS``.
        left_out: whether nothing is promised of what it changes: a sentence for people alone, or a table of sizes.
    """

    name: str
    module: str
    id: str
    change: str
    kind: str
    left_out: bool


def tokens(lines: list[str]) -> list[str]:
    """Of lines of a function, which need not be complete."""
    found = []
    try:
        for token in tokenize.generate_tokens(io.StringIO("(" + " ".join(line.strip() for line in lines)).readline):
            found.append(token.string)
    except (tokenize.TokenError, IndentationError):
        pass
    return [token for token in found[1:] if token.strip()]


def classify(before: list[str], after: list[str]) -> tuple[str, bool]:
    """Kind of a change, and whether it is one of words alone."""
    old, new = tokens(before), tokens(after)
    matcher = difflib.SequenceMatcher(None, old, new, autojunk=False)
    changes = [(old[a:b], new[c:d]) for what, a, b, c, d in matcher.get_opcodes() if what != "equal"]
    gone, come = [t for a, _ in changes for t in a], [t for _, b in changes for t in b]
    text = [t for t in gone if re.match(r"\w*[\"']", t)]
    if come and all(re.match(r"\w*[\"']", t) for t in come) and len(text) == len(gone):
        return "text or name", any(" " in t.strip() and t[0] in "\"'" for t in text)
    if {"and", "False"} <= set(come) or {"or", "True"} <= set(come):
        return "condition forced", False
    if come == ["None"] or come == ['""'] or (gone and come == ["="]):
        at = next((i for i, t in enumerate(new) if t == "None" and (i >= len(old) or old[i] != "None")), 0)
        return ("value dropped" if at and new[at - 1] == "=" and new[at + 1 :] in ([], [")"]) else "argument dropped"), False
    if set(gone) & {"break", "continue"}:
        return "loop left", False
    if set(gone) & _WORDS or set(come) & _WORDS or {"True", "False"} & set(come):
        return "and, or, not, in, is", False
    if set(gone) | set(come) <= _COMPARISONS:
        return "comparison", False
    if come and all(re.match(r"[\d.]", t) for t in come):
        return "constant by one", False
    if come and all(not re.match(r"[\w\"']", t) for t in come):
        return "operator swapped", False
    return ("call swapped" if len(gone) == len(come) and come else "argument dropped"), False


def mutants(module: str) -> dict[str, Mutant]:
    """By mutmut's name. To be called in ``WORK``, where they have been made."""
    import libcst
    from mutmut.mutation.diff_apply import find_top_level_function_or_method as find
    from mutmut.utils.format_utils import mangled_name_from_mutant_name as mangled

    path = Path("mutants/allreduce_jit", f"{module}.py")
    tree, found, seen = libcst.parse_module(path.read_text()), {}, Counter()

    @functools.cache
    def lines(name: str) -> list[str]:
        function = find(tree, name)
        assert function is not None, name
        text = tree.code_for_node(function.with_changes(name=libcst.Name("f"), decorators=()))
        return [line.strip() for line in text.strip().splitlines()]

    for name in codes(module):
        short = name.rpartition(".")[2]
        original = mangled(short)
        old, new = lines(f"{original}__mutmut_orig"), lines(short)
        spans = [span for span in difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes() if span[0] != "equal"]
        before, after = old[spans[0][1] : spans[-1][2]], new[spans[0][3] : spans[-1][4]]
        change = f"{' '.join(before)}  =>  {' '.join(after)}"
        seen[original, change] += 1
        id = hashlib.sha256(f"{module} {original} {change} {seen[original, change]}".encode()).hexdigest()[:12]
        kind, words = classify(before, after)
        found[name] = Mutant(name, module, id, change, kind, words or original in TABLES)
    return found


def meta(module: str) -> Path:
    return WORK / f"mutants/allreduce_jit/{module}.py.meta"


def codes(module: str) -> dict[str, int | None]:
    """Exit code of the tests on each mutant."""
    file = meta(module)
    return json.loads(file.read_text())["exit_code_by_key"] if file.exists() else {}


def mark(module: str, names: dict[str, int]) -> None:
    if names:
        content = json.loads(meta(module).read_text())
        content["exit_code_by_key"] |= names
        meta(module).write_text(json.dumps(content, indent=4))


def explained() -> dict[str, str]:
    """Reasons by id of a mutant."""
    by_reason = json.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
    return {id: reason for reason, ids in by_reason.items() for id in ids}


def prepare() -> None:
    """A project of its own, as mutmut copies into the folder that it runs in."""
    WORK.mkdir(parents=True, exist_ok=True)
    for name in ("allreduce_jit", "kernels", "tests", "tools", "docs", "README.md", "typings"):
        if not (WORK / name).is_symlink():
            (WORK / name).symlink_to(ROOT / name)
    only = json.dumps([f"allreduce_jit/{module}.py" for module in MODULES])
    text = CONFIGURATION.format(only=only, tests=json.dumps(QUICK))
    if not (WORK / "pyproject.toml").exists() or (WORK / "pyproject.toml").read_text() != text:
        (WORK / "pyproject.toml").write_text(text)


_MAKE = """
import mutmut.__main__ as mutmut
from pathlib import Path
Path("mutants").mkdir(exist_ok=True)
mutmut.set_mutant_under_test("mutant_generation")
mutmut.copy_src_dir()
mutmut.copy_also_copy_files()
mutmut.create_mutants(1)
"""


def inside(code: str, *arguments: str) -> int:
    """Python in ``WORK``, from where mutmut goes. Without bytecode, which would be of the last mutant's file, and without threads of
    OpenMP, which a fork has not and waits for."""
    environ = os.environ | {"PYTHONPATH": str(ROOT / "tools"), "PYTHONDONTWRITEBYTECODE": "1", "POLICY_MUTANTS": str(WORK)}
    environ |= {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *arguments], cwd=WORK, env=environ, check=False).returncode


def survives_wide(mutant: Mutant) -> bool:
    environ = os.environ | {"PYTHONPATH": str(ROOT / "tools"), "MUTANT_UNDER_TEST": mutant.name}
    tests = WIDE[mutant.module.partition("/")[0]]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--rootdir=.", *tests]
    run = subprocess.run(command, cwd=WORK / "mutants", env=environ, check=False, capture_output=True, timeout=1800)
    return run.returncode == 0


def table(chosen: list[Mutant], outcomes: dict[str, str], key) -> list[str]:
    lines = [
        "",
        "| | mutants | killed | equivalent | survived | killed of those that change anything |",
        "|---|---|---|---|---|---|",
    ]
    groups: dict[str, Counter] = {}
    for mutant in chosen:
        for name in (key(mutant), "all"):
            groups.setdefault(name, Counter())[outcomes[mutant.name]] += 1
    groups["all"] = groups.pop("all", Counter())
    for name, count in groups.items():
        total = sum(count[outcome] for outcome in KNOWN)
        share = f"{100 * count[KILLED] / (total - count[EQUIVALENT]):.1f} %" if total > count[EQUIVALENT] else "-"
        lines.append(f"| {name} | {total} | {count[KILLED]} | {count[EQUIVALENT]} | {count[SURVIVED]} | {share} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="MODULE", help="such as policy/plan; by default all")
    parser.add_argument("--no-run", action="store_true", help="what is known, no run")
    parser.add_argument("--again", action="store_true", help="those that survived before, too, which tests may notice by now")
    parser.add_argument("--wide", action="store_true", help="run what is left against slower tests")
    parser.add_argument(
        "--write", action="store_true", help="write what is known of the modules to tests/policy/mutants_verdicts.json"
    )
    args = parser.parse_args()
    modules = args.only or list(MODULES)
    if unknown := set(modules) - set(MODULES):
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(MODULES)}")
    prepare()
    if not args.no_run:
        if inside(_MAKE):
            return 2
    os.chdir(WORK)
    every = {module: mutants(module) for module in modules}
    reasons = explained()
    if not args.no_run:
        todo = []
        for module, found in every.items():
            known = codes(module)
            mark(module, {name: _SKIPPED for name, mutant in found.items() if mutant.left_out})
            wanted = (None, *((0, 5, 33) if args.again else ()))
            judged = {n for n, m in found.items() if m.left_out or known[n] is not None and m.id in reasons}
            todo += [n for n in found if n not in judged and known[n] in wanted]
        if todo:
            inside("from mutmut.__main__ import cli; cli()", "run", "--max-children", "1", *todo)
    chosen = [mutant for found in every.values() for mutant in found.values()]
    outcomes: dict[str, str] = {}
    for module, found in every.items():
        for name, code in codes(module).items():
            outcome = _OUTCOMES.get(code, KILLED)
            if args.wide and outcome == SURVIVED and found[name].id not in reasons and not survives_wide(found[name]):
                mark(module, {name: 1})
                outcome = KILLED
            outcomes[name] = EQUIVALENT if outcome == SURVIVED and found[name].id in reasons else outcome
    counted = [mutant for mutant in chosen if outcomes[mutant.name] in KNOWN]
    lines = [*table(counted, outcomes, lambda m: m.module), *table(counted, outcomes, lambda m: m.kind)]
    counts = Counter(outcomes.values())
    print(*lines, "", f"not counted: {counts[LEFT_OUT]} of words for people and tables, {counts[UNKNOWN]} not run", sep="\n")
    left = [mutant for mutant in counted if outcomes[mutant.name] == SURVIVED]
    print(*(f"{outcomes[m.name]}: {m.id} {m.name} [{m.kind}]: {m.change}" for m in left), sep="\n")
    if args.write:
        verdicts: dict[str, dict[str, dict[str, int]]] = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
        for module in modules:
            kinds: dict[str, Counter] = {}
            for mutant in (m for m in counted if m.module == module):
                kinds.setdefault(mutant.kind, Counter())[outcomes[mutant.name]] += 1
            verdicts |= {module: {kind: dict(sorted(count.items())) for kind, count in sorted(kinds.items())}}
        VERDICTS.write_text(json.dumps(verdicts, indent=1) + "\n")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
