"""Parse the values of SLURM's variables: lists of hosts, tasks on each node, steps that are a shell, GPUs.

`env.py` says which variables give this process its rank. Pure: reads a mapping only.
"""

import re
from collections.abc import Mapping
from itertools import product

from dengine.errors import LaunchError

__all__ = ["has_own_gpus", "host_names", "is_shell", "shell_of", "step_port", "tasks_per_node"]

# Outside the range from which kernels hand out ports to clients (32768 and up).
_FIRST_PORT, _NUM_PORTS = 10_000, 20_000
_FIRST_RESERVED_STEP = 0xFFFF_FFF0  # numbers of steps that srun did not start: a batch script, an interactive shell
_INTERACTIVE_STEP = 0xFFFF_FFFA
_PART_OF_NAME = re.compile(r"\[([^\[\]]*)\]")


def host_names(node_list: str) -> list[str]:
    """The hosts of a node list, in its order: `gpu[08-10,2],cpu1` gives gpu08, gpu09, gpu10, gpu2, cpu1.

    Raises: LaunchError: it is not such a list.
    """
    names: list[str] = []
    for part in re.findall(r"(?:\[[^\]]*\]|[^,\[\]])+", node_list):
        fixed, ranges = _PART_OF_NAME.sub("{}", part.strip()), _PART_OF_NAME.findall(part)
        names += [fixed.format(*numbers) for numbers in product(*(_numbers(each, node_list) for each in ranges))]
    if not names or node_list.count("[") != node_list.count("]"):
        raise LaunchError(f"{node_list!r} is no list of SLURM nodes such as node[01-03,07].")
    return names


def tasks_per_node(text: str) -> list[int]:
    """`4(x2),3`: two nodes of four tasks, then one of three.

    Raises: LaunchError: it is not such a list.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise LaunchError(
                f"SLURM's tasks per node (SLURM_STEP_TASKS_PER_NODE, else SLURM_TASKS_PER_NODE): {text!r} is no "
                "list of numbers of tasks such as 4(x2),3."
            )
        counts += [int(found[1])] * int(found[2] or 1)
    return counts


def is_shell(env: Mapping[str, str]) -> bool:
    """Whether this is the shell of an allocation, in which a plain `python` is one process.

    It has the number of task 0, and the number of tasks that were asked for, but nobody started the others.
    """
    step = env.get("SLURM_STEP_ID", "")
    if step.isdigit():
        return int(step) >= _FIRST_RESERVED_STEP
    return "SLURM_PROCID" not in env or env.get("ENVIRONMENT") == "BATCH"


def shell_of(env: Mapping[str, str]) -> str:
    """The name of the shell that this is, if `is_shell`."""
    step = env.get("SLURM_STEP_ID", "")
    if env.get("ENVIRONMENT") == "BATCH" and step != str(_INTERACTIVE_STEP):
        return "an sbatch script"
    return "salloc"


def step_port(job: int, step: str) -> int:
    """A port that is the same for all tasks of the step, and different for two steps of one job."""
    return _FIRST_PORT + (job * 7 + (int(step) if step.isdigit() else 0)) % _NUM_PORTS


def has_own_gpus(env: Mapping[str, str]) -> bool:
    """Whether each task sees only its own GPUs, so that they count from 0 in every task.

    That is so with `--gpus-per-task`, `--ntasks-per-gpu` and other bindings, but not with `--gpus-per-node` alone.
    """
    bound = env.get("SLURMD_TRES_BIND", "")
    if bound:
        return any(kind in bound for kind in ("per_task", "single", "map", "mask"))
    # Before SLURM 22.05. If nothing is bound, CUDA_VISIBLE_DEVICES is not set, or lists the GPUs of all tasks.
    shown = env.get("CUDA_VISIBLE_DEVICES", "")
    return shown != "" and env.get("SLURM_GPUS_PER_TASK", "") == str(len(shown.split(",")))


def _numbers(ranges: str, node_list: str) -> list[str]:
    """`08-10,2` gives 08, 09, 10 and 2: leading zeros are part of a name."""
    numbers: list[str] = []
    for each in ranges.split(","):
        found = re.fullmatch(r"(\d+)(?:-(\d+))?", each.strip())
        if found is None:
            raise LaunchError(f"{node_list!r} is no list of SLURM nodes such as node[01-03,07].")
        first, last = found[1], found[2] or found[1]
        numbers += [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    return numbers
