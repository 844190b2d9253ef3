"""Set aside the values of a model before it is spread over ranks, and give them back one tensor at a time.

So no rank needs more memory than for its own part and one whole tensor. Values come from the first rank of the
replicas. For a model on the meta device, each module's `reset_parameters` makes them from torch's seed and the
module's name, so that they are the same on every mesh.
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from dengine.comm.parts import named_modules_beside_parts
from dengine.compiled_names import without_compiled
from dengine.dtensor import PLAIN, cut_like, is_dtensor, laid_out_like, local_part

__all__ = ["Initialize", "Kept", "check_meta", "given_back", "set_aside"]

Initialize: TypeAlias = Callable[[nn.Module], object]
Kept: TypeAlias = dict[tuple[nn.Module, str], Tensor]


def check_meta(model: nn.Module, init_fn: Initialize | None, *, is_of_experts: bool) -> bool:
    """Whether a part of `model` is on the meta device, and must be initialised now.

    Raises: ValueError: a module cannot initialise its own tensors there, and there is no `init_fn`.
    """
    if is_of_experts:
        if init_fn is not None:
            raise ValueError(
                "init_fn= initialises experts together with the model that they are in, by their names there: pass it "
                "to prepare_model(model), which comes after prepare_model(experts, parts='ep')."
            )
        return False
    has_meta = False
    for name, module in model.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        found = [key for key, value in own if value.is_meta]
        has_meta = has_meta or bool(found)
        if found and init_fn is None and _reset_of(module) is None:
            raise ValueError(
                f"{f'{name}.{found[0]}'.lstrip('.')!r} is on the meta device, but its {type(module).__qualname__} has "
                "no reset_parameters() that could initialise it: pass init_fn=, a function that initialises the own "
                "parameters and buffers of the module that it is given."
            )
    if init_fn is not None and not has_meta:
        raise ValueError("init_fn= initialises models on the meta device, but this one has its values already.")
    return has_meta


def set_aside(model: nn.Module, *, only_meta: bool = False) -> Kept:
    """Set aside the plain parameters of `model`, and put an empty one on the meta device in place of each.

    Parts inside it have their values and their layout already: of these, only parameters on the meta device are set
        aside.

    Args:
        only_meta: set aside only parameters on the meta device, everywhere.
    """
    kept: Kept = {}
    empty: dict[int, nn.Parameter] = {}
    own = {module for _, module in named_modules_beside_parts(model)}
    for module in model.modules():
        for name, value in list(module._parameters.items()):
            is_plain = type(value) in PLAIN and module in own and not only_meta
            if value is None or not (value.is_meta or is_plain):
                continue
            kept[module, name] = value
            if not value.is_meta:
                if id(value) not in empty:  # tied weights stay tied
                    bare = torch.empty_like(value, device="meta")
                    empty[id(value)] = nn.Parameter(bare, requires_grad=value.requires_grad)
                _put(module, name, empty[id(value)])
    return kept


def given_back(
    model: nn.Module, kept: Kept, device: torch.device, seed: int, init_fn: Initialize | None, *, on_host: bool = False
) -> Iterator[Tensor]:
    """Give `model` its values back in its present layout. After this, nothing of `kept` is on the meta device.

    Yields each tensor that ranks must get from one of them, whole and on `device`. When the iterator goes on, this rank
    takes its part of the present content of that tensor.

    Args:
        on_host: parts that are cut stay on the host (FSDP's CPU offload).
    """
    done: dict[int, tuple[Tensor, nn.Parameter]] = {}
    own = {module for _, module in named_modules_beside_parts(model)}
    for path, module in model.named_modules():
        made = _initialised(module, path, kept, device, seed, init_fn)
        for name in list(module._parameters):
            if (source := kept.pop((module, name), None)) is None:
                continue
            target: Any = module._parameters[name]
            if id(target) not in done:
                whole = made[name] if source.is_meta else source.detach().to(device)
                if not source.is_meta:
                    yield whole
                done[id(target)] = target, _part(whole, source, target, on_host=on_host)
            _put(module, name, done[id(target)][1])
        for name, value in list(module._buffers.items()):
            if value is not None and (name in made or not value.is_meta):
                whole = made[name] if value.is_meta else value.to(device)
                module._buffers[name] = whole
                if module in own and not (value.is_meta or is_dtensor(whole)):
                    yield whole


def _part(whole: Tensor, source: Tensor, target: Tensor, *, on_host: bool) -> nn.Parameter:
    """This rank's part of `whole` as a parameter with the layout of `target`; `source` itself if that is the same."""
    if not is_dtensor(target):
        if isinstance(source, nn.Parameter) and source.device == whole.device:
            return source
        return nn.Parameter(whole, requires_grad=source.requires_grad)
    local = local_part(cut_like(whole, target))
    if local.untyped_storage().nbytes() > local.nbytes:
        local = local.clone()  # else the whole tensor would live as long as its part
    cut = laid_out_like(local, target)
    return nn.Parameter(cut.cpu() if on_host else cut, requires_grad=source.requires_grad)


def _initialised(
    module: nn.Module, path: str, kept: Kept, device: torch.device, seed: int, init_fn: Initialize | None
) -> dict[str, Tensor]:
    """New whole values for the tensors of `module` itself on the meta device. Torch's generators are restored."""
    parameters, buffers = module._parameters, module._buffers
    names = [name for name in parameters if (source := kept.get((module, name))) is not None and source.is_meta]
    names += [name for name, value in buffers.items() if value is not None and value.is_meta]
    if not names:
        return {}
    # The module's other own tensors are initialised as well, but not kept.
    own: dict[str, nn.Parameter | None] = {
        name: None if value is None else nn.Parameter(_empty(value, device), requires_grad=value.is_floating_point())
        for name, value in parameters.items()
    }
    own_buffers = {name: None if value is None else _empty(value, device) for name, value in buffers.items()}
    name = without_compiled(path)
    mixed = int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "big") >> 1
    initialise = init_fn if init_fn is not None else lambda _: _call(_reset_of(module))
    try:
        module._parameters, module._buffers = own, own_buffers
        with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device], device_type=_generator(device)):
            torch.manual_seed(mixed)
            with torch.no_grad():
                initialise(module)
        made = {**module._parameters, **module._buffers}
    finally:
        module._parameters, module._buffers = parameters, buffers
    return {name: value.detach() for name in names if (value := made[name]) is not None}


def _generator(device: torch.device) -> str:
    return "cuda" if device.type == "cpu" else device.type


def _empty(like: Tensor, device: torch.device) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=device)


def _call(reset: Callable[[], object] | None) -> None:
    assert reset is not None, "check_meta() has seen to it"
    reset()


def _reset_of(module: nn.Module) -> Callable[[], object] | None:
    """The method with which `module` initialises its own tensors; nn.MultiheadAttention has another name for it."""
    for name in ("reset_parameters", "_reset_parameters"):
        found: Any = getattr(module, name, None)
        if callable(found):
            return found  # type: ignore[no-any-return]
    return None


def _put(module: nn.Module, name: str, value: nn.Parameter) -> None:
    """Set a parameter without the checks of `register_parameter`, by `__setattr__` if the class has its own (RNNs)."""
    if type(module).__setattr__ is nn.Module.__setattr__:
        module._parameters[name] = value
    else:
        setattr(module, name, value)
