"""No value that is logged ends the training: what a row cannot hold is left out, and the row is kept."""

import datetime
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dengine import Engine, Events
from dengine.handlers import TrackingHandler
from dengine.tracking import Track


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no repr")


ODD = [
    [1, 2],
    [],
    (1.0,),
    {1, 2},
    torch.zeros(2),
    torch.zeros(2, 3),
    torch.zeros(0),
    torch.tensor(1j),
    torch.empty((), device="meta"),
    np.zeros(4),
    np.array(["a", "b"]),
    np.complex64(1j),
    1j,
    b"bytes",
    10**5000,
    -(10**5000),
    object(),
    Unprintable(),
    print,
    datetime.date(2020, 1, 1),
]


def rows(run: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]


def warned(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in caught]


@pytest.mark.parametrize("odd", ODD, ids=lambda odd: type(odd).__name__)
def test_what_a_row_cannot_hold_is_left_out_with_one_warning_and_the_rest_is_kept(odd: Any, tmp_path: Path) -> None:
    with Track.run("p", dir=tmp_path) as run:
        (told,) = warned(lambda: run.log({"loss": 0.5, "val": {"odd": odd, "acc": 1.0}}))
        assert "'val/odd'" in told
        assert warned(lambda: run.log({"val": {"odd": odd}, "loss": 0.25})) == []
    first, second = rows(run)
    assert (first["loss"], first["val/acc"], first["step"]) == (0.5, 1.0, 0)
    assert (second["loss"], second["step"]) == (0.25, 1)
    assert "val/odd" not in {**first, **second, **run.summary}


def test_several_in_one_row_are_one_warning_and_a_new_name_is_another(tmp_path: Path) -> None:
    with Track.run("p", dir=tmp_path) as run:
        (told,) = warned(lambda: run.log({"a": [1], "b": torch.zeros(3), "c": 1}))
        assert "'a'" in told
        assert "'b'" in told
        assert len(warned(lambda: run.log({"a": [1], "d": [2]}))) == 1


def test_none_is_null_without_a_warning(tmp_path: Path) -> None:
    with Track.run("p", dir=tmp_path) as run:
        assert warned(lambda: run.log({"acc": None, "deep": {"er": None}, "loss": 1.0})) == []
    (row,) = rows(run)
    assert (row["acc"], row["deep/er"], row["loss"]) == (None, None, 1.0)
    assert json.loads((run.dir / "summary.json").read_text())["acc"] is None
    with Track.run("p", dir=tmp_path, resume=run.id) as again:
        again.log({"acc": 0.5})
    assert [row["acc"] for row in rows(again)] == [None, 0.5]


def test_a_row_of_odd_values_alone_is_still_a_row(tmp_path: Path) -> None:
    with Track.run("p", dir=tmp_path) as run:
        warned(lambda: run.log({"a": [1]}, step=7))
        run.log({"b": 2})
    assert [row["step"] for row in rows(run)] == [7, 8]


@pytest.mark.parametrize("backend", ["tensorboard"])
def test_a_backend_is_told_what_it_can_hold(tmp_path: Path, backend: str) -> None:
    pytest.importorskip(backend)
    with Track.run("p", dir=tmp_path, backend=backend) as run:
        assert len(warned(lambda: run.log({"a": None, "b": 1.0, "c": [1]}))) == 1


def test_curves_pass_over_null(tmp_path: Path) -> None:
    from dengine.tracking.curves import curves_of

    curves = curves_of([{"step": 0, "acc": None, "never": None}, {"step": 1, "acc": 0.5}])
    assert [(curve.name, curve.x.tolist(), curve.y.tolist()) for curve in curves] == [("acc", [1.0], [0.5])]


class Writer:
    def __init__(self) -> None:
        self.written: list[tuple[str, float, int]] = []

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.written.append((name, value, step))


class Foreign:
    def __init__(self) -> None:
        self.written: list[Any] = []

    def log(self, values: Any, step: int) -> None:
        self.written.append((values, step))


class Mlflow:
    def __init__(self) -> None:
        self.written: list[Any] = []

    def log_metrics(self, values: Any, step: int) -> None:
        self.written.append((values, step))


@pytest.mark.parametrize(
    ("run", "written"),
    [(Writer(), [("loss", 0.5, 1)]), (Foreign(), [({"none": None, "loss": 0.5}, 1)]), (Mlflow(), [({"loss": 0.5}, 1)])],
)
def test_a_tracking_handler_gives_null_to_who_can_hold_it(run: Any, written: Any) -> None:
    trainer = Engine(lambda engine, batch: {"loss": 0.5, "none": None})
    log = TrackingHandler(run, ["none", "loss"], output_transform=lambda output: output)
    trainer.on(Events.ITERATION_COMPLETED, log)
    assert warned(lambda: trainer.run([0])) == []
    assert run.written == written


def test_a_number_without_end_in_the_configuration_is_kept_as_text(tmp_path: Path) -> None:
    with Track.run("p", dir=tmp_path, config={"seed": 1 << 50_000, "lr": 0.1}) as run:
        config = json.loads((Path(run.dir) / "config.json").read_text())
    assert config["lr"] == 0.1
    assert int(config["seed"], 16) == 1 << 50_000
