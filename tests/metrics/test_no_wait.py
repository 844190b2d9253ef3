"""No update waits for the device: none reads a value, or makes a shape that depends on one."""

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from dengine.metrics import (
    MAE,
    MSE,
    RMSE,
    Accuracy,
    Average,
    ConfusionMatrix,
    DistributedAccuracy,
    DistributedMetric,
    F1Score,
    Loss,
    Perplexity,
    Precision,
    R2Score,
    Recall,
    RunningAverage,
    Throughput,
    TopKAccuracy,
)

WAITS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "nonzero_numpy",
    "masked_select",
    "bincount",
    "histc",
    "_unique",
    "_unique2",
    "unique_dim",
    "unique_consecutive",
    "repeat_interleave",
}


class Waits(TorchDispatchMode):
    """The operations seen that wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        is_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in WAITS or is_mask:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


def cases(device: str) -> list[tuple[str, Any, Any]]:
    scores = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)).to(device)
    labels = torch.ones(6, dtype=torch.int64, device=device)
    many = torch.ones(6, 4, dtype=torch.int64, device=device)
    value, count = torch.tensor(0.375, device=device), torch.ones((), dtype=torch.int64, device=device)
    pair, twins = (scores, labels), (labels, labels)
    every: list[tuple[Any, Any]] = [
        (Accuracy(), pair),
        (Accuracy(), twins),
        (Accuracy(num_classes=4), twins),
        (Accuracy(), (scores[:, 0], labels)),
        (Accuracy(), (scores[:, 0], scores[:, 1])),
        (Accuracy("binary"), (scores[:, 0], scores[:, 1])),
        (Accuracy("multilabel"), (scores, many)),
        (Accuracy(average=None), pair),
        (TopKAccuracy(2), pair),
        (DistributedMetric(Accuracy()), pair),
        (DistributedAccuracy(), pair),
        (Loss(cross_entropy), pair),
        (Loss(torch.nn.CrossEntropyLoss(reduction="none")), pair),
        (Loss(torch.nn.CrossEntropyLoss(torch.ones(4, device=device))), pair),
        (Loss(cross_entropy, batch_size=lambda target: target.sum()), pair),
        (Loss(torch.nn.MSELoss(reduction="none"), ignore_index=0), (scores, scores)),
        (Perplexity(), pair),
        (Perplexity(ignore_index=1), (scores.reshape(2, 3, 4), labels.reshape(2, 3))),
        (Throughput(), pair),
        (Throughput(), count),
        (Accuracy(), (scores, scores.softmax(1))),
        (TopKAccuracy(2), (scores, scores.softmax(1))),
        (Accuracy("multilabel", ignore_index=1), (scores, many)),
        (TopKAccuracy(2, ignore_index=1), pair),
    ]
    for kind in (Precision, Recall, F1Score):
        every += [(kind("multilabel", average="samples"), (scores, many))]
        every += [(kind("multilabel", average="samples", ignore_index=0), (scores, many))]
    for kind in (Accuracy, Precision, ConfusionMatrix):
        every += [(kind(ignore_index=1), pair), (kind(num_classes=4, ignore_index=-1), twins)]
        every += [(kind("multilabel", ignore_index=0), (scores, many)), (kind(num_classes=4), (scores, scores))]
    for kind in (Precision, Recall, F1Score, ConfusionMatrix):
        every += [(kind(), pair), (kind(num_classes=4), twins), (kind("binary"), (scores[:, 0], labels))]
        every += [(kind("multilabel"), (scores, many)), (kind("multilabel", 4), (many, many.float()))]
    for kind in (MSE, RMSE, MAE, R2Score):
        every += [(kind(), (scores, scores)), (kind(), twins)]
    for kind in (Average, Perplexity, RunningAverage):
        every += [(kind(), value), (kind(), scores)]
    for kind in (Average, Perplexity):
        every += [(kind(), (value, count)), (kind(), (value, 3)), (kind(), (labels, labels)), (kind(), (0.5, count))]
    return [(f"{type(metric).__name__}-{place}", metric, output) for place, (metric, output) in enumerate(every)]


@pytest.mark.parametrize(("metric", "output"), [pytest.param(*case[1:], id=case[0]) for case in cases("cpu")])
def test_no_operation_of_an_update_waits(metric: Any, output: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # As on a device: on the CPU there is nothing to wait for, and values may be read.
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    with Waits() as waits:
        for _ in range(80):  # small batches are counted some at a time
            metric.update(output)
        metric.reset()
        metric.update(output)
    assert waits.seen == []


@pytest.mark.parametrize(("metric", "output"), [pytest.param(*case[1:], id=case[0]) for case in cases("meta")])
def test_an_update_needs_no_values_at_all(metric: Any, output: Any) -> None:
    # Tensors without storage: whatever reads one, or copies it to the host, raises.
    for _ in range(80):
        metric.update(output)


@pytest.mark.gpu
def test_no_update_waits_for_the_gpu_and_values_are_those_of_the_host() -> None:
    for (name, metric, output), (_, on_host, same) in zip(cases("cuda"), cases("cpu"), strict=True):
        metric.update(output)  # what is made once
        try:
            torch.cuda.set_sync_debug_mode("error")
            for _ in range(79):
                metric.update(output)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for _ in range(80):
            on_host.update(same)
        if not isinstance(metric, Throughput):
            found, expected = value_of(metric), value_of(on_host)
            if isinstance(expected, str):
                assert found == expected, name
            else:
                torch.testing.assert_close(found, expected, rtol=1e-6, atol=0, equal_nan=True, msg=name)


def value_of(metric: Any) -> Any:
    """On the host; of labels that are refused when they are judged, what is said."""
    try:
        return torch.as_tensor(metric.compute()).cpu().double()
    except ValueError as error:
        return str(error)


def test_the_watch_for_waits_sees_them() -> None:
    tensor = torch.arange(3)
    with Waits() as waits:
        bool(tensor[0])
        tensor[tensor > 1]
        tensor.unique()
        tensor.tolist()
    assert {"_local_scalar_dense", "index", "_unique2"} <= set(waits.seen)


def test_a_scatter_adds_in_place_and_makes_nothing_as_large_as_the_matrix() -> None:
    metric = ConfusionMatrix(num_classes=50)
    batch = torch.arange(6), torch.arange(6)
    metric.update(batch)
    leaf: Any
    (leaf,) = metric.stateful_metrics()
    address = leaf.counts.data_ptr()

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            is_new = isinstance(result, torch.Tensor) and result.data_ptr() != address
            self.numel = max(self.numel, result.numel() if is_new else 0)
            return result

    with Largest() as largest:
        for _ in range(80):
            metric.update(batch)
    assert leaf.counts.data_ptr() == address
    assert largest.numel <= 32 * 6  # small batches are counted 32 at a time
