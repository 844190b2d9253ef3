"""Read configuration files as plain data, with a reader for each format."""

import json
import re
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dengine.config.scalars import finite, whole
from dengine.config.sdn import read_sdn
from dengine.config.source_locations import Document, SourceLocation, below, plain
from dengine.config.yaml_text import read_yaml
from dengine.errors import ConfigError

__all__ = ["SUFFIXES", "read_file", "refuse_all_but_mapping"]

_MAX_BYTES = 64 << 20
_MAX_DOTS = 1000
_DOTTED = re.compile(rf"""(?:(?:[\w-]+|"[^"\n]*"|'[^'\n]*')[ \t]*\.[ \t]*){{{_MAX_DOTS}}}""")
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\],:]|\n')


def read_file(path: Path, suffix: str) -> Document:
    """The mapping in the file, read by the reader for `suffix`.

    Raises:
        ConfigError: the content is not one mapping in that format (the message has the line and the key), or the file
            is too large, or not a regular file.
        OSError: the file cannot be read.
    """
    source = str(path)
    try:
        text = _bytes_of(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source}: this is no UTF-8 text: {error.reason} at byte {error.start}.") from error
    try:
        data, document = SUFFIXES[suffix](text, source)
        document.data = plain(refuse_all_but_mapping(data, source), "", document)
    except RecursionError as error:
        raise ConfigError(f"{source}: it is nested too deep, or contains itself.") from error
    return document


def _bytes_of(path: Path) -> bytes:
    if "\0" in str(path):
        raise ConfigError(f"{str(path)!r} is no path of a file.")
    found = path.stat()
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(f"{path} is a folder, and no configuration file.")
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: this is a pipe or a device, and no file: it could be read without an end.")
    if found.st_size > _MAX_BYTES:
        raise ConfigError(
            f"{path}: this has {found.st_size >> 20} MiB, and a configuration file has at most {_MAX_BYTES >> 20}: "
            "keep data in a file of its own."
        )
    return path.read_bytes()


def refuse_all_but_mapping(data: object, source: str) -> Mapping[object, object]:
    """`data`, which must be a mapping; an empty file is an empty mapping. Raises: ConfigError."""
    if data is None:
        return {}
    if not isinstance(data, Mapping):
        raise ConfigError(f"{source}: a configuration is a mapping of keys to values, but this is a {_kind(data)}.")
    return data


def _kind(data: object) -> str:
    return "list" if isinstance(data, list | tuple) else f"single value ({data!r})"


def _sdn(text: str, source: str) -> tuple[Any, Document]:
    document = read_sdn(text, source)
    return document.data, document


def _toml(text: str, source: str) -> tuple[Any, Document]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        try:
            import tomli as tomllib
        except ImportError as error:
            raise ImportError('TOML needs tomli on Python 3.10: pip install "dengine[config]".') from error
    for number, line in enumerate(text.split("\n"), start=1):
        # The reader's time grows with the square of the number of parts of a key.
        if line.count(".") >= _MAX_DOTS and _DOTTED.search(line):
            raise ConfigError(
                f"{SourceLocation(source, number)}: a key of more than {_MAX_DOTS} parts is nested too deep."
            )
    try:
        return _without_dates(tomllib.loads(text, parse_float=finite)), Document({}, (source,))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{source}: this is no TOML: {error}.") from error
    except ValueError as error:
        what = str(error).partition(";")[0]  # the rest says how to raise the limit in Python
        raise ConfigError(f"{source}: a number is too long or too large: {what}.") from error


def _without_dates(value: Any) -> Any:
    """Dates and times as their text, as in the other formats."""
    if isinstance(value, dict):
        return {key: _without_dates(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_without_dates(inner) for inner in value]
    return value.isoformat() if hasattr(value, "isoformat") else value


def _json(text: str, source: str) -> tuple[Any, Document]:
    if not text.strip():
        return None, Document({}, (source,))
    try:
        data = json.loads(text, parse_int=whole, parse_float=finite)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{source}, line {error.lineno}, column {error.colno}: this is no JSON: {error.msg}."
        ) from error
    except ValueError as error:  # a number that is too long or too large
        raise ConfigError(f"{source}: {error}.") from error
    return data, Document({}, (source,), _json_locations(text, source))


def _json_locations(text: str, source: str) -> dict[str, SourceLocation]:
    """The line of each key in `text`, which is valid JSON.

    Raises:
        ConfigError: a key occurs twice. JSON allows that, and its reader would keep the last one.
    """
    locations: dict[str, SourceLocation] = {}
    line, last = 1, ""
    open_keys: list[str] = [""]  # the full key of each value that is open
    counts: list[int | None] = []  # for each of them the number of items before; None for a mapping
    lines: list[dict[str, int]] = []  # the keys so far; not the full ones: "a.b" and b in a have the same
    for token in _TOKEN.findall(text):
        if token == "\n":
            line += 1
        elif token in ("{", "["):
            counts.append(0 if token == "[" else None)
            lines.append({})
            open_keys.append(below(open_keys[-1], 0) if token == "[" else "")
        elif token in ("}", "]"):
            counts.pop()
            lines.pop()
            open_keys.pop()
        elif token == "," and counts[-1] is not None:
            counts[-1] += 1
            open_keys[-1] = below(open_keys[-2], counts[-1])
        elif token == ":":
            key = json.loads(last)
            open_keys[-1] = full = below(open_keys[-2], key)
            if key in lines[-1]:
                raise ConfigError(f"{source}, line {line}: {full!r} is there twice: first in line {lines[-1][key]}.")
            lines[-1][key] = line
            locations[full] = SourceLocation(source, line)
        last = token if token != "\n" else last
    return locations


SUFFIXES: dict[str, Callable[[str, str], tuple[Any, Document]]] = {
    ".yaml": read_yaml,
    ".yml": read_yaml,
    ".toml": _toml,
    ".json": _json,
    ".sdn": _sdn,
}
