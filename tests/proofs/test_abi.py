"""What host and device share: one description, and a field that moved on one side only does not compile."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess

import pytest
import twin

from allreduce_jit import abi
from allreduce_jit.bench import speed_of_light
from allreduce_jit.errors import CompileError
from allreduce_jit.jit import compiler, source
from allreduce_jit.jit.cache import KernelCache
from allreduce_jit.policy.catalogue import NVLINK_ALGORITHMS, WORLD_SIZES, cuda_module
from allreduce_jit.policy.plan import HEADER_BYTES, PACKET, WARP

STRUCTS = [abi.Args, abi.Signature, abi.Header, abi.SmallControl, abi.Channel, abi.Report, abi.FloorArgs, abi.FloorState]
MISTAKES = [  # text of abi.cuh or floor.cu, what someone made of it, what the compiler says
    ("    u32 rank;\n    u32 capacity;", "    u32 capacity;\n    u32 rank;", "Args.rank has moved"),
    ("    u64 total; ", "    u32 total; ", "Args.total has another size"),
    ("    u32 reserved[63];", "    u32 reserved[64];", "Header.reserved has another size"),
    ("    u32 sequence;     // calls", "    u64 sequence;     // calls", "Control.sequence has another size"),
    ("    u32 channels;                //", "    u32 more, channels;                //", "Control.channels has moved"),
    ("    u32 mine[2], theirs[2];", "    u32 theirs[2], mine[2];", "Report.mine has moved"),
    ("    u32 mine[2], theirs[2];", "    u32 mine[2], theirs[2], more;", "Report has another size"),
    ("    u32 epoch;\n    u32 stopped;", "    u32 stopped;\n    u32 epoch;", "Channel.epoch has moved"),
    ("    u64 timeout_ns; ", "    u32 timeout_ns; ", "FloorArgs.timeout_ns has another size"),
]


def has_nvrtc() -> bool:
    try:
        return bool(compiler._version("cuda"))
    except CompileError:
        return False


def planted(texts: dict[str, str], old: str, new: str) -> dict[str, str]:
    (name,) = [name for name, text in texts.items() if old in text]
    return texts | {name: texts[name].replace(old, new)}


def spec_with(message: str):
    return speed_of_light.module(2) if message.startswith("Floor") else cuda_module("one_shot", 2)


@pytest.mark.skipif(not has_nvrtc(), reason="needs NVRTC")
@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_nvrtc_refuses_a_field_that_moved(monkeypatch, old, new, message):
    texts = planted(source.files(), old, new)
    monkeypatch.setattr(compiler, "_cuda_source", lambda spec: source.unit(spec, source.expand(spec.source, texts)))
    with pytest.raises(CompileError, match=f"static assertion failed .*{message}"):
        compiler.build(spec_with(message), "sm_90", KernelCache(None))


def syntax(folder, texts: dict[str, str]) -> str:
    """What g++ says of abi.cuh and of floor.cu's structs."""
    for name, text in texts.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    structs = texts["floor.cu"][: texts["floor.cu"].index('#include "floor_layout.cuh"')]
    (folder / "both.cpp").write_text(f'{structs}#include "floor_layout.cuh"\n#include "abi.cuh"\n')
    command = [twin.COMPILER, "-std=c++17", "-fsyntax-only", "-I", str(folder), str(folder / "both.cpp")]
    return subprocess.run(command, capture_output=True, text=True).stderr


@pytest.mark.skipif(not shutil.which(twin.COMPILER), reason="needs g++")
@pytest.mark.parametrize(("old", "new", "message"), MISTAKES)
def test_the_host_compiler_refuses_a_field_that_moved(tmp_path, old, new, message):
    assert syntax(tmp_path, twin.sources()) == ""
    assert message in syntax(tmp_path, planted(twin.sources(), old, new))


@pytest.mark.skipif(not shutil.which(twin.COMPILER), reason="needs g++")
def test_a_field_that_moved_in_python_does_not_compile(tmp_path, monkeypatch):
    fields = abi.Report._fields_
    monkeypatch.setattr(abi, "Report", type("Report", (ctypes.Structure,), {"_fields_": [fields[1], fields[0], *fields[2:]]}))
    assert "Report.code has moved" in syntax(tmp_path, twin.sources())


def test_every_field_is_asserted():
    text = "".join(abi.headers().values())
    for struct in STRUCTS:
        for name, _ in struct._fields_:
            assert f"is_at(&{struct.__name__}::{name}, {getattr(struct, name).offset})," in text
        assert f"sizeof({struct.__name__}) == {ctypes.sizeof(struct)}," in text
    for name, _ in abi.Control._fields_:  # whose offsets follow from those of the short form, and from these
        assert f"sizeof(Control::{name}) == {getattr(abi.Control, name).size}," in text
    assert f"sizeof(Control) == {ctypes.sizeof(abi.Control)}," in text


def test_sources_have_no_copy_of_a_constant():
    """They are made from ``abi``; kernels name them."""
    for name, text in source.files().items():
        if name not in abi.headers():
            assert not re.search(rf"\b({'|'.join(abi.CONSTANTS)}) *=", text), name


def test_the_layout_has_room():
    assert ctypes.sizeof(abi.Header) == HEADER_BYTES and HEADER_BYTES % PACKET == 0
    assert ctypes.sizeof(abi.Signature) == PACKET and abi.Header.signatures.offset % PACKET == 0
    assert max(WORLD_SIZES) <= abi.MAX_RANKS and abi.MAX_RANKS <= WARP
    assert ctypes.sizeof(abi.Channel) == 8  # one load
    assert abi.Control.completed.offset == abi.Control.sequence.offset + 4 and abi.Control.sequence.offset % 8 == 0  # one load
    # The fields of a tag and of an abort code do not overlap.
    assert max(what.number for what in NVLINK_ALGORITHMS.values()) < 1 << abi.DTYPE_SHIFT
    assert 16 << abi.DTYPE_SHIFT <= abi.IN_PLACE << 1 <= 1 << abi.NUMEL_SHIFT
    assert max(abi.Kind) < 1 << abi.CULPRIT_SHIFT and abi.MAX_RANKS << abi.CULPRIT_SHIFT <= 1 << abi.FINDER_SHIFT


def test_triton_has_the_same_words():
    pytest.importorskip("triton")
    from allreduce_jit.triton_kernels import guard, wait

    for constant, field, size in (
        (wait.SEQUENCE, abi.Control.sequence, 4),
        (guard.IN_FLIGHT, abi.Control.completed, 4),
        (wait._REPORTED, abi.Control.reported, 4),
        (wait.HANDSHAKEN, abi.Control.handshaken, 4),
        (wait._DEADLINE, abi.Control.deadline_ns, 8),
        (wait._GRACE, abi.Control.grace_ns, 8),
        (wait._CALL, abi.Report.sequence, 4),
        (wait._TAG, abi.Report.tag, 4),
        (wait._BUFFER, abi.Report.buffer, 4),
        (wait._CHANNEL, abi.Report.channel, 4),
        (wait._WAITED_MS, abi.Report.waited_ms, 4),
        (guard.MINE, abi.Report.mine, 4),
        (guard.THEIRS, abi.Report.theirs, 4),
    ):
        assert constant.value * size == field.offset
    assert (guard._SIGNATURES.value, guard._IN_PLACE.value) == (abi.Header.signatures.offset, abi.IN_PLACE)
    # Words that the kernels address as the first of their struct.
    assert abi.Header.abort.offset == abi.Report.code.offset == 0
