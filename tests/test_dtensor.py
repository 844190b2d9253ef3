"""What is asked of tensors and modules that are spread over ranks, and that asking costs no import."""

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from dengine.dtensor import (
    cut_like,
    is_dtensor,
    is_fsdp,
    is_made_of_others,
    is_mesh,
    laid_out_like,
    local_part,
    mesh_of,
    piece_of,
    whole,
)


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_plain_tensor_is_asked_without_importing_what_it_is_not() -> None:
    code = """
import sys, torch
from dengine.dtensor import is_dtensor, is_fsdp, is_mesh, local_part, mesh_of, piece_of, whole
value = torch.nn.Parameter(torch.ones(2))
assert not is_dtensor(value) and not is_fsdp(torch.nn.Linear(1, 1)) and not is_mesh(value) and mesh_of(value) is None
assert whole(value) is value and piece_of(value) == (0, 1)
assert local_part(value).data_ptr() == value.data_ptr() and not local_part(value).requires_grad
assert "torch.distributed.tensor" not in sys.modules and "torch.distributed.fsdp" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.usefixtures("group")
def test_a_dtensor_and_a_sharded_module_are_told_apart_from_plain_ones() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    content = torch.arange(4.0)
    spread = nn.Parameter(distribute_tensor(content, mesh, [Shard(0)]))
    assert is_dtensor(spread)
    assert is_mesh(mesh)
    assert is_made_of_others(spread)
    assert mesh_of(spread) == mesh
    assert piece_of(spread) == (0, 1)
    assert local_part(spread).equal(content)
    assert not is_dtensor(local_part(spread))
    assert whole(spread).equal(content)
    assert is_dtensor(cut_like(content, spread))
    assert cut_like(content, content) is content
    assert is_dtensor(laid_out_like(content, spread))
    assert laid_out_like(content, content) is content
    module = nn.Linear(2, 2)
    assert not is_fsdp(module)
    fully_shard(module, mesh=mesh)
    assert is_fsdp(module)
