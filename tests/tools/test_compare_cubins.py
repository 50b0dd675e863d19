"""``tools/compare_cubins.py``: sections of a cubin, and what counts as a difference."""

from __future__ import annotations

import importlib.util
import re
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import compare_cubins as tool
import pytest
from helpers import ROOT

from allreduce_jit.errors import CompileError
from allreduce_jit.jit import compiler
from allreduce_jit.jit.cache import KernelCache
from allreduce_jit.policy.catalogue import cuda_module

TOOL = Path(tool.__file__)
SPEC = cuda_module("one_shot", 2)


@pytest.fixture(scope="module")
def cubin():
    try:
        compiler._version("cuda")
    except CompileError:
        pytest.skip("needs NVRTC")
    return compiler.build(SPEC, "sm_90", KernelCache(None))[0].cubin


def test_it_reads_what_the_module_says_of_itself(cubin, tmp_path):
    found = tool.kernels(cubin)
    assert set(found) == set(SPEC.entries)
    for kernel in found.values():
        assert len(kernel.code) % tool.INSTRUCTION == 0 and kernel.figures[0] > 100
        assert 24 <= kernel.registers <= 64 and kernel.stack == kernel.shared == 0


def test_it_reads_what_cuobjdump_reads(cubin, tmp_path):
    triton = importlib.util.find_spec("triton")
    program = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump" if triton else None
    if program is None or not program.exists():
        pytest.skip("needs cuobjdump (Triton's wheel has it)")
    (tmp_path / "it.cubin").write_bytes(cubin)
    text = subprocess.run([program, "-res-usage", tmp_path / "it.cubin"], capture_output=True, text=True, check=True).stdout
    usage = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    assert {name: (k.registers, k.stack, k.shared) for name, k in tool.kernels(cubin).items()} == {
        name: tuple(map(int, figures)) for name, *figures in usage
    }


def kernel(*instructions: int, **changes):
    code = b"".join(struct.pack("<2Q", word, 0) for word in instructions)
    return replace(tool.Kernel(code, registers=32, stack=0, shared=0), **changes)


@pytest.mark.parametrize(
    ("after", "verdict"),
    [
        (kernel(0x1210, 0x2385, 0x3986), "same"),
        (kernel(0x5210, 0x2385, 0x3986), "operands"),
        (kernel(0x2385, 0x1210, 0x3986), "order"),
        (kernel(0x1210, 0x2385, 0x3987), "code"),
        (kernel(0x1210, 0x2385), "code"),
        (kernel(0x1210, 0x2385, 0x3986, registers=33), "code"),
        (kernel(0x1210, 0x2385, 0x3986, stack=8), "code"),
        (None, "gone"),
    ],
)
def test_what_counts_as_a_difference(after, verdict):
    before = kernel(0x1210, 0x2385, 0x3986)
    assert tool.verdict(before, after) == verdict
    assert tool.verdict(None, before) == "new"


def run(*arguments):
    done = subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout


def test_its_exit_status_and_table(cubin, tmp_path):
    for folder in ("before", "after"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / f"{SPEC.name}.sm_90.cubin").write_bytes(cubin)
    assert run(tmp_path / "before", tmp_path / "after") == (0, "6 kernels: 6 same\n")
    changed = bytearray(cubin)
    changed[cubin.index(tool.kernels(cubin)[SPEC.entries[0]].code) + 4] ^= 1
    (tmp_path / "after" / f"{SPEC.name}.sm_90.cubin").write_bytes(changed)
    status, text = run(tmp_path / "before", tmp_path / "after")
    assert status == 1 and "6 kernels: 1 operands, 5 same" in text and f"one_shot_ws2.sm_90/{SPEC.entries[0]}" in text
    (tmp_path / "after" / f"{SPEC.name}.sm_90.cubin").unlink()
    assert run(tmp_path / "before", tmp_path / "after")[0] == 1
    assert run(tmp_path / "after", tmp_path / "after")[0] == 1  # nothing compared is no proof


def test_it_compiles_a_checkout(cubin, tmp_path):
    """This one, by the names that its modules have today."""
    tool.compile_checkout(ROOT, tmp_path, ["sm_90"], [2], "^one_shot_ws2$")
    (path,) = tmp_path.iterdir()
    assert path.name == "one_shot_ws2.sm_90.cubin"
    mine, same = tool.kernels(path.read_bytes()), tool.kernels(cubin)
    assert {name: kernel.code for name, kernel in mine.items()} == {name: kernel.code for name, kernel in same.items()}
