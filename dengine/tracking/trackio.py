"""Report to Trackio, a dashboard on localhost with SQLite files in the user's cache (`TRACKIO_DIR`): `trackio show`."""

import contextlib
import io
from collections.abc import Mapping
from typing import Any

from dengine.tracking.backend import Backend, RunInfo, StoredFiles, package
from dengine.tracking.values import Scalar

__all__ = ["TrackioBackend"]


class TrackioBackend(Backend):
    """A run of trackio with our id, so that trackio finds it again if it is resumed.

    A thread of trackio sends its rows twice a second. Its output on stdout is not shown.
    """

    def __init__(self, info: RunInfo) -> None:
        trackio = package("trackio", "trackio")
        self._module = trackio
        with _quiet():
            # Not trackio.init(), which would end a run that the script has opened itself.
            self._run: Any = trackio.Run(
                url=None,
                project=info.project,
                client=None,
                name=info.name if info.name == info.id else f"{info.name} ({info.id})",
                run_id=info.id,
                config={f"config{key}" if key.startswith("_") else key: value for key, value in info.config.items()},
            )

    def log(self, values: Mapping[str, Scalar], step: int, time_s: float) -> None:
        self._run.log({name: value for name, value in values.items() if value is not None}, step=step)

    def log_artifact(self, stored: StoredFiles) -> None:
        artifact = self._module.Artifact(stored.name, type=stored.type, metadata={"sha256": stored.digest})
        for name in stored.files:
            # No second copy: stored files do not change.
            artifact.add_reference((stored.folder / name).as_uri(), name=name)
        with _quiet():
            self._run.log_artifact(artifact, aliases=list(stored.aliases))

    def finish(self, is_failed: bool, summary: Mapping[str, Scalar]) -> None:
        with _quiet():
            self._run.finish()


def _quiet() -> contextlib.redirect_stdout[io.StringIO]:
    return contextlib.redirect_stdout(io.StringIO())
