"""A model on its device and spread over the ranks, and the way back to the bare module."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from dengine import torch_internals
from dengine.comm.collectives import broadcast_tensors, collective
from dengine.comm.consistency import Compared, parameters_of, refuse_differences, same_on_all_ranks
from dengine.comm.mesh import check_mesh, refuse_laid_out, sources_of, spreads_model, spreads_part
from dengine.control.plane import plane
from dengine.launch.world import World, refuse_forgotten_group, world
from dengine.parallel.ddp_buckets import settle_buckets

__all__ = ["Compression", "Precision", "Strategy", "evaluating", "prepare_model", "unwrap_model"]

Strategy: TypeAlias = Literal["auto", "ddp", "fsdp", "none"]
Precision: TypeAlias = Literal["bf16", "fp16"]
Compression: TypeAlias = Literal["bf16", "fp16"]
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
_STRATEGIES = ("auto", "ddp", "fsdp", "none")


def prepare_model(
    model: nn.Module,
    strategy: Strategy = "auto",
    *,
    blocks: Iterable[type[nn.Module]] = (),
    mixed_precision: Precision | None = None,
    gradient_compression: Compression | None = None,
    activation_checkpointing: bool = False,
    compile: bool | Mapping[str, Any] = False,
    **kwargs: Any,
) -> nn.Module:
    """`model` on this rank's device, its gradients averaged over the ranks.

    Collective: call on all ranks. Every rank starts from rank 0's parameters and buffers. In a run of one process it
    is the plain module on its device, whatever the strategy.

    Args:
        strategy: "ddp" wraps in `DistributedDataParallel`; "fsdp" shards parameters, gradients and optimizer state
            in place by `fully_shard` (build the optimizer afterwards); "auto" is "ddp", or nothing for a model without
            a trainable parameter; "none" moves the model to the device only.
        blocks: module classes (a transformer's layer). With "fsdp" they are sharded one by one, so that only one of
            them is whole at a time; without them the model is gathered as one. They are what
            `activation_checkpointing` is about.
        mixed_precision: "bf16" or "fp16" has FSDP compute and gather in that type and reduce gradients in float32 (a
            `MixedPrecisionPolicy` of your own goes into `mp_policy=`). With DDP that is autocast's business:
            `create_supervised_trainer(mixed_precision=)`.
        gradient_compression: "bf16" or "fp16" has DDP send gradients in that type (its hook of that name).
        activation_checkpointing: keep only the inputs of each of `blocks` and compute the rest anew when gradients are.
        compile: compile the model's forward and backward by `torch.compile`, with options where a mapping is given. In
            place: neither the model's class nor its names change, in checkpoints or elsewhere.
        **kwargs: go to `DistributedDataParallel` (`static_graph`, `gradient_as_bucket_view`, ...) or `fully_shard`.
            With `mesh=` of some of the ranks, they start from the first rank of that mesh.

    Raises:
        TypeError: `model` is no module. ValueError: an unknown strategy; options that the strategy does not take; a
            model wrapped already, or laid out over a mesh (parameters that are DTensors), which only strategy="none"
            takes; compression that the backend cannot send.
        ConsistencyError: names, shapes or types of the parameters differ between ranks.

    Cost: one small all-reduce; one broadcast of parameters and buffers; with "ddp", one all-reduce of zeros as large as
        the gradients, so that a resumed run adds them up in the same order as one that was never interrupted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare_model() takes a torch.nn.Module, but got {type(model).__qualname__}.")
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(_STRATEGIES)}.")
    blocks = tuple(blocks)
    if unwrap_model(model) is not model and isinstance(model, DistributedDataParallel):
        raise ValueError("This model is wrapped in DistributedDataParallel already: pass the bare module.")
    refuse_forgotten_group("prepare_model()")
    here = world()
    _check_options(strategy, blocks, mixed_precision, gradient_compression, activation_checkpointing, kwargs)
    if gradient_compression == "bf16" and here.size > 1 and not _sends_bf16(here):
        raise ValueError(
            f"gradient_compression='bf16' needs NCCL, but the backend is {here.backend!r}: 'fp16' can be sent by Gloo."
        )
    if here.size > 1:
        _check_layout(model, strategy, kwargs, here)
    if activation_checkpointing:
        _checkpoint_blocks(model, blocks)
    model = model.to(here.device)
    if compile:
        _compile(model, compile if isinstance(compile, Mapping) else {})
    if here.size > 1:
        # DDP would say that they differ, but neither which ones nor on which rank.
        entries = parameters_of(model)
        if not same_on_all_ranks(entries, "the comparison of models in prepare_model()"):
            refuse_differences([Compared("The parameters of the model", entries)])
        plane().prepared.add_model(model)
        spreads_model(model)
    if here.size == 1 or strategy == "none":
        return model
    if strategy == "fsdp":
        if mixed_precision is not None:
            kwargs["mp_policy"] = _policy(mixed_precision)
        return _sharded(model, here, blocks, kwargs)
    if strategy == "auto" and not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    device_ids = None if here.device.type == "cpu" else [here.device]
    with collective("the wrapping in DistributedDataParallel by prepare_model()"):
        wrapped = DistributedDataParallel(model, device_ids=device_ids, **kwargs)
        settle_buckets(wrapped)
    if gradient_compression is not None:
        wrapped.register_comm_hook(None, _hook(gradient_compression))
    return wrapped


def _compile(model: nn.Module, options: Mapping[str, Any]) -> None:
    if not type(model).forward.__module__.startswith("torch.nn."):
        model.compile(**options)
        return
    torch_internals.compiles_own_call(model, **options)  # else left as it is, in silence


def unwrap_model(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP and `torch.compile`; a model that is not wrapped comes back as it is."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif (inner := torch_internals.inside_compile(model)) is not model and isinstance(inner, nn.Module):
            model = inner
        else:
            return model


@contextmanager
def evaluating(model: nn.Module) -> Iterator[nn.Module]:
    """The bare module in eval mode with rank 0's buffers: the way to evaluate over shards of different length.

    DDP's own forward broadcasts buffers in every batch, under `eval()` too, which hangs where a rank has fewer batches;
    and batch-norm statistics differ between ranks after a training step, so that each would judge with its own.
    An engine's step is written before `with` gives the bare module: there, `unwrap_model(model)` is the same one.
    On the way out, also by an exception, every module is in the mode it was in, and each rank has its own buffers back.

    Collective: enter it on all ranks, once per evaluation. Cost: one broadcast of the buffers per dtype; their copy.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> with evaluating(net) as bare, torch.no_grad():
        ...     bare(torch.zeros(3, 2)).shape
        torch.Size([3, 1])
    """
    bare = unwrap_model(model)
    modes = {module: module.training for module in (model, *model.modules())}
    buffers = list(bare.buffers())
    own = [buffer.detach().clone() for buffer in buffers] if world().rank != 0 else []
    broadcast_tensors(buffers)
    for module in (model, bare):  # the wrapper has a mode of its own
        module.eval()
    try:
        yield bare
    finally:
        for module, mode in modes.items():
            module.training = mode
        for buffer, value in zip(buffers, own, strict=False):
            buffer.detach().copy_(value)


def _checkpoint_blocks(model: nn.Module, blocks: tuple[type[nn.Module], ...]) -> None:
    """Have each module of `blocks` in `model` compute its activations anew in the backward pass. In place, once.

    The forward of each is wrapped, not the module: its name and its parameters' names stay.

    Raises: ValueError: there is no such module.
    """
    found = [module for module in model.modules() if isinstance(module, blocks)]
    if not found:
        names = ", ".join(block.__name__ for block in blocks)
        raise ValueError(
            f"There is no {names} in this {type(model).__qualname__}: blocks= names the classes of layers."
        )
    for module in found:
        if not isinstance(module.forward, partial):
            # Through the instance: assigned to the class, it would hold for other models too.
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)


def _check_options(
    strategy: str,
    blocks: tuple[type[nn.Module], ...],
    mixed_precision: str | None,
    gradient_compression: str | None,
    activation_checkpointing: bool,
    kwargs: Mapping[str, Any],
) -> None:
    for name, value in (("mixed_precision", mixed_precision), ("gradient_compression", gradient_compression)):
        if value not in (None, "bf16", "fp16"):
            raise ValueError(f"{name}={value!r} must be 'bf16', 'fp16' or None.")
    if activation_checkpointing and not blocks:
        raise ValueError("activation_checkpointing=True needs blocks=, the classes of the layers that it is about.")
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
        raise ValueError("mixed_precision= and mp_policy= say the same thing: give one of them.")


def _check_layout(model: nn.Module, strategy: str, kwargs: Mapping[str, Any], here: World) -> None:
    """Raises: ValueError, TypeError: the model is laid out over a mesh already, or the given mesh is not for it."""
    if strategy == "none":
        return
    if strategy != "fsdp" and "mesh" in kwargs:
        raise ValueError(
            f"mesh= is what strategy='fsdp' shards over; strategy={strategy!r} takes device_mesh= of one dimension."
        )
    if strategy == "fsdp" or any(parameter.requires_grad for parameter in model.parameters()):
        refuse_laid_out(model, strategy)
    if (mesh := kwargs.get("mesh", kwargs.get("device_mesh"))) is not None:
        check_mesh(mesh)
        spreads_part("mesh=" if "mesh" in kwargs else "device_mesh=", mesh.size(), here)
    elif (group := kwargs.get("process_group")) is not None:
        spreads_part("process_group=", group.size(), here)


def _sends_bf16(here: World) -> bool:
    return here.device.type != "cpu" and "nccl" in here.backend


def _policy(mixed_precision: Precision) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    return MixedPrecisionPolicy(param_dtype=_DTYPES[mixed_precision], reduce_dtype=torch.float32)


def _hook(compression: Compression) -> Any:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    return default_hooks.bf16_compress_hook if compression == "bf16" else default_hooks.fp16_compress_hook


def _sharded(model: nn.Module, here: World, blocks: tuple[type[nn.Module], ...], kwargs: dict[str, Any]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh  # these two cost 0.3 s to import
    from torch.distributed.fsdp import fully_shard

    mesh = kwargs.get("mesh")
    # fully_shard cuts up what each rank has: without this, ranks seeded differently would train a mixture. What other
    # ranks have than those of the mesh is their own, if it is of some of the ranks only.
    within = None if mesh is None or mesh.size() == here.size else sources_of(mesh)
    with torch.no_grad():
        broadcast_tensors([*model.parameters(), *model.buffers()], within=within)
    options = {**kwargs, "mesh": init_device_mesh(here.device.type, (here.size,)) if mesh is None else mesh}
    for module in model.modules():
        if isinstance(module, blocks) and module is not model:
            fully_shard(module, **options)
    fully_shard(model, **options)
    return model
