"""Small batches wait to be counted together: nothing that reads, copies, resets or reuses their tensors may see it."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score, recall_score

from dengine.metrics import Accuracy, ConfusionMatrix, Recall, Throughput, TopKAccuracy
from dengine.metrics.collection.metric_set import MetricSet
from dengine.metrics.collection.saved_state import load_state_dict, state_dict
from dengine.metrics.core.batch_queue import BatchQueue

Batch = tuple[torch.Tensor, torch.Tensor]
NUM_BATCHES = 69  # two full queues and some


def batches(sizes: list[int], num_classes: int = 5) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(size, num_classes, generator=generator), torch.randint(num_classes, (size,), generator=generator))
        for size in sizes
    ]


def accuracy_of(seen: list[Batch]) -> float:
    return float(accuracy_score(torch.cat([y for _, y in seen]), torch.cat([x.argmax(1) for x, _ in seen])))


@pytest.mark.parametrize(
    "sizes", [[8] * NUM_BATCHES, [8] * 40 + [3] + [8] * 40, [8, 3] * 10, [8, 0, 8, 8, 0, 0, 8], [1] * 34, [5000] * 3]
)
def test_every_sample_counts_once_at_whatever_size_of_batches(sizes: list[int]) -> None:
    accuracy, recall, seen = Accuracy(), Recall(average="macro"), batches(sizes)
    for place, batch in enumerate(seen, start=1):
        accuracy.update(batch)
        recall.update(batch)
        # To read a value in between changes nothing.
        if place % 5 == 0:
            assert accuracy.compute() == pytest.approx(accuracy_of(seen[:place]))
    assert accuracy.compute() == pytest.approx(accuracy_of(seen))
    labels, predicted = torch.cat([y for _, y in seen]), torch.cat([x.argmax(1) for x, _ in seen])
    assert recall.compute() == pytest.approx(recall_score(labels, predicted, average="macro"))


def test_tensors_that_a_step_writes_again_were_counted_as_they_were() -> None:
    metric, seen = Accuracy(), batches([8] * NUM_BATCHES)
    scores, labels = torch.empty(8, 5), torch.empty(8, dtype=torch.int64)
    for batch in seen:
        scores.copy_(batch[0])
        labels.copy_(batch[1])
        metric.update((scores, labels))
    scores.zero_()
    assert metric.compute() == pytest.approx(accuracy_of(seen))


@pytest.mark.parametrize("other", [lambda x: x.double(), lambda x: x[:, :, None], lambda x: x.T.contiguous().T])
def test_another_kind_of_tensor_in_between(other: Callable[[torch.Tensor], torch.Tensor]) -> None:
    metric, seen = TopKAccuracy(1), batches([8] * 12)
    for place, (scores, labels) in enumerate(seen):
        is_other = place % 4 == 3
        scores = other(scores) if is_other else scores
        metric.update((scores, labels[:, None] if scores.ndim == 3 else labels))
    assert metric.compute() == pytest.approx(accuracy_of(seen))


def test_a_wrong_shape_is_an_error_at_once_and_loses_nothing() -> None:
    metric, seen = Accuracy(num_classes=5), batches([8] * 4)
    for batch in seen[:3]:
        metric.update(batch)
    with pytest.raises(ValueError, match=r"predictions of shape \(8, 5\) and targets of shape \(7,\)"):
        metric.update((seen[0][0], seen[0][1][:7]))
    metric.update(seen[3])
    assert metric.compute() == pytest.approx(accuracy_of(seen))


def test_a_label_outside_the_classes_is_found_while_it_waits() -> None:
    metric, seen = Accuracy(), batches([8] * 3)
    seen[2][1][4] = 9
    for batch in seen:
        metric.update(batch)
    with pytest.raises(ValueError, match="labels as high as 9, but 5 classes"):
        metric.compute()


def test_reset_drops_what_waits() -> None:
    metric, seen = Accuracy(), batches([8] * 9)
    for batch in seen[:5]:
        metric.update(batch)
    metric.reset()
    for batch in seen[5:]:
        metric.update(batch)
    assert metric.compute() == pytest.approx(accuracy_of(seen[5:]))


def test_what_a_checkpoint_holds_has_what_waits() -> None:
    metric, resumed, seen = ConfusionMatrix(), ConfusionMatrix(), batches([8] * 9)
    for batch in seen[:5]:
        metric.update(batch)
        resumed.update(batch)  # an epoch that is given up: its counts must go
    load_state_dict(resumed, state_dict(metric))
    for batch in seen[5:]:
        metric.update(batch)
        resumed.update(batch)
    assert torch.equal(resumed.compute(), metric.compute())  # type: ignore[arg-type]
    assert int(metric.compute().sum()) == 72


def test_a_value_read_from_a_copy_takes_nothing_from_the_metric() -> None:
    metric, seen = Accuracy(), batches([8] * 9)
    (leaf,) = metric.stateful_metrics()
    for batch in seen[:5]:
        leaf.update(batch)
    leaf.flush()
    reduced = leaf.with_states({name: getattr(leaf, name) for name in leaf.states})
    twin = deepcopy(leaf)
    for batch in seen[5:]:
        leaf.update(batch)
    assert reduced.compute() == twin.compute() == pytest.approx(accuracy_of(seen[:5]))
    assert leaf.compute() == pytest.approx(accuracy_of(seen))


def test_inference_mode_comes_and_goes() -> None:
    metric, seen = Accuracy(), batches([8] * 40)
    for place, (scores, labels) in enumerate(seen):
        with torch.inference_mode(place % 3 != 0):
            metric.update((scores * 1, labels))
    assert metric.compute() == pytest.approx(accuracy_of(seen))


def test_no_graph_is_kept() -> None:
    metric, seen = Accuracy(), batches([8] * 5)
    for scores, labels in seen:
        metric.update((scores.clone().requires_grad_() * 1, labels))
    assert metric.compute() == pytest.approx(accuracy_of(seen))
    joined = metric.stateful_metrics()[0]._queue._batches  # type: ignore[attr-defined]
    assert not any(part.requires_grad for part in joined)


def test_large_batches_are_not_copied() -> None:
    queue = BatchQueue()
    large = torch.zeros(64, 1000), torch.zeros(64, dtype=torch.int64)
    queue.expect(large)
    assert not queue.add(large)
    small = torch.zeros(64, 100), torch.zeros(64, dtype=torch.int64)
    queue.expect(small)
    assert queue.add(small)


def test_a_mapping_is_read_in_an_engine_as_before() -> None:
    together, seen = MetricSet(), batches([8] * NUM_BATCHES)
    together.add_all({"acc": Accuracy(), "recall": Recall(average="micro")})
    for scores, labels in seen:
        together.update({"pred": scores, "label": labels})
    values = together.compute(distributed=False)
    assert values["acc"] == values["recall"] == pytest.approx(accuracy_of(seen))


def test_an_epoch_resumed_in_its_middle_took_the_time_before_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 100.0
    monkeypatch.setattr("dengine.metrics.builtin.throughput.perf_counter", lambda: now_s)
    metric: Any = Throughput()
    metric.update(torch.zeros(30))
    now_s += 2
    saved = state_dict(metric)
    now_s += 1000  # until somebody starts the job again
    resumed: Any = Throughput()
    load_state_dict(resumed, saved)
    resumed.update(torch.zeros(30))
    now_s += 4
    assert resumed.compute() == pytest.approx(60 / 6)
