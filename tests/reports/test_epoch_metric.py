"""A function of all predictions and targets is called once, with those of all ranks."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from dengine import Engine, NotComputableError
from dengine.metrics import EpochMetric

SCORES, LABELS = torch.rand(20, generator=torch.Generator().manual_seed(0)), torch.arange(20) % 2
SHARDS = [
    [(SCORES[:4], LABELS[:4]), (SCORES[4:5], LABELS[4:5])],
    [],
    [(SCORES[5:5], LABELS[5:5]), (SCORES[5:], LABELS[5:])],
]


def auc(predictions: torch.Tensor, targets: torch.Tensor) -> Any:
    return roc_auc_score(targets, predictions)


def test_every_rank_gets_the_value_of_the_union_in_one_exchange(over_ranks: Any) -> None:
    ranks = over_ranks(lambda: {"auc": EpochMetric(auc)}, SHARDS)
    assert ranks.values == {"auc": roc_auc_score(LABELS, SCORES)}
    assert ranks.collectives["gather"] == 1


def test_mappings_tensors_and_arrays_are_values(over_ranks: Any) -> None:
    def several(predictions: torch.Tensor, targets: torch.Tensor) -> Any:
        return {
            "ap": average_precision_score(targets, predictions),
            "matrix": confusion_matrix(targets, predictions > 0.5),
            "best": predictions.max(),
        }

    values = over_ranks(lambda: {"m": EpochMetric(several)}, SHARDS).values
    assert values["m/ap"] == average_precision_score(LABELS, SCORES)
    assert np.array_equal(values["m/matrix"], confusion_matrix(LABELS, SCORES > 0.5))
    assert values["m/best"] == pytest.approx(float(SCORES.max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_scores_of_any_precision_reach_the_function_so_that_numpy_reads_them(dtype: torch.dtype) -> None:
    metric = EpochMetric(auc)
    metric.update((SCORES.to(dtype).requires_grad_(), LABELS.bool()))
    assert metric.compute() == roc_auc_score(LABELS, SCORES.to(dtype).double())


def test_a_step_may_write_to_its_tensors_again() -> None:
    buffer = torch.zeros(2)

    def step(engine: Engine, batch: float) -> Any:
        return buffer.fill_(batch), buffer

    engine = Engine(step)
    engine.add_metric(EpochMetric(lambda p, t: p.sum()), "sum")
    assert engine.run([1.0, 2.0], max_epochs=2).metrics == {"sum": 6.0}


def test_no_sample_anywhere_is_not_computable(over_ranks: Any) -> None:
    for shards in ([[], []], [[(SCORES[:0], LABELS[:0])], []]):
        outcomes = over_ranks(lambda: {"auc": EpochMetric(auc)}, shards).outcomes
        assert all(isinstance(outcome, NotComputableError) and "'auc'" in str(outcome) for outcome in outcomes)


def test_shapes_that_do_not_go_together_are_told_at_once() -> None:
    metric = EpochMetric(auc)
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        metric.update((torch.rand(3), torch.rand(2)))
    metric.update((torch.rand(3, 2), torch.rand(3)))
    with pytest.raises(ValueError, match=r"\(3, 4\).*\(3, 2\)"):
        metric.update((torch.rand(3, 4), torch.rand(3)))
    with pytest.raises(TypeError, match="function="):
        EpochMetric(None)  # type: ignore[arg-type]


def test_an_error_of_the_function_is_the_same_on_every_rank(over_ranks: Any) -> None:
    def fails(predictions: torch.Tensor, targets: torch.Tensor) -> Any:
        raise KeyError("mine")

    outcomes = over_ranks(lambda: {"m": EpochMetric(fails)}, SHARDS).outcomes
    assert all(isinstance(outcome, KeyError) for outcome in outcomes)
