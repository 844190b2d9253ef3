"""What the seed shows of Engine, Events and metrics, in Python: its three test scenarios and its snippets."""

import inspect
import math
from enum import Enum
from typing import Any

import pytest
import torch

from dengine import Engine, EventEnum, Events, State
from dengine.metrics import Accuracy, DistributedAccuracy, DistributedMetric, Metric

# -- "Testing Strategy" ------------------------------------------------------------------------------------------


def test_scenario_basic_training_loop() -> None:
    counter = {"count": 0}

    def process(engine: Engine, batch: int) -> int:
        counter["count"] += 1
        return batch

    engine = Engine(process)
    data = [1, 2, 3, 4, 5]
    engine.run(data, max_epochs=2)
    assert counter["count"] == 10  # 5 batches x 2 epochs


def test_scenario_event_handlers() -> None:
    events_fired: list[str] = []

    def process(engine: Engine, batch: int) -> int:
        return batch

    engine = Engine(process)

    @engine.on(Events.STARTED)
    def on_start(e: Engine) -> None:
        events_fired.append("started")

    @engine.on(Events.ITERATION_COMPLETED)
    def on_iter(e: Engine) -> None:
        events_fired.append("iter")

    @engine.on(Events.EPOCH_COMPLETED)
    def on_epoch(e: Engine) -> None:
        events_fired.append("epoch")

    engine.run([1, 2, 3], max_epochs=1)
    assert events_fired == ["started", "iter", "iter", "iter", "epoch"]


def test_scenario_metrics_computation() -> None:
    def process(engine: Engine, batch: int) -> dict[str, int]:
        return {"pred": batch * 2, "label": batch * 2}

    engine = Engine(process)
    metric = Accuracy()
    engine.add_metric(metric, "acc")
    engine.run([1, 2, 3], max_epochs=1)
    assert engine.state.metrics["acc"] == 1.0  # perfect accuracy


# -- Engine ------------------------------------------------------------------------------------------------------


def test_a_training_step_trains_and_its_output_is_the_state_s() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = torch.nn.MSELoss()

    def train_step(engine: Engine, batch: Any) -> dict[str, float]:
        model.train()
        optimizer.zero_grad()
        x, y = batch
        pred = model(x)
        loss = loss_fn(pred, y)
        loss.backward()
        optimizer.step()
        return {"loss": loss.item()}

    x = torch.randn(64, 2)
    train_loader = [(x, x.sum(1, keepdim=True))]
    trainer = Engine(train_step)
    losses: list[float] = []

    @trainer.on(Events.EPOCH_COMPLETED(every=50))
    def log(engine: Engine) -> None:
        losses.append(engine.state.output["loss"])

    trainer.run(train_loader, max_epochs=200)
    assert len(losses) == 4
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-3


def test_the_state_has_the_attributes_of_the_seed() -> None:
    state = Engine(lambda engine, batch: batch).run([7, 8], max_epochs=3)
    assert isinstance(state, State)
    assert state.epoch == 2  # 0-indexed
    assert state.iteration == 6
    assert state.epoch_iteration == 2
    assert state.max_epochs == 3
    assert state.output == 8
    assert state.metrics == {}
    assert state.dataloader == [7, 8]
    assert state.batch is None
    assert all(isinstance(seconds, float) for seconds in state.times.values())


def test_the_seed_s_parameters_come_in_the_seed_s_order() -> None:
    def names(function: Any) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name != "self"]

    assert names(Engine.__init__)[:1] == ["process_function"]
    assert names(Engine.on)[:3] == ["event", "handler", "priority"]
    assert names(Engine.add_metric)[:2] == ["metric", "name"]
    assert names(Engine.add_metrics) == ["metrics"]
    assert names(Engine.run)[:2] == ["data", "max_epochs"]
    assert names(Engine.load_state_dict) == ["state_dict"]
    assert names(Engine.fire_event) == ["event"]
    assert inspect.signature(Engine.register_events).parameters["events"].kind is inspect.Parameter.VAR_POSITIONAL
    assert names(Engine.terminate) == names(Engine.state_dict) == []


# -- Events ------------------------------------------------------------------------------------------------------


def test_the_seed_s_events_are_there() -> None:
    for name in (
        "STARTED",
        "EPOCH_STARTED",
        "ITERATION_STARTED",
        "ITERATION_COMPLETED",
        "EPOCH_COMPLETED",
        "COMPLETED",
        "EXCEPTION_RAISED",
    ):
        assert isinstance(Events[name], EventEnum)


def test_periodic_events() -> None:
    engine = Engine(lambda engine, batch: batch)
    batches: list[int] = []
    epochs: list[int] = []
    once: list[int] = []
    engine.on(Events.ITERATION_COMPLETED(every=100), lambda engine: batches.append(engine.state.iteration))
    engine.on(Events.EPOCH_COMPLETED(every=5), lambda engine: epochs.append(engine.state.epoch))
    engine.on(Events.ITERATION_COMPLETED(once=1000), lambda engine: once.append(engine.state.iteration))
    engine.run(range(120), max_epochs=10)
    assert batches == list(range(100, 1201, 100))
    assert epochs == [4, 9]
    assert once == [1000]


def test_handler_order() -> None:
    trainer = Engine(lambda engine, batch: batch)
    order: list[str] = []
    for name in ("handler1", "handler2", "handler3"):
        trainer.on(Events.EPOCH_COMPLETED, lambda engine, name=name: order.append(name))
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: order.append("late"), priority=-10)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: order.append("normal"), priority=0)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: order.append("urgent"), priority=10)
    trainer.run([1])
    assert order == ["urgent", "handler1", "handler2", "handler3", "normal", "late"]


@pytest.mark.parametrize("base", [Enum, EventEnum])
def test_custom_events(base: Any) -> None:
    train_events: Any = base(
        "TrainEvents",
        {
            "BACKWARD_STARTED": "backward_started",
            "BACKWARD_COMPLETED": "backward_completed",
            "OPTIMIZER_STEP": "optimizer_step",
        },
    )
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(engine: Engine, batch: torch.Tensor) -> dict[str, float]:
        loss = model(batch).square().mean() * 1e6
        engine.fire_event(train_events.BACKWARD_STARTED)
        loss.backward()
        engine.fire_event(train_events.BACKWARD_COMPLETED)
        engine.fire_event(train_events.OPTIMIZER_STEP)
        optimizer.step()
        return {"loss": loss.item()}

    trainer = Engine(train_step)
    trainer.register_events(train_events)
    norms: list[float] = []

    @trainer.on(train_events.BACKWARD_COMPLETED)
    def clip_gradients(engine: Engine) -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)

    @trainer.on(train_events.OPTIMIZER_STEP)
    def note(engine: Engine) -> None:
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))

    trainer.run([torch.ones(4, 1)] * 3)
    assert norms == pytest.approx([1.0] * 3, abs=1e-4)


# -- metrics -----------------------------------------------------------------------------------------------------


class PerplexityMetric(Metric):
    """Word for word the seed's: its own __init__, which never calls that of Metric."""

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
        avg_loss = self.total_loss / self.count
        return math.exp(avg_loss)


def test_a_custom_metric_gets_the_whole_output_and_begins_anew_each_epoch() -> None:
    trainer = Engine(lambda engine, batch: {"loss": batch + engine.state.epoch, "pred": 1, "label": 2})
    trainer.add_metric(PerplexityMetric(), "ppl")
    values: list[Any] = []

    @trainer.on(Events.EPOCH_COMPLETED)
    def log(engine: Engine) -> None:
        values.append(engine.state.metrics["ppl"])

    trainer.run([1.0, 2.0], max_epochs=2)
    assert values == pytest.approx([math.exp(1.5), math.exp(2.5)])
    assert all(type(value) is float for value in values)


def test_metrics_may_be_added_together_and_reduced_over_ranks() -> None:
    trainer = Engine(lambda engine, batch: (torch.tensor([batch, 1]), torch.tensor([1, 1])))
    trainer.add_metrics({"acc": Accuracy(), "again": DistributedMetric(base_metric=Accuracy(), reduce_op="mean")})
    trainer.add_metric(DistributedAccuracy(device="cpu"), "third")
    assert trainer.run([0, 1]).metrics == {"acc": 0.75, "again": 0.75, "third": 0.75}


# -- advanced features -------------------------------------------------------------------------------------------


def test_engines_may_alternate() -> None:
    source_trainer, target_trainer, evaluator = (Engine(lambda engine, batch: batch) for _ in range(3))
    evaluator.add_metric(Accuracy(output_transform=lambda output: (output, 1)), "acc")
    accuracies: list[Any] = []
    for _ in range(3):
        source_trainer.run([1, 2], max_epochs=1)
        target_trainer.run([3], max_epochs=1)
        evaluator.run([1, 1, 0, 1])
        accuracies.append(evaluator.state.metrics["acc"])
    assert accuracies == [0.75] * 3
    assert source_trainer.state.iteration == 2


def test_an_evaluator_runs_inside_a_handler_of_the_trainer() -> None:
    trainer, evaluator = Engine(lambda engine, batch: batch), Engine(lambda engine, batch: batch)
    evaluator.add_metric(Accuracy(output_transform=lambda output: (output, 1)), "acc")
    found: list[tuple[int, Any]] = []

    @trainer.on(Events.ITERATION_COMPLETED(every=5))
    def evaluate_during_training(engine: Engine) -> None:
        evaluator.run([1, 0])
        found.append((engine.state.iteration, evaluator.state.metrics["acc"]))

    trainer.run(range(7), max_epochs=2)
    assert found == [(5, 0.5), (10, 0.5)]


def test_a_saved_trainer_resumes_from_its_iteration(tmp_path: Any) -> None:
    trainer = Engine(lambda engine, batch: batch)

    @trainer.on(Events.ITERATION_COMPLETED(every=5))
    def save(engine: Engine) -> None:
        torch.save({"trainer": engine.state_dict()}, tmp_path / f"checkpoint_{engine.state.iteration}.pt")

    trainer.run(range(4), max_epochs=2)

    resumed = Engine(lambda engine, batch: batch)
    state_dict = torch.load(tmp_path / "checkpoint_5.pt")
    resumed.load_state_dict(state_dict["trainer"])
    iterations: list[int] = []
    resumed.on(Events.ITERATION_COMPLETED, lambda engine: iterations.append(engine.state.iteration))
    resumed.run(range(4), max_epochs=100)  # resumes from iteration 5
    assert iterations == list(range(6, 401))
