"""A checkpoint's way to the disk: collect, write, commit, agree, prune. folder.py has that of sharded ones.

`collect` (states/snapshot.py) is for all ranks; `write`, `commit` and `prune` are for the one that writes and touch no
rank; `agree` tells all ranks what became of it.
"""

import functools
import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from dengine.checkpoint.catalogue import manifest
from dengine.checkpoint.catalogue.manifest import Entry
from dengine.checkpoint.disk import atomic as storage
from dengine.checkpoint.disk.footer import SealedFile
from dengine.checkpoint.disk.hashing import DigestedFile
from dengine.checkpoint.formats.sharded.tree import all_tensors
from dengine.checkpoint.states.plain import refuse_pickles
from dengine.checkpoint.states.snapshot import States
from dengine.comm.outcome import from_rank_zero
from dengine.distributed import world
from dengine.errors import CheckpointError

__all__ = ["agree", "commit", "failure_text", "planned", "prune", "write"]

T = TypeVar("T")

# One file is written at a time by a process: its switch for torch's own checksums is one for all threads.
_writing = threading.Lock()
# The manifest is read, changed and replaced: two threads at once would lose what one of them adds.
_listing = threading.Lock()


_PLAIN_LEAVES = (torch.Tensor, nn.Parameter, str, bool, int, float, type(None))


def planned(
    path: Path,
    prefix: str,
    step: int | None,
    score: float | None,
    score_name: str | None,
    objects: tuple[str, ...],
    sequence: int,
    writer: str = "",
) -> Entry:
    """The entry of a file that is yet to be written by this process."""
    versions = {"dengine": _version(), "torch": str(torch.__version__)}
    return Entry(path.name, prefix, step, score, score_name, sequence, objects, world().size, versions, writer=writer)


def write(states: States, path: Path, entry: Entry) -> tuple[Path, Path, Entry]:
    """Write the temporary file beside `path`, down to the disk: its path, `path`, and the entry with its digest.

    What could not be loaded again is refused before a byte is written. Leftovers of killed runs are removed first: they
    may be what fills the disk.

    Raises:
        Exception: an object cannot be pickled, or the disk is full; no temporary file is left.
    """
    for name, state in states.items():
        _check_loadable(name, state)
    if path.parent.is_dir():
        storage.remove_leftovers(path.parent)

    def fill(descriptor: int) -> Entry:
        with DigestedFile(descriptor, _num_bytes(states)) as digested:
            file = SealedFile(digested)
            try:
                with _without_checksums():
                    torch.save(states, file)  # type: ignore[arg-type]
                seal = file.seal(manifest.about(entry))
            except Exception:
                if file.error is not None:
                    raise file.error from None
                raise
        return replace(entry, sha256=seal.sha256, num_bytes=seal.num_bytes)

    with _writing:
        temporary, sealed = storage.write_beside(path, fill)
    return temporary, path, sealed


def commit(temporary: Path, path: Path, entry: Entry, dropped: Sequence[Entry]) -> Entry:
    """Give the file or folder its name, then list it in the manifest, without those that are to go. Gives `entry`.

    The manifest is written before either gets its name, so that a full disk is met before anything has changed. What
    fails is undone; an interrupt undoes nothing, and leaves what a kill would: a whole file, which is listed or found.
    """
    folder = path.parent
    with _listing:
        try:
            names = {one.name for one in dropped}
            text = manifest.manifest_text(manifest.listing(folder, [entry], names))
            listed, _ = storage.write_beside(folder / manifest.FILE_NAME, lambda descriptor: _put(descriptor, text))
        except BaseException:
            _give_up(temporary)
            raise
        is_new = not path.exists()
        try:
            storage.commit(temporary, path)
        except BaseException:
            _give_up(listed)
            raise
        try:
            storage.commit(listed, folder / manifest.FILE_NAME)
        except Exception:
            if is_new:
                _take_back(path)
            raise
    return entry


def _give_up(temporary: Path) -> None:
    storage.discard(temporary)
    storage.end(temporary)


def _take_back(path: Path) -> None:
    """Remove the file or folder, and the manifest where it lists that already: it is rebuilt from what there is."""
    if path.name in manifest.survey(path.parent).listed:
        storage.discard(path.parent / manifest.FILE_NAME)
    storage.remove(path)


def prune(folder: Path, dropped: Sequence[Entry]) -> None:
    """Remove what the new file has made superfluous. What cannot be is warned of, and tried again after a restart."""
    for one in dropped:
        try:
            storage.remove(folder / one.name)
        except OSError as error:
            warnings.warn(f"The superfluous checkpoint {folder / one.name} stays: {error}", stacklevel=2)


def agree(action: Callable[[], T], path: Path) -> T:
    """Rank 0's result of `action`, on every rank. Collective: one small broadcast.

    Raises:
        CheckpointError: on every rank, where it failed, with the reason.
    """
    return from_rank_zero(action, f"save {path}", lambda error: (CheckpointError, failure_text(path, error)))


def failure_text(path: Path, error: BaseException) -> str:
    return f"{path} could not be saved, and nothing was changed: {type(error).__qualname__}: {error}"


def _check_loadable(name: str, state: Any) -> None:
    if not _is_plain(state):  # a trial costs more than a small model's bytes
        refuse_pickles(name, state)


def _is_plain(value: Any) -> bool:
    """Whether there is nothing in `value` but what can be loaded for certain; of anything else, a trial tells."""
    kind = type(value)
    if kind in _PLAIN_LEAVES:
        return True
    if kind is dict or kind is OrderedDict:
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values())) and all(map(_is_plain, _more(value)))
    if kind is list or kind is tuple:
        return all(map(_is_plain, value))
    return False


def _more(value: Any) -> list[Any]:
    """What a dict has besides its items: of a module's state, the versions (`_metadata`)."""
    return list(getattr(value, "__dict__", {}).values())


def _num_bytes(states: States) -> int:
    """Of all tensors: at least so long is the file."""
    storages = {}
    for tensor in all_tensors(states):
        if tensor.layout == torch.strided and not hasattr(tensor, "__tensor_flatten__"):  # else it has no address
            storage = tensor.untyped_storage()
            storages[tensor.device, storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Without the CRC-32 of each tensor in the archive: nobody checks it, and it costs half of the time of a save.

    A `torch.save` of another thread meanwhile leaves them out too, which `torch.load` does not mind.
    """
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _put(descriptor: int, text: bytes) -> None:
    while text:
        text = text[os.write(descriptor, text) :]


@functools.cache
def _version() -> str:
    try:
        return version("dengine")
    except PackageNotFoundError:
        return "unknown"
