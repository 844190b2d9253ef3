"""Protocols and aliases that more than one room uses."""

from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch

__all__ = ["MetricValue", "Stateful"]

MetricValue: TypeAlias = float | torch.Tensor


@runtime_checkable
class Stateful(Protocol):
    """What can be put into a checkpoint and taken out again."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...
