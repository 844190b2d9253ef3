"""Load states into objects: into all of them or, if one refuses, into none."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from dengine.checkpoint.states.partial import Fitting
from dengine.checkpoint.states.per_rank import PerRank, is_of_ranks
from dengine.checkpoint.states.snapshot import RANDOM, RESERVED, HostCopy, States, unwrapped
from dengine.compiled_names import aligned
from dengine.distributed import world
from dengine.dtensor import any_dtensor, cut_like
from dengine.types import Stateful, takes_restored, with_per_rank_state

__all__ = ["Restoring", "give_random_states"]


class Restoring:
    """Loads states into objects, and can undo it.

    `load` copies the present states of all objects to host memory before it changes one, so that `undo` can restore
    them. For an optimizer that has not stepped yet, that needs little memory.

    Two things cannot be undone: effects of an object's `load_state_dict` outside its state, and an object that refuses
    the state that it gave itself (a warning names it).
    """

    def __init__(self, into: Mapping[str, Stateful], fitting: Fitting | None = None) -> None:
        self._fitting = fitting  # picks the parts to load; None: all
        # The engine is last: it checks a state before it changes anything, and remembers that it was loaded.
        self._engines = with_per_rank_state(into)
        self._into = unwrapped({name: value for name, value in into.items() if name not in self._engines})
        self._into |= self._engines
        self._before: dict[str, Any] = {}

    def load(self, states: States) -> None:
        """Load `states` into all objects.

        Raises:
            KeyError: the checkpoint lacks a name; nothing is changed then.
            Exception: the `load_state_dict` of an object raised it; call `undo` then.
        """
        missing = sorted(self._into.keys() - states.keys())
        if missing:
            there = ", ".join(sorted(states.keys() - {RESERVED}))
            raise KeyError(f"there is no {', '.join(missing)} in it; it holds {there}.")
        before = HostCopy().take({name: _state_of(name, target) for name, target in self._into.items()})
        named = aligned({name: states[name] for name in before if name not in self._engines}, before)
        for name, target in self._into.items():
            if name in self._engines:
                target.load_state_dict(states[name])
                self._before[name] = before[name]
                continue
            state = named[name]
            if is_of_ranks(state) and not isinstance(target, PerRank):
                raise ValueError(f"each rank has saved a state of its own of {name!r}: load it into PerRank(...).")
            if self._fitting is not None and (state := self._fitting.of(name, target, state, before[name])) is None:
                continue
            self._before[name] = before[name]
            target.load_state_dict(_fitted(target, state))

    def undo(self) -> None:
        """Restore the states that `load` replaced, the last one first."""
        for name, state in reversed(self._before.items()):
            target = self._into[name]
            try:
                target.load_state_dict(_fitted(target, state))
            except Exception as error:
                warnings.warn(f"{name!r} does not take back the state it had: {error!r}", stacklevel=2)
        self._before = {}


def _state_of(name: str, target: Stateful) -> Any:
    """The present state of an object.

    Raises:
        ValueError: a lazy module has parameters without a shape, so that its state could not be restored.
    """
    if isinstance(target, nn.Module):
        for key, value in (*target.named_parameters(), *target.named_buffers()):
            if nn.parameter.is_lazy(value):
                raise ValueError(
                    f"{f'{name}/{key}'!r} is not initialized yet, as its module is a lazy one: run one batch through "
                    "the model first."
                )
    return target.state_dict()


def give_random_states(states: States, into: Mapping[str, Stateful]) -> None:
    """Give each object with random number generators those of this rank, and the loaded objects, for its next run.

    Loaded data are at their position already.
    """
    here = world()
    saved = states.get(RESERVED, {}).get(RANDOM, {})
    for name, value in with_per_rank_state(into).items():
        if takes_restored(value):
            value.data_restored([each for each in into.values() if each is not value])
        of_ranks = saved.get(name)
        if not of_ranks:
            continue
        num_ranks = states[RESERVED]["world_size"]
        if num_ranks != here.size and here.rank == 0:
            warnings.warn(
                f"The checkpoint was saved by {num_ranks} ranks and is loaded by {here.size}: the random number "
                "generators go on on the ranks that were there; the others begin with what they are seeded with.",
                stacklevel=2,
            )
        if here.rank < num_ranks:
            value.load_random_state(of_ranks[here.rank])
        elif takes_restored(value):
            value.load_random_state(of_ranks[0], data_only=True)


def _fitted(target: Stateful, state: Any) -> Any:
    """`state` with its tensors sharded as the target's are (FSDP2); `state` itself if nothing is sharded."""
    if isinstance(target, nn.Module):
        own = target.state_dict()
        if not any_dtensor(own.values()):
            return state
        return {name: _cut(value, own.get(name)) for name, value in state.items()}
    if isinstance(target, torch.optim.Optimizer):
        parameters = [each for group in target.param_groups for each in group["params"]]
        if not any_dtensor(parameters):
            return state
        order = [index for group in state["param_groups"] for index in group["params"]]
        like = dict(zip(order, parameters, strict=False))
        cut = {
            index: {key: _cut(value, like.get(index)) for key, value in of_one.items()}
            for index, of_one in state["state"].items()
        }
        return {**state, "state": cut}
    return state


def _cut(value: Any, like: Any) -> Any:
    """This rank's part of `value`, if `like` is sharded and has the same shape. No collective: each rank has all of
    it.
    """
    fits = isinstance(value, torch.Tensor) and isinstance(like, torch.Tensor) and value.shape == like.shape
    return cut_like(value, like) if fits else value
