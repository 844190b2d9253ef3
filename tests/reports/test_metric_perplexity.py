"""`Perplexity` of logits and labels, in both layouts that there are."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from dengine import Engine, NotComputableError
from dengine.metrics import Perplexity

NUM_CLASSES = 7


def tokens(*shape: int, ignore_index: int = -100) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits with the classes last, and labels of which some are ignored."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, NUM_CLASSES, shape, generator=generator)
    labels[torch.rand(shape, generator=generator) < 0.3] = ignore_index
    return torch.randn(*shape, NUM_CLASSES, generator=generator), labels


def expected(logits: torch.Tensor, labels: torch.Tensor, ignore_index: int = -100) -> float:
    flat = logits.double().reshape(-1, NUM_CLASSES), labels.reshape(-1).long()
    return math.exp(cross_entropy(*flat, ignore_index=ignore_index))


@pytest.mark.parametrize("shape", [(12,), (12, 5), (12, 5, 3)])
@pytest.mark.parametrize("is_last", [True, False])
def test_the_classes_are_the_second_dimension_or_the_last(shape: tuple[int, ...], is_last: bool) -> None:
    logits, labels = tokens(*shape)
    metric = Perplexity()
    for one, other in zip(logits.split((1, 9, 2)), labels.split((1, 9, 2)), strict=True):
        metric.update((one if is_last else one.movedim(-1, 1), other))
    assert metric.compute() == pytest.approx(expected(logits, labels), rel=1e-6)


def test_where_both_layouts_fit_it_is_that_of_cross_entropy() -> None:
    logits, labels = torch.randn(3, NUM_CLASSES, NUM_CLASSES), torch.randint(0, NUM_CLASSES, (3, NUM_CLASSES))
    metric = Perplexity()
    metric.update((logits, labels))
    assert metric.compute() == pytest.approx(math.exp(cross_entropy(logits, labels)), rel=1e-6)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 255])
def test_ignored_tokens_are_in_neither_sum_nor_count(ignore_index: int) -> None:
    logits, labels = tokens(4, 6, ignore_index=ignore_index)
    metric = Perplexity(ignore_index=ignore_index)
    metric.update((logits, labels))
    metric.update((logits, torch.full_like(labels, ignore_index)))
    assert metric.compute() == pytest.approx(expected(logits, labels, ignore_index), rel=1e-6)
    assert int(metric.count) == (labels != ignore_index).sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_logits_of_16_bits_are_taken_in_32(dtype: torch.dtype) -> None:
    logits, labels = tokens(64, 32)
    metric = Perplexity()
    for _ in range(3):
        metric.update((logits.to(dtype), labels))
    assert metric.compute() == pytest.approx(expected(logits.to(dtype), labels), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_labels_of_any_whole_dtype_are_taken(dtype: torch.dtype) -> None:
    logits, labels = torch.randn(4, NUM_CLASSES), torch.tensor([0, 6, 3, 1])
    metric = Perplexity()
    metric.update((logits, labels.to(dtype)))
    assert metric.compute() == pytest.approx(expected(logits, labels), rel=1e-6)


def test_arrays_are_taken() -> None:
    logits, labels = tokens(4, 6)
    metric = Perplexity()
    metric.update((logits.numpy(), labels.numpy()))
    assert metric.compute() == pytest.approx(expected(logits, labels), rel=1e-6)


@pytest.mark.parametrize("bad", [-1, NUM_CLASSES, 10**9])
def test_a_label_outside_the_classes_is_an_error_on_all_ranks(over_ranks: Any, bad: int) -> None:
    logits, labels = tokens(4, 6)
    wrong = labels.clone()
    wrong[2, 3] = bad
    ranks = over_ranks(lambda: {"ppl": Perplexity()}, [[(logits, labels)], [(logits, wrong)], []])
    assert all(isinstance(outcome, ValueError) and "1 labels outside" in str(outcome) for outcome in ranks.outcomes)


def test_ranks_that_keep_different_numbers_of_tokens_give_what_one_would(over_ranks: Any) -> None:
    logits, labels = tokens(12, 5)
    shards = [[(logits[:1], labels[:1])], [], [(logits[1:4], labels[1:4]), (logits[4:], labels[4:])]]
    found = over_ranks(lambda: {"ppl": Perplexity()}, shards).values["ppl"]
    assert found == pytest.approx(expected(logits, labels), rel=1e-6)


def test_a_step_without_a_loss_is_read_by_its_logits_and_labels() -> None:
    logits, labels = tokens(4, 6)
    engine = Engine(lambda engine, batch: batch)
    engine.add_metric(Perplexity(), "ppl")
    assert engine.run([{"logits": logits, "labels": labels}]).metrics["ppl"] == pytest.approx(expected(logits, labels))
    with_loss = {"loss": torch.tensor(1.0), "pred": logits, "label": labels}
    assert engine.run([with_loss]).metrics["ppl"] == pytest.approx(math.e)


@pytest.mark.parametrize("shapes", [((4, 5, 7), (4, 6)), ((4, 7), (5,)), ((4, 6, 2, 7), (4, 6, 3))])
def test_shapes_that_fit_neither_layout_are_an_error_that_shows_both(shapes: Any) -> None:
    logits, labels = torch.rand(shapes[0]), torch.zeros(shapes[1], dtype=torch.int64)
    with pytest.raises(ValueError, match=r"Perplexity got predictions of shape \(4.*targets of shape \("):
        Perplexity().update((logits, labels))


def test_values_with_counts_are_values_with_counts_still() -> None:
    metric = Perplexity()
    metric.update((torch.tensor([1.0, 3.0]), torch.tensor([3, 1])))
    metric.update((torch.tensor([1.0, 2.0]), torch.tensor(2)))
    metric.update((np.float32(1.5), np.int64(8)))
    assert metric.compute() == pytest.approx(math.exp((3 + 3 + 2 + 4 + 12) / 16))


def test_where_every_token_is_ignored_nothing_was_seen() -> None:
    metric = Perplexity()
    metric.update((torch.randn(2, 3, NUM_CLASSES), torch.full((2, 3), -100)))
    with pytest.raises(NotComputableError):
        metric.compute()


def test_an_update_makes_no_graph() -> None:
    metric = Perplexity()
    metric.update((torch.randn(4, NUM_CLASSES, requires_grad=True), torch.zeros(4, dtype=torch.int64)))
    assert isinstance(metric.value_sum, torch.Tensor)
    assert not metric.value_sum.requires_grad
