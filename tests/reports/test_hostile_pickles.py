"""The pickle inside a file whose digest is right: what it calls takes no memory for what is not in the file."""

import io
import struct
import tempfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dengine.checkpoint import load, save
from dengine.checkpoint.disk.archive import check_archive, check_calls
from dengine.checkpoint.disk.footer import write_footer
from dengine.checkpoint.disk.hashing import HashingWriter
from dengine.errors import CheckpointError
from dengine.handlers import Checkpoint

ABOUT = {
    "format": 1,
    "prefix": "c",
    "step": 2,
    "score": None,
    "score_name": None,
    "sequence": 2,
    "objects": ["model"],
    "world_size": 1,
    "versions": {},
}
MUCH = 10**9


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def called(module: str, name: str, *arguments: bytes, by: bytes = b"R") -> bytes:
    return f"c{module}\n{name}\n".encode() + b"(" + b"".join(arguments) + b"t" + by


def doubled(times: int) -> bytes:
    value = b"U\x04abcd"
    for _ in range(times):
        value = called("_codecs", "encode", value, text("hex"))
    return value


def copied(times: int) -> bytes:
    whole = b"(" + text("x" * 100_000) + b"q\x01" + text("latin1") + b"q\x02t0"
    return whole + b"](" + b"c_codecs\nencode\nh\x01h\x02\x86R" * times + b"e"


HUGE = number(MUCH)
CALLS = {
    "bytearray": called("builtins", "bytearray", HUGE),
    "bytearray by its old name": called("__builtin__", "bytearray", HUGE),
    "bytearray made anew": called("builtins", "bytearray", HUGE, by=b"\x81"),
    "bytearray from the memo": b"c__builtin__\nbytearray\nq\x010h\x01" + HUGE + b"\x85R",
    "bytearray in a list": b"](" + called("builtins", "bytearray", HUGE) + b"e",
    "tensor": called("torch", "Tensor", HUGE),
    "tensor made anew": called("torch", "Tensor", number(4), number(4), by=b"\x81"),
    "tensor of a type": called("torch", "DoubleTensor", HUGE),
    "storage": called("torch.storage", "UntypedStorage", HUGE),
    "typed storage": called("torch.storage", "TypedStorage", HUGE),
    "doubled": doubled(22),
    "copied": copied(3000),
}


def written(path: Path, pickle: bytes) -> None:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_STORED) as archive:
        for name, part in (("data.pkl", pickle), ("byteorder", b"little"), ("data/0", b"\0" * 64), ("version", b"3\n")):
            archive.writestr(f"archive/{name}", part)
    with open(path, "wb") as file, HashingWriter(file.fileno()) as whole:
        whole.write(content.getvalue()[:-22])
        whole.write(content.getvalue()[-22:])
        write_footer(whole, ABOUT)


def model_of(value: float) -> nn.Linear:
    model = nn.Linear(4, 4)
    nn.init.constant_(model.weight, value)
    return model


@pytest.mark.parametrize("name", list(CALLS))
def test_a_pickle_that_asks_for_memory_is_damage_and_gets_none(tmp_path: Path, name: str) -> None:
    save(tmp_path / "c_1.pt", {"model": model_of(1)})
    written(tmp_path / "c_2.pt", b"\x80\x02}" + text("model") + CALLS[name] + b"s.")
    model = model_of(0)
    tracemalloc.start()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert Checkpoint.resume(tmp_path, {"model": model}, "c") == tmp_path / "c_1.pt"
        with pytest.raises(CheckpointError, match="torch.save never"):
            load(tmp_path / "c_2.pt", {"model": model})
        assert tracemalloc.get_traced_memory()[1] < 300_000_000  # most of it to hash the file
    finally:
        tracemalloc.stop()
    assert "c_2.pt" in str(caught[0].message)
    assert bool((model.weight == 1).all())


class Holder:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["value"]


def with_attribute() -> torch.Tensor:
    tensor: Any = torch.ones(2)
    tensor.note = "kept"
    return tensor


@pytest.mark.parametrize(
    "value",
    [
        bytearray(b"some"),
        bytearray(),
        [bytearray(b"one"), bytearray(b"two"), bytearray(b"one")],
        b"some",
        [b"a", b"b\xff", "encode"],
        {"Tensor": 1 << 70, "c\nbytearray\n": -5},
        {1, 2},
        complex(1, 2),
        torch.Size([2, 3]),
        torch.float16,
        torch.device("cpu"),
    ],
    ids=str,
)
def test_what_a_save_writes_is_taken(tmp_path: Path, value: Any) -> None:
    save(tmp_path / "c_1.pt", {"it": Holder(value)})
    holder = Holder(None)
    load(tmp_path / "c_1.pt", {"it": holder})
    assert holder.state == value


@pytest.mark.parametrize(
    "tensor",
    [with_attribute(), nn.Parameter(torch.ones(2)), torch.ones(2).to_sparse(), torch.ones(2, dtype=torch.bfloat16)],
    ids=["attribute", "parameter", "sparse", "bfloat16"],
)
def test_every_tensor_that_a_save_writes_is_taken(tmp_path: Path, tensor: torch.Tensor) -> None:
    save(tmp_path / "c_1.pt", {"it": Holder([tensor, bytearray(b"x")])})
    holder = Holder(None)
    load(tmp_path / "c_1.pt", {"it": holder})
    assert torch.equal(holder.state[0].to_dense(), tensor.detach().to_dense())


@pytest.mark.parametrize(
    "pickle", [b"cbuiltins\nbytearray\nR.", b"cbuiltins\nbytearray\nh\x01.", b"cbuiltins\nbytearray\ne."]
)
def test_a_pickle_without_sense_is_told_so(pickle: bytes) -> None:
    with pytest.raises(ValueError, match="pickle"):
        check_calls(pickle)


def test_an_archive_behind_something_else_is_refused() -> None:
    content = io.BytesIO()
    torch.save({"model": {}}, content)
    check_archive(_file(content.getvalue()))
    with pytest.raises(ValueError, match="begin with"):
        check_archive(_file(b"another archive" + content.getvalue()))


def _file(content: bytes) -> Any:
    file = tempfile.TemporaryFile()  # noqa: SIM115 - it is closed with its last reference
    file.write(content)
    file.seek(0)
    return file
