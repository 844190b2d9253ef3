"""The rank that the others wait for, and its phase, on real ranks: a random one sleeps in one part of its steps.

DENGINE_STRAGGLERS=100 has so many of each kind of step, instead of one for each phase.
"""

import os
import pickle
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor, nn

from dengine import Engine, Events, distributed
from dengine.comm import waits
from dengine.handlers import ThroughputMonitor
from dengine.supervised import create_supervised_trainer

NUM_CASES = int(os.environ.get("DENGINE_STRAGGLERS", "1"))  # of each kind of step
NUM_STEPS = 8
LEAST_S = 0.03
ALIVE: list[Engine] = []  # with their models in DDP, which the steps of the engines after them do not use
Cases: TypeAlias = "list[tuple[int, str]]"  # the slow rank, and its phase


@dataclass
class Sleeper:
    """Sleeps where it is told to, and if it is this rank's turn."""

    phase: str = ""
    seconds: float = 0.0

    def at(self, phase: str) -> None:
        if phase == self.phase:
            time.sleep(self.seconds)


class SlowBackward(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, values: Tensor, sleeper: Sleeper) -> Tensor:
        context.sleeper = sleeper
        return values.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        context.sleeper.at("backward")
        return gradient, None


class Net(nn.Module):
    def __init__(self, sleeper: Sleeper) -> None:
        super().__init__()
        self.sleeper = sleeper
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))  # buffers go to all ranks

    def forward(self, inputs: Tensor) -> Tensor:
        self.sleeper.at("forward")
        first = SlowBackward.apply(self.layers[0](inputs), self.sleeper)
        return self.layers[2](self.layers[1](first))


@dataclass
class SlowData:
    sleeper: Sleeper
    num_samples: int  # another number on each rank, so that their counts are exchanged

    def __len__(self) -> int:
        return NUM_STEPS

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for _ in range(NUM_STEPS):
            self.sleeper.at("data")
            yield torch.ones(self.num_samples, 8), torch.ones(self.num_samples, 1)


def supervised(sleeper: Sleeper) -> Engine:
    model = Net(sleeper)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    return create_supervised_trainer(model, optimizer, nn.functional.mse_loss)


def by_hand_in_ddp(sleeper: Sleeper) -> Engine:
    model = distributed.prepare_model(Net(sleeper))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        optimizer.zero_grad()
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        sleeper.at("step")
        optimizer.step()

    engine = Engine(step)
    engine.on(Events.EPOCH_COMPLETED, lambda engine: pickle.dumps(model))  # hooks are on it meanwhile
    return engine


def by_hand(sleeper: Sleeper) -> Engine:
    """A step whose parts cannot be told apart."""
    model = Net(sleeper)

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        nn.functional.mse_loss(model(batch[0]), batch[1]).backward()
        for parameter in model.parameters():
            parameter.grad = distributed.all_reduce(parameter.grad, name="gradients")

    return Engine(step)


def unknown_waits(sleeper: Sleeper) -> Engine:
    """A step that waits in a collective that this package does not see."""

    def step(engine: Engine, batch: tuple[Tensor, Tensor]) -> None:
        dist.all_reduce(torch.ones(1))

    return Engine(step)


KINDS: dict[str, tuple[Callable[[Sleeper], Engine], tuple[str, ...]]] = {
    "supervised": (supervised, ("data", "forward", "backward", "handlers")),
    "by_hand_in_ddp": (by_hand_in_ddp, ("data", "forward", "backward", "step", "handlers")),
    "by_hand": (by_hand, ("data", "forward", "backward", "handlers")),
    "unknown_waits": (unknown_waits, ("data", "handlers")),
}


def found_on(rank: int, size: int, kind: str, cases: Cases) -> list[tuple[Any, dict[str, Any]]]:
    """Slow one rank after the other, an epoch each: by several times what an even step takes here, as the first epoch
    shows."""
    sleeper, even_s = Sleeper(), 0.0
    engine = KINDS[kind][0](sleeper)
    ALIVE.append(engine)
    ThroughputMonitor(print_line=False).attach(engine)
    engine.on(Events.ITERATION_COMPLETED, lambda engine: sleeper.at("handlers"))
    found: list[tuple[Any, dict[str, Any]]] = []

    @engine.on(Events.EPOCH_STARTED)
    def choose(engine: Engine) -> None:
        if engine.state.epoch == 0:
            return
        slow, phase = cases[engine.state.epoch - 1]
        sleeper.seconds, sleeper.phase = max(LEAST_S, 3 * even_s), phase if rank == slow else ""

    @engine.on(Events.EPOCH_COMPLETED)
    def note(engine: Engine) -> None:
        nonlocal even_s
        if engine.state.epoch == 0:
            even_s = 1e-3 * engine.state.metrics["step_ms"]
            return
        metrics = {name: value for name, value in engine.state.metrics.items() if name.startswith("straggler")}
        found.append((engine.state.straggler, metrics))

    engine.run(SlowData(sleeper, 2 + rank), max_epochs=len(cases) + 1)
    assert waits._listeners == ()
    return found


def found_in_all(rank: int, size: int, cases: dict[str, Cases]) -> dict[str, list[tuple[Any, dict[str, Any]]]]:
    return {kind: found_on(rank, size, kind, each) for kind, each in cases.items()}


@pytest.mark.parametrize("size", [2, 3])
def test_the_slow_rank_and_its_phase_are_named_on_every_rank(size: int) -> None:
    generator = random.Random(size)
    cases: dict[str, Cases] = {}
    for kind, (_, phases) in KINDS.items():
        num = max(NUM_CASES, len(phases))
        cases[kind] = [(generator.randrange(size), phases[index % len(phases)]) for index in range(num)]
    results = run_ranks(found_in_all, size, cases, deadline_s=60 + 2 * sum(map(len, cases.values())))
    for found in results[1:]:
        assert found == results[0]
    for kind in KINDS:
        of_kind = results[0][kind]
        in_step = ("forward", "backward") if kind == "by_hand" else ()
        expected = [(slow, "step" if phase in in_step else phase) for slow, phase in cases[kind]]
        assert [(each.rank, each.phase) if each else None for each, _ in of_kind] == expected, kind
        for straggler, metrics in of_kind:
            assert metrics == {"straggler_rank": straggler.rank, "straggler_s": straggler.seconds}
            assert straggler.seconds > LEAST_S / 2
