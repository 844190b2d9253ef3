"""Explain the errors of DistributedDataParallel that name its own arguments, in terms of `prepare_model()`."""

import re
import traceback
from collections.abc import Sequence
from typing import Any

from torch.nn.parallel import DistributedDataParallel

__all__ = ["explain"]

_UNUSED = "Expected to have finished reduction in the prior iteration"
_TWICE = "Expected to mark a variable ready only once"
_NUM_SHOWN = 8


def explain(error: BaseException) -> None:
    """Put an explanation in front of the message of `error`, if it is a known error of DDP.

    It is changed in place, so it keeps its traceback, and DDP's own message after ours.
    """
    text = error.args[0] if type(error) is RuntimeError and error.args else ""
    if not isinstance(text, str) or not text.startswith((_UNUSED, _TWICE)):
        return
    ours = _unused(error, text) if text.startswith(_UNUSED) else _twice()
    error.args = (f"{ours}\n\nDistributedDataParallel says: {text}",)


def _unused(error: BaseException, text: str) -> str:
    names = _names(_model_of(error), text)
    what = f"Parameters of the model ({names})" if names else "Some parameters of the model"
    return (
        f"{what} got no gradient in the step before, and the ranks wait for the gradient of every one. If a step may "
        "leave them out, pass prepare_model(model, find_unused_parameters=True); if they are never used, take them out "
        "of the model, or set requires_grad=False before prepare_model()."
    )


def _twice() -> str:
    return (
        "A parameter of the model got its gradient twice in one backward(), as if a layer is used twice under "
        "activation checkpointing. If every step uses the same layers, pass prepare_model(model, static_graph=True); "
        "checkpoint with use_reentrant=False, as prepare_model(activation_checkpointing=True) does."
    )


def _model_of(error: BaseException) -> Any:
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if isinstance(frame.f_locals.get("self"), DistributedDataParallel):
            return frame.f_locals["self"]
    return None


def _names(model: Any, text: str) -> str:
    """The names of the parameters whose numbers are in DDP's message; "" if they cannot be found."""
    found = re.search(r"did not receive grad for rank \d+: ((?:\d+ ?)+)", text)
    if model is None or found is None:
        return ""
    ignored = model.parameters_to_ignore
    counted = [name for name, each in model.module.named_parameters() if each.requires_grad and name not in ignored]
    return _joined([counted[number] for number in map(int, found[1].split()) if number < len(counted)])


def _joined(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NUM_SHOWN} more" if len(names) > _NUM_SHOWN else ""
    return ", ".join(names[:_NUM_SHOWN]) + more
