"""Mutation testing of the kernels on the CPU: which small changes of the sources does some check of ``tests/proofs`` notice?

Usage: python tests/proofs/mutation.py [--known] [--sample N] [--seed S] [--minutes M] [--only REGEX] [--jobs N] [--again] [--fresh]
       python tests/proofs/mutation.py --table | --list

Every mutant of the CUDA sources (``tests/proofs/mutants.py``) is built as the CPU twin and run against the checks (``mutant_checks.py``), the
cheapest first; one of the Triton sources (``triton_mutants.py``, ``triton_mutant_checks.py``) is run in Triton's interpreter.
Verdicts are kept in ``build/mutants/results.jsonl`` as they come: a run that was stopped goes on where it was. Exits with 1 if a mutant
survives that ``tests/proofs/mutants_explained.json`` does not explain. Needs g++, NVRTC, tree-sitter-cuda and Triton; no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import random
import re
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]

import mutants  # noqa: E402
import triton_mutants  # noqa: E402
from mutants import KINDS, Mutant  # noqa: E402

RESULTS = ROOT / "build/mutants/results.jsonl"
EXPLAINED = ROOT / "tests/proofs/mutants_explained.json"
KILLERS = ROOT / "tests/proofs/mutants_killed.json"  # of mutants that were killed: by which check
LATER = "left by the quick checks"


def explained() -> dict[str, str]:
    """Reasons by id of a mutant."""
    by_reason = json.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
    return {id: reason for reason, ids in by_reason.items() for id in ids}


def known(path: Path) -> dict[str, dict]:
    """The last verdict on each mutant, by id."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {verdict["id"]: verdict for verdict in map(json.loads, lines)}


def outcome(verdict: dict, reasons: dict[str, str]) -> str:
    return "explained" if verdict["outcome"] in ("survived", LATER) and verdict["id"] in reasons else verdict["outcome"]


def quickly_killed(verdict: dict) -> bool:
    """By a check that says so each time, and does not wait for what never ends."""
    return verdict["outcome"] == "killed" and verdict["how"] != "time" and "ThreadSanitizer" not in verdict["check"]


def table(chosen: list[Mutant], verdicts: dict[str, dict], reasons: dict[str, str]) -> str:
    """By kind of mutant, how many came to what."""
    counts = {kind: Counter() for kind in KINDS}
    for mutant in chosen:
        if mutant.id in verdicts:
            counts[mutant.kind][outcome(verdicts[mutant.id], reasons)] += 1
        # Who is left by the quick checks has not been shown to be noticed.
    for count in counts.values():
        count["survived"] += count.pop(LATER, 0)
    counts["all"] = sum(counts.values(), Counter())
    lines = [
        "| kind | mutants | killed | equivalent | explained | survived | noticed or explained |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, count in counts.items():
        equal = count["equivalent"]
        total = count["killed"] + count["explained"] + count["survived"] + equal
        share = f"{100 * (total - count['survived']) / total:.1f} %" if total else "-"
        lines.append(f"| {kind} | {total} | {count['killed']} | {equal} | {count['explained']} | {count['survived']} | {share} |")
    checks = Counter(
        re.sub(r", seed \d+$", "", v["check"])
        for v in (verdicts[m.id] for m in chosen if m.id in verdicts)
        if v["outcome"] == "killed"
    )
    lines += [f"does not compile (not counted): {counts['all']['does not compile']}"]
    lines += ["killed by: " + ", ".join(f"{check} {count}" for check, count in checks.most_common())]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, metavar="N", help="so many of them, drawn at random")
    parser.add_argument("--seed", type=int, help="of the draw; by default drawn as well, and printed")
    parser.add_argument("--minutes", type=float, help="begin no mutant after so long")
    parser.add_argument("--only", default="", metavar="REGEX", help="mutants whose description or id has a match")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at a time")
    parser.add_argument("--again", action="store_true", help="those that survived before, too")
    parser.add_argument(
        "--depth", choices=["quick", "longer", "full"], default="full", help="no checks but those: who is left is no survivor yet"
    )
    parser.add_argument("--table", action="store_true", help="what is known, no run")
    parser.add_argument("--list", action="store_true", help="the mutants, no run")
    parser.add_argument(
        "--known", action="store_true", help="of those alone that were killed before, by the same check if it still does"
    )
    parser.add_argument("--keep", action="store_true", help="write down who was killed by what, for --known")
    parser.add_argument("--fresh", action="store_true", help="as if nothing were known, which is not kept either")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if why := mutants.missing():
        print(f"mutants: {why}")
        return 2
    if args.fresh:
        folder = tempfile.TemporaryDirectory()
        args.results = Path(folder.name, "results.jsonl")

    chosen = [mutant for mutant in (*mutants.every(), *triton_mutants.every()) if re.search(args.only, f"{mutant.id} {mutant}")]
    killers = json.loads(KILLERS.read_text()) if KILLERS.exists() else {}
    if args.known:
        chosen = [mutant for mutant in chosen if mutant.id in killers]
    if args.sample:
        seed = random.randrange(1 << 30) if args.seed is None else args.seed
        print(f"{args.sample} of {len(chosen)} mutants, seed {seed}")
        # A longer one begins with a shorter one, and sources that change elsewhere leave it as it is.
        chosen = sorted(chosen, key=lambda mutant: hashlib.sha256(f"{seed} {mutant.id}".encode()).digest())[: args.sample]
    reasons = explained()
    if args.list:
        print(*(f"{mutant.id} {mutant}" for mutant in chosen), sep="\n")
        return 0
    if not args.table:
        run(chosen, args, reasons, killers)
    verdicts = known(args.results)
    if args.keep:
        killers |= {m.id: verdicts[m.id]["check"] for m in chosen if m.id in verdicts and quickly_killed(verdicts[m.id])}
        KILLERS.write_text(json.dumps(dict(sorted(killers.items())), indent=0) + "\n")
    survivors = [m for m in chosen if m.id in verdicts and outcome(verdicts[m.id], reasons) in ("survived", LATER)]
    print(table(chosen, verdicts, reasons))
    print(*(f"survived: {mutant.id} {mutant}" for mutant in survivors), sep="\n")
    return 1 if survivors else 0


def run(chosen: list[Mutant], args: argparse.Namespace, reasons: dict[str, str], killers: dict[str, str]) -> None:
    import mutant_checks
    from triton_mutant_checks import Judge

    verdicts = known(args.results)
    depths = (mutant_checks.QUICK, mutant_checks.LONGER, mutant_checks.FULL)
    deeper = [depth for depth in depths if depths.index(depth) < depths.index(args.depth)]

    def open_(verdict: dict) -> bool:
        """Whether there is more to ask."""
        return verdict["outcome"] == LATER and verdict["check"] in deeper or args.again and verdict["outcome"] == "survived"

    left = [m for m in chosen if m.id not in reasons and (m.id not in verdicts or open_(verdicts[m.id]))]
    args.results.parent.mkdir(parents=True, exist_ok=True)
    objects = args.results.parent / "objects"
    if any(m.file not in triton_mutants.FILES for m in left):
        mutant_checks.prepare(objects)
    until = time.monotonic() + 60 * args.minutes if args.minutes else float("inf")

    def sound() -> None:
        """The sources pass every check as they are: or no mutant could be said to be killed."""
        which = mutant_checks.unchanged("failure.cuh")  # of which all kernels are made
        checks = mutant_checks.every_check(which)
        tasks = [
            *[partial(mutant_checks.judge, which, objects, only=checks[i :: args.jobs]) for i in range(args.jobs)],
            # The protocol's, of which each file leads to the same checks, and the norm's.
            *[
                partial(triton.judge, mutant_checks.unchanged(file))
                for file in (triton_mutants.FILES[0], triton_mutants.FILES[-1])
            ],
        ]
        for verdict in pool.map(lambda task: task(), tasks):
            if verdict.outcome != mutant_checks.SURVIVED:
                raise SystemExit(f"the sources do not pass {verdict.check}: {verdict.how}")

    def cuda(mutant: Mutant) -> mutant_checks.Verdict:
        verdict = None
        if same := [check for check in mutant_checks.every_check(mutant) if check[0] == killers.get(mutant.id)]:
            verdict = mutant_checks.judge(mutant, objects, only=same)
        if verdict is None or verdict.outcome == mutant_checks.SURVIVED:
            before = verdicts.get(mutant.id, {})
            passed = before["check"] if before.get("outcome") == LATER else ""
            verdict = mutant_checks.judge(mutant, objects, args.depth, passed=passed)
        if args.depth != mutant_checks.FULL and verdict.outcome == mutant_checks.SURVIVED:
            verdict = replace(verdict, outcome=LATER, check=args.depth)
        return verdict

    def one(mutant: Mutant) -> None:
        if time.monotonic() > until:
            return
        verdict = triton.judge(mutant, killers.get(mutant.id)) if mutant.file in triton_mutants.FILES else cuda(mutant)
        if verdict.outcome == mutant_checks.BROKEN:
            print(f"no verdict on {mutant.id} {mutant}: {verdict.how}", flush=True)
            return
        with args.results.open("a") as file:
            file.write(json.dumps({"id": mutant.id, **asdict(verdict)}) + "\n")
        what = outcome({"id": mutant.id, "outcome": verdict.outcome}, reasons)
        print(f"{verdict.seconds:6.1f} s {what}: {mutant.id} {mutant}: {verdict.check} ({verdict.how})"[:300], flush=True)

    with contextlib.closing(Judge(args.jobs)) as triton, ThreadPoolExecutor(args.jobs) as pool:
        if left and not args.sample:
            sound()
        list(pool.map(one, left))


if __name__ == "__main__":
    sys.exit(main())
