"""What ranks have otherwise than each other is found when a run begins, and named; what may differ is left alone."""

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, Subset, TensorDataset

from dengine import Engine, Events, distributed
from dengine.handlers import (
    Checkpoint,
    ConsistencyCheck,
    EarlyStopping,
    MemoryMonitor,
    Preemption,
    TerminateOnNan,
    ThroughputMonitor,
    TimeLimit,
)

SAMPLES = TensorDataset(torch.arange(24.0))


class Augmented(Dataset[float]):
    def __init__(self, transform: Any) -> None:
        self.transform = transform
        self.rank_of_reader = distributed.world().rank  # each rank's own, as a device or a path may be

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> float:
        return float(self.transform(float(index)))


class Flip:
    def __init__(self, p: float = 0.5) -> None:
        self.p = p
        self.num_calls = 0

    def __call__(self, value: float) -> float:
        self.num_calls += 1
        return -value


class Keep:
    def __call__(self, value: float) -> float:
        return value


class Stream(IterableDataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[int]:
        yield from range(self.size)


def nothing(engine: Engine, batch: Any) -> None:
    return None


def outcome(action: Callable[..., object], *arguments: object) -> str:
    try:
        action(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "fine"


def loader(**settings: Any) -> DataLoader[Any]:
    return DataLoader(SAMPLES, batch_size=settings.pop("batch_size", 4), **settings)


def prepared_otherwise(rank: int, what: str) -> DataLoader[Any]:
    """A prepared loader that differs on rank 1."""
    prepare = distributed.prepare_data_loader
    is_odd = rank == 1
    transform: Any = Flip(0.25 * (1 + is_odd)) if what == "number" else Flip()
    if is_odd and what in ("transform", "function", "nested"):
        transform = {"transform": Keep(), "function": lambda value: value, "nested": nn.Sequential(nn.ReLU())}[what]
    elif what == "nested":
        transform = nn.Sequential(nn.Tanh())
    collate = (lambda batch: batch) if is_odd and what == "collate" else None
    dataset: Any = Augmented(transform)
    match what:
        case "seed" | "stream seed":
            return prepare(loader() if what == "seed" else DataLoader(Stream(24), batch_size=4), seed=7 * is_odd)
        case "shuffle":
            return prepare(loader(shuffle=is_odd))
        case "batch size":
            return prepare(loader(batch_size=4 + 2 * is_odd))
        case "drop_last":
            return prepare(loader(drop_last=is_odd))
        case "exact":
            return prepare(loader(), exact=is_odd)
        case "preparation":
            return loader() if is_odd else prepare(loader())
        case "sampler":
            sampler = DistributedSampler(SAMPLES, shuffle=True, seed=3 * is_odd)
            return DataLoader(SAMPLES, batch_size=4, sampler=sampler)
        case "subset":
            dataset = Subset(dataset, range(10))
    return prepare(DataLoader(dataset, batch_size=4, collate_fn=collate))


DIFFERENCES = {
    "seed": "seed=7, but rank 0 has seed=0",
    "stream seed": "seed=7",
    "shuffle": "shuffle=True, but rank 0 has shuffle=False",
    "batch size": "global_batch_size=12, but rank 0 has global_batch_size=8",
    "drop_last": "drop_last=True",
    "exact": "exact=True",
    "preparation": "no preparation",
    "sampler": "seed=3",
    "transform": "transform Keep, but rank 0 has data set.transform Flip",
    "function": "<lambda>",
    "number": "transform.p=0.5, but rank 0 has data set.transform.p=0.25",
    "nested": "ReLU",
    "collate": "<lambda>",
}


def data_that_differ(rank: int, size: int) -> dict[str, str]:
    with distributed.process_group(timeout=300):
        told = {
            what: outcome(lambda case: Engine(nothing).run(prepared_otherwise(rank, case)), what)
            for what in DIFFERENCES
        }
        told["alike"] = outcome(lambda: Engine(nothing).run(prepared_otherwise(rank, "subset"), max_epochs=2))
        # What a rank's transform has counted by the second run is its own.
        mine, engine = prepared_otherwise(rank, "alike"), Engine(nothing)
        told["again"] = outcome(lambda: (engine.run(mine), engine.run(mine)))
        told["own data"] = outcome(lambda: Engine(nothing).run([1, 2, 3][rank:]))
        own = distributed.ElasticSampler(SAMPLES, num_replicas=1, rank=0, seed=rank)
        told["own order"] = outcome(lambda: Engine(nothing).run(DataLoader(SAMPLES, sampler=own)))
        return told


def test_data_prepared_otherwise_on_one_rank_are_refused_at_the_start_naming_what_differs() -> None:
    for told in run_ranks(data_that_differ, 2, init=False, deadline_s=90):
        for what, words in DIFFERENCES.items():
            assert told[what].startswith("ConsistencyError: The data of the run differ"), (what, told[what])
            assert "rank 1 has" in told[what], (what, told[what])
            assert words in told[what], (what, told[what])
        assert [told[what] for what in ("alike", "again", "own data", "own order")] == ["fine"] * 4


def attached(rank: int, what: str, folder: str) -> Engine:
    """An engine with a handler that all ranks take part in on rank 0 only, or attached otherwise on rank 1."""
    net, trainer = nn.Linear(1, 1), Engine(nothing)
    checkpoint = Checkpoint({"net": net}, folder)
    match what:
        case "every":
            trainer.on(Events.ITERATION_COMPLETED(every=2 + rank), checkpoint)
        case _ if rank != 0:
            pass
        case "checkpoint":
            trainer.on(Events.EPOCH_COMPLETED, checkpoint)
        case "partial":
            trainer.on(Events.EPOCH_COMPLETED, partial(checkpoint))
        case "check":
            trainer.on(Events.EPOCH_COMPLETED, ConsistencyCheck(net))
        case "early":
            trainer.on(Events.EPOCH_COMPLETED, EarlyStopping(2, lambda engine: 1.0, Engine(nothing)))
        case "memory":
            MemoryMonitor().attach(trainer)
        case "throughput":
            ThroughputMonitor().attach(trainer)
        case "preemption":
            Preemption(checkpoint).attach(trainer)
    return trainer


HANDLERS = {
    "checkpoint": "Checkpoint at Events.EPOCH_COMPLETED",
    "partial": "Checkpoint at Events.EPOCH_COMPLETED",
    "every": "Checkpoint at Events.ITERATION_COMPLETED(every=3)",
    "check": "ConsistencyCheck",
    "early": "EarlyStopping",
    "memory": "MemoryMonitor",
    "throughput": "ThroughputMonitor",
    "preemption": "Preemption",
}


def handlers_that_differ(rank: int, size: int, folder: str) -> dict[str, str]:
    with distributed.process_group(timeout=300):
        told = {what: outcome(lambda case: attached(rank, case, folder).run(range(3)), what) for what in HANDLERS}
        trainer = Engine(nothing)
        if rank == 0:
            trainer.on(Events.ITERATION_COMPLETED, lambda engine: None)
            trainer.on(Events.ITERATION_COMPLETED, TimeLimit(1000))
            trainer.on(Events.ITERATION_COMPLETED, TerminateOnNan())
            Preemption(lambda engine: None).attach(trainer)
        trainer.on(Events.EPOCH_COMPLETED, Checkpoint({"net": nn.Linear(1, 1)}, folder))
        told["legal"] = outcome(lambda: trainer.run(range(3)))
        return told


def test_a_handler_that_is_collective_and_attached_on_one_rank_only_is_refused_at_the_start(tmp_path: Path) -> None:
    for told in run_ranks(handlers_that_differ, 2, str(tmp_path), init=False, deadline_s=60):
        for what, words in HANDLERS.items():
            assert told[what].startswith("ConsistencyError"), (what, told[what])
            assert words in told[what], (what, told[what])
            assert "Attach it on every rank" in told[what], (what, told[what])
        assert told["legal"] == "fine"


class Shrinking:
    """As many batches as its list says for each epoch; sized or not."""

    def __init__(self, *sizes: int) -> None:
        self.sizes, self.size = sizes, sizes[0]

    def set_epoch(self, epoch: int) -> None:
        self.size = self.sizes[epoch]

    def __iter__(self) -> Iterator[int]:
        yield from range(self.size)


class Once:
    """An iterable that is no iterator, and gives what it has only once."""

    def __init__(self, size: int) -> None:
        self.left = iter(range(size))

    def __iter__(self) -> Iterator[int]:
        yield from self.left


class Growing(Dataset[int]):
    def __init__(self, *sizes: int) -> None:
        self.sizes, self.size = sizes, sizes[0]

    def set_epoch(self, epoch: int) -> None:
        self.size = self.sizes[epoch]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def run_over(data: Any, max_epochs: int = 2, **settings: Any) -> list[int]:
    engine, ended = Engine(nothing), []
    engine.on(Events.EPOCH_COMPLETED, lambda engine: ended.append(engine.state.iteration))
    try:
        engine.run(data, max_epochs, **settings)
    except Exception as error:
        ended.append(f"{type(error).__name__}: {error}")
    return ended


def nothing_to_train_on(rank: int, size: int) -> dict[str, Any]:
    prepare = distributed.prepare_data_loader
    with distributed.process_group(timeout=300):
        few = TensorDataset(torch.arange(3.0))
        return {
            "drop_last": run_over(prepare(DataLoader(few, batch_size=2, drop_last=True))),
            "empty": run_over(prepare(DataLoader(Subset(few, []), batch_size=2), exact=True)),
            "lists": run_over([]),
            "given": run_over([], epoch_length=3),
            "stream": run_over(prepare(DataLoader(Stream(0), batch_size=2))),
            "own stream": run_over(Shrinking(0, 0)),
            "generator": run_over(each for each in ()),
            "short stream": run_over(prepare(DataLoader(Stream(3), batch_size=2, drop_last=True))),
            "exact": run_over(prepare(DataLoader(Subset(few, [0]), batch_size=1), exact=True)),
            "one": run_over(Shrinking(1 - rank, 1 - rank)),
            "lists of one": run_over([[1], []][rank]),
            # Later epochs.
            "shrunk": run_over(Shrinking(2, 1, 0, 0), 4),
            "exhausted": run_over(Once(3 * (1 - rank)), 4),
            "one in turn": run_over(Shrinking(*(int(each % size == rank) for each in range(5))), 5),
            "curriculum": run_over(prepare(DataLoader(Growing(4, 0), batch_size=2), exact=True)),
            "again": run_over([1, 2], 3),
        }


def test_where_no_rank_has_a_batch_all_of_them_raise_before_any_epoch_is_completed() -> None:
    for rank, told in enumerate(run_ranks(nothing_to_train_on, 2, init=False, deadline_s=60)):
        for what in ("drop_last", "empty", "lists", "given", "stream", "own stream", "generator", "short stream"):
            assert len(told[what]) == 1, (what, told[what])
            assert told[what][0].startswith("ValueError: The data"), (what, told[what])
            assert "no batch on any rank" in told[what][0], (what, told[what])
        for what in ("exact", "one", "lists of one"):
            assert told[what] == ([0, 0] if rank == 1 else [1, 2]), (what, told[what])
        for what, before in {"shrunk": [2, 3], "exhausted": [3 * (1 - rank)], "curriculum": [1]}.items():
            *ended, error = told[what]
            assert ended == before, (what, told[what])
            assert error.startswith("ValueError: The data"), (what, error)
            assert "no batch on any rank" in error, (what, error)
        assert told["one in turn"] == ([1, 1, 2, 2, 3] if rank == 0 else [0, 1, 1, 2, 2])
        assert told["again"] == [2, 4, 6]


def whole(rank: int, size: int) -> dict[str, int]:
    prepare, told = distributed.prepare_data_loader, {}
    with distributed.process_group(timeout=300):
        cases: dict[str, Any] = {
            "plain": loader(shuffle=True),
            "stream": DataLoader(Stream(8), batch_size=2),
            "prepared": prepare(loader()),
            "sampler": DataLoader(SAMPLES, sampler=DistributedSampler(SAMPLES)),
            "own subset": DataLoader(Subset(SAMPLES, range(rank, 24, size)), batch_size=4),
            "own tensors": DataLoader(TensorDataset(torch.full((8,), rank)), batch_size=4),
            "list": [1, 2],
        }
        for what, data in cases.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                engine = Engine(nothing)
                engine.run(data, max_epochs=2)
                engine.run(data)
            told[what] = sum("prepare_data_loader" in str(each.message) for each in caught)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Engine(nothing, distributed=False).run(loader())
        told["own engine"] = len(caught)
    return told


def test_a_loader_that_nobody_prepared_draws_one_warning_on_rank_0() -> None:
    for rank, told in enumerate(run_ranks(whole, 2, init=False, deadline_s=60)):
        assert (told.pop("plain"), told.pop("stream")) == ((1, 1) if rank == 0 else (0, 0))
        assert set(told.values()) == {0}, told


def resumed_on_one_rank(rank: int, size: int) -> str:
    with distributed.process_group(timeout=30):
        trainer = Engine(nothing)
        trainer.run([1])
        if rank == 1:
            trainer.load_state_dict(trainer.state_dict())
        return outcome(trainer.run, [1], 2)


def test_a_state_that_was_loaded_on_one_rank_only_is_told() -> None:
    for told in run_ranks(resumed_on_one_rank, 2, init=False, deadline_s=60):
        assert "rank 1 has epochs_completed=1, but rank 0 has epochs_completed=0" in told


def run_on_one_rank(rank: int, size: int) -> list[str]:
    with distributed.process_group(timeout=300):
        trainer, evaluator = Engine(nothing), Engine(nothing)

        def evaluate(engine: Engine) -> None:
            if rank == 0:
                evaluator.run([1])

        trainer.on(Events.COMPLETED, evaluate)
        return [outcome(lambda: (trainer.run([1]), trainer.run([1])))]


def test_a_run_inside_another_one_on_rank_0_only_is_not_taken_for_the_next_run_of_the_others() -> None:
    for (told,) in run_ranks(run_on_one_rank, 2, init=False, deadline_s=60):
        assert "ConsistencyError" in told
        assert "distributed=False" in told
