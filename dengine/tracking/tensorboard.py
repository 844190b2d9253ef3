"""Write event files for TensorBoard into the run's folder: `tensorboard --logdir runs`."""

import json
from collections.abc import Mapping

from dengine.tracking.backend import Backend, RunInfo, StoredFiles, package
from dengine.tracking.values import Scalar, to_json

__all__ = ["TensorBoardBackend"]


class TensorBoardBackend(Backend):
    """Writes scalars; and strings, the configuration and the names of artifacts as text: event files hold no files."""

    def __init__(self, info: RunInfo) -> None:
        package("tensorboard", "tensorboard")
        from torch.utils.tensorboard import SummaryWriter

        # By default a killed process loses the values of the last two minutes.
        self._writer = SummaryWriter(str(info.dir / "tensorboard"), flush_secs=1)
        self._step = 0
        if not info.is_resumed:
            self._text("config", json.dumps(to_json(dict(info.config)), indent=2), 0)
            self._text("run", f"{info.project} / {info.name} ({info.id}) {' '.join(info.tags)}", 0)

    def log(self, values: Mapping[str, Scalar], step: int, time_s: float) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self._writer.add_text(name, value, step, time_s)
            elif value is not None:
                self._writer.add_scalar(name, value, step, time_s)
        self._step = step

    def log_artifact(self, stored: StoredFiles) -> None:
        self._text(
            f"artifact/{stored.name}", f"{stored.version} {', '.join(stored.aliases)}: {stored.folder}", self._step
        )

    def finish(self, is_failed: bool, summary: Mapping[str, Scalar]) -> None:
        self._text("summary", json.dumps(to_json(dict(summary)), indent=2), self._step)
        self._writer.close()

    def _text(self, name: str, text: str, step: int) -> None:
        indented = "\n".join(
            f"    {line}" for line in text.splitlines()
        )  # four spaces: shown literally, not as markdown
        self._writer.add_text(name, indented, step)
