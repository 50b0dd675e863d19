"""The CUDA translation unit of a module: the sources of ``kernels/cuda``, what is made from ``abi``, and its constants."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Iterator

from .. import abi
from ..policy.catalogue import KernelSpec

_INCLUDE = re.compile(r'^#include "([^"]+)"\n', re.M)


def files() -> dict[str, str]:
    """All files of ``kernels/cuda`` by their path there, and the headers that are made from ``abi``."""
    return {**dict(_walk(importlib.resources.files("allreduce_jit.cuda_kernels"), "")), **abi.headers()}


def _walk(folder, prefix: str) -> Iterator[tuple[str, str]]:
    for entry in folder.iterdir():
        if entry.name.endswith((".cu", ".cuh")):
            yield prefix + entry.name, entry.read_text()
        elif entry.is_dir() and not entry.name.startswith("__"):
            yield from _walk(entry, f"{prefix}{entry.name}/")


def expand(filename: str, texts: dict[str, str]) -> str:
    """A file with its includes put in place, each once: the compiler then needs no include path.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    seen: set[str] = set()

    def text_of(name: str) -> str:
        if name in seen:
            return ""
        seen.add(name)
        if name not in texts:
            raise FileNotFoundError(f"kernels/cuda has no file {name}")
        return _INCLUDE.sub(lambda match: text_of(match[1]), texts[name].replace("#pragma once\n", ""))

    return text_of(filename)


def unit(spec: KernelSpec, source: str) -> str:
    """What a compiler is given: ``Config``, the source, and an entry point for each body."""
    constants = "".join(f"    static constexpr unsigned {name} = {value};\n" for name, value in spec.constants)
    macro, *arguments = map(str, spec.macro)
    entries = "".join(f"{macro}({', '.join((name, *arguments, body))})\n" for name, body in zip(spec.entries, spec.bodies))
    return f"struct Config {{\n{constants}}};\n{source}{entries}"
