"""torch's private names: only one module uses them, and without any of them the answers are the same."""

from __future__ import annotations

import ast
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.wrapper import Wrapper
from torch._subclasses import FakeTensorMode

import allreduce_jit
from allreduce_jit import inputs, torch_private
from allreduce_jit.harness import ranks
from allreduce_jit.setup import groups

PACKAGE = Path(allreduce_jit.__file__).parent
CUDA_NAMES = {
    "current_device": (torch._C, "_cuda_getDevice"),
    "current_raw_stream": (torch._C, "_cuda_getCurrentRawStream"),
    "stream_is_capturing": (torch._C, "_cuda_isCurrentStreamCapturing"),
    "keep_gpu_busy": (torch.cuda, "_sleep"),
}


def resolved():
    """The module's names as they are chosen at import."""
    return SimpleNamespace(**runpy.run_path(torch_private.__file__))


# -- nobody else


def private_names(path):
    """(line, name) of every private name that a module takes from somewhere, or asks for by getattr."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.ImportFrom):
            names = [part for name in (node.module or "", *(alias.name for alias in node.names)) for part in name.split(".")]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "hasattr"):
            names = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
        yield from ((node.lineno, name) for name in names if name.startswith("_") and not name.endswith("__"))


def defined_names(path):
    """Names that a module makes: functions, classes, variables, attributes, arguments."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):  # import x as _x
            yield node.asname or ""


def test_one_module_uses_private_names_of_others():
    ours = {name for path in PACKAGE.rglob("*.py") if path.name != "torch_private.py" for name in defined_names(path)}
    ours |= {"_exit", "_SimpleCData", "_fields_"}  # of os and ctypes
    found = {(path.name, name) for path in PACKAGE.rglob("*.py") for _, name in private_names(path) if name not in ours}
    assert {file for file, _ in found} == {"torch_private.py"}
    taken = {name for _, name in found}
    assert {
        "_C",
        "_cuda_getDevice",
        "_world",
        "_new_process_group_helper",
        "_get_backend",
        "_symmetric_memory",
        "_sleep",
    } <= taken


# -- the current device and stream


@pytest.mark.parametrize("name", CUDA_NAMES)
def test_a_private_name_is_taken_where_it_is(monkeypatch, name):
    owner, private = CUDA_NAMES[name]
    monkeypatch.setattr(owner, private, lambda *arguments: 17, raising=False)
    assert getattr(resolved(), name) is getattr(owner, private)


def test_public_names_do_where_private_ones_are_missing(monkeypatch):
    for owner, private in CUDA_NAMES.values():
        monkeypatch.delattr(owner, private, raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device))
    names = resolved()
    assert (names.current_device(), names.current_raw_stream(2), names.stream_is_capturing()) == (3, 102, True)


@pytest.mark.gpus(1)
def test_private_and_public_names_agree_on_a_gpu(monkeypatch):
    private = resolved()
    for owner, name in CUDA_NAMES.values():
        monkeypatch.delattr(owner, name)
    public = resolved()
    monkeypatch.undo()
    last = torch.cuda.device_count() - 1
    x = torch.zeros(1, device=f"cuda:{last}")

    def answers(names):
        return names.current_device(), names.current_raw_stream(last), names.stream_is_capturing()

    with torch.cuda.device(last):
        assert answers(private) == answers(public) == (last, 0, False)
        with torch.cuda.stream(torch.cuda.Stream()) as stream:
            assert answers(private) == answers(public) and answers(public)[1] == torch.cuda.current_stream().cuda_stream != 0, (
                stream
            )
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.add_(1)
            assert answers(private) == answers(public) and answers(public)[2]
        for names in (private, public):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            names.keep_gpu_busy(2_000_000)
            end.record()
            end.synchronize()
            assert start.elapsed_time(end) > 0.5


# -- tensors


@pytest.mark.parametrize("change", ["missing", "yes to all", "yes to negated", "yes to conjugated", "fails", "other arguments"])
def test_a_tensor_check_that_is_not_what_it_was_is_not_used(monkeypatch, change):
    real = torch._C._dynamo.guards.TensorGuards

    class Other:
        def __init__(self, x, **options):
            if change == "other arguments":
                raise TypeError
            self.guard = real(x, **options)

        def check(self, x):
            if change == "fails":
                raise RuntimeError
            if change == "yes to negated" and x.is_neg():
                x = torch._neg_view(x)
            if change == "yes to conjugated" and x.is_conj():
                x = x.conj()
            return change == "yes to all" or self.guard.check(x)

    assert torch_private._tensor_check() is not None
    if change == "missing":
        monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    else:
        monkeypatch.setattr(torch._C._dynamo.guards, "TensorGuards", Other)
    assert torch_private._tensor_check() is None
    monkeypatch.setattr(inputs, "tensor_check", None)
    assert not inputs.tensor_guard(torch.ones(2))(torch.ones(2))


@pytest.fixture
def fresh_quick_empty():
    torch_private.quick_empty.cache_clear()
    yield
    torch_private.quick_empty.cache_clear()


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (4, 6), (1, 2, 3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.cfloat])
@pytest.mark.parametrize("change", [None, "missing", "other shape", "other strides", "other dtype", "fails"])
def test_new_tensors_are_like_the_input(fresh_quick_empty, monkeypatch, shape, dtype, change):
    guards = torch._C._dynamo.guards
    others = {
        "other shape": lambda shape, strides, dtype: torch.empty(3, 2, dtype=dtype),
        "other strides": lambda shape, strides, dtype: torch.empty(3, 2, dtype=dtype).t(),
        "other dtype": lambda shape, strides, dtype: torch.empty(shape),
        "fails": lambda shape, strides: None,
    }
    if change == "missing":
        monkeypatch.delattr(guards, "_empty_strided_cpu")
    elif change:
        monkeypatch.setattr(guards, "_empty_strided_cpu", others[change])
    assert torch_private.quick_empty("cpu") is (None if change else guards._empty_strided_cpu)
    x = torch.ones(shape, dtype=dtype)
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            made = inputs.maker(x)()
            assert (made.shape, made.dtype, made.device, made.stride()) == (x.shape, dtype, x.device, x.stride())
            assert not made.requires_grad and made.is_inference() == torch.is_inference_mode_enabled()


class Liar(torch.Tensor):
    """Has memory, and refuses every function."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(function)


def test_without_overrides_by_public_names(monkeypatch):
    freed = torch.ones(8)
    freed.untyped_storage().resize_(16)
    whole = torch.ones(8)
    tensors = [whole, torch.nn.Parameter(whole), whole.as_subclass(Liar), freed, freed.as_subclass(Liar), Wrapper(whole),
               torch._to_functional_tensor(whole.clone()), FakeTensorMode().from_tensor(whole)]  # fmt: skip

    def problems():
        with monkeypatch.context() as m:  # numel is asked before the context
            m.setattr(Liar, "numel", lambda self: 8)
            return [inputs.memory_problem(x) for x in tensors]

    assert torch_private.without_overrides is torch._C.DisableTorchFunctionSubclass
    before = problems()
    assert before[:3] == [None] * 3 and all(before[3:])
    monkeypatch.setattr(torch._C, "DisableTorchFunctionSubclass", torch.no_grad)  # which leaves overrides as they are
    assert torch_private._without_overrides() is torch_private._WithoutOverrides
    monkeypatch.delattr(torch._C, "DisableTorchFunctionSubclass")
    assert torch_private._without_overrides() is torch_private._WithoutOverrides
    monkeypatch.setattr(inputs, "without_overrides", torch_private._WithoutOverrides)
    assert problems() == before


# -- process groups


class Without:
    """A module in which a name is missing, or another thing."""

    def __init__(self, module, name, value=None):
        self.module, self.name, self.value = module, name, value

    def __getattr__(self, name):
        if name != self.name:
            return getattr(self.module, name)
        if self.value is None:
            raise AttributeError(name)
        return self.value


def fewer_arguments(size, rank, ranks, backend, store):
    raise NotImplementedError


CHANGES = [  # of torch.distributed.distributed_c10d: name, what is there instead (None: nothing)
    ("nothing", None),
    ("_new_process_group_helper", None),
    ("_new_process_group_helper", fewer_arguments),
    ("_set_pg_timeout", None),
    ("_world", None),
    ("_get_default_store", None),
]


def siblings(place):
    """For each change: sums in the gloo group of another, whether it is kept, and known while it lives."""
    found = []
    for change in CHANGES:
        group, made, sums = dist.new_group(list(range(place.world_size))), [], []
        with pytest.MonkeyPatch.context() as m:
            m.setattr(groups, "has_backend", lambda group, what: False)  # as an NCCL group has no "cpu:"
            m.setattr(torch_private, "dist", Without(dist, "distributed_c10d", Without(dist.distributed_c10d, *change)))
            for _ in range(2):
                with allreduce_jit.init(group, device="cpu") as comm:
                    made.append(comm.group)
                    sums.append(comm.all_reduce(torch.tensor([place.rank + 1.0])).item())
        living = groups._alive(made[0])
        dist.destroy_process_group(made[0])
        found.append((sums, made[0] is made[1], made[0] is group, living, groups._alive(made[0])))
    return found


def test_siblings_by_private_and_public_names():
    assert ranks.run(siblings, cpu=2, deadline=60).value == [([3.0, 3.0], True, False, True, False)] * len(CHANGES)


# -- for measurements


def test_what_torch_does_not_tell_of_backends_and_symmetric_memory(monkeypatch):
    assert torch_private.backend_of(SimpleNamespace(), torch.device("cpu")) is None
    assert torch_private.backend_of(SimpleNamespace(_get_backend=lambda device: device), torch.device("cpu")) == torch.device(
        "cpu"
    )
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", SimpleNamespace(empty=1))
    monkeypatch.delattr(dist, "_symmetric_memory", raising=False)
    assert torch_private.symmetric_memory() is None
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", None)
    assert torch_private.symmetric_memory() is None


def test_a_gpu_is_kept_busy_by_fills(monkeypatch):
    done = []
    waste = SimpleNamespace(fill_=done.append)
    monkeypatch.setattr(torch, "empty", lambda numel, dtype, device: waste if device == "cuda" else None)
    for cycles, fills in ((0, 1), (1_000, 1), (30_000_000, 501)):
        done.clear()
        torch_private._fill_for(cycles)
        assert len(done) == fills


# -- calls of others' programs


def test_calls_are_known_here():
    assert torch_private.knows_calls() is None and torch_private.functional_collective("all_reduce_").name().endswith(
        "all_reduce_"
    )


@pytest.mark.parametrize(
    "owner, name, instead",
    [
        (dist.distributed_c10d, "_world", None),
        (dist.distributed_c10d, "_world", SimpleNamespace(default_pg=None)),
        (torch_private, "function_modes", lambda: 0),
        (torch_private, "operator_modes", lambda: None),
    ],
)
def test_calls_that_are_told_in_another_way(monkeypatch, owner, name, instead):
    monkeypatch.setattr(owner, name, instead)
    assert torch_private.knows_calls()
