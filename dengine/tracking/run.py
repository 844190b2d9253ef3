"""The interface of a run, and the run that records nothing."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from dengine.tracking.artifact_store import ArtifactStore
from dengine.tracking.artifacts import Artifact
from dengine.tracking.values import Plain

__all__ = ["NullRun", "Run"]


class Run(ABC):
    """A run of `Track.run`, and a context manager: leaving it finishes the run, by an exception as a failed one.

    Attributes:
        id: its name in the project, with which it can be resumed. "unrecorded" if nothing is recorded.
        name, project: as given; the name is the id by default.
        dir: the folder of its files, absolute. If nothing is recorded, there is no such folder.
        config: as given, as dicts, lists and scalars; changes of it are written when the run finishes.
        summary: the last value of each name; the script may add others. Written when the run finishes.
    """

    id: str
    name: str
    project: str
    dir: Path
    config: dict[str, Any]
    summary: dict[str, Any]

    @abstractmethod
    def log(self, values: Mapping[str, object], step: int | None = None) -> None:
        """Record numbers, bools and strings; nested names are joined by "/". The row is in `metrics.jsonl` on return.

        A value that a row cannot hold (a list, a tensor of several elements) is left out, with one warning for its
        name, and the rest of the row is kept: no value ends the training. None is null.

        Args:
            values: by name. Tensors and arrays of one element are read, which waits for their device.
            step: any whole number, also a smaller one than before; by default one more than the last, from 0.

        Raises:
            TypeError, ValueError: `values` is not a dict or contains itself, a value is named "step" or "time" (each
                row has these already), two have one name, or `step` is not a whole number. Nothing is recorded then.
            RuntimeError: the run is finished.
        """

    @abstractmethod
    def log_artifact(self, artifact: Artifact, aliases: Sequence[str] = ()) -> Artifact:
        """Store the artifact's files as its next version, `v0`, `v1`, ..., under "latest" and `aliases`.

        Versions are numbered in the project. Contents that are stored already get the aliases, but no new version.
        Cost: one copy and one SHA-256 of the files, for which the caller waits.

        Returns: `artifact`, whose `version` is set now; if nothing is recorded, as it was.
        Raises: FileNotFoundError, ValueError, TypeError, TrackingError: nothing is changed then.
        """

    @abstractmethod
    def use_artifact(self, reference: str) -> Artifact:
        """An artifact of the project: "name:alias", "name:v0", or "name" for the latest.

        It works on every rank that sees the folder, also on those that record nothing.

        Raises: KeyError: there is no such artifact; the message lists the known ones. TrackingError: its record is
            damaged, or leads out of the project.
        """

    @abstractmethod
    def finish(self) -> None:
        """End the record as a finished run; a second call does nothing.

        Raises: TrackingError: rows could not be written. ValueError: a value in `summary` or `config` contains
            itself; the rest is recorded, and so is the end of the run.
        """

    @abstractmethod
    def __enter__(self) -> "Run": ...

    @abstractmethod
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class NullRun(Run):
    """Records nothing: the run on ranks other than 0, and if tracking is disabled."""

    def __init__(self, name: str | None, project: str, root: Path, config: dict[str, Plain]) -> None:
        self.id = "unrecorded"
        self.name, self.project = name or self.id, project
        self.dir = root / project / self.id
        self.config = config
        self.summary = {}
        self._store = ArtifactStore(root / project)

    def log(self, values: Mapping[str, object], step: int | None = None) -> None:
        pass

    def log_artifact(self, artifact: Artifact, aliases: Sequence[str] = ()) -> Artifact:
        return artifact

    def use_artifact(self, reference: str) -> Artifact:
        return self._store.get(reference)

    def finish(self) -> None:
        pass

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass
