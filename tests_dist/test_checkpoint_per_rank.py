"""What each rank has for itself: refused by name if undeclared, kept of every rank if declared."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from dengine import Engine, Events
from dengine.checkpoint import PerRank, load, save, verify
from dengine.errors import CheckpointError
from dengine.handlers import EMA, Checkpoint


class Replay:
    """A class of the user's: tensors and numbers, and a model of its own with buffers."""

    def __init__(self, rank: int, size: int = 4, **tensors: torch.Tensor) -> None:
        self.tensors = {"items": torch.arange(size) + 100.0 * rank, **tensors}
        self.count = rank
        self.net = nn.BatchNorm1d(2)

    def state_dict(self) -> dict[str, Any]:
        return {"tensors": self.tensors, "count": self.count, "of_net": self.net.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tensors, self.count = state["tensors"], state["count"]
        self.net.load_state_dict(state["of_net"])


def refusal(save_or_load: Any) -> str:
    try:
        save_or_load()
    except CheckpointError as error:
        return str(error)
    return "nothing"


def refused(rank: int, size: int, folder: Path) -> list[str]:
    large = torch.zeros(100_000)
    late = Replay(0, more=large.index_fill(0, torch.arange(50_000, 50_100), float(rank)))
    lacking = Replay(0, extra=torch.ones(2)) if rank else Replay(0)
    cases: list[tuple[str, dict[str, Any]]] = [
        ("c_1.pt", {"replay": Replay(rank)}),
        ("c_1", {"replay": Replay(rank)}),
        ("c_1", {"replay": Replay(0, 3 + rank)}),
        ("c_1", {"replay": late}),
        ("c_1.pt", {"replay": lacking}),
        ("c_1.pt", {"replay": PerRank(Replay(rank))}),
        ("c_1", {"replay": Replay(0) if rank else PerRank(Replay(0))}),
    ]
    messages = [refusal(partial(save, folder / path, objects)) for path, objects in cases]
    assert list(folder.iterdir()) == [], list(folder.iterdir())
    return messages


def alike(rank: int, size: int, folder: Path) -> None:
    """What may differ: buffers of a model inside, an average's too, and numbers."""
    replay, model = Replay(0), nn.BatchNorm1d(2)
    replay.count = rank
    for each in (replay.net, model):
        each.running_mean = torch.full((2,), float(rank))
    save(folder / "alike_1.pt", {"replay": replay, "ema": EMA(model)})


def kept(rank: int, size: int, folder: Path, asynchronous: bool) -> list[Any]:
    def objects(of_rank: int) -> dict[str, Any]:
        return {
            "replay": PerRank(Replay(of_rank, 3 + of_rank)),
            "own": PerRank(nn.Linear(1 + of_rank, 2)),
            "trainer": Engine(lambda engine, batch: None),
        }

    def values(of: dict[str, Any]) -> list[Any]:
        (replay,) = [each for key, each in of["replay"].state_dict().items() if type(key) is int]
        (own,) = [each for key, each in of["own"].state_dict().items() if type(key) is int]
        return [replay["tensors"]["items"].tolist(), replay["count"], own["weight"].tolist()]

    saved = objects(rank)
    checkpoint = Checkpoint(saved, folder, n_saved=None, asynchronous=asynchronous)
    saved["trainer"].on(Events.ITERATION_COMPLETED, checkpoint)
    saved["trainer"].run([1, 2])
    assert checkpoint.last_path == folder / "checkpoint_2", checkpoint.last_path
    fresh = objects(rank)
    assert Checkpoint.resume(folder, fresh) == folder / "checkpoint_2"
    assert values(fresh) == values(saved), values(fresh)
    bare = Replay(7)
    message = refusal(lambda: load(folder / "checkpoint_2", {"replay": bare}))
    assert (bare.count, "'replay'" in message, "PerRank" in message) == (7, True, True), message
    return values(saved)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_declared_states_of_all_ranks_are_kept_and_go_to_the_same_ranks_alone(
    tmp_path: Path, asynchronous: bool
) -> None:
    of_ranks = run_ranks(kept, 2, tmp_path, asynchronous, deadline_s=60)
    assert [items for items, *_ in of_ranks] == [[0, 1, 2], [100, 101, 102, 103]]
    path, replay, model = tmp_path / "checkpoint_2", Replay(9), nn.Linear(1, 1)
    verify(path)
    message = refusal(lambda: load(path, {"replay": PerRank(replay)}))
    assert "each of 2 ranks has saved a state of its own (PerRank), and there are 1 now" in message
    left = load(path, {"replay": PerRank(replay), "own": PerRank(model)}, partial=True)
    assert left is not None
    assert left.missing_keys == ["replay", "own"]
    assert replay.count == 9


def test_undeclared_differences_of_own_objects_are_refused_by_name_with_two_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(refused, 2, tmp_path, deadline_s=60)
    assert first == second
    differing, in_folder, shapes, late, lacking, declared, by_one = first
    for message in (differing, in_folder, shapes):
        assert "'replay/tensors/items' of rank 1 is not that of rank 0" in message
        assert "{'replay': PerRank(...)}" in message
    assert "'replay/tensors/more' of rank 1 is not that of rank 0" in late
    assert "'replay/tensors/extra' is on rank 1, but not on rank 0" in lacking
    assert "a path without an ending" in declared
    assert (
        "rank 1 saves a state of each rank (PerRank) of nothing, rank 0 a state of each rank (PerRank) of replay"
        in (by_one)
    )


def test_buffers_and_numbers_may_differ(tmp_path: Path) -> None:
    run_ranks(alike, 2, tmp_path, deadline_s=60)
    verify(tmp_path / "alike_1.pt")


def test_one_process_keeps_its_own_in_a_file_or_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "c_1.pt", tmp_path / "c_2"):
        save(path, {"replay": PerRank(Replay(3))})
        fresh = Replay(0)
        load(path, {"replay": PerRank(fresh)})
        assert (fresh.count, fresh.tensors["items"].tolist()) == (3, [300, 301, 302, 303])
        save(tmp_path / "bare_1.pt", {"replay": fresh})
        assert "saved without PerRank()" in refusal(partial(load, tmp_path / "bare_1.pt", {"replay": PerRank(fresh)}))


@pytest.mark.parametrize("value", [3, Replay, Engine(lambda engine, batch: None), PerRank(Replay(0))])
def test_what_has_no_state_of_a_rank_s_own_cannot_be_declared(value: Any) -> None:
    with pytest.raises(TypeError, match="PerRank"):
        PerRank(value)
