"""What each launcher's variables mean, as a table. SLURM's are copied from tasks of a real one (22.05)."""

import re

import pytest

from dengine.errors import LaunchError
from dengine.launch.env import Launch, choose_launch, find_launch
from dengine.launch.slurm import host_names, tasks_per_node

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "none",
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
PORT = 10_000 + 1234 * 7  # of SLURM's step 0


def job(nodes: str, num_tasks: int, tasks_per_node: str) -> dict[str, str]:
    """What a whole allocation sets, whoever looks."""
    return {
        "SLURM_JOB_ID": "1234",
        "SLURM_JOB_NODELIST": nodes,
        "SLURM_NTASKS": str(num_tasks),
        "SLURM_TASKS_PER_NODE": tasks_per_node,
    }


def step(nodes: str, num_tasks: int, tasks_per_node: str, rank: int, node: int, local: int) -> dict[str, str]:
    """What a task sees of a step of its own, beside its allocation."""
    return {
        "SLURM_NTASKS": str(num_tasks),
        "SLURM_TASKS_PER_NODE": tasks_per_node,
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NODELIST": nodes,
        "SLURM_STEP_NUM_TASKS": str(num_tasks),
        "SLURM_STEP_TASKS_PER_NODE": tasks_per_node,
        "SLURM_PROCID": str(rank),
        "SLURM_NODEID": str(node),
        "SLURM_LOCALID": str(local),
    }


TWO_BY_TWO = job("node[1-2]", 4, "2(x2)")
BATCH = {"ENVIRONMENT": "BATCH", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}
ONE_TASK = {**TWO_BY_TWO, **step("node1", 1, "1", 0, 0, 0)}
PER_TASK = {**job("node1", 2, "2"), **step("node1", 2, "2", 1, 0, 1)}

# what it is: (its variables, the launch, what the reason says)
ENVIRONMENTS: dict[str, tuple[dict[str, str], Launch | None, str]] = {
    "nobody": ({"HOME": "somewhere", "MASTER_ADDR": "left over"}, None, "neither torchrun nor srun"),
    "torchrun": (
        TORCHRUN,
        Launch("torchrun", 5, 8, 1, 4, 1, "10.0.0.1", 29500),
        "torchrun set RANK and WORLD_SIZE",
    ),
    "by hand on one node": (
        {name: TORCHRUN[name] for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")},
        Launch("torchrun", 5, 8, 5, 8, 0, "10.0.0.1", 29500),
        "RANK and WORLD_SIZE are set",
    ),
    "torchrun in a task of a larger step": (
        {**SLURM, **TORCHRUN},
        Launch("torchrun", 5, 8, 1, 4, 1, "10.0.0.1", 29500),
        "they win over SLURM's",
    ),
    "torchrun in a one-task job": (
        {**ONE_TASK, "SLURMD_TRES_BIND": "gpu:per_task:4", **TORCHRUN},
        Launch("torchrun", 5, 8, 1, 4, 1, "10.0.0.1", 29500),
        "they win over SLURM's",
    ),
    "srun": (SLURM, Launch("slurm", 3, 4, 1, 2, 1, "gpu07", PORT), "srun started 4 tasks (step 1234.0)"),
    "srun in a batch script": (
        {**TWO_BY_TWO, **BATCH, **step("node[1-2]", 4, "2(x2)", 2, 1, 0)},
        Launch("slurm", 2, 4, 0, 2, 1, "node1", PORT),
        "srun started 4 tasks",
    ),
    "a step on the second node of its job": (
        {**TWO_BY_TWO, **step("node2", 2, "2", 1, 0, 1), "SLURM_STEP_ID": "3"},
        Launch("slurm", 1, 2, 1, 2, 0, "node2", PORT + 3),
        "srun started 2 tasks (step 1234.3)",
    ),
    "tasks that differ between nodes": (
        {**job("gpu[1,3-4]", 11, "4(x2),3"), **step("gpu[1,3-4]", 11, "4(x2),3", 10, 2, 2)},
        Launch("slurm", 10, 11, 2, 3, 2, "gpu1", PORT),
        "srun started 11 tasks",
    ),
    "a heterogeneous job": (
        {**job("node[1-2]", 3, "2,1"), "SLURM_HET_SIZE": "2", **step("node[1-2]", 3, "2,1", 2, 1, 0)},
        Launch("slurm", 2, 3, 0, 1, 1, "node1", PORT),
        "srun started 3 tasks",
    ),
    "cyclic distribution": (
        {**TWO_BY_TWO, **step("node[1-2]", 4, "2(x2)", 1, 1, 0), "SLURM_DISTRIBUTION": "cyclic"},
        Launch("slurm", 1, 4, 0, 2, 1, "node1", PORT),
        "srun started 4 tasks",
    ),
    "a master of the user's own": (
        {**SLURM, "MASTER_ADDR": "head", "MASTER_PORT": "12345"},
        Launch("slurm", 3, 4, 1, 2, 1, "head", 12345),
        "srun started 4 tasks",
    ),
    "the shell of a batch script": ({**TWO_BY_TWO, **BATCH}, None, "the shell of an sbatch script is one process"),
    "a batch script that is a step": (
        {**TWO_BY_TWO, **BATCH, "SLURM_STEP_ID": "4294967291"},
        None,
        "the shell of an sbatch script is one process",
    ),
    "salloc on the login host": (TWO_BY_TWO, None, "the shell of salloc is one process"),
    "salloc on the first node": (
        # What is the allocation's is kept: only the step knows that it is one task.
        {**step("node1", 1, "1", 0, 0, 0), **TWO_BY_TWO, "SLURM_STEP_ID": "4294967290", "SLURM_PTY_PORT": "46829"},
        None,
        "the shell of salloc is one process",
    ),
    "srun in that shell": (
        {**TWO_BY_TWO, "SLURM_PTY_PORT": "46829", **step("node[1-2]", 2, "1(x2)", 0, 0, 0)},
        Launch("slurm", 0, 2, 0, 1, 0, "node1", PORT),
        "srun started 2 tasks",
    ),
    "srun of one task": (ONE_TASK, None, "srun started one task"),
    "--ntasks-per-gpu": (
        {**PER_TASK, "SLURMD_TRES_BIND": "gpu:single:1", "CUDA_VISIBLE_DEVICES": "1", "SLURM_NTASKS_PER_TRES": "1"},
        Launch("slurm", 1, 2, 1, 2, 0, "node1", PORT, has_own_gpus=True),
        "srun started 2 tasks",
    ),
    "--gpus-per-task": (
        {**PER_TASK, "SLURMD_TRES_BIND": "gpu:per_task:2", "CUDA_VISIBLE_DEVICES": "2,3", "SLURM_GPUS_ON_NODE": "4"},
        Launch("slurm", 1, 2, 1, 2, 0, "node1", PORT, has_own_gpus=True),
        "srun started 2 tasks",
    ),
    "--gpus-per-task of an older SLURM": (
        {**PER_TASK, "SLURM_GPUS_PER_TASK": "2", "CUDA_VISIBLE_DEVICES": "2,3"},
        Launch("slurm", 1, 2, 1, 2, 0, "node1", PORT, has_own_gpus=True),
        "srun started 2 tasks",
    ),
    "--gpus-per-task, bound to none": (
        {**PER_TASK, "SLURMD_TRES_BIND": "gpu:none", "SLURM_GPUS_PER_TASK": "1"},
        Launch("slurm", 1, 2, 1, 2, 0, "node1", PORT),
        "srun started 2 tasks",
    ),
    "--gpus-per-node": (
        {**PER_TASK, "CUDA_VISIBLE_DEVICES": "0,1", "SLURM_GPUS_ON_NODE": "2"},
        Launch("slurm", 1, 2, 1, 2, 0, "node1", PORT),
        "srun started 2 tasks",
    ),
}


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_launch_that_an_environment_describes_and_why(name: str) -> None:
    env, launch, reason = ENVIRONMENTS[name]
    found = choose_launch(env)
    assert found.launch == launch
    assert reason in found.reason
    assert find_launch(env) == launch


def test_a_gpu_of_ones_own_is_the_first_that_is_shown_and_else_that_of_the_local_rank() -> None:
    index = {name: launch.device_index for name, (_, launch, _) in ENVIRONMENTS.items() if launch is not None}
    assert index["--ntasks-per-gpu"] == index["--gpus-per-task"] == 0
    assert index["--gpus-per-node"] == index["--gpus-per-task, bound to none"] == 1
    assert index["torchrun in a one-task job"] == 1


@pytest.mark.parametrize("missing", ["RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"])
def test_half_set_variables_of_torchrun_name_the_missing_one(missing: str) -> None:
    env = {name: value for name, value in TORCHRUN.items() if name != missing}
    with pytest.raises(LaunchError, match=f"^{missing} is not set"):
        find_launch(env)


def test_a_local_rank_alone_is_half_set_too() -> None:
    with pytest.raises(LaunchError, match="^RANK is not set, although LOCAL_RANK=1 is"):
        find_launch({"LOCAL_RANK": "1"})


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
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0 is no port: they go from 1 to 65535"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536 is no port"),
    ],
)
def test_variables_that_make_no_sense_are_said_so(changed: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(message)):
        find_launch({**TORCHRUN, **changed})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"SLURM_JOB_NODELIST": "gpu[07-"}, "'gpu[07-' is no list of SLURM nodes"),
        ({"SLURM_JOB_NODELIST": "gpu[a-b]"}, "'gpu[a-b]' is no list of SLURM nodes"),
        ({"SLURM_STEP_TASKS_PER_NODE": "4(x2"}, "'4(x2' is no list of numbers of tasks"),
    ],
)
def test_lists_of_slurm_that_make_no_sense_are_said_so(changed: dict[str, str], message: str) -> None:
    with pytest.raises(LaunchError, match=re.escape(message)):
        find_launch({**SLURM, **changed})


@pytest.mark.parametrize(
    ("node_list", "hosts"),
    [
        ("node1", ["node1"]),
        ("node1,node2", ["node1", "node2"]),
        ("node[01-03,07]", ["node01", "node02", "node03", "node07"]),
        ("gpu[003-005,9],cpu1", ["gpu003", "gpu004", "gpu005", "gpu9", "cpu1"]),
        ("gpu[7,9-11]", ["gpu7", "gpu9", "gpu10", "gpu11"]),
        ("r[1-2]n[03-04]-ib", ["r1n03-ib", "r1n04-ib", "r2n03-ib", "r2n04-ib"]),
        ("a-b-[98-101],c", ["a-b-98", "a-b-99", "a-b-100", "a-b-101", "c"]),
        ("127.0.0.1", ["127.0.0.1"]),
    ],
)
def test_the_hosts_of_a_node_list(node_list: str, hosts: list[str]) -> None:
    assert host_names(node_list) == hosts


def test_the_tasks_of_each_node() -> None:
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    assert tasks_per_node("1") == [1]
