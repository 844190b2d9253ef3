"""Accuracy and TopKAccuracy against scikit-learn, and what they refuse."""

import re
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, recall_score, top_k_accuracy_score

from dengine import Engine, NotComputableError
from dengine.metrics import Accuracy, TopKAccuracy

UNEVEN = (0, 1, 7, 0, 12)  # batches of 20 samples, empty ones among them


def updated(metric: Any, prediction: Any, target: Any, sizes: tuple[int, ...] = ()) -> Any:
    """`metric` after one update with everything or, with `sizes`, after one for each batch."""
    for batch in zip(prediction.split(sizes), target.split(sizes), strict=True) if sizes else [(prediction, target)]:
        metric.update(batch)
    return metric


@pytest.mark.parametrize("sizes", [UNEVEN, ()])
@pytest.mark.parametrize("rest", [(3, 2), (4,), ()])
def test_scores_are_compared_with_labels_as_scikit_learn_does(rest: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    scores, labels = torch.randn(20, 5, *rest), torch.randint(0, 5, (20, *rest))
    expected = accuracy_score(labels.flatten(), scores.argmax(1).flatten())
    for metric in (Accuracy(), Accuracy("multiclass"), Accuracy(num_classes=5)):
        assert updated(metric, scores, labels, sizes).compute() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("rest", [(3, 2), ()])
@pytest.mark.parametrize("num_classes", [5, None])
def test_predicted_labels_are_compared_as_scikit_learn_does(num_classes: int | None, rest: tuple[int, ...]) -> None:
    predicted, labels = torch.randint(0, 5, (2, 20, *rest))
    metric = updated(Accuracy(num_classes=num_classes), predicted, labels, UNEVEN)
    assert metric.compute() == pytest.approx(accuracy_score(labels.flatten(), predicted.flatten()), abs=1e-15)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_binary_scores_are_compared_with_the_threshold(dtype: torch.dtype, threshold: float) -> None:
    scores, targets = torch.rand(20), torch.randint(0, 2, (20,))
    expected = accuracy_score(targets, scores > threshold)
    for shaped in (scores, scores.unsqueeze(1)):
        metric = updated(Accuracy("binary", threshold=threshold), shaped, targets.to(dtype), UNEVEN)
        assert metric.compute() == pytest.approx(expected, abs=1e-15)


def test_logits_are_compared_with_a_threshold_of_zero() -> None:
    metric = Accuracy("binary", threshold=0.0)
    metric.update((torch.tensor([0.3, -0.3, 2.0, 0.1]), torch.tensor([1.0, 0.0, 1.0, 0.0])))
    assert metric.compute() == 0.75


def test_multilabel_accuracy_is_subset_accuracy() -> None:
    scores, targets = torch.rand(20, 2), torch.randint(0, 2, (20, 2))
    expected = accuracy_score(targets, (scores > 0.5).int())
    for predicted in (scores, (scores > 0.5), (scores > 0.5).long()):
        assert updated(Accuracy("multilabel"), predicted, targets, UNEVEN).compute() == pytest.approx(expected)


def test_positions_of_multilabel_maps_are_samples() -> None:
    scores, targets = torch.rand(20, 2, 3), torch.randint(0, 2, (20, 2, 3))
    flat = [part.movedim(1, -1).reshape(-1, 2) for part in (scores, targets)]
    assert updated(Accuracy("multilabel"), scores, targets).compute() == pytest.approx(
        accuracy_score(flat[1], flat[0] > 0.5)
    )


@pytest.mark.parametrize("average", ["macro", "weighted", None])
def test_averaged_accuracy_is_scikit_learns_recall(average: Any) -> None:
    scores, labels = torch.randn(20, 8), torch.randint(0, 6, (20,))
    expected = recall_score(
        labels, scores.argmax(1), average=average, zero_division=0, labels=range(8) if average is None else None
    )
    metric = updated(Accuracy(average=average), scores, labels, UNEVEN)
    np.testing.assert_allclose(metric.compute(), expected, atol=1e-15)


@pytest.mark.parametrize(
    ("prediction", "label", "expected"), [(4, 4, 1.0), (4, 5, 0.0), (0.1, 0.1, 1.0), (0.3, 1.0, 0.0), (2, 2.0, 1.0)]
)
def test_equal_numbers_are_right(prediction: float, label: float, expected: float) -> None:
    metric = Accuracy()
    metric.update((prediction, label))
    assert metric.compute() == expected


def test_a_step_that_doubles_its_batch_twice_is_always_right() -> None:
    engine = Engine(lambda engine, batch: {"pred": 2 * batch, "label": 2 * batch})
    engine.add_metric(Accuracy(), "acc")
    for data in ([1, 2, 3], [0.1, 0.2], [torch.arange(4)], [torch.randn(4)]):
        assert engine.run(data).metrics["acc"] == 1.0


def test_probabilities_with_whole_targets_are_binary_without_being_told() -> None:
    metric = Accuracy()
    metric.update((torch.tensor([0.9, 0.2, 0.4]), torch.tensor([1, 0, 1])))
    assert metric.compute() == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        (torch.tensor([2.1, -0.2]), torch.tensor([1, 0])),  # logits; 0.5 would be the wrong threshold
        (torch.tensor([0.9, 0.2]), torch.tensor([1.0, 0.0])),  # what BCELoss takes; equality would always fail
        (torch.tensor([2.0, 1.0]), torch.tensor([2, 1])),
    ],
)
def test_scores_that_could_be_anything_are_an_error_and_never_a_wrong_number(
    prediction: torch.Tensor, target: torch.Tensor
) -> None:
    metric = Accuracy()
    metric.update((prediction, target))
    with pytest.raises(ValueError, match="task='binary'"):
        metric.compute()


@pytest.mark.parametrize("bad", [-1, 5, -100])
@pytest.mark.parametrize("average", ["micro", "macro"])
def test_a_label_outside_the_classes_is_an_error(average: Any, bad: int) -> None:
    labels = torch.tensor([0, 4, bad, 2])
    metric = Accuracy(average=average)
    metric.update((torch.randn(4, 5), labels))
    with pytest.raises(ValueError, match=rf"Accuracy got labels as (low|high) as {bad}, but 5 classes"):
        metric.compute()
    metric.reset()
    metric.update((torch.eye(5), torch.arange(5)))
    assert metric.compute() == 1.0


def test_a_predicted_label_outside_the_classes_is_an_error() -> None:
    metric = Accuracy(num_classes=3)
    metric.update((torch.tensor([0, 3]), torch.tensor([0, 1])))
    with pytest.raises(ValueError, match="as high as 3, but 3 classes have the labels 0 to 2"):
        metric.compute()


@pytest.mark.parametrize("task", ["binary", "multilabel"])
@pytest.mark.parametrize(("target", "message"), [(2, "as high as 2"), (-1, "as low as -1"), (0.3, "no whole numbers")])
def test_a_target_that_is_neither_zero_nor_one_is_an_error(task: Any, target: float, message: str) -> None:
    metric = Accuracy(task)
    metric.update((torch.rand(2, 2), torch.tensor([[0, 1], [1, target]])))
    with pytest.raises(ValueError, match=message):
        metric.compute()


def test_a_target_of_nan_is_an_error() -> None:
    metric = Accuracy("binary")
    metric.update((torch.rand(2), torch.tensor([1.0, torch.nan])))
    with pytest.raises(ValueError, match="no whole numbers"):
        metric.compute()


@pytest.mark.parametrize(
    ("task", "prediction", "target"),
    [
        (None, (4, 5), (3,)),
        (None, (4, 5, 2), (4, 3)),
        (None, (4, 5), (4, 1)),
        (None, (4,), (5,)),
        (None, (4, 0), (4,)),
        ("multiclass", (4, 5), (4, 5)),
        ("binary", (4, 2), (4,)),
        ("binary", (4,), (4, 1)),
        ("multilabel", (4,), (4,)),
        ("multilabel", (4, 3), (4, 2)),
    ],
)
def test_shapes_that_do_not_go_together_are_an_error_that_shows_both(
    task: Any, prediction: tuple[int, ...], target: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match=re.escape(f"shape {prediction} and targets of shape {target}")):
        Accuracy(task).update((torch.rand(prediction), torch.zeros(target, dtype=torch.int64)))


def test_ambiguous_shapes_ask_for_a_task() -> None:
    with pytest.raises(ValueError, match="task='binary' or 'multilabel'"):
        Accuracy().update((torch.rand(4, 3), torch.ones(4, 3, dtype=torch.int64)))


@pytest.mark.parametrize("scores", [(4, 6), (4, 4)])
def test_another_number_of_classes_than_told_is_an_error(scores: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="num_classes=5"):
        Accuracy(num_classes=5).update((torch.rand(scores), torch.zeros(4, dtype=torch.int64)))


@pytest.mark.parametrize("metric", [Accuracy(), Accuracy(average="macro"), TopKAccuracy()])
def test_another_number_of_classes_than_before_is_an_error(metric: Any) -> None:
    metric.update((torch.rand(4, 6), torch.zeros(4, dtype=torch.int64)))
    with pytest.raises(ValueError, match="got 7 classes, but 6 before"):
        metric.update((torch.rand(4, 7), torch.zeros(4, dtype=torch.int64)))


def test_labels_of_a_floating_dtype_are_an_error_beside_scores() -> None:
    with pytest.raises(TypeError, match="whole-number dtype, but got torch.float32"):
        Accuracy().update((torch.rand(4, 6), torch.zeros(4)))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ({"loss": 1, "scores": 2}, r"\['loss', 'scores'\].*output_transform="),
        ((1, 2, 3), "pair"),
        (("a", 1), "'a'"),
        (([torch.tensor(1)], [1]), "list of tensors"),
    ],
)
def test_an_output_that_is_no_pair_is_an_error_that_tells_what_to_do(output: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        Accuracy().update(output)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"task": "regression"}, ValueError),
        ({"num_classes": 0}, ValueError),
        ({"num_classes": 2.5}, TypeError),
        ({"average": "samples"}, ValueError),
        ({"task": "binary", "num_classes": 3}, ValueError),
        ({"task": "multiclass", "threshold": 0.3}, ValueError),
        ({"task": "multilabel", "average": "macro"}, ValueError),
        ({"threshold": "high"}, TypeError),
        ({"output_transform": "pred"}, TypeError),
    ],
)
def test_wrong_arguments_are_an_error_at_once(arguments: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        Accuracy(**arguments)


@pytest.mark.parametrize("metric", [Accuracy(), Accuracy(average="macro"), TopKAccuracy()])
def test_nothing_seen_is_not_computable(metric: Any) -> None:
    with pytest.raises(NotComputableError, match="no sample was seen on any rank"):
        metric.compute()
    metric.update((torch.rand(0, 5), torch.zeros(0, dtype=torch.int64)))
    with pytest.raises(NotComputableError):
        metric.compute()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32, torch.int64, torch.uint16])
def test_labels_of_any_whole_dtype_are_taken(dtype: torch.dtype) -> None:
    for metric in (Accuracy(num_classes=3), Accuracy(num_classes=3, average="macro"), TopKAccuracy(1)):
        metric.update((torch.eye(3), torch.arange(3).to(dtype)))
        assert metric.compute() == 1.0


def test_arrays_and_lists_are_taken() -> None:
    metric = Accuracy()
    metric.update((np.array([[0.1, 0.9]]), np.array([1])))
    metric.update(([1, 0], [1, 1]))
    assert metric.compute() == pytest.approx(2 / 3)


@pytest.mark.parametrize("k", [1, 2, 5, 9])
@pytest.mark.parametrize("rest", [(3, 2), ()])
def test_top_k_is_scikit_learns(k: int, rest: tuple[int, ...]) -> None:
    scores, labels = torch.randn(20, 7, *rest), torch.randint(0, 7, (20, *rest))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # k >= 7: a perfect score
        expected = top_k_accuracy_score(
            labels.flatten(), scores.movedim(1, -1).reshape(-1, 7), k=k, labels=np.arange(7)
        )
    assert updated(TopKAccuracy(k), scores, labels, UNEVEN).compute() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("k", "error"), [(0, ValueError), (1.5, TypeError)])
def test_a_k_that_is_no_count_is_an_error(k: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="k="):
        TopKAccuracy(k)


def test_top_k_refuses_predicted_labels_and_bad_ones() -> None:
    with pytest.raises(ValueError, match=r"\(4,\).*\(4,\)"):
        TopKAccuracy().update((torch.zeros(4), torch.zeros(4, dtype=torch.int64)))
    metric = TopKAccuracy(2)
    metric.update((torch.rand(2, 4), torch.tensor([1, -100])))
    with pytest.raises(ValueError, match="TopKAccuracy got labels as low as -100, but 4 classes"):
        metric.compute()


@settings(deadline=None)  # the machine may be busy
@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30),
    st.lists(st.integers(0, 30), max_size=4),
)
def test_batches_do_not_matter(pairs: list[tuple[int, int]], cuts: list[int]) -> None:
    predicted, labels = torch.tensor(pairs).unbind(1)
    bounds = sorted({0, len(pairs), *(cut for cut in cuts if cut < len(pairs))})
    metric = Accuracy(num_classes=4)
    for start, stop in pairwise(bounds):
        metric.update((predicted[start:stop], labels[start:stop]))
    assert metric.compute() == sum(one == other for one, other in pairs) / len(pairs)
