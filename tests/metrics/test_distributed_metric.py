"""DistributedMetric around every kind of metric, and metrics that a user wrote."""

from typing import Any, NamedTuple

import pytest
import torch
import torchmetrics

from dengine import Engine, NotComputableError
from dengine.metrics import Accuracy, Average, DistributedAccuracy, DistributedMetric, Metric, Precision


class AsInTheSeed(Metric):
    """No super().__init__(), the step's whole output."""

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
        return self.total_loss / self.count


class Duck:
    """The three methods, and no base class."""

    def reset(self) -> None:
        self.seen: list[Any] = []

    def update(self, output: Any) -> None:
        self.seen.append(output)

    def compute(self) -> float:
        return float(len(self.seen))


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (Accuracy(), 0.5),
        (DistributedAccuracy(), 0.5),
        (Precision(num_classes=2, average="micro"), 0.5),
        (Accuracy() * 2, 1.0),
        (AsInTheSeed(), 1.5),
        (Duck(), 2.0),
        (torchmetrics.classification.MulticlassAccuracy(2, average="micro"), 0.5),
        (Average(output_transform=lambda output: output["loss"] + 1), 2.5),
    ],
)
@pytest.mark.parametrize("op", ["mean", "sum", "max", "min"])
def test_the_base_gets_what_it_would_get_on_its_own(op: Any, base: Any, expected: float) -> None:
    pairs = [(torch.tensor([1, 1]), torch.tensor([1, 0])), (torch.tensor([0]), torch.tensor([0]))]
    pairs[1] = (torch.tensor([0, 0]), torch.tensor([0, 1]))
    engine = Engine(
        lambda engine, place: {"loss": place + 1.0, "pred": pairs[place][0], "label": pairs[place][1]},
    )
    engine.add_metric(DistributedMetric(base, op), "value")
    assert engine.run([0, 1]).metrics["value"] == pytest.approx(expected)


def test_a_pair_in_a_list_reaches_torchmetrics_spread_out() -> None:
    metric = DistributedMetric(torchmetrics.classification.MulticlassAccuracy(2))
    metric.update([torch.tensor([1, 1]), torch.tensor([1, 1])])
    assert metric.compute() == 1.0


def test_the_mean_is_weighted_by_targets_and_not_by_whatever_else_is_in_the_output(over_ranks: Any) -> None:
    def output(num_samples: int, loss: float) -> dict[str, Any]:
        return {"loss": loss, "pred": torch.rand(num_samples), "label": torch.rand(num_samples), "rest": torch.rand(7)}

    ranks = over_ranks(lambda: {"loss": DistributedMetric(AsInTheSeed())}, [[output(1, 1.0)], [output(3, 5.0)]])
    assert ranks.values == {"loss": 4.0}


def test_outputs_are_moved_whatever_holds_them() -> None:
    class Pair(NamedTuple):
        prediction: torch.Tensor
        target: torch.Tensor

    seen: list[Any] = []

    class Seeing(Duck):
        def update(self, output: Any) -> None:
            seen.append(output)

    metric = DistributedMetric(Seeing(), device="meta")
    tensor = torch.rand(3)
    for output in (tensor, (tensor, tensor), [tensor, 1], {"a": [tensor]}, Pair(tensor, tensor)):
        metric.update(output)
    assert seen[0].is_meta
    assert seen[1][0].is_meta
    assert seen[2][0].is_meta
    assert seen[2][1] == 1
    assert seen[3]["a"][0].is_meta
    assert isinstance(seen[4], Pair)
    assert seen[4].target.is_meta


@pytest.mark.parametrize(("arguments", "error"), [((Accuracy(), "median"), ValueError), ((3,), TypeError)])
def test_wrong_arguments_are_an_error_at_once(arguments: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        DistributedMetric(*arguments)


def test_nothing_seen_names_the_metric() -> None:
    engine = Engine(lambda engine, batch: (torch.empty(0), torch.empty(0)))
    engine.add_metric(DistributedAccuracy(), "acc")
    with pytest.raises(NotComputableError, match="Metric 'acc'"):
        engine.run([1])


def test_a_metric_as_in_the_seed_works_in_an_engine() -> None:
    engine = Engine(lambda engine, batch: {"loss": batch})
    engine.add_metric(AsInTheSeed(), "loss")
    assert engine.run([1.0, 2.0], max_epochs=2).metrics["loss"] == 1.5


def test_an_error_of_a_users_metric_keeps_its_class(over_ranks: Any) -> None:
    class Odd(ValueError):
        pass

    class Failing(Average):
        def compute(self) -> float:
            raise Odd("as it is")

    engine = Engine(lambda engine, batch: batch)
    engine.add_metric(Failing(), "odd")
    with pytest.raises(Odd, match="^as it is$"):
        engine.run([1.0])
