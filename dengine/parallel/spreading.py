"""What makes a model one over ranks, in place: a plan of tensor parallelism, FSDP2, and the weights to begin with."""

from typing import Any

import torch
from torch import nn

from dengine import torch_internals
from dengine.comm.collectives import broadcast_each
from dengine.dtensor import any_dtensor, is_dtensor, local_part
from dengine.launch.world import world
from dengine.parallel.layout import Layout, TensorParallel, apply_plan
from dengine.parallel.weights import Initialize, Kept, given_back, set_aside

__all__ = ["spread"]


def spread(
    model: nn.Module,
    layout: Layout,
    plan: TensorParallel | None,
    blocks: tuple[type[nn.Module], ...],
    options: dict[str, Any],
    init_fn: Initialize | None,
    *,
    is_on_meta: bool,
) -> None:
    """Bring `model` onto this rank's device and, but for DDP, into its `layout`; `options` go to `fully_shard`.

    Collective, if the layout is over several ranks. Cost: see `prepare_model`.
    """
    device = world().device
    is_planned = plan is not None and layout.tp is not None
    is_tensor_parallel = is_planned or (layout.tp is not None and any_dtensor(model.parameters()))
    is_cut = layout.strategy == "fsdp" or is_tensor_parallel
    if not is_cut and not is_on_meta:
        _take_whole(model, layout, device)
        return
    with torch.no_grad():
        kept = set_aside(model, only_meta=not is_cut)
        if is_cut:
            _send_what_stays(model, layout)
        if plan is not None and layout.tp is not None:
            apply_plan(plan, model, layout.tp)
        if layout.strategy == "fsdp":
            _shard(model, layout, blocks, _for_new(options, kept))
        elif is_tensor_parallel and layout.strategy == "ddp":
            torch_internals.replicate(model, layout.data)
        seed = torch.tensor(torch.initial_seed() & (2**63 - 1))
        if is_on_meta:
            broadcast_each([seed])
        values = given_back(model, kept, device, int(seed), init_fn, on_host="offload_policy" in options)
        if is_cut:
            broadcast_each(values, within=layout.within)
        else:
            for _ in values:
                pass  # all ranks have made the same
            _take_whole(model, layout, device)


def _take_whole(model: nn.Module, layout: Layout, device: torch.device) -> None:
    """Bring a model that is not cut up onto `device`, with one rank's values along what DDP does not send over."""
    model.to(device)
    if layout.beside_ddp:
        values = (value for value in (*model.parameters(), *model.buffers()) if not is_dtensor(value))
        broadcast_each(values, within=layout.beside_ddp)


def _send_what_stays(model: nn.Module, layout: Layout) -> None:
    """Tensors of other classes than torch's own, and those that are cut up over `tp` already, are not set aside."""
    staying = [value for value in model.parameters() if not value.is_meta]
    cut = [local_part(value) for value in (*staying, *model.buffers()) if is_dtensor(value) and not value.is_meta]
    broadcast_each(cut, within=layout.within_tp)
    broadcast_each([local_part(value) for value in staying if not is_dtensor(value)], within=layout.within)


def _for_new(options: dict[str, Any], kept: Kept) -> dict[str, Any]:
    """`options` that name parameters, or ask a function about them, for those that stand in place of `kept` now."""
    pairs = [(module._parameters[name], before) for (module, name), before in kept.items()]
    stand_ins, originals = {id(before): new for new, before in pairs}, {id(new): before for new, before in pairs}
    told = dict(options)
    if (ignored := options.get("ignored_params")) is not None:
        told["ignored_params"] = {stand_ins.get(id(each), each) for each in ignored}
    if (place := options.get("shard_placement_fn")) is not None:
        told["shard_placement_fn"] = lambda new: place(originals.get(id(new), new))
    return told


def _shard(model: nn.Module, layout: Layout, blocks: tuple[type[nn.Module], ...], options: dict[str, Any]) -> None:
    from torch.distributed.device_mesh import init_device_mesh  # these two cost 0.3 s to import
    from torch.distributed.fsdp import fully_shard

    here = world()
    over = {**options, "mesh": layout.data or init_device_mesh(here.device.type, (here.size,))}
    for module in model.modules():
        if isinstance(module, blocks) and module is not model:
            fully_shard(module, **over)
    fully_shard(model, **over)
