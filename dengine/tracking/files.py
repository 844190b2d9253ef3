"""The small files of a run: replaced in one step, so that a reader finds the old one or the new one."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from dengine.errors import DengineError
from dengine.tracking.values import to_json

__all__ = ["TrackingError", "path_part", "read_json", "write_json"]


class TrackingError(DengineError, RuntimeError):
    """A run cannot be recorded, or what was recorded is damaged."""


def write_json(path: Path, value: Any) -> None:
    """Raises: OSError; the file is as it was then."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(to_json(value), indent=2, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file, {} where there is no file.

    Raises: TrackingError, where it holds none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError) as error:
        raise TrackingError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TrackingError(f"{path} must hold a JSON object, but holds a {type(value).__name__}.")
    return value


def path_part(what: str, name: object) -> str:
    """`name`, checked to be fit for the name of a folder.

    Raises: TypeError: it is no string. ValueError: it is empty, begins with a dot, or has a slash in it.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what}={name!r} must be a string.")
    if not name.strip() or name.startswith(".") or any(letter in name for letter in "/\\\0\n"):
        raise ValueError(f"{what}={name!r} becomes a folder: it needs a letter, no slash, and no dot at its front.")
    return name
