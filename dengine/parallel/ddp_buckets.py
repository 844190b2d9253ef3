"""The buckets in which DDP sums gradients: settled before the first step, so that a resumed run sums as it would have.

DDP lays its buckets out anew after the first backward pass, by the order in which gradients came. From three ranks on,
the order in which a number's summands are added depends on its place in a bucket: the first step of a resumed run,
still in the first layout, would round differently from that of a run never interrupted.
"""

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dengine import torch_internals

__all__ = ["settle_buckets"]

_IS_SETTLED = "_dengine_is_settled"


def settle_buckets(model: DistributedDataParallel) -> None:
    """Have DDP take its final layout now, by a backward pass of zeros in the reverse order of the parameters.

    That is the order in which gradients come where layers are used in the order in which they were made; elsewhere
    the sums overlap a little less with the backward pass. Gradients that are there stay as they are.

    Left alone are models that are settled already, those whose buckets DDP never lays out anew
    (`find_unused_parameters`), and those that a pass of dense zeros is no example for: `static_graph`, DDP's own
    `mixed_precision`, sparse gradients, parameters with hooks (an optimizer in the backward pass would step), a
    communication hook (PowerSGD counts its calls). A resumed run of these last five, on three ranks or more, may round
    the first step's sums differently.

    Collective: call on all ranks. Cost: one all-reduce of the gradients; memory for them, as in a step.
    """
    if not _can_settle(model):
        return
    setattr(model, _IS_SETTLED, True)
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


def _can_settle(model: DistributedDataParallel) -> bool:
    if getattr(model, _IS_SETTLED, False) or torch_internals.has_final_buckets(model):
        return False
    is_sparse = any(getattr(each, "sparse", False) for each in model.modules() if isinstance(each, _EMBEDDINGS))
    is_other = model.find_unused_parameters or model.static_graph or model.mixed_precision
    has_hooks = any(map(torch_internals.has_gradient_hooks, model.module.parameters()))
    return not (is_other or is_sparse or has_hooks)


_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
