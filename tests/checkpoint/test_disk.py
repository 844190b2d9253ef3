"""Disks that are full, read-only or fail, and what a large file costs on them."""

import ctypes
import errno
import hashlib
import os
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from dengine import Engine, Events
from dengine.checkpoint import latest, load, save, verify
from dengine.checkpoint.disk import space as disk
from dengine.checkpoint.disk.hashing import HashingWriter
from dengine.errors import CheckpointError
from dengine.handlers import Checkpoint

MB = 1 << 20


class Plain:
    def __init__(self, num_bytes: int, value: int = 1) -> None:
        self.tensor = torch.full((num_bytes,), value, dtype=torch.uint8)

    def state_dict(self) -> dict[str, Any]:
        return {"t": self.tensor}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.tensor = state_dict["t"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# -- full --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pt", ""])
def test_a_full_disk_costs_the_new_one_and_nothing_else(small_disk: Path, ending: str) -> None:
    save(small_disk / f"c_1{ending}", {"it": Plain(MB // 4)})
    before = contents(small_disk)
    for step in (2, 1):  # a new name, and one that would be replaced
        with pytest.raises(CheckpointError, match=f"c_{step}.*nothing was changed.*No space left"):
            save(small_disk / f"c_{step}{ending}", {"it": Plain(2 * MB)})
        assert contents(small_disk) == before
    load(small_disk / f"c_1{ending}", {"it": Plain(1)})
    save(small_disk / f"c_2{ending}", {"it": Plain(MB // 4)})


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_a_disk_that_fills_during_a_run_ends_it_with_the_last_good_one_in_place(
    small_disk: Path, is_asynchronous: bool
) -> None:
    it = Plain(MB // 4)
    trainer = Engine(lambda engine, batch: it.load_state_dict({"t": torch.zeros(batch * MB // 4, dtype=torch.uint8)}))
    checkpoint = Checkpoint({"it": it, "trainer": trainer}, small_disk, asynchronous=is_asynchronous)
    trainer.on(Events.ITERATION_COMPLETED, checkpoint)
    with pytest.raises(CheckpointError, match=r"checkpoint_2\.pt could not be saved.*No space left"):
        trainer.run([1, 8])
    assert sorted(path.name for path in small_disk.iterdir()) == ["checkpoint_1.pt", "manifest.json"]
    assert [one.step for one in checkpoint.saved] == [1]
    assert latest(small_disk) == small_disk / "checkpoint_1.pt"


@pytest.mark.parametrize("ending", [".pt", ""])
def test_where_there_is_room_for_two_what_is_freed_aside_is_free_for_the_next(disk_of_eight: Path, ending: str) -> None:
    it = Plain(3 * MB)
    for step in range(6):
        save(disk_of_eight / f"c_{step}{ending}", {"it": it})
        if step:
            disk.remove(disk_of_eight / f"c_{step - 1}{ending}")
        assert verify(disk_of_eight / f"c_{step}{ending}").step == step


def test_the_name_of_a_large_file_goes_at_once_although_somebody_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(bytes(2 * MB))
    with path.open("rb") as reader:
        disk.remove(path)
        assert not path.exists()
        assert len(reader.read()) == 2 * MB
    disk.wait_for_space()
    assert not [thread for thread in threading.enumerate() if thread.name == "dengine-checkpoint-free"]
    assert list(tmp_path.iterdir()) == []
    disk.remove(path)  # gone already


# -- read-only ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pt", ""])
def test_a_read_only_disk_is_named_and_still_read(small_disk: Path, ending: str) -> None:
    save(small_disk / f"c_1{ending}", {"it": Plain(10)})
    before = contents(small_disk)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    try:
        for step in (1, 2):
            with pytest.raises(CheckpointError, match=f"c_{step}.*nothing was changed.*Read-only file system"):
                save(small_disk / f"c_{step}{ending}", {"it": Plain(10)})
        it = Plain(1)
        assert Checkpoint.resume(small_disk, {"it": it}, "c") == small_disk / f"c_1{ending}"
        assert len(it.tensor) == 10
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert contents(small_disk) == before


# -- digests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sizes", [[], [0], [5], [MB - 1, 1, 1], [MB], [3 * MB + 7, 5, MB, 0, 2], [9000] * 300])
def test_a_file_has_all_that_was_written_in_order_and_its_digest(tmp_path: Path, sizes: list[int]) -> None:
    parts = [os.urandom(size) for size in sizes]
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    with HashingWriter(descriptor, sum(sizes)) as file:
        for part in parts:
            buffer = bytearray(part)
            file.write(memoryview(buffer))
            buffer[:] = bytes(len(buffer))  # the memory is the caller's again
        digest = file.digest()
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert digest == hashlib.sha256(b"".join(parts)).hexdigest()
    assert file.num_bytes == sum(sizes)


@pytest.mark.parametrize("sizes", [[22], [MB - 1, 22], [MB, 1, 22], [9000] * 120 + [22]])
def test_the_end_of_a_file_can_be_taken_back_and_is_neither_written_nor_digested(
    tmp_path: Path, sizes: list[int]
) -> None:
    parts = [os.urandom(size) for size in sizes]
    descriptor = os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT)
    with HashingWriter(descriptor) as file:
        for part in parts:
            file.write(part)
        assert file.take_back(22) == parts[-1]
        file.write(b"other")
        digest = file.digest()
        with pytest.raises(ValueError, match="22 bytes cannot be taken back: 22 of them are written"):
            file.take_back(22)
    os.close(descriptor)
    expected = b"".join(parts[:-1]) + b"other"
    assert (tmp_path / "file").read_bytes() == expected
    assert digest == hashlib.sha256(expected).hexdigest()


def test_what_the_disk_meets_with_when_it_begins_early_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: object) -> int:
        ctypes.set_errno(errno.EIO)
        return -1

    monkeypatch.setattr(disk, "_of_c_library", lambda name: failing if name == "sync_file_range" else None)
    with pytest.raises(CheckpointError, match="Input/output error"):
        save(tmp_path / "c_1.pt", {"it": Plain(9 * MB)})
    assert list(tmp_path.iterdir()) == []


def test_where_the_system_can_neither_reserve_room_nor_begin_early_a_save_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "_of_c_library", lambda name: None)
    save(tmp_path / "c_1.pt", {"it": Plain(9 * MB)})
    assert verify(tmp_path / "c_1.pt").step == 1
