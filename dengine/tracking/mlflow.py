"""Report to MLflow: to the configured tracking server, else to a SQLite file in the folder of the runs."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dengine.tracking.backend import Backend, RunInfo, StoredFiles, package
from dengine.tracking.values import Scalar, to_json

__all__ = ["MlflowBackend"]

_BATCH = 1000  # the most metrics that MLflow takes in one call
_NUM_PARAMS = 100
_MAX_WAIT_S = 1.0
_PARAM_LENGTH = 6000
_ID_TAG = "dengine.run_id"


class MlflowBackend(Backend):
    """A run in the MLflow experiment with the project's name.

    One call to MLflow takes milliseconds, so values are collected for about a second and sent together. MLflow gives
    runs ids of its own; our id is a tag, so that a resumed run is found again.
    """

    def __init__(self, info: RunInfo) -> None:
        if info.is_offline:
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        mlflow = package("mlflow", "mlflow")
        self._metric = mlflow.entities.Metric
        self._waiting: list[Any] = []
        self._sent_s = time.monotonic()
        root = info.dir.parent.parent
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        is_remote = uri is not None and uri.startswith(("http:", "https:", "databricks"))
        if uri is None or (info.is_offline and is_remote):
            uri, artifacts = f"sqlite:///{root / 'mlflow.db'}", (root / "mlflow-artifacts").as_uri()
        else:
            artifacts = None
        # Not the module's functions: these have one run per process, which may be the script's own.
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        self._run_id = self._open(mlflow, info, artifacts)

    def log(self, values: Mapping[str, Scalar], step: int, time_s: float) -> None:
        for name, value in values.items():
            if isinstance(value, str):
                self._client.set_tag(self._run_id, _key(name), value)
            elif value is not None:
                self._waiting.append(self._metric(_key(name), float(value), int(time_s * 1000), step))
        if len(self._waiting) >= _BATCH or time.monotonic() - self._sent_s >= _MAX_WAIT_S:
            self._send()

    def log_artifact(self, stored: StoredFiles) -> None:
        for name in stored.files:
            folder = Path("artifacts", stored.name, stored.version, name).parent.as_posix()
            self._client.log_artifact(self._run_id, str(stored.folder / name), folder)
        for alias in stored.aliases:
            self._client.set_tag(self._run_id, f"alias.{stored.name}.{alias}", stored.version)

    def finish(self, is_failed: bool, summary: Mapping[str, Scalar]) -> None:
        self._send()
        self._client.set_terminated(self._run_id, "FAILED" if is_failed else "FINISHED")

    def _open(self, mlflow: Any, info: RunInfo, artifacts: str | None) -> str:
        experiment = self._client.get_experiment_by_name(info.project)
        if experiment is None:
            experiment_id = self._client.create_experiment(info.project, artifacts)
        else:
            experiment_id = experiment.experiment_id
        found = self._client.search_runs([experiment_id], f"tags.`{_ID_TAG}` = '{info.id}'") if info.is_resumed else []
        run = (
            found[0]
            if found
            else self._client.create_run(
                experiment_id, tags={_ID_TAG: info.id, **dict.fromkeys(info.tags, "true")}, run_name=info.name
            )
        )
        if found:
            self._client.update_run(run.info.run_id, status="RUNNING")
        # A parameter cannot be changed after it was set.
        params = [
            mlflow.entities.Param(_key(name), value[:_PARAM_LENGTH])
            for name, value in _params("", info.config)
            if _key(name) not in run.data.params
        ]
        for start in range(0, len(params), _NUM_PARAMS):
            self._client.log_batch(run.info.run_id, params=params[start : start + _NUM_PARAMS])
        return str(run.info.run_id)

    def _send(self) -> None:
        self._sent_s = time.monotonic()
        waiting, self._waiting = self._waiting, []
        for start in range(0, len(waiting), _BATCH):
            self._client.log_batch(self._run_id, metrics=waiting[start : start + _BATCH])


def _params(prefix: str, config: Mapping[str, Any]) -> list[tuple[str, str]]:
    params: list[tuple[str, str]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            params += _params(f"{prefix}{key}/", value)
        else:
            params.append((f"{prefix}{key}", str(to_json(value))))
    return params


def _key(name: str) -> str:
    """`name` as MLflow allows it: letters, digits, and "_-. :/", and no part "." or ".."."""
    kept = "".join(letter if letter.isalnum() or letter in "_-. :/" else "_" for letter in name)
    return "/".join(part.replace(".", "_") if set(part) <= {"."} else part for part in kept.split("/") if part) or "_"
