"""Checkpoints of sharded models on real ranks: folders, from a save to a run that goes on."""

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Outcome, run_ranks
from tensors import whole_tensor
from torch import nn

from dengine import Engine, Events, distributed
from dengine.checkpoint import latest, load, save, verify
from dengine.checkpoint.catalogue.manifest import scan
from dengine.checkpoint.disk import space as storage
from dengine.checkpoint.formats.sharded.plan import read_shards
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.handlers import Checkpoint

Bits = dict[str, bytes]


def prepared(strategy: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Two layers of one shape, and rows (5) that no number of ranks here divides."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5))
    model = distributed.prepare_model(model, strategy)  # type: ignore[arg-type]
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def trainer_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> Engine:
    """Its batches are random ones of each rank, so that what it learns tells where the generators are."""

    def train_step(engine: Engine, batch: int) -> None:
        optimizer.zero_grad()
        model(torch.rand(3, 4)).square().sum().backward()
        optimizer.step()

    return Engine(train_step)


def bits(model: nn.Module, optimizer: torch.optim.Optimizer) -> Bits:
    """Weights and moments, byte for byte. Collective where they are sharded."""
    found = {}
    for name, parameter in distributed.unwrap_model(model).named_parameters():
        for key, tensor in {"weight": parameter, **optimizer.state.get(parameter, {})}.items():
            whole = whole_tensor(tensor.detach())
            found[f"{name}/{key}"] = whole.numpy().tobytes()
    return found


def objects_of(strategy: str, seed: int) -> dict[str, Any]:
    model, optimizer = prepared(strategy, seed)
    return {"optimizer": optimizer, "model": model, "trainer": trainer_of(model, optimizer)}


def state_of(objects: dict[str, Any]) -> Bits:
    return bits(objects["model"], objects["optimizer"])


def run(objects: dict[str, Any], folder: Path, *, until: int, **options: Any) -> Checkpoint:
    checkpoint = Checkpoint(objects, folder, **options)
    objects["trainer"].on(Events.ITERATION_COMPLETED, checkpoint)
    objects["trainer"].run(range(10), max_iterations=until)
    return checkpoint


def saved(rank: int, size: int, folder: Path) -> tuple[Bits, Bits]:
    """The state after three steps, which is saved, and after six."""
    objects = objects_of("fsdp", seed=1)
    torch.manual_seed(100 + rank)
    objects["trainer"].on(
        Events.ITERATION_COMPLETED(once=3), lambda engine: states.append(state_of(objects)), priority=1
    )
    states: list[Bits] = []
    objects["trainer"].on(Events.ITERATION_COMPLETED(once=3), Checkpoint(objects, folder))
    objects["trainer"].run(range(10), max_iterations=6)
    return states[0], state_of(objects)


def resumed(rank: int, size: int, folder: Path, strategy: str) -> tuple[str, Bits, Bits]:
    """The path, the state after loading, and after three more steps."""
    objects = objects_of(strategy, seed=50 + rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other generators on other ranks
        path = Checkpoint.resume(folder, objects)
    loaded = state_of(objects)
    assert objects["trainer"].state.iteration == 3
    objects["trainer"].run(range(10), max_iterations=6)
    return str(path), loaded, state_of(objects)


def test_what_three_ranks_saved_goes_on_on_three_bit_for_bit_and_is_whole_on_two_and_one(tmp_path: Path) -> None:
    (at_three, at_six), *_ = run_ranks(saved, 3, tmp_path, deadline_s=120)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_3", "manifest.json"}
    entry = verify(tmp_path / "checkpoint_3")
    assert scan(tmp_path).listed == {"checkpoint_3": entry}
    assert (entry.step, entry.world_size, entry.objects) == (3, 3, ("optimizer", "model", "trainer"))
    path = str(tmp_path / "checkpoint_3")
    assert run_ranks(resumed, 3, tmp_path, "fsdp", deadline_s=120) == [(path, at_three, at_six)] * 3
    for size, strategy in ((2, "fsdp"), (2, "ddp"), (1, "none")):
        for found, loaded, _ in run_ranks(resumed, size, tmp_path, strategy, deadline_s=120):
            assert (found, loaded) == (path, at_three), (size, strategy)


# -- damage ------------------------------------------------------------------------------------------------------


def resumed_with_warnings(rank: int, size: int, folder: Path) -> tuple[str, list[str], bool]:
    objects = objects_of("fsdp", seed=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = Checkpoint.resume(folder, objects)
    told = [str(each.message) for each in caught if "Resuming" in str(each.message)]
    assert path is not None
    whole = read_shards(path)["model"]
    same = all(
        parameter.detach().full_tensor().equal(whole[name]) for name, parameter in objects["model"].named_parameters()
    )
    return path.name, told, same


def saved_often(rank: int, size: int, folder: Path, n_saved: int, until: int) -> list[str]:
    checkpoint = run(objects_of("fsdp", seed=1), folder, until=until, n_saved=n_saved)
    return [one.path.name for one in checkpoint.saved]


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "metadata"])
def test_a_damaged_shard_is_named_and_all_ranks_fall_back_to_the_one_before(tmp_path: Path, damage: str) -> None:
    run_ranks(saved_often, 2, tmp_path, 3, 3, deadline_s=60)
    shard = tmp_path / "checkpoint_3" / ("metadata.json" if damage == "metadata" else "rank_00001.bin")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "gone":
        shard.unlink()
    else:
        shard.write_bytes(content[:-3] if damage == "cut" else content)
    with pytest.raises(CorruptCheckpointError, match=shard.name):
        verify(tmp_path / "checkpoint_3")
    assert latest(tmp_path) == tmp_path / "checkpoint_2"
    first, second = run_ranks(resumed_with_warnings, 2, tmp_path, deadline_s=60)
    assert (first[0], first[2]) == (second[0], second[2]) == ("checkpoint_2", True)
    assert len(first[1]) == 1
    assert str(shard) in first[1][0]
    assert second[1] == []


# -- kills and retention -----------------------------------------------------------------------------------------


def killed(rank: int, size: int, folder: Path, victim: int, at: str, step: int) -> None:
    """Save steps 1 and 2, and be killed in the save of `step` (2: once more)."""
    objects = objects_of("fsdp", seed=1)
    run(objects, folder, until=2, n_saved=2)
    real = getattr(os, at)

    def die(*arguments: Any, **options: Any) -> Any:
        # A folder that is replaced steps aside first: the kill is to come between its two renames.
        if str(arguments[-1]).endswith(".replaced"):
            return real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    if rank == victim:
        setattr(os, at, die)
    handle = Checkpoint(objects, folder, n_saved=2, global_step_transform=lambda engine, event: step)
    engine = Engine(lambda engine, batch: None)
    engine.on(Events.ITERATION_COMPLETED, handle)
    engine.run([0])


@pytest.mark.parametrize(("victim", "at", "step"), [(1, "fsync", 3), (0, "rename", 3), (0, "rename", 2)])
def test_a_killed_save_leaves_nothing_under_the_final_name_and_the_one_before_is_resumed(
    tmp_path: Path, victim: int, at: str, step: int
) -> None:
    outcomes: list[Outcome[None]] = run_ranks(
        killed, 2, tmp_path, victim, at, step, expect_failures=True, deadline_s=60
    )
    assert outcomes[victim].exitcode == -signal.SIGKILL
    seen = {path.name for path in tmp_path.iterdir() if not path.name.startswith(".")}
    assert seen == {"checkpoint_1", "checkpoint_2", "manifest.json"} - ({"checkpoint_2"} if step == 2 else set())
    found = run_ranks(resumed_with_warnings, 2, tmp_path, deadline_s=60)
    assert [(name, told, same) for name, told, same in found] == [("checkpoint_2", [], True)] * 2
    run_ranks(saved_often, 2, tmp_path, 2, 4, deadline_s=60)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_3", "checkpoint_4", "manifest.json"}


def watched(rank: int, size: int, folder: Path) -> tuple[list[tuple[str, list[str]]], list[str]]:
    """Each removal, and the steps that were intact and listed when it came."""
    removals: list[tuple[str, list[str]]] = []
    real = storage.remove

    def remove(path: Path) -> None:
        listed = [name for name in scan(folder).listed if verify(folder / name)]
        removals.append((path.name, listed))
        real(path)

    storage.remove = remove
    objects = objects_of("fsdp", seed=1)
    checkpoint = run(objects, folder, until=3, n_saved=1)
    kept = [one.path.name for one in checkpoint.saved]
    return removals, [*kept, str(checkpoint.last_path)]


def test_an_older_folder_goes_only_once_the_new_one_is_safe_and_listed(tmp_path: Path) -> None:
    (removals, kept), (none, same) = run_ranks(watched, 2, tmp_path, deadline_s=60)
    assert removals == [("checkpoint_1", ["checkpoint_2"]), ("checkpoint_2", ["checkpoint_3"])]
    assert none == []
    assert kept == same == ["checkpoint_3", str(tmp_path / "checkpoint_3")]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_3", "manifest.json"}


def saved_again(rank: int, size: int, folder: Path) -> tuple[Bits, Bits, list[str]]:
    """A step of one name, saved twice by a run that has gone on meanwhile."""
    objects = objects_of("fsdp", seed=1)
    checkpoint = run(objects, folder, until=3, n_saved=2, global_step_transform=lambda engine, event: 7)
    expected = state_of(objects)
    other = objects_of("fsdp", seed=5)
    load(folder / "checkpoint_7", other)
    return expected, state_of(other), [one.path.name for one in checkpoint.saved]


def test_a_step_that_is_saved_again_is_replaced(tmp_path: Path) -> None:
    for expected, found, kept in run_ranks(saved_again, 2, tmp_path, deadline_s=60):
        assert found == expected
        assert kept == ["checkpoint_7"]
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint_7", "manifest.json"}


# -- refused -----------------------------------------------------------------------------------------------------


def refused(rank: int, size: int, folder: Path) -> dict[str, str]:
    """What each of some saves and loads that cannot be done says."""
    model, optimizer = prepared("fsdp", seed=1)
    other = distributed.prepare_model(nn.Linear(3, 3), "fsdp")
    save(folder / "model_1", {"model": model, "optimizer": optimizer})
    attempts = {
        "no model": lambda: save(folder / "c_1", {"optimizer": optimizer}),
        "another model": lambda: load(folder / "model_1", {"optimizer": optimizer, "model": other}),
    }
    told = {}
    for name, attempt in attempts.items():
        try:
            attempt()
        except (ValueError, CheckpointError) as error:
            told[name] = f"{type(error).__name__}: {error}"
    return told


def test_what_cannot_be_saved_or_loaded_is_told_on_all_ranks_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = run_ranks(refused, 2, tmp_path, deadline_s=60)
    assert first == second
    assert "CheckpointError: " in first["no model"]
    assert "'optimizer' is kept by the names of its parameters" in first["no model"]
    assert "none of 'model' has all of them" in first["another model"]
    assert {path.name for path in tmp_path.iterdir()} == {"model_1", "manifest.json"}


def taken_back(rank: int, size: int, folder: Path) -> tuple[bool, str]:
    """A load that fails with the optimizer, after the model has been overwritten."""
    model, optimizer = prepared("fsdp", seed=1)
    save(folder / "c_1", {"model": model, "optimizer": optimizer})
    other, _ = prepared("fsdp", seed=2)
    before = bits(other, optimizer)
    torch.optim.Optimizer.load_state_dict = lambda self, state: 1 / 0
    try:
        load(folder / "c_1", {"model": other, "optimizer": torch.optim.AdamW([*other.parameters()])})
    except CheckpointError as error:
        return bits(other, optimizer) == before, str(error)
    return False, "loaded"


def test_where_an_object_refuses_layers_of_one_shape_are_as_they_were(tmp_path: Path) -> None:
    for is_unchanged, message in run_ranks(taken_back, 2, tmp_path, deadline_s=60):
        assert "ZeroDivisionError" in message
        assert is_unchanged
