"""``allreduce-jit warmup`` and ``allreduce-jit cache``: fill the kernel cache ahead of time, look at it, empty it."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..harness import report, terminal
from ..policy import backends, local_norm, measured_tables
from ..policy.catalogue import WORLD_SIZES
from ..settings import Settings


def run(
    args: argparse.Namespace,
    modules: Callable[..., Iterable[Any]] = backends.modules,
    build: Callable[..., tuple[Any, bool]] | None = None,
) -> int:
    """Compile, print, and return the exit code: 1 if a kernel did not compile."""
    if build is None:
        from ..jit.compiler import build
    cache = _open()
    archs = [args.arch] if args.arch else _archs()
    paths = backends.names() if args.path == "all" else (args.path,)
    sizes = WORLD_SIZES if args.world_size == "all" else (int(args.world_size),)
    if args.op == "all-reduce":
        specs = {spec.name: spec for path in paths for n in sizes for spec in modules(path, n)}
        jobs = [(spec, arch) for spec in specs.values() for arch in archs]
    else:
        jobs = _norm_jobs(args, archs, [(path, n) for path in paths for n in sizes], modules)
    start = time.perf_counter()
    rows = _build_all(jobs, build, cache)
    failed = [row for row in rows if row["error"]]
    document = {
        "ok": not failed,
        "directory": _name(cache.directory),
        "problem": cache.problem,
        "compiled": sum(not row["cached"] for row in rows) - len(failed),
        "cached": sum(row["cached"] for row in rows),
        "failed": len(failed),
        "seconds": round(time.perf_counter() - start, 3),
        "kernels": rows,
    }
    print(json.dumps(document, indent=2) if args.json else _render(document))
    return 1 if failed else 0


def _norm_jobs(
    args: argparse.Namespace, archs: list[str], where: list[tuple[str, int]], modules: Callable[..., Iterable[Any]]
) -> list[tuple[Any, str]]:
    """Of calls with a residual and no quantization: their kernels, and the one behind an all-reduce where a path has none."""
    from ..norms import norm_family

    families = [norm_family(args.dtype, hidden) for hidden in args.hidden]
    found: dict[tuple[str, str], tuple[Any, str]] = {}
    for arch in archs:
        specs = [spec for path, n in where for spec in modules(path, n, families, arch)]
        for spec in (*specs, *map(local_norm.module, families)):
            found[spec.name, arch] = spec, arch
    return list(found.values())


def _build_all(jobs: list[tuple[Any, str]], build: Callable[..., tuple[Any, bool]], cache: Any) -> list[dict[str, Any]]:
    from ..jit.compiler import workers

    def row(job: tuple[Any, str]) -> dict[str, Any]:
        (spec, arch), start, cached, error = job, time.perf_counter(), False, None
        try:
            _, cached = build(spec, arch, cache)
        except Exception as trouble:  # noqa: BLE001 - the other kernels are wanted all the same
            error = f"{type(trouble).__name__}: {trouble}"
        ms = (time.perf_counter() - start) * 1e3
        return {"name": spec.name, "arch": arch, "cached": cached, "ms": round(ms, 2), "error": error}

    progress, rows = terminal.Progress(), []
    with ThreadPoolExecutor(workers()) as pool:
        for found in pool.map(row, jobs):
            rows.append(found)
            progress(f"warmup: {len(rows)}/{len(jobs)}  {found['name']} {found['arch']}", len(rows) / len(jobs))
    progress.done()
    return rows


def _render(document: dict[str, Any]) -> str:
    def how(row: dict[str, Any]) -> str:
        return "FAILED" if row["error"] else "cached" if row["cached"] else "compiled"

    rows = [(row["name"], row["arch"], how(row), row["ms"]) for row in document["kernels"]]
    lines = [report.table(("kernel", "arch", "how", "ms"), rows)]
    lines += [f"{row['name']} {row['arch']}: {row['error']}" for row in document["kernels"] if row["error"]]
    counts = ", ".join(f"{document[key]} {key}" for key in ("compiled", "cached", "failed"))
    lines.append(f"{counts} in {document['seconds']:.1f} s; {document['directory'] or 'no directory'}")
    if document["problem"]:
        lines.append(f"nothing was kept on disk: {document['problem']}")
    return "\n".join(lines)


def run_cache(args: argparse.Namespace) -> int:
    """``cache path``, ``cache list``, ``cache clear``."""
    cache = _open()
    document: dict[str, Any] = {"directory": _name(cache.directory), "problem": cache.problem}
    lines = [] if cache.problem is None else [f"not usable: {cache.problem}"]
    if args.action == "path":
        lines = [document["directory"] or "none", *lines]
    elif args.action == "list":
        entries = document["entries"] = [{"name": name, "bytes": size} for name, size in cache.entries()]
        lines += [report.table(("kernel", "bytes"), [tuple(entry.values()) for entry in entries])] if entries else []
        lines.append(
            f"{report.counted(len(entries), 'kernel')}, {sum(entry['bytes'] for entry in entries):,} bytes in {document['directory'] or 'no directory'}"
        )
        refused = cache.refused() + measured_tables.refused(cache.directory)
        document["refused"] = [{"file": file, "why": why} for file, why in refused]
        document["tables"] = sorted({*map(str, measured_tables.entries(cache.directory))} - {file for file, _ in refused})
        lines += [f"{report.counted(len(document['tables']), 'table')} of allreduce-jit tune", *document["tables"]]
        lines += [f"not used: {file}: {why}" for file, why in refused]
    else:
        document["removed"], document["tables_removed"] = cache.clear(), measured_tables.clear(cache.directory)
        lines.append(f"{report.counted(document['removed'], 'kernel')} removed from {document['directory'] or 'no directory'}")
        lines.append(f"{report.counted(document['tables_removed'], 'table')} of allreduce-jit tune removed")
    print(json.dumps(document, indent=2) if args.json else "\n".join(lines))
    return 0


def _open() -> Any:
    from ..jit.cache import KernelCache

    return KernelCache(Settings.from_env().cache_dir)


def _name(directory: Path | None) -> str | None:
    return None if directory is None else str(directory)


def _archs() -> list[str]:
    import torch

    found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    if not found:
        raise InputError("this machine shows no CUDA GPU to compile for; name one, e.g. --arch sm_90")
    return [f"sm_{major}{minor}" for major, minor in sorted(found)]
