"""Make an `Accelerator` that agrees with `distributed.world()` about the ranks."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dengine.distributed import World, world
from dengine.errors import LaunchError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["accelerator_for", "distributed_kind"]

_PRECISIONS = (None, "no", "fp16", "bf16", "fp8")
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def accelerator_for(given: "Accelerator | None", mixed_precision: str | None) -> "Accelerator":
    """`given`, or a new one for this rank, checked against the world.

    Never communicates: inside a process group accelerate uses that group.

    Raises:
        ImportError: accelerate is not installed. TypeError: `given` is no Accelerator.
        ValueError: an unknown precision, or not that of `given` or of an earlier Accelerator of this process;
            DeepSpeed or FSDP is configured, but accelerate does not use it here.
        LaunchError: accelerate finds other ranks than there are.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise ImportError(
            'Supervised trainers and evaluators need accelerate: pip install "dengine[accelerate]".'
        ) from error
    if mixed_precision not in _PRECISIONS:
        raise ValueError(f"mixed_precision={mixed_precision!r} must be one of {', '.join(map(repr, _PRECISIONS))}.")
    here = world()
    if mixed_precision == "fp16" and here.device.type == "cpu":
        raise ValueError("mixed_precision='fp16' needs a GPU: use 'bf16' on the CPU.")
    if given is None:
        accelerator = _made(Accelerator, here, mixed_precision)
    elif not isinstance(given, Accelerator):
        raise TypeError(f"accelerator= takes an accelerate.Accelerator, but got {given!r}.")
    else:
        accelerator = given
    has = accelerator.mixed_precision
    if mixed_precision not in (None, has):
        whose = "that this process made before" if given is None else "you gave"
        raise ValueError(
            f"mixed_precision={mixed_precision!r}, but the Accelerator {whose} has {has!r}, and accelerate knows one "
            "precision a process: give it there only."
        )
    _check_ranks(accelerator, here)
    _check_kind(accelerator, here)
    return accelerator


def distributed_kind(accelerator: "Accelerator") -> str:
    """accelerate's name for the way in which models are spread: "NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED",
    ...
    """
    return str(accelerator.distributed_type.name)


def _made(kind: "type[Accelerator]", here: World, mixed_precision: str | None) -> "Accelerator":
    from accelerate import PartialState

    with _launch_variables(here):
        # Without cpu=True accelerate takes a machine without a GPU for one process, whatever the launcher says. Its
        # Accelerator, given the same, would leave DeepSpeed out.
        PartialState(cpu=here.device.type == "cpu")
        try:
            return kind(mixed_precision=mixed_precision, step_scheduler_with_optimizer=False)
        except ValueError as error:
            if "already been initialized" not in str(error):
                raise
            raise ValueError(
                f"mixed_precision={mixed_precision!r} differs from that of an Accelerator that this process made "
                "before, and accelerate knows one precision a process: pass it to the first trainer or evaluator. "
                f"accelerate says: {error}"
            ) from error


@contextmanager
def _launch_variables(here: World) -> Iterator[None]:
    """Set torchrun's variables for this launch inside the block: accelerate reads them, but none of SLURM's."""
    before = {name: os.environ.get(name) for name in _VARIABLES}
    if here.size > 1:
        launch = {
            "RANK": here.rank,
            "WORLD_SIZE": here.size,
            "LOCAL_RANK": here.local_rank,
            "LOCAL_WORLD_SIZE": here.local_size,
        }
        os.environ.update({name: str(value) for name, value in launch.items()})
        # Only a check reads it: the group exists.
        os.environ.setdefault("MASTER_ADDR", "localhost")
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _check_ranks(accelerator: "Accelerator", here: World) -> None:
    theirs = (accelerator.process_index, accelerator.num_processes)
    if theirs != (here.rank, here.size):
        raise LaunchError(
            f"accelerate takes this process for rank {theirs[0]} of {theirs[1]}, but it is rank {here.rank} of "
            f"{here.size}. Open distributed.process_group() before any Accelerator is made, and leave accelerator= "
            "out; an Accelerator of your own on a machine without a GPU takes cpu=True, and under srun none can be "
            "made before process_group()."
        )
    if accelerator.device.type != here.device.type:
        raise LaunchError(
            f"accelerate computes on {accelerator.device}, but this rank's device is {here.device}: make the "
            f"Accelerator with cpu={here.device.type == 'cpu'}."
        )


def _check_kind(accelerator: "Accelerator", here: World) -> None:
    """Refuse a configuration that accelerate would silently ignore here."""
    kind = distributed_kind(accelerator)
    if kind != "DEEPSPEED" and _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            f"accelerate is configured for DeepSpeed, but this Accelerator is of the kind {kind}: leave accelerator= "
            "out, or make it without cpu=True, after process_group() and, without a GPU, after "
            "accelerate.PartialState(cpu=True)."
        )
    if kind == "FSDP" and not getattr(accelerator, "is_fsdp2", False):
        raise ValueError(
            "accelerate is configured for the first version of FSDP, whose models cannot be evaluated and saved as "
            "they are: say fsdp_version: 2 in its configuration, or FSDP_VERSION=2 in the environment."
        )
    if kind not in ("FSDP", "NO") and _is_set("ACCELERATE_USE_FSDP"):  # NO: one process, which shards nothing
        raise ValueError(
            f"accelerate is configured for FSDP, which it uses on GPUs only; this Accelerator is of the kind {kind}. "
            'Leave FSDP out of its configuration: distributed.prepare_model(model, strategy="fsdp") shards on any '
            "device."
        )


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"
