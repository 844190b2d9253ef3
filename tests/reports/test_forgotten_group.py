"""A process that was started together with others does not train by itself because process_group() was forgotten."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch.utils.data import DataLoader

from dengine import Engine, LaunchError, distributed

TORCHRUN = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
}
SRUN = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_JOB_NODELIST": "node1",
    "ENVIRONMENT": "BATCH",  # a step of a batch job inherits it
}
SUBMITIT = {"SUBMITIT_EXECUTOR": "local", "SUBMITIT_LOCAL_NTASKS": "2", "SUBMITIT_LOCAL_GLOBALID": "1"}
SBATCH = {
    "SLURM_JOB_ID": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "8",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "ENVIRONMENT": "BATCH",
}


def nothing(engine: Engine, batch: object) -> None:
    return None


DOORS = {
    "prepare_model()": lambda: distributed.prepare_model(torch.nn.Linear(1, 1)),
    "prepare_data_loader()": lambda: distributed.prepare_data_loader(DataLoader([1, 2])),  # type: ignore[arg-type]
    "run()": lambda: Engine(nothing).run([1]),
    "all_reduce()": lambda: distributed.all_reduce(1.0),
    "barrier()": lambda: distributed.barrier(),
    "rank_zero_first()": lambda: distributed.rank_zero_first().__enter__(),
}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Callable[[Mapping[str, str]], None]:
    def launch(env: Mapping[str, str]) -> None:
        for name in {*TORCHRUN, *SRUN, *SUBMITIT}:
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        # A group that an earlier test in this process has left would let what comes after it run alone.
        monkeypatch.setattr("dengine.launch.world._left", [])

    return launch


STARTED = {
    "torchrun": (TORCHRUN, "torchrun started this process as rank 1 of 2"),
    "by hand": ({name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE")}, "as rank 1 of 2"),
    "srun": (SRUN, "srun started this process as rank 1 of 2"),
    "torchrun in srun": ({**SRUN, **TORCHRUN}, "torchrun started"),
    "submitit": (SUBMITIT, "submitit"),
    "submitit in a batch job": ({**SBATCH, **SUBMITIT}, "submitit"),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("launcher", STARTED)
def test_without_a_process_group_what_would_train_alone_is_refused(
    launched: Callable[[Mapping[str, str]], None], launcher: str, door: str
) -> None:
    env, words = STARTED[launcher]
    launched(env)
    with pytest.raises(LaunchError) as caught:
        DOORS[door]()
    assert words in str(caught.value)
    assert door in str(caught.value)
    assert "process_group()" in str(caught.value)


@pytest.mark.parametrize("launcher", STARTED)
def test_who_means_to_work_alone_says_so(launched: Callable[[Mapping[str, str]], None], launcher: str) -> None:
    launched(STARTED[launcher][0])
    assert Engine(nothing, distributed=False).run([1, 2]).iteration == 2
    with distributed.process_group("none") as world:
        assert (world.rank, world.size) == (0, 1)
        for door in DOORS.values():
            door()


ALONE = {
    "plain python": {},
    "torchrun of one": {**TORCHRUN, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
    "the shell of sbatch": SBATCH,
    "the shell of sbatch, as newer SLURM marks it": {**SBATCH, "SLURM_STEP_ID": str(0xFFFFFFFB)},
    "the shell of salloc": {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "node1"},
    "an interactive step": {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_ID": str(0xFFFFFFFA)},
    "srun of one task in a larger job": {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "8"},
    "a stray number": {"WORLD_SIZE": "2"},
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("where", ALONE)
def test_a_process_that_is_alone_needs_no_group(
    launched: Callable[[Mapping[str, str]], None], where: str, door: str
) -> None:
    launched(ALONE[where])
    DOORS[door]()


@pytest.mark.parametrize("launcher", ["submitit", "submitit in a batch job", "mpirun"])
def test_a_launcher_whose_variables_are_not_read_is_told_of_by_process_group(
    launched: Callable[[Mapping[str, str]], None], launcher: str
) -> None:
    launched(STARTED[launcher][0])
    with pytest.raises(LaunchError, match="started several processes"), distributed.process_group():
        pass
