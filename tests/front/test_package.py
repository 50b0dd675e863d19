"""The package from outside: what importing costs, what is public, what gets installed, what is documented."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import sysconfig
import types
import venv
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT, TESTS

import allreduce_jit
from allreduce_jit import abi
from allreduce_jit.settings import V2_SWITCH, VARIABLES, Settings


def run(code, *, python=sys.executable, **options):
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- importing


def test_import_is_quick():
    code = """
import sys, time, torch
known = set(sys.modules)
for _ in range(5):
    start = time.perf_counter()
    import allreduce_jit
    print(time.perf_counter() - start)
    for name in set(sys.modules) - known:
        del sys.modules[name]
"""
    # The quickest of several: what else the machine does can only add to it.
    assert min(map(float, run(code).split())) <= 0.020


def test_import_brings_nothing_along():
    code = """
import sys
before = set(sys.modules)
import allreduce_jit
new = {name.split(".")[0] for name in set(sys.modules) - before}
mapped = open("/proc/self/maps").read() if sys.platform == "linux" else ""
print(sorted(new - set(sys.stdlib_module_names)), "libcuda" in mapped or "libnvrtc" in mapped)
"""
    assert run(code).split("\n")[0] == "['allreduce_jit'] False"


def test_import_touches_no_gpu():
    """Neither does looking at every public name."""
    code = """
import torch, allreduce_jit
for name in allreduce_jit.__all__:
    getattr(allreduce_jit, name)
print(torch.cuda.is_initialized())
"""
    assert run(code).strip() == "False"


def test_import_without_cuda_and_triton():
    """As on a machine that has neither; torch is always there."""
    code = """
import sys
for name in ("cuda", "triton"):
    sys.modules[name] = None
import allreduce_jit
print(all(getattr(allreduce_jit, name) is not None for name in allreduce_jit.__all__))
"""
    assert run(code).strip() == "True"


# -- names


def submodules():
    """Of all rooms, by their names within the package."""
    found = pkgutil.walk_packages(allreduce_jit.__path__, "allreduce_jit.")
    return [module.name.removeprefix("allreduce_jit.") for module in found if not module.name.endswith("__main__")]


def test_public_names_stay_what_they_are():
    """Importing a submodule binds its name in the package, over anything public of that name."""
    assert not set(allreduce_jit.__all__) & set(submodules())
    code = f"""
import importlib, json, types
import allreduce_jit
before = {{name: getattr(allreduce_jit, name) for name in allreduce_jit.__all__}}
for name in {submodules()!r}:
    importlib.import_module("allreduce_jit." + name)
same = all(getattr(allreduce_jit, name) is value for name, value in before.items())
modules = [name for name, value in before.items() if isinstance(value, types.ModuleType)]
print(json.dumps([same, modules]))
"""
    assert json.loads(run(code)) == [True, []]


# In the order of the data flow: each may import those further down, and nothing else of ours.
ROOMS = ["__main__", "cli", "bench", "harness", "__init__", "integrations", "communicator", "fused", "describe", "routes", "norms", "known_norms", "operands", "setup", "engine", "jit", "policy",
         "machine", "inputs", "torch_private", "settings", "paths", "errors", "records", "deprecation", "abi", "version"]  # fmt: skip
KERNELS = {"cuda_kernels", "triton_kernels"}


def arrows():
    """(module, its room, the room of what it imports) of every import inside the package."""
    root = Path(allreduce_jit.__file__).parent
    for path in root.rglob("*.py"):
        here = path.relative_to(root).with_suffix("").parts
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                base = here[: len(here) - node.level]
                names = [(*base, *node.module.split("."))] if node.module else [(*base, alias.name) for alias in node.names]
                for name in names:
                    yield "/".join(here), here[0], "__init__" if name[0] in allreduce_jit.__all__ else name[0]


def test_modules_are_short():
    root = Path(allreduce_jit.__file__).parent
    lines = {path.name: len(path.read_text().splitlines()) for path in root.rglob("*.py")}
    assert not {name: count for name, count in lines.items() if count > 300}


def test_imports_point_downwards():
    found = [arrow for arrow in arrows() if arrow[2] not in KERNELS]
    assert {room for _, room, _ in found} | {other for _, _, other in found} == set(ROOMS)
    assert not [arrow for arrow in found if arrow[1] != arrow[2] and ROOMS.index(arrow[2]) < ROOMS.index(arrow[1])]


def test_public_names():
    assert allreduce_jit.__all__ == sorted(set(allreduce_jit.__all__))
    assert set(allreduce_jit.__all__) <= set(dir(allreduce_jit))
    for name in allreduce_jit.__all__:
        value = getattr(allreduce_jit, name)
        assert getattr(value, "__name__", name) == name and not isinstance(value, types.ModuleType)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        allreduce_jit.nonsense  # noqa: B018
    namespace = {}
    exec("from allreduce_jit import *", namespace)
    assert set(allreduce_jit.__all__) <= set(namespace)


def test_type_checkers_see_the_same_names():
    """The lazy table and the imports under TYPE_CHECKING tell the same."""
    source = Path(allreduce_jit.__file__).read_text().split("if TYPE_CHECKING:\n")[1].split("\n\n\n")[0]
    imported = re.findall(r"from \.([\w.]+) import (\([^)]*\)|[^\n]*)", source)
    found = {name: module for module, names in imported for name in re.findall(r"\w+", names)}
    assert found == {name: allreduce_jit._HOME[name] for name in allreduce_jit.__all__}


def test_exceptions_have_one_base():
    from allreduce_jit import AllReduceError

    names = [name for name in allreduce_jit.__all__ if isinstance(getattr(allreduce_jit, name), type)]
    exceptions = [getattr(allreduce_jit, name) for name in names if issubclass(getattr(allreduce_jit, name), Exception)]
    assert len(exceptions) > 5 and all(issubclass(e, AllReduceError) for e in exceptions)
    assert issubclass(AllReduceError, RuntimeError)


# -- tests


def imported(path):
    """Names of the modules that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_test_file_imports_another():
    """What tests share is in ``helpers``, or beside them in a file that is no test. Tools know of no tests at all. Mutants are what
    tests are run against."""
    ours = [path for folder in (TESTS, ROOT / "tools") for path in folder.rglob("*.py")]
    names = {path.stem for path in ours if path.is_relative_to(TESTS) and path.name != "__init__.py"}
    tests = {name for name in names if name.startswith("test_")}
    assert len(tests) > 35
    for path in ours:
        if path.name in ("mutant_checks.py", "triton_mutant_checks.py"):
            continue
        if path.is_relative_to(ROOT / "tools"):  # other packages may name their modules as they like
            assert not {name.split(".")[0] for name in imported(path)} & (names | {"helpers", "tests"}), path
        else:
            assert not {part for name in imported(path) for part in name.split(".")} & tests, path


def test_no_two_files_of_tests_and_tools_have_one_name():
    """Pytest imports a test by the name of its file, with its folder on the path."""
    stems = [path.stem for folder in (TESTS, ROOT / "tools") for path in folder.rglob("*.py") if path.stem != "__init__"]
    assert len(stems) == len(set(stems))


# -- installing


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """What a release has, and nothing that earlier builds left."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("allreduce_jit", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("pyproject.toml", "setup.cfg", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(tree, tmp_path_factory):
    needs_build_tools()
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", out, tree)
    (path,) = out.glob("*.whl")
    return path


def needs_build_tools():
    """Asked of the metadata: setuptools changes the interpreter that imports it."""

    def version(name):
        try:
            return tuple(map(int, importlib.metadata.version(name).split(".")[:2]))
        except importlib.metadata.PackageNotFoundError:
            return (0, 0)

    if version("pip") < (22, 3) or version("setuptools") < (68, 0):
        pytest.skip("needs pip 22.3 and setuptools 68")
    if version("setuptools") < (70, 1) and version("wheel") == (0, 0):
        pytest.skip("needs wheel, or setuptools 70.1")


def pip(*arguments):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PIP_NO_INDEX": "1"})
    assert done.returncode == 0, done.stdout + done.stderr


def sources():
    """Files of the package in this tree, as the wheel should name them."""
    homes = {"allreduce_jit": "allreduce_jit", "kernels/cuda": "allreduce_jit/cuda_kernels"}
    homes["kernels/triton"] = "allreduce_jit/triton_kernels"
    return {
        f"{home}/{path.relative_to(ROOT / folder)}"
        for folder, home in homes.items()
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }


@pytest.mark.programs
def test_wheel(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if ".dist-info/" not in name]
        extension = "allreduce_jit/engine/_eager.abi3.so"
        if shutil.which("cc") and Path(sysconfig.get_path("include"), "Python.h").exists():
            names.remove(extension)  # for Python 3.10 and later; where it cannot be built, there is a wheel all the same
        assert set(names) == sources() and len(names) == len(set(names))
        assert {name.split("/")[0] for name in names} == {"allreduce_jit"}  # no `kernels`, which is Hugging Face's
        assert {Path(name).suffix for name in names} == {".py", ".c", ".cu", ".cuh", ".typed"}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        text = archive.read(entry_points).decode()
        assert "allreduce-jit = allreduce_jit.cli.main:main" in text
        assert "[vllm.general_plugins]\nallreduce_jit = allreduce_jit.integrations.vllm:register" in text
        assert "[sglang.srt.plugins]\nallreduce_jit = allreduce_jit.integrations.sglang_plugin:register" in text


USE = """
import importlib.resources, importlib.util, sys
import allreduce_jit.policy.catalogue, allreduce_jit.policy.plan
from allreduce_jit.cuda_kernels import __file__ as where
from allreduce_jit.jit import source
files = sorted(source.files())
legacy = importlib.util.find_spec("allreduce_jit.triton_kernels.p2p").origin
typed = importlib.resources.files("allreduce_jit").joinpath("py.typed").is_file()
print(allreduce_jit.__file__, where, legacy, typed, importlib.util.find_spec("kernels"), *files, sep="\\n")
"""


def check_installed(package, tmp_path):
    """Install a wheel into an environment of its own, and import it from somewhere else."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip("--python", python, "install", "--no-deps", package)
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    init, where, legacy, typed, kernels, *files = run(USE, python=python, cwd=tmp_path, env=env).splitlines()
    assert typed == "True" and kernels == "None"
    cuda = ROOT / "kernels/cuda"
    own = [str(path.relative_to(cuda)) for path in cuda.rglob("*") if path.suffix in (".cu", ".cuh")]
    assert files == sorted([*own, *abi.headers()])
    assert (home / "bin" / "allreduce-jit").exists()
    return [Path(path) for path in (init, where, legacy)]


@pytest.mark.programs
def test_installed_wheel(wheel, tmp_path):
    for path in check_installed(wheel, tmp_path):
        assert path.is_relative_to(tmp_path / "venv")


@pytest.mark.programs
def test_editable_installation(tree, tmp_path):
    needs_build_tools()
    # What `pip install -e` asks of setuptools; pip itself would look for setuptools in the new environment.
    build = "from setuptools.build_meta import build_editable; import sys; build_editable(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, str(tmp_path)], cwd=tree, check=True, capture_output=True)
    (package,) = tmp_path.glob("*.whl")
    found = check_installed(package, tmp_path)
    assert found == [tree / "allreduce_jit/__init__.py", tree / "kernels/cuda/__init__.py", tree / "kernels/triton/p2p.py"]


def test_requirements_put_no_floor_on_cuda_13():
    text = (ROOT / "pyproject.toml").read_text()
    (required,) = re.findall(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)
    floors = dict(re.findall(r'"([\w-]+)(?:>=([\d.]+))?', required))
    assert set(floors) == {"torch", "triton", "cuda-python", "cuda-core"}
    assert int(floors["cuda-python"].split(".")[0]) <= 12


# -- documents


def rows(text):
    """Cells of all table rows that begin with a variable's name."""
    lines = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip("| `"): cells for cells in lines}


def test_environment_document():
    text = (ROOT / "docs/environment.md").read_text()
    table = rows(text)
    assert set(table) == set(VARIABLES) and text.count("| `") - text.count(" | `") == len(VARIABLES)
    assert [line[3:] for line in text.splitlines() if line.startswith("## ")] == ["General", "Cache", "Compiler", "Debug"]
    defaults = Settings.from_env({"HOME": "/home/someone"})
    for name, (_, _, default, meaning) in table.items():
        assert len(meaning) > 20
        field, parse = VARIABLES[name]
        if field == "cache_dir":
            assert default == "`$XDG_CACHE_HOME/allreduce_jit`, else `~/.cache/allreduce_jit`"
        else:
            assert parse(name, default.strip("`")) == getattr(defaults, field), name
    assert table[V2_SWITCH][2] == "`on`"


OTHERS = {"SGLANG_PLUGINS"}  # not ours, and told of


@pytest.mark.parametrize(
    "document", [*(path.name for path in ROOT.glob("*.md")), *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
)
def test_documents_name_no_unknown_variable(document):
    names = set(re.findall(r"\bALLREDUCE_JIT_[A-Z_]*[A-Z]|\bSGLANG_[A-Z_0-9]*[A-Z0-9]", (ROOT / document).read_text()))
    assert names <= set(VARIABLES) | OTHERS
