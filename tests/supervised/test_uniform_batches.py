"""Which data are believed to have as many samples in each batch as they say, so that ranks need not tell each other."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, Subset, TensorDataset

from dengine.supervised.uniform_batches import _leading, num_uniform

SET = TensorDataset(torch.arange(10.0), torch.arange(10))


class Endless(Sampler[int]):
    """Without a length, as torch's own base class is."""

    def __iter__(self) -> Iterator[int]:
        while True:
            yield 0


class Filtering(DataLoader[Any]):
    def __iter__(self) -> Any:
        return (batch for batch in super().__iter__() if len(batch[0]) > 1)


class Unreadable(Dataset[Any]):
    """Leaves out what it cannot read."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> Any:
        return SET[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        return [SET[index] for index in indices if index % 3]


@pytest.mark.parametrize(
    ("data", "known"),
    [
        (DataLoader(SET, batch_size=4), (4, 2)),
        (DataLoader(Subset(SET, range(9)), batch_size=4, shuffle=True), (4, 2)),
        (DataLoader(SET, batch_size=4, sampler=Endless()), (0, 0)),
        (Filtering(SET, batch_size=4), (0, 0)),
        (DataLoader(Unreadable(), batch_size=4), (0, 0)),
        (DataLoader(Subset(Unreadable(), range(9)), batch_size=4), (0, 0)),
        (DataLoader(SET, batch_size=4, collate_fn=lambda samples: samples[0]), (0, 0)),
        ([(torch.ones(2), torch.ones(2))] * 3 + [(torch.ones(1), torch.ones(1))], (2, 3)),
        (iter([]), (0, 0)),
    ],
)
def test_what_is_known_of_the_first_batches(data: Any, known: tuple[int, int]) -> None:
    assert _leading(data) == known
    assert num_uniform(data, 4) == (known[1] if known[0] == 4 else 0)
