"""A document of ``bench --op add-rms-norm`` as text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..harness import report, terminal
from .table import heading, refusals


def render(document: dict[str, Any]) -> str:
    """The tables as text."""
    options = document["options"]
    what = f"residual and RMSNorm, rounding {options['rounding']}, quantization {options['quant']}"
    notes = [
        f"# all-reduce, {what}; SoL: of the all-reduce of those bytes alone",
        "# unfused: our all_reduce and add_rms_norm; allreduce, norm: each alone; others: their all-reduce and add_rms_norm, "
        "but for flashinfer_*, which are fused",
    ]
    lines = [*heading(document), *(terminal.wrapped(note, 2) for note in notes)]
    names = [name for name, why in document["peers"].items() if why is None]
    for mode in dict.fromkeys(row["mode"] for row in document["rows"]):
        rows = [row for row in document["rows"] if row["mode"] == mode]
        columns = _columns(rows, names)
        cells = ([cell(row) for cell in columns.values()] for row in rows)
        lines += ["", f"# {mode}", report.table(list(columns), cells, keys=2)]
        lines += refusals(rows)
    verdict = terminal.verdict(document["ok"], "OK")
    return "\n".join([*lines, "", f"# Out of bounds values : {document['wrong']} {verdict}"])


def _columns(rows: list[dict[str, Any]], names: list[str]) -> dict[str, Callable[[dict[str, Any]], Any]]:
    columns: dict[str, Callable[[dict[str, Any]], Any]] = {
        "rows": lambda row: row["rows"],
        "hidden": lambda row: row["hidden"],
        "type": lambda row: row["dtype"],
        "algorithm": lambda row: row["algorithm"],
        "fused": lambda row: row["fused"]["p50_us"],
        "p99": lambda row: row["fused"]["p99_us"],
        "#wrong": _wrong,
        "unfused": lambda row: row["unfused"]["p50_us"],
        "allreduce": lambda row: row["all_reduce"]["p50_us"],
        "norm": lambda row: row["norm"]["p50_us"],
    }
    if any(row["sol_us"] for row in rows):
        columns["SoL"] = lambda row: row["sol_us"]
        columns["xSoL"] = lambda row: row["sol_ratio"]
    for name in names:
        columns[name] = lambda row, name=name: row["peers"][name].get("p50_us")
    return columns


def _wrong(row: dict[str, Any]) -> Any:
    counts = [row[name]["wrong"] for name in ("fused", "unfused")]
    return "N/A" if None in counts else sum(counts)
