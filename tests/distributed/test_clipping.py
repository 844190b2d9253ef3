"""`clip_grad_norm_` of plain tensors is torch's own."""

import pytest
import torch
from torch import nn

from dengine import distributed


def parameters() -> list[nn.Parameter]:
    made = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    made[0].grad, made[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    return made


def test_gradients_are_scaled_to_the_largest_norm_and_the_norm_before_is_given() -> None:
    made = parameters()
    assert distributed.clip_grad_norm_(iter(made), 1.0) == 5.0
    assert made[0].grad is not None
    torch.testing.assert_close(made[0].grad, torch.tensor([0.6, 0.0]))


def test_one_tensor_and_none_at_all_are_taken() -> None:
    assert distributed.clip_grad_norm_(parameters()[0], 10.0, float("inf")) == 3.0
    assert distributed.clip_grad_norm_([], 1.0) == 0.0


@pytest.mark.parametrize("order", [0, -1.0, float("nan"), float("-inf")])
def test_an_order_that_gives_no_norm_is_refused(order: float) -> None:
    made = parameters()
    with pytest.raises(ValueError, match="norm_type=.* must be a positive number"):
        distributed.clip_grad_norm_(made, 1.0, order)
    assert made[1].grad == 4.0


def test_a_norm_that_is_none_can_be_an_error() -> None:
    made = parameters()
    made[1].grad = torch.tensor([float("nan")])
    with pytest.raises(RuntimeError, match="non-finite"):
        distributed.clip_grad_norm_(made, 1.0, error_if_nonfinite=True)
