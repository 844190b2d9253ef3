"""One metric object counts for one engine, once."""

import gc
from typing import Any

import pytest
import torch
import torchmetrics

from dengine import Engine, Events
from dengine.metrics import (
    Accuracy,
    Average,
    ConfusionMatrix,
    DistributedMetric,
    F1Score,
    MetricFunction,
    Precision,
    Recall,
    compute_all,
)


def engine() -> Engine:
    return Engine(lambda engine, batch: batch)


class Duck:
    def reset(self) -> None: ...

    def update(self, output: Any) -> None: ...

    def compute(self) -> float:
        return 0.0


def pairs() -> list[tuple[str, Any, Any]]:
    """What is attached to the first engine, and to the second one."""
    found: list[tuple[str, Any, Any]] = []
    for make in (Accuracy, Average, Duck, torchmetrics.MeanMetric, lambda: DistributedMetric(Accuracy())):
        metric = make()
        found.append((f"the same {type(metric).__name__}", metric, metric))
    for name, around in {
        "arithmetic": lambda metric: 2 * metric + 1,
        "a function": lambda metric: MetricFunction(abs, metric),
        "a distributed metric": DistributedMetric,
        "an item": lambda metric: metric[0],
    }.items():
        for swap in (False, True):
            metric = ConfusionMatrix()
            both = (around(metric), metric) if swap else (metric, around(metric))
            found.append((f"in {name} {swap}", *both))
    member = torchmetrics.SumMetric()
    found.append(("in a collection", torchmetrics.MetricCollection({"a": member}), member))
    member = torchmetrics.SumMetric()
    found.append(("in a collection 2", member, torchmetrics.MetricCollection({"a": member})))
    member = torchmetrics.MeanMetric()
    found.append(("in a wrapper", torchmetrics.wrappers.MinMaxMetric(member), member))
    member = torchmetrics.MeanMetric()
    found.append(("of torchmetrics in arithmetic", Average() * 2, Average()))
    found[-1] = ("of torchmetrics in a function", MetricFunction(float, member), member)
    found.append(("the same metric twice inside", DistributedMetric(member), MetricFunction(abs, member)))
    return found


@pytest.mark.parametrize(("kind", "first", "second"), [pytest.param(*pair, id=pair[0]) for pair in pairs()])
def test_a_metric_of_two_engines_is_refused_and_nothing_is_added(kind: str, first: Any, second: Any) -> None:
    one, other = engine(), engine()
    one.add_metric(first, "mine")
    with pytest.raises(ValueError, match="'mine'") as error:
        other.add_metric(second, "yours")
    assert "yours" in str(error.value)
    assert other.metric_names == []
    other.add_metric(Average(), "yours")
    with pytest.raises(ValueError, match="object for each engine"):
        other.add_metrics({"a": Average(), "b": second})
    assert other.metric_names == ["yours"]
    assert one.metric_names == ["mine"]


def test_a_metric_may_be_added_once_its_engine_is_gone() -> None:
    metric, tensors = Average(), torchmetrics.MeanMetric()
    for value in (1.0, 3.0):
        trainer = engine()
        trainer.add_metrics({"own": metric, "theirs": tensors})

        @trainer.on(Events.COMPLETED)  # the engine and its handler are a cycle, which the collector has to find
        def keep(_: Engine, trainer: Engine = trainer) -> None: ...

        gc.disable()
        assert trainer.run([value]).metrics == {"own": value, "theirs": value}
        gc.enable()
        values = trainer.state.metrics
        del trainer, keep
    assert values == {"own": 3.0, "theirs": 3.0}


def test_values_that_are_kept_keep_no_engine_alive() -> None:
    metric = Average()
    kept = []
    for value in (1.0, 3.0):
        trainer = engine()
        trainer.add_metric(metric, "own")
        kept.append(trainer.run([value]))
        del trainer
    assert [state.metrics["own"] for state in kept] == [1.0, 3.0]


@pytest.mark.parametrize(
    "make",
    [
        lambda metric: DistributedMetric(metric),
        lambda metric: DistributedMetric(metric, "max") + 1,
        lambda metric: torchmetrics.MetricCollection({"a": metric}),
    ],
)
@pytest.mark.parametrize("is_first", [False, True])
def test_a_metric_that_would_be_updated_twice_by_one_engine_is_refused(make: Any, is_first: bool) -> None:
    metric = torchmetrics.SumMetric()
    both = [metric, make(metric)] if is_first else [make(metric), metric]
    trainer = engine()
    trainer.add_metric(both[0], "first")
    with pytest.raises(ValueError, match="'first' already, and would count every batch twice"):
        trainer.add_metric(both[1], "second")
    with pytest.raises(ValueError, match="twice"):
        engine().add_metrics({"a": make(metric), "b": make(metric)})
    assert trainer.run([1.0, 2.0]).metrics.keys() <= {"first", "first/a"}


def test_one_metric_may_have_two_names_and_be_in_arithmetic_on_one_engine() -> None:
    precision, recall = Precision(), Recall()
    trainer = engine()
    trainer.add_metrics({"p": precision, "same": precision, "r": recall, "f": 2 * precision * recall})
    trainer.add_metric(precision / recall, "ratio")
    trainer.add_metric(F1Score(), "f1")
    values = trainer.run([(torch.eye(2), torch.tensor([0, 1]))]).metrics
    assert values == {"p": 1.0, "same": 1.0, "r": 1.0, "f": 2.0, "ratio": 1.0, "f1": 1.0}


def test_one_object_with_two_transforms_is_refused() -> None:
    metric = torchmetrics.MeanMetric()
    trainer = engine()
    trainer.add_metric(metric, "a", output_transform=abs)
    trainer.add_metric(metric, "b", output_transform=abs)
    with pytest.raises(ValueError, match="'a' already, with another output_transform"):
        trainer.add_metric(metric, "c", output_transform=float)


def test_compute_all_reads_metrics_that_an_engine_has() -> None:
    metric = Average()
    trainer = engine()
    trainer.add_metric(metric, "own")
    trainer.run([1.0, 3.0])
    assert compute_all({"now": metric, "again": metric}) == {"now": 2.0, "again": 2.0}
