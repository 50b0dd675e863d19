"""From a group to the best engine that all of its ranks could build, one agreed step at a time.

Every exchange goes over the CPU group and every rank takes part in each, whatever went wrong on it: a rank
that failed says so instead of leaving the others waiting, and all step down together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace

import torch
import torch.distributed as dist

from ..errors import CommunicatorFailed, InputError, SettingsError
from ..machine.probe import Capabilities, probe
from ..machine.process import Process
from ..policy import measured_tables
from ..policy.catalogue import WORLD_SIZES
from ..policy.dispatch import decide
from ..policy.tables import Bands
from ..policy.verdict import Path, Reason, Verdict
from ..settings import Settings
from ..version import __version__
from .exchange import all_gather_json

log = logging.getLogger("allreduce_jit")


@dataclass
class Ladder:
    """What was agreed: the engine (None = torch.distributed), why, and how long each stage took in seconds.

    ``processes``: each rank's own account of which process it is, for ``watcher.watch``.
    ``tuned``: V2's tables per dtype as measured on this machine, ``tuning`` the file they are from; None = the
    package's.
    """

    verdict: Verdict
    capabilities: list[Capabilities]
    settings: Settings
    processes: list[Process]
    tuned: Mapping[str, Bands] | None = None
    tuning: str | None = None
    engine: object | None = None
    timings: dict[str, float] = field(default_factory=dict)


class StepDown(Exception):
    """Some rank could not go on; all ranks hold the same reason."""

    def __init__(self, reason: Reason):
        self.reason = reason


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
        PeerTimeout: a rank is gone, or did not answer within ``Settings.setup_timeout_s``.
    """
    started = time.perf_counter()
    settings, problem = _settings()
    choice = {"use_v2": settings.use_v2 if use_v2 is None else use_v2, "path": settings.path}
    seen = probe(device)
    facts = {"capabilities": seen.to_json(), "staging_mb": settings.staging_mb, "tuning": settings.tuning}
    facts |= {"process": asdict(Process.own()), "tuned": None}  # all ranks send the same fields
    if dist.get_rank(group) == 0 and settings.tuning:
        facts["tuned"] = measured_tables.load(settings.cache_dir, measured_tables.fingerprint(seen, dist.get_world_size(group)))
    payload = {"problem": problem, "request": request, "choice": choice, **facts}
    answers = _exchange(group, payload, settings.setup_timeout_s)
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
    verdict = decide(caps, list(choices), WORLD_SIZES)
    ladder = Ladder(verdict, caps, settings, list(processes), *_tuned(answers))
    ladder.timings["probe_s"] = time.perf_counter() - started
    return ladder


def _tuned(answers: list[dict]) -> tuple[dict[str, Bands] | None, str | None]:
    """Rank 0's tables and their file, unless some rank wants none; the same on all ranks."""
    found = answers[0]["tuned"]
    if found and all(answer["tuning"] for answer in answers):
        try:
            return measured_tables.tables_from_json(len(answers), found["tables"]), found["path"]
        except (KeyError, TypeError, ValueError) as e:
            log.warning("rank 0's tuned table is ignored: %s", e)
    return None, None


def v2_is_on(group: dist.ProcessGroup) -> bool:
    """Whether the environment of no rank switches V2 off. Collective; raises as ``survey`` does."""
    settings, problem = _settings()
    answers = _exchange(group, {"problem": problem, "use_v2": settings.use_v2}, settings.setup_timeout_s)
    _raise_first_problem(answers)
    return all(answer["use_v2"] for answer in answers)


def _settings() -> tuple[Settings, str | None]:
    """This rank's settings, or what is wrong with its environment."""
    try:
        return Settings.from_env(), None
    except Exception as e:  # noqa: BLE001 - whatever it is, the peers must hear of it
        return Settings(), str(e) or repr(e)


def _exchange(group: dist.ProcessGroup, payload: dict[str, object], timeout_s: float) -> list[dict]:
    """All ranks' payloads, each with the fields of ours."""
    answers = all_gather_json(group, payload, timeout_s)
    for rank, answer in enumerate(answers):
        if not isinstance(answer, dict) or answer.keys() != payload.keys():
            raise InputError(
                f"rank {rank} takes part in another exchange than this one ({', '.join(payload)}): "
                "do all ranks run the same version and make the same calls?"
            )
    return answers


def _read(rank: int, answer: dict) -> tuple[Capabilities, Settings, int, Process]:
    """What a rank says of itself in the survey."""
    try:
        capabilities, process = Capabilities.from_json(answer["capabilities"]), Process.from_json(answer["process"])
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
    highest: Path = Path.V2,
    lowest: Path = Path.LEGACY,
    max_ctas: int | None = None,
    tables: Mapping[str, Bands] | None = None,
) -> Ladder:
    """Survey, then build the highest rung that every rank can build and verify.

    Args:
        highest: no rung above it is tried.
        lowest: below it there is torch.distributed alone.
        max_ctas: blocks that V2 may occupy at once; such a communicator has a table of its own.
        tables: V2's per dtype, instead of what was measured; the same on all ranks.
    """
    # Another version may lay its memory out otherwise.
    request = {"package": __version__, "deterministic": deterministic, "highest": highest, "lowest": lowest, "max_ctas": max_ctas}
    ladder = survey(group, device, request=request)
    if tables is not None or max_ctas is not None:
        ladder.tuned, ladder.tuning = tables, None
    verdict = ladder.verdict
    if verdict.path is Path.V2 and highest is not Path.V2:
        verdict = _lower(ladder, verdict, Reason("v2-switched-off", "the caller asked for the legacy kernels"))
    while verdict.path is not Path.TORCH:
        if verdict.path is Path.LEGACY and lowest is Path.V2:
            verdict = replace(verdict, path=Path.TORCH, full_nvlink=None)
            break
        try:
            ladder.engine = _build(group, device, deterministic, max_ctas, ladder, verdict.path)
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
    without_v2 = [Settings(use_v2=False)] * len(ladder.capabilities)
    below = decide(ladder.capabilities, without_v2, WORLD_SIZES)
    # It names the switch, which stands in for the failure here.
    reasons = (reason, *(r for r in below.reasons if r.code != "v2-switched-off"))
    return replace(below, reasons=reasons)


def _build(group, device: torch.device, deterministic: bool, max_ctas: int | None, ladder: Ladder, path: Path):
    """One rung in agreed stages: kernels, memory, mapping, verified traffic."""
    rank = dist.get_rank(group)
    engine = None

    def compile_share():
        nonlocal engine
        from ..jit.cache import KernelCache

        engine = _engine(path, _config(rank, device, deterministic, max_ctas, ladder))
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
            _close(engine, device)
        raise
    return engine


def _close(engine, device: torch.device) -> None:
    """Never raises: this rank still has to take the next rung with the others."""
    try:
        with torch.cuda.device(device):
            engine.close()
    except Exception as e:  # noqa: BLE001
        log.warning("%s: could not release everything: %s: %s", device, type(e).__name__, e)


def _stage(group, ladder: Ladder, timing: str, code: str, work: Callable[[], object], device: torch.device) -> list:
    """Run ``work`` on every rank; returns all results, or raises the same ``StepDown`` everywhere."""
    started = time.perf_counter()
    result = problem = None
    waited = False
    try:
        # Whatever device the caller has made the default one, what engines check against is on the CPU.
        with torch.cuda.device(device), torch.device("cpu"):
            result = work()
    except Exception as e:  # noqa: BLE001 - whatever it is, the peers must hear of it
        problem, waited = f"{type(e).__name__}: {e}", isinstance(e, CommunicatorFailed)
    payload = {"problem": problem, "waited": waited, "result": result}
    answers = _exchange(group, payload, ladder.settings.setup_timeout_s)
    ladder.timings[timing] = ladder.timings.get(timing, 0.0) + time.perf_counter() - started
    failed = [rank for rank, answer in enumerate(answers) if answer["problem"]]
    if failed:
        cause = min(failed, key=lambda rank: bool(answers[rank]["waited"]))  # who waited in vain is not to blame
        raise StepDown(Reason(code, f"rank {cause}: {answers[cause]['problem']}", cause))
    return [answer["result"] for answer in answers]


def _config(rank: int, device: torch.device, deterministic: bool, max_ctas: int | None, ladder: Ladder):
    from ..engine.base import EngineConfig

    gpus = [c.gpu for c in ladder.capabilities]
    major, minor = gpus[rank].compute_capability
    return EngineConfig(
        rank=rank,
        world_size=len(gpus),
        device=device,
        arch=f"sm_{major}{minor}",
        nvlink=bool(ladder.verdict.full_nvlink),
        deterministic=deterministic,
        settings=ladder.settings,
        max_ctas=max_ctas,
        tuned=ladder.tuned,
    )


def _engine(path: Path, config):
    if path is Path.V2:
        from ..engine.v2 import V2Engine

        return V2Engine(config)
    from ..engine.legacy import LegacyEngine

    return LegacyEngine(config)
