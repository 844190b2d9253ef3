"""A footer that makes a file verifiable: its description, and the SHA-256 of all its bytes.

`torch.save` writes a zip archive, which may end with a comment that readers ignore. The comment has, as text, a JSON
object (step, score, versions, ...), its length, and the digest of everything before the digest:

    zip archive | JSON | "dengine1" | length of the JSON, 8 hex digits | SHA-256, 64 hex digits

So one pass writes and hashes, no second file is needed to tell a complete file from a damaged one, and
`torch.load(path, weights_only=True)` reads it. In a shell, `head -c -64 FILE | sha256sum` and `tail -c 64 FILE` give
the same digest.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from dengine.checkpoint.disk.hashing import HashingWriter
from dengine.errors import CorruptCheckpointError

__all__ = ["Footer", "check_footer", "read_footer", "write_footer"]

_MAGIC = b"dengine1"
_LENGTH = re.compile(rb"[0-9a-f]{8}")
_DIGEST_BYTES = 64  # of its text
_FOOTER_BYTES = len(_MAGIC) + 8 + _DIGEST_BYTES
_ZIP_END_BYTES = 22  # the archive's last record; its last two bytes are the length of the comment
_READ_BYTES = 4 << 20


@dataclass(frozen=True)
class Footer:
    """The footer of a file: `about` (its JSON), its digest as text, its length in bytes."""

    about: dict[str, object]
    sha256: str
    num_bytes: int


def write_footer(file: HashingWriter, about: dict[str, object]) -> Footer:
    """End the archive that `torch.save` has written with `about` and the digest; `file` is complete then, but not on
    the disk.

    Raises:
        ValueError: `about` does not fit into a zip comment (64 kB). OSError: the disk is full.
    """
    text = json.dumps(about, sort_keys=True, separators=(",", ":")).encode()
    length = len(text) + _FOOTER_BYTES
    if length > 0xFFFF:
        raise ValueError(f"The description of a checkpoint takes {length} bytes, of which 65535 can be kept.")
    end = file.take_back(_ZIP_END_BYTES)  # torch.save writes it as a part of its own
    assert end.startswith(b"PK\x05\x06"), "torch.save wrote something else than a zip archive"
    assert end.endswith(b"\0\0"), "the zip archive has a comment already"
    digest = file.end_with_digest(end[:-2] + length.to_bytes(2, "little") + text + _MAGIC + b"%08x" % len(text))
    return Footer(about, digest, file.num_bytes)


def read_footer(file: BinaryIO, path: Path) -> Footer:
    """What the file says about itself, not yet proven. Cost: two reads at its end.

    Raises:
        CorruptCheckpointError: it does not end as a checkpoint does. OSError: it cannot be read.
    """
    num_bytes = file.seek(0, os.SEEK_END)
    if num_bytes < _ZIP_END_BYTES + _FOOTER_BYTES:
        raise CorruptCheckpointError(f"{path} is truncated: it has {num_bytes} bytes, too few for any checkpoint.")
    file.seek(-_FOOTER_BYTES, os.SEEK_END)
    footer = file.read(_FOOTER_BYTES)
    magic, length, digest = footer[:8], footer[8:16], footer[16:]
    try:
        if magic != _MAGIC:
            raise ValueError(magic)
        if not _LENGTH.fullmatch(length) or int(length, 16) > 0xFFFF:  # what a zip comment can have
            raise ValueError(length)
        start = num_bytes - _FOOTER_BYTES - int(length, 16)
        file.seek(start)
        about = json.loads(file.read(num_bytes - _FOOTER_BYTES - start))
        if not isinstance(about, dict):
            raise ValueError(about)
        return Footer(about, digest.decode("ascii"), num_bytes)
    except (ValueError, OSError, RecursionError) as error:  # no number, a place before the file, no text, no JSON
        if isinstance(error, OSError) and error.errno != 22:
            raise
        raise CorruptCheckpointError(
            f"{path} ({num_bytes} bytes) does not end with dengine's digest: it is truncated, its end was changed, or "
            "something else wrote it (then read it with torch.load(path, weights_only=True))."
        ) from None


def check_footer(file: BinaryIO, path: Path) -> Footer:
    """Read all of the file, and compare it with its digest. Cost: one read, one SHA-256 (about 1 GB/s).

    Raises:
        CorruptCheckpointError: a byte is missing or was changed. OSError: it cannot be read.
    """
    footer = read_footer(file, path)
    found = hashlib.sha256()
    file.seek(0)
    buffer = memoryview(bytearray(_READ_BYTES))
    left = footer.num_bytes - _DIGEST_BYTES
    while left > 0:
        count = file.readinto(buffer[: min(left, _READ_BYTES)])  # type: ignore[attr-defined]
        if not count:
            raise CorruptCheckpointError(f"{path} was truncated while it was read: {left} bytes are missing.")
        found.update(buffer[:count])
        left -= count
    if found.hexdigest() != footer.sha256:
        raise CorruptCheckpointError(
            f"{path} was changed after it was saved: its {footer.num_bytes} bytes have SHA-256 "
            f"{found.hexdigest()[:16]}..., but it says {footer.sha256[:16]}... ."
        )
    return footer
