"""The README's examples, as they stand there."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.S)


def torchrun(code, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(code)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    logs = ["--log-dir", str(tmp_path), "--redirects", "1"]  # on one standard output, lines of two ranks may mix
    done = subprocess.run([*launcher, *logs, str(script)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return "".join(path.read_text() for path in tmp_path.rglob("stdout.log"))


def test_there_are_three():
    assert len(EXAMPLES) == 3


def test_plain(tmp_path):
    lines = torchrun(EXAMPLES[0], tmp_path).strip().splitlines()
    assert len(lines) == 2
    assert all(line.endswith(" 2.0") for line in lines)


@pytest.mark.gpus(2)
def test_graph(tmp_path):
    assert torchrun(EXAMPLES[1], tmp_path).count("4.0") == 2


def test_sglang(tmp_path):
    out = torchrun(EXAMPLES[2], tmp_path)
    assert out.count("CustomAll") == 2
    assert ("enabled:" in out) == (torch.cuda.device_count() >= 2)
