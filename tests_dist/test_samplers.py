"""Samplers of the user's over real ranks: interrupted, resumed, also by another number of ranks, and evaluated."""

import hashlib
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankFailed, run_ranks
from torch import nn
from torch.utils.data import (
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from dengine import Engine, Events, distributed
from dengine.engine import Absent
from dengine.errors import ConsistencyError
from dengine.handlers import Checkpoint

LENGTH, GLOBAL_BATCH, EPOCHS = 29, 6, 2

Sample = tuple[int, float]
Batches = list[list[Sample]]


class Noisy(Dataset[tuple[int, torch.Tensor]]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.rand(2) + index / LENGTH


class InEpochs(Sampler[int]):
    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return 20

    def __iter__(self) -> Iterator[int]:
        return iter(random.Random(self.epoch).sample(range(LENGTH), 20))


class Seeded(Sampler[int]):
    def __init__(self) -> None:
        self.generator = random.Random(4)

    def __len__(self) -> int:
        return 15

    def __iter__(self) -> Iterator[int]:
        return iter(self.generator.choices(range(LENGTH), k=15))


class Buckets(InEpochs):
    """Eight batches of different lengths in an epoch, nine in the next."""

    def __len__(self) -> int:
        return 8 + self.epoch % 2

    def __iter__(self) -> Iterator[Any]:
        order = random.Random(self.epoch).sample(range(LENGTH), LENGTH)
        cuts = [0, 2, 7, 8, 9, 12, *([15] if self.epoch % 2 else []), 16, 20, LENGTH]
        return (order[first:last] for first, last in pairwise(cuts))


def weights() -> list[float]:
    return [float(index % 4) for index in range(LENGTH)]


SAMPLERS: dict[str, Callable[[], Any]] = {
    "weighted": lambda: WeightedRandomSampler(weights(), 23),
    "weighted by a generator": lambda: WeightedRandomSampler(weights(), 23, generator=torch.Generator().manual_seed(5)),
    "weighted, each once": lambda: WeightedRandomSampler(weights(), 20, replacement=False),
    "replaced": lambda: RandomSampler(range(LENGTH), replacement=True),
    "few": lambda: RandomSampler(range(LENGTH), num_samples=16),
    "many": lambda: RandomSampler(range(LENGTH), num_samples=40),
    "subset": lambda: SubsetRandomSampler(range(3, 26)),
    "in epochs": InEpochs,
    "seeded": Seeded,
    "buckets": Buckets,
    "kept": lambda: DistributedSampler(range(LENGTH), seed=9),  # type: ignore[arg-type]
}
OWN_ORDER = [kind for kind in SAMPLERS if kind != "kept"]


def loader_of(kind: str, num_workers: int, *, exact: bool = False) -> DataLoader[Any]:
    size = distributed.world().data_size
    options: dict[str, Any] = {"num_workers": num_workers, "persistent_workers": num_workers > 0}
    if kind == "buckets":
        options["batch_sampler"] = SAMPLERS[kind]()
    else:
        options.update(sampler=SAMPLERS[kind](), batch_size=GLOBAL_BATCH // size)
    return distributed.prepare_data_loader(DataLoader(Noisy(), **options), exact=exact)


def samples_of(batch: Any) -> list[Sample]:
    if isinstance(batch, Absent):
        return []
    return [(index, float(noise[0])) for index, noise in zip(batch[0].tolist(), batch[1], strict=True)]


# -- training, interrupted and resumed by as many ranks ----------------------------------------------------------


def train(kind: str, folder: Path, until: int | None, num_workers: int) -> tuple[Batches, str]:
    """This rank's batches from the newest checkpoint on, and a digest of the weights at the end."""
    torch.manual_seed(0)
    model = distributed.prepare_model(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    batches: Batches = []

    def step(engine: Engine, batch: Any) -> None:
        batches.append(samples_of(batch))
        optimizer.zero_grad()
        model(batch[1]).square().mean().backward()
        optimizer.step()

    trainer = Engine(step)
    objects = {"trainer": trainer, "model": model, "optimizer": optimizer}
    if until is not None:
        trainer.on(Events.ITERATION_COMPLETED(once=until), Checkpoint(objects, folder))
    Checkpoint.resume(folder, objects)
    trainer.run(loader_of(kind, num_workers), max_epochs=EPOCHS, max_iterations=until)
    values = b"".join(value.detach().numpy().tobytes() for value in model.state_dict().values())
    return batches, hashlib.sha256(values).hexdigest()


def first_parts(rank: int, size: int, folder: str) -> dict[str, Any]:
    """Each kind: the run without an interruption, and the part up to a stop: before the last batch of an epoch, after
    it, or in the second epoch. Each kind is stopped at another of these for each number of ranks.
    """
    found = {}
    for number, kind in enumerate(SAMPLERS):
        stop = len(loader_of(kind, 0)) + (-1, 0, 2)[(number + size) % 3]
        whole = train(kind, Path(folder, f"{kind} whole"), None, number % 3 == 0)
        found[kind] = whole, train(kind, Path(folder, kind), stop, number % 3 == 1)
    return found


def last_parts(rank: int, size: int, folder: str) -> dict[str, Any]:
    return {kind: train(kind, Path(folder, kind), None, number % 3 == 2) for number, kind in enumerate(SAMPLERS)}


@pytest.mark.parametrize("size", [1, 2, 3])
def test_interrupted_and_resumed_runs_end_as_one_without_an_interruption(tmp_path: Path, size: int) -> None:
    first = run_ranks(first_parts, size, str(tmp_path))
    last = run_ranks(last_parts, size, str(tmp_path))
    for kind in SAMPLERS:
        for rank in range(size):
            (batches, digest), (before, _) = first[rank][kind]
            after, digest_at_end = last[rank][kind]
            assert before + after == batches, kind
            assert digest_at_end == digest, kind
        assert len({each[kind][0][1] for each in first}) == 1, kind


# -- the same samples on any number of ranks ---------------------------------------------------------------------


def seen(kind: str, folder: Path, until: int | None, num_workers: int) -> Batches:
    batches: Batches = []
    trainer = Engine(lambda engine, batch: batches.append(samples_of(batch)), joined=True)
    if until is not None:
        trainer.on(Events.ITERATION_COMPLETED(once=until), Checkpoint({"trainer": trainer}, folder))
    Checkpoint.resume(folder, {"trainer": trainer})
    trainer.run(loader_of(kind, num_workers, exact=True), max_epochs=EPOCHS, max_iterations=until)
    return batches


def all_seen(rank: int, size: int, folder: str, stops: dict[str, int] | None) -> dict[str, Batches]:
    return {
        kind: seen(kind, Path(folder, kind), None if stops is None else stops[kind], (number + size) % 4 == 0)
        for number, kind in enumerate(OWN_ORDER)
    }


def joined(parts: list[dict[str, Batches]], kind: str) -> Batches:
    """The global batches: of each step, the batches of the ranks one after the other."""
    of_ranks = [part[kind] for part in parts]
    steps = max(map(len, of_ranks))
    return [sum((batches[step] for batches in of_ranks if step < len(batches)), []) for step in range(steps)]


def test_three_two_and_one_rank_see_the_global_batches_of_one_and_each_draw_once(tmp_path: Path) -> None:
    # The oracle: this process alone, without workers, never interrupted.
    whole = {kind: seen(kind, tmp_path / "whole", None, 0) for kind in OWN_ORDER}
    for kind, batches in whole.items():
        indices = Counter(index for batch in batches for index, _ in batch)
        if kind == "buckets":
            assert set(indices.values()) == {EPOCHS}
            assert len(indices) == LENGTH
        elif kind in ("weighted, each once", "few", "subset", "in epochs"):
            assert max(indices.values()) <= EPOCHS
        expected = LENGTH if kind == "buckets" else len(SAMPLERS[kind]())
        assert indices.total() == EPOCHS * expected
    per_epoch = {kind: len(batches) // EPOCHS for kind, batches in whole.items()}
    last_of_first = {kind: 1 if kind == "buckets" else number - 1 for kind, number in per_epoch.items()}
    second = {kind: 5 if kind == "buckets" else number + 1 for kind, number in per_epoch.items()}
    parts = [
        run_ranks(all_seen, size, str(tmp_path / "parts"), stops)
        for size, stops in ((3, last_of_first), (2, second), (1, None))
    ]
    alone = run_ranks(all_seen, 2, str(tmp_path / "two"), None)
    for kind, batches in whole.items():
        found = [batch for each in parts for batch in joined(each, kind)]
        if kind == "buckets":  # a step has as many batches as there are ranks
            assert sum(found, []) == sum(batches, [])
            assert sum(joined(alone, kind), []) == sum(batches, [])
        else:
            assert found == batches, kind
            assert joined(alone, kind) == batches, kind


def on_a_mesh(rank: int, size: int) -> dict[str, Batches]:
    with distributed.process_group(mesh={"dp": 1, "tp": 2}):
        return {kind: seen(kind, Path("unused"), None, 0) for kind in OWN_ORDER[::3]}


def test_ranks_that_share_their_data_on_a_mesh_get_the_same_samples() -> None:
    whole = {kind: seen(kind, Path("unused"), None, 0) for kind in OWN_ORDER[::3]}
    with_tp = run_ranks(on_a_mesh, 2, init=False)
    assert with_tp == [whole, whole]


# -- bad input ---------------------------------------------------------------------------------------------------


class OfRank(Sampler[int]):
    def __init__(self) -> None:
        self.order = random.Random(distributed.world().rank).sample(range(LENGTH), 12)

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[int]:
        return iter(self.order)


class BatchesOfRank(OfRank):
    def __iter__(self) -> Iterator[Any]:
        return iter([[index] for index in self.order])


class LaterOfRank(InEpochs):
    """The same in the first epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch * (1 + distributed.world().rank)


def run_over(options: dict[str, Any]) -> str:
    try:
        loader: DataLoader[Any] = DataLoader(Noisy(), **options)
        trainer = Engine(lambda engine, batch: None, joined=True)
        trainer.run(distributed.prepare_data_loader(loader), max_epochs=EPOCHS)
    except ConsistencyError as error:
        return str(error)
    return ""


def differing(rank: int, size: int) -> list[str]:
    mine = [*weights()[:-1], 1.0 + rank]
    generator = torch.Generator().manual_seed(rank)
    return [
        run_over({"sampler": WeightedRandomSampler(mine, 9)}),
        run_over({"sampler": WeightedRandomSampler(mine, 9, replacement=False)}),
        run_over({"sampler": RandomSampler(range(LENGTH), replacement=True, generator=generator)}),
        run_over({"sampler": SubsetRandomSampler(range(rank, 20 + rank))}),
        run_over({"sampler": OfRank()}),
        run_over({"batch_sampler": BatchesOfRank()}),
        run_over({"sampler": LaterOfRank()}),
        run_over({"sampler": WeightedRandomSampler(weights(), 9)}),
    ]


def test_samplers_that_differ_between_ranks_are_named_on_every_rank() -> None:
    first, second = run_ranks(differing, 2)
    assert first == second
    names = ["WeightedRandomSampler"] * 2 + ["RandomSampler", "SubsetRandomSampler", "OfRank", "BatchesOfRank"]
    later = "The samples of this epoch differ between ranks: rank 1 has LaterOfRank"
    assert re.match(later + r" .* in epoch 1\), but rank 0 has LaterOfRank", first[-2]), first[-2]
    for name, message in zip(names, first[:-2], strict=True):
        start = "The data of the run differ between ranks: rank 1 has sampler="
        assert re.match(re.escape(start) + name + r" .*, but rank 0 has sampler=" + name, message), message
    assert first[-1] == ""


def changed(rank: int, size: int, folder: str, is_changed: bool, kind: str) -> None:
    sampler: Any = InEpochs()
    if is_changed:
        other = {"weights": WeightedRandomSampler(weights(), 20), "order": InEpochs(), "none": None}
        sampler = other[kind]
        if kind == "order":
            InEpochs.__iter__ = lambda self: iter(range(20))
    trainer = Engine(lambda engine, batch: None)
    trainer.on(Events.ITERATION_COMPLETED(once=4), Checkpoint({"trainer": trainer}, folder))
    Checkpoint.resume(folder, {"trainer": trainer})
    loader: DataLoader[Any] = DataLoader(Noisy(), batch_size=4, sampler=sampler)
    trainer.run(distributed.prepare_data_loader(loader), max_epochs=EPOCHS, max_iterations=None if is_changed else 4)


def test_another_sampler_in_a_resumed_run_is_named(tmp_path: Path) -> None:
    run_ranks(changed, 1, str(tmp_path), False, "")
    for kind, name in (("weights", "WeightedRandomSampler"), ("order", "InEpochs"), ("none", "none of its own")):
        with pytest.raises(RankFailed, match=f"the sampler was InEpochs .* in epoch 0\\) and is {name}"):
            run_ranks(changed, 1, str(tmp_path), True, kind)
