"""A map-style data set around another one, whose attributes it shows."""

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

__all__ = ["TransparentDataset"]


class TransparentDataset(Dataset[Any]):
    """A map-style data set around another one: attributes are those of the one inside, to read and to set.

    A class derived from it keeps attributes of its own in `__dict__`.
    """

    def __init__(self, dataset: Any, **own: Any) -> None:
        self.__dict__.update(own, _dataset=dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # the protocols of copying and pickling ask for their methods by name
            raise AttributeError(name)
        return getattr(self.__dict__["_dataset"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        # A worker_init_fn opens a file and sets it on what it finds as get_worker_info().dataset.
        setattr(self._dataset, name, value)

    def _fetched(self, indices: Sequence[Any]) -> Any:
        """The samples of the data set inside, in one fetch if it has one."""
        fetch = getattr(self._dataset, "__getitems__", None)
        return fetch(indices) if callable(fetch) else [self._dataset[index] for index in indices]
