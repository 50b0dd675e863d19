"""A stand-in of the CUDA driver as cuda.bindings has it: every answer is of the type that the bindings document.

They answer with objects of their own (``cuuint64_t``, ``CUstream``, enums), some of which have no ``==``. A stand-in that
answered with ints once hid that two streams were never ordered.
"""

from __future__ import annotations

import itertools
import re
from functools import cache
from typing import Any

import pytest

driver = pytest.importorskip("cuda.bindings.driver")

_HANDLES = itertools.count(1 << 33, 1 << 12)


@cache
def documented(name: str) -> tuple[Any, ...]:
    """The types that ``cuda.bindings.driver.<name>`` returns besides its error, as its docstring lists them."""
    text = getattr(driver, name).__doc__
    found = re.search(r"^([ \t]*)Returns\n\1-+\n\1CUresult\n(.*?)(?=^\1\S[^\n]*\n\1-+\n|\Z)", text, re.M | re.S)
    assert found, f"{name}: no list of what it returns"
    lines = re.findall(rf"^{found[1]}(\w+) : (.+)$", found[2], re.M)
    return tuple(map(_type, (kind for _, kind in lines)))


def _type(text: str) -> Any:
    name = re.sub(r":py:obj:`~?\.?([^`]+)`", r"\1", text)
    if name.startswith("list["):
        return list
    plain = {"int": int, "unsigned int": int, "unsigned long long": int, "size_t": int, "bytes": bytes, "Any": int}
    return plain.get(name) or getattr(driver, name)


def made(kind: Any) -> Any:
    """Any value of that type: a new handle, zero, the first of an enum."""
    if kind in (int, bytes, list):
        return kind()
    if hasattr(kind, "__members__"):
        return kind(0)
    if kind in (driver.CUipcMemHandle, driver.CUuuid):
        return kind()
    return kind(0 if kind is driver.CUdevice else next(_HANDLES))


class FakeDriver:
    """``call`` takes the place of ``allreduce_jit.engine.driver.call`` in the modules it is put into.

    Attributes:
        log: (name, *arguments) of every call, handles as ints.
        answers: name -> function of the arguments, whose value has to be of the documented types.
        fails: name -> the exception to raise.
    """

    def __init__(self, monkeypatch, *modules, **answers):
        self.log: list[tuple] = []
        self.answers, self.fails = answers, {}
        for module in modules:
            monkeypatch.setattr(module, "call", self.call)

    def call(self, name: str, *arguments: Any) -> Any:
        kinds = documented(name)
        self.log.append((name, *map(plain, arguments)))
        if name in self.fails:
            raise self.fails[name]
        if name not in self.answers:
            values = tuple(map(made, kinds))
        else:
            answer = self.answers[name](*arguments)
            values = () if answer is None else answer if isinstance(answer, tuple) else (answer,)
            assert len(values) == len(kinds) and all(map(isinstance, values, kinds)), f"{name} answers {kinds}, not {values}"
        return values[0] if len(values) == 1 else values or None

    def named(self, *names: str) -> list[tuple]:
        """The calls of these names."""
        return [entry for entry in self.log if entry[0] in names]


def plain(value: Any) -> Any:
    """A handle as the int that it is; anything else as it is."""
    try:
        return value if isinstance(value, (bool, bytes, str, list)) else int(value)
    except (TypeError, ValueError):
        return value


def capture_info(number: int | None) -> tuple:
    """What ``cuStreamGetCaptureInfo`` answers for a stream of capture ``number``, or of none."""
    kinds = documented("cuStreamGetCaptureInfo")
    status = kinds[0].CU_STREAM_CAPTURE_STATUS_NONE if number is None else kinds[0].CU_STREAM_CAPTURE_STATUS_ACTIVE
    return status, driver.cuuint64_t(number or 0), *map(made, kinds[2:])
