"""Build what a release is made of and try it: the sdist, the wheel that comes out of it, what they hold, what `twine check` says of
them, and the wheel in an empty environment of each Python that is here.

    python tools/distribution.py OUT [--python PYTHON ...]

Needs git, build, twine and setuptools (before 70.1 wheel, too), and no network: nothing is fetched, and the environments stay without
torch, which importing the package, its C extension and the help of its command line do without. Exit code: 0 well, 1 something is wrong, 2 a tool is
missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
MINORS = (10, 11, 12, 13)
NEEDED = ("build", "twine", "setuptools")
NOT_SHIPPED = (".github/", ".gitignore")  # of the repository, not of the package
_GENERATED = ("PKG-INFO", "allreduce_jit.egg-info/")
_USE = """
import allreduce_jit
from allreduce_jit.jit import source
from allreduce_jit.policy import catalogue, plan
import importlib.util
from allreduce_jit.engine import _eager
assert importlib.util.find_spec("allreduce_jit.triton_kernels.p2p").origin
assert importlib.util.find_spec("torch") is None, "the environment is not empty"
print(allreduce_jit.__version__, *sorted(source.files()))
"""


class Wrong(Exception):
    """The message says what; the exit code is 1."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/distribution.py", description="Build the sdist and the wheel, and try them.")
    parser.add_argument("out", type=Path, metavar="OUT", help="folder for both")
    text = "interpreter to try the wheel with, may be repeated (default: each of 3.10 to 3.13 that is found)"
    parser.add_argument("--python", action="append", type=Path, metavar="PYTHON", help=text)
    args = parser.parse_args(argv)
    problem = missing()
    if problem is not None:
        print(f"distribution: {problem}", file=sys.stderr)
        return 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            _try_all(args.out.resolve(), args.python or list(interpreters()), Path(folder))
    except Wrong as wrong:
        print(f"distribution: {wrong}", file=sys.stderr)
        return 1
    return 0


def missing() -> str | None:
    """Which tool is not here, or None."""
    lacking = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if lacking:
        return f"{', '.join(lacking)} not installed: pip install {' '.join(lacking)}"
    if shutil.which("cc") is None:
        return "no C compiler: a wheel carries the C extension"
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        return "no git repository: what belongs to a release is what git tracks"
    git = subprocess.run(["git", "-C", ROOT, "ls-files", "pyproject.toml"], capture_output=True, text=True)
    if git.returncode or not git.stdout:  # such as somebody else's repository, which git does not trust
        return f"git does not say what it tracks: {git.stderr.strip() or 'not pyproject.toml'}"
    return None


def interpreters() -> Iterator[Path]:
    """One of each Python that the package supports: this one, those on PATH, those that pyenv keeps."""
    kept = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    for minor in MINORS:
        on_path = shutil.which(f"python3.{minor}")
        candidates = [Path(sys.executable)] if sys.version_info[1] == minor else []
        candidates += [Path(on_path)] if on_path else []
        candidates += sorted(kept.glob(f"3.{minor}.*/bin/python"))
        found = next((path for path in candidates if _runs(path)), None)
        if found is not None:
            yield found


def _runs(python: Path) -> bool:
    """A name on PATH may be pyenv's stand-in for a version that is not switched on."""
    return subprocess.run([python, "-c", "import venv, ensurepip"], capture_output=True).returncode == 0


def _try_all(out: Path, pythons: list[Path], folder: Path) -> None:
    tracked = _run("git", "-C", ROOT, "ls-files").splitlines()
    tree = folder / "tree"
    for name in tracked:
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    for old in [*out.glob("allreduce_jit-*.tar.gz"), *out.glob("allreduce_jit-*.whl")]:
        old.unlink()
    _run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, tree)  # the wheel out of the sdist
    (sdist,), (wheel,) = out.glob("allreduce_jit-*.tar.gz"), out.glob("allreduce_jit-*.whl")
    _check_sdist(sdist, {name for name in tracked if not name.startswith(NOT_SHIPPED)})
    _run(sys.executable, "-m", "twine", "check", "--strict", sdist, wheel)
    print(f"built and checked: {sdist}, {wheel}")
    kernels = sorted(path.relative_to(tree / "kernels/cuda") for path in (tree / "kernels/cuda").rglob("*.cu*"))
    for number, python in enumerate(pythons):
        print(f"installed, imported and run: {_install(python, folder / f'venv{number}', wheel, kernels)}")


def _check_sdist(sdist: Path, wanted: set[str]) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive.getmembers() if member.isfile()}
    lacking = sorted(wanted - names)
    extra = sorted(name for name in names - wanted if not name.startswith(_GENERATED))
    if lacking or extra:
        raise Wrong(f"{sdist.name} lacks {lacking} and has {extra} that git does not track; see MANIFEST.in")


def _install(python: Path, home: Path, wheel: Path, kernels: list[Path]) -> str:
    """What was installed where; in an environment of its own, of which nothing else is seen."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PIP_"))}
    _run(python, "-m", "venv", home, env=env)
    inside = home / "bin/python"
    _run(inside, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check", wheel, env=env)
    version, *files = _run(inside, "-c", _USE, env=env, cwd=home).split()
    lacking = sorted({str(path) for path in kernels} - set(files))
    if lacking:
        raise Wrong(f"{wheel.name} lacks the kernels {lacking}")
    said = _run(home / "bin/allreduce-jit", "--version", env=env, cwd=home).strip()
    if said != f"allreduce-jit {version}" or f"-{version}-" not in wheel.name:
        raise Wrong(f"{wheel.name} is installed as {version} and says that it is {said!r}")
    _run(home / "bin/allreduce-jit", "--help", env=env, cwd=home)
    return f"{said} on {_run(inside, '--version', env=env).strip()}"


def _run(*command: object, **options: object) -> str:
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)  # type: ignore[call-overload]
    if done.returncode:
        raise Wrong(f"{' '.join(words)} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout


if __name__ == "__main__":
    sys.exit(main())
