"""Every environment variable: what it takes, what it refuses and with which words."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pwd
from pathlib import Path
from types import SimpleNamespace

import pytest

from allreduce_jit import settings
from allreduce_jit.cli import doctor
from allreduce_jit.cli import main as cli
from allreduce_jit.errors import AllReduceError, SettingsError
from allreduce_jit.jit.cache import Artifact, KernelCache
from allreduce_jit.policy import measured_tables as tuned
from allreduce_jit.settings import PLUGINS_SWITCH, PREFIX, V2_SWITCH, VARIABLES, Settings, default_cache_dir, misread_switch

HOME = {"HOME": "/home/someone"}
TRUE = ["1", "true", "True", "TRUE", "yes", "YES", "on", "On", " 1 "]
FALSE = ["0", "false", "False", "FALSE", "no", "No", "off", "OFF", " off\n"]
SWITCHED_ON = ["1", "true", "True", "YES", "y", "Y", "on"]
SWITCHED_OFF = ["0", "false", "FALSE", "No", "n", "N", "off", "Off"]
VALID = {
    V2_SWITCH: [(t, True) for t in SWITCHED_ON] + [(t, False) for t in SWITCHED_OFF],
    PLUGINS_SWITCH: [(t, "on") for t in TRUE] + [(t, "off") for t in FALSE] + [("require", "require"), (" Require ", "require")],
    "ALLREDUCE_JIT_TUNING": [(t, True) for t in TRUE] + [(t, False) for t in FALSE],
    "ALLREDUCE_JIT_PDL": [(t, True) for t in TRUE] + [(t, False) for t in FALSE],
    "ALLREDUCE_JIT_C_CALLS": [(t, True) for t in TRUE] + [(t, False) for t in FALSE],
    "ALLREDUCE_JIT_PATH": [("auto", "auto"), ("Legacy", "legacy"), ("host", "host"), (" TORCH ", "torch")],
    "ALLREDUCE_JIT_CACHE_DIR": [("/tmp/x", Path("/tmp/x")), ("rel", Path("rel"))],
    "ALLREDUCE_JIT_TIMEOUT": [("0", 0.0), ("0.5", 0.5), ("30", 30.0), ("1e3", 1000.0), ("86400", 86400.0)],
    "ALLREDUCE_JIT_SETUP_TIMEOUT": [("0", 0.0), ("0.5", 0.5), ("300", 300.0), ("86400", 86400.0)],
    "ALLREDUCE_JIT_FIRST_TIMEOUT": [("0", 0.0), ("600", 600.0)],
    "ALLREDUCE_JIT_STAGING_MB": [("4", 4), (" 64 ", 64), ("1024", 1024)],
}
NOT_BOOL = ["", "2", "tru", "enable", "none", "-1"]
INVALID = {
    V2_SWITCH: [],
    PLUGINS_SWITCH: [*NOT_BOOL, "required", "vllm"],
    "ALLREDUCE_JIT_TUNING": NOT_BOOL,
    "ALLREDUCE_JIT_PDL": NOT_BOOL,
    "ALLREDUCE_JIT_C_CALLS": NOT_BOOL,
    "ALLREDUCE_JIT_PATH": ["", "v2", "nccl", "legacy,torch"],
    "ALLREDUCE_JIT_CACHE_DIR": ["", "  "],
    "ALLREDUCE_JIT_TIMEOUT": ["", "-1", "86401", "nan", "inf", "-inf", "30s"],
    "ALLREDUCE_JIT_SETUP_TIMEOUT": ["", "-1", "86401", "nan", "5m"],
    "ALLREDUCE_JIT_FIRST_TIMEOUT": ["", "-1", "86401", "soon"],
    "ALLREDUCE_JIT_STAGING_MB": ["", "3", "1025", "32.0", "-8", "0x20", "32MB"],
}


def each(table):
    return [(name, value) for name, values in table.items() for value in values]


def test_the_tables_here_are_complete():
    assert set(VALID) == set(INVALID) == set(VARIABLES)
    fields = {f.name for f in dataclasses.fields(Settings)}
    assert {field for field, _ in VARIABLES.values()} == fields
    assert all(name in (V2_SWITCH, PLUGINS_SWITCH) or name.startswith(PREFIX) for name in VARIABLES)


def test_defaults():
    found = Settings.from_env(HOME)
    assert found == dataclasses.replace(Settings(), cache_dir=Path("/home/someone/.cache/allreduce_jit"))
    assert found.use_v2 is True and found.path == "auto" and found.pdl is True and found.plugins == "off"
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.use_v2 = False


@pytest.mark.parametrize(("name", "case"), each(VALID))
def test_valid(name, case):
    text, value = case
    default = Settings.from_env(HOME)
    found = Settings.from_env({**HOME, name: text})
    assert type(getattr(found, VARIABLES[name][0])) in (type(value), type(Path("x")))
    assert found == dataclasses.replace(default, **{VARIABLES[name][0]: value})  # and nothing else changed


@pytest.mark.parametrize(("name", "text"), each(INVALID))
def test_invalid(name, text):
    with pytest.raises(SettingsError, match=name) as caught:
        Settings.from_env({**HOME, name: text})
    assert "expected" in str(caught.value)
    assert isinstance(caught.value, (AllReduceError, ValueError))


@pytest.mark.parametrize("name", ["ALLREDUCE_JIT_", "ALLREDUCE_JIT_PTAH", "ALLREDUCE_JIT_path", "ALLREDUCE_JIT_V2"])
def test_unknown_names_list_the_valid_ones(name):
    with pytest.raises(SettingsError) as caught:
        Settings.from_env({**HOME, name: "1"})
    assert f"unknown environment variable {name};" in str(caught.value)
    assert all(valid in str(caught.value) for valid in VARIABLES)


def test_other_peoples_variables_are_none_of_our_business():
    env = {**HOME, "SGLANG_OPT_OTHER": "x", "ALLREDUCE": "y", "allreduce_jit_path": "z", "XALLREDUCE_JIT_PATH": "q"}
    assert Settings.from_env(env) == Settings.from_env(HOME)


def test_bools_name_their_choices():
    with pytest.raises(SettingsError, match=r"1, true, yes, on, 0, false, no, off \(any case\)"):
        Settings.from_env({**HOME, "ALLREDUCE_JIT_PDL": "maybe"})


@pytest.mark.parametrize("text", [*NOT_BOOL, " 0", "0 ", "None", "of"])
def test_sglangs_switch_is_read_as_sglang_reads_it(text, caplog):
    """Its EnvField warns of what it cannot parse, the empty string and blanks included, and takes the default."""
    settings._warn_once.cache_clear()
    for _ in range(3):
        assert Settings.from_env({**HOME, V2_SWITCH: text}) == Settings.from_env(HOME)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.getMessage() == misread_switch({V2_SWITCH: text})
    assert f"{V2_SWITCH}={text!r} is not understood" in record.getMessage() and "off" in record.getMessage()


@pytest.mark.parametrize("text", [None, *SWITCHED_ON, *SWITCHED_OFF])
def test_a_switch_that_is_understood_warns_of_nothing(text, caplog):
    env = {} if text is None else {V2_SWITCH: text}
    Settings.from_env({**HOME, **env})
    assert misread_switch(env) is None and not caplog.records


@pytest.mark.parametrize(
    ("env", "directory"),
    [
        ({"HOME": "/h"}, "/h/.cache/allreduce_jit"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/xdg"}, "/xdg/allreduce_jit"),
        ({"HOME": "/h", "XDG_CACHE_HOME": ""}, "/h/.cache/allreduce_jit"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "xdg"}, "/h/.cache/allreduce_jit"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "~/xdg"}, "/h/.cache/allreduce_jit"),
        ({"HOME": "/h", "XDG_CACHE_HOME": "/xdg", "ALLREDUCE_JIT_CACHE_DIR": "/mine"}, "/mine"),
    ],
)
def test_cache_directory(env, directory):
    assert Settings.from_env(env).cache_dir == Path(directory)


@pytest.mark.parametrize("home", [None, "", "h", "."])
@pytest.mark.parametrize("xdg", [None, "", "xdg"])
def test_cache_directory_without_a_variable(monkeypatch, home, xdg):
    """The user database says where, or nobody does: no directory is made up in the current one."""
    env = {name: value for name, value in (("HOME", home), ("XDG_CACHE_HOME", xdg)) if value is not None}
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir="/users/me"))
    assert default_cache_dir(env) == Path("/users/me/.cache/allreduce_jit")
    for name in env.keys() | {"HOME"}:
        monkeypatch.delenv(name, raising=False)
    assert Settings.from_env({"ALLREDUCE_JIT_CACHE_DIR": "~/x"}).cache_dir == Path("/users/me/x")

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert default_cache_dir(env) is None and Settings.from_env(env).cache_dir is None
    assert Settings.from_env({**env, "ALLREDUCE_JIT_CACHE_DIR": "/mine"}).cache_dir == Path("/mine")
    for text in ("~", "~/x", "~nobody-of-this-name/x"):
        with pytest.raises(SettingsError, match="ALLREDUCE_JIT_CACHE_DIR='~.*home directory"):
            Settings.from_env({"ALLREDUCE_JIT_CACHE_DIR": text})
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: SimpleNamespace(pw_dir=""))
    assert default_cache_dir(env) is None


def test_without_a_cache_directory(monkeypatch, tmp_path, capsys):
    """In memory alone, with the variable to set; nothing is made in the current directory."""

    def unknown(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    for name in [n for n in os.environ if n.startswith(PREFIX)] + ["HOME", "XDG_CACHE_HOME"]:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    cache = KernelCache(Settings.from_env().cache_dir)
    cache.put("a" * 64, Artifact("one", "sm_90", 0, 0, b"cubin"))
    assert cache.get("a" * 64) is not None and "set ALLREDUCE_JIT_CACHE_DIR" in cache.problem and cache.refused() == []
    assert tuned.load(None, {"world_size": 2}) is None and tuned.entries(None) == tuned.refused(None) == []
    assert tuned.clear(None) == 0
    with pytest.raises(OSError, match="set ALLREDUCE_JIT_CACHE_DIR"):
        tuned.save(None, {"world_size": 2}, {})
    for action in ("path", "list", "clear"):
        assert cli.main(["cache", action]) == 0
        out = capsys.readouterr().out
        assert "set ALLREDUCE_JIT_CACHE_DIR" in out and "None" not in out
        assert cli.main(["cache", action, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["directory"] is None
    document = doctor.examine()
    assert document.cache.directory is None and any("set ALLREDUCE_JIT_CACHE_DIR" in p for p in document.problems)
    assert "None" not in [line for line in doctor.render(document).splitlines() if "kernel cache" in line][0]
    assert list(tmp_path.iterdir()) == []


def test_reads_the_environment_at_the_call(monkeypatch):
    for name in [n for n in os.environ if n.startswith(PREFIX)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv(V2_SWITCH, "off")
    assert Settings.from_env().use_v2 is False
    monkeypatch.setenv(V2_SWITCH, "on")
    assert Settings.from_env().use_v2 is True
