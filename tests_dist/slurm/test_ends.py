"""How the jobs of slurm/ end: done, cancelled, failed, tried too often, or never begun, and what their log says."""

import time
from pathlib import Path

import pytest
from slurm_cluster import JOB, Cluster, Job, until

ROOT = Path(__file__).resolve().parents[2]
TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
FORMS = ["train", "torchrun"]


def test_the_main_job_trains_under_torchrun_on_two_nodes(cluster: Cluster, tmp_path: Path) -> None:
    """With one task per rank: test_requeue.py."""
    arguments = ("examples/digits.py", "--epochs", "1", "--output", str(tmp_path))
    job = cluster.submit("torchrun", *arguments, options=TWO_NODES)
    assert job.wait(200) == "COMPLETED 0:0", job.log
    assert "Validation accuracy" in job.log
    assert "on node[1-2]" in job.log


@pytest.mark.parametrize("form", FORMS)
def test_a_rank_that_fails_ends_the_job_at_once_and_the_log_says_why(
    cluster: Cluster, tmp_path: Path, form: str
) -> None:
    job = cluster.submit(
        form, JOB, str(tmp_path), "--fail-at=10", "--pause=0.1", "--stall-timeout=600", options=TWO_NODES
    )
    job.says("planted in iteration 10")
    begun = time.monotonic()
    # 1, or 143 where srun ended the other rank, as it does at once.
    assert job.wait().startswith("FAILED "), job.log
    assert time.monotonic() - begun < 300  # where nobody ends it, the other rank waits for 600 s
    assert job.fields["Restarts"] == "0"
    assert "ValueError: planted in iteration 10" in job.log
    assert "small_job.py" in job.log


def test_a_job_that_is_cancelled_saves_and_is_not_begun_again(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("train", JOB, str(tmp_path), "--pause=0.2", options=TWO_NODES)
    job.reaches(tmp_path, 3)
    cluster.client("scancel", job.number)
    until(lambda: job.fields["JobState"] == "CANCELLED", 60, lambda: job.fields)
    job.says("saved after", times=2)
    assert job.fields["Restarts"] == "0"
    assert "requeued" not in job.log


def test_a_job_is_begun_again_only_so_often(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("train", JOB, str(tmp_path), "--pause=0.2", options=TWO_NODES, env={"MAX_REQUEUES": "0"})
    job.reaches(tmp_path, 3)
    job.signal_shell()
    assert job.wait() == "FAILED 75:0", job.log
    assert "not requeued after SIGUSR1: it was 0 times already, and MAX_REQUEUES is 0" in job.log


def test_a_job_that_slurm_requeues_without_end_is_ended(cluster: Cluster, tmp_path: Path) -> None:
    """A node that fails again and again: SLURM itself knows no bound."""
    (tmp_path / "wait.py").write_text("import time; print('waits', flush=True); time.sleep(600)")
    job = cluster.submit("train", str(tmp_path / "wait.py"), env={"MAX_REQUEUES": "0"})
    job.says("waits")
    cluster.client("scontrol", "requeue", job.number)
    assert job.wait() == "FAILED 75:0", job.log
    assert "not begun again: it was 1 times already" in job.log


def test_half_set_variables_are_named(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.submit("train", JOB, str(tmp_path), env={"RANK": "0"}, options=TWO_NODES)
    assert job.wait().startswith("FAILED "), job.log
    assert "WORLD_SIZE is not set, although RANK=0 is" in job.log


def test_of_a_sweep_only_the_run_that_was_told_is_begun_again(cluster: Cluster, tmp_path: Path) -> None:
    """The last element's job id is the whole array's: requeued by it, all would be begun again."""
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(f"{tmp_path}/one\n{tmp_path}/two --pause 0.3\n")
    array = cluster.submit("array", str(sweep), JOB, options=("--array=1-2", f"--output={tmp_path}/%a.out"))
    one, two = (Job(cluster, f"{array.number}_{index}", tmp_path / f"{index}.out") for index in (1, 2))
    until(lambda: two.fields.get("JobState") == "RUNNING", 30, lambda: two.fields)
    assert two.fields["JobId"] == array.number
    two.reaches(tmp_path / "two", 3)
    two.says("begins after 0")
    # What SLURM does before the time limit: to this element's shell. scancel by its id would be for the whole array.
    cluster.client("scancel", "--batch", "--signal=USR1", two.number)
    assert two.wait() == "COMPLETED 0:0", two.log
    assert one.wait() == "COMPLETED 0:0", one.log
    assert (one.fields["Restarts"], two.fields["Restarts"]) == ("0", "1")


def test_a_line_that_is_not_there_is_named(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sweep.txt").write_text("--lr 1\n")
    output = f"--output={tmp_path}/%a.out"
    array = cluster.submit("array", str(tmp_path / "sweep.txt"), JOB, options=("--array=2", output))
    job = Job(cluster, f"{array.number}_2", tmp_path / "2.out")
    assert job.wait() == "FAILED 2:0"
    assert f"line 2 of {tmp_path}/sweep.txt is empty or not there: it has 1 lines" in job.log


@pytest.mark.parametrize("form", ["train", "torchrun", "array"])
def test_without_a_script_the_usage_is_said(cluster: Cluster, form: str) -> None:
    job = cluster.submit(form)
    assert job.wait() == "FAILED 2:0"
    assert f"slurm/{form}.sbatch" in job.log


def test_a_python_that_is_not_there_is_named(cluster: Cluster) -> None:
    job = cluster.submit("train", JOB, env={"PYTHON": "/no/python"})
    assert job.wait() == "FAILED 2:0"
    assert "there is no /no/python: submit it from the folder that has .venv, or set PYTHON" in job.log


def test_what_requeues_is_the_same_in_all_forms() -> None:
    """Each script is to be copied alone, so each has its own copy."""
    common = {
        (ROOT / "slurm" / f"{form}.sbatch").read_text().split("# -- 8< --")[1].split("# -- >8 --")[0]
        for form in ("train", "torchrun", "array")
    }
    assert len(common) == 1
