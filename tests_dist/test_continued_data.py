"""Virtual epochs on several ranks: a run resumed anywhere is, bit for bit, the one that was never interrupted."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from job import digest
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dengine import Events, create_supervised_trainer, distributed
from dengine.data.sampler import ElasticSampler
from dengine.handlers import Checkpoint

LENGTH, GLOBAL_BATCH, PER_PASS, ITERATIONS, SEED = 25, 6, 5, 13, 3
PLACES = (2, 4, 5, 9)  # in the first epoch; at its end, the pass's last batch but one; at the pass's end; further on

Run = tuple[list[list[int]], str]  # the samples of each iteration, and the weights at the end


class Augmented(Dataset[Any]):
    def __len__(self) -> int:
        return LENGTH

    def __getitem__(self, index: int) -> Any:
        return (torch.full((4,), index / LENGTH) + 0.1 * torch.randn(4), torch.tensor([index]))


def train(rank: int, size: int, folder: str, workers: int, exact: bool, epoch_length: int, at: int | None) -> Run:
    """Train to the end, saving at each iteration; or, with `at`, from what was saved there on."""
    torch.manual_seed(7 + rank)  # which the resume replaces
    torch.manual_seed(7) if at is None else None
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Tanh(), nn.Linear(8, 1))
    model = distributed.prepare_model(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        lambda pred, targets: (pred - targets / LENGTH).square().mean(),
        output_transform=lambda inputs, targets, pred, loss: targets.flatten().tolist(),
    )
    data = DataLoader(Augmented(), shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    loader = distributed.prepare_data_loader(data, global_batch_size=GLOBAL_BATCH, seed=SEED, exact=exact)
    seen: list[list[int]] = []

    def note(engine: Any) -> None:
        seen.append(list(engine.state.output) if isinstance(engine.state.batch, (list, tuple)) else [])

    trainer.on(Events.ITERATION_COMPLETED, note, priority=1)
    objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
    if at is None:
        trainer.on(Events.ITERATION_COMPLETED, Checkpoint(objects, folder, n_saved=None))
    else:
        assert Checkpoint.resume(f"{folder}/{at}-{size}", objects), "nothing to resume"
        assert trainer.state.iteration == at, trainer.state.iteration
    trainer.run(loader, max_epochs=None, max_iterations=ITERATIONS, epoch_length=epoch_length, continue_data=True)
    return seen, digest(distributed.unwrap_model(model).state_dict())


def runs(
    rank: int, size: int, folder: str, cases: list[tuple[int, bool, int]], at: tuple[int | None, ...]
) -> list[Run]:
    with distributed.process_group():
        return [
            train(rank, size, f"{folder}/{number}", *case, place) for number, case in enumerate(cases) for place in at
        ]


def only(folder: Path, num_cases: int, sizes: tuple[int, ...]) -> None:
    """For each case, place and size a folder that has the checkpoint of that place alone, as a killed job left it."""
    for number in range(num_cases):
        for at in PLACES:
            for size in sizes:
                target = folder / str(number) / f"{at}-{size}"
                target.mkdir()
                shutil.copy(folder / str(number) / f"checkpoint_{at}.pt", target)


def global_batches() -> list[list[int]]:
    sampler = ElasticSampler(range(LENGTH), batch_size=GLOBAL_BATCH, num_replicas=1, rank=0, seed=SEED)
    batches = []
    for number in range(3):
        sampler.set_epoch(number)
        order = list(sampler)
        batches += [sorted(order[start : start + GLOBAL_BATCH]) for start in range(0, LENGTH, GLOBAL_BATCH)]
    return batches[:ITERATIONS]


def together(found: list[list[Run]], number: int) -> list[list[int]]:
    """The samples of each iteration of run `number`, of all ranks; padding repeats some."""
    return [
        sorted({each for rank in batch for each in rank})
        for batch in zip(*(of[number][0] for of in found), strict=True)
    ]


@pytest.mark.parametrize(("size", "others"), [(1, 2), (2, 3), (3, 1)])
def test_a_run_resumed_anywhere_ends_with_the_bits_of_one_never_interrupted(
    tmp_path: Path, size: int, others: int
) -> None:
    cases = [(0, False, 4), (2, False, 4), (0, True, 4), (0, True, 7)]  # workers, exact, epoch_length
    whole = run_ranks(runs, size, str(tmp_path), cases, (None,), init=False)
    only(tmp_path, len(cases), (size, others))
    again = run_ranks(runs, size, str(tmp_path), cases, PLACES, init=False)
    elsewhere = run_ranks(runs, others, str(tmp_path), cases, PLACES, init=False)
    wanted = global_batches()
    for number, case in enumerate(cases):
        assert [len(batch) for of in whole for batch in of[number][0]].count(0) == (size - 1) * 2 * case[1]
        found = together(whole, number)
        if case[1]:
            assert found == wanted
        else:
            assert all(set(few) <= set(many) for few, many in zip(wanted, found, strict=True))
        for index, at in enumerate(PLACES, len(PLACES) * number):
            for rank in range(size):
                seen, weights = whole[rank][number]
                assert again[rank][index] == (seen[at:], weights), (case, at, rank)
            if case[1]:
                assert together(elsewhere, index) == wanted[at:], (case, at)
