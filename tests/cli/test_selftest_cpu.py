"""The whole library from its command line, on a machine that needs no GPU."""

import json
import os
import subprocess
import sys

import pytest
from helpers import ROOT


@pytest.fixture(scope="module")
def selftest():
    command = [sys.executable, "-m", "allreduce_jit", "selftest", "--json", "--cpu", "4", "--max-bytes", "64K"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    return subprocess.run([*command, "--deadline", "400"], env=env, capture_output=True, text=True, timeout=450)


def test_it_passes(selftest):
    assert selftest.returncode == 0, selftest.stderr + selftest.stdout
    document = json.loads(selftest.stdout)
    assert document["ok"] and document["wrong"] == 0 and document["checked"] > 1_000_000


def test_it_says_that_torch_distributed_ran_and_why(selftest):
    document = json.loads(selftest.stdout)
    facts = document["communicator"]
    assert (facts["path"], facts["backend"], facts["world_size"]) == ("torch.distributed", "gloo", 4)
    assert facts["reasons"] and all(reason["code"] and reason["text"] for reason in facts["reasons"])
    assert {row["path"] for row in document["rows"]} == {"torch.distributed"}
    assert {row["dtype"] for row in document["rows"]} == {"fp32", "fp16", "bf16"}


def test_nothing_but_the_document_is_on_stdout(selftest):
    assert selftest.stdout.startswith("{") and selftest.stdout.rstrip().endswith("}")
