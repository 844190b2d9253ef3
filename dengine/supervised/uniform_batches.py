"""Find out, at the first batch of an epoch, how many batches have the same number of samples on all ranks."""

from typing import Any

from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Subset, default_collate

from dengine.data.loader import PreparedLoader
from dengine.distributed import all_reduce
from dengine.supervised.batches import num_samples

__all__ = ["num_uniform"]


def num_uniform(data: object, first_count: int, *, done: int = 0) -> int:
    """The number of batches after the first `done` of a pass over `data` that have `first_count` samples on every rank.

    0 if ranks differ, or if one of them does not know it.

    Collective. Cost: one small all-reduce, and for a list one look at each batch.
    """
    count, num_batches = _leading(data)
    num_batches = max(num_batches - done, 0)
    if count != first_count or not count:
        num_batches = 0
    mine = {"largest": first_count, "smallest": -first_count, "num_batches": -num_batches}
    found = all_reduce(mine, "max", name="the number of samples of a batch")
    return -found["num_batches"] if found["largest"] == -found["smallest"] else 0


def _leading(data: Any) -> tuple[int, int]:
    """The number of samples of the first batch, and the number of batches from there on that have as many."""
    if type(data) in (list, tuple):
        return _leading_of_list(data)
    if type(data) not in (DataLoader, PreparedLoader) or not _gives_each_sample(data.dataset):
        return 0, 0
    # Any other collate_fn may leave samples out, or make several of one.
    is_plain = type(data.batch_sampler) is BatchSampler and data.collate_fn is default_collate
    if not is_plain or not isinstance(data.batch_size, int):
        return 0, 0
    try:
        return data.batch_size, len(data.sampler) // data.batch_size
    except (TypeError, NotImplementedError):  # a sampler without an end
        return 0, 0


def _gives_each_sample(dataset: Any) -> bool:
    """Whether a batch has a sample for each index: a data set with a batched fetch may leave some out."""
    while type(dataset) is Subset:
        dataset = dataset.dataset
    return not isinstance(dataset, IterableDataset) and not hasattr(dataset, "__getitems__")


def _leading_of_list(batches: Any) -> tuple[int, int]:
    first = 0
    for number, batch in enumerate(batches):
        try:
            count = num_samples(*batch)
        except TypeError:  # no pair, or one without samples: an error once that batch comes
            return first, number
        if number == 0:
            first = count
        elif count != first:
            return first, number
    return first, len(batches)
