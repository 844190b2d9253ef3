"""Data that give each rank its own samples already are not cut up once more; a sampler of the user's stays his."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from dengine import Engine, Events
from dengine.data.loader import data_state
from dengine.distributed import ElasticSampler, World, prepare_data_loader

NUMBERS = TensorDataset(torch.arange(13))
PLACES = [(0, 2), (1, 2)]


@pytest.fixture(params=PLACES, ids=["rank 0", "rank 1"])
def place(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    rank, size = request.param
    monkeypatch.setattr("dengine.data.loader.world", lambda: World(rank=rank, size=size))
    return rank, size


class Split(NamedTuple):
    """As datasets.distributed.DistributedConfig."""

    rank: int
    world_size: int


class Half(IterableDataset[int]):
    """Gives every second number."""

    def __init__(self, rank: int, size: int) -> None:
        self.mine = range(rank, 12, size)

    def __iter__(self) -> Iterator[int]:
        return iter(self.mine)


class HuggingFace(Half):
    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)
        self._distributed = Split(rank, size)


class Announced(Half):
    shards_itself = True


def split_by_node(source: Any, group: Any = None) -> Any:
    return source


split_by_node.__module__ = "webdataset.shardlists"


class WebDataset(Half):
    def __init__(self, rank: int, size: int, stage: Any = split_by_node) -> None:
        super().__init__(rank, size)
        self.pipeline = [object(), stage, print]


class StreamingDataset(Half):
    pass


StreamingDataset.__module__ = "streaming.base.dataset"


class StreamingText(StreamingDataset):
    pass


def batches(loader: Any) -> list[list[int]]:
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize(
    "kind",
    [HuggingFace, Announced, WebDataset, partial(WebDataset, stage=partial(split_by_node)), StreamingText],
)
def test_a_stream_that_shards_itself_loses_no_sample(kind: Any, place: tuple[int, int]) -> None:
    prepared = prepare_data_loader(DataLoader(kind(*place), batch_size=4))
    mine = list(range(place[0], 12, 2))
    assert batches(prepared) == [mine[:4], mine[4:]]
    state = data_state(prepared)
    assert state is not None
    assert (state["global_batch_size"], state["exact"]) == (8, True)
    assert prepare_data_loader(DataLoader(kind(*place), batch_size=1), global_batch_size=4).batch_size == 2
    assert batches(prepare_data_loader(prepared)) == [mine[:4], mine[4:]]


def test_a_stream_that_does_not_is_dealt_out(place: tuple[int, int]) -> None:
    class StreamingDataset(Half):  # of the user's own
        pass

    for dataset in (Half(0, 1), StreamingDataset(0, 1), WebDataset(0, 1, stage=print)):
        found = batches(prepare_data_loader(DataLoader(dataset, batch_size=3)))
        assert found == [[3 * place[0] + i for i in range(3)], [6 + 3 * place[0] + i for i in range(3)]]


@pytest.mark.parametrize("wrong", [Split(0, 4), Split(3, 4), Split(0, 1)])
def test_a_split_for_another_rank_or_number_of_ranks_is_refused_with_both(wrong: Split, place: tuple[int, int]) -> None:
    dataset = HuggingFace(*place)
    dataset._distributed = wrong
    with pytest.raises(ValueError, match=f"rank {wrong.rank} of {wrong.world_size}, but this is rank {place[0]} of 2"):
        prepare_data_loader(DataLoader(dataset))


# -- samplers ----------------------------------------------------------------------------------------------------


def samplers(place: tuple[int, int]) -> list[Any]:
    rank, size = place
    return [
        DistributedSampler(NUMBERS, num_replicas=size, rank=rank, seed=7),
        DistributedSampler(NUMBERS, num_replicas=size, rank=rank, shuffle=False, drop_last=True),
        type("Mine", (DistributedSampler,), {})(NUMBERS, num_replicas=size, rank=rank, seed=7),
        ElasticSampler(NUMBERS, batch_size=3, num_replicas=size, rank=rank, seed=7, exact=True),
        ElasticSampler(NUMBERS, num_replicas=size, rank=rank, shuffle=False, drop_last=True),
    ]


@pytest.mark.parametrize("number", range(5))
def test_a_sampler_that_fits_the_ranks_is_kept_with_its_seed_and_settings(number: int, place: tuple[int, int]) -> None:
    prepared = prepare_data_loader(DataLoader(NUMBERS, batch_size=3, sampler=samplers(place)[number]))
    assert isinstance(prepared.sampler, DistributedSampler)
    expected = samplers(place)[number]
    for name in ("seed", "shuffle", "drop_last", "num_replicas", "rank", "num_samples", "total_size"):
        assert getattr(prepared.sampler, name) == getattr(expected, name), name
    assert len(prepared) == -(-len(expected) // 3)
    again = prepare_data_loader(prepare_data_loader(DataLoader(NUMBERS, batch_size=3, sampler=samplers(place)[number])))
    for epoch in (0, 1, 2):  # nobody tells it
        expected.set_epoch(epoch)
        wanted = list(expected)
        for loader in (prepared, again):
            assert sum((batch[0].tolist() for batch in loader), []) == wanted


def test_a_kept_sampler_may_be_told_by_the_one_who_made_it(place: tuple[int, int]) -> None:
    mine = DistributedSampler(NUMBERS, num_replicas=place[1], rank=place[0], seed=7)
    prepared = prepare_data_loader(DataLoader(NUMBERS, sampler=mine))
    for epoch in (0, 1, 5, 2):
        mine.set_epoch(epoch)
        expected = list(mine)
        assert [int(batch[0]) for batch in prepared] == expected


@pytest.mark.parametrize("kind", [DistributedSampler, ElasticSampler])
@pytest.mark.parametrize("wrong", [(0, 4), (3, 4), (0, 1)])
def test_a_sampler_for_another_rank_or_number_of_ranks_is_refused_with_both(
    kind: Any, wrong: tuple[int, int], place: tuple[int, int]
) -> None:
    rank, size = wrong
    sampler = kind(NUMBERS, num_replicas=size, rank=rank)
    with pytest.raises(ValueError, match=f"for rank {rank} of {size}, but this is rank {place[0]} of 2"):
        prepare_data_loader(DataLoader(NUMBERS, sampler=sampler))


class ByLength(DistributedSampler[int]):
    """As transformers' DistributedLengthGroupedSampler: with neither a data set nor `shuffle`."""

    def __init__(self, rank: int, size: int) -> None:
        self.lengths = [index % 5 for index in range(13)]
        self.rank, self.num_replicas, self.seed, self.epoch, self.drop_last = rank, size, 0, 0, False
        self.num_samples = -(-13 // size)
        self.total_size = self.num_samples * size

    def __iter__(self) -> Iterator[int]:
        order = sorted(range(13), key=lambda index: ((self.lengths[index] + self.epoch) % 5, index))
        return iter((order * 2)[self.rank : self.total_size : self.num_replicas])


def test_a_distributed_sampler_with_attributes_of_its_own_is_kept(place: tuple[int, int]) -> None:
    loader = DataLoader(NUMBERS, batch_size=2, sampler=ByLength(*place))
    found: list[list[int]] = []
    trainer = Engine(lambda engine, batch: found.append(batch[0].tolist()))
    trainer.run(loader, max_epochs=2)
    plain, found[:] = list(found), []
    prepared = prepare_data_loader(loader)
    trainer.run(prepared, max_epochs=2)
    assert found == plain
    assert data_state(prepared)["length"] == 13
    with pytest.raises(ValueError, match="takes 14 samples of 13"):
        prepare_data_loader(loader, exact=True)


def test_exact_is_refused_of_a_sampler_that_pads(place: tuple[int, int]) -> None:
    rank, size = place
    padding: list[Any] = [DistributedSampler(NUMBERS, num_replicas=size, rank=rank)]
    padding.append(ElasticSampler(NUMBERS, num_replicas=size, rank=rank))
    for sampler in padding:
        with pytest.raises(ValueError, match="takes 14 samples of 13: leave the sampler out"):
            prepare_data_loader(DataLoader(NUMBERS, sampler=sampler), exact=True)
    even = TensorDataset(torch.arange(12))
    sampler = DistributedSampler(even, num_replicas=size, rank=rank)
    assert len(prepare_data_loader(DataLoader(even, sampler=sampler), exact=True)) == 6


def test_a_run_over_a_kept_sampler_is_resumed_without_loading_in_vain() -> None:
    def loader() -> Any:
        sampler: Any = DistributedSampler(NUMBERS, num_replicas=1, rank=0, seed=7)
        return prepare_data_loader(DataLoader(NUMBERS, batch_size=2, sampler=sampler))

    whole: list[Any] = []
    states: list[Any] = []
    trainer = Engine(lambda engine, batch: whole.append(batch[0].tolist()))
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: states.append((engine.state_dict(), engine.random_state())))
    trainer.run(loader(), max_epochs=2)
    for position, saved in states:
        rest: list[Any] = []
        again = Engine(lambda engine, batch: rest.append(batch[0].tolist()))  # noqa: B023
        again.load_state_dict(position)
        again.load_random_state(saved)
        again.run(loader(), max_epochs=2)
        assert rest == whole[position["iteration"] :]


# -- the packages themselves -------------------------------------------------------------------------------------


def test_hugging_face_s_split_is_recognised(place: tuple[int, int]) -> None:
    datasets = pytest.importorskip("datasets")
    pytest.importorskip("datasets.distributed")
    stream = datasets.Dataset.from_dict({"x": list(range(12))}).to_iterable_dataset()
    mine = datasets.distributed.split_dataset_by_node(stream, rank=place[0], world_size=place[1])
    prepared = prepare_data_loader(DataLoader(mine, batch_size=2))
    assert sum((batch["x"].tolist() for batch in prepared), []) == list(range(place[0], 12, 2))


def test_webdataset_s_split_is_recognised(place: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    webdataset = pytest.importorskip("webdataset")
    shards = [f"{number}" for number in range(8)]
    pipeline = webdataset.DataPipeline(
        webdataset.SimpleShardList(shards), webdataset.split_by_node, webdataset.split_by_worker
    )
    prepared = prepare_data_loader(DataLoader(pipeline, batch_size=None))
    monkeypatch.setenv("RANK", str(place[0]))
    monkeypatch.setenv("WORLD_SIZE", str(place[1]))
    assert [shard["url"] for shard in prepared] == shards[place[0] :: 2]
