"""Kernel engines without kernels, under the real ladder and communicator: they sum over gloo, exactly."""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist

from allreduce_jit.engine import norm_reference, reference
from allreduce_jit.policy.nvlink_norm import APART
from allreduce_jit.policy.operation import ALL_REDUCE
from allreduce_jit.policy.plan import Plan
from allreduce_jit.setup import ladder, nccl

from .fakes import MACHINES, look

STAGES = ("construct", "compile", "load", "allocate", "connect", "verify")
# First number of elements -> algorithm; odd on purpose.
SWITCHES = {1: "one_shot", 1001: "two_shot", 20_001: "three_shot"}
LIMIT = 30_003  # elements from which the fake legacy hands over to torch.distributed
MOST_ROWS = 20  # with a norm, that the fake V2 takes in one kernel


class FakeEngine:
    """Records what happened to it in ``events``; fails where ``fails`` (path, stage) -> exception says so."""

    compiled, cached = 2, 1
    uses_device = True

    def __init__(self, path, config, group, fails):
        self.path, self.config, self.group, self.fails = path, config, group, fails
        self.events: list[str] = []
        self.families = []
        self.sums = self.norms = 0
        self.hands_over = not config.deterministic
        self.dead = []
        self.c_calls = False
        self._stage("construct")

    def _stage(self, name):
        self.events.append(name)
        assert name not in STAGES or torch.empty(0).device.type == "cpu"
        if (self.path, name) in self.fails:
            raise self.fails[self.path, name]

    @property
    def closed(self):
        return self.events.count("close")

    def compile(self, cache, families):
        self._stage("compile")
        return [f"kernel {self.config.rank}"]

    def load(self, shares, families):
        assert shares == [[f"kernel {rank}"] for rank in range(self.config.world_size)]
        self._stage("load")

    def allocate(self):
        self._stage("allocate")
        self.memory, self.state = SimpleNamespace(nbytes=1 << 20), SimpleNamespace(nbytes=1 << 10)
        return f"{self.path} of {self.config.rank}"

    def connect(self, handles):
        assert handles == [f"{self.path} of {rank}" for rank in range(self.config.world_size)]
        self._stage("connect")

    def verify(self, families):
        self._stage("verify")

    def close(self):
        self._stage("close")

    def check(self):
        self._stage("check")

    def abort(self):
        self._stage("abort")

    def lost(self, rank):
        self.dead.append(rank)

    def plan(self, spec):
        if spec.epilogue is not None:
            return Plan(self.path, "one_shot_norm" if spec.rows <= MOST_ROWS else APART, 1, 32, spec.numel)
        if self.path == "legacy" and self.hands_over and spec.numel >= LIMIT:
            return Plan("torch.distributed", "nccl", 0, 0, spec.numel)
        algorithm = SWITCHES[max(first for first in SWITCHES if first * 4 <= spec.nbytes or first == 1)]
        return Plan(self.path, algorithm, 1, 32, spec.numel)

    def takes(self, spec):
        if spec.family not in (self.families or ALL_REDUCE):
            return False
        plan = self.plan(spec)
        return plan.path == self.path and plan.algorithm != APART

    def in_c(self, spec, matches, empty):
        return None

    def prepared(self, spec):
        return self.all_reduce if spec.epilogue is None else partial(self.all_reduce_norm, spec)

    def all_reduce_norm(self, spec, x, out, *others):
        assert spec.family in self.families and self.path == "v2"
        total = torch.empty_like(x)
        self.all_reduce(x, total)
        self.sums, self.norms = self.sums - 1, self.norms + 1
        norm_reference.run(replace(spec, operation="norm"), (total, out, *others))

    def all_reduce(self, x, out):
        assert not self.closed and x.numel() and x.shape == out.shape and x.dtype is out.dtype
        assert x.is_contiguous() and out.is_contiguous() and not x.is_neg() and not out.is_neg()
        self.sums += 1
        mine = x.detach().clone()
        if self.config.world_size > 1:
            parts = [torch.empty_like(mine) for _ in range(self.config.world_size)]
            dist.all_gather(parts, mine, group=self.group)
        else:
            parts = [mine]
        out.copy_(reference.ordered_sum(parts))


class FakeNccl:
    """NCCL over a gloo group."""

    def __init__(self, group):
        self.group = group

    def all_reduce(self, x):
        dist.all_reduce(x, group=self.group)

    def completed(self):
        return True

    def abort(self):
        self.group = None


@contextmanager
def fake_gpus(group, machine="h200-x4", fails=None, change=lambda caps: caps):
    """The ranks of ``group`` find themselves on ``machine``, with CPU tensors; yields the engines built here.

    ``fails``: (path, stage) -> exception on this rank. ``change``: applied to what this rank's probe found.
    """
    built: list[FakeEngine] = []
    rank = dist.get_rank(group)

    def engine(path, config):
        one = FakeEngine.__new__(FakeEngine)
        built.append(one)
        one.__init__(path.value, config, group, fails or {})
        return one

    with ExitStack() as stack:
        for owner, name, value in (
            (ladder, "probe", lambda device: change(look(MACHINES[machine], rank))),
            (ladder, "_engine_class", lambda row: partial(engine, row.path)),
            (nccl, "connect", lambda group, device, timeout_s: (FakeNccl(group), None)),
            (torch.cuda, "device", lambda device: nullcontext()),
            (torch.cuda, "synchronize", lambda *device: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        yield built


def suite(place, cases):
    """Run rank-side ``cases`` in one set of processes; a failure says which one it was."""
    for case in cases:
        try:
            case(place)
        except BaseException as e:
            if hasattr(e, "add_note"):
                e.add_note(f"in {case.__name__}")
            raise
        place.barrier()
    return [case.__name__ for case in cases]


def raised(kind, call, *words):
    """The exception of ``kind`` that ``call`` raises; its message holds all ``words``."""
    try:
        call()
    except kind as e:
        missing = [word for word in words if word not in str(e)]
        assert not missing, f"{e!r} does not say {missing}"
        return e
    raise AssertionError(f"no {kind.__name__} was raised")


@contextmanager
def logged():
    """What the package says, at INFO and above."""
    records, handler, logger = [], logging.Handler(), logging.getLogger("allreduce_jit")
    handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield records
    logger.removeHandler(handler)
    logger.setLevel(level)
