"""Which curves a run's rows hold."""

import math
from typing import Any

import numpy as np
import pytest

from dengine.tracking.curves import best_of, curves_of, smoothed


def found(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[tuple[float, float]]]:
    return {(curve.name, curve.split): list(zip(curve.x, curve.y, strict=True)) for curve in curves_of(rows)}


def test_names_tell_the_split_and_the_axis_is_the_epoch_where_every_row_has_one() -> None:
    rows = [{"step": 44 * (n + 1), "epoch": n, "train/loss": 1.0 - n, "val_acc": n / 2, "lr": 0.1} for n in range(2)]
    assert found(rows) == {
        ("loss", "training"): [(0, 1.0), (1, 0.0)],
        ("acc", "validation"): [(0, 0.0), (1, 0.5)],
        ("lr", ""): [(0, 0.1), (1, 0.1)],
    }
    assert {curve.over for curve in curves_of(rows)} == {"epoch"}


def test_rows_of_epochs_stand_at_the_iteration_that_had_been_reached() -> None:
    rows: list[dict[str, Any]] = []
    for epoch in range(2):
        rows += [{"step": 10 * epoch + n, "time": 10.0 * epoch + n, "train/loss": 1.0} for n in (5, 10)]
        rows.append({"step": epoch, "time": 10.0 * epoch + 10.5, "val/loss": 2.0, "epoch": epoch})
    assert found(rows)[("loss", "validation")] == [(10, 2.0), (20, 2.0)]


def test_iterations_are_left_where_they_are_though_some_rows_name_their_epoch() -> None:
    rows = [{"step": 5, "x": 1.0}, {"step": 10, "x": 1.0, "epoch": 0}, {"step": 20, "x": 2.0, "epoch": 1}]
    assert found(rows)[("x", "")] == [(5, 1.0), (10, 1.0), (20, 2.0)]


def test_of_steps_done_twice_by_a_resumed_run_the_later_counts() -> None:
    rows = [{"step": step, "x": float(number)} for number, step in enumerate([1, 2, 3, 2, 3, 4])]
    assert found(rows)[("x", "")] == [(1, 0.0), (2, 3.0), (3, 4.0), (4, 5.0)]


def test_strings_are_no_curve_but_those_of_numbers_that_are_not_finite_are() -> None:
    rows: list[dict[str, Any]] = [
        {"step": 0, "x": "NaN", "phase": "warm-up"},
        {"step": 1, "x": "Infinity"},
        {"step": 2, "x": 1},
    ]
    ((_, points),) = found(rows).items()
    assert math.isnan(points[0][1])
    assert points[1:] == [(1, math.inf), (2, 1.0)]


@pytest.mark.parametrize(
    ("values", "best"),
    [
        ({"val/loss": [3.0, 1.0, 2.0], "val/acc": [0.1, 0.5, 0.7]}, ("acc", 2, 0.7)),
        ({"val/loss": [3.0, "NaN", 2.0], "train/acc": [1.0, 1.0, 1.0]}, ("loss", 2, 2.0)),
        ({"val/loss": ["NaN", "NaN", "NaN"]}, None),
        ({"train/loss": [1.0, 2.0, 3.0]}, None),
    ],
)
def test_the_best_is_a_validation_accuracy_s_or_else_a_loss_s(values: dict[str, Any], best: Any) -> None:
    rows = [{"step": n, **{name: each[n] for name, each in values.items()}} for n in range(3)]
    picked = best_of(curves_of(rows))
    assert (None if picked is None else (picked.name, picked.x, picked.y)) == best


def test_smoothing_neither_lags_nor_ends_in_the_last_point_nor_is_stopped_by_a_nan() -> None:
    line = np.arange(100.0)
    assert smoothed(line, 5)[5:-5] == pytest.approx(line[5:-5])
    line[50] = np.nan
    assert smoothed(line, 5)[50] == pytest.approx(50)
    assert np.isfinite(smoothed(line, 5)).all()
    assert smoothed(np.array([0.0] * 20 + [12.0]), 5)[-1] == pytest.approx(2.0)
