"""Leave out batches whose loading raised: None comes in the place of each, with a warning, up to a bound."""

import pickle
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch.utils.data import IterableDataset

from dengine.checks import whole_number
from dengine.data.seeding import EpochIndex
from dengine.data.transparent import TransparentDataset
from dengine.launch.world import world

__all__ = ["CaughtCollate", "CaughtDataset", "Failures", "checked_failures"]

_MOST = 10  # by default, in one pass
_NUM_SHOWN = 16  # samples of a batch, in a message


def checked_failures(dataset: object, on_error: object, max_errors: object) -> "Failures | None":
    """What is kept of errors by `on_error="skip"`; None for `on_error="raise"`.

    Raises: TypeError, ValueError: an argument is wrong, or they contradict each other or the data set.
    """
    if on_error not in ("raise", "skip"):
        raise ValueError(f'on_error={on_error!r} must be "raise" or "skip".')
    if on_error == "raise":
        if max_errors is not None:
            raise ValueError(
                f"max_errors={max_errors!r} bounds the batches that are left out, but the first error is raised: pass "
                'on_error="skip" with it, or leave it out.'
            )
        return None
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            f'on_error="skip" goes on with the next batch, but this {type(dataset).__qualname__} is a stream, and one '
            "that has raised is over. Catch the error in it, where a sample is read, and go on with the next sample; "
            "or have collate_fn give None for a batch of which nothing is left."
        )
    return Failures(_MOST if max_errors is None else whole_number("max_errors", max_errors, least=0))


@dataclass(frozen=True)
class _Failed:
    """What comes in the place of a batch whose loading raised, out of a worker too."""

    kind: type[BaseException] | None  # None: it does not leave a worker
    text: str
    report: str
    samples: list[int]


class CaughtDataset(TransparentDataset):
    """A map-style data set from which a loader's fetch gives an error instead of raising it.

    An index that is no `EpochIndex` passes through.
    """

    def __init__(self, dataset: Any, collate: "CaughtCollate") -> None:
        super().__init__(dataset, _collate=collate)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, EpochIndex):
            return self._dataset[index]
        return self._collate.caught(lambda: self._dataset[index], [index])

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        return self._collate.caught(lambda: self._fetched(indices), indices)

    def __reduce__(self) -> tuple[type["CaughtDataset"], tuple[Any, ...]]:
        return CaughtDataset, (self._dataset, self._collate)


class CaughtCollate:
    """A `collate_fn` that passes errors of the fetch on, and gives its own instead of raising them."""

    def __init__(self, inside: Callable[..., object]) -> None:
        self.inside = inside
        self._samples: list[int] = []  # of the batch under way: the data set fetches it in the same process

    def __call__(self, fetched: Any) -> Any:
        return fetched if type(fetched) is _Failed else self._caught(lambda: self.inside(fetched))

    def caught(self, fetch: Callable[[], Any], samples: Sequence[int]) -> Any:
        """What `fetch` gives, for a batch of `samples`; or its error."""
        self._samples = list(samples)
        return self._caught(fetch)

    def _caught(self, action: Callable[[], Any]) -> Any:
        try:
            return action()
        except Exception as error:
            text = f"{type(error).__qualname__}: {error}"
            return _Failed(_portable(type(error)), text, traceback.format_exc(), [int(each) for each in self._samples])


class Failures:
    """The errors of one loader on this rank: their number in the whole training, and in this pass over the data."""

    def __init__(self, max_errors: int) -> None:
        self.max_errors = max_errors
        self.num_errors = 0
        self._in_pass = 0

    def leave_out(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The `batches` of a new pass, with None in the place of errors.

        Raises: (at the batch) an error like that of the last batch, if there are more than `max_errors` in the pass.
        """
        self._in_pass = 0
        return map(self._kept, batches)

    def state(self) -> list[int]:
        return [self.num_errors, self._in_pass]

    def restore(self, state: Sequence[int]) -> None:
        self.num_errors, self._in_pass = state

    def _kept(self, batch: Any) -> Any:
        if type(batch) is not _Failed:
            return batch
        self._note(batch)
        return None

    def _note(self, failed: _Failed) -> None:
        self.num_errors, self._in_pass = self.num_errors + 1, self._in_pass + 1
        shown = ", ".join(map(str, failed.samples[:_NUM_SHOWN])) + (", ..." if failed.samples[_NUM_SHOWN:] else "")
        what = f"a batch (samples {shown}), whose loading raised {failed.text}"
        if self._in_pass > self.max_errors:
            _raise(
                failed,
                f"Rank {world().rank} cannot load {what}. That is error {self._in_pass} in this pass over the data "
                f'({self.num_errors} in the whole training), but on_error="skip" leaves out at most '
                f"max_errors={self.max_errors} in one: repair these samples or leave them out of the data set, or "
                f"allow more.\n\n{failed.report}",
            )
        warnings.warn(
            f"Rank {world().rank} leaves out {what}. It is error {self._in_pass} of at most {self.max_errors} in this "
            "pass over the data.",
            RuntimeWarning,
            stacklevel=2,
        )


def _raise(failed: _Failed, message: str) -> None:
    """Raises: an error of the kind that loading raised, if it takes a message alone; else RuntimeError."""
    try:
        error = None if failed.kind is None or issubclass(failed.kind, KeyError) else failed.kind(message)
    except Exception:
        error = None
    raise error or RuntimeError(message)


def _portable(kind: type[BaseException]) -> type[BaseException] | None:
    try:
        pickle.dumps(kind)
    except Exception:
        return None
    return kind
