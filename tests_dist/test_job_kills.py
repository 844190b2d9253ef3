"""Whole jobs are killed and started again, and end with the bits of one that never was.

A rank, or all of them, gets SIGKILL at an enumerated place (each call that reaches the disk, each part of each
iteration, the ends of epochs, while states are loaded) or after a random time; some are killed again after the restart.
Nothing but the number of ranks may make a difference to the end: not the workers of the loader, not the way of saving.

`DENGINE_CHECKPOINT_KILLS=200` raises the number of kills of jobs (default 9, over 1, 2 and 3 ranks).
"""

import json
import os
import random
from pathlib import Path

import pytest
from blows import Blow
from job import EPOCHS, ITERATIONS, PER_EPOCH, VARIANTS, attempt, whole

NUM_KILLS = int(os.environ.get("DENGINE_CHECKPOINT_KILLS", "9"))
SIZES = (2, 3, 1)
MOMENTS = (
    "call",
    "begun",
    "seconds",
    "saved",
    "call",
    "stepped",
    "seconds",
    "epoch",
    "call",
    "backward",
    "load",
    "worker",
)


def blow_of(number: int, draw: random.Random, size: int) -> Blow:
    """The `number`th: kinds by turns, the place in each drawn."""
    calls, seconds = whole(size)[0].num_calls, whole(size)[0].seconds
    moment = MOMENTS[number % len(MOMENTS)]
    rank = draw.choice([None, *range(size)])
    if moment == "call":  # rank 0 has the most of them
        return Blow(moment, 1 + draw.randrange(calls), draw.choice([0, None]))
    if moment == "seconds":
        return Blow(moment, draw.uniform(0.0, 0.9 * seconds), rank)
    if moment == "worker":
        return Blow(moment, 100 * draw.randrange(EPOCHS) + draw.randrange(50), None)
    if moment == "load":
        return Blow(moment, 1, rank)
    if moment == "epoch":
        return Blow(draw.choice(["epoch_started", "evaluating", "epoch_completed"]), 1 + draw.randrange(EPOCHS), rank)
    around_an_end = PER_EPOCH * (1 + draw.randrange(EPOCHS)) + draw.choice([-1, 0, 1])
    return Blow(moment, min(draw.choice([around_an_end, 1 + draw.randrange(ITERATIONS)]), ITERATIONS), rank)


def killed_and_resumed(folder: Path, number: int, size: int) -> tuple[int, list[str]]:
    """How often kill `number` and those after it hit, and what is wrong with the end."""
    draw = random.Random(1000 * size + number)
    variant = draw.choice(VARIANTS)
    blow = blow_of(number, draw, size)
    if blow.moment == "worker" and variant.workers == 0:
        variant = VARIANTS[1]
    if blow.moment == "load":  # there must be something to load
        attempt(folder, size, variant, Blow("saved", 1 + draw.randrange(2, ITERATIONS)))
    num_hits, problems, ends = 0, [], None
    while ends is None and num_hits < 4:
        ends = attempt(folder, size, variant, blow, draw.choice([0.0, 0.0, 0.2]))
        if ends is None:
            num_hits += 1
            blow = blow_of(draw.randrange(100), draw, size) if draw.random() < 0.25 and num_hits < 3 else None
            variant = draw.choice(VARIANTS)
    if ends is None:
        return num_hits, ["it never ended"]
    for rank, (end, wanted) in enumerate(zip(ends, whole(size), strict=True)):
        problems += [f"rank {rank}: {key}" for key in wanted.state if end.state.get(key) != wanted.state[key]]
        problems += [f"rank {rank} warned: {text}" for text in end.warned if "is still being written" not in text]
        problems += [f"rank {rank} began at {end.begun}, not at {ends[0].begun}"] * (end.begun != ends[0].begun)
    return num_hits, problems + left_over(folder, has_saved=ends[0].begun < ITERATIONS)


def left_over(folder: Path, *, has_saved: bool) -> list[str]:
    """What should not be in the folder, or is missing. A job killed between its last save and the end of what that one
    had to remove has nothing to save when it is started again (not `has_saved`), and so removes nothing.
    """
    names = {path.name for path in folder.iterdir()}
    listed = set(json.loads((folder / "manifest.json").read_text())["files"])
    expected = {f"checkpoint_{ITERATIONS - 1}.pt", f"checkpoint_{ITERATIONS}.pt"}
    best = {name for name in names if name.startswith("best_")}
    is_right = names >= {"manifest.json", *listed} and expected <= names and len(best) >= 1 and len(listed) == 3
    if has_saved:
        is_right = is_right and names == {"manifest.json", *listed}
    return [] if is_right else [f"there is {sorted(names)}, listed {sorted(listed)}"]


@pytest.mark.parametrize("size", SIZES)
def test_a_job_killed_anywhere_ends_with_the_bits_of_one_never_interrupted(tmp_path: Path, size: int) -> None:
    wanted = -(-NUM_KILLS * (2 if size == 2 else 1) // 4)  # half of them with two ranks
    num_hits, number, problems = 0, 0, []
    while num_hits < wanted and number < 3 * wanted + 10:
        folder = tmp_path / str(number)
        folder.mkdir()
        hits, found = killed_and_resumed(folder, number, size)
        problems += [f"kill {number}: {each}" for each in found]
        num_hits, number = num_hits + hits, number + 1
    assert problems == []
    assert num_hits >= wanted


def test_a_job_that_is_started_again_when_it_is_over_stays_as_it_is(tmp_path: Path) -> None:
    first, second = (attempt(tmp_path, 2, VARIANTS[0], None) for _ in range(2))
    assert first is not None
    assert second is not None
    assert [end.begun for end in second] == [ITERATIONS] * 2
    assert [end.state for end in second] == [end.state for end in first] == [end.state for end in whole(2)]
