"""Metrics over real ranks: equal to one process over the union of the data, in one collective."""

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torchmetrics
from ranks import run_ranks
from torchmetrics import classification

from dengine import Engine, Events, distributed
from dengine.control.plane import plane
from dengine.errors import MetricStateError
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
    Metric,
    Perplexity,
    Precision,
    R2Score,
    Recall,
    RunningAverage,
    TopKAccuracy,
    compute_all,
)
from dengine.torch_internals import num_collectives

COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_object",
    "broadcast",
    "broadcast_object_list",
    "barrier",
    "all_gather_into_tensor",
    "reduce",
    "gather",
    "gather_object",
)


@contextmanager
def recorded_collectives() -> Iterator[list[str]]:
    """The names of torch.distributed's collectives in the order of their calls."""
    calls: list[str] = []
    real = {name: getattr(dist, name) for name in COLLECTIVES}
    for name, function in real.items():
        setattr(dist, name, lambda *a, name=name, function=function, **o: (calls.append(name), function(*a, **o))[1])
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def classified(size: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * size + seed)
    return torch.randn(size, 5, generator=generator), torch.randint(0, 5, (size,), generator=generator)


def batches_of(rank: int, size: int, *tensors: torch.Tensor, batch_size: int = 3) -> list[tuple[torch.Tensor, ...]]:
    """This rank's shard, every `size`-th sample, in batches; empty where there are fewer samples than ranks."""
    mine = [tensor[rank::size] for tensor in tensors]
    return list(zip(*(part.split(batch_size) for part in mine), strict=True)) if len(mine[0]) else []


def first(output: Any) -> Any:
    return output[0]


def as_regression(output: Any) -> Any:
    prediction, target = output
    return prediction[:, 0].double() + 1e8, target.double() + 1e8


def as_loss(output: Any) -> Any:
    return output[0][:, 0].double().mean(), len(output[0])


def all_metrics() -> dict[str, Any]:
    cross_entropy = torch.nn.CrossEntropyLoss()
    precision, recall = Precision(average="macro"), Recall(average="macro")
    return {
        "acc": Accuracy(),
        "top2": TopKAccuracy(k=2),
        "precision": precision,
        "recall": recall,
        "f1": F1Score(average="weighted"),
        "by_hand": 2 * precision * recall / (precision + recall + 1e-12),
        "confusion": ConfusionMatrix(num_classes=5),
        "loss": Loss(cross_entropy),
        "average": Average(output_transform=as_loss),
        "perplexity": Perplexity(output_transform=as_loss),
        "mse": MSE(output_transform=as_regression),
        "rmse": RMSE(output_transform=as_regression),
        "mae": MAE(output_transform=as_regression),
        "dacc": DistributedMetric(Accuracy(), "mean"),
        "dacc2": DistributedAccuracy(),
        "r2": R2Score(output_transform=as_regression),
    }


def values_for_sizes(rank: int, size: int, lengths: list[int]) -> list[dict[str, Any]]:
    """One engine for each length, as a user would have it, over this rank's shard."""
    found = []
    for length in lengths:
        evaluator = Engine(lambda engine, batch: batch)
        metrics = all_metrics()
        if length == 1:
            del metrics["r2"]  # undefined for one sample
        evaluator.add_metrics(metrics)
        evaluator.run(batches_of(rank, size, *classified(length)))
        found.append(dict(evaluator.state.metrics))
    return found


def test_any_number_of_ranks_gives_what_one_gives_for_every_size_from_1_to_50() -> None:
    lengths = list(range(1, 51))
    (expected,) = run_ranks(values_for_sizes, 1, lengths)
    for size in (2, 3, 4, 5):
        ranks = run_ranks(values_for_sizes, size, lengths, deadline_s=150)
        for rank, found in enumerate(ranks):
            for length, values, wanted in zip(lengths, found, expected, strict=True):
                assert values.keys() == wanted.keys()
                for name, value in values.items():
                    # Sums of floats are added in another order: the last bits of a float64 may differ.
                    torch.testing.assert_close(
                        torch.as_tensor(value, dtype=torch.float64),
                        torch.as_tensor(wanted[name], dtype=torch.float64),
                        # The loss function itself takes its mean of each batch in float32.
                        rtol={"r2": 1e-7, "loss": 1e-6}.get(name, 1e-12),
                        atol=1e-12,
                        msg=lambda text, where=(size, rank, length, name): f"{where}: {text}",
                    )
                for name in ("acc", "top2", "confusion"):
                    assert torch.equal(torch.as_tensor(values[name]), torch.as_tensor(wanted[name]))


def test_one_process_is_judged_by_hand() -> None:
    (found,) = run_ranks(values_for_sizes, 1, [50])
    prediction, target = classified(50)
    values = found[0]
    assert values["acc"] == (prediction.argmax(1) == target).double().mean().item()
    assert values["loss"] == pytest.approx(torch.nn.functional.cross_entropy(prediction, target).item(), rel=1e-6)
    assert values["perplexity"] == pytest.approx(math.exp(prediction[:, 0].double().mean().item()))


# -- how many collectives ------------------------------------------------------------------------------------------


def sum_metrics(count: int) -> dict[str, Any]:
    kinds: list[Callable[[], Any]] = [
        Accuracy,
        lambda: Precision(num_classes=5),
        lambda: F1Score(num_classes=5, average="macro"),
        lambda: Loss(torch.nn.CrossEntropyLoss()),
        lambda: classification.MulticlassF1Score(5),
        lambda: torchmetrics.MeanMetric(),
        lambda: ConfusionMatrix(num_classes=5),
        lambda: TopKAccuracy(k=2),
    ]
    return {f"m{i}": kinds[i % len(kinds)]() for i in range(count)}


def collectives_of_epochs(rank: int, size: int, count: int, extremes: bool) -> list[list[str]]:
    evaluator = Engine(lambda engine, batch: batch)
    for name, metric in sum_metrics(count).items():
        is_mean = isinstance(metric, torchmetrics.MeanMetric)
        evaluator.add_metric(metric, name, output_transform=first if is_mean else None)
    if extremes:
        evaluator.add_metric(Extremes(), "extremes")
    epochs: list[list[str]] = []
    with recorded_collectives() as calls:
        evaluator.on(Events.ITERATION_COMPLETED, lambda engine: calls.clear())
        evaluator.on(Events.EPOCH_COMPLETED, lambda engine: epochs.append(list(calls)))
        evaluator.run(batches_of(rank, size, *classified(20)), max_epochs=3)
    return epochs


@pytest.mark.parametrize("count", [1, 8, 32])
def test_the_end_of_an_epoch_costs_one_collective_for_any_number_of_sum_metrics(count: int) -> None:
    assert run_ranks(collectives_of_epochs, 2, count, False) == [[["all_reduce"]] * 3] * 2


def test_minima_cost_one_more_and_joined_states_one_gather() -> None:
    first_epoch, *others = run_ranks(collectives_of_epochs, 2, 8, True)[0]
    assert others == [["all_reduce", "all_reduce", "all_gather"]] * 2
    # In the first epoch the ranks also agree upon what will be joined.
    assert [name for name in first_epoch if name != "all_gather_object"] == others[0]


def classes_inferred(rank: int, size: int) -> tuple[list[list[str]], float]:
    evaluator = Engine(lambda engine, batch: batch)
    evaluator.add_metric(F1Score(average="macro"), "f1")
    epochs: list[list[str]] = []
    with recorded_collectives() as calls:
        evaluator.on(Events.ITERATION_COMPLETED, lambda engine: calls.clear())
        evaluator.on(Events.EPOCH_COMPLETED, lambda engine: epochs.append(list(calls)))
        # Rank 1 sees nothing in the first run, and cannot know the number of classes.
        evaluator.run(batches_of(rank, size, *classified(1)))
        calls.clear()
        evaluator.run(batches_of(rank, size, *classified(20)))
    return epochs, float(evaluator.state.metrics["f1"])


def test_a_number_of_classes_that_one_rank_cannot_know_is_agreed_upon_once() -> None:
    ranks = run_ranks(classes_inferred, 2)
    first_epoch, second_epoch = ranks[0][0]
    assert first_epoch.count("all_reduce") == 1
    assert second_epoch == ["all_reduce"]
    assert ranks[0][1] == ranks[1][1]


# -- states of every kind ----------------------------------------------------------------------------------------


class Extremes(Metric):
    """Every reduction at once; big numbers, and a rank that may see nothing."""

    low: Any
    high: Any
    labels: Any
    scores: Any
    big: Any

    def __init__(self) -> None:
        super().__init__()
        self.add_state("low", math.inf, "min")
        self.add_state("high", -(2**62), "max")
        self.add_state("labels", [], "cat")
        self.add_state("scores", [], "cat")
        self.add_state("big", 0, "sum")
        self.add_state("mean", 0.0, "mean")

    def update(self, output: Any) -> None:
        prediction, target = output
        self.low = torch.minimum(torch.as_tensor(self.low), prediction.min())
        self.high = torch.maximum(torch.as_tensor(self.high), target.max() + 2**60)
        self.labels.append(target)
        self.scores.append(prediction)
        self.big += 2**53 + 1
        self.mean = float(len(self.labels))

    def compute(self) -> Any:
        return {
            "low": self.low,
            "high": self.high,
            "labels": self.labels,
            "scores": self.scores,
            "big": self.big,
            "mean": self.mean,
        }


def extremes(rank: int, size: int, length: int) -> dict[str, Any]:
    metric = Extremes()
    for batch in batches_of(rank, size, *classified(length)):
        metric.update(batch)
    labels_before = len(metric.labels)
    values = compute_all({"x": metric})
    again = compute_all({"x": metric})
    assert len(metric.labels) == labels_before, "the local state was touched"
    assert all(torch.equal(torch.as_tensor(values[key]), torch.as_tensor(again[key])) for key in values)
    return dict(values)


@pytest.mark.parametrize(("size", "length"), [(2, 1), (3, 2), (2, 7), (3, 50), (4, 3)])
def test_every_reduction_is_exact_also_with_a_rank_that_saw_nothing(size: int, length: int) -> None:
    prediction, target = classified(length)
    shards = [batches_of(rank, size, prediction, target) for rank in range(size)]
    num_batches = [len(shard) for shard in shards]
    for found in run_ranks(extremes, size, length):
        assert found["x/low"] == prediction.min().item()
        assert found["x/high"] == target.max().item() + 2**60
        assert found["x/big"] == sum(num_batches) * (2**53 + 1)
        assert found["x/mean"] == pytest.approx(sum(num_batches) / sum(count > 0 for count in num_batches))
        assert torch.equal(found["x/labels"], torch.cat([target[rank::size] for rank in range(size)]))
        assert torch.equal(found["x/scores"], torch.cat([prediction[rank::size] for rank in range(size)]))


def goes_on(rank: int, size: int) -> list[float]:
    metric = Accuracy()
    values = []
    for label in (0, 1):
        metric.update((torch.tensor([rank * label]), torch.tensor([0])))
        values.append(float(compute_all({"a": metric})["a"]))
    return values


def called_again(rank: int, size: int) -> dict[str, Any]:
    """Values of metrics that are made anew for each call, as in a function that evaluates, and what it costs."""
    found: dict[str, Any] = {"values": [], "calls": []}
    with distributed.process_group():
        for length in (9, 8, 1, 9):  # of one sample, ranks have none
            metrics = {"accuracy": Accuracy(), "confusion": ConfusionMatrix(num_classes=5)}
            for batch in batches_of(rank, size, *classified(length)):
                for metric in metrics.values():
                    metric.update(batch)
            before = num_collectives(plane().group)
            values = compute_all(metrics)
            found["calls"].append(num_collectives(plane().group) - before)
            found["values"].append((values["accuracy"], values["confusion"].tolist()))
        wider = Counts(5 + (rank == 1))
        with pytest.raises(MetricStateError, match=r"'accuracy'.* on rank 1"):
            compute_all({"accuracy": wider, "confusion": Average()})
    return found


class Counts(Metric):
    """A metric with a state of some numbers."""

    counts: torch.Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(size), reduce="sum")
        self.num_updates = 1

    def update(self, output: object) -> None:
        pass

    def compute(self) -> float:
        return float(self.counts.sum())


def test_the_same_names_again_cost_one_collective() -> None:
    for size in (2, 3):
        for found in run_ranks(called_again, size, init=False, deadline_s=60):
            assert found["calls"][1:] == [1, 1, 1]
            for length, (accuracy, confusion) in zip((9, 8, 1, 9), found["values"], strict=True):
                prediction, target = classified(length)
                assert accuracy == pytest.approx((prediction.argmax(1) == target).double().mean().item())
                counted = torch.zeros(5, 5, dtype=torch.int64)
                for label, guess in zip(target, prediction.argmax(1), strict=True):
                    counted[label, guess] += 1
                assert confusion == counted.tolist()


def other_names(rank: int, size: int) -> str:
    """What a rank is told that computes other metrics than the others, each known from before."""
    first, second = Average(), Average()
    for metric in (first, second):
        metric.update(1.0)
    with distributed.process_group():
        compute_all({"first": first})
        compute_all({"second": second})
        with pytest.raises(MetricStateError) as caught:
            compute_all({"first": first} if rank else {"second": second})
    return str(caught.value)


def test_other_names_on_another_rank_are_an_error_also_if_the_states_fit() -> None:
    for size in (2, 3):
        for rank, said in enumerate(run_ranks(other_names, size, init=False, deadline_s=60)):
            assert f"got {'first' if rank else 'second'} on rank {rank}, but other metrics on another rank" in said


def test_updates_go_on_after_a_reduction() -> None:
    # Right: 2 of 2, then rank 1 is wrong once: 3 of 4.
    assert run_ranks(goes_on, 2) == [[1.0, 0.75]] * 2


# -- torchmetrics ------------------------------------------------------------------------------------------------


def zoo() -> dict[str, tuple[Any, Any]]:
    """name: (metric, output_transform)."""

    def soft(output: Any) -> Any:
        return output[0].softmax(1), output[1]

    def pair(output: Any) -> Any:
        return output[0][:, 0], output[0][:, 1]

    return {
        "acc": (classification.MulticlassAccuracy(5), None),
        "f1": (classification.MulticlassF1Score(5, average="macro"), None),
        "auroc": (classification.MulticlassAUROC(5), soft),
        "binned": (classification.MulticlassAUROC(5, thresholds=20), soft),
        "kappa": (classification.MulticlassCohenKappa(5), None),
        "confusion": (classification.MulticlassConfusionMatrix(5), None),
        "mean": (torchmetrics.MeanMetric(), first),
        "sum": (torchmetrics.SumMetric(), first),
        "max": (torchmetrics.MaxMetric(), first),
        "cat": (torchmetrics.CatMetric(), first),
        "mse": (torchmetrics.MeanSquaredError(), pair),
        "r2": (torchmetrics.R2Score(), pair),
        "pearson": (torchmetrics.PearsonCorrCoef(), pair),
        "spearman": (torchmetrics.SpearmanCorrCoef(), pair),
        "collection": (
            torchmetrics.MetricCollection(
                [
                    classification.MulticlassPrecision(5),
                    classification.MulticlassRecall(5),
                    classification.MulticlassF1Score(5),
                ]
            ),
            None,
        ),
        "compound": (classification.MulticlassPrecision(5) + classification.MulticlassRecall(5), None),
        "minmax": (torchmetrics.MinMaxMetric(classification.MulticlassAccuracy(5)), None),
    }


def next_to_its_own(rank: int, size: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Values by dengine's packed reduction, and by torchmetrics' own synchronisation of twins."""
    evaluator = Engine(lambda engine, batch: batch)
    twins = zoo()
    for name, (metric, transform) in zoo().items():
        evaluator.add_metric(metric, name, transform)
    batches = batches_of(rank, size, *classified(23))
    evaluator.run(batches)
    own: dict[str, Any] = {}
    for name, (twin, transform) in twins.items():
        for batch in batches:
            arguments = transform(batch) if transform else batch
            twin.update(*arguments) if isinstance(arguments, tuple) else twin.update(arguments)
        value = twin.compute()
        own |= {f"{name}/{key}": part for key, part in value.items()} if isinstance(value, dict) else {name: value}
    return dict(evaluator.state.metrics), own


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_torchmetrics_give_what_they_would_have_given_to_the_last_bit(size: int) -> None:
    for found, own in run_ranks(next_to_its_own, size, deadline_s=120):
        assert found.keys() == own.keys()
        for name, value in own.items():
            assert torch.equal(torch.as_tensor(found[name], dtype=value.dtype), value), name


def with_an_empty_rank(rank: int, size: int) -> dict[str, Any]:
    evaluator = Engine(lambda engine, batch: batch)
    for name in ("acc", "auroc", "mean", "collection", "cat"):
        evaluator.add_metric(zoo()[name][0], name, zoo()[name][1])
    evaluator.run(batches_of(rank, size, *classified(2)))
    return dict(evaluator.state.metrics)


def test_torchmetrics_do_not_hang_on_an_empty_rank() -> None:
    (expected,) = run_ranks(with_an_empty_rank, 1)
    for found in run_ranks(with_an_empty_rank, 3):
        for name, value in expected.items():
            torch.testing.assert_close(torch.as_tensor(found[name]), torch.as_tensor(value))


# -- values per rank, and what declares nothing ------------------------------------------------------------------


class PerplexityOfTheSeed(Metric):
    def __init__(self) -> None:
        self.total_loss = 0.0
        self.count = 0

    def reset(self) -> None:
        self.total_loss = 0.0
        self.count = 0

    def update(self, output: Any) -> None:
        self.total_loss += output["loss"]
        self.count += 1

    def compute(self) -> float:
        return math.exp(self.total_loss / self.count)


def undeclared(rank: int, size: int, counts: list[int]) -> tuple[float, list[str]]:
    engine = Engine(lambda engine, batch: {"loss": float(rank)})
    engine.add_metric(PerplexityOfTheSeed(), "ppl")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        engine.run(range(counts[rank]), max_epochs=2)
    return float(engine.state.metrics["ppl"]), [str(warning.message) for warning in caught]


@pytest.mark.parametrize("counts", [[1, 3], [2, 0], [0, 1, 4]])
def test_a_metric_that_declares_nothing_is_averaged_by_its_updates_and_says_so_once(counts: list[int]) -> None:
    values, messages = zip(*run_ranks(undeclared, len(counts), counts), strict=True)
    expected = sum(count * math.exp(rank) for rank, count in enumerate(counts)) / sum(counts)
    assert values == pytest.approx([expected] * len(counts))
    declares = [message for rank in messages for message in rank if "declares no states" in message]
    assert len(declares) == 1, messages


def by_rank(rank: int, size: int, op: str, counts: list[int]) -> float:
    metric = DistributedMetric(Average(), op)  # type: ignore[arg-type]
    engine = Engine(lambda engine, batch: torch.full((batch,), float(rank + 1)))
    engine.add_metric(metric, "x")
    engine.run([counts[rank]] if counts[rank] else [])
    return float(engine.state.metrics["x"])


@pytest.mark.parametrize("counts", [[1, 2, 5], [3, 0, 1]])
def test_a_distributed_metric_reduces_the_values_and_leaves_out_who_saw_nothing(counts: list[int]) -> None:
    seen = [(rank + 1, count) for rank, count in enumerate(counts) if count]
    expected = {
        "mean": sum(value * count for value, count in seen) / sum(counts),
        "sum": sum(value for value, _ in seen),
        "max": max(value for value, _ in seen),
        "min": min(value for value, _ in seen),
    }
    for op, value in expected.items():
        assert run_ranks(by_rank, 3, op, counts) == pytest.approx([value] * 3)


# -- errors are the same on every rank ---------------------------------------------------------------------------


def nothing_seen(rank: int, size: int) -> None:
    evaluator = Engine(lambda engine, batch: batch)
    evaluator.add_metric(Accuracy(), "val_acc")
    evaluator.run([(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))])  # a batch, without a sample


def test_nothing_seen_anywhere_is_an_error_everywhere_that_names_the_metric() -> None:
    outcomes = run_ranks(nothing_seen, 3, expect_failures=True)
    assert {outcome.error_type for outcome in outcomes} == {"NotComputableError"}
    assert all("'val_acc'" in outcome.error_message for outcome in outcomes)


def different_metrics(rank: int, size: int) -> None:
    evaluator = Engine(lambda engine, batch: batch)
    evaluator.add_metric(Accuracy(), "acc")
    if rank == 2:
        evaluator.add_metric(Loss(torch.nn.CrossEntropyLoss()), "loss")
    evaluator.run(batches_of(rank, size, *classified(9)))


def test_different_metrics_are_found_when_the_run_starts_and_the_rank_is_named() -> None:
    outcomes = run_ranks(different_metrics, 3, expect_failures=True)
    assert {outcome.error_type for outcome in outcomes} == {"MetricStateError"}
    for outcome in outcomes:
        assert outcome.error_message.startswith("Rank 2 has the metrics 'acc' (Accuracy), 'loss' (Loss), but rank 0")


def different_shapes(rank: int, size: int) -> None:
    metric = ConfusionMatrix(num_classes=5 + (rank == 1))
    for batch in batches_of(rank, size, *classified(9)):
        metric.update(batch if rank == 0 else (torch.nn.functional.pad(batch[0], (0, 1)), batch[1]))
    compute_all({"confusion": metric})


def test_states_of_different_shapes_name_the_metric_and_the_rank() -> None:
    outcomes = run_ranks(different_shapes, 2, expect_failures=True)
    assert {outcome.error_type for outcome in outcomes} == {"MetricStateError"}
    assert all("'confusion'" in outcome.error_message and "on rank 1" in outcome.error_message for outcome in outcomes)


class Failing(Metric):
    def __init__(self) -> None:
        self.rank = dist.get_rank()

    def reset(self) -> None: ...

    def update(self, output: Any) -> None: ...

    def compute(self) -> float:
        if self.rank == 1:
            raise ZeroDivisionError("no positives on this rank")
        return 0.0


def one_rank_cannot_compute(rank: int, size: int) -> None:
    evaluator = Engine(lambda engine, batch: batch)
    evaluator.add_metrics({"acc": Accuracy(), "failing": Failing()})
    evaluator.run(batches_of(rank, size, *classified(9)))


def test_a_metric_that_fails_on_one_rank_fails_on_all_and_nobody_waits() -> None:
    outcomes = run_ranks(one_rank_cannot_compute, 3, expect_failures=True, deadline_s=30)
    assert [outcome.error_type for outcome in outcomes] == ["MetricStateError", "ZeroDivisionError", "MetricStateError"]
    assert "on rank 1: ZeroDivisionError('no positives on this rank')" in outcomes[0].error_message


def wrong_label_on_one_rank(rank: int, size: int) -> None:
    evaluator = Engine(lambda engine, batch: batch)
    evaluator.add_metric(F1Score(num_classes=5), "f1")
    prediction, target = classified(9)
    if rank == 1:
        target = target + 10
    evaluator.run(batches_of(rank, size, prediction, target))


def test_a_label_outside_the_classes_is_an_error_on_every_rank() -> None:
    outcomes = run_ranks(wrong_label_on_one_rank, 2, expect_failures=True)
    assert {outcome.error_type for outcome in outcomes} == {"ValueError"}


def running(rank: int, size: int, counts: list[int]) -> float:
    engine = Engine(lambda engine, batch: float(rank))
    engine.add_metric(RunningAverage(), "x")
    engine.run(range(counts[rank]))
    return float(engine.state.metrics["x"])


def test_a_running_average_is_plain_over_the_ranks_that_saw_anything() -> None:
    assert run_ranks(running, 3, [2, 0, 5]) == pytest.approx([1.0] * 3)
