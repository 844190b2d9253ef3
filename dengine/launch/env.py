"""Read the launcher's variables: torchrun's, SLURM's, or none. Pure: reads a mapping only."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from dengine.errors import LaunchError
from dengine.launch.slurm import has_own_gpus, host_names, is_shell, shell_of, step_port, tasks_per_node

__all__ = ["Choice", "Launch", "choose_launch", "find_launch", "is_agents_store", "shared_start"]


@dataclass(frozen=True)
class Launch:
    """One process as its launcher started it.

    `has_own_gpus`: the process sees only its own GPUs, so its local rank is not the index of a GPU.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    node_rank: int
    master_addr: str
    master_port: int
    has_own_gpus: bool = False

    @property
    def device_index(self) -> int:
        return 0 if self.has_own_gpus else self.local_rank


class Choice(NamedTuple):
    """The launch that the variables describe (None: one process), and why that one was chosen."""

    launch: Launch | None
    reason: str


def find_launch(env: Mapping[str, str]) -> Launch | None:
    """The launch that `env` describes, or None in a process that nobody launched.

    torchrun's variables win over SLURM's: torchrun may itself run inside a SLURM task.

    Raises:
        LaunchError: variables are incomplete or not numbers, or the launcher is not supported.
    """
    choice = choose_launch(env)
    if choice.launch is None and (started := _by_another_launcher(env)) is not None:
        launcher, advice = started
        raise LaunchError(
            f"{launcher} started several processes, but neither RANK nor WORLD_SIZE is set, so that each of them would "
            f"be a world of one: {advice}."
        )
    return choice.launch


def shared_start(env: Mapping[str, str]) -> str | None:
    """A sentence that says who started this process with others, and as which rank; None if it is alone."""
    try:
        launch = find_launch(env)
    except LaunchError:  # incomplete: process_group() says what is missing
        if (started := _by_another_launcher(env)) is not None:
            return f"{started[0]} started this process together with others"
        rank, size = env.get("RANK", ""), env.get("WORLD_SIZE", "")
        if rank.isdigit() and size.isdigit() and int(size) > 1:
            return f"This process was started as rank {rank} of {size} (by RANK and WORLD_SIZE)"
        return None
    if launch is None or launch.size == 1:
        return None
    launcher = "srun" if launch.launcher == "slurm" else "torchrun"
    if launcher == "torchrun" and "TORCHELASTIC_RUN_ID" not in env:
        return f"This process was started as rank {launch.rank} of {launch.size} (by RANK and WORLD_SIZE)"
    return f"{launcher} started this process as rank {launch.rank} of {launch.size}"


def is_agents_store(env: Mapping[str, str]) -> bool:
    """Whether torchrun's agent hosts the store, and not rank 0."""
    return env.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def choose_launch(env: Mapping[str, str]) -> Choice:
    """The launch as `find_launch` gives it, with the reason. A launcher that is not supported counts as none.

    Raises: LaunchError: variables are incomplete or not numbers.
    """
    if "RANK" in env or "WORLD_SIZE" in env:
        by = "torchrun set RANK and WORLD_SIZE" if "TORCHELASTIC_RUN_ID" in env else "RANK and WORLD_SIZE are set"
        suffix = "; they win over SLURM's, which are set too" if "SLURM_JOB_ID" in env else ""
        return Choice(_from_torchrun(env), by + suffix)
    if "SLURM_PROCID" in env or "SLURM_JOB_ID" in env:
        return _choose_in_slurm(env)
    if "LOCAL_RANK" in env:
        _text(env, "RANK", ["LOCAL_RANK"])
    return Choice(None, "neither torchrun nor srun set any variables")


def _by_another_launcher(env: Mapping[str, str]) -> tuple[str, str] | None:
    """An unsupported launcher that started several processes, and what to do about it; None if there is none."""
    if _is_above_one(env, "SUBMITIT_LOCAL_NTASKS"):
        export = "call submitit.helpers.TorchDistributedEnvironment().export() before process_group()"
        return "submitit's local executor", export
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"):
        if _is_above_one(env, name):
            return (
                f"mpirun ({name}={env[name]})",
                "start the script with torchrun or srun, or set these and MASTER_ADDR",
            )
    return None


def _is_above_one(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").isdigit() and int(env[name]) > 1


def _choose_in_slurm(env: Mapping[str, str]) -> Choice:
    if is_shell(env):
        return Choice(None, f"the shell of {shell_of(env)} is one process: srun starts ranks")
    launch = _from_slurm(env)
    step = f"{env.get('SLURM_JOB_ID', '?')}.{env.get('SLURM_STEP_ID', '?')}"
    if launch is None:
        return Choice(None, f"srun started one task (step {step})")
    return Choice(launch, f"srun started {launch.size} tasks (step {step})")


def _from_torchrun(env: Mapping[str, str]) -> Launch:
    given = [name for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if env.get(name)]
    rank, size = (_number(env, name, given) for name in ("RANK", "WORLD_SIZE"))
    # These may be missing if the user started the ranks himself: then there is one node.
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
        _port(env, given),
    )
    return _checked(launch, "RANK", "WORLD_SIZE")


def _from_slurm(env: Mapping[str, str]) -> Launch | None:
    given = [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS") if env.get(name)]
    # The step's own number of tasks, if there is one: a job's may be larger.
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
        env.get("MASTER_ADDR") or host_names(_text(env, nodes, given))[0],
        _port(env, given)
        if "MASTER_PORT" in env
        else step_port(_number(env, "SLURM_JOB_ID", given), env.get("SLURM_STEP_ID", "0")),
        has_own_gpus(env),
    )
    return _checked(launch, "SLURM_PROCID", size_name)


def _tasks_on_node(env: Mapping[str, str], node_rank: int, size: int) -> int:
    per_node = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_TASKS_PER_NODE") or str(size))
    return per_node[node_rank] if node_rank < len(per_node) else size


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


def _port(env: Mapping[str, str], given: list[str]) -> int:
    port = _number(env, "MASTER_PORT", given)
    if not 0 < port < 2**16:
        raise LaunchError(f"MASTER_PORT={port} is no port: they go from 1 to 65535.")
    return port
