"""Calls with a norm for the CPU twin (twin.py): kernels of a world, and programs of such calls and all-reduces in the same slots."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import twin
from helpers.norms import TINY
from twin import Buffer, Call, Edit, Failed, Program, World

from allreduce_jit.engine import norm_reference, reference
from allreduce_jit.policy import nvlink_norm
from allreduce_jit.policy.catalogue import KernelSpec, cuda_module
from allreduce_jit.policy.norm import GROUP, Norm
from allreduce_jit.policy.norm_catalogue import norm_module
from allreduce_jit.policy.norm_forms import Form
from allreduce_jit.policy.operation import OpSpec
from allreduce_jit.policy.plan import Plan

WARPS = 24  # channels of a region: what the largest row here takes


@dataclass(frozen=True)
class Kernel:
    """A form of a family of calls."""

    family: OpSpec
    form: Form


def kernel(algorithm: str, hidden: int, dtype: str = "bfloat16", packets: int = 1, cluster: int = 1, **norm) -> Kernel:
    """``norm``: of policy.norm.Norm; ``weight`` is that of the dtype unless told."""
    family = OpSpec("all_reduce_norm", dtype, (0, hidden), Norm(**{"weight": dtype, **norm}))
    return Kernel(family, Form(f"{algorithm}_norm", packets, cluster))


@dataclass(frozen=True)
class NormCall:
    """One all-reduce with a norm.

    Attributes:
        kernel: what runs it; or its family, for the plan to choose a form.
        rows: how many.
        eps: added to the mean of squares.
        column_major: how scales of groups lie.
        in_place: the norm is written over the input, the new residual over the old one.
        chained: the input is the norm of the call before (or what it all-reduced to), the residual is the one that it left; results
            (unless in place) go to that call's input and residual: any access that is not ordered by the stream shows.
        plain: no zeros, infinities and NaNs.
    """

    kernel: Kernel | OpSpec
    rows: int
    eps: float = 1e-5
    column_major: bool = False
    in_place: bool = False
    chained: bool = False
    plain: bool = False

    @property
    def spec(self) -> OpSpec:
        family = self.kernel.family
        norm = replace(family.epilogue, eps=self.eps)
        if norm.quant == "group":
            norm = replace(norm, scale_strides=(1, self.rows) if self.column_major else (family.hidden // GROUP, 1))
        return replace(family, shape=(self.rows, family.hidden), epilogue=norm)

    def plan(self, world: World) -> Plan:
        if isinstance(self.kernel, Kernel):
            return nvlink_norm.plan_of(self.kernel.form, self.spec, world.world_size, world.layout)
        return world.engines[0].plan(self.spec)


class NormProgram(Program):
    """As ``Program``; a step has a buffer for each pointer of its call."""

    def __init__(self, world_size: int, calls: Sequence[NormCall | Call], seed: int):
        self.calls, self.buffers, self.steps, self.end, self.holes = list(calls), [], [], twin.GUARD, []
        filled: list[tuple[Buffer, NormCall | Call, str]] = []
        for call in self.calls:
            named = self._named(call)
            filled += [
                (buffer, call, name) for name, buffer in named.items() if buffer in self.buffers and name not in self._held
            ]
            self.steps.append((call, *(named[pointer.name] for pointer in call.spec.pointers)))
        self.before = [torch.full((self.end,), 0x5A, dtype=torch.uint8) for _ in range(world_size)]
        for rank, arena in enumerate(self.before):
            for i, (buffer, call, name) in enumerate(filled):
                buffer.of(arena).copy_(_values(call, name, buffer, random.Random(f"{seed} {rank} {i}")))
        self.after = [arena.clone() for arena in self.before]
        for call, *buffers in self.steps:
            want = reference.ordered_sum([buffers[0].of(arena) for arena in self.after])
            for arena in self.after:
                tensors = [buffer.of(arena) for buffer in buffers]
                if isinstance(call, NormCall):
                    norm_reference.run(replace(call.spec, operation="norm"), [want, *tensors[1:]])
                else:
                    tensors[1].copy_(want)

    def _named(self, call: NormCall | Call) -> dict[str, Buffer]:
        """The buffers of a call by name; ``_held`` are those which need no values."""
        self._held = {"output"}
        before = dict(zip((p.name for p in self.steps[-1][0].spec.pointers), self.steps[-1][1:])) if call.chained else {}
        spec, dtype = call.spec, getattr(torch, call.spec.dtype)
        x = before.get("norm", before.get("output")) or self._buffer(dtype, spec.numel)
        assert (x.dtype, x.numel) == (dtype, spec.numel), "a chain of calls of one dtype and size, not quantized unless kept"
        spare = x if call.in_place else before.get("input") or self._buffer(dtype, spec.numel)
        self._held |= set() if not before else {"input"}
        if isinstance(call, Call):
            return {"input": x, "output": spare}
        norm = spec.epilogue
        named = {"input": x, "weight": self._buffer(getattr(torch, norm.weight), spec.hidden)}
        residual = before.get("residual_out") or self._buffer(dtype, spec.numel)
        named["residual"] = residual
        named["residual_out"] = residual if call.in_place else before.get("residual") or self._buffer(dtype, spec.numel)
        self._held |= {"residual_out", "norm"} | ({"residual"} if "residual_out" in before else set())
        if norm.quant == "none":
            return named | {"output": spare}
        named |= {"norm": spare, "output": self._buffer(norm_reference.E4M3, spec.numel)}
        scales = {"static": 1, "token": spec.rows, "group": spec.numel // GROUP}[norm.quant]
        self._held |= {"scale"} if norm.quant != "static" else set()
        return named | {"scale": self._buffer(torch.float32, scales)}

    def check_rows(self, arena: torch.Tensor) -> int:
        """Of a call that may have failed, given numbers alone: a row of results is NaN, all of it, where an element of its sum is, and
        nowhere else. Returns how many rows are NaN."""
        lost = 0
        for call, *buffers in self.steps:
            spec, named = call.spec, dict(zip((p.name for p in call.spec.pointers), buffers))
            missing = named["residual_out"].of(arena).view(spec.rows, -1).isnan().any(-1)
            for name in {"output", "norm"} & set(named):
                nans = named[name].of(arena).float().isnan().view(spec.rows, -1)
                if not torch.equal(nans.all(-1), missing) or not torch.equal(nans.any(-1), missing):
                    raise Failed(
                        "bits",
                        f"{name}: rows NaN {nans.all(-1).tolist()}, in part {nans.any(-1).tolist()}; of the sum {missing.tolist()}",
                    )
            lost += int(missing.sum())
        return lost


def _values(call: NormCall | Call, name: str, buffer: Buffer, dice: random.Random) -> torch.Tensor:
    """Rows of several kinds."""
    generator = torch.Generator().manual_seed(dice.getrandbits(60))
    if name == "scale":
        return torch.rand(1, generator=generator) / 100
    if name == "weight":
        made = torch.randn(buffer.numel, generator=generator)
        made[::7] = -0.0
        return made
    hidden = call.spec.shape[-1]
    dtype, rows = call.spec.dtype, []
    for _ in range(buffer.numel // hidden):
        normal = torch.randn(hidden, generator=generator)
        kind = 0 if getattr(call, "plain", False) else dice.choice([0, 0, 0, 1, 2, 3, 4, 5])
        if kind in (1, 2):
            kind_of = reference.RANDOM if kind == 1 else reference.SPECIALS
            normal = reference.values(dice.getrandbits(30), 0, hidden, buffer.dtype, kind=kind_of).float()
        rows.append(normal * {3: 0.0, 4: TINY[dtype], 5: torch.finfo(buffer.dtype).max / 8}.get(kind, 1.0))
    return torch.cat(rows)


def modules(kernels: Sequence[Kernel], world_size: int, bare: Sequence[str] = ()) -> list[KernelSpec]:
    """Of these kernels, each once, and of all-reduces ``bare``."""
    specs = [norm_module(kernel.form, kernel.family, world_size) for kernel in kernels]
    return [*dict.fromkeys(specs), *(cuda_module(name, world_size) for name in bare)]


def world(objects: Path, world_size: int, kernels: Sequence[Kernel], *, bare: Sequence[str] = (), tsan: bool = False,
          edits: Sequence[Edit] = (), warps: int = WARPS, **options) -> World:  # fmt: skip
    built = modules(kernels, world_size, bare)
    options = {"relayout": partial(twin.cramped, warps=warps), **options}
    return World(twin.build(objects, world_size, tsan, edits, built), world_size, modules=built, **options)


def mixed(dice: random.Random, kernels: Sequence[Kernel], count: int, bare: Sequence[str] = (), most: int = 5, plain: bool = False,
          chains: bool = True) -> list[NormCall | Call]:  # fmt: skip
    """Everything changes from call to call; all-reduces ``bare`` take turns with the others."""
    calls: list[NormCall | Call] = [
        NormCall(each, dice.randint(1, most), in_place=dice.random() < 0.4, plain=plain) for each in kernels
    ]
    while len(calls) < count:
        options = {"in_place": dice.random() < 0.4, "chained": False}
        before = calls[-1] if calls else None
        alike = [k for k in kernels if before and chains and _follows(before, k)]
        if bare and dice.random() < 0.3:
            if before and chains and _has_norm(before) and dice.random() < 0.6:
                calls.append(
                    Call(dice.choice(bare), before.spec.dtype, before.spec.numel, chained=True, in_place=options["in_place"])
                )
            else:
                calls.append(Call(dice.choice(bare), dice.choice(["float32", "bfloat16"]), dice.randint(1, 600)))
            continue
        if alike and dice.random() < 0.6:
            chosen = dice.choice(alike)
            rows, options["chained"] = before.spec.numel // chosen.family.hidden, True
        else:
            chosen, rows = dice.choice(kernels), dice.randint(1, most)
        more = {"eps": dice.choice([0.0, 1e-5, 1e-6]), "column_major": dice.random() < 0.5}
        calls.append(NormCall(chosen, rows, **more, **options, plain=plain))
    return calls


def _has_norm(call: NormCall | Call) -> bool:
    return isinstance(call, Call) or call.spec.epilogue.quant == "none" or call.spec.epilogue.keep_norm


def _follows(before: NormCall | Call, kernel: Kernel) -> bool:
    family = kernel.family
    if not _has_norm(before) or before.spec.dtype != family.dtype or before.spec.numel % family.hidden:
        return False
    return before.spec.numel // family.hidden in range(1, 6) and getattr(before, "offset", 0) == 0
