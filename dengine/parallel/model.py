"""Move a model to its device and spread it over the ranks, and find the user's module in it again."""

from collections.abc import Iterable, Mapping
from contextlib import nullcontext, suppress
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dengine import torch_internals
from dengine.comm.collectives import collective
from dengine.comm.consistency import (
    Compared,
    parameters_of,
    refuse_differences,
    refuse_different_parts,
    same_on_all_ranks,
)
from dengine.comm.mesh import note_model
from dengine.comm.parts import mark_part
from dengine.control.plane import plane
from dengine.dtensor import any_dtensor, has_dimension
from dengine.errors import ConsistencyError
from dengine.launch.world import World, refuse_forgotten_group, world
from dengine.naming import a_type
from dengine.parallel.ddp_buckets import build_buckets_early
from dengine.parallel.layout import Layout, Parts, TensorParallel, check_plan, layout_of
from dengine.parallel.options import (
    Compression,
    Precision,
    Strategy,
    check_blocks,
    check_ddp_options,
    check_options,
    checkpoint_blocks,
    compile_model,
    compression_hook,
    fsdp_options,
    refuse_unsendable,
)
from dengine.parallel.spreading import spread
from dengine.parallel.undo import unchanged_by_errors
from dengine.parallel.weights import Initialize, check_meta

__all__ = ["prepare_model", "unwrap_model"]

_WRAPPING = "the wrapping in DistributedDataParallel by prepare_model()"


def prepare_model(
    model: nn.Module,
    strategy: Strategy = "auto",
    *,
    blocks: Iterable[type[nn.Module]] = (),
    mixed_precision: Precision | None = None,
    gradient_compression: Compression | None = None,
    activation_checkpointing: bool = False,
    compile: bool | Mapping[str, Any] = False,
    tensor_parallel: TensorParallel | None = None,
    parts: Parts | None = None,
    init_fn: Initialize | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Move `model` to this rank's device, and make the ranks average its gradients.

    Collective: call on all ranks. Every rank starts from rank 0's parameters and buffers. In a run of one process the
    result is the plain module on its device, whatever the strategy.

    Args:
        strategy: "ddp" wraps in `DistributedDataParallel`; "fsdp" shards parameters, gradients and optimizer state
            in place by `fully_shard` (build the optimizer afterwards); "auto" is "ddp", or nothing for a model without
            a trainable parameter; "none" moves the model to the device only. On the mesh of `process_group(mesh=)`,
            "ddp" is over the dimensions `dp`, `dp_replicate`, `ep` and `cp`; "fsdp" shards over `dp_shard` (or `dp`)
            and `cp`, and replicates over the others; "auto" is "fsdp" if there is a `dp_shard`.
        blocks: module classes (a transformer's layer). With "fsdp" they are sharded one by one, so that only one of
            them is whole at a time; without them the model is gathered as one. `activation_checkpointing` needs them,
            too.
        mixed_precision: with "bf16" or "fp16", FSDP computes and gathers in that type, and reduces gradients in float32
            (pass your own `MixedPrecisionPolicy` as `mp_policy=`). With DDP use autocast:
            `create_supervised_trainer(mixed_precision=)`.
        gradient_compression: with "bf16" or "fp16", DDP sends gradients in that type (its hook of that name).
        activation_checkpointing: keep only the inputs of each of `blocks`, and compute the rest again in the backward
            pass.
        compile: compile the model's forward and backward by `torch.compile`, with options if a mapping is given. This
            is done in place: neither the model's class nor its names change.
        tensor_parallel: a plan of `torch.distributed.tensor.parallel`, a style for each module by its name
            (`{"layers.*.w1": ColwiseParallel()}`), applied first, over the dimension `tp` of the mesh. A model that is
            laid out over `tp` already is taken as it is. In a run of one process, or with a `tp` of 1, a plan is only
            checked.
        parts: "pp" or "ep" declares that ranks along that dimension of the mesh have different parts of a model on
            purpose, stages or experts: nothing is compared or sent between them. Prepare a module of experts, whose
            `forward` takes the tokens of all ranks of `ep`, in place before the model around it. Preparing that model
            does not change it, but initialises its parameters on the meta device.
        init_fn: initialises the own parameters and buffers of the module that it gets, instead of `reset_parameters()`,
            for models on the meta device. The weights are the same on every mesh: they follow from torch's seed on
            rank 0 and the names of the modules.
        **kwargs: go to `DistributedDataParallel` (`static_graph`, `gradient_as_bucket_view`, ...) or `fully_shard`.
            With `mesh=` of some of the ranks, they start from the first rank of that mesh.

    Raises:
        TypeError: `model` is no module. ValueError: an unknown strategy; options that the strategy does not take; a
            model wrapped already, or laid out over another mesh (parameters that are DTensors), which only
            strategy="none" takes; experts in a model that was prepared before them; compression that the backend cannot
            send; a plan that does not fit the model or the mesh; a module on the meta device that cannot initialise
            itself. Nothing is changed then.
        ConsistencyError: names, shapes or types of the parameters differ between ranks, or the arguments of another
            rank do not fit, which raises the error itself.

    Cost: one small all-reduce; one broadcast of each parameter and buffer; with "ddp", one all-reduce of zeros as large
        as the gradients, so that a resumed run adds them up in the same order as one that was never interrupted. With
        "fsdp" or a plan, a rank's device holds its own part and one whole tensor at most, beside what was there.
    """
    refuse_forgotten_group("prepare_model()")
    here = world()
    blocks = tuple(blocks)
    try:
        given = blocks, mixed_precision, gradient_compression, activation_checkpointing, parts, kwargs
        layout, plan, options, is_on_meta = _checked(model, strategy, tensor_parallel, init_fn, given, here)
    except (TypeError, ValueError) as error:
        _refuse_with_others(error)
        raise
    _compare(model, plan, layout, parts)
    layout = layout.with_groups(here)
    with unchanged_by_errors(model) as before:
        if activation_checkpointing:
            checkpoint_blocks(model, blocks)
        if compile:
            compile_model(model, compile if isinstance(compile, Mapping) else {})
        spread(model, layout, tensor_parallel, blocks, options, init_fn, before, is_on_meta=is_on_meta)
    if parts is not None and layout.place:
        mark_part(model, parts)
    if layout.strategy != "ddp" or any_dtensor(model.parameters()):
        return model
    if strategy == "auto" and not any(parameter.requires_grad for parameter in model.parameters()):
        with collective(_WRAPPING) if parts is not None else nullcontext():  # other stages may be wrapped
            return model
    return _in_ddp(model, layout, gradient_compression, kwargs, here)


def _checked(
    model: nn.Module,
    strategy: Strategy,
    tensor_parallel: TensorParallel | None,
    init_fn: Initialize | None,
    given: tuple[Any, ...],
    here: World,
) -> tuple[Layout, list[str], dict[str, Any], bool]:
    """The layout of `model`, the lines of its plan, the options of FSDP2, and whether some of it is on the meta device.

    Raises: TypeError, ValueError: as in `prepare_model`. Nothing is changed or sent.
    """
    blocks, mixed_precision, gradient_compression, activation_checkpointing, parts, kwargs = given
    if not isinstance(model, nn.Module):
        raise TypeError(f"prepare_model() takes a torch.nn.Module, but got {type(model).__qualname__}.")
    if isinstance(model, DistributedDataParallel):
        raise ValueError("This model is wrapped in DistributedDataParallel already: pass the bare module.")
    # Also in a run of one process, so that mistakes show before there are several.
    check_options("fsdp" if strategy == "auto" and has_dimension(here.mesh, "dp_shard") else strategy, *given)
    if activation_checkpointing:
        check_blocks(model, blocks)
    if parts == "ep":
        _refuse_known_experts(model)
    is_on_meta = check_meta(model, init_fn, is_of_experts=parts == "ep")
    layout = layout_of(model, strategy, parts, kwargs, here, is_planned=tensor_parallel is not None)
    is_container = isinstance(model, (nn.ModuleList, nn.ModuleDict)) and type(model).forward is nn.Module.forward
    if is_container and layout.strategy in ("fsdp", "replicate"):
        raise ValueError(f"FSDP2 takes a module that is called, but {a_type(model)} is not: prepare each module in it.")
    if layout.strategy == "ddp":
        check_options("ddp", *given)
        check_ddp_options(kwargs)
        refuse_unsendable(gradient_compression, here)
    plan = [] if tensor_parallel is None else check_plan(tensor_parallel, model, layout.tp.size() if layout.tp else 1)
    is_tensor_parallel = layout.tp is not None and (tensor_parallel is not None or any_dtensor(model.parameters()))
    if layout.strategy == "replicate" or layout.is_of_experts or is_tensor_parallel:
        layout.refuse_options_of_ddp(gradient_compression, kwargs)
    options = fsdp_options(kwargs, mixed_precision, here) if layout.strategy == "fsdp" else {}
    return layout, plan, options, is_on_meta


def _refuse_known_experts(experts: nn.Module) -> None:
    """Refuse `experts` if they, or the model around them, were prepared before. Raises: ValueError."""
    if any(part is experts for part, _ in plane().prepared.living_parts()):
        raise ValueError(f"This {type(experts).__qualname__} was prepared with parts= already.")
    for model in plane().prepared.living_models().values():
        if any(module is experts for module in model.modules()):
            raise ValueError(
                f"This {type(experts).__qualname__} is in a {type(model).__qualname__} that was prepared already: call "
                "prepare_model(experts, parts='ep') before prepare_model(model)."
            )


def _refuse_with_others(error: TypeError | ValueError) -> None:
    """Make the other ranks refuse the arguments, too, if those of this rank do not fit. Collective."""
    with suppress(ConsistencyError):  # they raise it; here `error` says more
        _agree([_arguments(f"some that do not fit ({type(error).__qualname__}: {error})")])


def _arguments(*entries: str) -> Compared:
    return Compared("The arguments of prepare_model()", entries, "Call it alike on every rank.")


def _agree(compared: list[Compared]) -> None:
    """Check that the entries agree. Raises: ConsistencyError: something differs between ranks. Collective."""
    if not same_on_all_ranks([line for each in compared for line in each.entries], "the comparison in prepare_model()"):
        refuse_differences(compared)


def _compare(model: nn.Module, plan: list[str], layout: Layout, parts: Parts | None) -> None:
    """Compare the model between the ranks.

    Raises: ConsistencyError: ranks that must have the same model or plan differ; or the arguments of a rank do not fit.
    """
    # DDP would say that they differ, but not which ones, nor on which rank.
    compared = Compared("The parameters of the model", [*parameters_of(model), *plan])
    arguments = _arguments("ones that fit", f"parts={parts!r}", f"strategy={layout.strategy!r}")
    if parts is not None:
        _agree([arguments])
        refuse_different_parts(compared, layout.place)
        return
    _agree([arguments, compared])
    plane().prepared.add_model(model)
    note_model(model)


def _in_ddp(
    model: nn.Module, layout: Layout, compression: Compression | None, kwargs: Mapping[str, Any], here: World
) -> DistributedDataParallel:
    device_ids = None if here.device.type == "cpu" else [here.device]
    over: dict[str, Any] = {} if layout.data is None else {"process_group": layout.data.get_group()}
    with collective(_WRAPPING):
        wrapped = DistributedDataParallel(model, device_ids=device_ids, **over, **kwargs)
        build_buckets_early(wrapped)
    if compression is not None:
        wrapped.register_comm_hook(None, compression_hook(compression))
    return wrapped


def unwrap_model(model: nn.Module) -> nn.Module:
    """The user's own module inside DDP and `torch.compile`; the model itself if it is not wrapped."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif (inner := torch_internals.inside_compile(model)) is not model and isinstance(inner, nn.Module):
            model = inner
        else:
            return model
