"""Tables that ``allreduce-jit tune`` measured on this machine, on disk: a hint, never a reason to fail."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..machine import files
from ..machine.probe import Capabilities
from ..paths import Path as Rung
from ..version import __version__
from . import backends
from .operation import DTYPES
from .tables import bands_to_json
from .tuning import AnyBands, Tunable

log = logging.getLogger("allreduce_jit")

FORMAT = 1


def fingerprint(caps: Capabilities, world_size: int, rung: Rung = Rung.V2) -> dict[str, Any] | None:
    """What a table holds for, as rank 0 sees it: another path, machine, driver or version has another table; None: no GPU.

    V2's does not name its path: it was the only one with tables once.
    """
    if caps.gpu is None:
        return None
    major, minor = caps.gpu.compute_capability
    path = {} if rung is Rung.V2 else {"path": rung.value}
    return path | {
        "gpu": caps.gpu.name,
        "arch": f"sm_{major}{minor}",
        "world_size": world_size,
        "gpus": 1 + len(caps.links),
        "full_nvlink": all(link.nvlink is True for link in caps.links),
        "driver": caps.software.driver,
        "package": __version__,
    }


def tunable_of(facts: Mapping[str, Any]) -> Tunable:
    """Whose table it is."""
    rung = facts.get("path", Rung.V2.value)
    return next(row.tunable for row in backends.BACKENDS if row.tunable and row.path.value == rung)


def path(cache_dir: Path | None, facts: Mapping[str, Any]) -> Path:
    """The file that holds the table for a fingerprint. Raises ``OSError`` where there is no directory for it."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return _folder(cache_dir) / f"{digest[:32]}.json"


def save(cache_dir: Path | None, facts: Mapping[str, Any], tables: Mapping[str, AnyBands], **more: Any) -> Path:
    """Write the tables, whole or not at all; ``more`` is for human readers. Raises ``OSError``."""
    file = path(cache_dir, facts)
    assert cache_dir is not None  # or path would have raised
    document = {"format": FORMAT, "fingerprint": facts, "tables": tables_to_json(tables), **more}
    files.write(file, Path(cache_dir), (json.dumps(document, indent=1) + "\n").encode())
    return file


def load(cache_dir: Path | None, facts: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """``{"path", "tables"}`` as JSON values, or None without a table; one that is no good is logged and ignored."""
    if facts is None or cache_dir is None:
        return None
    file = path(cache_dir, facts)
    try:
        document = _document(file, cache_dir)
        if document.get("fingerprint") != facts:
            raise ValueError(f"it is for {document.get('fingerprint')}, this is {dict(facts)}")
        tables_from_json(tunable_of(facts), facts["world_size"], document.get("tables"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as e:
        log.warning("the tuned table %s is ignored: %s", file, e)
        return None
    return {"path": str(file), "tables": document["tables"]}


def load_all(cache_dir: Path | None, caps: Capabilities, world_size: int) -> dict[str, dict[str, Any]]:
    """What ``load`` finds for this machine, by path."""
    rungs = [row.path for row in backends.BACKENDS if row.tunable]
    found = {rung.value: load(cache_dir, fingerprint(caps, world_size, rung)) for rung in rungs}
    return {rung: one for rung, one in found.items() if one is not None}


def _document(file: Path, cache_dir: Path) -> dict[str, Any]:
    """A file as far as it can be judged without a machine. Raises ``OSError``, ``ValueError`` or ``RecursionError``."""
    document = json.loads(files.read(file, Path(cache_dir)).decode())
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ValueError(f"expected an object with format {FORMAT}")
    return document


def tables_to_json(tables: Mapping[str, AnyBands]) -> dict[str, Any]:
    return {dtype: bands_to_json(bands) for dtype, bands in tables.items()}


def tables_from_json(tunable: Tunable, world_size: int, value: object) -> dict[str, AnyBands]:
    """Bands per dtype. Raises ``ValueError`` unless all dtypes are there and all bands keep the rules."""
    if not isinstance(value, dict) or value.keys() != DTYPES.keys():
        raise ValueError(f"expected tables for {', '.join(DTYPES)}")
    return {dtype: tunable.bands_from_json(world_size, bands) for dtype, bands in value.items()}


def entries(cache_dir: Path | None) -> list[Path]:
    """All files with tables, good or not, oldest machine or newest; sorted."""
    try:
        return sorted(file for file in _folder(cache_dir).iterdir() if file.suffix == ".json")
    except OSError:
        return []


def refused(cache_dir: Path | None) -> list[tuple[str, str]]:
    """(file, why) of the tables that would be ignored on any machine, or of their directory if it cannot be listed."""
    found = []
    try:
        os.listdir(_folder(cache_dir))
    except FileNotFoundError:
        return []
    except OSError as e:
        return [(str(_folder(cache_dir)), str(e))]
    assert cache_dir is not None
    for file in entries(cache_dir):
        try:
            _document(file, cache_dir)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as e:
            found.append((str(file), str(e)))
    return found


def clear(cache_dir: Path | None) -> int:
    """Remove all tables, and what unfinished writes left; returns how many tables there were."""
    found = entries(cache_dir)
    for file in (*found, *(_folder(cache_dir).glob(f"{files.TEMPORARY}*") if cache_dir is not None else ())):
        try:
            file.unlink(missing_ok=True)
        except OSError as e:
            log.warning("the tuned table %s cannot be removed: %s", file, e)
    return len(found) - len(entries(cache_dir))


def _folder(cache_dir: Path | None) -> Path:
    if cache_dir is None:
        raise FileNotFoundError(files.NO_DIRECTORY)
    return Path(cache_dir) / "tuning"
