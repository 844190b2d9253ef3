"""Sums and counts are right whatever dtype they come in, and complex numbers are refused."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dengine import Engine, MetricStateError, create_supervised_trainer
from dengine.handlers import ThroughputMonitor
from dengine.metrics import (
    MAE,
    MSE,
    RMSE,
    Accuracy,
    Average,
    DistributedMetric,
    Loss,
    Metric,
    Perplexity,
    R2Score,
    RunningAverage,
    Throughput,
)
from dengine.parallel.gradients import GradientMean

WHOLE = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
FLOATS = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", [*FLOATS, *WHOLE, torch.bool])
@pytest.mark.parametrize("kind", [Average, Perplexity])
@pytest.mark.parametrize("wrap", [lambda metric: metric, DistributedMetric])
def test_a_count_is_added_up_in_64_bits_whatever_its_dtype(kind: Any, dtype: torch.dtype, wrap: Any) -> None:
    batch = 1 if dtype == torch.bool else 100
    metric = wrap(kind())
    for loss, num_batches in ((2.0, 700), (5.0, 300)):
        for _ in range(num_batches):
            metric.update((torch.tensor(loss), torch.tensor(batch, dtype=dtype)))
    mean = 2.0 * 0.7 + 5.0 * 0.3
    assert metric.compute() == pytest.approx(math.exp(mean) if kind is Perplexity else mean, rel=1e-12)


@pytest.mark.parametrize("dtype", FLOATS)
def test_values_and_masks_of_one_dtype_give_the_mean_of_what_the_mask_keeps(dtype: torch.dtype) -> None:
    losses, mask = torch.full((4, 512), 2.0, dtype=dtype), torch.ones(4, 512, dtype=dtype)
    metric = Perplexity()
    for _ in range(50):
        metric.update((losses, mask))
    assert metric.compute() == pytest.approx(math.exp(2.0), rel=1e-12)


def test_a_count_of_32_bits_goes_on_beyond_its_last_odd_number() -> None:
    metric = Average()
    metric.update((torch.tensor(0.0), torch.tensor(2.0**24)))
    for _ in range(4):
        metric.update((torch.tensor(1.0), torch.tensor(1.0)))
    assert metric.compute() == pytest.approx(4 / (2**24 + 4), rel=1e-12)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.float16, np.float32])
def test_numpys_scalars_are_counts_too(kind: Any) -> None:
    average, speed = Average(), Throughput()
    for _ in range(1000):
        average.update((1.0, kind(100)))
        if issubclass(kind, np.integer):
            speed.update(kind(100))
    average.update((0.0, 100_000))
    assert average.compute() == pytest.approx(0.5, rel=1e-12)
    assert int(speed.num_samples) in (0, 100_000)


@pytest.mark.parametrize("dtype", WHOLE)
def test_the_samples_of_a_throughput_do_not_overflow(dtype: torch.dtype) -> None:
    metric = Throughput()
    for _ in range(1000):
        metric.update(torch.tensor(100, dtype=dtype))
    assert int(metric.num_samples) == 100_000


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.bfloat16, torch.float32, None])
def test_the_monitor_counts_samples_and_tokens_of_any_dtype(dtype: torch.dtype | None) -> None:
    def count(engine: Engine) -> Any:
        return np.uint8(100) if dtype is None else torch.tensor(100, dtype=dtype)

    engine = Engine(lambda engine, batch: None)
    monitor = ThroughputMonitor(num_samples=count, num_tokens=count, print_line=False)
    monitor.attach(engine)
    metrics = engine.run([0] * 1000).metrics
    assert metrics["samples_per_s"] == metrics["tokens_per_s"] > 0
    assert float(monitor._samples) == float(monitor._tokens) == 100_000


@pytest.mark.parametrize(
    "batch",
    [
        np.zeros((7, 2)),
        {"meta": None, "x": np.zeros((7, 2))},
        ([[1.0, 2.0]] * 7, [0] * 7),
        (torch.zeros(7, 2), {"boxes": torch.zeros(7, 4)}),
    ],
)
def test_the_monitor_knows_the_samples_of_arrays_lists_and_mappings(batch: Any) -> None:
    engine = Engine(lambda engine, batch: None)
    monitor = ThroughputMonitor(print_line=False)
    monitor.attach(engine)
    engine.run([batch] * 3)
    assert monitor._samples == 21


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.uint8, np.int16])
def test_the_weight_of_a_batch_may_be_a_scalar_of_numpys(kind: Any) -> None:
    model = nn.Linear(1, 1, bias=False)
    mean = GradientMean(model, num_batches=2000)
    for _ in range(2000):
        mean.begin(kind(100), torch.device("cpu"), is_last=False)
        mean.backward(model.weight.sum())
    assert mean._total == 200_000
    mean.finish(list(model.parameters()))
    assert model.weight.grad.item() == pytest.approx(1.0, rel=1e-4)


def test_weights_of_16_bits_give_the_gradient_that_whole_numbers_give() -> None:
    def trained(weight: Any) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        trainer = create_supervised_trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            nn.functional.mse_loss,
            gradient_accumulation_steps=3,
            weight=weight,
        )
        trainer.run([(torch.full((size, 2), 0.5), torch.full((size, 1), float(size))) for size in (301, 5, 2)])
        return torch.cat([each.detach().flatten() for each in model.parameters()])

    expected = trained(lambda inputs, targets: len(targets))
    for dtype in (torch.float16, torch.int16, torch.float64):
        found = trained(lambda inputs, targets, dtype=dtype: torch.tensor(len(targets)).to(dtype))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("dtype", "value"),
    [(torch.uint8, 200), (torch.int8, 100), (torch.int16, 30_000), (torch.float16, 60_000.0), (torch.bfloat16, 257.0)],
)
def test_the_sum_of_short_states_of_many_ranks_does_not_overflow(
    over_ranks: Any, dtype: torch.dtype, value: Any
) -> None:
    class Short(Metric):
        def __init__(self) -> None:
            super().__init__(lambda output: output)
            self.add_state("total", torch.tensor(0, dtype=dtype))

        def update(self, output: Any) -> None:
            self.total = torch.tensor(output, dtype=dtype)

        def compute(self) -> float:
            return float(self.total)

    seen = float(torch.tensor(value, dtype=dtype))
    assert over_ranks(lambda: {"total": Short()}, [[value]] * 3).values == {"total": 3 * seen}


@pytest.mark.parametrize("kind", [Average, Perplexity, RunningAverage, MSE, MAE, RMSE, R2Score, Accuracy])
@pytest.mark.parametrize("value", [torch.tensor(1 + 2j), torch.ones(3, dtype=torch.complex64), 1 + 2j, np.array([1j])])
def test_complex_numbers_are_refused_and_never_cut_to_their_real_part(kind: Any, value: Any) -> None:
    takes_pairs = kind not in (Average, Perplexity, RunningAverage)
    with pytest.raises(TypeError, match=r"real numbers.*complex"):
        kind().update((value, value) if takes_pairs else value)


@pytest.mark.parametrize("output", [(torch.tensor(1j), 2), (1.0, torch.tensor(1j))])
def test_a_complex_value_or_count_of_a_pair_is_refused(output: Any) -> None:
    with pytest.raises(TypeError, match="complex"):
        Average().update(output)


def test_a_complex_loss_is_refused() -> None:
    with pytest.raises(TypeError, match="complex"):
        Loss(lambda prediction, target: prediction.mean()).update((torch.ones(2, dtype=torch.complex64), torch.ones(2)))


def test_a_complex_state_of_a_users_metric_is_refused_by_name() -> None:
    class Spectrum(Metric):
        total: torch.Tensor

        def __init__(self) -> None:
            super().__init__(lambda output: output)
            self.add_state("total", torch.zeros((), dtype=torch.complex64))

        def update(self, output: Any) -> None:
            self.total = self.total + output

        def compute(self) -> torch.Tensor:
            return self.total

    engine = Engine(lambda engine, batch: torch.tensor(1j))
    engine.add_metric(Spectrum(), "spectrum")
    with pytest.raises(MetricStateError, match=r"'total' of 'spectrum'.*complex"):
        engine.run([1])
