"""A job is preempted by a signal to its ranks, and goes on: bit for bit what it would have been."""

import os
import pickle
import random
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from blows import Blow
from job import DEADLINE_S, EPOCHS, ITERATIONS, PER_EPOCH, VARIANTS, End, Variant, job, whole
from ranks import run_command, run_ranks

NUM_SIGNALS = int(os.environ.get("DENGINE_CHECKPOINT_KILLS", "3"))
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def run(folder: Path, size: int, variant: Variant, blow: Blow | None) -> list[End]:
    return run_ranks(job, size, str(folder), variant, blow, init=False, deadline_s=DEADLINE_S)


def preempted_and_resumed(folder: Path, size: int, variant: Variant, blow: Blow) -> list[End]:
    """The ends of the first job, once it is shown that the second ends as one that was never interrupted."""
    first = run(folder, size, variant, blow)
    assert len({end.preempted for end in first}) == 1, blow
    if not first[0].preempted:  # too late: the run was over
        assert [end.state for end in first] == [end.state for end in whole(size)], blow
        return first
    second = run(folder, size, variant, None)
    for rank, (end, wanted) in enumerate(zip(second, whole(size), strict=True)):
        assert not end.preempted
        assert end.begun == second[0].begun
        assert {key: end.state[key] for key in wanted.state} == wanted.state, (rank, blow)
    return second


@pytest.mark.parametrize(
    ("blow", "variant", "size", "saved"),
    [
        (Blow("epoch_started", 1, 1, signal.SIGTERM), Variant(), 2, range(1, 4)),
        (Blow("begun", 4, 0, signal.SIGUSR2), Variant(True), 3, range(4, 8)),
        (Blow("stepped", PER_EPOCH, 1, signal.SIGUSR1), Variant(False, 2, True), 2, range(PER_EPOCH, PER_EPOCH + 4)),
        (Blow("backward", 8, None, signal.SIGTERM), Variant(True, 2), 2, range(8, 12)),  # to both
        (Blow("begun", 7, 1, signal.SIGTERM, "group"), Variant(False, 2), 2, range(7, 11)),  # the workers get it too
        (Blow("begun", 7, 0, signal.SIGUSR1, "group"), Variant(True, 2, True), 2, range(7, 11)),
        (Blow("stepped", ITERATIONS, 1, signal.SIGUSR1), Variant(), 2, (0, ITERATIONS)),  # preempted, or over
        (Blow("evaluating", 1, 1, signal.SIGUSR1), Variant(), 2, range(PER_EPOCH, PER_EPOCH + 3)),
        (Blow("epoch_completed", 2, 0, signal.SIGTERM), Variant(), 1, range(2 * PER_EPOCH, 2 * PER_EPOCH + 1)),
    ],
)
def test_a_preempted_job_ends_with_the_bits_of_one_that_never_was(
    tmp_path: Path, blow: Blow, variant: Variant, size: int, saved: Sequence[int]
) -> None:
    second = preempted_and_resumed(tmp_path, size, variant, blow)
    assert second[0].begun in saved


def test_signals_at_random_moments_too(tmp_path: Path) -> None:
    """In a save, in a step, in an evaluation; to one rank or to all."""
    for number in range(NUM_SIGNALS):
        draw = random.Random(number)
        size = draw.choice([1, 2, 3])
        moment = ("call", "begun", "saved", "backward", "evaluating")[number % 5]
        # The first calls come before the run, where signals are nobody's yet.
        count = {"call": draw.randrange(whole(size)[0].num_calls // 4, whole(size)[0].num_calls)}.get(
            moment, 1 + draw.randrange(EPOCHS if moment == "evaluating" else ITERATIONS)
        )
        rank = 0 if moment == "call" else draw.choice([None, *range(size)])
        folder = tmp_path / str(number)
        folder.mkdir()
        preempted_and_resumed(folder, size, draw.choice(VARIANTS), Blow(moment, count, rank, draw.choice(SIGNALS)))


SCRIPT = """
import os, pickle, sys
from blows import Blow
from job import Variant, job
folder, blow = sys.argv[1], Blow("begun", 4, 1, int(sys.argv[2]), "parent") if len(sys.argv) > 2 else None
rank = int(os.environ["RANK"])
end = job(rank, int(os.environ["WORLD_SIZE"]), folder, Variant(), blow)
with open(f"{folder}/end.{rank}", "wb") as file:
    pickle.dump(end, file)
"""


def test_a_signal_to_torchrun_reaches_the_ranks_and_the_job_goes_on(tmp_path: Path) -> None:
    """With the options of launch/quickstart.sh. A rank sends it to the launcher, so that it comes in a known step."""
    script, folder = tmp_path / "script.py", tmp_path / "saved"
    script.write_text(SCRIPT)
    folder.mkdir()

    def launched(*arguments: str) -> list[End]:
        run_command(
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *("--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2", "--shutdown-timeout=60"),
            *(str(script), str(folder), *arguments),
            deadline_s=140,
        )
        return [pickle.loads((folder / f"end.{rank}").read_bytes()) for rank in range(2)]

    assert [end.preempted for end in launched(str(int(signal.SIGUSR1)))] == [True, True]
    second = launched()
    assert all(4 <= end.begun < ITERATIONS for end in second)
    assert [end.state for end in second] == [end.state for end in whole(2)]
