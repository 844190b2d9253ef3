"""The scripts of launch/ and .ci/, without network: a stand-in for the environment's Python notes what it is asked."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = [
    *sorted((ROOT / "launch").glob("*.sh")),
    *sorted((ROOT / "slurm").glob("*.sbatch")),
    *sorted((ROOT / "tests_dist").rglob("*.sh")),
    ROOT / ".ci" / "run",
]
SOURCED = ["common.sh", "torchrun.sh", "machines.sh"]
INSTALLING = ["quickstart", "test", "benchmark", "single"]
STARTED_BY_USERS = [*INSTALLING, "multinode", "elastic"]
TOOLS = ["bash", "basename", "cat", "cksum", "dirname", "grep", "ls", "mkdir", "mktemp", "rm", "sleep", "tail", "tee"]
COUNT_GPUS = "import torch; print(torch.cuda.device_count())"

# Notes each call in $FAKE/calls. The first word of a call that has a file $FAKE/<word>.out gets it as the output,
# and <word>.code as the exit code; any other call succeeds in silence.
FAKE_PYTHON = f"""#!{shutil.which("bash")}
echo "$*" >> "$FAKE/calls"
for word in "$@"; do
    if [[ -e "$FAKE/$word.out" ]]; then
        cat "$FAKE/$word.out"
        exit "$(cat "$FAKE/$word.code")"
    fi
done
"""


@dataclass(frozen=True)
class Sandbox:
    """A copy of the scripts, run from another folder, on a PATH that holds a few tools and no Python."""

    root: Path
    elsewhere: Path
    tools: Path
    fake: Path

    @property
    def venv(self) -> Path:
        return self.root / ".venv"

    def bash(self, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [str(self.tools / "bash"), *words],
            cwd=self.elsewhere,
            env={"PATH": str(self.tools), "FAKE": str(self.fake), **environment},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )

    def launch(self, name: str, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self.bash(str(self.root / "launch" / f"{name}.sh"), *words, **environment)

    def set_up(self, extras: str) -> subprocess.CompletedProcess[str]:
        return self.bash("-c", 'source "$1" && set_up "$2"', "bash", str(self.root / "launch" / "common.sh"), extras)

    def add_python(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_PYTHON)
        path.chmod(0o755)

    def answer(self, word: str, text: str, *, code: int = 0) -> None:
        (self.fake / f"{word}.out").write_text(text)
        (self.fake / f"{word}.code").write_text(str(code))

    def calls(self, containing: str) -> list[str]:
        calls = self.fake / "calls"
        return [line for line in calls.read_text().splitlines() if containing in line] if calls.exists() else []


@pytest.fixture
def bare(tmp_path: Path) -> Sandbox:
    """No Python anywhere; a blank in every path, which is where unquoted variables break."""
    sandbox = Sandbox(*(tmp_path / name for name in ("the root", "else where", "the tools", "the fake")))
    for folder in (sandbox.elsewhere, sandbox.tools, sandbox.fake, sandbox.root / "benchmarks"):
        folder.mkdir(parents=True)
    shutil.copytree(ROOT / "launch", sandbox.root / "launch")
    for name in ("pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, sandbox.root)
    for tool in TOOLS:
        found = shutil.which(tool)
        assert found, tool
        (sandbox.tools / tool).symlink_to(found)
    return sandbox


@pytest.fixture
def ready(bare: Sandbox) -> Sandbox:
    """With an environment whose Python is the stand-in."""
    bare.add_python(bare.venv / "bin" / "python")
    return bare


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_parses(script: Path) -> None:
    outcome = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (outcome.returncode, outcome.stderr) == (0, "")


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_that_are_started_are_executable_and_those_sourced_are_not(script: Path) -> None:
    assert os.access(script, os.X_OK) == (script.name not in SOURCED)


def test_shellcheck_finds_nothing() -> None:
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (extra lint)")
    names = [str(script.relative_to(ROOT)) for script in SCRIPTS]
    outcome = subprocess.run([shellcheck, "--external-sources", *names], cwd=ROOT, capture_output=True, text=True)
    assert (outcome.returncode, outcome.stdout) == (0, "")


@pytest.mark.parametrize("name", STARTED_BY_USERS)
def test_help_needs_no_python_and_makes_nothing(bare: Sandbox, name: str) -> None:
    outcome = bare.launch(name, "--help")
    assert (outcome.returncode, outcome.stderr) == (0, "")
    assert f"bash launch/{name}.sh" in outcome.stdout
    assert not bare.venv.exists()


@pytest.mark.parametrize("name", INSTALLING)
def test_missing_python_is_one_line_that_says_what_to_install(bare: Sandbox, name: str) -> None:
    (bare.root / "benchmarks" / "loop.py").touch()
    (bare.elsewhere / "train.py").touch()
    outcome = bare.launch(name, *(["train.py"] if name == "single" else []))
    assert outcome.returncode != 0
    assert len(outcome.stderr.splitlines()) == 1
    assert "no Python 3.10 or newer found: install one (Debian, Ubuntu: apt install python3 " in outcome.stderr
    assert not bare.venv.exists()


def test_python_asked_for_that_does_not_run_is_named_and_no_other_is_taken(bare: Sandbox) -> None:
    bare.add_python(bare.tools / "python3")
    outcome = bare.launch("test", PYTHON="python9")
    assert outcome.returncode != 0
    assert len(outcome.stderr.splitlines()) == 1
    assert "PYTHON=python9 is no Python 3.10 or newer" in outcome.stderr


def test_missing_venv_module_is_one_line_that_says_what_to_install(bare: Sandbox) -> None:
    bare.add_python(bare.tools / "python3")
    bare.answer("import venv, ensurepip", "", code=1)
    outcome = bare.launch("test")
    assert outcome.returncode != 0
    assert len(outcome.stderr.splitlines()) == 1
    assert "apt install python3-venv" in outcome.stderr


def test_folder_that_is_no_environment_is_not_emptied(bare: Sandbox) -> None:
    bare.add_python(bare.tools / "python3")
    bare.venv.mkdir()
    (bare.venv / "thesis.txt").touch()
    outcome = bare.launch("test")
    assert outcome.returncode != 0
    assert "is no virtual environment" in outcome.stderr
    assert bare.calls("-m venv") == []


def test_broken_environment_is_made_anew(bare: Sandbox) -> None:
    bare.add_python(bare.tools / "python3")
    bare.venv.mkdir()
    (bare.venv / "pyvenv.cfg").touch()
    bare.launch("test")
    assert bare.calls("-m venv") == [f"-m venv --clear {bare.venv}"]


def test_pip_missing_in_the_environment_is_one_line_that_says_what_to_install(ready: Sandbox) -> None:
    ready.answer("pip", "", code=1)
    ready.answer("ensurepip", "", code=1)
    outcome = ready.set_up("test")
    assert outcome.returncode != 0
    assert "apt install python3-venv" in outcome.stderr.splitlines()[-1]
    assert ready.calls("pip install") == []


def test_second_set_up_does_not_install_again(ready: Sandbox) -> None:
    for _ in range(2):
        assert ready.set_up("test,lint").returncode == 0
        assert len(ready.calls("pip install")) == 1
    assert "--constraint constraints.txt --editable .[test,lint]" in ready.calls("pip install")[0]
    # Either alone, as launch/test.sh asks for it after .ci/run has installed both.
    assert ready.set_up("lint").returncode == 0
    assert len(ready.calls("pip install")) == 1


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(ready: Sandbox, name: str) -> None:
    ready.set_up("test")
    with (ready.root / name).open("a") as file:
        file.write("# one more line\n")
    ready.set_up("test")
    assert len(ready.calls("pip install")) == 2


def test_extra_not_installed_yet_is_installed(ready: Sandbox) -> None:
    ready.set_up("test")
    ready.set_up("test,lint")
    assert len(ready.calls("pip install")) == 2


def test_failed_install_shows_pips_errors_without_its_noise_and_is_tried_again(ready: Sandbox) -> None:
    noise = "WARNING: Location 'file:///somewhere/' is ignored: it is neither a file nor a directory.\n"
    ready.answer("install", f"{noise}ERROR: No matching distribution found for torch\n", code=1)
    for attempt in (1, 2):
        outcome = ready.set_up("test")
        assert outcome.returncode != 0
        assert "ERROR: No matching distribution found for torch" in outcome.stderr
        assert "is ignored" not in outcome.stderr
        assert len(ready.calls("pip install")) == attempt


@pytest.mark.parametrize(
    ("environment", "num_gpus", "prefix", "num_processes"),
    [
        ({}, 0, "OMP_NUM_THREADS=1 ", 2),
        ({}, 4, "", 4),
        ({"NPROC": "3"}, 4, "", 3),
        ({"NPROC": "3", "OMP_NUM_THREADS": "8"}, 0, "OMP_NUM_THREADS=8 ", 3),
    ],
)
def test_quickstart_runs_the_command_it_prints(
    ready: Sandbox, environment: dict[str, str], num_gpus: int, prefix: str, num_processes: int
) -> None:
    ready.answer(COUNT_GPUS, f"{num_gpus}\n")
    outcome = ready.launch("quickstart", "--epochs", "2", **environment)
    assert outcome.returncode == 0
    job = f"{ready.root}/examples/digits.py --epochs 2"
    arguments = f"--standalone --local-addr=127.0.0.1 --nproc-per-node={num_processes} {SIGNALS} {job}"
    assert ready.calls("torchrun") == [f"{ready.venv}/bin/torchrun {arguments}"]
    printed = f"TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 {ready.venv}/bin/python {ready.venv}/bin/torchrun {arguments}"
    assert outcome.stdout == prefix + printed.replace("the root", r"the\ root").replace(",", r"\,") + "\n"


def test_quickstart_fails_when_training_fails(ready: Sandbox) -> None:
    ready.answer(COUNT_GPUS, "0\n")
    ready.answer("--standalone", "", code=7)
    assert ready.launch("quickstart").returncode == 7


@pytest.mark.parametrize("num_processes", ["0", "two", "-1"])
def test_impossible_number_of_processes_is_named_before_anything_is_installed(
    ready: Sandbox, num_processes: str
) -> None:
    outcome = ready.launch("quickstart", NPROC=num_processes)
    assert outcome.returncode != 0
    assert f"NPROC={num_processes} is no number of processes" in outcome.stderr
    assert ready.calls("") == []


SIGNALS = "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2 --shutdown-timeout=120"


@pytest.fixture
def node(ready: Sandbox) -> Sandbox:
    """A machine with a script in another folder, without GPUs, that finds itself to be the head `node1`."""
    (ready.elsewhere / "my train.py").touch()
    ready.answer(COUNT_GPUS, "0\n")
    ready.answer("node1", "true\n")
    return ready


def test_single_runs_the_script_with_its_arguments_and_those_that_look_like_torchruns(node: Sandbox) -> None:
    outcome = node.launch("single", "my train.py", "--nnodes", "a b", "--help", NPROC="3")
    assert outcome.returncode == 0
    arguments = f"--standalone --local-addr=127.0.0.1 --nproc-per-node=3 {SIGNALS} my train.py --nnodes a b --help"
    assert node.calls("torchrun") == [f"{node.venv}/bin/torchrun {arguments}"]
    assert outcome.stdout.endswith(r"my\ train.py --nnodes a\ b --help" + "\n")
    assert outcome.stdout.startswith("OMP_NUM_THREADS=1 ")


def test_single_installs_for_the_scripts_that_do_not(bare: Sandbox, ready: Sandbox) -> None:
    assert ready.launch("single", "--install").returncode == 0
    assert len(ready.calls("pip install")) == 1
    assert ready.calls("torchrun") == []


@pytest.mark.parametrize("is_head", ["true", "false"])
def test_multinode_meets_on_the_head_and_says_who_that_is(node: Sandbox, is_head: str) -> None:
    node.answer("node1", f"{is_head}\n")
    outcome = node.launch("multinode", "my train.py", "--lr", "1", NNODES="2", HEAD="node1", PORT="5000", RUN_ID="a")
    assert outcome.returncode == 0
    meeting = "--rdzv-backend=c10d --rdzv-endpoint=node1:5000 --rdzv-id=a"
    arguments = f"--nnodes=2 {meeting} --rdzv-conf=is_host={is_head} --nproc-per-node=2 {SIGNALS} my train.py --lr 1"
    assert node.calls("torchrun") == [f"{node.venv}/bin/torchrun {arguments}"]
    assert node.calls("pip install") == []  # machines that share the folder would do it at the same time


def test_elastic_joins_again_after_an_error_but_only_so_often(node: Sandbox) -> None:
    node.answer("--max-restarts=1", "", code=7)
    outcome = node.launch("elastic", "my train.py", NNODES="1:3", HEAD="node1", RESTARTS="1", LAST_CALL="9")
    assert outcome.returncode == 7
    meeting = "--rdzv-endpoint=node1:29400 --rdzv-id=dengine --rdzv-conf=is_host=true"
    arguments = (
        f"--nnodes=1:3 --rdzv-backend=c10d {meeting},last_call_timeout=9 --max-restarts=1 --nproc-per-node=2 {SIGNALS}"
    )
    assert node.calls("torchrun") == [f"{node.venv}/bin/torchrun {arguments} my train.py"] * 2
    assert "torchrun ended with 7; it joins again" in outcome.stderr


def test_elastic_keeps_a_folder_in_memory_over_its_restarts_and_removes_it_at_the_end(node: Sandbox) -> None:
    folder = node.elsewhere / f"dengine-{os.getuid()}-a b"
    (node.venv / "bin" / "python").write_text(
        FAKE_PYTHON + '[[ $* != *torchrun* ]] || { ls -ld "$DENGINE_FAST_DIR"; ls "$DENGINE_FAST_DIR"; '
        'echo > "$DENGINE_FAST_DIR/kept"; exit 7; }\n'
    )
    environment = {"NNODES": "1:3", "HEAD": "node1", "RESTARTS": "1", "RUN_ID": "a b"}
    outcome = node.launch("elastic", f"--fast-dir={node.elsewhere}", "my train.py", **environment)
    assert outcome.returncode == 7, outcome.stderr
    lines = outcome.stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["drwx------", "drwx------", "kept"]
    assert all(line.endswith(str(folder)) for line in lines[:2])
    assert not folder.exists()
    missing = node.launch("elastic", "--fast-dir=/no/such", "my train.py", **environment)
    assert missing.returncode == 1
    assert "no folder can be made in /no/such: give --fast-dir=FOLDER" in missing.stderr


def test_elastic_ends_where_training_ends(node: Sandbox) -> None:
    assert node.launch("elastic", "my train.py", NNODES="1:3", HEAD="node1").returncode == 0
    assert len(node.calls("torchrun")) == 1


def test_elastic_passes_a_signal_on_and_does_not_join_again(node: Sandbox) -> None:
    """torchrun ends with 1 also where all its ranks have saved."""
    (node.venv / "bin" / "python").write_text(
        FAKE_PYTHON + "[[ $* != *torchrun* ]] || { trap 'echo saved; exit 1' USR1; echo begun; sleep 30 & wait; }\n"
    )
    process = subprocess.Popen(
        [str(node.tools / "bash"), str(node.root / "launch" / "elastic.sh"), "my train.py"],
        cwd=node.elsewhere,
        env={"PATH": str(node.tools), "FAKE": str(node.fake), "NNODES": "1:2", "HEAD": "node1"},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        while "begun" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "saved\n"
        assert process.wait(30) == 1
    finally:
        with suppress(ProcessLookupError):  # its sleep may not have begun
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
    assert len(node.calls("torchrun")) == 1


@pytest.mark.parametrize(
    ("name", "words", "environment", "said"),
    [
        ("single", [], {}, "no script to run: see --help"),
        ("single", ["none.py"], {}, "there is no script none.py in "),
        ("single", ["my train.py"], {"NPROC": "0"}, "NPROC=0 is no number of processes"),
        ("multinode", ["my train.py"], {"HEAD": "node1"}, "NNODES= is no number of machines"),
        ("multinode", ["my train.py"], {"NNODES": "1:2", "HEAD": "node1"}, "NNODES=1:2 is no number of machines"),
        ("multinode", ["my train.py"], {"NNODES": "2"}, "HEAD is not set"),
        ("multinode", ["my train.py"], {"NNODES": "2", "HEAD": "no"}, "HEAD=no is not known here"),
        ("multinode", ["my train.py"], {"NNODES": "2", "HEAD": "node1", "PORT": "x"}, "PORT=x is no whole number"),
        ("elastic", ["my train.py"], {"NNODES": "2", "HEAD": "node1"}, "NNODES=2 must be two numbers of machines"),
    ],
)
def test_what_cannot_be_started_is_said_in_one_line(
    node: Sandbox, name: str, words: list[str], environment: dict[str, str], said: str
) -> None:
    node.answer("no", "", code=1)
    outcome = node.launch(name, *words, **environment)
    assert outcome.returncode != 0
    assert len(outcome.stderr.splitlines()) == 1
    assert said in outcome.stderr
    assert node.calls("torchrun") == []


@pytest.mark.parametrize("name", ["multinode", "elastic"])
def test_several_machines_need_an_environment_that_is_there(bare: Sandbox, name: str) -> None:
    (bare.elsewhere / "train.py").touch()
    outcome = bare.launch(name, "train.py", NNODES="1:2" if name == "elastic" else "2", HEAD="node1")
    assert outcome.returncode != 0
    assert "make it once with bash launch/single.sh --install" in outcome.stderr
    assert not bare.venv.exists()


NOTHING_SELECTED = 5


@pytest.mark.parametrize(
    ("tests_code", "dist_code", "arguments", "passes"),
    [
        (1, 0, [], False),
        (0, 1, [], False),
        (0, 0, [], True),
        (NOTHING_SELECTED, 0, [], False),  # a folder without tests is a fault
        (0, NOTHING_SELECTED, [], False),
        (NOTHING_SELECTED, 0, ["-k", "word"], True),
        (0, NOTHING_SELECTED, ["-k", "word"], True),
        (1, NOTHING_SELECTED, ["-k", "word"], False),
        (NOTHING_SELECTED, NOTHING_SELECTED, ["-k", "word"], False),
    ],
)
def test_test_script_runs_both_halves_and_fails_with_either(
    ready: Sandbox, tests_code: int, dist_code: int, arguments: list[str], passes: bool
) -> None:
    ready.answer("tests", "noise\n=== 3 passed in 0.51s ===\n", code=tests_code)
    ready.answer("tests_dist", "noise\n=== 1 failed in 61.20s (0:01:01) ===\n", code=dist_code)
    outcome = ready.launch("test", *arguments)
    assert (outcome.returncode == 0) == passes
    assert outcome.stdout.splitlines()[-2:] == [
        "tests:      === 3 passed in 0.51s ===",
        "tests_dist: === 1 failed in 61.20s (0:01:01) ===",
    ]
    tail = "".join(f" {argument}" for argument in arguments)
    assert ready.calls("-m pytest") == [
        f"-m pytest --color=no tests -n logical --maxprocesses=4 --dist=loadfile{tail}",
        f"-m pytest --color=no tests_dist{tail}",
    ]


@pytest.mark.parametrize("gpu_code", [0, 1])
def test_test_script_runs_the_tests_on_gpus_where_there_are_some(ready: Sandbox, gpu_code: int) -> None:
    ready.answer(COUNT_GPUS, "1\n")
    ready.answer("gpu", "=== 4 passed in 9.50s ===\n", code=gpu_code)
    outcome = ready.launch("test", "-x")
    assert outcome.returncode == gpu_code
    assert outcome.stdout.splitlines()[-3] == "gpu:        === 4 passed in 9.50s ==="
    assert ready.calls("-m pytest")[2:] == ["-m pytest --color=no -m gpu tests tests_dist -x"]


@pytest.mark.parametrize("path", ["tests", "tests/engine", "tests_dist", "tests_dist/test_a.py::test_b"])
def test_test_script_runs_one_pytest_over_the_paths_it_is_given(ready: Sandbox, path: str) -> None:
    assert ready.launch("test", "-x", path).returncode == 0
    assert ready.calls("-m pytest") == [f"-m pytest -x {path}"]


def test_benchmark_script_runs_each_file_named_with_the_remaining_arguments(ready: Sandbox) -> None:
    for name in ("loop", "memory"):
        (ready.root / "benchmarks" / f"{name}.py").touch()
    assert ready.launch("benchmark", "memory", "benchmarks/loop.py", "--steps", "9").returncode == 0
    folder = f"{ready.root}/benchmarks"
    assert ready.calls("/benchmarks/") == [f"{folder}/memory.py --steps 9", f"{folder}/loop.py --steps 9"]


def test_benchmark_script_runs_the_loop_by_default(ready: Sandbox) -> None:
    (ready.root / "benchmarks" / "loop.py").touch()
    assert ready.launch("benchmark").returncode == 0
    assert ready.calls("/benchmarks/") == [f"{ready.root}/benchmarks/loop.py"]


def test_unknown_benchmark_is_named_with_those_there_are(ready: Sandbox) -> None:
    (ready.root / "benchmarks" / "loop.py").touch()
    outcome = ready.launch("benchmark", "loop", "lop")
    assert outcome.returncode != 0
    assert "no benchmark benchmarks/lop.py: benchmarks/ has loop.py" in outcome.stderr
    assert ready.calls("") == []
