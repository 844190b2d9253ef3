"""The values of an engine's metrics, some of which can be read while an epoch is under way."""

from collections import OrderedDict
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from copy import deepcopy
from typing import Any

from dengine.metrics.core.computed import flat
from dengine.metrics.core.function import MetricFunction
from dengine.metrics.core.metric import Metric
from dengine.types import MetricValue

__all__ = ["Live", "MetricValues"]

_NOT_THERE: Any = object()


class Live:
    """A metric whose present value can be read."""

    def __init__(self, name: str, metric: Metric) -> None:
        self._name = name
        self._metric = metric

    def names(self) -> list[str]:
        """The names of the values. This waits for a device only if a function may give a mapping."""
        if isinstance(self._metric, MetricFunction):
            return list(self.read())
        return [self._name] if self._metric.has_live_value() else []

    def read(self) -> dict[str, MetricValue]:
        return flat(self._name, self._metric.live_value()) if self._metric.has_live_value() else {}


class MetricValues(dict[str, MetricValue]):
    """Values by name: a dict in which some values are live until the epoch ends.

    A live value is computed when it is read, and exists once the epoch has one. Copies (also by `dict()`, `|` and
    pickle) are plain dicts of the values at that time. A value that the user sets is not live until the next epoch.

    Raises: KeyError: there is no such value; the message lists the names.
    """

    def __init__(self, values: Mapping[str, MetricValue] | None = None) -> None:
        super().__init__(values or {})
        self._live: dict[str, Live] = {}

    def follow(self, live: Mapping[str, Live]) -> None:
        """Make these values live from now on, instead of their old values."""
        for name in live:
            for key in [key for key in dict.__iter__(self) if key.startswith(f"{name}/")]:
                dict.__delitem__(self, key)
            dict.__setitem__(self, name, _NOT_THERE)  # keeps its position in the order
        self._live = dict(live)

    def freeze(self, *, is_read: bool) -> None:
        """End all live values: they are read for the last time, or dropped."""
        for name, live in list(self._live.items()):
            values = _read(live) if is_read else {}
            self._end(name)
            dict.update(self, values)

    # -- reading -------------------------------------------------------------------------------------------------------

    def __missing__(self, key: object) -> MetricValue:
        have = ", ".join(map(repr, self)) or "none"
        raise KeyError(
            f"There is no metric {key!r} in state.metrics; there are: {have}. Most have one once an epoch has ended."
        )

    def __getitem__(self, key: str) -> MetricValue:
        if self._live and (live := self._live_of(key)) is not None:
            values = live.read()
            return values[key] if key in values else self.__missing__(key)
        return super().__getitem__(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401 - this is what it would call

    def __contains__(self, key: object) -> bool:
        if self._live and (live := self._live_of(key)) is not None:
            return key in live.names()
        return super().__contains__(key)

    def __iter__(self) -> Iterator[str]:
        for key in super().__iter__():
            if key in self._live:
                yield from self._live[key].names()
            else:
                yield key

    def __reversed__(self) -> Iterator[str]:
        return reversed(list(self))

    def __len__(self) -> int:
        return sum(1 for _ in self) if self._live else super().__len__()

    def keys(self) -> Any:
        return KeysView(self)

    def values(self) -> Any:
        return ValuesView(self)

    def items(self) -> Any:
        return ItemsView(self)

    def __eq__(self, other: object) -> bool:
        return self.copy() == (other.copy() if isinstance(other, MetricValues) else other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None

    def __repr__(self) -> str:
        return repr(self.copy())

    # -- copies --------------------------------------------------------------------------------------------------------

    def copy(self) -> dict[str, MetricValue]:
        return {key: self[key] for key in self}

    __copy__ = copy

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, MetricValue]:
        return deepcopy(self.copy(), memo)

    def __or__(self, other: Any) -> Any:
        return self.copy() | (other.copy() if isinstance(other, MetricValues) else other)

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __reduce__(self) -> Any:
        # A kind of dict that torch.load(weights_only=True) knows, in case it is saved.
        return OrderedDict, (), None, None, iter(self.copy().items())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.__reduce__()

    # -- writing -------------------------------------------------------------------------------------------------------

    def __setitem__(self, key: str, value: MetricValue) -> None:
        if self._live:
            self._end(key)
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        if key not in self:
            self.__missing__(key)
        self._end(key)
        if dict.__contains__(self, key):
            super().__delitem__(key)

    def update(self, *others: Any, **named: Any) -> None:
        for key, value in dict(*others, **named).items():
            self[key] = value

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def setdefault(self, key: str, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: str, default: Any = _NOT_THERE) -> Any:
        if key not in self and default is not _NOT_THERE:
            return default
        value = self[key]
        del self[key]
        return value

    def popitem(self) -> tuple[str, MetricValue]:
        key = next(reversed(self), _NOT_THERE)
        if key is _NOT_THERE:
            raise KeyError("There is no metric in state.metrics.")
        return key, self.pop(key)

    def clear(self) -> None:
        self._live = {}
        super().clear()

    @classmethod
    def fromkeys(cls, keys: Iterable[Any], value: Any = None) -> Any:
        return dict.fromkeys(keys, value)

    # -- helpers -------------------------------------------------------------------------------------------------------

    def _live_of(self, key: object) -> Live | None:
        """The live metric that gives the value of `key`; `name` gives `name/key` if its value is a mapping."""
        if not isinstance(key, str) or key in self._live:
            return self._live.get(key) if isinstance(key, str) else None
        return next((live for name, live in self._live.items() if key.startswith(f"{name}/")), None)

    def _end(self, key: str) -> None:
        for name in [name for name in self._live if key == name or key.startswith(f"{name}/")]:
            del self._live[name]
            if name != key or dict.get(self, name) is _NOT_THERE:
                dict.pop(self, name, None)


def _read(live: Live) -> dict[str, MetricValue]:
    try:
        return live.read()
    except Exception:  # a function that fails on the present values; the run has ended all the same
        return {}
