"""Folders of safetensors as Hugging Face's libraries have them, in one file or in several with an index."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.tools.interchange.base import OtherFormat, Reader, in_files, refuse_not_tensors

__all__ = ["SafeTensors"]

_ENDING = ".safetensors"
_INDEX = "model.safetensors.index.json"
_FORMAT = {"format": "pt"}  # what transformers asks for in the header


class SafeTensors(OtherFormat):
    """`model.safetensors`, or `model-00001-of-00002.safetensors`, ... and `model.safetensors.index.json`.

    Tensors that share memory (tied weights) are in it once, under the first name; the header says which other names
    were left out, as that of `safetensors.torch.save_model` does.
    """

    name = "safetensors"

    def write(self, state: Mapping[Any, Any], read: Reader, target: Path) -> None:
        _package()
        refuse_not_tensors(state, self.name)
        kept, left_out = _once_each(state)
        shards = list(map(dict, in_files(kept.items(), lambda item: item[1].nbytes)))
        names = ["model.safetensors"]
        if len(shards) > 1:
            names = [f"model-{place:05d}-of-{len(shards):05d}.safetensors" for place in range(1, len(shards) + 1)]
        for file, shard in zip(names, shards, strict=True):
            header = _FORMAT | {other: name for other, name in left_out.items() if name in shard}
            _write({name: read(tensor) for name, tensor in shard.items()}, header, target / file)
        if len(shards) > 1:
            file_of = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            num_bytes = sum(tensor.nbytes for tensor in kept.values())
            index = {"metadata": {"total_size": num_bytes}, "weight_map": file_of}
            (target / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")

    def is_at(self, source: Path) -> bool:
        return source.suffix == _ENDING if source.is_file() else any(source.glob(f"*{_ENDING}"))

    def read(self, source: Path) -> dict[Any, Any]:
        _package()
        state: dict[Any, Any] = {}
        file_of: dict[str, Path] = {}
        for file in _files(source):
            for name, tensor in _tensors(file).items():
                if name in state:
                    raise CorruptCheckpointError(f"{name!r} is both in {file_of[name]} and in {file}.")
                state[name], file_of[name] = tensor, file
        return state


def _package() -> ModuleType:
    try:
        import safetensors.torch
    except ModuleNotFoundError as error:
        raise CheckpointError(
            f"--format safetensors needs a package that is not installed ({error.name}): pip install "
            '"dengine[safetensors]".'
        ) from None
    return safetensors.torch


# -- writing -----------------------------------------------------------------------------------------------------


def _once_each(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The tensors, each once, and the names that others of the same memory have -> the name that is kept."""
    kept: dict[str, torch.Tensor] = {}
    left_out: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        if tensor.is_meta or not tensor.numel():  # of a folder, which keeps each by itself
            kept[name] = tensor
            continue
        same = tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
        if same in first:
            left_out[name] = first[same]
        else:
            first[same] = name
            kept[name] = tensor
    return kept, left_out


def _write(tensors: Mapping[str, torch.Tensor], header: dict[str, str], path: Path) -> None:
    path.touch()
    mode = path.stat().st_mode  # safetensors would have the file read by its owner alone
    try:
        _package().save_file({name: _alone(tensor) for name, tensor in tensors.items()}, path, metadata=header)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"safetensors cannot hold this: {error}") from error
    path.chmod(mode)


def _alone(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor` row by row, in memory that no other has: safetensors takes nothing else."""
    plain = tensor.resolve_conj().resolve_neg().contiguous()
    return plain if plain.untyped_storage().nbytes() == plain.nbytes else plain.clone()


# -- reading -----------------------------------------------------------------------------------------------------


def _files(source: Path) -> list[Path]:
    if source.is_file():
        return [source]
    index = source / _INDEX
    if not index.exists():
        return sorted(source.glob(f"*{_ENDING}"))
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ValueError("it names what is no file of its folder")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCheckpointError(f"{index} is damaged: {error!r}") from error
    for name in names:
        if not (source / name).is_file():
            raise CorruptCheckpointError(f"{source / name} is missing, which {index.name} lists.")
    return [source / name for name in names]


def _tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in `file`, also by the names that were left out since they share their memory."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as opened:
            # Copies: they are parts of one memory, all of which would be saved for each.
            found = {name: opened.get_tensor(name).clone() for name in opened.keys()}  # noqa: SIM118
            header = opened.metadata() or {}
    except SafetensorError as error:
        raise CorruptCheckpointError(f"{file} is damaged: {error}") from error
    left_out = {other: found[name] for other, name in header.items() if name in found and other not in _FORMAT}
    return left_out | found
