"""Model and optimizer as they are trained: on their device and, over several ranks, wrapped."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dengine.comm.collectives import broadcast_tensors
from dengine.comm.mesh import spreads_model
from dengine.distributed import prepare_model
from dengine.parallel.ddp_buckets import settle_buckets
from dengine.parallel.gradients import find_ddp, find_fsdp
from dengine.supervised.accelerator import distributed_kind
from dengine.supervised.deepspeed import check_clipping, check_precision, configured, is_engine, keep_states_out

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["is_wrapped", "wrap", "wrap_model"]

_PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_MLU", "MULTI_NPU", "MULTI_HPU", "MULTI_MUSA")


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: "Accelerator",
    num_batches: int,
    max_grad_norm: float | None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """`model` and `optimizer`, wrapped if they are not: by `prepare_model`, or by accelerate if its configuration says
    FSDP or DeepSpeed.

    Every rank gets rank 0's parameters and buffers. DeepSpeed accumulates `num_batches` and clips to `max_grad_norm` by
    itself.

    Collective: call on all ranks.

    Raises: ValueError: a way of spreading models that is not supported; DeepSpeed clips to another norm, or would
        train in fp16 without scaling the loss.
    """
    kind = distributed_kind(accelerator)
    if kind in ("FSDP", "DEEPSPEED"):
        is_ready = is_wrapped(model) or is_engine(model)
        if is_ready:
            _refuse_other_wrapper(model, kind)
        if kind == "DEEPSPEED":
            return _wrap_with_deepspeed(model, optimizer, accelerator, num_batches, max_grad_norm, is_ready=is_ready)
        if is_ready:
            return model, optimizer
        if not accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:  # which sends them itself
            broadcast_tensors([*model.parameters(), *model.buffers()])
        return accelerator.prepare(model, optimizer)  # type: ignore[no-any-return]
    if kind not in _PLAIN:
        raise ValueError(f"Accelerate's distributed type {kind} is not supported: use DDP, FSDP or DeepSpeed.")
    return wrap_model(model, accelerator), optimizer


def _wrap_with_deepspeed(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: "Accelerator",
    num_batches: int,
    max_grad_norm: float | None,
    *,
    is_ready: bool,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    check_precision(accelerator)
    engine: Any = model
    stepped = optimizer
    if is_ready:
        check_clipping(max_grad_norm, engine.gradient_clipping())
    else:
        broadcast_tensors(list(model.buffers()))  # parameters it sends itself
        with configured(accelerator, num_batches, max_grad_norm):
            engine, stepped = accelerator.prepare(model, optimizer)
    keep_states_out(engine, optimizer, accelerator)
    return engine, stepped


def _refuse_other_wrapper(model: nn.Module, kind: str) -> None:
    if (kind == "DEEPSPEED") != is_engine(model) or find_ddp(model) is not None:
        raise ValueError(
            f"accelerate is configured for {kind}, but this model is a {type(model).__qualname__}: pass the bare "
            "model, without prepare_model()."
        )


def wrap_model(model: nn.Module, accelerator: "Accelerator") -> nn.Module:
    """`model` on its device; over several ranks in DDP, unless it is wrapped already.

    Collective over several ranks, also if it is in DDP already: that has its buckets built now.
    """
    if is_wrapped(model):
        spreads_model(model)
        if (ddp := find_ddp(model)) is not None:
            settle_buckets(ddp)
        return model
    return prepare_model(model)


def is_wrapped(model: nn.Module) -> bool:
    is_accelerates = getattr(model, "_is_accelerate_prepared", False)
    return bool(is_accelerates) or find_ddp(model) is not None or find_fsdp(model) is not None
