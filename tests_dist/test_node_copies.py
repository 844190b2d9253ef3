"""Checkpoints in folders of the nodes' own (`placement="node"`), and resuming from the newest of several folders.

Nodes are simulated: each rank is told to be the first of a node of its own, and has another folder.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from dengine import Engine, Events, distributed
from dengine.checkpoint import verify
from dengine.errors import CheckpointError
from dengine.handlers import EMA, Checkpoint


def on_nodes(rank: int, size: int, num_nodes: int) -> int:
    """Make this rank one of `num_nodes` nodes; gives which."""
    per_node = size // num_nodes
    node, local = divmod(rank, per_node)
    os.environ.update(
        LOCAL_RANK=str(local), LOCAL_WORLD_SIZE=str(per_node), GROUP_RANK=str(node), GROUP_WORLD_SIZE=str(num_nodes)
    )
    return node


def objects_of(rank: int) -> dict[str, Any]:
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 1))
    model = distributed.prepare_model(net)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)

    def step(engine: Engine, batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(batch + rank).square().mean().backward()  # ranks have other statistics in batch norm
        optimizer.step()

    trainer, ema = Engine(step), EMA(model)
    trainer.on(Events.ITERATION_COMPLETED, ema)
    return {"model": model, "optimizer": optimizer, "ema": ema, "trainer": trainer}


DEADLINE_S = 60.0
BATCHES = [torch.linspace(-1, 1, 24).reshape(6, 4) * number for number in range(1, 9)]


def bits(objects: dict[str, Any]) -> dict[str, Any]:
    net = distributed.unwrap_model(objects["model"])
    return {**{name: each.clone() for name, each in net.state_dict().items()}, "at": objects["trainer"].state.iteration}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one
    )


def save_on_nodes(rank: int, size: int, root: str, num_nodes: int, asynchronous: bool, until: int) -> dict[str, Any]:
    node = on_nodes(rank, size, num_nodes)
    with distributed.process_group():
        objects = objects_of(rank)
        checkpoint = Checkpoint(objects, f"{root}/fast{node}", asynchronous=asynchronous, placement="node", n_saved=2)
        objects["trainer"].on(Events.ITERATION_COMPLETED(every=2), checkpoint)
        safe = Checkpoint({k: objects[k] for k in objects}, f"{root}/safe")
        objects["trainer"].on(Events.ITERATION_COMPLETED(every=5), safe)
        objects["trainer"].run(BATCHES[:until], max_epochs=1)
        return {
            "bits": bits(objects),
            "last": str(checkpoint.last_path),
            "saved": [each.step for each in checkpoint.saved],
        }


def resume_on_nodes(rank: int, size: int, root: str, num_nodes: int) -> tuple[str, dict[str, Any], list[str]]:
    node = on_nodes(rank, size, num_nodes)
    with distributed.process_group(), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        objects = objects_of(rank)
        with torch.no_grad():
            for each in objects["model"].parameters():
                each.zero_()
        path = Checkpoint.resume([f"{root}/fast{node}", f"{root}/safe"], objects)
        texts = [str(each.message) for each in warned]
        return str(path), bits(objects), [text for text in texts if "one file system" not in text]


def resumed(root: str) -> list[tuple[str, dict[str, Any], list[str]]]:
    return run_ranks(resume_on_nodes, 2, root, 2, init=False, deadline_s=DEADLINE_S)


@pytest.mark.parametrize("asynchronous", [True, False])
def test_each_node_keeps_the_same_copy_and_gets_it_from_another_one(tmp_path: Path, asynchronous: bool) -> None:
    root = str(tmp_path)
    ends = run_ranks(save_on_nodes, 2, root, 2, asynchronous, 8, init=False, deadline_s=DEADLINE_S)
    for node in (0, 1):
        folder = tmp_path / f"fast{node}"
        assert ends[node]["last"] == str(folder / "checkpoint_8.pt")
        assert sorted(each.name for each in folder.glob("*.pt")) == ["checkpoint_6.pt", "checkpoint_8.pt"]
        assert ends[node]["saved"] == [6, 8]
        assert folder.stat().st_mode & 0o777 == 0o700
    first, second = (tmp_path / f"fast{node}" / "checkpoint_8.pt" for node in (0, 1))
    assert verify(first) == verify(second)

    # The node of rank 0 is gone with its memory.
    shutil.rmtree(tmp_path / "fast0")
    for node, (path, end, warned) in enumerate(
        run_ranks(resume_on_nodes, 2, root, 2, init=False, deadline_s=DEADLINE_S)
    ):
        assert path == str(tmp_path / f"fast{node}" / "checkpoint_8.pt")
        assert same(end, ends[0]["bits"])
        assert warned == []
    assert verify(first) == verify(second)

    # A copy is damaged: the other one is taken, and repairs it.
    content = bytearray(second.read_bytes())
    content[len(content) // 2] ^= 1
    second.write_bytes(content)
    paths, bits_of, warned_of = zip(
        *run_ranks(resume_on_nodes, 2, root, 2, init=False, deadline_s=DEADLINE_S), strict=True
    )
    assert list(paths) == [str(first), str(second)]
    assert all(same(end, ends[0]["bits"]) for end in bits_of)
    assert len(warned_of[0]) == 1
    assert "was changed" in warned_of[0][0]
    assert verify(first) == verify(second)

    # Both are: the one before it.
    for each in (first, second):
        each.write_bytes(bytes(content))
    paths, _, warned_of = zip(*resumed(root), strict=True)
    assert [Path(path).name for path in paths] == ["checkpoint_6.pt"] * 2

    # The fast ones are older than the safe one, or gone.
    for node in (0, 1):
        for step in (6, 8):
            (tmp_path / f"fast{node}" / f"checkpoint_{step}.pt").unlink()
    (tmp_path / "fast1" / "manifest.json").unlink()
    paths, bits_of, _ = zip(*resumed(root), strict=True)
    assert set(paths) == {f"{root}/safe/checkpoint_5.pt"}


def fail_on_node_1(rank: int, size: int, root: str) -> list[str]:
    """Saves of which the copy of node 1 fails; the errors on this rank."""
    node = on_nodes(rank, size, 2)
    told = []
    with distributed.process_group():
        for asynchronous in (False, True):
            objects = objects_of(rank)
            missing = Checkpoint(objects, f"{root}/part{node}/fast", asynchronous=asynchronous, placement="node")
            objects["trainer"].on(Events.ITERATION_COMPLETED(every=2), missing)
            try:
                objects["trainer"].run(BATCHES, max_epochs=1)
            except CheckpointError as error:
                told.append(str(error))
        for asynchronous in (False, True):
            objects = objects_of(rank)
            fast = Checkpoint(objects, f"{root}/{asynchronous}{node}", asynchronous=asynchronous, placement="node")
            if node == 1:  # after the plan, in the write: a folder in place of the file cannot be replaced
                os.makedirs(f"{root}/{asynchronous}1/checkpoint_4.pt/in_the_way")
            objects["trainer"].on(Events.ITERATION_COMPLETED(every=2), fast)
            try:
                objects["trainer"].run(BATCHES, max_epochs=1)
            except CheckpointError as error:
                told.append(str(error))
    return told


def test_a_node_that_cannot_save_is_named_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "part0").mkdir()
    for told in run_ranks(fail_on_node_1, 2, str(tmp_path), init=False, deadline_s=DEADLINE_S):
        assert len(told) == 4
        assert all("on node 1 (rank 1), there is no folder" in text for text in told[:2])
        assert all("on node 1 (rank 1), IsADirectoryError" in text for text in told[2:])


def sharded(rank: int, size: int, root: str, num_nodes: int, saves: bool) -> tuple[str, float]:
    """Save a sharded model of ones on each node, or resume it; gives the path or the error, and the sum of a part."""
    node = on_nodes(rank, size, num_nodes)
    with distributed.process_group():
        torch.manual_seed(7)
        model = distributed.prepare_model(nn.Linear(8, 4, bias=False), strategy="fsdp")
        trainer = Engine(lambda engine, batch: None)
        objects = {"model": model, "trainer": trainer}
        fast, path = f"{root}/fast{node}", ""
        if saves:
            with torch.no_grad():
                next(model.parameters()).fill_(1.0)
            checkpoint = Checkpoint(objects, fast, asynchronous=True, placement="node")
            trainer.on(Events.ITERATION_COMPLETED(every=2), checkpoint)
            try:
                trainer.run([0] * 4, max_epochs=1)
                path = str(checkpoint.last_path)
            except CheckpointError as error:
                path = str(error)
        else:
            path = str(Checkpoint.resume([fast], objects))
        return path, float(next(model.parameters()).to_local().sum())  # type: ignore[attr-defined]


def test_a_sharded_model_is_kept_on_one_node_and_refused_on_several(tmp_path: Path) -> None:
    root, path = str(tmp_path), str(tmp_path / "fast0" / "checkpoint_4")
    assert run_ranks(sharded, 2, root, 1, True, init=False, deadline_s=DEADLINE_S) == [(path, 16.0)] * 2
    assert run_ranks(sharded, 2, root, 1, False, init=False, deadline_s=DEADLINE_S) == [(path, 16.0)] * 2
    # The other rank is on a node that lacks it.
    ends = run_ranks(sharded, 2, root, 2, False, init=False, deadline_s=DEADLINE_S)
    assert ends == [(path, 16.0), (path.replace("fast0", "fast1"), 16.0)]
    assert verify(path) == verify(path.replace("fast0", "fast1"))
    for told, _ in run_ranks(sharded, 2, root, 2, True, init=False, deadline_s=DEADLINE_S):
        assert "takes only what all ranks have alike" in told
