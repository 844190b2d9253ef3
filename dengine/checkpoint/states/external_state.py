"""Mark and refuse objects whose state is kept by another library, so that their `state_dict()` is incomplete."""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim import Optimizer

from dengine.errors import CheckpointError

__all__ = ["mark_external", "refuse_to_load", "refuse_to_save"]

# Modules of DeepSpeed's classes.
_NAMES = {"DeepSpeedEngine", "DeepSpeedOptimizer", "DeepSpeedOptimizerWrapper"}

# An attribute: whether its state_dict() is complete. Loading into it would have no effect.
_external: WeakKeyDictionary[nn.Module | Optimizer, bool] = WeakKeyDictionary()


def mark_external(value: nn.Module | Optimizer, *, is_whole: bool) -> None:
    """Mark `value`, whose state DeepSpeed keeps, so that it is not loaded and, unless `is_whole`, not saved.

    In a model, that holds for all parts of it.
    """
    for each in value.modules() if isinstance(value, nn.Module) else [value]:
        _external[each] = is_whole


def refuse_to_save(objects: Mapping[str, object]) -> None:
    """Refuse to save an object whose `state_dict()` has only this rank's part of the state. Raises: CheckpointError."""
    for name, value in objects.items():
        _refuse_wrapper(name, value)
        if _is_whole(value) is False:
            raise CheckpointError(
                f"DeepSpeed keeps a part of {name!r} on each rank, which state_dict() does not give. Leave it out, and "
                "save it by the DeepSpeed engine's own save_checkpoint(), which pickles; or shard by "
                'distributed.prepare_model(model, strategy="fsdp"), of which checkpoints have everything.'
            )


def refuse_to_load(objects: Mapping[str, object]) -> None:
    """Refuse to load into an object that is trained from a copy, which would not change. Raises: CheckpointError."""
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
    """Whether the state that `value` gives is complete; None if DeepSpeed does not keep it."""
    # Other objects may have no hash.
    return _external.get(value) if isinstance(value, (nn.Module, Optimizer)) else None
