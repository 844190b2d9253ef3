"""A checkpoint holds what the other handlers of its iteration have done, wherever it is attached."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import Engine, Events, SupervisedEvents, create_supervised_trainer
from dengine.checkpoint import load
from dengine.handlers import EMA, Checkpoint, LRScheduler

NUM_BATCHES, NUM_EPOCHS = 7, 2


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(4, 4, generator=generator), torch.randint(0, 3, (4,), generator=generator))
        for _ in range(NUM_BATCHES)
    ]


def made(attached: str, accumulation: int, folder: Path) -> tuple[Engine, dict[str, Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, gradient_accumulation_steps=accumulation)
    schedule = LRScheduler(torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9))
    by_epoch = LRScheduler(torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5))
    ema = EMA(model)
    parts = {"model": model, "optimizer": optimizer, "trainer": trainer, "ema": ema}
    parts |= {"schedule": schedule, "by_epoch": by_epoch}
    save = Checkpoint(parts, folder, n_saved=99)
    event: Any = Events.ITERATION_COMPLETED | Events.EPOCH_COMPLETED
    if attached == "at the step":
        event = SupervisedEvents.OPTIMIZER_STEP_COMPLETED
    if attached != "last":
        trainer.on(event, save)
    trainer.on(Events.ITERATION_COMPLETED, schedule)
    trainer.on(Events.ITERATION_COMPLETED, ema)
    trainer.on(Events.EPOCH_COMPLETED, by_epoch)
    if attached == "last":
        trainer.on(event, save)
    return trainer, parts


@pytest.mark.parametrize(
    ("attached", "accumulation"),
    [("first", 1), ("last", 1), ("at the step", 1), ("at the step", 2), ("at the step", 3)],
)
def test_a_run_resumed_from_any_checkpoint_ends_as_the_whole_one(
    attached: str, accumulation: int, tmp_path: Path
) -> None:
    trainer, whole = made(attached, accumulation, tmp_path)
    trainer.run(batches(), max_epochs=NUM_EPOCHS)
    saved = list(tmp_path.glob("*.pt"))
    assert len(saved) >= NUM_EPOCHS * NUM_BATCHES // accumulation
    for path in saved:
        trainer, resumed = made(attached, accumulation, tmp_path / path.stem)
        load(path, resumed)
        trainer.run(batches(), max_epochs=NUM_EPOCHS)
        assert resumed["ema"].num_updates == NUM_EPOCHS * NUM_BATCHES, path.name
        rates = [parts["optimizer"].param_groups[0]["lr"] for parts in (resumed, whole)]
        assert rates[0] == rates[1], path.name
        for one, other in ((resumed["model"], whole["model"]), (resumed["ema"].model, whole["ema"].model)):
            for found, expected in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
                assert torch.equal(found, expected), path.name


def test_a_step_that_the_end_of_the_data_completes_is_saved_behind_the_handlers_of_the_epochs_end(
    tmp_path: Path,
) -> None:
    """Nobody knew that the last batch was the last one, so that its step is made as the epoch ends."""
    trainer, parts = made("at the step", 2, tmp_path)
    trainer.run(iter(batches()), max_epochs=1)
    (last,) = tmp_path.glob("*_7.pt")
    _, again = made("at the step", 2, tmp_path / "again")
    load(last, again)
    assert again["by_epoch"].state_dict() == parts["by_epoch"].state_dict()


def test_what_a_run_that_failed_was_to_save_is_not_saved_by_the_next_one(tmp_path: Path) -> None:
    trainer, _ = made("at the step", 1, tmp_path)

    def fail(engine: Engine) -> None:
        raise RuntimeError("before it was saved")

    handle = trainer.on(Events.ITERATION_COMPLETED(once=3), fail)
    with pytest.raises(RuntimeError, match="before it was saved"):
        trainer.run(batches())
    assert sorted(path.stem for path in tmp_path.glob("*.pt")) == ["checkpoint_1", "checkpoint_2"]
    handle.remove()
    trainer.run(batches(), max_iterations=1)
    assert sorted(path.stem for path in tmp_path.glob("*.pt")) == ["checkpoint_1", "checkpoint_2"]
