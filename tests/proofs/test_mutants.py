"""The mutation harness itself: what mutants are made, and that a verdict says what happened."""

from __future__ import annotations

import contextlib

import mutants
import pytest
import triton_mutants
import twin
from helpers.cubins import needs_nvrtc, needs_triton
from mutants import KINDS, of_text

from allreduce_jit.jit import source

pytestmark = pytest.mark.skipif(mutants.missing() is not None, reason=str(mutants.missing()))
needs_twin = pytest.mark.skipif(twin.missing() is not None, reason=str(twin.missing()))

TEXT = """
__device__ inline void f(const Args &a, u32 x) {
    if (x == 1 && a.last) return;
    // Two stores.
    st_relaxed_sys_u32(a.own + 4, x);
    st_relaxed_sys_u32(a.report, x);
    for (u32 i = 0; i < x; i++) table[i] = x > 2 ? 1 : 2;
}
"""
MADE = {
    ("statement removed", "return;", "{}"),
    ("statement removed", "st_relaxed_sys_u32(a.report, x);", ";"),
    ("condition negated", "x == 1 && a.last", "!(x == 1 && a.last)"),
    ("condition negated", "x > 2", "!(x > 2)"),
    ("condition dropped", "x == 1 && a.last", "true"),
    ("condition dropped", "x == 1 && a.last", "(a.last)"),
    ("condition dropped", "x > 2 ? 1 : 2", "(2)"),
    ("comparison by one", ">", ">="),
    ("constant by one", "4", "5"),
    ("constant by one", "4", "3"),
    ("index by one", "i", "i + 1"),
    ("operator swapped", "&&", "||"),
    ("operator swapped", "+", "-"),
    ("arguments swapped", "a.report, x", "x, a.report"),
    ("turn left out", "0", "(0) + 1"),
    ("turn left out", "i", "i + 1"),
    ("access weakened", "st_relaxed_sys_u32", "st_relaxed_gpu_u32"),
}


def test_what_is_made_of_a_text():
    made = of_text("guard.cuh", TEXT)
    assert MADE <= {(mutant.kind, mutant.old, mutant.new) for mutant in made}
    swapped = [mutant.applied(TEXT) for mutant in made if mutant.kind == "order swapped"]
    assert any(text.index("a.report") < text.index("a.own") for text in swapped)
    assert {mutant.kind for mutant in made} == set(KINDS)


def test_an_id_is_that_of_the_line_wherever_it_moves():
    before, after = of_text("guard.cuh", TEXT), of_text("guard.cuh", "\n// More.\n" + TEXT)
    assert [mutant.id for mutant in before] == [mutant.id for mutant in after]
    assert len({mutant.id for mutant in before}) == len(before)
    assert before[0].line == after[0].line - 2


def test_mutants_of_the_kernels():
    """Hundreds, of every file and kind, each another text; the parser understands nearly all of the sources."""
    made, texts = mutants.every(), source.files()
    assert len(made) > 1000 and len({mutant.id for mutant in made}) == len(made)
    assert {mutant.file for mutant in made} == {*mutants.BARE, *mutants.NORM, *mutants.HOST, mutants.PTX}
    assert {mutant.kind for mutant in made} == set(KINDS)
    results = [(mutant.file, mutant.applied(texts[mutant.file])) for mutant in made]
    assert len(set(results)) == len(results) and not any(texts[file] == text for file, text in results)
    lines = {(mutant.file, mutant.line) for mutant in made}
    for file, line in (
        ("guard.cuh", "if (kind) stop<Config>"),
        ("failure.cuh", "if (sequence) {"),
        ("wait.cuh", "if (since == 0"),
    ):
        assert (file, next(i for i, text in enumerate(texts[file].split("\n"), 1) if line in text)) in lines


def test_strength_and_scope_of_ptx():
    made = of_text(mutants.PTX, source.files()[mutants.PTX])
    assert {mutant.kind for mutant in made} == {"access weakened"}
    assert {(".relaxed.sys", ".relaxed.gpu"), (".acq_rel.sys", ".acq_rel.gpu")} <= {(mutant.old, mutant.new) for mutant in made}


def find(file: str, line: str, kind: str, new: str):
    """The last such mutant of the line."""
    return [m for m in mutants.every((file,)) if line in m.text and (m.kind, m.new) == (kind, new)][-1]


@pytest.fixture(scope="module")
def objects(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants") / "objects"
    import mutant_checks

    mutant_checks.prepare(folder)
    return folder


@needs_twin
@needs_nvrtc
def test_verdicts(objects, monkeypatch, record_property):
    """One that is noticed at once, one that a promise alone notices, one that changes nothing, one that does not compile, one for ever."""
    import mutant_checks
    from mutant_checks import EQUIVALENT, INVALID, KILLED, QUICK, SURVIVED, judge

    wrong = find("packet.cuh", "acc[e] += x[e]", "operator swapped", "-=")
    verdict = judge(wrong, objects)
    assert (verdict.outcome, verdict.how) == (KILLED, "bits"), verdict

    silent = find("failure.cuh", "&& before == 0; j++", "turn left out", "j + 1")
    assert judge(silent, objects, QUICK).outcome == SURVIVED
    promises = [check for check in mutant_checks.promises_bare() if "everybody_hears" in check[0]]
    verdict = judge(silent, objects, only=promises)
    assert (verdict.outcome, verdict.check.partition(",")[0]) == (KILLED, "everybody_hears"), verdict

    same = find("failure.cuh", "return Config::GUARDED && ld_relaxed_gpu_u32", "operator swapped", "-")  # of an offset of 0
    monkeypatch.setattr(mutant_checks, "longer", lambda mutant: [])
    monkeypatch.setattr(mutant_checks, "configurations", lambda file: [mutant_checks.cuda_module("one_shot", 2)])
    assert judge(same, objects).outcome == EQUIVALENT

    invalid = mutants.Mutant("exchange.cuh", "constant by one", 0, "", "not C++ ", 1, "")
    assert judge(invalid, objects).outcome == INVALID

    endless = mutants.Mutant(
        "exchange.cuh", "constant by one", *_at("exchange.cuh", "parity = u32(state) & 1;"), "for (;;);", 1, ""
    )
    verdict = judge(endless, objects, limit=10)
    assert (verdict.outcome, verdict.how) == (KILLED, "time"), verdict
    record_property("shown", f"mutants: of {len(mutants.every())}, verdicts of each kind")


@needs_twin
@needs_triton
def test_a_check_that_the_sources_do_not_pass_kills_nothing(objects, monkeypatch):
    import mutant_checks
    import mutation
    import triton_mutant_checks

    def broken(_) -> None:
        raise AssertionError("always")

    one, results = mutants.every(("wait.cuh",))[0], objects.parent / "results.jsonl"
    monkeypatch.setattr(mutant_checks, "every_check", lambda mutant: [("fine", lambda _: None), ("broken", broken)])
    monkeypatch.setattr(triton_mutant_checks.Judge, "judge", lambda *_: mutant_checks.Verdict(mutant_checks.SURVIVED))
    monkeypatch.setattr("sys.argv", ["mutation.py", "--only", one.id, "--results", str(results)])
    with pytest.raises(SystemExit, match="the sources do not pass broken: AssertionError"):
        mutation.main()
    assert not results.exists()


def _at(file: str, text: str) -> tuple[int, str]:
    return source.files()[file].encode().index(text.encode()), text


def test_what_is_explained_exists():
    """A reason for a mutant that is gone says nothing."""
    import mutation

    ids = {mutant.id for mutant in (*mutants.every(), *triton_mutants.every())}
    explained = mutation.explained()
    assert explained and set(explained) <= ids
    assert all(len(reason) > 20 for reason in explained.values())


def test_the_table(capsys):
    import mutation

    chosen = mutants.every(("wait.cuh",))[:4]
    outcomes = ["killed", "survived", "equivalent", "does not compile"]
    verdicts = {m.id: {"id": m.id, "outcome": o, "check": "x, seed 1"} for m, o in zip(chosen, outcomes)}
    text = mutation.table(chosen, verdicts, {})
    assert "| all | 3 | 1 | 1 | 0 | 1 | 66.7 % |" in text and "killed by: x 1" in text
    text = mutation.table(chosen, verdicts, {chosen[1].id: "a reason"})
    assert "| all | 3 | 1 | 1 | 1 | 0 | 100.0 % |" in text


TRITON_TEXT = '''
@triton.jit
def f(words, first, kind, stop, mine, theirs, WORLD: tl.constexpr, INTERPRET: tl.constexpr):
    """Text."""
    if kind == 1:
        tl.store(words + first, tl.where(mine < theirs, mine, 2))
    stop |= mine & theirs
    for step in tl.static_range(1, WORLD):
        push(mine, stop, step, INTERPRET)
    if INTERPRET:
        return kind - 1
    return tl.load(words) - first


def host(kind):
    return kind - 1
'''
TRITON_MADE = {
    ("statement removed", "tl.store(words + first, tl.where(mine < theirs, mine, 2))", "pass"),
    ("statement removed", "stop |= mine & theirs", "pass"),
    ("condition negated", "kind == 1", "not (kind == 1)"),
    ("condition dropped", "kind == 1", "True"),
    ("condition dropped", "tl.where(mine < theirs, mine, 2)", "(2)"),
    ("condition dropped", "mine & theirs", "(theirs)"),
    ("comparison by one", "<", "<="),
    ("constant by one", "2", "3"),
    ("operator swapped", "|=", "&="),
    ("operator swapped", "==", "!="),
    ("arguments swapped", "mine, stop", "stop, mine"),
    ("turn left out", "1", "(1) + 1"),
    ("turn left out", "WORLD", "(WORLD) - 1"),
}


def test_what_is_made_of_a_triton_text():
    """Of kernels alone, and of what they do: no argument's type, no docstring, nothing that tells the interpreter from a GPU."""
    made = triton_mutants.of_text("triton/f.py", TRITON_TEXT)
    assert TRITON_MADE <= {(mutant.kind, mutant.old, mutant.new) for mutant in made}
    changed = {TRITON_TEXT.split("\n")[mutant.line - 1].strip() for mutant in made}
    assert changed == {"if kind == 1:", "tl.store(words + first, tl.where(mine < theirs, mine, 2))", "stop |= mine & theirs",
                       "for step in tl.static_range(1, WORLD):", "push(mine, stop, step, INTERPRET)", "return tl.load(words) - first"}  # fmt: skip
    for mutant in made:
        compile(mutant.applied(TRITON_TEXT), "f.py", "exec")


def test_mutants_of_the_triton_kernels():
    made, texts = triton_mutants.every(), triton_mutants.texts()
    assert len(made) > 600 and len({mutant.id for mutant in made}) == len(made)
    assert {mutant.file for mutant in made} == set(triton_mutants.FILES)
    for mutant in made:
        compile(mutant.applied(texts[mutant.file]), mutant.file, "exec")


@needs_triton
def test_verdicts_on_triton(monkeypatch):
    """One whose sums are wrong, one that changes nothing, one that raises, one for ever; and one of the norm."""
    import triton_mutant_checks
    from mutant_checks import INVALID, KILLED, SURVIVED

    def found(line: str, kind: str, new: str):
        return [m for m in triton_mutants.every() if line in m.text and (m.kind, m.new) == (kind, new)][-1]

    checks = [check for check in triton_mutant_checks.checks() if check[0] in ("specials", "absent")]
    monkeypatch.setattr(triton_mutant_checks, "checks", lambda: checks)
    monkeypatch.setattr(triton_mutant_checks, "WIDTHS", [72])
    with contextlib.closing(triton_mutant_checks.Judge(1)) as judge:
        wrong = judge.judge(found("total += blocks", "operator swapped", "-="))
        assert (wrong.outcome, wrong.check) == (KILLED, "specials"), wrong
        # A verdict of 3 is a stop, which the other half of the condition sees.
        same = judge.judge(found("while (verdict > 3)", "constant by one", "2"))
        assert same.outcome == SURVIVED, same
        raising = judge.judge(found("parts[step], stop", "index by one", "step + 1"))
        assert (raising.outcome, raising.check) == (INVALID, "specials"), raising
        norm = judge.judge(found("a += tl.load", "operator swapped", "-="))
        assert (norm.outcome, norm.check) == (KILLED, "local norm"), norm
        monkeypatch.setattr(triton_mutant_checks, "LIMIT", 4)
        endless = judge.judge(found("while (verdict > 3)", "operator swapped", "|"))
        assert (endless.outcome, endless.check, endless.how) == (KILLED, "specials", "time"), endless
