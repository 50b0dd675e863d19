"""``allreduce-jit doctor``: what this machine is, which path would run on it, and what is in the way."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..harness import report, terminal
from ..integrations.present import EngineReport, engines
from ..machine.probe import Capabilities
from ..policy import backends
from ..policy.verdict import Reason
from ..records import Record, plain
from ..settings import PLUGINS_SWITCH, PREFIX, V2_SWITCH, Settings, misread_switch
from . import advice

_MAX_RANKS = 8
# Codes of reasons that are nobody's fault: the machine has nothing to reduce over, or the user wanted it so.
_NO_HINDRANCE = ("cpu", "world-size-1", "path-forced")
_LABEL = 13  # columns, before what is said
_COLOURS = {
    "PROBLEM ": terminal.RED,
    "no problems": terminal.GREEN,
    "note ": terminal.YELLOW,
    "advice ": terminal.BOLD,
}  # of lines' beginnings
_PROC_GPUS = Path("/proc/driver/nvidia/gpus")


def run(args: argparse.Namespace) -> int:
    """Examine, print, and return the exit code: 1 if there is a GPU and something keeps the kernels from it."""
    found = examine()
    print(json.dumps(found.to_dict(), indent=2) if args.json else render(found))
    return exit_code(found)


@dataclass(frozen=True)
class VerdictReport(Record):
    """What would run, as ``Verdict`` has it, with every path by its name.

    Attributes:
        path, backend, full_nvlink: as of ``Verdict``.
        reasons: one for each step down.
        tuning: as ``Communicator.describe`` has it.
    """

    path: str
    backend: str
    full_nvlink: bool | None
    reasons: tuple[Reason, ...]
    tuning: str | None = None


@dataclass(frozen=True)
class CacheReport(Record):
    """The compiled kernels on disk.

    Attributes:
        directory: where they are; None: nowhere.
        entries: how many.
        norms: those of them with a norm.
        bytes: of all of them.
        problem: why none are kept, else None.
    """

    directory: str | None
    entries: int
    norms: int
    bytes: int
    problem: str | None


@dataclass(frozen=True)
class DoctorReport(Record):
    """What ``allreduce-jit doctor`` says.

    Attributes:
        gpu_present: whether the process or the driver has a GPU.
        simulated_ranks: how many ranks the verdict is for, one for each GPU; 0: ranks on the CPU.
        verdict: what would run; None: something kept doctor from a decision.
        problems: what is in the way.
        probe: what each rank would see.
        versions: by distribution; None: not installed.
        driver: the kernel driver's version; None: there is none.
        cache: compiled kernels.
        engines: those that are installed.
        environment: our variables that are set.
        advice: what to do next.
    """

    gpu_present: bool
    simulated_ranks: int
    verdict: VerdictReport | None
    problems: tuple[str, ...]
    probe: tuple[Capabilities, ...]
    versions: Mapping[str, str | None]
    driver: str | None
    cache: CacheReport
    engines: tuple[EngineReport, ...]
    environment: Mapping[str, str]
    advice: str = ""


def exit_code(found: DoctorReport) -> int:
    runs_kernels = found.verdict is not None and found.verdict.path in backends.names()
    harmless = runs_kernels or not found.gpu_present or not found.problems
    return 0 if harmless else 1


def examine(
    probe: Callable[[str], Any] | None = None,
    decide: Callable[..., Any] | None = None,
    open_cache: Callable[[Path | None], Any] | None = None,
    gpu_count: int | None = None,
    proc_gpus: Path = _PROC_GPUS,
    load_tables: Callable[..., Any] | None = None,
) -> DoctorReport:
    """Everything ``doctor`` says. Nothing on the machine makes it raise.

    The GPUs that this process sees stand in for the ranks of a group, one each. The arguments replace the
    package's own functions and the machine's own answers.
    """
    look = _Look()
    settings = look.attempt("settings", Settings.from_env)
    misread = misread_switch(os.environ)
    look.problems += [misread] if misread else []
    look.problems += [f"{name} is not installed: {loss}" for module, name, loss in _needed() if not _importable(module)]
    visible = _visible() if gpu_count is None else gpu_count
    installed = len(list(proc_gpus.iterdir())) if proc_gpus.is_dir() else 0
    if installed and not visible:
        look.problems.append(f"the driver has {installed} GPUs, torch sees none: a CPU build, or hidden from it")
    caps = look.caps(probe or _imported("machine.probe", "probe"), min(visible, _MAX_RANKS))
    verdict = None
    if settings and None not in caps:
        verdict = look.verdict(decide or _imported("policy.dispatch", "decide"), caps if visible else caps * 2, settings)
    if verdict and settings and settings.tuning and verdict.tuning:
        load = load_tables or _imported("policy.measured_tables", "load_all")
        tables = look.attempt("measured tables", lambda: load(settings.cache_dir, caps[0], len(caps))) or {}
        verdict = replace(verdict, tuning=tables.get(verdict.path, {}).get("path", verdict.tuning))
    cache = look.cache(open_cache or _imported("jit.cache", "KernelCache"), settings or Settings())
    found = DoctorReport(
        gpu_present=bool(visible or installed),
        simulated_ranks=len(caps) if visible else 0,
        verdict=verdict,
        problems=tuple(look.problems),
        probe=tuple(one for one in caps if one is not None),
        versions=report.versions(),
        driver=report.driver_version(),
        cache=cache,
        engines=engines(),
        environment={k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIX) or k in (PLUGINS_SWITCH, V2_SWITCH)},
    )
    return replace(found, advice=advice.next_step(found, settings is not None))


def _needed() -> list[tuple[str, str, str]]:
    """What is imported beside torch: the module, its distribution, and what a machine with GPUs cannot have without it."""
    needed = [("cuda.bindings", "cuda-bindings", "no GPU path at all, all-reduces go to torch.distributed")]
    for toolchain in dict.fromkeys(row.toolchain for row in backends.BACKENDS):
        lost = ", ".join(row.path.value for row in backends.BACKENDS if row.toolchain is toolchain)
        needed.append((toolchain.module, toolchain.distribution, f"nothing compiles the kernels of {lost}"))
    return needed


def _imported(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"..{module}", __package__), name)


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even the package that it would be in
        return False


def _visible() -> int:
    import torch

    return torch.cuda.device_count()


class _Look:
    """Collects the problems of every step, each of which may fail."""

    def __init__(self) -> None:
        self.problems: list[str] = []

    def attempt(self, what: str, step: Callable[[], Any]) -> Any:
        try:
            return step()
        except Exception as error:  # noqa: BLE001 - whatever breaks here is what the user called the doctor for
            self.problems.append(f"{what}: {type(error).__name__}: {error}")
            return None

    def caps(self, probe: Callable[[str], Any], gpus: int) -> list[Any]:
        """One per GPU, or the CPU's; None where the probe failed."""
        devices = [f"cuda:{i}" for i in range(gpus)] or ["cpu"]
        found = [self.attempt(f"probe of {device}", lambda device=device: probe(device)) for device in devices]
        for device, facts in zip(devices, found):
            if gpus and facts is not None and facts.gpu is None:
                self.problems.append(f"{device}: no usable GPU")
        return found

    def verdict(self, decide: Callable[..., Any], caps: list[Any], settings: Settings) -> VerdictReport | None:
        found = self.attempt("decision", lambda: decide(caps, [settings] * len(caps)))
        if found is None:
            return None
        path = report.word(found.path)
        if path not in backends.names():
            self.problems += _said(reason for reason in found.reasons if reason.code not in _NO_HINDRANCE)
        tunable = any(row.tunable for row in backends.BACKENDS if row.path.value == path)
        return VerdictReport(path, found.backend, found.full_nvlink, tuple(found.reasons), "package" if tunable else None)

    def cache(self, open_cache: Callable[[Path | None], Any], settings: Settings) -> CacheReport:
        opened = self.attempt("kernel cache", lambda: open_cache(settings.cache_dir))
        entries = opened and self.attempt("kernel cache", opened.entries) or []
        problem = opened and opened.problem
        if problem:
            self.problems.append(f"kernel cache {settings.cache_dir or '(none)'}: {problem}")
        total = sum(size for _, size in entries)
        norms = sum("norm_" in name for name, _ in entries)
        directory = settings.cache_dir and str(settings.cache_dir)
        return CacheReport(directory, len(entries), norms, total, problem)


def _said(reasons: Iterable[Reason]) -> list[str]:
    return report.reasons([plain(reason) for reason in reasons])


def render(found: DoctorReport) -> str:
    """The examination as text."""
    verdict, cache, probes = found.verdict, found.cache, [one.to_dict() for one in found.probe]
    lines = ["versions     " + ", ".join(f"{k} {v or 'missing'}" for k, v in found.versions.items())]
    lines.append(f"driver       {found.driver or 'none'}")
    lines += _host_lines(probes[0]) if probes else []
    for facts in probes:
        lines += _gpu_lines(facts)
    state = f"{cache.entries} kernels ({cache.norms} with a norm), {cache.bytes} bytes"
    lines.append(f"kernel cache {cache.directory or '(none)'}: {cache.problem or state}")
    lines += [f"environment  {name}={value}" for name, value in found.environment.items()]
    for engine in found.engines:
        on = "its plug-in is on; before us: " + ("; ".join(engine.before_us) or "nothing")
        lines.append(f"engine       {engine.engine} {engine.version}: " + (engine.why or on))
    ranks = found.simulated_ranks
    who = f"{ranks} ranks, one per GPU" if ranks else "ranks on the CPU"
    if verdict:
        kernels = f"{verdict.path}, else " if verdict.path in backends.names() else ""
        lines.append(f"would run    {kernels}torch.distributed over {verdict.backend}, for {who}")
        lines += [f"  because    {line}" for line in _said(verdict.reasons)]
        lines += [f"table        {verdict.tuning}"] if verdict.tuning else []
        lines += [f"note         {estimate}" for estimate in advice.estimates(verdict, ranks)]
    notes = dict.fromkeys(" ".join(note.split()) for facts in probes for note in facts.get("problems", ()))
    lines += [f"note         {note}" for note in notes]
    lines += [f"PROBLEM      {problem}" for problem in found.problems] or ["no problems"]
    lines.append(f"advice       {found.advice}")
    return terminal.painted(terminal.wrapped("\n".join(lines), _LABEL), _COLOURS)


def _host_lines(facts: dict[str, Any]) -> list[str]:
    host = facts.get("host") or {}
    software = {k: v for k, v in (facts.get("software") or {}).items() if k in ("nvrtc", "nvml", "cuda_driver")}
    lines = ["host         " + ", ".join(f"{k} {v}" for k, v in host.items())]
    return lines + ["libraries    " + ", ".join(f"{k} {v or 'missing'}" for k, v in software.items())]


def _gpu_lines(facts: dict[str, Any]) -> list[str]:
    gpu = facts.get("gpu")
    if gpu is None:
        return [f"{facts['device']:<12} no GPU"]
    lines = [f"{facts['device']:<12} " + ", ".join(f"{k} {_plain(v)}" for k, v in gpu.items())]
    lines.append(f"  fabric     {facts.get('fabric')}, MPS {facts.get('mps')}")
    for link in facts.get("links", ()):
        details = ", ".join(f"{k} {_plain(v)}" for k, v in link.items() if k != "peer_uuid")
        lines.append(f"  link       to {link['peer_uuid']}: {details}")
    return lines


def _plain(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ".".join(map(str, value))
    if value is None or isinstance(value, bool):
        return {None: "unknown", True: "yes", False: "no"}[value]
    return str(value)
