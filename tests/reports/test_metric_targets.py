"""Soft targets, scores that are nan, and `ignore_index`: the right number, or an error that says what to do."""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    multilabel_confusion_matrix,
    precision_score,
    recall_score,
    top_k_accuracy_score,
)

from dengine import Engine, NotComputableError
from dengine.metrics import (
    Accuracy,
    ConfusionMatrix,
    DistributedAccuracy,
    F1Score,
    Precision,
    Recall,
    TopKAccuracy,
)

SIZES = (0, 1, 7, 0, 12)
RATIOS: list[tuple[Any, Any]] = [(Precision, precision_score), (Recall, recall_score), (F1Score, f1_score)]
CLASS_METRICS: list[Any] = [
    Accuracy,
    lambda **kwargs: Accuracy(average="macro", **kwargs),
    DistributedAccuracy,
    lambda **kwargs: TopKAccuracy(2, **kwargs),
    Precision,
    Recall,
    F1Score,
    ConfusionMatrix,
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def computed(metric: Any, prediction: torch.Tensor, target: torch.Tensor) -> Any:
    for batch in zip(prediction.split(SIZES), target.split(SIZES), strict=True):
        metric.update(batch)
    return metric.compute()


# -- soft targets ------------------------------------------------------------------------------------------------


def smoothed(labels: torch.Tensor, num_classes: int = 4) -> torch.Tensor:
    return torch.nn.functional.one_hot(labels, num_classes).movedim(-1, 1).float() * 0.9 + 0.1 / num_classes


@pytest.mark.parametrize("make", CLASS_METRICS)
@pytest.mark.parametrize("rest", [(), (3,), (2, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_of_class_probabilities_the_likeliest_class_counts(make: Any, rest: Any, dtype: torch.dtype) -> None:
    scores, labels = torch.randn(20, 4, *rest), torch.randint(0, 4, (20, *rest))
    expected = computed(make(), scores, labels)
    found = computed(make(), scores, smoothed(labels).to(dtype))
    np.testing.assert_array_equal(found, expected)


def test_mixed_up_samples_have_the_class_that_most_of_them_is() -> None:
    metric = Accuracy(num_classes=3)
    metric.update((torch.tensor([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2]]), torch.tensor([[0.3, 0.7, 0.0], [0.0, 0.4, 0.6]])))
    assert metric.compute() == 0.5


@pytest.mark.parametrize(
    ("prediction", "target"),
    [
        (torch.rand(8), torch.full((8,), 0.9)),
        (torch.rand(8, 1), torch.full((8, 1), 0.05)),
        (torch.rand(8), torch.tensor([0.0, 1.0] * 4)),
        (torch.rand(2, 1, 4, 4), torch.full((2, 1, 4, 4), 0.9)),
        (torch.rand(8, 3), torch.full((8, 3), 0.9)),
        (torch.rand(8, 3), torch.ones(8, 3)),
        (torch.rand(8, 3), torch.zeros(8, 3)),
        (torch.rand(8, 3), torch.full((8, 3), torch.nan)),
        (torch.rand(8, 3), torch.tensor([[1.5, -0.5, 0.0]] * 8)),
        (torch.randint(0, 2, (8,)), torch.full((8,), 0.9)),
        (torch.randint(0, 2, (8, 3)), torch.full((8, 3), 0.9)),
        (torch.full((8,), torch.nan), torch.zeros(8)),
    ],
)
def test_soft_targets_that_are_no_class_probabilities_are_refused_and_never_compared(
    prediction: torch.Tensor, target: torch.Tensor
) -> None:
    metric = Accuracy()
    metric.update((prediction, target))
    with pytest.raises(ValueError, match="task='binary'"):
        metric.compute()


@pytest.mark.parametrize("make", [Accuracy, Precision, Recall, F1Score, ConfusionMatrix])
@pytest.mark.parametrize(("task", "shape"), [("binary", (8,)), ("binary", (8, 1)), ("multilabel", (8, 3))])
def test_soft_answers_of_yes_and_no_are_refused_with_the_way_out(make: Any, task: str, shape: Any) -> None:
    metric = make(task)
    metric.update((torch.rand(shape), torch.full(shape, 0.9)))
    with pytest.raises(ValueError, match=r"no whole numbers.*target > 0.5"):
        metric.compute()


def test_soft_targets_of_one_rank_are_refused_on_all(over_ranks: Any) -> None:
    good = torch.eye(3), torch.eye(3)
    bad = torch.rand(2, 3), torch.ones(2, 3)
    ranks = over_ranks(lambda: {"acc": Accuracy(), "f1": F1Score()}, [[good], [bad], []])
    assert all(isinstance(outcome, ValueError) and "add up to 1" in str(outcome) for outcome in ranks.outcomes)


def test_whole_labels_of_a_floating_dtype_are_labels() -> None:
    metric = Accuracy()
    metric.update((torch.tensor([2.0, 1.0, 0.0]), torch.tensor([2.0, 1.0, 1.0])))
    assert metric.compute() == pytest.approx(2 / 3)


@pytest.mark.parametrize("num_classes", [None, 3])
def test_predictions_of_yes_and_no_are_labels_beside_labels(num_classes: int | None) -> None:
    metric = Accuracy(num_classes=num_classes)
    metric.update((torch.tensor([True, True, False]), torch.tensor([2, 1, 0])))
    assert metric.compute() == pytest.approx(2 / 3)


# -- scores that are nan -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CLASS_METRICS)
@pytest.mark.parametrize("rest", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("is_whole_row", [True, False])
def test_scores_that_are_nan_are_an_error(make: Any, rest: Any, dtype: torch.dtype, is_whole_row: bool) -> None:
    scores, labels = torch.randn(40, 4, *rest).to(dtype), torch.zeros(40, *rest, dtype=torch.int64)
    scores[7, slice(None) if is_whole_row else 2] = torch.nan
    metric = make()
    for batch in zip(scores.split(4), labels.split(4), strict=True):
        metric.update(batch)
    with pytest.raises(ValueError, match="scores that are nan"):
        metric.compute()
    metric.reset()
    metric.update((torch.eye(4), torch.arange(4)))
    metric.compute()


@pytest.mark.parametrize("make", [Accuracy, Precision, Recall, F1Score, ConfusionMatrix])
@pytest.mark.parametrize(("task", "shape"), [("binary", (8,)), ("binary", (8, 1)), ("multilabel", (8, 3))])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32])
def test_scores_of_yes_and_no_that_are_nan_are_an_error(make: Any, task: str, shape: Any, dtype: torch.dtype) -> None:
    metric = make(task)
    metric.update((torch.full(shape, torch.nan), torch.zeros(shape, dtype=dtype)))
    with pytest.raises(ValueError, match="scores that are nan"):
        metric.compute()


def test_probabilities_that_are_nan_are_an_error_where_the_task_is_told_by_shapes() -> None:
    metric = Accuracy()
    metric.update((torch.tensor([0.2, torch.nan]), torch.tensor([0, 0])))
    with pytest.raises(ValueError, match="probabilities"):
        metric.compute()


def test_infinite_scores_are_scores() -> None:
    metric = Accuracy()
    metric.update((torch.tensor([[-torch.inf, torch.inf], [torch.inf, -torch.inf]]), torch.tensor([1, 0])))
    assert metric.compute() == 1.0


def test_a_nan_on_one_rank_is_an_error_on_all_in_the_same_collective(over_ranks: Any) -> None:
    good = torch.eye(3), torch.arange(3)
    bad = torch.full((3, 3), torch.nan), torch.arange(3)
    ranks = over_ranks(lambda: {"acc": Accuracy(), "top": TopKAccuracy(1), "f1": F1Score()}, [[good], [bad], []])
    assert all(isinstance(outcome, ValueError) and "nan" in str(outcome) for outcome in ranks.outcomes)
    assert ranks.collectives["sum"] == 1


# -- ignore_index ------------------------------------------------------------------------------------------------

IGNORED = [-100, -1, 0, 2, 255]


@pytest.mark.parametrize("make", CLASS_METRICS)
@pytest.mark.parametrize("ignore_index", IGNORED)
@pytest.mark.parametrize("rest", [(), (3,), (2, 5)])
def test_ignored_labels_are_left_out_in_value_and_count(make: Any, ignore_index: int, rest: Any) -> None:
    scores, labels = torch.randn(20, 5, *rest), torch.randint(0, 5, (20, *rest))
    labels[torch.rand(labels.shape) < 0.4] = ignore_index
    found = computed(make(ignore_index=ignore_index), scores, labels)
    kept = labels != ignore_index
    without = make()
    without.update((scores.movedim(1, -1)[kept], labels[kept]))
    np.testing.assert_allclose(found, without.compute(), atol=1e-15)


@pytest.mark.parametrize("ignore_index", IGNORED)
def test_the_metrics_of_what_is_kept_are_scikit_learns(ignore_index: int) -> None:
    scores, labels = torch.randn(20, 5), torch.randint(0, 5, (20,))
    labels[::3] = ignore_index
    kept = labels != ignore_index
    true, predicted = labels[kept], scores.argmax(1)[kept]
    assert computed(Accuracy(ignore_index=ignore_index), scores, labels) == accuracy_score(true, predicted)
    matrix = computed(ConfusionMatrix(ignore_index=ignore_index), scores, labels)
    np.testing.assert_array_equal(matrix, confusion_matrix(true, predicted, labels=range(5)))
    top = computed(TopKAccuracy(3, ignore_index=ignore_index), scores, labels)
    assert top == pytest.approx(top_k_accuracy_score(true, scores[kept], k=3, labels=range(5)))
    for kind, reference in RATIOS:
        found = computed(kind(ignore_index=ignore_index), scores, labels)
        assert found == pytest.approx(reference(true, predicted, average="macro", zero_division=0))


@pytest.mark.parametrize("ignore_index", IGNORED)
@pytest.mark.parametrize("num_classes", [None, 5])
def test_ignored_positions_may_hold_any_prediction(ignore_index: int, num_classes: int | None) -> None:
    predicted, labels = torch.tensor([4, 1, -7, 3]), torch.tensor([4, 3, ignore_index, 3])
    kinds: list[Any] = [Accuracy] if num_classes is None else [Accuracy, Recall, ConfusionMatrix]
    for kind in kinds:
        metric = kind(num_classes=num_classes, ignore_index=ignore_index)
        metric.update((predicted, labels))
        expected = kind(num_classes=num_classes)
        expected.update((torch.tensor([4, 1, 3]), torch.tensor([4, 3, 3])))
        np.testing.assert_array_equal(metric.compute(), expected.compute())


@pytest.mark.parametrize("kind", [Accuracy, Precision, Recall, F1Score, ConfusionMatrix])
@pytest.mark.parametrize("ignore_index", [-1, 0, 1, 255])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32])
def test_a_binary_target_is_ignored(kind: Any, ignore_index: int, dtype: torch.dtype) -> None:
    scores, targets = torch.rand(20), torch.randint(0, 2, (20,))
    targets[::4] = ignore_index
    kept = targets != ignore_index
    metric, expected = kind("binary", ignore_index=ignore_index), kind("binary")
    expected.update((scores[kept], targets[kept]))
    np.testing.assert_allclose(computed(metric, scores, targets.to(dtype)), expected.compute(), atol=1e-15)


@pytest.mark.parametrize("ignore_index", [-1, 255])
@pytest.mark.parametrize("average", ["micro", "macro", "weighted", None])
@pytest.mark.parametrize(("kind", "reference"), RATIOS)
@pytest.mark.parametrize("rest", [(), (3,)])
def test_single_labels_of_a_multilabel_sample_are_ignored(
    kind: Any, reference: Any, average: Any, ignore_index: int, rest: Any
) -> None:
    scores, targets = torch.rand(20, 3, *rest), torch.randint(0, 2, (20, 3, *rest))
    is_ignored = torch.rand(targets.shape) < 0.3
    found = computed(
        kind("multilabel", average=average, ignore_index=ignore_index),
        scores,
        targets.masked_fill(is_ignored, ignore_index),
    )
    # Neither predicted nor there: what is ignored adds to no count.
    predicted, true = ((part * ~is_ignored).movedim(1, -1).reshape(-1, 3) for part in ((scores > 0.5).long(), targets))
    np.testing.assert_allclose(found, reference(true, predicted, average=average, zero_division=0), atol=1e-15)


def test_the_multilabel_matrix_leaves_out_ignored_labels() -> None:
    scores, targets = torch.rand(20, 3), torch.randint(0, 2, (20, 3))
    is_ignored = torch.rand(targets.shape) < 0.3
    found = computed(ConfusionMatrix("multilabel", ignore_index=-1), scores, targets.masked_fill(is_ignored, -1))
    for label in range(3):
        kept = ~is_ignored[:, label]
        expected = confusion_matrix(targets[kept, label], scores[kept, label] > 0.5, labels=[0, 1])
        np.testing.assert_array_equal(found[label], expected)
    assert multilabel_confusion_matrix(targets, scores > 0.5).sum() > found.sum()


def test_a_multilabel_sample_is_right_where_its_labels_that_count_are() -> None:
    targets = torch.tensor([[1, -1, 0], [1, 0, -1], [-1, -1, -1], [-1, 0, 0]])
    scores = torch.tensor([[0.9, 0.9, 0.1], [0.1, 0.1, 0.9], [0.9, 0.1, 0.9], [0.9, 0.1, 0.1]])
    metric = Accuracy("multilabel", ignore_index=-1)
    metric.update((scores, targets))
    assert metric.compute() == pytest.approx(2 / 3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.bool])
def test_an_index_that_the_labels_dtype_cannot_hold_ignores_nothing(dtype: torch.dtype) -> None:
    labels = torch.tensor([156, 0]).to(dtype) if dtype == torch.uint8 else torch.tensor([1, 0]).to(dtype)
    metric = Accuracy(num_classes=157, ignore_index=-100 if dtype == torch.uint8 else 2**40)
    metric.update((torch.tensor([156 if dtype == torch.uint8 else 1, 1]), labels))
    assert metric.compute() == 0.5


def test_numbers_are_ignored_too() -> None:
    metric = Accuracy(ignore_index=-1)
    for pair in ((1, 1), (2, -1), (0, 3)):
        metric.update(pair)
    assert metric.compute() == 0.5


@pytest.mark.parametrize("make", CLASS_METRICS)
def test_a_label_outside_the_classes_that_is_not_ignored_is_an_error_still(make: Any) -> None:
    metric = make(ignore_index=-100)
    metric.update((torch.randn(3, 5), torch.tensor([0, -100, -1])))
    with pytest.raises(ValueError, match="as low as -1"):
        metric.compute()


@pytest.mark.parametrize("make", CLASS_METRICS)
def test_scores_beside_ignored_labels_may_be_nan(make: Any) -> None:
    scores = torch.randn(4, 5)
    scores[2] = torch.nan
    metric = make(ignore_index=-100)
    metric.update((scores, torch.tensor([0, 1, -100, 3])))
    metric.compute()


@pytest.mark.parametrize("make", CLASS_METRICS)
def test_where_all_is_ignored_nothing_was_seen(make: Any) -> None:
    metric = make(ignore_index=-100)
    metric.update((torch.randn(3, 5), torch.full((3,), -100)))
    with pytest.raises(NotComputableError):
        metric.compute()


@pytest.mark.parametrize("make", CLASS_METRICS)
def test_probabilities_cannot_be_ignored_by_an_index(make: Any) -> None:
    with pytest.raises(ValueError, match=r"ignore_index=-100 got targets of shape \(3, 5\)"):
        make(ignore_index=-100).update((torch.randn(3, 5), torch.eye(5)[:3]))


@pytest.mark.parametrize("make", CLASS_METRICS)
@pytest.mark.parametrize("bad", [0.5, "0", True])
def test_an_index_that_is_no_whole_number_is_an_error_at_once(make: Any, bad: Any) -> None:
    with pytest.raises(TypeError, match="ignore_index="):
        make(ignore_index=bad)


def test_metrics_that_ignore_differently_do_not_share_their_counts() -> None:
    scores, labels = torch.randn(20, 5), torch.randint(0, 5, (20,))
    engine = Engine(lambda engine, batch: batch)
    engine.add_metrics({"all": Recall(), "some": Recall(ignore_index=0), "same": Precision(ignore_index=0)})
    metrics = engine.run([(scores, labels)]).metrics
    kept = labels != 0
    assert metrics["all"] == pytest.approx(recall_score(labels, scores.argmax(1), average="macro", zero_division=0))
    expected = recall_score(labels[kept], scores.argmax(1)[kept], average="macro", zero_division=0)
    assert metrics["some"] == pytest.approx(expected)


def test_ranks_that_keep_different_numbers_of_labels_give_what_one_would(over_ranks: Any) -> None:
    scores, labels = torch.randn(20, 5), torch.randint(0, 5, (20,))
    labels[:8] = -1
    many = torch.randint(-1, 2, (20, 5))

    def make() -> dict[str, Any]:
        return {
            "acc": Accuracy(ignore_index=-1),
            "macro": F1Score(ignore_index=-1),
            "matrix": ConfusionMatrix(ignore_index=-1),
            "top": TopKAccuracy(2, ignore_index=-1),
        }

    def make_many() -> dict[str, Any]:
        return {
            "matrix": ConfusionMatrix("multilabel", ignore_index=-1),
            "subset": Accuracy("multilabel", ignore_index=-1),
            "samples": F1Score("multilabel", average="samples", ignore_index=-1),
        }

    for build, prediction, target in ((make, scores, labels), (make_many, scores.sigmoid(), many)):
        shards = [[(prediction[:7], target[:7])], [], [(prediction[7:9], target[7:9]), (prediction[9:], target[9:])]]
        expected = over_ranks(build, [[(prediction, target)]]).values
        found = over_ranks(build, shards).values
        for name, value in expected.items():
            np.testing.assert_allclose(found[name], value, atol=1e-12, err_msg=name)


# -- average="samples" -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "reference"), RATIOS)
@pytest.mark.parametrize("rest", [(), (3,)])
@pytest.mark.parametrize("is_scores", [True, False])
def test_the_mean_over_samples_is_scikit_learns(kind: Any, reference: Any, rest: Any, is_scores: bool) -> None:
    scores, targets = torch.rand(20, 4, *rest), torch.randint(0, 2, (20, 4, *rest))
    targets[3], scores[3] = 0, 0.0  # neither predicted nor there
    targets[4], scores[5] = 0, 0.0
    flat = [part.movedim(1, -1).reshape(-1, 4) for part in (scores, targets)]
    expected = reference(flat[1], flat[0] > 0.5, average="samples", zero_division=0)
    found = computed(kind("multilabel", average="samples"), scores if is_scores else (scores > 0.5).long(), targets)
    assert found == pytest.approx(expected, abs=1e-12)


def test_means_over_samples_are_counted_once_where_they_are_attached_together() -> None:
    scores, targets = torch.rand(20, 4), torch.randint(0, 2, (20, 4))
    engine = Engine(lambda engine, batch: batch)
    engine.add_metrics({kind.__name__: kind("multilabel", average="samples") for kind, _ in RATIOS})
    metrics = engine.run([(scores[:7], targets[:7]), (scores[7:], targets[7:])]).metrics
    for kind, reference in RATIOS:
        expected = reference(targets, scores > 0.5, average="samples", zero_division=0)
        assert metrics[kind.__name__] == pytest.approx(expected)


@pytest.mark.parametrize("kind", [Precision, Recall, F1Score])
def test_labels_of_a_sample_that_are_ignored_are_in_no_mean(kind: Any) -> None:
    scores = torch.tensor([[0.9, 0.1, 0.9], [0.9, 0.9, 0.9]])
    metric, expected = (kind("multilabel", average="samples", ignore_index=index) for index in (-1, None))
    metric.update((scores, torch.tensor([[1, 1, -1], [-1, -1, -1]])))
    expected.update((scores[:1, :2], torch.tensor([[1, 1]])))
    assert metric.compute() == expected.compute()


@pytest.mark.parametrize("kind", [Accuracy, Precision, Recall, F1Score])
@pytest.mark.parametrize("task", [None, "binary", "multiclass"])
def test_a_mean_over_samples_needs_several_labels_a_sample(kind: Any, task: Any) -> None:
    with pytest.raises(ValueError, match=r"average='samples'.*multilabel"):
        kind(task, average="samples")


# -- mappings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", CLASS_METRICS)
def test_a_mapping_is_read_by_its_keys_wherever_it_comes_from(make: Any) -> None:
    scores, labels = torch.randn(6, 4), torch.randint(0, 4, (6,))
    expected = make()
    expected.update((scores, labels))
    by_hand = make()
    by_hand.update({"y_pred": scores, "y": labels})
    np.testing.assert_array_equal(by_hand.compute(), expected.compute())
    if make is not DistributedAccuracy:
        engine = Engine(lambda engine, batch: batch)
        engine.add_metric(make(output_transform=lambda output: {"logits": output[0], "labels": output[1]}), "value")
        found = engine.run([(scores, labels)]).metrics["value"]
        np.testing.assert_array_equal(found, expected.compute())


@pytest.mark.parametrize("make", CLASS_METRICS)
def test_a_mapping_as_prediction_is_an_error_that_lists_its_keys(make: Any) -> None:
    with pytest.raises(TypeError, match=r"\['logits', 'loss'\].*output_transform="):
        make().update(({"loss": 0.5, "logits": torch.randn(6, 4)}, torch.zeros(6, dtype=torch.int64)))


def test_a_parameter_of_a_lazy_module_is_an_error_that_says_so() -> None:
    with pytest.raises(TypeError, match="lazy module"):
        Accuracy().update((torch.nn.LazyLinear(4).weight, torch.zeros(6, dtype=torch.int64)))
