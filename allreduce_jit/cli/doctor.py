"""``allreduce-jit doctor``: what this machine is, which path would run on it, and what is in the way."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..harness import report, terminal
from ..integrations.present import engines
from ..paths import Path as Rung
from ..policy import backends
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
    document = examine()
    print(json.dumps(document, indent=2) if args.json else render(document))
    return exit_code(document)


def exit_code(document: dict[str, Any]) -> int:
    runs_kernels = (document["verdict"] or {}).get("path") in backends.names()
    harmless = runs_kernels or not document["gpu_present"] or not document["problems"]
    return 0 if harmless else 1


def examine(
    probe: Callable[[str], Any] | None = None,
    decide: Callable[..., Any] | None = None,
    open_cache: Callable[[Path | None], Any] | None = None,
    gpu_count: int | None = None,
    proc_gpus: Path = _PROC_GPUS,
) -> dict[str, Any]:
    """Everything ``doctor`` says, JSON-able. Nothing on the machine makes it raise.

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
    cache = look.cache(open_cache or _imported("jit.cache", "KernelCache"), settings or Settings())
    document = {
        "gpu_present": bool(visible or installed),
        "simulated_ranks": len(caps) if visible else 0,
        "verdict": verdict,
        "problems": look.problems,
        "probe": [found.to_json() for found in caps if found is not None],
        "versions": report.versions(),
        "driver": report.driver_version(),
        "cache": cache,
        "engines": engines(),
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIX) or k in (PLUGINS_SWITCH, V2_SWITCH)},
    }
    return document | {"advice": advice.next_step(document, settings is not None)}


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
            if gpus and facts is not None and facts.to_json().get("gpu") is None:
                self.problems.append(f"{device}: no usable GPU")
        return found

    def verdict(self, decide: Callable[..., Any], caps: list[Any], settings: Settings) -> dict[str, Any] | None:
        found = self.attempt("decision", lambda: decide(caps, [settings] * len(caps)))
        if found is None:
            return None
        path = report.word(found.path)
        reasons = [{"code": report.word(r.code), "text": r.text, "rank": r.rank} for r in found.reasons]
        if path not in backends.names():
            hindrances = [reason for reason in reasons if reason["code"] not in _NO_HINDRANCE]
            self.problems += report.reasons(hindrances)
        return {"path": path, "backend": found.backend, "full_nvlink": found.full_nvlink, "reasons": reasons}

    def cache(self, open_cache: Callable[[Path | None], Any], settings: Settings) -> dict[str, Any]:
        opened = self.attempt("kernel cache", lambda: open_cache(settings.cache_dir))
        entries = opened and self.attempt("kernel cache", opened.entries) or []
        problem = opened and opened.problem
        if problem:
            self.problems.append(f"kernel cache {settings.cache_dir or '(none)'}: {problem}")
        total = sum(size for _, size in entries)
        norms = sum("norm_" in name for name, _ in entries)
        directory = settings.cache_dir and str(settings.cache_dir)
        return {"directory": directory, "entries": len(entries), "norms": norms, "bytes": total, "problem": problem}


def render(document: dict[str, Any]) -> str:
    """The examination as text."""
    verdict, cache, probes = document["verdict"], document["cache"], document["probe"]
    lines = ["versions     " + ", ".join(f"{k} {v or 'missing'}" for k, v in document["versions"].items())]
    lines.append(f"driver       {document['driver'] or 'none'}")
    lines += _host_lines(probes[0]) if probes else []
    for facts in probes:
        lines += _gpu_lines(facts)
    state = f"{cache['entries']} kernels ({cache['norms']} with a norm), {cache['bytes']} bytes"
    lines.append(f"kernel cache {cache['directory'] or '(none)'}: {cache['problem'] or state}")
    lines += [f"environment  {name}={value}" for name, value in document["environment"].items()]
    for found in document["engines"]:
        lines.append(f"engine       {found['engine']} {found['version']}: " + (found["why"] or "its plug-in is on"))
    ranks = document["simulated_ranks"]
    who = f"{ranks} ranks, one per GPU" if ranks else "ranks on the CPU"
    if verdict:
        kernels = f"{verdict['path']}, else " if verdict["path"] in backends.names() else ""
        lines.append(f"would run    {kernels}torch.distributed over {verdict['backend']}, for {who}")
        lines += [f"  because    {line}" for line in report.reasons(verdict["reasons"])]
    lines += [f"note         {estimate}" for estimate in _estimates(verdict, ranks)]
    notes = dict.fromkeys(" ".join(note.split()) for facts in probes for note in facts.get("problems", ()))
    lines += [f"note         {note}" for note in notes]
    lines += [f"PROBLEM      {problem}" for problem in document["problems"]] or ["no problems"]
    lines.append(f"advice       {document['advice']}")
    return terminal.painted(terminal.wrapped("\n".join(lines), _LABEL), _COLOURS)


def _estimates(verdict: dict[str, Any] | None, ranks: int) -> list[str]:
    """What the tables of the path that would run were not measured for."""
    path = verdict and verdict["path"]
    if path == Rung.LEGACY.value and not (verdict or {})["full_nvlink"]:
        return ["from which size on calls go to NCCL is an estimate on PCIe: allreduce-jit bench compares the two"]
    if path == Rung.HOST.value and ranks > 2:
        return [f"which algorithm runs which size is an estimate for {ranks} ranks: it was measured for 2"]
    return []


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
