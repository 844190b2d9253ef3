"""A real SLURM for tests, and its jobs. slurm/cluster.sh starts and ends it."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ranks import PATIENCE, TAG

__all__ = ["JOB", "Cluster", "Job", "on", "until"]

ROOT = Path(__file__).resolve().parents[2]
JOB = str(ROOT / "tests_dist" / "support" / "small_job.py")
SCRIPT = ROOT / "tests_dist" / "slurm" / "cluster.sh"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "BOOT_FAIL"}


def until(is_so: Callable[[], object], deadline_s: float, told: Callable[[], object] = str) -> float:
    """Wait until it is so; give the seconds that it took. Raises: TimeoutError with what `told` says."""
    begun = time.monotonic()
    while not is_so():
        if time.monotonic() - begun > deadline_s * PATIENCE:
            raise TimeoutError(f"not so after {deadline_s:g} s: {told()}")
        time.sleep(0.3)  # scontrol costs, too
    return time.monotonic() - begun


def on(*nodes: int) -> tuple[str, ...]:
    """One task on each of these, and on no other: what happens to a node is to happen to one test only."""
    names = ",".join(f"node{number}" for number in nodes)
    return (f"--nodes={len(nodes)}", "--ntasks-per-node=1", f"--nodelist={names}")


@dataclass(frozen=True)
class Job:
    """A job that was submitted; of an array, one element (`123_4`)."""

    cluster: "Cluster"
    number: str
    log_path: Path

    @property
    def fields(self) -> dict[str, str]:
        shown = self.cluster.client("scontrol", "--oneliner", "show", "job", self.number)
        return dict(re.findall(r"(\S+?)=(\S*)", shown))

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def wait(self, deadline_s: float = 150) -> str:
        """Until it is over, all its requeues included: `COMPLETED 0:0`."""
        until(lambda: self.fields["JobState"] in ENDED, deadline_s, lambda: f"{self.fields['JobState']}\n{self.log}")
        fields = self.fields
        return f"{fields['JobState']} {fields['ExitCode']}"

    def says(self, text: str, times: int = 1, deadline_s: float = 150) -> float:
        """Wait until the log has `text` so many times; give the seconds that it took."""
        return until(lambda: self.log.count(text) >= times, deadline_s, lambda: f"{text!r} missing in\n{self.log}")

    def reaches(self, folder: Path, iteration: int) -> None:
        """Wait until the training of small_job.py, which tells it in this folder, is there."""
        place = folder / "iteration"
        until(lambda: place.exists() and int(place.read_text()) >= iteration, 150, lambda: self.log)

    def signal_shell(self, name: str = "USR1") -> None:
        """What `--signal=B:USR1@180` does before the time limit, now."""
        self.cluster.client("scancel", "--batch", f"--signal={name}", self.number)


@dataclass(frozen=True)
class Cluster:
    """Nodes `node1`, `node2`, ... of which `folder` holds all state."""

    folder: Path
    work: Path

    @property
    def tag(self) -> str:
        """Of all its processes, which outlive a test: no other test of the session is to take them for its own."""
        return f"slurm-{os.environ[TAG]}"

    def control(self, action: str, *words: str) -> subprocess.CompletedProcess[str]:
        with (self.work / "cluster.out").open("w+") as output:  # no pipe: the daemons would hold it open
            done = subprocess.run(
                [str(SCRIPT), action, str(self.folder), *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=120 * PATIENCE,
                env={**os.environ, TAG: self.tag},
            )
            output.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, output.read())

    def client(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """The output of sbatch, scontrol and so on. Raises: RuntimeError, with what it said."""
        done = self.run(*command, env=env)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} gave {done.returncode}: {done.stdout}{done.stderr}")
        return done.stdout

    def run(
        self, *command: str, env: Mapping[str, str] | None = None, deadline_s: float = 60
    ) -> subprocess.CompletedProcess[str]:
        """What a user types in the repository's folder."""
        surrounding = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        surrounding |= {TAG: self.tag, "SLURM_CONF": str(self.folder / "slurm.conf")}
        return subprocess.run(
            command,
            cwd=ROOT,
            env={**surrounding, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=deadline_s * PATIENCE,
        )

    def submit(
        self, form: str, *arguments: str, options: tuple[str, ...] = (), env: Mapping[str, str] | None = None
    ) -> Job:
        """`sbatch [options] slurm/FORM.sbatch arguments`, as a user does, from the repository's folder."""
        log = self.work / f"{form}-{len(list(self.work.iterdir()))}-%j.out"
        number = self.client(
            "sbatch",
            "--parsable",
            f"--output={log}",
            *options,
            f"slurm/{form}.sbatch",
            *arguments,
            env={"PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **(env or {})},
        ).strip()
        return Job(self, number, Path(str(log).replace("%j", number)))
