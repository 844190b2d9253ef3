"""What this rank has prepared in a world: models, which each run compares, and what tells who shares data."""

import weakref
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Prepared"]


class Prepared:
    """What a world of several ranks keeps of the models and data that were prepared in it.

    Attributes:
        shared_data: why some ranks need the same samples, once a model shows it.
        deals_to_all_ranks: whether each rank gets samples of its own.
        has_warned_of_shared_data: that both are true.
    """

    def __init__(self) -> None:
        self.shared_data: str | None = None
        self.deals_to_all_ranks = self.has_warned_of_shared_data = False
        self._models: dict[int, weakref.ref[nn.Module]] = {}  # by their number in the order of being prepared
        self._num_models = 0
        self._parts: list[tuple[weakref.ref[nn.Module], DeviceMesh]] = []

    def add_model(self, model: nn.Module) -> None:
        """Have the parameters of `model` compared at the start of each run."""
        self._models[self._num_models] = weakref.ref(model)
        self._num_models += 1

    def add_part(self, model: nn.Module, mesh: "DeviceMesh") -> None:
        """Note that the ranks of `mesh` have other parts of a model than `model`, on purpose."""
        self._parts.append((weakref.ref(model), mesh))

    def living_parts(self) -> "list[tuple[nn.Module, DeviceMesh]]":
        """What `add_part` was given, of models that still live."""
        living = [(model, mesh) for each, mesh in self._parts if (model := each()) is not None]
        self._parts = [each for each in self._parts if each[0]() is not None]
        return living

    def living_models(self) -> dict[int, nn.Module]:
        """The models of `add_model` that still live, by number. Which do depends on this rank's garbage collector."""
        living = {number: model for number, each in self._models.items() if (model := each()) is not None}
        self._models = {number: self._models[number] for number in living}
        return living
