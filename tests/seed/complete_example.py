"""The seed's complete training example, word for word but for the syntax and the imports.

It reads config/train.sdn in the current folder, and writes there.
"""

import torch
from parts import ResNet50, create_dataloader

from dengine import Engine, Events
from dengine.config import Conf
from dengine.handlers import Checkpoint, EarlyStopping, LRScheduler, ProgressBar
from dengine.metrics import Accuracy, Loss
from dengine.tracking import Track

# Load config
cfg = Conf.load_sdn("config/train.sdn")

# Create model
model = ResNet50(num_classes=10)
optimizer = torch.optim.Adam(model.parameters(), lr=cfg.lr)
loss_fn = torch.nn.CrossEntropyLoss()

# Create data loaders
train_loader = create_dataloader(cfg, split="train")
val_loader = create_dataloader(cfg, split="val")


# Define training step
def train_step(engine: Engine, batch: any):
    model.train()
    optimizer.zero_grad()

    images, labels = batch
    pred = model(images)
    loss = loss_fn(pred, labels)

    loss.backward()
    optimizer.step()

    return {
        "loss": loss.item(),
        "pred": pred.detach(),
        "labels": labels,
    }


# Define validation step
def val_step(engine: Engine, batch: any):
    model.eval()

    with torch.no_grad():
        images, labels = batch
        pred = model(images)
        loss = loss_fn(pred, labels)

    return {
        "loss": loss.item(),
        "pred": pred,
        "labels": labels,
    }


# Create engines
trainer = Engine(train_step)
evaluator = Engine(val_step)

# Add metrics to evaluator
accuracy = Accuracy(output_transform=lambda x: (x["pred"], x["labels"]))
evaluator.add_metrics({
    "acc": accuracy,
    "loss": Loss(loss_fn, output_transform=lambda x: (x["pred"], x["labels"])),
})  # fmt: skip

# Setup tracking
with Track.run(project="cifar10", config=Conf.to_dict(cfg)) as run:
    # Progress bar
    pbar = ProgressBar()
    pbar.attach(trainer, output_transform=lambda x: {"loss": x["loss"]})

    # Run validation every epoch
    @trainer.on(Events.EPOCH_COMPLETED)
    def run_validation(engine: Engine):
        evaluator.run(val_loader)
        metrics = evaluator.state.metrics

        # Log to tracking
        run.log({
            "train/loss": engine.state.output["loss"],
            "val/loss": metrics["loss"],
            "val/acc": metrics["acc"],
            "epoch": engine.state.epoch,
        }, step=engine.state.epoch)  # fmt: skip

        print(f"Epoch {engine.state.epoch}")
        print(f"  Train Loss: {engine.state.output['loss']:.4f}")
        print(f"  Val Loss: {metrics['loss']:.4f}")
        print(f"  Val Acc: {metrics['acc']:.4f}")

    # Checkpoint best model
    best_checkpoint = Checkpoint(
        to_save={"model": model, "optimizer": optimizer},
        save_dir=cfg.checkpoint_dir,
        filename_prefix="best",
        score_function=lambda eng: evaluator.state.metrics["acc"],
        score_name="acc",
        n_saved=1,
    )
    trainer.on(Events.EPOCH_COMPLETED, best_checkpoint)

    # Early stopping
    early_stop = EarlyStopping(
        patience=cfg.patience,
        score_function=lambda eng: evaluator.state.metrics["acc"],
        trainer=trainer,
    )
    evaluator.on(Events.EPOCH_COMPLETED, early_stop)

    # Learning rate scheduling
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, mode="max", patience=5
    )  # fmt: skip
    lr_handler = LRScheduler(
        scheduler,
        metric_name="acc",
        metric_engine=evaluator,
    )
    trainer.on(Events.EPOCH_COMPLETED, lr_handler)

    # Run training
    trainer.run(train_loader, max_epochs=cfg.epochs)

    # Save final model
    final_artifact = Track.Artifact("cifar10-resnet50", type="model")
    torch.save(model.state_dict(), "final_model.pt")
    final_artifact.add_file("final_model.pt")
    run.log_artifact(final_artifact, aliases=["final"])

print("Training completed!")
