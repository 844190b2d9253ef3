"""One rank has nothing to add up, so that its states skip the buffer: what comes out is what the buffer would give."""

import pytest
import torch

from dengine.launch.world import World
from dengine.metrics.reduction.packing import Plan, of_one_rank, packed, unpacked
from dengine.metrics.reduction.schema import State, schema_of

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WHOLES = (torch.bool, torch.uint8, torch.int32, torch.int64)
DTYPES = FLOATS + WHOLES


def state(op: str, dtype: torch.dtype, *, is_seen: bool = True) -> State:
    value = torch.tensor([[1, 0, 3], [0, 2, 2]]).to(dtype)
    return State("'m' (M)", f"{op} of {dtype}", op, value, is_seen)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["sum", "mean", "min", "max", "gather", "samples", "cat"])
@pytest.mark.parametrize("is_seen", [True, False], ids=["seen", "not seen"])
def test_a_state_of_one_rank_is_what_the_buffer_would_give(op: str, dtype: torch.dtype, is_seen: bool) -> None:
    here = World(device=torch.device("cpu"))
    states = [state(op, dtype, is_seen=is_seen)]
    schemas = (schema_of(states[0]),)
    plan = Plan.of(schemas)
    expected = unpacked(packed(states, schemas, plan, here, None), states, schemas, plan, here)[0]

    own = of_one_rank(states, schemas, here)[0]

    assert own.dtype == expected.dtype
    assert own.shape == expected.shape
    assert torch.equal(own, expected)
    assert own.data_ptr() != states[0].value.data_ptr()  # else the epoch's value would go on counting


@pytest.mark.parametrize("op", ["sum", "min", "max", "gather"])
def test_numbers_that_are_none_and_the_largest_ones_stay_as_they_are(op: str) -> None:
    here = World(device=torch.device("cpu"))
    for value in (torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0]), torch.tensor([2**63 - 1, -(2**63)])):
        one = State("'m' (M)", op, op, value)  # type: ignore[arg-type]
        own = of_one_rank([one], (schema_of(one),), here)[0]
        assert torch.equal(own.reshape(-1).nan_to_num(7.0), value.nan_to_num(7.0))
