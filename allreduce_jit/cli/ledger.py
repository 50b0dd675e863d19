"""What a soak has counted: of one rank, of all of them together, and as text."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from ..bench import timing
from ..harness import report, terminal
from ..harness.place import Place
from .bursts import Burst

_SHOWN = 20
_RESOURCES = {"descriptors": "open files", "threads": "threads", "device_bytes": "bytes of device memory in use"}


@dataclass
class Counts:
    """Of one rank.

    Attributes:
        calls: verified calls, by ``eager`` and ``graph``.
        kinds: calls by algorithm and dtype, or kind of norm.
        elements: compared elements.
        wrong: wrong ones among them.
        failures: calls with wrong elements, the first few.
        latencies: of eager calls, in µs.
        resources: what the process and its GPU hold, at several times.
    """

    calls: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    elements: int = 0
    wrong: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    resources: list[dict[str, int]] = field(default_factory=list)

    def add(self, rank: int, burst: Burst, kind: str, turns: int, algorithms: list[str]) -> None:
        """So many turns of a burst that have completed; ``algorithms`` ran its calls."""
        self.calls[kind] += turns * len(burst.calls)
        for call, algorithm in zip(burst.calls, algorithms):
            self.kinds[f"{algorithm} {call.title}"] += turns
        self.elements += turns * burst.elements
        wrong, found = burst.verdict()
        self.wrong += wrong
        for number, call, count in found[: max(0, _SHOWN - len(self.failures))]:
            where = {"call": number, "numel": call.numel, "dtype": call.title}
            self.failures.append({"rank": rank, **where, "kind": kind, "in_place": call.in_place, "wrong": count})


def resources(place: Place) -> dict[str, int]:
    """Descriptors, threads and device memory in use."""
    found = {}
    with suppress(OSError):  # no /proc, as in some sandboxes
        found = {"descriptors": len(os.listdir("/proc/self/fd")), "threads": len(os.listdir("/proc/self/task"))}
    if place.device.type == "cuda":
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(place.device)
        found["device_bytes"] = total - free
    return found


def document(
    place: Place,
    communicator: Any,
    options: Mapping[str, Any],
    counts: Counts,
    alongside: Mapping[str, int],
    errors: list[str],
    seconds: float,
) -> dict[str, Any]:
    """The ledger of all ranks, the same on each; collective.

    Args:
        counts: this rank's.
        alongside: what ran beside the calls: ``gemm`` and ``nccl``, the same on all ranks, and this rank's ``stalls``.
        errors: what ended the run, by rank; the same on all.
        seconds: of the slowest rank.
    """
    latencies = counts.latencies
    mine = {
        "elements": counts.elements,
        "wrong": counts.wrong,
        "failures": counts.failures,
        "stalls": alongside["stalls"],
        "latency": [timing.percentile(latencies, 50), timing.percentile(latencies, 99.9)] if latencies else [0.0, 0.0],
        "resources": counts.resources,
    }
    everyone = place.gather(mine)
    wrong, calls = sum(one["wrong"] for one in everyone), counts.calls.total()
    median, tail = (max(column) for column in zip(*(one["latency"] for one in everyone)))
    return {
        "ok": not wrong and not errors and calls > 0,
        "machine": report.machine(),
        "communicator": communicator.describe().to_dict(),
        "options": options,
        "calls": {"total": calls, **counts.calls},
        "kinds": dict(sorted(counts.kinds.items())),
        "elements": sum(one["elements"] for one in everyone),
        "wrong": wrong,
        "failures": sorted((f for one in everyone for f in one["failures"]), key=lambda f: (f["call"], f["rank"])),
        "hangs": len(errors),
        "errors": errors,
        "latency_us": {"median": round(median, 2), "p99.9": round(tail, 2), "samples": len(latencies)},
        "alongside": {**alongside, "stalls": sum(one["stalls"] for one in everyone)},
        "resources": [one["resources"] for one in everyone],
        "seconds": round(seconds, 2),
        "calls_per_second": round(calls / seconds) if seconds else 0,
    }


def render(ledger: dict[str, Any]) -> str:
    """The ledger as text."""
    calls, latency, alongside = ledger["calls"], ledger["latency_us"], ledger["alongside"]
    kinds = ", ".join(f"{count:,} {name}" for name, count in ledger["kinds"].items())
    lines = [
        report.headline(ledger["machine"]),
        f"{report.counted(ledger['communicator']['world_size'], 'rank')}, path {ledger['communicator']['path']}",
        f"{calls['total']:,} calls in {ledger['seconds']} s ({calls.get('eager', 0):,} eager, {calls.get('graph', 0):,} "
        f"in graphs): {kinds}",
        f"alongside: {alongside['gemm']:,} matrix products, {alongside['nccl']:,} NCCL all-reduces, "
        f"{alongside['stalls']:,} stalls",
        f"{ledger['elements']:,} elements checked, {ledger['wrong']:,} wrong; {report.counted(ledger['hangs'], 'rank')} with errors",
        f"latency: median {latency['median']} µs, p99.9 {latency['p99.9']} µs ({latency['samples']:,} samples a rank)",
    ]
    for name in ledger["resources"][0][0]:
        over_time = ", ".join(f"{at[name]:,}" for at in ledger["resources"][0])
        lines.append(f"{_RESOURCES[name]} of rank 0, early and at the end: {over_time}")
    lines += [
        f"rank {f['rank']}: call {f['call']:,} ({f['kind']}, {f['numel']} {f['dtype']}"
        f"{', in place' if f['in_place'] else ''}): {f['wrong']} wrong elements"
        for f in ledger["failures"][:_SHOWN]
    ]
    return terminal.wrapped("\n".join([*lines, *ledger["errors"], terminal.verdict(ledger["ok"], "ok")]), 2)
