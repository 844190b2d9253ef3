"""What a state may hold: it comes back as what it equals, or is refused with its path, before a byte is written."""

import collections
import enum
import pathlib
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dengine import Engine, Events
from dengine.checkpoint import load, save
from dengine.errors import CheckpointError
from dengine.handlers import Checkpoint


class Holder:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


class Text(str, enum.Enum):
    A = "a"


class Number(enum.IntEnum):
    ONE = 1


class Flags(enum.IntFlag):
    X = 4


class Pure(enum.Enum):
    A = "a"


Pair = collections.namedtuple("Pair", "a b")


@pytest.mark.parametrize("ending", [".pt", ""])
@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (Text.A, "a"),
        (Number.ONE, 1),
        (Flags.X, 4),
        (np.float64(0.1), 0.1),
        (np.float32(0.5), 0.5),
        (np.int64(-3), -3),
        (np.uint8(3), 3),
        (np.bool_(True), True),
        (np.str_("s"), "s"),
        (np.complex128(1 + 2j), 1 + 2j),
        ({1, 2}, {1, 2}),
        (frozenset({1}), {1}),
        ({Text.A: [np.int64(1)]}, {"a": [1]}),
        ((np.float64(1), (Number.ONE,)), (1.0, (1,))),
        (torch.Size([2, 3]), torch.Size([2, 3])),
        (torch.float16, torch.float16),
        (torch.device("cpu"), torch.device("cpu")),
        (collections.OrderedDict(b=1, a=np.int64(2)), {"b": 1, "a": 2}),
        (collections.defaultdict(int, a=1), {"a": 1}),
        (types.MappingProxyType({"a": Number.ONE}), {"a": 1}),
        (b"x", b"x"),
        (2**80, 2**80),
    ],
    ids=str,
)
def test_what_equals_plain_data_is_stored_as_that(tmp_path: Path, given: Any, expected: Any, ending: str) -> None:
    save(tmp_path / f"c_1{ending}", {"it": Holder({"x": given, "list": [given]})})
    into = Holder({"x": None, "list": []})
    load(tmp_path / f"c_1{ending}", {"it": into})
    assert into.state == {"x": expected, "list": [expected]}
    assert type(into.state["x"]) is type(expected) or isinstance(into.state["x"], dict)


@pytest.mark.parametrize("ending", [".pt", ""])
@pytest.mark.parametrize(
    ("given", "way_out"),
    [
        (Pure.A, r"\.value"),
        (pathlib.Path("a"), r"str\(\)"),
        (np.arange(3), "torch.from_numpy"),
        (Pair(1, 2), r"tuple\(\)"),
        (collections.deque([1]), r"list\(\)"),
        (lambda: None, "function|object|slice"),
        (object(), "function|object|slice"),
        (slice(1), "function|object|slice"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_only_a_pickle_could_bring_back_is_named_by_its_path(
    tmp_path: Path, given: Any, way_out: str, ending: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"(?s)'it/a/1/x'.*{way_out if ending == '.pt' else 'is a'}") as caught:
        save(tmp_path / f"c_1{ending}", {"it": Holder({"a": [0, {"x": given}]})})
    assert "'dengine'" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def cyclic_list() -> Any:
    state: list[Any] = [1]
    state.append(state)
    return state


def cyclic_dict() -> Any:
    state: dict[str, Any] = {"a": [{}]}
    state["a"][0]["b"] = (state,)
    return state


def deep(levels: int) -> Any:
    state: Any = 1
    for _ in range(levels):
        state = [state]
    return state


def wide(levels: int) -> Any:
    state: Any = [1]
    for _ in range(levels):
        state = [state, state]
    return state


@pytest.mark.parametrize("is_asynchronous", [False, True])
@pytest.mark.parametrize("ending", [".pt", ""])
@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"x": cyclic_list()}, r"'it/x/1' contains itself"),
        (cyclic_dict(), r"'it/a/0/b/0' contains itself"),
        ({"x": deep(5000)}, "lies deeper than"),
        ({"x": wide(60)}, "values"),
    ],
    ids=["list", "dict", "deep", "wide"],
)
def test_a_state_without_an_end_is_refused_at_once(
    tmp_path: Path, state: Any, reason: str, ending: str, is_asynchronous: bool
) -> None:
    objects = {"it": Holder(state)}
    if not is_asynchronous:
        with pytest.raises(CheckpointError, match=reason):
            save(tmp_path / f"c_1{ending}", objects)
        return
    trainer = Engine(lambda engine, batch: None)
    trainer.on(Events.COMPLETED, Checkpoint(objects, tmp_path, asynchronous=True))
    with pytest.raises(CheckpointError, match=reason):
        trainer.run([1])


def test_one_list_in_two_places_is_no_circle(tmp_path: Path) -> None:
    shared = [1, 2]
    save(tmp_path / "c_1.pt", {"it": Holder({"a": shared, "b": shared})})
    into = Holder({})
    load(tmp_path / "c_1.pt", {"it": into})
    assert into.state == {"a": [1, 2], "b": [1, 2]}


class Wrapped(torch.Tensor):
    """A tensor made of two others, as torchao's are: without memory of its own."""

    inner: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, scale: torch.Tensor) -> "Wrapped":
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=torch.float32)

    def __init__(self, inner: torch.Tensor, scale: torch.Tensor) -> None:
        self.inner, self.scale = inner, scale

    def __tensor_flatten__(self) -> Any:
        return ["inner", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> "Wrapped":
        return Wrapped(inner["inner"], inner["scale"])

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
            return Wrapped(args[0].inner.clone(), args[0].scale.clone())
        if function is torch.ops.aten.copy_.default:
            args[0].inner.copy_(args[1].inner)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        raise NotImplementedError(function)


@pytest.mark.parametrize("is_asynchronous", [False, True])
def test_a_tensor_made_of_others_is_saved_where_torch_may_load_it(tmp_path: Path, is_asynchronous: bool) -> None:
    tensors = {str(k): Wrapped(torch.full((3,), k, dtype=torch.int8), torch.ones(1)) for k in range(3)}
    trainer = Engine(lambda engine, batch: None)
    checkpoint = Checkpoint({"it": Holder(tensors)}, tmp_path, asynchronous=is_asynchronous)
    trainer.on(Events.COMPLETED, checkpoint)
    with pytest.raises(CheckpointError, match=r"'it/0' is a .*Wrapped.*add_safe_globals"):
        trainer.run([1])
    with torch.serialization.safe_globals([Wrapped]):
        trainer.run([1])
        into = Holder({})
        load(tmp_path / "checkpoint_1.pt", {"it": into})
        assert [into.state[str(k)].inner.tolist() for k in range(3)] == [[k] * 3 for k in range(3)]
        load(tmp_path / "checkpoint_1.pt", {"it": Holder(tensors)})  # whose own state is copied before
        with pytest.raises(CheckpointError, match=r"'it/0' is a Wrapped.*\.pt"):
            save(tmp_path / "folder", {"it": Holder(tensors)})


def test_a_metric_with_an_enum_is_saved_in_the_midst_of_an_epoch(tmp_path: Path) -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Rough(torchmetrics.Metric):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.mode, self.rate = Text.A, np.float32(0.5)
            self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

        def update(self, value: torch.Tensor) -> None:
            self.total += value

        def compute(self) -> torch.Tensor:
            return self.total

    trainer = Engine(lambda engine, batch: torch.tensor(float(batch)))
    trainer.add_metric(Rough(), "total")
    trainer.on(Events.ITERATION_COMPLETED(once=2), Checkpoint({"trainer": trainer}, tmp_path))
    assert trainer.run([1, 2, 4]).metrics["total"] == 7
    other = Engine(lambda engine, batch: torch.tensor(float(batch)))
    other.add_metric(Rough(), "total")
    Checkpoint.resume(tmp_path, {"trainer": other})
    assert other.run([1, 2, 4]).metrics["total"] == 7


def test_a_lazy_module_is_named_before_it_has_seen_a_batch(tmp_path: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(2))
    with pytest.raises(CheckpointError, match=r"'model/0\.weight'.*lazy.*run one batch"):
        save(tmp_path / "c_1.pt", {"model": model})
    save(tmp_path / "c_1.pt", {"model": nn.Sequential(nn.Linear(3, 2))})
    with pytest.raises(CheckpointError, match=r"'model/0\.weight'.*lazy.*run one batch"):
        load(tmp_path / "c_1.pt", {"model": model})
    model(torch.ones(1, 3))
    load(tmp_path / "c_1.pt", {"model": model})


def test_a_model_without_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"'model/weight' is a tensor on the meta device"):
        save(tmp_path / "c_1.pt", {"model": nn.Linear(2, 2, device="meta")})


@pytest.mark.parametrize("ending", [".pt", ""])
def test_numpy_numbers_in_the_groups_of_an_optimizer_are_saved(tmp_path: Path, ending: str) -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=np.float64(0.5), momentum=np.float32(0.25))
    save(tmp_path / f"c_1{ending}", {"model": model, "optimizer": optimizer})
    other = torch.optim.SGD(model.parameters(), lr=1.0)
    load(tmp_path / f"c_1{ending}", {"model": model, "optimizer": other})
    assert other.param_groups[0]["lr"] == 0.5
    assert other.param_groups[0]["momentum"] == 0.25
    assert type(other.param_groups[0]["lr"]) is float
