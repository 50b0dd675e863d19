"""Plans of the NVLink kernels that normalize the rows of the sum: (OpSpec, world size) -> form, block, launches of whole rows. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .norm_forms import NORM_ALGORITHMS, Form, NormBand, norm_bands
from .operation import OpSpec
from .plan import WARP, Launch, Layout, Plan, ceil_div
from .tables import Band

APART = "apart"  # in place of an algorithm: an all-reduce, then a kernel of its own for the norm
MOST_LAUNCHES = 8  # of a call with few SMs; what takes more goes apart


@dataclass(frozen=True)
class NormPlan(Plan):
    """A call of ``all_reduce_norm``, or of one launch of it.

    Attributes:
        form: of the kernel.
        rows: of a launch, all of whose blocks it has.
    """

    form: Form
    rows: int


def make_bands(
    family: OpSpec, world_size: int, bare: Sequence[Band], layout: Layout, clusters: bool, max_ctas: int | None = None
) -> tuple[NormBand, ...]:
    """Which form takes how many rows: those of the table for which there is room. Empty: a row has none, calls go apart.

    Args:
        bare: which algorithm all-reduces which sizes of this dtype.
        clusters: whether the GPU has them; with ``max_ctas`` none are used.
    """
    one_shot_up_to = max((band.up_to for band in bare if band.algorithm == "one_shot"), default=0)
    found = norm_bands(family, world_size, one_shot_up_to, clusters and max_ctas is None)
    return tuple(band for band in found if _most_rows(band.form, family, world_size, layout, max_ctas))


def make_plan(
    spec: OpSpec, world_size: int, bands: Sequence[NormBand], layout: Layout, max_ctas: int | None = None
) -> NormPlan | Plan:
    """The plan of a call with at least one row. A call that needs several launches goes to the next form, if there is one."""
    apart = Plan("v2", APART, 0, 0, spec.numel)
    plan = None
    for band in bands:
        if spec.rows <= band.up_to or band is bands[-1]:
            plan = plan_of(band.form, spec, world_size, layout, max_ctas)
            if plan.rows == spec.rows:
                break
    few = max_ctas is not None
    return apart if plan is None or few and ceil_div(spec.rows, plan.rows) > MOST_LAUNCHES else plan


def plan_of(form: Form, spec: OpSpec, world_size: int, layout: Layout, max_ctas: int | None = None) -> NormPlan:
    """The plan that runs ``form``: equal launches where one does not hold all rows.

    Raises:
        ValueError: there is no room for a row.
    """
    most = _most_rows(form, spec, world_size, layout, max_ctas)
    if not most:
        raise ValueError(f"{form}: no room for a row of {spec.hidden} {spec.dtype} elements")
    rows = ceil_div(spec.rows, ceil_div(spec.rows, most))
    block = WARP * form.warps(spec, world_size)
    return NormPlan("v2", form.algorithm, rows * form.cluster, block, rows * spec.hidden, form, rows)


def launches(plan: NormPlan, spec: OpSpec) -> list[Launch]:
    """The launches of a call, each with a guard of its own: in the first cluster, or block.

    Arguments of each as of all-reduces that do not stream: ``launch``, its number, and ``last``, 1.
    """
    starts = range(0, spec.rows, plan.rows)
    return [
        Launch(
            row * spec.hidden,
            min(plan.rows, spec.rows - row) * spec.hidden,
            (min(plan.rows, spec.rows - row) + 1) * plan.form.cluster,
            (("launch", i), ("last", 1)),
        )
        for i, row in enumerate(starts)
    ]


def _most_rows(form: Form, family: OpSpec, world_size: int, layout: Layout, max_ctas: int | None) -> int:
    """Rows that a launch can have: as many as there are slots for (a warp's have an epoch word), and blocks besides the guard's."""
    region = layout.regions.get(NORM_ALGORITHMS[form.algorithm].region)
    if region is None:
        return 0
    room = region.capacity // form.slots(family, world_size)
    return room if max_ctas is None else min(room, (max_ctas - form.cluster) // form.cluster)
