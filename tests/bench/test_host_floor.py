"""The floor of path host: its arithmetic and its kernels' machine code (``test_gpus.py`` measures it)."""

from __future__ import annotations

import re

import pytest
from helpers.cubins import compile_one, compile_with, entries_of, needs_nvrtc, nvrtc_archs, opcodes, resources

from allreduce_jit.bench import host_floor as floor
from allreduce_jit.policy.catalogue import WORLD_SIZES

MEASURED = floor.HostFloor(flag_us=2.4, packets_us=(2.5, 2.7, 3.2, 4.8, 11.6, 36.6), both_gbs=42.2)
LOAD, STORE = "LDG.E.128.STRONG.SYS", "STG.E.128.STRONG.SYS"


def test_speed_of_light():
    assert [MEASURED.sol_us(size, 2) for size in floor.SIZES] == pytest.approx(MEASURED.packets_us)
    assert MEASURED.sol_us(4, 2) == 2.5 and 2.5 < MEASURED.sol_us(2 << 10, 2) < 2.7
    assert MEASURED.sol_us(64 << 20, 2) == pytest.approx(2.4 + (64 << 20) / 42.2e3)
    assert MEASURED.sol_us(64 << 20, 4) == pytest.approx(2.4 + 1.5 * (64 << 20) / 42.2e3)
    for n in WORLD_SIZES:
        times = [MEASURED.sol_us(1 << shift, n) for shift in range(30)]
        assert times == sorted(times)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles(tmp_path, arch):
    if arch not in nvrtc_archs():
        pytest.skip(f"this NVRTC does not compile for {arch}")
    for world_size in (2, 8):
        artifact = compile_one(floor.module(world_size), arch)
        assert entries_of(artifact.cubin) == set(floor.ENTRIES)
        for usage in resources(tmp_path, artifact).values():
            assert usage["STACK"] == usage["LOCAL"] == 0 and usage["REG"] <= 64


def check(code):
    """What the figures stand for: the packets that a figure counts are stored, and loaded, in a loop."""
    for name in ("floor_packets", "floor_both"):
        loops, wide = loop_bodies(code[name]), [op for op in code[name] if re.match(r"(LD|ST)G?\.E\.128", op)]
        assert set(wide) == {LOAD, STORE}
        assert any(LOAD in body for body in loops) and any(STORE in body for body in loops)
        assert not [op for op in code[name] if op.startswith(("MEMBAR", "CCTL", "FENCE"))]


def loop_bodies(ops):
    """From the first wide access to each branch behind it."""
    first = min(ops.index(op) for op in (LOAD, STORE) if op in ops)
    return [ops[first:i] for i, op in enumerate(ops) if op == "BRA" and i > first]


@needs_nvrtc
def test_machine_code(tmp_path):
    for world_size in (2, 4, 8):
        check(opcodes(tmp_path, compile_one(floor.module(world_size), "sm_90")))


@needs_nvrtc
@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        # ptxas drops the loads, and stores are all that is timed.
        ("if (seen == ~0u) st_relaxed_gpu_u32", "if (false) st_relaxed_gpu_u32"),
        ("st.relaxed.sys.global.v4", "st.global.v4"),
        ("ld.relaxed.sys.global.v4", "ld.acquire.sys.global.v4"),  # a fence for every packet
    ],
)
def test_the_check_sees_a_planted_mistake(monkeypatch, tmp_path, text, mistake):
    code = opcodes(tmp_path, compile_with(monkeypatch, floor.module(2), text, mistake))
    with pytest.raises(AssertionError):
        check(code)
