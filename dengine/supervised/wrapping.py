"""Prepare model and optimizer for training: move them to the device and, over several ranks, wrap them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dengine.comm.collectives import broadcast_tensors
from dengine.comm.mesh import note_model
from dengine.comm.parts import parts_inside
from dengine.control.plane import plane
from dengine.distributed import prepare_model, unwrap_model, world
from dengine.dtensor import any_dtensor, describe_mesh, has_dimension
from dengine.launch.mesh import DATA_NAMES, SEQUENCE_NAMES
from dengine.parallel.ddp_buckets import build_buckets_early
from dengine.parallel.gradients import find_ddp, find_fsdp
from dengine.supervised.accelerator import distributed_kind
from dengine.supervised.deepspeed import check_clipping, check_precision, configured, is_engine, keep_states_out

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ["is_wrapped", "refuse_stage", "wrap", "wrap_model"]

_PLAIN = ("NO", "MULTI_CPU", "MULTI_GPU", "MULTI_XPU", "MULTI_MLU", "MULTI_NPU", "MULTI_HPU", "MULTI_MUSA")


def wrap(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    accelerator: "Accelerator",
    num_batches: int,
    max_grad_norm: float | None,
) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Wrap `model` and `optimizer`, unless they are: in DDP, or by accelerate if its configuration says FSDP or
    DeepSpeed.

    Every rank gets rank 0's parameters and buffers. DeepSpeed itself accumulates `num_batches` and clips to
    `max_grad_norm`.

    Collective: call on all ranks.

    Raises: ValueError: the configured way to spread models is not supported; DeepSpeed clips to another norm, or would
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
        if not accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:  # else it sends them itself
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
        broadcast_tensors(list(model.buffers()))  # it sends parameters itself
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

    Collective over several ranks, also if it is in DDP already: its buckets are built now.
    """
    if is_wrapped(model):
        note_model(model)
        if (ddp := find_ddp(model)) is not None:
            build_buckets_early(ddp)
        return model
    _refuse_replaced_parameters(model)
    return prepare_model(model)


def refuse_stage(model: nn.Module, what: str) -> None:
    """Refuse a stage of a pipeline, which cannot be called with a batch. Raises: ValueError."""
    bare = unwrap_model(model)
    if any(part is bare and has_dimension(mesh, "pp") for part, mesh in plane().prepared.living_parts()):
        raise ValueError(
            f"This {type(bare).__qualname__} is a stage of a pipeline, as prepare_model(parts='pp') was told, but "
            f"{what}() calls a whole model: give an Engine a step that runs the schedule of the pipeline."
        )


def _refuse_replaced_parameters(model: nn.Module) -> None:
    """Refuse to replace parameters that the optimizer has. Raises: ValueError."""
    if (mesh := world().mesh) is None:
        return
    sizes = zip(mesh.mesh_dim_names or (), mesh.shape, strict=True)
    names = [name for name, size in sizes if size > 1 and name in (*DATA_NAMES, *SEQUENCE_NAMES)]
    if "dp_shard" in names or (names and (any_dtensor(model.parameters()) or parts_inside(model))):
        raise ValueError(
            f"On {describe_mesh(mesh)} prepare_model() puts other parameters in the place of those of this "
            f"{type(model).__qualname__}, which the optimizer has: call it yourself, and build the optimizer from the "
            "parameters of what it gives."
        )


def is_wrapped(model: nn.Module) -> bool:
    is_accelerates = getattr(model, "_is_accelerate_prepared", False)
    return bool(is_accelerates) or find_ddp(model) is not None or find_fsdp(model) is not None
