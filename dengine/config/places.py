"""Where the keys of a configuration come from, and how a key and its place are written in a message."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from dengine.errors import ConfigError

__all__ = ["Document", "Place", "below", "plain"]


@dataclass(frozen=True)
class Place:
    """A file (or whatever else was read) and, where it is known, the line in it, from 1."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}, line {self.line}"


@dataclass
class Document:
    """Plain data as it was read, and where. `places` holds full keys such as `train.layers[0].size`."""

    data: dict[Any, Any]
    sources: tuple[str, ...]
    places: dict[str, Place] = field(default_factory=dict)

    def place(self, key: str) -> Place:
        """Where `key` is written: its own line, else that of the nearest mapping around it."""
        while key:
            if key in self.places:
                return self.places[key]
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return Place(", ".join(self.sources))

    def forget(self, key: str) -> None:
        """`key` was given a value by the program: it no longer is what the file says."""
        for known in list(self.places):
            if known == key or known.startswith((f"{key}.", f"{key}[")):
                del self.places[known]


def below(key: str, part: object) -> str:
    """The full key of `part` inside `key`: `train` and `lr` are `train.lr`, `layers` and 0 are `layers[0]`."""
    if isinstance(part, int):
        return f"{key}[{part}]"
    return f"{key}.{part}" if key else str(part)


def plain(value: Any, key: str, document: Document) -> Any:
    """A copy of `value` made of what a configuration can hold: tuples become lists.

    Raises:
        ConfigError: a value or a key of another type, named by its full key.
    """
    if isinstance(value, Mapping):
        for part in value:
            if not isinstance(part, str | int) or isinstance(part, bool):
                where = f" in {key!r}" if key else ""
                raise ConfigError(
                    f"{document.place(key)}: the key {part!r}{where} must be text or a whole number: quote it."
                )
        return {part: plain(inner, below(key, part), document) for part, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, below(key, index), document) for index, inner in enumerate(value)]
    if value is None or isinstance(value, bool | int | float | str | bytes | Path | Enum):
        return value
    raise ConfigError(
        f"{document.place(key)}: {key!r} is a {type(value).__module__}.{type(value).__qualname__}; a configuration "
        "holds numbers, text, booleans, null, lists and mappings of them."
    )
