"""Which compilers this process can use: asked by the probe and by the compiler, answered here alone.

Nothing here imports torch, triton or cuda.core, which take longer than all else that a probe does.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path


def nvrtc() -> str:
    """Version of NVRTC, which is loaded after this. Raises whatever says why there is none that can be used."""
    from cuda.bindings import nvrtc

    if importlib.util.find_spec("cuda.core") is None:
        raise RuntimeError("cuda.core, through which NVRTC is called, is missing: install cuda-core")
    try:
        error, major, minor = nvrtc.nvrtcVersion()
    except Exception:  # noqa: BLE001 - which one depends on cuda-python's version
        # It looks in the interpreter's own site folders alone; what is loaded already it takes from anywhere.
        if not _load_nvrtc_of_a_wheel():
            raise
        error, major, minor = nvrtc.nvrtcVersion()
    if error != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise RuntimeError(f"nvrtcVersion: {error.name}")
    return f"{major}.{minor}"


def _load_nvrtc_of_a_wheel() -> bool:
    """Load NVRTC from where ``PYTHONPATH`` or ``.pth`` files have packages: the newest of the first folder with any."""
    for folder in sys.path:
        for library in sorted(Path(folder).glob("nvidia/*/lib/libnvrtc.so.*"), key=lambda path: path.name, reverse=True):
            for builtins in library.parent.glob("libnvrtc-builtins.so.*"):  # which not every NVRTC finds beside itself
                ctypes.CDLL(str(builtins), ctypes.RTLD_GLOBAL)
            ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)
            return True
    return False


def triton() -> str | None:
    """Version of the Triton that ``import triton`` finds, whatever its distribution is called; None: it finds none."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # the latter: a folder of that name, but no package
        return None
    for name in ("triton", "pytorch-triton"):  # a nightly build's tells more than the package itself
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    found = re.search(r"^__version__ *= *['\"](.+?)['\"]", Path(spec.origin).read_text(encoding="utf-8"), re.M)
    return found[1] if found else "unknown"
