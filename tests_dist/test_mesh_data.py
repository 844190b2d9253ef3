"""Data on a mesh of ranks: which samples each gets. What it should be is computed here, in the parent."""

import os
import random
import warnings
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from dengine import Engine, Events, create_supervised_evaluator, create_supervised_trainer, distributed
from dengine.checkpoint import load
from dengine.control.plane import plane
from dengine.distributed import ElasticSampler
from dengine.engine import Absent
from dengine.errors import ConsistencyError
from dengine.handlers import Checkpoint
from dengine.torch_internals import num_collectives

# A mesh, and the ranks that share their data, in the order of their parts.
MESHES = [
    ({"dp": 2, "tp": 2}, [(0, 1), (2, 3)]),
    ({"dp_replicate": 2, "dp_shard": 2}, [(0,), (1,), (2,), (3,)]),
    ({"dp": 2, "cp": 2}, [(0, 1), (2, 3)]),
    ({"pp": 2, "dp": 2}, [(0, 2), (1, 3)]),
    ({"tp": 4}, [(0, 1, 2, 3)]),
]
SIZE = 23  # uneven for any of them


class Noisy(Dataset[Any]):
    """The index of a sample, and what each generator draws for it."""

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> Any:
        return index, random.random(), float(np.random.rand()), torch.rand(()).item()


class Numbers(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(SIZE))


def numbers(size: int) -> Any:
    """A data set whose samples are their indices; to the type checker it would be none."""
    return range(size)


def seen_on(rank: int, size: int, mesh: dict[str, int], kind: str) -> list[list[Any]]:
    """The samples of two epochs."""
    with distributed.process_group(mesh=mesh):
        if kind == "stream":
            loader: Any = distributed.prepare_data_loader(DataLoader(Numbers(), batch_size=2), exact=True)
        elif kind == "sampler":
            loader = DataLoader(
                numbers(SIZE), batch_size=2, sampler=ElasticSampler(range(SIZE), batch_size=2, exact=True)
            )
        else:
            workers: dict[str, Any] = {"num_workers": 2, "persistent_workers": True} if kind == "workers" else {}
            loader = DataLoader(Noisy(), batch_size=2, shuffle=True, **workers)
            loader = distributed.prepare_data_loader(loader, exact=True, seed=3)
        seen: list[list[Any]] = [[], []]

        def step(engine: Engine, batch: Any) -> None:
            rows = (
                zip(*(column.tolist() for column in batch), strict=True) if isinstance(batch, list) else batch.tolist()
            )
            seen[engine.state.epoch].extend(rows)

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Engine(step).run(loader, max_epochs=2)
        return seen


@pytest.mark.parametrize("kind", ["augmented", "workers", "stream", "sampler"])
@pytest.mark.parametrize(("mesh", "groups"), MESHES, ids=str)
def test_each_sample_is_seen_once_and_alike_by_the_ranks_that_share_it(
    mesh: dict[str, int], groups: list[tuple[int, ...]], kind: str
) -> None:
    seen = run_ranks(seen_on, 4, mesh, kind, init=False, deadline_s=60)
    for group in groups:
        assert all(seen[rank] == seen[group[0]] for rank in group), "peers have other samples, or other augmentation"
    for epoch in (0, 1):
        found = [row[0] if isinstance(row, tuple) else row for group in groups for row in seen[group[0]][epoch]]
        assert Counter(found) == Counter(range(SIZE))
        lengths = [len(seen[group[0]][epoch]) for group in groups]
        assert max(lengths) - min(lengths) <= (1 if kind != "stream" else 2)
    assert kind == "stream" or seen[0][0] != seen[0][1], "both epochs are in one order"


def test_the_samples_are_those_of_as_many_ranks_without_a_mesh() -> None:
    on_a_mesh = run_ranks(seen_on, 4, {"dp": 2, "tp": 2}, "augmented", init=False, deadline_s=60)
    plain = run_ranks(seen_on, 2, {"dp": 2}, "augmented", init=False, deadline_s=60)
    assert [on_a_mesh[0], on_a_mesh[2]] == plain


def refused(rank: int, size: int, mesh: dict[str, int]) -> list[str]:
    told = []

    def note(call: Any) -> None:
        try:
            call()
        except ValueError as error:
            told.append(str(error))

    with distributed.process_group(mesh=mesh):
        of_torch = DataLoader(numbers(8), sampler=DistributedSampler(numbers(8)))  # takes all ranks for its own
        by_hand = DataLoader(numbers(8), sampler=ElasticSampler(range(8), num_replicas=4, rank=rank))
        note(lambda: distributed.prepare_data_loader(of_torch))
        note(lambda: distributed.prepare_data_loader(by_hand))
        note(lambda: distributed.prepare_data_loader(DataLoader(numbers(8)), global_batch_size=3))
        note(lambda: Engine(lambda engine, batch: None, distributed=False).run(by_hand))  # is this rank's own affair
        kept = DataLoader(numbers(8), sampler=ElasticSampler(range(8)))
        assert distributed.prepare_data_loader(kept).sampler is kept.sampler, "a sampler that fits is made anew"
        note(lambda: Engine(lambda engine, batch: None).run(by_hand))
    return told


def test_a_sampler_for_other_ranks_is_refused_and_the_place_on_the_mesh_is_told() -> None:
    told = run_ranks(refused, 4, {"dp": 2, "tp": 2}, init=False, expect_failures=True, deadline_s=60)
    for rank, outcome in enumerate(told):
        assert outcome.value is not None, outcome.error_message
        place = (
            f"this is rank {rank} of 4 on a mesh (dp={rank // 2}, tp={rank % 2}), which is given part {rank // 2} of 2"
        )
        first, second, third, fourth = outcome.value
        assert first.startswith(f"This loader has a DistributedSampler for rank {rank} of 4, but {place}")
        assert "rank=world().data_rank and num_replicas=world().data_size" in first
        assert second.startswith(f"This loader has a ElasticSampler for rank {rank} of 4, but {place}")
        assert "does not divide into 2 parts, one for each group of ranks with the same data" in third
        assert fourth == second


def trains(
    rank: int, size: int, mesh: dict[str, int], batch_size: int, folder: Path, stop: int | None
) -> list[list[int]]:
    with distributed.process_group(mesh=mesh):
        loader = DataLoader(TensorDataset(torch.arange(24)), batch_size=batch_size, shuffle=True)
        seen: list[list[int]] = []
        trainer = Engine(lambda engine, batch: seen.append(batch[0].tolist()))
        trainer.on(Events.ITERATION_COMPLETED(every=2), Checkpoint({"trainer": trainer}, folder))
        Checkpoint.resume(folder, {"trainer": trainer})
        trainer.run(distributed.prepare_data_loader(loader), max_epochs=2, max_iterations=stop)
        return seen


def test_a_run_goes_on_at_the_same_sample_on_another_mesh(tmp_path: Path) -> None:
    """The position counts by parts of the data: 2 parts of batches of 2, then 4 of 1, then 1 of 4."""
    whole = run_ranks(trains, 1, {"dp": 1}, 4, tmp_path / "whole", None, init=False, deadline_s=60)[0]
    first = run_ranks(trains, 4, {"dp": 2, "tp": 2}, 2, tmp_path, 4, init=False, deadline_s=60)
    second = run_ranks(trains, 4, {"dp_replicate": 2, "dp_shard": 2}, 1, tmp_path, 8, init=False, deadline_s=60)
    third = run_ranks(trains, 2, {"tp": 2}, 4, tmp_path, None, init=False, deadline_s=60)
    assert first[0] == first[1]
    assert third[0] == third[1]
    batches = [one + other for one, other in zip(first[0], first[2], strict=True)]
    batches += [[sample for part in row for sample in part] for row in zip(*second, strict=True)]
    assert batches + third[0] == whole


def joined(rank: int, size: int) -> tuple[list[list[int]], int]:
    """Three batches of one sample over two parts of the data: ranks of the second one lack the last batch."""
    with distributed.process_group(mesh={"dp": 2, "tp": 2}):
        seen, num_absent = [], 0

        def step(engine: Engine, batch: Any) -> None:
            nonlocal num_absent
            seen.append((batch.spare if isinstance(batch, Absent) else batch).tolist())
            num_absent += isinstance(batch, Absent)
            distributed.barrier("in the step")  # which all ranks must reach

        loader = distributed.prepare_data_loader(DataLoader(numbers(3)), exact=True)
        Engine(step, joined=True).run(loader)
    return seen, num_absent


def test_a_joined_engine_goes_on_by_the_longest_part_of_the_data() -> None:
    told = run_ranks(joined, 4, init=False, deadline_s=60)
    assert told == [([[0], [2]], 0), ([[0], [2]], 0), ([[1], [1]], 1), ([[1], [1]], 1)]


def told_of(rank: int, size: int, mesh: dict[str, int], batches: list[Any]) -> str:
    with distributed.process_group(mesh=mesh):
        try:
            Engine(lambda engine, batch: None).run([batches[rank]])
        except ConsistencyError as error:
            return str(error)
    return "ran"


@pytest.mark.parametrize(
    ("batches", "ranks", "text"),
    [
        # Ranks 1 and 2 have each other's batch.
        ([torch.tensor([each]) for each in (0, 1, 0, 1)], "1 (dp=0, tp=1)", "rank 1 has int64 (1,) that begins 1"),
        ([{"x": [np.arange(2 + each)]} for each in (5, 5, 6, 5)], "3 (dp=1, tp=1)", "rank 3 has x.0: int64 (7,)"),
        ([("a", 1.0), ("a", 1.0), ("a", 1.0), ("a", 2.0)], "3 (dp=1, tp=1)", "rank 3 has 1: 2.0, rank 2 has 1: 1.0"),
        ([*[torch.eye(9)] * 3, torch.eye(9).flip(0)], "3 (dp=1, tp=1)", "rank 3 has float32 (9, 9)"),
        ([*[torch.ones(9)] * 3, torch.ones(9).cumprod(0)], "", "ran"),
        ([torch.zeros(9), torch.arange(9) // 8.0] * 2, "1 (dp=0, tp=1)", "both have float32 (9,) that begins 0.0, "),
        ([[1], [1, 2]] * 2, "1 (dp=0, tp=1)", "rank 1 has 2 parts of it, rank 0 1"),
        ([{"s": torch.eye(2).to_sparse(), "o": object(), "e": torch.zeros(0)}] * 4, "", "ran"),
    ],
)  # fmt: skip
def test_other_first_batches_of_ranks_that_share_them_are_named_on_all(
    batches: list[Any], ranks: str, text: str
) -> None:
    told = run_ranks(told_of, 4, {"dp": 2, "tp": 2}, batches, init=False, deadline_s=60)
    assert len(set(told)) == 1
    assert text in told[0]
    assert told[0].startswith(f"Rank {ranks} and rank" if ranks else "ran")


def test_ranks_with_data_of_their_own_may_have_other_batches() -> None:
    batches = [torch.tensor([each]) for each in range(4)]
    mesh = {"dp_replicate": 2, "dp_shard": 2}
    assert run_ranks(told_of, 4, mesh, batches, init=False, deadline_s=60) == ["ran"] * 4


def other_seed(rank: int, size: int, odd: int) -> str:
    with distributed.process_group(mesh={"pp": 2, "dp": 2}):
        loader = distributed.prepare_data_loader(DataLoader(numbers(8), shuffle=True), seed=int(rank == odd))
        try:
            Engine(lambda engine, batch: None).run(loader)
        except ConsistencyError as error:
            return str(error)
    return "ran"


def test_another_seed_of_the_loader_is_named() -> None:
    told = run_ranks(other_seed, 4, 2, init=False, deadline_s=60)
    assert len(set(told)) == 1
    assert "rank 2 has seed=1, but rank 0 has seed=0" in told[0]


def resumed_with_another_batch(rank: int, size: int) -> list[str]:
    told: list[str] = []
    state: dict[str, Any] = {}
    with distributed.process_group(mesh={"dp": 1, "tp": 2}):
        batches = [[0], [1], [2], [3] if rank == 0 else [4]]
        for stop in (1, 3, None):
            engine = Engine(lambda engine, batch: None)
            if told:
                engine.load_state_dict(state)
            try:
                engine.run(batches, max_iterations=stop)
                told.append("ran")
            except ConsistencyError as error:
                told.append(str(error))
            state = engine.state_dict()
    return told


def test_a_resumed_run_is_looked_at_in_its_first_iteration() -> None:
    for told in run_ranks(resumed_with_another_batch, 2, init=False, deadline_s=60):
        assert told[:2] == ["ran", "ran"]
        assert "rank 1 has 0: 4, rank 0 has 0: 3" in told[2]


def num_calls(rank: int, size: int, mesh: dict[str, int] | None, kind: str) -> list[int]:
    """How many collectives a run of two epochs takes, and one more run."""
    with distributed.process_group(mesh=mesh):
        data: Any = Numbers() if kind == "stream" else numbers(8)
        loader = distributed.prepare_data_loader(DataLoader(data))
        found = []
        for _ in range(2):
            before = num_collectives(plane().group)
            Engine(lambda engine, batch: None).run(loader, max_epochs=2)
            found.append(num_collectives(plane().group) - before)
    return found


def test_the_comparison_takes_one_small_collective_and_none_without_ranks_that_share_data() -> None:
    """A stream takes one more anyway, to find out whether any rank has a batch: the comparison is in it."""
    for mesh in (None, {"dp": 2}):
        assert run_ranks(num_calls, 2, mesh, "map", init=False, deadline_s=60) == [[1, 1]] * 2
        assert run_ranks(num_calls, 2, mesh, "stream", init=False, deadline_s=60) == [[2, 2]] * 2
    for kind in ("map", "stream"):
        assert run_ranks(num_calls, 2, {"tp": 2}, kind, init=False, deadline_s=60) == [[2, 2]] * 2


class OwnRank(IterableDataset[int]):
    """Reads the launcher's variables, as streams do that shard themselves; `is_told` of the part it is to give."""

    shards_itself = True

    def __init__(self, *, is_told: bool = False) -> None:
        self.is_told = is_told

    def __iter__(self) -> Iterator[int]:
        here = distributed.world()
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        return iter(range(*((here.data_rank, 8, here.data_size) if self.is_told else (rank, 8, size))))


class Piped(OwnRank):
    """As webdataset's pipelines are, without the attribute."""

    shards_itself = False

    def __init__(self) -> None:
        super().__init__()

        def split_by_node(source: Any) -> Any:
            return source

        split_by_node.__module__ = "webdataset.shardlists"
        self.pipeline = [split_by_node]


def streaming_dataset() -> IterableDataset[int]:
    """As MosaicML's and LitData's are: known by the class's name and its package."""
    kind: Any = type("StreamingDataset", (OwnRank,), {"shards_itself": False, "__module__": "streaming.base"})
    return kind()


def fed_in_turn(rank: int, size: int) -> dict[str, str]:
    """What comes of each kind of data and of engine; the next one goes on after an error that all ranks raise."""
    net = torch.nn.Linear(2, 1)
    told = {}

    def pairs(seed: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed)
        return [(torch.randn(2, 2, generator=generator), torch.zeros(2, 1)) for _ in range(2)]

    with distributed.process_group(mesh={"dp": 2, "tp": 2}) as here:
        plain = Engine(lambda engine, batch: None)
        model = distributed.prepare_model(net)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = create_supervised_trainer(model, optimizer, torch.nn.functional.mse_loss)
        evaluator = create_supervised_evaluator(model)
        validated = create_supervised_trainer(model, optimizer, torch.nn.functional.mse_loss)
        own, alike = pairs(rank), pairs(here.data_rank)
        validated.on(Events.ITERATION_COMPLETED(once=1), lambda engine: evaluator.run(own))
        stream = DataLoader(Numbers(), batch_size=2)
        for name, engine, data in (
            ("reads its rank", plain, distributed.prepare_data_loader(DataLoader(OwnRank()))),
            ("streaming", plain, distributed.prepare_data_loader(DataLoader(streaming_dataset()))),
            ("webdataset", plain, distributed.prepare_data_loader(DataLoader(Piped()))),
            ("is told", plain, distributed.prepare_data_loader(DataLoader(OwnRank(is_told=True)))),
            ("seed of a stream", plain, distributed.prepare_data_loader(stream, seed=int(rank == 3))),
            ("trainer", trainer, own),
            ("trainer alike", trainer, alike),
            ("evaluator", evaluator, own),
            ("evaluator alike", evaluator, alike),
            ("in a handler", validated, alike),
        ):
            try:
                engine.run(data)
                told[name] = "ran"
            except ConsistencyError as error:
                told[name] = str(error)
    return told


def test_whatever_runs_other_data_than_its_peers_is_told_at_once_and_how_to_be_given_the_same() -> None:
    first, *others = run_ranks(fed_in_turn, 4, init=False, deadline_s=60)
    assert others == [first] * 3
    assert {name for name, text in first.items() if text == "ran"} == {"is told", "trainer alike", "evaluator alike"}
    for name in ("reads its rank", "streaming", "webdataset"):
        assert "rank 1 has int64 (1,) that begins 1, rank 0 has int64 (1,) that begins 0" in first[name], first[name]
        assert "asks for RANK or torch.distributed.get_rank() by itself" in first[name]
    for name in ("trainer", "evaluator", "in a handler"):
        assert first[name].startswith("Rank 1 (dp=0, tp=1) and rank 0 (dp=0, tp=0) must be given the same data"), name
    assert "rank 3 has seed=1, but rank 0 has seed=0" in first["seed of a stream"]


# -- an epoch that ends unevenly ---------------------------------------------------------------------------------


def resumed(rank: int, size: int, num_samples: int, folder: str) -> list[tuple[int, list[tuple[int, list[int]]]]]:
    """For each run this rank's part of the data and, with their epochs, its batches: of a whole run, then from its
    checkpoints on other meshes."""
    found = []
    for mesh, start in (
        ({"dp": 2, "tp": 2}, None),
        ({"dp": 2, "tp": 2}, "at_5.pt"),
        ({"tp": 4}, "at_5.pt"),
        ({"dp": 4}, "at_5.pt"),
        ({"dp": 2, "tp": 2}, "at_6.pt"),
    ):
        seen: list[tuple[int, list[int]]] = []
        with distributed.process_group(mesh=mesh) as here, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other generators
            trainer = Engine(partial(note, seen))
            if start is None:
                checkpoint = Checkpoint({"trainer": trainer}, folder, "at", n_saved=None)
                trainer.on(Events.ITERATION_COMPLETED(every=5) | Events.EPOCH_COMPLETED, checkpoint)
            else:
                load(f"{folder}/{start}", {"trainer": trainer})
            loader = DataLoader(numbers(num_samples), shuffle=True)
            trainer.run(distributed.prepare_data_loader(loader, global_batch_size=4, exact=True, seed=3), max_epochs=2)
            found.append((here.data_rank, seen))
    return found


def note(seen: list[tuple[int, list[int]]], engine: Engine, batch: torch.Tensor) -> None:
    seen.append((engine.state.epoch, batch.tolist()))


@pytest.mark.parametrize("num_samples", [21, 23])  # in the last batch of four, a rank of two has one and none, or two
def test_a_run_goes_on_at_the_uneven_end_of_an_epoch_on_any_mesh(tmp_path: Path, num_samples: int) -> None:
    of_ranks = run_ranks(resumed, 4, num_samples, str(tmp_path), init=False, deadline_s=60)
    for run, num_done in enumerate([0, 20, 20, 20, num_samples]):
        parts: dict[int, list[tuple[int, list[int]]]] = {}
        for found in of_ranks:
            part, seen = found[run]
            assert parts.setdefault(part, seen) == seen, "ranks that share their data have other samples"
        counts = [Counter(x for seen in parts.values() for at, batch in seen if at == e for x in batch) for e in (0, 1)]
        assert sum(counts[0].values()) == num_samples - num_done
        assert counts[1] == Counter(range(num_samples))
        if run == 0:
            first = counts[0]
            assert first == counts[1]
            whole = {part: dict(enumerate(batch for at, batch in seen if at == 0)) for part, seen in parts.items()}
            left = Counter(x for batches in whole.values() for x in batches.get(5, []))
        assert counts[0] == (first, left, left, left, Counter())[run]
