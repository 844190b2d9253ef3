"""The locations of the keys of a configuration, and their texts in messages."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from dengine.checks import is_whole_number
from dengine.errors import ConfigError

__all__ = ["MAX_DEPTH", "Document", "Repeats", "SourceLocation", "below", "plain"]

MAX_DEPTH = 64
_MAX_BITS = 13_000  # about 3 900 digits: Python does not write an int with more than 4 300
_ALLOWED_REPEATS = 10_000


@dataclass(frozen=True)
class SourceLocation:
    """A file (or another source) and, if known, the line in it, from 1."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}, line {self.line}"


@dataclass
class Document:
    """Plain data that was read. `locations` has the location of each full key, such as `train.layers[0].size`."""

    data: dict[Any, Any]
    sources: tuple[str, ...]
    locations: dict[str, SourceLocation] = field(default_factory=dict)

    def location(self, key: str) -> SourceLocation:
        """The location of `key`: its own line, else that of the nearest mapping around it."""
        while key:
            if key in self.locations:
                return self.locations[key]
            key = key[: max(key.rfind("."), key.rfind("["), 0)]
        return SourceLocation(", ".join(self.sources))

    def forget(self, key: str) -> None:
        """Drop the location of `key`, since the program has changed its value."""
        for known in list(self.locations):
            if known == key or known.startswith((f"{key}.", f"{key}[")):
                del self.locations[known]


def below(key: str, part: object) -> str:
    """The full key of `part` inside `key`: `train` and `lr` are `train.lr`, `layers` and 0 are `layers[0]`."""
    if isinstance(part, int):
        return f"{key}[{part}]"
    return f"{key}.{part}" if key else str(part)


class Repeats:
    """Counts the values that occur several times through references: an alias, a shared object.

    A few lines of aliases to aliases could make billions of values; ten times the written number is allowed.
    """

    def __init__(self, source: SourceLocation) -> None:
        self._source = source
        self._seen: dict[int, object] = {}  # objects by id, kept so that the id stays theirs
        self._num_once = 0
        self._num_again = 0

    def count(self, value: object, num_inside: int) -> None:
        """Count a list or a mapping of `num_inside` values that is about to be copied.

        Raises: ConfigError: there are too many copies.
        """
        if id(value) not in self._seen:
            self._seen[id(value)] = value
            self._num_once += 1 + num_inside
            return
        self._num_again += 1 + num_inside
        if self._num_again > _ALLOWED_REPEATS + 10 * self._num_once:
            raise ConfigError(
                f"{self._source}: {self._num_once} values are written, but references to them (aliases) make more than "
                f"{self._num_again} copies: write out what is needed."
            )


def plain(value: Any, key: str, document: Document) -> Any:
    """A copy of `value` of types that a configuration can hold: tuples become lists.

    Raises:
        ConfigError: a value or a key has another type (the message has its full key); lists and mappings are nested
            more than 64 deep, or occur too often; a whole number has thousands of digits.
    """
    return _plain(value, key, document, Repeats(document.location("")), 0)


def _plain(value: Any, key: str, document: Document, repeats: Repeats, depth: int) -> Any:
    if isinstance(value, Mapping | list | tuple):
        repeats.count(value, len(value))
        if depth > MAX_DEPTH:
            location, short = document.location(key), key if len(key) <= 60 else f"{key[:57]}..."
            raise ConfigError(
                f"{location}: {short!r} is nested too deep (more than {MAX_DEPTH} levels), or contains itself."
            )
    if isinstance(value, Mapping):
        for part in value:
            if not (isinstance(part, str) or is_whole_number(part)):
                where = f" in {key!r}" if key else ""
                raise ConfigError(
                    f"{document.location(key)}: the key {part!r}{where} must be text or a whole number: quote it."
                )
        return {part: _plain(inner, below(key, part), document, repeats, depth + 1) for part, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, below(key, index), document, repeats, depth + 1) for index, each in enumerate(value)]
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ConfigError(
            f"{document.location(key)}: {key!r} is a whole number of thousands of digits: quote it as text."
        )
    if value is None or isinstance(value, bool | int | float | str | bytes | Path | Enum):
        return value
    raise ConfigError(
        f"{document.location(key)}: {key!r} is a {type(value).__module__}.{type(value).__qualname__}; a configuration "
        "holds numbers, text, booleans, null, lists and mappings of them."
    )
