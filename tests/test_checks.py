"""The checks of numbers: what is one, what is a slip, and what the message says."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from dengine.checks import is_number, is_whole_number, number, whole_number
from dengine.handlers import ThroughputMonitor, TimeLimit


@pytest.mark.parametrize("value", [3, 0.5, np.float32(0.5), np.int64(3), Fraction(1, 2)])
def test_a_real_number_of_python_or_numpy_becomes_pythons_own(value: object) -> None:
    given = number("x", value)
    assert given == value
    assert type(given) in (int, float)


@pytest.mark.parametrize("value", [True, np.True_, "3", None, 1j, [3], torch.tensor(3.0)])
def test_a_bool_a_text_and_a_tensor_are_no_numbers(value: object) -> None:
    assert not is_number(value)
    with pytest.raises(TypeError, match=r"^x=.* must be a number above 0\.$"):
        number("x", value, "a number above 0", above=0)


@pytest.mark.parametrize("value", [0, -0.5, math.nan])
def test_a_number_that_is_not_above_the_bound_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=f"^x={value} must be a number above 0"):
        number("x", value, "a number above 0", above=0)


def test_a_whole_number_of_any_size_is_no_bool_and_no_float() -> None:
    assert whole_number("x", -(10**30), least=None) == -(10**30)
    assert [is_whole_number(value) for value in (1, True, 1.0, "1")] == [True, False, False, False]
    with pytest.raises(TypeError, match="x=True must be a whole number, but is a bool"):
        whole_number("x", True, least=None)


def test_arguments_take_numbers_of_numpy() -> None:
    assert repr(TimeLimit(np.float32(2.5))) == "TimeLimit(seconds=2.5)"
    with pytest.raises(TypeError, match="peak_flops_per_s='1e15' must be a number above 0"):
        ThroughputMonitor(peak_flops_per_s="1e15")  # type: ignore[arg-type]
