"""Kernels that all-reduce and normalize compile, without a GPU, and their machine code is what protocol and arithmetic lean on.

LONG=2 compiles them for every pair of world size and architecture; without it, for a few of them.
"""

from __future__ import annotations

import ctypes
import os
import re
from collections import Counter

import pytest
from helpers.cubins import PARAMETERS_AT, compile_one, entries_of, needs_nvrtc, nvrtc_archs, opcodes, resources

from allreduce_jit.abi import NormArgs
from allreduce_jit.errors import CompileError
from allreduce_jit.jit import compiler
from allreduce_jit.policy.norm import Norm
from allreduce_jit.policy.norm_catalogue import has_clusters, norm_module
from allreduce_jit.policy.norm_forms import NORM_ALGORITHMS, Form, norm_bands
from allreduce_jit.policy.operation import ITEMSIZE, OpSpec

LONG = os.environ.get("LONG") == "2"
ALL = [(world_size, arch) for arch in ("sm_80", "sm_90", "sm_100") for world_size in range(2, 9)]
REGISTERS = 65536  # of a multiprocessor, on all of these
RSQRT, RECIPROCAL, DIVISION = 5, 9, 16  # FFMAs that these consist of

FAMILIES = [
    OpSpec("all_reduce_norm", dtype, (0, hidden), Norm(**{"weight": dtype, **norm}))
    for dtype, hidden, norm in [
        ("bfloat16", 4096, {}),
        ("bfloat16", 8192, {"quant": "static", "rounding": "U"}),
        ("bfloat16", 2880, {"quant": "token", "keep_norm": True}),
        ("float16", 4096, {"rounding": "H", "weight_bias": 1}),
        ("float32", 2048, {"residual": False}),
        ("bfloat16", 7168, {"quant": "group", "residual": False, "weight": "float32"}),
    ]
]


def picked(family, world_size, arch):
    """The forms that the table picks."""
    bands = norm_bands(family, world_size, clusters=has_clusters(arch))
    return list(dict.fromkeys(band.form for band in bands))


@pytest.mark.long
@needs_nvrtc
@pytest.mark.parametrize(("world_size", "arch"), ALL if LONG else [(2, "sm_90"), (8, "sm_80"), (4, "sm_100")])
def test_norms(tmp_path, world_size, arch):
    if arch not in nvrtc_archs():
        pytest.skip(f"this NVRTC does not compile for {arch}")
    seen = set()
    for i, family in enumerate(FAMILIES):
        if arch == "sm_80" and family.epilogue.quant != "none":
            continue
        for form in picked(family, world_size, arch)[:: 1 if LONG or i < 2 else 2]:
            spec = norm_module(form, family, world_size)
            check_module(tmp_path, spec, compile_one(spec, arch), form, family, world_size)
            seen.add((form.algorithm, form.cluster > 1))
    algorithms = set(list(NORM_ALGORITHMS)[: 1 + (world_size > 2)])
    assert {algorithm for algorithm, _ in seen} == algorithms
    assert (arch == "sm_80") != any(clusters for _, clusters in seen)


@needs_nvrtc
def test_other_forms(tmp_path):
    """Several packets a thread, and clusters that share them."""
    family = FAMILIES[0]
    for form, world_size in (
        (Form("one_shot_norm", 2, 1), 4),
        (Form("two_shot_norm", 2, 1), 3),
        (Form("one_shot_norm", 2, 2), 2),
    ):
        spec = norm_module(form, family, world_size)
        check_module(tmp_path, spec, compile_one(spec, "sm_90"), form, family, world_size)


def stack(form, family, world_size):
    """Bytes that a thread may keep in local memory: none with a packet a thread (of each part), but for a few where one-shot has 64 registers
    for four ranks, or a block of more than 16 warps; some with several."""
    if form.packets > 1:
        return 64 * world_size * form.packets
    if form.algorithm == "one_shot_norm" and (form.warps(family, world_size) > 16 or world_size == 4):
        return 16
    return 0


def check_module(tmp_path, spec, artifact, form, family, world_size):
    """Raises AssertionError."""
    norm, arch = family.epilogue, artifact.arch
    assert entries_of(artifact.cubin) == set(spec.entries) == {spec.name}
    (usage,), (ops,) = resources(tmp_path, artifact).values(), opcodes(tmp_path, artifact).values()
    parts = world_size if NORM_ALGORITHMS[form.algorithm].parts else 1
    count, peers, elements = parts * form.packets, world_size - 1, 16 // ITEMSIZE[family.dtype]

    _, cluster, warps, blocks = spec.macro
    assert usage["LOCAL"] == 0 and usage["STACK"] <= stack(form, family, world_size)
    assert usage["CONSTANT[0]"] == PARAMETERS_AT[arch] + ctypes.sizeof(NormArgs)
    assert -(-usage["REG"] * 32 // 256) * 256 * warps * blocks <= REGISTERS

    accesses = [op for op in ops if re.match(r"(LDG?|STG?|ATOMG?|REDG?)\.", op)]
    strong, weak = ([op for op in accesses if (".STRONG." in op) == yes] for yes in (True, False))
    # Packets are pushed, and the slots poisoned; a signature, and the parameters. They are polled in the fast path, the slow one, the guard.
    packets = form.packets * peers * (2 if parts > 1 else 1)
    # (Some are there once more, on a path of their own.)
    wide = Counter(op for op in strong if ".128" in op)
    assert set(wide) == {"LDG.E.128.STRONG.SYS", "STG.E.128.STRONG.SYS"}
    assert 0 <= wide["STG.E.128.STRONG.SYS"] - (2 * packets + 2) <= packets
    assert 2 <= wide["LDG.E.128.STRONG.SYS"] - packets - peers <= 4
    assert {op.rsplit(".STRONG.", 1)[1] for op in strong} == {"SYS", "GPU"}
    assert sum("CAS" in op and op.endswith(".SYS") for op in strong) == 2  # of the guard and of who gives up
    assert not [op for op in ops if op.startswith("LDG") and {"CONSTANT", "CI"} & set(op.split("."))]
    # The user's tensors, 16 bytes at a time, the input's each once; stores may be there twice, on two paths.
    wide_weight = 2 if norm.weight == "float32" and family.dtype != "float32" else 1
    assert weak.count("LDG.E.128") == count * (1 + norm.residual + wide_weight)
    results = count * (1 + (norm.quant == "none" or norm.keep_norm))
    assert results <= weak.count("STG.E.128") <= 2 * results
    quantized = weak.count("STG.E.64" if elements == 8 else "STG.E")
    assert quantized >= count if norm.quant != "none" else not quantized

    # The report is complete before its code is written. A cluster meets, and exchanges words, without a wait for stores to global memory.
    fences = Counter(op for op in ops if op.startswith("MEMBAR"))
    assert fences.pop("MEMBAR.ALL.SYS", 0) == 2
    assert set(fences) <= ({"MEMBAR.ALL.CTA"} if cluster > 1 else set())

    # What others wait for in a barrier, once for each exchange.
    exchanges = 1 + (norm.quant == "token")
    barriers = Counter(op.split(".")[0] for op in ops)
    if cluster > 1:
        assert barriers["UCGABAR_ARV"] == barriers["UCGABAR_WAIT"] == 1 and not barriers["BAR"]
        assert barriers["STAS"] >= count + exchanges - 1 and sum("PHASECHK" in op for op in ops) >= exchanges
    else:
        assert barriers["BAR"] == exchanges and not barriers["UCGABAR_ARV"]
        assert barriers["STS"] >= count + exchanges - 1
    assert sum(op == "LDS.128" for op in ops) >= exchanges

    # One after the other: the guard draws its ticket before the next kernel may start, and before it waits; other blocks read nothing
    # before they wait, but the abort word.
    assert ("PREEXIT" in ops and "ACQBULK" in ops) == (arch != "sm_80")
    if arch != "sm_80":
        starts = [i for i, op in enumerate(ops) if op == "PREEXIT"]  # the guard's, which looks before, and the others'
        looks = [[op for op in ops[start : ops.index("ACQBULK", start)] if op in accesses] for start in starts]
        assert sorted(looks) == [[], ["LDG.E.STRONG.GPU"]]
        ticket = ops.index("ATOMG.E.ADD.STRONG.GPU")
        before = ops[ticket : ops.index("ACQBULK", ticket)]
        assert "PREEXIT" in before
        assert {op for op in before if op in accesses} == {"ATOMG.E.ADD.STRONG.GPU", "LDG.E.STRONG.GPU"}

    # Every product and every sum is rounded by itself.
    number = Counter(op.split(".")[0] for op in ops)
    for name in ("FFMA", "FMUL", "FADD"):
        number[name] += 2 * number[f"{name}2"]  # sm_100 has them for two at a time
    numbers = count * elements
    assert number["FMUL"] >= numbers * (3 + (norm.quant != "none"))  # a square, with r, with the weight, with 1 / scale
    # The tree, the bias; the residual and the ranks, but for 16-bit numbers that are added two at a time.
    ranks, residual = form.packets * elements * peers, numbers * norm.residual
    in_pairs = (ranks * (world_size == 2) + residual * (norm.rounding != "U")) * (elements == 8)
    assert number["FADD"] >= count * (elements - 1 + 5) + numbers + ranks + residual - in_pairs
    assert number["HADD2"] + number["HFMA2"] >= in_pairs // 2
    divisions = {"none": 0, "static": RECIPROCAL, "token": RECIPROCAL + DIVISION, "group": count * (RECIPROCAL + DIVISION)}
    assert number["FFMA"] <= RSQRT + divisions[norm.quant]
    if norm.quant != "none":
        assert [op for op in ops if "E4M3" in op and "SATFINITE" in op]


@needs_nvrtc
def test_quantization_needs_sm_89():
    spec = norm_module(Form("one_shot_norm", 1, 1), FAMILIES[2], 2)
    assert compile_one(spec, "sm_89").name == spec.name
    with pytest.raises(CompileError, match="sm_89 or higher"):
        compile_one(spec, "sm_80")


SQUARES = [
    ("__fmul_rn(v.f[e], v.f[e])", "v.f[e] * v.f[e]"),
    ("__fadd_rn(square[e], square[e + step])", "square[e] + square[e + step]"),
]
WAIT, PREPARE = "    griddepcontrol_wait();\n\n    Packet own", "    epilogue.prepare();\n"


@needs_nvrtc
@pytest.mark.parametrize(
    "edits",
    [
        SQUARES,
        [("__fadd_rn(__fmul_rn(total(), 1.f / Config::HIDDEN), eps)", "(total() * (1.f / Config::HIDDEN) + eps)")],
        [("__frsqrt_rn(", "(1.f / __fsqrt_rn("), ("eps));\n        Packet norm", "eps)));\n        Packet norm")],
        [(PREPARE, ""), (WAIT, PREPARE + WAIT)],
        [("ld.global.v4.u32", "ld.global.nc.v4.u32")],
        [("st.relaxed.sys.global.v4", "st.relaxed.gpu.global.v4")],
        [("st.relaxed.sys.global.v4", "st.global.v4")],
        [("ld.relaxed.sys.global.v4", "ld.global.nc.v4")],
        [("fence.acq_rel.sys", "fence.sc.sys")],
        [("    if (WITH_PARAMETERS && !aborted)\n", "    if (!WITH_PARAMETERS && !aborted)\n")],
        [("            __syncthreads();\n", "            __syncwarp();\n")],
        [("if (!Config::STREAM) griddepcontrol_launch_dependents();  // now", "// now")],
        [("WARPS, MIN_BLOCKS)       \\\n", "WARPS, 4)       \\\n")],  # so few registers that they spill
    ],
    ids=lambda edits: edits[0][1].strip()[:40],
)  # fmt: skip
def test_the_check_sees_a_planted_mistake(monkeypatch, tmp_path, edits):
    sees(monkeypatch, tmp_path, edits, Form("one_shot_norm", 1, 1))


@needs_nvrtc
@pytest.mark.parametrize(
    "edits",
    [
        [("barrier.cluster.arrive.relaxed", "barrier.cluster.arrive.release")],
        [("            mbarrier_wait(address);\n", "            __syncthreads();\n")],
        [("if (lane < CLUSTER) st_async_u32(there + offset, word, there);", "if (lane == 0) st_shared_u32(address + offset, word);")],
    ],
    ids=lambda edits: edits[0][1].strip()[:40],
)  # fmt: skip
def test_the_check_sees_a_planted_mistake_in_a_cluster(monkeypatch, tmp_path, edits):
    sees(monkeypatch, tmp_path, edits, Form("one_shot_norm", 1, 4))


def sees(monkeypatch, tmp_path, edits, form):
    family, world_size = FAMILIES[0], 4
    spec = norm_module(form, family, world_size)
    source = compiler._cuda_source(spec)
    for old, new in edits:
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    monkeypatch.setattr(compiler, "_cuda_source", lambda spec: source)
    artifact = compile_one(spec, "sm_90")
    with pytest.raises(AssertionError):
        check_module(tmp_path, spec, artifact, form, family, world_size)
