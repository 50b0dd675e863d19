"""The floor: its arithmetic, its answer without GPUs, and its kernels' machine code (``test_gpus.py`` measures it)."""

from __future__ import annotations

import ctypes
import re
from types import SimpleNamespace

import pytest
import torch
from helpers.cubins import PARAMETERS_AT, compile_one, compile_with, entries_of, needs_nvrtc, nvrtc_archs, opcodes, resources

from allreduce_jit.abi import FLAG_STRIDE, FloorArgs
from allreduce_jit.bench import speed_of_light as floor
from allreduce_jit.paths import Path
from allreduce_jit.policy.catalogue import WORLD_SIZES, nvlink_modules

H200 = floor.Floor(flag_us=1.51, flag_serial_us=1.91, empty_us=0.54, empty_serial_us=0.81, egress_gbs=352.0)


def test_speed_of_light():
    assert H200.hop_us == pytest.approx(1.10)
    # One-shot's bytes in one hop: 3 * 64 KB at 352 GB/s are 0.56 µs.
    assert H200.sol_us(64 << 10, 4) == pytest.approx(1.51 + 3 * 65536 / 352e3)
    # Two-shot's in two: 1.5 * 256 MB.
    assert H200.sol_us(256 << 20, 4) == pytest.approx(1.51 + 1.10 + 1.5 * (256 << 20) / 352e3)
    # Two ranks: both move the same bytes, and one-shot has a hop less.
    assert H200.sol_us(1 << 30, 2) == pytest.approx(1.51 + (1 << 30) / 352e3)
    for n in WORLD_SIZES:
        times = [H200.sol_us(1 << shift, n) for shift in range(30)]
        assert times == sorted(times) and times[0] == pytest.approx(1.51, abs=0.01)


def test_json_has_everything_that_sol_is_made_of():
    found = H200.to_json()
    assert found["hop_us"] == H200.hop_us
    assert floor.Floor(**{k: v for k, v in found.items() if k != "hop_us"}) == H200


@pytest.mark.parametrize(
    ("device", "path", "reason"),
    [("cpu", "v2", "the ranks are on the CPU"), ("cuda", "legacy", "measured on paths v2 and host, this is legacy")],
)
def test_no_floor_has_a_reason(device, path, reason):
    place = SimpleNamespace(device=torch.device(device))
    communicator = SimpleNamespace(path=Path(path))
    assert floor.measure(place, communicator) == (None, reason)


@pytest.mark.parametrize("n", WORLD_SIZES)
def test_stores_stay_inside_the_memory_and_off_each_other(n):
    """By the addresses of floor.cu: packets of source s at data[owner] + s * packets * 16."""
    bases, regions = [(owner + 1) << 40 for owner in range(n)], set()
    for rank in range(n):
        probe = floor._Probe(SimpleNamespace(world_size=n, rank=rank), None)
        probe.state = torch.zeros(2, dtype=torch.int32)
        probe.memory = SimpleNamespace(connect=lambda handles: None, addresses=bases)
        probe.connect([])
        nbytes = probe.args.packets * 16
        assert probe.egress_bytes == nbytes * (n - 1) <= floor.EGRESS_BYTES < probe.egress_bytes + 16 * n
        for owner in set(range(n)) - {rank}:
            flag = probe.args.flags[owner] + rank * FLAG_STRIDE
            data = probe.args.data[owner] + rank * nbytes
            assert bases[owner] <= flag < bases[owner] + floor.FLAGS_BYTES <= data
            assert data % 16 == 0 and data + nbytes <= bases[owner] + probe.nbytes
            regions |= {(flag, flag + 4), (data, data + nbytes)}
    ordered = sorted(regions)
    assert len(ordered) == 2 * n * (n - 1) and all(a[1] <= b[0] for a, b in zip(ordered, ordered[1:]))


def test_no_engine_uses_the_kernels():
    assert not {spec.source for n in WORLD_SIZES for spec in nvlink_modules(n)} & {floor.module(4).source}


def test_flags_have_room():
    assert FLAG_STRIDE * max(WORLD_SIZES) <= floor.FLAGS_BYTES and floor.FLAGS_BYTES % 16 == 0


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_compiles(tmp_path, world_size, arch):
    if arch not in nvrtc_archs():
        pytest.skip(f"this NVRTC does not compile for {arch}")
    spec = floor.module(world_size)
    artifact = compile_one(spec, arch)
    assert entries_of(artifact.cubin) == set(spec.entries)
    for usage in resources(tmp_path, artifact).values():
        assert usage["STACK"] == usage["LOCAL"] == 0
        assert usage["CONSTANT[0]"] == PARAMETERS_AT[arch] + ctypes.sizeof(FloorArgs)
        assert usage["REG"] <= 64


def check(code, world_size):
    """What the figures stand for, read from the machine code of sm_90."""
    for ops in code.values():
        accesses = [i for i, op in enumerate(ops) if re.match(r"(LD|ST|LDG|STG|ATOMG?|RED|MEMBAR)\b", op)]
        # Triggers at once, and touches no memory before the kernel ahead is complete.
        assert ops.index("PREEXIT") < ops.index("ACQBULK") < min(accesses, default=len(ops))
        assert not [op for op in ops if op.startswith(("MEMBAR", "CCTL", "FENCE"))]
    assert not [op for op in code["floor_empty"] if re.match(r"(LD|ST)G?\b", op)]
    flag = code["floor_flag"]
    # The epoch with the expiry in one load, then the polls; one flag out and the epoch back; a clock to stop by.
    assert [op for op in flag if re.match(r"LDG?\b", op)][0] == "LDG.E.64.STRONG.GPU"
    assert "LDG.E.STRONG.SYS" in flag and "STG.E.STRONG.SYS" in flag and "STG.E.STRONG.GPU" in flag
    assert [op for op in flag if op.startswith(("S2UR", "S2R", "CS2R"))] and "BRA" in flag
    store = code["floor_store"]
    stores = [op for op in store if re.match(r"STG?\b", op)]
    assert set(stores) == {"STG.E.128.STRONG.SYS"} and len(stores) % (world_size - 1) == 0
    assert not [op for op in store if re.match(r"LDG?\b", op)]


@needs_nvrtc
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_machine_code(tmp_path, world_size):
    check(opcodes(tmp_path, compile_one(floor.module(world_size), "sm_90")), world_size)


@needs_nvrtc
@pytest.mark.parametrize(
    ("instruction", "mistake"),
    [
        ("ld.relaxed.sys.global.u32", "ld.global.u32"),  # may poll a stale line for ever
        ("st.relaxed.sys.global.v4", "st.global.v4"),
        ("st.relaxed.sys.global.u32", "st.release.sys.global.u32"),  # a fence: not the shortest exchange
        ("griddepcontrol.launch_dependents", "griddepcontrol.wait"),
    ],
)
def test_the_check_sees_a_planted_mistake(monkeypatch, tmp_path, instruction, mistake):
    code = opcodes(tmp_path, compile_with(monkeypatch, floor.module(4), instruction, mistake))
    with pytest.raises((AssertionError, ValueError)):
        check(code, 4)
