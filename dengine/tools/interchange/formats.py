"""Which formats there are, and which one a source is of."""

from pathlib import Path

from dengine.checkpoint.formats.sharded.verify import holds_shards
from dengine.errors import CheckpointError
from dengine.tools.interchange.base import OtherFormat
from dengine.tools.interchange.dcp import DistributedCheckpoint
from dengine.tools.interchange.safe_tensors import SafeTensors
from dengine.tools.interchange.torch_file import TorchFile

__all__ = ["FORMATS", "format_of"]

FORMATS: dict[str, OtherFormat] = {each.name: each for each in (SafeTensors(), DistributedCheckpoint(), TorchFile())}


def format_of(source: Path, name: str | None) -> OtherFormat:
    """The format `name`, or else the one that `source` looks like.

    Raises:
        CheckpointError: there is no source, it is of no format known here, or it is a folder of dengine's own.
    """
    if not source.exists():
        raise CheckpointError(f"{source} does not exist.")
    if holds_shards(source):
        raise CheckpointError(f"{source} is a checkpoint of dengine already: there is nothing to import.")
    if name is not None:
        return FORMATS[name]
    for each in FORMATS.values():
        if each.is_at(source):
            return each
    raise CheckpointError(
        f"{source} is of no format that is known here: a folder of safetensors, one of torch.distributed.checkpoint "
        "(with .metadata), or a file of torch.save (.pt, .pth, .bin). --format says which one it is."
    )
