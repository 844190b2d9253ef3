"""Weights & Biases."""

from collections.abc import Mapping
from typing import Any

from dengine.tracking.backend import Backend, RunInfo, StoredFiles, package
from dengine.tracking.values import Scalar

__all__ = ["WandbBackend"]

_STEP = "global_step"


class WandbBackend(Backend):
    """A run of the same id and name.

    wandb drops what is logged at a step below its last one, as happens if epochs and iterations are both logged, or a
    run resumes from a checkpoint. So wandb's own step counts calls, and ours is a value that it draws curves over.
    """

    def __init__(self, info: RunInfo) -> None:
        wandb = package("wandb", "wandb")
        self._module = wandb
        self._run: Any = wandb.init(
            project=info.project,
            name=info.name,
            id=info.id,
            config=dict(info.config),
            tags=list(info.tags),
            dir=str(info.dir),
            # Without a server there is nothing to resume, and wandb warns of it.
            resume=None if info.is_offline else "allow",
            mode="offline" if info.is_offline else None,
            reinit="create_new",  # leave alone the run that the script may have of its own
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric(_STEP, hidden=True)
        self._run.define_metric("*", step_metric=_STEP)

    def log(self, values: Mapping[str, Scalar], step: int, time_s: float) -> None:
        self._run.log({_STEP: step, **values})

    def log_artifact(self, stored: StoredFiles) -> None:
        artifact = self._module.Artifact(stored.name, type=stored.type, metadata={"sha256": stored.digest})
        for name in stored.files:
            # What is stored does not change, so that wandb needs no copy of it.
            artifact.add_file(str(stored.folder / name), name=name, policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=list(stored.aliases))

    def finish(self, is_failed: bool, summary: Mapping[str, Scalar]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(is_failed))
