"""`Loss` weighs each batch by what its mean was divided by."""

from collections import namedtuple
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dengine.metrics import Loss

SIZES = (10, 10, 1)
WEIGHT = torch.tensor([0.1, 1.0, 5.0])


def batches(*parts: torch.Tensor, sizes: tuple[int, ...] = SIZES) -> list[tuple[torch.Tensor, ...]]:
    return list(zip(*(part.split(sizes) for part in parts), strict=True))


def log_scores(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).log_softmax(1)


def labels(*shape: int, num_ignored: int = 0, ignore_index: int = -100) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    found = torch.randint(0, 3, shape, generator=generator)
    found.view(-1)[torch.randperm(found.numel(), generator=generator)[:num_ignored]] = ignore_index
    return found


def updated(metric: Loss, pairs: Any) -> Loss:
    for pair in pairs:
        metric.update(pair)
    return metric


@pytest.mark.parametrize("num_ignored", [0, 9])
@pytest.mark.parametrize("rest", [(), (4,)])
@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(WEIGHT),
        nn.CrossEntropyLoss(WEIGHT, label_smoothing=0.1),
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.NLLLoss(WEIGHT),
        nn.NLLLoss(),
        partial(F.cross_entropy, weight=WEIGHT),
        partial(F.nll_loss, weight=WEIGHT),
        partial(partial(F.cross_entropy, label_smoothing=0.2), weight=WEIGHT),
        F.cross_entropy,
        F.nll_loss,
        nn.CrossEntropyLoss(WEIGHT).forward,
    ],
)
def test_the_loss_of_classes_is_that_of_all_samples_at_once(loss_fn: Any, rest: Any, num_ignored: int) -> None:
    scores, target = log_scores(21, 3, *rest), labels(21, *rest, num_ignored=num_ignored)
    metric = updated(Loss(loss_fn), batches(scores, target))
    assert metric.compute() == pytest.approx(float(loss_fn(scores, target)), rel=1e-6)


@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 2, 255])
@pytest.mark.parametrize("weight", [None, WEIGHT])
@pytest.mark.parametrize("is_told", [True, False])
def test_an_ignored_class_counts_for_nothing(ignore_index: int, weight: Any, is_told: bool) -> None:
    scores, target = log_scores(21, 3), labels(21, num_ignored=8, ignore_index=ignore_index)
    loss_fn = nn.CrossEntropyLoss(weight, ignore_index=ignore_index)
    metric = Loss(loss_fn, ignore_index=ignore_index if is_told else None)
    updated(metric, batches(scores, target))
    assert metric.compute() == pytest.approx(float(loss_fn(scores, target)), rel=1e-6)


def test_a_batch_that_is_ignored_whole_is_passed_over() -> None:
    scores = log_scores(4, 3)
    metric = Loss(nn.CrossEntropyLoss(WEIGHT))
    metric.update((scores, torch.full((4,), -100)))
    metric.update((scores, torch.tensor([0, 1, 2, -100])))
    expected = F.cross_entropy(scores, torch.tensor([0, 1, 2, -100]), WEIGHT)
    assert metric.compute() == pytest.approx(float(expected), rel=1e-6)


def test_a_function_that_ignores_an_index_by_itself_counts_rightly() -> None:
    def masked_error(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (prediction - target)[target != -1].square().mean()

    prediction, target = torch.arange(21.0), torch.arange(21.0) % 7
    target[:9] = -1
    metric = updated(Loss(masked_error, ignore_index=-1), batches(prediction, target))
    assert metric.compute() == pytest.approx(float(masked_error(prediction, target)), rel=1e-6)


def test_losses_given_one_by_one_are_left_out_where_the_target_is_ignored() -> None:
    prediction, target = torch.arange(21.0), torch.arange(21.0) % 7
    metric = Loss(nn.MSELoss(reduction="none"), ignore_index=3)
    updated(metric, batches(prediction, target))
    kept = target != 3
    assert metric.compute() == pytest.approx(float(F.mse_loss(prediction[kept], target[kept])), rel=1e-6)


def test_ignored_labels_are_in_no_mean_of_losses_given_one_by_one() -> None:
    scores, target = log_scores(21, 3), labels(21, num_ignored=8)
    metric = updated(Loss(nn.CrossEntropyLoss(reduction="none")), batches(scores, target))
    assert metric.compute() == pytest.approx(float(F.cross_entropy(scores, target)), rel=1e-6)


def test_class_probabilities_are_samples_of_weight_one() -> None:
    scores = log_scores(21, 3, 4)
    target = torch.rand(21, 3, 4).softmax(1)
    loss_fn = nn.CrossEntropyLoss(WEIGHT)
    metric = updated(Loss(loss_fn), batches(scores, target))
    assert metric.compute() == pytest.approx(float(loss_fn(scores, target)), rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_targets_of_bytes_are_labels_too(dtype: torch.dtype) -> None:
    scores, target = log_scores(21, 3), torch.full((21,), 156)  # as a byte -100 would be 156
    target[:5] = 1
    loss_fn = partial(F.mse_loss, reduction="none")
    metric = Loss(lambda p, t: loss_fn(p[:, 0], t.float()), ignore_index=-100)
    metric.update((scores, target.to(dtype)))
    assert metric.count == 21


Pair = namedtuple("Pair", "first second")


@dataclass
class Target:
    name: str
    values: Any


@pytest.mark.parametrize(
    "shape",
    [
        lambda target: target.numpy(),
        lambda target: target.tolist(),
        lambda target: tuple(target.tolist()),
        lambda target: list(target),
        lambda target: {"y": target},
        lambda target: {"meta": "a", "inner": {"y": target.numpy()}},
        lambda target: {"y": target.tolist()},
        lambda target: [target, target.unsqueeze(1)],
        lambda target: (target, target.numpy()),
        lambda target: Pair(target, target),
        lambda target: Target("a", target),
        lambda target: [{"y": each} for each in target],
        lambda target: [torch.zeros(number + 1) for number in range(len(target))],
        lambda target: tuple(torch.zeros(3) for _ in range(len(target))),
        lambda target: None,
    ],
)
def test_a_batch_weighs_its_samples_whatever_its_target_is_made_of(shape: Any) -> None:
    metric = Loss(lambda prediction, target: float(prediction.mean()))
    for size, value in zip(SIZES, (0.0, 0.0, 1.0), strict=True):
        metric.update((torch.full((size, 2), value), shape(torch.zeros(size))))
    assert metric.compute() == pytest.approx(1 / 21)


@pytest.mark.parametrize(
    "target", ["abc", object(), [torch.zeros(3), torch.zeros(4)], {"a": torch.zeros(3, 2), "b": [1]}]
)
def test_a_target_whose_samples_cannot_be_told_is_refused_and_says_what_to_pass(target: Any) -> None:
    metric = Loss(lambda prediction, target: 1.0)
    with pytest.raises(TypeError, match="batch_size="):
        metric.update(({"p": torch.zeros(7, 2), "q": torch.zeros(5)}, target))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, None])
def test_batch_size_may_give_a_tensor_or_a_scalar_of_numpys(dtype: torch.dtype | None) -> None:
    metric = Loss(
        lambda prediction, target: prediction,
        batch_size=lambda target: np.uint8(target) if dtype is None else torch.tensor(target, dtype=dtype),
    )
    for loss, count in ((1.0, 200), (1.0, 200), (float("nan"), 0), (0.0, 100)):
        metric.update((torch.tensor(loss), count))
    assert metric.compute() == pytest.approx(400 / 500)


@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(reduction="sum"), nn.MSELoss(reduction="sum"), partial(F.l1_loss, reduction="sum")]
)
def test_a_loss_that_sums_is_refused_unless_it_is_told_what_a_sum_counts_for(loss_fn: Any) -> None:
    with pytest.raises(ValueError, match='reduction="mean"'):
        Loss(loss_fn)
    Loss(loss_fn, batch_size=lambda target: 1)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"loss_fn": nn.CrossEntropyLoss(), "ignore_index": 0}, ValueError),
        ({"loss_fn": F.nll_loss, "ignore_index": 255}, ValueError),
        ({"loss_fn": F.mse_loss, "ignore_index": 1, "batch_size": len}, ValueError),
        ({"loss_fn": F.mse_loss, "ignore_index": 0.5}, TypeError),
        ({"loss_fn": F.mse_loss, "ignore_index": True}, TypeError),
    ],
)
def test_settings_that_contradict_each_other_are_an_error_at_once(arguments: Any, error: Any) -> None:
    with pytest.raises(error, match="ignore_index"):
        Loss(**arguments)


def test_the_weights_of_a_module_are_read_when_they_are_used() -> None:
    loss_fn = nn.CrossEntropyLoss(torch.ones(3))
    metric = Loss(loss_fn)
    loss_fn.weight = WEIGHT
    scores, target = log_scores(21, 3), labels(21)
    updated(metric, batches(scores, target))
    assert metric.compute() == pytest.approx(float(F.cross_entropy(scores, target, WEIGHT)), rel=1e-6)


def test_the_weighted_loss_of_uneven_ranks_is_that_of_all_samples(over_ranks: Any) -> None:
    scores, target = log_scores(21, 3), labels(21, num_ignored=5)
    shards = [[], batches(scores, target)[:2], [batches(scores, target)[2]]]
    values = over_ranks(lambda: {"loss": Loss(nn.CrossEntropyLoss(WEIGHT))}, shards).values
    assert values["loss"] == pytest.approx(float(F.cross_entropy(scores, target, WEIGHT)), rel=1e-6)


def test_a_mapping_is_read_by_its_keys_by_hand_too() -> None:
    metric = Loss(F.mse_loss)
    metric.update({"pred": torch.ones(3), "label": torch.zeros(3)})
    assert metric.compute() == 1.0
