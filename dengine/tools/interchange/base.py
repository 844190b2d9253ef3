"""What a format of other tools is: it writes one state into a new file or folder, and reads one."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, TypeVar

import torch

from dengine.errors import CheckpointError

__all__ = ["OtherFormat", "Reader", "in_files", "refuse_not_tensors"]

T = TypeVar("T")

Reader: TypeAlias = Callable[[torch.Tensor], torch.Tensor]  # from what stands for a tensor in a state to its data

FILE_BYTES = 4 << 30  # of tensors in a file, and so what is in memory at a time
_MOST_NAMED = 3


class OtherFormat(ABC):
    """A format of other tools.

    Attributes:
        name: as `--format` takes it.
        is_file: whether it is one file, which ends with `.pt`, rather than a folder.
    """

    name: ClassVar[str]
    is_file: ClassVar[bool] = False

    @abstractmethod
    def write(self, state: Mapping[Any, Any], read: Reader, target: Path) -> None:
        """Write `state` to `target`: a path where nothing is or, of a folder, one that is empty. No more than
        FILE_BYTES of tensors, or one, are in memory at a time, if the format allows it.

        Raises: CheckpointError: it cannot hold such a state, or a package is missing.
        """

    @abstractmethod
    def is_at(self, source: Path) -> bool:
        """Whether `source` looks like one."""

    @abstractmethod
    def read(self, source: Path) -> dict[Any, Any]:
        """The state in `source`, in memory. Nothing in it is executed.

        Raises:
            CorruptCheckpointError: it is damaged. CheckpointError: it is none, or a package is missing.
        """


def refuse_not_tensors(state: Mapping[Any, Any], format_name: str) -> None:
    """
    Raises:
        CheckpointError: `state` has something else than tensors by name.
    """
    others = [str(name) for name, value in state.items() if not isinstance(value, torch.Tensor)]
    if others:
        more = f" and {len(others) - _MOST_NAMED} more" if len(others) > _MOST_NAMED else ""
        raise CheckpointError(
            f"{format_name} holds tensors by their names and nothing else, but {', '.join(others[:_MOST_NAMED])}{more} "
            "is no tensor: take --format dcp or torch, or the --name of a model."
        )


def in_files(items: Iterable[T], num_bytes_of: Callable[[T], int]) -> Iterator[list[T]]:
    """`items` in their order, in lists of FILE_BYTES at most, or of one item; one empty list if there is none."""
    file: list[T] = []
    total = 0
    for item in items:
        num_bytes = num_bytes_of(item)
        if file and total + num_bytes > FILE_BYTES:
            yield file
            file, total = [], 0
        file.append(item)
        total += num_bytes
    yield file
