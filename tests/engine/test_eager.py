"""Eager calls in C, with the driver's functions stood in for by others of the same C types; each promise has a planted bug."""

from __future__ import annotations

import ctypes
import importlib.machinery
import importlib.util
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import threading
import weakref
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("cuda.bindings.driver")

from allreduce_jit.abi import Args
from allreduce_jit.engine import driver, eager
from allreduce_jit.engine.base import KernelEngine
from allreduce_jit.engine.driver import KernelLaunch
from allreduce_jit.engine.prepared import PreparedCall, binding
from allreduce_jit.errors import AllReduceError
from allreduce_jit.inputs import maker, tensor_guard
from allreduce_jit.policy.operation import all_reduce
from allreduce_jit.settings import Settings

SOURCE = pathlib.Path(eager.__file__).with_name("eager.c")
LAUNCH = ctypes.CFUNCTYPE(ctypes.c_int, *[ctypes.c_void_p] * 4)
CAPTURING = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.POINTER(ctypes.c_int))
STREAM = 0x7F0012345670
needs_extension = pytest.mark.skipif(not eager.BUILT, reason="needs the C extension, which takes a C compiler to build")


class Driver:
    """What of the driver such a call uses, as C functions; ``launched``: (kernel, stream, input, output) of each launch."""

    def __init__(self):
        self.launched, self.asked = [], []
        self.error = self.status = self.status_error = 0
        self._functions = {"cuLaunchKernelEx": LAUNCH(self._launch), "cuStreamIsCapturing": CAPTURING(self._capturing)}
        self.seen = None  # called in a launch

    def entry(self, name):
        return self._functions[name]

    def _launch(self, config, kernel, arguments, extra):
        stream = driver._Config.from_address(config).stream
        args = Args.from_address(ctypes.c_void_p.from_address(arguments).value)
        self.launched.append((kernel, stream or 0, args.input, args.output))
        if self.seen:
            self.seen()
        return self.error

    def _capturing(self, stream, status):
        self.asked.append(stream)
        status[0] = self.status
        return self.status_error


class Lock:
    """An RLock that tells how often it is held."""

    def __init__(self):
        self._lock, self.depth = threading.RLock(), 0

    def acquire(self):
        self._lock.acquire()
        self.depth += 1
        return True

    def release(self):
        self.depth -= 1
        self._lock.release()


class Engine(SimpleNamespace):
    """What of an engine such a call looks at; weak references to it are possible."""


class World:
    """An engine of one call of ``like``, and that call in C."""

    def __init__(self, monkeypatch, like, module=None):
        self.driver, self.device, self.stream = Driver(), 0, 0
        monkeypatch.setattr(driver, "_entry", self.driver.entry)
        monkeypatch.setattr(driver, "describe", lambda error: f"{error!r}")
        monkeypatch.setattr(eager, "current_device", lambda: self.device)
        monkeypatch.setattr(eager, "current_raw_stream", lambda device: self.stream if device == 0 else -1)
        if module is not None:
            monkeypatch.setattr(eager, "_eager", module)
        self.engine = Engine(
            config=SimpleNamespace(settings=Settings(), rank=0),
            state=SimpleNamespace(words=(ctypes.c_uint32 * 10)()),
            _raw_device=0,
            _streams=SimpleNamespace(last=0, priority=0),
            _lock=Lock(),
            _stopped=False,
        )
        spec = all_reduce(str(like.dtype).removeprefix("torch."), like.numel())
        forms = []
        for kernel in (0x1000, 0x2000):  # of aligned tensors, of others
            args = Args()
            pointers = [(ctypes.c_uint64.from_buffer(args, getattr(Args, name).offset), 0) for name in ("input", "output")]
            forms.append([binding(KernelLaunch(kernel, [args], 2, 64, pdl=True), pointers)])
        self.call = eager.eager_call(PreparedCall(self.engine, spec, *forms), tensor_guard(like), maker(like))

    def declines(self, x, out=None):
        before = len(self.driver.launched)
        return self.call(x, out) is None and len(self.driver.launched) == before and self.engine._lock.depth == 0


def tensor(n=64, dtype=torch.bfloat16):
    return torch.arange(n).to(dtype)


# -- what is promised: each takes a monkeypatch and a module, and raises AssertionError


def launches(monkeypatch, module):
    """Input and output reach the kernel, of the form for their alignment; what comes back is what was asked for."""
    x, out, odd = tensor(), tensor(), torch.empty(65, dtype=torch.bfloat16)[1:]
    world = World(monkeypatch, x, module)
    assert world.call(x, out) is out and world.driver.launched[-1] == (0x1000, 0, x.data_ptr(), out.data_ptr())
    assert world.call(x, x) is x and world.driver.launched[-1] == (0x1000, 0, x.data_ptr(), x.data_ptr())
    new = world.call(x, None)
    assert new is not x and (new.shape, new.dtype, new.stride()) == (x.shape, x.dtype, x.stride())
    assert world.driver.launched[-1] == (0x1000, 0, x.data_ptr(), new.data_ptr())
    assert odd.data_ptr() % 16
    assert world.call(odd, out) is out and world.driver.launched[-1] == (0x2000, 0, odd.data_ptr(), out.data_ptr())
    assert world.call(x, odd) is odd and world.driver.launched[-1] == (0x2000, 0, x.data_ptr(), odd.data_ptr())
    assert world.engine._lock.depth == 0 and not world.driver.asked  # the default stream is never captured


def declines_other_tensors(monkeypatch, module):
    x = tensor()
    world = World(monkeypatch, x, module)
    freed, sparse = tensor(), tensor(64, torch.float32).to_sparse()
    freed.untyped_storage().resize_(0)
    nested = torch.nested.nested_tensor([tensor(4), tensor(2)], layout=torch.jagged)
    others = (
        tensor(32),
        tensor(64, torch.float16),
        tensor(128)[::2],
        torch.nn.Parameter(tensor()),
        sparse,
        nested,
        freed,
        3,
        None,
    )
    # Types alone: a message that shows a tensor without memory would read it.
    taken = [type(other) for other in others if not world.declines(other)]
    taken += [type(out) for out in others if out is not None and not world.declines(x, out)]
    assert not taken
    assert world.declines(x.requires_grad_())


def declines_overlaps(monkeypatch, module):
    memory = torch.zeros(256, dtype=torch.bfloat16)
    x, half_over, behind, same = memory[64:128], memory[96:160], memory[128:192], memory[64:128]
    world = World(monkeypatch, x, module)
    assert world.declines(x, half_over) and world.declines(half_over, x)
    assert world.declines(x, same)  # another tensor object: what it is, Python tells
    assert world.call(x, behind) is behind


def declines_what_another_call_did(monkeypatch, module):
    """A failed call, a stopped engine, another stream or device, a capture."""
    x, out = tensor(), tensor()
    world = World(monkeypatch, x, module)
    world.engine.state.words[0] = 1
    assert world.declines(x, out)
    world.engine.state.words[0], world.engine._stopped = 0, True
    assert world.declines(x, out)
    world.engine._stopped, world.device = False, 1
    assert world.declines(x, out)
    world.device, world.stream = 0, STREAM
    assert world.declines(x, out)
    world.engine._streams.last = None
    assert world.declines(x, out)
    world.engine._streams.last = STREAM
    assert world.call(x, out) is out and world.driver.launched[-1][1] == STREAM and world.driver.asked == [STREAM]
    world.driver.status = 1
    assert world.declines(x, out)
    world.driver.status, world.driver.status_error = 0, 900
    assert world.declines(x, out)
    world.driver.status_error = 0
    assert world.call(x, out) is out
    world.stream = world.engine._streams.last = 0
    assert world.call(x, out) is out and world.driver.launched[-1][1] == 0  # and not that of the launch before


def locked(monkeypatch, module):
    """The launch is under the engine's lock, which is free again after every outcome."""
    x, depths = tensor(), []
    world = World(monkeypatch, x, module)
    world.driver.seen = lambda: depths.append(world.engine._lock.depth)
    world.call(x, None)
    world.driver.error = 719
    with pytest.raises(AllReduceError, match="kernel launch: .*CUDA_ERROR_LAUNCH_FAILED"):
        world.call(x, None)
    assert depths == [1, 1] and world.engine._lock.depth == 0
    world.driver.error = 0
    assert world.call(x, x) is x
    del world.engine._streams.last
    with pytest.raises(AttributeError):
        world.call(x, x)
    assert world.engine._lock.depth == 0


def keeps_nothing(monkeypatch, module):
    x, out = tensor(), tensor()
    world = World(monkeypatch, x, module)
    for stopped, *given in (
        (0, x, out),
        (0, x, x),
        (0, x, None),
        (0, out, tensor(8)),
        (0, tensor(8), None),
        (1, x, out),
        (1, x, None),
    ):
        world.engine._stopped = bool(stopped)
        world.call(*given)  # names that are made once
        before = sys.getrefcount(x), sys.getrefcount(out), sys.getrefcount(None)
        for _ in range(1000):
            world.call(*given)
        after = sys.getrefcount(x), sys.getrefcount(out), sys.getrefcount(None)
        assert before[:2] == after[:2] and abs(after[2] - before[2]) < 500
    world.engine._stopped = False
    made = weakref.ref(world.call(x, None))
    assert made() is None
    engine = weakref.ref(world.engine)
    del world.call, world.engine
    assert engine() is None


def others_run(monkeypatch, module):
    """While the driver works, or waits, other threads run: one of them may be what it waits for."""
    library = ctypes.CDLL(None)
    semaphore, until = ctypes.create_string_buffer(64), (ctypes.c_long * 2)()  # sem_t, timespec
    assert library.sem_init(semaphore, 0, 0) == 0
    x = tensor()
    world = World(monkeypatch, x, module)
    library.clock_gettime(0, until)
    until[0] += 3  # seconds from now
    address = ctypes.cast(library.sem_timedwait, ctypes.c_void_p).value  # (config, kernel): a semaphore, and until when
    real = eager._eager.make

    def waiting(*parts):
        where = (*parts[18][:3], ctypes.addressof(semaphore), ctypes.addressof(until), parts[18][5])
        return real(*parts[:16], address, parts[17], where, where, parts[20])

    monkeypatch.setattr(eager, "_eager", SimpleNamespace(make=waiting))
    forms = ([one] for one in _bindings())
    call = eager.eager_call(PreparedCall(world.engine, all_reduce("bfloat16", 64), *forms), tensor_guard(x), maker(x))
    thread = threading.Timer(0.05, library.sem_post, [semaphore])
    thread.start()
    try:
        assert call(x, x) is x
    except ValueError as error:  # -1, which is no error of the driver's
        raise AssertionError(f"no other thread ran: {error}") from error
    finally:
        thread.join()


def _bindings():
    for kernel in (0x1000, 0x2000):
        args = Args()
        pointers = [(ctypes.c_uint64.from_buffer(args, getattr(Args, name).offset), 0) for name in ("input", "output")]
        yield binding(KernelLaunch(kernel, [args], 2, 64), pointers)


PROMISES = [
    launches,
    declines_other_tensors,
    declines_overlaps,
    declines_what_another_call_did,
    locked,
    keeps_nothing,
    others_run,
]


@needs_extension
@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise.__name__)
def test_promise(monkeypatch, promise):
    promise(monkeypatch, None)


def test_an_engine_that_is_closed_is_stopped_before_its_memory_goes():
    engine = KernelEngine.__new__(KernelEngine)
    seen, state = [], SimpleNamespace(close=lambda: seen.append(engine._stopped))
    engine._stopped, engine._graph_cache, engine.state = False, SimpleNamespace(close=lambda: None), state
    engine.close()
    assert seen == [True]


@needs_extension
def test_arguments_are_checked():
    with pytest.raises(TypeError):
        eager._eager.make(1, 2, 3)


@needs_extension
def test_wants_two_arguments(monkeypatch):
    world = World(monkeypatch, tensor())
    for given in ((), (tensor(),), (tensor(), None, None)):
        with pytest.raises(TypeError, match="two arguments"):
            world.call(*given)


def test_what_stays_in_python(monkeypatch):
    x = tensor()
    world = World(monkeypatch, x, SimpleNamespace(make=lambda *parts: "in C"))
    assert world.call == "in C"
    one, other = _bindings()
    spec = all_reduce("bfloat16", 64)
    for forms in (([one, one], [other, other]), ([(*one[:2], 8, *one[3:])], [other]), ([one], [(*other[:5], ((other[1], 0),))])):
        assert eager.eager_call(PreparedCall(world.engine, spec, *forms), tensor_guard(x), maker(x)) is None


PLANTED = {
    "the lock is kept": ("PyObject *left = PyObject_CallNoArgs(c->release);", "PyObject *left = PyLong_FromLong(0);", locked),
    "no lock": ("PyObject *held = PyObject_CallNoArgs(c->acquire);", "PyObject *held = PyLong_FromLong(0); c->engine;", locked),
    "a failed call is not seen": ("if (*c->stop) return 0;", "", declines_what_another_call_did),
    "a stopped engine launches": ("PyObject_GetAttr(c->engine, stopped), Py_False)) != 1)", "PyObject_GetAttr(c->engine, stopped), Py_False)) < 0)", declines_what_another_call_did),
    "streams are not ordered": ("if (known != stream) return 0;", "", declines_what_another_call_did),
    "captures are not asked for": ("if (stream && (c->capturing((void *)stream, &status) || status)) return 0;", "", declines_what_another_call_did),
    "the stream of the launch before": ("*l->stream = (void *)stream;", "if (stream) *l->stream = (void *)stream;", declines_what_another_call_did),
    "any device": ("int yes = PyObject_RichCompareBool(device, c->device, Py_EQ);", "int yes = 1;", declines_what_another_call_did),
    "overlaps are not seen": ("apart < c->nbytes", "apart < 1", declines_overlaps),
    "memory that is gone": ("input < c->no_address || output < c->no_address || ", "", declines_other_tensors),
    "out is not looked at": ("if (yes == 1 && out != Py_None && out != x) yes = fits(c, out);", "", declines_other_tensors),
    "subclasses are taken": ("if ((PyObject *)Py_TYPE(x) != c->tensor) return 0;", "", declines_other_tensors),
    "one form for all addresses": ("(input | output) % 16", "input % 16", launches),
    "the GIL is kept": ("Py_BEGIN_ALLOW_THREADS", "{", others_run),
    "the output leaks": ("    Py_DECREF(out);\n    if (PyErr", "    if (PyErr", keeps_nothing),
    "the engine leaks": ("Py_DECREF(c->held);", "", keeps_nothing),
}  # fmt: skip


@pytest.mark.skipif(
    shutil.which("cc") is None or not pathlib.Path(sysconfig.get_path("include"), "Python.h").exists(),
    reason="needs a C compiler and Python.h",
)
@pytest.mark.parametrize("bug", PLANTED)
def test_planted_bug(monkeypatch, tmp_path, bug):
    text, mistake, promise = PLANTED[bug]
    source = SOURCE.read_text()
    assert source.count(text) == 1
    source = source.replace(text, mistake)
    if "ALLOW" in text:
        source = source.replace("Py_END_ALLOW_THREADS", "}")
    module = built(source, tmp_path)
    with pytest.raises((AssertionError, AttributeError, RuntimeError)):  # not kept, or what came of the mistake
        promise(monkeypatch, module)


def built(source, folder):
    """The extension of ``source``, loaded."""
    (folder / "eager.c").write_text(source)
    file = folder / f"_eager_{abs(hash(source))}.so"
    include = sysconfig.get_path("include")
    subprocess.run(["cc", "-O1", "-shared", "-fPIC", "-I", include, folder / "eager.c", "-o", file], check=True)
    loader = importlib.machinery.ExtensionFileLoader("_eager", str(file))
    spec = importlib.util.spec_from_file_location("_eager", file, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module
