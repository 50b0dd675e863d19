"""The README's examples, as they stand there."""

import re

import pytest
import torch
from helpers import ROOT
from helpers.fakes import MACHINES, look_all
from helpers.torchrun import torchrun

from allreduce_jit.policy.dispatch import decide
from allreduce_jit.settings import Settings

README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)
SHOWN = re.search(r"```text\n(.*?)```", README, re.S)[1].splitlines()  # by the first: without a GPU, and on two with NVLink


def test_there_are_seven():
    assert len(EXAMPLES) == 7


@pytest.mark.programs
def test_plain(tmp_path):
    """Both ranks print the line that README shows of such a machine; on GPUs that NVLink does not connect, another."""
    lines = torchrun(EXAMPLES[0], tmp_path).splitlines()
    assert len(lines) == 2 and all(line.startswith("2.0 by ") for line in lines)
    if torch.cuda.device_count() < 2:
        assert lines == [SHOWN[0]] * 2
    elif "by v2" in lines[0]:
        assert lines == [SHOWN[1]] * 2


def test_what_the_first_program_prints_on_gpus_is_what_the_policy_says():
    verdict = decide(look_all(MACHINES["h200-x4"])[:2], [Settings()] * 2)
    assert SHOWN[1] == f"2.0 by {verdict.path}: {verdict.reasons[0].text}" and len(SHOWN) == 2


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
    counts = ("1, left: {}", "0, left: {'no kernel': 1}")
    assert len(lines) == 2 and all(line in {f"2.0, calls taken: {count}" for count in counts} for line in lines), lines


@pytest.mark.programs
def test_compiled(tmp_path):
    assert torchrun(EXAMPLES[6], tmp_path).split() == ["8.0"] * 2
