"""The kernels of path host as machine code: what they store and load, and what they do not keep. LONG=2: of all world sizes."""

from __future__ import annotations

import ctypes
import os
import re

import pytest
from helpers.cubins import PARAMETERS_AT, compile_one, compile_with, entries_of, needs_nvrtc, nvrtc_archs, opcodes, resources

from allreduce_jit.abi import Args
from allreduce_jit.policy.catalogue import HOST_ALGORITHMS, WORLD_SIZES, entry, host_algorithms, host_module
from allreduce_jit.policy.operation import DTYPES, ITEMSIZE

ARCHS = ("sm_80", "sm_90", "sm_100")
LONG = os.environ.get("LONG") == "2"
CASES = [(n, arch) for arch in ARCHS for n in WORLD_SIZES] if LONG else [(2, "sm_90"), (3, "sm_80"), (8, "sm_90"), (4, "sm_100")]
REPORTS = 3  # places that may report: the guard, who waits, who was stopped before


@pytest.mark.long
@needs_nvrtc
@pytest.mark.parametrize(("world_size", "arch"), CASES)
def test_host(tmp_path, world_size, arch):
    if arch not in nvrtc_archs():
        pytest.skip(f"this NVRTC does not compile for {arch}")
    for name in host_algorithms(world_size):
        check_module(tmp_path, name, world_size, compile_one(host_module(name, world_size), arch))


def check_module(tmp_path, name, world_size, artifact):
    """Every kernel of a module; raises AssertionError."""
    what, usage, code = HOST_ALGORITHMS[name], resources(tmp_path, artifact), opcodes(tmp_path, artifact)
    kernels = {entry(name, dtype, world_size, whole): (dtype, whole) for dtype in DTYPES for whole in (True, False)}
    assert entries_of(artifact.cubin) == set(kernels) == set(usage) == set(code)
    for kernel, (dtype, whole) in kernels.items():
        assert usage[kernel]["STACK"] == usage[kernel]["LOCAL"] == 0  # nothing spilled, no array in local memory
        assert usage[kernel]["CONSTANT[0]"] == PARAMETERS_AT[artifact.arch] + ctypes.sizeof(Args)
        assert usage[kernel]["REG"] <= 128  # a block of 512 threads
        check_kernel(code[kernel], what, world_size, 1 if whole else 16 // ITEMSIZE[dtype], artifact.arch)


def check_kernel(ops, what, world_size, elements, arch):
    accesses = [op for op in ops if re.match(r"(LDG?|STG?|ATOMG?|REDG?)\.", op)]
    strong = [op for op in accesses if ".STRONG." in op]
    assert not [op for op in accesses if {"CONSTANT", "CI"} & set(op.split("."))]  # nothing through the non-coherent path
    # Outboxes and signatures: 16 bytes at a time, strong and of system scope.
    wide = [op for op in strong if ".128" in op]
    assert set(wide) == {"LDG.E.128.STRONG.SYS", "STG.E.128.STRONG.SYS"}
    assert {op.rsplit(".STRONG.", 1)[1] for op in strong} == {"SYS", "GPU"}
    # Each packet is stored once, however many peers read it, and loaded from every peer: in the loop, and where a wait is long.
    chunks = world_size if what.parts else (what.ahead + 1) * what.packets
    phases, peers = 2 if what.parts else 1, world_size - 1
    stores, loads = wide.count("STG.E.128.STRONG.SYS"), wide.count("LDG.E.128.STRONG.SYS")
    exact = arch != "sm_100" and not what.parts  # elsewhere the compiler copies code
    assert stores == chunks + 1 if exact else stores > chunks
    assert loads >= peers * what.packets * phases + 3
    # Weak accesses: the user's tensors, once more to store NaN, and loads of arguments.
    tensor = world_size if what.parts else what.packets
    inputs = 2 * world_size if what.parts else chunks
    found = [op for op in accesses if ".STRONG." not in op and op.startswith(("ST", "LDG.E.128", "LD.E.U16", "LD.E.CONSTANT"))]
    if elements == 1:
        assert set(found) == {"STG.E.128", "LDG.E.128"}
        if arch != "sm_100":
            assert found.count("STG.E.128") == tensor + 1 and found.count("LDG.E.128") == inputs
    else:
        assert not [op for op in found if ".128" in op] and sum(op.startswith("ST") for op in found) >= (tensor + 1) * elements
    # No fence but before the code of a report: a chunk proves its own arrival.
    assert [op for op in ops if op.startswith("MEMBAR")] == REPORTS * ["MEMBAR.ALL.SYS"]
    # The causes are told apart in device memory, by one compare-and-swap in each place.
    assert sum("CAS" in op for op in strong) == REPORTS
    assert ("PREEXIT" in ops and "ACQBULK" in ops) == (arch != "sm_80")


@needs_nvrtc
@pytest.mark.parametrize(
    ("algorithm", "instruction", "mistake"),
    [
        ("host_one_shot", "ld.relaxed.sys.global.v2.u64", "ld.global.nc.v2.u64"),  # may read a stale line for ever
        ("host_one_shot", "st.relaxed.sys.global.v2.u64", "st.global.v2.u64"),  # may never leave this GPU
        ("host_one_shot", "st.relaxed.sys.global.v2.u64", "st.relaxed.gpu.global.v2.u64"),
        ("host_one_shot", "st.relaxed.sys.global.v2.u64", "st.release.sys.global.v2.u64"),  # a fence for every chunk
        ("host_stream", "griddepcontrol.wait", "griddepcontrol.launch_dependents"),
    ],
)
def test_the_check_sees_a_planted_mistake(monkeypatch, tmp_path, algorithm, instruction, mistake):
    artifact = compile_with(monkeypatch, host_module(algorithm, 2), instruction, mistake)
    with pytest.raises(AssertionError):
        check_module(tmp_path, algorithm, 2, artifact)


@needs_nvrtc
def test_with_virtual_ranks(tmp_path):
    for name in HOST_ALGORITHMS:
        artifact = compile_one(host_module(name, 3, virtual_ranks=True), "sm_90")
        assert artifact.name.endswith("_virtual") and entries_of(artifact.cubin) == {
            entry(name, dtype, 3, whole) for dtype in DTYPES for whole in (True, False)
        }
        for usage in resources(tmp_path, artifact).values():
            assert usage["STACK"] == usage["LOCAL"] == 0
            assert usage["CONSTANT[0]"] == PARAMETERS_AT["sm_90"] + 8  # a pointer to all ranks' arguments
