"""Mutants of the Triton sources: the kinds of ``mutants``, found in Python's own syntax tree."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import legacy_ranks
from mutants import (
    ARGUMENTS,
    COMPARED,
    CONSTANT,
    DROPPED,
    INDEX,
    NEGATED,
    OPERATOR,
    ORDER,
    REMOVED,
    TURN,
    WEAKER,
    Change,
    Mutant,
    made,
)

FOLDER = "triton/"  # in front of a file's name in ``Mutant.file``
PROTOCOL = ("p2p.py", "guard.py", "wait.py", "slots.py")
NORM = "norm.py"
FILES = tuple(FOLDER + name for name in (*PROTOCOL, NORM))

_COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">"}
_OPERATORS = {"&": "|", "|": "&", "^": "|", "+": "-", "-": "+", "==": "!=", "!=": "=="}
_ASSIGNMENTS = {"+=": "-=", "|=": "&=", "&=": "|=", "*=": "/="}
_COMMUTATIVE = ("range", "tl.static_range")  # or have a rule of their own
_FOR_THE_COMPILER = ("tl.multiple_of", "tl.max_contiguous")
# Arguments of a type of their own: with another one in their place a call does not compile.
_OTHER = re.compile(r"[A-Z_]+|tl\.\w+|link|pointers|words?( \+ \w+)?|theirs( \+ 1)?|word_at\(.*")
# Whether the interpreter runs the kernel: of its two branches one is not for GPUs, and the other is not run here.
_RUN_BY = "INTERPRET"
# How an access is told to be strong, and what is weaker; of a fence in assembly, its text.
_WEAKER = {
    ("cache_modifier", ".wt"): '""',
    ("volatile", True): "False",
    ("sem", "acq_rel"): '"relaxed"',
    ("scope", "sys"): '"gpu"',
}
_FENCE, _WEAKER_FENCES = "fence.acq_rel.sys; ", ("fence.acq_rel.gpu; ", "")
# Calls that access memory that others see, or hold such accesses.
_ACCESS = re.compile(
    r"tl\.(load|store|atomic_\w+)|push|read|write|receive|guard|fail|check|stopped|peers_of|_leave|_poll|_load_signatures|_store_halves"
)


def texts() -> dict[str, str]:
    """The sources, by ``Mutant.file``."""
    return {FOLDER + path.name: path.read_text() for path in sorted(legacy_ranks.source().glob("*.py"))}


def every(files: tuple[str, ...] = FILES) -> list[Mutant]:
    """All mutants of these files, in their order."""
    found = texts()
    return [mutant for file in files for mutant in of_text(file, found[file])]


def of_text(file: str, text: str) -> list[Mutant]:
    """All mutants of the kernels of one file."""
    return made(file, text, _Kernels(text).changes())


class _Kernels:
    """Functions of one file that Triton compiles, without their arguments and docstrings."""

    def __init__(self, text: str):
        self.data, self.tree = text.encode(), ast.parse(text)
        self.lines = [0]
        for line in self.data.split(b"\n"):
            self.lines.append(self.lines[-1] + len(line) + 1)

    def changes(self) -> Iterator[Change]:
        for function in self.tree.body:
            if isinstance(function, ast.FunctionDef) and any("jit" in ast.unparse(one) for one in function.decorator_list):
                body = function.body[1:] if ast.get_docstring(function) else function.body
                yield from self._of_block(body)
                yield from self._weaker(function)

    def _weaker(self, function: ast.FunctionDef) -> Iterator[Change]:
        for node in ast.walk(function):
            if isinstance(node, ast.keyword) and isinstance(node.value, ast.Constant) and (node.arg, node.value.value) in _WEAKER:
                yield self._replace(WEAKER, node.value, _WEAKER[node.arg, node.value.value])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(_FENCE):
                for fence in _WEAKER_FENCES:
                    yield self._replace(WEAKER, node, self._text(node).replace(_FENCE, fence))

    def _at(self, node: ast.AST) -> tuple[int, int]:
        return (self.lines[node.lineno - 1] + node.col_offset, self.lines[node.end_lineno - 1] + node.end_col_offset)

    def _text(self, node: ast.AST) -> str:
        start, end = self._at(node)
        return self.data[start:end].decode()

    def _replace(self, kind: str, node: ast.AST, new: str) -> Change:
        return kind, *self._at(node), new

    def _of_block(self, body: list[ast.stmt]) -> Iterator[Change]:
        for statement in body:
            yield from self._of_statement(statement)
        for a, b in zip(body, body[1:]):
            if _accesses(a) and _accesses(b) and not _written(a) & _names(b):
                (start, middle), (_, end) = self._at(a), self._at(b)
                indent = "\n" + " " * a.col_offset
                yield ORDER, start, end, self._text(b) + indent + self.data[start:middle].decode()

    def _of_statement(self, node: ast.stmt) -> Iterator[Change]:
        compiler = isinstance(node, (ast.If, ast.While)) and _RUN_BY in _names(node.test)
        if isinstance(node, (ast.Expr, ast.AugAssign)):
            yield self._replace(REMOVED, node, "pass")
        elif isinstance(node, ast.Assign) and _written(node) & _names(node.value) and not _for_the_compiler(node.value):
            yield self._replace(REMOVED, node, "pass")
        if isinstance(node, ast.AugAssign):
            yield from self._of_sign(OPERATOR, _ASSIGNMENTS, node.target, node.value)
        if isinstance(node, ast.If) and not compiler:
            yield self._replace(NEGATED, node.test, f"not ({self._text(node.test)})")
            yield self._replace(DROPPED, node.test, "True")
            yield self._replace(DROPPED, node.test, "False")
        elif isinstance(node, ast.While):
            yield self._replace(TURN, node.test, "False")
        elif isinstance(node, ast.For):
            first, *rest = node.iter.args
            if rest:
                yield self._replace(TURN, first, f"({self._text(first)}) + 1")
                yield self._replace(TURN, rest[0], f"({self._text(rest[0])}) - 1")
            else:
                yield self._replace(TURN, first, f"1, {self._text(first)}")
                yield self._replace(TURN, first, f"({self._text(first)}) - 1")
        for field, value in () if compiler else ast.iter_fields(node):
            if field in ("body", "orelse"):
                yield from self._of_block(value)
            elif field not in ("annotation", "target", "targets"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST):
                        yield from self._of_expression(child)

    def _of_expression(self, root: ast.AST) -> Iterator[Change]:
        for node in ast.walk(root):
            if isinstance(node, ast.IfExp):
                yield self._replace(NEGATED, node.test, f"not ({self._text(node.test)})")
                yield self._replace(DROPPED, node, f"({self._text(node.body)})")
                yield self._replace(DROPPED, node, f"({self._text(node.orelse)})")
            elif isinstance(node, ast.Compare):
                yield from self._of_sign(COMPARED, _COMPARISONS, node.left, node.comparators[0])
                yield from self._of_sign(OPERATOR, _OPERATORS, node.left, node.comparators[0])
            elif isinstance(node, ast.BinOp):
                yield from self._of_sign(OPERATOR, _OPERATORS, node.left, node.right)
                if isinstance(node.op, (ast.BitAnd, ast.BitOr)):
                    for side in (node.left, node.right):
                        yield self._replace(DROPPED, node, f"({self._text(side)})")
            elif isinstance(node, ast.Constant) and type(node.value) is int:
                yield self._replace(CONSTANT, node, str(node.value + 1))
                if node.value > 1:
                    yield self._replace(CONSTANT, node, str(node.value - 1))
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, (ast.Name, ast.BinOp)):
                yield self._replace(INDEX, node.slice, f"{self._text(node.slice)} + 1")
            elif isinstance(node, ast.Call):
                yield from self._of_call(node)

    def _of_call(self, node: ast.Call) -> Iterator[Change]:
        name = ast.unparse(node.func)
        if name == "tl.where":
            for chosen in node.args[1:]:
                yield self._replace(DROPPED, node, f"({self._text(chosen)})")
        if name not in (*_COMMUTATIVE, *_FOR_THE_COMPILER):
            for a, b in zip(node.args, node.args[1:]):
                if {_OTHER.fullmatch(self._text(one)) is None for one in (a, b)} == {True}:
                    yield ARGUMENTS, self._at(a)[0], self._at(b)[1], f"{self._text(b)}, {self._text(a)}"

    def _of_sign(self, kind: str, swapped: dict[str, str], left: ast.expr, right: ast.expr) -> Iterator[Change]:
        """What stands between two operands, parentheses aside."""
        start, end = self._at(left)[1], self._at(right)[0]
        sign = re.search(r"[^\s()]+", self.data[start:end].decode())
        if sign and sign[0] in swapped:
            yield kind, start + sign.start(), start + sign.end(), swapped[sign[0]]


def _for_the_compiler(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) in _FOR_THE_COMPILER


def _names(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name)}


def _written(node: ast.AST) -> set[str]:
    return {one.id for one in ast.walk(node) if isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store)}


def _accesses(node: ast.stmt) -> bool:
    return any(isinstance(one, ast.Call) and _ACCESS.fullmatch(ast.unparse(one.func)) for one in ast.walk(node))
