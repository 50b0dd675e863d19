"""What this package says of itself, as values: names for the parts, and JSON from ``to_dict``."""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from .deprecation import deprecated

OPTIONAL: Mapping[str, bool] = {"optional": True}
"""Metadata of a field that ``to_dict`` leaves away where it is None."""


@dataclass(frozen=True)
class Record:
    """A frozen value whose parts are its attributes.

    Reading it as the dictionary that it was before (``record["path"]``, ``get``, ``in``, iteration, ``|``) works, for now, with a
    ``DeprecationWarning``.
    """

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings, numbers, bools and None, all the way down: ready for ``json.dumps``."""
        return {
            field.name: plain(value)
            for field in fields(self)
            if (value := getattr(self, field.name)) is not None or "optional" not in field.metadata
        }

    # -- as a dictionary

    def __getitem__(self, name: str) -> Any:
        return self._as_dictionary(f"[{name!r}]", f"write .{name}")[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Deprecated: the attribute."""
        return self._as_dictionary(f".get({name!r})", f"write .{name}").get(name, default)

    def keys(self) -> Any:
        """Deprecated: of ``to_dict()``."""
        return self._as_dictionary(".keys()").keys()

    def values(self) -> Any:
        """Deprecated: of ``to_dict()``."""
        return self._as_dictionary(".values()").values()

    def items(self) -> Any:
        """Deprecated: of ``to_dict()``."""
        return self._as_dictionary(".items()").items()

    def __iter__(self) -> Iterator[str]:
        return iter(self._as_dictionary(" as a dictionary"))

    def __contains__(self, name: object) -> bool:
        return name in self._as_dictionary(" as a dictionary")

    def __or__(self, other: Any) -> dict[str, Any]:
        return self._as_dictionary(" | …") | other

    def __ror__(self, other: Any) -> dict[str, Any]:
        return other | self._as_dictionary(" | …")

    def _as_dictionary(
        self, use: str, instead: str = "read attributes, or the dictionary that to_dict() makes"
    ) -> dict[str, Any]:
        deprecated(f"{type(self).__name__}{use}", instead)
        return self.to_dict()


def plain(value: Any) -> Any:
    """``value`` as JSON has it; dataclasses become dicts, enumerations their values, tuples lists."""
    if isinstance(value, Record):
        return value.to_dict()
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(name): plain(part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(part) for part in value]
    return value
