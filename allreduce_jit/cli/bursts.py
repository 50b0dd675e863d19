"""Bursts of all-reduces with their data: every element of every call is compared, on the device.

A burst is a list of calls on slices of flat buffers, one buffer a dtype: one pass fills all inputs, the calls follow
each other without a pause, one pass compares all results. So a verified call costs hardly more than the call. Calls with
a norm have buffers of their own (``norm_bursts``).

Rank r's contribution to element i of call number c is 17·h(r, i) + (c mod 17), with small random h. All sums are
integers up to 256, which every dtype holds exactly in every order of adding. What is left over of an earlier
call gives another remainder: contributions of the last 16 calls differ modulo 17, and so do the sums of those of up
to 16 ranks, as long as all of the stale ones are equally old.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ..engine import reference
from ..harness.place import Place

MODULUS = 17
LARGEST_SUM = 256  # integers up to it are exact in bf16
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Call:
    """One all-reduce of a burst; ``offset`` in elements of its dtype's flat buffers."""

    numel: int
    dtype: torch.dtype
    in_place: bool
    offset: int

    @property
    def kind(self) -> torch.dtype:
        """What calls have in common that share buffers."""
        return self.dtype

    @property
    def title(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def buffers(self, place: Place, calls: Sequence[Any], seed: int) -> FlatBuffers:
        """Those of all ``calls`` of this kind."""
        return FlatBuffers(place, calls, self.dtype, seed)

    def algorithm(self, communicator: Any) -> str:
        return communicator.plan(self.numel, self.dtype).algorithm


def draw(dice: random.Random, most_calls: int, most_bytes: int, largest: int) -> list[Call]:
    """A burst's calls: sizes log-uniform from one element to ``largest`` bytes, ``most_bytes`` in all."""
    calls: list[Call] = []
    ends = dict.fromkeys(DTYPES.values(), 0)
    total = 0
    while len(calls) < most_calls:
        dtype = dice.choice(list(ends))
        numel = min(int(2 ** dice.uniform(0, (largest // dtype.itemsize).bit_length())), largest // dtype.itemsize)
        total += numel * dtype.itemsize
        if total > most_bytes and calls:
            break
        step = 16 // dtype.itemsize
        offset = -(-ends[dtype] // step) * step
        if dice.random() < 0.25:
            offset += dice.randrange(1, step)
        calls.append(Call(numel, dtype, dice.random() < 0.5, offset))
        ends[dtype] = offset + numel
    return calls


class FlatBuffers:
    """The buffers of all calls of one dtype in a burst, and the two passes over them."""

    def __init__(self, place: Place, calls: Sequence[Any], dtype: torch.dtype, seed: int):
        mine = [(index, call) for index, call in enumerate(calls) if call.kind is dtype]
        size = max((call.offset + call.numel for _, call in mine), default=0)
        n, device = place.world_size, place.device

        def full(value: Any, kind: torch.dtype) -> torch.Tensor:
            return torch.full((size,), value, dtype=kind, device=device)

        self.n = n
        self.call = full(-1, torch.int32)  # index of the call that an element belongs to, -1: a gap
        self.in_place = full(False, torch.bool)
        for index, call in mine:
            part = slice(call.offset, call.offset + call.numel)
            self.call[part] = index
            self.in_place[part] = call.in_place
        self.live = self.call >= 0
        self.age = self.call.clamp(min=0).remainder(MODULUS).to(torch.int16)
        contributions = [multiples(seed, rank, size, dtype, device, n) for rank in range(n)]
        self.mine, self.sum = contributions[place.rank], sum(contributions[1:], contributions[0])
        self.x, self.y, self.want = (full(0, dtype) for _ in range(3))
        self.phase, self.nan = torch.empty_like(self.age), torch.full((), torch.nan, dtype=dtype, device=device)
        self.wrong, self.bad = full(False, torch.bool), full(False, torch.bool)

    def bound(self, communicator: Any, call: Call) -> Callable[[], Any]:
        """The call, to be made in every turn."""
        part = slice(call.offset, call.offset + call.numel)
        return partial(communicator.all_reduce, (self.y if call.in_place else self.x)[part], out=self.y[part])

    def fill(self, phase: torch.Tensor) -> None:
        """Inputs of a turn in ``x``, or in ``y`` where the call is in place; elsewhere ``y`` holds NaN."""
        torch.add(self.age, phase, out=self.phase)
        self.phase.remainder_(MODULUS)
        torch.add(self.mine, self.phase, out=self.x)
        torch.where(self.in_place, self.x, self.nan, out=self.y)

    def compare(self, errors: torch.Tensor, clean: torch.Tensor) -> None:
        """Add the number of wrong elements to ``errors``; remember which they are if ``clean``: no earlier turn had any."""
        torch.add(self.sum, self.phase, alpha=self.n, out=self.want)
        torch.ne(self.y, self.want, out=self.wrong)
        self.wrong.logical_and_(self.live)
        errors.add_(self.wrong.sum())
        self.wrong.logical_and_(clean)
        self.bad.logical_or_(self.wrong)

    def found(self) -> Iterator[tuple[int, int]]:
        """(index of a call, wrong elements) of the first turn that had any."""
        yield from zip(*(t.tolist() for t in self.call[self.bad].unique(return_counts=True)))


def multiples(seed: int, rank: int, numel: int, dtype: torch.dtype, device: Any, world_size: int) -> torch.Tensor:
    """17·h: multiples of the modulus so small that all sums stay exact."""
    span = max(1, LARGEST_SUM // world_size // MODULUS * 2)
    small = reference.values(seed, rank, numel, dtype, device, kind=reference.INTEGERS, world_size=world_size)
    return small.remainder_(span).sub_(span // 2).mul_(MODULUS)


class Burst:
    """A list of calls with their data; ``turn`` runs and verifies all of them once, and may be captured.

    Errors are counted on the device; ``verdict`` reads them.
    """

    def __init__(self, place: Place, communicator: Any, calls: Sequence[Any], seed: int):
        self.calls = calls
        self.flats: dict[Any, Any] = {}
        for call in calls:
            if call.kind not in self.flats:
                self.flats[call.kind] = call.buffers(place, calls, seed)
        self.elements = sum(call.numel for call in calls)

        def scalar(kind: torch.dtype) -> torch.Tensor:
            return torch.zeros((), dtype=kind, device=place.device)

        self.phase, self.turns, self.errors, self.first = (
            scalar(kind) for kind in (torch.int16, torch.int64, torch.int64, torch.int64)
        )
        self.number = 0
        self._bound = [self.flats[call.kind].bound(communicator, call) for call in calls]

    def start(self, number: int) -> None:
        """The next turn's first call is the run's call ``number``; forget what was counted."""
        self.number = number
        self.phase.fill_(number % MODULUS)
        for counter in (self.turns, self.errors):
            counter.zero_()
        self.first.fill_(-1)
        for flat in self.flats.values():
            flat.bad.zero_()

    def turn(self, around: Callable[[Callable[[], Any]], Any]) -> None:
        """Fill, call, compare. ``around(call)`` makes each call."""
        for flat in self.flats.values():
            flat.fill(self.phase)
        for call in self._bound:
            around(call)
        clean = self.first < 0
        for flat in self.flats.values():
            flat.compare(self.errors, clean)
        self.first.copy_(torch.where(clean & (self.errors > 0), self.turns, self.first))
        self.turns.add_(1)
        self.phase.add_(len(self.calls)).remainder_(MODULUS)

    def verdict(self) -> tuple[int, list[tuple[int, Any, int]]]:
        """Wrong elements since ``start``; and of the first turn that had any: (call number, call, wrong elements)."""
        wrong = int(self.errors)
        if not wrong:
            return 0, []
        first, found = int(self.first), []
        for flat in self.flats.values():
            for index, count in flat.found():
                found.append((self.number + first * len(self.calls) + index, self.calls[index], count))
        return wrong, sorted(found, key=lambda one: one[0])
