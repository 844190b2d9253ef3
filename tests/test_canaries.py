"""What dengine uses of torch though torch does not promise it. Each docstring says what breaks if its test fails.

A new torch is judged by `bash launch/test.sh -m canary`.
"""

import gc
import io
import os
import socket
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, IterableDataset, TensorDataset, get_worker_info

from dengine import torch_internals

pytestmark = pytest.mark.canary


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=torch_internals.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
        gc.collect()  # a worker of a loader that frees a group of its parent's would wait for the group's threads


# -- process groups ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_the_groups_of_a_process_are_listed_and_count_their_collectives() -> None:
    """Else a hang names the rank that waits, and not the one that joined fewer collectives than the others."""
    default, other = dist.group.WORLD, dist.new_group([0])
    assert {default, other} <= set(torch_internals.process_groups())
    before = torch_internals.num_collectives(default)
    dist.all_reduce(torch.ones(1))
    assert torch_internals.num_collectives(default) == before + 1


@pytest.mark.usefixtures("group")
def test_the_store_of_a_group_made_elsewhere_is_found() -> None:
    """Else ranks of a process group that the user has made cannot leave notes for each other: checkpoints that are
    written in the background would not be agreed upon."""
    store = torch_internals.default_store()
    store.set("key", "value")
    assert store.get("key") == b"value"


@pytest.mark.usefixtures("group")
def test_the_timeout_of_a_group_can_be_set() -> None:
    """Else a rank waits in a group of the mesh for half an hour, whatever `timeout` process_group() was given."""
    group: Any = dist.new_group([0], backend="gloo")
    torch_internals.set_timeout(group, timedelta(seconds=77))
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=77)


@pytest.mark.usefixtures("group")
def test_groups_can_be_aborted_without_a_wait() -> None:
    """Else a rank whose peers have failed waits on its GPU until NCCL's own timeout, not for five seconds."""
    assert callable(dist.distributed_c10d._abort_process_group)


def test_stores_keep_compare_and_count_as_their_names_say() -> None:
    """Else neither the control plane nor `doctor` has anywhere to write."""
    store = torch_internals.PrefixStore("a", torch_internals.HashStore())
    assert store.compare_set("key", "", "first") == b"first"
    assert store.compare_set("key", "", "second") == b"first"
    assert store.add("count", 2) == 2
    assert store.check(["key"])
    assert store.delete_key("key")
    server = torch_internals.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    client = torch_internals.TCPStore("localhost", server.port, is_master=False, wait_for_workers=False)
    client.set("key", "value")
    assert server.get("key") == b"value"


def test_a_store_listens_on_a_socket_that_is_there() -> None:
    """Else no process group begins without torchrun, or its store listens on all of the host's networks."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    options: dict[str, Any] = {"is_master": True, "wait_for_workers": False, "multi_tenant": True}
    server = torch_internals.TCPStore(
        "127.0.0.1", port, master_listen_fd=listener.detach(), use_libuv=torch_internals.LIBUV_TAKES_LISTENER, **options
    )
    client = torch_internals.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    client.set("key", "value")
    assert server.get("key") == b"value"


CONNECTIONS = """
import os, sys
import torch, torch.distributed as dist
from dengine import torch_internals
from dengine.control.sockets import new_connections
rank, file = int(sys.argv[1]), sys.argv[2]

def num_of_gloo(is_listening):
    num = 0
    for number in map(int, os.listdir("/proc/self/fd")):
        try:
            num += torch_internals.is_socket_of_gloo(number, is_listening=is_listening)
        except OSError:
            pass
    return num

before = num_of_gloo(False), num_of_gloo(True)
with new_connections(0) as made:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    dist.barrier()
after = num_of_gloo(False), num_of_gloo(True)
for each in made:
    each.close()
print(*before, *after, len(made))
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_gloo_connects_ranks_by_sockets_of_the_process_that_proc_lists(tmp_path: Path) -> None:
    """Else a failing rank cannot shut its connections, and the others wait for it until Gloo's timeout instead of
    leaving within five seconds."""
    for printed in connections_of_two_ranks(tmp_path, is_lazy=False):
        assert int(printed[-1]) >= 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("is_lazy", [False, True])
def test_the_sockets_of_gloo_are_known_by_their_options(tmp_path: Path, is_lazy: bool) -> None:
    """Else a rank cannot be freed that waits in a group of the script's own, or in a connection that came later."""
    for printed in connections_of_two_ranks(tmp_path, is_lazy=is_lazy):
        assert printed == ["0", "0", "1", "1", "1"]


def connections_of_two_ranks(tmp_path: Path, *, is_lazy: bool) -> list[list[str]]:
    """What CONNECTIONS prints on each."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", CONNECTIONS, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "TORCH_GLOO_LAZY_INIT": str(int(is_lazy))},
        )
        for rank in range(2)
    ]
    return [each.communicate(timeout=300)[0].split() for each in ranks]


# -- where a thread waits ----------------------------------------------------------------------------------------


def frames_during(action: Any) -> list[Any]:
    """The innermost frames that another thread sees in this one during `action`, which calls what it is given."""
    seen: list[Any] = []
    here = threading.get_ident()

    def look() -> None:
        seen.append(sys._current_frames()[here])

    def look_from_another_thread() -> None:
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()

    action(look_from_another_thread)
    return seen


def test_a_backward_pass_is_waited_for_in_a_file_of_torch_autograd() -> None:
    """Else a rank that waits for others inside `backward()` is not told from one that computes, and a deadlock of the
    script is reported as a stall, after `stall_timeout`."""

    def backward(look: Any) -> None:
        tensor = torch.ones(2, requires_grad=True)
        tensor.register_hook(lambda gradient: look())
        tensor.sum().backward()

    (frame,) = frames_during(backward)
    found = []
    while frame is not None:
        found.append(torch_internals.wait_in(frame))
        is_torchs = torch_internals.is_waiting_file(frame.f_code.co_filename)
        assert is_torchs or not found[-1]
        frame = frame.f_back
    assert "backward()" in found


def test_collectives_and_the_forward_of_ddp_are_in_the_files_that_are_looked_for() -> None:
    """Else a rank that waits in them is not told from one that computes."""
    for function, wait in (
        (dist.all_reduce, "a collective of torch.distributed"),
        (DistributedDataParallel.forward, "forward of DistributedDataParallel"),
    ):
        code = getattr(function, "__wrapped__", function).__code__
        assert torch_internals.is_waiting_file(code.co_filename)
        assert wait in [each for part, each in torch_internals._WAITS.items() if part in code.co_filename]


# -- DistributedDataParallel -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_a_backward_pass_of_zeros_settles_the_buckets_of_ddp() -> None:
    """Else the first step after a resume rounds its sums of gradients otherwise than the run that was never
    interrupted, on three ranks or more."""
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    model = DistributedDataParallel(module)
    assert not torch_internals.has_final_buckets(model)
    torch_internals.build_ddp_buckets(model, list(module.parameters()))
    model(torch.ones(1, 2)).sum().backward()  # DDP notes in its forward pass that they are new
    assert torch_internals.has_final_buckets(model)


def test_hooks_on_a_parameter_are_seen() -> None:
    """Else the pass of zeros that settles the buckets would run them: an optimizer in the backward pass would step."""
    parameters = [nn.Parameter(torch.ones(1)) for _ in range(3)]
    parameters[1].register_hook(lambda gradient: None)
    parameters[2].register_post_accumulate_grad_hook(lambda parameter: None)
    assert [torch_internals.has_gradient_hooks(each) for each in parameters] == [False, True, True]


@pytest.mark.usefixtures("group")
def test_what_is_asked_for_in_a_backward_pass_comes_in_that_order_around_ddp() -> None:
    """Else `ThroughputMonitor` takes DDP's wait for other ranks for work, and finds no slow rank."""
    model, reduced = DistributedDataParallel(nn.Linear(2, 1)), torch.futures.Future[torch.Tensor]()
    seen: list[str] = []

    def reduce(state: object, bucket: dist.GradBucket) -> torch.futures.Future[torch.Tensor]:
        seen.append("last gradient")
        late = threading.Timer(0.5, reduced.set_result, [bucket.buffer()])
        late.start()
        return reduced

    def before_ddp() -> None:
        seen.append(f"done: {reduced.done()}")
        torch_internals.after_backward(lambda: seen.append(f"done: {reduced.done()}"))

    model.register_comm_hook(None, reduce)
    output = model(torch.ones(3, 2))
    output.register_hook(lambda gradient: torch_internals.after_backward(before_ddp))
    output.sum().backward()
    assert seen == ["last gradient", "done: False", "done: True"]


@pytest.mark.usefixtures("group")
def test_ddp_sends_buffers_by_a_method_of_its_own() -> None:
    """Else a rank that waits for the buffers of rank 0 seems to be at work in its forward pass."""
    model = DistributedDataParallel(nn.BatchNorm1d(2))
    seen: list[str] = []

    @contextmanager
    def around() -> Iterator[None]:
        seen.append("sent")
        yield

    end = torch_internals.time_buffer_sync(model, around())
    model.will_sync_module_buffers = lambda: True
    model(torch.ones(3, 2))
    assert seen == ["sent"]
    end()
    assert "_sync_buffers" not in vars(model)


# -- torch.compile -----------------------------------------------------------------------------------------------


def test_the_wrapper_of_compile_has_the_module_under_the_name_that_is_taken_out_of_checkpoints() -> None:
    """Else a checkpoint of a compiled model cannot be loaded into one that is not, and DDP inside it is not found."""
    module = nn.Linear(1, 1)
    compiled: Any = torch.compile(module)
    assert torch_internals.inside_compile(compiled) is module
    assert f"{torch_internals.HIDDEN_BY_COMPILE}.weight" in compiled.state_dict()


def test_a_module_of_torch_s_own_is_called_through_what_was_compiled() -> None:
    """Else `prepare_model(compile=True)` leaves an nn.Sequential as slow as it was, without a word."""
    calls = []

    def backend(graph: Any, _: Any) -> Any:
        calls.append(graph)
        return graph.forward

    module = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    expected = module(torch.ones(1, 2))
    torch_internals.compiles_own_call(module, backend=backend)
    assert torch.equal(module(torch.ones(1, 2)), expected)
    assert calls


# -- FSDP2 -------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_fully_shard_puts_its_class_before_the_module_s_and_its_notes_under_known_names() -> None:
    """Else EMA cannot copy a sharded model."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    module = nn.Linear(2, 2)
    before = set(vars(module))
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    assert torch_internals.class_before_fsdp(module) is nn.Linear
    assert isinstance(module, FSDPModule)
    assert any(base.__name__ == "FSDPModule" for base in type(module).__mro__)
    added = set(vars(module)) - before
    assert all(name.startswith(torch_internals.FSDP_ATTRIBUTES) for name in added)
    torch_internals.clear_load_hooks(module)
    assert not module._load_state_dict_post_hooks
    assert all(hasattr(module.weight, name) for name in ("device_mesh", "placements", "to_local", "full_tensor"))


@pytest.mark.usefixtures("group")
def test_fsdp_knows_where_the_parameters_are_that_it_spreads() -> None:
    """Else EMA cannot copy a model of which FSDP2 leaves some parameters alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    alone = set(module[1].parameters())
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)), ignored_params=alone)
    module[0].weight = nn.Parameter(module[0].weight.detach())
    found = {id(each) for each in torch_internals.parameters_of_fsdp(module)}
    assert found == {id(each) for each in module[0].parameters()}


@pytest.mark.usefixtures("group")
def test_ddp_sends_buffers_after_a_pass_that_sent_gradients() -> None:
    """Else a step that Replay runs twice, within an accumulation, has other buffers the second time."""
    model = nn.parallel.DistributedDataParallel(nn.Linear(1, 1))
    assert getattr(model, torch_internals.SENDS_BUFFERS_NEXT) is True
    with model.no_sync():
        model(torch.ones(1, 1)).sum().backward()
    assert getattr(model, torch_internals.SENDS_BUFFERS_NEXT) is False
    model(torch.ones(1, 1)).sum().backward()
    assert getattr(model, torch_internals.SENDS_BUFFERS_NEXT) is True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.usefixtures("group")
def test_gradients_that_fsdp_has_not_sent_are_found(dtype: torch.dtype) -> None:
    """Else Replay and Guard, which run a step again, would add gradients of an accumulation twice."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    module: Any = nn.Linear(2, 2)
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)), mp_policy=policy)
    module.set_requires_gradient_sync(False)
    module(torch.ones(1, 2)).sum().backward()
    assert sum(getattr(*each) is not None for each in torch_internals.unsent_gradients(module)) == 2
    for each in torch_internals.unsent_gradients(module):
        setattr(*each, None)
    module.set_requires_gradient_sync(True)
    module(torch.ones(1, 2)).sum().backward()
    assert torch.equal(module.bias.grad.to_local(), torch.ones(2))


@pytest.mark.usefixtures("group")
def test_a_module_that_torch_has_forgotten_can_be_sharded_again() -> None:
    """Else a model whose layout failed half-way, and that was put back, can never be prepared."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    module = nn.Linear(2, 2, bias=False)
    before, weight = dict(vars(module)), module.weight
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    torch_internals.forget_fsdp(module)
    module.__class__ = nn.Linear
    vars(module).clear()
    vars(module).update(before)
    module._parameters["weight"] = weight
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    assert isinstance(module, FSDPModule)


@pytest.mark.usefixtures("group")
def test_a_replicated_module_is_one_of_fsdp_and_keeps_its_class_where_torch_says() -> None:
    """Else a tensor-parallel model cannot be averaged over `dp`, or EMA cannot copy it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule

    module = nn.Linear(2, 2)
    module.register_forward_hook(print)
    mesh = init_device_mesh("cpu", (1,))
    torch_internals.replicate(module, mesh, set())
    assert isinstance(module, FSDPModule)
    assert torch_internals.is_replicated(module)
    assert torch_internals.mesh_of_fsdp(module) is mesh
    assert list(torch_internals.hooks_of_others(module)["_forward_hooks"].values()) == [print]
    assert not torch_internals.hooks_of_others(module)["_forward_pre_hooks"]
    assert torch_internals.class_before_fsdp(module) is nn.Linear


@pytest.mark.usefixtures("group")
def test_dimensions_of_a_mesh_can_be_taken_as_one() -> None:
    """Else neither `dp_shard` with `cp` can be sharded over, nor `dp` with `cp` replicated."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (1, 1, 1), mesh_dim_names=("dp_replicate", "dp_shard", "cp"))
    name = torch_internals.flat_mesh(mesh, ["dp_shard", "cp"])
    assert mesh[name].ndim == 1
    assert mesh["dp_replicate", name].ndim == 2
    assert torch_internals.flat_mesh(mesh, ["cp"]) == "cp"


def test_a_scaler_goes_by_the_flags_that_it_is_given_for_gradients_in_parts() -> None:
    """Else ranks of a mesh do not leave out the same steps in fp16."""
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for is_too_large, expected in ((False, 0.5), (True, 0.5), (False, 0.0)):
        optimizer.zero_grad()
        scaler.scale(weight.sum() / 2).backward()
        assert weight.grad is not None
        (flag,) = torch_internals.unscale(scaler, optimizer, [weight.grad])
        assert weight.grad.tolist() == [0.5, 0.5]
        assert flag.item() == 0
        flag.fill_(float(is_too_large))
        scaler.step(optimizer)
        scaler.update()
        assert weight.tolist() == [expected, expected]
    assert scaler.get_scale() == 2.0


# -- DataLoader --------------------------------------------------------------------------------------------------


def test_the_iterator_of_a_loader_is_told_from_one_that_resets_itself() -> None:
    """Else an epoch over `iter(loader)` is taken for one of data that begin anew, and asked for a batch too many."""
    loader = DataLoader(TensorDataset(torch.arange(2)))
    assert torch_internals.is_loader_iterator(iter(loader))
    assert not torch_internals.is_loader_iterator(iter([1, 2]))


def test_workers_that_were_dropped_are_replaced_by_others() -> None:
    """Else persistent workers go on with the data set as it was in the first epoch: each epoch has its samples."""
    loader = DataLoader(TensorDataset(torch.arange(2)), num_workers=1, persistent_workers=True)
    first = iter(loader)
    assert len(list(first)) == 2
    assert iter(loader) is first
    torch_internals.drop_workers(loader)
    assert iter(loader) is not first
    torch_internals.exchange_workers(loader, first)
    assert iter(loader) is first
    assert torch_internals.exchange_workers(loader, None) is first
    assert iter(loader) is not first


class AsksForItsWorker(IterableDataset[bool]):
    def __iter__(self) -> Iterator[bool]:
        yield get_worker_info() is None
        with torch_internals.outside_worker():
            yield get_worker_info() is None
        yield get_worker_info() is None


def test_a_stream_can_be_kept_from_knowing_its_worker() -> None:
    """Else pack_sequences() in workers packs the part that a source gives each worker: another order of tokens."""
    assert list(DataLoader(AsksForItsWorker(), batch_size=None, num_workers=1)) == [False, True, False]


# -- torch.save --------------------------------------------------------------------------------------------------


def test_a_saved_file_ends_with_the_record_of_a_zip_archive_without_a_comment() -> None:
    """Else a checkpoint cannot take its description and digest as that comment: no save works, and says so."""
    written: list[bytes] = []

    class Sink(io.RawIOBase):
        def write(self, data: Any) -> int:
            written.append(bytes(data))
            return len(data)

    torch.save({"a": torch.ones(3)}, Sink())  # type: ignore[arg-type]
    whole = b"".join(written)
    assert whole[-22:].startswith(b"PK\x05\x06")
    assert whole.endswith(b"\0\0")
    with_comment = whole[:-2] + (5).to_bytes(2, "little") + b"notes"
    assert zipfile.ZipFile(io.BytesIO(with_comment)).comment == b"notes"
    assert torch.equal(torch.load(io.BytesIO(with_comment), weights_only=True)["a"], torch.ones(3))


def test_checksums_of_tensors_can_be_left_out_of_a_saved_file() -> None:
    """Else a save takes up to twice the time."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        file = io.BytesIO()
        torch.save(torch.ones(3), file)
    finally:
        torch.serialization.set_crc32_options(before)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), torch.ones(3))


def test_a_module_s_state_has_the_versions_of_its_parts_beside_its_items() -> None:
    """Else a state that was loaded from a checkpoint is taken for one of the oldest version of each module."""
    assert nn.BatchNorm1d(1).state_dict()._metadata[""]["version"] >= 2  # type: ignore[attr-defined]


def test_tensors_are_copied_and_scaled_many_at_a_time() -> None:
    """Else EMA, the scaling of gradients and snapshots of states fail."""
    targets, sources = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.ones(3)]
    torch._foreach_copy_(targets, sources)
    torch._foreach_mul_(targets, 4.0)
    torch._foreach_lerp_(targets, sources, 0.5)
    assert [each.tolist() for each in targets] == [[2.5] * 2, [2.5] * 3]


@pytest.mark.usefixtures("group")
def test_meshes_are_forgotten_by_what_keeps_them() -> None:
    """Else DTensors of a second group use the groups of the first one, which are gone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, _redistribute, debug, distribute_tensor

    mesh = init_device_mesh("cpu", (1,))
    tensor = distribute_tensor(torch.ones(2, 2), mesh, [Shard(0)])
    doubled: Any = tensor + tensor
    doubled.redistribute(mesh, [Replicate()])
    assert _redistribute._gen_transform_infos.cache_info().currsize > 0
    torch_internals.forget_meshes()
    assert debug._get_python_sharding_prop_cache_info().currsize == 0
    assert _redistribute._gen_transform_infos.cache_info().currsize == 0


def test_the_result_of_a_collective_under_way_is_of_a_class_that_can_be_awaited() -> None:
    """Else an output of a tensor-parallel model is sent to other ranks before its numbers are there."""
    from torch.distributed._functional_collectives import AsyncCollectiveTensor

    assert torch_internals.is_pending(AsyncCollectiveTensor(torch.ones(2)))
    assert callable(AsyncCollectiveTensor.wait)
    assert not torch_internals.is_pending(torch.ones(2))
