"""What a copy in memory every 20 steps costs the language model of the examples, as a share of its time.

    python benchmarks/node_copies.py [--rounds R] [--folder /dev/shm/benchmark]

Blocks of 20 steps with and without `Checkpoint(..., placement="node", asynchronous=True)` alternate in one process, so
that what else the machine does hits both alike. A block with it has the whole of the save: the copy that holds the
loop, and what the thread that writes takes from the steps after it.
"""

import argparse
import shutil
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from language_model import GPT, loss_and_count

from dengine import Engine, Events
from dengine.handlers import Checkpoint

EVERY = 20


def run(folder: Path, rounds: int) -> None:
    torch.manual_seed(0)
    model = GPT(128, width=128, num_heads=4, num_layers=2, dropout=0.1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    tokens = torch.randint(1, 256, (32, 129))

    def step(engine: Engine, batch: int) -> None:
        loss, count = loss_and_count(model, tokens)
        optimizer.zero_grad()
        torch.autograd.backward(loss / count)
        optimizer.step()

    trainer = Engine(step)
    objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
    checkpoint = Checkpoint(objects, folder, asynchronous=True, placement="node")
    held: list[float] = []
    blocks: dict[bool, list[float]] = {True: [], False: []}
    cpu: dict[bool, list[float]] = {True: [], False: []}
    started = [time.perf_counter(), time.process_time()]

    @trainer.on(Events.ITERATION_COMPLETED(every=EVERY), priority=-1)
    def note(engine: Engine) -> None:
        saves = engine.state.iteration // EVERY % 2 == 1  # the block that begins now
        checkpoint.wait()  # what the block before has not finished is its own
        now, cpu_now = time.perf_counter(), time.process_time()
        blocks[not saves].append(now - started[0])
        cpu[not saves].append(cpu_now - started[1])
        started[:] = now, cpu_now
        if saves:
            checkpoint(engine)
            held.append(time.perf_counter() - now)

    trainer.run(range(2 * EVERY * (rounds + 1)), max_epochs=1)
    with_it, without = blocks[True][1:], blocks[False][1:]  # the first of each warms up
    shares = [one / other - 1 for one, other in zip(with_it, without, strict=False)]
    cpu_shares = [one / other - 1 for one, other in zip(cpu[True][1:], cpu[False][1:], strict=False)]
    num_bytes = sum(path.stat().st_size for path in folder.glob("*.pt"))
    print(f"{num_bytes / 1e6:.1f} MB, {rounds} rounds of {EVERY} steps each, {torch.get_num_threads()} thread(s)")
    print(f"a block without: {1e3 * statistics.median(without):.1f} ms (median)")
    held_share = statistics.median(held[1:]) / statistics.median(without)
    print(f"the loop is held: {1e3 * statistics.median(held[1:]):.2f} ms, {100 * held_share:.2f} % of a block")
    print(f"a block with it takes {100 * statistics.median(shares):+.2f} % (median of pairs)")
    print(f"and {100 * statistics.median(cpu_shares):+.2f} % of processor time, which other processes hardly change")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm/dengine-benchmark"))
    options = parser.parse_args()
    try:
        run(options.folder, options.rounds)
    finally:
        shutil.rmtree(options.folder, ignore_errors=True)
