"""Every environment variable that configures the package, in one frozen value: ours parsed strictly, SGLang's as SGLang does.

Read once per communicator (never per call), so that an engine may still set variables after import.
"""

from __future__ import annotations

import functools
import logging
import os
import pwd
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from . import paths
from .errors import SettingsError

log = logging.getLogger("allreduce_jit")

V2_SWITCH = "SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2"
PLUGINS_SWITCH = "ALLREDUCE_JIT"
PREFIX = "ALLREDUCE_JIT_"

# Of ALLREDUCE_JIT_PATH: the highest rung to try; "auto" stands for the highest there is.
PATHS = ("auto", *[path.short for path in paths.Path][1:])

_TRUE = ("1", "true", "yes", "on")
_FALSE = ("0", "false", "no", "off")
# What EnvBool of sglang/srt/environ.py takes, in any case and without blanks; on and off are ours.
_SGLANG_TRUE = ("1", "true", "yes", "y", "on")
_SGLANG_FALSE = ("0", "false", "no", "n", "off")


@dataclass(frozen=True)
class Settings:
    """What the user chose.

    Attributes:
        use_v2: the switch ``SGLANG_OPT_USE_CUSTOM_ALL_REDUCE_V2`` (default on).
        path: highest rung of the ladder to try, one of ``PATHS``: ``auto`` allows all of them.
        cache_dir: where cubins are kept; None: nowhere, as no home directory is known.
        timeout_s: seconds that a kernel waits for a peer before it gives up; 0 = for ever.
        first_timeout_s: the same in the first call of a shape, when peers may still compile or load a model.
        setup_timeout_s: seconds that a rank waits for the others in each exchange of the set-up; 0 = for ever.
        staging_mb: upper bound of staging memory per rank, in MiB.
        tuning: use the table that ``allreduce-jit tune`` measured on this machine, where there is one.
        pdl: launch kernels with programmatic dependent launch where the GPU has it.
        c_calls: make eager calls in C where that extension was built.
        plugins: what the plug-ins for inference engines do: ``off`` nothing, ``on`` take calls where they can, ``require`` the same, and
            what keeps them from it is an error.
    """

    use_v2: bool = True
    path: str = "auto"
    cache_dir: Path | None = field(default_factory=lambda: default_cache_dir(os.environ))
    timeout_s: float = 30.0
    first_timeout_s: float = 600.0
    setup_timeout_s: float = 300.0
    staging_mb: int = 32
    tuning: bool = True
    pdl: bool = True
    c_calls: bool = True
    plugins: str = "off"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Parse ``environ`` (default ``os.environ``).

        Raises:
            SettingsError: an unknown ``ALLREDUCE_JIT_*`` name or a bad value; the message lists the valid ones.
        """
        env = os.environ if environ is None else environ
        unknown = sorted(k for k in env if k.startswith(PREFIX) and k not in VARIABLES)
        if unknown:
            raise SettingsError(f"unknown environment variable {unknown[0]}; valid: {', '.join(VARIABLES)}")
        values = {VARIABLES[k][0]: VARIABLES[k][1](k, env[k]) for k in VARIABLES if k in env}
        return cls(**{"cache_dir": default_cache_dir(env), **values})


def default_cache_dir(env: Mapping[str, str]) -> Path | None:
    """None: no variable and no user database says where. Relative directories are ignored, as the XDG rules want."""
    if os.path.isabs(env.get("XDG_CACHE_HOME", "")):
        return Path(env["XDG_CACHE_HOME"]) / "allreduce_jit"
    home = _home(env)
    return home and home / ".cache" / "allreduce_jit"


def _home(env: Mapping[str, str]) -> Path | None:
    home = env.get("HOME", "")
    if not os.path.isabs(home):
        try:
            home = pwd.getpwuid(os.getuid()).pw_dir
        except KeyError:  # a container whose user ids have no names
            return None
    return Path(home) if os.path.isabs(home) else None


def misread_switch(env: Mapping[str, str]) -> str | None:
    """What is wrong with the value of SGLang's switch, for people; None if nothing is."""
    text = env.get(V2_SWITCH)
    if text is None or text.lower() in _SGLANG_TRUE + _SGLANG_FALSE:
        return None
    valid = ", ".join(_SGLANG_TRUE + _SGLANG_FALSE)
    return f"{V2_SWITCH}={text!r} is not understood, so V2 stays on (the default); valid, in any case: {valid}"


def parse_switch(name: str, text: str) -> bool:
    """SGLang's switch as SGLang reads it: a value that is not understood gives the default and one warning."""
    problem = misread_switch({name: text})
    if problem:
        _warn_once(problem)
        return Settings.use_v2
    return text.lower() in _SGLANG_TRUE


@functools.cache
def _warn_once(problem: str) -> None:
    log.warning("%s", problem)


def _bool(name: str, text: str) -> bool:
    low = text.strip().lower()
    if low in _TRUE:
        return True
    if low in _FALSE:
        return False
    raise SettingsError(f"{name}={text!r}: expected one of {', '.join(_TRUE + _FALSE)} (any case)")


def _path(name: str, text: str) -> str:
    if text.strip().lower() in PATHS:
        return text.strip().lower()
    raise SettingsError(f"{name}={text!r}: expected one of {', '.join(PATHS)}")


def parse_plugins(name: str, text: str) -> str:
    """Of ``ALLREDUCE_JIT``: a switch with a third position."""
    low = text.strip().lower()
    if low not in (*_TRUE, *_FALSE, "require"):
        raise SettingsError(f"{name}={text!r}: expected one of {', '.join(_TRUE + _FALSE)}, require (any case)")
    return "require" if low == "require" else "on" if low in _TRUE else "off"


def _directory(name: str, text: str) -> Path:
    if not text.strip():
        raise SettingsError(f"{name} is empty: expected a directory")
    if Path(text).parts[0] == "~":
        home = _home(os.environ)
        if home is None:
            raise SettingsError(f"{name}={text!r}: this user has no home directory, expected another one")
        return home.joinpath(*Path(text).parts[1:])
    try:
        return Path(text).expanduser()
    except RuntimeError as e:
        raise SettingsError(f"{name}={text!r}: {e}") from e


def _seconds(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 86400:
        raise SettingsError(f"{name}={text!r}: expected seconds between 0 (wait for ever) and 86400")
    return value


def _megabytes(name: str, text: str) -> int:
    if re.fullmatch(r"[0-9]{1,4}", text.strip()) and 4 <= int(text) <= 1024:
        return int(text)
    raise SettingsError(f"{name}={text!r}: expected whole MiB between 4 and 1024")


# name -> (field, parser); docs/environment.md lists the same names (a test compares them).
VARIABLES = {
    V2_SWITCH: ("use_v2", parse_switch),
    PLUGINS_SWITCH: ("plugins", parse_plugins),
    "ALLREDUCE_JIT_PATH": ("path", _path),
    "ALLREDUCE_JIT_CACHE_DIR": ("cache_dir", _directory),
    "ALLREDUCE_JIT_TIMEOUT": ("timeout_s", _seconds),
    "ALLREDUCE_JIT_FIRST_TIMEOUT": ("first_timeout_s", _seconds),
    "ALLREDUCE_JIT_SETUP_TIMEOUT": ("setup_timeout_s", _seconds),
    "ALLREDUCE_JIT_STAGING_MB": ("staging_mb", _megabytes),
    "ALLREDUCE_JIT_TUNING": ("tuning", _bool),
    "ALLREDUCE_JIT_PDL": ("pdl", _bool),
    "ALLREDUCE_JIT_C_CALLS": ("c_calls", _bool),
}
