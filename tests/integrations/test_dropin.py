"""The drop-in classes and their dispatch: who is picked, why not, and that a disabled object is a complete one."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import threading
import types
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers.fake_engines import LIMIT, fake_gpus, raised, suite

import allreduce_jit
from allreduce_jit import CustomAllreduce, CustomAllReduceV2, dispatch_custom_allreduce
from allreduce_jit.errors import ClosedError, InputError, SettingsError
from allreduce_jit.harness import ranks
from allreduce_jit.integrations import sglang as dropin
from allreduce_jit.integrations.sglang import can_use_custom_all_reduce_v2, can_use_custom_all_reduce_with_nvlink
from allreduce_jit.policy.tables import NVLINK_TABLES
from allreduce_jit.policy.verdict import Path
from allreduce_jit.settings import V2_SWITCH
from allreduce_jit.setup import ladder

CPU = torch.device("cpu")
NVLINK, PCIE, NO_P2P = "h200-x4", "a100-pcie-x4", "rtx4090-x2"
CLASSES = [CustomAllReduceV2, CustomAllreduce]


class Log:
    """Records of the package's logger."""

    def __enter__(self):
        self.records = []
        self.handler = logging.Handler()
        self.handler.emit = self.records.append
        logger = logging.getLogger("allreduce_jit")
        self.level = logger.level
        logger.setLevel(logging.DEBUG)
        logger.addHandler(self.handler)
        return self

    def __exit__(self, *exc):
        logger = logging.getLogger("allreduce_jit")
        logger.setLevel(self.level)
        logger.removeHandler(self.handler)

    def __call__(self, level):
        return [r.getMessage() for r in self.records if r.levelname == level]


def env(**values):
    """The switch in this process only; None takes it away."""
    switch = values.pop("switch")
    clean = {k: v for k, v in os.environ.items() if k != V2_SWITCH}
    return mock.patch.dict(os.environ, clean | ({} if switch is None else {V2_SWITCH: switch}), clear=True)


# -- on every rank


def dispatch(place):
    group = place.control
    for machine, switch, want in (
        (NVLINK, None, CustomAllReduceV2),
        *((NVLINK, on, CustomAllReduceV2) for on in ("1", "true", "YES", "On", "y")),
        *((NVLINK, off, CustomAllreduce) for off in ("0", "false", "No", "OFF", "n")),
        (PCIE, None, CustomAllreduce),
        (PCIE, "1", CustomAllreduce),
        (NO_P2P, "1", CustomAllreduce),
        ("no-driver", "1", CustomAllreduce),
    ):
        with fake_gpus(group, machine) as built, env(switch=switch), Log() as log:
            assert dispatch_custom_allreduce(group, CPU) is want, (machine, switch)
        assert not built  # asking builds nothing
        chosen = ["[AR] Using CustomAllReduceV2 (JIT-compiled)"] if want is CustomAllReduceV2 else []
        assert log("DEBUG") == chosen and not log("WARNING")
    assert list(inspect.signature(dispatch_custom_allreduce).parameters) == ["group", "device"]
    assert dispatch_custom_allreduce(group, "cpu") is CustomAllreduce  # this machine as it is


def the_switch_differs_between_ranks(place):
    """One answer on all ranks: classes that differ would wait for each other for ever."""
    group = place.control
    with fake_gpus(group):
        for one_rank in range(place.world_size):
            with env(switch="off" if place.rank == one_rank else "on"):
                assert dispatch_custom_allreduce(group, CPU) is CustomAllreduce
            # What SGLang's reader does not understand is the default there, and stops no server here either.
            with env(switch="" if place.rank == one_rank else None):
                assert dispatch_custom_allreduce(group, CPU) is CustomAllReduceV2
            with mock.patch.dict(os.environ, {"ALLREDUCE_JIT_PDL": "maybe"} if place.rank == one_rank else {}):
                for call in (lambda: dispatch_custom_allreduce(group, CPU), lambda: CustomAllReduceV2(group, CPU)):
                    raised(SettingsError, call, f"rank {one_rank}: ALLREDUCE_JIT_PDL='maybe'", "true")
        # The capability check does not ask for the switch.
        with env(switch="off"):
            assert can_use_custom_all_reduce_v2(group, CPU) is True


def capability(place):
    group = place.control
    for machine, nvlink in ((NVLINK, True), (PCIE, False), (NO_P2P, None), ("no-driver", None)):
        with fake_gpus(group, machine), Log() as log:
            sizes = allreduce_jit.THRESHOLD_2_SHOT_MAP.keys()
            assert can_use_custom_all_reduce_with_nvlink(group, CPU, sizes or {2}, "Asker") is nvlink, machine
            assert [text.startswith("Asker is not possible: ") for text in log("INFO")] == [True] * (nvlink is None)
            assert can_use_custom_all_reduce_v2(group, "cpu") is (nvlink is True)
    with fake_gpus(group), Log() as log:
        assert can_use_custom_all_reduce_with_nvlink(group, CPU, [4, 8], "Asker") is None
        assert log("INFO") == ["Asker: world size 2 is not among [4, 8]"]
        with mock.patch.dict(dropin.THRESHOLD_2_SHOT_MAP, {4: 1}, clear=True):
            assert can_use_custom_all_reduce_v2(group, CPU) is False
        with mock.patch.dict(os.environ, {"ALLREDUCE_JIT_PATH": "torch"}):
            assert can_use_custom_all_reduce_with_nvlink(group, CPU, [2], "Asker") is None
            assert can_use_custom_all_reduce_v2(group, CPU) is False
    alone = [dist.new_group([rank]) for rank in range(place.world_size)][place.rank]
    with fake_gpus(alone):
        assert can_use_custom_all_reduce_v2(alone, CPU) is False
        assert can_use_custom_all_reduce_with_nvlink(alone, CPU, [1], "Asker") is None
        assert dispatch_custom_allreduce(alone, CPU) is CustomAllreduce


def nccl_groups(place):
    nccl = str(dist.distributed_c10d.BackendConfig(dist.Backend("nccl")))
    with mock.patch.object(dist, "get_backend_config", lambda group: nccl):
        for call in (
            lambda: dispatch_custom_allreduce(place.control, CPU),
            lambda: can_use_custom_all_reduce_v2(place.control, CPU),
            lambda: can_use_custom_all_reduce_with_nvlink(place.control, CPU, [2], "Asker"),
            lambda: CustomAllReduceV2(place.control, CPU),
            lambda: CustomAllreduce(place.control, CPU, max_size=1),
        ):
            raised(InputError, call, "must not be an NCCL group", 'new_group(ranks, backend="gloo")')


def multi_node(place):
    """The policy, the dispatch and then graphs: in this order, whatever the user had set."""
    for switch, warnings in ((None, 0), ("1", 1), ("0", 0)):
        with fake_gpus(place.control), env(switch=switch), Log() as log:
            allreduce_jit.apply_multi_node_policy(1)
            assert os.environ.get(V2_SWITCH) == switch
            allreduce_jit.apply_multi_node_policy(2)
            assert os.environ[V2_SWITCH] == "0"
            assert dispatch_custom_allreduce(place.control, CPU) is CustomAllreduce
            want = f"Disabling {V2_SWITCH} because nnodes=2 (custom all-reduce v2 is intra-node only)."
            assert log("WARNING") == [want] * warnings
            direct = CustomAllReduceV2(place.control, CPU)
            assert direct.disabled and V2_SWITCH in direct.reason
            direct.close()
    assert "apply_multi_node_policy" in dispatch_custom_allreduce.__doc__ and "span" in dispatch_custom_allreduce.__doc__


def exercise(place, ar, cls, enabled, max_size=None):
    """Every method and attribute of the contract, before and after close."""
    n, mine = place.world_size, torch.arange(7.0) + place.rank
    total = torch.arange(7.0) * n + sum(range(n))
    assert type(ar) is cls and ar.disabled is not enabled
    assert (ar.group, ar.device, ar.rank, ar.world_size) == (place.control, CPU, place.rank, n)
    assert isinstance(ar.max_size, int) and (max_size is None or ar.max_size == max_size) and ar.reason
    assert ar.should_custom_ar(mine) is enabled
    copy = mine.clone()
    with ar.capture(), ar.capture():
        found = ar.custom_all_reduce(mine)
        with ar.capture():
            assert torch.equal(ar.custom_all_reduce(mine.view(7, 1).t()), total.view(1, 7))
    assert torch.equal(found, total) and torch.equal(mine, copy) and found.data_ptr() != mine.data_ptr()
    assert ar.custom_all_reduce(torch.arange(3) + place.rank).tolist() == [1, 3, 5]  # int64: torch.distributed
    assert ar.custom_all_reduce(torch.ones(0)).numel() == 0
    raised(InputError, lambda: ar.custom_all_reduce(torch.ones(1, device="meta")), f"rank {place.rank}")
    ar.close()
    ar.close()
    assert ar.disabled and ar.should_custom_ar(mine) is False
    with ar.capture(), ar.capture():
        pass
    raised(ClosedError, lambda: ar.custom_all_reduce(mine), "closed")


def objects(place):
    """Enabled and disabled ones, on all kinds of machines; a class never builds the other one's kernels."""
    for machine, enabled in ((NVLINK, CLASSES), (PCIE, [CustomAllreduce]), (NO_P2P, []), ("no-driver", []), (None, [])):
        for cls in CLASSES:
            for max_size in (None, 1 << 20):
                with Log() as log, fake_gpus(place.control, machine or "cpu-ranks") as built:
                    with mock.patch.object(ladder, "probe", ladder.probe if machine else real_probe):
                        ar = cls(place.control, CPU, max_size=max_size) if max_size else cls(place.control, CPU)
                    exercise(place, ar, cls, cls in enabled, max_size)
                path = "v2" if cls is CustomAllReduceV2 else "legacy"
                assert [(engine.path, engine.closed) for engine in built] == [(path, 1)] * (cls in enabled)
                warned = log("WARNING")
                assert len(warned) == (place.rank == 0 and cls not in enabled), warned
                assert all(text == f"{cls.__name__} is disabled: {ar.reason}" for text in warned)
                assert len(log("INFO")) == (place.rank == 0)


real_probe = ladder.probe


def a_failure_while_building(place):
    for cls, path in zip(CLASSES, ("v2", "legacy"), strict=True):
        fails = {(path, "connect"): RuntimeError("planted")} if place.rank == 1 else {}
        with Log() as log, fake_gpus(place.control, NVLINK, fails) as built:
            ar = cls(place.control, CPU)
            assert ar.reason.endswith("rank 1: RuntimeError: planted")
            exercise(place, ar, cls, False)
        assert [(engine.path, engine.closed) for engine in built] == [(path, 1)]
        assert len(log("WARNING")) == (place.rank == 0)


def what_should_be_taken(place):
    """max_size, dtype, size and device; no exchange, no synchronisation, and the same answer everywhere."""

    def forbidden(*args, **kwargs):
        raise AssertionError("should_custom_ar must not talk to anybody")

    tensors = [
        torch.empty(shape, dtype=dtype)
        for shape in ((0,), (1,), (250,), (251,), (25, 10), (LIMIT - 1,), (LIMIT,), (), (1 << 20,))
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool)
    ]
    tensors += [torch.empty(10, 20).t(), torch.empty(500)[::2], torch.empty(4, device="meta"), torch.empty(3, requires_grad=True)]
    for machine, cls in ((NVLINK, CustomAllReduceV2), (PCIE, CustomAllreduce)):
        answers = {}
        for max_size in (None, 1000, 0, 8 << 20):
            with fake_gpus(place.control, machine):
                ar = cls(place.control, CPU, max_size)
                with mock.patch.multiple(dist, all_gather=forbidden, all_reduce=forbidden, barrier=forbidden), \
                     mock.patch.object(torch.cuda, "synchronize", forbidden):  # fmt: skip
                    mine = [ar.should_custom_ar(t) for t in tensors]
                ar.close()
            assert place.gather(mine) == [mine] * place.world_size
            answers[max_size] = mine
            for t, answer in zip(tensors, mine, strict=True):
                fits = max_size is None or t.numel() * t.element_size() <= max_size
                kernels = t.dtype in (torch.float32, torch.float16, torch.bfloat16) and t.device == CPU
                plan = cls is CustomAllReduceV2 or t.numel() < LIMIT
                assert answer is (fits and kernels and plan), (t.shape, t.dtype, max_size)
        assert answers[None] != answers[1000] != answers[0]


CASES = [
    dispatch,
    the_switch_differs_between_ranks,
    capability,
    nccl_groups,
    multi_node,
    objects,
    a_failure_while_building,
    what_should_be_taken,
]


def test_two_ranks():
    assert len(ranks.run(suite, CASES, cpu=2, deadline=200).value) == len(CASES)


# -- in this process


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.group.WORLD
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def unfilled():
    with mock.patch.dict(dropin.THRESHOLD_2_SHOT_MAP, clear=True):
        yield dropin.THRESHOLD_2_SHOT_MAP


@pytest.mark.parametrize("cls", CLASSES)
def test_one_rank(group, cls, caplog):
    ar = cls(group, "cpu")
    assert ar.disabled and "one rank" in ar.reason and len(caplog.records) == 1
    x = torch.ones(3)
    found = ar.custom_all_reduce(x)
    assert torch.equal(found, x) and found.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("cls", CLASSES)
def test_after_the_process_group_is_gone(group, cls):
    ar = cls(group, "cpu")
    dist.destroy_process_group()
    assert ar.should_custom_ar(torch.ones(1)) is False
    with ar.capture():
        ar.close()
    ar.close()
    del ar


def test_a_group_is_asked_for(tmp_path):
    for call in (dispatch_custom_allreduce, can_use_custom_all_reduce_v2, *CLASSES):
        with pytest.raises(InputError, match="init_process_group"):
            call(None, "cpu")


@pytest.mark.parametrize("first", ["can_use_v2", "V2", "dispatch"])
def test_the_map_is_filled_by_whoever_comes_first(group, unfilled, first):
    assert not unfilled
    calls = {"can_use_v2": can_use_custom_all_reduce_v2, "V2": CustomAllReduceV2, "dispatch": dispatch_custom_allreduce}
    seen = []
    real = dropin.require_cpu_group
    with mock.patch.object(dropin, "require_cpu_group", lambda g: (seen.append(dict(unfilled)), real(g))):
        calls[first](group, "cpu")
    assert seen and all(seen)  # filled before anything else is looked at
    assert unfilled.keys() == NVLINK_TABLES.keys() == set(range(2, 9))
    assert all(isinstance(n, int) and n > 0 for n in unfilled.values())
    assert allreduce_jit.THRESHOLD_2_SHOT_MAP is unfilled


def test_the_map_is_filled_once(unfilled):
    allreduce_jit._maybe_init_config()
    assert len(unfilled) == 7
    unfilled[2] = 12345  # what a user set stays
    allreduce_jit._maybe_init_config()
    assert unfilled[2] == 12345


def test_many_threads_see_the_whole_map_or_wait(unfilled, monkeypatch):
    """With a table whose reading lets the other threads run, so that a fill in pieces would be seen."""
    whole, reads, partial = dict(NVLINK_TABLES), [], []

    class Slow(dict):
        def items(self):
            reads.append(1)
            for item in super().items():
                threading.Event().wait(0.005)
                yield item

    monkeypatch.setattr(dropin, "NVLINK_TABLES", Slow(whole))
    barrier = threading.Barrier(16)

    def ask():
        barrier.wait()
        for _ in range(20):
            allreduce_jit._maybe_init_config()
            partial.append(unfilled.keys() != whole.keys())

    threads = [threading.Thread(target=ask) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(partial) == 320 and not any(partial) and len(reads) == 1


def test_rocm(group, monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setitem(sys.modules, "aiter", None)  # not importable
    assert dispatch_custom_allreduce(group, "cpu") is CustomAllreduce
    path = "aiter.dist.device_communicators.custom_all_reduce".split(".")
    for depth in range(1, len(path) + 1):
        monkeypatch.setitem(sys.modules, ".".join(path[:depth]), types.ModuleType(".".join(path[:depth])))
    assert dispatch_custom_allreduce(group, "cpu") is CustomAllreduce  # an aiter without the class
    theirs = type("CustomAllreduce", (), {})
    monkeypatch.setattr(sys.modules[".".join(path)], "CustomAllreduce", theirs, raising=False)
    assert dispatch_custom_allreduce(group, "cpu") is theirs
    monkeypatch.setattr(torch.version, "hip", None)
    assert dispatch_custom_allreduce(group, "cpu") is CustomAllreduce


# The constructor of SGLang 0.5.23's class, as it stands there: name -> kind and whether it has a default.
UPSTREAM = {
    **dict.fromkeys(("group", "device"), ("POSITIONAL_OR_KEYWORD", False)),
    "max_size": ("POSITIONAL_OR_KEYWORD", True),
    **dict.fromkeys(("max_pull_size", "max_push_size", "max_pull_blocks", "max_push_blocks"), ("KEYWORD_ONLY", True)),
}


def test_signatures():
    found = inspect.signature(CustomAllReduceV2).parameters
    assert {name: (p.kind.name, p.default is not p.empty) for name, p in found.items()} == UPSTREAM
    assert all(p.default is None for name, p in found.items() if name not in ("group", "device"))
    parameters = inspect.signature(CustomAllreduce).parameters
    assert list(parameters) == ["group", "device", "max_size"] and parameters["max_size"].default is None
    assert CustomAllReduceV2._rung is Path.V2 and CustomAllreduce._rung is Path.LEGACY
    missing = [name for name in ("obj", "config", "supports_push", "reserve_push_capacity", "uses_one_shot_push", "override_algo")
               if hasattr(CustomAllReduceV2, name) or name not in CustomAllReduceV2.__doc__]  # fmt: skip
    assert not missing  # what it has not, it says


@pytest.mark.parametrize(
    ("options", "largest", "pull"),
    [
        ({}, dropin.UNLIMITED, True),
        ({"max_size": 4096}, 4096, True),
        ({"max_size": 4096, "max_push_size": 8192}, 8192, True),
        ({"max_size": 4096, "max_push_size": 1024}, 4096, True),  # upstream would pull what is larger
        ({"max_pull_size": 2048, "max_push_size": 1024}, 2048, True),
        ({"max_pull_size": 0, "max_push_size": 1024}, 1024, False),
        ({"max_pull_blocks": 0, "max_push_size": 1024}, 1024, False),
        ({"max_pull_blocks": 4, "max_size": 1024}, 1024, True),
    ],
)
def test_upstreams_sizes(group, options, largest, pull):
    ar = CustomAllReduceV2(group, "cpu", **options)
    assert (ar.max_size, ar.pull_enabled) == (largest, pull)
    assert ar.max_size == max(ar.max_pull_size, ar.max_push_size) and (pull or ar.max_pull_size == 0)
    ar.close()


def upstreams_arguments(place):
    """Sizes bound what is taken; blocks reach the engine, and one more, which watches."""
    for options, blocks in (({"max_push_blocks": 7}, 8), ({"max_push_blocks": 0}, 2), ({"max_pull_blocks": 3}, None)):
        with fake_gpus(place.control) as (built):
            ar = CustomAllReduceV2(place.control, CPU, max_pull_size=0, max_push_size=1000, **options)
            (engine,) = built
            assert engine.config.max_ctas == blocks
            assert ar.should_custom_ar(torch.empty(250)) and not ar.should_custom_ar(torch.empty(251))
            ar.close()


def any_rung(place):
    """What the plug-in for SGLang puts there: the best that runs, and contiguous tensors alone."""
    for machine, path in ((NVLINK, "v2"), (PCIE, "legacy"), (NO_P2P, "host"), ("a100-vgpu-x2", None)):
        with fake_gpus(place.control, machine) as built:
            ar = dropin.AllReduceJit(place.control, CPU)
            assert [engine.path for engine in built] == [path] * (path is not None) and ar.disabled is (path is None)
            assert ar.should_custom_ar(torch.empty(4, 6)) is not ar.disabled
            assert not ar.should_custom_ar(torch.empty(4, 6).t())
            ar.close()
    assert not issubclass(dropin.AllReduceJit, (CustomAllReduceV2, CustomAllreduce))


def test_two_ranks_of_what_is_newer():
    assert len(ranks.run(suite, [upstreams_arguments, any_rung], cpu=2, deadline=100).value) == 2
