"""From a group to the best engine that all of its ranks could build, one agreed step at a time.

Every exchange goes over the CPU group and every rank takes part in each, whatever went wrong on it: a rank
that failed says so instead of leaving the others waiting, and all step down together.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.distributed as dist

from .agree import all_gather_json
from .dispatch import decide
from .errors import SettingsError
from .kernel import WORLD_SIZES
from .probe import Capabilities, probe
from .settings import Settings
from .verdict import Path, Reason, Verdict


@dataclass
class Ladder:
    """What was agreed: the engine (None = torch.distributed), why, and how long each stage took in seconds."""

    verdict: Verdict
    capabilities: list[Capabilities]
    settings: Settings
    engine: object | None = None
    timings: dict[str, float] = field(default_factory=dict)


class StepDown(Exception):
    """Some rank could not go on; all ranks hold the same reason."""

    def __init__(self, reason: Reason):
        self.reason = reason


def survey(group: dist.ProcessGroup, device: torch.device, use_v2: bool | None = None) -> Ladder:
    """Probe all ranks and decide, building nothing. Collective over ``group`` (CPU-capable).

    Args:
        use_v2: overrides the environment's switch on this rank (the caller asks about V2 itself).

    Raises:
        SettingsError: on every rank, when the environment of any rank is wrong.
    """
    started = time.perf_counter()
    settings, problem = Settings(), None
    try:
        settings = Settings.from_env()
    except SettingsError as e:
        problem = str(e)
    if use_v2 is not None:
        settings = replace(settings, use_v2=use_v2)
    choice = {"use_v2": settings.use_v2, "path": settings.path}
    mine = {"problem": problem, "choice": choice, "capabilities": probe(device).to_json()}
    answers = all_gather_json(group, mine)
    for rank, answer in enumerate(answers):
        if answer["problem"]:
            raise SettingsError(f"rank {rank}: {answer['problem']}")
    caps = [Capabilities.from_json(a["capabilities"]) for a in answers]
    verdict = decide(caps, [Settings(**a["choice"]) for a in answers], WORLD_SIZES)
    return Ladder(verdict, caps, settings, timings={"probe_s": time.perf_counter() - started})


def climb(group: dist.ProcessGroup, device: torch.device, deterministic: bool = False,
          highest: Path = Path.V2) -> Ladder:
    """Survey, then build the highest rung (not above ``highest``) that every rank can build and verify."""
    use_v2 = None if highest is Path.V2 else False
    ladder = survey(group, device, use_v2)
    verdict = ladder.verdict
    while verdict.path is not Path.TORCH:
        try:
            ladder.engine = _build(group, device, deterministic, ladder, verdict.path)
            break
        except StepDown as step:
            verdict = _lower(ladder, verdict, step.reason)
    ladder.verdict = verdict
    ladder.timings["total_s"] = sum(ladder.timings.values())
    return ladder


def _lower(ladder: Ladder, verdict: Verdict, reason: Reason) -> Verdict:
    """The rung below, with ``reason`` for leaving this one."""
    if verdict.path is Path.LEGACY:
        return replace(verdict, path=Path.TORCH, reasons=(*verdict.reasons, reason), full_nvlink=None)
    without_v2 = [replace(ladder.settings, use_v2=False)] * len(ladder.capabilities)
    below = decide(ladder.capabilities, without_v2, WORLD_SIZES)
    # It names the switch, which stands in for the failure here.
    reasons = (reason, *(r for r in below.reasons if r.code != "v2-switched-off"))
    return replace(below, reasons=reasons)


def _build(group, device: torch.device, deterministic: bool, ladder: Ladder, path: Path):
    """One rung in agreed stages: kernels, memory, mapping, verified traffic."""
    rank = dist.get_rank(group)
    engine = None

    def compile_share():
        nonlocal engine
        from .cache import KernelCache

        engine = _engine(path, _config(rank, device, deterministic, ladder))
        return engine.compile(KernelCache(ladder.settings.cache_dir))

    def allocate():
        engine.load(shares)
        return engine.allocate()

    try:
        shares = _stage(group, ladder, "build_s", "build-failed", compile_share, device)
        handles = _stage(group, ladder, "build_s", "build-failed", allocate, device)
        _stage(group, ladder, "map_s", "map-failed", lambda: engine.connect(handles), device)
        _stage(group, ladder, "verify_s", "verify-failed", lambda: engine.verify(), device)
    except BaseException:
        if engine is not None:
            engine.close()
        raise
    return engine


def _stage(group, ladder: Ladder, timing: str, code: str, work: Callable[[], object], device: torch.device) -> list:
    """Run ``work`` on every rank; returns all results, or raises the same ``StepDown`` everywhere."""
    started = time.perf_counter()
    result = problem = None
    try:
        with torch.cuda.device(device):
            result = work()
    except Exception as e:  # noqa: BLE001 - whatever it is, the peers must hear of it
        problem = f"{type(e).__name__}: {e}"
    answers = all_gather_json(group, {"problem": problem, "result": result})
    ladder.timings[timing] = ladder.timings.get(timing, 0.0) + time.perf_counter() - started
    for rank, answer in enumerate(answers):
        if answer["problem"]:
            raise StepDown(Reason(code, f"rank {rank}: {answer['problem']}", rank))
    return [answer["result"] for answer in answers]


def _config(rank: int, device: torch.device, deterministic: bool, ladder: Ladder):
    from .engine import EngineConfig

    gpus = [c.gpu for c in ladder.capabilities]
    major, minor = gpus[rank].compute_capability
    return EngineConfig(
        rank=rank,
        world_size=len(gpus),
        device=device,
        arch=f"sm_{major}{minor}",
        sm_count=min(gpu.sm_count for gpu in gpus),
        nvlink=bool(ladder.verdict.full_nvlink),
        deterministic=deterministic,
        settings=ladder.settings,
    )


def _engine(path: Path, config):
    if path is Path.V2:
        from .v2 import V2Engine

        return V2Engine(config)
    from .legacy import LegacyEngine

    return LegacyEngine(config)
