"""Data that keep their own position: saved with the run, and restored at once instead of drawn and dropped."""

import warnings
from collections.abc import Callable, Iterator
from itertools import chain, islice
from typing import Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset

from dengine.data.loader import inside
from dengine.data.parts import parts_of
from dengine.data.stateful import counts_globally, forget_position, going_on, inexactness, keeps_position, version_of
from dengine.data.stream import StatefulStreamShard
from dengine.distributed import world
from dengine.naming import a_type, type_name

__all__ = ["SavedSource", "Source"]

T = TypeVar("T")

SavedSource: TypeAlias = dict[str, Any]  # plain values, and the state that the data gave

_PLAIN = (bool, int, float, str, bytes, type(None))
_REFUSALS = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
_WAY_OUT = (
    "Go on with the data that the run was started with, or say allow_changed_data=True: then as many batches as "
    "the run has taken are drawn and dropped."
)


class Source:
    """The part of a run's data that keeps its own position: the data, or the data set of a loader without workers.

    `part` is None if there is none, or if its state would not be the position; `why_drawn` then says why.
    """

    def __init__(self, data: Any, *, can_seek: bool) -> None:
        self.data = data
        self.why_drawn = ""  # to the position of a resumed run, although the data keep their own
        self.kind = ""
        self.part: Any = self._found(data) if _is_of_stream(data) or not can_seek else None
        self.pending: SavedSource | None = None  # a state that the next pass goes on from
        self.is_at_end = False  # of a pass
        self._loaded: SavedSource | None = None
        self.has_loaded = False  # for the next pass
        self._has_started = False
        self._is_ahead = False  # batches were drawn that the run has not been given
        self._num_fetched = 0  # batches of the epoch, before those of a resumed run too

    def check(self, saved: SavedSource | None, *, allow_changed_data: bool) -> SavedSource | None:
        """`saved`, if the data can go on from it; None if they are drawn and dropped up to the position.

        Raises: ValueError: it is of other data.
        """
        if saved is None:
            return None
        changes = self._changes(saved)
        if changes and not allow_changed_data:
            raise ValueError(f"The data do not fit the position that was saved for them:\n{changes}.\n{_WAY_OUT}")
        if changes or self.part is None:
            return None
        if saved["ends_pass"] and self._begins_anew:
            return None
        if saved["state"] is None:
            self.why_drawn = saved["why_drawn"]
            return None
        here = world()
        if (saved["data_rank"], saved["data_size"]) != (here.data_rank, here.data_size) and not saved["is_shared"]:
            self.why_drawn = (
                f"the run was saved by {saved['data_size']} ranks and goes on on {here.data_size}, so that the shards "
                "differ: some samples of this epoch come twice or not at all"
            )
            return None
        return saved

    def load(self, skip: int) -> None:
        """Restore the position that `check` has let pass, for a pass over the data that starts at batch `skip`.

        Raises: ValueError: the data refuse it.
        """
        saved, self.pending = self.pending, None
        # Between epochs, one of the middle of a pass (with epoch_length) does not matter: the next pass begins anew.
        if saved is not None and (saved["done"] == skip or saved["ends_pass"] or isinstance(self.data, Iterator)):
            self._loaded, self.has_loaded = saved, True
            self._restoring(lambda: self.part.load_state_dict(saved["state"]))

    def load_again(self) -> None:
        """Restore the position once more, if it was restored: the data were iterated over in between."""
        if self._loaded is not None:
            self.pending = self._loaded
            self.load(self._loaded["done"])

    def take_loaded(self, *, may_be_over: bool) -> Iterator[object] | None:
        """An iterator over the data from the position that was loaded, once; None if there is none.

        It is made at once, for it may draw from the random number generators. Raises: ValueError: the data refuse the
        position.
        """
        has_loaded, self.has_loaded = self.has_loaded, False
        if not has_loaded or self._loaded is None:
            return None
        if self._loaded["is_over"] and not may_be_over:
            return iter(())  # the position is the next epoch's
        return self._restoring(lambda: going_on(self.data, may_be_over=may_be_over))

    @property
    def restored_parts(self) -> list[object]:
        """The parts of the data that a position is, or was, loaded into: nothing else of them is restored."""
        if self.pending is None and self._loaded is None:
            return []
        return [inside(part) for part in (parts_of(self.data) if self.part is self.data else [self.part])]

    def state(self, done: int, *, is_completed: bool, ends_pass: bool) -> SavedSource | None:
        """What `check` takes: the position after the first `done` batches of the epoch; None if the data keep none.

        `is_completed`: the epoch is over. `ends_pass`: a pass is, after `done` batches. Cost: the `state_dict()` of the
        data.
        """
        if self.pending is not None:
            return self.pending  # still to be loaded
        if not self.kind:
            return None
        here, is_between = world(), is_completed or not (done or self._num_fetched)
        return {
            "kind": self.kind,
            "version": version_of(self.part),
            "num_workers": self._num_workers,
            "data_rank": here.data_rank,
            "data_size": here.data_size,
            "is_shared": self._is_shared,
            "settings": self._settings,
            "why_drawn": self.why_drawn or "it was saved while a batch was under way",
            "done": 0 if is_between else done,
            "ends_pass": self.is_at_end or ends_pass,
            "is_over": counts_globally(self.part) and done > 0 and not self._num_in_pass(done),
            "state": self._state(done, is_between=is_between),
        }

    def begin_pass(self) -> None:
        """Count batches from the beginning of an epoch, or of a pass over data that go on from epoch to epoch."""
        self._num_fetched, self._is_ahead = 0, False

    def note_ahead(self, is_ahead: bool) -> None:
        """Note whether batches were drawn that the run has not been given, so that the state is not the position."""
        self._is_ahead = is_ahead

    def counted(self, batches: Iterator[object], skip: int) -> Iterator[object]:
        """`batches`, those after the first `skip` of the epoch, counted as they are fetched."""
        self._num_fetched += skip
        first = list(islice(batches, 1))
        forget_position(self.data)
        self.is_at_end, self._has_started = False, True
        for batch in chain(first, batches):
            self._num_fetched += 1
            yield batch

    def _restoring(self, action: Callable[[], T]) -> T:
        saved, refusals = self._loaded, _REFUSALS if self._loaded is not None else ()
        try:
            return action()
        except refusals as error:
            assert saved is not None
            version = version_of(self.part)
            versions = f" It was saved by version {saved['version']}, this is {version}." if saved["version"] else ""
            raise ValueError(
                f"The {self.kind} does not go on from the position that was saved for it: "
                f"{type(error).__qualname__}: {error}.{versions} {_WAY_OUT}"
            ) from error

    def _found(self, data: object) -> Any:
        """The part of `data` whose state is their position; None without one."""
        loader = data if isinstance(data, DataLoader) else None
        if loader is not None and counts_globally(inside(loader.dataset)):
            part: Any = inside(loader.dataset)
        elif keeps_position(data):
            part = data
        elif loader is not None and keeps_position(loader.dataset):
            part = loader.dataset
            if loader.num_workers:
                self.why_drawn = (
                    "its workers have copies of the data set, whose states are not known here; torchdata's "
                    "StatefulDataLoader knows them"
                )
        else:
            return None
        self.kind = type_name(inside(part))
        if reason := inexactness(data):
            self.why_drawn = f"the state of the {self.kind} is not exact ({reason})"
        return None if self.why_drawn else part

    @property
    def _num_workers(self) -> int | None:
        """The number of workers that the state is for; None if it does not depend on it."""
        return None if self._is_one else getattr(self.data, "num_workers", None)

    @property
    def _is_one(self) -> bool:
        """Whether the position is that of all ranks and workers."""
        return counts_globally(self.part) or getattr(self.part, "position_is_shared", False) is True

    @property
    def _begins_anew(self) -> bool:
        """Whether the next pass does not depend on the last one: it has new workers, or is told its number."""
        hears_epoch = any(callable(getattr(inside(part), "set_epoch", None)) for part in parts_of(self.data))
        return hears_epoch or bool(self._num_workers and _is_of_stream(self.data))

    @property
    def _settings(self) -> dict[str, Any] | None:
        """What a prepared stream is cut by."""
        stream = getattr(self.data, "dataset", None)
        return stream.state() if isinstance(stream, StatefulStreamShard) else None

    @property
    def _is_shared(self) -> bool:
        """Whether the state is the same on all ranks, and for any number of them."""
        stream = getattr(self.data, "dataset", None)
        return self._is_one or (isinstance(stream, StatefulStreamShard) and not stream.shards_itself)

    def _changes(self, saved: SavedSource) -> str:
        if saved["state"] is None:
            return ""
        if not self.kind:
            return f"they were {_with_article(saved['kind'])}, which keeps its position, and are {a_type(self.data)}"
        if saved["kind"] != self.kind:
            return f"the data were {_with_article(saved['kind'])} and are {_with_article(self.kind)}"
        if saved["settings"] != self._settings:
            return f"they were cut by {saved['settings']} and are cut by {self._settings}"
        if saved["num_workers"] != self._num_workers:
            return f"num_workers was {saved['num_workers']} and is {self._num_workers}, each with a position of its own"
        return ""

    def _state(self, done: int, *, is_between: bool) -> Any:
        """The state of the data, if it is the position after `done` batches; else None."""
        if self.part is None or not self._has_started:
            return None
        if counts_globally(self.part):
            return self._global_state(done, is_between=is_between)
        if is_between:
            if not (self.is_at_end or isinstance(self.data, Iterator)):
                return None  # the next epoch begins with a new pass
        elif self._is_ahead or self._num_fetched != done:
            return None
        try:
            return _plain(self.part.state_dict())
        except _Unusual as unusual:
            self.part, self.why_drawn = None, f"the state of the {self.kind} holds {unusual}"
            warnings.warn(
                f"The state of the {self.kind} is not saved, as it holds {unusual}: only tensors, numbers, strings, "
                "lists, tuples and dicts can be read without executing code. A run that is resumed draws and drops the "
                "batches before its position.",
                RuntimeWarning,
                stacklevel=2,
            )
            return None

    def _global_state(self, done: int, *, is_between: bool) -> Any:
        """The state of MosaicML's `StreamingDataset`, in samples of all ranks; its number of the epoch is its own."""
        if not is_between and (self._is_ahead or self._num_fetched != done):
            return None
        in_pass, batch_size = self._num_in_pass(done), self.data.batch_size or 1
        if is_between or not in_pass:
            state = self.part.state_dict(num_samples=0, from_beginning=True)
            return {**state, "epoch": state["epoch"] + 1}
        num_samples = in_pass * batch_size * world().data_size
        return self.part.state_dict(num_samples=num_samples, from_beginning=True)

    def _num_in_pass(self, done: int) -> int:
        """The batches of its pass after `done` ones of the epoch; 0 at the pass's end."""
        size, batch_size = len(self.part), self.data.batch_size or 1  # of this rank
        num_batches = size // batch_size if self.data.drop_last else -(-size // batch_size)
        return done % num_batches if num_batches else done


class _Unusual(Exception):
    """A value that a checkpoint does not take."""


def _plain(value: Any) -> Any:
    """A copy of `value`. Raises: _Unusual: there is a value in it that is not plain."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind is torch.Tensor:
        return value.detach().clone()
    if kind is dict and all(type(key) in (str, int) for key in value):
        return {key: _plain(each) for key, each in value.items()}
    if kind is list or kind is tuple:
        return kind(_plain(each) for each in value)
    if isinstance(value, np.generic) and type(value.item()) in _PLAIN:
        return value.item()
    raise _Unusual(a_type(value))


def _is_of_stream(data: object) -> bool:
    return isinstance(getattr(data, "dataset", None), IterableDataset)


def _with_article(kind: str) -> str:
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"
