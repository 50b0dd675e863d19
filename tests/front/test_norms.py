"""Norms without a communicator: what they take, refuse and return, and who computes them on a GPU."""

import ctypes
import logging
import math
import re
import threading

import pytest
import torch
from helpers.norms import Case, cases, difference, given, options, outs, taken

import allreduce_jit
from allreduce_jit import InputError, InputTypeError, known_norms, norms
from allreduce_jit.engine import norm_reference
from allreduce_jit.errors import CompileError
from allreduce_jit.jit.cache import Artifact
from allreduce_jit.norms import add_rms_norm, add_rms_norm_fp8, norm_family, operands, run_local
from allreduce_jit.operands import _Checks, quant_of
from allreduce_jit.policy import local_norm
from allreduce_jit.policy.norm import Norm
from allreduce_jit.policy.operation import OpSpec

CPU = torch.device("cpu")
H = 256


def rows(*lead, dtype=torch.bfloat16, hidden=H):
    return torch.randn(*lead, hidden).to(dtype)


def weights(dtype=torch.bfloat16, hidden=H):
    return torch.randn(hidden).to(dtype)


def twin(case, tensors, **more):
    how = {name: value for name, value in options(case).items() if name not in ("quant", "column_major", "keep_norm")}
    if case.quant == "none":
        tensors = {name: tensor for name, tensor in tensors.items() if name != "scale"}
        return add_rms_norm(**tensors, **how, **more)
    how |= {"scales": case.quant, "column_major": case.column_major, "with_norm": case.keep_norm}
    return add_rms_norm_fp8(**tensors, **how, **more)


# -- what is returned


def test_the_twin_is_the_reference():
    for case in cases([64, 384], rows=(0, 1, 7)):
        call = taken(case)
        norm_reference.run(call.spec, call.tensors)
        tensors = given(case)
        written = outs(case, tensors)
        got = twin(case, tensors, **written)
        assert not difference(case, got, call.results), case
        assert {id(tensor) for tensor in written.values()} <= {id(tensor) for tensor in got}


def test_leading_dimensions_are_rows():
    x, residual, weight = rows(3, 5), rows(3, 5), weights(torch.float32)
    norm, total = add_rms_norm(x, residual, weight)
    flat, flat_total = add_rms_norm(x.view(15, H), residual.view(15, H), weight)
    assert norm.shape == total.shape == x.shape
    assert torch.equal(norm.view(15, H), flat) and torch.equal(total.view(15, H), flat_total)
    assert torch.equal(add_rms_norm(x[0, 0], residual[0, 0], weight)[0], norm[0, 0])
    norm, total = add_rms_norm(x, None, weight)
    assert torch.equal(total, x) and total.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("lead", [(7,), (3, 5), (), (1,), (0,)])
def test_shapes_and_strides_of_scales(lead):
    x, weight = rows(*lead), weights()
    many = math.prod(lead)
    assert add_rms_norm_fp8(x, None, weight, scales="token")[1].shape == (*lead, 1)
    plain, column = (add_rms_norm_fp8(x, None, weight, scales="group", column_major=c)[1] for c in (False, True))
    assert plain.shape == column.shape == (*lead, H // 128) and plain.is_contiguous()
    assert torch.equal(plain, column)
    if len(lead) == 1:
        assert column.stride() == (1, many) or many < 2
    scale = torch.tensor([0.25])
    quantized, same, _ = add_rms_norm_fp8(x, None, weight, scale=scale)
    assert same is scale and quantized.dtype is torch.float8_e4m3fn and quantized.shape == x.shape
    # What a deep-learning compiler wants: columns that begin at multiples of 16 bytes.
    if len(lead) == 1 and many > 1:
        padded = torch.full((H // 128, many + 5), -1.0).t()[:many]
        assert add_rms_norm_fp8(x, None, weight, scales="group", scale_out=padded)[1] is padded
        assert torch.equal(padded, plain)
        call = taken_with(x, weight, quant="group", scale_out=padded)
        assert call.spec.epilogue.scale_strides == (1, many + 5) and not call.copies


def taken_with(x, weight, residual=None, **more):
    how = {"operation": "norm", "device": CPU, "index": -1, "rank": None, "eps": 1e-6, **more}
    return operands(x, residual, weight, **how)


def test_tensors_that_kernels_cannot_use_pass_through_copies():
    """Strided, unaligned and negated ones, read or written."""
    case = Case("bfloat16", H, 6, quant="group", keep_norm=True)
    tensors = given(case)
    want = twin(case, tensors)

    def strided(like):
        return torch.empty(*like.shape[:-1], 2 * like.shape[-1], dtype=like.dtype)[..., ::2]

    def unaligned(like):
        return torch.empty(like.numel() + 1, dtype=like.dtype)[1:].view(like.shape)

    for other in (strided, unaligned):
        changed = {name: other(t).copy_(t) if t is not None else None for name, t in tensors.items()}
        written = dict(zip(("out", "scale_out", "residual_out", "norm_out"), map(other, want), strict=True))
        got = twin(case, changed, **written)
        assert all(a is b for a, b in zip(got, written.values(), strict=True))
        assert [torch.equal(a.float().nan_to_num(), b.float().nan_to_num()) for a, b in zip(got, want, strict=True)] == [True] * 4
        call = operands(**changed, **options(case), **written, operation="norm", device=CPU, index=-1, rank=None)
        assert all(
            t.is_contiguous() and t.data_ptr() % 16 == 0 for p, t in zip(call.spec.pointers, call.tensors) if p.name != "scale"
        )
        assert len(call.copies) == (4 if other is strided else 3)  # a scale need not be aligned
    negated = torch._neg_view(tensors["x"])
    plain = twin(case, {**tensors, "x": negated.resolve_neg()})
    assert torch.equal(twin(case, {**tensors, "x": negated})[2].nan_to_num(), plain[2].nan_to_num())


def test_over_the_inputs():
    x, residual, weight = rows(4), rows(4), weights()
    norm, total = add_rms_norm(x, residual, weight)
    a, b = x.clone(), residual.clone()
    got = add_rms_norm(a, b, weight, out=a, residual_out=b)
    assert got[0] is a and got[1] is b and torch.equal(a, norm) and torch.equal(b, total)
    a, b = x.clone(), residual.clone()
    quantized = add_rms_norm_fp8(a, b, weight, scales="token", with_norm=True, norm_out=a.view(4, H), residual_out=b)
    assert torch.equal(a, norm) and torch.equal(b, total) and quantized[3].data_ptr() == a.data_ptr()
    wide = torch.cat([x, x], dim=1)[:, :H]  # one strided view, read and written
    assert add_rms_norm(wide, residual, weight, out=wide)[0] is wide and torch.equal(wide, norm)
    # Inputs may share memory, and what is packed first cannot be spoiled.
    assert torch.equal(add_rms_norm(x, x, weight)[1], (x.float() * 2).bfloat16())
    both = torch.cat([x, residual], dim=1)
    assert torch.equal(add_rms_norm(both[:, :H], both[:, H:], weight)[0], norm)


def test_options_in_the_call():
    call = taken_with(rows(2, 3), weights(torch.float32), rows(2, 3), weight_bias=1, rounding="U", eps=1e-6)
    assert call.spec == OpSpec("norm", "bfloat16", (6, H), Norm("U", "none", True, "float32", 1, ctypes.c_float(1e-6).value))
    assert [pointer.name for pointer in call.spec.pointers] == ["input", "output", "residual", "weight", "residual_out"]
    fused = operands(
        rows(2), None, weights(), 0, quant="token", keep_norm=True, operation="all_reduce_norm", device=CPU, index=-1, rank=3
    )
    assert fused.spec.operation == "all_reduce_norm" and fused.spec.epilogue.weight == "bfloat16"
    assert [pointer.name for pointer in fused.spec.pointers] == ["input", "output", "weight", "residual_out", "scale", "norm"]
    assert len(fused.results) == 4


def test_families():
    family = norm_family("bfloat16", 256)
    assert family == norm_family(torch.bfloat16, 256, weight=torch.bfloat16)
    assert family == OpSpec("all_reduce_norm", "bfloat16", (0, 256), Norm(weight="bfloat16")) == family.family
    want = Norm("H", "group", False, "float32", 1, keep_norm=True)
    assert (
        norm_family("float16", 256, "H", "group", residual=False, weight="float32", weight_bias=1, with_norm=True).epilogue
        == want
    )
    x = rows(2)
    for residual, kind in ((None, {"residual": False}), (rows(2), {})):
        call = operands(x, residual, weights(), 1e-6, operation="all_reduce_norm", device=CPU, index=-1, rank=0)
        assert call.spec.family == norm_family("bfloat16", x.shape[-1], **kind)
    for bad in (
        ("float64", 64),
        (torch.int8, 64),
        ("bfloat16", 64, "X"),
        ("bfloat16", 64, "R", "tensor"),
        ("bfloat16", 60),
        ("bfloat16", 192, "R", "group"),
    ):
        with pytest.raises(InputError, match="norm_family: .* expected"):
            norm_family(*bad)
    with pytest.raises(InputError, match="weight 'float16': expected one of bfloat16, float32"):
        norm_family("bfloat16", 64, weight="float16")
    assert {"add_rms_norm", "add_rms_norm_fp8", "norm_family"} <= set(allreduce_jit.__all__)


# -- what is refused

BIG = torch.randn(40, H).bfloat16()
X, RESIDUAL, WEIGHT = BIG[:4], BIG[4:8], torch.randn(H).bfloat16()

REFUSED = [
    # what is passed, what is said
    ({"x": 3}, "add_rms_norm takes a torch.Tensor, not int"),
    ({"x": X.double()}, "dtype 'float64': expected one of float32, float16, bfloat16"),
    ({"x": X[:, :60]}, "rows of 60 elements: expected a multiple of 8 from 64 to 16384"),
    ({"x": torch.zeros(2, 16392)}, "rows of 16392 elements"),
    ({"x": torch.tensor(1.0)}, "rows of 0 elements"),
    ({"x": X.to_sparse()}, "takes strided tensors"),
    ({"x": X.to("meta")}, "add_rms_norm: the tensor is on meta: expected a CUDA device or the CPU"),
    ({"x": X.clone().requires_grad_()}, "the tensor requires grad and add_rms_norm is not differentiable"),
    ({"residual": RESIDUAL[:3]}, r"residual is \(3, 256\) torch.bfloat16: expected \(4, 256\) torch.bfloat16"),
    ({"residual": RESIDUAL.float()}, "residual is .* torch.float32: expected .* torch.bfloat16"),
    ({"residual": 0.0}, "takes a torch.Tensor as residual, not float"),
    ({"residual": RESIDUAL.to("meta")}, "residual is on meta, the input on cpu: move the tensor"),
    ({"weight": None}, "takes a torch.Tensor as weight, not NoneType"),
    ({"weight": WEIGHT[:128]}, r"weight is \(128,\) torch.bfloat16: expected \(256,\) torch.bfloat16 or torch.float32"),
    ({"weight": WEIGHT[None]}, r"weight is \(1, 256\)"),
    ({"weight": WEIGHT.half()}, "weight is .* torch.float16: expected"),
    ({"weight": torch.nn.Parameter(WEIGHT)}, "weight requires grad and add_rms_norm is not differentiable"),
    ({"eps": -1e-6}, "eps -1e-06: expected a finite number"),
    ({"eps": math.nan}, "eps nan"),
    ({"eps": 1e39}, "eps 1e.39"),
    ({"eps": "1e-6"}, "eps is a str: expected a float"),
    ({"rounding": "r"}, "rounding 'r': expected one of R, U, H"),
    ({"weight_bias": 2}, "weight_bias 2: expected one of 0, 1"),
    ({"out": X[:3].clone()}, r"out is \(3, 256\) .*: expected \(4, 256\)"),
    ({"out": X.float()}, "out is .* torch.float32: expected .* torch.bfloat16"),
    ({"out": "here"}, "takes a torch.Tensor as out, not str"),
    ({"out": X.clone().requires_grad_()}, "out requires grad"),
    ({"out": torch.empty(1, H, dtype=torch.bfloat16).expand(4, H)}, "out is an expanded tensor"),
    ({"residual_out": X[:, :128]}, "residual_out is"),
    ({"out": BIG[2:6]}, "out overlaps x without being the same view: pass out=x, or separate memory"),
    ({"out": RESIDUAL}, "out overlaps residual: pass separate memory"),
    ({"residual_out": X}, "residual_out overlaps x: pass separate memory"),
    ({"residual_out": BIG[5:9]}, "residual_out overlaps residual without being the same view"),
    ({"residual": X, "out": X}, "out overlaps residual"),
    ({"out": BIG[8:12], "residual_out": BIG[10:14]}, "residual_out overlaps out: pass separate memory"),
    ({"out": BIG[8:12], "residual_out": BIG[8:12]}, "residual_out overlaps out"),
    ({"weight": BIG[9], "out": BIG[8:12]}, "out overlaps weight"),
]  # fmt: skip

REFUSED_FP8 = [
    ({"scales": "none", "scale": None}, "scales 'none': expected one of static, token, group"),
    ({"scale": None}, 'scales="static" without scale'),
    ({"scale": 0.5}, "add_rms_norm_fp8 takes a torch.Tensor as scale, not float"),
    ({"scale": torch.ones(2)}, r"scale is \(2,\) torch.float32: expected one element of torch.float32"),
    ({"scale": torch.ones(1).double()}, r"scale is \(1,\) torch.float64"),
    ({"scale_out": torch.ones(4, 1)}, 'scale_out with scales="static"'),
    ({"scales": "token"}, 'scale with scales="token", which are found'),
    ({"column_major": True}, 'column_major with scales="static"'),
    ({"scales": "token", "scale": None, "column_major": True}, 'column_major with scales="token"'),
    ({"norm_out": BIG[8:12]}, "norm_out without with_norm=True"),
    ({"scales": "token", "scale": None, "scale_out": torch.ones(4)}, r"scale_out is \(4,\) .*: expected \(4, 1\) torch.float32"),
    ({"scales": "group", "scale": None, "scale_out": torch.ones(4, 2).half()}, "scale_out is .* torch.float16"),
    ({"scales": "group", "scale": None, "scale_out": torch.ones(4, 1).expand(4, 2)}, "scale_out is an expanded tensor"),
    ({"x": torch.zeros(4, 192), "residual": None, "weight": torch.zeros(192), "scales": "group", "scale": None}, "a multiple of 128"),
    ({"out": BIG[8:12]}, "out is .* torch.bfloat16: expected .* torch.float8_e4m3fn"),
    ({"out": X.view(torch.float8_e4m3fn)[:, :H]}, None),  # strided: it passes through a copy, and x is read by then
    ({"out": BIG.view(-1)[: 2 * H].view(torch.float8_e4m3fn).view(4, H)}, "out overlaps x: pass separate memory"),
    ({"with_norm": True, "norm_out": BIG[1:5]}, "norm_out overlaps x without being the same view: pass norm_out=x"),
    ({"with_norm": True, "norm_out": X, "residual_out": X}, "residual_out overlaps x|norm_out overlaps residual_out"),
]  # fmt: skip


def kind_of(said):
    """Errors of type are ``TypeError``s, too."""
    return InputTypeError if re.search(r"not (int|float|str|NoneType)$|eps is a", said) else InputError


@pytest.mark.parametrize(("change", "said"), REFUSED, ids=[said[:50] for _, said in REFUSED])
def test_refused(change, said):
    operation = {"x": X, "residual": RESIDUAL, "weight": WEIGHT} | change
    with pytest.raises(kind_of(said), match=said) as caught:
        add_rms_norm(**operation)
    assert "rank" not in str(caught.value)


@pytest.mark.parametrize(("change", "said"), REFUSED_FP8, ids=[str(said)[:50] for _, said in REFUSED_FP8])
def test_refused_fp8(change, said):
    operation = {"x": X, "residual": RESIDUAL, "weight": WEIGHT, "scale": torch.ones(1)} | change
    if said is None:
        add_rms_norm_fp8(**{**operation, "x": X.clone()})
        return
    with pytest.raises(kind_of(said), match=said):
        add_rms_norm_fp8(**operation)


def test_a_communicator_says_its_rank():
    for quant, title in (("none", "all_reduce_add_rms_norm"), ("token", "all_reduce_add_rms_norm_fp8")):
        with pytest.raises(InputError, match=f"^rank 2: {title}: eps -1: "):
            operands(X, None, WEIGHT, -1, quant=quant, operation="all_reduce_norm", device=CPU, index=-1, rank=2)
    with pytest.raises(InputError, match="^rank 2: the tensor is on cpu, this communicator on cuda:1: move the tensor"):
        operands(X, None, WEIGHT, 0, operation="all_reduce_norm", device=torch.device("cuda", 1), index=1, rank=2)
    with pytest.raises(InputError, match="^rank 1: all_reduce_add_rms_norm_fp8: scales 'none'"):
        quant_of("none", "all_reduce_norm", 1)
    with pytest.raises(InputError, match="all_reduce_add_rms_norm: scale_out without scales"):
        operands(X, None, WEIGHT, 0, scale_out=torch.ones(4, 1), operation="all_reduce_norm", device=CPU, index=-1, rank=0)


@pytest.mark.parametrize(
    ("arch", "refused"), [((8, 0), True), ((8, 6), True), ((8, 9), False), ((9, 0), False), ((12, 0), False)]
)
def test_e4m3_wants_a_gpu_that_has_it(monkeypatch, arch, refused):
    monkeypatch.setattr("allreduce_jit.operands._capability", lambda device: arch)
    check = _Checks("add_rms_norm_fp8", torch.device("cuda", 0), 0, None)
    if refused:
        with pytest.raises(InputError, match=f"needs a GPU from sm_89 on, cuda:0 is sm_{arch[0]}{arch[1]}: use add_rms_norm$"):
            check.scales("token", H, None, None, False)
    else:
        check.scales("token", H, None, None, False)
    check.scales("none", H, None, None, False)


# -- on a GPU


@pytest.fixture
def gpu(monkeypatch):
    """``local_norm`` over a stand-in of the driver; what it launches, and what it compiles."""
    local = pytest.importorskip("allreduce_jit.engine.local_norm")
    launched, compiled = [], []

    class Launch:
        def __init__(self, kernel, arguments, grid, block, shared_bytes):
            self.fixed = kernel, grid, block, shared_bytes
            self.arguments = arguments

        def __call__(self, stream):
            launched.append((*self.fixed, stream, [argument.value for argument in self.arguments]))

    class Module:
        def __init__(self, cubin):
            self.cubin = cubin

        def kernel(self, name):
            return name, self.cubin

    def build(spec, arch, cache):
        compiled.append((spec, arch))
        return Artifact(spec.name, arch, 128, 64, spec.name.encode()), False

    monkeypatch.setattr(local, "build", build)
    monkeypatch.setattr(local, "_cubins", lambda: None)
    monkeypatch.setattr(local, "current_device", lambda: 1)
    monkeypatch.setattr(local, "current_raw_stream", lambda device: 70 + device)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(local.driver, "KernelLaunch", Launch)
    monkeypatch.setattr(local.driver, "load_module", Module)
    monkeypatch.setattr(local.driver, "call", lambda *args: None)
    monkeypatch.setattr(local, "_calls", {})
    monkeypatch.setattr(local, "_untold", True)
    local._kernel.cache_clear()
    yield local, launched, compiled
    local._kernel.cache_clear()


def test_what_a_gpu_is_told(gpu):
    local, launched, compiled = gpu
    for case in (
        Case("bfloat16", 2880, 7, residual=True, weight_bias=1),
        Case("float16", 384, 7, "H", "group", False, True, column_major=True, keep_norm=True),
    ):
        call = taken(case)
        local.run(call.spec, call.tensors, 5)
        kernel, grid, block, shared_bytes, stream, values = launched[-1]
        spec = local_norm.module(call.spec)
        assert (kernel, grid, block, shared_bytes, stream) == (("add_rms_norm", spec.name.encode()), 5, 128, 64, 71)
        told = dict(zip([*local_norm.ARGUMENTS, "scratch", "profile"], values, strict=True))
        addresses = {pointer.name: tensor.data_ptr() for pointer, tensor in zip(call.spec.pointers, call.tensors, strict=True)}
        assert {name: told[name] for name in addresses} == addresses
        assert all(told[name] == 0 for name in ("residual", "scale", "norm") if name not in addresses)
        assert (told["rows"], told["hidden"], told["weight_bias"], told["weight_is_fp32"]) == (
            7,
            case.hidden,
            case.weight_bias,
            case.weight_fp32,
        )
        assert told["eps"] == call.spec.epilogue.eps and told["inverse"] == ctypes.c_float(1 / case.hidden).value
        assert (told["scale_row"], told["scale_group"]) == ((1, 7) if case.quant == "group" else (1, 0))
        assert compiled[-1] == (spec, "sm_90")
    assert [type(a) for a in local._calls[1, call.spec, 5]._launch.arguments][:9] == [ctypes.c_int64] * 8 + [ctypes.c_int32]


def test_repeated_calls_make_nothing(gpu):
    local, launched, compiled = gpu
    call = taken(Case("bfloat16", 256, 7))
    threads = [threading.Thread(target=local.run, args=(call.spec, call.tensors)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other = taken(Case("bfloat16", 200, 9, weight_fp32=True, weight_bias=1, eps=0.5))  # of the same kernel
    local.run(other.spec, other.tensors)
    assert len(launched) == 9 and len(compiled) == 1 and len(local._calls) == 2
    assert launched[-1][1] == 9


def test_memory_that_was_freed_is_an_error(gpu):
    local, launched, _ = gpu
    call = taken(Case("bfloat16", 256, 7))
    call.tensors[2].untyped_storage().resize_(0)
    with pytest.raises(InputError, match="argument 2 is a tensor of which the storage has 0 bytes"):
        local.run(call.spec, call.tensors)
    assert not launched


def test_without_triton_torch_does_it(gpu, monkeypatch, caplog):
    local, launched, _ = gpu

    def build(spec, arch, cache):
        raise CompileError("no Triton on this machine")

    monkeypatch.setattr(local, "build", build)
    with caplog.at_level(logging.WARNING, "allreduce_jit"):
        for hidden in (256, 256, 512):
            case = Case("bfloat16", hidden, 7)
            call, want = taken(case), taken(case)
            local.run(call.spec, call.tensors)
            norm_reference.run(want.spec, want.tensors)
            assert not difference(case, call.results, want.results)
    assert not launched and [record.message for record in caplog.records if "no Triton" in record.message] == [
        "norms without an all-reduce are made of torch's operations, the same bits and slower: no Triton on this machine"
    ]


def test_no_rows_launch_nothing(gpu):
    _, launched, compiled = gpu
    call = taken(Case("bfloat16", 256, 0))
    run_local(call.spec, call.tensors)
    assert not launched and not compiled


# -- calls like an earlier one


def known_call(**change):
    """A call of a kind that was accepted before, and whether it went without the checks."""
    operation = {"x": X.clone(), "residual": RESIDUAL.clone(), "weight": WEIGHT.clone()}
    add_rms_norm(**operation)
    operation |= {name: value(operation) if callable(value) else value for name, value in change.items()}
    checked = []
    whole, known_norms.operands = known_norms.operands, lambda *a, **k: checked.append(1) or whole(*a, **k)
    try:
        want = add_rms_norm(
            **{name: v.clone() if isinstance(v, torch.Tensor) else v for name, v in operation.items() if "out" not in name}
        )
        del checked[:]
        found = add_rms_norm(**operation)
    finally:
        known_norms.operands = whole
    assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
    return not checked


@pytest.mark.parametrize(("change", "known"), [
    ({}, True),
    ({"out": lambda o: o["x"]}, True),
    ({"residual_out": lambda o: o["residual"]}, True),
    ({"out": lambda o: o["x"], "residual_out": lambda o: o["residual"]}, True),
    ({"out": lambda o: torch.empty_like(o["x"]), "residual_out": lambda o: torch.empty_like(o["x"])}, True),
    ({"weight": torch.nn.Parameter(WEIGHT.clone(), requires_grad=False)}, True),
    ({"x": torch.zeros(4 * H + 8, dtype=torch.bfloat16)[1:-7].view(4, H)}, False),  # not at a multiple of 16 bytes
    ({"residual": torch.zeros(4, 2 * H, dtype=torch.bfloat16)[:, :H]}, False),
    ({"weight": torch.zeros(2 * H, dtype=torch.bfloat16)[::2]}, False),
    ({"eps": 0.5}, True),  # the second time
    ({"out": lambda o: torch.zeros(4, 2 * H, dtype=torch.bfloat16)[:, :H]}, False),
], ids=lambda v: "known" if v is True else "checked" if v is False else " ".join(v) or "plain")  # fmt: skip
def test_calls_of_a_known_kind_want_no_checks(change, known):
    assert known_call(**change) == known


@pytest.mark.parametrize("into", [("out",), ("residual_out",), ("out", "residual_out")], ids=" ".join)
def test_who_always_says_where_results_go_is_known_as_well(into, monkeypatch):
    """Of a kind that nobody else calls; later calls that leave the results to us get new ones."""
    checked = []
    whole = known_norms.operands
    monkeypatch.setattr(known_norms, "operands", lambda *a, **k: checked.append(1) or whole(*a, **k))
    x, residual = torch.randn(7, H).bfloat16(), torch.randn(7, H).bfloat16()
    eps = 0.125 + len("".join(into)) / 1024
    want = None
    for turn in range(3):
        outs = {name: torch.full_like(x, 7.0) for name in into} if turn < 2 else {}
        norm, total = add_rms_norm(x, residual, WEIGHT, eps, **outs)
        assert norm is outs.get("out", norm) and total is outs.get("residual_out", total)
        assert want is None or (torch.equal(norm, want[0]) and torch.equal(total, want[1]))
        assert len({t.data_ptr() for t in (x, residual, norm, total)}) == 4 and norm.shape == total.shape == x.shape
        want = norm.clone(), total.clone()
    assert len(checked) == 1


def test_what_a_known_kind_must_not_overwrite_is_refused_all_the_same():
    add_rms_norm(X, RESIDUAL, WEIGHT)
    big = torch.zeros(6, H, dtype=torch.bfloat16)
    for change in ({"out": RESIDUAL}, {"residual_out": X}, {"residual": X, "out": X}, {"x": big[:4], "out": big[1:5]},
                   {"out": big[:4], "residual_out": big[2:6]}, {"weight": big[5], "out": big[2:6]},
                   {"residual": big[:4], "residual_out": big[2:6]}):  # fmt: skip
        with pytest.raises(InputError, match="overlaps"):
            add_rms_norm(**{"x": X, "residual": RESIDUAL, "weight": WEIGHT} | change)


def test_a_weight_that_requires_grad_is_refused_all_the_same():
    add_rms_norm(X, RESIDUAL, WEIGHT)
    weight = torch.nn.Parameter(WEIGHT.clone())
    with pytest.raises(InputError, match="requires grad"):
        add_rms_norm(X, RESIDUAL, weight)
    with torch.no_grad():
        assert torch.equal(add_rms_norm(X, RESIDUAL, weight)[0], add_rms_norm(X, RESIDUAL, WEIGHT)[0])


def test_quantized_calls_of_a_known_kind():
    for how in (
        {"scales": "token"},
        {"scales": "group", "column_major": True, "with_norm": True},
        {"scale": torch.tensor([0.1])},
    ):
        first = norms.add_rms_norm_fp8(X, None, WEIGHT, **how)
        again = norms.add_rms_norm_fp8(X, None, WEIGHT, **how)
        assert [t.stride() for t in first] == [t.stride() for t in again]
        assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(first, again, strict=True)
                   if a.is_contiguous())  # fmt: skip
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True) if a.dtype is torch.float32)
