"""Containers are taken for what they are, wherever the package looks into one."""

import dataclasses
from collections import Counter, OrderedDict, UserDict, UserList, defaultdict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch

from dengine import Engine, Events, distributed, trees
from dengine.handlers import TerminateOnNan
from dengine.metrics import Accuracy, DistributedMetric
from dengine.metrics.core.batch_size import num_samples
from dengine.supervised.batches import detached, on_device
from dengine.tracking.values import plain

P = namedtuple("P", ["x", "y"])


class Typed(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass
class Data:
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True, slots=True)
class Frozen:
    x: Any
    y: Any


class ReadOnly(Mapping[str, Any]):
    def __init__(self, x: Any, y: Any) -> None:
        self._inside = {"x": x, "y": y}

    def __getitem__(self, key: str) -> Any:
        return self._inside[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._inside)

    def __len__(self) -> int:
        return len(self._inside)


class Row(list[Any]):
    """A list with a name of its own."""


def default(x: Any, y: Any) -> defaultdict[str, Any]:
    return defaultdict(list, x=x, y=y)


CONTAINERS: dict[str, Callable[[Any, Any], Any]] = {
    "dict": lambda x, y: {"x": x, "y": y},
    "ordered dict": lambda x, y: OrderedDict(x=x, y=y),
    "defaultdict": default,
    "user dict": lambda x, y: UserDict(x=x, y=y),
    "read-only mapping": ReadOnly,
    "mapping proxy": lambda x, y: MappingProxyType({"x": x, "y": y}),
    "list": lambda x, y: [x, y],
    "subclass of list": lambda x, y: Row([x, y]),
    "tuple": lambda x, y: (x, y),
    "namedtuple": P,
    "typed named tuple": Typed,
    "dataclass": Data,
    "frozen dataclass with slots": Frozen,
}
MAKERS = pytest.mark.parametrize("make", CONTAINERS.values(), ids=CONTAINERS.keys())
BECOME_A_DICT = (ReadOnly, MappingProxyType)


def is_like(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, BECOME_A_DICT):
        return type(found) is dict and found == dict(wanted)
    return type(found) is type(wanted) and bool(found == wanted)


@MAKERS
def test_leaves_are_replaced_and_the_container_stays_what_it_is(make: Callable[[Any, Any], Any]) -> None:
    value = make(1, [2, (3,)])
    assert is_like(trees.map_leaves(lambda leaf: 10 * leaf, value), make(10, [20, (30,)]))
    assert list(trees.leaves(value)) == [1, 2, 3]
    assert list(trees.leaves(make(1, 2))) == [1, 2]
    assert [path for path, _ in trees.named_leaves(value, "a")][1:] in (["a.y.0", "a.y.1.0"], ["a.1.0", "a.1.1.0"])


@MAKERS
def test_all_reduce_gives_back_the_container_that_it_was_given(make: Callable[[Any, Any], Any]) -> None:
    value = make(1.0, {"b": 2, "a": torch.tensor(3)})
    assert is_like(distributed.all_reduce(value), value)
    assert is_like(distributed.all_reduce(make(1.0, 2.0), "mean"), make(1.0, 2.0))


@MAKERS
def test_a_batch_is_moved_and_a_step_s_output_is_detached_in_any_container(make: Callable[[Any, Any], Any]) -> None:
    weight = torch.ones(2, requires_grad=True)
    output = make(weight * 2, "text")
    free = detached(output)
    assert [getattr(leaf, "requires_grad", None) for leaf in trees.leaves(free)] == [False, None]
    moved = on_device(output, torch.device("meta"))
    assert [getattr(leaf, "is_meta", None) for leaf in trees.leaves(moved)] == [True, None]
    assert next(trees.leaves(output)).requires_grad


@MAKERS
def test_a_nan_is_found_in_any_container(make: Callable[[Any, Any], Any]) -> None:
    trainer = Engine(lambda engine, batch: make(1.0, [batch]))
    trainer.on(Events.ITERATION_COMPLETED, TerminateOnNan())
    with pytest.warns(RuntimeWarning, match="NaN"):
        assert trainer.run([0.0, float("nan"), 1.0]).iteration == 2


@MAKERS
def test_a_configuration_is_recorded_by_the_names_of_its_parts(make: Callable[[Any, Any], Any]) -> None:
    value = make(1, 2)
    assert plain(value) == ({"x": 1, "y": 2} if trees.has_names(value) else [1, 2])


@MAKERS
def test_the_size_of_a_batch_is_found_in_any_container(make: Callable[[Any, Any], Any]) -> None:
    assert num_samples(make(torch.zeros(5, 2), torch.zeros(5)), torch.zeros(5)) == 5


def test_a_named_tuple_as_a_prediction_is_moved_for_a_distributed_metric() -> None:
    metric = DistributedMetric(Accuracy(), "mean", device="cpu")
    metric.update(P(torch.tensor([0, 1]), torch.tensor([0, 0])))
    assert metric.compute() == 0.5


@pytest.mark.parametrize(
    "leaf", [None, 1, "text", torch.ones(2), {1, 2}, Data, P, UserList([1]), range(3)], ids=lambda each: repr(each)[:20]
)
def test_anything_else_is_a_leaf(leaf: Any) -> None:
    assert trees.parts(leaf) is None
    assert trees.map_leaves(lambda each: each, leaf) is leaf
    assert list(trees.leaves(leaf)) == [leaf]


def test_what_a_container_has_besides_its_parts_is_kept() -> None:
    mapped = trees.map_leaves(lambda leaf: leaf + 1, default(1, 2))
    assert mapped.default_factory is list
    assert isinstance(trees.map_leaves(lambda leaf: leaf + 1, Counter(a=1)), Counter)
    data = Data(1, 2)
    data.note = "mine"  # type: ignore[attr-defined]
    assert trees.map_leaves(lambda leaf: leaf + 1, data).note == "mine"


def test_a_dataclass_whose_field_is_not_set_keeps_it_unset() -> None:
    data = Data(1, 2)
    del data.y
    mapped = trees.map_leaves(lambda leaf: leaf + 1, data)
    assert mapped.x == 2
    assert not hasattr(mapped, "y")


def test_two_mappings_filled_in_another_order_are_reduced_alike_and_keep_their_order() -> None:
    from dengine.comm.nested import flatten, signature

    first, second = OrderedDict(a=1.0, b=2.0), OrderedDict(b=2.0, a=1.0)
    assert signature(first) == signature(second)
    leaves: list[torch.Tensor] = []
    rebuild = flatten(second, leaves, "sum")
    assert [leaf.item() for leaf in leaves] == [1.0, 2.0]
    assert list(rebuild(leaves).items()) == [("b", 2.0), ("a", 1.0)]


def test_a_container_that_is_said_to_be_a_leaf_is_one() -> None:
    value = [P(1, 2), 3]
    assert trees.map_leaves(lambda leaf: "leaf", value, is_leaf=lambda each: isinstance(each, P)) == ["leaf", "leaf"]
