"""A small training job for tests of launches: it is preempted, resumes, fails on request, and says its bits at the end.

python small_job.py FOLDER [--iterations 40] [--pause 0.05] [--fail-at 10] [--exit-code 0] [--stall-timeout 60]
"""

import argparse
import hashlib
import os
import socket
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from dengine import Engine, Events, distributed
from dengine.handlers import Checkpoint, Preemption


class Augmented(Dataset[torch.Tensor]):
    """Each sample draws random numbers, so that a generator that is not restored shows in the bits."""

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index)) + torch.randn(4)


def say(*words: object) -> None:
    """One write for the whole line: the ranks share the file."""
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


def train(options: argparse.Namespace, world: distributed.World) -> int:
    torch.manual_seed(7)
    model = distributed.prepare_model(nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    loader = distributed.prepare_data_loader(DataLoader(Augmented(), shuffle=True), global_batch_size=4)

    def step(engine: Engine, batch: torch.Tensor) -> None:
        time.sleep(options.pause)
        if world.rank == world.size - 1 and engine.state.iteration == options.fail_at:
            raise ValueError(f"planted in iteration {options.fail_at}")
        optimizer.zero_grad()
        model(batch).square().mean().backward()
        optimizer.step()

    trainer = Engine(step)
    objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
    checkpoint = Checkpoint(objects, options.folder)
    trainer.on(Events.ITERATION_COMPLETED(every=5), checkpoint)
    Preemption(checkpoint).attach(trainer)
    folders = [str(options.folder)]
    if fast := os.environ.get("DENGINE_FAST_DIR"):
        folders.insert(0, fast)
        in_memory = Checkpoint(objects, fast, asynchronous=True, placement="node")
        trainer.on(Events.ITERATION_COMPLETED(every=2), in_memory)
    say(f"rank {world.rank} resumes from {Checkpoint.resume(folders, objects)}")
    if fast and os.path.isdir(fast):
        say(f"rank {world.rank} has {fast} with mode {os.stat(fast).st_mode & 0o777:o}")
    say(f"rank {world.rank} of {world.size} on {socket.gethostname()} begins after {trainer.state.iteration}")

    @trainer.on(Events.ITERATION_COMPLETED, rank_zero_only=True)
    def tell(engine: Engine) -> None:
        unfinished = options.folder / "iteration.new"
        unfinished.write_text(str(engine.state.iteration))
        unfinished.rename(options.folder / "iteration")

    state = trainer.run(loader, max_epochs=1000, max_iterations=options.iterations)
    if state.preempted:
        say(f"rank {world.rank} saved after {state.iteration}")
        return int(options.exit_code)
    say(f"rank {world.rank} has {digest(distributed.unwrap_model(model))} after {state.iteration}")
    return 0


def digest(model: nn.Module) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values())).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--pause", type=float, default=0.05)
    parser.add_argument("--fail-at", type=int)
    parser.add_argument("--exit-code", type=int, default=75, help="of a run that was told to leave")
    parser.add_argument("--stall-timeout", type=float, default=60)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with distributed.process_group(timeout=600, stall_timeout=options.stall_timeout) as world:
        code = train(options, world)
    sys.exit(code)


if __name__ == "__main__":
    main()
