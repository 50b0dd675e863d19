"""What the command line says of itself: help, examples, exit codes, the advice at the end of doctor."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import ROOT

from allreduce_jit.cli import advice, doctor, options
from allreduce_jit.cli import main as cli
from allreduce_jit.policy.verdict import CODES, Reason
from allreduce_jit.version import __version__

COMMANDS = ["", "selftest", "soak", "doctor", "bench", "tune", "warmup", "cache"]
PAGE = (ROOT / "docs/command-line.md").read_text()


def help_of(command, capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main([*command.split(), "--help"])
    assert caught.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_ends_in_examples(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = help_of(command, capsys)
    assert max(map(len, text.splitlines())) <= 80
    examples = text.split("\nexamples:\n")[1].split("\n\n")[0].splitlines()
    assert len(examples) >= 2
    for line in examples:
        words = shlex.split(re.split(r" {2,}| > ", line.strip())[0])
        program = ["allreduce-jit"] if words[0] == "allreduce-jit" else "torchrun --nproc-per-node 4 -m allreduce_jit".split()
        assert words[: len(program)] == program
        assert cli._parser().parse_args(words[len(program) :]).command == (command or words[len(program)])


def test_commands_are_all_there(capsys):
    assert re.findall(r"^    (\w+) ", help_of("", capsys), re.M) == COMMANDS[1:]
    assert re.findall(r"^\| `(\w+)` \|", PAGE, re.M) == ["doctor", "selftest", "soak", *COMMANDS[4:]]


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"allreduce-jit {__version__}\n"


def test_exit_codes_are_the_same_in_the_help_and_the_page(capsys):
    table = {int(code): text for code, text in re.findall(r"^\| (\d+) \| (.+) \|$", PAGE, re.M)}
    assert table == options.EXIT_CODES
    for code, text in table.items():
        assert re.search(rf"^  {code} +{re.escape(text)}$", help_of("", capsys), re.M)


# -- advice


def document(path="torch.distributed", codes=("no-p2p",), gpus=2, problems=()):
    reasons = tuple(Reason(code, "why", 0) for code in codes)
    return doctor.DoctorReport(
        gpu_present=gpus > 0,
        simulated_ranks=gpus,
        verdict=path and doctor.VerdictReport(path, "nccl", None, reasons),
        problems=tuple(problems),
        probe=(),
        versions={},
        driver=None,
        cache=doctor.CacheReport(None, 0, 0, 0, None),
        engines=(),
        environment={},
    )


def test_there_is_a_sentence_for_every_reason():
    assert advice.known() == set(CODES)
    assert not set(advice._REMEDIES) & set(advice._FACTS)
    for code in CODES:
        said = advice.next_step(document(codes=[code]), True)
        assert re.fullmatch(r"[A-Z][^\n]{20,160}\.", said), said


def test_what_can_be_mended_goes_first():
    assert advice.next_step(document(codes=["no-nvlink", "no-triton"]), True).startswith("Install Triton")
    assert advice.next_step(document("legacy", ["no-nvlink"]), True).startswith("Without NVLink this is the fastest path")
    assert (
        advice.next_step(document("v2", ["full-nvlink"]), True)
        == "Nothing is in the way; allreduce-jit selftest checks every bit."
    )
    said = advice.next_step(document("v2", ["full-nvlink"], problems=["kernel cache: read-only"]), True)
    assert said == "All-reduces would run on path v2, but mend what the first problem names."


def test_what_keeps_doctor_from_a_decision():
    assert "variable" in advice.next_step(document(None, problems=["settings: bad"]), False)
    assert advice.next_step(document(None, problems=["probe: bad"]), True).startswith("Mend what the first problem names")
    assert "CUDA build of torch" in advice.next_step(replace(document(codes=["cpu"], gpus=0), gpu_present=True), True)
    assert advice.next_step(document(codes=["cpu"], gpus=0), True).startswith("Without a GPU")


def test_advice_is_the_last_line_of_doctor(monkeypatch, tmp_path):
    cache = SimpleNamespace(entries=list, problem=None)
    found = doctor.examine(open_cache=lambda directory: cache, gpu_count=0, proc_gpus=tmp_path)
    assert doctor.render(found).splitlines()[-1] == f"advice       {found.advice}"
    monkeypatch.setenv("ALLREDUCE_JIT_PATH", "fastest")
    found = doctor.examine(open_cache=lambda directory: cache, gpu_count=0, proc_gpus=tmp_path)
    assert found.advice.startswith("Correct the variable")
