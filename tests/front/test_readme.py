"""The README's examples, as they stand there."""

import re

import pytest
import torch
from helpers import ROOT
from helpers.torchrun import torchrun

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def test_there_are_seven():
    assert len(EXAMPLES) == 7


@pytest.mark.programs
def test_plain(tmp_path):
    lines = torchrun(EXAMPLES[0], tmp_path).strip().splitlines()
    assert len(lines) == 2
    assert all(line.endswith(" 2.0") for line in lines)


@pytest.mark.programs
@pytest.mark.gpus(2)
def test_graph(tmp_path):
    assert torchrun(EXAMPLES[1], tmp_path).count("4.0") == 2


@pytest.mark.programs
def test_sglang(tmp_path):
    out = torchrun(EXAMPLES[2], tmp_path)
    assert out.count("CustomAll") == 2
    assert ("enabled:" in out) == (torch.cuda.device_count() >= 2)


@pytest.mark.programs
def test_norm(tmp_path):
    assert torchrun(EXAMPLES[3], tmp_path).splitlines() == ["True True"] * 4


@pytest.mark.programs
def test_fp8(tmp_path):
    lines = torchrun(EXAMPLES[4], tmp_path).splitlines()
    assert lines == ["torch.float8_e4m3fn True (8, 1) (8, 32) (1, 8)", "True"] * 2


@pytest.mark.programs
def test_install(tmp_path):
    lines = torchrun(EXAMPLES[5], tmp_path).splitlines()
    counts = ("taken {'eager': 1, 'functional': 0} {}", "left {'eager': 0, 'functional': 0} {'no kernel': 1}")
    assert len(lines) == 2 and all(line in {f"2.0 {count}" for count in counts} for line in lines), lines


@pytest.mark.programs
def test_compiled(tmp_path):
    assert torchrun(EXAMPLES[6], tmp_path).split() == ["8.0"] * 2
