"""Documents joined to sequences of one length: which pieces, from which position, in which worker."""

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

import dengine
from dengine.data import pack_sequences
from dengine.distributed import prepare_data_loader

# Empty ones, one of a single token, several in one piece, one over several pieces: 1 2 3 | 4 | 5 ... 15 | 16 17
DOCUMENTS = [[], [1, 2, 3], [4], [], list(range(5, 16)), [16, 17], []]


def pieces_of(packed: Any) -> list[list[int]]:
    return [piece.tolist() for piece in packed]


def joined(documents: list[list[int]], length: int, end: int | None, pad: int | None) -> list[list[int]]:
    """The oracle: one list, cut."""
    tokens = [token for each in documents for token in (*each, *([] if end is None else [end]))]
    if pad is not None:
        tokens += [pad] * (-len(tokens) % length)
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]


class MapStyle(Dataset[Any]):
    def __init__(self, documents: list[Any]) -> None:
        self.documents = documents
        self.epoch = -1
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int) -> Any:
        self.asked.append(index)
        return {"text": "...", "input_ids": self.documents[index]}

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Stream(IterableDataset[Any]):
    def __init__(self, documents: list[Any]) -> None:
        self.documents = documents
        self.num_drawn = 0

    def __iter__(self) -> Iterator[Any]:
        for document in self.documents:
            self.num_drawn += 1
            yield torch.tensor(document, dtype=torch.int32)


class Stateful(IterableDataset[Any]):
    """Rotates its documents by the epoch."""

    def __init__(self, documents: list[Any], *, is_exact: bool = True) -> None:
        self.documents = documents
        self.epoch, self.position, self.begin_at = 0, 0, 0
        self.num_drawn = 0
        self.state_is_exact = is_exact

    def __iter__(self) -> Iterator[Any]:
        self.position, self.begin_at = self.begin_at, 0
        order = np.roll(np.arange(len(self.documents)), self.epoch)
        while self.position < len(self.documents):
            self.num_drawn += 1
            self.position += 1
            yield np.array(self.documents[order[self.position - 1]], dtype=np.uint16)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin_at = state["position"]


class Rows(IterableDataset[Any]):
    """Gives each worker a part, as Hugging Face's streams do."""

    def __iter__(self) -> Iterator[Any]:
        info = torch.utils.data.get_worker_info()
        step = 1 if info is None else info.num_workers
        yield from DOCUMENTS[0 if info is None else info.id :: step]


SOURCES = [list, MapStyle, Stream, Stateful, lambda documents: Stateful(documents, is_exact=False)]


@pytest.mark.filterwarnings("ignore:To go on inside a document")
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("end", "pad"), [(None, None), (0, None), (None, 99), (0, 99)])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 17])
def test_pieces_are_those_of_the_joined_documents_from_any_position(
    source: Any, end: int | None, pad: int | None, length: int
) -> None:
    expected = joined(DOCUMENTS, length, end, pad)
    packed = pack_sequences(source(DOCUMENTS), length, end_token=end, pad_token=pad)
    found, states = [], [packed.state_dict()]
    for piece in packed:
        assert piece.dtype == torch.int64
        assert piece.shape == (length,)
        found.append(piece.tolist())
        states.append(packed.state_dict())
    assert found == expected
    for begin, state in enumerate(states):
        again = pack_sequences(source(DOCUMENTS), length, end_token=end, pad_token=pad)
        again.load_state_dict(pickle.loads(pickle.dumps(state)))
        assert repr(again.state_dict()) == repr(state)
        assert pieces_of(again) == expected[begin:]
        assert pieces_of(again) == expected  # the next pass is a whole one


@pytest.mark.parametrize("source", [*SOURCES[:4], lambda documents: Rows()])
def test_batches_of_a_prepared_loader_do_not_depend_on_the_workers(source: Any) -> None:
    expected = joined(DOCUMENTS, 2, 0, None)
    for num_workers in (0, 1, 2, 3):
        packed = pack_sequences(source(DOCUMENTS), 2, end_token=0)
        loader = prepare_data_loader(DataLoader(packed, batch_size=2, num_workers=num_workers))
        batches = [batch.tolist() for batch in loader]
        assert sum(batches, []) == expected
        assert [len(batch) for batch in batches] == [2] * (len(expected) // 2) + [1] * (len(expected) % 2)


@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (3, 2), (2, 2)])
@pytest.mark.parametrize("source", [MapStyle, Stateful])
def test_a_prepared_loader_goes_on_from_its_state_with_any_workers(source: Any, before: int, after: int) -> None:
    def loader(num_workers: int) -> Any:
        packed = pack_sequences(source(DOCUMENTS), 2, end_token=0)
        return prepare_data_loader(DataLoader(packed, batch_size=2, num_workers=num_workers))

    first = loader(before)
    expected = [batch.tolist() for batch in loader(0)]
    states = [first.state_dict()] + [first.state_dict() for _ in first]
    for begin, state in enumerate(states):
        again = loader(after)
        again.load_state_dict(pickle.loads(pickle.dumps(state)))
        assert [batch.tolist() for batch in again] == expected[begin:]
        again.dataset.set_epoch(0)
        assert [batch.tolist() for batch in again] == expected  # the next pass is a whole one
    with pytest.raises(ValueError, match="the global batch was 3 and is 2: pass global_batch_size=3"):
        again.load_state_dict({**states[1], "global_batch_size": 3})


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_workers_of_another_loader_give_each_piece_once(num_workers: int) -> None:
    loader = DataLoader(pack_sequences(Rows(), 2), batch_size=None, num_workers=num_workers)
    assert [piece.tolist() for piece in loader] == joined(DOCUMENTS, 2, None, None)


def test_a_position_in_a_worker_is_that_of_its_own_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    info = type("Info", (), {"id": 1, "num_workers": 2})()
    monkeypatch.setattr("dengine.data.packing.get_worker_info", lambda: info)
    expected = joined(DOCUMENTS, 2, 0, None)[1::2]
    packed = pack_sequences(DOCUMENTS, 2, end_token=0)
    for begin, _ in enumerate(packed, 1):
        again = pack_sequences(DOCUMENTS, 2, end_token=0)
        again.load_state_dict(packed.state_dict())
        assert pieces_of(again) == expected[begin:]


def test_numbered_documents_and_those_of_a_stream_with_a_state_are_not_drawn_again() -> None:
    documents = [[number] * 3 for number in range(10_000)]
    numbered, stateful = MapStyle(documents), Stateful(documents)
    for source in (numbered, stateful):
        packed = pack_sequences(source, 2)
        pieces = iter(packed)
        for _ in range(12_000):
            next(pieces)
        state = packed.state_dict()
        again = pack_sequences(type(source)(documents), 2)
        again.load_state_dict(state)
        assert next(iter(again)).tolist() == [8000, 8000]
        assert numbered is not source or again.dataset.asked[:2] == [7999, 8000]
        assert max(len(getattr(again.dataset, "asked", ())), getattr(again.dataset, "num_drawn", 0)) <= 3


def test_a_stream_without_a_state_is_read_again_with_a_warning() -> None:
    packed = pack_sequences(Stream(DOCUMENTS), 5)
    next(pieces := iter(packed))
    next(pieces)
    again = pack_sequences(Stream(DOCUMENTS), 5)
    again.load_state_dict(packed.state_dict())
    with pytest.warns(RuntimeWarning, match="To go on inside a document, 4 documents are drawn from the Stream"):
        assert pieces_of(again) == joined(DOCUMENTS, 5, None, None)[2:]


def test_an_order_for_each_epoch_with_each_document_once() -> None:
    documents = [[number] for number in range(50)]
    source = MapStyle(documents)
    packed = pack_sequences(source, 1, shuffle=True, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        packed.set_epoch(epoch)
        orders.append(sum(pieces_of(packed), []))
        assert source.epoch == epoch
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))
    assert orders[0] == orders[2] != orders[1]
    assert orders[0] != sum(pieces_of(pack_sequences(documents, 1, shuffle=True, seed=4)), [])
    next(pieces := iter(packed))
    next(pieces)
    state = packed.state_dict()
    packed.load_state_dict(state)
    packed.set_epoch(0)  # as an engine does before the epoch that it goes on with
    assert sum(pieces_of(packed), []) == orders[0][2:]
    packed.load_state_dict(state)
    packed.set_epoch(1)  # another one begins at its beginning
    assert sum(pieces_of(packed), []) == orders[1]


class Drawing(MapStyle):
    def __getitem__(self, index: int) -> Any:
        return [index, int(torch.randint(1000, ())), int(np.random.randint(1000))]


def test_what_a_source_draws_depends_on_the_document_alone() -> None:
    def packed() -> Any:
        return pack_sequences(Drawing(DOCUMENTS), 4, shuffle=True)

    expected, before = pieces_of(packed()), torch.get_rng_state()
    for num_workers in (0, 2):
        loader = prepare_data_loader(DataLoader(packed(), 2, num_workers=num_workers))
        assert sum((batch.tolist() for batch in loader), []) == expected
    whole = packed()
    next(iter(whole))
    again = packed()
    again.load_state_dict(whole.state_dict())
    assert pieces_of(again) == expected[1:]
    assert torch.equal(torch.get_rng_state(), before)


def test_one_long_document_in_a_file_is_read_by_piece(tmp_path: Path) -> None:
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "train.bin")
    packed = pack_sequences([np.memmap(tmp_path / "train.bin", np.uint16, "r")], 300)
    assert pieces_of(packed) == [list(range(start, start + 300)) for start in (0, 300, 600)]
    assert len(pickle.dumps(packed.state_dict())) < 2000


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: pack_sequences(iter(DOCUMENTS), 2), TypeError, "which can be read once"),
        (lambda: pack_sequences({"train": DOCUMENTS}, 2), TypeError, "a dict of ['train']: choose one of them"),
        (lambda: pack_sequences("text", 2), TypeError, "takes a data set of documents, but got a str"),
        (lambda: pack_sequences(DOCUMENTS, 0), ValueError, "length=0 must be at least 1"),
        (lambda: pack_sequences(DOCUMENTS, 2, seed=0.5), TypeError, "seed=0.5 must be a whole"),  # type: ignore[arg-type]
        (lambda: pack_sequences(Stream(DOCUMENTS), 2, shuffle=True), ValueError, "shuffle it by its own means"),
        (
            lambda: pieces_of(pack_sequences(DOCUMENTS, 18)),
            ValueError,
            "The 7 documents have 17 tokens together",
        ),
        (
            lambda: pieces_of(pack_sequences([[1], "text"], 1)),
            TypeError,
            "Document 1 is no row of token ids: it is a str,",
        ),
        (lambda: pieces_of(pack_sequences([1, 2], 1)), TypeError, "(for one long document: [ids])"),
        (lambda: pieces_of(pack_sequences([[0.5]], 1)), TypeError, "float64 (1,)"),
        (lambda: pieces_of(pack_sequences(MapStyle([[1]]), 1, key="ids")), TypeError, "it has ['input_ids', 'text']"),
    ],
)
def test_what_is_no_document_is_named(build: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        build()


def test_a_state_of_other_data_is_refused_and_changes_nothing() -> None:
    packed = pack_sequences(DOCUMENTS, 4)
    next(pieces := iter(packed))
    next(pieces)
    state = packed.state_dict()
    for other, message in [
        (pack_sequences(DOCUMENTS, 5), "length was 4 and is 5"),
        (pack_sequences(DOCUMENTS[:-1], 4), "num_documents was 7 and is 6"),
        (pack_sequences(Stateful(DOCUMENTS), 4), "has_own_state was False and is True"),
    ]:
        with pytest.raises(ValueError, match=message):
            other.load_state_dict(state)
        assert pieces_of(other) == joined(DOCUMENTS, other.length, None, None)
    for nonsense in ({}, {**state, "version": 2}, [1]):
        with pytest.raises(ValueError, match="no state of pack_sequences"):
            packed.load_state_dict(nonsense)  # type: ignore[arg-type]
    changed = pack_sequences([[], [1, 2, 3], [4], [], list(range(25, 36)), [16, 17], []], 4)
    changed.load_state_dict(state)
    with pytest.raises(ValueError, match=r"after the tokens \[5, 6, 7, 8\], but that document has others there"):
        next(iter(changed))
    gone = pack_sequences(Stream(DOCUMENTS[:2]), 4)
    gone.load_state_dict({**state, "kind": gone.state_dict()["kind"]})
    with pytest.raises(ValueError, match="is not there any more"), pytest.warns(RuntimeWarning):
        next(iter(gone))


def test_the_package_has_it_by_attribute() -> None:
    assert dengine.data.pack_sequences is pack_sequences


@pytest.mark.filterwarnings("ignore:To go on inside a document", "ignore:Loading a state dict of a shuffle buffer")
@pytest.mark.parametrize("buffer_size", [0, 3])  # a shuffle buffer is not in the state: the documents are counted
def test_a_stream_of_hugging_face_goes_on_where_it_was(buffer_size: int) -> None:
    datasets = pytest.importorskip("datasets")

    def packed() -> Any:
        rows = datasets.Dataset.from_list([{"input_ids": each} for each in DOCUMENTS]).to_iterable_dataset(2)
        return pack_sequences(rows.shuffle(seed=1, buffer_size=buffer_size) if buffer_size else rows, 2)

    first = packed()
    expected = pieces_of(first)
    for begin, _ in enumerate(first, 1):
        again = packed()
        again.load_state_dict(first.state_dict())
        assert pieces_of(again) == expected[begin:]
        assert pieces_of(again) == expected
