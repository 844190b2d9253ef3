"""MSE, RMSE, MAE and R2Score against scikit-learn, digits included."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score, root_mean_squared_error

from dengine import NotComputableError
from dengine.metrics import MAE, MSE, RMSE, R2Score

UNEVEN = (0, 1, 7, 0, 12)
KINDS: list[tuple[Any, Callable[..., float]]] = [
    (MSE, mean_squared_error),
    (RMSE, root_mean_squared_error),
    (MAE, mean_absolute_error),
    (R2Score, r2_score),
]


def computed(metric: Any, prediction: torch.Tensor, target: torch.Tensor, sizes: tuple[int, ...] = UNEVEN) -> Any:
    for batch in zip(prediction.split(sizes), target.split(sizes), strict=True):
        metric.update(batch)
    return metric.compute()


@pytest.mark.parametrize("offset", [1e8, -1e8, 0.0])
@pytest.mark.parametrize("batch_size", [1, 10, 1000])
def test_r2_keeps_its_digits_under_a_large_offset(batch_size: int, offset: float) -> None:
    noise = torch.randn(1000, dtype=torch.float64)
    targets = offset + noise
    predictions = targets + 0.3 * torch.randn(1000, dtype=torch.float64)
    exact = 1 - (targets - predictions).square().sum() / (targets - targets.mean()).square().sum()
    metric = computed(R2Score(), predictions, targets, (batch_size,) * (1000 // batch_size))
    assert metric == pytest.approx(float(exact), abs=1e-9 if offset else 1e-13)


def test_r2_keeps_its_digits_over_ranks(over_ranks: Any) -> None:
    targets = 1e8 + torch.randn(1000, dtype=torch.float64)
    predictions = targets + 0.3 * torch.randn(1000, dtype=torch.float64)
    exact = 1 - (targets - predictions).square().sum() / (targets - targets.mean()).square().sum()
    cuts = [0, 1, 1, 400, 1000]
    shards = [[(predictions[a:b], targets[a:b])] for a, b in pairwise(cuts)]
    assert over_ranks(lambda: {"r2": R2Score()}, shards).values["r2"] == pytest.approx(float(exact), abs=1e-9)


@pytest.mark.parametrize(("kind", "reference"), KINDS)
@pytest.mark.parametrize("shape", [(20, 3), (20, 1), (20,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.int64])
def test_errors_are_scikit_learns(dtype: torch.dtype, shape: tuple[int, ...], kind: Any, reference: Any) -> None:
    prediction, target = (10 * torch.randn(2, *shape)).to(dtype)
    expected = reference(target.double(), prediction.double())
    assert computed(kind(), prediction, target) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(("kind", "reference"), KINDS)
def test_positions_of_maps_are_samples(kind: Any, reference: Any) -> None:
    prediction, target = torch.randn(2, 20, 3, 4, 5, dtype=torch.float64)
    flat = [part.movedim(1, -1).reshape(-1, 3) for part in (target, prediction)]
    assert computed(kind(), prediction, target) == pytest.approx(reference(*flat), rel=1e-12)


@pytest.mark.parametrize(("kind", "expected"), [(MSE, 0.05), (RMSE, math.sqrt(0.05)), (MAE, 0.2), (R2Score, 0.8)])
def test_numbers_are_samples_and_keep_their_digits(kind: Any, expected: float) -> None:
    metric = kind()
    for pair in ((0.1, 0.0), (0.7, 1.0)):
        metric.update(pair)
    assert metric.compute() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("value", [0.1, 1e8 + 0.1, 0.0, -3.0])
def test_targets_that_are_all_alike_score_as_in_scikit_learn(value: float, over_ranks: Any) -> None:
    targets = torch.full((7,), value, dtype=torch.float64)
    for predictions, expected in ((targets, 1.0), (targets + 1, 0.0)):
        assert computed(R2Score(), predictions, targets, (3, 4)) == expected
        shards = [[(predictions[:3], targets[:3])], [], [(predictions[3:], targets[3:])]]
        assert over_ranks(lambda: {"r2": R2Score()}, shards).values == {"r2": expected}


def test_r2_of_one_sample_is_nan_as_in_scikit_learn() -> None:
    assert math.isnan(computed(R2Score(), torch.ones(1), torch.ones(1), (1,)))


@pytest.mark.parametrize("kind", [MSE, RMSE, MAE, R2Score])
@pytest.mark.parametrize(("prediction", "target"), [((4, 1), (4,)), ((4,), (4, 1)), ((4,), (5,)), ((2, 3), (3, 2))])
def test_nothing_is_broadcast(prediction: tuple[int, ...], target: tuple[int, ...], kind: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shape {prediction} and targets of shape {target}")):
        kind().update((torch.rand(prediction), torch.rand(target)))


@pytest.mark.parametrize("kind", [RMSE, R2Score])
def test_another_number_of_quantities_than_before_is_an_error(kind: Any) -> None:
    metric = kind()
    metric.update((torch.rand(4, 3), torch.rand(4, 3)))
    with pytest.raises(ValueError, match="2 quantities.*3 before"):
        metric.update((torch.rand(4, 2), torch.rand(4, 2)))


@pytest.mark.parametrize("kind", [MSE, RMSE, MAE, R2Score])
def test_complex_numbers_and_mappings_are_an_error(kind: Any) -> None:
    with pytest.raises(TypeError, match="complex"):
        kind().update((torch.rand(4, dtype=torch.complex64), torch.rand(4)))
    with pytest.raises(TypeError, match=r"\['loss'\].*output_transform="):
        kind().update({"loss": 1.0})


@pytest.mark.parametrize("kind", [MSE, RMSE, MAE, R2Score])
def test_nothing_seen_is_not_computable(kind: Any) -> None:
    metric = kind()
    for _ in range(2):
        with pytest.raises(NotComputableError, match="no sample was seen on any rank"):
            metric.compute()
        metric.update((torch.rand(0), torch.rand(0)))


def test_gradients_are_left_behind() -> None:
    for metric in (MSE(), RMSE(), MAE(), R2Score()):
        metric.update((torch.rand(4, requires_grad=True), torch.rand(4)))
        for name in metric.states:
            state = getattr(metric, name)
            assert not isinstance(state, torch.Tensor) or not state.requires_grad
