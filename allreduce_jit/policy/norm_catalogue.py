"""The catalogue of NVLink kernels that normalize: a module for each form of a family of calls."""

from __future__ import annotations

from collections.abc import Sequence

from .catalogue import KernelSpec, nvlink_modules
from .norm import QUANTS, ROUNDINGS
from .norm_forms import NORM_ALGORITHMS, Form, norm_bands
from .operation import ALL_REDUCE, DTYPES, OpSpec

CLUSTERS_FROM = 90  # sm_90


def modules(world_size: int, families: Sequence[OpSpec] = ALL_REDUCE, arch: str | None = None) -> list[KernelSpec]:
    """All CUDA modules of calls of ``families``, by the tables of this package. ``arch``: whose; None: of one that has all forms."""
    found = nvlink_modules(world_size, [family for family in families if family.epilogue is None])
    for family in families:
        if family.operation == "all_reduce_norm":
            bands = norm_bands(family, world_size, clusters=has_clusters(arch))
            found += [norm_module(form, family, world_size) for form in dict.fromkeys(band.form for band in bands)]
    return found


def has_clusters(arch: str | None) -> bool:
    """Whether GPUs of ``arch``, e.g. ``sm_90``, have clusters of blocks; None: yes."""
    return arch is None or int(arch.removeprefix("sm_")) >= CLUSTERS_FROM


def norm_module(form: Form, family: OpSpec, world_size: int, virtual_ranks: bool = False, guarded: bool = True) -> KernelSpec:
    """One form of a family of ``all_reduce_norm``, whose only entry has the module's name."""
    norm, what = family.epilogue, NORM_ALGORITHMS[form.algorithm]
    if norm is None:
        raise ValueError(f"{family} has no norm")
    constants: tuple[tuple[str, object], ...] = (
        ("WORLD_SIZE", world_size),
        ("STREAM", 0),
        ("GUARDED", int(guarded)),
        ("VIRTUAL_RANKS", int(virtual_ranks)),
        ("HOST", 0),
        ("HIDDEN", family.hidden),
        ("ROUNDING", ROUNDINGS.index(norm.rounding)),
        ("QUANT", QUANTS.index(norm.quant)),
        ("RESIDUAL", int(norm.residual)),
        ("WEIGHT_IS_FP32", int(norm.weight == "float32")),
        ("WEIGHT_BIAS", norm.weight_bias),
        ("KEEP_NORM", int(norm.keep_norm)),
    )
    told = [norm.rounding.lower(), *([norm.quant] if norm.quant != "none" else []), *([] if norm.residual else ["plain"])]
    told += [f"w_{DTYPES[norm.weight]}"] * (norm.weight != family.dtype) + [f"b{norm.weight_bias}"] * bool(norm.weight_bias)
    told += ["kept"] * norm.keep_norm + ["virtual"] * virtual_ranks + ["unguarded"] * (not guarded)
    name = (
        f"{form.algorithm}_k{form.packets}_c{form.cluster}_{family.hidden}_{DTYPES[family.dtype]}_{'_'.join(told)}_ws{world_size}"
    )
    function = what.source.removesuffix(".cu")
    body = f"{function}<Config, {DTYPES[family.dtype].title()}, {form.packets}, {form.cluster}>"
    macro = ("NORM_ENTRY", form.cluster, form.warps(family, world_size), form.blocks(family, world_size))
    return KernelSpec(name, "cuda", what.source, constants, (name,), (body,), macro)
