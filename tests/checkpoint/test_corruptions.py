"""Damage of any kind, anywhere: it is found, nothing of it is loaded, and the newest intact one is resumed.

`DENGINE_CHECKPOINT_CORRUPTIONS=1000` raises the number of corruptions (default 60).
"""

import os
import pickle
import random
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from dengine import Engine
from dengine.checkpoint import latest, load, save, verify
from dengine.errors import CorruptCheckpointError
from dengine.handlers import Checkpoint

NUM_CORRUPTIONS = int(os.environ.get("DENGINE_CHECKPOINT_CORRUPTIONS", "60"))
NAMES = ("c_1.pt", "c_2", "c_3.pt", "c_4")  # oldest first; two files, two folders


class Bomb:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.mark),)


def objects() -> tuple[dict[str, object], nn.Linear]:
    model = nn.Linear(16, 16)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(2, 16)).sum().backward()
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "trainer": Engine(lambda engine, batch: None)}, model


def filled(folder: Path) -> None:
    parts, model = objects()
    for number, name in enumerate(NAMES, start=1):
        nn.init.constant_(model.weight, number)
        save(folder / name, parts)


# -- kinds of damage: each changes `content` -----------------------------------------------------------------------


def flip(content: bytes, draw: random.Random) -> bytes:
    place = draw.choice(
        [draw.randrange(len(content)), draw.randrange(min(200, len(content))), -1 - draw.randrange(150)]
    )
    changed = bytearray(content)
    changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(content: bytes, draw: random.Random) -> bytes:
    return content[: draw.choice([0, 1, len(content) - 1, draw.randrange(len(content))])]


def lengthen(content: bytes, draw: random.Random) -> bytes:
    return content + draw.randbytes(1 + draw.randrange(100))


def blank(content: bytes, draw: random.Random) -> bytes:
    """A block that never reached the disk, as after a power cut."""
    start = draw.randrange(len(content))
    return content[:start] + bytes(min(512, len(content) - start)) + content[start + 512 :]


def drop(content: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(content))
    return content[:start] + content[start + 1 + draw.randrange(64) :]


def other(content: bytes, draw: random.Random) -> bytes:
    return draw.randbytes(len(content))


KINDS = (flip, cut, lengthen, blank, drop, other, "bomb", "gone")


def damage(path: Path, kind: object, draw: random.Random, mark: Path) -> bool:
    """Whether anything is changed."""
    before = path.read_bytes()
    if kind == "gone":
        path.unlink()
        return True
    after = pickle.dumps(Bomb(mark)) if kind == "bomb" else kind(before, draw)
    path.write_bytes(after)
    return bool(after != before)


def files_of(path: Path) -> list[Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]


def wrong_after(folder: Path, damaged: set[str]) -> str | None:
    """What `resume` makes of the folder, where it differs from the newest of what is not `damaged`."""
    parts, model = objects()
    nn.init.constant_(model.weight, -1.0)
    expected = max(set(NAMES) - damaged)
    newer = [name for name in damaged if name > expected]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        path = Checkpoint.resume(folder, parts, "c")
    said = " ".join(str(each.message) for each in caught)
    if path != folder / expected or not bool((model.weight == NAMES.index(expected) + 1).all()):
        return f"resumed from {path}, not from {expected}"
    if bool(newer) != bool(said) or not all(f"{folder / name}" in said for name in newer):
        return f"said {said!r} of {newer}"
    if latest(folder, "c") != path:
        return f"latest gives {latest(folder, 'c')}"
    for name in damaged:
        for act in (verify, lambda path: load(path, parts)):
            try:
                act(folder / name)
            except CorruptCheckpointError:
                continue
            except Exception as error:
                if not (folder / name).exists():
                    continue
                return f"{name}: {error!r}"
            return f"{name} was taken for intact"
    return None if bool((model.weight == NAMES.index(expected) + 1).all()) else "something of it was loaded"


def test_any_damage_is_found_and_the_newest_intact_one_is_resumed(tmp_path: Path) -> None:
    whole, mark = tmp_path / "whole", tmp_path / "ran"
    filled(whole)
    assert wrong_after(whole, set()) is None
    draw = random.Random(0)
    problems, num_damaged = [], 0
    while num_damaged < NUM_CORRUPTIONS:
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        damaged = {"c_4"} | set(draw.sample(NAMES[1:3], draw.randrange(3)))
        told = []
        for name in sorted(damaged):
            path, kind = draw.choice(files_of(folder / name)), draw.choice(KINDS)
            told.append(f"{kind} of {path.relative_to(folder)}")
            if not damage(path, kind, draw, mark):
                damaged.discard(name)
        is_all_known = all((folder / name).exists() for name in damaged)  # what is gone, only the manifest knows
        if is_all_known and draw.random() < 0.3:
            damage(folder / "manifest.json", draw.choice(KINDS), draw, mark)
        if problem := wrong_after(folder, damaged):
            problems.append(f"{told}: {problem}")
        num_damaged += len(damaged)
        shutil.rmtree(folder)
    assert problems == []
    assert not mark.exists()


@pytest.mark.parametrize("name", ["metadata.json", ".metadata", "rank_00000.bin"])
def test_a_pickle_in_a_folder_does_not_run_when_it_is_resumed(tmp_path: Path, name: str) -> None:
    filled(tmp_path)
    mark = tmp_path / "ran"
    (tmp_path / "c_4" / name).write_bytes(pickle.dumps(Bomb(mark)))
    if name == ".metadata":  # torch's own name for it: nobody looks at it
        assert Checkpoint.resume(tmp_path, objects()[0], "c") == tmp_path / "c_4"
    else:
        with pytest.warns(UserWarning, match="c_4"):
            assert Checkpoint.resume(tmp_path, objects()[0], "c") == tmp_path / "c_3.pt"
    assert not mark.exists()
    pickle.loads(pickle.dumps(Bomb(mark)))
    assert mark.exists()  # it would have
