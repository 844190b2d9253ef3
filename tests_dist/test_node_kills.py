"""Jobs with a copy in memory on each node are killed at random moments, some with the memory of a node, and go on.

Each ends with the bits of a job that never was killed, and never does more steps again than since the last finished
copy. `DENGINE_NODE_KILLS=200` raises the number of kills (default 10, over 1, 2 and 3 ranks, on one node and several).
"""

import os
import random
import shutil
from pathlib import Path

import pytest
from blows import Blow
from job import ITERATIONS, SAVE_EVERY, Variant, attempt, whole

NUM_KILLS = int(os.environ.get("DENGINE_NODE_KILLS", "10"))
JOBS = [(2, 2), (1, 1), (2, 1), (3, 1), (3, 3)]  # ranks, and nodes


def blow_of(draw: random.Random, size: int) -> Blow:
    """A SIGKILL at a random time or, for those that hit while a copy is written, at a random call that reaches it."""
    rank = draw.choice([None, *range(size)])
    if draw.random() < 0.5:
        return Blow("seconds", draw.uniform(0.3, 1.0) * whole(size)[0].seconds, rank)
    return Blow("call", 1 + draw.randrange(whole(size)[0].num_calls), rank)


def reached(folder: Path) -> tuple[int, int]:
    """The last iteration that rank 0 has completed, and the step of the last copy that was finished then."""
    lines = (folder / "reached").read_text().splitlines() if (folder / "reached").exists() else []
    at, finished = lines[-1].split() if lines else (0, 0)
    return int(at), int(finished)


def killed_and_resumed(folder: Path, size: int, num_nodes: int, draw: random.Random) -> tuple[int, list[str]]:
    """How many kills hit, and what is wrong with the end."""
    num_hits, problems, ends = 0, [], None
    wanted_begin, most_again = 0, 0
    while ends is None:
        variant = Variant(draw.random() < 0.8, num_nodes=num_nodes)
        blow = blow_of(draw, size) if num_hits == 0 or (num_hits < 3 and draw.random() < 0.3) else None
        ends = attempt(folder, size, variant, blow, draw.choice([0.0, 0.2]))
        if ends is not None:
            break
        num_hits += 1
        at, finished = reached(folder)
        wanted_begin, most_again = max(wanted_begin, finished), at
        if num_nodes > 1 and draw.random() < 0.6:  # a node is gone with its memory
            shutil.rmtree(folder / f"fast{draw.randrange(num_nodes)}", ignore_errors=True)
    begun = ends[0].begun
    if begun < wanted_begin:
        problems.append(f"it went on from {begun}, although the copy of {wanted_begin} was finished")
    if most_again - begun > 2 * SAVE_EVERY:
        problems.append(f"it went on from {begun}, although it had reached {most_again}")
    for rank, (end, wanted) in enumerate(zip(ends, whole(size), strict=True)):
        problems += [f"rank {rank}: {key}" for key in wanted.state if end.state.get(key) != wanted.state[key]]
        problems += [f"rank {rank} began at {end.begun}, not at {begun}"] * (end.begun != begun)
        # A manifest is missing if the first save of all was killed before it.
        allowed = ("is still being written", "are on one file system", "manifest.json is missing")
        problems += [f"rank {rank} warned: {text}" for text in end.warned if not any(each in text for each in allowed)]
    return num_hits, problems + (left_over(folder, num_nodes) if begun < ITERATIONS - SAVE_EVERY else [])


def left_over(folder: Path, num_nodes: int) -> list[str]:
    wanted = {"manifest.json", ".owner", "checkpoint_12.pt", "checkpoint_14.pt"}
    there = [{path.name for path in (folder / f"fast{node}").iterdir()} for node in range(num_nodes)]
    return [f"node {node} has {sorted(names)}" for node, names in enumerate(there) if names != wanted]


@pytest.mark.parametrize(("size", "num_nodes"), JOBS, ids=lambda number: str(number))
def test_a_killed_job_goes_on_from_the_copies_in_memory(tmp_path: Path, size: int, num_nodes: int) -> None:
    wanted, draw = -(-NUM_KILLS // len(JOBS)), random.Random(10 * size + num_nodes)
    num_hits, number, problems = 0, 0, []
    while num_hits < wanted and number < 3 * wanted + 5:
        folder = tmp_path / str(number)
        folder.mkdir()
        hits, found = killed_and_resumed(folder, size, num_nodes, draw)
        problems += [f"job {number}: {each}" for each in found]
        num_hits, number = num_hits + hits, number + 1
    assert problems == []
    assert num_hits >= wanted
