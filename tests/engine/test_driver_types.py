"""Stand-ins of the driver answer with the real thing's types, and nothing compares what has no ``==``."""

from __future__ import annotations

import ast
import ctypes
import importlib
import inspect
from pathlib import Path

import pytest
from helpers.fake_driver import FakeDriver, capture_info, documented, driver
from helpers.fake_launch import FakeLaunch

import allreduce_jit
from allreduce_jit.engine import driver as launches
from allreduce_jit.engine import memory, streams

SOURCES = sorted(Path(allreduce_jit.__file__).parent.rglob("*.py"))


def driver_calls() -> dict[str, set[str]]:
    """Every function of cuda.bindings.driver that the package calls by name -> the files that do."""
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and hasattr(driver, node.value):
                if node.value.startswith("cu") and inspect.isroutine(getattr(driver, node.value)):
                    found.setdefault(node.value, set()).add(path.name)
    return found


CALLS = driver_calls()


def test_all_calls_are_seen():
    assert len(CALLS) > 35
    assert {
        "cuStreamGetCaptureInfo",
        "cuMemAlloc",
        "cuIpcOpenMemHandle",
        "cuModuleLoadData",
        "cuDeviceGetUuid",
        "cuGraphCreate",
    } <= set(CALLS)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_the_stand_in_answers_with_the_types_of_the_bindings(name, monkeypatch):
    fake = FakeDriver(monkeypatch)
    kinds = documented(name)
    answer = fake.call(name)
    values = () if not kinds else (answer,) if len(kinds) == 1 else answer
    assert len(values) == len(kinds) and all(map(isinstance, values, kinds))
    if kinds:  # an answer of another type is a mistake in the test that gives it
        fake.answers[name] = lambda: tuple(object() for _ in kinds)
        with pytest.raises(AssertionError, match=name):
            fake.call(name)


def without_equality() -> set[str]:
    """Those of the package's calls that answer with values which compare by identity."""
    found = set()
    for name in CALLS:
        for kind in documented(name):
            handle = kind not in (int, bytes, list, driver.CUipcMemHandle, driver.CUuuid) and not hasattr(kind, "__members__")
            if handle and kind(5) != kind(5):
                found.add(name)
    return found


def test_which_answers_have_no_equality():
    """Each is turned into a plain value where it comes in: these by ``int()`` in the functions named here."""
    assert without_equality() <= {
        "cuStreamGetCaptureInfo",
        "cuMemAlloc",
        "cuMemHostAlloc",
        "cuIpcOpenMemHandle",
        "cuDeviceGet",
        "cuMemHostGetDevicePointer",
    }
    assert driver.cuuint64_t(5) != driver.cuuint64_t(5)  # what the package has to live with


def test_the_id_of_a_capture_is_a_plain_value(monkeypatch):
    FakeDriver(monkeypatch, streams, cuStreamGetCaptureInfo=lambda stream: capture_info(33 if stream else None))
    assert streams.capture_of(1) == streams.capture_of(2) == 33 and type(streams.capture_of(1)) is int
    assert streams.capture_of(0) is None


# -- handles of memory


def test_a_handle_of_memory_reaches_the_peer_whole(monkeypatch):
    """With the installed bindings' own struct, which has had a member for its bytes and has it no more."""
    sent, opened = bytes(range(64)), []

    def made_by_the_driver(_):
        handle = driver.CUipcMemHandle()
        ctypes.memmove(handle.getPtr(), sent, 64)
        return handle

    def note(handle, flags):
        opened.append((ctypes.string_at(handle.getPtr(), 64), flags))
        return driver.CUdeviceptr(0x7000)

    FakeDriver(monkeypatch, memory, cuIpcGetMemHandle=made_by_the_driver, cuIpcOpenMemHandle=note)
    staging = memory.StagingMemory(1 << 20, 0)
    assert staging.handle() == sent.hex()
    staging.connect([staging.handle(), bytes(reversed(sent)).hex()])
    assert opened == [(bytes(reversed(sent)), 1)] and staging.addresses[1] == 0x7000
    with pytest.raises(ValueError):
        staging.connect(["", "00" * 65])


# -- launches


PDL = int(driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)


def handed(monkeypatch, stream=77, **options):
    """What a real launch hands to the driver, and what the stand-in notes of the same arguments."""
    got = []

    def enter(config, kernel, pointers, extra):
        config, addresses = config._obj, [*pointers._obj]
        values = [ctypes.c_uint64.from_address(addresses[0]).value, ctypes.c_int32.from_address(addresses[1]).value]
        kinds = [config.attributes[i].id for i in range(config.count)]
        shape = [config.grid[0], config.block[0], config.shared_bytes, PDL in kinds, config.grid[1], config.stream or 0]
        got.append((len(addresses), values, shape))
        return 0

    monkeypatch.setattr(launches, "_entry", {"cuLaunchKernelEx": enter}.get)
    arguments = [ctypes.c_uint64(1 << 40), ctypes.c_int32(-3)]
    for cls in (launches.KernelLaunch, FakeLaunch):
        arguments[0].value = 1 << 40
        one = cls(1 << 46, arguments, 5, 64, **options)
        arguments[0].value += 16  # after it was made and before it is launched
        assert one(stream) is None
        assert (one.grid, one.pdl, one.arguments) == (5, options.get("pdl", False), arguments)
    (fired,) = FakeLaunch.fired
    assert [type(value) for value in fired.arguments] == [ctypes.c_uint64, ctypes.c_int32]
    arguments[0].value = 0  # later changes are none of what was launched
    shape = [fired.grid, fired.block, fired.shared_bytes, fired.pdl, fired.ranks, fired.stream]
    return got, [(len(fired.arguments), [value.value for value in fired.arguments], shape)]


@pytest.mark.parametrize("options", [{}, {"shared_bytes": 128}, {"pdl": True, "ranks": 2}, {"stream": 0}], ids=str)
def test_the_stand_in_of_a_launch_hands_over_what_the_real_one_does(monkeypatch, options):
    monkeypatch.setattr(FakeLaunch, "fired", [])
    real, fake = handed(monkeypatch, **options)
    assert real == fake and real[0][1] == [(1 << 40) + 16, -3]


def test_the_stand_in_of_a_launch_is_made_as_the_real_one():
    real, fake = inspect.signature(launches.KernelLaunch), inspect.signature(FakeLaunch)
    assert real.parameters == fake.parameters


# -- names


def names_used(module: str) -> set[str]:
    """Attributes that the package asks of ``driver`` or ``nvml``, by whichever name it holds them, and functions that it names in calls."""
    found = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            held = node.value if isinstance(node, ast.Attribute) else None
            if isinstance(held, ast.Name) and held.id == module and f"from cuda.bindings import {module}" in path.read_text():
                found.add(node.attr)
            elif isinstance(held, ast.Attribute) and held.attr == f"_{module}":
                found.add(node.attr)
            elif module == "driver" and isinstance(node, ast.Call) and getattr(node.func, "id", "") == "call":
                found |= {value.value for value in node.args[:1] if isinstance(value, ast.Constant)}
    return found


@pytest.mark.parametrize(("module", "least"), [("driver", 30), ("nvml", 8)])
def test_the_bindings_have_every_name_that_is_asked_of_them(module, least):
    bindings = importlib.import_module(f"cuda.bindings.{module}")
    used = names_used(module)
    assert len(used) >= least and {name for name in used if not hasattr(bindings, name)} == set()
