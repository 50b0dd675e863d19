"""What a release is made of: built, checked and installed; and that its papers say the same as the package."""

from __future__ import annotations

import re
import sys
import tarfile
import zipfile
from pathlib import Path

import distribution
import pytest
from helpers import ROOT

import allreduce_jit

PYPROJECT = (ROOT / "pyproject.toml").read_text()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    problem = distribution.missing()
    if problem is not None:
        pytest.skip(problem)
    out = tmp_path_factory.mktemp("dist")
    assert distribution.main([str(out), "--python", sys.executable]) == 0
    return out


@pytest.mark.programs
def test_wheel_carries_kernels_and_licence(built):
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = archive.read(next(name for name in names if name.endswith(".dist-info/METADATA"))).decode()
        licence = archive.read(next(name for name in names if re.search(r"\.dist-info/(licenses/)?LICENSE$", name)))
    assert {"allreduce_jit/cuda_kernels/two_shot.cu", "allreduce_jit/triton_kernels/p2p.py", "allreduce_jit/py.typed"} <= names
    assert licence == (ROOT / "LICENSE").read_bytes()
    assert re.search(r"^License(-Expression)?: Apache-2\.0$", metadata, re.M)
    assert "Requires-Python: >=3.10" in metadata and "Description-Content-Type: text/markdown" in metadata


@pytest.mark.programs
def test_sdist_can_be_tested_and_built_again(built):
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"Makefile", "setup.sh", "tests/conftest.py", "docs/glossary.md", "kernels/cuda/ptx.cuh", "CHANGELOG.md"} <= names
    assert not [name for name in names if "__pycache__" in name or name.startswith((".venv", ".github"))]


def test_a_file_that_the_sdist_lacks_is_told(tmp_path):
    sdist = tmp_path / "package-1.tar.gz"
    with tarfile.open(sdist, "w:gz") as archive:
        archive.add(ROOT / "README.md", "package-1/README.md")
        archive.add(ROOT / "README.md", "package-1/PKG-INFO")
        archive.add(ROOT / "README.md", "package-1/left over")
    with pytest.raises(distribution.Wrong, match=r"lacks \['LICENSE'\] and has \['left over'\]"):
        distribution._check_sdist(sdist, {"README.md", "LICENSE"})


def test_a_command_that_fails_and_a_missing_tool_are_told(monkeypatch, capsys):
    with pytest.raises(distribution.Wrong, match=r"ended with 3:\nwhy"):
        distribution._run(sys.executable, "-c", "print('why'); raise SystemExit(3)")
    monkeypatch.setattr(distribution, "NEEDED", ("json", "no_such_tool"))
    assert distribution.main(["/nonexistent"]) == 2
    assert capsys.readouterr().err == "distribution: no_such_tool not installed: pip install no_such_tool\n"


def test_interpreters_run_and_are_of_different_versions():
    found = list(distribution.interpreters())
    versions = [distribution._run(python, "-c", "import sys; print(*sys.version_info[:2])").split() for python in found]
    assert versions == sorted(versions) and len({tuple(version) for version in versions}) == len(versions)
    assert [str(part) for part in sys.version_info[:2]] in versions or sys.version_info[1] not in distribution.MINORS
    assert not distribution._runs(Path("/bin/false"))


# -- papers


def pythons() -> set[str]:
    return set(re.findall(r"Programming Language :: Python :: (3\.\d+)", PYPROJECT))


def test_pythons_are_the_same_everywhere():
    assert pythons() == {f"3.{minor}" for minor in distribution.MINORS}
    assert f'requires-python = ">=3.{min(distribution.MINORS)}"' in PYPROJECT
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    (matrix,) = re.findall(r"python: \[(.*)\]", workflow)
    assert set(re.findall(r'"([\d.]+)"', matrix)) == pythons()


def test_citation_is_of_this_version_and_licence():
    fields = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert fields["version"] == allreduce_jit.__version__ and fields["cff-version"] == "1.2.0"
    assert fields["license"] == "Apache-2.0" and f"license = {fields['license']}\n" in (ROOT / "setup.cfg").read_text()
    assert (ROOT / "LICENSE").read_text().split()[:4] == ["Apache", "License", "Version", "2.0,"]


def test_changelog_begins_with_this_version():
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == allreduce_jit.__version__ and len(headings) == len(set(headings))


@pytest.mark.parametrize("paper", ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs/command-line.md"])
def test_links_between_files_lead_somewhere(paper):
    text = (ROOT / paper).read_text()
    for target in re.findall(r"\]\((?!https?:)([^)#\s]+)(?:#[^)]*)?\)", text):
        assert ((ROOT / paper).parent / target).exists(), (paper, target)


def test_commands_and_paths_that_the_papers_name_exist():
    makefile = (ROOT / "Makefile").read_text()
    for paper in ("CONTRIBUTING.md", "SECURITY.md"):
        text = (ROOT / paper).read_text()
        for target in re.findall(r"`make (\w+)`", text):
            assert re.search(rf"^{target}:", makefile, re.M), (paper, target)
        named = re.findall(r"`((?:allreduce_jit|kernels|tests|tools|docs|\.ci|\.github)/[\w./-]*)`", text)
        assert named
        for path in named:
            assert (ROOT / path).exists(), (paper, path)


def test_the_public_workflow_runs_what_ci_runs():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    assert "run: bash .ci/run\n" in workflow
    for target in re.findall(r"\bmake (\w+)", workflow):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M), target
    assert "permissions:\n  contents: read\n" in workflow
