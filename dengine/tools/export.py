"""`python -m dengine export CHECKPOINT -o TARGET --format FORMAT`: a state of a checkpoint as other tools read it."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from dengine import atomic_files
from dengine.checkpoint.formats.sharded.tree import all_tensors
from dengine.checkpoint.reading import SavedStates, saved_states
from dengine.checkpoint.states.snapshot import RESERVED
from dengine.errors import CheckpointError
from dengine.tools.arguments import a_path
from dengine.tools.interchange.base import OtherFormat
from dengine.tools.interchange.formats import FORMATS
from dengine.tools.target import add_target, exit_code_of, refuse_taken
from dengine.tools.text import say, size_text

__all__ = ["configure", "run"]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=a_path, help="a checkpoint: a file (.pt), or a folder of shards")
    add_target(parser, "a new file that ends with .pt (--format torch), or a new folder")
    parser.add_argument("--format", required=True, choices=list(FORMATS), help="who is to read it")
    parser.add_argument("--name", default="model", help="which of the saved objects; 'model' by default")


def run(options: argparse.Namespace) -> int:
    """Gives 0 if the target is there, 1 if the checkpoint is damaged, 2 if this cannot be done; no target then."""
    return exit_code_of(lambda: _export(options.checkpoint, options.output, FORMATS[options.format], options.name))


def _export(source: Path, target: Path, format: OtherFormat, name: str) -> None:
    _refuse_suffix(target, format)
    refuse_taken(target)
    saved = saved_states(source)
    state = _state(saved, name)
    write_whole = atomic_files.write_file if format.is_file else atomic_files.write_folder
    write_whole(target, partial(format.write, state, saved.read))
    tensors = all_tensors(state)
    num_bytes = size_text(sum(tensor.nbytes for tensor in tensors))
    say(f"{target}: {len(tensors)} tensors ({num_bytes}) of {name!r} in {source}, as {format.name}")


def _refuse_suffix(target: Path, format: OtherFormat) -> None:
    if format.is_file and target.suffix != ".pt":
        raise CheckpointError(f"--format {format.name} is one file, whose name ends with .pt, but -o is {target}.")
    if not format.is_file and target.suffix in (".pt", ".safetensors", ".bin"):
        raise CheckpointError(f"--format {format.name} is a folder, but -o {target} has the ending of a file.")


def _state(saved: SavedStates, name: str) -> dict[Any, Any]:
    names = [each for each in saved.states if each != RESERVED]
    if name not in names:
        raise CheckpointError(
            f"{saved.path} holds no {name!r}, but {', '.join(map(repr, names))}: choose one of them by --name."
        )
    state = saved.states[name]
    if not isinstance(state, dict):
        raise CheckpointError(f"{name!r} in {saved.path} is a {type(state).__qualname__}, no state by names.")
    return state
