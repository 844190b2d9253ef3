"""Which is meant: a checkpoint, or a folder of checkpoints. What takes the one says so where it is given the other."""

from pathlib import Path

from dengine.checkpoint.formats.sharded.verify import holds_shards
from dengine.checks import path_of

__all__ = ["no_folder_of_checkpoints", "path_of", "printable"]


def printable(text: str) -> str:
    """`text` with what would command a terminal (escapes, line ends, marks of direction) written out."""
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode("ascii") for each in text)


def no_folder_of_checkpoints(path: Path, name: str) -> str | None:
    """Why `path` cannot be what `name` looks into; None where it can, which one that is not there yet can too."""
    if path.is_dir():
        is_checkpoint = holds_shards(path)
    elif path.suffix != ".pt" and path.exists():
        return f"{path} is a file, not a folder of checkpoints: {name} takes the folder that they are saved in."
    else:
        is_checkpoint = path.suffix == ".pt"  # also one that is not there: beginning anew would be a surprise
    if not is_checkpoint:
        return None
    return (
        f"{path} is a checkpoint, not a folder of them: {name} takes its folder ({path.parent}); "
        "dengine.checkpoint.load takes the checkpoint itself."
    )
