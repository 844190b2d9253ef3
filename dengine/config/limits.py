"""Limit the size of a configuration after its `${...}` are replaced. Pure: reads no file, replaces nothing."""

import re
from collections.abc import Iterator
from typing import Any

from dengine.config.source_locations import Document, below
from dengine.errors import ConfigError

__all__ = ["refuse_growth"]

_VALUE = 100  # the cost of a value besides its characters: OmegaConf needs microseconds for each
_ALLOWANCE = 1_000_000
_FACTOR = 10
_MAX_NESTED = 64
_PART = re.compile(r"[^.\[\]]+")
_BY_KEY = ("oc.select", "oc.deprecated", "oc.dict.keys", "oc.dict.values")  # resolvers whose first argument is a key
_Path = tuple[Any, ...]


def refuse_growth(document: Document) -> None:
    """Refuse values that refer to each other and would grow without bound: `b: ${a}${a}`, `c: ${b}${b}`, ...

    Allowed are ten times the written size, and a million characters more.

    Raises: ConfigError: it would be larger; the message has the key and the file.
    Cost: one pass over the values; a second one only if there is a `${`.
    """
    written, has_reference = _written(document.data)
    if not has_reference:
        return
    try:
        _Growth(document, _ALLOWANCE + _FACTOR * written).of(())
    except RecursionError as error:
        raise ConfigError(
            f"{document.location('')}: its ${{...}} refer to each other through too many values, one after the other."
        ) from error


def _written(data: Any) -> tuple[int, bool]:
    """The size of the values as written, and whether there is a `${` in them."""
    total, has_reference, open_values = 0, False, [data]
    while open_values:
        value = open_values.pop()
        total += _VALUE
        if isinstance(value, str):
            total += len(value)
            has_reference = has_reference or "${" in value
        elif isinstance(value, dict):
            open_values += value.values()
        elif isinstance(value, list):
            open_values += value
    return total, has_reference


class _Growth:
    """The size of each value after its `${...}` are replaced. OmegaConf refuses a value that refers to itself."""

    def __init__(self, document: Document, limit: int) -> None:
        self._document = document
        self._limit = limit
        self._known: dict[_Path, int] = {}  # 0 for values that are being measured

    def of(self, path: _Path) -> int:
        if path in self._known:
            return self._known[path]
        self._known[path] = 0
        value = self._at(path)
        weight = _VALUE
        if isinstance(value, str):
            weight += len(value) + sum(self._of_reference(inner, path) for inner in _references(value))
        else:
            weight += sum(self.of((*path, key)) for key in _keys(value))
        if weight > self._limit:
            raise ConfigError(self._message(path))
        self._known[path] = weight
        return weight

    def _message(self, path: _Path) -> str:
        full = ""
        for key in path:
            full = below(full, key)
        what = repr(full) if full else "the configuration"
        return (
            f"{self._document.location(full)}: {what} would hold more than {self._limit} characters after its ${{...}} "
            "are replaced: it refers again and again to values that refer to others."
        )

    def _of_reference(self, inner: str, path: _Path, depth: int = 0) -> int:
        """The size of the replacement of a `${...}` in the value at `path`, given its inside."""
        if depth > _MAX_NESTED:
            return 0
        nested = sum(self._of_reference(each, path, depth + 1) for each in _references(inner))
        resolver, is_resolver, arguments = inner.partition(":")
        if is_resolver and "${" not in resolver:
            key = arguments.partition(",")[0].strip() if resolver.strip() in _BY_KEY else ""
            return _VALUE + nested + (self._of_key(key, path) if key and "${" not in key else 0)
        return _VALUE + nested + self._of_key(inner, path)

    def _of_key(self, key: str, path: _Path) -> int:
        start = key.find("${")
        if start >= 0 and (exact := self._replaced(key, path)) is not None:
            key, start = exact, -1
        if start < 0:
            return self.of(self._target(key, path))
        # Which of them is used is known only when it is read: at most the largest.
        around = self._target(key[: max(key.rfind(".", 0, start), key.rfind("[", 0, start), 0)], path)
        return max((self.of((*around, each)) for each in _keys(self._at(around))), default=0)

    def _replaced(self, key: str, path: _Path) -> str | None:
        """`key` with its own `${...}` replaced; None if one of these is not a plain value."""
        for inner in list(_references(key)):
            if "${" in inner or ":" in inner:
                return None
            found = self._at(self._target(inner, path))
            if not isinstance(found, str | int) or "${" in str(found):
                return None
            key = key.replace(f"${{{inner}}}", str(found), 1)
        return key

    def _target(self, key: str, path: _Path, depth: int = 0) -> _Path:
        """The path to which the key of a reference in the value at `path` leads. There may be nothing at it."""
        key = key.strip()
        num_dots = len(key) - len(key.lstrip("."))
        target: _Path = path[:-num_dots] if num_dots else ()
        for part in _PART.findall(key):
            value = self._at(target)
            if isinstance(value, str) and depth <= _MAX_NESTED:
                inner = next(_references(value), "")
                if value.strip() != f"${{{inner}}}" or "${" in inner or ":" in inner:
                    return target  # its replacement is unknown; a part of it is not larger
                target = self._target(inner, target, depth + 1)
                value = self._at(target)
            target = (*target, _key_of(value, part))
        return target

    def _at(self, path: _Path) -> Any:
        value: Any = self._document.data
        for key in path:
            try:
                value = value[key]
            except (KeyError, IndexError, TypeError):
                return None
        return value


def _keys(value: Any) -> list[Any]:
    return list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []


def _key_of(value: Any, part: str) -> Any:
    if (isinstance(value, list) or part not in (value or ())) and part.isdecimal() and len(part) < 10:
        return int(part)
    return part


def _references(text: str) -> Iterator[str]:
    """The insides of the outermost `${...}` of a text. One that is not closed does not count."""
    start = text.find("${")
    while start >= 0:
        end, depth = start + 2, 1
        while end < len(text) and depth:
            depth += (text[end] == "{") - (text[end] == "}")
            end += 1
        if depth:
            return
        yield text[start + 2 : end - 1]
        start = text.find("${", end)
