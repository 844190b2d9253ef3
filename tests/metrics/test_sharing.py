"""Precision and its like are counted once where they are attached together, and only there."""

from typing import Any

import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, precision_score, recall_score

from dengine import Engine, Events
from dengine.metrics import (
    Accuracy,
    ConfusionMatrix,
    DistributedMetric,
    F1Score,
    Precision,
    Recall,
    compute_all,
)
from dengine.metrics.builtin.class_counts import ClassCounts

SCORES, LABELS = torch.randn(20, 4), torch.randint(0, 4, (20,))
BATCHES = list(zip(SCORES.split((5, 15)), LABELS.split((5, 15)), strict=True))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[ClassCounts]:
    """The leaves, once for each update that they got."""
    leaves: list[ClassCounts] = []
    update = ClassCounts.update

    def seen(self: ClassCounts, output: Any) -> None:
        leaves.append(self)
        update(self, output)

    monkeypatch.setattr(ClassCounts, "update", seen)
    return leaves


def engine_with(metrics: dict[str, Any]) -> Engine:
    engine = Engine(lambda engine, batch: batch)
    for name, metric in metrics.items():
        engine.add_metric(metric, name)
    return engine


def expected() -> dict[str, float]:
    predicted = SCORES.argmax(1)
    return {
        "p": precision_score(LABELS, predicted, average="macro"),
        "r": recall_score(LABELS, predicted, average="micro"),
        "f": f1_score(LABELS, predicted, average="weighted"),
    }


def every() -> dict[str, Any]:
    return {"p": Precision(), "r": Recall(average="micro"), "f": F1Score(average="weighted")}


@pytest.mark.parametrize("place", [0, 1, 3])
def test_a_confusion_matrix_counts_for_all_wherever_it_comes_in_the_order(
    place: int, counted: list[ClassCounts]
) -> None:
    named = list(every().items())
    named.insert(place, ("m", ConfusionMatrix()))
    metrics = dict(named)
    values = engine_with(metrics).run(BATCHES, max_epochs=2).metrics
    assert len(counted) == 2 * len(BATCHES)
    assert counted[0].has_matrix
    matrix = values.pop("m")
    assert (matrix.numpy() == confusion_matrix(LABELS, SCORES.argmax(1))).all()
    assert values == pytest.approx(expected())
    # By hand, each still gives this rank's value.
    assert metrics["p"].compute() == pytest.approx(expected()["p"])


def test_metrics_without_a_matrix_keep_no_matrix(counted: list[ClassCounts]) -> None:
    values = engine_with({**every(), "a": Accuracy(average="macro")}).run(BATCHES).metrics
    assert len(counted) == len(BATCHES)
    assert counted[0].counts.shape == (3, 4)
    assert values.pop("a") == pytest.approx(recall_score(LABELS, SCORES.argmax(1), average="macro"))
    assert values == pytest.approx(expected())


def test_metrics_inside_expressions_are_counted_once(counted: list[ClassCounts]) -> None:
    precision, recall = Precision(), Recall()
    engine = engine_with({"f": 2 * precision * recall / (precision + recall), "m": ConfusionMatrix(), "p": precision})
    values = engine.run(BATCHES).metrics
    p, r = (score(LABELS, SCORES.argmax(1), average="macro") for score in (precision_score, recall_score))
    assert values["f"] == pytest.approx(2 * p * r / (p + r))
    assert len(counted) == len(BATCHES)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Precision(), Recall(num_classes=4)),
        (Precision("binary"), Recall("binary", threshold=0.0)),
        (Precision("binary"), Recall("multilabel")),
        (Precision(output_transform=lambda output: output), Recall(output_transform=lambda output: output)),
        (Precision(), Recall(output_transform=lambda output: output)),
        (Precision(), DistributedMetric(Recall())),
    ],
)
def test_metrics_of_different_settings_are_not_shared(first: Any, second: Any) -> None:
    leaves = first.stateful_metrics() + second.stateful_metrics()
    engine_with({"first": first, "second": second})
    assert first.stateful_metrics() + second.stateful_metrics() == leaves


def test_one_transform_is_shared_also_as_a_method(counted: list[ClassCounts]) -> None:
    class Reader:
        def pair(self, output: Any) -> Any:
            return output

    reader = Reader()
    engine_with({"p": Precision(output_transform=reader.pair), "r": Recall(output_transform=reader.pair)}).run(BATCHES)
    assert len(counted) == len(BATCHES)


def test_a_leaf_that_has_counted_already_is_left_alone() -> None:
    first, second = Precision(), Recall()
    second.update(BATCHES[0])
    engine_with({"first": first, "second": second})
    assert first.stateful_metrics() != second.stateful_metrics()
    assert second.compute() == pytest.approx(
        recall_score(BATCHES[0][1], BATCHES[0][0].argmax(1), average="macro", zero_division=0)
    )


def test_metrics_that_shared_a_leaf_in_an_earlier_engine_do_not_in_two_later_ones() -> None:
    precision, recall = Precision(), Recall()
    earlier = engine_with({"p": precision, "r": recall})
    earlier.run(BATCHES)
    del earlier
    engines = [engine_with({"p": precision}), engine_with({"r": recall})]
    assert precision.stateful_metrics() != recall.stateful_metrics()
    engines[1].on(Events.EPOCH_STARTED, lambda engine: engines[0].run(BATCHES))  # one while the other one runs
    values = {**engines[1].run(BATCHES).metrics, **engines[0].state.metrics}
    wanted = {"p": (precision_score, "macro"), "r": (recall_score, "macro")}
    for name, (score, average) in wanted.items():
        assert values[name] == pytest.approx(score(LABELS, SCORES.argmax(1), average=average))


def test_compute_all_joins_nothing_as_metrics_of_ones_own_loop_are_updated_one_by_one() -> None:
    metrics = {**every(), "m": ConfusionMatrix()}
    leaves = {name: metric.stateful_metrics() for name, metric in metrics.items()}
    for batch in BATCHES:
        for metric in metrics.values():
            metric.update(batch)
    values = compute_all(metrics)
    assert {name: metric.stateful_metrics() for name, metric in metrics.items()} == leaves
    assert int(values.pop("m").sum()) == 20
    assert values == pytest.approx(expected())
    for metric in metrics.values():
        metric.reset()
    with pytest.raises(RuntimeError):
        compute_all(metrics)
    assert {name: metric.stateful_metrics() for name, metric in metrics.items()} == leaves
