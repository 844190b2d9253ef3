"""Rebuild a `DataLoader` over this rank's shard, with the settings of the original."""

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cache
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    default_collate,
    default_convert,
)

from dengine import torch_internals
from dengine.checks import whole_number
from dengine.comm.mesh import note_different_samples
from dengine.data.dealt_batches import DealtBatches
from dengine.data.draws import Draw, draw_of, is_plain
from dengine.data.failures import CaughtCollate, CaughtDataset, Failures, checked_failures
from dengine.data.passes import PassCounter
from dengine.data.sampler import DataState, ElasticSampler
from dengine.data.seeding import (
    SeededCollate,
    SeededDataset,
    draws_nothing,
)
from dengine.data.self_sharding import KeptSampler, check_fits, shards_itself
from dengine.data.stateful import inexactness, keeps_position
from dengine.data.stream import Carried, CarryingCollate, StatefulStreamShard, StreamPosition, StreamShard
from dengine.data.whole_epochs import WholeEpochs
from dengine.launch.world import World, refuse_forgotten_group, world
from dengine.naming import a_type
from dengine.splitmix64 import derived_seed

__all__ = [
    "PositionedLoader",
    "PreparedLoader",
    "collate_of_user",
    "data_state",
    "drawn_epoch",
    "go_on_from",
    "inside",
    "pass_counters",
    "prepare_data_loader",
    "renew_workers",
]

T = TypeVar("T")

_WORKERS_EPOCH = "_dengine_epoch"  # on a loader: the epoch that its workers were started for

# Settings that are kept; those that the installed torch does not know are left out.
_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "multiprocessing_context",
    "generator",
    "prefetch_factor",
    "persistent_workers",
    "pin_memory_device",
    "in_order",
    "snapshot_every_n_steps",
)


def prepare_data_loader(
    loader: "DataLoader[T]",
    *,
    exact: bool = False,
    global_batch_size: int | None = None,
    seed: int = 0,
    shard: Literal["auto", "rank", "self"] = "auto",
    on_error: Literal["raise", "skip"] = "raise",
    max_errors: int | None = None,
) -> "DataLoader[T]":
    """`loader` over this rank's shard of its data set, with the same settings otherwise.

    Shuffling is kept from the loader's own sampler. The order of samples is one permutation of the epoch, the same for
    any number of ranks, consumed in global batches (`ElasticSampler`). Iterable data sets are sharded by batch: each
    rank reads the stream and keeps its turn.

    Of other samplers, every rank draws the whole epoch, the same one, and takes its share of the global batches. What
    `RandomSampler(replacement=True | num_samples=)`, `SubsetRandomSampler` and `WeightedRandomSampler` draw follows
    from the seed, the epoch and the position; in the user's sampler, the state of its generator is part of the seed. A
    sampler of your own must have a length, and give the same indices once more after the same `set_epoch(epoch)`;
    generators that are attributes of it, and the global ones, are seeded for it (`WholeEpochs`). A batch sampler that
    does so is dealt out batch by batch: in each step a rank has one of its batches, as it is. (torch's own
    `BatchSampler` counts as its sampler and `batch_size`.)

    On a mesh (`process_group(mesh=)`) ranks that differ in `cp`, `tp` and `pp` alone get the same samples, augmented
    alike: what is said of ranks here is said of such groups (`World.data_rank` of `World.data_size`).

    Loaders that give each rank its own samples already stay as they are: those with a `DistributedSampler` (an
    `ElasticSampler`) for this rank, with its own seed, and those of a stream that shards itself (Hugging Face's after
    `split_dataset_by_node`, webdataset's with `split_by_node`, MosaicML's and LitData's `StreamingDataset`, any with
    `shards_itself = True`). How many batches a rank has is then up to that stream. Where this cannot be told, say it:
    `shard="self"` leaves data as they are, `shard="rank"` cuts them. If two ranks begin a run with the same batch, a
    warning names them.

    torchdata's `StatefulDataLoader` gives a `StatefulDataLoader`; so does a loader with workers over a stream that
    keeps its own position, if torchdata is installed: only the workers know it. Positions are saved with the trainer,
    so there is no state to list.

    What the data set draws at random follows from `seed`, the epoch and the sample alone (`SeededDataset`; a stream's
    from its start), whatever the number of ranks and workers, also in a resumed run and in workers that outlive an
    epoch; what a `collate_fn` of your own draws, from the batch's first sample (`SeededCollate`). `prepared.dataset`
    has the attributes of the data set inside. Iterating draws nothing from the global generators.

    The engine sets the epoch. If nobody does (the loader is inside a `tqdm`, a `zip`, a class of yours, a step, or in a
    loop of your own), each new iteration goes on to the next epoch, and a resumed run goes on from the saved one.
    `prepared.sampler.set_epoch(epoch)` sets another one (with a batch sampler, `prepared.batch_sampler.set_epoch`), and
    so does `set_epoch` of a sampler of your own. Workers are process groups of their own, so that a scheduler's signal
    to the rank's group does not end them before the rank has saved.

    Args:
        exact: every sample once over all ranks, without padding; shards may differ in length (for evaluation).
            Without it the last batch is padded if needed, so that all ranks take the same number of steps. With a
            sampler: every index that it draws once; with a batch sampler: every batch once.
        global_batch_size: samples of all ranks together in one step; without it the loader's `batch_size` is that of
            one rank.
        seed: of the permutation and of what the data set draws; the same on all ranks.
        shard: who gives each rank its own samples: "self", the data (a map-style loader comes back as it is); "rank",
            this function, whatever the data say; "auto", the data if they are known to.
        on_error: "skip" leaves a batch out whose loading raised (a corrupt image, in a worker or not): None comes in
            its place, with a warning that names rank, error and samples. An engine takes that for an iteration without
            a step; over several ranks a step with collectives (DDP) needs a joined engine (a supervised trainer), in
            which no other rank waits. `engine.state.data_errors` counts, and `state.metrics["data_errors"]` is the sum
            over all ranks at the end of an epoch. A worker that died is still an error. Not for streams.
        max_errors: the most errors in one pass over this rank's data (10 by default); the next one is raised.

    Raises:
        TypeError: `loader` is no DataLoader, or has a sampler without a length.
        ValueError: `global_batch_size` does not divide by the number of ranks, or there is a batch sampler; `exact` on
            a loader with `drop_last`, or with a sampler that pads; a sampler or a split that is not for this rank, or
            for another number of ranks; another `shard`, or "self" with an option that it would overlook; weights or
            indices that do not fit the data set. Later, as an epoch is drawn: a sampler gives other indices than
            before, fewer or more than its length, or some that do not exist.

    Cost: no collective; O(1) memory and time for any size of the data set. Weights and the indices of a subset are
    looked through once an epoch; an epoch of a sampler of your own is drawn whole (the first one twice), and stored
    with 8 bytes an index; so is one of `WeightedRandomSampler(replacement=False)`.
    """
    if not isinstance(loader, DataLoader):
        raise TypeError(f"prepare_data_loader() takes a DataLoader, but got {a_type(loader)}.")
    refuse_forgotten_group("prepare_data_loader()")
    here = world()
    if shard not in ("auto", "rank", "self"):
        raise ValueError(f"shard={shard!r} must be 'auto', 'rank' or 'self'.")
    failures = checked_failures(inside(loader.dataset), on_error, max_errors)
    if shard == "self" and not isinstance(inside(loader.dataset), IterableDataset):
        if exact or global_batch_size is not None or failures is not None:
            raise ValueError(
                "shard='self' leaves this loader as it is, its batches too, so on_error=, exact= and "
                "global_batch_size= would be overlooked: leave them out."
            )
        note_different_samples()
        return loader
    samples = _samples_of(loader, shard)
    if exact and samples.drop_last:
        raise ValueError("exact=True sees every sample, but this loader has drop_last=True: build it without.")
    dataset: Any = loader.dataset
    dataset = inside(dataset)  # if it was prepared before
    collate = _seeded_collate(loader)
    if isinstance(dataset, IterableDataset):
        batch_size = _batch_size(loader.batch_size, here, global_batch_size)
        note_different_samples()
        is_alike = getattr(dataset, "is_alike_in_workers", False) is True
        cut = StatefulStreamShard if keeps_position(dataset) and not is_alike else StreamShard
        if shard == "self" or (shard == "auto" and shards_itself(dataset, here)):
            # Each rank has its own samples already: what they are, and how many, is not decided here.
            stream: Any = cut(dataset, batch_size, World(), True, loader.drop_last, seed, collate, here.data_size)
        else:
            stream = cut(dataset, batch_size, here, exact, loader.drop_last, seed, collate)
        return _rebuilt(loader, stream, seed, collate, batch_size=batch_size, drop_last=loader.drop_last)
    settings = _settings(samples, dataset, here, exact=exact, global_batch_size=global_batch_size, seed=seed)
    sampler: Any = settings.get("batch_sampler", settings.get("sampler"))
    if collate is not None or not draws_nothing(dataset, loader.collate_fn):
        dataset = SeededDataset(dataset, seed, collate)
        sampler.carries_epoch = True
    if failures is not None:
        caught = CaughtCollate(collate or collate_of_user(loader.collate_fn))
        dataset = CaughtDataset(dataset, caught)
        sampler.carries_epoch = True
    prepared = _rebuilt(loader, dataset, seed, collate if failures is None else caught, **settings)
    prepared.keeps_sampler = samples.is_kept
    if failures is not None:
        prepared.failures = sampler.passes.failures = failures
    return prepared


def data_state(data: object) -> DataState | None:
    """The settings of `data` that a resumed run must find unchanged (`changed_order` compares two); None if unknown.

    They are known for a loader that `prepare_data_loader` gave, and for one with an `ElasticSampler`.
    """
    for part in (getattr(data, name, None) for name in ("batch_sampler", "sampler", "dataset")):
        if isinstance(part, (DealtBatches, ElasticSampler, StreamShard)):
            return part.state()
        if isinstance(part, KeptSampler):
            return part.state(getattr(data, "batch_size", None) or 1)
    return None


def drawn_epoch(data: object) -> str:
    """What a sampler that is asked for whole epochs has drawn for the one that is set, in words; "" for other data."""
    for part in (getattr(data, "batch_sampler", None), getattr(data, "sampler", None)):
        if isinstance(part, DealtBatches | ElasticSampler) and isinstance(part.draw, WholeEpochs):
            return str(part.draw.description(part.passes.epoch)["sampler"])
    return ""


def inside(part: Any) -> Any:
    """The user's data set that `prepare_data_loader` has wrapped; any other object itself."""
    while isinstance(part, (CaughtDataset, SeededDataset, StreamShard)):
        part = part._dataset
    return part


def collate_of_user(function: Any) -> Any:
    """The user's `collate_fn`, which `prepare_data_loader` has wrapped; any other function itself."""
    while isinstance(function, (CarryingCollate, CaughtCollate, SeededCollate)):
        function = function.inside
    return function


def pass_counters(data: object) -> list[PassCounter]:
    """The counters of the parts of `data` that go on to the next epoch by themselves, unless an engine sets it."""
    parts = (data, *(getattr(data, name, None) for name in ("batch_sampler", "sampler", "dataset")))
    kinds = (DealtBatches, ElasticSampler, KeptSampler, StreamShard)
    return [part.passes for part in parts if isinstance(part, kinds)]


def go_on_from(data: object, saved: DataState, num_batches: int) -> None:
    """Have the samplers of `data` draw the epoch of a saved state, of which this rank has had `num_batches`, so that
    the two can be compared, and the rest of it dealt out.
    """
    for part in (getattr(data, "batch_sampler", None), getattr(data, "sampler", None)):
        if isinstance(part, DealtBatches | ElasticSampler) and "sampler_epoch" in saved:
            part.set_epoch(saved["sampler_epoch"])
        if isinstance(part, DealtBatches) and "rounds" in saved:
            part.go_on_from(saved, num_batches)


def renew_workers(data: object, epoch: int) -> None:
    """End persistent workers if the epoch has changed, so that the next iteration starts new ones with that epoch.

    They hold copies of the data set from when they were started. Prepared loaders do not need this.
    """
    if not isinstance(data, DataLoader) or isinstance(data, PreparedLoader) or not data.persistent_workers:
        return
    if not callable(getattr(data.dataset, "set_epoch", None)) or _is_shared(getattr(data.dataset, "_epoch", None)):
        return
    if vars(data).get(_WORKERS_EPOCH) != epoch:
        torch_internals.drop_workers(data)
    vars(data)[_WORKERS_EPOCH] = epoch


def _is_shared(epoch: object) -> bool:
    return isinstance(epoch, torch.Tensor) and bool(epoch.is_shared())  # type: ignore[no-untyped-call]  # as Hugging Face's streams keep it


class _Samples(NamedTuple):
    """What the user's own loader says about its samples; with a `batch_sampler`, that alone counts."""

    sampler: Any
    batch_sampler: Any
    batch_size: int | None
    drop_last: bool
    is_kept: bool  # the sampler gives shards already


def _samples_of(loader: "DataLoader[Any]", shard: str) -> _Samples:
    sampler: Any = loader.sampler
    batches: Any = loader.batch_sampler
    batch_size, drop_last = loader.batch_size, loader.drop_last
    if isinstance(batches, DealtBatches):  # prepared before
        batches = batches.draw.inside
    if batch_size is None and is_plain(batches, BatchSampler):
        sampler, batch_size, drop_last = batches.sampler, batches.batch_size, batches.drop_last
    if batch_size is not None or isinstance(loader.dataset, IterableDataset):
        batches = None  # torch's, made from batch_size=
    is_prepared = isinstance(loader, PreparedLoader) and not loader.keeps_sampler
    has_shards = batches is None and isinstance(sampler, DistributedSampler)
    is_kept = has_shards and not is_prepared and shard != "rank"
    return _Samples(sampler, batches, batch_size, drop_last, is_kept)


def _settings(
    samples: _Samples, dataset: Any, here: World, *, exact: bool, global_batch_size: int | None, seed: int
) -> dict[str, Any]:
    """The arguments for a `DataLoader` that say which samples it has, in which batches."""
    if samples.batch_sampler is not None:
        if global_batch_size is not None:
            raise ValueError(
                f"global_batch_size={global_batch_size} is for loaders with a batch_size, but this one has a "
                f"{type(samples.batch_sampler).__qualname__}, whose batches are dealt out whole: leave it out."
            )
        return {"batch_sampler": DealtBatches(samples.batch_sampler, dataset, seed=seed, exact=exact)}
    batch_size = _batch_size(samples.batch_size, here, global_batch_size)
    settings: dict[str, Any] = {"batch_size": batch_size, "drop_last": samples.drop_last}
    if samples.is_kept:
        return {**settings, "sampler": _kept(samples.sampler, here, exact=exact)}
    draw, shuffle = _draw(samples.sampler, dataset, seed)
    sampler = ElasticSampler(
        dataset,
        batch_size=batch_size or 1,
        shuffle=shuffle,
        seed=seed,
        drop_last=samples.drop_last,
        exact=exact,
        draw=draw,
    )
    return {**settings, "sampler": sampler}


def _draw(sampler: Any, dataset: Any, seed: int) -> tuple[Draw | None, bool]:
    """The order that a sampler draws (None: all samples, once), and whether it is shuffled."""
    if isinstance(sampler, ElasticSampler):  # of a loader that was prepared before
        if sampler.draw is None:
            return None, sampler.shuffle
        sampler = sampler.draw.inside
    if isinstance(sampler, DistributedSampler):  # of which nothing else is kept with shard="rank"
        return None, sampler.shuffle
    draw = draw_of(sampler, dataset, seed)
    return draw, draw is not None or not is_plain(sampler, SequentialSampler)


def _kept(sampler: Any, here: World, *, exact: bool) -> ElasticSampler | KeptSampler:
    """The user's own sampler, which gives shards already."""
    check_fits(sampler, here, exact=exact)
    note_different_samples()
    return sampler if isinstance(sampler, ElasticSampler | KeptSampler) else KeptSampler(sampler)


def _batch_size(own: int | None, here: World, global_batch_size: int | None) -> int | None:
    """The batch size of one rank."""
    if global_batch_size is None:
        return own
    total = whole_number("global_batch_size", global_batch_size, least=1)
    num_parts = here.data_size
    if total % num_parts:
        below = total // num_parts * num_parts
        nearest = f"{below} and {below + num_parts}" if below else f"{num_parts}"
        parts = "ranks" if num_parts == here.size else "parts, one for each group of ranks with the same data"
        raise ValueError(
            f"global_batch_size={total} does not divide into {num_parts} {parts}; the nearest sizes that do: {nearest}."
        )
    if own is None:
        raise ValueError("global_batch_size= needs a loader that makes batches, but this one has batch_size=None.")
    return total // num_parts


def _seeded_collate(loader: "DataLoader[Any]") -> SeededCollate | None:
    """The loader's `collate_fn` with a seed; None for torch's own functions, which draw nothing."""
    collate = collate_of_user(loader.collate_fn)
    return None if collate in (default_collate, default_convert) else SeededCollate(collate)


def _rebuilt(
    loader: "DataLoader[Any]", dataset: Any, seed: int, collate: Callable[..., Any] | None, **changed: Any
) -> "PreparedLoader[Any]":
    of_torchdata = _stateful_loader(loader, dataset)
    kind: type[PreparedLoader[Any]] = PreparedLoader if of_torchdata is None else _prepared(of_torchdata)
    known = inspect.signature(kind).parameters
    kept = {name: getattr(loader, name) for name in _KEPT if name in known and hasattr(loader, name)}
    if not kept.get("pin_memory_device"):
        kept.pop("pin_memory_device", None)  # deprecated: even its default draws a warning
    if kept.get("generator") is None:
        # Without one of its own, each iteration draws the workers' seed from the global generator.
        kept["generator"] = torch.Generator().manual_seed(derived_seed(seed, world().data_rank))
    if changed.get("batch_size", 0) is None:
        changed.pop("drop_last")
    start = loader.worker_init_fn
    kept["worker_init_fn"] = start if isinstance(start, _WorkerStart) or not loader.num_workers else _WorkerStart(start)
    function = collate or collate_of_user(loader.collate_fn)
    if isinstance(dataset, StreamShard) and dataset.is_undivided:
        dataset.carrier = CarryingCollate(function)
        return PositionedLoader(dataset, collate_fn=dataset.carrier, **kept, **changed)
    return kind(dataset, collate_fn=function, **kept, **changed)


def _stateful_loader(loader: "DataLoader[Any]", dataset: Any) -> Any:
    """torchdata's `StatefulDataLoader`, if `loader` is one, or its workers read a stream that keeps its own position:
    only their copies of it know that, and only torchdata's loader asks them. Else None.
    """
    needs_one = loader.num_workers > 0 and isinstance(dataset, StatefulStreamShard) and inexactness(dataset) is None
    if needs_one:
        with suppress(ImportError):
            importlib.import_module("torchdata.stateful_dataloader")
    found = getattr(sys.modules.get("torchdata.stateful_dataloader"), "StatefulDataLoader", None)
    return found if found is not None and (needs_one or isinstance(loader, found)) else None


@cache
def _prepared(of_torchdata: Any) -> "type[PreparedLoader[Any]]":
    return type("PreparedStatefulLoader", (PreparedLoader, of_torchdata), {"__module__": __name__})


class PreparedLoader(DataLoader[T]):
    """The loader that `prepare_data_loader` gives."""

    keeps_sampler = False  # the user's own
    failures: Failures | None = None  # of on_error="skip"

    def __iter__(self) -> Any:
        if isinstance(self.dataset, StreamShard):  # a sampler counts for itself
            self.dataset.begin_pass()
        batches = super().__iter__()
        return batches if self.failures is None else self.failures.leave_out(batches)


class PositionedLoader(PreparedLoader[T]):
    """The loader over a stream that is the same in all workers and on all ranks, and so is its position.

    It goes on from a state with any number of workers, and with another number of ranks if the global batch is the
    same.
    """

    _position: StreamPosition | None = None

    @property
    def position_is_shared(self) -> bool:
        """Whether all ranks have the same position: they read the same stream."""
        return not cast(StreamShard, self.dataset).shards_itself

    def __iter__(self) -> Any:
        return self._unpacked(super().__iter__())

    def _unpacked(self, batches: Iterator[Carried]) -> Iterator[T]:
        for batch, position in batches:
            self._position = position
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that the loader gave."""
        stream: Any = self.dataset
        rounds, state = self._position or (0, inside(stream).state_dict())
        return {"rounds": rounds, "stream": state, "global_batch_size": stream.state()["global_batch_size"]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin the next iteration after the batch that `state` was taken at, unless another epoch is set.

        Raises: ValueError: it is of other batches, or of another stream.
        """
        stream: Any = self.dataset
        now = stream.state()["global_batch_size"]
        if state["global_batch_size"] != now:
            raise ValueError(
                f"the global batch was {state['global_batch_size']} and is {now}: pass "
                f"global_batch_size={state['global_batch_size']} to prepare_data_loader()"
            )
        inside(stream).check_state(state["stream"])
        stream.set_epoch(state["stream"]["epoch"])
        stream.go_on_from((state["rounds"], state["stream"]))
        torch_internals.drop_workers(self)


class _WorkerStart:
    """Takes a worker out of its rank's process group, then calls the user's own `worker_init_fn`.

    A launcher passes a scheduler's signal on to the whole group. The rank goes on to the end of an iteration then, and
    saves; a worker would die of SIGTERM, and take the next batch with it.
    """

    def __init__(self, inside: Callable[[int], Any] | None) -> None:
        self._inside = inside

    def __call__(self, worker: int) -> None:
        if hasattr(os, "setpgid"):  # not on Windows
            os.setpgid(0, 0)
        if self._inside is not None:
            self._inside(worker)
