"""The reference of the norms: each step against exact arithmetic, all of it against float64, and how the modes differ."""

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from helpers.norms import Case, cases, difference, given, options, taken

from allreduce_jit.engine import norm_reference, reference
from allreduce_jit.operands import operands
from allreduce_jit.policy.norm import GROUP, LEAST_GROUP_ABSMAX, LEAST_TOKEN_SCALE, Norm

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def fp32(value):
    """``value`` (exact, or float64) rounded once to fp32, as a float."""
    return float(np.float32(value))


# -- rsqrt


def misrounded(root, bits):
    """Of fp32 numbers (as bits) in [1, 4), those for which ``root`` is not the correctly rounded 1 / sqrt."""
    x = bits.view(np.float32)
    got = root(x)
    wide = 1 / np.sqrt(x.astype(np.float64))
    # Where float64, off by 2^-52 of its value at most, is far from the middle between two neighbours, it is right about the nearest.
    low = wide.astype(np.float32)
    low = np.where(low > wide, np.nextafter(low, np.float32(0)), low)
    high = np.nextafter(low, np.float32(2))
    middle = (low.astype(np.float64) + high) / 2  # exact
    nearest = np.where(wide < middle, low, high)
    close = np.abs(wide - middle) <= wide * 2**-50
    wrong = [int(b) for b in bits[(got != nearest) & ~close]]
    for b, value, m, below, above in zip(*(array[close] for array in (bits, got, middle, low, high)), strict=True):
        # Is 1 / sqrt(x) below the middle? In integers, scaled by powers of 2: m^2 x against 1. They are never equal: m has 25 bits.
        exact = Fraction(float(m)) ** 2 * Fraction(float(np.uint32(b).view(np.float32)))
        assert exact != 1
        if value != (below if exact > 1 else above):
            wrong.append(int(b))
    return wrong, int(close.sum())


@pytest.mark.parametrize("first", [0x3F800000, 0x40000000], ids=["odd", "even"])
def test_rsqrt_is_correctly_rounded(first):
    """All mantissas with exponents of both parities; all other numbers differ from these by a power of 4, and results of 2."""
    bits = np.arange(first, first + (1 << 23), dtype=np.uint32)
    wrong, close = misrounded(lambda x: norm_reference.rsqrt(torch.from_numpy(x)).numpy(), bits)
    assert not wrong
    assert close < 100  # looked at one by one; that branch has its own test


def test_the_proof_sees_a_wrong_rounding():
    bits = np.arange(0x3F800000, 0x3F800000 + (1 << 16), dtype=np.uint32)
    wrong, _ = misrounded(lambda x: np.float32(1) / np.sqrt(x), bits)
    assert len(wrong) > 100
    lone = np.array([0x3F812345], dtype=np.uint32)
    right = norm_reference.rsqrt(torch.from_numpy(lone.view(np.float32))).numpy()
    assert misrounded(lambda x: right, lone)[0] == []
    for other in (0, 2):
        assert misrounded(lambda x: np.nextafter(right, np.float32(other)), lone)[0] == [0x3F812345]


def test_rsqrt_of_the_rest():
    x = torch.tensor([0.0, math.inf, math.nan, 2.0**-149, 2.0**-148, 3 * 2.0**-149, 2.0**127, -1.0])
    got = norm_reference.rsqrt(x)
    want = [math.inf, 0.0, math.nan, fp32(2**74.5), 2.0**74, fp32(2**74.5 / math.sqrt(3)), fp32(2**-63.5), math.nan]
    assert reference.compare(got, torch.tensor(want)).wrong == 0


# -- the tree


def by_hand(values):
    """The tree, one fp32 addition after the other."""
    values = [*values, *[0.0] * ((1 << (len(values) - 1).bit_length()) - len(values))]
    while len(values) > 1:
        values = [
            fp32(a + b) for a, b in zip(values[::2], values[1::2], strict=True)
        ]  # a sum of two in float64 rounds harmlessly
    return values[0]


@pytest.mark.parametrize("hidden", [64, 72, 2880, 4096])
def test_the_tree_adds_neighbours_first(hidden):
    others = []
    for seed in range(20):
        x = torch.randn(hidden, generator=torch.Generator().manual_seed(seed)) ** 2
        want = by_hand(x.tolist())
        assert norm_reference.tree(x[None]).tolist() == [want]
        halves = torch.nn.functional.pad(x, (0, (1 << (hidden - 1).bit_length()) - hidden)).view(2, -1).t().reshape(-1)
        others.append((norm_reference.tree(halves).item() == want, float(np.cumsum(x.numpy())[-1]) == want))
    assert not all(halved for halved, _ in others) and not all(in_turn for _, in_turn in others)


def test_a_row_ends_in_zeros():
    x = torch.rand(4, 72)
    padded = torch.nn.functional.pad(x, (0, 56))
    assert torch.equal(norm_reference.tree(x), norm_reference.tree(padded))


# -- a row, one operation after the other


def narrow(value, dtype):
    return torch.tensor(value, dtype=torch.float32).to(dtype).float().item()


def row_by_hand(x, residual, weight, norm, hidden, dtype):
    """(residual_out, norm) of one row of floats. Products and sums of two fp32 numbers are exact in float64, or round harmlessly."""
    a = [fp32(x[i] + residual[i]) for i in range(hidden)] if residual else x
    t = [narrow(value, dtype) for value in a]
    v = a if norm.rounding == "U" else t
    mean = fp32(by_hand([fp32(value * value) for value in v]) * fp32(1 / hidden))
    r = fp32(1 / math.sqrt(fp32(mean + norm.eps)))
    n = [fp32(value * r) for value in v]
    if norm.rounding == "H":
        n = [narrow(value, dtype) for value in n]
    return t, [narrow(fp32(n[i] * fp32(weight[i] + norm.weight_bias)), dtype) for i in range(hidden)]


@dtypes
@pytest.mark.parametrize("rounding", ["R", "U", "H"])
def test_a_row_by_hand(dtype, rounding):
    for hidden, bias, residual, weight_dtype in (
        (64, 0, True, dtype),
        (72, 1, False, torch.float32),
        (2880, 1, True, torch.float32),
    ):
        case = Case(
            str(dtype).removeprefix("torch."), hidden, 2, rounding, "none", residual, weight_dtype is not dtype, bias, 1e-5
        )
        tensors = given(case)
        norm = Norm(rounding, weight_bias=bias, eps=fp32(1e-5))
        got = norm_reference.normed(tensors["x"], tensors["residual"], tensors["weight"], norm)
        for row in range(2):
            rows = [None if tensors[name] is None else tensors[name][row].float().tolist() for name in ("x", "residual")]
            t, y = row_by_hand(*rows, tensors["weight"].float().tolist(), norm, hidden, dtype)
            assert reference.compare(got.residual_out[row], torch.tensor(t, dtype=dtype)).wrong == 0
            assert reference.compare(got.norm[row], torch.tensor(y, dtype=dtype)).wrong == 0


# -- all of it, against float64


@dtypes
@pytest.mark.parametrize("hidden", [64, 4096])
def test_within_a_unit_of_float64(dtype, hidden):
    generator = torch.Generator().manual_seed(hidden)
    x, residual = (torch.randn(64, hidden, generator=generator).to(dtype) for _ in range(2))
    weight = torch.randn(hidden, generator=generator).to(dtype)
    found = {}
    for rounding in "RUH":
        got = norm_reference.normed(x, residual, weight, Norm(rounding, eps=fp32(1e-6)))
        total = x.float() + residual.float()
        v = (total if rounding == "U" else total.to(dtype)).double()
        exact = v / torch.sqrt((v * v).mean(-1, keepdim=True) + fp32(1e-6)) * weight.double()
        kind = torch.finfo(dtype)
        unit = kind.eps * torch.exp2(exact.abs().log2().floor()).clamp(min=kind.smallest_normal)
        # fp32 rounds in six places on the way, H in two of T; each by half a unit at most, which may be two of the result's.
        most = {"H": 2.0}.get(rounding, 1.0) if dtype is not torch.float32 else 4.0
        assert (((got.norm.double() - exact).abs() / unit).nan_to_num().max()) <= most
        found[rounding] = got
        assert torch.equal(got.residual_out, total.to(dtype))
    same = [torch.equal(found[a].norm, found[b].norm) for a, b in ("RU", "RH", "UH")]
    assert same == [dtype is torch.float32] * 3
    if dtype is torch.bfloat16 and hidden == 4096:  # as it was measured when this arithmetic was chosen
        share = [float((found["R"].norm != found[other].norm).float().mean()) for other in "UH"]
        assert 0.1 < share[0] < 0.4 and 0.1 < share[1] < 0.4


# -- quantized


def e4m3():
    """All finite values of e4m3 that are not negative, with their bits."""
    bits = torch.arange(0x7F, dtype=torch.uint8)
    return bits.view(torch.float8_e4m3fn).float().tolist(), bits.tolist()


def test_quantized_to_nearest_even():
    values, bits = e4m3()
    assert values[-1] == 448 and values[:3] == [0, 2**-9, 2**-8]
    asked, want = [*values], [*bits]
    for i, (low, high) in enumerate(zip(values, values[1:])):
        middle = (low + high) / 2
        asked += [
            middle,
            float(np.nextafter(np.float32(middle), np.float32(0))),
            float(np.nextafter(np.float32(middle), np.float32(999))),
        ]
        want += [bits[i] + bits[i] % 2, bits[i], bits[i] + 1]
    asked += [449, 464, 465, 480, 1e30, math.inf, math.nan]
    want += [0x7E] * 6 + [0x7F]
    y = torch.tensor([asked, [-value for value in asked]])
    got = norm_reference.quantized(y, torch.tensor(1.0)).view(torch.uint8)
    assert got[0].tolist() == want
    assert [b & 0x7F for b in got[1].tolist()] == want and all(b >> 7 for b in got[1].tolist()[:-1])


def test_multiplied_by_the_rounded_reciprocal():
    scale = torch.rand(500) / 50 + 1e-3
    y = torch.randn(1, 500)
    for s in scale:
        inverse = fp32(1 / float(s))
        want = torch.tensor([fp32(value * inverse) for value in y[0].tolist()]).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(norm_reference.quantized(y, s)[0].view(torch.uint8), want.view(torch.uint8))


def test_scales_of_tokens_and_groups():
    y = torch.randn(5, 384).bfloat16()
    y[1] = 0
    y[2, 200] = math.nan
    y[3, 5] = -math.inf
    y[4] *= 1e-20
    absmax = y.float().abs().view(5, 3, GROUP).amax(-1)
    token, group = norm_reference._scales(y, "token"), norm_reference._scales(y, "group")
    assert (token.shape, group.shape) == ((5, 1), (5, 3))
    assert token[0].item() == fp32(Fraction(absmax[0].max().item()) / 448)
    assert group[0].tolist() == [fp32(Fraction(value) / 448) for value in absmax[0].tolist()]
    least = fp32(Fraction(fp32(LEAST_GROUP_ABSMAX)) / 448)
    assert token[[1, 4]].tolist() == [[fp32(LEAST_TOKEN_SCALE)]] * 2 and group[[1, 4]].tolist() == [[least] * 3] * 2
    assert token[2].isnan().all() and group[2].isnan().tolist() == [False, True, False]
    assert token[3].item() == math.inf and group[3].isinf().tolist() == [True, False, False]
    # Nothing is lost of what no NaN and no infinity touches.
    q = norm_reference.quantized(y, group).float().view(5, 3, GROUP) * group[..., None]
    exact = y.float().view(5, 3, GROUP)
    fine = absmax.isfinite()[..., None].expand_as(exact) & (absmax[..., None] > LEAST_GROUP_ABSMAX)
    assert bool(((q - exact).abs() <= absmax[..., None] * 2**-4)[fine].all())
    assert norm_reference.quantized(y, group).view(5, 3, GROUP)[2, 1].float().isnan().all()


# -- into tensors


def test_any_case_is_what_its_parts_are():
    """Strides, absent tensors and tensors that are written over change nothing."""
    for case in cases([64, 384], rows=(0, 1, 7)):
        call = taken(case)
        norm_reference.run(call.spec, call.tensors)
        tensors = given(case)
        norm = replace(call.spec.epilogue, keep_norm=True)
        whole = norm_reference.normed(tensors["x"], tensors["residual"], tensors["weight"], norm, tensors["scale"])
        want = [whole.norm if case.quant == "none" else whole.quantized]
        if case.quant != "none":
            want.append(torch.empty_strided(call.results[1].shape, call.results[1].stride()).copy_(whole.scale))
        want += [whole.residual_out, *[whole.norm] * case.keep_norm]
        assert not difference(case, call.results, want), case


def test_no_rows():
    case = Case("bfloat16", 64, 0, quant="token", keep_norm=True)
    call = operands(**given(case), **options(case), operation="norm", device=torch.device("cpu"), index=-1, rank=None)
    norm_reference.run(call.spec, call.tensors)
    assert [tuple(result.shape) for result in call.results] == [(0, 64), (0, 1), (0, 64), (0, 64)]
