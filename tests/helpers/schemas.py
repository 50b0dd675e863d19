"""The JSON Schemas of docs/schemas, and what a document does not keep of them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from . import ROOT

FOLDER = ROOT / "docs/schemas"
SCHEMAS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in FOLDER.glob("*.json")}


def violations(name: str, document: Any) -> list[str]:
    """Where ``document`` is not what the schema of that command says; [] if it is. Skips without jsonschema."""
    jsonschema = pytest.importorskip("jsonschema", reason="needs jsonschema, 4.18 or later")
    from referencing import Registry, Resource

    registry = Registry().with_resources((schema["$id"], Resource.from_contents(schema)) for schema in SCHEMAS.values())
    validator = jsonschema.Draft202012Validator(SCHEMAS[name], registry=registry)
    # Of a choice that fits nowhere, what the branch that comes closest finds.
    return [f"{error.json_path}: {error.message[:300]}" for error in map(_closest, validator.iter_errors(document))]


def _closest(error: Any) -> Any:
    from jsonschema.exceptions import best_match

    return best_match([error]) or error
