"""A right digest and a wrong content: told in a sentence, before memory is taken, and never a hang."""

import hashlib
import io
import json
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dengine.__main__ import main
from dengine.checkpoint import latest, load, save, verify
from dengine.checkpoint.catalogue import manifest
from dengine.checkpoint.disk.footer import write_footer
from dengine.checkpoint.disk.hashing import HashingWriter
from dengine.checkpoint.formats.sharded import files as shard_files
from dengine.checkpoint.formats.sharded.check import check_declared
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.handlers import Checkpoint

TOO_MUCH = 10**12


def model_of(value: float) -> nn.Linear:
    model = nn.Linear(4, 4, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def about(step: Any = 2, **changes: Any) -> dict[str, Any]:
    return {
        "format": 1,
        "prefix": "c",
        "step": step,
        "score": None,
        "score_name": None,
        "sequence": 2,
        "objects": ["model"],
        "world_size": 1,
        "versions": {"dengine": "0", "torch": "0"},
        **changes,
    }


def sealed(path: Path, archive: bytes, description: Any) -> None:
    """A file with a right digest around any archive and any description."""
    with open(path, "wb") as file, HashingWriter(file.fileno()) as whole:
        whole.write(archive[:-22])
        whole.write(archive[-22:])
        write_footer(whole, description)


def archive_of(states: Any) -> bytes:
    content = io.BytesIO()
    torch.save(states, content)
    return content.getvalue()


def falls_back(folder: Path, newest: str = "c_2") -> str:
    """What `resume` says of the newest, which it passes over for the first; inspect ends with a code, too."""
    model = model_of(0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert Checkpoint.resume(folder, {"model": model}, "c") == folder / "c_1.pt"
    assert bool((model.weight == 1).all())
    assert main(["inspect", str(folder)]) in (0, 1)
    found = [path for path in folder.iterdir() if path.name.startswith(newest)]
    for path in found:
        assert main(["inspect", str(path)]) in (1, 2)
        with pytest.raises(CheckpointError):
            load(path, {"model": model})
    assert bool((model.weight == 1).all())
    return " ".join(str(each.message) for each in caught)


# -- what a file says of itself ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        about(step=float("inf")),
        about(step=float("nan")),
        about(step="2"),
        about(step=-1),
        about(step=10**40),
        about(step=True),
        about(step=[1]),
        about(sequence=float("inf")),
        about(sequence=None),
        about(objects="model"),
        about(objects=[1]),
        about(versions=[1]),
        about(versions={"torch": 2}),
        about(world_size=-3),
        about(world_size={}),
        about(score=[]),
        about(score="much"),
        about(prefix=None),
        about(score_name=3),
        about(format=2),
        {},
        [],
        "text",
        None,
    ],
    ids=str,
)
def test_a_wrong_description_counts_as_damage(tmp_path: Path, wrong: Any) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    sealed(tmp_path / "c_2.pt", archive_of({"model": model_of(2).state_dict()}), wrong)
    assert "c_2.pt" in falls_back(tmp_path)
    assert latest(tmp_path, "c") == tmp_path / "c_1.pt"
    with pytest.raises(CorruptCheckpointError):
        verify(tmp_path / "c_2.pt")
    save(tmp_path / "c_3.pt", {"model": model_of(3)})  # which surveys the folder


def test_deep_json_in_a_description_counts_as_damage(tmp_path: Path) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    text = b"[" * 30_000 + b"]" * 30_000
    archive = archive_of({"model": model_of(2).state_dict()})
    content = archive[:-2] + (len(text) + 80).to_bytes(2, "little") + text + b"dengine1" + b"%08x" % len(text)
    (tmp_path / "c_2.pt").write_bytes(content + hashlib.sha256(content).hexdigest().encode())
    assert "c_2.pt" in falls_back(tmp_path)


# -- what a file holds -------------------------------------------------------------------------------------------


def cyclic() -> Any:
    state: dict[str, Any] = {}
    state["more"] = [state]
    return state


def nested(levels: int, width: int) -> Any:
    state: Any = [0]
    for _ in range(levels):
        state = [state] * width
    return state


@pytest.mark.parametrize(
    "states",
    [
        [1, 2],
        torch.ones(1),
        {1: {}},
        {"model": cyclic()},
        {"model": nested(300, 1)},
        {"model": nested(60, 2)},
        {"model": {"weight": torch.ones(1).expand(TOO_MUCH)}},
        {"model": {"weight": torch.empty(TOO_MUCH, device="meta")}},
        {"model": model_of(2).state_dict(), "dengine": []},
        {"model": model_of(2).state_dict(), "dengine": {"random": [1]}},
        {"model": model_of(2).state_dict(), "dengine": {"random": {"trainer": [[]]}}},
    ],
    ids=range(11),
)
def test_wrong_states_in_a_whole_file_count_as_damage(tmp_path: Path, states: Any) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    sealed(tmp_path / "c_2.pt", archive_of(states), about())
    if isinstance(states, dict) and "dengine" in states:  # nothing of it is shown
        with pytest.raises(CorruptCheckpointError):
            load(tmp_path / "c_2.pt", {"model": model_of(0)})
        assert main(["inspect", str(tmp_path / "c_2.pt")]) in (0, 1)
    else:
        assert "c_2.pt" in falls_back(tmp_path)


def test_a_packed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    plain = zipfile.ZipFile(io.BytesIO(archive_of({"model": {"weight": torch.zeros(1 << 20)}})))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as target:
        for name in plain.namelist():
            target.writestr(name, plain.read(name))
    sealed(tmp_path / "c_2.pt", packed.getvalue(), about())
    assert "packed" in falls_back(tmp_path)


@pytest.mark.parametrize("content", [b"PK\x05\x06" + bytes(18), b"x" * 500 + b"PK\x05\x06" + bytes(18)])
def test_what_is_no_archive_counts_as_damage(tmp_path: Path, content: bytes) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    sealed(tmp_path / "c_2.pt", content, about())
    assert "c_2.pt" in falls_back(tmp_path)


# -- folders -----------------------------------------------------------------------------------------------------


def rewritten(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "metadata.json"
    body = json.loads(path.read_bytes())["body"]
    change(body)
    path.write_bytes(shard_files._rendered(body))


def tensor(body: dict[str, Any]) -> dict[str, Any]:
    return body["states"]["items"][0][1]["items"][0][1]


def part(body: dict[str, Any]) -> dict[str, Any]:
    return body["chunks"]["model/weight"][0]


def overlapping(body: dict[str, Any]) -> None:
    """Two parts of the whole number of elements, which leave the last two rows unwritten."""
    one = part(body)
    half = {**one, "sizes": [2, 4], "num_bytes": 32}
    body["chunks"]["model/weight"] = [half, {**half}]


def crossing(body: dict[str, Any]) -> None:
    one = part(body)
    body["chunks"]["model/weight"] = [
        {**one, "sizes": [2, 4], "num_bytes": 32},
        {**one, "sizes": [4, 2], "num_bytes": 32},
    ]


def huge(body: dict[str, Any]) -> None:
    tensor(body)["shape"] = [TOO_MUCH]
    part(body).update(sizes=[TOO_MUCH], offsets=[0], num_bytes=4 * TOO_MUCH)


def huge_file(body: dict[str, Any]) -> None:
    huge(body)
    body["files"]["rank_00000.bin"]["num_bytes"] = 4 * TOO_MUCH


def put(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda body: body.__setitem__(key, value)


def more(value: Any, name: Any = "more") -> Callable[[dict[str, Any]], None]:
    return lambda body: body["states"]["items"][0][1]["items"].append([name, value])


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "overlapping": overlapping,
    "crossing": crossing,
    "missing": lambda body: body["chunks"].pop("model/weight"),
    "no parts": lambda body: body["chunks"].update({"model/weight": []}),
    "huge": huge,
    "huge file": huge_file,
    "negative shape": lambda body: tensor(body).update(shape=[-4, -4]),
    "shape of text": lambda body: tensor(body).update(shape="44"),
    "shape beyond numbers": lambda body: tensor(body).update(shape=[0, 10**30]),
    "dtype": lambda body: tensor(body).update(dtype="float33"),
    "dtype of a module": lambda body: tensor(body).update(dtype="nn"),
    "dtype as a list": lambda body: tensor(body).update(dtype=[]),
    "part beyond its file": lambda body: part(body).update(start=4),
    "part of a file that is not listed": lambda body: part(body).update(file="rank_00009.bin"),
    "negative start": lambda body: part(body).update(start=-1),
    "a start in halves": lambda body: part(body).update(start=0.5),
    "states as a list": put("states", []),
    "states as a tensor": put("states", {"type": "tensor", "dtype": "float32", "shape": []}),
    "states as text": put("states", "x"),
    "chunks as a list": put("chunks", []),
    "files as a list": put("files", []),
    "ranks": put("world_size", "many"),
    "about as a list": put("about", [1]),
    "about without end": lambda body: body["about"].update(step=10**30),
    "unknown node": more({"type": "os.system", "value": "ls"}),
    "node without a type": more({"value": 1}),
    "unknown device": more({"type": "device", "value": "warp:0"}),
    "device of no text": more({"type": "device", "value": {}}),
    "float": more({"type": "float", "value": "x"}),
    "bytes": more({"type": "bytes", "value": "?"}),
    "size": more({"type": "size", "value": [{}]}),
    "set of lists": more({"type": "set", "value": [[1]]}),
    "a list as a key": more(1, [1]),
    "a tensor as a key": more(1, {"type": "tensor", "dtype": "float32", "shape": []}),
    "a key twice": more(1, "weight"),
    "items as a number": more({"type": "dict", "items": 3}),
    "pairs of three": more({"type": "dict", "items": [[1, 2, 3]]}),
    "deep": more(nested(700, 1)),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_a_folder_that_declares_what_cannot_be_counts_as_damaged(tmp_path: Path, change: str) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    save(tmp_path / "c_2", {"model": model_of(2)})
    (tmp_path / "manifest.json").unlink()  # which has the digest of what it was before
    rewritten(tmp_path / "c_2", CHANGES[change])
    assert "c_2" in falls_back(tmp_path)
    if change.split()[-1] != "file":
        with pytest.raises(CheckpointError):
            verify(tmp_path / "c_2")


def test_deep_metadata_count_as_damaged(tmp_path: Path) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    save(tmp_path / "c_2", {"model": model_of(2)})
    (tmp_path / "manifest.json").unlink()
    (tmp_path / "c_2" / "metadata.json").write_bytes(b'{"body":{"about":' + b"[" * 10**6 + b"]" * 10**6 + b"}}")
    assert "c_2" in falls_back(tmp_path)


def test_any_grid_of_parts_is_taken_and_any_overlap_is_not() -> None:
    class Part:
        def __init__(self, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> None:
            self.offsets, self.sizes, self.file, self.start = offsets, sizes, "f", 0
            self.num_bytes = 4 * sizes[0] * sizes[1]

    tree = {"type": "dict", "items": [["w", {"type": "tensor", "dtype": "float32", "shape": [4, 4]}]]}
    bricks = [((0, 0), (2, 1)), ((0, 1), (2, 3)), ((2, 0), (2, 3)), ((2, 3), (2, 1))]
    grid = [((row, column), (2, 2)) for row in (0, 2) for column in (0, 2)]
    rows = [((row, 0), (1, 4)) for row in (3, 0, 2, 1)]
    for boxes in (bricks, grid, rows, [((0, 0), (4, 4))], [*rows, ((4, 0), (0, 4))]):
        check_declared(tree, {"w": [Part(*box) for box in boxes]}, {"f": (64, "")})
    for boxes in ([grid[0], grid[1], grid[2], grid[2]], [rows[0], *rows[:3]], [bricks[0], bricks[0], *bricks[1:3]]):
        with pytest.raises(ValueError, match="overlap|make up"):
            check_declared(tree, {"w": [Part(*box) for box in boxes]}, {"f": (64, "")})


# -- files that have no end, or may not be read --------------------------------------------------------------------


@pytest.mark.parametrize("place", ["manifest.json", "c_2.pt", "c_2/metadata.json", "c_2/rank_00000.bin"])
@pytest.mark.parametrize("kind", ["pipe", "zero", "folder", "huge"])
def test_a_pipe_or_a_device_is_never_read(tmp_path: Path, place: str, kind: str) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    save(tmp_path / place.split("/")[0].replace("manifest.json", "d_2.pt"), {"model": model_of(2)})
    path = tmp_path / place
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zero":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:  # a hole of a terabyte
        with open(path, "wb") as file:
            file.truncate(1 << 40)
        if place == "c_2.pt":
            pytest.skip("it is read from its end, where there is nothing")
    model = model_of(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert Checkpoint.resume(tmp_path, {"model": model}, "c") == tmp_path / "c_1.pt"
    assert latest(tmp_path, "c") == tmp_path / "c_1.pt"
    for each in (tmp_path, path, path.parent):
        assert main(["inspect", str(each)]) in (0, 1, 2)
    if place == "c_2.pt":
        with pytest.raises(CheckpointError):
            load(path, {"model": model})
        with pytest.raises(CheckpointError):
            verify(path)
    elif place == "manifest.json" and kind != "folder":
        with pytest.warns(UserWarning, match="rebuilt"):
            save(tmp_path / "c_3.pt", {"model": model})
        assert manifest.scan(tmp_path).problem is None


@pytest.mark.parametrize("name", ["c_2.pt", "c_2"])
@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(5, "Input/output error")], ids=str)
def test_a_file_that_cannot_be_read_is_passed_over_like_a_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: OSError
) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    save(tmp_path / name, {"model": model_of(2)})
    real = os.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> int:
        if name in str(path):
            raise error
        return real(path, *arguments, **options)

    monkeypatch.setattr("os.open", refusing)
    said = falls_back(tmp_path)
    assert name in said
    assert error.strerror in said
    assert latest(tmp_path, "c") == tmp_path / "c_1.pt"
    (tmp_path / "c_1.pt").unlink()
    with pytest.raises(CorruptCheckpointError, match="is intact"):
        Checkpoint.resume(tmp_path, {"model": model_of(0)}, "c")


def test_a_part_that_cannot_be_read_is_passed_over_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    save(tmp_path / "c_2", {"model": model_of(2)})
    real = os.open

    def refusing(path: Any, *arguments: Any, **options: Any) -> int:
        if "rank_00000" in str(path):
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **options)

    monkeypatch.setattr("os.open", refusing)
    assert "Permission denied" in falls_back(tmp_path)


def test_a_folder_that_may_not_be_listed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})

    def refused(self: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", refused)
    for act in (lambda: Checkpoint.resume(tmp_path, {"model": model_of(0)}, "c"), lambda: latest(tmp_path, "c")):
        with pytest.raises(CheckpointError, match="cannot be read.*Permission denied"):
            act()
    assert main(["inspect", str(tmp_path)]) == 2


# -- another file than was saved -----------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [".pt", ""])
def test_an_older_file_under_a_newer_name_is_named_and_passed_over(tmp_path: Path, ending: str) -> None:
    for step in (1, 2):
        save(tmp_path / f"c_{step}{ending}", {"model": model_of(step)})
    newer = tmp_path / f"c_2{ending}"
    (shutil.rmtree if newer.is_dir() else os.unlink)(newer)
    (shutil.copytree if not ending else shutil.copy)(tmp_path / f"c_1{ending}", newer)
    model = model_of(0)
    for act in (lambda: verify(newer), lambda: load(newer, {"model": model})):
        with pytest.raises(CorruptCheckpointError, match=r"c_2.* is another file than was saved under this name"):
            act()
    with pytest.warns(UserWarning, match="another file than was saved"):
        assert Checkpoint.resume(tmp_path, {"model": model}, "c") == tmp_path / f"c_1{ending}"
    assert bool((model.weight == 1).all())
    assert latest(tmp_path, "c") == tmp_path / f"c_1{ending}"
    assert main(["inspect", str(tmp_path)]) == 1


@pytest.mark.parametrize("ending", [".pt", ""])
def test_one_saved_again_under_its_name_counts_before_the_manifest_has_it(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"c_1{ending}"
    save(path, {"model": model_of(1)})
    before = (tmp_path / "manifest.json").read_bytes()
    save(path, {"model": model_of(2)})
    (tmp_path / "manifest.json").write_bytes(before)  # as a kill between the two renames leaves it
    model = model_of(0)
    assert Checkpoint.resume(tmp_path, {"model": model}, "c") == path
    assert bool((model.weight == 2).all())
    verify(path)


def test_a_renamed_file_is_still_itself(tmp_path: Path) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    (tmp_path / "c_1.pt").rename(tmp_path / "mine.pt")
    load(tmp_path / "mine.pt", {"model": model_of(0)})


# -- the terminal ------------------------------------------------------------------------------------------------

EVIL = "\x1b[2J\x1b]0;title\x07\r\u202e\udc80"


def test_nothing_that_a_file_holds_commands_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class It:
        def state_dict(self) -> dict[str, Any]:
            return {EVIL[:-1]: EVIL[:-1], "w": {EVIL[:-1] + "t": torch.ones(1)}}

        def load_state_dict(self, state: Any) -> None: ...

    for ending in (".pt", ""):
        save(tmp_path / f"c_1{ending}", {"it\x1b[31m": It()})
    sealed(
        tmp_path / "c_3.pt", archive_of({"it": {}}), about(step=3, prefix=EVIL, objects=[EVIL], versions={EVIL: EVIL})
    )
    (tmp_path / "c_4\x1b[1m.pt").write_bytes(b"?")
    for path in (tmp_path, *tmp_path.glob("c_*")):
        main(["inspect", str(path)])
    shown = capsys.readouterr()
    assert "\\x1b[2J" in shown.out
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", shown.out + shown.err)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(CheckpointError) as refused:
            Checkpoint.resume(tmp_path, {"x": It()}, "c")
    assert "\x1b" not in str(refused.value) + "".join(str(each.message) for each in caught)
