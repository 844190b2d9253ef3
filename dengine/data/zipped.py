"""Several loaders side by side: one dict of batches for each step."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

from dengine.data.parts import set_epoch_of_parts
from dengine.data.passes import PassCounter
from dengine.naming import a_type, shown

__all__ = ["ZippedLoaders", "zip_loaders"]

Start: TypeAlias = Callable[[Iterable[Any], int], Iterator[Any]]  # an iterator over a loader after some batches

_MODES = ("cycle", "min", "max")
_MOST_PASSES = 1 << 20  # in one epoch, if lengths are unknown


def zip_loaders(mode: Literal["cycle", "min", "max"] = "cycle", **loaders: Iterable[Any]) -> "ZippedLoaders":
    """The `loaders` side by side: each step gets a dict with one batch of each, under the names given here.

    mode:
        "cycle": as long as the longest; shorter ones begin anew, with the order of their next pass.
        "min": as long as the shortest.
        "max": as long as the longest; the others give None after their end.

    Pass each loader to `prepare_data_loader` before: then each step has the same samples on any number of ranks, and a
    resumed run begins at any step at once (O(1)); if one cannot, all are drawn and dropped up to the step.

    The engine sets the epoch, and each loader is set to the number of its pass: in "cycle" the passes of earlier epochs
    count, as many in each as the longest loader takes. If nobody sets the epoch, each iteration goes on to the next,
    and a resumed run to the one after the saved one.

    Raises:
        TypeError: something that cannot be iterated over anew. ValueError: another mode, or no loaders.
            While iterating: a loader that gives no batch in "cycle".

    Example:
        >>> zipped = zip_loaders(labelled=["a", "b"], unlabelled=[1, 2, 3])
        >>> len(zipped), list(zipped)[-1]
        (3, {'labelled': 'a', 'unlabelled': 3})
        >>> list(zip_loaders("max", labelled=["a"], unlabelled=[1, 2]))[-1]
        {'labelled': None, 'unlabelled': 2}
    """
    if mode not in _MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(map(repr, _MODES))}.")
    if not loaders:
        raise ValueError("zip_loaders() takes loaders by name, as zip_loaders(labelled=a, unlabelled=b), but got none.")
    for name, loader in loaders.items():
        if isinstance(loader, Iterator):
            raise TypeError(
                f"zip_loaders() takes loaders that can be iterated over each epoch, but {name}= is {a_type(loader)}, "
                "which can be read once: give it a loader, a list, or a class whose __iter__ begins anew."
            )
        if not hasattr(loader, "__iter__"):
            raise TypeError(f"zip_loaders() takes loaders, but {name}= is {a_type(loader)}.")
    return ZippedLoaders(mode, loaders)


class ZippedLoaders:
    """What `zip_loaders` gives; `loaders` has them by name."""

    def __init__(self, mode: str, loaders: Mapping[str, Iterable[Any]]) -> None:
        self.mode = mode
        self.loaders: Mapping[str, Any] = MappingProxyType(dict(loaders))
        self.passes = PassCounter({"mode": mode, "loaders": sorted(loaders)})

    def __len__(self) -> int:
        """The number of steps.

        Raises: TypeError: a loader has no length.
        """
        lengths = [len(loader) for loader in self.loaders.values()]
        return min(lengths) if self.mode == "min" else max(lengths)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return self.start(0, _after)

    def __repr__(self) -> str:
        return shown(self, mode=self.mode, loaders=list(self.loaders))

    def set_epoch(self, epoch: int) -> None:
        """Make the next iteration one of `epoch`."""
        self.passes.set_epoch(epoch)

    def start(self, num_steps: int, start: Start) -> Iterator[dict[str, Any]]:
        """An iterator over the steps after the first `num_steps`, of which `start` makes each loader's part."""
        epoch = self.passes.begin()
        lengths = {name: _length(loader) for name, loader in self.loaders.items()}
        known = [length for length in lengths.values() if length is not None]
        longest = max(known) if len(known) == len(lengths) else None
        is_cycled = self.mode == "cycle"
        turns = [
            _Turn(name, loader, lengths[name], longest if is_cycled else lengths[name], epoch)
            for name, loader in self.loaders.items()
        ]
        for turn in turns:
            turn.begin(num_steps, start, is_cycled=is_cycled)
        return self._steps(turns, longest - num_steps if is_cycled and longest is not None else None)

    def _steps(self, turns: "list[_Turn]", num_left: int | None) -> Iterator[dict[str, Any]]:
        """The steps; in "cycle", `num_left` of them, or if that is unknown until each loader has ended once."""
        is_cycled = self.mode == "cycle"
        while num_left is None or num_left > 0:
            step: dict[str, Any] = {}
            for turn in turns:
                step[turn.name] = turn.next_batch()
                num_ended = sum(each.has_ended for each in turns)
                if num_left is None and (num_ended == len(turns) or (num_ended and self.mode == "min")):
                    return
                if turn.is_over and is_cycled:
                    step[turn.name] = turn.begin_again()
            num_left = None if num_left is None else num_left - 1
            yield step


class _Turn:
    """The passes over one loader within an epoch."""

    def __init__(self, name: str, loader: Iterable[Any], length: int | None, num_steps: int | None, epoch: int) -> None:
        self.name, self._loader, self._length = name, loader, length
        # The number of the first pass of this epoch, and of each next one.
        self._pass, self._stride = epoch, _MOST_PASSES
        if length and num_steps is not None:
            self._pass, self._stride = epoch * -(-num_steps // length), 1
        self._batches: Iterator[Any] = iter(())
        self.is_over = False  # the present pass
        self.has_ended = False  # a pass of this epoch

    def begin(self, num_steps: int, start: Start, *, is_cycled: bool) -> None:
        if self._length is not None:
            num_passes, rest = divmod(num_steps, self._length) if is_cycled and self._length else (0, num_steps)
            num_steps = min(rest, self._length)
            self._pass += num_passes * self._stride
            self.has_ended = num_passes > 0
        set_epoch_of_parts(self._loader, self._pass)
        self._batches = start(self._loader, num_steps)

    def next_batch(self) -> Any:
        """The next batch; None after the end."""
        if not self.is_over:
            for batch in self._batches:
                return batch
            self.is_over = self.has_ended = True
        return None

    def begin_again(self) -> Any:
        """Begin the next pass, and give its first batch. Raises: ValueError: there is none."""
        self._pass += self._stride
        set_epoch_of_parts(self._loader, self._pass)
        self._batches = iter(self._loader)
        for batch in self._batches:
            self.is_over = False
            return batch
        raise ValueError(
            f"{self.name}= of zip_loaders() gave no batch when it began anew: it must give some each time that it is "
            "iterated over. Check its data set's size, and drop_last with a batch size above it."
        )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except OSError:
        raise
    except Exception:  # no length, or none yet
        return None


def _after(loader: Iterable[Any], num_batches: int) -> Iterator[Any]:
    batches = iter(loader)
    next(islice(batches, num_batches, num_batches), None)
    return batches
