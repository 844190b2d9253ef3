"""What the launcher says about this process: torchrun's variables, SLURM's, or nothing. Pure: reads a mapping only."""

from collections.abc import Mapping
from dataclasses import dataclass

from dengine.errors import LaunchError

__all__ = ["Launch", "find_launch", "first_host"]

# Outside the range from which kernels hand out ports to clients (32768 and up).
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000


@dataclass(frozen=True)
class Launch:
    """One process as its launcher started it."""

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int
    master_addr: str
    master_port: int


def find_launch(env: Mapping[str, str]) -> Launch | None:
    """The launch that `env` describes, or None in a process that nobody launched.

    torchrun's variables win over SLURM's: torchrun may itself run inside a SLURM task.

    Raises:
        LaunchError: variables that are half set or no numbers.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        return _from_torchrun(env)
    if "SLURM_PROCID" in env and not _is_batch_shell(env):
        return _from_slurm(env)
    return None


def first_host(node_list: str) -> str:
    """The first host of a SLURM node list: `gpu[003-005,9],cpu1` gives `gpu003`."""
    first = ""
    depth = 0
    for letter in node_list:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            break
        first += letter
    while "[" in first:
        head, _, rest = first.partition("[")
        ranges, _, tail = rest.partition("]")
        first = head + ranges.split(",")[0].split("-")[0] + tail
    return first.strip()


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    given = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if env.get(name)]
    rank, size = (_number(env, name, given) for name in ("RANK", "WORLD_SIZE"))
    # Launched by hand, these may be absent: one node then.
    local_rank = _number(env, "LOCAL_RANK", given) if "LOCAL_RANK" in env else rank
    local_size = _number(env, "LOCAL_WORLD_SIZE", given) if "LOCAL_WORLD_SIZE" in env else size
    node_rank = _number(env, "GROUP_RANK", given) if "GROUP_RANK" in env else rank // max(local_size, 1)
    launch = Launch(
        "torchrun",
        rank,
        size,
        local_rank,
        local_size,
        node_rank,
        _text(env, "MASTER_ADDR", given),
        _number(env, "MASTER_PORT", given),
    )
    return _checked(launch, "RANK", "WORLD_SIZE")


def _from_slurm(env: Mapping[str, str]) -> Launch | None:
    given = [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS") if env.get(name)]
    # The step's own number of tasks, where there is one: a job's may be larger.
    size_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    rank, size = _number(env, "SLURM_PROCID", given), _number(env, size_name, given)
    if size == 1:
        return None
    local_rank = _number(env, "SLURM_LOCALID", given)
    nodes = "SLURM_STEP_NODELIST" if "SLURM_STEP_NODELIST" in env else "SLURM_JOB_NODELIST"
    node_rank = _number(env, "SLURM_NODEID", given) if "SLURM_NODEID" in env else 0
    launch = Launch(
        "slurm",
        rank,
        size,
        local_rank,
        _tasks_on_node(env, node_rank, size),
        node_rank,
        env.get("MASTER_ADDR") or first_host(_text(env, nodes, given)),
        _number(env, "MASTER_PORT", given) if "MASTER_PORT" in env else _slurm_port(env, given),
    )
    return _checked(launch, "SLURM_PROCID", size_name)


def _is_batch_shell(env: Mapping[str, str]) -> bool:
    """The shell of an sbatch script is task 0 of nothing: a plain `python` in it is one process."""
    return env.get("ENVIRONMENT") == "BATCH" and "SLURM_STEP_ID" not in env


def _tasks_on_node(env: Mapping[str, str], node_rank: int, size: int) -> int:
    """This node's entry of `SLURM_STEP_TASKS_PER_NODE`, e.g. `4(x2),1`: two nodes of four tasks, one of one."""
    text = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(size)
    per_node: list[int] = []
    for part in text.split(","):
        tasks, _, times = part.partition("(x")
        per_node += [int(tasks)] * int(times.rstrip(")") or 1)
    return per_node[node_rank] if node_rank < len(per_node) else size


def _slurm_port(env: Mapping[str, str], given: list[str]) -> int:
    """A port that every task of the step derives alike, and that two steps of one job do not share."""
    step = env.get("SLURM_STEP_ID", "0")
    return _FIRST_PORT + (_number(env, "SLURM_JOB_ID", given) * 7 + (int(step) if step.isdigit() else 0)) % _NUM_PORTS


def _checked(launch: Launch, rank_name: str, size_name: str) -> Launch:
    if not 0 <= launch.rank < launch.size:
        raise LaunchError(
            f"{rank_name}={launch.rank} does not fit {size_name}={launch.size}: ranks go from 0 to {launch.size - 1}."
        )
    return launch


def _text(env: Mapping[str, str], name: str, given: list[str]) -> str:
    value = env.get(name, "")
    if not value:
        others = ", ".join(f"{other}={env[other]}" for other in given)
        raise LaunchError(
            f"{name} is not set, although {others} is: the launcher's variables are half set. Start the script with "
            f"torchrun or srun, which set all of them, or set {name}; for one process, unset the others."
        )
    return value


def _number(env: Mapping[str, str], name: str, given: list[str]) -> int:
    text = _text(env, name, given)
    if not text.isdigit():
        raise LaunchError(f"{name}={text!r} must be a whole number of at least 0.")
    return int(text)
