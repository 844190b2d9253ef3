"""Handlers beside a training on a GPU: what they find there, and that none waits for it unasked."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from dengine import Engine, Events, create_supervised_trainer
from dengine.handlers import (
    EMA,
    Checkpoint,
    LRScheduler,
    MemoryMonitor,
    Profiler,
    ProgressBar,
    TerminateOnNan,
    ThroughputMonitor,
    TrackingHandler,
)
from dengine.metrics import Accuracy, Average
from dengine.tracking import Track

pytestmark = pytest.mark.gpu
WIDTH = 256


def trainer_and_model() -> tuple[Engine, nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10)).cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return create_supervised_trainer(model, optimizer, cross_entropy), model, optimizer


def batches(num: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(32, WIDTH).pin_memory(), torch.randint(0, 10, (32,)).pin_memory()) for _ in range(num)]


def test_no_handler_waits_for_the_device_before_its_turn(tmp_path: Path) -> None:
    trainer, model, optimizer = trainer_and_model()
    trainer.add_metrics({"acc": Accuracy(), "loss": Average()})
    ProgressBar().attach(trainer, output_transform=lambda output: {"loss": output["loss"]})
    ThroughputMonitor(num_tokens=lambda engine: (engine.state.output["label"] >= 0).sum()).attach(trainer)
    MemoryMonitor().attach(trainer)
    ema = EMA(model)
    trainer.on(Events.ITERATION_COMPLETED, ema)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100)
    trainer.on(Events.ITERATION_COMPLETED, LRScheduler(scheduler))
    done: list[int] = []
    with Track.run("gpu", dir=tmp_path) as run:
        log = TrackingHandler(run, output_transform=lambda output: {"loss": output["loss"]})
        trainer.on(Events.ITERATION_COMPLETED(every=10), log)
        trainer.run(batches(4))  # what is made once
        trainer.on(Events.GET_BATCH_COMPLETED(once=2), lambda engine: torch.cuda.set_sync_debug_mode("error"))
        trainer.on(Events.ITERATION_COMPLETED, lambda engine: done.append(engine.state.iteration), priority=-1)
        trainer.on(
            Events.ITERATION_COMPLETED(once=9), lambda engine: torch.cuda.set_sync_debug_mode("default"), priority=-2
        )
        try:
            trainer.run(batches(12))
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert done == list(range(1, 13))
    assert ema.num_updates == 16


def test_an_average_of_weights_is_that_of_the_host() -> None:
    trainer, model, _ = trainer_and_model()
    ema = EMA(model, decay=0.5)
    seen: list[torch.Tensor] = []
    trainer.on(Events.ITERATION_COMPLETED, ema)
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: seen.append(model[0].weight.detach().cpu().double()))
    trainer.run(batches(3))
    expected = ((seen[0] + seen[1]) / 2 + seen[2]) / 2
    torch.testing.assert_close(ema.model[0].weight.cpu().double(), expected, rtol=1e-5, atol=1e-7)


def test_throughput_and_memory_are_those_of_the_device() -> None:
    trainer, _, _ = trainer_and_model()
    ThroughputMonitor(peak_flops_per_s=1e15).attach(trainer)
    MemoryMonitor().attach(trainer)
    metrics = trainer.run(batches(20), max_epochs=2).metrics
    assert 0 < metrics["mfu"] < 1
    assert metrics["peak_device_mib"] >= 3 * 4 * WIDTH * WIDTH / 2**20  # a layer's weights and their two moments


def test_a_trace_has_the_kernels(tmp_path: Path) -> None:
    trainer, _, _ = trainer_and_model()
    profiler = Profiler(tmp_path, wait=1, warmup=1, active=2)
    profiler.attach(trainer)
    trainer.run(batches(8))
    (path,) = profiler.paths
    assert any(event.get("cat") == "kernel" for event in json.loads(path.read_text())["traceEvents"])


def test_nan_on_the_device_ends_the_run() -> None:
    trainer, _, _ = trainer_and_model()
    trainer.on(Events.ITERATION_COMPLETED, TerminateOnNan())
    data = batches(40)
    data[2][0][0, 0] = float("nan")
    with pytest.warns(RuntimeWarning, match="by iteration 16 "):  # where the flag is read
        assert trainer.run(data).iteration == 16


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_checkpoint_has_what_the_device_held_when_it_was_called(tmp_path: Path, asynchronous: bool) -> None:
    trainer, model, optimizer = trainer_and_model()
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "trainer": trainer}
    held: list[list[torch.Tensor]] = []

    def note(engine: Engine) -> None:
        moments = [value for state in optimizer.state.values() for value in state.values()]
        held.append([value.detach().cpu().clone() for value in (*model.parameters(), *moments)])

    trainer.on(Events.ITERATION_COMPLETED(once=5), note)
    trainer.on(Events.ITERATION_COMPLETED(once=5), Checkpoint(parts, tmp_path, asynchronous=asynchronous))
    trainer.run(batches(30))
    trainer, model, optimizer = trainer_and_model()
    assert Checkpoint.resume(tmp_path, {"model": model, "optimizer": optimizer, "trainer": trainer})
    note(trainer)
    assert all(map(torch.equal, *held))
    assert all(weight.is_cuda for weight in model.parameters())
