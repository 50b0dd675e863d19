#!/usr/bin/env bash
# Make the environment that `make` uses, in the folder given.
# Where $PYTHON already holds torch, build on top of it and need no network; otherwise install everything.
set -euo pipefail
venv=$1
python=${PYTHON:-python3}
rm -rf "$venv"

if "$python" -c "import torch" 2>/dev/null; then
    echo "setup: $venv on top of $python, which has torch"
    "$python" -m venv --without-pip "$venv"
    # Everything the interpreter has, its own .pth files included; a nested virtual environment would lose it.
    "$python" - > "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/parent.pth" <<'P'
import sys
for path in sys.path:
    if path.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({path!r})")
P
    "$venv/bin/python" -m pip install -q --no-build-isolation --no-deps -e .
    for package in triton:triton cuda.core:cuda-core cuda.bindings:cuda-bindings pytest:pytest numpy:numpy \
        pytest_timeout:pytest-timeout xdist:pytest-xdist hypothesis:hypothesis ruff:ruff "pyright:pyright[nodejs]" \
        jsonschema:jsonschema tree_sitter:tree-sitter tree_sitter_cuda:tree-sitter-cuda build.env:build twine:twine material:mkdocs-material \
        "mkdocstrings_handlers.python:mkdocstrings[python]"; do
        "$venv/bin/python" -c "import ${package%%:*}" 2>/dev/null ||
            "$venv/bin/python" -m pip install -q "${package##*:}" 2>/dev/null ||
            echo "setup: ${package##*:} is not installed and cannot be fetched; going on without it"
    done
else
    echo "setup: $python has no torch: fetching it and the tools for tests and pages into $venv; this takes minutes and several GB"
    "$python" -m venv "$venv"
    "$venv/bin/python" -m pip install -q "torch==2.13.0"
    "$venv/bin/python" -m pip install -q -e ".[test,docs]"
fi
