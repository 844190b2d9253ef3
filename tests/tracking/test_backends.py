"""Each backend against its real package, read back by the package's own means."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dengine.tracking import Run, Track

pytestmark = pytest.mark.filterwarnings("error:The backend")

ROWS: list[tuple[int, dict[str, Any]]] = [
    (1, {"train/loss": 0.5, "phase": "warm-up"}),
    (2, {"train/loss": math.nan}),
    (0, {"val": {"acc": 0.75}}),  # a step that goes back
    (3, {"train/loss": 0.25}),
]


def needs(package: str) -> Any:
    return pytest.importorskip(package, reason=f'pip install "dengine[{package}]"')


def log_all(run: Run, folder: Path) -> None:
    (folder / "weights.bin").write_text("weights")
    for step, values in ROWS:
        run.log(values, step=step)
    run.log_artifact(Track.Artifact("model", type="model").add_file(folder / "weights.bin"), aliases=["best"])


def files_are_complete(run: Run) -> bool:
    rows = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows[-len(ROWS) :]] == [1, 2, 0, 3]


def test_tensorboard_has_every_scalar_at_its_step(tmp_path: Path) -> None:
    needs("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Track.run("p", config={"lr": 0.1}, dir=tmp_path / "runs", backend="tensorboard") as run:
        log_all(run, tmp_path)
    events = EventAccumulator(str(run.dir / "tensorboard"))
    events.Reload()
    losses = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert [step for step, _ in losses] == [1, 2, 3]
    assert losses[0][1] == 0.5
    assert math.isnan(losses[1][1])
    assert [(event.step, event.value) for event in events.Scalars("val/acc")] == [(0, 0.75)]
    assert {"config/text_summary", "phase/text_summary", "artifact/model/text_summary"} <= set(events.Tags()["tensors"])
    assert files_are_complete(run)


def test_wandb_keeps_rows_whose_step_goes_back_and_runs_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = needs("wandb")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    Track.set_mode("offline")
    try:
        own = wandb.init(project="own", dir=str(tmp_path), mode="offline", settings=wandb.Settings(silent=True))
        with Track.run("p", config={"lr": 0.1}, dir=tmp_path / "runs", backend="wandb") as run:
            log_all(run, tmp_path)
        own.log({"x": 1})  # the script's own run goes on
        own.finish()
    finally:
        Track.set_mode("online")
    (file,) = (run.dir / "wandb").glob("offline-run-*/*.wandb")
    assert wandb_rows(file) == [(1, "train/loss"), (2, "train/loss"), (0, "val/acc"), (3, "train/loss")]
    assert files_are_complete(run)


def wandb_rows(file: Path) -> list[tuple[int, str]]:
    from wandb.proto import wandb_internal_pb2

    rows = []
    for data in wandb_records(file.read_bytes()):
        record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            row = {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
            rows += [(row["global_step"], name) for name in ("train/loss", "val/acc") if name in row]
    return rows


def wandb_records(data: bytes) -> list[bytes]:
    """LevelDB's log format: blocks of 32 KiB; a part has a checksum (4 bytes), its length (2) and its kind (1)."""
    records, parts, at = [], b"", 7  # the file's own header
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if left < 7 or kind == 0:  # padding
            at += left
            continue
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            records.append(parts)
            parts = b""
    return records


def test_mlflow_has_metrics_params_and_artifacts_and_a_resumed_run_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = needs("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    config = {"lr": 0.1, "net": {"width": 8}}
    with Track.run("p", config=config, dir=tmp_path / "runs", backend="mlflow") as first:
        log_all(first, tmp_path)
        first.log({"odd#name": 1.0})
    with (
        pytest.raises(ZeroDivisionError),
        Track.run("p", config={"lr": 0.2}, dir=tmp_path / "runs", backend="mlflow", resume=first.id) as second,
    ):
        second.log({"train/loss": 0.125}, step=4)
        raise ZeroDivisionError
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("p")
    (run,) = client.search_runs([experiment.experiment_id])
    history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "train/loss")}
    assert sorted(history) == [1, 2, 3, 4]
    assert (history[1], history[4]) == (0.5, 0.125)
    assert run.data.params == {"lr": "0.1", "net/width": "8"}
    assert run.data.metrics["odd_name"] == 1.0
    assert run.data.tags["alias.model.best"] == "v0"
    assert run.info.status == "FAILED"
    assert [file.path for file in client.list_artifacts(run.info.run_id, "artifacts/model/v0")] == [
        "artifacts/model/v0/weights.bin"
    ]
    assert not (Path.cwd() / "mlruns").exists()


TRACKIO = """
import sys, math, json
sys.path.insert(0, {here!r})
from pathlib import Path
from dengine.tracking import Track
import test_backends
with Track.run("p", config={{"lr": 0.1, "_own": 1}}, dir={runs!r}, backend="trackio") as run:
    test_backends.log_all(run, Path({folder!r}))
with Track.run("p", dir={runs!r}, backend="trackio", resume=run.id) as again:
    again.log({{"train/loss": 0.125}}, step=4)
import trackio
found = trackio.Api().runs("p")
print(json.dumps([found[0].id, len(list(found)), run.id]))
"""


def test_trackio_has_every_row_and_a_resumed_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs("trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when trackio is imported: in another process
    code = TRACKIO.format(here=str(Path(__file__).parent), runs=str(tmp_path / "runs"), folder=str(tmp_path))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("\n") == 1, done.stdout  # trackio's own messages are kept back
    trackio_id, num_runs, run_id = json.loads(done.stdout)
    assert (trackio_id, num_runs) == (run_id, 1)
    rows = trackio_rows(tmp_path / "trackio")
    assert [step for step, _ in rows] == [1, 2, 0, 3, 4]
    assert [row.get("train/loss") for _, row in rows] == [0.5, "NaN", None, 0.25, 0.125]


def trackio_rows(folder: Path) -> list[tuple[int, dict[str, Any]]]:
    import sqlite3

    (file,) = folder.glob("p*.db")
    with sqlite3.connect(file) as connection:
        found = connection.execute("SELECT step, metrics FROM metrics ORDER BY id").fetchall()
    return [(step, json.loads(metrics)) for step, metrics in found]


@pytest.mark.parametrize("name", ["trackio", "tensorboard", "wandb", "mlflow"])
def test_a_missing_package_names_the_extra_and_the_run_is_failed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # importing it raises ModuleNotFoundError
    with pytest.raises(ModuleNotFoundError, match=rf'pip install "dengine\[{name}\]"'):
        Track.run("p", dir=tmp_path, backend=name)
    (status,) = tmp_path.glob("p/*/status.json")
    assert json.loads(status.read_text())["status"] == "failed"


def test_a_backend_that_fails_is_a_warning_and_the_files_go_on(tmp_path: Path) -> None:
    needs("tensorboard")
    with Track.run("p", dir=tmp_path, backend=["tensorboard"]) as run:
        run._backends["tensorboard"].log = None  # type: ignore[attr-defined]
        with pytest.warns(RuntimeWarning, match="The backend 'tensorboard' failed .*complete without it"):
            run.log({"x": 1})
    assert json.loads((run.dir / "metrics.jsonl").read_text())["x"] == 1
