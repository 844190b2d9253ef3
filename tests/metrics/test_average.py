"""Loss, Average, RunningAverage, Perplexity and Throughput."""

import math
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, mse_loss

from dengine import Engine, NotComputableError
from dengine.metrics import Average, Loss, Perplexity, RunningAverage, Throughput


@pytest.mark.parametrize(("value", "num_updates"), [(0.1, 200_000), (torch.tensor(0.1, dtype=torch.float64), 20_000)])
def test_many_updates_lose_no_digits(value: Any, num_updates: int) -> None:
    metric = Average()
    for _ in range(num_updates):
        metric.update(value)
    assert metric.compute() == pytest.approx(0.1, abs=1e-10)


def test_many_float32_losses_lose_no_digits() -> None:
    metric = Loss(lambda prediction, target: prediction)
    tenth = torch.tensor(0.1)
    for _ in range(20_000):
        metric.update((tenth, 1))
    assert metric.compute() == pytest.approx(float(tenth), abs=1e-12)


@pytest.mark.parametrize("reduction", ["none", "mean"])
@pytest.mark.parametrize("shape", [(3, 4), ()])
def test_the_loss_of_uneven_batches_is_that_of_all_samples(shape: tuple[int, ...], reduction: str) -> None:
    logits, labels = torch.randn(20, 5, *shape), torch.randint(0, 5, (20, *shape))
    metric = Loss(torch.nn.CrossEntropyLoss(reduction=reduction))
    for batch in zip(logits.split((0, 1, 7, 12)), labels.split((0, 1, 7, 12)), strict=True):
        metric.update(batch)
    assert metric.compute() == pytest.approx(float(cross_entropy(logits.double(), labels)), rel=1e-6)


def test_the_loss_counts_what_batch_size_says() -> None:
    metric = Loss(lambda prediction, target: prediction.mean(), batch_size=lambda target: target["n"])
    metric.update((torch.tensor([1.0]), {"n": 1}))
    metric.update((torch.tensor([4.0]), {"n": 2}))
    assert metric.compute() == 3.0


def test_the_loss_of_numbers_is_the_mean_of_them() -> None:
    metric = Loss(lambda prediction, target: abs(prediction - target))
    for pair in ((1, 2), (1.0, 4.0)):
        metric.update(pair)
    assert metric.compute() == 2.0


def test_a_loss_makes_no_graph() -> None:
    metric = Loss(mse_loss)
    metric.update((torch.rand(4, requires_grad=True), torch.rand(4)))
    assert not metric.value_sum.requires_grad


@pytest.mark.parametrize("loss_fn", [None, "mse", torch.nn.MSELoss])
def test_a_loss_that_is_no_function_is_an_error_at_once(loss_fn: Any) -> None:
    with pytest.raises(TypeError, match="loss_fn="):
        Loss(loss_fn)


@pytest.mark.parametrize("output", [{"loss": 1.0}, 1.0, (1, 2, 3)])
def test_a_loss_needs_a_pair(output: Any) -> None:
    with pytest.raises(TypeError, match="output_transform="):
        Loss(mse_loss).update(output)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ([1, 2.0, torch.tensor(6.0)], 3.0),
        ([torch.tensor([1.0, 2.0, 3.0]), 6.0], 3.0),
        ([torch.ones(2, 2), 6], 2.0),
        ([torch.empty(0), 6], 6.0),
        ([(1.0, 3), (5.0, 1)], 2.0),
        ([(torch.tensor(1.0), torch.tensor(3)), (5.0, torch.tensor(1)), (torch.tensor(2.0), 4)], 2.0),
        ([(torch.tensor([1.0, 5.0]), torch.tensor([3, 1]))], 2.0),
        ([(torch.tensor([1.0, 3.0]), 2)], 2.0),
        ([(math.nan, 0), 2.0], 2.0),
        ([(torch.tensor(math.nan), torch.tensor(0)), 2.0], 2.0),
    ],
)
def test_average_is_weighted_by_counts(outputs: list[Any], expected: float) -> None:
    metric = Average()
    for output in outputs:
        metric.update(output)
    assert metric.compute() == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("kind", [Average, RunningAverage, Perplexity])
def test_an_engine_feeds_the_loss_of_a_mapping(kind: Any) -> None:
    engine = Engine(lambda engine, batch: {"loss": batch, "pred": 0})
    engine.add_metric(kind(), "value")
    expected = math.e if kind is Perplexity else 1.0
    assert engine.run([1.0, torch.tensor(1.0)]).metrics["value"] == pytest.approx(expected)


@pytest.mark.parametrize("kind", [Average, RunningAverage, Perplexity])
@pytest.mark.parametrize("output", [{"pred": 1, "label": 2}, "loss", None, (1, 2, 3)])
def test_what_is_no_value_is_an_error_that_lists_keys(output: Any, kind: Any) -> None:
    engine = Engine(lambda engine, batch: output)
    engine.add_metric(kind(), "value")
    with pytest.raises(TypeError, match="output_transform=") as error:
        engine.run([0])
    assert not isinstance(output, dict) or "['label', 'pred']" in str(error.value)


@pytest.mark.parametrize("kind", [Average, Perplexity])
def test_values_and_counts_of_different_shapes_are_an_error_that_shows_both(kind: Any) -> None:
    with pytest.raises(ValueError, match=r"\(3,\).*\(2,\)"):
        kind().update((torch.rand(3), torch.rand(2)))


def test_perplexity_weights_batches_by_their_tokens() -> None:
    logits, labels = torch.randn(12, 7), torch.randint(0, 7, (12,))
    metric = Perplexity()
    for one, other in zip(logits.split((2, 10)), labels.split((2, 10)), strict=True):
        metric.update((cross_entropy(one, other), other.numel()))
    assert metric.compute() == pytest.approx(math.exp(cross_entropy(logits, labels)), rel=1e-6)


def test_a_perplexity_beyond_floats_is_infinite() -> None:
    metric = Perplexity()
    metric.update(1000.0)
    assert metric.compute() == math.inf


@settings(deadline=None)  # the machine may be busy
@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(0, 0.99))
def test_the_running_average_is_exponential_from_the_first_value_on(values: list[float], alpha: float) -> None:
    numbers, tensors = RunningAverage(alpha), RunningAverage(alpha)
    expected = values[0]
    for place, value in enumerate(values):
        expected = value if place == 0 else alpha * expected + (1 - alpha) * value
        numbers.update(value)
        tensors.update(torch.tensor(value, dtype=torch.float64))
    assert numbers.compute() == pytest.approx(expected, abs=1e-12)
    assert tensors.compute() == pytest.approx(expected, abs=1e-12)


def test_a_running_average_starts_afresh_with_each_epoch() -> None:
    engine = Engine(lambda engine, batch: 10.0 * engine.state.epoch)
    engine.add_metric(RunningAverage(), "running")
    assert engine.run([1, 2, 3], max_epochs=2).metrics["running"] == 10.0


def test_a_running_average_of_ranks_leaves_out_those_without_a_value(over_ranks: Any) -> None:
    shards = [[], [1.0, torch.tensor(1.0)], [torch.empty(0)], [4.0]]
    assert over_ranks(lambda: {"running": RunningAverage()}, shards).values == {"running": 2.5}


@pytest.mark.parametrize(("alpha", "error"), [(1.0, ValueError), (-0.1, ValueError), ("a", TypeError)])
def test_an_alpha_out_of_range_is_an_error(alpha: Any, error: type[Exception]) -> None:
    with pytest.raises(error, match="alpha="):
        RunningAverage(alpha)


@pytest.mark.parametrize(
    ("output", "samples"),
    [
        ((torch.rand(8, 3), torch.rand(8)), 8),
        ({"pred": torch.rand(8, 3), "label": torch.rand(8)}, 8),
        ((0.5, 1), 1),
        ((torch.rand(3), torch.tensor(1)), 1),
        (torch.rand(8, 3), 8),
        (8, 8),
        (torch.tensor(8), 8),
        (torch.rand(0, 3), 0),
    ],
)
def test_throughput_knows_the_samples_of_a_step(output: Any, samples: int) -> None:
    metric = Throughput()
    metric.update(metric.transform(output))
    assert int(metric.num_samples) == samples


@pytest.mark.parametrize("output", [{"loss": 1.0}, 0.5, torch.tensor(0.5), True, None])
def test_throughput_refuses_to_guess(output: Any) -> None:
    with pytest.raises(TypeError, match="output_transform="):
        Throughput().update(output)


def test_throughput_is_samples_over_time_since_the_reset() -> None:
    metric = Throughput()
    time.sleep(0.2)
    start = time.perf_counter()
    metric.reset()
    metric.update(100)
    time.sleep(0.05)
    value = metric.compute()
    assert 100 / (time.perf_counter() - start) <= value <= 100 / 0.05


def test_throughput_is_all_samples_over_the_longest_ranks_time(over_ranks: Any) -> None:
    class Slow(Throughput):
        def flush(self) -> None:
            super().flush()
            self.elapsed_s = {0: 9.0, 10: 2.0, 30: 4.0}[int(self.num_samples)]

    ranks = over_ranks(lambda: {"speed": Slow()}, [[10], [30], []])
    assert ranks.values == {"speed": 40 / 9.0}
    assert ranks.collectives["sum"] == 1
    assert ranks.collectives["max"] == 0


@pytest.mark.parametrize("metric", [Loss(mse_loss), Average(), RunningAverage(), Perplexity(), Throughput()])
def test_nothing_seen_is_not_computable(metric: Any) -> None:
    with pytest.raises(NotComputableError, match="was seen on any rank"):
        metric.compute()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_loss_of_16_bit_predictions_is_taken_in_32(dtype: torch.dtype) -> None:
    scores, labels = torch.randn(64, 10).to(dtype), torch.randint(0, 10, (64,))
    metric = Loss(torch.nn.functional.cross_entropy)
    metric.update((scores, labels))
    assert metric.compute() == pytest.approx(torch.nn.functional.cross_entropy(scores.float(), labels).item(), abs=1e-6)
