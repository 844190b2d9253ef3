"""What a batch counts, what goes to the device, and outputs that keep no graph."""

import dataclasses
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from dengine.supervised.batches import check_callables, detached, num_samples, on_device


def of(*sizes: int) -> list[torch.Tensor]:
    return [torch.zeros(size, 4) for size in sizes]


@pytest.mark.parametrize(
    ("inputs", "targets", "expected"),
    [
        (torch.zeros(5, 4), torch.zeros(5), 5),
        (of(5, 5), torch.zeros(5), 5),
        (torch.zeros(5, 4), of(5, 5), 5),
        (of(5, 5), {"first": torch.zeros(5)}, 5),
        (torch.zeros(3, 4), [{"boxes": torch.zeros(7, 4)}] * 3, 3),
    ],
)
def test_what_a_batch_counts(inputs: Any, targets: Any, expected: int) -> None:
    assert num_samples(inputs, targets) == expected


@pytest.mark.parametrize(
    ("inputs", "targets"), [(of(3, 3, 3), of(2, 1, 4)), (torch.zeros(3, 4), of(2, 2, 2)), (of(3, 3), of(50, 50))]
)
def test_lists_of_one_tensor_a_sample_are_not_counted_by_guess(inputs: Any, targets: Any) -> None:
    with pytest.raises(TypeError, match=r"first dimensions are .*weight=lambda inputs, targets: len\(targets\)"):
        num_samples(inputs, targets)


@dataclasses.dataclass(frozen=True)
class Output:
    logits: torch.Tensor
    hidden: tuple[torch.Tensor, ...] = ()
    name: str = "net"


def test_a_dataclass_keeps_no_graph() -> None:
    weight = torch.ones(2, requires_grad=True)
    output = Output(2 * weight, (3 * weight,))
    found = detached(output)
    assert type(found) is Output
    assert found.name == "net"
    assert not found.logits.requires_grad
    assert not found.hidden[0].requires_grad
    assert output.logits.requires_grad  # the one that the step still uses
    assert not detached(UserDict(logits=2 * weight))["logits"].requires_grad


def test_a_packed_sequence_goes_to_the_device_by_itself() -> None:
    packed = pack_sequence([torch.zeros(3, 2), torch.zeros(1, 2)])
    (moved,) = on_device((packed,), torch.device("meta"))
    assert isinstance(moved, PackedSequence)
    assert moved.data.device.type == "meta"
    assert moved.batch_sizes.device.type == "cpu"


def test_a_class_of_losses_is_no_loss() -> None:
    with pytest.raises(TypeError, match=r"loss_fn is the class CrossEntropyLoss: pass an instance"):
        check_callables(loss_fn=nn.CrossEntropyLoss)
