"""Checkpoints that are folders, by one process: their place among files, and what is not taken for one."""

import contextlib
import io
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dengine.__main__ import main
from dengine.checkpoint import latest, load, save, verify
from dengine.checkpoint.catalogue.manifest import scan
from dengine.checkpoint.disk import space as storage
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.handlers import Checkpoint


def filled(value: float) -> nn.Module:
    model = nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def value_of(model: nn.Module) -> float:
    values = torch.cat([parameter.detach().reshape(-1) for parameter in model.parameters()]).unique()
    assert len(values) == 1
    return float(values)


def test_files_and_folders_stand_in_one_order_and_the_newest_intact_one_is_taken(tmp_path: Path) -> None:
    for step, name in enumerate(["c_1.pt", "c_2", "c_3.pt", "c_4"], start=1):
        save(tmp_path / name, {"model": filled(step)})
    found = scan(tmp_path)
    assert [entry.name for entry in found.entries] == ["c_1.pt", "c_2", "c_3.pt", "c_4"]
    assert {entry.name: entry for entry in found.entries} == found.listed
    for name, value in [("c_4", 4), ("c_3.pt", 3), ("c_2", 2)]:
        assert latest(tmp_path, "c") == tmp_path / name
        model = nn.Linear(4, 3)
        assert Checkpoint.resume(tmp_path, {"model": model}, "c") == tmp_path / name
        assert value_of(model) == value
        storage.remove(tmp_path / name)
        (tmp_path / "manifest.json").unlink(missing_ok=True)


def test_a_damaged_description_makes_a_folder_damaged_not_invisible(tmp_path: Path) -> None:
    save(tmp_path / "c_1", {"model": filled(1)})
    save(tmp_path / "c_2", {"model": filled(2)})
    path = tmp_path / "c_2" / "metadata.json"
    content = path.read_bytes()
    for changed in (b"", content[:20], b"x" + content, content.replace(b'"step":2', b'"step":9')):
        path.write_bytes(changed)
        with pytest.raises(CorruptCheckpointError, match=re.escape(str(path))):
            verify(tmp_path / "c_2")
        with pytest.warns(UserWarning, match=r"Resuming from .*c_1"):
            assert Checkpoint.resume(tmp_path, {"model": nn.Linear(4, 3)}, "c") == tmp_path / "c_1"
    path.unlink()
    assert [entry.name for entry in scan(tmp_path).damaged] == ["c_2"]


def test_a_folder_of_something_else_is_neither_a_checkpoint_nor_replaced(tmp_path: Path) -> None:
    (tmp_path / "c_1").mkdir()
    (tmp_path / "c_1" / "notes.txt").write_text("mine")
    (tmp_path / "c_2").mkdir()
    (tmp_path / "c_2" / "metadata.json").write_text("{}")
    (tmp_path / "c_2" / "notes.txt").write_text("mine")
    for name in ("c_1", "c_2"):
        with pytest.raises(CheckpointError, match="is there already"):
            save(tmp_path / name, {"model": filled(1)})
        assert (tmp_path / name / "notes.txt").read_text() == "mine"
    assert scan(tmp_path).entries == ()


def test_missing_and_differing_names_are_all_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    save(tmp_path / "c_1", {"model": nn.ModuleDict({"a": filled(1), "b": filled(1)})})
    into = nn.ModuleDict({"a": nn.Linear(5, 3), "c": filled(7)})
    before = {name: value.clone() for name, value in into.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        load(tmp_path / "c_1", {"model": into})
    for part in ("b.weight", "c.weight", "size mismatch for a.weight", "every object is as it was"):
        assert part in str(raised.value)
    assert all(torch.equal(value, before[name]) for name, value in into.state_dict().items())
    with pytest.raises(CheckpointError, match="holds no 'ema', but 'model'"):
        load(tmp_path / "c_1", {"ema": into})


def test_a_folder_that_was_aside_when_a_kill_came_is_resumed_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path / "c_1", {"model": filled(1)})

    class Killed(BaseException):
        pass

    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if not str(target).endswith(".replaced"):
            raise Killed
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(Killed):
            save(tmp_path / "c_1", {"model": filled(2)})
    assert not (tmp_path / "c_1").exists()
    model = nn.Linear(4, 3)
    assert Checkpoint.resume(tmp_path, {"model": model}, "c") == tmp_path / "c_1"
    assert value_of(model) == 1


def test_a_replacement_that_fails_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "c_1", {"model": filled(1)})
    before = sorted(tmp_path.iterdir())
    real = os.rename

    def rename(source: Any, target: Any) -> None:
        if str(source).endswith(".tmp"):
            raise OSError(30, "Read-only file system")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(CheckpointError, match="nothing was changed: .*Read-only file system"):
            save(tmp_path / "c_1", {"model": filled(2)})
    assert sorted(tmp_path.iterdir()) == before
    model = nn.Linear(4, 3)
    load(tmp_path / "c_1", {"model": model})
    assert value_of(model) == 1
    save(tmp_path / "c_1", {"model": filled(3)})
    load(tmp_path / "c_1", {"model": model})
    assert value_of(model) == 3


def inspected(path: Path) -> tuple[int, str]:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = main(["inspect", str(path)])
    return code, printed.getvalue()


def test_inspect_shows_names_shapes_ranks_and_which_file_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "c_5"
    save(path, {"model": filled(1)})
    code, text = inspected(path)
    assert code == 0
    assert f"{path}: intact, SHA-256 of metadata.json {verify(path).sha256}" in text
    assert re.search(r"step 5; .* saved by 1 rank; dengine", text)
    assert re.search(r"rank_00000\.bin +60 B +intact", text)
    assert re.search(r"  weight +3x4 +float32 +48 B +0 +intact", text)
    shard = path / "rank_00000.bin"
    content = bytearray(shard.read_bytes())
    content[3] ^= 1
    shard.write_bytes(content)
    code, text = inspected(path)
    assert code == 1
    assert re.search(r"rank_00000\.bin +60 B +CORRUPT\n\nrank_00000\.bin was changed", text)
    assert re.search(r"  weight +3x4 +float32 +48 B +0 +CORRUPT", text)
    code, text = inspected(tmp_path)
    assert code == 1
    assert re.search(r"c_5 +5 .*CORRUPT\n\nc_5/rank_00000\.bin was changed", text)
