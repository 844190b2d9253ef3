"""The folder that several ranks write: each rank's own document, the root that holds them together, and older ones."""

import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from dengine import Engine, Events, distributed
from dengine.checkpoint import load, verify
from dengine.checkpoint.formats.sharded import files as shard_files
from dengine.checkpoint.formats.sharded.plan import read_shards
from dengine.checkpoint.formats.sharded.saved import _OfSeveral
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.handlers import Checkpoint

NUM_RANKS, NUM_LAYERS = 4, 6
# What this project wrote before each rank had a document: two ranks, FSDP2, AdamW, two steps.
OLD = Path(__file__).parents[1] / "tests" / "data" / "sharded_2"
OLD_SUMS = {"0.weight": 1.436902, "0.bias": 0.440114, "1.weight": -0.716168, "1.bias": 0.418167}
OLD_DRAWN = [[0.1116642951965332, 0.8158431053161621], [0.19804948568344116, 0.45028752088546753]]


def model_width(model: nn.Module) -> int:
    width: int = next(iter(model.children())).in_features
    return width


def objects_of(model: nn.Module, drawn: list[list[float]] | None = None) -> dict[str, Any]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(engine: Engine, batch: int) -> None:
        if drawn is not None:
            drawn.append(torch.rand(2).tolist())
        optimizer.zero_grad()
        model(torch.full((2, model_width(model)), float(batch))).square().sum().backward()
        optimizer.step()

    return {"model": model, "optimizer": optimizer, "trainer": Engine(step)}


def layers() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(NUM_LAYERS)))


def saved(rank: int, size: int, folder: Path) -> tuple[list[int], dict[str, bytes]]:
    """Two saves; which documents this rank reads to get its own part again; and what there is after all."""
    objects = objects_of(distributed.prepare_model(layers(), "fsdp"))
    objects["trainer"].on(Events.ITERATION_COMPLETED, Checkpoint(objects, folder, "c", n_saved=2))
    objects["trainer"].run(range(2))
    read: list[int] = []
    original = _OfSeveral._document

    def counting(self: _OfSeveral, rank: int) -> Any:
        read.append(rank)
        return original(self, rank)

    _OfSeveral._document = counting
    load(folder / "c_2", objects_of(distributed.prepare_model(layers(), "fsdp")))
    _OfSeveral._document = original
    state = objects["model"].state_dict()
    return read, {name: value.full_tensor().numpy().tobytes() for name, value in state.items()}


def old_resumed(rank: int, size: int) -> tuple[dict[str, float], list[list[float]]]:
    drawn: list[list[float]] = []
    model = distributed.prepare_model(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), "fsdp")
    objects = objects_of(model, drawn)
    load(OLD, objects)
    sums = {name: float(value.full_tensor().double().sum()) for name, value in model.state_dict().items()}
    objects["trainer"].run(range(2), max_epochs=2)
    return sums, drawn


def of_whole(folder: Path) -> dict[str, bytes]:
    return {name: value.numpy().tobytes() for name, value in read_shards(folder)["model"].items()}


def document(folder: Path, name: str = "metadata.json") -> dict[str, Any]:
    body: dict[str, Any] = json.loads((folder / name).read_text())["body"]
    return body


def forged(folder: Path, name: str, body: dict[str, Any]) -> None:
    """Write a document as somebody would who can compute digests."""
    raw = shard_files._rendered(body)
    (folder / name).write_bytes(raw)
    if name != "metadata.json":
        root = document(folder)
        root["tables"][int(name[5:10])] = [len(raw), hashlib.sha256(raw).hexdigest()]
        forged(folder, "metadata.json", root)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[list[int], dict[str, bytes]]]]:
    folder = tmp_path_factory.mktemp("documents")
    return folder, run_ranks(saved, NUM_RANKS, folder, deadline_s=90)


@pytest.fixture
def copied(run: Any, tmp_path: Path) -> Path:
    shutil.copytree(run[0] / "c_2", tmp_path / "c_2")
    return tmp_path / "c_2"


def test_each_rank_reads_and_writes_its_own_and_the_root_is_small(run: Any) -> None:
    folder, of_ranks = run
    names = {path.name for path in (folder / "c_2").iterdir()}
    own = {f"rank_{rank:05d}.{ending}" for rank in range(NUM_RANKS) for ending in ("bin", "json")}
    assert names == {"metadata.json", *own}
    assert [sorted(read) for read, _ in of_ranks] == [[0], [0, 1], [0, 2], [0, 3]]
    num_tensors = NUM_LAYERS * 2 * 4  # weights, two moments, steps
    assert (folder / "c_2" / "metadata.json").stat().st_size < 64 * num_tensors + 120 * NUM_RANKS + 700
    for rank in range(NUM_RANKS):
        text = (folder / "c_2" / f"rank_{rank:05d}.json").read_text()
        others = [other for other in range(NUM_RANKS) if f"random/trainer/{other}/" in text]
        assert others == [rank]
    entry = verify(folder / "c_2")
    assert entry.num_bytes == sum(path.stat().st_size for path in (folder / "c_2").iterdir())
    assert of_whole(folder / "c_2") == of_ranks[0][1]


def test_every_change_of_a_byte_is_found(copied: Path) -> None:
    whole = of_whole(copied)
    for path in sorted(copied.iterdir()):
        content = path.read_bytes()
        for place in range(0, len(content), max(1, len(content) // 12)):
            path.write_bytes(content[:place] + bytes([content[place] ^ 0x20]) + content[place + 1 :])
            with pytest.raises(CorruptCheckpointError, match=str(copied)):
                verify(copied)
            with suppress(CorruptCheckpointError):  # unless it is not needed
                assert of_whole(copied) == whole
        for spoilt in (content[:-1], content + b"\0", b""):
            path.write_bytes(spoilt)
            with pytest.raises(CorruptCheckpointError, match=path.name):
                verify(copied)
        path.write_bytes(content)
    verify(copied)


@pytest.mark.parametrize("name", ["metadata.json", "rank_00000.json", "rank_00003.json", "rank_00003.bin"])
def test_a_file_that_is_gone_is_named(copied: Path, name: str) -> None:
    (copied / name).unlink()
    for action in (verify, read_shards):
        with pytest.raises(CorruptCheckpointError, match=name):
            action(copied)


def test_a_document_of_another_save_is_named(run: Any, copied: Path) -> None:
    shutil.copy(run[0] / "c_1" / "rank_00002.json", copied / "rank_00002.json")
    model = layers()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CorruptCheckpointError, match=r"rank_00002.json was changed, or is of another save"):
        load(copied, {"model": model})
    with pytest.raises(CorruptCheckpointError, match=r"rank_00002.json was changed, or is of another save"):
        verify(copied)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_ranks_that_claim_one_part_are_named(copied: Path) -> None:
    body, first = document(copied, "rank_00001.json"), document(copied, "rank_00000.json")
    name = next(name for name in body["chunks"] if name.startswith("model/"))
    body["chunks"][name][0]["offsets"] = first["chunks"][name][0]["offsets"]
    forged(copied, "rank_00001.json", body)
    for action in (verify, read_shards):
        with pytest.raises(CorruptCheckpointError, match=f"{name}' overlap.*rank_00000.bin, rank_00001.bin"):
            action(copied)


FORGERIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "fewer documents": lambda root: root["tables"].pop(),
    "a huge world": lambda root: root.update(world_size=1 << 40),
    "a huge document": lambda root: root["tables"][1].__setitem__(0, 1 << 62),
    "no digest": lambda root: root["tables"][1].__setitem__(1, None),
    "no index": lambda root: root.update(index=None),
    "no layouts": lambda root: root["index"].update(layouts=[]),
    "a rank that is none": lambda root: root["index"]["layouts"][0].update(ranks=[[7, 1, 4]]),
    "a huge layout": lambda root: root["index"]["layouts"][0].update(ranks=[[0, 0, 1 << 40]]),
    "a dimension that is none": lambda root: root["index"]["layouts"][0].update(cuts=[[9, 4]]),
    "another cut": lambda root: root["index"]["layouts"][0].update(cuts=[[1, 4]]),
    "one rank of all": lambda root: root["index"]["layouts"][0].update(cuts=None, ranks=[[2, 1, 1]]),
    "text for a layout": lambda root: root["index"]["tensors"]["0"].update(
        dict.fromkeys(root["index"]["tensors"]["0"], "x")
    ),
    "deep": lambda root: root.update(index=json.loads("[" * 800 + "]" * 800)),
}


@pytest.mark.parametrize("name", FORGERIES)
def test_a_root_that_somebody_made_up_is_refused(copied: Path, name: str) -> None:
    root = document(copied)
    FORGERIES[name](root)
    forged(copied, "metadata.json", root)
    with pytest.raises(CorruptCheckpointError, match=str(copied)):
        read_shards(copied)
    with pytest.raises(CheckpointError):
        load(copied, {"model": layers()})


def test_a_folder_of_the_old_format_loads_as_before(tmp_path: Path) -> None:
    assert verify(OLD).step == 2
    for rank, (sums, drawn) in enumerate(run_ranks(old_resumed, 2, deadline_s=60)):
        assert {name: round(value, 6) for name, value in sums.items()} == OLD_SUMS
        assert drawn[0] == OLD_DRAWN[rank]
    objects = objects_of(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one rank of two
        load(OLD, objects)
    found = {name: round(float(value.double().sum()), 6) for name, value in objects["model"].state_dict().items()}
    assert found == OLD_SUMS
