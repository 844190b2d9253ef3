"""A checkpoint that is a folder, which all ranks write and read together: what sharded models need.

sharded/plan.py has the bytes; here are the objects they belong to, and the place among the other checkpoints.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import nn

from dengine import atomic_files
from dengine.checkpoint.catalogue.entry import about
from dengine.checkpoint.formats.base import Background, Format, SaveOutcome, SavePlan, agree, failure_text, publish
from dengine.checkpoint.formats.nodes import Nodes
from dengine.checkpoint.formats.sharded.names import (
    LikeParameters,
    model_of,
    named_optimizer_state,
    numbered_optimizer_state,
)
from dengine.checkpoint.formats.sharded.plan import (
    Known,
    ShardPlan,
    plan_shards,
    read_shards,
    write_shards,
)
from dengine.checkpoint.formats.sharded.read import LikeRank, LikeTensors
from dengine.checkpoint.formats.sharded.saved import Table
from dengine.checkpoint.formats.sharded.together import shared_by_all
from dengine.checkpoint.formats.sharded.tree import tensors_in
from dengine.checkpoint.formats.sharded.verify import read_outline
from dengine.checkpoint.states.parts import parts_in_states
from dengine.checkpoint.states.per_rank import PerRank
from dengine.checkpoint.states.snapshot import RANDOM, RESERVED, Collected, States, unwrapped
from dengine.control.mailbox import Mailbox
from dengine.distributed import unwrap_model, world
from dengine.dtensor import is_dtensor, local_part
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.types import Stateful, with_per_rank_state

__all__ = ["FolderFormat", "numbered", "read_folder"]


class _Options(TypedDict):
    about: dict[str, object]
    parts: Mapping[tuple[str, ...], str]
    own: dict[str, object]
    known: Known


class FolderFormat(Format):
    """Raw bytes of tensors, and what they are. The states of optimizers are kept by the names of their parameters, so
    that they fit any other sharding. A folder of the same name is replaced.

    Cost: six small collectives, two more at the first save. With a background: two small gathers, two broadcasts (and
    two gathers more at the first save), and one copy of the bytes that this rank writes; the ranks' threads report to
    rank 0's through the store what became of it, and it commits.
    """

    ending = ""

    def __init__(self) -> None:
        self._known = Known()

    def save(
        self,
        path: Path,
        collected: Collected,
        objects: Mapping[str, Stateful],
        plan: Callable[[], SavePlan],
        background: Background | None = None,
        nodes: Nodes | None = None,
    ) -> SaveOutcome | None:
        made = agree(plan, path) if nodes is None else nodes.plan_folder(path, plan, lambda: _own_bytes(collected))
        if background is not None:
            background.start(made, lambda: self._copied(made, collected, objects, background))
            return None
        with _refused(path):
            by_name = _by_name(path, collected, objects)
            commit = partial(_publish, made)
            return write_shards(path, by_name, commit=commit, **self._options(made, collected))

    def _options(self, plan: SavePlan, collected: Collected) -> _Options:
        random = {name: {world().rank: state} for name, state in collected.random.items()}
        return {
            "about": about(plan.entry),
            "parts": collected.parts,
            "own": {**collected.per_rank, RESERVED: {RANDOM: random}},
            "known": self._known,
        }

    def _copied(
        self, plan: SavePlan, collected: Collected, objects: Mapping[str, Stateful], background: Background
    ) -> Callable[[], SaveOutcome | None]:
        """What the thread of this rank is to call, after its part is copied. On rank 0 it gives the outcome, or raises
        what failed, on whichever rank; on the others None. Collective: two small gathers, one broadcast."""
        with _refused(plan.path):
            by_name = _by_name(plan.path, collected, objects)
            shards = plan_shards(plan.path, by_name, may_exist=True, **self._options(plan, collected))
        mailbox = Mailbox(shards.temporary.name, background.is_leaving)
        try:
            copied = background.copies.take({name: local_part(tensor) for name, tensor in shards.mine.items()})
        except BaseException as error:
            mailbox.post(_failed(error))
            atomic_files.end(shards.temporary)
            raise
        return partial(_write, replace(shards, mine=copied), mailbox, plan)


def _own_bytes(collected: Collected) -> int:
    """About what this rank writes: its share of what several have alike, and what is not spread only on rank 0."""
    total = 0
    for _, tensor in tensors_in({**collected.states, **collected.per_rank}):
        if is_dtensor(tensor):
            total += tensor.numel() * tensor.itemsize // tensor.device_mesh.size()
        elif world().rank == 0 or collected.has_own:
            total += tensor.nbytes
    return total


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    try:
        yield
    except (CheckpointError, FileNotFoundError, TypeError, ValueError) as error:
        raise CheckpointError(failure_text(path, error)) from error


def _write(shards: ShardPlan, mailbox: Mailbox, plan: SavePlan) -> SaveOutcome | None:
    try:
        mailbox.post(_fared(shards))
        if not mailbox.is_mine:
            return None
        notes = [json.loads(each) for each in mailbox.collect()]
        for rank, each in enumerate(notes):
            if "failure" in each:
                raise CheckpointError(f"Rank {rank} could not write its part: {each['failure']}")
        return shards.finish([Table(*each["written"]) for each in notes], partial(_publish, plan))
    except BaseException:
        if mailbox.is_mine:
            atomic_files.discard(shards.temporary)
        raise
    finally:
        atomic_files.end(shards.temporary)


def _fared(shards: ShardPlan) -> str:
    """Write this rank's part, and say in a note what it is."""
    try:
        written = shards.write()
    except Exception as error:
        return _failed(error)
    return json.dumps({"written": written})


def _failed(error: BaseException) -> str:
    return json.dumps({"failure": f"{type(error).__qualname__}: {error}"})


def _publish(plan: SavePlan, temporary: Path) -> SaveOutcome:
    outline = read_outline(temporary)
    return publish(temporary, plan, replace(plan.entry, sha256=outline.sha256, num_bytes=outline.num_bytes))


def _by_name(path: Path, collected: Collected, objects: Mapping[str, Stateful]) -> States:
    """Collective: one small gather, so that all raise if one does."""
    by_name: States = {}
    shared_by_all(lambda: by_name.update(_named(collected, objects)), f"save {path}")
    return by_name


def read_folder(path: Path, into: Mapping[str, Stateful]) -> States:
    """The states in `path` for the objects of `into`, laid out as they are, and dengine's own entry; nothing is loaded.

    Collective: call on all ranks. Cost: one small gather, and as `read_shards`.

    Raises:
        CorruptCheckpointError: on every rank, if one finds a byte changed that it needs.
        CheckpointError: on every rank, if it lacks a name, or has no model for an optimizer.
    """
    like: dict[str, Any] = {}
    parts: dict[tuple[str, ...], str] = {}
    try:
        shared_by_all(lambda: like.update(_layouts(into, parts)), f"read {path}")
        return read_shards(path, like, parts=parts)
    except CorruptCheckpointError:
        raise
    except (CheckpointError, FileNotFoundError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} could not be loaded, and every object is as it was: {error}") from error


def numbered(states: States, into: Mapping[str, Stateful], names: Iterable[str] | None = None) -> States:
    """What `read_folder` gave, as the objects' own `load_state_dict` takes it; with `names`, of these alone. No
    collective.

    Raises:
        ValueError: an optimizer's groups do not hold the parameters they held.
    """
    loadable = dict(states)
    for name in into if names is None else names:
        value = into[name]
        if isinstance(value, torch.optim.Optimizer):
            loadable[name] = numbered_optimizer_state(value, model_of(name, value, into), states[name])
    return loadable


def _named(collected: Collected, objects: Mapping[str, Stateful]) -> States:
    by_name, with_parts = dict(collected.states), {path[0] for path in collected.parts}
    for name, value in objects.items():
        if isinstance(value, torch.optim.Optimizer):
            model = model_of(name, value, objects)
            by_name[name] = named_optimizer_state(value, model, by_name[name], has_parts=name in with_parts)
    return by_name


def _layouts(into: Mapping[str, Stateful], parts: dict[tuple[str, ...], str]) -> dict[str, Any]:
    """How each state is to come: sharded if its object is, else whole; `parts` gets those that this rank has."""
    layouts: dict[str, Any] = {RESERVED: None}
    states: dict[str, Any] = {}
    engines = with_per_rank_state(into)
    for name, value in unwrapped(into).items():
        if isinstance(value, torch.optim.Optimizer):
            model: nn.Module = unwrap_model(model_of(name, value, into))
            layouts[name] = LikeParameters.of(model)
        elif name in engines:  # numbers alone
            layouts[name] = None
        elif isinstance(value, PerRank):
            layouts[name] = LikeRank()
        else:
            states[name] = value.state_dict()
            layouts[name] = LikeTensors.of(states[name])
    parts.update(parts_in_states(into, states))
    return layouts
