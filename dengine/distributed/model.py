"""A model on its device and spread over the ranks, and the way back to the bare module."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dengine.distributed.buckets import settle_buckets
from dengine.distributed.collectives import broadcast_tensors
from dengine.distributed.consistency import parameters_of, refuse_difference, same_on_all_ranks
from dengine.distributed.control import Control
from dengine.distributed.world import World, control, world

__all__ = ["Strategy", "evaluating", "prepare_model", "unwrap_model"]

Strategy: TypeAlias = Literal["auto", "ddp", "fsdp", "none"]
_STRATEGIES = ("auto", "ddp", "fsdp", "none")


def prepare_model(
    model: nn.Module, strategy: Strategy = "auto", *, blocks: Iterable[type[nn.Module]] = (), **kwargs: Any
) -> nn.Module:
    """`model` on this rank's device, its gradients averaged over the ranks.

    Collective: call on all ranks. Every rank starts from rank 0's parameters and buffers. In a run of one process it
    is the plain module on its device, whatever the strategy.

    Args:
        strategy: "ddp" wraps in `DistributedDataParallel`; "fsdp" shards parameters, gradients and optimizer state
            in place by `fully_shard` (build the optimizer afterwards); "auto" is "ddp", or nothing for a model without
            a trainable parameter; "none" moves the model to the device only.
        blocks: with "fsdp", the module classes that are sharded one by one (a transformer's layer), so that only one
            of them is whole at a time; without them the model is gathered as one.
        **kwargs: go to `DistributedDataParallel` or `fully_shard`.

    Raises:
        TypeError: `model` is no module. ValueError: an unknown strategy; options that the strategy does not take; a
            model wrapped already.
        ConsistencyError: names, shapes or types of the parameters differ between ranks.

    Cost: one small all-reduce; one broadcast of parameters and buffers; with "ddp", one all-reduce of zeros as large as
        the gradients, so that a resumed run adds them up in the same order as one that was never interrupted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare_model() takes a torch.nn.Module, but got {type(model).__qualname__}.")
    if strategy not in _STRATEGIES:
        raise ValueError(f"strategy={strategy!r} must be one of {', '.join(_STRATEGIES)}.")
    blocks = tuple(blocks)
    if blocks and strategy != "fsdp":
        raise ValueError(f"blocks= says what strategy='fsdp' shards one by one; strategy={strategy!r} takes none.")
    if kwargs and strategy == "none":
        raise ValueError(f"strategy='none' takes no options, but got {', '.join(sorted(kwargs))}.")
    if unwrap_model(model) is not model and isinstance(model, DistributedDataParallel):
        raise ValueError("This model is wrapped in DistributedDataParallel already: pass the bare module.")
    here = world()
    model = model.to(here.device)
    if here.size > 1:
        # DDP would say that they differ, but neither which ones nor on which rank.
        entries = parameters_of(model)
        if not same_on_all_ranks(entries):
            refuse_difference(entries, "The parameters of the model")
        if isinstance(plane := control(), Control):
            plane.add_model(model)
    if here.size == 1 or strategy == "none":
        return model
    if strategy == "fsdp":
        return _sharded(model, here, blocks, kwargs)
    if strategy == "auto" and not any(parameter.requires_grad for parameter in model.parameters()):
        return model
    wrapped = DistributedDataParallel(model, device_ids=None if here.device.type == "cpu" else [here.device], **kwargs)
    settle_buckets(wrapped)
    return wrapped


def unwrap_model(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP and `torch.compile`; a model that is not wrapped comes back as it is."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's wrapper
            model = model._orig_mod  # type: ignore[assignment]
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


def _sharded(model: nn.Module, here: World, blocks: tuple[type[nn.Module], ...], kwargs: dict[str, Any]) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh  # these two cost 0.3 s to import
    from torch.distributed.fsdp import fully_shard

    # fully_shard cuts up what each rank has: without this, ranks seeded differently would train a mixture.
    with torch.no_grad():
        broadcast_tensors([*model.parameters(), *model.buffers()])
    options = {"mesh": init_device_mesh(here.device.type, (here.size,)), **kwargs}
    for module in model.modules():
        if isinstance(module, blocks) and module is not model:
            fully_shard(module, **options)
    fully_shard(model, **options)
    return model
