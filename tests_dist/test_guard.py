"""A batch that only one rank finds bad: all ranks end with the bits of a run on data without it."""

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import Engine, Events, GuardError, create_supervised_trainer, distributed
from dengine.handlers import Checkpoint, Guard
from dengine.handlers import guard as guard_module
from dengine.metrics import Average

Batch = tuple[Tensor, Tensor]
State = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One training, in which rank `by` finds batch `bad` (from 0) bad."""

    train: str  # "by hand" or "supervised"
    strategy: str = "ddp"
    optimizer: str = "adam"
    on_bad: str = "skip"
    bad: int = 5
    value: float = math.nan
    accumulation: int = 1
    is_late: bool = False
    spike: float | None = None
    ignores_labels: bool = False
    unused: bool = False
    number: int = 10


CASES = [
    Case("supervised"),
    Case("supervised", optimizer="sgd", on_bad="roll_back", accumulation=2, bad=4),
    Case("supervised", is_late=True, on_bad="roll_back"),
    Case("supervised", is_late=True, accumulation=2, bad=6),
    Case("supervised", ignores_labels=True),
    Case("supervised", strategy="fsdp"),
    Case("supervised", strategy="fsdp", is_late=True),
    Case("supervised", strategy="fsdp", is_late=True, accumulation=2, bad=4),
    Case("by hand", on_bad="roll_back", optimizer="sgd"),
    Case("by hand", value=math.inf),
    Case("by hand", is_late=True),
    Case("by hand", spike=50.0, value=1e6, bad=55, number=58),
    Case("by hand", spike=50.0, value=1e6, bad=55, number=58, unused=True),
]


class Net(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(4, 8)
        self.norm = nn.Identity() if case.spike else nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(8, 3)
        self.spare = nn.Linear(1, 1) if case.unused else None

    def forward(self, inputs: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(torch.relu(self.norm(self.first(inputs)))))
        return out


def data_of(case: Case, rank: int, size: int, *, is_clean: bool) -> list[Batch]:
    generator = torch.Generator().manual_seed(50 + rank)
    data = [
        (torch.randn(6, 4, generator=generator), torch.randint(0, 3, (6,), generator=generator))
        for _ in range(case.number)
    ]
    if is_clean:
        last = case.bad - case.bad % case.accumulation
        return data[:last] + data[last + case.accumulation :]
    if rank == size - 1:
        inputs, labels = data[case.bad]
        data[case.bad] = (
            (inputs, torch.full_like(labels, -100)) if case.ignores_labels else (inputs * case.value, labels)
        )
    return data


def trained(case: Case, rank: int, size: int, *, is_clean: bool) -> State:
    guard_module._is_late = lambda device: case.is_late  # as on a GPU
    model: nn.Module = Net(case)
    options: dict[str, Any] = {"find_unused_parameters": True} if case.unused else {}
    model = distributed.prepare_model(model, case.strategy, **options)  # type: ignore[arg-type]
    kinds: dict[str, Any] = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}
    momentum = {"momentum": 0.9} if case.optimizer == "sgd" else {}
    optimizer = kinds[case.optimizer](model.parameters(), lr=0.01, **momentum)
    if case.train == "supervised":
        guard = False if is_clean else {"on_bad": case.on_bad, "snapshot_every": 3}
        trainer = create_supervised_trainer(
            model, optimizer, cross_entropy, gradient_accumulation_steps=case.accumulation, guard=guard
        )
        trainer.add_metric(Average(output_transform=lambda output: output["loss"]), "loss")
    else:
        trainer = by_hand(case, model, optimizer, is_clean=is_clean)
        trainer.add_metric(Average(), "loss")
    torch.manual_seed(100 + rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = trainer.run(data_of(case, rank, size, is_clean=is_clean))
    return state_of(model, optimizer, state)


def by_hand(case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, *, is_clean: bool) -> Engine:
    guard: Guard

    def train_step(engine: Engine, batch: Batch) -> Tensor:
        optimizer.zero_grad()
        loss = cross_entropy(model(batch[0]), batch[1])
        if is_clean:
            loss.backward()
            optimizer.step()
        else:
            guard.backward(loss)
            guard.step()
        return loss.detach()

    trainer = Engine(train_step)
    if not is_clean:
        guard = Guard(trainer, model, optimizer, on_bad=case.on_bad, snapshot_every=3, spike=case.spike)  # type: ignore[arg-type]
    return trainer


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, state: Any) -> State:
    parts: list[Any] = [*distributed.unwrap_model(model).state_dict().values()]
    parts += [value for of_one in optimizer.state_dict()["state"].values() for value in of_one.values()]
    local = [each.to_local() if hasattr(each, "to_local") else each for each in parts]
    return {
        "tensors": [each.clone() if isinstance(each, Tensor) else each for each in local],
        "draw": torch.rand(3),
        "loss": state.metrics["loss"],
        "skipped": getattr(state, "skipped", None),
        "roll_backs": getattr(state, "roll_backs", None),
    }


def all_cases(rank: int, size: int) -> list[tuple[State, State]]:
    return [tuple(trained(case, rank, size, is_clean=clean) for clean in (False, True)) for case in CASES]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_batch_that_one_rank_finds_bad_leaves_no_trace_on_any(size: int) -> None:
    for rank, outcomes in enumerate(run_ranks(all_cases, size)):
        for case, (found, wanted) in zip(CASES, outcomes, strict=True):
            step = case.bad - case.bad % case.accumulation + case.accumulation
            assert found["skipped"] == [step], (rank, case)
            assert found["roll_backs"] == (case.on_bad == "roll_back"), (rank, case)
            same = [torch.equal(*pair) for pair in zip(found["tensors"], wanted["tensors"], strict=True)]
            assert all(same), (rank, case, same)
            assert torch.equal(found["draw"], wanted["draw"]), (rank, case)
            assert found["loss"] == wanted["loss"], (rank, case)


def uneven(rank: int, size: int) -> Any:
    """Rank 1 has one batch less, and its last one is bad: it is also the placeholder of the last step."""
    case = Case("supervised")

    def train(*, is_clean: bool) -> State:
        data = data_of(case, rank, size, is_clean=True)[: 5 - rank]
        if rank == 1 and not is_clean:
            data[3] = (data[3][0] * math.nan, data[3][1])
        if is_clean:
            del data[3]
        model = distributed.prepare_model(Net(case))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        trainer = create_supervised_trainer(model, optimizer, cross_entropy, guard=not is_clean)
        trainer.add_metric(Average(output_transform=lambda output: output["loss"]), "loss")
        torch.manual_seed(100 + rank)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.run(data)
        return state_of(model, optimizer, trainer.state)

    return train(is_clean=False)["skipped"]


def test_a_bad_batch_does_not_come_back_as_a_placeholder() -> None:
    assert run_ranks(uneven, 2) == [[4], [4]]


def too_many(rank: int, size: int) -> list[int]:
    case = Case("by hand")
    model = distributed.prepare_model(Net(case))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(engine: Engine, batch: Batch) -> None:
        optimizer.zero_grad()
        guard.backward(cross_entropy(model(batch[0]), batch[1]))
        guard.step()

    trainer = Engine(train_step)
    guard = Guard(trainer, model, optimizer, max_bad=1)
    data = [
        (x * (math.nan if rank == index % 2 else 1), y)
        for index, (x, y) in enumerate(data_of(case, rank, 2, is_clean=True))
    ]
    try:
        trainer.run(data)
    except GuardError as error:
        return error.iterations
    return []


def test_too_many_bad_steps_are_an_error_of_every_rank() -> None:
    assert run_ranks(too_many, 2) == [[1, 2], [1, 2]]


def resumed(rank: int, size: int, folder: str) -> list[State]:
    """A whole run, and one that was killed after a step that was left out."""
    case = Case("supervised", spike=50.0, value=1e6, bad=55, number=60)

    def train(stop: int | None, *, resumes: bool) -> State:
        model = distributed.prepare_model(Net(case))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        trainer = create_supervised_trainer(
            model, optimizer, cross_entropy, guard={"spike": 50.0, "on_bad": "roll_back"}
        )
        trainer.add_metric(Average(output_transform=lambda output: output["loss"]), "loss")
        objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
        torch.manual_seed(100 + rank)
        if resumes:
            assert Checkpoint.resume(folder, objects) is not None
        trainer.on(Events.ITERATION_COMPLETED(once=40 if stop == 40 else 57), Checkpoint(objects, folder, n_saved=9))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.run(data_of(case, rank, size, is_clean=False), max_iterations=stop)
        if stop == 40:
            return {}
        return state_of(model, optimizer, trainer.state)

    train(40, resumes=False)
    before = train(None, resumes=True)  # saved before 50 good steps: the losses of then are needed
    after = train(None, resumes=True)  # saved after the step that was left out
    return [before, after, train(None, resumes=False)]


def test_a_job_that_was_killed_goes_on_with_what_its_guard_knew(tmp_path: Path) -> None:
    for rank, (before, after, whole) in enumerate(run_ranks(resumed, 2, str(tmp_path))):
        for found in (before, after):
            assert found["skipped"] == whole["skipped"] == [56], rank
            assert found["roll_backs"] == whole["roll_backs"] == 1
            assert all(torch.equal(*pair) for pair in zip(found["tensors"], whole["tensors"], strict=True)), rank
            assert torch.equal(found["draw"], whole["draw"])
            assert found["loss"] == whole["loss"]
