"""Report to Weights & Biases."""

from collections.abc import Mapping
from typing import Any

from dengine.tracking.backend import Backend, RunInfo, StoredFiles, package
from dengine.tracking.values import Scalar

__all__ = ["WandbBackend"]

_STEP = "global_step"


class WandbBackend(Backend):
    """A run of wandb with the same id and name.

    wandb drops values that are logged at a smaller step than the last one, which happens if epochs and iterations are
    both logged, or if a run resumes from a checkpoint. So wandb's own step counts calls, and our step is a value over
    which it draws curves.
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
            reinit="create_new",  # do not touch a run that the script has opened itself
            settings=wandb.Settings(silent=True),
        )
        self._run.define_metric(_STEP, hidden=True)
        self._run.define_metric("*", step_metric=_STEP)

    def log(self, values: Mapping[str, Scalar], step: int, time_s: float) -> None:
        self._run.log({_STEP: step, **values})

    def log_artifact(self, stored: StoredFiles) -> None:
        artifact = self._module.Artifact(stored.name, type=stored.type, metadata={"sha256": stored.digest})
        for name in stored.files:
            # Stored files do not change, so wandb needs no copy.
            artifact.add_file(str(stored.folder / name), name=name, policy="immutable", skip_cache=True)
        self._run.log_artifact(artifact, aliases=list(stored.aliases))

    def finish(self, is_failed: bool, summary: Mapping[str, Scalar]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish(exit_code=int(is_failed))
