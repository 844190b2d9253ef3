"""Over real ranks: a best checkpoint by the trainer's step, a stop that rank 0 decides, and one warning for all."""

import warnings
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks

from dengine import Engine, Events, distributed
from dengine.handlers import Checkpoint, EarlyStopping
from dengine.tracking import Track


def trained(rank: int, size: int, folder: str) -> dict[str, Any]:
    trainer, evaluator = Engine(lambda engine, batch: batch), Engine(lambda engine, batch: batch)
    losses = iter([9.0, 1.0, 1.0, 3.0, 4.0, 5.0, 6.0, 7.0])

    def loss(engine: Engine) -> float:
        # Asked of rank 0 alone: any other one's would go on for ever.
        return next(losses) if rank == 0 else -float(trainer.state.epoch)

    model = torch.nn.Linear(1, 1)
    checkpoint = Checkpoint(
        {"model": model}, folder, "best", n_saved=None, score_function=lambda engine: 0.5, score_name="acc"
    )
    evaluator.on(Events.EPOCH_COMPLETED, checkpoint)
    stop = EarlyStopping(2, loss, trainer, mode="min", start_after=1)
    evaluator.on(Events.EPOCH_COMPLETED, stop)
    evaluator.on(Events.EPOCH_COMPLETED(after=3), lambda engine: None)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([0, 1, 2]))
    with warnings.catch_warnings(record=True) as caught, Track.run("p", dir=folder) as run:
        warnings.simplefilter("always")
        trainer.on(Events.EPOCH_COMPLETED, lambda engine: run.log({"odd": [1], "epoch": engine.state.epoch}))
        trainer.run(range(4), max_epochs=20)
    distributed.barrier()
    return {
        "epochs": trainer.state.epochs_completed,
        "saved": [saved.path.name for saved in checkpoint.saved],
        "stop": stop.state_dict(),
        "told": sorted(str(each.message).partition(":")[0] for each in caught if each.category is RuntimeWarning),
    }


def test_an_evaluators_handlers_act_alike_on_all_ranks_and_speak_on_one(tmp_path: Path) -> None:
    first, second = run_ranks(trained, 2, str(tmp_path))
    # One call is passed over, without a loss; then 9.0 and 1.0 are improvements, 1.0 and 3.0 are none.
    assert first["epochs"] == second["epochs"] == 5
    names = [f"best_{step}_acc=0.5000.pt" for step in (4, 8, 12, 16, 20)]
    assert first["saved"] == second["saved"] == names
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == sorted(names)
    assert first["stop"]["num_passed_over"] == second["stop"]["num_passed_over"] == 1
    assert first["told"] == ["Left out of the record", "The counts of this run did not reach some handlers"]
    assert second["told"] == []
