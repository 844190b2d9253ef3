"""Hosts with addresses of their own for tests, and what runs on them. hosts/hosts.sh makes them."""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from ranks import PATIENCE

__all__ = ["Command", "Hosts", "until"]

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tests_dist" / "hosts" / "hosts.sh"


def until(is_so: Callable[[], object], deadline_s: float, told: Callable[[], object] = str) -> float:
    """Wait until it is so; give the seconds that it took. Raises: TimeoutError with what `told` says."""
    begun = time.monotonic()
    while not is_so():
        if time.monotonic() - begun > deadline_s * PATIENCE:
            raise TimeoutError(f"not so after {deadline_s:g} s: {told()}")
        time.sleep(0.05)
    return time.monotonic() - begun


@dataclass(frozen=True)
class Command:
    """What runs on a host: its process there, and what it has printed so far."""

    host: str
    process: subprocess.Popen[bytes]
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def says(self, text: str, deadline_s: float = 150) -> float:
        return until(lambda: text in self.log, deadline_s, lambda: f"{text!r} missing in\n{self.log}")

    def wait(self, deadline_s: float = 150) -> int:
        try:
            return self.process.wait(deadline_s * PATIENCE)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"{self.host} still runs after {deadline_s:g} s:\n{self.log}") from None


@dataclass(frozen=True)
class Hosts:
    """`h1`, `h2`, ... with 10.77.0.1, 10.77.0.2, ..."""

    folder: Path
    work: Path
    running: list[Command] = field(default_factory=list)

    def control(self, action: str, *words: str) -> subprocess.CompletedProcess[str]:
        with (self.work / "hosts.out").open("w+") as output:  # no pipe: what holds the hosts open would hold it, too
            command = [str(SCRIPT), action, str(self.folder), *words]
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, timeout=60 * PATIENCE
            )
            output.seek(0)
            return subprocess.CompletedProcess(done.args, done.returncode, output.read())

    def name_as_debian_does(self) -> None:
        """Each host's own name is 127.0.1.1 on itself, and its address on the others."""
        for path in self.folder.glob("h*.hosts"):
            host = path.name.partition(".")[0]
            lines = path.read_text().splitlines()
            kept = [line for line in lines if not line.endswith(f" {host}")]
            path.write_text("\n".join(["127.0.1.1 " + host, *kept]) + "\n")

    def launch(self, host: str, script: str, *arguments: str, env: Mapping[str, str]) -> Command:
        """`bash launch/SCRIPT arguments` there, in the environment in which the tests run."""
        log = self.work / f"{host}-{len(self.running)}.out"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(SCRIPT), "exec", str(self.folder), host, "bash", f"launch/{script}", *arguments],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "DENGINE_VENV": sys.prefix, "NPROC": "1", **env},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.running.append(Command(host, process, log))
        return self.running[-1]

    def ranks(self, host: str, script: str) -> list[int]:
        """The processes on a host that run the script, torchrun and its shell excepted."""
        return self._pythons(host, lambda line: script.encode() in line and b"torchrun" not in line)

    def agent(self, host: str) -> int:
        (agent,) = self._pythons(host, lambda line: b"torchrun" in line)
        return agent

    def _pythons(self, host: str, is_meant: Callable[[bytes], bool]) -> list[int]:
        here = os.stat(f"/proc/{(self.folder / 'ns' / f'{host}.pid').read_text().strip()}/ns/net").st_ino
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                line = (folder / "cmdline").read_bytes()
                if line.startswith(sys.executable.encode()) and is_meant(line):
                    found += [int(folder.name)] if (folder / "ns" / "net").stat().st_ino == here else []
        return found

    def down(self) -> None:
        ended = self.control("down")
        for command in self.running:
            command.process.wait(10)
        assert ended.returncode == 0, ended.stdout
