"""Collect the content of a checkpoint: the states of the user's objects, and one entry of dengine."""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn

from dengine.checkpoint.states.external_state import refuse_to_save
from dengine.checkpoint.states.parts import parts_in_states
from dengine.checkpoint.states.per_rank import PerRank
from dengine.checkpoint.states.plain import no_state, plain_states
from dengine.checkpoint.states.replicas import Print, prints_of, prints_of_others, refuse_lost
from dengine.distributed import all_gather_object, unwrap_model, world
from dengine.dtensor import PLAIN, any_dtensor, is_made_of_others, local_part, whole
from dengine.errors import CheckpointError
from dengine.types import Stateful, is_stateful, with_per_rank_state

__all__ = [
    "FORMAT_VERSION",
    "RANDOM",
    "RESERVED",
    "Collected",
    "HostCopy",
    "States",
    "check_objects",
    "collect",
    "gather_full",
    "mapped",
    "unwrapped",
]

RESERVED = "dengine"
RANDOM = "random"  # in the reserved entry: name -> one state of the generators for each rank
FORMAT_VERSION = 1

States: TypeAlias = dict[str, Any]


def check_objects(objects: Mapping[str, object]) -> dict[str, Stateful]:
    """`objects`, checked to be a mapping of objects that can be saved and loaded.

    Raises:
        TypeError: it is no mapping, a name is no string, or an object has no `state_dict` and `load_state_dict`; for a
            plain value the message says how the engine can save it.
        ValueError: it is empty, or uses the reserved name.
    """
    if not isinstance(objects, Mapping):
        raise TypeError(f"A checkpoint takes a dict such as {{'model': model}}, but got {objects!r}.")
    if not objects:
        raise ValueError("A checkpoint needs at least one object to save, e.g. {'model': model}.")
    checked: dict[str, Stateful] = {}
    for name, value in objects.items():
        if not isinstance(name, str):
            raise TypeError(f"The names of what is saved must be strings, but got {name!r}.")
        if name == RESERVED:
            raise ValueError(f"The name {RESERVED!r} is reserved for dengine's own entry: choose another one.")
        if isinstance(value, type):
            raise TypeError(f"{name!r} cannot be saved: it is the class {value.__qualname__}; pass an instance.")
        if not is_stateful(value):
            raise TypeError(
                f"{name!r} cannot be saved: a {type(value).__qualname__} has no state_dict() and load_state_dict()"
                f"{_way_out(name, value)}."
            )
        checked[name] = value
    return checked


def _way_out(name: str, value: object) -> str:
    """The end of the message: how to save a value without a state instead, if that is known."""
    if value is None:
        return ": leave it out"
    if isinstance(value, torch.Tensor):
        return ": register it as a buffer of a module that is saved"
    if not isinstance(value, (bool, int, float, complex, str, bytes, list, tuple, dict, set, np.generic, np.ndarray)):
        return ""
    if name in ("epoch", "epochs", "iteration", "iterations", "step", "global_step"):
        name = f"my_{name}"  # the engine has an attribute of that name
    attribute = name if name.isidentifier() else "value"
    return (
        ". An engine's state has a checkpoint of the epoch and iteration, and of plain values of your own: save "
        f"{{'trainer': trainer}}, having set trainer.state.{attribute} and called "
        f"trainer.state.persist({attribute!r})"
    )


@dataclass(frozen=True)
class Collected:
    """States by name, with dengine's own entry.

    Attributes:
        random: the generators of this rank, by the names of the objects that carry them.
        of_ranks: those of all ranks; None if they are to go into a folder, where each rank's are in its own file.
        is_sharded: whether a tensor in them is, or would be, sharded (FSDP2).
        parts: the names of which other ranks have tensors of their own, see `parts_in_states`.
        per_rank: what each rank keeps for itself (`PerRank`), by name; {} on a lone rank, whose states have it.
        has_own: whether there are parts, or states of `per_rank`, on any rank.
    """

    states: States
    random: dict[str, Any]
    of_ranks: list[dict[str, Any]] | None
    is_sharded: bool
    num_ranks: int
    parts: Mapping[tuple[str, ...], str]
    per_rank: States
    has_own: bool

    @property
    def needs_folder(self) -> bool:
        return self.is_sharded or self.has_own


class _Given(NamedTuple):
    """The states that the objects of this rank have given."""

    states: States
    random: dict[str, Any]
    has_shards: bool
    prints: dict[str, dict[str, Print]]
    parts: dict[tuple[str, ...], str]
    per_rank: States

    @property
    def has_own(self) -> bool:
        return bool(self.parts or self.per_rank)


_NOTHING = _Given({}, {}, False, {}, {}, {})


def collect(objects: Mapping[str, Stateful], *, into_folder: bool = False) -> Collected:
    """The states by name, as `torch.load(weights_only=True)` reads them, and the random generators of every rank.

    Models are taken out of DDP and `torch.compile`, and no name shows what was compiled. Tensors are the live ones, not
    copies, and sharded ones (FSDP2) have this rank's part. `into_folder`: the states go into a folder, sharded or not.
    Collective: one gather of small objects.

    Raises:
        CheckpointError: on every rank, if an object on one of them gives no state, or one that could not be loaded
            again; if they save different names, or different tensors with the same name.
    """
    mine, failure, cause = _NOTHING, None, None
    try:
        mine = _given(objects)
    except (CheckpointError, TypeError) as error:
        failure, cause = str(error), error.__cause__ or error
    except Exception as error:  # whatever it is, the other ranks must not wait for ever
        failure, cause = f"the states could not be taken: {type(error).__qualname__}: {error}", error
    random = None if into_folder or mine.has_shards or mine.has_own else mine.random
    names = sorted(mine.random), sorted(mine.per_rank)
    report = failure, (names, random), mine.has_shards, mine.has_own, mine.prints
    everyone = all_gather_object((sorted(objects), report))
    gathered = [theirs for _, theirs in everyone]
    _agree_on_names([names for names, _ in everyone])
    for rank, (reason, *_) in enumerate(gathered):
        if reason is not None:
            raise CheckpointError(f"Nothing was saved or changed, since on rank {rank} {reason}") from cause
    for place, what in enumerate(("random number generators of ", "a state of each rank (PerRank) of ")):
        _agree_on_names([theirs[place] for _, (theirs, _), *_ in gathered], what)
    is_sharded = any(theirs for _, _, theirs, *_ in gathered)
    has_own = any(theirs for _, _, _, theirs, _ in gathered)
    models = [name for name, value in objects.items() if isinstance(value, nn.Module)]
    refuse_lost([prints for *_, prints in gathered], models, is_united=into_folder or is_sharded or has_own)
    of_ranks = [theirs for _, (_, theirs), *_ in gathered if theirs is not None]
    reserved = {"format": FORMAT_VERSION, "world_size": len(gathered)}
    return Collected(
        {**mine.states, RESERVED: reserved},
        mine.random,
        of_ranks if len(of_ranks) == len(gathered) else None,
        is_sharded,
        len(gathered),
        mine.parts,
        mine.per_rank,
        has_own,
    )


def _given(objects: Mapping[str, Stateful]) -> _Given:
    """The states of `objects` on this rank. Raises: CheckpointError, TypeError: something cannot be saved."""
    inner = unwrapped(objects)
    refuse_to_save(inner)
    engines = with_per_rank_state(objects)
    states: States = {}
    random: dict[str, Any] = {}
    for name, value in inner.items():
        try:
            states[name] = value.state_dict()
            if name in engines:
                random[name] = engines[name].random_state()
        except Exception as error:
            raise no_state(name, error) from error
    states, tensors = plain_states(states)
    own = [name for name, value in objects.items() if isinstance(value, PerRank)] if world().size > 1 else []
    per_rank = {name: states.pop(name) for name in own}
    parts = parts_in_states(objects, states)
    models = {name: value for name, value in objects.items() if isinstance(value, nn.Module)}
    apart = {path for path, part in parts.items() if part}
    prints = prints_of(models, apart) | prints_of_others(objects, states, apart)
    return _Given(states, plain_states(random)[0], _has_shards(tensors, objects), prints, parts, per_rank)


def _has_shards(tensors: Sequence[torch.Tensor], objects: Mapping[str, Stateful]) -> bool:
    """Whether the `tensors` of the states are sharded, or will be: an optimizer may have no state yet."""
    optimizers = [each for each in objects.values() if isinstance(each, torch.optim.Optimizer)]
    parameters = [each for one in optimizers for group in one.param_groups for each in group["params"]]
    return any_dtensor([*tensors, *parameters])


def _agree_on_names(names: Sequence[list[str]], what: str = "") -> None:
    """Check that all ranks save the same names.

    Raises:
        CheckpointError: a rank saves other names than rank 0.
    """
    for rank, theirs in enumerate(names):
        if theirs != names[0]:
            here, on_zero = (" and ".join(each) or "nothing" for each in (theirs, names[0]))
            raise CheckpointError(
                f"Nothing was saved, since rank {rank} saves {what}{here}, rank 0 {what}{on_zero}: give the same "
                "names on all ranks."
            )


def gather_full(states: States) -> States:
    """`states` with the whole tensor for each sharded one, on every rank. Collective: a gather for each sharded
    tensor.
    """
    return mapped(states, _whole)  # type: ignore[no-any-return]


class HostCopy:
    """Copies states to host memory, so that training can go on.

    The next copy uses the memory again, so only one copy is valid at a time. It is pinned if tensors are on a CUDA
    device. Tied weights stay tied.
    """

    def __init__(self) -> None:
        self._buffers: list[torch.Tensor] = []
        self._layouts: list[tuple[Any, ...]] = []  # the kind of tensor for which each was made

    def take(self, states: States, *, waits: bool = True) -> States:
        """A copy of `states`. Cost: one copy of the bytes, and one wait for each CUDA device that has some of them.

        Without `waits` the copies are only queued: for states that go back to where they came from.
        """
        slots: dict[tuple[Any, ...], int] = {}
        sources: list[torch.Tensor] = []

        def copy_of(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return copy.deepcopy(value)
            # A sharded tensor has no address itself, but its part has.
            part = value if type(value) in PLAIN else local_part(value)
            is_made = type(part) not in PLAIN and is_made_of_others(part)
            if value.layout != torch.strided or is_made:  # then it has no address
                return value.detach().cpu().clone()
            layout = (type(value) is torch.Tensor, value.device, value.dtype, value.shape, value.stride())
            slot = slots.setdefault((part.data_ptr(), *layout), len(sources))
            if slot == len(sources):
                sources.append(part)
                self._make_fit(value, slot, layout)
            return self._buffers[slot]

        taken = mapped(states, copy_of)
        del self._buffers[len(sources) :], self._layouts[len(sources) :]
        self._fill(sources, waits=waits)
        return taken  # type: ignore[no-any-return]

    def _fill(self, sources: list[torch.Tensor], *, waits: bool) -> None:
        """Copy all tensors in one call: for small tensors, a call for each would cost more than the bytes."""
        devices = {source.device for source in sources if source.device.type == "cuda"}
        targets = [buffer if type(buffer) in PLAIN else local_part(buffer) for buffer in self._buffers]
        with torch.no_grad():
            if sources:
                torch._foreach_copy_(targets, sources, non_blocking=bool(devices))
        for device in devices if waits else ():
            torch.cuda.synchronize(device)  # the copies were only queued

    def _make_fit(self, tensor: torch.Tensor, slot: int, layout: tuple[Any, ...]) -> None:
        if slot < len(self._buffers) and self._layouts[slot] == layout:
            return
        buffer = torch.empty_like(tensor.detach(), device="cpu", pin_memory=tensor.device.type == "cuda")
        self._buffers[slot : slot + 1] = [buffer]
        self._layouts[slot : slot + 1] = [layout]


def unwrapped(objects: Mapping[str, Stateful]) -> dict[str, Stateful]:
    """`objects`, with models taken out of their wrappers."""
    return {name: unwrap_model(each) if isinstance(each, nn.Module) else each for name, each in objects.items()}


def _whole(value: Any) -> Any:
    """The whole of a sharded tensor: saved as it is, a file would have only one rank's part."""
    return whole(value) if isinstance(value, torch.Tensor) else value


def mapped(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """`value` with `leaf` applied to the values in its dicts, lists and tuples, all of which are new objects."""
    if isinstance(value, dict):
        new = copy.copy(value)  # keeps the type, and the versions in a module's state (`_metadata`)
        for key, part in value.items():
            new[key] = mapped(part, leaf)
        return new
    if type(value) in (list, tuple):
        return type(value)([mapped(part, leaf) for part in value])
    return leaf(value)
