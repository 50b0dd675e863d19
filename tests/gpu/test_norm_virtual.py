"""The V2 kernels that normalize with 2 to 8 virtual ranks on one GPU, every bit: two-shot, too, which two GPUs do not run."""

import itertools
from dataclasses import replace

import pytest
import torch

from allreduce_jit.engine import norm_reference, reference
from allreduce_jit.engine.failure import Kind
from allreduce_jit.norms import norm_family
from allreduce_jit.policy.norm_forms import Form

pytestmark = pytest.mark.gpus(1)

EPS = 2.0**-17
ONE, TWO = Form("one_shot_norm", 1, 1), Form("two_shot_norm", 1, 1)
KINDS = [  # dtype, hidden, and what more of norm_family
    ("bfloat16", 4096, {}),
    ("bfloat16", 2880, {"rounding": "H", "residual": False}),
    ("float16", 72, {"rounding": "U", "weight": "float32", "weight_bias": 1}),
    ("float32", 1024, {"quant": "group", "with_norm": True}),
    ("bfloat16", 1536, {"quant": "token"}),
    ("float16", 3584, {"quant": "static", "rounding": "H"}),
]


@pytest.fixture(scope="module", params=range(2, 9))
def world(request):
    from virtual import VirtualWorld

    torch.zeros(1, device="cuda")  # makes the context current
    world = VirtualWorld(request.param)
    world.set_deadlines(20)
    return world


def tensors_of(spec, seed, rank, x):
    """Of one rank, on the CPU, one per pointer; what is written is poisoned."""
    norm, dtype = spec.epilogue, getattr(torch, spec.dtype)
    shape, like = (spec.rows, spec.hidden), reference.values(seed, 99, spec.numel, dtype)
    made = {
        "input": x,
        "output": torch.empty(shape, dtype=dtype if norm.quant == "none" else norm_reference.E4M3),
        "residual": like.view(shape),
        "weight": reference.values(seed, 98, spec.hidden, dtype).to(getattr(torch, norm.weight)),
        "residual_out": torch.empty(shape, dtype=dtype),
        "norm": torch.empty(shape, dtype=dtype),
        "scale": torch.tensor([0.04]) if norm.quant == "static" else torch.empty(spec.rows, max(1, norm.scale_strides[0])),
    }
    for name in ("output", "residual_out", "norm", *(["scale"] if norm.quant in ("token", "group") else [])):
        reference.poison(made[name])
    return [made[pointer.name] for pointer in spec.pointers]


def run(world, form, dtype, hidden, how, rows, seed, kind=reference.RANDOM):
    family = norm_family(dtype, hidden, **how)
    strides = (hidden // 128, 1) if family.epilogue.quant == "group" else (0, 0)
    spec = replace(family, shape=(rows, hidden), epilogue=replace(family.epilogue, eps=EPS, scale_strides=strides))
    n = world.world_size
    inputs = [
        reference.values(seed, r, spec.numel, getattr(torch, dtype), kind=kind, world_size=n).view(rows, hidden) for r in range(n)
    ]
    want = tensors_of(spec, seed, 0, reference.ordered_sum(inputs))
    norm_reference.run(replace(spec, operation="norm"), want)
    mine = [[tensor.cuda() for tensor in tensors_of(spec, seed, rank, inputs[rank])] for rank in range(n)]
    world.norm(form, spec, mine)
    return spec, mine, want


def forms(world):
    return (ONE,) if world.world_size == 2 else (ONE, TWO)  # two ranks have no two-shot


def test_bits(world):
    for form, (seed, (dtype, hidden, how)) in itertools.product(forms(world), enumerate(KINDS)):
        for rows, kind in ((1, reference.RANDOM), (3, reference.SPECIALS), (3, reference.RANDOM)):
            spec, mine, want = run(world, form, dtype, hidden, how, rows, seed, kind)
            for rank, tensors in enumerate(mine):
                for pointer, found, right in zip(spec.pointers, tensors, want, strict=True):
                    if pointer.name != "input":
                        difference = reference.compare(found.cpu(), right)
                        assert not difference.wrong, f"{form} {spec} rank {rank}: {pointer.name}: {difference}"
    assert world.fully_poisoned() and not world.report.any()


def test_a_missing_rank_is_named_and_no_block_hangs(world):
    missing = world.world_size - 1
    for form in forms(world):
        world.set_deadlines(0.3)
        world.silence(missing)
        try:
            spec, mine, _ = run(world, form, "bfloat16", 4096, {}, 2, 5)
            names = [pointer.name for pointer in spec.pointers]
            for rank in range(world.world_size):
                assert mine[rank][names.index("output")].isnan().all(), rank
            for rank in range(missing):
                code = int(world.report[rank][0])
                assert (code & 0xFF, code >> 8 & 0xFF) in ((Kind.TIMEOUT, missing), (Kind.ABORTED, missing)), f"{rank}: {code:#x}"
        finally:
            world.set_deadlines(20)
            world.revive()
