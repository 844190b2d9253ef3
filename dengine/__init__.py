"""dengine: a distributed-first, event-driven training engine for PyTorch.

Importing it starts nothing, and loads nothing that is not used: the names below are looked up on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from dengine.version import __version__

if TYPE_CHECKING:
    from dengine import checkpoint, config, data, distributed, engine, errors, handlers, metrics, supervised, tracking
    from dengine.engine import Engine, EventEnum, Events, State, filtered
    from dengine.errors import (
        CheckpointError,
        ConfigError,
        ConsistencyError,
        CorruptCheckpointError,
        DengineError,
        GuardError,
        LaunchError,
        MetricStateError,
        MissingKeyError,
        NotComputableError,
        RankZeroCollectiveError,
        RemoteInterrupt,
        RemoteRankError,
        ReplayError,
        StallError,
        TrackingError,
    )
    from dengine.supervised import SupervisedEvents, create_supervised_evaluator, create_supervised_trainer

_ENGINE = ("Engine", "EventEnum", "Events", "State", "filtered")
_ERRORS = (
    "CheckpointError",
    "ConfigError",
    "ConsistencyError",
    "CorruptCheckpointError",
    "DengineError",
    "GuardError",
    "LaunchError",
    "MetricStateError",
    "MissingKeyError",
    "NotComputableError",
    "RankZeroCollectiveError",
    "RemoteInterrupt",
    "RemoteRankError",
    "ReplayError",
    "StallError",
    "TrackingError",
)
_SUPERVISED = ("SupervisedEvents", "create_supervised_evaluator", "create_supervised_trainer")
_SUBPACKAGES = (
    "checkpoint",
    "config",
    "data",
    "distributed",
    "engine",
    "errors",
    "handlers",
    "metrics",
    "supervised",
    "tracking",
)


# A name of another library -> what to write instead.
_INSTEAD = {
    "Trainer": "write Engine(step), or create_supervised_trainer(model, optimizer, loss_fn), and trainer.run(data)",
    "LightningModule": "write the step as a function (engine, batch) -> output, for Engine(step)",
    "Accelerator": "create_supervised_trainer(..., accelerator=) takes one of accelerate's",
    "Callback": "a handler is any function of the engine: engine.on(Events.X, handler)",
    "idist": "it is dengine.distributed",
    "contrib": "handlers are in dengine.handlers, run trackers in dengine.tracking",
    "utils": "write dengine.distributed, dengine.tracking or dengine.config",
    "seed_everything": "seed the generators yourself, as by torch.manual_seed(seed)",
}

__all__ = [
    "CheckpointError",
    "ConfigError",
    "ConsistencyError",
    "CorruptCheckpointError",
    "DengineError",
    "Engine",
    "EventEnum",
    "Events",
    "GuardError",
    "LaunchError",
    "MetricStateError",
    "MissingKeyError",
    "NotComputableError",
    "RankZeroCollectiveError",
    "RemoteInterrupt",
    "RemoteRankError",
    "ReplayError",
    "StallError",
    "State",
    "SupervisedEvents",
    "TrackingError",
    "__version__",
    "checkpoint",
    "config",
    "create_supervised_evaluator",
    "create_supervised_trainer",
    "data",
    "distributed",
    "engine",
    "errors",
    "filtered",
    "handlers",
    "metrics",
    "supervised",
    "tracking",
]


def __getattr__(name: str) -> Any:
    if name in _ENGINE:
        return getattr(import_module("dengine.engine"), name)
    if name in _ERRORS:
        return getattr(import_module("dengine.errors"), name)
    if name in _SUPERVISED:
        return getattr(import_module("dengine.supervised"), name)
    if name in _SUBPACKAGES:
        return import_module(f"dengine.{name}")
    hint = f": {_INSTEAD[name]}." if name in _INSTEAD else ""
    raise AttributeError(f"module 'dengine' has no attribute {name!r}{hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
