"""`Artifact`: files with a name, which are stored in versions."""

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from dengine.checks import path_of
from dengine.tracking.files import (
    TrackingError,
    inner_path,
    refuse_outside,
    refuse_special,
)

__all__ = ["Artifact", "checked_name", "copied", "is_name"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")  # the name of a file has at most 255 characters
_CHUNK_BYTES = 1 << 20


class Artifact:
    """Files with a name, such as a model or a data set. Add files, then pass it to `run.log_artifact`.

    Args:
        name: letters, digits, "_", "-" and ".".
        type: any word for its kind: "model", "dataset".

    Attributes:
        version: "v0", "v1", ... once it is stored, None before.
        digest: SHA-256 over the names and digests of its files, once it is stored.
        files: the names of its files; digests: SHA-256 by name, once it is stored.

    Raises:
        ValueError: the name has other characters.

    Example:
        >>> import tempfile
        >>> from pathlib import Path, PurePosixPath
        >>> from dengine.tracking import Track
        >>> folder = Path(tempfile.mkdtemp())
        >>> size = (folder / "weights.txt").write_text("0.5")
        >>> with Track.run("example", dir=folder / "runs") as run:
        ...     model = Track.Artifact("model", type="model").add_file(folder / "weights.txt")
        ...     stored = run.log_artifact(model, aliases=["best"])
        ...     (run.use_artifact("model:best").download() / "weights.txt").read_text()
        '0.5'
    """

    def __init__(self, name: str, type: str = "artifact") -> None:
        self.name = checked_name(name)
        self.type = str(type)
        self.version: str | None = None
        self.digest: str | None = None
        self._sources: dict[str, Path] = {}
        self._folder: Path | None = None
        self._project_dir = Path()
        self.digests: dict[str, str] = {}

    @property
    def files(self) -> list[str]:
        return sorted(self._sources or self.digests)

    def add_file(self, path: str | Path, name: str | None = None) -> "Artifact":
        """Add the file under `name` (by default its own name). It is read when the artifact is logged.

        Returns: the artifact itself.
        Raises: ValueError: the name is taken, or leads out of the artifact. RuntimeError: the artifact is stored
            already.
        """
        if self.version is not None:
            raise RuntimeError(f"{self.name}:{self.version} is stored, and does not change: make a new Artifact.")
        path = path_of("path", path)
        given = path.name if name is None else str(name)
        inner = inner_path(given)
        if inner is None:
            raise ValueError(
                f"name={given!r} must be a path inside the artifact: relative, without '..', backslashes and control "
                "characters."
            )
        if inner in self._sources:
            raise ValueError(f"{self.name!r} has a file {inner!r} already: pass name= to add this one under another.")
        self._sources[inner] = Path(os.path.abspath(path))  # also if the current folder changes later
        return self

    def add_dir(self, path: str | Path, name: str = "", *, follow_links: bool = False) -> "Artifact":
        """Add each file below the folder `path`, under `name/` and its path in there.

        Args:
            follow_links: take the contents of links that lead out of `path`, and of links to folders. Without it they
                are refused, since a link in a folder from somebody else could point to any file of this machine.

        Returns: the artifact itself; on an error it is as it was.
        Raises: as `add_file`; NotADirectoryError; ValueError: there is a link (see `follow_links`), or a folder
            contains itself by a link.
        """
        path = path_of("path", path)
        if not path.is_dir():
            raise NotADirectoryError(f"{path} is no folder that could be added to the artifact {self.name!r}.")
        before = dict(self._sources)
        try:
            for file in sorted(_files_below(path, follow_links)):
                self.add_file(file, str(Path(name) / file.relative_to(path)))
        except BaseException:
            self._sources = before
            raise
        return self

    def download(self, dir: str | Path | None = None) -> Path:
        """The folder with the files, each compared with its digest; with `dir`, a copy of the folder there.

        Cost: one read of the files. Without `dir` it is the stored folder itself: do not write to it.

        Raises:
            RuntimeError: the artifact is not stored yet. TrackingError: a file is missing, has changed, or is reached
                by a link that leads out of the project or out of `dir`; the message names it.
        """
        if self._folder is None:
            raise RuntimeError(f"The artifact {self.name!r} is not stored yet: run.log_artifact(artifact) comes first.")
        for name, digest in self.digests.items():
            refuse_outside(self._folder / name, self._project_dir)
            self._check(self._folder / name, digest)
        if dir is None:
            return self._folder
        folder = path_of("dir", dir)
        for name, digest in self.digests.items():
            target = folder / name
            refuse_outside(target, folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(self._folder / name, target)
            self._check(target, digest)
        return folder

    def _check(self, file: Path, digest: str) -> None:
        try:
            refuse_special(file)
            found = copied(file, None)
        except OSError as error:
            raise TrackingError(f"{file} of {self.name}:{self.version} cannot be read: {error}") from error
        if found != digest:
            raise TrackingError(
                f"{file} of {self.name}:{self.version} has changed: its SHA-256 is {found}, but {digest} was stored."
            )

    def _become(self, version: str, entry: dict[str, Any], project_dir: Path) -> None:
        """Turn this artifact into the stored version that `entry` of the index describes."""
        self.version, self.digest, self.type = version, entry["digest"], entry["type"]
        self._folder, self._project_dir = project_dir / entry["path"], project_dir
        self.digests = {name: file["sha256"] for name, file in entry["files"].items()}
        self._sources = {}


def is_name(name: object) -> TypeGuard[str]:
    """Whether it is a valid name of artifacts and aliases."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def checked_name(name: object) -> str:
    """`name`, checked. Raises: ValueError: it is no valid name of an artifact."""
    if not is_name(name):
        raise ValueError(
            f"An artifact's name has letters, digits, '_', '-' and '.', at most 200 of them, unlike {name!r}."
        )
    return name


def _files_below(folder: Path, follow_links: bool) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=follow_links):
        for each in (Path(parent, name) for name in (*folders, *files)):
            if each.is_symlink():
                _check_link(each, folder, follow_links)
            if each.is_file() or not each.exists():  # a link to nothing is reported when the artifact is logged
                yield each


def _check_link(link: Path, folder: Path, follow_links: bool) -> None:
    target, parent = os.path.realpath(link), os.path.realpath(link.parent)
    if os.path.join(parent, "").startswith(os.path.join(target, "")):
        raise ValueError(f"{link} is a link to a folder around it, so what it holds has no end.")
    is_outside = not target.startswith(os.path.join(os.path.realpath(folder), ""))
    if not follow_links and (is_outside or os.path.isdir(target)):
        where = f"out of {folder}" if is_outside else "to a folder"
        raise ValueError(f"{link} is a link {where}, to {target}: pass follow_links=True to store what is there.")


def copied(source: Path, target: Path | None) -> str:
    """Copy a file, or only read it if `target` is None, and give its SHA-256."""
    digest = hashlib.sha256()
    with open(source, "rb") as file, open(target or os.devnull, "wb") as copy:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        if target is not None:
            os.fsync(copy.fileno())
    return digest.hexdigest()
