"""A run whose output goes wrong ends, and nothing waits for a device to find out."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from dengine import Engine, Events
from dengine.handlers import TerminateOnNan

NAN, INF = math.nan, math.inf


def stopped_at(outputs: list[Any], **options: Any) -> int:
    trainer = Engine(lambda engine, batch: outputs[batch])
    trainer.on(Events.ITERATION_COMPLETED, TerminateOnNan(**options))
    return trainer.run(range(len(outputs)), max_epochs=1).iteration


@pytest.mark.parametrize(
    "wrong",
    [
        NAN,
        INF,
        -INF,
        complex(0, NAN),
        torch.tensor(NAN),
        torch.tensor([1.0, -INF]),
        torch.tensor([1.0, NAN], dtype=torch.bfloat16),
        torch.tensor([complex(1, INF)]),
        torch.tensor([1.0, NAN]).to(torch.float8_e4m3fn),
        torch.tensor([[0.0, NAN]]).to_sparse(),
        torch.tensor([[0.0, NAN]]).to_sparse_csr(),
        np.float32("nan"),
        {"loss": np.array([1.0, -np.inf])},
        {"loss": 1.0, "parts": [torch.ones(2), (torch.tensor([[NAN]]),)]},
    ],
)
def test_a_number_that_is_not_finite_ends_the_run_where_it_comes(wrong: Any) -> None:
    with pytest.warns(RuntimeWarning, match="iteration 3"):
        assert stopped_at([1.0, {"loss": torch.ones(2)}, wrong, 1.0, 1.0]) == 3


def test_finite_numbers_and_what_is_no_number_end_nothing() -> None:
    outputs = [
        0,
        np.int64(3),
        np.array(["nan"]),
        "nan",
        None,
        True,
        torch.tensor([1]),
        torch.zeros(0),
        {"a": [1e300]},
        torch.tensor([True]),
    ]
    assert stopped_at(outputs) == len(outputs)


def test_a_transform_says_what_is_looked_at() -> None:
    outputs = [{"loss": 1.0, "aux": NAN}] * 4
    assert stopped_at(outputs, output_transform=lambda output: output["loss"]) == 4


def test_it_can_be_used_again_after_it_has_ended_a_run() -> None:
    handler = TerminateOnNan()
    trainer = Engine(lambda engine, batch: torch.tensor(batch))
    trainer.on(Events.ITERATION_COMPLETED, handler)
    with pytest.warns(RuntimeWarning):
        assert trainer.run([1.0, NAN, 1.0]).iteration == 2
    assert trainer.run([1.0, 1.0, 1.0]).iteration == 3


class OnDevice(TerminateOnNan):
    """As on a GPU: the flag is on a device where reading costs."""

    reads: list[int]

    def _is_due(self, iteration: int, is_last: bool) -> bool:
        self._flags = {torch.device("meta"): flag for flag in self._flags.values()}
        return super()._is_due(iteration, is_last)


def test_a_flag_on_a_device_is_read_every_16_iterations_and_at_the_end_of_an_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[int] = []
    trainer = Engine(lambda engine, batch: torch.tensor(1.0))
    handler = OnDevice()
    monkeypatch.setattr(handler, "_read", lambda: reads.append(trainer.state.iteration))
    trainer.on(Events.ITERATION_COMPLETED, handler)
    trainer.run(range(20), max_epochs=2)
    assert reads == [16, 20, 32, 40]


@dataclass
class Output:
    loss: Any
    parts: Any = None


def test_a_dataclass_is_looked_into_and_a_whole_number_of_any_size_is_right() -> None:
    assert stopped_at([Output(1.0), Output(torch.ones(1), [Output(NAN)]), Output(1.0)]) == 2
    assert stopped_at([10**400, Fraction(10**400), Output(10**400), Output]) == 4
