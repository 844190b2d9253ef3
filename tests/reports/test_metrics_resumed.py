"""What a metric has gathered survives a resume in the middle of an epoch, however it keeps it."""

import enum
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from torch import nn
from torchmetrics import wrappers
from torchmetrics.regression import KendallRankCorrCoef

from dengine import Engine, Events
from dengine.handlers import Checkpoint
from dengine.metrics import Average, Metric
from dengine.metrics.collection.saved_state import load_state_dict, state_dict

BATCHES = [torch.tensor([[1.0, 2.0], [3.0, 5.0]]) + torch.tensor([3.0, 1.0]) * i**2 for i in range(4)]


class Mode(str, enum.Enum):
    FIRST = "first"
    SECOND = "second"


class Level(enum.IntEnum):
    LOW = 1
    HIGH = 2


@dataclass
class Totals:
    total: float = 0.0
    count: int = 0


class Meter:
    """As in many a script: no metric, but it gathers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, value: float) -> None:
        self.total, self.count = self.total + value, self.count + 1


class Duck:
    """A duck-typed metric that keeps its sums wherever a metric may keep them."""

    def __init__(self, make: Any) -> None:
        self.make = make
        self.reset()

    def reset(self) -> None:
        self.store = self.make()

    def update(self, output: Any) -> None:
        add(self.store, float(output.sum()))

    def compute(self) -> float:
        return float(sum(numbers(self.store)))


def add(store: Any, value: float) -> None:
    if isinstance(store, dict):
        for key in list(store):
            inner = store[key]
            add(inner, value) if isinstance(inner, list) or hasattr(inner, "update") else store.__setitem__(
                key, inner + value
            )
    elif isinstance(store, (list, deque)):
        add(store[0], value) if store and hasattr(store[0], "update") else store.append(value)
    elif isinstance(store, tuple):
        store[0].update(torch.tensor(value))
    elif isinstance(store, set):
        store.add(value)
    elif isinstance(store, Totals):
        store.total += value
    elif isinstance(store, np.ndarray):
        store += value
    else:
        store.update(value if isinstance(store, Meter) else torch.tensor(value))


def numbers(store: Any) -> list[float]:
    if isinstance(store, dict):
        return [number for value in store.values() for number in numbers(value)]
    if isinstance(store, (list, deque, tuple, set)):
        return [number for value in store for number in numbers(value)]
    if isinstance(store, (Totals, Meter)):
        return [store.total]
    if isinstance(store, np.ndarray):
        return store.tolist()
    return [float(store.compute())] if hasattr(store, "compute") else [float(store)]


STORES: dict[str, Any] = {
    "list": list,
    "deque": lambda: deque(maxlen=3),
    "set": set,
    "dict by name": lambda: {"sum": 0.0},
    "dict by tuple": lambda: {(0, 1): 0.0, None: 0.0},
    "dict by enum": lambda: {Mode.FIRST: 0.0, Level.HIGH: 0.0},
    "default dict": lambda: defaultdict(float, {"sum": 0.0}),
    "ordered dict": lambda: OrderedDict(sum=0.0),
    "counter": lambda: Counter({"sum": 0.0}),
    "array": lambda: np.zeros(2),
    "array in a dict": lambda: {"sums": np.zeros(2)},
    "numpy's numbers": lambda: {"sum": np.float32(0)},
    "dataclass": Totals,
    "meter": Meter,
    "metrics in a list": lambda: [torchmetrics.SumMetric()],
    "metrics in a tuple": lambda: (Average(), 3.0),
    "metrics in a dict": lambda: {"a": torchmetrics.SumMetric(), "b": torchmetrics.SumMetric()},
    "metrics in a dict of lists": lambda: {"a": [torchmetrics.SumMetric()], "b": [Average()]},
    "a collection in a dict": lambda: {"a": torchmetrics.MetricCollection([torchmetrics.SumMetric()])["SumMetric"]},
}


def resumed_and_whole(make: Any, folder: Path) -> tuple[Any, Any]:
    """The value of an epoch that was interrupted after its second iteration, and that of one that was not."""
    values = []
    for is_cut in (False, True, None):
        trainer = Engine(lambda engine, batch: batch)
        trainer.add_metric(make(), "m")
        if is_cut:
            trainer.on(Events.ITERATION_COMPLETED(once=2), Checkpoint({"trainer": trainer}, folder))
            trainer.on(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate(), priority=-1)
        if is_cut is None:
            assert Checkpoint.resume(folder, {"trainer": trainer})
        values.append(trainer.run(BATCHES).metrics)
    return values[2], values[0]


@pytest.mark.parametrize("kind", STORES)
def test_a_metric_keeps_what_it_gathered_wherever_it_keeps_it(kind: str, tmp_path: Path) -> None:
    resumed, whole = resumed_and_whole(lambda: Duck(STORES[kind]), tmp_path)
    assert resumed == whole


class Modules(nn.Module):
    """Metrics within modules within a metric."""

    def __init__(self) -> None:
        super().__init__()
        inner = nn.ModuleDict({"sum": torchmetrics.SumMetric(), "list": nn.ModuleList([torchmetrics.MaxMetric()])})
        self.parts = nn.ModuleList([torchmetrics.MeanMetric(), inner])
        self.register_buffer("count", torch.zeros(()))

    def all(self) -> list[Any]:
        return [part for part in self.modules() if isinstance(part, torchmetrics.Metric)]

    def reset(self) -> None:
        self.count.zero_()
        for part in self.all():
            part.reset()

    def update(self, output: Any) -> None:
        self.count += 1
        for part in self.all():
            part.update(output)

    def compute(self) -> torch.Tensor:
        return torch.stack([self.count, *(part.compute() for part in self.all())])  # type: ignore[list-item]


@pytest.mark.parametrize(
    "make",
    [
        lambda: wrappers.MultioutputWrapper(torchmetrics.MeanSquaredError(), 1),
        lambda: wrappers.MultitaskWrapper(
            {
                "a": torchmetrics.MeanSquaredError(),
                "b": torchmetrics.MetricCollection([torchmetrics.MeanSquaredError()]),
            }
        ),
        lambda: torchmetrics.MetricCollection(
            {"outer": wrappers.MultioutputWrapper(torchmetrics.MeanAbsoluteError(), 1)}, prefix="x_"
        ),
        lambda: wrappers.MinMaxMetric(torchmetrics.MeanAbsoluteError()),
        Modules,
        KendallRankCorrCoef,
    ],
)
def test_metrics_inside_modules_go_on_from_what_they_had(make: Any, tmp_path: Path) -> None:
    is_tasks = isinstance(make(), wrappers.MultitaskWrapper)

    def metric() -> Any:
        made = make()
        if isinstance(made, Modules):
            return made
        pair = (lambda x: (x[:, :1], x[:, 1:])) if "Kendall" not in repr(made) else (lambda x: (x[:, 0], x[:, 1]))
        update = made.update
        if is_tasks:
            made.update = lambda p, t: update({"a": p, "b": p}, {"a": t, "b": t})
        made.pair = pair
        return made

    values = []
    for is_cut in (False, True, None):
        trainer = Engine(lambda engine, batch: batch)
        made = metric()
        trainer.add_metric(made, "m", output_transform=getattr(made, "pair", None))
        if is_cut:
            trainer.on(Events.ITERATION_COMPLETED(once=2), Checkpoint({"trainer": trainer}, tmp_path))
            trainer.on(Events.ITERATION_COMPLETED(once=2), lambda engine: engine.terminate(), priority=-1)
        if is_cut is None:
            assert Checkpoint.resume(tmp_path, {"trainer": trainer})
        values.append(trainer.run(BATCHES).metrics)
    assert str(values[2]) == str(values[0])


def test_a_bootstrapper_keeps_its_samples() -> None:
    first, second = (wrappers.BootStrapper(torchmetrics.MeanMetric(), num_bootstraps=3, raw=True) for _ in range(2))
    first.update(torch.arange(8.0))
    load_state_dict(second, state_dict(first))
    assert torch.equal(first.compute()["raw"], second.compute()["raw"])


def test_enums_and_numpy_numbers_are_kept_plainly_and_come_back_as_they_were(tmp_path: Path) -> None:
    class WithEnums(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.mode: Any = None
            self.level = Level.LOW
            self.total = np.float64(0)
            self.modes: list[Any] = []

        def update(self, output: Any) -> None:
            self.mode, self.level = Mode.SECOND, Level.HIGH
            self.total = self.total + np.float64(output.sum())
            self.modes.append(Mode.FIRST)

        def compute(self) -> float:
            assert self.mode is Mode.SECOND
            assert self.level is Level.HIGH
            assert set(self.modes) == {Mode.FIRST}
            assert isinstance(self.total, np.float64)
            return float(self.total) + len(self.modes)

    resumed, whole = resumed_and_whole(WithEnums, tmp_path)
    assert resumed == whole
    # One that saw nothing after the resume must know them, too.
    first, second = WithEnums(), WithEnums()
    first.update(BATCHES[0])
    load_state_dict(second, state_dict(first))
    assert second.compute() == first.compute()


def test_attributes_that_refer_to_one_list_still_do() -> None:
    class Aliased(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.mine: list[float] = []
            self.same = self.mine

        def update(self, output: Any) -> None:
            self.mine.append(output)

        def compute(self) -> float:
            return sum(self.same)

    first, second = Aliased(), Aliased()
    first.update(1.0)
    load_state_dict(second, state_dict(first))
    second.update(2.0)
    assert second.compute() == 3.0


def test_a_state_that_contains_itself_is_saved_without_end() -> None:
    class Circular(Metric):
        def __init__(self) -> None:
            super().__init__()
            self.total = 0.0
            self.owner = self
            self.loop: list[Any] = []
            self.loop.append(self.loop)
            self.inside = {"me": self, "loop": self.loop}

        def update(self, output: Any) -> None:
            self.total += output

        def compute(self) -> float:
            return self.total

    first, second = Circular(), Circular()
    first.update(2.0)
    load_state_dict(second, state_dict(first))
    assert second.compute() == 2.0
    assert second.loop[0] is second.loop


def test_slots_are_kept_too(tmp_path: Path) -> None:
    class Slim:
        __slots__ = ("total",)

        def reset(self) -> None:
            self.total = 0.0

        def update(self, output: Any) -> None:
            self.total += float(output.sum())

        def compute(self) -> float:
            return self.total

    resumed, whole = resumed_and_whole(Slim, tmp_path)
    assert resumed == whole


def test_a_state_of_an_earlier_version_is_read() -> None:
    metric = Average()
    load_state_dict(metric, {"value_sum": {"value": 6.0}, "count": {"value": 2}})
    assert metric.compute() == 3.0
