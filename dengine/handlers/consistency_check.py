"""Check that all ranks train the same model."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from dengine import trees
from dengine.comm.copies import compare_tensors
from dengine.comm.parts import Dimensions, parts_of_names, parts_of_optimizer
from dengine.distributed import unwrap_model
from dengine.engine import Engine
from dengine.naming import other_names, shown

__all__ = ["ConsistencyCheck"]

_OF_PARAMETER = re.compile(r"optimizer\.state\.(\d+)\.")
_IS_NUMBER = re.compile(r"optimizer\.param_groups\.\d+\.params\.")


@other_names(
    attach="it takes one event, so write trainer.on(Events.ITERATION_COMPLETED(every=1000), handler)",
)
class ConsistencyCheck:
    """Compares the parameters of `model`, and the state of `optimizer` if given, bit by bit over all ranks.

    Buffers are left out, since each rank has its own statistics of batch norm between two forward passes. A sharded
    parameter is compared between the ranks that have the same piece: the replicas of HSDP, the copies of a
    tensor-parallel group. Parts of a model that differ on purpose (`prepare_model(parts=)`) are compared between
    the ranks that have the same part. Pieces that only one rank has are not compared, nor is anything in one process.

    Attach it on every rank: `trainer.on(Events.ITERATION_COMPLETED(every=1000), ConsistencyCheck(model))`.
    Collective. Cost: reads every parameter once on its device, one all-reduce of 16 bytes a parameter (for each piece
    of one that has copies), one wait for the device.

    Args:
        before_saving: also compare before each save of a `Checkpoint` that this engine calls, at whatever event (also
            for `Preemption`). What is found then fails the save on all ranks, before anything is written; what was
            saved before stays as it is. A `Checkpoint` on another engine (an evaluator) needs a check there.

    Raises (when called):
        ConsistencyError: (on every rank) the parameters differ; the message names a rank that differs from the majority
            of those that have a copy, and the first parameter. Without a majority (two copies) it names all of them.

    Example:
        >>> from dengine import Engine, Events
        >>> model = nn.Linear(2, 1)
        >>> trainer = Engine(lambda engine, batch: None)
        >>> handle = trainer.on(Events.ITERATION_COMPLETED(every=2), ConsistencyCheck(model))
        >>> state = trainer.run(range(4))
    """

    is_collective = True

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None, *, before_saving: bool = False
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"ConsistencyCheck() takes a torch.nn.Module, but got {type(model).__qualname__}.")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer= takes a torch optimizer, but got {type(optimizer).__qualname__}.")
        self._model = model
        self._optimizer = optimizer
        self.precedes_saves = bool(before_saving)

    def __repr__(self) -> str:
        return shown(self, self._model, optimizer=self._optimizer, before_saving=self.precedes_saves or None)

    def __call__(self, engine: Engine) -> None:
        model = unwrap_model(self._model)
        compared: dict[str, Any] = dict(model.named_parameters())
        parts = parts_of_names(model, compared)
        if self._optimizer is not None:
            state = _state_of(self._optimizer)
            compared |= state
            parts |= _parts_of_state(state, self._optimizer)
        compare_tensors(compared, "The parameters", parts)


def _state_of(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The tensors and numbers of an optimizer's state by name. Not which parameters it has: stages of a pipeline have
    more or fewer."""
    saved = trees.named_leaves(optimizer.state_dict(), "optimizer")
    return {name: value for name, value in saved if value is not None and not _IS_NUMBER.match(name)}


def _parts_of_state(names: Iterable[str], optimizer: torch.optim.Optimizer) -> dict[str, Dimensions]:
    """The dimensions along which the parameters of an optimizer's state by these `names` are parts of a model."""
    parts = parts_of_optimizer(optimizer)
    owners = {name: found for name in names if (found := _OF_PARAMETER.match(name))}
    return {name: parts[int(owner[1])] for name, owner in owners.items() if int(owner[1]) in parts}
