"""Clear errors of connecting the ranks, in place of those of torch."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from dengine.control.failure import is_of_backend, line_of
from dengine.errors import LaunchError
from dengine.launch.env import Launch

__all__ = ["explaining_lost_rank", "explaining_shared_gpu"]


@contextmanager
def explaining_lost_rank(launch: Launch) -> Iterator[None]:
    """Raise a clear error if a connection breaks while the group is being made: no probe can say yet who is gone."""
    try:
        yield
    except RuntimeError as error:
        is_lost = isinstance(error, dist.DistStoreError) or is_of_backend(error)
        if isinstance(error, LaunchError | dist.DistBackendError) or not is_lost:  # NCCL says what it is
            raise
        raise LaunchError(
            f"Rank {launch.rank} of {launch.size} lost another rank while process_group() connected them: its process "
            "ended (killed, or by an error that it printed), or its host is not reached. What broke here: "
            f"{line_of(error)}"
        ) from error


@contextmanager
def explaining_shared_gpu(launch: Launch) -> Iterator[None]:
    """Raise a clear error if NCCL refuses two ranks on one GPU."""
    try:
        yield
    except dist.DistBackendError as error:
        if "Duplicate GPU" not in str(error):
            raise
        raise LaunchError(
            f"Rank {launch.rank} and another rank of its host have one GPU, and NCCL gives each rank one of its own "
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}; {torch.cuda.device_count()} "
            f"shown, for {launch.local_size} ranks): start one process per GPU (torchrun --nproc-per-node=gpu; srun "
            "--gpus-per-task=1). process_group(backend='gloo') lets ranks share a GPU, slowly."
        ) from error
