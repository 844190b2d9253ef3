"""Data that keep their own position, on several ranks: each rank goes on from its own, at once."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dengine import Engine, Events, distributed
from dengine.handlers import Checkpoint

NUM_SAMPLES, GLOBAL_BATCH, EPOCHS = 25, 6, 2
PER_EPOCH = -(-NUM_SAMPLES // GLOBAL_BATCH)
KILLS = (2, PER_EPOCH, PER_EPOCH + 1)  # the middle, an epoch's last batch, the second epoch
drawn: list[int] = []


class Stream(IterableDataset[int]):
    def __init__(self) -> None:
        self.epoch = self.position = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch, self.position = epoch, 0

    def __iter__(self) -> Iterator[int]:
        order = torch.randperm(NUM_SAMPLES, generator=torch.Generator().manual_seed(self.epoch)).tolist()
        while self.position < NUM_SAMPLES:
            self.position += 1
            drawn.append(order[self.position - 1])
            yield order[self.position - 1] + 100 * int(torch.rand(()) * 10)  # which the resumed run draws, too
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.position = state["epoch"], state["position"]


def own() -> Any:
    loader = DataLoader(Stream(), batch_size=1)
    return distributed.prepare_data_loader(loader, global_batch_size=GLOBAL_BATCH)


def rows(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        yield from ({"x": 10 * shard + row} for row in range(5))


def hugging_face(num_workers: int = 0, *, is_split: bool = False) -> Any:
    datasets = pytest.importorskip("datasets")
    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"shards": list(range(6))})
    if is_split:
        here = distributed.world()
        stream = pytest.importorskip("datasets.distributed").split_dataset_by_node(stream, here.rank, here.size)
    return distributed.prepare_data_loader(DataLoader(stream, batch_size=2, num_workers=num_workers))


CASES: dict[str, Callable[[], Any]] = {
    "own": own,
    "Hugging Face split": lambda: hugging_face(is_split=True),
    "Hugging Face with workers": lambda: hugging_face(2),
}


def train(make: Callable[[], Any], folder: Path, until: int | None = None, **options: Any) -> tuple[list[Any], str]:
    torch.manual_seed(1)
    inner = nn.Linear(1, 1)
    model = distributed.prepare_model(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found: list[Any] = []

    def step(engine: Engine, batch: Any) -> None:
        values = batch["x"] if isinstance(batch, dict) else batch
        found.append(values.tolist())
        loss = (model(values.reshape(-1, 1) / 100) + torch.rand(()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    trainer = Engine(step)
    objects = {"trainer": trainer, "model": model, "optimizer": optimizer}
    if until is not None:
        trainer.on(Events.ITERATION_COMPLETED(once=until), Checkpoint(objects, folder))
    Checkpoint.resume(folder, objects)
    trainer.run(make(), max_epochs=EPOCHS, max_iterations=until, **options)
    return found, hashlib.sha256(inner.weight.detach().numpy().tobytes()).hexdigest()


def cases(rank: int, size: int, folder: str) -> dict[str, Any]:
    warnings.simplefilter("error", RuntimeWarning)  # nothing is drawn and dropped
    found: dict[str, Any] = {}
    for name, make in CASES.items():
        whole = train(make, Path(folder) / f"{name} {size}")
        for kill in KILLS:
            path = Path(folder) / f"{name} {kill} {size}"
            first, _ = train(make, path, kill)
            drawn.clear()
            rest, weights = train(make, path)
            found[f"{name} {kill}"] = (first + rest, weights) == whole, len(drawn), len(sum(rest, [])) * size
        found[name] = whole[0]
    return found


def resumed(rank: int, size: int, folder: str) -> list[Any]:
    warnings.simplefilter("ignore", UserWarning)
    return train(own, Path(folder) / "own 2 2")[0]


def test_each_rank_goes_on_from_its_own_position_and_a_stream_that_all_read_on_any_number_of_ranks(
    tmp_path: Path,
) -> None:
    of_ranks = run_ranks(cases, 2, str(tmp_path))
    for rank, found in enumerate(of_ranks):
        for name in CASES:
            for kill in KILLS:
                is_same, num_drawn, num_left = found[f"{name} {kill}"]
                assert is_same, (rank, name, kill)
                assert num_drawn <= num_left + GLOBAL_BATCH, (rank, name, kill)
    three = run_ranks(resumed, 3, str(tmp_path))
    wanted = [sum((found["own"][step] for found in of_ranks), []) for step in range(2, 2 * PER_EPOCH)]
    got = [sum((found[step] for found in three), []) for step in range(2 * PER_EPOCH - 2)]
    for one, other in zip(got, wanted, strict=True):
        assert one[: NUM_SAMPLES % GLOBAL_BATCH] == other[: NUM_SAMPLES % GLOBAL_BATCH]
        assert len(other) < GLOBAL_BATCH or one == other
