"""A document of ``bench`` as text: nccl-tests' table, with competitors to the right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..harness import report, terminal


def render(document: dict[str, Any]) -> str:
    """The tables as text."""
    lines = heading(document)
    names = [name for name, why in document["peers"].items() if why is None]
    for mode in dict.fromkeys(row["mode"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["mode"] == mode]
        columns = _columns(rows, names)
        cells = ([cell(row) for cell in columns.values()] for row in rows)
        headers = [header.split("/")[-1] for header in columns]
        lines += ["", f"# {mode}", report.table(headers, cells)]
        if any(row.get("ever_new") for row in rows):
            lines.append("# *: no two calls of a burst with the same addresses; otherwise the same few in turn")
        lines += refusals(rows)
    verdict = terminal.verdict(document["ok"], "OK")
    average = document["average_busbw_gbs"]
    lines += ["", f"# Out of bounds values : {document['wrong']} {verdict}"]
    return "\n".join([*lines, f"# Avg bus bandwidth    : {average:.4g} GB/s"])


def heading(document: dict[str, Any]) -> list[str]:
    """What was measured where; lines that fit the terminal, if stdout is one."""
    facts = document["communicator"]
    lines = [
        f"# {report.headline(document['machine'])}",
        f"# {report.counted(facts['world_size'], 'rank')}, path {facts['path']}; {'; '.join(report.reasons(facts['reasons']))}",
        f"# {document['unit']}; NVLink multicast {document['multicast']}",
        f"# {_speed_of_light(document)}",
    ]
    found = document["peers"].items()
    lines += [f"# competitor {name}: {'ok' if why is None else 'unavailable: ' + why}" for name, why in found]
    return [terminal.wrapped(line, 2) for line in lines]


def _speed_of_light(document: dict[str, Any]) -> str:
    """The floor of a document in one line, or why it has none."""
    light = document.get("floor", {"reason": "not measured"})
    if "reason" in light:
        return f"no SoL: {light['reason']}"
    if "both_gbs" in light:
        return (
            f"SoL: an exchange of 16-byte packets through host memory up to 1 MB, beyond t_flag {light['flag_us']:.2f} µs + "
            f"2(n-1)/n·S/BW, BW {light['both_gbs']:.1f} GB/s in and out at once, measured in this run"
        )
    return (
        f"SoL: t_flag {light['flag_us']:.2f} µs + min((n-1)·S/BW, t_hop {light['hop_us']:.2f} µs + 2(n-1)/n·S/BW), "
        f"BW {light['egress_gbs']:.1f} GB/s, measured in this run"
    )


def _columns(rows: list[dict[str, Any]], names: list[str]) -> dict[str, Callable[[dict[str, Any]], Any]]:
    """Header (what stands before a slash keeps it apart from others) → the cell of a row."""
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "size": lambda row: row["bytes"],
        "count": lambda row: row["count"],
        "type": lambda row: row["dtype"],
        "redop": lambda row: row["redop"],
        "algorithm": lambda row: row["algorithm"],
        "time": lambda row: row["p50_us"],
        "p99": lambda row: row["p99_us"],
        "algbw": lambda row: row["algbw_gbs"],
        "busbw": lambda row: row["busbw_gbs"],
        "#wrong": lambda row: "N/A" if row["wrong"] is None else row["wrong"],
    }
    for header, field in (("out=", "with_out"), ("new/time*", "ever_new"), ("new/out=*", "ever_new_with_out")):
        if any(row.get(field) for row in rows):
            columns[header] = lambda row, field=field: (row.get(field) or {}).get("p50_us")
    if any(row.get("sol_us") for row in rows):
        columns["SoL"] = lambda row: row["sol_us"]
        columns["xSoL"] = lambda row: row["sol_ratio"]
    for name in names:
        columns[name] = lambda row, name=name: row["peers"][name].get("p50_us")
        columns[f"{name}/p99"] = lambda row, name=name: row["peers"][name].get("p99_us")
    return columns


def refusals(rows: list[dict[str, Any]]) -> list[str]:
    """Why competitors left rows out."""
    texts = {f"# - {name}: {r['reason']}": None for row in rows for name, r in row["peers"].items() if "reason" in r}
    return list(texts)
