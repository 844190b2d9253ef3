"""One file, as `torch.save` writes it and `torch.load(weights_only=True)` reads it."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dengine.errors import CorruptCheckpointError
from dengine.tools.interchange.base import OtherFormat, Reader
from dengine.trees import map_leaves

__all__ = ["TorchFile"]

_ENDINGS = (".pt", ".pth", ".bin")


class TorchFile(OtherFormat):
    """What `torch.load(path, weights_only=True)` gives. All of it is in memory when it is written from a folder."""

    name = "torch"
    is_file = True

    def write(self, state: Mapping[Any, Any], read: Reader, target: Path) -> None:
        torch.save(map_leaves(lambda leaf: read(leaf) if isinstance(leaf, torch.Tensor) else leaf, state), target)

    def is_at(self, source: Path) -> bool:
        return source.is_file() and source.suffix in _ENDINGS

    def read(self, source: Path) -> dict[Any, Any]:
        try:
            state = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
        except OSError:
            raise
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__qualname__])[0]
            raise CorruptCheckpointError(
                f"{source} cannot be read by torch.load(weights_only=True): {reason}"
            ) from error
        if not isinstance(state, dict):
            raise CorruptCheckpointError(f"{source} holds a {type(state).__qualname__}, no dict of tensors.")
        return state
