"""The tracking parts of the complete training example, as a user writes them."""

import json
from pathlib import Path

import pytest
import torch

from dengine import Engine, Events
from dengine.metrics import Accuracy, Loss
from dengine.tracking import Track


def test_the_complete_example_tracks_its_epochs_and_its_final_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, loss_fn = torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss()
    val_loader = [(torch.randn(8, 4), torch.randint(0, 3, (8,)))]
    trainer = Engine(lambda engine, batch: {"loss": batch / 2})
    evaluator = Engine(lambda engine, batch: {"pred": model(batch[0]).detach(), "labels": batch[1]})
    evaluator.add_metrics(
        {
            "acc": Accuracy(output_transform=lambda x: (x["pred"], x["labels"])),
            "loss": Loss(loss_fn, output_transform=lambda x: (x["pred"], x["labels"])),
        }
    )

    with Track.run(project="cifar10", config={"lr": 0.1, "epochs": 2}) as run:

        @trainer.on(Events.EPOCH_COMPLETED)
        def run_validation(engine: Engine) -> None:
            evaluator.run(val_loader)
            metrics = evaluator.state.metrics
            run.log(
                {
                    "train/loss": engine.state.output["loss"],
                    "val/loss": metrics["loss"],
                    "val/acc": metrics["acc"],
                    "epoch": engine.state.epoch,
                },
                step=engine.state.epoch,
            )

        trainer.run([1.0, 2.0], max_epochs=2)
        final_artifact = Track.Artifact("cifar10-resnet50", type="model")
        torch.save(model.state_dict(), "final_model.pt")
        final_artifact.add_file("final_model.pt")
        run.log_artifact(final_artifact, aliases=["final"])

    rows = [json.loads(line) for line in (run.dir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["epoch"], row["train/loss"]) for row in rows] == [(0, 0, 1.0), (1, 1, 1.0)]
    assert rows[0]["val/acc"] == pytest.approx(evaluator.state.metrics["acc"])
    with Track.run(project="cifar10") as later:
        folder = later.use_artifact("cifar10-resnet50:final").download()
    weights = torch.load(folder / "final_model.pt", weights_only=True)
    assert torch.equal(weights["weight"], model.weight)
