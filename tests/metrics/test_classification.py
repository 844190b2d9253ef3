"""Precision, Recall, F1Score and ConfusionMatrix against scikit-learn, and what they refuse."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import confusion_matrix, f1_score, multilabel_confusion_matrix, precision_score, recall_score

from dengine import NotComputableError
from dengine.metrics import ConfusionMatrix, F1Score, Precision, Recall

UNEVEN = (0, 1, 7, 0, 12)
RATIOS: list[tuple[Any, Callable[..., Any]]] = [
    (Precision, precision_score),
    (Recall, recall_score),
    (F1Score, f1_score),
]
AVERAGES = ["micro", "macro", "weighted", None]


def computed(metric: Any, prediction: torch.Tensor, target: torch.Tensor, sizes: tuple[int, ...] = UNEVEN) -> Any:
    for batch in zip(prediction.split(sizes), target.split(sizes), strict=True):
        metric.update(batch)
    return metric.compute()


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(("kind", "reference"), RATIOS)
@pytest.mark.parametrize("rest", [(3,), ()])
def test_classes_that_do_not_occur_count_as_in_scikit_learn(
    rest: tuple[int, ...], kind: Any, reference: Any, average: Any
) -> None:
    scores, labels = torch.randn(20, 9, *rest), torch.randint(2, 6, (20, *rest))
    scores[:, 7:] = -9  # never predicted, and no target
    expected = reference(
        labels.flatten(),
        scores.argmax(1).flatten(),
        average=average,
        zero_division=0,
        labels=range(9) if average is None else None,
    )
    for metric, prediction in (
        (kind(average=average), scores),
        (kind("multiclass", 9, average=average), scores),
        (kind(num_classes=9, average=average), scores.argmax(1)),
    ):
        np.testing.assert_allclose(computed(metric, prediction, labels), expected, atol=1e-15)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(("kind", "reference"), RATIOS)
@pytest.mark.parametrize("targets", [torch.zeros(20, dtype=torch.int64), torch.arange(20) % 2, torch.ones(20)])
def test_averages_of_a_binary_task_are_over_both_classes(
    targets: torch.Tensor, kind: Any, reference: Any, average: Any
) -> None:
    scores = torch.rand(20)
    expected = reference(
        targets,
        scores > 0.5,
        average=average,
        zero_division=0,
        labels=range(2) if average is None else None,
    )
    np.testing.assert_allclose(computed(kind("binary", average=average), scores, targets), expected, atol=1e-15)


@pytest.mark.parametrize(("kind", "reference"), RATIOS)
def test_a_binary_task_is_about_the_positive_class_unless_told_otherwise(kind: Any, reference: Any) -> None:
    logits, targets = torch.randn(20, 1), torch.randint(0, 2, (20,))
    expected = reference(targets, logits.squeeze(1) > 0, zero_division=0)
    assert computed(kind("binary", threshold=0.0), logits, targets) == pytest.approx(expected, abs=1e-15)
    assert computed(kind("binary"), (logits > 0).long(), targets.unsqueeze(1)) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize(("kind", "reference"), RATIOS)
@pytest.mark.parametrize("rest", [(3,), ()])
def test_multilabel_ratios_are_scikit_learns(rest: tuple[int, ...], kind: Any, reference: Any, average: Any) -> None:
    scores, targets = torch.rand(20, 4, *rest), torch.randint(0, 2, (20, 4, *rest))
    targets[:, 2] = 0
    scores[:, 2] = 0  # a label that nobody has
    flat = [part.movedim(1, -1).reshape(-1, 4) for part in (scores, targets)]
    expected = reference(flat[1], flat[0] > 0.5, average=average, zero_division=0)
    np.testing.assert_allclose(computed(kind("multilabel", average=average), scores, targets), expected, atol=1e-15)


@pytest.mark.parametrize(("kind", "reference"), RATIOS)
def test_the_default_average_of_several_classes_is_macro(kind: Any, reference: Any) -> None:
    scores, labels = torch.randn(20, 4), torch.randint(0, 4, (20,))
    expected = reference(labels, scores.argmax(1), average="macro", zero_division=0)
    assert computed(kind(), scores, labels) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("rest", [(3,), ()])
def test_the_confusion_matrix_is_scikit_learns(rest: tuple[int, ...]) -> None:
    scores, labels = torch.randn(20, 5, *rest), torch.randint(0, 4, (20, *rest))
    expected = confusion_matrix(labels.flatten(), scores.argmax(1).flatten(), labels=range(5))
    for metric, prediction in ((ConfusionMatrix(), scores), (ConfusionMatrix(num_classes=5), scores.argmax(1))):
        matrix = computed(metric, prediction, labels)
        assert matrix.dtype == torch.int64
        np.testing.assert_array_equal(matrix, expected)


def test_the_binary_confusion_matrix_is_scikit_learns() -> None:
    scores, targets = torch.rand(20), torch.randint(0, 2, (20,))
    np.testing.assert_array_equal(
        computed(ConfusionMatrix("binary"), scores, targets), confusion_matrix(targets, scores > 0.5)
    )


def test_the_multilabel_confusion_matrix_is_scikit_learns() -> None:
    scores, targets = torch.rand(20, 3), torch.randint(0, 2, (20, 3))
    np.testing.assert_array_equal(
        computed(ConfusionMatrix("multilabel"), scores, targets), multilabel_confusion_matrix(targets, scores > 0.5)
    )


def test_a_matrix_computed_by_hand_is_not_the_state() -> None:
    metric = ConfusionMatrix(num_classes=2)
    metric.update((torch.tensor([0]), torch.tensor([0])))
    matrix = metric.compute()
    metric.update((torch.tensor([0]), torch.tensor([0])))
    assert isinstance(matrix, torch.Tensor)
    assert matrix[0, 0] == 1


@pytest.mark.parametrize("kind", [Precision, Recall, F1Score, ConfusionMatrix])
@pytest.mark.parametrize("bad", [-1, 4, 10**12, -(10**12)])
def test_a_label_outside_the_classes_is_an_error_that_names_metric_and_range(kind: Any, bad: int) -> None:
    for prediction, target in (
        (torch.randn(3, 4), torch.tensor([0, bad, 3])),
        (torch.tensor([0, bad, 3]), torch.tensor([0, 1, 3])),
    ):
        metric = kind(num_classes=4)
        metric.update((prediction, target))
        with pytest.raises(ValueError, match=rf"{kind.__name__} got labels as (low|high) as {bad}, but 4 classes"):
            metric.compute()


@pytest.mark.parametrize("kind", [Precision, Recall, F1Score, ConfusionMatrix])
def test_a_multilabel_target_that_is_neither_zero_nor_one_is_an_error(kind: Any) -> None:
    metric = kind("multilabel")
    metric.update((torch.rand(3, 4), torch.full((3, 4), 2)))
    with pytest.raises(ValueError, match="as high as 2, but 2 classes have the labels 0 to 1"):
        metric.compute()


@pytest.mark.parametrize("kind", [Precision, Recall, F1Score, ConfusionMatrix])
def test_predicted_labels_need_num_classes(kind: Any) -> None:
    with pytest.raises(ValueError, match="num_classes="):
        kind().update((torch.tensor([1, 2]), torch.tensor([1, 2])))


@pytest.mark.parametrize("kind", [Precision, Recall, F1Score, ConfusionMatrix])
def test_scores_of_the_targets_shape_ask_for_a_task(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"\(2,\).*\(2,\).*task='binary'"):
        kind(num_classes=2).update((torch.rand(2), torch.tensor([1, 0])))


@pytest.mark.parametrize("kind", [Precision, Recall, F1Score, ConfusionMatrix])
def test_nothing_seen_is_not_computable(kind: Any) -> None:
    for metric in (kind(), kind(num_classes=3), kind("multilabel")):
        with pytest.raises(NotComputableError, match="no sample was seen"):
            metric.compute()


@pytest.mark.parametrize("kind", [Precision, Recall, F1Score])
@pytest.mark.parametrize("average", ["samples", "binary", 1])
def test_an_unknown_average_is_an_error(kind: Any, average: Any) -> None:
    with pytest.raises(ValueError, match="average="):
        kind(average=average)


def test_f1_of_two_metrics_is_their_harmonic_mean() -> None:
    precision, recall = Precision(num_classes=3), Recall(num_classes=3)
    f1 = 2 * precision * recall / (precision + recall)
    f1.update((torch.tensor([0, 1, 1, 2]), torch.tensor([0, 1, 2, 2])))
    p, r = (1 + 0.5 + 1) / 3, (1 + 1 + 0.5) / 3
    assert f1.compute() == pytest.approx(2 * p * r / (p + r))


def test_a_quotient_of_zeros_is_nan_and_ends_no_run() -> None:
    precision, recall = Precision("binary"), Recall("binary")
    f1 = 2 * precision * recall / (precision + recall)
    f1.update((torch.tensor([0.9]), torch.tensor([0])))
    assert np.isnan(f1.compute())


def test_counts_made_in_inference_mode_go_on_outside_of_it() -> None:
    metric = Recall()
    with torch.inference_mode():
        metric.update((torch.eye(3), torch.arange(3)))
    metric.update((torch.eye(3), torch.tensor([0, 0, 0])))
    assert metric.compute() == pytest.approx((2 / 4 + 1 + 1) / 3)


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=40), st.sampled_from(AVERAGES))
def test_any_labels_give_scikit_learns_numbers(pairs: list[tuple[int, int]], average: Any) -> None:
    predicted, labels = torch.tensor(pairs).unbind(1)
    for kind, reference in RATIOS:
        metric = kind(num_classes=5, average=average)
        metric.update((predicted, labels))
        expected = reference(
            labels, predicted, average=average, zero_division=0, labels=range(5) if average is None else None
        )
        np.testing.assert_allclose(metric.compute(), expected, atol=1e-15)
