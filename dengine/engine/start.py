"""What all ranks must have alike when they begin a run, and what is said where they work for nothing."""

import warnings
from typing import Any

from dengine.comm.consistency import Compared
from dengine.control.stop import Run
from dengine.data.alike import is_whole_on_every_rank, samples_of, shard_entries
from dengine.distributed import world
from dengine.engine.dispatch import Dispatcher

__all__ = ["must_be_alike", "samples_if_whole", "warn_of_whole_data"]

_WARNED = "_dengine_warned"  # on a loader


def must_be_alike(
    data: object, run: Run, dispatcher: Dispatcher, *, stop_every: int, epochs_completed: int
) -> list[Compared]:
    """All that the ranks compare beside metrics and models. In the order in which a difference is looked for."""
    nesting = "run() in a handler or step of another run" if run.depth > 1 else "run() outside of any other run"
    return [
        Compared(
            "The places where this run begins",
            [nesting],
            "An engine that only some ranks run is made by Engine(..., distributed=False); every other one is run by "
            "all ranks, not under `if world.rank == 0:`.",
        ),
        Compared(
            "The settings of the engine",
            [f"stop_every={stop_every} (a supervised trainer's gradient_accumulation_steps)"],
        ),
        Compared(
            "The places where this run goes on",
            [f"epochs_completed={epochs_completed}"],
            "Load the state on every rank, as Checkpoint.resume() does.",
        ),
        Compared(
            "The handlers that all ranks take part in",
            dispatcher.collectives(),
            "Attach it on every rank, not under `if world.rank == 0:`: what it does on rank 0 alone, such as writing "
            "a file, it does there by itself.",
        ),
        Compared(
            "The data of the run",
            shard_entries(data),
            "Build the data set, its transforms and the loader alike on every rank, with the same arguments to "
            "prepare_data_loader(): the shards are parts of one order of samples.",
            may_lack=True,
        ),
    ]


def samples_if_whole(data: Any) -> str:
    """Which samples `data` goes through, to be compared if it looks as if no rank had a shard of them; else ""."""
    return samples_of(data) if is_whole_on_every_rank(data) and _WARNED not in vars(data) else ""


def warn_of_whole_data(data: Any) -> None:
    """Warn, once for a loader, if every rank goes through all samples. On rank 0 only."""
    here = world()
    if here.rank != 0 or not is_whole_on_every_rank(data) or _WARNED in vars(data):
        return
    vars(data)[_WARNED] = True
    warnings.warn(
        f"This {type(data).__qualname__} is not prepared, so that each of the {here.size} ranks goes through all of "
        "its samples: pass it to distributed.prepare_data_loader(), which gives each rank its shard. If that is meant, "
        "or each rank has a data set of its own, ignore this warning.",
        RuntimeWarning,
        stacklevel=2,
    )
