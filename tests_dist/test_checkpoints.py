"""Checkpoints on real ranks: who writes, who learns of it, and what each rank gets back."""

import os
import time
import warnings
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tensors import whole_tensor
from torch import nn

from dengine import Engine, Events, distributed
from dengine import atomic_files as storage_module
from dengine.checkpoint import load, save
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.handlers import Checkpoint


def model_of(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def step_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()


def whole(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = whole_tensor(value.detach())
    return tensor.clone()


class Broken:
    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def state_dict(self) -> dict[str, Any]:
        if self.fails:
            raise ArithmeticError("no state here")
        return {"value": 1}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.fails:
            raise ArithmeticError("not mine")


# -- saving ------------------------------------------------------------------------------------------------------


def no_state_on_one(rank: int, size: int, folder: str) -> str:
    model = nn.Linear(1, 1)
    try:
        save(Path(folder) / "c_1.pt", {"model": model, "other": Broken(fails=rank == 1)})
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_an_object_without_a_state_on_one_rank_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    for message in run_ranks(no_state_on_one, 3, str(tmp_path), deadline_s=30):
        assert "on rank 1 'other' gave no state: ArithmeticError: no state here" in message
    assert list(tmp_path.iterdir()) == []


class FailingMapping(UserDict[str, int]):
    """A container of a state's own, which cannot be read."""

    def __iter__(self) -> Any:
        raise RuntimeError("lost")


class HasMapping:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


def unreadable_on_one(rank: int, size: int, folder: str) -> str:
    value = FailingMapping(one=1) if rank == 1 else {"one": 1}
    try:
        save(Path(folder) / "c_1.pt", {"other": HasMapping(value)})
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_state_that_cannot_be_read_on_one_rank_fails_the_save_on_every_rank(tmp_path: Path) -> None:
    for message in run_ranks(unreadable_on_one, 3, str(tmp_path), deadline_s=30):
        assert "on rank 1 'other' gave no state: RuntimeError: lost" in message
    assert list(tmp_path.iterdir()) == []


def other_names(rank: int, size: int, folder: str, suffix: str) -> list[str]:
    messages = []
    model, trainer = nn.Linear(1, 1), Engine(lambda engine, batch: None)
    for objects in ({"m": model} if rank else {"t": trainer, "m": model}, {"m": model if rank else trainer}):
        try:
            save(Path(folder) / f"c_1{suffix}", objects)
        except CheckpointError as error:
            messages.append(str(error))
    return messages


@pytest.mark.parametrize("suffix", [".pt", ""])
def test_ranks_that_save_other_names_are_told_which_and_nothing_is_saved(tmp_path: Path, suffix: str) -> None:
    first, second = run_ranks(other_names, 2, str(tmp_path), suffix, deadline_s=30)
    assert first == second
    assert "rank 1 saves m, rank 0 m and t:" in first[0]
    assert "rank 1 saves random number generators of nothing, rank 0 random number generators of m:" in first[1]
    assert list(tmp_path.iterdir()) == []


def full_disk(*arguments: object) -> None:
    raise OSError(28, "No space left on device")


def failing_writer(rank: int, size: int, folder: str, is_at_the_end: bool) -> tuple[int, str, list[str]]:
    trainer = Engine(lambda engine, batch: distributed.all_reduce(1.0))
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, folder, n_saved=9, asynchronous=True)
    trainer.on(Events.ITERATION_COMPLETED(once=[2, 5] if is_at_the_end else [2, 5, 8]), checkpoint)

    def fill(engine: Engine) -> None:
        checkpoint.wait()
        storage_module.os.fsync = full_disk  # type: ignore[attr-defined]

    trainer.on(Events.ITERATION_COMPLETED(once=4), fill)
    try:
        trainer.run(range(12))
    except CheckpointError as error:
        return trainer.state.iteration, str(error), [one.path.name for one in checkpoint.saved]
    return trainer.state.iteration, "saved", []


@pytest.mark.parametrize("is_at_the_end", [False, True])
def test_an_error_of_the_writing_thread_is_raised_on_every_rank(tmp_path: Path, is_at_the_end: bool) -> None:
    outcomes = run_ranks(failing_writer, 3, str(tmp_path), is_at_the_end, deadline_s=60)
    for iteration, message, saved in outcomes:
        assert iteration == (12 if is_at_the_end else 8)
        assert "checkpoint_5.pt could not be saved" in message
        assert "No space left" in message
        assert saved == ["checkpoint_2.pt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_2.pt", "manifest.json"]


def slow_writer(rank: int, size: int, folder: str) -> tuple[list[str], str | None]:
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.3)
        real(descriptor)

    os.fsync = slow
    trainer = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint({"model": nn.Linear(1, 1)}, folder, asynchronous=True)
    trainer.on(Events.ITERATION_COMPLETED(once=3), checkpoint)
    trainer.run(range(3))
    return sorted(os.listdir(folder)), str(checkpoint.last_path)


def test_a_run_ends_on_every_rank_only_when_the_last_write_is_safe(tmp_path: Path) -> None:
    for there, last in run_ranks(slow_writer, 2, str(tmp_path), deadline_s=30):
        assert there == ["checkpoint_3.pt", "manifest.json"]
        assert last == str(tmp_path / "checkpoint_3.pt")


def own_engine(rank: int, size: int, folder: str) -> str:
    if rank == 0:
        evaluator = Engine(lambda engine, batch: None, distributed=False)
        evaluator.on(Events.COMPLETED, Checkpoint({"model": nn.Linear(1, 1)}, folder))
        try:
            evaluator.run([1])
        except ValueError as error:
            return str(error)
    return "nothing"


def test_an_engine_of_one_rank_alone_is_refused_instead_of_a_deadlock(tmp_path: Path) -> None:
    assert "takes all ranks" in run_ranks(own_engine, 2, str(tmp_path), deadline_s=30)[0]


# -- loading -----------------------------------------------------------------------------------------------------


def there_and_back(rank: int, size: int, folder: str, strategy: str) -> tuple[bool, bool, bool]:
    def make(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = distributed.prepare_model(model_of(seed), strategy)  # type: ignore[arg-type]
        return model, torch.optim.Adam(model.parameters())

    model, optimizer = make(0)
    step_of(model, optimizer)
    save(Path(folder) / "c_1.pt", {"model": model, "optimizer": optimizer})
    other, its_optimizer = make(7)
    step_of(other, its_optimizer)
    load(Path(folder) / "c_1.pt", {"model": other, "optimizer": its_optimizer})
    same = all(torch.equal(whole(a), whole(b)) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    step_of(model, optimizer)
    step_of(other, its_optimizer)
    after = all(torch.equal(whole(a), whole(b)) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    bare = distributed.unwrap_model(other).state_dict()
    return same, after, any(name.startswith("module.") for name in bare)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_model_and_its_optimizer_go_on_as_if_nothing_had_been(tmp_path: Path, strategy: str) -> None:
    assert run_ranks(there_and_back, 2, str(tmp_path), strategy, deadline_s=60) == [(True, True, False)] * 2


def saved_then(rank: int, size: int, folder: str, what: str) -> tuple[str, str, bool]:
    """Each rank sees a folder of its own, as on nodes without a shared file system."""
    mine = Path(folder) / f"node{rank}"
    mine.mkdir()
    model = model_of(0)
    for node in range(size):
        save(Path(folder) / f"node{node}" / "c_1.pt", {"model": model})
    distributed.barrier("saved")
    path = mine / "c_1.pt"
    if rank == 2 and what == "missing":
        path.unlink()
    if rank == 2 and what == "changed":
        os.environ["LOCAL_RANK"] = "0"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    if what == "another":
        other = Path(folder) / "other_2.pt"
        save(other, {"model": model_of(9)})
        if rank == 2:
            path.write_bytes(other.read_bytes())
        distributed.barrier("written")
    if rank == 1 and what == "refused":
        into: Any = nn.Linear(9, 9)
    else:
        into = model_of(5)
    before = into.weight.detach().clone()
    try:
        load(path, {"model": into})
    except CheckpointError as error:
        return type(error).__name__, str(error), torch.equal(before, into.weight)
    return "loaded", "", False


@pytest.mark.parametrize(
    ("what", "kind", "message"),
    [
        ("missing", "CheckpointError", "Rank 2 of 3 cannot read"),
        ("changed", "CorruptCheckpointError", "was changed after it was saved"),
        ("another", "CheckpointError", "Rank 2 sees another file"),
        ("refused", "CheckpointError", "could not be loaded on rank 1 of 3, and every object is as it was"),
    ],
)
def test_what_one_rank_cannot_use_none_uses(tmp_path: Path, what: str, kind: str, message: str) -> None:
    # One rank a node, so that each reads its own file whole.
    outcomes = run_ranks(saved_then, 3, str(tmp_path), what, deadline_s=30, env={"LOCAL_RANK": "0"})
    for found, text, is_unchanged in outcomes:
        assert found == kind, text
        assert message in text
        assert is_unchanged


def other_names_wanted(rank: int, size: int, folder: str, extra: str, who: int) -> tuple[str, bool]:
    """One rank wants one name more, which both files have, or only the older one, or none."""
    model = model_of(0)
    for number, names in ((1, ("model", "older", "both")), (2, ("model", "both"))):
        save(Path(folder) / f"checkpoint_{number}.pt", {name: model_of(1) for name in names})
    before = model.weight.detach().clone()
    wanted = {"model": model, extra: model_of(2)} if rank == who else {"model": model}
    try:
        if extra == "both":
            load(Path(folder) / "checkpoint_2.pt", wanted)
        else:
            Checkpoint.resume(folder, wanted)
    except CheckpointError as error:
        return str(error), torch.equal(before, model.get_parameter("weight"))
    return "loaded", torch.equal(before, model.get_parameter("weight"))


@pytest.mark.parametrize("extra", ["both", "older", "none"])
@pytest.mark.parametrize(("size", "who"), [(2, 0), (2, 1), (3, 1)])
def test_ranks_that_want_other_names_are_told_which_instead_of_a_hang(
    tmp_path: Path, size: int, who: int, extra: str
) -> None:
    for text, is_unchanged in run_ranks(other_names_wanted, size, str(tmp_path), extra, who, deadline_s=30):
        told = [" and ".join(sorted(("model", extra))) if rank == who else "model" for rank in (1, 0)]
        assert f"rank 1 asks for {told[0]}, rank 0 for {told[1]}: give the same names on all ranks" in text
        assert is_unchanged


def corrupt_newest(rank: int, size: int, folder: str) -> tuple[str, list[str], int]:
    model, trainer = model_of(0), Engine(lambda engine, batch: None)
    trainer.on(Events.ITERATION_COMPLETED, Checkpoint({"model": model, "trainer": trainer}, folder, n_saved=3))
    trainer.run(range(3))
    if rank == 0:
        newest = Path(folder) / "checkpoint_3.pt"
        newest.write_bytes(newest.read_bytes()[:-1000])
    distributed.barrier("cut")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = Checkpoint.resume(folder, {"model": model, "trainer": trainer})
    told = [str(each.message) for each in caught if "Resuming" in str(each.message)]
    return Path(str(path)).name, told, trainer.state.iteration


def test_all_ranks_fall_back_to_the_same_intact_file_and_rank_zero_says_so(tmp_path: Path) -> None:
    outcomes = run_ranks(corrupt_newest, 3, str(tmp_path), deadline_s=30)
    assert [(name, iteration) for name, _, iteration in outcomes] == [("checkpoint_2.pt", 2)] * 3
    assert len(outcomes[0][1]) == 1
    assert "checkpoint_3.pt" in outcomes[0][1][0]
    assert outcomes[1][1] == outcomes[2][1] == []


class Carrier:
    """What an engine does with the generators, in sight."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.given: Any = None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass

    def random_state(self) -> dict[str, Any]:
        return {"rank": self.rank, "numbers": torch.tensor([self.rank])}

    def load_random_state(self, state: dict[str, Any]) -> None:
        self.given = state["rank"], state["numbers"].tolist()


def saved_carrier(rank: int, size: int, folder: str) -> None:
    save(Path(folder) / "checkpoint_1.pt", {"carrier": Carrier(rank)})


def given_back(rank: int, size: int, folder: str) -> tuple[Any, int]:
    carrier = Carrier(rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        Checkpoint.resume(folder, {"carrier": carrier})
    return carrier.given, sum("random number generators" in str(each.message) for each in caught)


def test_each_rank_gets_its_own_generators_back_and_with_more_ranks_the_new_ones_get_none(tmp_path: Path) -> None:
    run_ranks(saved_carrier, 2, str(tmp_path))
    loaded = torch.load(tmp_path / "checkpoint_1.pt", weights_only=True)["dengine"]
    assert loaded["world_size"] == 2
    assert [state["rank"] for state in loaded["random"]["carrier"]] == [0, 1]
    assert run_ranks(given_back, 2, str(tmp_path)) == [((0, [0]), 0), ((1, [1]), 0)]
    assert run_ranks(given_back, 3, str(tmp_path)) == [((0, [0]), 1), ((1, [1]), 0), (None, 0)]


def drawing(rank: int, size: int, folder: str) -> tuple[bool, bool]:
    """Numbers drawn by a run that was never interrupted, and by one that was, at iteration 4 of 3 a batch."""

    def draw(log: list[float]) -> Engine:
        return Engine(lambda engine, batch: log.append(torch.rand(()).item() + 10 * batch))

    torch.manual_seed(rank)
    uninterrupted: list[float] = []
    draw(uninterrupted).run([0, 1, 2], max_epochs=3)
    torch.manual_seed(rank)
    interrupted: list[float] = []
    first = draw(interrupted)
    first.on(Events.ITERATION_COMPLETED(once=4), Checkpoint({"trainer": first}, folder))
    first.run([0, 1, 2], max_iterations=4, max_epochs=3)
    torch.manual_seed(99)
    second = draw(interrupted)
    path = Checkpoint.resume(folder, {"trainer": second})
    second.run([0, 1, 2], max_epochs=3)
    return path is not None, interrupted == uninterrupted


def test_a_resumed_run_draws_on_each_rank_the_numbers_of_one_never_interrupted(tmp_path: Path) -> None:
    assert run_ranks(drawing, 2, str(tmp_path), deadline_s=30) == [(True, True)] * 2


def nothing_there(rank: int, size: int, folder: str) -> tuple[str, str]:
    first = str(Checkpoint.resume(Path(folder) / "not there", {"model": nn.Linear(1, 1)}))
    save(Path(folder) / "checkpoint_1.pt", {"model": nn.Linear(1, 1)})
    distributed.barrier("saved")
    if rank == 0:
        path = Path(folder) / "checkpoint_1.pt"
        path.write_bytes(path.read_bytes()[:-1])
    distributed.barrier("cut")
    try:
        Checkpoint.resume(folder, {"model": nn.Linear(1, 1)})
    except CorruptCheckpointError as error:
        return first, str(error)
    return first, "loaded"


def test_nothing_yet_is_none_on_every_rank_and_nothing_intact_an_error(tmp_path: Path) -> None:
    for first, message in run_ranks(nothing_there, 2, str(tmp_path)):
        assert first == "None"
        assert "is intact" in message


def the_file_itself(rank: int, size: int, folder: str) -> str:
    save(Path(folder) / "checkpoint_1.pt", {"model": nn.Linear(1, 1)})
    try:
        return str(Checkpoint.resume(Path(folder) / "checkpoint_1.pt", {"model": nn.Linear(1, 1)}))
    except CheckpointError as error:
        return str(error)


def test_a_file_where_its_folder_is_wanted_is_the_same_error_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(the_file_itself, 2, str(tmp_path))
    assert first == second
    assert "checkpoint_1.pt is a checkpoint, not a folder of them" in first
