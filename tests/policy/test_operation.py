"""Calls as values: families, what a call binds, and where each launch begins."""

from dataclasses import replace

import pytest

from allreduce_jit.policy.norm import HIDDEN, QUANTS, ROUNDINGS, Norm
from allreduce_jit.policy.operation import DTYPES, NORMS, OPERATIONS, OpSpec, all_reduce


def norm_spec(quant="none", rows=7, hidden=2880, dtype="bfloat16", **more):
    return OpSpec("all_reduce_norm", dtype, (rows, hidden), Norm(quant=quant, weight=dtype, **more))


def bound(spec, start):
    """Bytes at which a launch begins whose first element is ``start``, by the pointers' names: whole ones, as of any address."""
    found = {pointer.name: pointer.offset(start) for pointer in spec.pointers}
    assert {*map(type, found.values())} == {int}
    return found


def test_all_reduce_binds_two_tensors_by_the_element():
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        spec = all_reduce(dtype, 99)
        assert list(bound(spec, 5).items()) == [("input", 5 * itemsize), ("output", 5 * itemsize)]
        assert (spec.numel, spec.nbytes) == (99, 99 * itemsize)
    assert spec.family == all_reduce("bfloat16") and spec.family.epilogue is None


@pytest.mark.parametrize(
    ("quant", "more", "want"),
    [
        ("none", {}, {"input": 2, "output": 2, "residual": 2, "weight": 0, "residual_out": 2}),
        ("none", {"residual": False}, {"input": 2, "output": 2, "weight": 0, "residual_out": 2}),
        ("static", {}, {"input": 2, "output": 1, "residual": 2, "weight": 0, "residual_out": 2, "scale": 0}),
        ("static", {"keep_norm": True, "residual": False}, {"input": 2, "output": 1, "weight": 0, "residual_out": 2, "scale": 0, "norm": 2}),
    ],
)  # fmt: skip
def test_norms_bind_whole_rows(quant, more, want):
    spec = norm_spec(quant, **more)
    assert list(bound(spec, 3 * 2880).items()) == [(name, 3 * 2880 * itemsize) for name, itemsize in want.items()]
    assert set(bound(spec, 0).values()) == {0}


def test_scales_advance_by_the_row():
    start = 5 * 2880
    assert bound(norm_spec("token"), start)["scale"] == 5 * 4
    assert bound(norm_spec("group", scale_strides=(22, 1)), start)["scale"] == 5 * 22 * 4
    assert bound(norm_spec("group", scale_strides=(1, 7)), start)["scale"] == 5 * 4  # column-major
    assert bound(norm_spec("group", dtype="float32", scale_strides=(22, 1)), start) == {
        "input": 4 * start,
        "output": start,
        "residual": 4 * start,
        "weight": 0,
        "residual_out": 4 * start,
        "scale": 5 * 22 * 4,
    }


def test_a_family_is_all_that_one_kernel_computes():
    for rounding in ROUNDINGS:
        for quant in QUANTS:
            for dtype in DTYPES:
                spec = OpSpec("norm", dtype, (3, 64), Norm(rounding, quant, False, "float32", 1, 1e-5, True, (1, 3)))
                family = OpSpec("norm", dtype, (0, 64), Norm(rounding, quant, False, "float32", 1, keep_norm=True))
                assert spec.family == family == family.family
                assert replace(spec, shape=(5, 64)).family == family != replace(spec, shape=(3, 72)).family
    assert norm_spec().family != norm_spec("token").family != replace(norm_spec("token"), operation="norm").family


def test_rows_and_hidden():
    spec = norm_spec(rows=0)
    assert (spec.rows, spec.hidden, spec.numel, spec.nbytes) == (0, 2880, 0, 0)
    for name in ("rows", "hidden", "numel"):
        with pytest.raises(ValueError, match="is a family of calls"):
            getattr(all_reduce("bfloat16"), name)
    assert (spec.family.rows, spec.family.hidden) == (0, 2880)


@pytest.mark.parametrize(
    "change",
    [
        {"operation": "all_reduce"},
        {"epilogue": None},
        {"operation": "nonsense"},
        {"wire": "nonsense"},
        {"memory": "nonsense"},
        {"shape": (2880,)},
        {"shape": (1, 7, 2880)},
        {"shape": (7, HIDDEN.stop + 8)},
        {"shape": (7, 68)},
    ],
    ids=str,
)
def test_what_is_no_call(change):
    with pytest.raises(ValueError, match="expected"):
        replace(norm_spec(), **change)


def test_what_would_be_one_is_named():
    for change, told in (
        ({"operation": "nonsense"}, "operation 'nonsense': expected one of all_reduce, all_reduce_norm, norm"),
        ({"epilogue": None}, "all_reduce_norm with epilogue None: expected all_reduce_norm and norm to have one, and no other"),
    ):
        with pytest.raises(ValueError, match=f"^{told}$"):
            replace(norm_spec(), **change)


def test_operations():
    assert set(NORMS) < set(OPERATIONS)
    for bad in ({"rounding": "X"}, {"quant": "tensor"}, {"weight_bias": 2}):
        with pytest.raises(ValueError, match="expected one of"):
            Norm(**bad)


def test_norms_that_differ_tell_their_peers():
    """All that decides about bits or about which tensors there are; eps and hidden are told beside it."""
    different = [
        Norm(rounding, quant, residual, weight, bias, 0.0, keep)
        for rounding in ROUNDINGS
        for quant in QUANTS
        for residual in (True, False)
        for weight in ("bfloat16", "float32")
        for bias in (0, 1)
        for keep in (True, False)
    ]
    told = [norm.parameters for norm in different]
    assert len(set(told)) == len(different) and max(told) < 1 << 16
