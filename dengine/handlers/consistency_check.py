"""Checks that all ranks train the same model."""

from typing import Any

import torch
from torch import nn

from dengine import trees
from dengine.comm.consistency import compare_tensors
from dengine.distributed import unwrap_model
from dengine.engine import Engine
from dengine.naming import other_names, shown

__all__ = ["ConsistencyCheck"]


@other_names(
    attach="it takes one event, so write trainer.on(Events.ITERATION_COMPLETED(every=1000), handler)",
)
class ConsistencyCheck:
    """Compares the parameters of `model`, and with `optimizer` its state too, bit by bit over all ranks.

    Buffers are left out: the statistics of batch norm are each rank's own between two forward passes. A sharded
    parameter is compared between the ranks that hold the same piece: the replicas of HSDP, the copies of a
    tensor-parallel group. If FSDP2 gives each rank another piece, and in a run of one process, there is nothing to
    compare.

    Attach it on every rank: `trainer.on(Events.ITERATION_COMPLETED(every=1000), ConsistencyCheck(model))`.
    Collective. Cost: reads every parameter once on its device, one all-reduce of 16 bytes a parameter (for each piece
    of one that has copies), one wait for the device.

    Raises (when called):
        ConsistencyError: (on every rank) the parameters differ; it names a rank that differs from the majority, and the
            first parameter.

    Example:
        >>> from dengine import Engine, Events
        >>> model = nn.Linear(2, 1)
        >>> trainer = Engine(lambda engine, batch: None)
        >>> handle = trainer.on(Events.ITERATION_COMPLETED(every=2), ConsistencyCheck(model))
        >>> state = trainer.run(range(4))
    """

    is_collective = True

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"ConsistencyCheck() takes a torch.nn.Module, but got {type(model).__qualname__}.")
        if optimizer is not None and not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"optimizer= takes a torch optimizer, but got {type(optimizer).__qualname__}.")
        self._model = model
        self._optimizer = optimizer

    def __repr__(self) -> str:
        return shown(self, self._model, optimizer=self._optimizer)

    def __call__(self, engine: Engine) -> None:
        compared: dict[str, Any] = dict(unwrap_model(self._model).named_parameters())
        if self._optimizer is not None:
            state = trees.named_leaves(self._optimizer.state_dict(), "optimizer")
            compared.update((path, value) for path, value in state if value is not None)
        compare_tensors(compared, "The parameters")
