"""Loaders side by side over ranks and workers, killed and resumed: the same steps, the same weights."""

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, Events, distributed
from dengine.data import zip_loaders
from dengine.handlers import Checkpoint

EPOCHS = 2
SIZES = {"short": (18, 6), "long": (48, 6)}  # samples and the global batch: 3 and 8 batches
MODES: dict[str, int] = {"cycle": 8, "min": 3, "max": 8}  # the steps of an epoch
CUTS = {"cycle": (2, 8, 13), "min": (2, 3, 5), "max": (4, 8, 10)}  # also inside an epoch's last batch


def part(folder: str, mode: Any, num_workers: int, max_iterations: int) -> tuple[list[Any], str]:
    """This rank's steps from the newest checkpoint on, and a digest of the weights at the end."""
    torch.manual_seed(0)
    model = distributed.prepare_model(nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    steps: list[Any] = []

    def step(engine: Engine, batches: dict[str, Any]) -> None:
        optimizer.zero_grad()
        inputs = torch.cat([batch[0] for batch in batches.values() if batch is not None])
        model(inputs[:, None] / 100).square().mean().backward()
        optimizer.step()
        steps.append({name: None if batch is None else batch[0].tolist() for name, batch in batches.items()})

    trainer = Engine(step)
    objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
    trainer.on(Events.ITERATION_COMPLETED(once=max_iterations), Checkpoint(objects, folder))
    Checkpoint.resume(folder, objects)
    loaders = {
        name: distributed.prepare_data_loader(
            DataLoader(TensorDataset(torch.arange(1.0, 1 + size)), shuffle=True, num_workers=num_workers),
            global_batch_size=global_batch,
        )
        for name, (size, global_batch) in SIZES.items()
    }
    trainer.run(zip_loaders(mode, **loaders), max_epochs=EPOCHS, max_iterations=max_iterations)
    weights = b"".join(value.numpy().tobytes() for value in distributed.unwrap_model(model).state_dict().values())
    return steps, hashlib.sha256(weights).hexdigest()


def cases(rank: int, size: int, folder: str) -> list[tuple[str, list[Any], str]]:
    """For each mode, what came of the whole run, then of each that was cut and gone on with."""
    found = []
    for mode, per_epoch in MODES.items():
        found.append((mode, *part(f"{folder}/{mode}", mode, 0, EPOCHS * per_epoch)))
        for cut, before, after in zip(CUTS[mode], (0, 2, 0), (2, 0, 0), strict=True):
            name = f"{folder}/{mode}_{cut}"
            steps, _ = part(name, mode, before, cut)
            rest, digest = part(name, mode, after, EPOCHS * per_epoch)
            found.append((mode, steps + rest, digest))
    return found


def order(name: str, number: int) -> list[list[float]]:
    """The global batches of a pass, sorted within."""
    size, global_batch = SIZES[name]
    sampler = distributed.ElasticSampler(range(size), batch_size=global_batch, num_replicas=1, rank=0)
    sampler.set_epoch(number)
    samples = [1.0 + index for index in sampler]
    return [sorted(samples[start : start + global_batch]) for start in range(0, size, global_batch)]


def oracle(mode: str) -> list[Any]:
    """The global steps, as one process alone has them: tests/data/test_zipped.py judges those."""
    steps: list[Any] = []
    for epoch in range(EPOCHS):
        passes = range(3 * epoch, 3 * epoch + 3) if mode == "cycle" else [epoch]
        short = [*sum((order("short", number) for number in passes), []), *[None] * 8]
        steps += [{"short": short[step], "long": order("long", epoch)[step]} for step in range(MODES[mode])]
    return steps


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_same_steps_for_any_ranks_and_workers_killed_and_resumed(tmp_path: Path, size: int) -> None:
    expected = {mode: oracle(mode) for mode in MODES}
    found = run_ranks(cases, size, str(tmp_path), deadline_s=240)
    digests: dict[str, set[str]] = {}
    for case in zip(*found, strict=True):
        mode = case[0][0]
        steps = [
            {
                name: None if of_ranks[0][name] is None else sorted(sum((each[name] for each in of_ranks), []))
                for name in of_ranks[0]
            }
            for of_ranks in zip(*(steps for _, steps, _ in case), strict=True)
        ]
        assert steps == expected[mode]
        digests.setdefault(mode, set()).update(digest for _, _, digest in case)
    assert all(len(each) == 1 for each in digests.values())
