"""The reference sum, the inputs, and the comparison, against exact arithmetic and single bits."""

import struct
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allreduce_jit.engine import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
INF, NAN = float("inf"), float("nan")


def total(*columns, dtype=torch.float32):
    """The reference's sum of one scalar per rank."""
    return reference.ordered_sum([torch.tensor([c], dtype=dtype) for c in columns])


def bits(tensor):
    return int(reference.as_bits(tensor)[0]) & ((1 << 8 * tensor.element_size()) - 1)


def fp32(value):
    """``value`` rounded to fp32, half to even, by the C library rather than by torch."""
    return struct.unpack("f", struct.pack("f", value))[0]


@given(st.lists(st.floats(width=32, min_value=-(2**99), max_value=2**99), min_size=1, max_size=8))
@settings(max_examples=200, deadline=None)
def test_sum_rounds_to_fp32_after_every_rank_in_order(column):
    want = fp32(column[0])
    for value in column[1:]:
        # A double holds the exact sum or rounds harmlessly: 53 bits are more than twice 24 and two.
        want = fp32(want + value)
    assert bits(total(*column)) == bits(torch.tensor([want]))


def test_order_matters_and_is_rank_order():
    assert total(1e8, -1e8, 1.0).item() == 1.0
    assert total(1e8, 1.0, -1e8).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_types_round_once(dtype):
    # One unit in the last place above 1 is twice as much as either small term: rounding in between loses both.
    ulp = torch.finfo(dtype).eps
    assert total(1.0, ulp / 2, ulp / 2, dtype=dtype).item() == 1.0 + ulp


@dtypes
def test_half_way_rounds_to_even(dtype):
    ulp = torch.finfo(dtype).eps
    assert total(1.0, ulp / 2, dtype=dtype).item() == 1.0
    assert total(1.0 + ulp, ulp / 2, dtype=dtype).item() == 1.0 + 2 * ulp


@dtypes
def test_zeros_keep_their_sign(dtype):
    sign = 1 << (8 * dtype.itemsize - 1)
    assert bits(total(-0.0, -0.0, -0.0, dtype=dtype)) == sign
    assert bits(total(-0.0, 0.0, dtype=dtype)) == 0
    assert bits(total(1.0, -1.0, dtype=dtype)) == 0
    assert bits(total(-0.0, dtype=dtype)) == sign


@dtypes
def test_infinities_and_nans(dtype):
    assert total(INF, 1.0, INF, dtype=dtype).item() == INF
    assert total(-INF, 5.0, dtype=dtype).item() == -INF
    assert total(INF, -INF, dtype=dtype).isnan().item()
    assert total(1.0, NAN, dtype=dtype).isnan().item()
    largest = torch.finfo(dtype).max
    assert total(largest, largest, dtype=dtype).item() == INF


def test_overflow_on_the_way_is_fp32s_alone():
    largest = torch.finfo(torch.float16).max
    assert total(largest, largest, -largest, dtype=torch.float16).item() == largest
    largest = torch.finfo(torch.float32).max
    assert total(largest, largest, -largest).item() == INF


@dtypes
def test_subnormals_are_not_flushed(dtype):
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert bits(total(smallest, smallest, dtype=dtype)) == 2
    assert bits(total(-smallest, dtype=dtype)) == (1 << (8 * dtype.itemsize - 1)) + 1


def test_sum_leaves_its_inputs_alone():
    first = torch.ones(4)
    reference.ordered_sum([first, torch.ones(4)])
    assert first.tolist() == [1.0] * 4


@dtypes
@pytest.mark.parametrize("kind", [reference.RANDOM, reference.INTEGERS, reference.SPECIALS])
def test_inputs_can_be_made_again_and_differ_by_rank_and_seed(dtype, kind):
    made = reference.values(7, 2, 1000, dtype, kind=kind)
    assert made.dtype == dtype and made.shape == (1000,)
    assert reference.as_bits(made).equal(reference.as_bits(reference.values(7, 2, 1000, dtype, kind=kind)))
    for seed, rank in ((7, 3), (8, 2)):
        other = reference.values(seed, rank, 1000, dtype, kind=kind)
        assert (reference.as_bits(made) != reference.as_bits(other)).float().mean() > 0.5


def test_inputs_are_the_same_bits_on_every_machine():
    made = reference.as_bits(reference.values(0, 0, 4, torch.float32))
    assert made.tolist() == [-1174007625, 819975978, 838467164, -1068984101]


@dtypes
def test_random_inputs_are_finite_spread_and_mostly_not_zero(dtype):
    made = reference.values(0, 0, 20000, dtype).double()
    assert made.abs().max() <= 4 and (made == 0).double().mean() < 0.25
    assert 0.4 < (made < 0).double().mean() < 0.55
    assert made.abs().max() / made[made != 0].abs().min() > 2**20


def test_random_inputs_show_a_wrong_order_and_an_early_rounding():
    inputs = [reference.values(0, rank, 4096, torch.float32) for rank in range(4)]
    assert reference.compare(reference.ordered_sum(inputs[::-1]), reference.ordered_sum(inputs)).wrong > 400
    halves = [reference.values(0, rank, 4096, torch.bfloat16) for rank in range(4)]
    early = ((halves[0] + halves[1]) + halves[2]) + halves[3]
    assert reference.compare(early, reference.ordered_sum(halves)).wrong > 400


@dtypes
@pytest.mark.parametrize("world_size", [2, 8, 200])
def test_integers_are_exact_in_any_order_and_any_precision(dtype, world_size):
    kind = reference.INTEGERS
    inputs = [reference.values(1, rank, 64, dtype, kind=kind, world_size=world_size) for rank in range(world_size)]
    assert all(t.double().equal(t.double().round()) for t in inputs)
    exact = [float(sum(Fraction(t[i].item()) for t in inputs)) for i in range(64)]
    assert reference.ordered_sum(inputs).tolist() == exact
    low = inputs[-1].clone()
    for tensor in reversed(inputs[:-1]):
        low += tensor
    assert low.tolist() == exact


@dtypes
def test_specials_hold_every_kind_of_value(dtype):
    made = reference.values(0, 0, 4096, dtype, kind=reference.SPECIALS)
    found = {int(b) & ((1 << 8 * dtype.itemsize) - 1) for b in reference.as_bits(made)}
    smallest = torch.finfo(dtype).smallest_normal
    assert {0, 1 << (8 * dtype.itemsize - 1), (1 << 8 * dtype.itemsize) - 1} <= found
    assert made.isnan().any() and made.isposinf().any() and made.isneginf().any()
    assert ((made.double().abs() < smallest) & (made != 0)).any()


@dtypes
@pytest.mark.parametrize("numel", [0, 1])
def test_tiny_inputs(dtype, numel):
    assert reference.expected(0, 3, numel, dtype).shape == (numel,)
    assert reference.compare(reference.expected(0, 3, numel, dtype), reference.expected(0, 3, numel, dtype)).wrong == 0


@dtypes
def test_compare_counts_elements_and_shows_the_first(dtype):
    want = reference.values(0, 0, 100, dtype)
    got = want.clone()
    reference.as_bits(got)[[17, 40, 99]] ^= 1
    difference = reference.compare(got, want)
    assert (difference.wrong, difference.first) == (3, 17)
    assert int(difference.got, 16) ^ int(difference.want, 16) == 1


def test_compare_tells_zeros_apart_but_not_nans():
    got = torch.tensor([0.0, NAN, 1.0])
    want = torch.tensor([-0.0, NAN, NAN])
    reference.as_bits(got)[1] = -1
    difference = reference.compare(got, want)
    assert (difference.wrong, difference.first) == (2, 0)
    assert (difference.got, difference.want) == ("0x00000000", "0x80000000")


@dtypes
def test_poison_is_no_value_of_a_sum(dtype):
    tensor = torch.zeros(8, dtype=dtype)
    reference.poison(tensor)
    assert reference.compare(tensor, reference.expected(0, 2, 8, dtype)).wrong == 8
    assert not tensor.isnan().any()
