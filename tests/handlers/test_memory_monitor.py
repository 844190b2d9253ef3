"""The peak of the memory, told by allocating some."""

import resource
from typing import Any

import pytest
import torch

from dengine import Engine, Events
from dengine.handlers import MemoryMonitor
from dengine.metrics import Average


def test_the_peak_is_among_the_metrics_and_grows_with_what_was_in_use() -> None:
    def step(engine: Engine, batch: int) -> None:
        torch.ones(batch * 2**18).sum()  # MiB

    trainer = Engine(step)
    MemoryMonitor().attach(trainer)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    small = trainer.run([1]).metrics["peak_host_mib"]
    large = trainer.run([int(before) + 64]).metrics["peak_host_mib"]
    assert small >= before
    assert large >= small + 32
    assert trainer.run([1]).metrics["peak_host_mib"] >= large  # a peak does not go down


def test_other_handlers_of_the_epochs_end_see_it_and_a_device_only_where_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[dict[str, Any]] = []
    trainer = Engine(lambda engine, batch: None)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: seen.append(dict(engine.state.metrics)), priority=1000)
    MemoryMonitor().attach(trainer)
    trainer.run([0], max_epochs=2)
    assert [list(metrics) for metrics in seen] == [["peak_host_mib"]] * 2
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20)
    assert trainer.run([0]).metrics["peak_device_mib"] == 3


@pytest.mark.parametrize("name", ["peak_host_mib", "peak_device_mib"])
def test_a_metric_of_its_name_is_not_overwritten(name: str) -> None:
    trainer = Engine(lambda engine, batch: batch)
    trainer.add_metric(Average(), name)
    with pytest.raises(ValueError, match=f"has a metric '{name}'"):
        MemoryMonitor().attach(trainer)


def test_only_an_engine_can_be_watched() -> None:
    with pytest.raises(TypeError, match="takes an Engine, but got None"):
        MemoryMonitor().attach(None)  # type: ignore[arg-type]
