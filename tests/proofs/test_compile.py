"""Every kernel that a plan can pick compiles, without a GPU, and its machine code is what the protocols lean on.

LONG=1 compiles the kernels of every world size for sm_90, LONG=2 for every architecture; without it, a few pairs.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import importlib.metadata
import importlib.util
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import legacy_ranks
import pytest
from helpers.cubins import (
    PARAMETERS_AT,
    available,
    compile_behind,
    compile_one,
    compile_with,
    entries_of,
    needs_nvrtc,
    needs_triton,
    nvrtc_archs,
    opcodes,
    resources,
)

from allreduce_jit.errors import CompileError
from allreduce_jit.jit import compiler, source, triton_process
from allreduce_jit.jit.cache import KernelCache
from allreduce_jit.jit.compiler import build
from allreduce_jit.machine.probe import probe
from allreduce_jit.machine.sources import SoftwareSource
from allreduce_jit.policy.catalogue import (
    NVLINK_ALGORITHMS,
    WORLD_SIZES,
    cuda_module,
    entry,
    nvlink_modules,
    p2p_modules,
    triton_module,
)
from allreduce_jit.policy.operation import DTYPES, ITEMSIZE, all_reduce
from allreduce_jit.policy.p2p import THREADS

ARCHS = ("sm_80", "sm_90", "sm_100")
ALL = [(n, arch) for arch in ARCHS for n in WORLD_SIZES]
LONG = bool(os.environ.get("LONG"))
PAIRS = (
    ALL
    if os.environ.get("LONG") == "2"
    else [pair for pair in ALL if pair[1] == "sm_90" or pair in ((8, "sm_80"), (4, "sm_100"))]
)
REGISTERS = 65536  # of a multiprocessor, on all of these


@pytest.fixture(scope="module")
def compiled():
    """Artifacts of specs for an architecture, each compiled once, several at a time."""
    memo = {}
    with ProcessPoolExecutor(min(8, os.cpu_count()), multiprocessing.get_context("spawn")) as pool:

        def get(specs, arch):
            if specs[0].language == "cuda" and arch not in nvrtc_archs():
                pytest.skip(f"this NVRTC does not compile for {arch}")
            missing = [spec for spec in specs if (spec, arch) not in memo]
            for spec, artifact in zip(missing, pool.map(compile_one, missing, [arch] * len(missing)), strict=True):
                memo[spec, arch] = artifact
            return [memo[spec, arch] for spec in specs]

        yield get


# -- V2


@pytest.mark.long
@needs_nvrtc
@pytest.mark.parametrize(("world_size", "arch"), PAIRS if LONG else [(2, "sm_90"), (8, "sm_80"), (4, "sm_100")])
def test_v2(compiled, tmp_path, world_size, arch):
    specs = list(dict.fromkeys(nvlink_modules(world_size) + nvlink_modules(world_size, few_sms=True)))
    assert len(specs) >= 2
    for spec, artifact in zip(specs, compiled(specs, arch), strict=True):
        assert (artifact.name, artifact.arch, artifact.threads, artifact.shared_bytes) == (spec.name, arch, 0, 0)
        check_module(tmp_path, spec, artifact)


def check_module(tmp_path, spec, artifact):
    """Every kernel of a V2 module; raises AssertionError."""
    name, world_size = spec.name.split("_ws")
    usage, code = resources(tmp_path, artifact), opcodes(tmp_path, artifact)
    assert entries_of(artifact.cubin) == set(spec.entries) == set(usage) == set(code)
    assert len(spec.entries) == 2 * len(DTYPES)
    for dtype in DTYPES:
        for whole in (True, False):
            kernel = entry(name, dtype, int(world_size), whole)
            check_resources(usage[kernel], NVLINK_ALGORITHMS[name], int(world_size), artifact.arch)
            elements = 1 if whole else 16 // ITEMSIZE[dtype]  # accesses to the user's tensor for one packet
            check_v2(code[kernel], NVLINK_ALGORITHMS[name], int(world_size), elements, pdl=artifact.arch != "sm_80")


def check_resources(usage, what, world_size, arch):
    from allreduce_jit.abi import Args

    assert usage["STACK"] == usage["LOCAL"] == 0  # nothing spilled, no array in local memory
    assert usage["CONSTANT[0]"] == PARAMETERS_AT[arch] + ctypes.sizeof(Args)
    warp = -(-usage["REG"] * 32 // 256) * 256  # registers are dealt to warps by the 256
    blocks = 1 if world_size > 4 or what.packets > 1 else 2  # __launch_bounds__ in entry.cuh
    assert REGISTERS // warp * 32 >= 512 * blocks


def check_v2(ops, what, world_size, elements, pdl):
    """The instructions of one kernel against what its algorithm is said to do."""
    check_memory_accesses(ops)
    accesses = [op for op in ops if re.match(r"(LDG?|STG?|ATOMG?|REDG?)\.", op)]
    strong = [op for op in accesses if ".STRONG." in op]
    weak = [op for op in accesses if ".STRONG." not in op]

    # Packets: in every phase each thread pushes one to every peer and poisons the slot of every peer, and loads it in
    # one place; in another, wherever a wait is long. Besides there is the signature. All are strong and of system scope.
    packets = what.packets * (world_size - 1) * (2 if what.parts else 1)
    wide = [op for op in strong if ".128" in op]
    assert set(wide) == {"LDG.E.128.STRONG.SYS", "STG.E.128.STRONG.SYS"}
    assert wide.count("STG.E.128.STRONG.SYS") == 2 * packets + 1
    assert wide.count("LDG.E.128.STRONG.SYS") - packets - (world_size - 1) in (2, 3)
    assert {op.rsplit(".STRONG.", 1)[1] for op in strong} == {"SYS", "GPU"}
    assert "LDG.E.STRONG.SYS" in strong and "STG.E.STRONG.SYS" in strong  # abort words, the report
    assert sum("CAS" in op and op.endswith(".SYS") for op in strong) == 2  # of the guard and of who gives up

    # Weak accesses: the user's tensors, 16 bytes at a time where they are whole packets, and once more to store NaN, in a
    # loop or unrolled; and loads of arguments.
    tensor = what.packets * (world_size if what.parts else 1)
    stores = [op for op in weak if op.startswith("ST")]
    assert len(stores) in ((tensor + 1) * elements, 2 * tensor * elements)
    if elements == 1:
        assert set(stores) == {"STG.E.128"} and weak.count("LDG.E.128") == tensor
    else:
        assert not [op for op in weak if ".128" in op]

    # The report is complete before its code is written.
    assert [op for op in ops if op.startswith("MEMBAR")] == 2 * ["MEMBAR.ALL.SYS"]
    assert ("PREEXIT" in ops and "ACQBULK" in ops) == pdl
    if pdl and what.stream:
        # The next launch may start only after the wait, and pushes before its own.
        assert "ACQBULK" in ops[: ops.index("PREEXIT")]
    elif pdl:
        # The next kernel may start at once. This one touches no memory before it may, but for a look at the abort word.
        tensor = ops.index(next(op for op in weak if op.startswith("LD")))
        wait = max(i for i, op in enumerate(ops[:tensor]) if op == "ACQBULK")
        before = ops[max(i for i, op in enumerate(ops[:wait]) if op == "PREEXIT") : wait]
        assert [op for op in before if op in accesses] == ["LDG.E.STRONG.GPU"]
    if pdl:
        # The guard draws its ticket before the next kernel may start, and before it waits.
        ticket = ops.index("ATOMG.E.ADD.STRONG.GPU")
        before = ops[ticket : ops.index("ACQBULK", ticket)]
        assert ("PREEXIT" in before) != what.stream
        assert {op for op in before if op in accesses} == {"ATOMG.E.ADD.STRONG.GPU", "LDG.E.STRONG.GPU"}


def check_memory_accesses(ops):
    """Nothing read through the non-coherent path, and no fence of the slow kind."""
    loads = [op for op in ops if re.match(r"LDG?\b", op)]
    assert loads and not [op for op in loads if {"CONSTANT", "CI"} & set(op.split("."))]
    assert not [op for op in ops if op.startswith("MEMBAR.SC")]
    assert not [op for op in ops if re.match(r"(LDL|STL)\b", op)]  # local memory


@needs_nvrtc
@pytest.mark.parametrize(
    ("algorithm", "instruction", "mistake"),
    [
        ("one_shot", "ld.relaxed.sys.global.v4", "ld.global.nc.v4"),  # may read a stale line for ever
        ("one_shot", "st.relaxed.sys.global.v4", "st.global.v4"),  # may never leave this GPU
        ("one_shot", "st.relaxed.sys.global.v4", "st.relaxed.gpu.global.v4"),
        ("one_shot", "st.relaxed.sys.global.v2.u64", "st.global.v2.u64"),
        ("one_shot", "fence.acq_rel.sys", "fence.sc.sys"),
        ("one_shot", "fence.acq_rel.sys", "fence.acq_rel.gpu"),
        ("one_shot", "griddepcontrol.wait", "griddepcontrol.launch_dependents"),
        ("one_shot", "if (!Config::STREAM) griddepcontrol_launch_dependents();  // now", "// now"),  # and not before
        ("two_shot_stream", "if (!STREAM) griddepcontrol", "griddepcontrol"),  # before the wait
        ("two_shot", "? 1 : 2", "? 4 : 4"),  # so few registers that they spill
    ],
)
def test_the_check_sees_a_planted_mistake(monkeypatch, tmp_path, algorithm, instruction, mistake):
    spec = cuda_module(algorithm, 4)
    artifact = compile_with(monkeypatch, spec, instruction, mistake)
    with pytest.raises(AssertionError):
        check_module(tmp_path, spec, artifact)


@pytest.mark.parametrize(
    ("algorithm", "world_size", "most"), [("one_shot", 4, 64), ("two_shot", 8, 128), ("two_shot_wide", 4, 128)]
)
def test_the_budget_of_registers(algorithm, world_size, most):
    from allreduce_jit.abi import Args

    usage = {"REG": most, "STACK": 0, "LOCAL": 0, "CONSTANT[0]": PARAMETERS_AT["sm_90"] + ctypes.sizeof(Args)}
    check_resources(usage, NVLINK_ALGORITHMS[algorithm], world_size, "sm_90")
    for worse in ({"REG": most + 1}, {"STACK": 8}, {"LOCAL": 4}):
        with pytest.raises(AssertionError):
            check_resources(usage | worse, NVLINK_ALGORITHMS[algorithm], world_size, "sm_90")


# NVRTC (13.0 and 13.5) leaves out a loop with `#pragma unroll` behind such a one, where that is discarded.
LOOP_AS_BRANCH = r"\b(else|if constexpr\s*\(.*\))\s*(//.*\s*)*(#.*\s+)*(for|while)\b"


def test_no_loop_is_a_branch_of_if_constexpr():
    bad = "if constexpr (A == f(1)) for (;;) {}", "} else\n    // slow\n#pragma unroll\n for (;;) {}", "else while (x) y();"
    assert all(re.search(LOOP_AS_BRANCH, text) for text in bad)
    assert not re.search(LOOP_AS_BRANCH, "if constexpr (A) { for (;;) {} } else { for (;;) {} } while (x) {}")
    sources = source.files()
    assert len(sources) > 20 and not [name for name, text in sources.items() if re.search(LOOP_AS_BRANCH, text)]


@needs_nvrtc
def test_v2_with_virtual_ranks(compiled, tmp_path):
    specs = [cuda_module(algorithm, 3, virtual_ranks=True) for algorithm in NVLINK_ALGORITHMS]
    for spec, artifact in zip(specs, compiled(specs, "sm_90"), strict=True):
        assert artifact.name == spec.name and artifact.name.endswith("_virtual")
        assert entries_of(artifact.cubin) == set(spec.entries)
        for usage in resources(tmp_path, artifact).values():
            assert usage["STACK"] == usage["LOCAL"] == 0
            assert usage["CONSTANT[0]"] == PARAMETERS_AT["sm_90"] + 8  # a pointer to all ranks' arguments


# -- legacy


@pytest.mark.long
@needs_triton
@pytest.mark.parametrize(
    ("world_size", "arch"), ALL if os.environ.get("LONG") == "2" else [(8, "sm_90"), (4, "sm_90"), (3, "sm_80"), (2, "sm_100")]
)
def test_legacy_compiles(compiled, tmp_path, world_size, arch):
    from allreduce_jit.triton_kernels import p2p

    sizes = {"i32": 4, "i64": 8, "constexpr": 0}
    specs = p2p_modules(world_size)
    assert len(specs) == 2 * len(DTYPES) * 2
    for spec, artifact in zip(specs, compiled(specs, arch), strict=True):
        assert (artifact.name, artifact.arch, artifact.threads) == (spec.name, arch, THREADS)
        assert artifact.shared_bytes <= 48 << 10  # what a kernel may have without asking
        assert entries_of(artifact.cubin) == set(spec.entries)
        (usage,) = resources(tmp_path, artifact).values()
        # For some, ptxas parks an address or two over the whole kernel to fit one more program; loops touch no stack.
        assert usage["STACK"] <= 16 and usage["LOCAL"] == 0
        parameters = 0
        for size in [*(sizes[t] for t in p2p.signature(spec.source).values() if sizes[t]), 8, 8]:  # + two for scratch
            parameters = -(-parameters // size) * size + size
        assert usage["CONSTANT[0]"] == PARAMETERS_AT[arch] + parameters


def check_strong_accesses(tmp_path, spec, artifact):
    """Of one of legacy's kernels, on sm_90: how many accesses of each strength and scope its sources ask for; raises AssertionError."""
    (ops,) = opcodes(tmp_path, artifact).values()
    peers, phases = dict(spec.constants)["WORLD"] - 1, 2 if "two_shot" in spec.name else 1
    waits = 1 + phases  # the guard's, and one a phase, each of which polls in two places and may fail
    expected = {
        "LDG.E.128.STRONG.SYS": 2 * (1 + peers) * phases,  # slots
        "STG.E.128.STRONG.SYS": peers * phases,
        "LDG.E.64.STRONG.SYS": 2 * 2 + waits,  # halves of signatures; limits
        "STG.E.64.STRONG.SYS": 2,
        "LDG.E.STRONG.SYS": 2 + 3 * waits,  # the abort code, in each wait as well; there what is handshaken; the call that failed
        # The number of the call, what is handshaken; the abort code to peers, the report's.
        "STG.E.STRONG.SYS": 2 + waits * (peers + 1),
        "ATOMG.E.CAS.STRONG.SYS": waits,
        "ATOMG.E.EXCH.STRONG.GPU": waits,
        "ATOMG.E.ADD.STRONG.GPU": 1,  # calls in flight
        "REDG.E.ADD.STRONG.GPU": 1,
        "MEMBAR.ALL.SYS": 2 * waits,  # before the abort code is exchanged, and before the report's is stored
        "MEMBAR.ALL.GPU": waits,  # before who reports is settled
    }
    found = Counter(op for op in ops if ".STRONG." in op or op.startswith("MEMBAR"))
    # The number of a call is stored when all threads have read the one before: behind the barrier that the atomic's result goes through.
    meet = [op for op in ops if op.startswith("BAR.SYNC") or op in ("ATOMG.E.ADD.STRONG.GPU", "STG.E.STRONG.SYS")]
    barrier, store = meet[meet.index("ATOMG.E.ADD.STRONG.GPU") + 1 :][:2]
    assert barrier.startswith("BAR.SYNC") and store == "STG.E.STRONG.SYS", (
        "a number is stored before all have read the one before"
    )
    assert found == expected, {
        op: (found[op], expected.get(op, 0)) for op in {*found, *expected} if found[op] != expected.get(op, 0)
    }


def compile_triton_from(sources, spec, arch="sm_90"):
    """``spec`` out of the sources in this folder."""
    theirs = (
        "import importlib.util; name = 'allreduce_jit.triton_kernels';"
        f" spec = importlib.util.spec_from_file_location(name, {str(sources / '__init__.py')!r}, submodule_search_locations=[{str(sources)!r}]);"
        " sys.modules[name] = importlib.util.module_from_spec(spec); "
    )
    return compile_behind(theirs, spec, arch)


@needs_triton
def test_weaker_accesses_of_legacy_are_seen(tmp_path):
    sources = shutil.copytree(legacy_ranks.source(), tmp_path / "sources", ignore=shutil.ignore_patterns("__pycache__"))
    spec = triton_module("one_shot", 2, "bfloat16", True)
    check_strong_accesses(tmp_path, spec, compile_triton_from(sources, spec))
    text = (sources / "slots.py").read_text()
    (sources / "slots.py").write_text(text.replace(', cache_modifier=".wt"', ""))
    with pytest.raises(AssertionError, match="STG.E.128.STRONG.SYS"):
        check_strong_accesses(tmp_path, spec, compile_triton_from(sources, spec))


@pytest.mark.long
@needs_triton
@pytest.mark.parametrize("world_size", WORLD_SIZES if LONG else (2, 4, 8))
def test_legacy_machine_code(compiled, tmp_path, world_size):
    specs = p2p_modules(world_size, [all_reduce("bfloat16")])
    for spec, artifact in zip(specs, compiled(specs, "sm_90"), strict=True):
        (ops,) = opcodes(tmp_path, artifact).values()
        check_memory_accesses(ops)
        check_strong_accesses(tmp_path, spec, artifact)
        assert not {"PREEXIT", "ACQBULK"} & set(ops)  # the protocol leans on launches that do not overlap
        scalar = [op for op in ops if op in ("LDG.E.U16", "STG.E.U16")]
        assert bool(scalar) == (not dict(spec.constants)["VECTOR"])


@needs_triton
@pytest.mark.parametrize("theirs", [None, "theirs"])
def test_triton_leaves_nothing_behind(tmp_path, monkeypatch, theirs):
    """Neither in the home directory nor in the environment, nor in the cache of others."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    if theirs:
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / theirs))
    before = dict(os.environ)
    compile_one(triton_module("one_shot", 2, "float32", True), "sm_90")
    assert dict(os.environ) == before and list(tmp_path.iterdir()) == []


OF_THEIR_OWN = """
import triton
import triton.language as tl

@triton.jit
def of_their_own(x, SIZE: tl.constexpr):
    offsets = tl.arange(0, SIZE)
    tl.store(x + offsets, tl.load(x + offsets) + 1)
"""


@needs_triton
def test_threads_that_compile_at_the_same_time(tmp_path, monkeypatch):
    """Two of ours and one that uses Triton itself: no error, and neither the environment nor Triton's knobs change."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    theirs = tmp_path / "theirs"
    monkeypatch.setenv("TRITON_CACHE_DIR", str(theirs))
    (tmp_path / "somebody.py").write_text(OF_THEIR_OWN)
    monkeypatch.syspath_prepend(tmp_path)
    kernel = importlib.import_module("somebody").of_their_own
    before, rounds, problems = process_state(), 6 if LONG else 2, []
    expected = {vector: compile_one(triton_module("one_shot", 2, "float32", vector), "sm_90") for vector in (True, False)}
    working, seen = threading.Event(), []

    def ours(vector):
        for _ in range(rounds):
            assert compile_one(triton_module("one_shot", 2, "float32", vector), "sm_90") == expected[vector]

    def other():
        for k in range(rounds):
            source = ASTSource(kernel, {"x": "*fp32", "SIZE": "constexpr"}, {"SIZE": 32 << k})
            triton.compile(source, GPUTarget("cuda", 90, 32), {"enable_fp_fusion": True})

    def guarded(work, *args):
        try:
            work(*args)
        except BaseException as e:  # noqa: BLE001
            problems.append(e)

    def watch():
        while not working.wait(0.001):
            seen.append(process_state() == before)

    watcher = threading.Thread(target=watch)
    threads = [threading.Thread(target=guarded, args=args) for args in ((ours, True), (ours, False), (other,))]
    for thread in (watcher, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    working.set()
    watcher.join()
    assert not problems and len(seen) > 20 and all(seen), problems
    assert process_state() == before
    assert {path.name for path in theirs.rglob("*.cubin")} == {"of_their_own.cubin"}  # all of theirs, none of ours


def process_state():
    import triton

    knobs = {name: vars(part).copy() for name, part in vars(triton.knobs).items() if isinstance(part, triton.knobs.base_knobs)}
    return dict(os.environ), knobs


COMPILE = """
from allreduce_jit.jit.cache import KernelCache
from allreduce_jit.jit.compiler import build
from allreduce_jit.policy.catalogue import cuda_module, triton_module
spec = {"cuda": cuda_module("one_shot", 2), "triton": triton_module("one_shot", 2, "float32", True)}[language]
print(len(build(spec, "sm_90", KernelCache(None))[0].cubin) > 1000)
"""


def in_a_process(code, *options, **environ):
    done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True, env={**os.environ, **environ})
    return done.stdout.strip().splitlines(), done.stderr


@pytest.mark.parametrize("language", ["cuda", "triton"])
@pytest.mark.parametrize("how", ["-W", "PYTHONWARNINGS"])
def test_warnings_as_errors(language, how):
    """A compiler's warning is none of ours to fail for."""
    if not available(language):
        pytest.skip(f"needs the compiler of {language}")
    options, environ = (["-W", "error"], {}) if how == "-W" else ([], {"PYTHONWARNINGS": "error"})
    out, err = in_a_process(f"language = {language!r}" + COMPILE, *options, **environ)
    assert out == ["True"], err


@needs_nvrtc
def test_the_first_modules_may_be_compiled_by_several_threads():
    """``cuda.core`` fails in most attempts where several threads import it at once."""
    code = """
from allreduce_jit.jit import compiler
from allreduce_jit.jit.cache import KernelCache
from allreduce_jit.policy.catalogue import cuda_module
compiler.workers = lambda sharing: 4
print(len(compiler.build_all([(cuda_module("one_shot", n), "sm_90") for n in (2, 3, 4, 5)], KernelCache(None))))
"""
    for _ in range(2):
        out, err = in_a_process(code)
        assert out == ["4"], err


@needs_triton
def test_what_others_set_for_triton_is_not_ours():
    """Whatever is set for kernels of others, in the environment or in the process: ours are the same."""
    wanted = compile_one(triton_module("one_shot", 2, "float32", True), "sm_90").cubin
    code = "language = 'triton'\nimport hashlib" + COMPILE
    code += "print(hashlib.sha256(build(spec, 'sm_90', KernelCache(None))[0].cubin).hexdigest())"
    for theirs in ({"TRITON_INTERPRET": "1"}, {"TRITON_OVERRIDE_ARCH": "sm80"}, {"TRITON_CACHE_MANAGER": "no.such:Manager"}):
        out, err = in_a_process(code, **theirs)
        assert out == ["True", hashlib.sha256(wanted).hexdigest()], (theirs, err)


# -- refusals


@pytest.fixture
def fresh_versions():
    compiler._version.cache_clear()
    yield
    compiler._version.cache_clear()


@needs_nvrtc
def test_the_log_of_nvrtc_is_in_the_error(monkeypatch):
    text = compiler._cuda_source(cuda_module("one_shot", 2))
    line = text.count("\n") + 1
    monkeypatch.setattr(compiler, "_cuda_source", lambda spec: text + "int planted = no_such_name;\n")
    cache = KernelCache(None)
    with pytest.raises(CompileError, match=rf'one_shot.cu\({line}\): error: identifier "no_such_name"') as caught:
        build(cuda_module("one_shot", 2), "sm_90", cache)
    assert "one_shot_ws2 for sm_90" in str(caught.value)
    monkeypatch.undo()
    assert build(cuda_module("one_shot", 2), "sm_90", cache)[1] is False  # nothing was kept of the failure


@needs_nvrtc
def test_an_architecture_that_nvrtc_does_not_know():
    with pytest.raises(CompileError, match="(?s)one_shot_ws2 for sm_999.*gpu-architecture"):
        compile_one(cuda_module("one_shot", 2), "sm_999")


@needs_nvrtc
def test_a_source_that_is_missing():
    with pytest.raises(CompileError, match="none.cu"):
        compile_one(replace(cuda_module("one_shot", 2), source="none.cu"), "sm_90")


@needs_triton
def test_the_message_of_triton_is_in_the_error():
    spec = triton_module("one_shot", 2, "bfloat16", False)
    no_number = replace(spec, constants=(*spec.constants, ("WORLD", "two")))
    with pytest.raises(CompileError, match="(?s)legacy_one_shot_bf16_ws2 for sm_90: CompilationError: .*guard\\(link, total"):
        compile_one(no_number, "sm_90")


@needs_triton
@pytest.mark.parametrize(("start", "how"), [("import os; os.abort()", "signal 6"), ("import none", "exit code 1: .*No module")])
def test_a_compiler_that_dies_is_an_error(monkeypatch, start, how):
    monkeypatch.setattr(triton_process, "_START", start)
    with pytest.raises(CompileError, match=f"(?s)legacy_one_shot_bf16_ws2 for sm_90: .*python.* ended with {how}"):
        compile_one(triton_module("one_shot", 2, "bfloat16", False), "sm_90")


def test_no_bindings(monkeypatch, fresh_versions):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(CompileError, match="no NVRTC on this machine: .*cuda.bindings"):
        compile_one(cuda_module("one_shot", 2), "sm_90")


@needs_nvrtc
def test_no_nvrtc_library(monkeypatch, fresh_versions):
    from cuda.bindings import nvrtc

    def fail():
        raise RuntimeError("Failed to dlopen libnvrtc")

    monkeypatch.setattr(nvrtc, "nvrtcVersion", fail)
    with pytest.raises(CompileError, match="no NVRTC on this machine: Failed to dlopen"):
        compile_one(cuda_module("one_shot", 2), "sm_90")


@needs_nvrtc
def test_no_cuda_core(monkeypatch, fresh_versions):
    """NVRTC is called through it: without it there is no compiler, for the probe as for us."""
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(CompileError, match="no NVRTC on this machine: cuda.core, .* is missing: install cuda-core"):
        compile_one(cuda_module("one_shot", 2), "sm_90")
    found = probe("cpu")
    assert found.software.nvrtc is None and any("install cuda-core" in problem for problem in found.problems)


@needs_nvrtc
@pytest.mark.parametrize("found", [True, False])
def test_nvrtc_of_a_wheel_anywhere_on_the_path(found):
    """As with ``PYTHONPATH`` or an environment on top of another: not in the interpreter's own site folders."""
    if not any(list(Path(folder).glob("nvidia/*/lib/libnvrtc.so.*")) for folder in sys.path):
        pytest.skip("needs NVRTC from a wheel")
    child = textwrap.dedent(f"""
        import site, sys
        site.getsitepackages, site.ENABLE_USER_SITE = list, False
        from cuda.bindings import nvrtc
        try:
            sys.exit(f"NVRTC {{nvrtc.nvrtcVersion()}} is the system's")
        except Exception:
            pass
        from allreduce_jit.jit import compiler, triton_process
        if not {found}:
            sys.path = []
        from allreduce_jit.machine.probe import probe
        seen = probe("cpu").software.nvrtc
        print(compiler._version("cuda"), seen)
    """)
    ours = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "CUDA_PATH", "LD_LIBRARY_PATH")}
    done = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, env=ours)
    if "is the system's" in done.stderr:
        pytest.skip("needs a machine with no NVRTC but a wheel's")
    if found:
        assert done.stdout.strip() == available("cuda") + available("cuda").replace("nvrtc", ""), done.stderr
    else:
        assert done.returncode and "CompileError: no NVRTC on this machine" in done.stderr


def test_no_triton(tmp_path, monkeypatch, fresh_versions):
    """A folder of that name is none."""
    (tmp_path / "triton").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert SoftwareSource().triton() is None
    with pytest.raises(CompileError, match=f"no Triton on this machine: there is no package triton in {tmp_path}"):
        compiler._version("triton")


def test_triton_of_a_distribution_by_another_name(tmp_path, monkeypatch, fresh_versions):
    """What the probe takes for Triton is Triton for the compiler."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("import os\n__version__ = '9.8.7'\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    assert SoftwareSource().triton() == "9.8.7" and compiler._version("triton") == "triton 9.8.7"
    compiler._version.cache_clear()
    (tmp_path / "pytorch_triton-9.8.7+git1.dist-info").mkdir()
    (tmp_path / "pytorch_triton-9.8.7+git1.dist-info/METADATA").write_text("Name: pytorch-triton\nVersion: 9.8.7+git1\n")
    assert SoftwareSource().triton() == "9.8.7+git1" and compiler._version("triton") == "triton 9.8.7+git1"
    assert "triton" not in sys.modules


def test_a_triton_that_does_not_import(tmp_path, fresh_versions):
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text("raise OSError('no libtriton.so')")
    out, err = in_a_process(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\nlanguage = 'triton'" + COMPILE)
    assert "CompileError: legacy_one_shot_fp32_ws2_vector for sm_90: OSError: no libtriton.so" in err and not out
