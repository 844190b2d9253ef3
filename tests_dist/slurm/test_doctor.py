"""The doctor as a step of a real job: what it finds where all is well, and where the job is set up wrongly."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from slurm_cluster import Cluster

ON_TWO_NODES = ("--nodes=2", "--nodelist=node[3,5]")


def doctor(
    cluster: Cluster, folder: Path, *options: str, tasks_per_node: int, **environment: str
) -> subprocess.CompletedProcess[str]:
    step = ("srun", *ON_TWO_NODES, f"--ntasks-per-node={tasks_per_node}", sys.executable, "-m", "dengine", "doctor")
    env = {"OMP_NUM_THREADS": "1", **environment}
    return cluster.run(*step, "--folder", str(folder), *options, env=env, deadline_s=150)


def test_four_tasks_on_two_nodes_are_fit_to_train_and_rank_zero_says_so(cluster: Cluster, tmp_path: Path) -> None:
    done = doctor(cluster, tmp_path, "--json", "--mesh", "dp_shard=-1,tp=2", tasks_per_node=2)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)  # one object: of one rank
    assert (report["launcher"], report["size"], report["hosts"]) == ("slurm", 4, ["node3", "node5"])
    verdicts = {each["check"]: each["verdict"] for each in report["checks"]}
    assert set(verdicts.values()) <= {"ok", "warn", "skip"}, done.stdout
    # It warns of the master: the nodes have loopback addresses here.
    assert [verdicts[name] for name in ("launcher", "ranks", "code", "signals", "shared", "gloo")] == ["ok"] * 6
    assert [verdicts[name] for name in ("mesh", "join")] == ["ok"] * 2
    figure = next(each["figure"] for each in report["checks"] if each["check"] == "mesh")
    assert figure == "dp_shard=2 x tp=2: 2 parts of the data, for ranks 0 and 1; ranks 2 and 3"


@pytest.mark.parametrize(
    ("environment", "figure", "advice"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set, although RANK=0 is", "unset"),
        ({"MASTER_ADDR": "192.0.2.1"}, "the master address 192.0.2.1 is not one of its own", "set MASTER_ADDR"),
    ],
)
def test_a_job_that_is_set_up_wrongly_is_told_so(
    cluster: Cluster, tmp_path: Path, environment: dict[str, str], figure: str, advice: str
) -> None:
    done = doctor(cluster, tmp_path, "--wait", "2", tasks_per_node=1, **environment)
    said = " ".join((done.stdout + done.stderr).split())
    assert done.returncode == 1, said
    assert "training would fail" in said
    assert figure in said
    assert advice in said
