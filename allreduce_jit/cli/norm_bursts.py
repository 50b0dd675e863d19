"""Calls with a norm in bursts: rows of one matrix per kind, compared with the exact results, which torch's operations make on the device.

The sums are those of ``bursts``: integers that tell a call from those before it. Residual and weight are random, so that the norms of
these sums round like any others.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..bench.norm_calls import NormKind, has_e4m3
from ..engine import reference
from ..harness.place import Place
from ..policy.operation import ITEMSIZE
from .bursts import MODULUS, multiples

# Elements of a row on GPUs and, for these are slow, on CPUs; what is normalized how.
_KINDS: tuple[tuple[int, int, str, dict[str, Any]], ...] = (
    (4096, 128, "bfloat16", {}),
    (8192, 256, "bfloat16", {}),
    (2880, 88, "float16", {"rounding": "U"}),
    (5120, 160, "bfloat16", {"rounding": "H", "weight": "float32", "weight_bias": 1}),
    (1024, 64, "float32", {"residual": False}),
    (4096, 128, "bfloat16", {"quant": "static"}),
    (7168, 224, "bfloat16", {"quant": "token", "with_norm": True}),
    (6144, 384, "float16", {"rounding": "U", "quant": "group", "column_major": True}),
)
_E4M3_NAN = 0x7F


def kinds(place: Place) -> tuple[NormKind, ...]:
    """What a soak calls; the same on all ranks. Collective."""
    e4m3 = all(place.gather(has_e4m3(place.device)))
    on_gpu = place.device.type == "cuda"
    found = (NormKind(dtype, large if on_gpu else small, **how) for large, small, dtype, how in _KINDS)
    return tuple(kind for kind in found if e4m3 or kind.quant == "none")


@dataclass(frozen=True)
class NormCall:
    """One call of a burst; ``first``: its first row in the buffers of its kind. In place: the norm goes into x if it may, and the sum
    into the residual."""

    kind: NormKind
    rows: int
    in_place: bool
    first: int

    @property
    def numel(self) -> int:
        return self.rows * self.kind.hidden

    @property
    def title(self) -> str:
        return str(self.kind)

    def buffers(self, place: Place, calls: Sequence[Any], seed: int) -> NormBuffers:
        """Those of all ``calls`` of this kind."""
        return NormBuffers(place, calls, self.kind, seed)

    def algorithm(self, communicator: Any) -> str:
        return communicator.plan_norm(self.rows, self.kind.family).algorithm


def one_of_each(kinds: Sequence[NormKind]) -> list[NormCall]:
    return [NormCall(kind, 1, False, 0) for kind in kinds]


def draw(dice: random.Random, most_calls: int, most_bytes: int, largest: int, kinds: Sequence[NormKind]) -> list[NormCall]:
    """A burst's calls: numbers of rows log-uniform up to ``largest`` bytes, ``most_bytes`` in all."""
    calls: list[NormCall] = []
    ends = dict.fromkeys(kinds, 0)
    total = 0
    while len(calls) < most_calls:
        kind = dice.choice(kinds)
        row = kind.hidden * ITEMSIZE[kind.dtype]
        most = max(1, largest // row)
        rows = min(int(2 ** dice.uniform(0, most.bit_length())), most)
        total += rows * row
        if total > most_bytes and calls:
            break
        calls.append(NormCall(kind, rows, dice.random() < 0.5, ends[kind]))
        ends[kind] += rows
    return calls


class NormBuffers:
    """The matrices of all calls of one kind in a burst, and the two passes over them."""

    def __init__(self, place: Place, calls: Sequence[Any], kind: NormKind, seed: int):
        mine = [(index, call) for index, call in enumerate(calls) if call.kind == kind]
        rows, n, device = sum(call.rows for _, call in mine), place.world_size, place.device
        self.kind, self.n = kind, n
        self.call = torch.empty(rows, dtype=torch.int32, device=device)  # index of the call that a row belongs to
        self.in_place = torch.empty(rows, 1, dtype=torch.bool, device=device)
        for index, call in mine:
            self.call[call.first :][: call.rows] = index
            self.in_place[call.first :][: call.rows] = call.in_place
        self.age = self.call.remainder(MODULUS).to(torch.int16)
        shape, dtype = (rows, kind.hidden), kind.torch_dtype
        contributions = [multiples(seed, rank, rows * kind.hidden, dtype, device, n).view(shape) for rank in range(n)]
        self.mine, self.sum = contributions[place.rank], sum(contributions[1:], contributions[0])
        self.given = kind.given(seed, rows, device)
        self.x, self.total = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.outs = kind.outs(rows, device)
        # The output that may be x, and what each output holds before a call: NaN, if not the input in whose place it goes.
        self.over_x = {"none": "out"}.get(kind.quant, "norm_out" if kind.with_norm else None)
        self.phase, self.nan = torch.empty_like(self.age), torch.full((), torch.nan, dtype=dtype, device=device)
        self.bad = torch.zeros(rows, dtype=torch.int64, device=device)

    def bound(self, communicator: Any, call: NormCall) -> Callable[[], Any]:
        """The call, to be made in every turn."""

        def part(matrix: torch.Tensor) -> torch.Tensor:
            return matrix[call.first :][: call.rows]

        outs = {name: part(matrix) for name, matrix in self.outs.items()}
        given = self.given
        residual = given.residual
        if residual is not None:
            residual = outs["residual_out"] if call.in_place else part(residual)
        x = outs[self.over_x] if call.in_place and self.over_x else part(self.x)
        return self.kind.fused(communicator, x, replace(given, residual=residual), outs)

    def fill(self, phase: torch.Tensor) -> None:
        """Inputs of a turn; outputs hold NaN, or what a call in place reads."""
        torch.add(self.age, phase, out=self.phase)
        self.phase.remainder_(MODULUS)
        torch.add(self.mine, self.phase.unsqueeze(1), out=self.x)
        for name, out in self.outs.items():
            source = self.x if name == self.over_x else self.given.residual if name == "residual_out" else None
            if source is not None:
                torch.where(self.in_place, source, self.nan, out=out)
            elif out.element_size() == 1:
                reference.as_bits(out).fill_(_E4M3_NAN)
            else:
                out.fill_(torch.nan)

    def compare(self, errors: torch.Tensor, clean: torch.Tensor) -> None:
        """Add the number of wrong elements to ``errors``; remember in which rows they are if ``clean``: no earlier turn had any."""
        torch.add(self.sum, self.phase.unsqueeze(1), alpha=self.n, out=self.total)
        want = self.kind.expected(self.total, self.given)
        for name, right in want.items():
            wrong = (reference.as_bits(self.outs[name]) != reference.as_bits(right)).sum(1)
            errors.add_(wrong.sum())
            self.bad.add_(wrong * clean)

    def found(self) -> Iterator[tuple[int, int]]:
        """(index of a call, wrong elements) of the first turn that had any."""
        for index in self.call[self.bad > 0].unique().tolist():
            yield index, int(self.bad[self.call == index].sum())
