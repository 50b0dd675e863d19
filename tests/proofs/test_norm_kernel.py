"""The local norm's kernel: its bits, in Triton's interpreter; its machine code; and mistakes that both have to see."""

import re
import shutil
from collections import Counter
from dataclasses import replace

import pytest
from helpers.cubins import compile_behind, compile_one, entries_of, needs_triton, opcodes, resources
from helpers.norms import cases
from legacy_ranks import source
from norm_interpreter import play

from allreduce_jit.policy import local_norm
from allreduce_jit.policy.norm import QUANTS, ROUNDINGS, Norm
from allreduce_jit.policy.operation import DTYPES, OpSpec, all_reduce

ARCHS = ("sm_80", "sm_90", "sm_100")


def every_case():
    return [*cases([64, 72, 2880, 4096]), *cases([128, 384], rows=(1, 9), dtypes=["bfloat16"])]


@needs_triton
def test_same_bits_as_the_reference():
    chosen = every_case()
    for field in ("residual", "weight_fp32", "weight_bias", "keep_norm", "column_major", "in_place"):
        assert len({getattr(case, field) for case in chosen}) == 2
    assert play({"kernel": str(source())}, chosen) == {"kernel": []}


# What a kernel could do instead, each of which changes bits.
MISTAKES = {
    "a product contracted with a sum": (
        "mean = _tree(v * v, STEPS) * inverse\n        n = v * _rsqrt(mean + eps, INTERPRET)",
        "n = v * _rsqrt(tl.fma(_tree(v * v, STEPS), inverse, eps), INTERPRET)",
    ),
    "squares contracted with the first sums": ("_tree(v * v, STEPS)", "_contracted(v, STEPS)"),
    "halves of a row added first, not neighbours": (
        "tl.sum(tl.reshape(x, [1 << (STEPS - step), 2]), axis=1)",
        "tl.sum(tl.reshape(x, [2, 1 << (STEPS - step)]), axis=0)",
    ),
    "one sum of the whole row": ("_tree(v * v, STEPS) *", "tl.sum(v * v, axis=0) *"),
    "normalized before rounding": ('if ROUNDING == "U" else', 'if ROUNDING != "H" else'),
    "rounded before normalizing": ('v = a if ROUNDING == "U" else rounded', "v = rounded"),
    "rounded once less": ('if ROUNDING == "H":', 'if ROUNDING == "none":'),
    "a sum of squares of the unrounded": ("_tree(v * v, STEPS)", "_tree(a * a, STEPS)"),
    "squares of the rounded": ("_tree(v * v, STEPS)", "_tree(rounded.to(tl.float32) * rounded.to(tl.float32), STEPS)"),
    "the residual added after rounding": ("a += tl.load(", "a = a.to(DTYPE).to(tl.float32) * (1 + 2**-20) + tl.load("),
    "scales of the unrounded norm": ("wide = y.to(tl.float32)", "wide = n * factor"),
    "the bias left out": ("(n * factor).to(DTYPE)", "(n * (factor - weight_bias)).to(DTYPE)"),
    "divided by the length": ("_tree(v * v, STEPS) * inverse", "tl.div_rn(_tree(v * v, STEPS), hidden.to(tl.float32))"),
    "an approximate rsqrt": ("(1.0 / tl.sqrt(x.to(tl.float64))).to(tl.float32)", "1.0 / tl.sqrt(x)"),
    "eps left out": ("mean + eps", "mean"),
    "divided by the scale": ("wide *= tl.div_rn(1.0, found)", "wide = tl.div_rn(wide, found)"),
    "multiplied by 1 / 448": ("to(tl.float32, bitcast=True), _LARGEST)", "to(tl.float32, bitcast=True), 1.0) * (1.0 / _LARGEST)"),
    "no least scale of a token": ("tl.where(found < _LEAST_SCALE, _LEAST_SCALE, found)", "found"),
    "no least magnitude of a group": ("tl.where(found < _LEAST_ABSMAX, _LEAST_ABSMAX, found)", "found"),
    "a NaN lost": ("tl.where(found < _LEAST_SCALE, _LEAST_SCALE, found)", "tl.where(found > _LEAST_SCALE, found, _LEAST_SCALE)"),
    "signs in the magnitude": (" & 0x7FFFFFFF", ""),
    "what follows a row in its magnitude": ("tl.where(exist, x.to(", "tl.where(exist | (x != x), x.to("),
    "not saturated": ("wide = tl.where(wide > _LARGEST, _LARGEST, wide)", "pass"),
    "infinity for NaN": ("wide = tl.where(wide < -_LARGEST, -_LARGEST, wide)", "wide = tl.where(wide >= -_LARGEST, wide, -_LARGEST)"),
    "scales by the row where columns are wanted": ("row * scale_row + group * scale_group", "row * (hidden // _GROUP) + group"),
    "the norm where the sum belongs": ("(residual_out, first, at, DTYPE), rounded,", "(residual_out, first, at, DTYPE), y,"),
    "a row left out": ("tl.program_id(0).to(tl.int64), rows,", "tl.program_id(0).to(tl.int64), rows - 1,"),
    "one row a program": ("tl.num_programs(0)):", "rows):"),
}  # fmt: skip
_CONTRACTED = """

@triton.jit
def _contracted(v, STEPS: tl.constexpr):
    wide = v.to(tl.float64)
    even, odd = tl.split(tl.reshape(wide, [1 << (STEPS - 1), 2]))
    return _tree(((even * even).to(tl.float32).to(tl.float64) + odd * odd).to(tl.float32), STEPS - 1)
"""


@needs_triton
def test_the_reference_sees_a_planted_mistake(tmp_path, record_property):
    mutants = {}
    for number, (name, (right, wrong)) in enumerate(MISTAKES.items()):
        folder = shutil.copytree(source(), tmp_path / str(number), ignore=shutil.ignore_patterns("__pycache__"))
        text = (folder / "norm.py").read_text()
        assert text.count(right) == 1, f"{name}: the kernel has changed"
        (folder / "norm.py").write_text(text.replace(right, wrong) + _CONTRACTED)
        mutants[name] = str(folder)
    found = play(mutants, list(cases([72, 384])), first=True)
    record_property("shown", "\n".join(f"{name}: {(wrong or ['not seen'])[0]}" for name, wrong in found.items()))
    assert not [name for name, wrong in found.items() if not wrong]
    assert not [wrong for wrong in found.values() if "Error" in wrong[0]]


# -- machine code


def module(dtype="bfloat16", hidden=4096, rounding="R", quant="none"):
    return local_norm.module(OpSpec("norm", dtype, (1, hidden), Norm(rounding, quant)))


def check_code(tmp_path, spec, artifact):
    """Raises AssertionError. What is contracted (FFMA) is what a division or an rsqrt consists of, once a row."""
    constants = dict(spec.constants)
    threads, a_thread = artifact.threads, max((1 << constants["STEPS"]) // artifact.threads, 1)
    assert threads == 32 * local_norm.warps(constants["STEPS"]) and artifact.shared_bytes <= 48 << 10
    assert entries_of(artifact.cubin) == set(spec.entries)
    (usage,), (ops,) = resources(tmp_path, artifact).values(), opcodes(tmp_path, artifact).values()
    assert usage["STACK"] <= 64 and usage["LOCAL"] == 0
    number = Counter(op.split(".")[0] for op in ops)
    for name in ("FFMA", "FMUL", "FADD"):
        number[name] += 2 * number[f"{name}2"]  # sm_100 has them for two at a time
    if constants["QUANT"] == "none":
        assert number["FFMA"] <= 8
        # A square, a product with r and one with the weight; the sum of squares, a residual, the bias.
        assert number["FMUL"] >= 3 * a_thread and number["FADD"] >= 3 * a_thread - 1
    if a_thread * (4 if constants["DTYPE"] == "float32" else 2) >= 16:  # x, residual and weight, 16 bytes at a time
        assert sum(op.startswith("LDG") and ".128" in op for op in ops) >= 3
        assert not [op for op in ops if re.match(r"LDG.*\.U?16$", op)]
    if constants["QUANT"] != "none":
        assert [op for op in ops if "E4M3" in op and "SATFINITE" in op]


@needs_triton
@pytest.mark.parametrize("arch", ARCHS)
def test_compiles(tmp_path, arch):
    specs = [module(), module("float32", 2880, "U"), module("float16", 16384, "H"), module(hidden=64)]
    if arch != "sm_80":
        specs += [module(quant=quant) for quant in QUANTS[1:]]
    for spec in specs if arch == "sm_90" else specs[::2]:
        artifact = compile_one(spec, arch)
        assert (artifact.name, artifact.arch) == (spec.name, arch)
        check_code(tmp_path, spec, artifact)


@needs_triton
def test_the_check_sees_contracted_products(tmp_path):
    fused = (
        "import triton; compile = triton.compile; triton.compile = lambda kernel, target, options:"
        " compile(kernel, target=target, options={**options, 'enable_fp_fusion': True}); "
    )
    artifact = compile_behind(fused, module())
    with pytest.raises(AssertionError):
        check_code(tmp_path, module(), artifact)


def test_modules_are_named_for_what_they_compute():
    specs = [module(d, h, r, q) for d in DTYPES for h in (64, 72, 128, 2880, 16384) for r in ROUNDINGS for q in QUANTS]
    distinct = {spec.name: spec for spec in specs}
    assert len(distinct) == len(set(specs)) == len(DTYPES) * 4 * len(ROUNDINGS) * len(QUANTS)  # 72 and 128 share one
    assert module(hidden=72) == module(hidden=128) != module(hidden=64)
    other = OpSpec("all_reduce_norm", "bfloat16", (9, 4096), Norm(weight="float32", weight_bias=1, eps=1.0))
    assert local_norm.module(other) == module()
    with pytest.raises(ValueError, match="all_reduce is none of"):
        local_norm.module(all_reduce("bfloat16", 64))
    with pytest.raises(ValueError, match="is a family"):
        local_norm.module(replace(other, shape=None))


def test_grids_and_blocks():
    assert [local_norm.grid(rows, most) for rows, most in ((1, None), (9, None), (9, 4), (3, 4))] == [1, 9, 4, 3]
    for steps in range(6, 15):
        threads = 32 * local_norm.warps(steps)
        assert threads <= 512 and (1 << steps) // threads <= 32
