"""torchdata's `StatefulDataLoader`, prepared and restored by hand: a stand-in, and itself if it is there."""

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler

from dengine import Engine, distributed

SAMPLERS = "torchdata.stateful_dataloader.sampler"


def samplers_of_torchdata() -> tuple[Any, Any]:
    """Its batch sampler, derived from torch's, and its random sampler, which is not."""

    class RandomOrder(Sampler[int]):
        replacement = False

        def __init__(self, data_source: Any) -> None:
            self.data_source = data_source
            self.num_samples = len(data_source)

        def __iter__(self) -> Iterator[int]:
            return iter(torch.randperm(self.num_samples).tolist())

        def __len__(self) -> int:
            return self.num_samples

    random = type("RandomSampler", (RandomOrder,), {"__module__": SAMPLERS})
    return type("BatchSampler", (BatchSampler,), {"__module__": SAMPLERS}), random


def loader_of(dataset: Any, *, shuffle: bool) -> DataLoader[Any]:
    batch_sampler, random = samplers_of_torchdata()
    sampler = random(dataset) if shuffle else SequentialSampler(dataset)
    loader: DataLoader[Any] = DataLoader(dataset, batch_size=2, sampler=sampler)
    vars(loader)["batch_sampler"] = batch_sampler(sampler, 2, False)  # as its constructor does
    return loader


@pytest.mark.parametrize("shuffle", [False, True])
def test_it_is_prepared_as_torchs_loader_is(shuffle: bool) -> None:
    dataset = list(range(7))
    prepared = distributed.prepare_data_loader(loader_of(dataset, shuffle=shuffle))
    plain: DataLoader[Any] = distributed.prepare_data_loader(DataLoader(dataset, batch_size=2, shuffle=shuffle))  # type: ignore[arg-type]
    found = [batch.tolist() for batch in prepared]
    assert found == [batch.tolist() for batch in plain]
    assert sorted(sum(found, [])) == [*dataset, *found[-1][1:]] or sorted(set(sum(found, []))) == dataset


def test_a_batch_sampler_of_ones_own_is_taken_as_torchs_loader_takes_it() -> None:
    loader: DataLoader[Any] = DataLoader([1, 2, 3], batch_sampler=[[0, 1], [2]])  # type: ignore[arg-type]
    assert [batch.tolist() for batch in distributed.prepare_data_loader(loader)] == [[1, 2], [3]]


class GoesOn:
    """As torchdata's loader: what is loaded waits in `next_iter_state` for the next pass."""

    def __init__(self) -> None:
        self.next_iter_state: int | None = None
        self.position = 0

    def __len__(self) -> int:
        return 7

    def __iter__(self) -> Iterator[int]:
        self.position, self.next_iter_state = self.next_iter_state or 0, None
        while self.position < 7:
            self.position += 1
            yield self.position - 1

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next_iter_state = state["position"]


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("iteration", [1, 3, 6, 7, 8, 13, 14])
def test_one_that_was_restored_by_hand_is_not_wound_forward_as_well(iteration: int, by_hand: bool) -> None:
    found: list[int] = []
    first, second = GoesOn(), GoesOn()
    trainer = Engine(lambda engine, batch: found.append(batch))
    trainer.run(first, max_epochs=3, max_iterations=iteration)
    resumed = Engine(lambda engine, batch: found.append(batch))
    resumed.load_state_dict(trainer.state_dict())
    if by_hand:
        second.load_state_dict(first.state_dict())
    resumed.run(second, max_epochs=3)
    assert found == list(range(7)) * 3


def test_torchdata_itself_where_it_is_installed() -> None:
    stateful: types.ModuleType = pytest.importorskip("torchdata.stateful_dataloader")
    assert SAMPLERS in sys.modules
    loader = stateful.StatefulDataLoader(list(range(7)), batch_size=2, shuffle=True)
    found = [batch.tolist() for batch in distributed.prepare_data_loader(loader)]
    plain: DataLoader[Any] = DataLoader(list(range(7)), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    assert found == [batch.tolist() for batch in distributed.prepare_data_loader(plain)]
