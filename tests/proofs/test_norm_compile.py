"""Kernels that all-reduce and normalize as machine code: every form of the table compiles, and keeps its values in registers."""

from __future__ import annotations

import pytest
from helpers.cubins import compile_one, entries_of, needs_nvrtc, resources

from allreduce_jit.norms import norm_family
from allreduce_jit.policy.norm_catalogue import has_clusters, modules

FAMILIES = [
    norm_family("bfloat16", 4096),
    norm_family("bfloat16", 2880, "H", "static"),
    norm_family("float16", 7168, "U", "group", weight="float32", with_norm=True),
    norm_family("bfloat16", 8192, "R", "token", residual=False, weight_bias=1),
    norm_family("float32", 64),
]


@needs_nvrtc
@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f"{f.dtype} {f.hidden} {f.epilogue.quant}")
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_forms_compile(tmp_path, world_size, family):
    for spec in modules(world_size, [family], "sm_90"):
        artifact = compile_one(spec, "sm_90")
        assert entries_of(artifact.cubin) >= set(spec.entries)
        (entry,) = spec.entries
        used = resources(tmp_path, artifact)[entry]
        threads = 32 * spec.macro[2] * spec.macro[3]  # that an SM has to hold
        assert used["LOCAL"] == 0 and used["REG"] * threads <= 65536, used


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_100"])
def test_other_gpus(arch):
    family = norm_family("bfloat16", 8192)
    specs = modules(4, [family], arch)
    assert {spec.macro[1] for spec in specs} == ({1, 8} if has_clusters(arch) else {1})
    for spec in specs:
        assert entries_of(compile_one(spec, arch).cubin) >= set(spec.entries)
