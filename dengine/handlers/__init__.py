"""Handlers: one policy per file, attached to events by the user."""

from typing import NoReturn

from dengine.handlers.checkpoint import Checkpoint
from dengine.handlers.consistency_check import ConsistencyCheck
from dengine.handlers.early_stopping import EarlyStopping
from dengine.handlers.ema import EMA
from dengine.handlers.guard import Guard
from dengine.handlers.lr_scheduler import LRScheduler
from dengine.handlers.memory_monitor import MemoryMonitor
from dengine.handlers.param_group_logger import ParamGroupLogger
from dengine.handlers.preemption import Preemption
from dengine.handlers.profiler import Profiler
from dengine.handlers.progress_bar import ProgressBar
from dengine.handlers.replay import Replay
from dengine.handlers.terminate_on_nan import TerminateOnNan
from dengine.handlers.throughput_monitor import ThroughputMonitor
from dengine.handlers.time_limit import TimeLimit
from dengine.handlers.timer import Timer
from dengine.handlers.tracking_handler import TrackingHandler
from dengine.naming import refuse_name

__all__ = [
    "EMA",
    "Checkpoint",
    "ConsistencyCheck",
    "EarlyStopping",
    "Guard",
    "LRScheduler",
    "MemoryMonitor",
    "ParamGroupLogger",
    "Preemption",
    "Profiler",
    "ProgressBar",
    "Replay",
    "TerminateOnNan",
    "ThroughputMonitor",
    "TimeLimit",
    "Timer",
    "TrackingHandler",
]

# A name of another library -> what to write instead.
_INSTEAD = {
    "ModelCheckpoint": "it is Checkpoint(to_save, save_dir, filename_prefix)",
    "DiskSaver": "give Checkpoint the folder itself: Checkpoint(to_save, save_dir)",
    "EMAHandler": "it is EMA(model, decay)",
    "ModelEMA": "it is EMA(model, decay)",
    "BasicTimeProfiler": "it is ThroughputMonitor() or Profiler(dir)",
    "HandlersTimeProfiler": "it is ThroughputMonitor() or Profiler(dir)",
    "LearningRateMonitor": "it is ParamGroupLogger(optimizer, run)",
    "OptimizerParamsHandler": "it is ParamGroupLogger(optimizer, run)",
    "OutputHandler": "it is TrackingHandler(run, metric_names, output_transform)",
    "TensorboardLogger": 'write TrackingHandler(SummaryWriter(...), "all"), or Track.run(..., backend="tensorboard")',
    "WandBLogger": 'write TrackingHandler(wandb_run, "all"), or Track.run(..., backend="wandb")',
    "MLflowLogger": 'write TrackingHandler(mlflow, "all"), or Track.run(..., backend="mlflow")',
    "TQDMProgressBar": "it is ProgressBar()",
    "create_lr_scheduler_with_warmup": "compose torch's own with SequentialLR, as LRScheduler shows",
    "LRFinder": "there is none",
}


def __getattr__(name: str) -> NoReturn:
    refuse_name(__name__, name, _INSTEAD)
