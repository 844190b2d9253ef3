"""Supervised training under every launcher, and with dengine's group or accelerate's state made first."""

import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from ranks import Completed, run_command, run_python, run_ranks, torchrun
from torch import nn
from torch.nn.functional import cross_entropy

from dengine import create_supervised_trainer, distributed

JOB = Path(__file__).with_name("support") / "supervised_job.py"


def found(done: Completed, ranks: int) -> str:
    assert done.returncode == 0, done.output
    lines = re.findall(rf"^{ranks} ranks: (.*)$", done.output, re.MULTILINE)
    assert len(lines) == 1, done.output
    return str(lines[0])


@pytest.fixture(scope="module")
def by_one_process(tag: str) -> str:
    return found(run_python(JOB), 1)


@pytest.mark.parametrize("order", ["dengine first", "accelerate first", "accelerate only"])
def test_two_ranks_of_torchrun_train_what_one_process_does(by_one_process: str, order: str) -> None:
    assert found(torchrun(JOB, 2, order), 2) == by_one_process


def test_two_ranks_of_accelerate_launch_do_too(by_one_process: str) -> None:
    # Without a GPU accelerate starts several ranks by MPI only; --multi_gpu has it start them as it does with GPUs.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = run_command(*launch, "--main_process_port", "0", str(JOB), deadline_s=120.0)
    assert found(done, 2) == by_one_process


def in_slurm(rank: int, size: int, order: str) -> tuple[int, float, list[str]]:
    """As srun starts a task: torchrun's variables are not there."""
    port = os.environ["MASTER_PORT"]
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR"):
        del os.environ[name]
    os.environ |= {
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank),
        "SLURM_NTASKS": str(size),
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "127.0.0.1",
        "MASTER_PORT": port,
    }
    before = dict(os.environ)
    accelerator = Accelerator(cpu=True) if order == "accelerate first" else None
    with distributed.process_group() as world:
        assert world.launcher == "slurm"
        torch.manual_seed(rank)
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = create_supervised_trainer(model, optimizer, cross_entropy, accelerator=accelerator)
        trainer.run([(torch.full((rank + 1, 2), float(rank)), torch.zeros(rank + 1, dtype=torch.int64))])
        changed = [name for name in os.environ if os.environ[name] != before.get(name)]
        return world.size, sum(parameter.sum().item() for parameter in model.parameters()), changed


def test_under_slurm_the_ranks_agree_and_the_environment_is_left_alone() -> None:
    results = run_ranks(in_slurm, 2, "", init=False)
    assert results[0] == results[1]
    assert results[0][0] == 2
    assert results[0][2] == []


def mismatched(rank: int, size: int, cpu: bool) -> Any:
    accelerator = Accelerator(cpu=cpu)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return create_supervised_trainer(model, optimizer, cross_entropy, accelerator=accelerator)


def test_an_accelerator_that_counts_other_ranks_is_refused_with_the_way_out() -> None:
    if torch.cuda.is_available():
        pytest.skip("with a GPU accelerate sees the ranks without being told")
    for outcome in run_ranks(mismatched, 2, False, expect_failures=True):
        assert outcome.error_type == "LaunchError"
        assert "rank 0 of 1" in outcome.error_message
        assert "cpu=True" in outcome.error_message
    for outcome in run_ranks(in_slurm, 2, "accelerate first", init=False, expect_failures=True):
        assert outcome.error_type == "LaunchError"
        assert "under srun none can be made before process_group()" in outcome.error_message
