"""What is found in a file that is not what was saved, and what is never executed."""

import json
import os
import pickle
import random
import re
import subprocess
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dengine import Engine, Events
from dengine.atomic_files import remove_leftovers
from dengine.checkpoint import latest, load, save, verify
from dengine.checkpoint.catalogue.manifest import scan
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.handlers import Checkpoint

# `DENGINE_CHECKPOINT_CORRUPTIONS=1000` raises the number of flips and of cuts, of a file and of the manifest.
NUM_CORRUPTIONS = int(os.environ.get("DENGINE_CHECKPOINT_CORRUPTIONS", "60"))


class Plain:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state_dict: Any) -> None:
        self.state = state_dict


def saved(folder: Path, name: str = "checkpoint_1.pt", value: float = 1.0) -> Path:
    model = nn.Linear(16, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    save(folder / name, {"model": model})
    return folder / name


def places(length: int) -> list[int]:
    """Places all over a file, its first and last bytes among them."""
    drawn = random.Random(0).sample(range(length), min(length, NUM_CORRUPTIONS))
    return sorted({0, 1, length - 1, length - 64, length - 65, length - 80, length - 81, *drawn})


# -- whole files -------------------------------------------------------------------------------------------------


def test_a_saved_file_is_read_by_torch_by_zip_and_by_mmap(tmp_path: Path) -> None:
    big = {"w": torch.arange(700_000, dtype=torch.float64), "n": [1, "a", None], "t": (1.5, True)}  # 5.6 MB: in pieces
    save(tmp_path / "c_7.pt", {"it": Plain(big)})
    for options in ({}, {"mmap": True}):
        loaded = torch.load(tmp_path / "c_7.pt", weights_only=True, **options)  # type: ignore[arg-type]
        assert torch.equal(loaded["it"]["w"], big["w"])  # type: ignore[arg-type]
        assert loaded["it"]["n"] == big["n"]
        assert loaded["it"]["t"] == big["t"]
    assert json.loads(zipfile.ZipFile(tmp_path / "c_7.pt").comment[:-80])["step"] == 7


def test_the_digest_can_be_checked_without_dengine(tmp_path: Path) -> None:
    path = saved(tmp_path)
    printed = subprocess.run(["bash", "-c", f"head -c -64 {path} | sha256sum"], capture_output=True, text=True)
    assert printed.stdout.split()[0] == verify(path).sha256 == path.read_bytes()[-64:].decode()


def test_the_manifest_lists_what_is_known_of_each_file(tmp_path: Path) -> None:
    trainer = Engine(lambda engine, batch: None)
    keep = Checkpoint({"model": nn.Linear(1, 1)}, tmp_path, "best", 2, lambda engine: engine.state.epoch + 0.5, "acc")
    trainer.on(Events.EPOCH_COMPLETED, keep)
    trainer.run([1, 2], max_epochs=2)
    files = json.loads((tmp_path / "manifest.json").read_text())["files"]
    assert files.keys() == {"best_2_acc=0.5000.pt", "best_4_acc=1.5000.pt"}
    entry = files["best_4_acc=1.5000.pt"]
    assert (entry["prefix"], entry["step"], entry["score"], entry["score_name"]) == ("best", 4, 1.5, "acc")
    assert entry["bytes"] == (tmp_path / "best_4_acc=1.5000.pt").stat().st_size
    assert entry["sha256"] == verify(tmp_path / "best_4_acc=1.5000.pt").sha256
    assert entry["world_size"] == 1
    assert entry["versions"]["torch"] == torch.__version__
    assert entry["objects"] == ["model"]


# -- damaged files -----------------------------------------------------------------------------------------------


def test_every_flipped_bit_is_found_and_nothing_of_it_is_loaded(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    model = nn.Linear(16, 16)
    before = model.weight.detach().clone()
    for place in places(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << (place % 8)
        path.write_bytes(changed)
        with pytest.raises(CorruptCheckpointError, match=re.escape(str(path))):
            load(path, {"model": model})
    assert torch.equal(model.weight, before)
    path.write_bytes(content)
    load(path, {"model": model})
    assert bool((model.weight == 1).all())


def test_every_cut_is_found_and_its_size_is_told(tmp_path: Path) -> None:
    path = saved(tmp_path)
    content = path.read_bytes()
    for place in places(len(content)):
        path.write_bytes(content[:place])
        with pytest.raises(CorruptCheckpointError, match=f"{place} bytes.* The manifest knows it with {len(content)}"):
            verify(path)


@pytest.mark.parametrize("cut", [False, True])
def test_a_damaged_manifest_changes_nothing_and_is_rebuilt(tmp_path: Path, cut: bool) -> None:
    saved(tmp_path, "checkpoint_1.pt", 1.0)
    saved(tmp_path, "checkpoint_2.pt", 2.0)
    manifest = tmp_path / "manifest.json"
    content = manifest.read_bytes()
    model = nn.Linear(16, 16)
    for place in places(len(content)):
        changed = bytearray(content[:place] if cut else content)
        if not cut:
            changed[place] ^= 1 << (place % 8)
        manifest.write_bytes(changed)
        found = scan(tmp_path)
        # White space in a JSON text says nothing; all else is noticed.
        assert found.problem is not None or found.listed == survey_of(tmp_path, content)
        assert Checkpoint.resume(tmp_path, {"model": model}) == tmp_path / "checkpoint_2.pt"
        assert bool((model.weight == 2).all())
    manifest.write_bytes(content[:-20])
    with pytest.warns(UserWarning, match=r"manifest\.json .*: it is rebuilt from the intact files"):
        saved(tmp_path, "checkpoint_3.pt", 3.0)
    assert scan(tmp_path).listed.keys() == {"checkpoint_1.pt", "checkpoint_2.pt", "checkpoint_3.pt"}


def survey_of(folder: Path, manifest: bytes) -> Any:
    (folder / "manifest.json").write_bytes(manifest)
    return scan(folder).listed


def test_a_rebuilt_manifest_lists_only_what_is_intact(tmp_path: Path) -> None:
    saved(tmp_path, "checkpoint_1.pt")
    broken = saved(tmp_path, "checkpoint_2.pt")
    content = bytearray(broken.read_bytes())
    content[1000] ^= 4  # its end is readable
    broken.write_bytes(content)
    (tmp_path / "manifest.json").unlink()
    with pytest.warns(UserWarning, match="is missing: it is rebuilt"):
        saved(tmp_path, "checkpoint_3.pt")
    assert scan(tmp_path).listed.keys() == {"checkpoint_1.pt", "checkpoint_3.pt"}
    assert latest(tmp_path) == tmp_path / "checkpoint_3.pt"


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "gone", "cut, no manifest"])
def test_resume_falls_back_to_the_newest_intact_one_and_says_so(tmp_path: Path, damage: str) -> None:
    for step in (1, 2, 3):
        newest = saved(tmp_path, f"checkpoint_{step}.pt", float(step))
    content = bytearray(newest.read_bytes())
    content[1000] ^= 1
    newest.write_bytes({"flip": bytes(content), "empty": b""}.get(damage, bytes(content[:-500])))
    if damage == "gone":
        newest.unlink()
    if "no manifest" in damage:
        (tmp_path / "manifest.json").unlink()
    model = nn.Linear(16, 16)
    with pytest.warns(UserWarning, match=r"Resuming from .*checkpoint_2\.pt, as .*checkpoint_3\.pt"):
        assert Checkpoint.resume(tmp_path, {"model": model}) == tmp_path / "checkpoint_2.pt"
    assert bool((model.weight == 2).all())
    assert latest(tmp_path) == tmp_path / "checkpoint_2.pt"


def test_an_older_damaged_file_is_nobody_s_concern(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    saved(tmp_path, "checkpoint_1.pt").write_bytes(b"")
    newest = saved(tmp_path, "checkpoint_2.pt")
    assert Checkpoint.resume(tmp_path, {"model": nn.Linear(16, 16)}) == newest
    assert not [each for each in recwarn if "Resuming" in str(each.message)]


def test_a_file_of_one_prefix_is_not_taken_for_another_s(tmp_path: Path) -> None:
    saved(tmp_path, "best_9.pt")
    assert latest(tmp_path) is None
    assert latest(tmp_path / "not there") is None
    with pytest.warns(UserWarning, match="no checkpoint 'checkpoint', so .* anew; there are some of 'best'"):
        assert Checkpoint.resume(tmp_path, {"model": nn.Linear(16, 16)}) is None


@pytest.mark.parametrize("name", ["checkpoint_1.pt", "checkpoint_1", "not_there.pt"])
def test_a_checkpoint_where_its_folder_is_wanted_does_not_begin_anew(tmp_path: Path, name: str) -> None:
    if name != "not_there.pt":
        saved(tmp_path, name)
    for use in (latest, lambda path: Checkpoint.resume(path, {"model": nn.Linear(16, 16)})):
        with pytest.raises(CheckpointError, match=rf"{name} is a checkpoint, not a folder of them: .* its folder"):
            use(tmp_path / name)


def test_a_folder_of_checkpoints_where_one_is_wanted_says_what_takes_it(tmp_path: Path) -> None:
    saved(tmp_path)
    for use in (verify, lambda path: load(path, {"model": nn.Linear(16, 16)})):
        with pytest.raises(CheckpointError, match=r"is a folder of checkpoints, not a checkpoint: Checkpoint\.resume"):
            use(tmp_path)
        with pytest.raises(TypeError, match="path=3 must be a path"):
            use(3)  # type: ignore[arg-type]


def test_a_metadata_json_of_something_else_makes_a_folder_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "metadata.json").write_text('{"run": 3}')
    assert Checkpoint.resume(tmp_path, {"model": nn.Linear(16, 16)}) is None
    newest = saved(tmp_path, "checkpoint_1.pt")
    assert Checkpoint.resume(tmp_path, {"model": nn.Linear(16, 16)}) == latest(tmp_path) == newest


def test_resume_passes_over_files_that_hold_too_little_and_says_what_there_is_where_all_do(tmp_path: Path) -> None:
    full = {"model": nn.Linear(1, 1), "other": Plain({"a": 1})}
    save(tmp_path / "best_1.pt", full)
    save(tmp_path / "best_2.pt", {"model": nn.Linear(1, 1)})
    assert Checkpoint.resume(tmp_path, full, "best") == tmp_path / "best_1.pt"
    with pytest.raises(CheckpointError, match=r"holds all of model, third: best_2\.pt holds model; best_1\.pt holds"):
        Checkpoint.resume(tmp_path, {"model": nn.Linear(1, 1), "third": Plain(1)}, "best")


# -- nothing is executed -----------------------------------------------------------------------------------------


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_something_is_refused_and_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "it ran"
    bomb = Bomb(trace)
    (tmp_path / "checkpoint_1.pt").write_bytes(pickle.dumps(bomb))
    torch.save({"model": bomb}, tmp_path / "checkpoint_2.pt")
    for name in ("checkpoint_1.pt", "checkpoint_2.pt"):
        for use in (verify, lambda path: load(path, {"model": Plain(1)})):
            with pytest.raises(CorruptCheckpointError, match="something else wrote it|truncated"):
                use(tmp_path / name)
    assert latest(tmp_path) is None
    with pytest.raises(CorruptCheckpointError):
        Checkpoint.resume(tmp_path, {"model": Plain(1)})
    assert not trace.exists()


def test_a_pickle_in_a_file_with_a_right_digest_does_not_run_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "it ran"
    monkeypatch.setattr("dengine.checkpoint.formats.file.check_loadable", lambda states: [])
    save(tmp_path / "checkpoint_1.pt", {"model": Plain({"a": Bomb(trace)})})
    assert not trace.exists()
    kept = Plain("as it was")
    with pytest.raises(CheckpointError, match="could not be loaded.*Weights only load failed"):
        load(tmp_path / "checkpoint_1.pt", {"model": kept})
    assert kept.state == "as it was"
    assert not trace.exists()


@pytest.mark.parametrize("state", [{"f": Path("x")}, OrderedDict(a=[Plain(1)])])
def test_what_could_not_be_loaded_again_is_not_saved(tmp_path: Path, state: Any) -> None:
    with pytest.raises(CheckpointError, match="the state of 'it' holds something that only a pickle could bring back"):
        save(tmp_path / "c_1.pt", {"it": Plain(state)})
    assert list(tmp_path.iterdir()) == []


# -- folders -----------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_the_new_file_and_nothing_else(small_disk: Path) -> None:
    small, large = Plain({"w": torch.ones(50_000)}), Plain({"w": torch.ones(500_000)})  # 0.2 MB, 2 MB
    save(small_disk / "c_1.pt", {"it": small})
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    for _ in range(3):
        with pytest.raises(
            CheckpointError, match="c_2.pt could not be saved, and nothing was changed: OSError.*No space"
        ):
            save(small_disk / "c_2.pt", {"it": large})
        assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before
    with pytest.raises(CheckpointError, match="No space left"):
        save(small_disk / "c_1.pt", {"it": large})
    load(small_disk / "c_1.pt", {"it": small})
    save(small_disk / "c_3.pt", {"it": small})


def test_a_disk_with_room_for_the_file_but_not_for_the_manifest_keeps_both_as_they_were(small_disk: Path) -> None:
    save(small_disk / "c_1.pt", {"it": Plain({"a": 1})})
    before = {path.name: path.read_bytes() for path in small_disk.iterdir()}
    one = verify(small_disk / "c_1.pt").num_bytes
    filler = small_disk / "filler"
    filler.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - (one // 4096 + 1) * 4096))
    with pytest.raises(CheckpointError, match="No space left"):
        save(small_disk / "c_2.pt", {"it": Plain({"a": 2})})
    filler.unlink()
    assert {path.name: path.read_bytes() for path in small_disk.iterdir()} == before


def test_leftovers_of_dead_processes_go_and_those_of_the_living_and_of_other_hosts_stay(tmp_path: Path) -> None:
    import socket

    child = subprocess.Popen(["true"])
    child.wait()
    here, dead, living = socket.gethostname(), child.pid, os.getppid()
    gone = tmp_path / f".c_1.pt.{dead}-0@{here}.tmp"
    own = tmp_path / f".c_2.pt.{os.getpid()}-77@{here}.tmp"  # of an earlier process with this one's number
    stay = [tmp_path / f".c_1.pt.{living}-0@{here}.tmp", tmp_path / f".c_1.pt.{dead}-0@elsewhere.tmp"]
    stay.append(tmp_path / ".c_1.pt.tmp")
    for path in (gone, own, *stay):
        path.write_text("")
    assert sorted(remove_leftovers(tmp_path)) == sorted([gone, own])
    assert sorted(tmp_path.iterdir()) == sorted(stay)
    gone.write_text("")
    save(tmp_path / "c_1.pt", {"it": Plain({"a": 1})})
    assert not gone.exists()


@pytest.mark.parametrize("name", ["model.pth", "model.bin", ".hidden_1.pt", ".hidden_1"])
def test_a_path_that_would_not_be_found_again_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="must end with .pt"):
        save(tmp_path / name, {"it": Plain({"a": 1})})


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    for use in (verify, lambda path: load(path, {"model": Plain(1)})):
        with pytest.raises(CheckpointError, match=r"none\.pt"):
            use(tmp_path / "none.pt")
