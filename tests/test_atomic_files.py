"""What is at a path while a file is written there, and after that has failed."""

import os
from pathlib import Path

import pytest

from dengine.atomic_files import temporary_path, write_file
from dengine.tracking.files import write_json


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "it.json"
    write_file(path, lambda temporary: temporary.write_text("old"))

    def full(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_file(path, full)
    assert [each.name for each in path.parent.iterdir()] == ["it.json"]
    assert path.read_text() == "old"


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    write_json(tmp_path / "it.json", {"a": 1})
    assert calls == ["fsync", "replace", "fsync"]


def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted, other = tmp_path / ".planted.tmp", tmp_path / "other"
    planted.symlink_to(other)
    monkeypatch.setattr("dengine.atomic_files.temporary_path", lambda path: planted)
    write_json(tmp_path / "it.json", {"a": 1})
    assert sorted(each.name for each in tmp_path.iterdir()) == ["it.json"]
    assert not (tmp_path / "it.json").is_symlink()


@pytest.mark.parametrize("name", ["a" * 250, "ä" * 125])
def test_a_temporary_name_is_no_longer_than_a_file_system_allows(name: str, tmp_path: Path) -> None:
    assert len(os.fsencode(temporary_path(tmp_path / name).name)) <= 255
    write_file(tmp_path / name, lambda temporary: temporary.write_text("it"))
    assert (tmp_path / name).read_text() == "it"
