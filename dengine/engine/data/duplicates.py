"""Warn, once for its data, if two ranks that should have different samples began a run with the same ones."""

import warnings

from dengine.data.alike import doubtful_part, is_in_doubt
from dengine.data.first_batch import compare_first_batch
from dengine.distributed import world
from dengine.naming import type_name

__all__ = ["compare_ranks", "may_be_duplicates", "note_compared"]

_COMPARED = "_dengine_compared"  # on the data


def may_be_duplicates(data: object) -> bool:
    """Whether the first batch of `data` is to be compared with those of other ranks: nobody has made sure that they
    differ, and it was not compared before.
    """
    return _COMPARED not in getattr(data, "__dict__", {}) and world().data_size > 1 and is_in_doubt(data)


def note_compared(data: object) -> None:
    if isinstance(attributes := getattr(data, "__dict__", None), dict):
        attributes[_COMPARED] = True


def compare_ranks(data: object, first: list[object], *, is_shared: bool) -> bool:
    """Compare the first batch between ranks, as `compare_first_batch`, and give whether any rank has one.

    Collective. Raises: ConsistencyError: ranks that share their data have different batches.
    """
    in_doubt = [doubtful_part(data, batch) for batch in first] if may_be_duplicates(data) else []
    found = compare_first_batch(first, in_doubt, is_shared=is_shared)
    note_compared(data)
    if found.ranks is not None and world().rank == 0:
        one, other = found.ranks
        warnings.warn(
            f"Rank {one} and rank {other} were given the same first batch by this {type_name(data)}, though each rank "
            "should have samples of its own: the loader was not prepared, or a source that should give each rank its "
            "own part does not. Pass the loader to distributed.prepare_data_loader() (with shard='rank', if it takes "
            "the source for one that shards itself), or have the source choose by world().data_rank and data_size. If "
            "that is meant, or the data repeat themselves, ignore this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
    return found.has_any
