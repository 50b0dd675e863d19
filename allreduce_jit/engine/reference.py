"""The exact answer: inputs every rank can regenerate, their ordered sum, and a comparison of bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch

RANDOM, INTEGERS, SPECIALS = "random", "integers", "specials"

# Bits of values on which sums go wrong first: ±0, ±1, ±Inf, NaNs (the all-ones word among them, which
# protocols use as "not arrived"), the smallest and largest subnormals, the smallest normal, the largest finite.
_SPECIAL_BITS = {
    torch.float32: (
        0x00000000, 0x80000000, 0x3F800000, 0xBF800000, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFFFFFFF,
        0x00000001, 0x80000001, 0x007FFFFF, 0x807FFFFF, 0x00800000, 0x80800000, 0x7F7FFFFF, 0xFF7FFFFF,
    ),
    torch.float16: (
        0x0000, 0x8000, 0x3C00, 0xBC00, 0x7C00, 0xFC00, 0x7E00, 0xFFFF,
        0x0001, 0x8001, 0x03FF, 0x83FF, 0x0400, 0x8400, 0x7BFF, 0xFBFF,
    ),
    torch.bfloat16: (
        0x0000, 0x8000, 0x3F80, 0xBF80, 0x7F80, 0xFF80, 0x7FC0, 0xFFFF,
        0x0001, 0x8001, 0x007F, 0x807F, 0x0080, 0x8080, 0x7F7F, 0xFF7F,
    ),
}  # fmt: skip
_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float8_e4m3fn: torch.int8}


@dataclass(frozen=True)
class Difference:
    """How far a result is from the reference.

    Attributes:
        wrong: number of elements whose bits differ (a NaN equals every NaN).
        first: index of the first of them, None if there is none.
        got: bits of that element, in hexadecimal.
        want: bits of the reference there.
    """

    wrong: int = 0
    first: int | None = None
    got: str = ""
    want: str = ""


def values(
    seed: int,
    rank: int,
    numel: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    *,
    kind: str = RANDOM,
    world_size: int = 8,
) -> torch.Tensor:
    """What ``rank`` contributes; the same bits on every device and every machine.

    Args:
        seed: of the whole run.
        rank: whose input it is.
        numel: number of elements of the 1-d result.
        dtype: fp32, fp16 or bf16.
        device: where the values are made.
        kind: ``random``: magnitudes spread over 2^-30 … 4, so that another order or a rounding in between
            shows; ``integers``: sums are exact in any order; ``specials``: zeros, infinities, NaNs, subnormals.
        world_size: how many such inputs are summed; keeps sums of ``integers`` exact.
    """
    bits = _hash(numel, _key(seed, rank, numel, dtype), device)
    if kind == SPECIALS:
        picks = bits.remainder_(len(_SPECIAL_BITS[dtype]))
        return _specials(dtype, device)[picks]
    if kind == INTEGERS:
        limit = max(1, min(8, 256 // world_size))
        return bits.remainder_(2 * limit + 1).sub_(limit).to(dtype)
    exponent = bits.bitwise_right_shift(40).bitwise_and_(31).add_(97).bitwise_left_shift_(23)
    sign_and_mantissa = bits.bitwise_and_(0x807FFFFF)
    return sign_and_mantissa.bitwise_or_(exponent).to(torch.int32).view(torch.float32).to(dtype)


def ordered_sum(inputs: Iterable[torch.Tensor]) -> torch.Tensor:
    """The fp32 sum in rank order, beginning with rank 0's values, rounded once to the inputs' dtype."""
    iterator = iter(inputs)
    first = next(iterator)
    total = first.to(torch.float32, copy=True)
    for tensor in iterator:
        total += tensor.to(torch.float32)
    return total.to(first.dtype)


def expected(
    seed: int, world_size: int, numel: int, dtype: torch.dtype, device: torch.device | str = "cpu", *, kind: str = RANDOM
) -> torch.Tensor:
    """The reference for a call in which each rank passes its ``values``."""
    return ordered_sum(values(seed, rank, numel, dtype, device, kind=kind, world_size=world_size) for rank in range(world_size))


def compare(actual: torch.Tensor, want: torch.Tensor) -> Difference:
    """Compare two tensors of one shape and dtype bit by bit; a NaN of any payload equals a NaN."""
    got_bits, want_bits = as_bits(actual), as_bits(want)
    differs = (got_bits != want_bits) & ~(actual.float().isnan() & want.float().isnan())  # e4m3 has no isnan of its own
    wrong = int(differs.sum())
    if not wrong:
        return Difference()
    first = int(differs.reshape(-1).to(torch.uint8).argmax())
    width = actual.element_size() * 8
    got, right = (int(t.reshape(-1)[first]) & ((1 << width) - 1) for t in (got_bits, want_bits))
    return Difference(wrong, first, f"{got:#0{width // 4 + 2}x}", f"{right:#0{width // 4 + 2}x}")


def as_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bits as integers of the same width."""
    return tensor.view(_BITS[tensor.dtype])


def poison(tensor: torch.Tensor) -> None:
    """Fill with a pattern that no sum yields, so that elements nobody wrote are seen."""
    as_bits(tensor).fill_({4: 0x5A5A5A5A, 2: 0x5A5A, 1: 0x5A}[tensor.element_size()])


def _specials(dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    width = 8 * dtype.itemsize
    signed = [b - (1 << width) if b >> (width - 1) else b for b in _SPECIAL_BITS[dtype]]
    return torch.tensor(signed, dtype=_BITS[dtype], device=device).view(dtype)


def _key(seed: int, rank: int, numel: int, dtype: torch.dtype) -> int:
    digest = hashlib.blake2b(f"{seed}/{rank}/{numel}/{dtype}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _hash(numel: int, key: int, device: torch.device | str) -> torch.Tensor:
    """63 well-mixed bits per index, in int64.

    Integer arithmetic rather than a ``torch.Generator``: a generator's stream depends on the device, and the
    ranks of one group need not run on the same model.
    """
    x = torch.arange(numel, dtype=torch.int64, device=device).mul_(-7046029254386353131).add_(key)
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        x ^= x.bitwise_right_shift(shift)
        x *= factor
    x ^= x.bitwise_right_shift(31)
    return x.bitwise_and_(0x7FFFFFFFFFFFFFFF)
