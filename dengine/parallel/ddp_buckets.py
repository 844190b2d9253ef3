"""Build the final buckets of DDP before the first step, so that a resumed run rounds like an uninterrupted one.

DDP rebuilds its buckets after the first backward pass, by the order in which gradients came. From three ranks on, the
order in which a number's summands are added depends on its position in a bucket. So the first step of a resumed run,
still with the first buckets, would round differently from the same step in an uninterrupted run.
"""

from weakref import WeakSet

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dengine import torch_internals

__all__ = ["build_buckets_early", "models_in_ddp"]

_HAS_EARLY_BUCKETS = "_dengine_has_early_buckets"
# Of the process, as torch's wrappers themselves are; what is gone leaves it.
_in_ddp: "WeakSet[DistributedDataParallel]" = WeakSet()


def models_in_ddp() -> list[DistributedDataParallel]:
    """The models in DDP that this package has made or trains, and that are still alive."""
    return list(_in_ddp)


def build_buckets_early(model: DistributedDataParallel) -> None:
    """Make DDP build its final buckets now, by a backward pass of zeros in the reverse order of the parameters.

    Gradients come in that order if layers are used in the order in which they were made; in other models the sums
    overlap a little less with the backward pass. Existing gradients stay as they are.

    Some models are left alone: those that have their final buckets already, those whose buckets DDP never rebuilds
    (`find_unused_parameters`), and those for which a pass of dense zeros is no example: `static_graph`, DDP's own
    `mixed_precision`, sparse gradients, parameters with hooks (an optimizer in the backward pass would step), a
    communication hook (PowerSGD counts its calls). A resumed run of these last five, on three ranks or more, may round
    the first step's sums differently.

    Collective: call on all ranks. Cost: one all-reduce of the gradients; memory for them, as in a step.
    """
    _in_ddp.add(model)
    if not _can_build_early(model):
        return
    setattr(model, _HAS_EARLY_BUCKETS, True)
    names = model.parameters_to_ignore
    parameters = [each for name, each in model.module.named_parameters() if each.requires_grad and name not in names]
    # Copies: with gradient_as_bucket_view, DDP has put them into its buckets by now.
    before = [None if each.grad is None else each.grad.clone() for each in parameters]
    try:
        for each in parameters:
            each.grad = None
        torch_internals.build_ddp_buckets(model, parameters)
    finally:
        for each, gradient in zip(parameters, before, strict=True):
            each.grad = gradient


def _can_build_early(model: DistributedDataParallel) -> bool:
    if getattr(model, _HAS_EARLY_BUCKETS, False) or torch_internals.has_final_buckets(model):
        return False
    is_sparse = any(getattr(each, "sparse", False) for each in model.modules() if isinstance(each, _EMBEDDINGS))
    is_other = model.find_unused_parameters or model.static_graph or model.mixed_precision
    has_hooks = any(map(torch_internals.has_gradient_hooks, model.module.parameters()))
    return not (is_other or is_sparse or has_hooks)


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
