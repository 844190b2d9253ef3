"""Recognise folders of shards, and verify every byte of them. No collective, and no tensor is made."""

import hashlib
import json
import os
from pathlib import Path

from dengine.checkpoint.disk.footer import Footer
from dengine.checkpoint.disk.regular import open_regular
from dengine.checkpoint.formats.sharded.files import FILE_NAME, METADATA, TABLE_NAME, as_corrupt, number, read_whole
from dengine.checkpoint.formats.sharded.saved import read_metadata
from dengine.errors import CorruptCheckpointError

__all__ = ["check_file", "check_length", "holds_shards", "is_shard_folder", "read_outline", "verify_shards"]

# The beginning of metadata.json: keys are sorted, and this is the first one.
_ABOUT = b'{"body":{"about":'
_ABOUT_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20


def is_shard_folder(path: Path, *, alone: bool = False) -> bool:
    """Whether `path` is a folder with files of a sharded checkpoint, damaged or not; `alone`: with no others."""
    if not path.is_dir():
        return False
    fitting = [name == METADATA or _is_rank_s(name) for name in os.listdir(path)]
    return any(fitting) and (all(fitting) or not alone)


def _is_rank_s(name: str) -> bool:
    return FILE_NAME.fullmatch(name) is not None or TABLE_NAME.fullmatch(name) is not None


def holds_shards(path: Path) -> bool:
    """Whether the folder `path` is, or was, a checkpoint. A `metadata.json` with other content does not count."""
    if not path.is_dir():
        return False
    names = os.listdir(path)
    if any(map(_is_rank_s, names)):
        return True
    if METADATA not in names:
        return False
    try:
        read_outline(path)
    except (CorruptCheckpointError, OSError):
        return False
    return True


def read_outline(folder: Path) -> Footer:
    """The description of the folder, not verified, with the SHA-256 of `metadata.json` and the bytes of all files.

    Cost: `metadata.json` is read, but only its beginning is parsed.

    Raises:
        CorruptCheckpointError: `metadata.json` is missing, or does not begin as it should. OSError: it cannot be read.
    """
    path = folder / METADATA
    with as_corrupt(path):
        raw = read_whole(path)
        if not raw.startswith(_ABOUT):
            raise ValueError("it does not begin with what it is about")
        about, _ = json.JSONDecoder().raw_decode(raw[len(_ABOUT) : len(_ABOUT) + _ABOUT_BYTES].decode("ascii"))
        about = dict(about)
        if "num_other_bytes" in about:  # of many ranks; to ask for each file would take long
            num_bytes = len(raw) + number(about.pop("num_other_bytes"))
        else:
            num_bytes = sum(each.stat().st_size for each in folder.iterdir())
        return Footer(about, hashlib.sha256(raw).hexdigest(), num_bytes)


def verify_shards(folder: Path) -> None:
    """Compare every file in `folder` with its digest. No collective: one rank suffices.

    Raises:
        FileNotFoundError: there is no such folder. CorruptCheckpointError: a file is missing or was changed; the
            message names it.
        ValueError: it is of another format, or of a machine with another byte order.
    """
    folder = Path(folder)
    for name, (num_bytes, sha256) in read_metadata(folder).files.items():
        check_file(folder / name, num_bytes, sha256)


def check_file(path: Path, num_bytes: int, sha256: str) -> None:
    """Verify a file.

    Raises:
        CorruptCheckpointError: the file is missing, has another length, or was changed.
    """
    check_length(path, num_bytes)
    digest = hashlib.sha256()
    try:
        with open_regular(path) as file:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
    except OSError as error:
        raise CorruptCheckpointError(f"{path} cannot be read: {error}") from error
    if digest.hexdigest() != sha256:
        raise CorruptCheckpointError(f"{path} was changed: its SHA-256 is {digest.hexdigest()}, not {sha256}.")


def check_length(path: Path, num_bytes: int) -> None:
    """Check the length of a file.

    Raises:
        CorruptCheckpointError: the file is missing, or has another length.
    """
    if not path.is_file():
        raise CorruptCheckpointError(f"{path} is missing.")
    if path.stat().st_size != num_bytes:
        raise CorruptCheckpointError(f"{path} has {path.stat().st_size} bytes, but was written with {num_bytes}.")
