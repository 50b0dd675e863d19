"""The pages of the documentation: no public name is left out or undocumented, links lead somewhere, examples print what pages show."""

from __future__ import annotations

import importlib.util
import inspect
import re
import shutil
import subprocess
import sys

import pages
import pytest
import torch
from helpers import ROOT
from helpers.torchrun import torchrun

import allreduce_jit

REFERENCE = (ROOT / "docs/reference.md").read_text()
NEEDED = ("mkdocs", "material", "mkdocstrings_handlers.python")


# -- the reference


def test_the_reference_has_every_public_name(monkeypatch):
    assert pages.unlisted(REFERENCE) == []
    assert pages.unlisted(REFERENCE + "\n::: allreduce_jit.init\n") == ["init"]
    assert pages.unlisted(REFERENCE.replace("::: allreduce_jit.decide\n", "")) == ["decide"]
    monkeypatch.setattr(allreduce_jit, "__all__", [*allreduce_jit.__all__, "brand_new"])
    assert pages.unlisted(REFERENCE) == ["brand_new"]


def members(kind):
    """Names that a class of ours and its bases of ours define for everybody."""
    ours = [base for base in kind.__mro__ if base.__module__.startswith("allreduce_jit")]
    found = {name: value for base in reversed(ours) for name, value in vars(base).items() if not name.startswith("_")}
    return {
        name: value
        for name, value in found.items()
        if callable(value) or isinstance(value, (property, classmethod, staticmethod))
    }


@pytest.mark.parametrize("name", allreduce_jit.__all__)
def test_public_names_are_documented(name):
    """By a docstring of their own, or in words on the page. So are methods and properties of classes."""
    value = getattr(allreduce_jit, name)
    own = vars(value).get("__doc__") if inspect.isclass(value) else getattr(value, "__doc__", None) if callable(value) else None
    assert own or re.search(rf"^### `{name}`\n\n\S", REFERENCE, re.M), name
    for member in members(value) if inspect.isclass(value) else ():
        documented = inspect.getdoc(getattr(value, member))
        assert documented or f"`{name}.{member}`" in REFERENCE, f"{name}.{member}"


# -- links


@pytest.mark.parametrize(
    ("page", "link", "relinked"),
    [
        ("index.md", "docs/performance.md", "performance.md"),
        ("index.md", "docs/pictures/latency.svg", "pictures/latency.svg"),
        ("performance.md", "benchmarks", "benchmarks/README.md"),
        ("performance.md", "verification.md#promises", "verification.md#promises"),
        ("start/pytorch.md", "../../README.md#use", "../index.md#use"),
        ("benchmarks/README.md", "../performance.md", "../performance.md"),
        ("architecture.md", "https://example.org/docs/x.md", "https://example.org/docs/x.md"),
        ("architecture.md", "#tests", "#tests"),
        ("architecture.md", "../nowhere.md", "../nowhere.md"),  # mkdocs complains
        ("architecture.md", "../Makefile", None),
        ("index.md", "tools/draw.py", None),
    ],
)
def test_links_of_files_lead_to_pages(page, link, relinked):
    became = "it" if relinked is None else f"[it]({relinked})"
    assert pages.relinked(f"see [it]({link}), and\n```\n[it]({link})\n```", page) == f"see {became}, and\n```\n[it]({link})\n```"


# -- the build


@pytest.fixture
def tree(tmp_path):
    """What the pages are made of."""
    for name in ("docs", "allreduce_jit"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tools").mkdir()
    for name in ("mkdocs.yml", "tools/pages.py", *(name for name in pages.OUTSIDE if (ROOT / name).exists())):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def build(tree):
    missing = [name for name in NEEDED if importlib.util.find_spec(name.split(".")[0]) is None]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}: the extra docs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tree / "site")]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, timeout=300)


@pytest.mark.programs
def test_strict_build(tree):
    done = build(tree)
    assert done.returncode == 0, done.stdout + done.stderr
    page = (tree / "site/reference/index.html").read_text()
    for name in [*allreduce_jit.__all__, "Communicator.all_reduce", "Communicator.all_reduce_add_rms_norm"]:
        assert f'id="allreduce_jit.{name}"' in page or f"<code>{name}</code>" in page, name
    home = (tree / "site/index.html").read_text()
    assert 'src="pictures/latency.svg"' in home and 'href="performance/"' in home
    assert (tree / "site/pictures/latency.svg").exists() and not list((tree / "site/pictures").glob("*.txt"))
    fetched = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?://[^"]*)"', page + home)
    assert not fetched  # a page asks nobody else for anything


PLANTED = {
    "a page that is not there": ("docs/glossary.md", "# Words", "# Words\n\n[gone](nowhere.md)", "nowhere.md"),
    "a heading that is not there": ("docs/glossary.md", "# Words", "# Words\n\n[gone](protocol.md#nothing)", "#nothing"),
    "a picture that is not there": ("docs/glossary.md", "# Words", "# Words\n\n![gone](pictures/gone.svg)", "gone.svg"),
    "a public name that is not listed": ("docs/reference.md", "::: allreduce_jit.decide\n", "", "decide is missing"),
    "a public name that is none": ("docs/reference.md", "::: allreduce_jit.decide\n", "::: allreduce_jit.decode\n", "decode"),
    "a link of the README": ("README.md", "(docs/glossary.md)", "(docs/words.md)", "words.md"),
}


@pytest.mark.programs
@pytest.mark.parametrize("what", PLANTED)
def test_planted_mistakes_stop_the_build(tree, what):
    file, old, new, told = PLANTED[what]
    text = (tree / file).read_text()
    assert text.count(old) == 1
    (tree / file).write_text(text.replace(old, new))
    done = build(tree)
    assert done.returncode != 0 and told in done.stdout + done.stderr, done.stdout + done.stderr


# -- examples


def examples(name):
    """The programs of a page, and the outputs that it shows."""
    text = (ROOT / "docs" / name).read_text()
    return re.findall(r"```python\n(.*?)```", text, re.S), re.findall(r"```text\n(.*?)```", text, re.S)


ON_GPUS = torch.cuda.device_count() >= 2


@pytest.mark.programs
def test_start_with_pytorch(tmp_path):
    programs, (shown,) = examples("start/pytorch.md")
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    printed = torchrun(programs[0], folders[0])
    if ON_GPUS:
        assert printed.count(": 3.0 by ") == 2
    else:
        assert sorted(printed.strip().splitlines()) == sorted(shown.strip().splitlines())
    assert torchrun(programs[1], folders[1]).split() == ["8.0"] * 2


@pytest.mark.programs
def test_start_with_sglang(tmp_path):
    (program,), (shown,) = examples("start/sglang.md")
    lines = torchrun(program, tmp_path).strip().splitlines()
    assert len(lines) == 2 and (lines == ["CustomAllReduceV2 enabled"] * 2 or not ON_GPUS)
    assert ON_GPUS or lines == [shown.strip()] * 2


@pytest.mark.programs
def test_start_with_transformers(tmp_path):
    """With a small model of random weights in place of the page's."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    pytest.importorskip("accelerate", reason="needs accelerate, which transformers asks for where a model is split")
    (program,), _ = examples("start/transformers.md")
    sizes = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
    }
    config = transformers.LlamaConfig(vocab_size=500, eos_token_id=None, **sizes)
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    small = program.replace('"meta-llama/Llama-3.1-8B"', repr(str(tmp_path / "model")))
    assert small != program
    (tmp_path / "run").mkdir()
    lines = torchrun(small, tmp_path / "run").strip().splitlines()
    assert len(lines) == 2 and len(set(lines)) == 1 and lines[0].startswith("(1, 16) "), lines
    assert ON_GPUS or re.fullmatch(r"\(1, 16\) torch.distributed {'eager': 0, 'functional': 0} {'no kernel': \d+}", lines[0]), (
        lines
    )


@pytest.mark.programs
def test_what_a_communicator_says(tmp_path):
    (program,), _ = examples("doctor.md")
    lines = torchrun(program, tmp_path).strip().splitlines()
    expected = ["torch.distributed ['cpu']", "torch.distributed False"]
    assert len(lines) == 4 and (ON_GPUS or sorted(lines) == sorted(expected * 2))


def test_every_example_of_a_page_is_run():
    """Programs of pages that no test above names."""
    here = (ROOT / "tests/docs/test_site.py").read_text()
    for path in (ROOT / "docs").rglob("*.md"):
        if "```python" in path.read_text():
            assert f'examples("{path.relative_to(ROOT / "docs")}")' in here, path


def test_doctor_shows_the_lines_that_the_page_explains():
    from allreduce_jit.cli.doctor import examine, render

    page = (ROOT / "docs/doctor.md").read_text()
    printed = render(examine(gpu_count=0))
    shown = re.search(r"```text\n(.*?)```", page, re.S)[1]
    words = [line.split()[0] for line in shown.splitlines()]
    assert words == ["versions", "driver", "host", "libraries", "cpu", "kernel", "would", "because", "no", "advice"]
    for head in ("versions", "host", "libraries"):  # the same facts, with this machine's values
        ours, theirs = (re.search(rf"^{head} +(.*)$", text, re.M)[1].split(", ") for text in (printed, shown))
        assert [part.split(" ")[0] for part in ours] == [part.split(" ")[0] for part in theirs], head
    heads = {line.split()[0] for line in printed.splitlines()}
    assert heads >= {"versions", "driver", "host", "libraries", "cpu", "kernel", "would", "because", "advice"}
    source = inspect.getsource(sys.modules["allreduce_jit.cli.doctor"])
    explained = re.findall(r"^\| `(\w+)", page, re.M)
    assert len(explained) == 14 and all(word == "cuda" or word in source for word in explained)
