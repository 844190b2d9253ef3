"""What a subclass of a metric of the package writes anew is what an engine calls, as by hand."""

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch

from dengine import Engine, Events
from dengine.metrics import (
    MSE,
    Accuracy,
    Average,
    ConfusionMatrix,
    DistributedMetric,
    F1Score,
    Metric,
    Precision,
    Recall,
    TopKAccuracy,
)

SCORES = torch.eye(4)[[0, 1, 2, 3, 0]]
LABELS = torch.tensor([0, 1, 2, 0, 1])


def derived(base: Any, *methods: str) -> Any:
    """A class with these methods of its own, each of which can be told by the value."""

    class Derived(base):
        resets = 0

        if "update" in methods:

            def update(self, output: Any) -> None:
                super().update((-output[0], output[1]))

        if "compute" in methods:

            def compute(self) -> Any:
                return 100 * super().compute()

        if "default_transform" in methods:

            def default_transform(self, output: Any) -> Any:
                return output[0], (output[1] + 1) % 4

        if "reset" in methods:

            def reset(self) -> None:
                super().reset()
                self.resets += 1

    return Derived


def value(result: Any) -> Any:
    return result.tolist() if isinstance(result, torch.Tensor) else result


def by_hand(metric: Metric, outputs: list[Any]) -> Any:
    metric.reset()
    for output in outputs:
        metric.update(metric.transform(output) if metric.transform else output)
    return value(metric.compute())


MAKERS: list[Callable[[Any], Metric]] = [
    lambda cls: cls(),
    lambda cls: cls(ignore_index=1),
    lambda cls: cls() * 2,
    lambda cls: 2 - cls() * cls(),
    lambda cls: DistributedMetric(cls()),
]


@pytest.mark.parametrize("methods", [(), ("update",), ("compute",), ("update", "compute", "reset")])
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("base", [Accuracy, Precision, Recall, F1Score, ConfusionMatrix, TopKAccuracy])
def test_an_engine_calls_what_is_called_by_hand(base: Any, make: Callable[[Any], Metric], methods: tuple[str]) -> None:
    outputs = [(SCORES, LABELS), (SCORES[:3], LABELS[:3])]
    engine = Engine(lambda engine, batch: batch)
    engine.add_metric(base(), "plain")  # beside it, so that leaves could be shared
    engine.add_metric(make(derived(base, *methods)), "own")
    engine.add_metric(F1Score(num_classes=4), "other")
    engine.run(outputs, max_epochs=2)
    assert value(engine.state.metrics["own"]) == by_hand(make(derived(base, *methods)), outputs)
    assert value(engine.state.metrics["plain"]) == by_hand(base(), outputs)


@pytest.mark.parametrize("base", [Accuracy, F1Score, TopKAccuracy])
def test_its_default_transform_is_the_one_that_is_used(base: Any) -> None:
    engine = Engine(lambda engine, batch: batch)
    engine.add_metrics({"own": derived(base, "default_transform")(), "plain": base()})
    engine.run([(SCORES, LABELS)])
    assert engine.state.metrics["own"] == by_hand(base(), [(SCORES, (LABELS + 1) % 4)])
    assert engine.state.metrics["plain"] == by_hand(base(), [(SCORES, LABELS)])


def test_its_reset_is_called_at_each_epoch() -> None:
    metric = derived(Accuracy, "reset")()
    engine = Engine(lambda engine, batch: batch)
    engine.add_metric(metric, "own")
    engine.run([(SCORES, LABELS)], max_epochs=3)
    assert metric.resets == 3


@pytest.mark.parametrize("base", [Accuracy, F1Score])
def test_it_goes_on_in_mid_epoch(base: Any) -> None:
    outputs = [(SCORES, LABELS), (SCORES[:3], LABELS[:3]), (SCORES[1:], LABELS[1:])]

    def engine_of() -> Engine:
        engine = Engine(lambda engine, batch: batch)
        engine.add_metric(derived(base, "update", "compute")(), "own")
        return engine

    first, second, whole = engine_of(), engine_of(), engine_of()
    states: list[Any] = []
    first.on(Events.ITERATION_COMPLETED(once=2), lambda engine: states.append(deepcopy(engine.random_state())))
    first.on(Events.ITERATION_COMPLETED(once=2), lambda engine: states.append(engine.state_dict()))
    first.run(outputs)
    second.load_state_dict(states[1])
    second.load_random_state(states[0])
    second.run(outputs)
    whole.run(outputs)
    assert second.state.metrics == first.state.metrics == whole.state.metrics


class Scaled(Accuracy):
    def update(self, output: Any) -> None:
        super().update((-output[0], output[1]))


def test_it_can_be_copied_and_pickled() -> None:
    for copied in (deepcopy(Scaled()), pickle.loads(pickle.dumps(Scaled(output_transform=None)))):
        assert by_hand(copied, [(SCORES, LABELS)]) == by_hand(Scaled(), [(SCORES, LABELS)])


@pytest.mark.parametrize("base", [Average, MSE])
def test_metrics_that_hold_their_own_state_did_so_before(base: Any) -> None:
    engine = Engine(lambda engine, batch: batch)
    engine.add_metric(derived(base, "compute")(), "own")
    engine.run([(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 1.0]))])
    plain = by_hand(base(), [(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 1.0]))])
    assert engine.state.metrics["own"] == 100 * plain
