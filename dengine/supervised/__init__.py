"""Ready-made trainers and evaluators, on `accelerate.Accelerator`: autocast, loss scaling, accumulation, wrapping."""

from dengine.supervised.evaluator import create_supervised_evaluator
from dengine.supervised.trainer import SupervisedEvents, create_supervised_trainer

__all__ = ["SupervisedEvents", "create_supervised_evaluator", "create_supervised_trainer"]
