"""Kernels compiled for tests, and NVIDIA's own reading of the cubins."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import threading
from pathlib import Path

import pytest

from allreduce_jit.errors import CompileError
from allreduce_jit.jit import compiler, triton_process
from allreduce_jit.jit.cache import KernelCache
from allreduce_jit.jit.compiler import build

PARAMETERS_AT = {"sm_80": 352, "sm_90": 528, "sm_100": 896}  # in constant bank 0


def available(language):
    try:
        return compiler._version(language)
    except CompileError:
        return None


needs_nvrtc = pytest.mark.skipif(not available("cuda"), reason="needs NVRTC")
needs_triton = pytest.mark.skipif(not available("triton"), reason="needs Triton")


def compile_one(spec, arch):
    return build(spec, arch, KernelCache(None))[0]


def compile_with(monkeypatch, spec, text, mistake, arch="sm_90"):
    """``spec`` out of a source that has ``mistake`` in the place of ``text``."""
    source = compiler._cuda_source(spec)
    assert text in source
    monkeypatch.setattr(compiler, "_cuda_source", lambda spec: source.replace(text, mistake))
    return compile_one(spec, arch)


_START_IS_PATCHED = threading.Lock()


def compile_behind(code, spec, arch="sm_90"):
    """``spec`` of a Triton kernel, by a process that has run ``code`` before, statements that end in a semicolon."""
    with _START_IS_PATCHED, pytest.MonkeyPatch.context() as patch:
        start = triton_process._START
        assert start.endswith("work(job)")
        patch.setattr(triton_process, "_START", start.removesuffix("work(job)") + code + "work(job)")
        return compile_one(spec, arch)


def nvrtc_archs():
    from cuda.bindings import nvrtc

    return [f"sm_{arch}" for arch in nvrtc.nvrtcGetSupportedArchs()[1]]


def cuobjdump(tmp_path, artifact, *options):
    """NVIDIA's own reading of a cubin, by the tool in Triton's wheel."""
    spec = importlib.util.find_spec("triton")
    tool = Path(spec.origin).parent / "backends/nvidia/bin/cuobjdump" if spec else None
    if tool is None or not tool.exists():
        pytest.skip("needs cuobjdump (Triton's wheel has it)")
    path = tmp_path / f"{artifact.name}.cubin"
    path.write_bytes(artifact.cubin)
    return subprocess.run([tool, *options, path], capture_output=True, text=True, check=True).stdout


def entries_of(cubin):
    """Kernels in a cubin: each has a section of its own."""
    assert cubin.startswith(b"\x7fELF")
    return {name.decode() for name in re.findall(rb"\.text\.(\w+)\0", cubin)}


def resources(tmp_path, artifact):
    """What each kernel takes: {name: {"REG": .., "STACK": .., "LOCAL": .., "CONSTANT[0]": .., ..}}."""
    text = cuobjdump(tmp_path, artifact, "-res-usage")
    found = re.findall(r"Function (\w+):\n(.*)", text)
    return {name: {k: int(v) for k, v in re.findall(r"(\S+):(\d+)", line)} for name, line in found}


def opcodes(tmp_path, artifact):
    """The instructions of each kernel in order, without operands and predicates."""
    text = cuobjdump(tmp_path, artifact, "-sass")
    parts = re.split(r"Function : (\w+)\n", text)[1:]
    line = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.M)
    return dict(zip(parts[::2], map(line.findall, parts[1::2]), strict=True))
