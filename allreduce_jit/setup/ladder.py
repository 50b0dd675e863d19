"""From a group to the best engine that all of its ranks could build: down the table of backends, together.

Every exchange goes over the CPU group and every rank takes part in each, whatever went wrong on it.
"""

from __future__ import annotations

import functools
import logging
import pkgutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from ..errors import InputError, SettingsError
from ..machine.probe import Capabilities, probe
from ..machine.process import Process
from ..paths import Path
from ..policy import backends, measured_tables
from ..policy.backends import Backend
from ..policy.catalogue import WORLD_SIZES
from ..policy.dispatch import decide
from ..policy.operation import ALL_REDUCE, OpSpec
from ..policy.tuning import AnyBands
from ..policy.verdict import Reason, Verdict
from ..settings import Settings
from ..version import __version__
from .exchange import all_gather_fields
from .stages import Stages, StepDown

if TYPE_CHECKING:
    from ..engine.base import EngineConfig, KernelEngine

log = logging.getLogger("allreduce_jit")


@dataclass(frozen=True)
class Measured:
    """A path's tables per dtype, in the place of the package's, and the ``file`` they are from, if they are from one."""

    tables: Mapping[str, AnyBands]
    file: str | None


@dataclass
class Ladder:
    """What was agreed: the engine (None = torch.distributed), why, and how long each stage took in seconds.

    ``wishes``: what each rank's environment says of paths, nothing else of it.
    ``processes``: each rank's own account of which process it is, for ``watcher.watch``.
    ``stages``: in which further kernels of ``engine`` are built.
    ``without``: why it lacks those of ``operations``, if they were what failed.
    ``measured``: the tables of the paths that have other ones than the package's.
    """

    verdict: Verdict
    capabilities: list[Capabilities]
    settings: Settings
    processes: list[Process]
    wishes: list[Settings]
    measured: Mapping[Path, Measured] = field(default_factory=dict)
    engine: KernelEngine | None = None
    stages: Stages | None = None
    without: Reason | None = None
    timings: dict[str, float] = field(default_factory=dict)

    @property
    def tuned(self) -> Mapping[str, AnyBands] | None:
        """The path's tables per dtype; None: the package's."""
        found = self.measured.get(self.verdict.path)
        return None if found is None else found.tables

    @property
    def tuning(self) -> str | None:
        """The file they are from."""
        found = self.measured.get(self.verdict.path)
        return None if found is None else found.file


def survey(
    group: dist.ProcessGroup, device: torch.device, use_v2: bool | None = None, request: dict[str, object] | None = None
) -> Ladder:
    """Probe all ranks and decide, building nothing. Collective over ``group`` (CPU-capable).

    Args:
        use_v2: overrides the environment's switch on this rank (the caller asks about V2 itself).
        request: what the caller wants; has to be the same on all ranks.

    Raises:
        SettingsError: on every rank, when the environment of any rank is wrong.
        InputError: on every rank, when their requests differ, or one sends what this version cannot read.
        PeerTimeoutError: a rank is gone, or did not answer within ``Settings.setup_timeout_s``.
    """
    started = time.perf_counter()
    settings, problem = _settings()
    choice = {field: getattr(settings, field) for field in backends.wishes()}
    if use_v2 is not None:
        choice["use_v2"] = use_v2
    seen = probe(device)
    facts = {"capabilities": seen.to_dict(), "staging_mb": settings.staging_mb, "tuning": settings.tuning}
    facts |= {"process": asdict(Process.own()), "tuned": None}  # all ranks send the same fields
    if dist.get_rank(group) == 0 and settings.tuning:
        facts["tuned"] = measured_tables.load_all(settings.cache_dir, seen, dist.get_world_size(group))
    payload = {"problem": problem, "request": request, "choice": choice, **facts}
    answers = all_gather_fields(group, payload, settings.setup_timeout_s)
    _raise_first_problem(answers)
    for rank, answer in enumerate(answers):
        if answer["request"] != answers[0]["request"]:
            raise InputError(
                f"rank {rank} asks for {answer['request']}, rank 0 for {answers[0]['request']}: ask alike on all ranks"
            )
    caps, choices, staging_mb, processes = zip(*map(_read, range(len(answers)), answers))
    # Every address and every plan follows from it.
    settings = replace(settings, staging_mb=min(staging_mb))
    caps = list(caps)
    wishes = list(choices)
    verdict = decide(caps, wishes, WORLD_SIZES)
    ladder = Ladder(verdict, caps, settings, list(processes), wishes, _measured(answers))
    ladder.timings["probe_s"] = time.perf_counter() - started
    return ladder


def _measured(answers: list[dict]) -> dict[Path, Measured]:
    """Rank 0's tables by path, unless some rank wants none; the same on all ranks."""
    measured: dict[Path, Measured] = {}
    if answers[0]["tuned"] and all(answer["tuning"] for answer in answers):
        for row in backends.BACKENDS:
            if row.tunable is None or (found := answers[0]["tuned"].get(row.path.value)) is None:
                continue
            try:
                tables = measured_tables.tables_from_json(row.tunable, len(answers), found["tables"])
                measured[row.path] = Measured(tables, found["path"])
            except (KeyError, TypeError, ValueError) as e:
                log.warning("rank 0's tuned table of path %s is ignored: %s", row.path, e)
    return measured


def v2_is_on(group: dist.ProcessGroup) -> bool:
    """Whether the environment of no rank switches V2 off. Collective; raises as ``survey`` does."""
    settings, problem = _settings()
    answers = all_gather_fields(group, {"problem": problem, "use_v2": settings.use_v2}, settings.setup_timeout_s)
    _raise_first_problem(answers)
    return all(answer["use_v2"] for answer in answers)


def _settings() -> tuple[Settings, str | None]:
    """This rank's settings, or what is wrong with its environment."""
    try:
        return Settings.from_env(), None
    except Exception as e:  # noqa: BLE001 - whatever it is, the peers must hear of it
        return Settings(), str(e) or repr(e)


def _read(rank: int, answer: dict) -> tuple[Capabilities, Settings, int, Process]:
    """What a rank says of itself in the survey."""
    try:
        capabilities, process = Capabilities.from_dict(answer["capabilities"]), Process.from_json(answer["process"])
        return capabilities, Settings(**answer["choice"]), int(answer["staging_mb"]), process
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise InputError(f"rank {rank} describes itself in words that this version does not know: {e!r}") from e


def _raise_first_problem(answers: list[dict]) -> None:
    for rank, answer in enumerate(answers):
        if answer["problem"]:
            raise SettingsError(f"rank {rank}: {answer['problem']}")


def climb(
    group: dist.ProcessGroup,
    device: torch.device,
    deterministic: bool = False,
    highest: Path | None = None,
    lowest: Path | None = None,
    max_ctas: int | None = None,
    tables: Mapping[str, AnyBands] | None = None,
    families: Sequence[OpSpec] = ALL_REDUCE,
    operations: Sequence[OpSpec] = (),
) -> Ladder:
    """Survey, then build the highest rung that every rank can build and verify.

    Args:
        highest: no rung above it is tried; None: all may be.
        lowest: below it there is torch.distributed alone; None: the lowest there is.
        max_ctas: blocks that kernels may occupy at once; what was measured without such a limit does not count then.
        tables: of path ``highest`` per dtype, instead of what was measured; the same on all ranks.
        families: of the calls whose kernels are built; a rung that cannot is none.
        operations: more of them, where a rung has such kernels; if they fail, the rung is built without them.
    """
    rows = [row.path for row in backends.BACKENDS]
    highest, lowest = highest or rows[0], lowest or rows[-1]
    # Another version may lay its memory out otherwise.
    request = {"package": __version__, "deterministic": deterministic, "highest": highest, "lowest": lowest, "max_ctas": max_ctas}
    request |= {"families": [asdict(family) for family in families], "operations": [asdict(family) for family in operations]}
    ladder = survey(group, device, request=request)
    if tables is not None or max_ctas is not None:
        ladder.measured = {} if tables is None else {highest: Measured(tables, None)}
    stages = Stages(group, device, ladder.settings.cache_dir, ladder.settings.setup_timeout_s, ladder.timings)
    left: dict[Path, Reason] = {}
    while (row := backends.of(ladder.verdict.path)) is not None:
        if rows.index(row.path) > rows.index(lowest):
            ladder.verdict = replace(ladder.verdict, path=Path.TORCH, full_nvlink=None)
            break
        if rows.index(row.path) < rows.index(highest):
            left[row.path] = row.unwanted(f"the caller asked for the {highest} kernels")
        else:
            construct = functools.partial(_construct, row, dist.get_rank(group), device, deterministic, max_ctas, ladder)
            more = [family for family in operations if family.operation in row.operations]
            try:
                ladder.engine, ladder.without = _build(stages, construct, families, more)
                ladder.stages = stages
                break
            except StepDown as step:
                left[row.path] = step.reason
        ladder.verdict = decide(ladder.capabilities, ladder.wishes, WORLD_SIZES, left=left)
    ladder.timings["total_s"] = sum(ladder.timings.values())
    return ladder


def _build(
    stages: Stages, construct: Callable[[], KernelEngine], families: Sequence[OpSpec], more: Sequence[OpSpec]
) -> tuple[KernelEngine, Reason | None]:
    """An engine with the kernels of ``families`` and of ``more``, all at once; if that fails, without the latter, and the reason."""
    without = None
    if more:
        try:
            return stages.build_engine(construct, [*families, *more]), None
        except StepDown as step:
            without = step.reason
    return stages.build_engine(construct, families), without


def _construct(
    row: Backend, rank: int, device: torch.device, deterministic: bool, max_ctas: int | None, ladder: Ladder
) -> KernelEngine:
    """This rank's engine."""
    from ..engine.base import EngineConfig

    gpus = [c.gpu for c in ladder.capabilities if c.gpu is not None]  # all, where a row was taken
    major, minor = gpus[rank].compute_capability
    config = EngineConfig(
        rank=rank,
        world_size=len(gpus),
        device=device,
        arch=f"sm_{major}{minor}",
        nvlink=bool(ladder.verdict.full_nvlink),
        deterministic=deterministic,
        settings=ladder.settings,
        max_ctas=max_ctas,
        tuned=ladder.tuned,
        bus_ids=tuple(gpu.pci_bus_id for gpu in gpus),
    )
    return _engine_class(row)(config)


def _engine_class(row: Backend) -> Callable[[EngineConfig], KernelEngine]:
    """Imported here, of the row that was chosen alone."""
    return pkgutil.resolve_name(row.engine)
