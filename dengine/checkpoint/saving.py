"""Save to a given path, and remove nothing else."""

from collections.abc import Mapping
from pathlib import Path

from dengine.checkpoint.formats.base import Format
from dengine.checkpoint.formats.file import FileFormat
from dengine.checkpoint.formats.folder import FolderFormat
from dengine.checkpoint.planning import plan_alone
from dengine.checkpoint.states.snapshot import check_objects, collect
from dengine.checks import path_of

__all__ = ["save"]


def save(path: str | Path, objects: Mapping[str, object]) -> None:
    """Save the states of `objects`, by name, to `path`, and list it in the `manifest.json` beside it.

    A path that ends with .pt becomes one file, which rank 0 writes; sharded tensors (FSDP2) are gathered whole for it.
    A path without an ending becomes a folder: all ranks write their parts at the same time, and nothing is gathered.
    Only a folder takes what ranks have apart: parts of a model (`parts=` of `prepare_model`), and states of each rank
    (`PerRank`).
    Both are complete or not there; one with the same name is replaced. Nothing else is removed:
    `dengine.handlers.Checkpoint` keeps the newest or the best.

    Collective: call on all ranks. Cost: two small collectives (nine for a folder), for a file the gathers of sharded
    tensors; one pass over the bytes that writes and hashes them, and the wait for the disk.

    Raises:
        TypeError, ValueError: an object without `state_dict`, no object at all, or a path with another ending.
        CheckpointError: on every rank, if it cannot be written; an older file is untouched.

    Example:
        >>> import tempfile, torch
        >>> from dengine.checkpoint import load, verify
        >>> model, folder = torch.nn.Linear(2, 1), Path(tempfile.mkdtemp())
        >>> save(folder / "model_5.pt", {"model": model})
        >>> verify(folder / "model_5.pt").step
        5
        >>> load(folder / "model_5.pt", {"model": torch.nn.Linear(2, 1)})
        >>> save(folder / "model_6", {"model": model})
        >>> load(folder / "model_6", {"model": torch.nn.Linear(2, 1)})
    """
    checked, path = check_objects(objects), path_of("path", path)
    if path.suffix not in (".pt", "") or path.name.startswith("."):
        raise ValueError(
            f"{path} must end with .pt, or have no ending (a folder, for sharded models), and not be hidden: that is "
            "how checkpoints are found again."
        )
    into_folder = path.suffix == ""
    format: Format = FolderFormat() if into_folder else FileFormat()
    collected = collect(checked, into_folder=into_folder)
    format.save(path, collected, checked, lambda: plan_alone(path, checked, collected.num_ranks))
