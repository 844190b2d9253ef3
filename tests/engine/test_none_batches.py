"""A batch of None is an iteration without a step."""

import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from dengine import Engine, Events, create_supervised_evaluator, create_supervised_trainer, distributed
from dengine.handlers import ProgressBar, TerminateOnNan, ThroughputMonitor
from dengine.metrics import Accuracy, Average, RunningAverage
from dengine.supervised.trainer import SupervisedEvents


def few(samples: list[int]) -> Any:
    """Leaves out what does not divide by 3; None if nothing is left."""
    kept = [float(sample) for sample in samples if sample % 3 == 0]
    return (torch.tensor(kept)[:, None], torch.tensor(kept)[:, None] / 10) if kept else None


def loader(**options: Any) -> Any:
    return DataLoader(range(16), batch_size=2, collate_fn=few, **options)  # type: ignore[arg-type]


def test_it_has_all_events_but_no_step_no_output_and_no_metric() -> None:
    called: list[Any] = []
    events: list[tuple[str, int, Any]] = []
    engine = Engine(lambda engine, batch: called.append(batch) or batch)
    engine.add_metric(Average(), "mean")
    engine.add_metric(RunningAverage(), "running")
    for event in (Events.GET_BATCH_COMPLETED, Events.ITERATION_STARTED, Events.ITERATION_COMPLETED):
        engine.on(
            event, lambda engine, name=event.value: events.append((name, engine.state.iteration, engine.state.batch))
        )
    outputs: list[Any] = []
    engine.on(Events.ITERATION_COMPLETED, lambda engine: outputs.append(engine.state.output))
    engine.on(Events.ITERATION_COMPLETED, TerminateOnNan(lambda output: output + 1))
    ThroughputMonitor().attach(engine)
    ProgressBar().attach(engine, output_transform=lambda output: {"loss": output + 0})
    state = engine.run([1, None, None, 4, None])
    assert called == [1, 4]
    assert outputs == [1, None, None, 4, None]
    assert (state.iteration, state.epoch_length, state.metrics["mean"]) == (5, 5, 2.5)
    assert [entry[1:] for entry in events if entry[0] == "iteration_completed"] == [
        (1, 1),
        (2, None),
        (3, None),
        (4, 4),
        (5, None),
    ]
    assert len(events) == 15


def test_a_handler_may_leave_a_batch_out_and_put_one_in() -> None:
    called: list[Any] = []
    engine = Engine(lambda engine, batch: called.append(batch))

    @engine.on(Events.ITERATION_STARTED)
    def change(engine: Engine) -> None:
        engine.state.batch = None if engine.state.batch == 2 else engine.state.batch or 7

    engine.run([1, 2, None])
    assert called == [1, 7]


def test_an_epoch_of_nothing_else_is_a_warning() -> None:
    engine = Engine(lambda engine, batch: 1)
    with pytest.warns(RuntimeWarning, match=r"All 3 batches of epoch 0 were None on rank 0.*run over range\(n\)"):
        assert engine.run([None] * 3).iteration == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        engine.run([None, 1])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_supervised_trainer_and_evaluator_leave_it_out(workers: int) -> None:
    torch.manual_seed(0)
    model, reference = nn.Linear(1, 1), nn.Linear(1, 1)
    reference.load_state_dict(model.state_dict())
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), 0.001), nn.MSELoss())
    steps: list[int] = []
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: steps.append(engine.state.iteration))
    trainer.run(loader(num_workers=workers))
    optimizer = torch.optim.SGD(reference.parameters(), 0.001)
    for batch in loader():
        if batch is not None:
            optimizer.zero_grad()
            nn.functional.mse_loss(reference(batch[0]), batch[1]).backward()
            optimizer.step()
    assert torch.equal(model.weight, reference.weight)
    assert steps == [1, 2, 4, 5, 7, 8]
    evaluator = create_supervised_evaluator(
        nn.Identity(),
        {"accuracy": Accuracy()},
        output_transform=lambda x, y, pred: (pred.flatten() > 0, y.flatten() > 0),
    )
    state = evaluator.run(distributed.prepare_data_loader(loader(), exact=True))
    assert (state.iteration, state.metrics["accuracy"]) == (8, 1.0)


@pytest.mark.parametrize("num_batches", [2, 3])
@pytest.mark.parametrize("left_out", [[1], [2], [1, 2], [5], [5, 6], [7], [1, 2, 3, 4, 5, 6]])
def test_an_accumulation_steps_with_what_it_has(num_batches: int, left_out: list[int]) -> None:
    torch.manual_seed(0)
    model, reference = nn.Linear(1, 1), nn.Linear(1, 1)
    reference.load_state_dict(model.state_dict())
    data = [
        None if number in left_out else (torch.full((number, 1), number / 9), torch.ones(number, 1))
        for number in range(1, 8)
    ]
    trainer = create_supervised_trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), nn.MSELoss(), gradient_accumulation_steps=num_batches
    )
    trainer.run(data, max_epochs=2)
    optimizer = torch.optim.SGD(reference.parameters(), 0.1)
    for _ in range(2):
        for start in range(0, 7, num_batches):
            if batches := [batch for batch in data[start : start + num_batches] if batch is not None]:
                inputs, targets = (torch.cat(part) for part in zip(*batches, strict=True))
                optimizer.zero_grad()
                nn.functional.mse_loss(reference(inputs), targets).backward()
                optimizer.step()
    assert torch.allclose(model.weight, reference.weight, atol=1e-6)
