"""Read and write the small JSON files of a run, and check names and paths that may come from somebody else."""

import json
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from dengine.atomic_files import write_file
from dengine.errors import TrackingError
from dengine.naming import a_type
from dengine.tracking.values import to_json

__all__ = ["TrackingError", "inner_path", "path_part", "read_json", "refuse_outside", "refuse_special", "write_json"]


def write_json(path: Path, value: object) -> None:
    """Replace the file in one step: readers see the old one or the new one. Raises: OSError: the old one stays."""
    text = json.dumps(to_json(value), indent=2, allow_nan=False) + "\n"

    def write(temporary: Path) -> None:
        with open(temporary, "x", encoding="utf-8") as file:  # not through a link, which would lead somewhere else
            file.write(text)

    write_file(path, write)


def read_json(path: Path) -> dict[str, Any]:
    """The object in the file; {} if there is no file.

    Raises: TrackingError: the file has other content, or is not a regular file (to read a pipe would wait).
    """
    try:
        refuse_special(path)
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, OSError, RecursionError) as error:
        raise TrackingError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise TrackingError(f"{path} must hold a JSON object, but holds {a_type(value)}.")
    return value


def path_part(what: str, name: object) -> str:
    """`name`, checked to be a valid name of a folder.

    Raises: TypeError: it is not a string. ValueError: it is empty, begins with a dot, or has a slash or a control
        character in it.
    """
    if not isinstance(name, str):
        raise TypeError(f"{what}={name!r} must be a string.")
    if not name.strip() or name.startswith(".") or "/" in name or not _is_printable(name):
        raise ValueError(f"{what}={name!r} becomes a folder: it needs a letter, no slash, and no dot at its front.")
    return name


def inner_path(name: object) -> str | None:
    """`name` as a path with forward slashes, if it stays inside the folder to which it is joined; else None.

    It stays inside on Windows, too. `a//b` and `./a/b` are `a/b`, so that one file has one name.
    """
    if not isinstance(name, str) or not _is_printable(name):
        return None
    path = PurePosixPath(name)
    if path.is_absolute() or PureWindowsPath(name).is_absolute() or ".." in path.parts or not path.parts:
        return None
    return path.as_posix()


def refuse_outside(path: Path, folder: Path) -> None:
    """Refuse a path out of `folder`, which may be a link itself. Raises: TrackingError: a link in it leads out."""
    real, inside = os.path.realpath(path), os.path.realpath(folder)
    if os.path.commonpath([real, inside]) != inside:
        raise TrackingError(
            f"{path} leads out of {folder}, to {real}: links out of a project are not followed. Put a copy there "
            "instead of the link."
        )


def refuse_special(path: Path) -> None:
    """Refuse all but regular files. Raises: TrackingError: a folder, a pipe or a device. OSError: it does not exist."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise TrackingError(f"{path} is no regular file, and is not read.")


def _is_printable(name: str) -> bool:
    """Whether it has no backslash, which is a slash on Windows, and no control character."""
    return not any(letter == "\\" or ord(letter) < 32 or ord(letter) == 127 for letter in name)
