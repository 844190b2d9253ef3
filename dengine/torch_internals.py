"""Every use of a private name of torch, or of behaviour that torch does not promise: one function or constant each.

`tests/test_canaries.py` has a test for each, which fails if torch changes it and says what then no longer holds;
`bash launch/test.sh -m canary` runs these alone.
"""

import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from functools import partial
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore, PrefixStore, TCPStore

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.data import DataLoader

__all__ = [
    "FSDP_ATTRIBUTES",
    "HIDDEN_BY_COMPILE",
    "LIBUV_TAKES_LISTENER",
    "SENDS_BUFFERS_NEXT",
    "HashStore",
    "PrefixStore",
    "TCPStore",
    "abort_process_groups",
    "after_backward",
    "build_ddp_buckets",
    "class_before_fsdp",
    "clear_load_hooks",
    "compiles_own_call",
    "default_store",
    "drop_workers",
    "flat_mesh",
    "forget_fsdp",
    "forget_meshes",
    "has_final_buckets",
    "has_gradient_hooks",
    "hooks_of_others",
    "inside_compile",
    "is_loader_iterator",
    "is_pending",
    "is_replicated",
    "is_socket_of_gloo",
    "is_waiting_file",
    "mesh_of_fsdp",
    "num_collectives",
    "outside_worker",
    "parameters_of_fsdp",
    "process_groups",
    "replicate",
    "set_timeout",
    "time_buffer_sync",
    "unscale",
    "unsent_gradients",
    "wait_in",
]

T = TypeVar("T")

HIDDEN_BY_COMPILE = "_orig_mod"  # the attribute of torch.compile's wrapper that holds the module
SENDS_BUFFERS_NEXT = "require_forward_param_sync"  # DDP's: False after a backward pass inside no_sync()
LIBUV_TAKES_LISTENER = torch.__version__ >= "2.8"  # else a TCPStore on a given socket has to be the older kind
FSDP_ATTRIBUTES = ("__composable_api", "_is_fsdp", "_fsdp_")  # how those begin that `fully_shard` leaves on a module

_FSDP_MODULES = ("torch.distributed.fsdp.", "torch.distributed._composable.")
_TIMEVAL_BYTES = 16
_BACKWARD = "backward()"
_WAITS = {
    "/torch/nn/parallel/distributed.py": "forward of DistributedDataParallel",
    "/torch/distributed/": "a collective of torch.distributed",  # FSDP's, too
}
_WAITING_FOLDERS = ("/torch/autograd/", "/torch/distributed/", "/torch/nn/parallel/")


# -- process groups ----------------------------------------------------------------------------------------------


def process_groups() -> list[dist.ProcessGroup]:
    """All process groups of this process, the default one included."""
    return list(dist.distributed_c10d._world.pg_map)


def num_collectives(group: dist.ProcessGroup | None) -> int:
    """How many collectives this rank has joined in `group`."""
    counted: Any = group
    return int(counted._get_sequence_number_for_group())


def default_store() -> dist.Store:
    """The store with which the default process group was made."""
    return dist.distributed_c10d._get_default_store()


def set_timeout(group: dist.ProcessGroup | None, timeout: timedelta) -> None:
    """Set the timeout of a group's collectives. A mesh makes its groups with torch's default."""
    dist.distributed_c10d._set_pg_timeout(timeout, group)


def abort_process_groups() -> None:
    """Abort the collectives that run on the device, in all groups, without waiting for them."""
    dist.distributed_c10d._abort_process_group()


def is_socket_of_gloo(number: int, *, is_listening: bool) -> bool:
    """Whether a descriptor of this process is a connection of Gloo's, or a socket at which Gloo awaits connections.

    By its options: Gloo's are inherited by programs that the process starts, and allow their address to be used again,
    which hardly anybody asks for on a connection. Those have the group's timeout in the kernel besides; the others
    listen at one address of the host.

    Raises: OSError: it is closed, or no socket.
    """
    if not os.get_inheritable(number):
        return False
    with socket.socket(fileno=os.dup(number)) as one:
        if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
            return False
        if not one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR):
            return False
        if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return is_listening and one.getsockname()[0] not in ("0.0.0.0", "::")
        return not is_listening and any(one.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL_BYTES))


# -- where a thread waits ----------------------------------------------------------------------------------------


def is_pending(value: object) -> bool:
    """Whether `value` is the result of a collective that may still be under way, as a model's output under `tp` is.

    Any operation on it waits; to pickle it does not.
    """
    known = sys.modules.get("torch.distributed._functional_collectives")
    return known is not None and isinstance(value, known.AsyncCollectiveTensor)


def is_waiting_file(file: str) -> bool:
    """Whether it is a file of torch in which a thread may wait for other ranks; it may compute there, too."""
    return any(folder in file.replace("\\", "/") for folder in _WAITING_FOLDERS)


def wait_in(frame: FrameType) -> str:
    """What this innermost frame waits for in torch, if it may wait for other ranks; else ""."""
    file = frame.f_code.co_filename.replace("\\", "/")
    if file.endswith("torch/autograd/graph.py") and frame.f_code.co_name == "_engine_run_backward":
        return _BACKWARD
    return next((name for part, name in _WAITS.items() if part in file), "")


# -- DistributedDataParallel -------------------------------------------------------------------------------------


def has_final_buckets(model: "DistributedDataParallel") -> bool:
    """Whether DDP has rebuilt its buckets already, or will not: it has a hook, or reduces after the backward pass."""
    return bool(
        getattr(model, "_has_rebuilt_buckets", False) or model._comm_hooks or model._delay_all_reduce_all_params
    )


def has_gradient_hooks(parameter: Tensor) -> bool:
    """Whether a hook runs when the gradient of `parameter` is ready."""
    hooks: Any = parameter
    return bool(hooks._backward_hooks or hooks._post_accumulate_grad_hooks)


def build_ddp_buckets(model: "DistributedDataParallel", parameters: list[nn.Parameter]) -> None:
    """Show DDP a backward pass of zeros through `parameters`, in reverse order. Collective: one all-reduce."""
    model.reducer.prepare_for_backward([])
    for each in reversed(parameters):
        torch.autograd.backward(each, torch.zeros_like(each))


def after_backward(function: Callable[[], None]) -> None:
    """Call `function` at the end of the backward pass that is under way, once all gradients are there.

    What was asked for earlier in the pass is called earlier. DDP asks when its last gradient is ready, and then waits
    for the other ranks: before it comes what a hook of the model's output asks for, and after it what that asks for.
    """
    engine: Any = torch.autograd.Variable
    engine._execution_engine.queue_callback(function)


def time_buffer_sync(model: "DistributedDataParallel", around: AbstractContextManager[None]) -> Callable[[], None]:
    """Enter `around` whenever DDP sends rank 0's buffers, before a forward pass. Gives the function that ends it."""
    wrapper: Any = model
    before = vars(wrapper).get("_sync_buffers")
    wrapper._sync_buffers = partial(_send_within, around, wrapper._sync_buffers)  # the model can still be pickled

    def end() -> None:
        if before is None:
            vars(wrapper).pop("_sync_buffers", None)
        else:
            wrapper._sync_buffers = before

    return end


def _send_within(around: AbstractContextManager[None], send: Callable[[], None]) -> None:
    with around:
        send()


# -- torch.compile -----------------------------------------------------------------------------------------------


def inside_compile(model: T) -> T:
    """The module that `torch.compile` has wrapped; any other model itself."""
    return getattr(model, HIDDEN_BY_COMPILE, model)


def compiles_own_call(model: nn.Module, **options: Any) -> None:
    """Do `model.compile(**options)`, for a class of torch itself.

    torch compiles no code of its own, so it would silently leave an nn.Sequential as it is.
    """
    call: Any = model._call_impl

    def called(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    called.__code__ = called.__code__.replace()  # what is compiled is kept by code: each model has its own
    model._compiled_call_impl = torch.compile(called, **options)


# -- FSDP2 -------------------------------------------------------------------------------------------------------


def class_before_fsdp(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before `fully_shard`: FSDPLinear(FSDPModule, Linear)."""
    kind: Any = type(module)
    return kind.__mro__[kind._orig_cls_mro_index]  # type: ignore[no-any-return]


def mesh_of_fsdp(module: Any) -> Any:
    """The mesh over which `fully_shard` or `replicate` spreads the parameters of `module`; None if it has none."""
    group = module._get_fsdp_state()._fsdp_param_group
    return None if group is None else group.mesh_info.mesh


def parameters_of_fsdp(module: Any) -> list[nn.Parameter]:
    """Those that `fully_shard` or `replicate` spreads as what `module` has: not those of other such modules in it."""
    group = module._get_fsdp_state()._fsdp_param_group
    positions = [] if group is None else [each._module_info for each in group.fsdp_params]
    # Not `sharded_param`, which torch sets anew in the first forward pass only, if others were put in their place.
    return [getattr(place.module, place.param_name) for place in positions]


def unsent_gradients(module: Any) -> list[tuple[Any, str]]:
    """Where FSDP2 keeps the gradients of `module` that it has added up, but not sent yet: objects and attributes."""
    group = module._get_fsdp_state()._fsdp_param_group
    kept = [] if group is None else group.fsdp_params
    whole = [each._unsharded_param for each in kept if hasattr(each, "_unsharded_param")]
    return [*((each, "grad") for each in whole), *((each, "unsharded_accumulated_grad") for each in kept)]


def is_replicated(module: nn.Module) -> bool:
    """Whether `replicate` was called for `module`, which then is a module of FSDP2, too."""
    return any(base.__name__ == "ReplicateModule" for base in type(module).__mro__)


def hooks_of_others(module: nn.Module) -> dict[str, Any]:
    """The hooks around the forward pass of `module`, except FSDP2's own: a copy of each of torch's tables."""
    kept: dict[str, Any] = {}
    for table in ("_forward_pre_hooks", "_forward_hooks"):
        hooks: dict[int, Any] = getattr(module, table)
        of_others = {
            key: hook
            for key, hook in hooks.items()
            if not type(getattr(hook, "__self__", None)).__module__.startswith(_FSDP_MODULES)
        }
        kept[table] = type(hooks)(of_others)
        for flags in (f"{table}_with_kwargs", f"{table}_always_called"):
            if (known := getattr(module, flags, None)) is not None:
                kept[flags] = type(known)({key: value for key, value in known.items() if key in of_others})
    return kept


def replicate(module: nn.Module, mesh: "DeviceMesh | None", ignored: set[nn.Parameter]) -> None:
    """Average the gradients of `module` over `mesh`, as DDP does, but by FSDP2, which takes DTensors.

    But for those of the parameters `ignored`.
    """
    from torch.distributed._composable.replicate_with_fsdp import replicate

    replicate(module, mesh=mesh, ignored_params=ignored)


def flat_mesh(mesh: "DeviceMesh", names: list[str]) -> str:
    """The name of one dimension of `mesh` that joins those in `names`, by which the mesh can be indexed.

    Collective, if there are several: a new group, the first time.
    """
    if len(names) > 1:
        mesh[tuple(names)]._flatten("_".join(names))
    return "_".join(names)


def forget_meshes() -> None:
    """Have DTensors forget all meshes, in this thread and in the one that runs backward passes on this rank's GPU.

    What torch has found out about an operation is kept for its mesh, and a mesh whose groups are gone equals a new one
    of the same ranks, whose collectives would then go to groups that are gone. Cost: nothing without DTensors.
    """
    if "torch.distributed.tensor" not in sys.modules:
        return
    _forget_meshes()
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        with torch.inference_mode(False), torch.enable_grad():
            value = torch.zeros((), device="cuda", requires_grad=True)
            value.register_hook(lambda _: _forget_meshes())  # type: ignore[no-untyped-call]
            (value * 1).backward()  # type: ignore[no-untyped-call]


def _forget_meshes() -> None:
    from torch.distributed.tensor import _redistribute, debug

    debug._clear_sharding_prop_cache()  # type: ignore[no-untyped-call]
    _redistribute._gen_transform_infos.cache_clear()
    _redistribute.clear_redistribute_planner_cache()


def forget_fsdp(module: nn.Module) -> None:
    """Have torch forget that `fully_shard` or `replicate` was called for `module`, else it would refuse a second time.

    Its class and its attributes are the caller's business.
    """
    from torch.distributed._composable_state import _module_state_mapping

    _module_state_mapping.pop(module, None)


def clear_load_hooks(module: nn.Module) -> None:
    """Drop the hooks that run after a state was loaded: FSDP2's would reset the model instead of its copy."""
    module._load_state_dict_post_hooks.clear()


# -- GradScaler --------------------------------------------------------------------------------------------------


def unscale(scaler: Any, optimizer: Any, gradients: list[Tensor]) -> list[Tensor]:
    """As `scaler.unscale_(optimizer)`, whose gradients are, or have as parts, the plain tensors `gradients`.

    torch itself takes no DTensors beside plain tensors, and of DTensors it looks for the ranks of the first one's mesh.

    Returns: for each device a flag, of one number above 0 if a gradient there is not finite. What `scaler.step` goes
        by is what they hold then.
    """
    holders = [gradient.detach() for gradient in gradients]
    for holder, gradient in zip(holders, gradients, strict=True):
        holder.grad = gradient
    stand_in: Any = SimpleNamespace(param_groups=[{"params": holders}])
    scaler.unscale_(stand_in)
    state = scaler._per_optimizer_states.pop(id(stand_in))
    scaler._per_optimizer_states[id(optimizer)] = state
    return list(state["found_inf_per_device"].values())


# -- DataLoader --------------------------------------------------------------------------------------------------


def is_loader_iterator(data: object) -> bool:
    """Whether it is an iterator of a DataLoader."""
    from torch.utils.data.dataloader import _BaseDataLoaderIter

    return isinstance(data, _BaseDataLoaderIter)


def drop_workers(loader: "DataLoader[object]") -> None:
    """End the persistent workers of `loader`, so that its next iteration starts others."""
    loader._iterator = None


def exchange_workers(loader: "DataLoader[object]", workers: Any) -> Any:
    """Give `loader` the iterator with persistent `workers` (None: none), and take the one that it had."""
    before, loader._iterator = loader._iterator, workers
    return before


@contextmanager
def outside_worker() -> Iterator[None]:
    """A context in which `torch.utils.data.get_worker_info()` knows of no worker, so that a stream gives all it has."""
    from torch.utils.data._utils import worker

    before, worker._worker_info = worker._worker_info, None
    try:
        yield
    finally:
        worker._worker_info = before
