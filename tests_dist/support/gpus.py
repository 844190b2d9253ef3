"""The ways in which ranks of a test share the GPUs that there are: NCCL with one each, Gloo with one for all."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dengine import distributed

__all__ = ["over_gpus", "spread"]

NUM_GPUS = torch.cuda.device_count()

# (backend, ranks). NCCL refuses two ranks on one device; what is around it runs by Gloo all the same.
over_gpus = pytest.mark.parametrize(
    ("backend", "size"),
    [
        pytest.param("auto", 1, id="nccl-1"),
        pytest.param("gloo", 2, id="gloo-2-on-one"),
        pytest.param(
            "auto",
            2,
            id="nccl-2",
            marks=pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs two CUDA devices, and there are {NUM_GPUS}"),
        ),
    ],
)


def spread(model: nn.Module, strategy: str = "ddp", **options: Any) -> nn.Module:
    """By `prepare_model`; a lone rank's, which it leaves bare, by torch itself, so that NCCL has something to do."""
    model = distributed.prepare_model(model, strategy, **options)  # type: ignore[arg-type]
    if distributed.world().size > 1:
        return model
    if strategy == "fsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)  # in place
        return model
    return DistributedDataParallel(model, **options)
