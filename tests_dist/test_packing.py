"""Packed documents over ranks and workers, killed and resumed: one stream of tokens, the same weights."""

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dengine import Engine, Events, distributed
from dengine.data import pack_sequences
from dengine.handlers import Checkpoint

LENGTH, GLOBAL_BATCH, EPOCHS = 4, 6, 2
DOCUMENTS = [[(7 * number + place) % 90 + 1 for place in range(number % 11)] for number in range(35)]
# In the first epoch, inside its last batch (whose step is done, and whose end is not), and in the second epoch.
CUTS = (2, 9, 12)


class Stateful(IterableDataset[Any]):
    """Rotates its documents by the epoch."""

    def __init__(self) -> None:
        self.epoch, self.position, self.begin_at = 0, 0, 0

    def __iter__(self) -> Iterator[Any]:
        self.position, self.begin_at = self.begin_at, 0
        while self.position < len(DOCUMENTS):
            self.position += 1
            yield DOCUMENTS[(self.position - 1 + self.epoch) % len(DOCUMENTS)]

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.begin_at = state["position"]


def oracle() -> list[list[list[int]]]:
    """The global batches, sorted within: one list of tokens an epoch, cut."""
    batches = []
    for epoch in range(EPOCHS):
        tokens = [token for each in DOCUMENTS[epoch:] + DOCUMENTS[:epoch] for token in (*each, 0)]
        pieces = [tokens[start : start + LENGTH] for start in range(0, len(tokens) - LENGTH + 1, LENGTH)]
        batches += [sorted(pieces[start : start + GLOBAL_BATCH]) for start in range(0, len(pieces), GLOBAL_BATCH)]
    return batches


def part(folder: str, num_workers: int, max_iterations: int) -> tuple[list[Any], str]:
    """This rank's batches from the newest checkpoint on, and a digest of the weights at the end."""
    warnings.filterwarnings("error", "To go on")  # nothing is drawn to be dropped
    torch.manual_seed(0)
    model = distributed.prepare_model(nn.Sequential(nn.Embedding(91, 4), nn.Flatten(), nn.Linear(4 * LENGTH, 1)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches: list[Any] = []

    def step(engine: Engine, batch: torch.Tensor) -> None:
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()
        batches.append(batch.tolist())

    trainer = Engine(step)
    objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
    trainer.on(Events.ITERATION_COMPLETED(once=max_iterations), Checkpoint(objects, folder))
    Checkpoint.resume(folder, objects)
    packed = pack_sequences(Stateful(), LENGTH, end_token=0)
    loader = DataLoader(packed, num_workers=num_workers)
    loader = distributed.prepare_data_loader(loader, global_batch_size=GLOBAL_BATCH)
    trainer.run(loader, max_epochs=EPOCHS, max_iterations=max_iterations)
    weights = b"".join(value.numpy().tobytes() for value in distributed.unwrap_model(model).state_dict().values())
    return batches, hashlib.sha256(weights).hexdigest()


def cases(rank: int, size: int, folder: str) -> list[tuple[list[Any], str]]:
    """What came of the whole run, then of each that was cut and gone on with, by another number of workers."""
    end = len(oracle())
    found = [part(f"{folder}/whole", 0, end)]
    for cut in CUTS:
        for before, after in ((0, 2), (2, 2), (2, 0)):
            name = f"{folder}/{cut}_{before}_{after}"
            batches, _ = part(name, before, cut)
            rest, digest = part(name, after, end)
            found.append((batches + rest, digest))
    return found


@pytest.mark.parametrize("size", [1, 2, 3])
def test_one_stream_of_tokens_for_any_ranks_and_workers_killed_and_resumed(tmp_path: Path, size: int) -> None:
    expected = oracle()
    per_epoch = len(expected) // EPOCHS
    assert CUTS[0] < per_epoch == CUTS[1] < CUTS[2] < len(expected)
    found = run_ranks(cases, size, str(tmp_path), deadline_s=240)
    for case in zip(*found, strict=True):
        steps = [sorted(sum(step, [])) for step in zip(*(batches for batches, _ in case), strict=True)]
        for last in (per_epoch - 1, len(expected) - 1):  # in which a rank without a turn repeats another's
            assert {str(each) for each in steps[last]} == {str(each) for each in expected[last]}
        assert steps[: per_epoch - 1] == expected[: per_epoch - 1]
        assert steps[per_epoch:-1] == expected[per_epoch:-1]
    for of_rank in found:
        assert {digest for _, digest in of_rank} == {found[0][0][1]}


def batches(rank: int, size: int, folder: str, num_workers: int, max_iterations: int) -> list[Any]:
    return part(folder, num_workers, max_iterations)[0]


def test_another_number_of_ranks_goes_on_in_the_same_stream(tmp_path: Path) -> None:
    found: list[Any] = []
    for size, num_workers, end in ((2, 1, 4), (3, 2, 12), (1, 0, 18)):
        of_ranks = run_ranks(batches, size, str(tmp_path), num_workers, end, deadline_s=120)
        found += [sorted(sum(step, [])) for step in zip(*of_ranks, strict=True)]
    expected = oracle()
    assert len(found) == len(expected)
    for step, (mine, other) in enumerate(zip(found, expected, strict=True)):
        assert mine == other or (step == 8 and {str(each) for each in mine} == {str(each) for each in other})
