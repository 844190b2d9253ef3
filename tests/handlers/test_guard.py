"""A bad step leaves no trace: the run ends with the bits of one on data without that batch."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from dengine import Engine, Events, GuardError, SupervisedEvents, create_supervised_trainer
from dengine.handlers import EMA, Checkpoint, Guard, LRScheduler, TerminateOnNan
from dengine.handlers import guard as guard_module
from dengine.metrics import Average

pytestmark = pytest.mark.filterwarnings("ignore:The step of iteration")

Batch = tuple[Tensor, Tensor]
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01),
}


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3))


def batches(number: int = 12) -> list[Batch]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator)) for _ in range(number)
    ]


def poisoned(data: list[Batch], *indices: int, value: float = math.nan) -> list[Batch]:
    return [(x * value if index in indices else x, y) for index, (x, y) in enumerate(data)]


def without(data: list[Batch], *indices: int) -> list[Batch]:
    return [batch for index, batch in enumerate(data) if index not in indices]


class Waits(TorchDispatchMode):
    """The operations seen that would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


class Outcome:
    """What a run leaves behind, to the last bit."""

    def __init__(self, trainer: Engine, model: nn.Module, optimizer: torch.optim.Optimizer, *more: Any) -> None:
        self.state = trainer.state
        parts: list[Any] = [model.state_dict(), optimizer.state_dict(), *(each.state_dict() for each in more)]
        self.tensors = {name: value.clone() for name, value in tensors_in(parts)}
        self.numbers = [repr(group) for group in optimizer.state_dict()["param_groups"]]
        self.draw = torch.rand(3)

    def check(self, other: "Outcome") -> None:
        assert self.tensors.keys() == other.tensors.keys()
        for name, value in self.tensors.items():
            assert torch.equal(value, other.tensors[name]), name
        assert self.numbers == other.numbers
        assert torch.equal(self.draw, other.draw), "the generator is elsewhere"


def tensors_in(value: Any, name: str = "") -> Any:
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_in(part, f"{name}.{key}")
    elif isinstance(value, list):
        for index, part in enumerate(value):
            yield from tensors_in(part, f"{name}.{index}")


def by_hand(
    data: list[Batch], optimizer_name: str, *, accumulation: int = 1, epochs: int = 1, **options: Any
) -> Outcome:
    model = net()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())

    def train_step(engine: Engine, batch: Batch) -> Tensor:
        if (engine.state.iteration - 1) % accumulation == 0:
            optimizer.zero_grad()
        loss = cross_entropy(model(batch[0]), batch[1])
        guard.backward(loss)
        if engine.state.iteration % accumulation == 0:
            guard.step()
        return loss.detach()

    trainer = Engine(train_step)
    guard = Guard(trainer, model, optimizer, **options)
    ema = EMA(model, 0.9)
    schedule = LRScheduler(torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5))
    trainer.on(Events.ITERATION_COMPLETED(every=accumulation), ema)
    trainer.on(Events.ITERATION_COMPLETED(every=accumulation), schedule)
    trainer.add_metric(Average(), "loss")
    torch.manual_seed(1)
    trainer.run(data, max_epochs=epochs)
    return Outcome(trainer, model, optimizer, ema, schedule)


def supervised(
    data: list[Batch], optimizer_name: str, *, guard: Any, accumulation: int = 1, epochs: int = 1
) -> Outcome:
    model = net()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    trainer = create_supervised_trainer(
        model, optimizer, cross_entropy, gradient_accumulation_steps=accumulation, max_grad_norm=1.0, guard=guard
    )
    ema = EMA(model, 0.9)
    schedule = LRScheduler(torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5))
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, ema)
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, schedule)
    trainer.add_metric(Average(output_transform=lambda output: output["loss"]), "loss")
    torch.manual_seed(1)
    trainer.run(data, max_epochs=epochs)
    return Outcome(trainer, model, optimizer, ema, schedule)


@pytest.fixture(params=["now", "late"])
def verdict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Judged before the step, as on the CPU, or some steps later, as on a GPU."""
    if request.param == "late":
        monkeypatch.setattr(guard_module, "_is_late", lambda device: True)
    return str(request.param)


@pytest.mark.parametrize("on_bad", ["skip", "roll_back"])
@pytest.mark.parametrize(
    ("accumulation", "removed"), [(1, (5,)), (1, (0, 6, 7)), (2, (4, 5)), (1, (11,)), (3, (9, 10, 11))]
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("train", ["by hand", "supervised"])
def test_a_poisoned_batch_leaves_no_trace(
    train: str, optimizer: str, accumulation: int, removed: tuple[int, ...], on_bad: str, verdict: str
) -> None:
    data = batches()
    bad = poisoned(data, *removed[::accumulation])
    options: dict[str, Any] = {"on_bad": on_bad, "snapshot_every": 4}
    if train == "by hand":
        found = by_hand(bad, optimizer, accumulation=accumulation, **options)
        wanted = by_hand(without(data, *removed), optimizer, accumulation=accumulation)
    else:
        found = supervised(bad, optimizer, accumulation=accumulation, guard=options)
        wanted = supervised(without(data, *removed), optimizer, accumulation=accumulation, guard=False)
    found.check(wanted)
    steps = [index + accumulation for index in removed[::accumulation]]
    assert found.state.skipped == steps
    returns = 2 if verdict == "late" and len(steps) == 3 else len(steps)  # two neighbours are found by one return
    assert found.state.roll_backs == (returns if on_bad == "roll_back" else 0)
    assert found.state.metrics["skipped"] == len(steps)
    assert found.state.metrics["loss"] == wanted.state.metrics["loss"]


@pytest.mark.parametrize("on_bad", ["skip", "roll_back"])
def test_several_epochs_and_their_ends(on_bad: str, verdict: str) -> None:
    data = batches(5)
    found = supervised(poisoned(data, 4), "adam", guard={"on_bad": on_bad, "snapshot_every": 3}, epochs=3)
    supervised_without = supervised(without(data, 4), "adam", guard=False, epochs=3)
    found.check(supervised_without)
    assert found.state.skipped == [5, 10, 15]


def losses(value: float, number: int) -> list[Tensor]:
    """Batches whose loss, by `line`, is about `value` squared."""
    return list(value + 0.1 * torch.randn(number, 4, 1, generator=torch.Generator().manual_seed(3)))


def line(data: list[Tensor], *, watch: Any = None, **options: Any) -> tuple[Engine, nn.Linear]:
    """The weight only scales, so that the loss stays what the batch says."""
    model = nn.Linear(1, 1)
    nn.init.ones_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)

    def train_step(engine: Engine, batch: Tensor) -> None:
        optimizer.zero_grad()
        guard.backward(model(batch).square().mean())
        guard.step()

    trainer = Engine(train_step)
    guard = Guard(trainer, model, optimizer, **options)
    if watch is not None:
        with watch:
            trainer.run(data)
    else:
        trainer.run(data)
    return trainer, model


def test_a_loss_that_stands_out_is_left_out_after_fifty_steps(verdict: str) -> None:
    data = losses(1.0, 100)
    data[30] = data[80] = torch.full((4, 1), 10.0)
    trainer, model = line(data, spike=8.0)
    assert trainer.state.skipped == [81]
    _, same = line(data[:80] + data[81:], spike=None)
    assert torch.equal(model.weight, same.weight)
    assert line(data)[0].state.skipped == [], "without spike= only what is not finite is bad"


def test_ten_thousand_good_steps_raise_no_alarm() -> None:
    assert line(losses(1.0, 10_000), spike=8.0)[0].state.skipped == []


@pytest.mark.parametrize("spike", [None, 8.0])
def test_a_good_step_waits_for_no_device(spike: float | None, verdict: str) -> None:
    watch = Waits()
    trainer, _ = line(losses(1.0, 250), spike=spike, watch=watch)
    assert trainer.state.skipped == []
    assert watch.seen == []


def test_losses_that_hardly_differ_are_no_reason_for_an_alarm() -> None:
    data = [torch.ones(4, 1)] * 60 + [torch.full((4, 1), 1.0001)] * 20
    assert line(data, spike=6.0)[0].state.skipped == []


def test_more_bad_steps_than_allowed_are_an_error_with_the_last_values(verdict: str) -> None:
    data = poisoned(batches(), 1, 4, 7)
    assert by_hand(data, "sgd", max_bad=3).state.skipped == [2, 5, 8]
    with pytest.raises(
        GuardError, match=r"3 of the last 1000 steps were bad, more than max_bad=2.*nan in iteration 8"
    ) as raised:
        by_hand(data, "sgd", max_bad=2)
    assert raised.value.iterations == [2, 5, 8]
    assert all(map(math.isnan, raised.value.losses))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_a_gradient_that_is_not_finite_is_enough(value: float) -> None:
    """The loss is finite, and only one element of one gradient is not."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model.weight.detach().clone()

    def train_step(engine: Engine, batch: Tensor) -> None:
        guard.backward(model(batch).mean())
        assert model.weight.grad is not None
        model.weight.grad[0, 1] = value
        guard.step()

    trainer = Engine(train_step)
    guard = Guard(trainer, model, optimizer)
    assert trainer.run([torch.ones(1, 2)]).skipped == [1]
    assert torch.equal(model.weight, before)


def test_a_loss_without_a_gradient_that_shows_it_is_enough() -> None:
    """All labels are ignored: the mean of nothing is not a number, but its gradient is 0."""
    model = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, guard=True)
    batch = torch.ones(2, 2), torch.full((2,), -100)
    before = model.weight.detach().clone()
    assert trainer.run([batch]).skipped == [1]
    assert torch.equal(model.weight, before)


def test_the_event_of_a_step_does_not_fire_for_one_that_was_left_out(verdict: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, guard=True)
    fired: list[int] = []
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: fired.append(engine.state.iteration))
    trainer.run(poisoned(batches(), 3, 11))
    assert fired == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]


def test_handlers_see_their_batch_whatever_becomes_of_the_step(verdict: str) -> None:
    seen: list[int] = []
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, guard=True, gradient_accumulation_steps=2)
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: seen.append(len(engine.state.batch[0])))
    trainer.run(poisoned(batches(), 3))
    assert seen == [6] * 12


def test_a_guard_decides_before_terminate_on_nan(verdict: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, guard=True)
    trainer.on(Events.ITERATION_COMPLETED, TerminateOnNan())
    assert trainer.run(poisoned(batches(), 3)).iteration == 12


def test_a_second_run_starts_with_a_clean_record() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, guard={"on_bad": "roll_back"})
    state = trainer.run(poisoned(batches(), 3))
    assert (state.skipped, state.roll_backs) == ([4], 1)
    state = trainer.run(batches())
    assert (state.skipped, state.roll_backs, state.metrics["skipped"]) == ([], 0, 0)


@pytest.mark.parametrize("on_bad", ["skip", "roll_back"])
@pytest.mark.parametrize("saved_at", [45, 63])  # before the fiftieth step; after a spike
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path: Path, saved_at: int, on_bad: str, verdict: str) -> None:
    """Saved after a step that was left out, with losses that are compared with those before the save."""
    data = poisoned(batches(70), 4, 66)
    data[61] = (data[61][0] * 1e4, data[61][1])

    def train(stop: int | None, *, resumes: bool) -> Outcome:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        guard = {"spike": 20.0, "on_bad": on_bad, "snapshot_every": 10}
        trainer = create_supervised_trainer(model, optimizer, cross_entropy, guard=guard)
        trainer.add_metric(Average(output_transform=lambda output: output["loss"]), "loss")
        objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
        torch.manual_seed(1)
        if resumes:
            assert Checkpoint.resume(tmp_path, objects) is not None
        elif stop is not None:
            trainer.on(Events.ITERATION_COMPLETED(once=stop), Checkpoint(objects, tmp_path))
        trainer.run(data, max_iterations=stop)
        return Outcome(trainer, model, optimizer)

    whole = train(None, resumes=False)
    assert whole.state.skipped == [5, 62, 67]
    train(saved_at, resumes=False)
    rest = train(None, resumes=True)
    rest.check(whole)
    assert rest.state.skipped == whole.state.skipped
    assert rest.state.roll_backs == whole.state.roll_backs
    assert rest.state.metrics["loss"] == whole.state.metrics["loss"]


def test_draws_of_a_handler_between_two_steps_do_not_disturb_steps_that_are_done_again() -> None:
    def train(data: list[Batch], **options: Any) -> Outcome:
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = create_supervised_trainer(model, optimizer, cross_entropy, **options)
        trainer.on(
            Events.ITERATION_COMPLETED(filter=lambda engine, count: count in (2, 3)), lambda engine: torch.rand(5)
        )
        torch.manual_seed(1)
        trainer.run(data)
        return Outcome(trainer, model, optimizer)

    train(poisoned(batches(), 6), guard={"on_bad": "roll_back"}).check(train(without(batches(), 6)))


@pytest.mark.parametrize("on_bad", ["skip", "roll_back"])
def test_iterations_without_a_batch_are_no_steps(on_bad: str, verdict: str) -> None:
    data: Any = poisoned(batches(), 6)
    data[2] = data[5] = data[7] = None
    found = supervised(data, "adam", guard={"on_bad": on_bad, "snapshot_every": 4})
    found.check(supervised(without(data, 6), "adam", guard=False))
    assert found.state.skipped == [7]


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"spike": 0}, ValueError, "spike=0 must be a number of robust deviations above 0"),
        ({"spike": -1.5}, ValueError, "spike=-1.5"),
        ({"spike": "a"}, TypeError, "spike='a'"),
        ({"on_bad": "stop"}, ValueError, 'on_bad=\'stop\' must be "skip" or "roll_back"'),
        ({"max_bad": -1}, ValueError, "max_bad=-1"),
        ({"snapshot_every": 0}, ValueError, "snapshot_every=0"),
        ({"num_snapshots": 0}, ValueError, "num_snapshots=0"),
    ],
)
def test_a_wrong_option_is_refused_and_the_engine_stays_without_a_guard(
    options: dict[str, Any], error: type[Exception], match: str
) -> None:
    model = net()
    trainer, optimizer = Engine(lambda engine, batch: None), torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(error, match=match):
        Guard(trainer, model, optimizer, **options)
    Guard(trainer, model, optimizer)
    with pytest.raises(error, match=match):
        create_supervised_trainer(model, optimizer, cross_entropy, guard=options)


def test_an_optimizer_of_another_model_is_refused() -> None:
    optimizer = torch.optim.SGD(net().parameters(), lr=0.1)
    with pytest.raises(ValueError, match="None of the parameters of this Sequential is in the optimizer"):
        Guard(Engine(lambda engine, batch: None), net(), optimizer)


def test_a_second_guard_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, guard=True)
    with pytest.raises(ValueError, match="has a guard already"):
        Guard(trainer, model, optimizer)


def test_snapshots_that_do_not_fit_are_refused_with_the_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monkeypatch.setattr("dengine.handlers.step_log.host_memory_free", lambda: 100)
    trainer = Engine(lambda engine, batch: None)
    with pytest.raises(MemoryError, match=r"1 snapshot of 0.00 GiB.*0.00 GiB are free"):
        Guard(trainer, model, optimizer, on_bad="roll_back")
    Guard(trainer, model, optimizer)


def test_two_steps_in_one_iteration_are_refused() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(engine: Engine, batch: Tensor) -> None:
        for _ in range(2):
            guard.backward(model(batch).mean())
            guard.step()

    trainer = Engine(train_step)
    guard = Guard(trainer, model, optimizer)
    with pytest.raises(RuntimeError, match="one step an iteration, but iteration 1 makes a second one"):
        trainer.run([torch.ones(1, 1)])


@pytest.mark.parametrize(("guard", "match"), [(3, "guard=3 must be True"), ({"spikes": 8}, "no option 'spikes'")])
def test_options_of_the_supervised_trainer_are_checked(guard: Any, match: str) -> None:
    model = net()
    with pytest.raises(TypeError, match=match):
        create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy, guard=guard)
