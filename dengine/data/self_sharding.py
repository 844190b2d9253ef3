"""Recognise data that give each rank its own samples already, so that they are not cut into shards again."""

from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, DistributedSampler

from dengine.data.passes import PassCounter
from dengine.data.sampler import DataState
from dengine.data.seeding import EpochIndex
from dengine.data.whole_epochs import size_of
from dengine.launch.world import World

__all__ = ["KeptSampler", "check_fits", "divides_by_worker", "refuse_other_part", "settings_of", "shards_itself"]

# The first part of a module's name, and the class in it (or one derived from it) that asks for its rank by itself.
_CLASSES = {("streaming", "StreamingDataset"), ("litdata", "StreamingDataset")}


def shards_itself(dataset: Any, here: World) -> bool:
    """Whether a stream gives only this rank's samples: Hugging Face's after `split_dataset_by_node`, webdataset's with
    `split_by_node`, MosaicML's and LitData's `StreamingDataset`, and whatever has `shards_itself = True`.

    Raises:
        ValueError: it was split for another number of ranks, or another rank.
    """
    split = getattr(dataset, "_distributed", None)  # Hugging Face's
    if split is not None and hasattr(split, "rank") and hasattr(split, "world_size"):
        _check_place(
            "This data set was split for",
            split.rank,
            split.world_size,
            here,
            "Split it by distributed.world().data_rank and .data_size, or not at all: prepare_data_loader() gives each "
            "rank its own samples",
        )
        return True
    if getattr(dataset, "shards_itself", False) is True:
        return True
    if divides_by_worker(dataset):
        return True
    stages = getattr(dataset, "pipeline", None)
    return isinstance(stages, list) and any(_splits_by_node(stage) for stage in stages)


def divides_by_worker(dataset: object) -> bool:
    """Whether a stream asks for its rank and worker, and gives parts to both: MosaicML's and LitData's."""
    return any((each.__module__.partition(".")[0], each.__name__) in _CLASSES for each in type(dataset).__mro__)


def check_fits(sampler: "DistributedSampler[object]", here: World, *, exact: bool) -> None:
    """Refuse a sampler that does not fit this rank.

    Raises:
        ValueError: the sampler's shard is not this rank's, or it pads although `exact` is wanted.
    """
    _check_sampler(sampler, here)
    size = settings_of(sampler)["length"]
    is_exact = getattr(sampler, "exact", sampler.total_size == size)
    if exact and not is_exact:
        raise ValueError(
            f"exact=True sees every sample once, but this loader's {type(sampler).__qualname__} takes "
            f"{sampler.total_size} samples of {size}: leave the sampler out, and prepare_data_loader() makes one that "
            "does, or use ElasticSampler(..., exact=True)."
        )


def settings_of(sampler: "DistributedSampler[Any]") -> dict[str, Any]:
    """What the order of a `DistributedSampler` depends on; one with a constructor of its own may lack some."""
    size = size_of(getattr(sampler, "dataset", getattr(sampler, "lengths", None)))  # `lengths`: as transformers' has
    return {
        "length": sampler.total_size if size is None else size,
        "seed": getattr(sampler, "seed", 0),
        "shuffle": getattr(sampler, "shuffle", True),
        "drop_last": getattr(sampler, "drop_last", False),
    }


def refuse_other_part(data: object, here: World) -> None:
    """Refuse a loader that nobody prepared and whose sampler gives other samples than the mesh does.

    Raises:
        ValueError: the sampler's shard is not this rank's.
    """
    sampler = data.sampler if isinstance(data, DataLoader) else None
    if here.mesh is not None and isinstance(sampler, DistributedSampler):
        _check_sampler(sampler, here)


class KeptSampler(DistributedSampler[int]):
    """A `DistributedSampler` of the user's own, with its seed and its order.

    As an `ElasticSampler` it goes on by itself to the next epoch, begins anywhere, and lets indices carry the epoch.
    Other attributes are those of the sampler `inside`.
    """

    def __init__(self, inside: "DistributedSampler[int]") -> None:
        self.inside = inside
        self.carries_epoch = False
        settings = settings_of(inside)
        kind = {"kept": type(inside).__qualname__, "seed": settings["seed"], "shuffle": settings["shuffle"]}
        self.passes = PassCounter(kind)
        self.passes.set_epoch(inside.epoch)
        self._last_epoch = inside.epoch
        self._skipped = 0

    def __getattr__(self, name: str) -> Any:
        if name == "inside" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.inside, name)

    def __len__(self) -> int:
        return len(self.inside)

    def __iter__(self) -> Iterator[int]:
        if self.inside.epoch != self._last_epoch:  # the user has called set_epoch() of his own sampler
            self.passes.set_epoch(self.inside.epoch)
        epoch = self._last_epoch = self.passes.begin(getattr(self.inside, "dataset", None))
        self.inside.set_epoch(epoch)
        first, self._skipped = self._skipped, 0
        indices = islice(self.inside, first, None)
        yield from map(EpochIndex.of(epoch), indices) if self.carries_epoch else indices

    def set_epoch(self, epoch: int) -> None:
        self.passes.set_epoch(epoch)
        self.inside.set_epoch(epoch)
        self._last_epoch = epoch
        self._skipped = 0

    def skip(self, num_samples: int) -> None:
        """Begin the next iteration after the first `num_samples` of this rank, of which only the indices are drawn."""
        self._skipped = num_samples

    def state(self, batch_size: int) -> DataState:
        """The same as for `ElasticSampler`: global batches are the same for any number of ranks, except the last
        one.
        """
        return {
            **settings_of(self.inside),
            "global_batch_size": self.inside.num_replicas * batch_size,
            "exact": False,
        }


def _check_sampler(sampler: "DistributedSampler[object]", here: World) -> None:
    _check_place(
        f"This loader has a {type(sampler).__qualname__} for",
        sampler.rank,
        sampler.num_replicas,
        here,
        "Give it rank=world().data_rank and num_replicas=world().data_size, or leave it out: prepare_data_loader() "
        "makes one from shuffle=",
    )


def _check_place(what: str, rank: int, num_ranks: int, here: World, way_out: str) -> None:
    if (rank, num_ranks) == (here.data_rank, here.data_size):
        return
    place = f"this is rank {here.rank} of {here.size}"
    if here.mesh is not None:
        place += f" on a mesh ({here.place_of(here.rank)}), which is given part {here.data_rank} of {here.data_size}"
    raise ValueError(
        f"{what} rank {rank} of {num_ranks}, but {place}, so that samples would be missed or come twice. {way_out}."
    )


def _splits_by_node(stage: Any) -> bool:
    function = stage.func if isinstance(stage, partial) else stage
    name = getattr(function, "__name__", "")
    return name == "split_by_node" and getattr(function, "__module__", "").partition(".")[0] == "webdataset"
