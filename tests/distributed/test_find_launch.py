"""What each launcher's variables mean, as a table."""

import re

import pytest

from dengine.distributed.launch import Launch, find_launch, first_host
from dengine.errors import LaunchError

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_NODEID": "1",
    "SLURM_JOB_ID": "1234",
    "SLURM_JOB_NODELIST": "gpu[07-08]",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}


def test_nobody_launched_a_plain_process() -> None:
    assert find_launch({"HOME": "somewhere", "MASTER_ADDR": "left over"}) is None


def test_torchrun_says_everything() -> None:
    assert find_launch(TORCHRUN) == Launch("torchrun", 5, 8, 1, 4, 1, "10.0.0.1", 29500)


def test_torchrun_inside_a_slurm_task_wins() -> None:
    found = find_launch({**SLURM, **TORCHRUN})
    assert found is not None
    assert (found.launcher, found.rank) == ("torchrun", 5)


def test_ranks_started_by_hand_on_one_node_need_no_local_rank() -> None:
    given = {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert find_launch(given) == Launch("torchrun", 5, 8, 5, 8, 0, "10.0.0.1", 29500)


def test_srun_says_everything_and_all_its_tasks_derive_one_port() -> None:
    found = find_launch(SLURM)
    assert found is not None
    assert found == Launch("slurm", 3, 4, 1, 2, 1, "gpu07", found.master_port)
    other = find_launch({**SLURM, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"})
    assert other is not None
    assert other.master_port == found.master_port
    assert 10_000 <= found.master_port < 30_000


def test_two_steps_of_one_job_do_not_share_a_port() -> None:
    first, second = (find_launch({**SLURM, "SLURM_STEP_ID": step}) for step in "01")
    assert first is not None
    assert second is not None
    assert first.master_port != second.master_port


def test_a_step_smaller_than_its_job_has_the_size_of_the_step() -> None:
    found = find_launch({**SLURM, "SLURM_NTASKS": "16", "SLURM_STEP_NUM_TASKS": "4", "SLURM_JOB_NODELIST": "a,b,c,d"})
    assert found is not None
    assert found.size == 4


def test_tasks_may_differ_between_nodes() -> None:
    found = find_launch({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1,3", "SLURM_LOCALID": "2"})
    assert found is not None
    assert found.local_size == 3


def test_a_master_given_by_the_user_overrides_the_derived_one() -> None:
    found = find_launch({**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "12345"})
    assert found is not None
    assert (found.master_addr, found.master_port) == ("head", 12345)


@pytest.mark.parametrize(
    "env",
    [
        # The shell of an sbatch script: task 0 of nothing.
        {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "ENVIRONMENT": "BATCH"},
        # An interactive salloc shell.
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_JOB_NODELIST": "a"},
        # `srun --pty bash`, or one task with torchrun to come.
        {**SLURM, "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
    ],
)
def test_a_slurm_shell_is_one_process(env: dict[str, str]) -> None:
    assert find_launch(env) is None


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_set_variables_of_torchrun_name_the_missing_one(missing: str) -> None:
    env = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(LaunchError, match=f"^{missing} is not set"):
        find_launch(env)


@pytest.mark.parametrize("missing", ["SLURM_NTASKS", "SLURM_LOCALID", "SLURM_JOB_NODELIST", "SLURM_JOB_ID"])
def test_half_set_variables_of_slurm_name_the_missing_one(missing: str) -> None:
    env = {name: value for name, value in SLURM.items() if name != missing}
    with pytest.raises(LaunchError, match=f"^{missing} is not set"):
        find_launch(env)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"RANK": "8"}, "RANK=8 does not fit WORLD_SIZE=8: ranks go from 0 to 7"),
        ({"RANK": "one"}, "RANK='one' must be a whole number"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "RANK=0 does not fit WORLD_SIZE=0"),
        ({"RANK": ""}, "RANK is not set"),
    ],
)
def test_variables_that_make_no_sense_are_said_so(changed: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(message)):
        find_launch({**TORCHRUN, **changed})


@pytest.mark.parametrize(
    ("node_list", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-005,9],cpu1", "gpu003"),
        ("gpu[7,9-11]", "gpu7"),
        ("r[1-2]n[03-04]-ib", "r1n03-ib"),
        ("a-b-[10-20],c", "a-b-10"),
    ],
)
def test_the_first_host_of_a_node_list(node_list: str, host: str) -> None:
    assert first_host(node_list) == host
