"""The compiler of kernels/triton: Triton, in a process of its own for each kernel.

Triton is configured per process, by environment and by ``triton.knobs``, and what an engine sets there for its own
kernels (the interpreter, dumps, instrumentation, a cache on a shared home) is not meant for ours. Nor is it safe beside
other threads that use Triton: it changes the filters of warnings, and reads source with ``ast``, whose depth counter
threads share (seen in Python 3.11: ``AST constructor recursion depth mismatch``). And its LLVM aborts the process where
other compilers raise.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from multiprocessing.spawn import get_executable
from pathlib import Path
from typing import Any

from ..errors import CompileError
from ..policy import local_norm
from ..policy.catalogue import KernelSpec
from ..policy.operation import ITEMSIZE
from ..policy.p2p import BLOCK_BYTES, NUM_WARPS
from .cache import Artifact

_START = (
    "import json, sys; job = json.load(sys.stdin); sys.path[:] = job['path']; "
    "from allreduce_jit.jit.triton_process import work; work(job)"
)


def compile(spec: KernelSpec, arch: str) -> Artifact:
    """The module of a kernel of ``kernels/triton``.

    Raises:
        CompileError: Triton is not there or refuses; the message holds what it said.
    """
    with tempfile.TemporaryDirectory(prefix="allreduce_jit_triton_") as folder:
        path = [entry for entry in sys.path if isinstance(entry, str)]
        job = {"path": path, "folder": folder, "source": spec.source, "constants": dict(spec.constants), "arch": arch}
        # The interpreter that multiprocessing starts: where Python is embedded, ``set_executable`` says which.
        command = [get_executable() or "python3", "-c", _START]
        done = subprocess.run(command, input=json.dumps(job), env=_environment(folder), text=True, errors="replace",
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)  # fmt: skip
        try:
            answer: dict[str, Any] = json.loads((Path(folder) / "answer").read_text())
        except FileNotFoundError:
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            answer = {"error": f"{command[0]} ended with {how}: {done.stdout[-4000:].strip() or 'it said nothing'}"}
        if "error" in answer:
            raise CompileError(f"{spec.name} for {arch}: {answer['error']}")
        return Artifact(spec.name, arch, cubin=(Path(folder) / "cubin").read_bytes(), **answer)


def _environment(folder: str) -> dict[str, str]:
    """The caller's, without what it has set for its own use of Triton and of warnings, but for where tools are."""
    theirs = {name for name in os.environ if name.startswith("TRITON_") and not name.endswith("_PATH")}
    kept = {name: value for name, value in os.environ.items() if name not in theirs | {"PYTHONWARNINGS"}}
    return {**kept, "TRITON_CACHE_DIR": folder}


def work(job: Mapping[str, Any]) -> None:
    """In the process: compile, and leave the cubin and an answer in the folder."""
    folder = Path(job["folder"])
    try:
        cubin, answer = _compile(job["source"], job["constants"], job["arch"])
        (folder / "cubin").write_bytes(cubin)
    except Exception as e:  # noqa: BLE001 - compilers raise what they like
        answer = {"error": f"{type(e).__name__}: {e}"}
    (folder / "answer").write_text(json.dumps(answer))


def _compile(source: str, constants: dict[str, Any], arch: str) -> tuple[bytes, dict[str, int]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ..triton_kernels import norm, p2p

    if source == local_norm.KERNEL:
        module, options = norm, {"num_warps": local_norm.warps(constants["STEPS"]), "num_stages": 1}
    else:
        module, options = p2p, {"num_warps": NUM_WARPS, "maxnreg": p2p.MAX_REGISTERS}
        constants["BLOCK"] = BLOCK_BYTES // ITEMSIZE[constants["DTYPE"]]
    constants["DTYPE"] = getattr(triton.language, constants["DTYPE"])
    constants["INTERPRET"] = False
    kernel = ASTSource(getattr(module, source), signature=module.signature(source), constexprs=constants)
    target = GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
    options["enable_fp_fusion"] = False  # the norm's bits are those of products and sums that are rounded each
    compiled = triton.compile(kernel, target=target, options=options)
    meta = compiled.metadata
    return compiled.asm["cubin"], {"threads": 32 * meta.num_warps, "shared_bytes": meta.shared}
