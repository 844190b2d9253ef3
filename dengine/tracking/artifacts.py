"""Artifacts: files that are kept under a name, in versions, and the folders that hold them."""

import fcntl
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any

from dengine.checks import path_of
from dengine.tracking.files import (
    TrackingError,
    inner_path,
    read_json,
    refuse_outside,
    refuse_special,
    write_json,
)

__all__ = ["Artifact", "ArtifactStore"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,199}")  # the name of a file has at most 255 characters
_VERSION = re.compile(r"v\d+")
_CHUNK_BYTES = 1 << 20


class Artifact:
    """Files under a name: a model, a data set. Put files in, then give it to `run.log_artifact`.

    Args:
        name: of letters, digits, "_", "-" and ".".
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
        self.name = _checked_name(name)
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
        self._sources[inner] = Path(os.path.abspath(path))  # whatever its current folder is later
        return self

    def add_dir(self, path: str | Path, name: str = "", *, follow_links: bool = False) -> "Artifact":
        """`add_file` for each file below the folder `path`, under `name/` and its path in there.

        Args:
            follow_links: take the contents of links that lead out of `path`, and of links to folders. They are refused
                otherwise, since by a link a folder of somebody else's could have any file of this machine stored.

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
        """The folder with its files, each compared with its digest first; with `dir`, a copy of it there.

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
            found = _copy(file, None)
        except OSError as error:
            raise TrackingError(f"{file} of {self.name}:{self.version} cannot be read: {error}") from error
        if found != digest:
            raise TrackingError(
                f"{file} of {self.name}:{self.version} has changed: its SHA-256 is {found}, but {digest} was stored."
            )

    def _become(self, version: str, entry: dict[str, Any], project_dir: Path) -> None:
        """Be the stored version that `entry` of the index describes."""
        self.version, self.digest, self.type = version, entry["digest"], entry["type"]
        self._folder, self._project_dir = project_dir / entry["path"], project_dir
        self.digests = {name: file["sha256"] for name, file in entry["files"].items()}
        self._sources = {}


class ArtifactStore:
    """The artifacts of a project. The files of a version lie in the folder of the run that stored it first.

    An index for each name, `<project>/artifacts/<name>.json`, has its versions and its aliases. What was stored before
    is not stored again: its version gets the new aliases.
    """

    def __init__(self, project_dir: Path) -> None:
        self._project_dir = project_dir
        self._index_dir = project_dir / "artifacts"

    def put(self, artifact: Artifact, aliases: Sequence[str], run_dir: Path) -> None:
        """Store it, and move `aliases` and "latest" to it. Afterwards it is the stored version.

        Raises: TypeError, ValueError: an alias is wrong, or the artifact has no file. FileNotFoundError: a file is not
            there. TrackingError: the index is damaged, or leads out of the project. Nothing is changed then.
        """
        _checked_name(artifact.name)
        _check_aliases(aliases)
        if artifact.version is None and not artifact.files:
            raise ValueError(f"The artifact {artifact.name!r} has no file: add_file() puts one in.")
        for path in artifact._sources.values():
            if not path.is_file():
                raise FileNotFoundError(f"{path}, a file of the artifact {artifact.name!r}, is not there.")
        _refuse_file_as_folder(artifact)
        home = run_dir / "artifacts" / artifact.name
        refuse_outside(home, self._project_dir)
        home.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".new-", dir=home))
        try:
            files = {name: _stored(path, staged / name) for name, path in artifact._sources.items()}
            with self._locked(artifact.name) as index:
                version = artifact.version or self._version(index, artifact, files, staged, home)
                if version not in index["versions"]:
                    raise ValueError(f"{artifact.name}:{version} belongs to another project: make a new Artifact here.")
                index["aliases"].update(dict.fromkeys([*aliases, "latest"], version))
            artifact._become(version, index["versions"][version], self._project_dir)
        finally:
            shutil.rmtree(staged, ignore_errors=True)
            with suppress(OSError):
                home.rmdir()  # it is empty if these contents had been stored before

    def get(self, reference: str) -> Artifact:
        """The artifact that "name:alias", "name:v0" or "name" (the latest) means.

        Raises: KeyError: there is no such artifact; it lists those there are. TrackingError: the index is damaged, or
            leads out of the project.
        Cost: reads one small file.
        """
        name, _, alias = str(reference).partition(":")
        index = _read_index(self._index_dir / f"{name}.json") if _NAME.fullmatch(name) else None
        if index is None:
            names = sorted(path.stem for path in self._index_dir.glob("*.json"))
            raise KeyError(f"There is no artifact {name!r}; there is {_listed(names, name)}.")
        version = index["aliases"].get(alias or "latest", alias)
        if version not in index["versions"]:
            have = [*index["versions"], *index["aliases"]]
            raise KeyError(f"The artifact {name!r} has no {alias!r}; it has {_listed(have, alias)}.")
        entry = index["versions"][version]
        artifact = Artifact(name, entry["type"])
        artifact._become(version, entry, self._project_dir)
        return artifact

    def _version(
        self, index: dict[str, Any], artifact: Artifact, files: dict[str, Any], staged: Path, home: Path
    ) -> str:
        """The version with these contents; a new one if there is none."""
        digest = _digest_of(files)
        for version, entry in index["versions"].items():
            folder = self._project_dir / entry["path"]
            # A run's folder may have been deleted, and its artifacts with it.
            if entry["digest"] == digest and all((folder / name).is_file() for name in files):
                return str(version)
        version = f"v{len(index['versions'])}"
        shutil.rmtree(home / version, ignore_errors=True)  # of a writer that was killed before it wrote the index
        os.chmod(staged, 0o777 & ~_umask())  # a temporary folder is its owner's alone
        os.rename(staged, home / version)
        path = str((home / version).relative_to(self._project_dir))
        index["versions"][version] = {
            "digest": digest,
            "type": artifact.type,
            "path": path,
            "time": time.time(),
            "files": files,
        }
        return version

    @contextmanager
    def _locked(self, name: str) -> Iterator[dict[str, Any]]:
        """The index of `name`, which is written if the body succeeds. Runs that log at the same time take turns."""
        refuse_outside(self._index_dir, self._project_dir)
        self._index_dir.mkdir(exist_ok=True)
        path = self._index_dir / f"{name}.json"
        # Not through a link, which would have another file locked.
        with open(os.open(self._index_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)) as lock:
            with suppress(OSError):  # a network file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            index = _read_index(path) or {"versions": {}, "aliases": {}}
            yield index
            write_json(path, index)


def _read_index(path: Path) -> dict[str, Any] | None:
    """The index in the file; None if there is no file.

    It may have come with a folder of somebody else's, so the paths in it must lie inside the project.

    Raises: TrackingError: it is damaged, or has a path that leads out of the project; the message names the file.
    """
    index = read_json(path)
    if not index:
        return None
    versions, aliases = index.get("versions"), index.get("aliases")
    if not isinstance(versions, dict) or not isinstance(aliases, dict):
        raise TrackingError(f"{path} is damaged: it needs an object of versions and one of aliases.")
    for alias, version in aliases.items():
        if not isinstance(version, str):
            raise TrackingError(f"{path} is damaged: the alias {alias!r} must name a version, but is {version!r}.")
    for version, entry in versions.items():
        if problem := _problem_of(version, entry):
            raise TrackingError(f"{path} is damaged: {version!r} {problem}.")
    return index


def _problem_of(version: str, entry: Any) -> str | None:
    """What is wrong with the entry of a version, if anything is."""
    if not _VERSION.fullmatch(version):
        return "is no version, as 'v0' is"
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("digest", "type", "path")):
        return "needs a digest, a type and a path, which are text"
    if inner_path(entry["path"]) is None:
        return f"lies at {entry['path']!r}, which is no path inside the project"
    if not isinstance(entry.get("files"), dict):
        return "needs an object of files"
    for name, file in entry["files"].items():
        if inner_path(name) is None:
            return f"has a file {name!r}, which is no path inside the artifact"
        if not isinstance(file, dict) or not isinstance(file.get("sha256"), str):
            return f"lacks the SHA-256 of its file {name!r}"
    return None


def _checked_name(name: object) -> str:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(
            f"An artifact's name has letters, digits, '_', '-' and '.', at most 200 of them, unlike {name!r}."
        )
    return name


def _refuse_file_as_folder(artifact: Artifact) -> None:
    names = set(artifact.files)
    for name in names:
        if taken := names & {str(parent) for parent in PurePosixPath(name).parents}:
            raise ValueError(f"{artifact.name!r} has a file {taken.pop()!r}, so none can be {name!r}: pass name=.")


def _files_below(folder: Path, follow_links: bool) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder, followlinks=follow_links):
        for each in (Path(parent, name) for name in (*folders, *files)):
            if each.is_symlink():
                _check_link(each, folder, follow_links)
            if each.is_file() or not each.exists():  # a link to nothing is found missing when the artifact is logged
                yield each


def _check_link(link: Path, folder: Path, follow_links: bool) -> None:
    target, parent = os.path.realpath(link), os.path.realpath(link.parent)
    if os.path.join(parent, "").startswith(os.path.join(target, "")):
        raise ValueError(f"{link} is a link to a folder around it, so what it holds has no end.")
    is_outside = not target.startswith(os.path.join(os.path.realpath(folder), ""))
    if not follow_links and (is_outside or os.path.isdir(target)):
        where = f"out of {folder}" if is_outside else "to a folder"
        raise ValueError(f"{link} is a link {where}, to {target}: pass follow_links=True to store what is there.")


def _stored(source: Path, target: Path) -> dict[str, Any]:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = _copy(source, target)
    return {"sha256": digest, "bytes": target.stat().st_size}


def _copy(source: Path, target: Path | None) -> str:
    """Copy a file, or only read it; its SHA-256."""
    digest = hashlib.sha256()
    with open(source, "rb") as file, open(target or os.devnull, "wb") as copy:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            copy.write(chunk)
        copy.flush()
        if target is not None:
            os.fsync(copy.fileno())
    return digest.hexdigest()


def _digest_of(files: dict[str, Any]) -> str:
    lines = sorted(f"{file['sha256']}  {name}\n" for name, file in files.items())
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _check_aliases(aliases: Sequence[str]) -> None:
    if isinstance(aliases, str):
        raise TypeError(f"aliases={aliases!r} must be a list of names: [{aliases!r}].")
    for alias in aliases:
        if not isinstance(alias, str) or not _NAME.fullmatch(alias) or _VERSION.fullmatch(alias):
            raise ValueError(f"The alias {alias!r} must be a word of letters, digits, '_', '-', '.', and no version.")


def _listed(names: Sequence[str], wanted: str) -> str:
    close = get_close_matches(wanted, names, n=1)
    return (", ".join(map(repr, names)) or "none") + (f" (closest: {close[0]!r})" if close else "")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
