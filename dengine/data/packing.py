"""Join documents of token ids into sequences of one length, beginning at any position inside a document."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, default_collate, get_worker_info

from dengine import torch_internals
from dengine.checks import whole_number
from dengine.data.permutation import Permutation
from dengine.data.seeding import EpochIndex, SeededDataset, draws_nothing, set_epoch_of
from dengine.data.self_sharding import divides_by_worker, shards_itself
from dengine.data.stateful import forget_position, inexactness, keeps_position
from dengine.launch.world import world
from dengine.naming import a_type, type_name

__all__ = ["PackedSequences", "pack_sequences"]

_Ids: TypeAlias = "np.ndarray[Any, Any]"

_VERSION = 1  # of the state
_MOST_AHEAD = 32  # documents fetched at a time, if they have numbers: one at first, then more
_NUM_COMPARED = 8  # tokens before the position, by which a resumed run knows the document again


def pack_sequences(
    dataset: Iterable[Any] | Dataset[Any],
    length: int,
    *,
    key: str = "input_ids",
    end_token: int | None = None,
    pad_token: int | None = None,
    shuffle: bool = False,
    seed: int = 0,
) -> "PackedSequences":
    """An iterable data set of int64 tensors `(length,)`: the documents of `dataset`, one after the other, cut there.

    A document is a list, an array or a tensor of token ids, or a dict that has one under `key` (as Hugging Face's
    tokenisers give). `dataset` is a list or a map-style data set of them (`[np.memmap(...)]` is one long document, of
    which only the pieces are read), or something that can be iterated over more than once.

    For a loss of next tokens ask for one token more than the model's context: inputs are `piece[:-1]`, targets
    `piece[1:]`.

    With `prepare_data_loader` the global batches are the same for any number of ranks and workers: each reads all
    documents, and keeps its turns. A source that shards itself (Hugging Face's after `split_dataset_by_node`) is packed
    on each rank by itself, which reads each document on one rank only; MosaicML's streams in each worker. In another
    loader the workers take turns by piece.

    What is left at the end of an epoch, less than `length`, is dropped; with `pad_token` it is filled up with that.

    `set_epoch` is passed on to the source. `state_dict` gives the position of the last iteration, inside a document;
    after `load_state_dict` the next one goes on from there, unless another epoch is set.

    Args:
        end_token: put after each document.
        shuffle: a new order of the documents each epoch, the same on all ranks; for sources with numbered documents.
            Others shuffle by themselves, by `set_epoch`.
        seed: of that order, and of what the source draws at random for a document (from `seed`, the epoch and the
            document alone).

    Raises:
        TypeError, ValueError: a wrong argument; an iterator, which could be read once only; `shuffle` on a stream.
            While iterating: a document that is none; documents that have less than `length` tokens together.

    Cost: to go on from a state takes O(1) for numbered documents and for a source with a state of its own; documents of
    other sources are drawn and dropped, with a warning. A piece of 1024 tokens takes 5 us from arrays, 20 from Python
    lists.

    Example:
        >>> packed = pack_sequences([[1, 2, 3], [4, 5, 6, 7]], 4, end_token=0)
        >>> [piece.tolist() for piece in packed]
        [[1, 2, 3, 0], [4, 5, 6, 7]]
        >>> state = packed.state_dict()
        >>> [piece.tolist() for piece in pack_sequences([[1, 2, 3], [4, 5, 6, 7]], 4, pad_token=9, end_token=0)][-1]
        [0, 9, 9, 9]
    """
    return PackedSequences(
        dataset, length, key=key, end_token=end_token, pad_token=pad_token, shuffle=shuffle, seed=seed
    )


class PackedSequences(IterableDataset[Tensor]):
    """What `pack_sequences` gives; `dataset` is the source of its documents."""

    def __init__(
        self,
        dataset: Iterable[Any] | Dataset[Any],
        length: int,
        *,
        key: str = "input_ids",
        end_token: int | None = None,
        pad_token: int | None = None,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        _check_source(dataset, shuffle)
        self.dataset: Any = dataset
        self.length = whole_number("length", length, least=1)
        self.key = key
        self.end_token = None if end_token is None else whole_number("end_token", end_token, least=None)
        self.pad_token = None if pad_token is None else whole_number("pad_token", pad_token, least=None)
        self.shuffle = shuffle
        self.seed = whole_number("seed", seed, least=None)
        self._epoch = 0
        self._start: dict[str, Any] | None = None  # the state from which the next iteration goes on
        self._pieces: _Pieces | None = None  # the last iteration

    @property
    def shards_itself(self) -> bool:
        """Whether the source gives each rank its own documents."""
        return shards_itself(self.dataset, world())

    @property
    def is_alike_in_workers(self) -> bool:
        """Whether `undivided` gives the same pieces in all workers."""
        return not divides_by_worker(self.dataset)

    @property
    def draws_alone(self) -> bool:
        """Whether what the source draws at random follows from the document, whatever the generators are."""
        return _has_numbers(self.dataset)

    @property
    def state_is_exact(self) -> bool:
        """True: if the state of the source is not exact, its documents are counted."""
        return True

    def __iter__(self) -> Iterator[Tensor]:
        pieces = self.undivided()
        worker = get_worker_info()
        if worker is None or divides_by_worker(self.dataset):
            return pieces
        return _turns(pieces, worker.id, worker.num_workers)

    def undivided(self) -> "Iterator[Tensor]":
        """The pieces, in a worker all of them as well. Whoever asks for them deals them out."""
        self._start, start = None, self._start
        self._pieces = _Pieces(self, self._epoch, start)
        return self._pieces

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration one of `epoch`, from its beginning unless a state of that epoch was loaded."""
        if self._start is not None and self._start["epoch"] != epoch:
            self._start = None
        self._epoch = epoch
        set_epoch_of(self.dataset, epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position of the last iteration after the last piece that it gave, as plain values."""
        if self._start is not None:
            return self._start
        pieces = self._pieces or _Pieces(self, self._epoch, None)
        return {"version": _VERSION, "kind": self._kind(), **pieces.state()}

    def check_state(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that `load_state_dict` does not take.

        Raises:
            ValueError: it is no state of this kind, or one of other settings or of another number of documents.
        """
        if not isinstance(state, Mapping) or state.get("version") != _VERSION or "kind" not in state:
            found = sorted(map(str, state)) if isinstance(state, Mapping) else a_type(state)
            raise ValueError(
                f"This is no state of pack_sequences() of version {_VERSION}: it is {found}, version "
                f"{state.get('version') if isinstance(state, Mapping) else None}. Load what its state_dict() gave, or "
                "begin the epoch anew without it."
            )
        mine = self._kind()
        changes = [
            f"{name} was {was!r} and is {mine.get(name)!r}"
            for name, was in state["kind"].items()
            if was != mine.get(name)
        ]
        if changes:
            raise ValueError(
                f"The state is of other data than this pack_sequences(): {'; '.join(changes)}. Build it as it was "
                "then, or begin the epoch anew without the state."
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Make the next iteration go on from where `state` was taken. Raises: ValueError: as `check_state`."""
        self.check_state(state)
        self._start = dict(state)
        self._epoch = state["epoch"]
        set_epoch_of(self.dataset, self._epoch)

    def _kind(self) -> dict[str, Any]:
        """The settings that a state is for."""
        return {
            "length": self.length,
            "end_token": self.end_token,
            "pad_token": self.pad_token,
            "shuffle": self.shuffle,
            "seed": self.seed if self.shuffle else None,
            "num_documents": len(self.dataset) if _has_numbers(self.dataset) else None,
            "has_own_state": _has_own_state(self.dataset),
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_pieces": None}


class _Pieces(Iterator[Tensor]):
    """One iteration: the pieces from a position on, which `state` gives after each."""

    def __init__(self, packed: PackedSequences, epoch: int, start: dict[str, Any] | None) -> None:
        self._packed = packed
        self._epoch = epoch
        self._num_pieces = 0 if start is None else start["pieces"]
        self._num_documents = 0  # drawn from the source, the present one included
        self._ids: _Ids = np.empty(0, np.int64)  # of the present document
        self._offset = 0  # what of it, and of the end token after it, was given
        self._documents: Iterator[Any] | None = None
        self._start = start

    @property
    def num_pieces(self) -> int:
        """The pieces of the epoch so far."""
        return self._num_pieces

    def __next__(self) -> Tensor:
        documents = self._documents
        if documents is None:
            documents = self._documents = self._started()
        parts: list[_Ids] = []
        missing = self._packed.length
        while missing:
            part = self._taken(missing)
            if part.size:
                parts.append(part)
                missing -= part.size
            elif not self._has_next(documents):
                return self._last(parts, missing)
        self._num_pieces += 1
        return _joined(parts)

    def state(self) -> dict[str, Any]:
        """The position, as plain values."""
        if self._documents is None and self._start is not None:
            return {name: self._start[name] for name in self._start if name not in ("version", "kind")}
        dataset = self._packed.dataset
        # That of a stream that is not begun is where its last pass has ended.
        own = dataset.state_dict() if self._documents is not None and _has_own_state(dataset) else None
        before = self._ids[max(0, self._offset - _NUM_COMPARED) : self._offset].tolist()
        return {
            "epoch": self._epoch,
            "pieces": self._num_pieces,
            "documents": self._num_documents,
            "offset": self._offset,
            "before": before,
            # The state of a source is after the present document, the rest of which is kept with it.
            "source": own,
            "rest": None if own is None else torch.from_numpy(self._ids[self._offset :].astype(np.int64)),
            "needs_end": own is not None and self._num_documents > 0 and self._offset <= self._ids.size,
        }

    def _started(self) -> Iterator[Any]:
        """The documents after the position of the start, whose own document is the present one."""
        start, dataset = self._start, self._packed.dataset
        if start is None:
            return self._drawn(0)
        self._num_documents = start["documents"]
        if start["source"] is not None:
            dataset.load_state_dict(start["source"])
            self._ids = start["rest"].numpy()
            self._offset = 0 if start["needs_end"] else self._size
            return self._drawn(0)
        if not self._num_documents:
            return self._drawn(0)
        documents = self._drawn(self._num_documents - 1)
        self._num_documents -= 1
        if not self._has_next(documents) or self._offset_is_wrong(start):
            raise ValueError(
                f"The state was taken inside document {start['documents'] - 1} of the epoch, after the tokens "
                f"{start['before']}, but that document "
                f"{'has others there' if self._num_documents == start['documents'] else 'is not there any more'}: the "
                "source is not what it was, or not in the same order. Build it as it was then, or begin the epoch anew "
                "without the state."
            )
        self._offset = start["offset"]
        return documents

    def _offset_is_wrong(self, start: dict[str, Any]) -> bool:
        offset: int = start["offset"]
        before = self._ids[max(0, offset - _NUM_COMPARED) : offset].tolist()
        return offset > self._size or before != start["before"]

    def _drawn(self, first: int) -> Iterator[Any]:
        """The documents from number `first` on, as the source gives them."""
        packed = self._packed
        if _has_numbers(packed.dataset):
            return _numbered(packed, self._epoch, first)
        with _alone(packed.dataset):
            documents: Iterator[Any] = iter(packed.dataset)
            if first:
                warnings.warn(
                    f"To go on inside a document, {first} documents are drawn from the {type_name(packed.dataset)} and "
                    "dropped: it has neither numbered documents nor an exact state of its own.",
                    RuntimeWarning,
                    stacklevel=2,
                )
                next(islice(documents, first, first), None)
        return documents

    def _has_next(self, documents: Iterator[Any]) -> bool:
        """Draw the next document, and give whether there was one."""
        with _alone(self._packed.dataset):
            try:
                document = next(documents)
            except StopIteration:
                return False
        if self._start is not None and self._start["source"] is not None:
            forget_position(self._packed.dataset)  # which the next pass would go on from as well
        self._num_documents += 1
        self._ids, self._offset = _ids_of(document, self._packed.key, self._num_documents - 1), 0
        return True

    @property
    def _size(self) -> int:
        """The number of tokens of the present document, with the end token after it."""
        return self._ids.size + (self._packed.end_token is not None and self._num_documents > 0)

    def _taken(self, most: int) -> _Ids:
        """The next tokens of the present document, at most as many as wanted; none at its end."""
        part: _Ids = self._ids[self._offset : self._offset + most]
        if part.size < most and self._offset + part.size < self._size:
            part = np.concatenate([part.astype(np.int64), np.full(1, self._packed.end_token)])
        self._offset += part.size
        return part

    def _last(self, parts: list[_Ids], missing: int) -> Tensor:
        """The piece that is filled up at the end. Raises: StopIteration: there is none."""
        packed = self._packed
        if parts and packed.pad_token is not None:
            self._num_pieces += 1
            return _joined([*parts, np.full(missing, packed.pad_token)])
        if self._num_pieces == 0 and not packed.shards_itself:  # else another rank may have some
            raise ValueError(
                f"The {self._num_documents} documents have {packed.length - missing} tokens together, less than one "
                f"piece of length={packed.length}: take a smaller length, or pad_token= to fill it up."
            )
        raise StopIteration


def _check_source(dataset: object, shuffle: bool) -> None:
    if isinstance(dataset, Mapping):
        raise TypeError(
            f"pack_sequences() takes the documents themselves, but got a {type_name(dataset)} of {sorted(dataset)}: "
            "choose one of them."
        )
    if isinstance(dataset, Iterator):
        raise TypeError(
            f"pack_sequences() takes documents that can be read once an epoch, but got {a_type(dataset)}, which can be "
            "read once: give it a list, a data set, or a class whose __iter__ begins anew."
        )
    if isinstance(dataset, str | bytes) or not (hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")):
        raise TypeError(f"pack_sequences() takes a data set of documents, but got {a_type(dataset)}.")
    if shuffle and not _has_numbers(dataset):
        raise ValueError(
            f"shuffle=True needs documents that can be asked for by their number, but {a_type(dataset)} is a stream: "
            "shuffle it by its own means, by the epoch that its set_epoch() is told."
        )


def _has_numbers(dataset: Any) -> bool:
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        return False
    return isinstance(dataset, Sequence | Dataset) or hasattr(dataset, "__getitem__")


def _has_own_state(dataset: Any) -> bool:
    """Whether a source is at its position again after it was given its own state."""
    return not _has_numbers(dataset) and keeps_position(dataset) and inexactness(dataset) is None


def _numbered(packed: PackedSequences, epoch: int, first: int) -> Iterator[Any]:
    """The documents of a source with numbers, in the order of `epoch`, from the position `first` on."""
    dataset = packed.dataset
    size = len(dataset)
    order = Permutation(size, packed.seed, epoch) if packed.shuffle else None
    fetch: Callable[[list[int]], Iterable[Any]]
    if draws_nothing(dataset, default_collate):
        fetch = lambda numbers: map(dataset.__getitem__, numbers)  # noqa: E731
    else:
        seeded = SeededDataset(dataset, packed.seed)
        fetch = lambda numbers: seeded.__getitems__(list(map(EpochIndex.of(epoch), numbers)))  # noqa: E731
    ahead = 1
    while first < size:
        positions = np.arange(first, min(first + ahead, size))
        yield from fetch((positions if order is None else order(positions)).tolist())
        first, ahead = first + ahead, min(2 * ahead, _MOST_AHEAD)


def _alone(dataset: object) -> AbstractContextManager[None]:
    """A context in which a source, in a worker, gives all of its documents, and not the worker's part."""
    if get_worker_info() is None or divides_by_worker(dataset):
        return nullcontext()
    return torch_internals.outside_worker()


def _turns(pieces: Iterator[Tensor], first: int, num_turns: int) -> Iterator[Tensor]:
    """Every `num_turns`-th piece of the epoch, from number `first` on."""
    assert isinstance(pieces, _Pieces)
    while True:
        is_mine = pieces.num_pieces % num_turns == first
        piece = next(pieces, None)
        if piece is None:
            return
        if is_mine:
            yield piece


def _joined(parts: list[_Ids]) -> Tensor:
    return torch.from_numpy(np.concatenate([part.astype(np.int64, copy=False) for part in parts]))


def _ids_of(document: Any, key: str, number: int) -> _Ids:
    """The token ids of a document, in an array of its own type: of a file in memory only pieces are read.

    Raises: TypeError: it has none.
    """
    value = document
    if isinstance(document, Mapping):
        if key not in document:
            raise TypeError(
                f"Document {number} has no {key!r}: it has {sorted(map(str, document))}. Name the one with the token "
                "ids by key=."
            )
        value = document[key]
    try:
        ids = np.asarray(value.numpy() if isinstance(value, Tensor) else value)
    except (TypeError, ValueError, RuntimeError):  # a ragged list, a tensor on another device
        ids = np.empty((0, 0))
    if ids.ndim == 1 and ids.size == 0:
        return ids.astype(np.int64)  # of an empty list
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        shown = f"{ids.dtype} {ids.shape}" if ids.size else repr(value)[:60]
        raise TypeError(
            f"Document {number} is no row of token ids: it is {a_type(value)}, {shown}. Give each document as a list, "
            "an array or a CPU tensor of whole numbers (for one long document: [ids])."
        )
    return ids
