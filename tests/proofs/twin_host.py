"""Calls through host memory for the CPU twin (twin.py): worlds of the engine of path host."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import twin
from twin import Call, Edit, Failed, World

from allreduce_jit.abi import Control, Header
from allreduce_jit.engine import reference
from allreduce_jit.engine.host import HostEngine
from allreduce_jit.policy import host
from allreduce_jit.policy.catalogue import HOST_ALGORITHMS, host_algorithms, host_module
from allreduce_jit.policy.operation import DTYPES
from allreduce_jit.policy.plan import HEADER_BYTES, Layout, Plan, Region

CHANNELS = 3  # few, so that a channel has many chunks


@dataclass(frozen=True)
class HostCall(Call):
    """``algorithm``: of ``HOST_ALGORITHMS``; ``channels``: warps that take turns."""

    channels: int = CHANNELS

    def plan(self, world: World) -> Plan:
        if self.algorithm is None:
            return world.engines[0].plan(self.spec)
        return host.plan_of(self.algorithm, self.block, self.channels, self.spec, world.world_size, world.layout)


class HostWorld(World):
    """As ``World``; its slots are outboxes, which begin as zeros and are never emptied."""

    EMPTY, POISONED = 0, False

    def _make_engines(self, pdl: bool, max_ctas: int | None) -> list:
        return [HostEngine(self._config(rank, pdl, max_ctas, bus_ids=(), tuned=None)) for rank in range(self.world_size)]

    def run(self, *args, **options) -> None:
        super().run(*args, **options)
        unused = slice(
            Header.parameters.offset, HEADER_BYTES
        )  # no call of this path has parameters, and the slots come right behind
        for rank in range(self.world_size):
            if self.staging(rank)[unused].any():
                raise Failed("header", f"of rank {rank}: written by who stores data")

    def near_abort_word(self, rank: int) -> int:
        """Address of the word that a rank's own process stops its kernels by, where they begin; for pokes."""
        return self._base + self._offsets[rank]["local"] + Control.abort.offset


def algorithms(world_size: int) -> list[str]:
    """All that a communicator of that size may have, and the stream, which serves any."""
    return list(dict.fromkeys([*host_algorithms(world_size), "host_stream"]))


def narrow(layout: Layout, world_size: int, channels: int = CHANNELS) -> Layout:
    """Of all of ``algorithms``, with few channels, and no byte between two of them."""
    regions, offset, first = {}, HEADER_BYTES, 0
    for name in algorithms(world_size):
        regions[name] = Region(offset, HOST_ALGORITHMS[name].slots(world_size), channels, first)
        offset, first = offset + channels * host.channel_bytes(name, world_size), first + channels
    return Layout(regions, offset, first)


def world(
    objects: Path, world_size: int, *, tsan: bool = False, edits: Sequence[Edit] = (), relayout=narrow, **options
) -> HostWorld:
    built = [host_module(name, world_size) for name in algorithms(world_size)]
    return HostWorld(twin.build(objects, world_size, tsan, edits, built), world_size, modules=built, relayout=relayout, **options)


def mixed(dice: random.Random, world_size: int, count: int, largest: int, kinds=(reference.RANDOM,), *, chains: bool = True,
          only: Sequence[str] = ()) -> list[Call]:  # fmt: skip
    """Sizes (up to 2**largest elements), dtypes, algorithms, channels and alignments that change from call to call."""
    calls: list[Call] = []
    for _ in range(count):
        algorithm, block = dice.choice(only or [*algorithms(world_size), None]), dice.choice([32, 32, 64, 96])
        channels, in_place = dice.randint(block // 32, CHANNELS), dice.random() < 0.3
        if calls and chains and dice.random() < 0.4:
            calls.append(replace(calls[-1], algorithm=algorithm, chained=True, in_place=in_place, channels=channels, block=block))
            continue
        numel = int(2 ** dice.uniform(0, largest)) if dice.random() < 0.97 else 0
        offset, dtype = dice.choice([0, 0, 1, 2, 3]), dice.choice(list(DTYPES))
        calls.append(HostCall(algorithm, dtype, numel, dice.choice(kinds), offset, in_place, False, block, channels))
    return calls
