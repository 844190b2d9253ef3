"""The state of a run, which handlers read and a checkpoint of an engine saves."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NoReturn

from dengine.checks import is_whole_number
from dengine.data.parts import failures_of
from dengine.engine.data.description import PassPosition
from dengine.metrics.collection.live import MetricValues
from dengine.naming import a_type
from dengine.types import MetricValue, Straggler

__all__ = ["State"]

# Written to and read from a checkpoint under these names; `True` if None is a value too.
_POSITION = {
    "epoch": False,
    "iteration": False,
    "epoch_iteration": False,
    "epochs_completed": False,
    "max_epochs": True,
    "epoch_length": True,
}


def _of_the_loop(name: str, instead: str) -> Any:
    """A property that only the loop sets, as `_name`.

    To set `name` itself is an error that says what to do instead, since the loop would ignore or overwrite the value.
    Reading it is one call of a C function; writing `_name` costs no more than any attribute.
    """

    def refuse(state: "State", value: object) -> NoReturn:
        raise AttributeError(f"state.{name} is kept by the engine and cannot be set to {value!r}: {instead}.")

    return property(attrgetter(f"_{name}"), refuse)


class State:
    """The state of one engine, as `engine.state`.

    You may set attributes of your own on it, and also `batch`, `output` and `metrics`. To set another attribute of the
    engine is an AttributeError that says what to do instead.

    Attributes:
        epoch: the current epoch, 0-indexed; in `COMPLETED` handlers and after the run, the last epoch that ran.
        iteration: iterations started over the whole training: 1 during the first one, 0 before it.
        epoch_iteration: the same, within the epoch.
        epochs_completed: the number of epochs whose end was reached: `epoch + 1` from `EPOCH_COMPLETED` on, `epoch`
        before it. max_epochs, epoch_length: as given or found; None if unknown.
        output: what the process function returned in the current (or last) iteration.
        batch: of the current iteration; None outside an epoch, so that no batch outlives it.
        dataloader: the data of the run.
        data_state: the description of the data, which must be the same in a resumed run.
        metrics: values by name, of the last completed epoch of this run. Those of `RunningAverage` and `Throughput` are
            current values of this rank until the epoch ends.
        times: seconds: "epoch" (the last finished one) and "run".
        straggler: the rank that the others waited for in the last epoch, as `ThroughputMonitor` finds it; else None.
        preempted: whether `preempt()` ended the run, on any rank: the job will be resumed later.
        exception: the exception that ended the run, from `EXCEPTION_RAISED` until the next run; else None.
    """

    epoch: int = _of_the_loop("epoch", "load_state_dict() has the next run() start at another position")
    iteration: int = _of_the_loop("iteration", "load_state_dict() has the next run() start at another position")
    epoch_iteration: int = _of_the_loop(
        "epoch_iteration",
        "terminate_epoch() leaves an epoch, and load_state_dict() has the next run() start at another position",
    )
    epochs_completed: int = _of_the_loop(
        "epochs_completed",
        "terminate_epoch() completes an epoch, and load_state_dict() has the next run() start at another position",
    )
    max_epochs: int | None = _of_the_loop(
        "max_epochs", "pass run(data, max_epochs=...); within a run, terminate() ends it earlier"
    )
    epoch_length: int | None = _of_the_loop(
        "epoch_length", "pass run(data, epoch_length=...); within an epoch, terminate_epoch() ends it earlier"
    )
    dataloader: Iterable[Any] | None = _of_the_loop(
        "dataloader", "pass the data to run(data); data with set_epoch(epoch) may change from epoch to epoch"
    )
    preempted: bool = _of_the_loop("preempted", "call preempt() on the engine")

    def __init__(self) -> None:
        self._epoch = 0
        self._iteration = 0
        self._epoch_start = 0  # iterations before the current epoch
        self._epochs_completed = 0
        self._max_epochs: int | None = None
        self._epoch_length: int | None = None
        self.output: Any = None
        self.batch: Any = None
        self._dataloader: Iterable[Any] | None = None
        self.data_state: dict[str, Any] | None = None
        self._pass: PassPosition | None = None  # None: each epoch begins the data anew
        self.metrics: dict[str, MetricValue] = MetricValues()
        self.times: dict[str, float] = {}
        self.straggler: Straggler | None = None
        self._preempted = False
        self.exception: BaseException | None = None
        self._persisted: list[str] = []
        self._iterations_done = 0  # `iteration` counts one that is still under way
        self._left_out = 0  # the last iteration whose batch was None

    if TYPE_CHECKING:
        # What users keep here: see persist().
        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __repr__(self) -> str:
        """The position of the run, and the names of its metrics. No value is read from a device."""
        names = ("epoch", "iteration", "epoch_iteration", "max_epochs", "epoch_length")
        mine = [name for name in vars(self) if name not in _OWN]
        shown = [f"{name}={getattr(self, name)!r}" for name in names]
        shown += [f"metrics={list(self.metrics)}"] + ([f"own={mine}"] if mine else [])
        return f"State({', '.join(shown)})"

    @property
    def data_errors(self) -> int:
        """Batches of this rank that were left out in this training as their loading raised (`on_error="skip"`)."""
        return sum(each.num_errors for each in failures_of(self._dataloader))

    @property
    def data_pass(self) -> int:
        """The number of the pass over the data, from 0: the epoch, unless they are continued (`continue_data=True`)."""
        return self._epoch if self._pass is None else self._pass.number

    @property
    def pass_iteration(self) -> int:
        """Iterations started within the pass: those within the epoch, unless the data are continued."""
        return self._epoch_iteration if self._pass is None else self._iteration - self._pass.start

    def persist(self, *names: str) -> None:
        """Make attributes of your own part of the engine's `state_dict()`.

        Raises:
            ValueError: a name that the engine itself uses.
            TypeError: a name that is not a string.
        """
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"persist() takes attribute names, but got {name!r}.")
            if name in _OWN:
                raise ValueError(f"state.{name} is the engine's own: persist() takes attributes that you set yourself.")
        self._persisted.extend(name for name in dict.fromkeys(names) if name not in self._persisted)

    def state_dict(self) -> dict[str, Any]:
        """The position and the persisted attributes: numbers, strings, lists and dicts only.

        An iteration that is still under way counts as not started.
        """
        under_way = self._under_way
        return {
            **{name: getattr(self, name) for name in _POSITION},
            "iteration": self.iteration - under_way,
            "epoch_iteration": self.epoch_iteration - under_way,
            "persisted": {name: self._plain_attribute(name) for name in self._persisted},
            "data": deepcopy(self.data_state),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a position and persisted attributes. Nothing is changed if anything is wrong.

        Raises:
            ValueError: an entry is missing, unknown or wrong; the message names it.
        """
        _check(state_dict)
        for name in _POSITION:
            setattr(self, f"_{name}", state_dict[name])
        self._iterations_done, self._pass = self._iteration, None
        self.data_state = deepcopy(state_dict["data"])
        for name, value in state_dict["persisted"].items():
            setattr(self, name, deepcopy(value))  # the run will change it
        self.persist(*state_dict["persisted"])

    @property
    def _epoch_iteration(self) -> int:
        # Computed when it is asked for: to set it would cost time in every iteration.
        return self._iteration - self._epoch_start

    @_epoch_iteration.setter
    def _epoch_iteration(self, value: int) -> None:
        self._epoch_start = self._iteration - value

    @property
    def _under_way(self) -> int:
        """The number of iterations that have started but are not done: 1 or 0."""
        return self._iteration - self._iterations_done

    def _begin_run(
        self, data: Iterable[Any], max_epochs: int | None, epoch_length: int | None, *, is_resumed: bool
    ) -> None:
        """Set the values with which a run starts: the initial ones, or those of a resumed run."""
        if not is_resumed:
            self._epoch = self._iteration = self._epoch_iteration = self._epochs_completed = 0
            self._iterations_done = 0
        self._max_epochs = max_epochs
        if epoch_length is not None or not is_resumed:
            self._epoch_length = epoch_length
        self._dataloader = data
        # New dicts: those of an earlier run keep their values.
        self.metrics, self.times = MetricValues(), {}
        self.output = self.batch = self.exception = self.straggler = None
        self._preempted = False

    def _plain_attribute(self, name: str) -> Any:
        if not hasattr(self, name):
            raise AttributeError(f"state.{name} was named in persist(), but is not set.")
        value = getattr(self, name)
        found = _not_plain(value)
        if found is not None:
            raise TypeError(_not_plain_message(name, found))
        return deepcopy(value)


_OWN = frozenset(vars(State())) | frozenset(dir(State))


def _check(state_dict: Mapping[str, Any]) -> None:
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"An engine's state is a dict, but got {a_type(state_dict)}.")
    wanted = {*_POSITION, "persisted", "data"}
    if missing := wanted - state_dict.keys():
        raise ValueError(f"The engine's state lacks {_names(missing)}; it has {_names(state_dict.keys())}.")
    if unknown := state_dict.keys() - wanted:
        raise ValueError(f"The engine's state has unknown entries {_names(unknown)}; known are {_names(wanted)}.")
    for name, may_be_none in _POSITION.items():
        value = state_dict[name]
        is_count = is_whole_number(value) and value >= 0
        if not is_count and not (may_be_none and value is None):
            raise ValueError(f"{name}={value!r} in the engine's state must be a whole number of at least 0.")
    persisted = state_dict["persisted"]
    if not isinstance(persisted, Mapping) or not all(isinstance(name, str) for name in persisted):
        raise ValueError(f"persisted={persisted!r} in the engine's state must be a dict with string keys.")
    for name, value in persisted.items():
        if (found := _not_plain(value)) is not None:
            raise ValueError(_not_plain_message(name, found))
    if clash := persisted.keys() & _OWN:
        raise ValueError(f"persisted in the engine's state names the engine's own {_names(clash)}.")
    data = state_dict["data"]
    if not (data is None or isinstance(data, dict)) or _not_plain(data) is not None:
        raise ValueError(f"data={data!r} in the engine's state must be a dict of plain values, or None.")
    _check_order(state_dict)


def _check_order(position: Mapping[str, Any]) -> None:
    if position["epoch_iteration"] > position["iteration"]:
        raise ValueError(
            f"epoch_iteration={position['epoch_iteration']} in the engine's state is above "
            f"iteration={position['iteration']}, of which it is a part."
        )
    if position["epochs_completed"] not in (position["epoch"], position["epoch"] + 1):
        raise ValueError(
            f"epochs_completed={position['epochs_completed']} in the engine's state must be epoch or epoch + 1, "
            f"with epoch={position['epoch']}."
        )


def _names(names: Iterable[object]) -> str:
    return ", ".join(sorted(repr(name) for name in names))


def _not_plain_message(name: str, found: object) -> str:
    return (
        f"state.{name} is persisted, so it must be made of plain numbers, strings, lists and dicts, "
        f"but it holds a {type(found).__module__}.{type(found).__qualname__}: convert it, e.g. with float()."
    )


def _not_plain(value: Any) -> Any:
    """The first part of `value` that is not a plain number, string, list, dict or None; None if there is none."""
    if value is None or type(value) in (bool, int, float, str):
        return None
    if type(value) is list:
        parts: Iterable[Any] = value
    elif type(value) in (dict, MetricValues):
        parts = (*value.keys(), *value.values())
    else:
        return value
    return next((found for part in parts if (found := _not_plain(part)) is not None), None)
