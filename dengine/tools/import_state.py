"""`python -m dengine import SOURCE -o TARGET`: what other tools have saved, as a checkpoint."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dengine.checkpoint import save
from dengine.checkpoint.formats.sharded.tree import all_tensors
from dengine.compiled_names import aligned
from dengine.errors import CheckpointError
from dengine.tools.arguments import a_path
from dengine.tools.interchange.formats import FORMATS, format_of
from dengine.tools.target import add_target, exit_code_of, refuse_taken
from dengine.tools.text import say, size_text

__all__ = ["configure", "run"]

_WRAPPER = "module."  # as DistributedDataParallel calls what it wraps


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=a_path,
        help="a folder (or file) of safetensors, a folder of torch.distributed.checkpoint, or a file of torch.save",
    )
    add_target(
        parser, "a new checkpoint: a file that ends with .pt, or a folder; 'checkpoint_0.pt' can be resumed from"
    )
    parser.add_argument("--format", choices=list(FORMATS), help="what the source is, if it does not show it")
    parser.add_argument("--name", default="model", help="the object that will load it; 'model' by default")


def run(options: argparse.Namespace) -> int:
    """Gives 0 if the target is there, 1 if the source is damaged, 2 if this cannot be done; no target then."""
    return exit_code_of(lambda: _import(options.source, options.output, options.format, options.name))


def _import(source: Path, target: Path, format_name: str | None, name: str) -> None:
    refuse_taken(target)
    format = format_of(source, format_name)
    state = _plain_names(_inside(format.read(source), name, source))
    if is_empty_folder := target.is_dir():
        target.rmdir()  # a checkpoint takes the place of a checkpoint only
    try:
        save(target, {name: _Imported(state)})
    except BaseException:
        if is_empty_folder:
            target.mkdir()
        raise
    tensors = all_tensors(state)
    num_bytes = size_text(sum(tensor.nbytes for tensor in tensors))
    say(f"{target}: {len(tensors)} tensors ({num_bytes}) from {source} ({format.name}), as {name!r}")


class _Imported:
    """An object that has a state already."""

    def __init__(self, state: dict[Any, Any]) -> None:
        self._state = state

    def state_dict(self) -> dict[str, Any]:
        return self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise NotImplementedError


def _inside(state: dict[Any, Any], name: str, source: Path) -> dict[Any, Any]:
    """`state`, or what it has under `name` if it holds the states of several objects.

    Raises: CheckpointError: it has several, and none of that name; or no tensor at all.
    """
    if not all_tensors(state):
        raise CheckpointError(f"{source} holds no tensors.")
    if any(isinstance(value, torch.Tensor) for value in state.values()):
        return state
    if not isinstance(found := state.get(name), Mapping) or not all_tensors(found):
        names = [str(each) for each, value in state.items() if isinstance(value, Mapping) and all_tensors(value)]
        raise CheckpointError(
            f"{source} holds several states, but none of the name {name!r}: there are {', '.join(map(repr, names))}. "
            "Choose one of them by --name."
        )
    return dict(found)


def _plain_names(state: dict[Any, Any]) -> dict[Any, Any]:
    """`state` with the names of the bare model, without those of DDP and `torch.compile`."""
    if all(isinstance(name, str) and name.startswith(_WRAPPER) for name in state):
        state = {name.removeprefix(_WRAPPER): value for name, value in state.items()}
    plain: dict[Any, Any] = aligned(state, {})
    return plain
