"""Spread a model over ranks in place: by a plan of tensor parallelism, by FSDP2, and with its first weights."""

from functools import partial
from typing import Any, cast

import torch
from torch import nn

from dengine import torch_internals
from dengine.comm.collectives import broadcast_each
from dengine.comm.parts import named_modules_beside_parts, named_parameters_beside_parts, parts_inside
from dengine.dtensor import any_dtensor, as_fsdp, is_dtensor, local_part
from dengine.launch.world import world
from dengine.parallel.layout import Layout, TensorParallel, apply_plan
from dengine.parallel.undo import Before
from dengine.parallel.weights import Initialize, Kept, given_back, set_aside

__all__ = ["spread"]


def spread(
    model: nn.Module,
    layout: Layout,
    plan: TensorParallel | None,
    blocks: tuple[type[nn.Module], ...],
    options: dict[str, Any],
    init_fn: Initialize | None,
    before: Before,
    *,
    is_on_meta: bool,
) -> None:
    """Move `model` to this rank's device and, except for DDP, into its `layout`; `options` go to `fully_shard`.

    Args:
        before: its values are dropped before the tensors are freed one by one.
        is_on_meta: whether parts of the model on the meta device get their values now. Experts get theirs later, with
            the model around them, since their names are only known there.

    Collective, if the layout is over several ranks. Cost: see `prepare_model`.
    """
    device = world().device
    is_planned = plan is not None and layout.tp is not None
    own = [parameter for _, parameter in named_parameters_beside_parts(model)]
    is_tensor_parallel = is_planned or (layout.tp is not None and any_dtensor(own))
    is_cut = layout.strategy in ("fsdp", "replicate") or is_tensor_parallel or layout.is_of_experts
    if not is_cut and not is_on_meta:
        _take_whole(model, layout, device)
        return
    late = [part for part in parts_inside(model) if any(each.is_meta for each in part.parameters())]
    with torch.no_grad():
        kept = set_aside(model, only_meta=not is_cut)
        if not is_on_meta:
            kept = {place: value for place, value in kept.items() if not value.is_meta}
        if is_cut:
            _send_what_stays(model, layout)
        if plan is not None and layout.tp is not None:
            apply_plan(plan, model, layout.tp)
        if layout.strategy == "fsdp":
            _shard(model, layout, blocks, _for_new(options, kept))
        elif layout.strategy == "replicate":
            torch_internals.replicate(model, layout.data, _parameters_of_parts(model))
        seed = torch.tensor(torch.initial_seed() & (2**63 - 1))
        if is_on_meta:
            broadcast_each([seed])
        else:
            before.forget()  # no code of the user runs after this, and each tensor is freed once its part exists
        values = given_back(model, kept, device, int(seed), init_fn, on_host="offload_policy" in options)
        if is_cut:
            broadcast_each(values, within=layout.within)
        else:
            for _ in values:
                pass  # all ranks have made the same values
            _take_whole(model, layout, device)
    for experts in [model] if layout.is_of_experts else late if layout.strategy != "none" else []:
        _sum_over_copies(experts, layout.num_averaged)


def _take_whole(model: nn.Module, layout: Layout, device: torch.device) -> None:
    """Move a model that is not cut up to `device`, with the values of one rank along dimensions that DDP does not
    cover.
    """
    if any(each.is_meta for each in (*model.parameters(), *model.buffers())):
        cast("Any", model)._apply(lambda value: value if value.is_meta else value.to(device))
    else:
        model.to(device)
    if layout.beside_ddp:
        values = (value for value in (*model.parameters(), *model.buffers()) if not is_dtensor(value))
        broadcast_each(values, within=layout.beside_ddp)


def _sum_over_copies(experts: nn.Module, num_averaged: int) -> None:
    """Make the gradients of `experts` the sum over the ranks that have them, divided by `num_averaged`.

    The gradients of an expert without a token on a rank are zeros there, so that all ranks send the same number.
    """
    is_sharded = False
    for module in experts.modules():
        if (sharded := as_fsdp(module)) is not None:
            is_sharded = True
            sharded.set_reduce_scatter_unused_params(True)
            if torch_internals.is_replicated(module):  # a divisor of our own would be applied twice to float16
                factor = num_averaged / torch_internals.mesh_of_fsdp(module).size()
                sharded.set_all_reduce_hook(partial(_divide, by=factor))
            else:
                sharded.set_gradient_divide_factor(num_averaged)
                sharded.set_force_sum_reduction_for_comms(True)  # as Gloo cannot divide while it sums up
    for parameter in experts.parameters() if not is_sharded else ():
        if parameter.requires_grad and not parameter.is_meta:
            parameter.register_hook(lambda gradient: gradient / num_averaged)  # type: ignore[no-untyped-call]


def _divide(gradients: torch.Tensor, by: float) -> None:
    gradients.div_(by)


def _parameters_of_parts(model: nn.Module) -> set[nn.Parameter]:
    return {parameter for part in parts_inside(model) for parameter in part.parameters()}


def _send_what_stays(model: nn.Module, layout: Layout) -> None:
    """Send the tensors that are not set aside: those of other classes than torch's, or cut up over `tp` already."""
    modules = [module for _, module in named_modules_beside_parts(model)]
    staying = [value for _, value in named_parameters_beside_parts(model) if not value.is_meta]
    buffers = [value for module in modules for value in module.buffers(recurse=False)]
    cut = [local_part(value) for value in (*staying, *buffers) if is_dtensor(value) and not value.is_meta]
    broadcast_each(cut, within=layout.within_tp)
    broadcast_each([local_part(value) for value in staying if not is_dtensor(value)], within=layout.within)


def _for_new(options: dict[str, Any], kept: Kept) -> dict[str, Any]:
    """`options`, in which parameters are replaced by those that stand for `kept` now, also for functions of them."""
    pairs = [(module._parameters[name], before) for (module, name), before in kept.items()]
    stand_ins, originals = {id(before): new for new, before in pairs}, {id(new): before for new, before in pairs}
    replaced = dict(options)
    if ignored := options.get("ignored_params"):
        replaced["ignored_params"] = {stand_ins.get(id(each), each) for each in ignored}
    if (place := options.get("shard_placement_fn")) is not None:
        replaced["shard_placement_fn"] = lambda new: place(originals.get(id(new), new))
    return replaced


def _shard(model: nn.Module, layout: Layout, blocks: tuple[type[nn.Module], ...], options: dict[str, Any]) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # to import these two costs 0.3 s
    from torch.distributed.fsdp import fully_shard

    here = world()
    over = {**options, "mesh": layout.data or init_device_mesh(here.device.type, (here.size,))}
    if parts := _parameters_of_parts(model):
        over["ignored_params"] = parts.union(options.get("ignored_params") or ())
    for module in model.modules():
        if isinstance(module, blocks) and module is not model:
            fully_shard(module, **over)
    fully_shard(model, **over)
