"""The artifacts of a project: their versions, their aliases, and the index that lists them."""

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

from dengine.tracking.artifacts import Artifact, checked_name, copied, is_name
from dengine.tracking.files import TrackingError, inner_path, read_json, refuse_outside, write_json

__all__ = ["ArtifactStore"]

_VERSION = re.compile(r"v\d+")


class ArtifactStore:
    """Stores the artifacts of a project. The files of a version are in the folder of the run that stored it first.

    An index for each name, `<project>/artifacts/<name>.json`, has its versions and its aliases. Contents that are
    stored already are not stored again: their version gets the new aliases.
    """

    def __init__(self, project_dir: Path) -> None:
        self._project_dir = project_dir
        self._index_dir = project_dir / "artifacts"

    def put(self, artifact: Artifact, aliases: Sequence[str], run_dir: Path) -> None:
        """Store `artifact`, which becomes the stored version, and move `aliases` and "latest" to it.

        Raises: TypeError, ValueError: an alias is wrong, or the artifact has no file. FileNotFoundError: a file does
            not exist. TrackingError: the index is damaged, or leads out of the project. Nothing is changed then.
        """
        checked_name(artifact.name)
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
                home.rmdir()  # it is empty if these contents were stored before

    def get(self, reference: str) -> Artifact:
        """The artifact "name:alias", "name:v0" or "name" (the latest).

        Raises: KeyError: there is no such artifact; the message lists the known ones. TrackingError: the index is
            damaged, or leads out of the project.
        Cost: reads one small file.
        """
        name, _, alias = str(reference).partition(":")
        index = _read_index(self._index_dir / f"{name}.json") if is_name(name) else None
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
        """The version with these contents, which is new if there is none."""
        digest = _digest_of(files)
        for version, entry in index["versions"].items():
            folder = self._project_dir / entry["path"]
            # A run's folder may have been deleted, and its artifacts with it.
            if entry["digest"] == digest and all((folder / name).is_file() for name in files):
                return str(version)
        version = f"v{len(index['versions'])}"
        shutil.rmtree(home / version, ignore_errors=True)  # left by a writer that was killed before it wrote the index
        os.chmod(staged, 0o777 & ~_umask())  # only its owner may read a temporary folder
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
        """A context with the index of `name`, which is written if the body succeeds. Runs that log at the same time
        wait.
        """
        refuse_outside(self._index_dir, self._project_dir)
        self._index_dir.mkdir(exist_ok=True)
        path = self._index_dir / f"{name}.json"
        # Not through a link, which would lock another file.
        with open(os.open(self._index_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)) as lock:
            with suppress(OSError):  # a network file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            index = _read_index(path) or {"versions": {}, "aliases": {}}
            yield index
            write_json(path, index)


def _read_index(path: Path) -> dict[str, Any] | None:
    """The index in the file; None if there is no file.

    It may come with a folder from somebody else, so the paths in it must be inside the project.

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
    """The problem of the entry of a version; None if there is none."""
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


def _refuse_file_as_folder(artifact: Artifact) -> None:
    names = set(artifact.files)
    for name in names:
        if taken := names & {str(parent) for parent in PurePosixPath(name).parents}:
            raise ValueError(f"{artifact.name!r} has a file {taken.pop()!r}, so none can be {name!r}: pass name=.")


def _stored(source: Path, target: Path) -> dict[str, Any]:
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = copied(source, target)
    return {"sha256": digest, "bytes": target.stat().st_size}


def _digest_of(files: dict[str, Any]) -> str:
    lines = sorted(f"{file['sha256']}  {name}\n" for name, file in files.items())
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def _check_aliases(aliases: Sequence[str]) -> None:
    if isinstance(aliases, str):
        raise TypeError(f"aliases={aliases!r} must be a list of names: [{aliases!r}].")
    for alias in aliases:
        if not is_name(alias) or _VERSION.fullmatch(alias):
            raise ValueError(f"The alias {alias!r} must be a word of letters, digits, '_', '-', '.', and no version.")


def _listed(names: Sequence[str], wanted: str) -> str:
    close = get_close_matches(wanted, names, n=1)
    return (", ".join(map(repr, names)) or "none") + (f" (closest: {close[0]!r})" if close else "")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
