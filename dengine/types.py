"""Protocols and types that more than one layer uses."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeGuard

import torch

__all__ = [
    "MetricValue",
    "PerRankState",
    "Stateful",
    "Straggler",
    "TakesRestored",
    "accumulator_dtype",
    "is_short_float",
    "is_stateful",
    "summable",
    "takes_restored",
    "with_per_rank_state",
]

MetricValue: TypeAlias = float | torch.Tensor


class Stateful(Protocol):
    """An object with a state that can be put into a checkpoint and taken out again."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> object: ...


def is_stateful(value: object) -> TypeGuard[Stateful]:
    """Whether it has the two methods; those of a delegate count, which `isinstance` of a Protocol does not see from
    Python 3.12 on."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))


class PerRankState(Stateful, Protocol):
    """What has, beside its state, one of each rank: an engine, with its generators and what its metrics have seen."""

    def random_state(self) -> object: ...

    def load_random_state(self, random_state: dict[str, object], /) -> None: ...


class TakesRestored(Stateful, Protocol):
    """What learns which objects were loaded with it: an engine, whose data may be one of them."""

    def data_restored(self, objects: Iterable[object], /) -> None: ...

    def load_random_state(self, random_state: dict[str, object], /, *, data_only: bool = False) -> None: ...


def with_per_rank_state(objects: Mapping[str, object]) -> dict[str, PerRankState]:
    """Those of `objects` that are engines to a checkpoint. By one name: `isinstance` of a Protocol takes 30 times as
    long."""
    return {name: value for name, value in objects.items() if hasattr(value, "load_random_state")}  # type: ignore[misc]


def takes_restored(value: object) -> TypeGuard[TakesRestored]:
    """Whether it wants to know what was loaded with it."""
    return hasattr(value, "data_restored")


@dataclass(frozen=True)
class Straggler:
    """The rank that the others waited for in an epoch.

    Attributes:
        rank: its number.
        phase: that in which it takes longer: "data", "forward", "backward", "handlers"; "step" for the rest of the
            step, or all of it if its parts are not known.
        seconds: how much longer than the others it takes for a step.
    """

    rank: int
    phase: str
    seconds: float


def accumulator_dtype(device: torch.device) -> torch.dtype:
    """The dtype in which floats are summed: float64, except on Apple's GPU, which has none."""
    return torch.float32 if device.type == "mps" else torch.float64


def summable(count: Any) -> Any:
    """`count`, a number or a tensor, in a type whose sums neither overflow nor are rounded: int64 or `float64`.

    A numpy scalar becomes a Python number. No wait for the device.
    """
    if isinstance(count, torch.Tensor):
        dtype = accumulator_dtype(count.device) if count.is_floating_point() else torch.int64
        return count if count.dtype == dtype and not count.requires_grad else count.detach().to(dtype)
    return count.item() if getattr(count, "ndim", None) == 0 and hasattr(count, "item") else count


def is_short_float(value: object) -> bool:
    """Whether it is a tensor of floats of 16 bits, in which a mean is too coarse."""
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype.itemsize == 2
