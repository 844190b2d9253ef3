"""Objects whose state another library keeps, so that their own `state_dict()` does not have all of it."""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from dengine.errors import CheckpointError

__all__ = ["mark_external", "refuse_to_load", "refuse_to_save"]

# Of DeepSpeed's own, whoever made them.
_NAMES = {"DeepSpeedEngine", "DeepSpeedOptimizer", "DeepSpeedOptimizerWrapper"}

# Whether its state_dict() is whole, though nobody would read what is loaded into it.
_external: WeakKeyDictionary[nn.Module | Optimizer, bool] = WeakKeyDictionary()


def mark_external(value: nn.Module | Optimizer, *, is_whole: bool) -> None:
    """See that `value`, whose state DeepSpeed keeps, is not loaded and, unless `is_whole`, not saved; of a model, that
    no part of it is."""
    for each in value.modules() if isinstance(value, nn.Module) else [value]:
        _external[each] = is_whole


def refuse_to_save(objects: Mapping[str, object]) -> None:
    """Raises: CheckpointError: the `state_dict()` of one of `objects` has only a part of the state on each rank."""
    for name, value in objects.items():
        _refuse_wrapper(name, value)
        if _is_whole(value) is False:
            raise CheckpointError(
                f"DeepSpeed keeps a part of {name!r} on each rank, which state_dict() does not give. Leave it out, and "
                "save it by the DeepSpeed engine's own save_checkpoint(), which pickles; or shard by "
                'distributed.prepare_model(model, strategy="fsdp"), of which checkpoints have everything.'
            )


def refuse_to_load(objects: Mapping[str, object]) -> None:
    """Raises: CheckpointError: one of `objects` is trained from a copy, which would not change."""
    for name, value in objects.items():
        _refuse_wrapper(name, value)
        if _is_whole(value) is not None:
            raise CheckpointError(
                f"DeepSpeed trains {name!r} from a copy of its own, which would not change. Load it before a trainer "
                "is made of it, or by the DeepSpeed engine's own load_checkpoint()."
            )


def _refuse_wrapper(name: str, value: object) -> None:
    if any(base.__name__ in _NAMES for base in type(value).__mro__):
        raise CheckpointError(
            f"{name!r} is DeepSpeed's own {type(value).__qualname__}, which has another state: give the bare model or "
            "optimizer, or use the DeepSpeed engine's own save_checkpoint() and load_checkpoint()."
        )


def _is_whole(value: object) -> bool | None:
    """Whether the state that `value` gives is whole; None if DeepSpeed does not keep it."""
    # Anything else may have no hash.
    return _external.get(value) if isinstance(value, (nn.Module, Optimizer)) else None
