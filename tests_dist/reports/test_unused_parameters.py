"""A parameter without a gradient under DDP is told by name, with the option of prepare_model()."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from dengine import Engine, distributed


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.used(inputs)


def unused(rank: int, size: int, kind: str) -> int:
    with distributed.process_group(timeout=300):
        options: dict[str, Any] = {"find_unused_parameters": True} if kind == "option" else {}
        model = distributed.prepare_model(Net(), **options)

        def step(engine: Engine, batch: torch.Tensor) -> None:
            loss = model(batch).sum()
            if kind == "on one rank" and rank == 0:
                loss = loss + model.module.spare(batch).sum()
            loss.backward()

        batches, engine = [torch.ones(3, 2)] * 4, Engine(step)
        if kind == "by hand":
            for batch in batches:
                step(engine, batch)
        return engine.run(batches).iteration


@pytest.mark.parametrize("kind", ["on all ranks", "on one rank", "by hand"])
def test_an_unused_parameter_is_named_with_the_option_that_allows_it(kind: str) -> None:
    for outcome in run_ranks(unused, 2, kind, init=False, expect_failures=True, deadline_s=60):
        is_told = kind == "on one rank" and outcome.rank == 0
        assert outcome.error_type == ("RemoteRankError" if is_told else "RuntimeError"), outcome
        assert "(spare.weight, spare.bias) got no gradient" in outcome.error_message
        assert "prepare_model(model, find_unused_parameters=True)" in outcome.error_message
        assert "Expected to have finished reduction" in outcome.error_message


def test_with_the_option_it_trains() -> None:
    assert run_ranks(unused, 2, "option", init=False, deadline_s=60) == [4, 4]
