"""The models and data that this rank has prepared in a world: each run compares the models."""

import weakref
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Prepared"]


class Prepared:
    """Keeps the models and data that were prepared in a world of several ranks.

    Attributes:
        shared_data: the reason why some ranks need the same samples, once a model shows it; else None.
        deals_to_all_ranks: whether each rank gets samples of its own.
        has_warned_of_shared_data: whether the user was warned that both are true.
    """

    def __init__(self) -> None:
        self.shared_data: str | None = None
        self.deals_to_all_ranks = self.has_warned_of_shared_data = False
        self._models: dict[int, weakref.ref[nn.Module]] = {}  # by number, in the order in which they were prepared
        self._num_models = 0
        self._parts: list[tuple[weakref.ref[nn.Module], DeviceMesh]] = []

    def add_model(self, model: nn.Module) -> None:
        """Compare the parameters of `model` at the start of each run from now on."""
        self._models[self._num_models] = weakref.ref(model)
        self._num_models += 1

    def add_part(self, model: nn.Module, mesh: "DeviceMesh") -> None:
        """Note that the ranks of `mesh` have different parts of a model on purpose; `model` is this rank's part."""
        self._parts.append((weakref.ref(model), mesh))

    def living_parts(self) -> "list[tuple[nn.Module, DeviceMesh]]":
        """The arguments of `add_part` for models that are still alive."""
        living = [(model, mesh) for each, mesh in self._parts if (model := each()) is not None]
        self._parts = [each for each in self._parts if each[0]() is not None]
        return living

    def living_models(self) -> dict[int, nn.Module]:
        """The models of `add_model` that are still alive, by number. That depends on this rank's garbage collector."""
        living = {number: model for number, each in self._models.items() if (model := each()) is not None}
        self._models = {number: self._models[number] for number in living}
        return living
