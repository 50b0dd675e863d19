"""Mutants of the CUDA sources: every small change of some kinds, found in the syntax tree (tree-sitter), not picked by hand."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from allreduce_jit.jit import source

# What the twin runs; ``ptx.cuh``, which it replaces, in the strength and scope of its instructions only. Left out: what is checked while
# it compiles (abi, layout, entry), and floor.cu, which no communicator runs.
BARE = ("exchange.cuh", "failure.cuh", "guard.cuh", "one_shot.cu", "packet.cuh", "slots.cuh", "two_shot.cu", "wait.cuh",
        "partition/flat.cuh", "wire/sentinel.cuh", "epilogue/store.cuh")  # fmt: skip
HOST = ("host_one_shot.cu", "host_two_shot.cu", "outbox.cuh", "wire/phase.cuh", "partition/chunks.cuh")
NORM = (
    "one_shot_norm.cu",
    "two_shot_norm.cu",
    "row_exchange.cuh",
    "warp_exchange.cuh",
    "partition/rows.cuh",
    "epilogue/norm.cuh",
)
PTX = "ptx.cuh"

REMOVED, NEGATED, DROPPED, COMPARED = "statement removed", "condition negated", "condition dropped", "comparison by one"
CONSTANT, INDEX, OPERATOR, ARGUMENTS = "constant by one", "index by one", "operator swapped", "arguments swapped"
TURN, ORDER, WEAKER = "turn left out", "order swapped", "access weakened"
KINDS = (REMOVED, NEGATED, DROPPED, COMPARED, CONSTANT, INDEX, OPERATOR, ARGUMENTS, TURN, ORDER, WEAKER)

_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_OPERATORS = {"&&": "||", "||": "&&", "&": "|", "|": "&", "^": "|", "+": "-", "-": "+", "==": "!=", "!=": "=="}
_ASSIGNMENTS = {"|=": "&=", "&=": "|=", "+=": "-="}
_COMMUTATIVE = ("max_u32", "min_u32", "__fadd_rn", "__fmul_rn", "defined", "sizeof", "offsetof")
_WEAKER = {
    "ld_relaxed_sys_v4": "ld_global_v4", "ld_relaxed_sys_v2_u64": "ld_global_v4", "st_relaxed_sys_v2_u64": "st_global_v4",
    "ld_relaxed_sys_u32": "ld_relaxed_gpu_u32", "st_relaxed_sys_u32": "st_relaxed_gpu_u32", "st_relaxed_gpu_u32": "st_global_u32",
}  # fmt: skip
_FOR_THE_COMPILER = ("materialize", "opaque")  # what they do is no change of meaning, and measured
_PREDICATED = "st_relaxed_sys_v4"  # of which there is no weak form with a predicate
_MNEMONICS = ((".relaxed.sys", ".relaxed.gpu"), (".relaxed.sys", ""), (".relaxed.gpu", ""), (".acq_rel.sys", ".acq_rel.gpu"),
              (".acquire.cluster", ".relaxed.cluster"), (".acquire.cluster", ".acquire.cta"), (".wait.acquire", ".wait"),
              (".release.cluster", ".release.cta"))  # fmt: skip
# Calls that access memory that others see, or order such accesses.
_ACCESS = re.compile(
    r"(st_|ld_|atom_|fence_|griddepcontrol_|__sync|cluster_|mbarrier_)|(push|poison|advance|publish|take|wait|load|send|receive|report"
    r"|give_up|stop|stopped|finish|prepare|abandon|all_sync|any_sync|broadcast|store|init)$"
)
_STATEMENTS = ("expression_statement", "declaration", "if_statement", "for_statement", "return_statement", "do_statement")


@dataclass(frozen=True)
class Mutant:
    """One change of one file.

    Attributes:
        file: in ``kernels/cuda``.
        kind: one of ``KINDS``.
        start: byte of ``old`` in the file.
        old: text that is replaced, and ``new``: by what.
        line: number of the line in which it begins, from 1, and ``text``: that line.
        turn: how many mutants of the same file, line, kind, old and new come before.
    """

    file: str
    kind: str
    start: int
    old: str
    new: str
    line: int
    text: str
    turn: int = 0

    @property
    def id(self) -> str:
        """The same as long as the line is, wherever it moves."""
        parts = (self.file, self.kind, self.text, self.old, self.new, str(self.turn))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]

    def applied(self, text: str) -> str:
        """The file with this change."""
        data = text.encode()
        old = self.old.encode()
        assert data[self.start : self.start + len(old)] == old
        return (data[: self.start] + self.new.encode() + data[self.start + len(old) :]).decode()

    def __str__(self) -> str:
        short = [re.sub(r"\s+", " ", text)[:90] for text in (self.old, self.new)]
        return f"{self.file}:{self.line} {self.kind}: {short[0]!r} -> {short[1]!r}"


def missing() -> str | None:
    """Why no mutants can be made here."""
    for name in ("tree_sitter", "tree_sitter_cuda"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    return None


def every(files: tuple[str, ...] = (*BARE, *NORM, *HOST, PTX)) -> list[Mutant]:
    """All mutants of these files, in their order."""
    texts = source.files()
    return [mutant for file in files for mutant in of_text(file, texts[file])]


def of_text(file: str, text: str) -> list[Mutant]:
    """All mutants of one file."""
    import tree_sitter_cuda
    from tree_sitter import Language, Parser

    root = Parser(Language(tree_sitter_cuda.language())).parse(text.encode()).root_node
    return made(file, text, _mnemonics(root) if file == PTX else _changes(root))


def made(file: str, text: str, changes: Iterator[Change]) -> list[Mutant]:
    """A mutant of each change of a file, once."""
    data, lines, seen, found = text.encode(), text.split("\n"), set(), []
    turns: Counter[tuple] = Counter()
    for kind, start, end, new in changes:
        old = data[start:end].decode()
        if old == new or (start, end, new) in seen:
            continue
        seen.add((start, end, new))
        line = data[:start].count(b"\n")
        key = (kind, lines[line].strip(), old, new)
        found.append(Mutant(file, kind, start, old, new, line + 1, lines[line].strip(), turns[key]))
        turns[key] += 1
    return found


Change = tuple[str, int, int, str]  # kind, first byte, byte behind the last, new text


def _text(node) -> str:
    return node.text.decode()


def _walk(node) -> Iterator:
    """All nodes in function bodies and initializers that were understood."""
    if node.type in ("ERROR", "comment", "static_assert_declaration", "preproc_def", "preproc_function_def", "preproc_include",
                     "template_parameter_list", "enum_specifier", "preproc_call"):  # fmt: skip
        return
    yield node
    for child in node.children:
        if not (node.type in ("preproc_if", "preproc_elif") and child == node.child_by_field_name("condition")):
            yield from _walk(child)


def _mnemonics(root) -> Iterator[Change]:
    for node in _walk(root):
        if node.type == "string_literal":
            text = _text(node)
            for old, new in _MNEMONICS:
                for match in re.finditer(re.escape(old) + r"\b", text):
                    yield WEAKER, node.start_byte + match.start(), node.start_byte + match.end(), new


def _changes(root) -> Iterator[Change]:
    for node in _walk(root):
        for rule in (_of_statement, _of_condition, _of_operator, _of_number, _of_index, _of_call, _of_loop):
            yield from rule(node)
        if node.type in ("compound_statement", "case_statement"):
            yield from _order(node)


def _replace(kind: str, node, new: str) -> Change:
    return kind, node.start_byte, node.end_byte, new


def _of_statement(node) -> Iterator[Change]:
    if node.type == "expression_statement":
        if not _text(node).strip(";") or re.match(rf"({'|'.join(_FOR_THE_COMPILER)})\([\w.\[\]]+\);", _text(node)):
            return
        yield _replace(REMOVED, node, "{}" if node.parent.type != "compound_statement" else ";")
    elif node.type == "return_statement" and len(node.children) <= 2:
        yield _replace(REMOVED, node, "{}")
    elif (
        node.type == "return_statement"
        and node.parent.type != "compound_statement"
        and node.parent.parent.type == "compound_statement"
    ):
        yield _replace(REMOVED, node, "{}")  # of an if; whether the function still returns is for the compiler


def _of_condition(node) -> Iterator[Change]:
    if node.type == "if_statement":
        condition = node.child_by_field_name("condition").child_by_field_name("value")
        if condition is not None and not any(child.type == "constexpr" for child in node.children):
            yield _replace(NEGATED, condition, f"!({_text(condition)})")
            yield _replace(DROPPED, condition, "true")
            yield _replace(DROPPED, condition, "false")
    elif node.type == "conditional_expression":
        condition = node.child_by_field_name("condition")
        yield _replace(NEGATED, condition, f"!({_text(condition)})")
        yield _replace(DROPPED, node, f"({_text(node.child_by_field_name('consequence'))})")
        yield _replace(DROPPED, node, f"({_text(node.child_by_field_name('alternative'))})")
    elif node.type == "binary_expression" and _text(node.child_by_field_name("operator")) in ("&&", "||"):
        for side in ("left", "right"):
            yield _replace(DROPPED, node, f"({_text(node.child_by_field_name(side))})")
    elif node.type == "unary_expression" and _text(node).startswith("!"):
        yield _replace(NEGATED, node, f"bool({_text(node)[1:]})")


def _of_operator(node) -> Iterator[Change]:
    if node.type == "binary_expression":
        operator = node.child_by_field_name("operator")
        if (name := _text(operator)) in _COMPARISONS:
            yield _replace(COMPARED, operator, _COMPARISONS[name])
        if name in _OPERATORS:
            yield _replace(OPERATOR, operator, _OPERATORS[name])
    elif node.type == "assignment_expression":
        operator = node.child_by_field_name("operator")
        if (name := _text(operator)) in _ASSIGNMENTS:
            yield _replace(OPERATOR, operator, _ASSIGNMENTS[name])


def _of_number(node) -> Iterator[Change]:
    if (
        node.type != "number_literal"
        or node.parent.type == "init_declarator"
        and node.parent.parent.parent.type == "for_statement"
    ):
        return
    match = re.fullmatch(r"(0[xX][0-9a-fA-F]+|[0-9]+)([uUlL]*)", _text(node))
    if match:
        value = int(match[1], 0)
        if value < 0xFFFFFFFF:
            yield _replace(CONSTANT, node, f"{value + 1}{match[2]}")
        if value > 1:
            yield _replace(CONSTANT, node, f"{value - 1}{match[2]}")


def _of_index(node) -> Iterator[Change]:
    if node.type == "subscript_expression":
        index = node.child_by_field_name("indices").named_children[0]
        if index.type != "number_literal":
            yield _replace(INDEX, index, f"{_text(index)} + 1")


def _of_call(node) -> Iterator[Change]:
    if node.type != "call_expression":
        return
    function, arguments = node.child_by_field_name("function"), node.child_by_field_name("arguments")
    name, given = re.sub(r"<.*", "", _text(function)), [n for n in arguments.named_children if n.type != "comment"]
    if name not in _COMMUTATIVE:
        for a, b in zip(given, given[1:]):
            if "lambda_expression" not in (a.type, b.type):
                yield ARGUMENTS, a.start_byte, b.end_byte, f"{_text(b)}, {_text(a)}"
    if name in _WEAKER:
        yield _replace(WEAKER, function, _WEAKER[name])
    elif name == _PREDICATED:
        to, packet, *yes = map(_text, given)
        yield _replace(WEAKER, node, f"(({' '.join(yes) or 'true'}) ? st_global_v4({to}, {packet}) : void())")


def _of_loop(node) -> Iterator[Change]:
    if node.type == "for_statement":
        declared, condition, update = map(node.child_by_field_name, ("initializer", "condition", "update"))
        if declared is not None and declared.type == "declaration":
            declarator = declared.child_by_field_name("declarator")
            name, value = declarator.child_by_field_name("declarator"), declarator.child_by_field_name("value")
            turn = "* 2" if update is not None and "*=" in _text(update) else "+ 1"
            yield _replace(TURN, value, f"({_text(value)}) {turn}")
            for part in () if condition is None else _walk(condition):
                left = part.child_by_field_name("left") if part.type == "binary_expression" else None
                if left is not None and _text(left) == _text(name):
                    yield _replace(TURN, left, f"{_text(left)} {turn}")
    elif node.type == "do_statement":
        condition = node.child_by_field_name("condition")
        yield _replace(TURN, condition, "(false)")
    elif node.type == "while_statement":
        yield _replace(TURN, node.child_by_field_name("condition"), "(false)")


def _order(block) -> Iterator[Change]:
    """Neighbours that both access memory, or order accesses, the other way round."""
    statements = [n for n in block.named_children if n.type not in ("comment", "preproc_call")]
    for a, b in zip(statements, statements[1:]):
        if a.type in _STATEMENTS and b.type in _STATEMENTS and _accesses(a) and _accesses(b):
            yield ORDER, a.start_byte, b.end_byte, f"{_text(b)}\n{_text(a)}"


def _accesses(statement) -> bool:
    for node in _walk(statement):
        if node.type == "call_expression":
            function = node.child_by_field_name("function")
            if function.type in ("field_expression", "template_method"):
                function = function.child_by_field_name("field") or function
            if _ACCESS.match(re.sub(r"<.*", "", _text(function), flags=re.S)):
                return True
    return False
