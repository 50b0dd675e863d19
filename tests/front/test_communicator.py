"""Communicator and init on CPU ranks: values of every kind of tensor, every bad input, and what they say."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import threading
import time
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.fake_engines import LIMIT, SWITCHES, FakeEngine, fake_gpus, raised, suite
from helpers.wrapper import Wrapper
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

import allreduce_jit
from allreduce_jit import communicator, describe, inputs, routes
from allreduce_jit.communicator import Communicator
from allreduce_jit.describe import stretches
from allreduce_jit.engine import reference
from allreduce_jit.errors import ClosedError, InputError, InputTypeError, NotDeterministicError, SettingsError
from allreduce_jit.harness import ranks
from allreduce_jit.inputs import as_device, tensor_guard
from allreduce_jit.policy import nvlink, p2p
from allreduce_jit.policy.operation import ITEMSIZE, all_reduce
from allreduce_jit.policy.tables import NVLINK_TABLES
from allreduce_jit.policy.verdict import Path
from allreduce_jit.setup import groups

CPU = torch.device("cpu")
KERNEL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*KERNEL_DTYPES, torch.float64, torch.int64, torch.int32, torch.int8, torch.uint8, torch.complex64, torch.complex128]
REFUSED_BY_GLOO = [torch.int16, torch.float8_e4m3fn]


# -- on every rank


def tensor(shape, dtype, rank, seed=0):
    """Small whole numbers: every sum is exact in every dtype and order."""
    dice = torch.Generator().manual_seed(1000 * seed + rank)
    return torch.randint(0, 7, shape, generator=dice).to(dtype)


def views(rank, dtype):
    """Tensors of every layout."""
    whole = tensor((6, 8), dtype, rank)
    yield whole
    yield whole.t()
    yield whole[::2, 1::3]
    yield whole[1:, 3:]
    yield whole[2, 3]
    yield whole[:, :1].expand(6, 5)
    yield whole[0, 0].expand(2, 3)
    yield whole[:0]
    yield whole.view(2, 3, 8).permute(2, 0, 1)
    yield tensor((2, 3, 4, 5), dtype, rank).to(memory_format=torch.channels_last)
    yield tensor((7001,), dtype, rank)[1:]


def same(a, b):
    return a.dtype is b.dtype and a.shape == b.shape and torch.equal(a, b)


def check_values(comm, dtypes):
    n = comm.world_size
    for dtype in dtypes:
        everyone = [list(views(rank, dtype)) for rank in range(n)]
        for number, x in enumerate(everyone[comm.rank]):
            total = sum(everyone[rank][number].to(torch.complex128) for rank in range(n))
            want = (total if dtype.is_complex else total.real).to(dtype)
            about = f"rank {comm.rank}: {dtype} view {number}"
            before = x.clone()
            found = comm.all_reduce(x)
            assert same(found, want) and found.is_contiguous(), about
            assert found.data_ptr() != x.data_ptr() or x.numel() == 0, about
            out = torch.full_like(want, 3)
            assert comm.all_reduce(x, out=out) is out and same(out, want), about
            strided = torch.ones((*want.shape, 2), dtype=dtype)
            assert comm.all_reduce(x, strided[..., 1]) is not None
            assert same(strided[..., 1], want) and bool((strided[..., 0] == 1).all()), about
            assert same(x, before), about
            for inner in (before.clone(memory_format=torch.contiguous_format), strided[..., 0].copy_(before)):
                assert comm.all_reduce(inner, out=inner) is inner and same(inner, want), about
            alias = before.clone()
            assert same(comm.all_reduce(alias, out=alias.view(alias.shape)), want) and same(alias, want), about


def values(place):
    with allreduce_jit.init(device="cpu") as comm:
        assert (comm.rank, comm.world_size, comm.device, comm.path) == (place.rank, place.world_size, CPU, Path.TORCH)
        check_values(comm, DTYPES)
        assert comm.all_reduce(torch.tensor([place.rank == 1, False])).tolist() == [True, False]  # as torch has it
        z = tensor((5,), torch.complex64, place.rank) * 1j
        want = sum(tensor((5,), torch.complex64, rank) for rank in range(place.world_size))
        assert same(comm.all_reduce(z.conj()), -1j * want)
        assert same(comm.all_reduce(z.conj().imag), -want.real)
        assert same(comm.all_reduce(z[:1].conj().imag), -want.real[:1])  # contiguous, but its memory is negated
        assert comm.all_reduce(torch.nn.Parameter(torch.ones(3)).data).tolist() == [place.world_size] * 3
        for dtype in REFUSED_BY_GLOO:  # torch's own words, on all ranks alike, and no harm done
            raised(RuntimeError, lambda dtype=dtype: comm.all_reduce(torch.ones(3).to(dtype)))
        check_values(comm, [torch.float32])


def all_kinds_of_groups(place):
    """Default, explicit and sub-groups, and those who are in none."""
    n, total = place.world_size, sum(range(place.world_size))
    pair = dist.new_group([0, 2])
    me = torch.tensor([float(place.rank)])
    for group in (None, dist.group.WORLD, place.control):
        with allreduce_jit.init(group) as comm:
            assert comm.group is (group or dist.group.WORLD) and comm.all_reduce(me).item() == total
    if place.rank == 1:
        raised(InputError, lambda: allreduce_jit.init(pair), "not a member", "rank 1", "members alone")
    else:
        with allreduce_jit.init(pair) as comm:
            assert (comm.rank, comm.world_size) == (place.rank // 2, 2) and comm.all_reduce(me).item() == 2
    alone = [dist.new_group([rank]) for rank in range(n)][place.rank]
    with allreduce_jit.init(alone, deterministic=True) as comm:
        assert comm.all_reduce(me).item() == place.rank and comm.describe().reasons[0].code == "world-size-1"
    before = len(dist.distributed_c10d._world.pg_map)  # not the same on all ranks: rank 1 has no part in `pair`
    with mock.patch.object(groups, "has_backend", lambda group, what: False):  # as an NCCL group has no "cpu:"
        for _ in range(3):
            comms = [allreduce_jit.init(group) for group in (None, place.control, *[pair] * (place.rank != 1))]
            for comm, want in zip(comms, (total, total, 2), strict=False):
                assert dist.get_backend(comm.group) == "gloo" and comm.all_reduce(me).item() == want
            assert len({comm.group for comm in comms}) == len(comms)
            for comm in comms:
                comm.close()
            assert len(dist.distributed_c10d._world.pg_map) == before + len(comms)  # made once, then kept
    if place.rank != 1:
        comm = allreduce_jit.init(pair)
        dist.destroy_process_group(pair)
        raised(InputError, lambda: allreduce_jit.init(pair), "destroyed")
        comm.close()
        comm.close()


def bad_input_on_one_rank(place):
    """An error there, nothing anywhere else, and all go on together."""
    with allreduce_jit.init(device="cpu") as comm:
        calls = list(bad_calls(comm))
        for number in range(len(calls)):
            if number % place.world_size == place.rank:
                kind, call, *words = calls[number]
                raised(kind, call, f"rank {place.rank}", *words)
        check_values(comm, [torch.float32])


def bad_calls(comm):
    """(exception, call, words of its message) for everything that all_reduce refuses."""
    x, ring = torch.ones(8), torch.arange(32.0)
    for thing in ([1.0], None, 3, "x", torch.float32):
        yield InputTypeError, lambda thing=thing: comm.all_reduce(thing), type(thing).__name__, "torch.Tensor"
    yield InputError, lambda: comm.all_reduce(torch.ones(8, device="meta")), "meta", "cpu", "move the tensor"
    leaf = torch.ones(8, requires_grad=True)
    for needs in (leaf, leaf * 2, torch.nn.Parameter(torch.ones(2, 2)).t()):
        yield InputError, lambda needs=needs: comm.all_reduce(needs), "requires grad", "detach", "no_grad"
    yield InputError, lambda: comm.all_reduce(x, out=torch.ones(8, requires_grad=True)), "out requires grad", "detach"
    sparse = torch.eye(3).to_sparse()
    yield InputError, lambda: comm.all_reduce(sparse), "layout", "to_dense"
    yield InputError, lambda: comm.all_reduce(torch.eye(3), out=sparse), "out is", "agree"
    for out in (x[:4], torch.ones(8, 1), torch.ones(0), x.double(), x.half(), torch.ones(8, device="meta")):
        yield InputError, lambda out=out: comm.all_reduce(x, out=out), "out is", str(out.dtype), "must agree"
    yield InputTypeError, lambda: comm.all_reduce(x, out=[0.0] * 8), "out must be a torch.Tensor", "list"
    for what, bad in without_memory(freed=comm._engine is None):
        yield InputError, lambda bad=bad: comm.all_reduce(bad), what
        yield InputError, lambda bad=bad: comm.all_reduce(x, out=bad), "out is", what
    wide = torch.zeros(1).expand(8)
    for given_x in (x, wide):
        yield InputError, lambda given_x=given_x: comm.all_reduce(given_x, out=wide), "expanded", "clone"
    for first, second in ((0, 1), (1, 0), (0, 7), (5, 3)):
        overlap = (ring[first : first + 8], ring[second : second + 8])
        yield InputError, lambda a=overlap: comm.all_reduce(*a), "overlaps", "out=x", "separate memory"


class Distributed(Wrapper):
    def to_local(self):
        raise NotImplementedError


class Overridden(torch.Tensor):
    """A tensor with memory of its own, whatever its class makes of functions."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


def without_memory(freed):
    """(words of the error, tensor of 8 elements) for all that look like a strided tensor and have no data, or not all of it."""
    whole = torch.ones(8)
    yield "a Wrapper without storage of its own", Wrapper(whole)
    yield "to_local()", Distributed(whole)
    yield "a Tensor without storage of its own", torch._to_functional_tensor(whole.clone())
    yield "a FakeTensor whose storage is on meta", FakeTensorMode().from_tensor(whole)
    for numel, kept, start in ((8, 0, 0), (12, 0, 4), (8, 16, 0)) if freed else ():  # with kernels: see test_engine
        cut = torch.ones(numel)[start:]
        cut.untyped_storage().resize_(kept)
        yield f"the storage has {kept} bytes and {4 * numel} are needed", cut


def tensors_of_other_classes(place):
    """They are taken if they have memory, whatever their class."""
    n = place.world_size
    with allreduce_jit.init(device="cpu") as comm:
        for kind in (torch.nn.Parameter, torch.nn.Buffer, Overridden):
            x = torch.ones(8)
            x = x.as_subclass(kind) if kind is Overridden else kind(x)
            with torch.no_grad():
                assert comm.all_reduce(x).tolist() == [n] * 8 and comm.all_reduce(x, out=x) is x and x.tolist() == [n] * 8


def what_may_look_bad_and_is_not(place):
    n = place.world_size
    with allreduce_jit.init(device="cpu") as comm:
        ring = torch.arange(32.0)
        for x, out in (
            (ring[:8], ring[8:16]),
            (ring[8:16], ring[:8]),
            (ring[::2], ring[1::2]),  # interleaved: no element in common
            (ring.view(4, 8)[:, :4], ring.view(4, 8)[:, 4:]),
            (ring[:16:2], ring[1:9]),  # these do meet, but the sum passes through a copy
            (ring[:8].view(1, 8), ring[:8].as_strided((1, 8), (1, 1))),  # the same memory by other strides
        ):
            ring.copy_(torch.arange(32.0))
            want = x * n
            assert same(comm.all_reduce(x, out=out), want)
        square = torch.arange(9.0).view(3, 3)
        want = square.t() * n
        assert same(comm.all_reduce(square.t(), out=square), want)
        leaf = torch.ones(4, requires_grad=True)
        with torch.no_grad():
            found = comm.all_reduce(leaf)
            assert found.tolist() == [n] * 4 and not found.requires_grad and leaf.tolist() == [1.0] * 4
            comm.all_reduce(leaf, out=leaf)
        assert leaf.tolist() == [n] * 4
        assert same(comm.all_reduce(leaf.detach()), torch.full((4,), float(n * n)))
        with torch.inference_mode():
            x = torch.arange(6.0)
            assert same(comm.all_reduce(x), x * n) and same(comm.all_reduce(x.view(2, 3).t()), x.view(2, 3).t() * n)
            with allreduce_jit.init(device="cpu") as another:  # its own exchange runs in that mode as well
                comm.warmup()
                assert same(another.all_reduce(x.clone(), out=x.clone()), torch.arange(6.0) * n)
        assert same(comm.all_reduce(x), x * n)
        with torch.device("meta"):
            assert same(
                comm.all_reduce(torch.ones(2, device="cpu").as_strided((2,), (0,))),
                torch.tensor([n, n], dtype=torch.float32, device="cpu"),
            )
        with comm.capture(), comm.capture():
            comm.warmup()
        comm.check()


def deterministic(place):
    for _ in range(2):
        found = raised(
            NotDeterministicError,
            lambda: allreduce_jit.init(device="cpu", deterministic=True),
            f"rank {place.rank}", "rank 0 has its tensors on the CPU", "without deterministic=True",
        )  # fmt: skip
        assert isinstance(found, allreduce_jit.AllReduceError)
    raised(InputError, lambda: allreduce_jit.init(deterministic=place.rank == 1), "rank 1", "'deterministic': True", "alike")
    with fake_gpus(place.control) as built, allreduce_jit.init(place.control, "cpu", deterministic=True) as comm:
        assert comm.path is Path.V2 and built[0].config.deterministic
        for dtype in (torch.int64, torch.float64, torch.bool):
            for _ in range(2):
                raised(NotDeterministicError, lambda dtype=dtype: comm.all_reduce(torch.ones(2, dtype=dtype)),
                       f"rank {place.rank}", str(dtype), "fp32, fp16 or bf16")  # fmt: skip
            assert comm.all_reduce(torch.ones(0, dtype=dtype)).numel() == 0
        check_values(comm, KERNEL_DTYPES[:1])


def bad_environment_on_one_rank(place):
    for name, words in (("ALLREDUCE_JIT_STAGING_MB", ["whole MiB"]), ("ALLREDUCE_JIT_FOO", ["unknown", "ALLREDUCE_JIT_PATH"])):
        if place.rank == 2:
            os.environ[name] = "many"
        raised(SettingsError, allreduce_jit.init, "rank 2", name, *words)
        os.environ.pop(name, None)
    with allreduce_jit.init() as comm:
        check_values(comm, [torch.float32])


def with_kernels(place):
    """What goes to the engine and what does not, and that only tensors it can take as they are reach it."""
    with fake_gpus(place.control) as built, allreduce_jit.init(place.control, "cpu") as comm:
        (engine,) = built
        assert comm.path is Path.V2 and comm.reason == "NVLink and peer access between all 3 GPUs"
        check_values(comm, [*KERNEL_DTYPES, torch.int64])
        for seed in range(20):
            dtype, numel = random.Random(seed).choice(KERNEL_DTYPES), random.Random(seed).randint(1, 3000)
            for kind in (reference.RANDOM, reference.SPECIALS):
                x = reference.values(seed, comm.rank, numel, dtype, kind=kind)
                want = reference.expected(seed, comm.world_size, numel, dtype, kind=kind)
                assert not reference.compare(comm.all_reduce(x), want).wrong
        sums = engine.sums
        comm.all_reduce(torch.ones(3, dtype=torch.int64))
        comm.all_reduce(torch.ones(0))
        assert engine.sums == sums
        negated = torch.tensor([1 + 2j]).conj().imag
        assert negated.is_contiguous() and comm.all_reduce(negated).item() == -2.0 * comm.world_size
        assert comm.all_reduce(negated, out=negated) is negated and negated.item() == -2.0 * comm.world_size
        assert engine.sums == sums + 2
        for kind, call, *words in bad_calls(comm):
            raised(kind, call, f"rank {place.rank}", *words)
        assert engine.sums == sums + 2
        comm.check()
        described = comm.describe().to_dict()
        assert json.loads(json.dumps(described)) == described
        own = {"rank": 0, "timings": 0, "watched": 0}  # what differs between ranks
        assert place.gather({**described, **own}) == [{**described, **own}] * 3
        assert described["path"] == "v2" and described["deterministic"] is True and described["backend"] == "nccl"
        assert (described["staging_bytes"], described["device_bytes"]) == (1 << 20, (1 << 20) + (1 << 10))
        assert described["kernels_of"] == {"backend": "nvlink", "memory": "device"}
        assert described["kernels"] == {"compiled": 2, "cached": 1}
        assert set(described["timings"]) == {"probe_s", "build_s", "map_s", "verify_s", "total_s"}
        assert engine.closed == 0
    assert engine.closed == 1 and comm.closed
    with fake_gpus(place.control, "a100-pcie-x4") as built, allreduce_jit.init(place.control, "cpu") as comm:
        assert comm.path is Path.LEGACY and comm.describe().deterministic is False
        small, large = (torch.ones(n, dtype=torch.float16) for n in (LIMIT - 1, LIMIT))
        sums = built[0].sums
        for x, ours in ((small, 1), (large, 1), (small, 2), (large, 2)):
            assert comm.takes(x.numel(), x.dtype) is (x is small) and comm.all_reduce(x)[-1] == 3
            assert built[0].sums == sums + ours
        assert comm.plan(LIMIT, torch.float16).path == "torch.distributed"
        assert comm.plan(LIMIT - 1, torch.float16).path == "legacy"


CASES = [
    values,
    all_kinds_of_groups,
    bad_input_on_one_rank,
    what_may_look_bad_and_is_not,
    tensors_of_other_classes,
    deterministic,
    bad_environment_on_one_rank,
    with_kernels,
]


def test_three_ranks():
    assert len(ranks.run(suite, CASES, cpu=3, deadline=200).value) == len(CASES)


# -- in this process


@pytest.fixture
def world_of_one(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def driven(world_of_one):
    """A communicator with a fake engine put under it."""
    from types import SimpleNamespace

    config = SimpleNamespace(rank=0, world_size=1, deterministic=False)
    comm = allreduce_jit.init(device="cpu")
    with fake_gpus(dist.group.WORLD):
        comm._engine = comm._ladder.engine = FakeEngine("v2", config, dist.group.WORLD, {})
        comm._routes = routes.Routes(comm._engines(), False, 0)
        comm._engine.allocate()
        yield comm
        comm.close()


def test_not_initialised():
    with pytest.raises(InputError, match="init_process_group first"):
        allreduce_jit.init()


def test_what_is_no_group(world_of_one):
    for thing in ("WORLD", 7, [0, 1]):
        with pytest.raises(InputTypeError, match=f"process group, not {type(thing).__name__}"):
            allreduce_jit.init(thing)
    with pytest.raises(InputError, match="not a member"):
        allreduce_jit.init(dist.GroupMember.NON_GROUP_MEMBER)


def test_devices(monkeypatch):
    for device in ("cpu", "cpu:0", torch.device("cpu"), torch.device("cpu", 0), None):
        assert str(as_device(device)) == "cpu"
    # Whether a GPU is there is for the ladder to say, on all ranks.
    for device, index in (("cuda", 0), ("cuda:3", 3), (2, 2), (torch.device("cuda:1"), 1)):
        assert as_device(device) == torch.device("cuda", index)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    for device in (None, "cuda", torch.device("cuda")):
        assert as_device(device) == torch.device("cuda", 5)
    for device in ("gpu", "cuda:x", "cuda:-1", -1, 1.5, object(), "", [0]):
        with pytest.raises(InputError, match="expected a torch.device"):
            as_device(device)
    for device in ("meta", "mps", "xpu:0"):
        with pytest.raises(InputError, match=f"{device} is neither a CUDA device nor the CPU"):
            as_device(device)


def test_a_cuda_device_that_is_not_there(world_of_one):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with allreduce_jit.init(device="cuda") as comm:
        assert comm.path is Path.TORCH and comm.device == torch.device("cuda:0")
        with pytest.raises(InputError, match="the tensor is on cpu, this communicator on cuda:0"):
            comm.all_reduce(torch.ones(1))


@pytest.mark.parametrize("deterministic", [False, True])
def test_one_rank_is_the_identity(world_of_one, deterministic):
    with allreduce_jit.init(device="cpu:0", deterministic=deterministic) as comm:
        check_values(comm, [*DTYPES, torch.bool])
        for dtype in REFUSED_BY_GLOO:
            assert comm.all_reduce(torch.ones(3).to(dtype)).float().tolist() == [1.0] * 3
        x = torch.tensor([0.0, -0.0, float("inf"), float("nan"), 1e-45])
        assert not reference.compare(comm.all_reduce(x), x).wrong
        z = torch.tensor([1 + 2j, 3 - 4j])
        assert torch.equal(comm.all_reduce(z.conj(), out=z), torch.tensor([1 - 2j, 3 + 4j]))
        comm.warmup()
        comm.check()
        described = comm.describe().to_dict()
        assert json.loads(json.dumps(described)) == described
        assert described["deterministic"] is True and described["path"] == "torch.distributed"
        assert described["staging_bytes"] == described["device_bytes"] == 0 and described["kernels_of"] is None
        assert [b["to_bytes"] for b in described["bands"]] == [None] * 3


def test_every_bad_call(driven):
    for kind, call, *words in bad_calls(driven):
        raised(kind, call, "rank 0", *words)
    assert driven._engine.sums == 0
    check_values(driven, DTYPES)


@pytest.mark.parametrize("good", [torch.ones(8), torch.eye(3), torch.ones(2, 2), torch.ones(8).half()], ids=str)
def test_every_bad_call_right_after_a_good_one(driven, good):
    """What is known of the last call spares none of the checks."""
    for kind, call, *words in bad_calls(driven):
        driven.all_reduce(good)
        driven.all_reduce(good, out=torch.empty_like(good))
        sums = driven._engine.sums
        raised(kind, call, "rank 0", *words)
        assert driven._engine.sums == sums


def test_memory_that_is_freed_between_two_calls(world_of_one):
    """All that a tensor says of itself is as it was. (On a kernel path: ``test_engine``, and on GPUs ``without_memory``.)"""
    with allreduce_jit.init(device="cpu") as comm:
        x, out = torch.ones(12)[4:], torch.ones(12)[4:]
        for _ in range(3):
            comm.all_reduce(x)
            comm.all_reduce(x, out=out)
        out.untyped_storage().resize_(0)
        raised(InputError, lambda: comm.all_reduce(x, out=out), "rank 0", "out is", "0 bytes and 48 are needed")
        x.untyped_storage().resize_(0)
        for call in (
            lambda: comm.all_reduce(x),
            lambda: comm.all_reduce(x, out=x),
            lambda: comm.all_reduce(x, out=torch.ones(8)),
        ):
            raised(InputError, call, "rank 0", "was given", "0 bytes and 48 are needed", "freed or resized")
        x.untyped_storage().resize_(48)
        assert comm.all_reduce(x.fill_(2)).tolist() == [2.0] * 8


def test_a_view_beyond_the_end_of_its_storage(driven):
    cut = torch.ones(12)[4:]
    cut.untyped_storage().resize_(40)
    raised(InputError, lambda: driven.all_reduce(cut), "40 bytes and 48 are needed")
    assert driven.all_reduce(cut[:6]).tolist() == [1.0] * 6


def test_arguments_of_functorch(driven):
    """They stand for tensors that other levels hold: an error, and no number is made up."""
    for transform in (torch.vmap, torch.func.grad):
        raised(InputError, lambda transform=transform: transform(lambda x: driven.all_reduce(x).sum())(torch.ones(3, 4)),
               "rank 0", "without storage of its own")  # fmt: skip
    assert driven._engine.sums == 0


def test_pending_results_and_distributed_tensors(world_of_one):
    from torch.distributed import _functional_collectives as functional
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    mesh = init_device_mesh("cpu", (1,))
    with allreduce_jit.init(device="cpu") as comm, torch.no_grad():
        raised(InputError, lambda: comm.all_reduce(DTensor.from_local(torch.ones(3), mesh, [Replicate()])), "pass its to_local()")
        pending = functional.all_reduce(torch.ones(3), "sum", dist.group.WORLD)
        if type(pending) is not torch.Tensor:
            raised(InputError, lambda: comm.all_reduce(pending), "pass its wait()")
            assert comm.all_reduce(pending.wait()).tolist() == [1.0] * 3


def test_tensor_guard():
    def fits_of(x):
        alike = tensor_guard(x)
        return lambda y: inputs.plain(y) and alike(y)

    x = torch.ones(4, 6)
    fits = fits_of(x)
    alike = torch.empty_like(x), torch.zeros(24).view(4, 6), torch.zeros(30)[3:27].view(4, 6), torch.nn.Parameter(x).detach()
    assert all(map(fits, (x, *alike)))
    unlike = (
        None, 3, "x", [1.0], x.numpy(), x.view(6, 4), x.view(24), x[:3], x.t(), torch.ones(6, 4).t(), x[:1].expand(4, 6),
        torch.ones(4, 12)[:, ::2], x.int(), x.double(), x.cfloat(), x.to_sparse(), x.to("meta"), torch._neg_view(x),
        torch.view_as_complex(torch.ones(4, 6, 2)).conj().imag, torch.ones(4, 6, requires_grad=True), torch.nn.Parameter(x),
    )  # fmt: skip
    assert not any(map(fits, unlike))
    with torch.no_grad():
        assert fits(x) and not any(map(fits, unlike))
    # Whether a tensor that requires grad is taken depends on the mode; of the others, torch's guards know too little.
    nested = [torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=way) for way in (torch.strided, torch.jagged)]
    layouts = [x.to_sparse_csr(), x.to_sparse_csc(), x.to_sparse_bsr((2, 2)), x.to_sparse_bsc((2, 2)), x.to_sparse()]
    if torch.backends.mkldnn.is_available():
        layouts.append(x.to_mkldnn())
    for other in (*nested, *layouts, torch.ones(4, 6, requires_grad=True), torch.nn.Parameter(x, requires_grad=False)):
        assert not fits(other) and not fits_of(other)(other)
    z = torch.ones(3, dtype=torch.cfloat)
    assert fits_of(z)(z) and not fits_of(z)(z.conj()) and not fits_of(z.conj())(z)


def test_calls_while_another_device_is_current(driven, monkeypatch):
    current, seen = [3], []

    @contextlib.contextmanager
    def switch(device):
        assert device == driven.device
        before, current[0] = current[0], driven._index
        yield
        current[0] = before

    monkeypatch.setattr(torch.cuda, "device", switch)
    monkeypatch.setattr(driven, "_current", lambda: current[0])
    all_reduce = driven._engine.all_reduce
    monkeypatch.setattr(driven._engine, "all_reduce", lambda *tensors: seen.append(current[0]) or all_reduce(*tensors))
    x, out = torch.ones(3), torch.zeros(3)
    for _ in range(3):
        assert driven.all_reduce(x) is not x and driven.all_reduce(x, out=out) is out and torch.equal(out, x)
        assert current == [3]
    raised(InputError, lambda: driven.all_reduce(torch.ones(2, device="meta")), "rank 0", "meta")
    assert seen and set(seen) == {driven._index}


def test_after_close(driven):
    engine = driven._engine
    driven.all_reduce(torch.ones(2))
    driven.close()
    driven.close()
    assert (
        engine.closed == 1
        and driven.closed
        and not driven._routes._engines
        and not driven._routes._routes
        and not driven._routes._calls
    )  # nothing holds the engine any more
    x = torch.ones(2)
    for call in (lambda: driven.all_reduce(x), lambda: driven.all_reduce(x, out=x), lambda: driven.all_reduce(3),
                 driven.warmup, driven.check, driven.abort, driven.describe, lambda: driven.plan(5, torch.float32), lambda: driven.capture().__enter__()):  # fmt: skip
        raised(ClosedError, call, "rank 0", "closed", "build a new one")
    assert driven.path is Path.TORCH and driven.reason  # what it was can still be asked
    assert driven.group is None and not driven.takes(5, torch.float32)
    with allreduce_jit.init(device="cpu") as another:
        assert another.all_reduce(x).tolist() == [1.0, 1.0]


def test_abort_and_local_close(driven):
    """``abort`` stops the engine's kernels; so does a local close, before it waits for them."""
    engine = driven._engine
    driven.abort()
    assert engine.events[-1] == "abort" and not driven.closed
    driven.close(local=True)
    driven.close(local=True)
    assert engine.events[-2:] == ["abort", "close"]


@pytest.mark.parametrize("max_ctas", [0, 1, -5, 2.0, "8"])
def test_max_ctas_that_are_none(driven, max_ctas):
    raised(InputError, lambda: allreduce_jit.init(device="cpu", max_ctas=max_ctas), repr(max_ctas), "2 blocks or more")


def test_close_that_fails_is_not_tried_again(driven):
    engine = driven._engine
    engine.fails["v2", "close"] = RuntimeError("CUDA is gone")
    with pytest.raises(RuntimeError, match="CUDA is gone"):
        driven.close()
    driven.close()
    assert engine.closed == 1 and driven.closed


def test_close_frees_even_if_the_device_is_broken(driven, monkeypatch):
    engine = driven._engine

    def broken(*device):
        raise RuntimeError("illegal memory access")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    with pytest.raises(RuntimeError, match="illegal"):
        driven.close()
    assert engine.closed == 1


@pytest.mark.parametrize("by", ["close", "del"])
def test_after_the_process_group_is_gone(driven, by):
    engine, one = driven._engine, driven
    dist.destroy_process_group()
    if by == "close":
        one.close()
        one.close()
    else:
        one.__del__()
    assert engine.closed == 1


def test_the_finaliser_releases_but_never_raises(driven, monkeypatch):
    config = driven._engine.config
    for fails in ({}, {("v2", "close"): RuntimeError("gone")}):
        comm = allreduce_jit.init(device="cpu")
        comm._engine = engine = FakeEngine("v2", config, None, fails)
        del comm
        gc.collect()
        assert engine.closed == 1
    # What would break a graph, or wait at exit for a peer that is gone, is left to the process's end.
    for owner, name in ((Communicator, "_capturing"), (communicator.sys, "is_finalizing")):
        comm = allreduce_jit.init(device="cpu")
        comm._engine = engine = FakeEngine("v2", config, None, {})
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, lambda *self: True)
            comm.__del__()
        assert engine.closed == 0
        comm.close()
    Communicator.__new__(Communicator).__del__()  # of one that was never built


def test_a_local_close_has_an_end(driven, monkeypatch, caplog):
    """Whatever else keeps the GPU busy; what cannot be freed yet is freed when that ends."""
    engine, idle = driven._engine, threading.Event()
    monkeypatch.setattr(communicator, "LOCAL_CLOSE_S", 0.2)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *device: idle.wait(20))
    started = time.monotonic()
    driven.close(local=True)
    assert 0.1 < time.monotonic() - started < 5 and driven.closed and engine.closed == 0
    assert "still at work after 0.2 s" in caplog.text
    idle.set()
    end = time.monotonic() + 10
    while not engine.closed and time.monotonic() < end:
        time.sleep(0.01)
    assert engine.closed == 1


def test_after_an_exception_nobody_is_waited_for(driven):
    """Calls in flight may wait for ranks that never make them."""
    engine = driven._engine
    with pytest.raises(ZeroDivisionError), driven:
        1 / 0  # noqa: B018
    assert engine.events[-2:] == ["abort", "close"]


def test_a_context_that_ends_well_aborts_nothing(driven):
    engine = driven._engine
    with driven:
        pass
    assert engine.events[-1] == "close" and "abort" not in engine.events


def test_routes_are_few_and_right(driven, monkeypatch):
    monkeypatch.setattr(routes, "MAX_ROUTES", 5)
    for turn in range(3):
        for numel in range(1, 20):
            for dtype in (torch.float32, torch.int32, torch.float16):
                sums = driven._engine.sums
                driven.all_reduce(torch.ones(numel, dtype=dtype))
                assert driven._engine.sums == sums + (dtype is not torch.int32)
                assert len(driven._routes._routes) <= 5 and len(driven._routes._calls) <= 5


def test_whether_a_kernel_takes_a_call_is_asked_once(driven, monkeypatch):
    """Inference engines ask before each call."""
    asked = [(5, torch.float32), (5, torch.int32), (7, torch.bfloat16)]
    first = [driven.takes(*call) for call in asked]
    monkeypatch.setattr(driven._engine, "takes", None)
    assert [driven.takes(*call) for call in asked] == first == [True, False, True]


def test_a_tensor_that_is_not_told_by_one_call_is_not_planned_anew(driven, monkeypatch):
    """A subclass, and every tensor where torch lacks the guards: who runs the call is known from the first one."""
    for x in (torch.nn.Parameter(torch.ones(8), requires_grad=False), torch.ones(9)):
        monkeypatch.setattr(inputs, "tensor_check", None)
        driven.all_reduce(x)
        sums = driven._engine.sums
        with monkeypatch.context() as patch:
            patch.setattr(driven._engine, "plan", None)
            driven.all_reduce(x)
            driven.all_reduce(x, out=torch.empty(x.shape))
        assert driven._engine.sums == sums + 2


def runs(plan, last):
    """(first, last, what) of every stretch of sizes with one plan, found by asking for each size."""
    found = []
    for numel in range(1, last + 1):
        what = plan(numel)
        if found and found[-1][2] == what:
            found[-1][1] = numel
        else:
            found.append([numel, numel, what])
    return found


def check_bands(comm, monkeypatch, largest):
    monkeypatch.setattr(describe, "LARGEST", largest)
    bands = comm.describe().bands
    for name, size in ITEMSIZE.items():
        dtype = getattr(torch, name)
        last = largest // size

        def plan(numel, dtype=dtype):
            found = comm.plan(numel, dtype)
            return found.path, found.algorithm

        want = [(a * size, None if b == last else b * size, *what) for a, b, what in runs(plan, last)]
        mine = [b for b in bands if b.dtype == name]
        assert [(b.from_bytes, b.to_bytes, b.path, b.algorithm) for b in mine] == want
    assert {b.dtype for b in bands} == set(ITEMSIZE)


def test_bands_by_asking_for_every_size(driven, monkeypatch):
    check_bands(driven, monkeypatch, 1 << 17)
    bands = [b for b in driven.describe().bands if b.dtype == "float32"]
    assert [b.from_bytes // 4 for b in bands] == list(SWITCHES)
    driven._engine.path = "legacy"
    check_bands(driven, monkeypatch, 1 << 17)
    assert [b.path for b in driven.describe().bands][3] == "torch.distributed"


@hypothesis_settings(max_examples=60, deadline=None)
@given(edges=st.lists(st.integers(2, 300), unique=True, max_size=12), largest=st.integers(1, 300))
def test_bands_of_any_edges(edges, largest):
    found = list(stretches(lambda n: sum(edge <= n for edge in edges), largest))
    firsts = sorted({1, *(edge for edge in edges if edge <= largest)})
    assert [(first, last) for first, last, _ in found] == list(zip(firsts, [*(n - 1 for n in firsts[1:]), None], strict=True))
    assert [answer for _, _, answer in found] == list(range(len(firsts)))


@pytest.mark.parametrize("world_size", range(2, 9))
def test_no_plan_comes_back_to_one_that_it_has_left(world_size):
    """What the search for bands relies on, of the plans that there are."""
    sizes = sorted({min(1 << 28, int(2 ** (power / 16)) + k) for power in range(28 * 16) for k in (-1, 0, 1)} - {0})
    for staging in (4, 32, 1024):
        bands = NVLINK_TABLES[world_size]
        of_v2, of_legacy = nvlink.make_layout(world_size, staging << 20, bands), p2p.make_layout(world_size, staging << 20)
        for dtype in ITEMSIZE:
            for plan in (
                lambda spec, layout=of_v2, bands=bands: nvlink.make_plan(spec, world_size, bands, layout),
                lambda spec, layout=of_legacy: p2p.make_plan(spec, world_size, p2p.make_limits(world_size, True), layout, True),
                lambda spec, layout=of_legacy: p2p.make_plan(spec, world_size, p2p.make_limits(world_size, False), layout, False),
            ):
                found = [(p.path, p.algorithm) for p in (plan(all_reduce(dtype, n)) for n in sizes)]
                changes = [what for i, what in enumerate(found) if i == 0 or found[i - 1] != what]
                assert len(changes) == len(set(changes)), changes
