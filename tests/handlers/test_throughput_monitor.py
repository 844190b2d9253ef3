"""The throughput monitor, on a clock of the test's own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dengine import Engine, Events
from dengine.handlers import ThroughputMonitor, throughput_monitor
from dengine.handlers.peaks import PEAKS, peak_flops_per_s


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(throughput_monitor, "perf_counter", clock)
    return clock


class SlowData:
    """Batches of 4, 3 and 1 sample, each of which takes 2 s to come."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def __len__(self) -> int:
        return 3

    def __iter__(self) -> Any:
        for size in (4, 3, 1):
            self.clock.now_s += 2.0
            yield torch.zeros(size, 5), torch.zeros(size)


def engine_on(clock: Clock) -> Engine:
    """A step takes 3 s, its handlers 1 s."""

    def step(engine: Engine, batch: Any) -> Any:
        clock.now_s += 3.0
        return {"tokens": torch.tensor(batch[0].numel())}

    engine = Engine(step)

    @engine.on(Events.ITERATION_COMPLETED)
    def handler(engine: Engine) -> None:
        clock.now_s += 1.0

    return engine


def test_times_and_rates_are_those_of_the_clock_in_each_epoch(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    engine = engine_on(clock)
    ThroughputMonitor(num_tokens=lambda engine: engine.state.output["tokens"]).attach(engine)
    seen: list[dict[str, Any]] = []
    engine.on(Events.EPOCH_COMPLETED, lambda engine: seen.append(dict(engine.state.metrics)))
    engine.run(SlowData(clock), max_epochs=2)
    expected = {
        "samples_per_s": 8 / 18,
        "tokens_per_s": 40 / 18,
        "data_ms": 2000.0,
        "step_ms": 3000.0,
        "handlers_ms": 1000.0,
    }
    assert seen == [pytest.approx(expected)] * 2
    lines = capsys.readouterr().err.splitlines()
    assert (
        lines[0] == "epoch 1: 0.4444 samples/s, 2.222 tokens/s, ms an iteration: data 2e+03, step 3e+03, handlers 1e+03"
    )
    assert len(lines) == 2


def test_utilisation_is_what_the_counter_counts_over_what_the_device_could_do(clock: Clock) -> None:
    model = nn.Linear(6, 7, bias=False)

    def step(engine: Engine, batch: Tensor) -> None:
        model(batch).sum().backward()
        clock.now_s += 0.5

    engine = Engine(step)
    ThroughputMonitor(peak_flops_per_s=1e6, print_line=False).attach(engine)
    metrics = engine.run([torch.randn(5, 6)] * 4).metrics
    # Forward and the gradient of the weights, 2 operations each; the input needs no gradient.
    assert metrics["mfu"] == pytest.approx(2 * (2 * 5 * 6 * 7) / 0.5 / 1e6)


def test_a_step_that_fails_under_the_counter_leaves_no_counter_behind(clock: Clock) -> None:
    def step(engine: Engine, batch: Tensor) -> None:
        if engine.state.iteration == 2:
            raise KeyError("lost")

    engine = Engine(step)
    ThroughputMonitor(peak_flops_per_s=1e6).attach(engine)
    with pytest.raises(KeyError, match="lost"):
        engine.run([torch.zeros(2)] * 4)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


def test_without_a_known_peak_there_is_no_utilisation_and_nothing_is_counted(clock: Clock) -> None:
    engine = engine_on(clock)
    monitor = ThroughputMonitor(print_line=False)
    monitor.attach(engine)
    assert "mfu" not in engine.run(SlowData(clock)).metrics
    assert peak_flops_per_s(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA H20", 148e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("AMD Instinct MI250X", 383e12),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA T400", None),
    ],
)
def test_a_device_is_known_by_the_words_of_its_name(
    monkeypatch: pytest.MonkeyPatch, name: str, peak: float | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops_per_s(torch.device("cuda", 0)) == peak


def test_every_entry_of_the_table_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, peak in PEAKS.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops_per_s(torch.device("cuda", 0)) == 1e12 * peak


@pytest.mark.parametrize(
    ("options", "error"),
    [({"num_samples": 3}, TypeError), ({"num_tokens": 3}, TypeError), ({"peak_flops_per_s": 0}, ValueError)],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        ThroughputMonitor(**options)
