"""Other trackers to which a run reports, besides its own files: one module each, imported when the run is opened."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from dengine.tracking.values import Scalar

__all__ = ["BACKENDS", "Backend", "RunInfo", "StoredFiles", "open_backend", "package"]

BACKENDS = ("trackio", "tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class RunInfo:
    """The information about the run that a backend gets. `config` is made of nested dicts and lists of scalars."""

    id: str
    name: str
    project: str
    dir: Path
    config: Mapping[str, Any]
    tags: Sequence[str]
    is_resumed: bool
    is_offline: bool


@dataclass(frozen=True)
class StoredFiles:
    """A stored version of an artifact. Its files are in the run's folder, and no longer change."""

    name: str
    type: str
    version: str
    digest: str
    folder: Path
    files: Sequence[str]
    aliases: Sequence[str]


class Backend(ABC):
    """Base class of other trackers. Made from a `RunInfo`, and called on the rank that records, by one thread at a
    time.
    """

    @abstractmethod
    def log(self, values: Mapping[str, Scalar], step: int, time_s: float) -> None: ...

    @abstractmethod
    def log_artifact(self, stored: StoredFiles) -> None: ...

    @abstractmethod
    def finish(self, is_failed: bool, summary: Mapping[str, Scalar]) -> None: ...


def open_backend(name: str, info: RunInfo) -> Backend:
    """Open the backend with that name.

    Raises: ValueError: there is no such backend. ModuleNotFoundError: its package is missing; the message names the
        extra.
    """
    if name == "trackio":
        from dengine.tracking.trackio import TrackioBackend

        return TrackioBackend(info)
    if name == "tensorboard":
        from dengine.tracking.tensorboard import TensorBoardBackend

        return TensorBoardBackend(info)
    if name == "wandb":
        from dengine.tracking.wandb import WandbBackend

        return WandbBackend(info)
    if name == "mlflow":
        from dengine.tracking.mlflow import MlflowBackend

        return MlflowBackend(info)
    close = get_close_matches(str(name), BACKENDS, n=1)
    raise ValueError(
        f"There is no backend {name!r}; there is {', '.join(map(repr, BACKENDS))}"
        f"{f' (closest: {close[0]!r})' if close else ''}. Without one, the run's own files are written."
    )


def package(module: str, extra: str) -> ModuleType:
    """The module of an optional package. Raises: ModuleNotFoundError: the message names the extra to install."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'backend="{extra}" needs a package that is not installed ({error.name}): pip install "dengine[{extra}]"',
            name=error.name,
        ) from error
