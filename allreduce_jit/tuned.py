"""Tables that ``allreduce-jit tune`` measured on this machine, on disk: a hint, never a reason to fail."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import __version__
from .kernel import DTYPES
from .probe import Capabilities
from .tuning import Bands, bands_from_json, bands_to_json

log = logging.getLogger("allreduce_jit")

FORMAT = 1


def fingerprint(caps: Capabilities, world_size: int) -> dict[str, Any] | None:
    """What a table holds for, as rank 0 sees it: another machine, driver or version has another table; None: no GPU."""
    if caps.gpu is None:
        return None
    major, minor = caps.gpu.compute_capability
    return {
        "gpu": caps.gpu.name,
        "arch": f"sm_{major}{minor}",
        "world_size": world_size,
        "gpus": 1 + len(caps.links),
        "full_nvlink": all(link.nvlink is True for link in caps.links),
        "driver": caps.software.driver,
        "package": __version__,
    }


def path(cache_dir: Path, facts: Mapping[str, Any]) -> Path:
    """The file that holds the table for a fingerprint."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Path(cache_dir) / "tuning" / f"{digest[:32]}.json"


def save(cache_dir: Path, facts: Mapping[str, Any], tables: Mapping[str, Bands], **more: Any) -> Path:
    """Write the tables, whole or not at all; ``more`` is for human readers. Raises ``OSError``."""
    file = path(cache_dir, facts)
    document = {"format": FORMAT, "fingerprint": facts, "tables": tables_to_json(tables), **more}
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=".tmp-", dir=file.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(document, indent=1) + "\n")
        os.replace(temporary, file)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return file


def load(cache_dir: Path, facts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``{"path", "tables"}`` as JSON values, or None without a table; one that is no good is logged and ignored."""
    if facts is None:
        return None
    file = path(cache_dir, facts)
    try:
        with open(file, encoding="utf-8") as stream:
            document = json.load(stream)
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise ValueError(f"expected an object with format {FORMAT}")
        if document.get("fingerprint") != facts:
            raise ValueError(f"it is for {document.get('fingerprint')}, this is {dict(facts)}")
        tables_from_json(facts["world_size"], document.get("tables"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        log.warning("the tuned table %s is ignored: %s", file, e)
        return None
    return {"path": str(file), "tables": document["tables"]}


def tables_to_json(tables: Mapping[str, Bands]) -> dict[str, Any]:
    return {dtype: bands_to_json(bands) for dtype, bands in tables.items()}


def tables_from_json(world_size: int, value: object) -> dict[str, Bands]:
    """Bands per dtype. Raises ``ValueError`` unless all dtypes are there and all bands keep the rules."""
    if not isinstance(value, dict) or value.keys() != DTYPES.keys():
        raise ValueError(f"expected tables for {', '.join(DTYPES)}")
    return {dtype: bands_from_json(world_size, bands) for dtype, bands in value.items()}


def entries(cache_dir: Path) -> list[Path]:
    """All files with tables, good or not, oldest machine or newest; sorted."""
    try:
        return sorted(file for file in (Path(cache_dir) / "tuning").iterdir() if file.suffix == ".json")
    except OSError:
        return []


def clear(cache_dir: Path) -> int:
    """Remove all tables, and what unfinished writes left; returns how many tables there were."""
    found = entries(cache_dir)
    for file in (*found, *(Path(cache_dir) / "tuning").glob(".tmp-*")):
        try:
            file.unlink(missing_ok=True)
        except OSError as e:
            log.warning("the tuned table %s cannot be removed: %s", file, e)
    return len(found) - len(entries(cache_dir))
