"""Objects whose state another library keeps, so that their own `state_dict()` does not have all of it."""

from typing import Any
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from dengine.errors import CheckpointError

__all__ = ["mark_external", "refuse_to_load", "refuse_to_save"]

# Of DeepSpeed's own, whoever made them.
_NAMES = {"DeepSpeedEngine", "DeepSpeedOptimizer", "DeepSpeedOptimizerWrapper"}

# Whether its state_dict() is whole, though nobody would read what is loaded into it.
_kept: WeakKeyDictionary[nn.Module | Optimizer, bool] = WeakKeyDictionary()


def mark_external(value: nn.Module | Optimizer, *, is_whole: bool) -> None:
    """See that `value`, whose state DeepSpeed keeps, is not loaded and, unless `is_whole`, not saved; of a model, that
    no part of it is."""
    for each in value.modules() if isinstance(value, nn.Module) else [value]:
        _kept[each] = is_whole


def refuse_to_save(name: str, value: Any) -> None:
    """Raises: CheckpointError: each rank's `state_dict()` has a part of the state only."""
    _refuse_wrapper(name, value)
    if _is_kept(value) and not _kept[value]:
        raise CheckpointError(
            f"DeepSpeed keeps a part of {name!r} on each rank, which state_dict() does not tell. Leave it out, and "
            "save it by the DeepSpeed engine's own save_checkpoint(), which pickles; or shard by "
            'distributed.prepare_model(model, strategy="fsdp"), of which checkpoints have everything.'
        )


def refuse_to_load(name: str, value: Any) -> None:
    """Raises: CheckpointError: it is trained from a copy, which would not change."""
    _refuse_wrapper(name, value)
    if _is_kept(value):
        raise CheckpointError(
            f"DeepSpeed trains {name!r} from a copy of its own, which would not change. Load it before a trainer is "
            "made of it, or by the DeepSpeed engine's own load_checkpoint()."
        )


def _refuse_wrapper(name: str, value: Any) -> None:
    if any(base.__name__ in _NAMES for base in type(value).__mro__):
        raise CheckpointError(
            f"{name!r} is DeepSpeed's own {type(value).__qualname__}, which has another state: give the bare model or "
            "optimizer, or use the DeepSpeed engine's own save_checkpoint() and load_checkpoint()."
        )


def _is_kept(value: Any) -> bool:
    # Anything else may have no hash.
    return isinstance(value, (nn.Module, Optimizer)) and value in _kept
