"""The whole is the same, however the samples are spread over ranks."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dengine import MetricStateError, NotComputableError
from dengine.metrics import (
    MAE,
    MSE,
    RMSE,
    Accuracy,
    Average,
    ConfusionMatrix,
    DistributedAccuracy,
    DistributedMetric,
    F1Score,
    Loss,
    Perplexity,
    Precision,
    R2Score,
    Recall,
    RunningAverage,
    Throughput,
    TopKAccuracy,
)
from dengine.metrics.collection.metric_set import MetricSet


def scores(output: Any) -> Any:
    return output["scores"], output["label"]


def binary(output: Any) -> Any:
    return output["scores"].softmax(1)[:, 0], output["label"] == 0


def multilabel(output: Any) -> Any:
    return output["scores"].sigmoid(), torch.nn.functional.one_hot(output["label"], 4)


def numbers(output: Any) -> Any:
    return output["scores"][:, :2], output["scores"][:, 2:]


def metrics() -> dict[str, Any]:
    """One of each kind, but for those that depend on the order of samples or on time."""
    precision, recall = Precision(output_transform=scores), Recall(output_transform=scores)
    return {
        "accuracy": Accuracy(output_transform=scores),
        "accuracy macro": Accuracy(average="macro", output_transform=scores),
        "accuracy labels": Accuracy(output_transform=lambda output: (output["scores"].argmax(1), output["label"])),
        "accuracy multilabel": Accuracy("multilabel", output_transform=multilabel),
        "top": TopKAccuracy(2, output_transform=scores),
        "precision": precision,
        "recall": recall,
        "f1 of two": 2 * precision * recall / (precision + recall),
        "f1": F1Score(average=None, output_transform=scores),
        "f1 binary": F1Score("binary", output_transform=binary),
        "f1 multilabel": F1Score("multilabel", output_transform=multilabel),
        "confusion": ConfusionMatrix(output_transform=scores),
        "confusion multilabel": ConfusionMatrix("multilabel", output_transform=multilabel),
        "mse": MSE(output_transform=numbers),
        "rmse": RMSE(output_transform=numbers),
        "mae": MAE(output_transform=numbers),
        "r2": R2Score(output_transform=numbers),
        "loss": Loss(cross_entropy, output_transform=scores),
        "average": Average(output_transform=lambda output: output["scores"][:, 0]),
        "perplexity": Perplexity(
            output_transform=lambda output: (cross_entropy(*scores(output)), len(output["label"]))
        ),
        "distributed": DistributedMetric(Accuracy(output_transform=scores)),
        "distributed 2": DistributedMetric(Loss(cross_entropy, output_transform=scores)),
        "distributed 3": DistributedAccuracy(output_transform=scores),
    }


def data(size: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return {
        "scores": torch.randn(size, 4, generator=generator),
        "label": torch.randint(0, 4, (size,), generator=generator),
    }


def shards(whole: Mapping[str, torch.Tensor], num_ranks: int, batch_size: int = 3) -> list[list[dict[str, Any]]]:
    """Every num_ranks-th sample, as a sampler deals them; in batches."""
    return [
        [
            {key: value[rank::num_ranks][start : start + batch_size] for key, value in whole.items()}
            for start in range(0, len(whole["label"][rank::num_ranks]), batch_size)
        ]
        for rank in range(num_ranks)
    ]


@pytest.fixture(scope="module")
def values_of_one_rank() -> dict[int, dict[str, Any]]:
    """Over all samples at once, by their number."""
    values = {}
    for size in range(1, 51):
        together = MetricSet()
        together.add_all(metrics())
        together.update(data(size))
        values[size] = together.compute(distributed=True)
    return values


@pytest.mark.parametrize("num_ranks", [5, 4, 3, 2])
def test_any_number_of_ranks_gives_what_one_gives_for_any_number_of_samples(
    num_ranks: int, over_ranks: Any, values_of_one_rank: Any
) -> None:
    for size in range(1, 51):
        whole = data(size)
        expected = values_of_one_rank[size]
        ranks = over_ranks(metrics, shards(whole, num_ranks))
        assert ranks.values.keys() == expected.keys()
        for name, value in ranks.values.items():
            np.testing.assert_allclose(value, expected[name], rtol=1e-6, err_msg=f"{name} of {size} samples")
            # Counts are exact; what is left is the order of float32 sums inside loss functions.
            if "loss" not in name and name not in ("perplexity", "distributed 2"):
                np.testing.assert_allclose(value, expected[name], rtol=1e-12, atol=1e-13, err_msg=f"{name} of {size}")
        assert ranks.collectives["sum"] == 1
        assert ranks.collectives["max"] == ranks.collectives["gather"] == 0


def test_an_epoch_costs_one_all_reduce_and_nothing_else_once_shapes_are_known(over_ranks: Any) -> None:
    def every() -> dict[str, Any]:
        return {
            "accuracy": Accuracy(),
            "f1": F1Score(num_classes=4),
            "confusion": ConfusionMatrix(num_classes=4),
            "mse": MSE(),
            "running": RunningAverage(output_transform=lambda output: output[0].sum()),
            "speed": Throughput(),
        }

    whole = data(12)
    labels = [[(whole["label"][rank::3], whole["label"][rank::3])] for rank in range(3)]
    ranks = over_ranks(every, labels)
    assert ranks.values["f1"] == 1.0
    assert ranks.collectives == {"sum": 1}


@pytest.mark.parametrize("bad_rank", [0, 2])
@pytest.mark.parametrize("kind", [Accuracy, TopKAccuracy, Precision, F1Score, ConfusionMatrix])
def test_a_bad_label_of_one_rank_is_the_same_error_on_every_rank(kind: Any, bad_rank: int, over_ranks: Any) -> None:
    batches: list[list[Any]] = [[(torch.eye(4), torch.arange(4))], [], [(torch.eye(4), torch.arange(4))]]
    batches[bad_rank].append((torch.eye(4), torch.tensor([0, 1, -7, 3])))
    outcomes = over_ranks(lambda: {"score": kind()}, batches).outcomes
    assert all(type(outcome) is ValueError for outcome in outcomes)
    message = f"Metric 'score' cannot be computed: {kind.__name__} got labels as low as -7, but 4 classes"
    assert all(str(outcome).startswith(message) for outcome in outcomes)


@pytest.mark.parametrize("name", [*metrics(), "running", "speed"])
def test_nothing_seen_on_any_rank_names_the_metric_on_every_rank(name: str, over_ranks: Any) -> None:
    every = {"running": RunningAverage, "speed": Throughput}
    outcomes = over_ranks(lambda: {name: every[name]() if name in every else metrics()[name]}, [[], [], []]).outcomes
    assert all(isinstance(outcome, NotComputableError) and f"Metric '{name}'" in str(outcome) for outcome in outcomes)


def test_ranks_of_different_classes_are_an_error_on_every_rank(over_ranks: Any) -> None:
    batches = [[(torch.rand(2, 4), torch.tensor([0, 1]))], [(torch.rand(2, 5), torch.tensor([0, 1]))], []]
    outcomes = over_ranks(lambda: {"acc": Accuracy()}, batches).outcomes
    assert all(isinstance(outcome, ValueError) and "4 and 5 classes" in str(outcome) for outcome in outcomes)
    outcomes = over_ranks(lambda: {"f1": F1Score()}, batches).outcomes
    assert all(isinstance(outcome, MetricStateError) and "'f1'" in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize(("op", "expected"), [("mean", 10 / 4), ("sum", 5.0), ("max", 3.0), ("min", 2.0)])
def test_a_distributed_metric_leaves_out_empty_ranks(op: Any, expected: float, over_ranks: Any) -> None:
    batches = [[], [torch.tensor([2.0, 2.0])], [torch.tensor([3.0]), torch.tensor([3.0])], [torch.empty(0)]]
    ranks = over_ranks(lambda: {"value": DistributedMetric(Average(), op)}, batches)
    assert ranks.values == {"value": expected}


def test_local_states_are_left_alone_by_a_reduction(over_ranks: Any) -> None:
    made: list[dict[str, Any]] = []

    def make() -> dict[str, Any]:
        made.append(metrics())
        return made[-1]

    parts = shards(data(9), 2)
    assert over_ranks(make, parts).values["confusion"].sum() == 9
    untouched = []
    for part in parts:
        untouched.append(metrics())
        together = MetricSet()
        together.add_all(untouched[-1])
        for output in part:
            together.update(output)
    # Threads make theirs in any order; the ranks differ in size.
    for group in (made, untouched):
        group.sort(key=lambda one: int(one["confusion"].compute().sum()))
    for reduced, expected in zip(made, untouched, strict=True):
        for name, metric in reduced.items():
            np.testing.assert_array_equal(metric.compute(), expected[name].compute(), err_msg=name)
