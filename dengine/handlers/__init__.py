"""Handlers: one policy per file, attached to events by the user."""

from dengine.handlers.checkpoint import Checkpoint
from dengine.handlers.consistency_check import ConsistencyCheck
from dengine.handlers.early_stopping import EarlyStopping
from dengine.handlers.ema import EMA
from dengine.handlers.lr_scheduler import LRScheduler
from dengine.handlers.memory_monitor import MemoryMonitor
from dengine.handlers.param_group_logger import ParamGroupLogger
from dengine.handlers.preemption import Preemption
from dengine.handlers.profiler import Profiler
from dengine.handlers.progress_bar import ProgressBar
from dengine.handlers.terminate_on_nan import TerminateOnNan
from dengine.handlers.throughput_monitor import ThroughputMonitor
from dengine.handlers.time_limit import TimeLimit
from dengine.handlers.timer import Timer
from dengine.handlers.tracking_handler import TrackingHandler

__all__ = [
    "EMA",
    "Checkpoint",
    "ConsistencyCheck",
    "EarlyStopping",
    "LRScheduler",
    "MemoryMonitor",
    "ParamGroupLogger",
    "Preemption",
    "Profiler",
    "ProgressBar",
    "TerminateOnNan",
    "ThroughputMonitor",
    "TimeLimit",
    "Timer",
    "TrackingHandler",
]
