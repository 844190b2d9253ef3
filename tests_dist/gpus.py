"""The ways in which ranks of a test share the GPUs that there are: NCCL with one each, Gloo with one for all."""

import pytest
import torch

__all__ = ["over_gpus"]

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
