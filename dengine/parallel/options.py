"""Check the options of `prepare_model()`, and translate them for torch."""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dengine import torch_internals
from dengine.launch.world import World

__all__ = [
    "Compression",
    "Precision",
    "Strategy",
    "check_blocks",
    "check_ddp_options",
    "check_options",
    "checkpoint_blocks",
    "compile_model",
    "compression_hook",
    "fsdp_options",
    "refuse_unsendable",
]

Strategy: TypeAlias = Literal["auto", "ddp", "fsdp", "none"]
Precision: TypeAlias = Literal["bf16", "fp16"]
Compression: TypeAlias = Literal["bf16", "fp16"]
_STRATEGIES = ("auto", "ddp", "fsdp", "none")
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def check_options(
    strategy: str,
    blocks: tuple[type[nn.Module], ...],
    mixed_precision: str | None,
    gradient_compression: str | None,
    activation_checkpointing: bool,
    parts: str | None,
    kwargs: Mapping[str, Any],
) -> None:
    """Check the options. Raises: ValueError: an option is unknown, or does not fit the strategy."""
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(_STRATEGIES)}.")
    if parts not in (None, "pp", "ep"):
        raise ValueError(
            f"parts={parts!r} must be 'pp', the dimension of a pipeline's stages, 'ep', that of experts, or None."
        )
    for name, value in (("mixed_precision", mixed_precision), ("gradient_compression", gradient_compression)):
        if value not in (None, "bf16", "fp16"):
            raise ValueError(f"{name}={value!r} must be 'bf16', 'fp16' or None.")
    if activation_checkpointing and not blocks:
        raise ValueError("activation_checkpointing=True needs blocks=, the classes of the layers to checkpoint.")
    if blocks and strategy != "fsdp" and not activation_checkpointing:
        raise ValueError(f"blocks= says what strategy='fsdp' shards one by one; strategy={strategy!r} takes none.")
    if mixed_precision is not None and strategy != "fsdp":
        raise ValueError(
            f"mixed_precision= is a policy of strategy='fsdp'; with strategy={strategy!r} it belongs to "
            "create_supervised_trainer(), or to torch.autocast."
        )
    if gradient_compression is not None and strategy not in ("auto", "ddp"):
        raise ValueError(f"gradient_compression= is DDP's; strategy={strategy!r} takes none.")
    if kwargs and strategy == "none":
        raise ValueError(f"strategy='none' takes no options, but got {', '.join(sorted(kwargs))}.")
    if "mp_policy" in kwargs and mixed_precision is not None:
        raise ValueError("mixed_precision= and mp_policy= mean the same: give one of them.")


def check_blocks(model: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
    """Check `blocks`. Raises: ValueError: no module in `model` is of these classes."""
    if not any(isinstance(module, blocks) for module in model.modules()):
        names = ", ".join(block.__name__ for block in blocks)
        raise ValueError(
            f"There is no {names} in this {type(model).__qualname__}: blocks= names the classes of layers."
        )


def checkpoint_blocks(model: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
    """Make each module of `blocks` in `model` compute its activations again in the backward pass. In place, once.

    The forward of each is wrapped, not the module: its name and its parameters' names stay.
    """
    for module in model.modules():
        if isinstance(module, blocks) and not isinstance(module.forward, partial):
            # Set on the instance: on the class, it would hold for other models, too.
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def compile_model(model: nn.Module, options: Mapping[str, Any]) -> None:
    if not type(model).forward.__module__.startswith("torch.nn."):
        model.compile(**options)
        return
    torch_internals.compiles_own_call(model, **options)  # else torch would silently not compile it


def refuse_unsendable(compression: Compression | None, here: World) -> None:
    """Refuse a compression that the backend cannot send. Raises: ValueError."""
    if compression == "bf16" and (here.device.type == "cpu" or "nccl" not in here.backend):
        raise ValueError(
            f"gradient_compression='bf16' needs NCCL, but the backend is {here.backend!r}: 'fp16' can be sent by Gloo."
        )


def fsdp_options(kwargs: Mapping[str, Any], mixed_precision: Precision | None, here: World) -> dict[str, Any]:
    """The options of `fully_shard` besides the mesh.

    Raises: TypeError: it does not know one of `kwargs`.
    """
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    _refuse_unknown(kwargs, fully_shard)
    options = {name: value for name, value in kwargs.items() if name != "mesh"}
    if mixed_precision is not None:
        options["mp_policy"] = MixedPrecisionPolicy(_DTYPES[mixed_precision], reduce_dtype=torch.float32)
    if here.device.type == "cpu" and isinstance(options.get("offload_policy"), CPUOffloadPolicy):
        del options["offload_policy"]  # the parameters exist already, and torch would need a GPU for pinned memory
    return options


def check_ddp_options(kwargs: Mapping[str, Any]) -> None:
    """Raises: TypeError: `DistributedDataParallel` does not know one of `kwargs`."""
    _refuse_unknown(kwargs, DistributedDataParallel)


def _refuse_unknown(kwargs: Mapping[str, Any], taken_by: Callable[..., object]) -> None:
    known = signature(taken_by).parameters.keys() - {"module"}
    if unknown := sorted(kwargs.keys() - known):
        options = ", ".join(sorted(known))
        raise TypeError(f"{taken_by.__name__}() takes no {', '.join(unknown)}: its options are {options}.")


def compression_hook(compression: Compression) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return default_hooks.bf16_compress_hook if compression == "bf16" else default_hooks.fp16_compress_hook
