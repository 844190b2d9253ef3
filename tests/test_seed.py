"""Every code block of the seed, in Python: as it stands but for the syntax and the imports, one test a block.

Names that a block takes for granted are made at the start of its test. The complete training example is a script of
its own, seed/complete_example.py. What needs several ranks is in tests_dist/test_seed.py.
"""

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from enum import Enum
from math import exp
from pathlib import Path
from typing import Any

import pytest
import torch

from dengine import Engine, EventEnum, Events, State
from dengine.handlers import Checkpoint, EarlyStopping, LRScheduler, ProgressBar, Timer, TrackingHandler
from dengine.metrics import MAE, MSE, Accuracy, Average, DistributedMetric, F1Score, Metric, Precision, R2Score, Recall
from dengine.tracking import Track

EXAMPLE = Path(__file__).resolve().parent / "seed" / "complete_example.py"

# -- what the blocks take for granted ----------------------------------------------------------------------------


def loss_step(engine: Engine, batch: Any) -> dict[str, Any]:
    return {"loss": 1 / engine.state.iteration}


def engine_with(**values: list[float]) -> Engine:
    """An engine whose metrics have these values, one an epoch or a run."""
    engine = Engine(lambda engine, batch: batch)
    rest = {name: iter(of_name) for name, of_name in values.items()}

    @engine.on(Events.EPOCH_COMPLETED, priority=1)
    def compute(engine: Engine) -> None:
        engine.state.metrics = {name: next(of_name) for name, of_name in rest.items()}

    return engine


@pytest.fixture
def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


# -- core concepts -----------------------------------------------------------------------------------------------


def test_engine() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = torch.nn.MSELoss()
    inputs = torch.randn(64, 2)
    train_loader = [(inputs, inputs.sum(1, keepdim=True))] * 20

    # Define process function
    def train_step(engine: Engine, batch: any) -> any:
        model.train()
        optimizer.zero_grad()

        x, y = batch
        pred = model(x)
        loss = loss_fn(pred, y)

        loss.backward()
        optimizer.step()

        return {"loss": loss.item()}

    # Create engine
    trainer = Engine(train_step)

    # Run engine
    trainer.run(train_loader, max_epochs=10)

    assert trainer.state.iteration == 200
    assert trainer.state.output["loss"] < 1e-3


def test_engine_state() -> None:
    engine = Engine(lambda engine, batch: batch)
    seen: list[Any] = []
    engine.on(Events.ITERATION_COMPLETED, lambda engine: seen.append(engine.state.batch))
    assert isinstance(engine.run([7, 8], max_epochs=3), State)

    assert engine.state.epoch == 2  # Current epoch (0-indexed)
    assert engine.state.iteration == 6  # Global iteration counter
    assert engine.state.epoch_iteration == 2  # Iteration within current epoch
    assert engine.state.max_epochs == 3  # Total epochs to run
    assert engine.state.output == 8  # Return value of process function
    assert engine.state.metrics == {}  # Computed metrics dict
    assert engine.state.dataloader == [7, 8]  # Current dataloader
    assert seen == [7, 8] * 3  # Current batch
    assert engine.state.times["run"] >= engine.state.times["epoch"] >= 0  # Timing information


def test_events() -> None:
    fired: list[str] = []
    engine = Engine(lambda engine, batch: fired.append("batch") or 1 / batch)
    engine.on(Events.STARTED, lambda engine: fired.append("started"))
    engine.on(Events.EPOCH_STARTED, lambda engine: fired.append("epoch started"))
    engine.on(Events.ITERATION_STARTED, lambda engine: fired.append("iteration started"))
    engine.on(Events.ITERATION_COMPLETED, lambda engine: fired.append("iteration completed"))
    engine.on(Events.EPOCH_COMPLETED, lambda engine: fired.append("epoch completed"))
    engine.on(Events.COMPLETED, lambda engine: fired.append("completed"))
    engine.on(Events.EXCEPTION_RAISED, lambda engine: fired.append("exception"))
    begun = ["started", "epoch started", "iteration started", "batch"]

    engine.run([1])
    assert fired == [*begun, "iteration completed", "epoch completed", "completed"]
    fired.clear()
    with pytest.raises(ZeroDivisionError):
        engine.run([0])
    assert fired == [*begun, "exception"]


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


def test_attaching_handlers(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Engine(loss_step)
    trainer.add_metric(Average(), "loss")

    # Simple handler
    @trainer.on(Events.EPOCH_COMPLETED)
    def log_metrics(engine: Engine):
        print(f"Epoch {engine.state.epoch}: loss={engine.state.metrics['loss']}")

    # Alternative syntax
    def log_metrics(engine: Engine):  # noqa: F811
        print(f"Epoch {engine.state.epoch}: loss={engine.state.metrics['loss']}")

    trainer.on(Events.EPOCH_COMPLETED, log_metrics)

    # Periodic handler
    @trainer.on(Events.ITERATION_COMPLETED(every=100))
    def log_batch(engine: Engine):
        print(f"Iter {engine.state.iteration}: loss={engine.state.output['loss']}")

    trainer.run([0] * 100)
    mean = sum(1 / count for count in range(1, 101)) / 100
    *by_iteration, first, second = capsys.readouterr().out.splitlines()
    assert by_iteration == ["Iter 100: loss=0.01"]
    assert first == second == f"Epoch 0: loss={mean}"


def test_handler_order() -> None:
    trainer = Engine(loss_step)
    order: list[str] = []

    def named(name: str) -> Callable[[Engine], None]:
        return lambda engine: order.append(name)

    handler1, handler2, handler3 = named("1"), named("2"), named("3")
    handler_urgent, handler_normal, handler_late = named("urgent"), named("normal"), named("late")

    # Handlers execute in registration order
    trainer.on(Events.EPOCH_COMPLETED, handler1)  # Runs first
    trainer.on(Events.EPOCH_COMPLETED, handler2)  # Runs second
    trainer.on(Events.EPOCH_COMPLETED, handler3)  # Runs third

    trainer.run([0])
    assert order == ["1", "2", "3"]
    order.clear()

    # Priority control (optional)
    trainer.on(Events.EPOCH_COMPLETED, handler_urgent, priority=10)  # High priority
    trainer.on(Events.EPOCH_COMPLETED, handler_normal, priority=0)  # Default
    trainer.on(Events.EPOCH_COMPLETED, handler_late, priority=-10)  # Low priority

    trainer.run([0])
    assert order == ["urgent", "1", "2", "3", "normal", "late"]


@pytest.mark.parametrize("enum", [Enum, EventEnum])
def test_custom_events(enum: Any) -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_fn = torch.nn.MSELoss()

    # Define custom events
    class TrainEvents(enum):
        BACKWARD_STARTED = "backward_started"
        BACKWARD_COMPLETED = "backward_completed"
        OPTIMIZER_STEP = "optimizer_step"

    # Fire events in process function
    def train_step(engine: Engine, batch: any):
        x, y = batch
        pred = model(x)
        loss = loss_fn(pred, y)

        engine.fire_event(TrainEvents.BACKWARD_STARTED)
        loss.backward()
        engine.fire_event(TrainEvents.BACKWARD_COMPLETED)

        engine.fire_event(TrainEvents.OPTIMIZER_STEP)
        optimizer.step()

        return {"loss": loss.item()}

    trainer = Engine(train_step)

    # Register events
    trainer.register_events(TrainEvents)

    # Attach custom event handlers
    @trainer.on(TrainEvents.BACKWARD_COMPLETED)
    def clip_gradients(engine: Engine):
        torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)

    norms: list[float] = []

    @trainer.on(TrainEvents.OPTIMIZER_STEP)
    def note(engine: Engine) -> None:
        norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])))

    trainer.run([(torch.ones(4, 1), torch.full((4, 1), 1e6))] * 3)
    assert norms == pytest.approx([1.0] * 3, abs=1e-4)


# -- metrics -----------------------------------------------------------------------------------------------------


def test_metric_interface() -> None:
    assert parameters_of(Metric.reset) == parameters_of(Metric.compute) == []
    assert parameters_of(Metric.update) == ["output"]


def test_classification_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Engine(lambda engine, batch: (torch.eye(2)[[batch, 1]], torch.tensor([1, 1])))

    # Attach metric to engine
    accuracy = Accuracy()
    trainer.add_metric(accuracy, "acc")

    # Metrics auto-compute on Events.EPOCH_COMPLETED
    @trainer.on(Events.EPOCH_COMPLETED)
    def log_accuracy(engine: Engine):
        print(f"Accuracy: {engine.state.metrics['acc']:.4f}")

    # Imported there with it
    trainer.add_metrics({"precision": Precision(), "recall": Recall(), "f1": F1Score()})

    trainer.run([0, 1])
    assert capsys.readouterr().out == "Accuracy: 0.7500\n"
    assert trainer.state.metrics == pytest.approx({"acc": 0.75, "precision": 0.5, "recall": 0.375, "f1": 3 / 7})


def test_regression_metrics() -> None:
    trainer = Engine(lambda engine, batch: batch)

    mse = MSE()
    mae = MAE()
    trainer.add_metrics({
        "mse": mse,
        "mae": mae,
    })  # fmt: skip

    trainer.add_metric(R2Score(), "r2")
    trainer.run([(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0]))])
    assert trainer.state.metrics == pytest.approx({"mse": 2.0, "mae": 1.0, "r2": 1 - 4 / 4.5})


def test_custom_metrics() -> None:
    trainer = Engine(lambda engine, batch: {"loss": batch + engine.state.epoch, "pred": 1, "label": 2})

    class PerplexityMetric(Metric):
        def __init__(self):
            self.total_loss = 0.0
            self.count = 0

        def reset(self):
            self.total_loss = 0.0
            self.count = 0

        def update(self, output: any):
            self.total_loss += output["loss"]
            self.count += 1

        def compute(self) -> float:
            avg_loss = self.total_loss / self.count
            return exp(avg_loss)

    perplexity = PerplexityMetric()
    trainer.add_metric(perplexity, "ppl")

    values: list[Any] = []
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: values.append(engine.state.metrics["ppl"]))
    trainer.run([1.0, 2.0], max_epochs=2)
    assert values == pytest.approx([exp(1.5), exp(2.5)])
    assert all(type(value) is float for value in values)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_distributed_metrics(device: str) -> None:
    trainer = Engine(lambda engine, batch: (torch.tensor([batch, 1]), torch.tensor([1, 1])))

    # Automatic reduction across GPUs
    accuracy = DistributedMetric(
        base_metric=Accuracy(),
        reduce_op="mean",  # "sum" | "mean" | "max" | "min"
        device=device,
    )

    trainer.add_metric(accuracy, "acc")
    assert trainer.run([0, 1]).metrics == {"acc": 0.75}


# -- built-in handlers -------------------------------------------------------------------------------------------


def test_checkpoint_handler() -> None:
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = engine_with(acc=[0.5, 0.75, 0.25, 0.7, 0.1])

    # Save model and optimizer state
    checkpoint = Checkpoint(
        to_save={
            "model": model,
            "optimizer": optimizer,
            "trainer": trainer,  # Save engine state
        },
        save_dir="checkpoints",
        filename_prefix="best",
        n_saved=3,  # Keep last 3 checkpoints
        global_step_transform=lambda engine, event: engine.state.iteration,
    )

    # Save every 1000 iterations
    trainer.on(Events.ITERATION_COMPLETED(every=1000), checkpoint)

    # Save best model based on metric
    best_checkpoint = Checkpoint(
        to_save={"model": model},
        save_dir="checkpoints",
        filename_prefix="best",
        score_function=lambda engine: engine.state.metrics["acc"],
        score_name="acc",
        n_saved=1,
    )
    trainer.on(Events.EPOCH_COMPLETED, best_checkpoint)

    trainer.run(range(1000), max_epochs=5)
    saved = sorted(path.name for path in Path("checkpoints").glob("*.pt"))
    assert saved == ["best_2000_acc=0.7500.pt", "best_3000.pt", "best_4000.pt", "best_5000.pt"]


def test_early_stopping() -> None:
    trainer = Engine(loss_step)
    evaluator = engine_with(val_loss=[1.0, 0.5, *[0.4999] * 20])

    # Stop if val loss doesn't improve
    early_stop = EarlyStopping(
        patience=10,
        min_delta=0.001,
        score_function=lambda engine: -engine.state.metrics["val_loss"],  # Maximize
        trainer=trainer,  # Engine to stop
    )

    evaluator.on(Events.EPOCH_COMPLETED, early_stop)

    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([0]))
    assert trainer.run([0], max_epochs=100).epoch == 11


def test_learning_rate_scheduler(optimizer: torch.optim.Optimizer) -> None:
    trainer = Engine(lambda engine, batch: optimizer.step())

    # Step LR
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=10, gamma=0.1)
    lr_handler = LRScheduler(scheduler)
    trainer.on(Events.EPOCH_COMPLETED, lr_handler)

    trainer.run([0], max_epochs=20)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_learning_rate_on_a_plateau(optimizer: torch.optim.Optimizer) -> None:
    evaluator = engine_with(val_loss=[1.0] * 7)

    # ReduceLROnPlateau (metric-based)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="min", patience=5
    )  # fmt: skip
    lr_handler = LRScheduler(scheduler, metric_name="val_loss")
    evaluator.on(Events.EPOCH_COMPLETED, lr_handler)

    rates = [evaluator.run([0]) and optimizer.param_groups[0]["lr"] for _ in range(7)]
    assert rates == pytest.approx([1.0] * 6 + [0.1])


def test_timer(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Engine(loss_step)

    timer = Timer()
    timer.attach(trainer, start=Events.STARTED, step=Events.ITERATION_COMPLETED)

    @trainer.on(Events.EPOCH_COMPLETED)
    def log_time(engine: Engine):
        print(f"Epoch time: {timer.value():.2f}s")
        print(f"Average batch time: {timer.step_time():.4f}s")

    trainer.run([0, 1])
    assert re.fullmatch(r"Epoch time: \d+\.\d\ds\nAverage batch time: \d\.\d{4}s\n", capsys.readouterr().out)


def test_progress_bar(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Engine(lambda engine, batch: {"loss": 0.345})

    pbar = ProgressBar()
    pbar.attach(trainer, metric_names=["loss"], output_transform=lambda x: x)

    # Output:
    # Epoch [1/10]: 100%|██████████| 1000/1000 [01:23<00:00, 12.01it/s, loss=0.345]
    trainer.run(range(1000), max_epochs=10)
    first, *_ = lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert re.fullmatch(r"Epoch \[1/10\]: 100%\|█{10,}\| 1000/1000 \[00:\d\d<00:00, +[\d.]+it/s, loss=0\.345\]", first)


def test_tracking_integration() -> None:
    trainer = Engine(loss_step)
    trainer.add_metric(Accuracy(output_transform=lambda output: (1, 1)), "acc")
    with Track.run(project="p") as run:
        # Log to Track system
        tracking_handler = TrackingHandler(
            run=run,
            metric_names=["loss", "acc"],
            output_transform=lambda x: x,
            global_step_transform=lambda engine, event: engine.state.iteration,
        )

        trainer.on(Events.ITERATION_COMPLETED(every=10), tracking_handler)

        trainer.run(range(20), max_epochs=2)
    rows = [{name: row.get(name) for name in ("step", "loss", "acc")} for row in rows_of(run.dir)]
    assert rows == [
        {"step": 10, "loss": 0.1, "acc": None},  # computed at the end of an epoch
        {"step": 20, "loss": 0.05, "acc": None},
        {"step": 30, "loss": 1 / 30, "acc": 1.0},
        {"step": 40, "loss": 0.025, "acc": 1.0},
    ]


# -- the complete training example -------------------------------------------------------------------------------

CONFIG = """\
lr: 0.01
batch_size: 64
epochs: 3
patience: 10
checkpoint_dir: checkpoints
"""


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_complete_training_example(tmp_path: Path, device: str) -> None:
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "train.sdn").write_text(CONFIG)
    done = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, timeout=1000, env=environment())
    assert done.returncode == 0, done.stderr

    (run_dir,) = (tmp_path / "runs" / "cifar10").glob("*-*")
    rows = rows_of(run_dir)
    assert [(row["step"], row["epoch"]) for row in rows] == [(0, 0), (1, 1), (2, 2)]
    best = max(row["val/acc"] for row in rows)
    assert best > 0.9
    assert json.loads((run_dir / "config.json").read_text())["lr"] == 0.01
    assert json.loads((run_dir / "status.json").read_text())["status"] == "finished"

    # What it prints
    *by_epoch, closing = done.stdout.splitlines()
    last = rows[-1]
    shown = [f"{name}: {last[key]:.4f}" for name, key in [("Train Loss", "train/loss"), ("Val Loss", "val/loss")]]
    assert by_epoch[-4:] == ["Epoch 2", *(f"  {line}" for line in shown), f"  Val Acc: {last['val/acc']:.4f}"]
    assert closing == "Training completed!"
    assert re.search(r"^Epoch \[3/3\]: 100%\|█+\| 24/24 \[.*loss=[\d.e-]+\]$", done.stderr, re.MULTILINE), done.stderr

    # What it saves
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.pt")
    assert checkpoint.name.endswith(f"_acc={best:.4f}.pt")
    with Track.run(project="cifar10") as later:
        folder = later.use_artifact("cifar10-resnet50:final").download()
    stored, saved = (torch.load(path / "final_model.pt", weights_only=True) for path in (folder, tmp_path))
    assert stored.keys() == saved.keys()
    assert all(torch.equal(stored[name], saved[name]) for name in saved)


# -- advanced features -------------------------------------------------------------------------------------------


def test_multiple_engines() -> None:
    def train_step_source(engine: Engine, batch: int) -> int:
        return order.append(f"source {batch}") or batch

    def train_step_target(engine: Engine, batch: int) -> int:
        return order.append(f"target {batch}") or batch

    order: list[str] = []
    source_loader, target_loader, val_loader, num_epochs = [1, 2], [3], [1, 1, 0, 1], 3
    evaluator = Engine(lambda engine, batch: (batch, 1))
    evaluator.add_metric(Accuracy(), "acc")
    evaluator.on(Events.COMPLETED, lambda engine: order.append(f"acc {engine.state.metrics['acc']}"))

    # Train on source domain
    source_trainer = Engine(train_step_source)

    # Train on target domain
    target_trainer = Engine(train_step_target)

    # Alternate training
    for epoch in range(num_epochs):  # noqa: B007
        source_trainer.run(source_loader, max_epochs=1)
        target_trainer.run(target_loader, max_epochs=1)

        # Evaluate
        evaluator.run(val_loader)

    assert order == ["source 1", "source 2", "target 3", "acc 0.75"] * 3


def test_engine_composition() -> None:
    trainer, model, best_acc, val_loader = Engine(loss_step), torch.nn.Linear(1, 1), 0.4, [1, 0]
    evaluator = Engine(lambda engine, batch: (batch, 1))
    evaluator.add_metric(Accuracy(), "acc")
    saved: list[str] = []

    def save_checkpoint(model: torch.nn.Module, path: str) -> None:
        saved.append(path)

    # Run evaluator at specific iterations
    @trainer.on(Events.ITERATION_COMPLETED(every=500))
    def evaluate_during_training(engine: Engine):
        evaluator.run(val_loader)
        val_acc = evaluator.state.metrics["acc"]

        if val_acc > best_acc:
            save_checkpoint(model, f"checkpoint_iter_{engine.state.iteration}.pt")

    trainer.run(range(700), max_epochs=2)
    assert saved == ["checkpoint_iter_500.pt", "checkpoint_iter_1000.pt"]


def test_state_serialization() -> None:
    def new_trainer() -> Engine:
        return Engine(loss_step)

    trainer, train_loader = new_trainer(), range(70)

    # Save engine state
    checkpoint = Checkpoint(
        to_save={"trainer": trainer},
        save_dir="checkpoints",
    )
    trainer.on(Events.ITERATION_COMPLETED(every=1000), checkpoint)

    trainer.run(train_loader, max_iterations=5500, max_epochs=100)
    trainer = new_trainer()
    iterations: list[int] = []
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: iterations.append(engine.state.iteration))

    # Resume training
    state_dict = torch.load("checkpoints/checkpoint_5000.pt")
    trainer.load_state_dict(state_dict["trainer"])
    trainer.run(train_loader, max_epochs=100)  # Resumes from iteration 5000

    assert iterations == list(range(5001, 7001))


# -- API reference -----------------------------------------------------------------------------------------------


def test_engine_reference() -> None:
    assert parameters_of(Engine.__init__)[:1] == ["process_function"]
    assert parameters_of(Engine.on)[:3] == ["event", "handler", "priority"]
    assert parameters_of(Engine.fire_event) == ["event"]
    assert inspect.signature(Engine.register_events).parameters["events"].kind is inspect.Parameter.VAR_POSITIONAL
    assert parameters_of(Engine.add_metric)[:2] == ["metric", "name"]
    assert parameters_of(Engine.add_metrics) == ["metrics"]
    assert parameters_of(Engine.run)[:2] == ["data", "max_epochs"]
    assert inspect.signature(Engine.run).parameters["max_epochs"].default == 1
    assert parameters_of(Engine.terminate) == parameters_of(Engine.state_dict) == []
    assert parameters_of(Engine.load_state_dict) == ["state_dict"]


def test_events_reference() -> None:
    names = "STARTED EPOCH_STARTED ITERATION_STARTED ITERATION_COMPLETED EPOCH_COMPLETED COMPLETED EXCEPTION_RAISED"
    for name in names.split():
        assert isinstance(Events[name], EventEnum)
        Events[name](every=2)
        Events[name](once=2)


def test_state_reference() -> None:
    state = Engine(loss_step).state
    for name in [
        "epoch",
        "iteration",
        "epoch_iteration",
        "max_epochs",
        "output",
        "metrics",
        "dataloader",
        "batch",
        "times",
    ]:
        assert hasattr(state, name)
    assert isinstance(state.times, dict)


# -- testing strategy --------------------------------------------------------------------------------------------


def test_scenario_basic_training_loop() -> None:
    counter = {"count": 0}

    def process(engine, batch):
        counter["count"] += 1
        return batch

    engine = Engine(process)
    data = [1, 2, 3, 4, 5]

    engine.run(data, max_epochs=2)

    assert counter["count"] == 10  # 5 batches × 2 epochs


def test_scenario_event_handlers() -> None:
    events_fired = []

    def process(engine, batch):
        return batch

    engine = Engine(process)

    @engine.on(Events.STARTED)
    def on_start(e):
        events_fired.append("started")

    @engine.on(Events.ITERATION_COMPLETED)
    def on_iter(e):
        events_fired.append("iter")

    @engine.on(Events.EPOCH_COMPLETED)
    def on_epoch(e):
        events_fired.append("epoch")

    engine.run([1, 2, 3], max_epochs=1)

    assert events_fired == ["started", "iter", "iter", "iter", "epoch"]


def test_scenario_metrics_computation() -> None:
    def process(engine, batch):
        return {"pred": batch * 2, "label": batch * 2}

    engine = Engine(process)

    metric = Accuracy()
    engine.add_metric(metric, "acc")

    engine.run([1, 2, 3], max_epochs=1)

    assert engine.state.metrics["acc"] == 1.0  # Perfect accuracy


# -- helpers -----------------------------------------------------------------------------------------------------


def parameters_of(function: Any) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name != "self"]


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}
