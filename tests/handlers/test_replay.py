"""A step that is run twice gives the same bits; if not, the parameter is named, and nothing was stepped."""

import math
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import Engine, Events, ReplayError, SupervisedEvents, create_supervised_trainer
from dengine.handlers import Guard, Replay

Batch = tuple[Tensor, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def batches(number: int = 12) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator)) for _ in range(number)
    ]


def flipped_once(gradient: Tensor) -> Tensor:
    wrong = gradient.clone()
    wrong.view(torch.int32).view(-1)[0] ^= 1
    return wrong


class Flip:
    """A hook that flips a bit of a gradient in its `at`-th backward pass."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, gradient: Tensor) -> Tensor | None:
        self.calls += 1
        return flipped_once(gradient) if self.calls == self.at else None


def by_hand(
    model: nn.Module, optimizer: torch.optim.Optimizer, change: Callable[[Engine], None] | None = None
) -> Engine:
    def train_step(engine: Engine, batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(batch[0]), batch[1])
        loss.backward()
        if change is not None:
            change(engine)
        optimizer.step()
        return loss.detach()

    return Engine(train_step)


def supervised(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Engine:
    return create_supervised_trainer(model, optimizer, cross_entropy, max_grad_norm=1.0, **options)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (by_hand, {}),
        (supervised, {}),
        (supervised, {"gradient_accumulation_steps": 3}),
        (supervised, {"gradient_accumulation_steps": 2, "guard": {"spike": 20.0, "on_bad": "roll_back"}}),
    ],
)
@pytest.mark.parametrize("every", [1, 2, 5])
@pytest.mark.filterwarnings("ignore:The step of iteration")
def test_a_run_with_a_replay_has_the_bits_of_one_without(make: Any, options: dict[str, Any], every: int) -> None:
    def trained(replays: bool) -> tuple[list[Tensor], int, list[int]]:
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        trainer = make(model, optimizer, **options)
        if replays:
            Replay(model, every=every).attach(trainer)
        steps: list[int] = []
        if make is supervised:
            trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: steps.append(engine.state.iteration))
        torch.manual_seed(1)
        data = batches()
        if "guard" in options:
            data[5] = (data[5][0] * math.nan, data[5][1])
        trainer.run(data, max_epochs=2)
        own = [value for of_one in optimizer.state_dict()["state"].values() for value in of_one.values()]
        return [*model.state_dict().values(), *own, torch.rand(2)], trainer.state.iteration, steps

    (found, *rest), (wanted, *others) = trained(True), trained(False)
    assert all(torch.equal(*pair) for pair in zip(found, wanted, strict=True))
    assert rest == others


@pytest.mark.parametrize("make", [by_hand, supervised])
@pytest.mark.parametrize("at", [4, 5])  # the rehearsal, or the step itself, of iteration 4
@pytest.mark.parametrize("name", ["0.weight", "1.bias", "4.bias"])
def test_a_flipped_bit_is_found_with_the_name_before_the_optimizer_steps(make: Any, at: int, name: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = make(model, optimizer)
    Replay(model, every=4).attach(trainer)
    flip = Flip(at)
    dict(model.named_parameters())[name].register_hook(flip)
    weights: list[Tensor] = []
    trainer.on(
        Events.ITERATION_STARTED(once=4), lambda engine: weights.extend(each.clone() for each in model.parameters())
    )
    with pytest.raises(ReplayError, match=f"The gradient of '{name}' differs.*iteration 4, on rank 0") as raised:
        trainer.run(batches())
    assert (raised.value.parameter, raised.value.rank) == (name, 0)
    assert all(torch.equal(*pair) for pair in zip(weights, model.parameters(), strict=True)), "a wrong step was made"


def test_a_gradient_that_is_changed_after_the_backward_pass_is_found_too() -> None:
    model, flips = net(), []

    def change(engine: Engine) -> None:
        if engine.state.iteration == 2 and not flips:
            flips.append(1)
            parameter = model[0].bias
            parameter.grad = flipped_once(parameter.grad)

    trainer = by_hand(model, torch.optim.SGD(model.parameters(), lr=0.1), change)
    Replay(model, every=2).attach(trainer)
    with pytest.raises(ReplayError, match=r"'0\.bias'"):
        trainer.run(batches())


def test_a_flipped_bit_within_an_accumulation_is_found() -> None:
    model = net()
    trainer = supervised(model, torch.optim.SGD(model.parameters(), lr=0.1), gradient_accumulation_steps=3)
    Replay(model, every=2).attach(trainer)
    model[0].weight.register_hook(Flip(3))
    with pytest.raises(ReplayError, match=r"'0\.weight' differs.*iteration 2"):
        trainer.run(batches())


NOISE = torch.Generator()


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.noise_source = torch.Generator()

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = inputs * self.scale + torch.rand(4, generator=self.noise_source)
        return out


def steps_with_generators() -> list[tuple[str, nn.Module, Callable[[Tensor], Tensor]]]:
    python, numpy = random.Random(3), np.random.default_rng(3)
    own = torch.Generator()
    model = nn.Linear(4, 1)
    return [
        ("own", model, lambda batch: model(batch * torch.rand(4, generator=own))),
        ("NOISE", model, lambda batch: model(batch * torch.rand(4, generator=NOISE))),
        ("python", model, lambda batch: model(batch * python.random())),
        ("numpy", model, lambda batch: model(batch * float(numpy.random()))),
        ("noise_source", noisy := Noisy(), lambda batch: noisy(batch)),
    ]


@pytest.mark.parametrize("index", range(5))
def test_a_step_that_draws_from_a_generator_of_its_own_is_refused_by_name(index: int) -> None:
    name, model, forward = steps_with_generators()[index]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(engine: Engine, batch: Tensor) -> None:
        optimizer.zero_grad()
        forward(batch).square().sum().backward()
        optimizer.step()

    trainer = Engine(train_step)
    Replay(model, every=2).attach(trainer)
    with pytest.raises(ReplayError, match=f"draws from a generator of its own, '{name}'"):
        trainer.run([torch.ones(2, 4)] * 3)


def test_generators_that_everybody_has_are_set_back() -> None:
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    unused = torch.Generator()

    def train_step(engine: Engine, batch: Tensor) -> None:
        optimizer.zero_grad()
        factor = torch.rand(()) + random.random() + float(np.random.rand())
        assert unused is not None
        model(batch * factor).sum().backward()
        optimizer.step()

    trainer = Engine(train_step)
    Replay(model, every=1).attach(trainer)
    assert trainer.run([torch.ones(2, 4)] * 3).iteration == 3


def test_an_error_of_the_step_is_raised_as_it_is() -> None:
    model = nn.Linear(4, 1)

    def train_step(engine: Engine, batch: Tensor) -> None:
        raise ValueError("no")

    trainer = Engine(train_step)
    Replay(model, every=1).attach(trainer)
    with pytest.raises(ValueError, match="no"):
        trainer.run([torch.ones(2, 4)])
    assert not trainer.repeats.is_rehearsal


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="every=0 must be at least 1"):
        Replay(net(), every=0)
    with pytest.raises(TypeError, match="Replay\\(\\) takes a torch.nn.Module"):
        Replay(3)  # type: ignore[arg-type]
    scaled = Engine(lambda engine, batch: None)
    scaled.state.grad_scaler = {}
    with pytest.raises(ValueError, match="fp16"):
        Replay(net()).attach(scaled)


@pytest.mark.filterwarnings("ignore:The step of iteration")
def test_a_step_that_a_guard_leaves_out_is_no_alarm() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(engine: Engine, batch: Batch) -> None:
        optimizer.zero_grad()
        guard.backward(cross_entropy(model(batch[0]), batch[1]))
        guard.step()

    trainer = Engine(train_step)
    guard = Guard(trainer, model, optimizer)
    Replay(model, every=1).attach(trainer)
    data = batches()
    data[3] = (data[3][0] * math.nan, data[3][1])
    assert trainer.run(data).skipped == [4]
