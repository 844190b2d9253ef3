"""`python -m dengine inspect PATH`: show the content of a checkpoint, or of a folder of them, and verify every byte."""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent
from typing import Any

import torch

from dengine.checkpoint import Entry, verify
from dengine.checkpoint.catalogue import manifest
from dengine.checkpoint.catalogue.manifest import entry_of
from dengine.checkpoint.formats.sharded.files import METADATA, Chunk
from dengine.checkpoint.formats.sharded.saved import read_metadata
from dengine.checkpoint.formats.sharded.tree import decoded, path_text
from dengine.checkpoint.formats.sharded.verify import check_file, holds_shards, is_shard_folder
from dengine.checkpoint.reading import mapped_states
from dengine.checkpoint.states.snapshot import RANDOM, RESERVED
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.tools.arguments import a_path
from dengine.tools.text import say, size_text

__all__ = ["configure", "run"]

_WIDEST = 60  # characters of a value in a table


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", type=a_path, help="a checkpoint (.pt), or a folder: of shards, or with checkpoints")


def run(options: argparse.Namespace) -> int:
    """Run the command. Gives 0 if all is intact, 1 if something is corrupt, 2 if there is nothing to inspect."""
    try:
        return _inspected(options.path)
    except OSError as error:
        return _refused(f"{options.path} cannot be read: {error}.")


def _inspected(path: Path) -> int:
    if is_shard_folder(path, alone=True) or holds_shards(path):
        return _shards(path)
    if path.is_dir():
        return _folder(path)
    if not path.exists():
        return _refused(f"{path} does not exist.")
    if path.name == manifest.FILE_NAME or (path.suffix != ".pt" and holds_shards(path.parent)):
        return _refused(f"{path} is a part of {path.parent}, which can be inspected.")
    return _file(path)


def _refused(reason: str) -> int:
    say(f"{reason} `python -m dengine inspect` takes a checkpoint or a folder with checkpoints.", sys.stderr)
    return 2


# -- a folder ----------------------------------------------------------------------------------------------------


def _folder(folder: Path) -> int:
    found = manifest.scan(folder)
    rows, problems = [], []
    for entry in sorted((*found.entries, *found.damaged), key=lambda each: (each.prefix, each.step or 0, each.name)):
        reason = _damage(folder / entry.name)
        rows.append([*_described(entry), "CORRUPT" if reason else "intact"])
        problems += [reason] if reason else []
    for name in found.unknown:
        if (reason := _damage(folder / name)) is not None:  # None if it was replaced at this moment
            rows.append([name, "", "", "?", "?", "?", "?", "CORRUPT"])
            problems.append(reason)
    for entry in found.lost:
        rows.append([*_described(entry), "LOST"])
        problems.append(f"{entry.name} is listed in the manifest, but not there.")
    if not rows:
        return _refused(f"{folder} holds no checkpoint.")
    say(_table(["file", "step", "score", "size", "ranks", "dengine", "torch", "verified"], rows))
    if found.problem is not None:
        problems.append(f"{manifest.FILE_NAME} {found.problem}; the next save rebuilds it.")
    _print_below(problems)
    return 1 if problems else 0


def _print_below(problems: list[str]) -> None:
    """Print the problems below a table: as sentences, they are too long for a column."""
    for number, each in enumerate(problems):
        say(f"{'' if number else chr(10)}{each}")


def _described(entry: Entry) -> list[str]:
    score = "" if entry.score is None else f"{entry.score_name}={entry.score:g}"
    step, ranks = ("" if number is None else str(number) for number in (entry.step, entry.world_size or None))
    versions = [entry.versions.get(name, "?") for name in ("dengine", "torch")]
    return [entry.name, step, score, size_text(entry.num_bytes) if entry.num_bytes else "?", ranks or "?", *versions]


def _damage(path: Path) -> str | None:
    try:
        verify(path)
    except CheckpointError as error:
        return str(error).replace(str(path), path.name)
    return None


# -- one file ----------------------------------------------------------------------------------------------------


def _file(path: Path) -> int:
    try:
        entry = verify(path)
    except CorruptCheckpointError as error:
        say(f"CORRUPT: {error}")
        return 1
    except CheckpointError as error:
        return _refused(str(error))
    try:
        states = mapped_states(path)
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__qualname__])[0]
        say(f"CORRUPT: {path} is as it was saved, but cannot be loaded without executing a pickle: {reason}")
        return 1
    say(f"{path}: intact, SHA-256 {entry.sha256}")
    say(_headline(entry))
    for name, state in states.items():
        leaves = [] if name == RESERVED else list(_leaves(state, ""))
        rows = [[key, *_shown(value)] for key, value in leaves]
        _print_state(name, state, leaves, ["name", "shape", "dtype", "size"], rows)
    return 0


def _headline(entry: Entry) -> str:
    score = "" if entry.score is None else f", {entry.score_name}={entry.score:g}"
    step = "no step" if entry.step is None else f"step {entry.step}"
    versions = ", ".join(f"{name} {number}" for name, number in sorted(entry.versions.items()))
    return f"{step}{score}; {size_text(entry.num_bytes)}; saved by {_ranks(entry.world_size)}; {versions}"


def _print_state(name: str, state: Any, leaves: list[tuple[str, Any]], head: list[str], rows: list[list[str]]) -> None:
    if name == RESERVED:  # the states of generators are long, and mean nothing to a reader
        entry: dict[str, Any] = state if isinstance(state, dict) else {}
        found = entry.get(RANDOM)
        of_ranks: dict[str, Any] = found if isinstance(found, dict) else {}
        drawn = ", ".join(f"of {owner} on {_ranks(len(each))}" for owner, each in of_ranks.items()) or "none"
        say(f"\n{name}: format {entry.get('format', '?')}; random number generators: {drawn}")
        return
    total = sum(value.nbytes for _, value in leaves if isinstance(value, torch.Tensor))
    values = "1 value" if len(leaves) == 1 else f"{len(leaves)} values"
    say(f"\n{name} ({values}, {size_text(total)} in tensors)")
    say(indent(_table(head, rows), "  "))


def _ranks(number: int) -> str:
    return "1 rank" if number == 1 else f"{number} ranks"


# -- one folder of shards ----------------------------------------------------------------------------------------


def _shards(path: Path) -> int:
    try:
        metadata, entry = read_metadata(path), entry_of(path)
    except CorruptCheckpointError as error:
        say(f"CORRUPT: {error}")
        return 1
    except (OSError, ValueError) as error:
        return _refused(str(error))
    damages = {name: _shard_damage(path, name, *expected) for name, expected in metadata.files.items()}
    verdicts = {name: "CORRUPT" if damage else "intact" for name, damage in damages.items()}
    damaged = [name for name, damage in damages.items() if damage]
    state = f"CORRUPT ({', '.join(damaged)})" if damaged else "intact"
    say(f"{path}: {state}, SHA-256 of {METADATA} {entry.sha256}")
    say(f"{_headline(entry)}\n")
    sizes = [[name, size_text(num_bytes), verdicts[name]] for name, (num_bytes, _) in metadata.files.items()]
    say(_table(["file", "size", "verified"], sizes))
    _print_below([damage for damage in damages.values() if damage])

    def placeholder(path_of_leaf: tuple[Any, ...], dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
        tensor = torch.empty(shape, dtype=dtype, device="meta")  # has a shape, but needs no memory
        holders[id(tensor)] = metadata.chunks.get(path_text(path_of_leaf), [])
        alive.append(tensor)
        return tensor

    holders: dict[int, list[Chunk]] = {}
    alive: list[torch.Tensor] = []
    for name, state_of in decoded(metadata.states, placeholder).items():
        leaves = [] if name == RESERVED else list(_leaves(state_of, ""))
        rows = [[key, *_shown(value), *_written_by(holders.get(id(value), []), verdicts)] for key, value in leaves]
        _print_state(name, state_of, leaves, ["name", "shape", "dtype", "size", "ranks", "verified"], rows)
    return 1 if damaged else 0


def _shard_damage(folder: Path, name: str, num_bytes: int, sha256: str) -> str | None:
    try:
        check_file(folder / name, num_bytes, sha256)
    except (CorruptCheckpointError, OSError) as error:
        return str(error).replace(str(folder / name), name)
    return None


def _written_by(chunks: list[Chunk], verdicts: dict[str, str]) -> list[str]:
    """The ranks that wrote the parts of a tensor, and whether their files are intact."""
    if not chunks:
        return ["", "intact"]  # it is in metadata.json, which has been checked
    files = sorted({chunk.file for chunk in chunks})
    ranks = ",".join(str(int(file.removeprefix("rank_").removesuffix(".bin"))) for file in files)
    return [ranks, "intact" if all(verdicts.get(file) == "intact" for file in files) else "CORRUPT"]


def _leaves(value: Any, path: str) -> Iterator[tuple[str, Any]]:
    """The values inside `value` that are not dicts or lists, each with its path."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple) and any(isinstance(part, dict | list | torch.Tensor) for part in value):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{path}[{index}]")
    else:
        yield path, value


def _shown(value: Any) -> list[str]:
    if isinstance(value, torch.Tensor):
        return [
            "x".join(map(str, value.shape)) or "scalar",
            str(value.dtype).removeprefix("torch."),
            size_text(value.nbytes),
        ]
    text = repr(value)
    return [text if len(text) <= _WIDEST else text[: _WIDEST - 3] + "...", type(value).__name__, ""]


# -- text --------------------------------------------------------------------------------------------------------


def _table(head: list[str], rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)
