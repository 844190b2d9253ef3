"""Checks at the start of a run: its arguments, and what must be the same on all ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING

from dengine.checks import whole_number
from dengine.comm.consistency import Compared
from dengine.data.alike import is_whole_on_every_rank, samples_of, shard_entries
from dengine.data.parts import failures_of, members_of
from dengine.data.sampler import ElasticSampler
from dengine.data.self_sharding import refuse_other_part
from dengine.distributed import world
from dengine.engine.data.duplicates import may_be_duplicates, note_compared
from dengine.engine.data.epochs import EpochIterator, check_data
from dengine.launch.world import refuse_forgotten_group, refuse_on_rank_zero_alone
from dengine.naming import type_name

if TYPE_CHECKING:
    from dengine.engine.loop import Loop

__all__ = ["checked_data", "checked_limits", "compare_start"]

_WARNED = "_dengine_warned"  # on a loader


def checked_limits(max_epochs: object, max_iterations: object) -> tuple[int | None, int | None]:
    """Both limits, checked to be whole numbers or None.

    Raises: TypeError, ValueError: one is wrong, or both are None.
    """
    if max_epochs is None and max_iterations is None:
        raise ValueError("max_epochs=None runs without an end: pass max_iterations= as well.")
    checked = [
        None if value is None else whole_number(name, value, least=1)
        for name, value in (("max_epochs", max_epochs), ("max_iterations", max_iterations))
    ]
    return checked[0], checked[1]


def checked_data(
    data: Iterable[object], epoch_length: object, continue_data: object, *, is_joined: bool, distributed: bool
) -> EpochIterator:
    """The epochs of a run over `data`.

    Raises:
        TypeError, ValueError: `data` cannot be iterated over or have no batch, `epoch_length` or `continue_data` is
            wrong, or, on a mesh, a loader has a sampler for other ranks.
        LaunchError: a launcher started several processes, but no process group is open.
    """
    check_data(data)
    here = world()
    if distributed:
        refuse_forgotten_group("run() of an Engine")
        for loader in (data, *members_of(data).values()):
            refuse_other_part(loader, here)
    if epoch_length is not None:
        epoch_length = whole_number("epoch_length", epoch_length, least=1)
    if continue_data is not False:
        _check_continued(data, epoch_length, continue_data, is_joined=is_joined)
    epochs = EpochIterator(
        data,
        epoch_length,
        is_continued=continue_data is True,
        is_joined=is_joined,
        may_be_empty=distributed and here.size > 1,
        is_shared=distributed and here.data_size < here.size,
    )
    if epochs.length == 0:
        epochs.emptiness.refuse_no_batch()
    return epochs


def _check_continued(data: object, epoch_length: int | None, continue_data: object, *, is_joined: bool) -> None:
    """Refuse `continue_data` if it is not True, or no epoch can be a part of a pass. Raises: TypeError, ValueError."""
    if continue_data is not True:
        raise TypeError(f"continue_data={continue_data!r} must be True or False.")
    if epoch_length is None:
        raise ValueError(
            "continue_data=True goes on through the data from epoch to epoch, so it needs the iterations of an epoch: "
            "pass epoch_length=, or leave continue_data= out, and each epoch is one pass over the data."
        )
    sampler = getattr(data, "sampler", None)
    if isinstance(sampler, ElasticSampler) and sampler.exact and not is_joined:
        raise ValueError(
            "This loader is prepared with exact=True, so that an evaluation sees every sample once, but with "
            "continue_data=True an epoch is only a part of a pass, which ends on some ranks before others. To "
            "evaluate, leave epoch_length= and continue_data= out; to train, prepare the loader without exact=True, or "
            "use create_supervised_trainer() or Engine(..., joined=True), whose ranks end a pass together."
        )


def compare_start(loop: Loop) -> None:
    """Compare what must be the same on all ranks, before the run starts. Collective.

    Raises:
        MetricStateError, ConsistencyError: on every rank; the message names a rank and the first difference.
        ValueError: no rank has a batch; on every rank.
    """
    refuse_on_rank_zero_alone("A run of an Engine")
    data, emptiness = loop.epochs.data, loop.epochs.emptiness
    if not emptiness.may_be_empty:  # no other rank has data: there is nobody to compare with
        return
    expected = emptiness.expected(is_in_doubt=may_be_duplicates(data))
    start = loop.metrics.agree(_must_be_alike(loop), batches=expected, data=_samples_if_whole(data))
    emptiness.take(start.most_batches)
    if start.is_same_data and _whole_loaders(data):
        emptiness.is_doubtful = False
        note_compared(data)
        _warn_of_whole_data(data)


def _must_be_alike(loop: Loop) -> list[Compared]:
    """Everything that the ranks compare, except metrics and models, in the order of the search for a difference."""
    nesting = (
        "run() in a handler or step of another run" if loop.limits.run.depth > 1 else "run() outside of any other run"
    )
    return [
        Compared(
            "The positions of this run in others",
            [nesting],
            "An engine that only some ranks run is made by Engine(..., distributed=False); every other one is run by "
            "all ranks, not under `if world.rank == 0:`.",
        ),
        Compared(
            "The settings of the engine",
            [f"stop_every={loop.limits.stop_every} (a supervised trainer's gradient_accumulation_steps)"],
        ),
        Compared("The arguments of run()", [f"continue_data={loop.epochs.is_continued}"]),
        Compared(
            "What happens to batches whose loading raises",
            [f"max_errors={each.max_errors}" for each in failures_of(loop.epochs.data)],
            "Pass the same on_error= and max_errors= to prepare_data_loader() on every rank.",
        ),
        Compared(
            "The epochs from which this run goes on",
            [f"epochs_completed={loop.state.epochs_completed}"],
            "Load the state on every rank, as Checkpoint.resume() does.",
        ),
        Compared(
            "The handlers that all ranks take part in",
            loop.dispatcher.collectives(),
            "Attach it on every rank, not under `if world.rank == 0:`: what it does on rank 0 alone, such as writing "
            "a file, it does there by itself.",
        ),
        Compared(
            "The data of the run",
            shard_entries(loop.epochs.data),
            "Build the data set, its transforms and the loader alike on every rank, with the same arguments to "
            "prepare_data_loader(): the shards are parts of one order of samples.",
            may_lack=True,
        ),
    ]


def _samples_if_whole(data: object) -> str:
    """A text for the samples of `data`, to be compared if no rank seems to have a shard; else ""."""
    return "\n".join(map(samples_of, _whole_loaders(data)))


def _whole_loaders(data: object) -> list[object]:
    """The loaders of `data` that nobody has cut into shards, as far as can be seen, and of which nobody was warned."""
    loaders = (data, *members_of(data).values())
    return [each for each in loaders if is_whole_on_every_rank(each) and _WARNED not in vars(each)]


def _warn_of_whole_data(data: object) -> None:
    """Warn, once for a loader, if every rank goes through all samples. On rank 0 only."""
    here = world()
    found = _whole_loaders(data)
    if here.rank != 0 or here.data_size == 1 or not found:
        return
    for loader in found:
        vars(loader)[_WARNED] = True
    warnings.warn(
        f"This {type_name(found[0])} is not prepared, so that each of the {here.size} ranks goes through all of "
        "its samples: pass it to distributed.prepare_data_loader(), which gives each rank its shard. If that is meant, "
        "or each rank has a data set of its own, ignore this warning.",
        RuntimeWarning,
        stacklevel=2,
    )
