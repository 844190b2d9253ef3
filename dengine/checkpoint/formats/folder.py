"""A checkpoint that is a folder, which all ranks write and read together: what sharded models need.

sharded/plan.py has the bytes; here are the objects they belong to, and the place among the other checkpoints.
"""

import json
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dengine.checkpoint.catalogue.manifest import Entry, about
from dengine.checkpoint.disk import atomic as storage
from dengine.checkpoint.formats.file import commit, failure_text, prune
from dengine.checkpoint.formats.sharded.files import Written, local_part
from dengine.checkpoint.formats.sharded.names import (
    LikeParameters,
    model_of,
    named_optimizer_state,
    numbered_optimizer_state,
)
from dengine.checkpoint.formats.sharded.plan import ShardPlan, plan_shards, read_shards, shared_by_all, write_shards
from dengine.checkpoint.formats.sharded.read import LikeTensors
from dengine.checkpoint.formats.sharded.verify import read_outline
from dengine.checkpoint.states.snapshot import RESERVED, HostCopy, States, bare
from dengine.control.exchange import Mailbox
from dengine.distributed import unwrap_model
from dengine.errors import CheckpointError, CorruptCheckpointError
from dengine.types import Stateful

__all__ = ["copy_folder", "numbered", "read_folder", "write_folder"]

_REFUSED = (CheckpointError, FileNotFoundError, TypeError, ValueError)


def write_folder(
    path: Path, states: States, objects: Mapping[str, Stateful], entry: Entry, dropped: Sequence[Entry]
) -> Entry:
    """Write `states` of `objects` to the folder `path`, list it, and only then remove what is `dropped`.

    The states of optimizers are kept by the names of their parameters, so that they fit any other sharding. A folder of
    the same name is replaced.

    Collective: call on all ranks, with rank 0's `entry`. Gives that entry with its digest. Cost: as `write_shards`, and
    one small gather.

    Raises:
        CheckpointError: on every rank, where one cannot write, or no model has the parameters of an optimizer; nothing
            is changed then.
    """
    try:
        by_name = _by_name(path, states, objects)
        done = write_shards(path, by_name, about=about(entry), commit=_committing(path, entry, dropped))
    except _REFUSED as error:
        raise CheckpointError(failure_text(path, error)) from error
    assert done is not None
    return done


def copy_folder(
    path: Path,
    states: States,
    objects: Mapping[str, Stateful],
    entry: Entry,
    dropped: Sequence[Entry],
    copies: HostCopy,
    is_leaving: threading.Event,
) -> Callable[[], Entry | None]:
    """As `write_folder`, in two parts: what is to be written is copied now, and written by what comes back, which is
    for a thread of each rank. That one is no collective; the ranks' threads tell rank 0's through the store how they
    fared, and it commits. On rank 0 it gives the entry, or raises what failed, on whichever rank; elsewhere None. With
    `is_leaving` set, it does not wait long for ranks that may be gone.

    Collective: call on all ranks, with rank 0's `entry`. Cost: two small gathers, one broadcast, one copy of the bytes
    that this rank writes.

    Raises:
        CheckpointError: on every rank, as `write_folder`; nothing is changed then.
    """
    try:
        plan = plan_shards(path, _by_name(path, states, objects), may_exist=True)
    except _REFUSED as error:
        raise CheckpointError(failure_text(path, error)) from error
    mailbox = Mailbox(plan.temporary.name, is_leaving)
    try:
        copied = copies.take({name: local_part(tensor) for name, tensor in plan.mine.items()})
    except BaseException as error:
        mailbox.post(_failed(error))
        storage.end(plan.temporary)
        raise
    plan = replace(plan, mine=copied)
    return lambda: _write_and_commit(plan, mailbox, about(entry), _committing(path, entry, dropped))


def _write_and_commit(
    plan: ShardPlan, mailbox: Mailbox, description: Mapping[str, Any], commit: Callable[[Path], Entry]
) -> Entry | None:
    try:
        mailbox.post(_fared(plan))
        if not mailbox.is_mine:
            return None
        notes = [json.loads(each) for each in mailbox.collect()]
        for rank, each in enumerate(notes):
            if "failure" in each:
                raise CheckpointError(f"Rank {rank} could not write its part: {each['failure']}")
        return plan.finish(
            [each["written"] and Written.from_dict(each["written"]) for each in notes], description, commit
        )
    except BaseException:
        if mailbox.is_mine:
            storage.discard(plan.temporary)
        raise
    finally:
        storage.end(plan.temporary)


def _fared(plan: ShardPlan) -> str:
    """Write this rank's part, and say in a note what it is."""
    try:
        written = plan.write()
    except Exception as error:
        return _failed(error)
    return json.dumps({"written": written and asdict(written)})


def _failed(error: BaseException) -> str:
    return json.dumps({"failure": f"{type(error).__qualname__}: {error}"})


def _committing(path: Path, entry: Entry, dropped: Sequence[Entry]) -> Callable[[Path], Entry]:
    def finish(temporary: Path) -> Entry:
        outline = read_outline(temporary)
        done = replace(entry, sha256=outline.sha256, num_bytes=outline.num_bytes)
        commit(temporary, path, done, dropped)
        prune(path.parent, dropped)
        return done

    return finish


def _by_name(path: Path, states: States, objects: Mapping[str, Stateful]) -> States:
    """Collective: one small gather, so that all raise where one does."""
    by_name: States = {}
    shared_by_all(lambda: by_name.update(_named(states, objects)), f"save {path}")
    return by_name


def read_folder(path: Path, into: Mapping[str, Stateful]) -> States:
    """The states in `path` for the objects of `into`, laid out as they are, and dengine's own entry; nothing is loaded.

    Collective: call on all ranks. Cost: one small gather, and as `read_shards`.

    Raises:
        CorruptCheckpointError: on every rank, where one finds a byte changed that it needs.
        CheckpointError: on every rank, where it lacks a name, or has no model for an optimizer.
    """
    like: dict[str, Any] = {}
    try:
        shared_by_all(lambda: like.update(_layouts(into)), f"read {path}")
        return read_shards(path, like)
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


def _named(states: States, objects: Mapping[str, Stateful]) -> States:
    by_name = dict(states)
    for name, value in objects.items():
        if isinstance(value, torch.optim.Optimizer):
            by_name[name] = named_optimizer_state(value, model_of(name, value, objects), states[name])
    return by_name


def _layouts(into: Mapping[str, Stateful]) -> dict[str, Any]:
    """How each state is to come: sharded where its object is, whole elsewhere."""
    layouts: dict[str, Any] = {RESERVED: None}
    for name, value in into.items():
        if isinstance(value, torch.optim.Optimizer):
            model: nn.Module = unwrap_model(model_of(name, value, into))
            layouts[name] = LikeParameters.of(model)
        elif hasattr(value, "load_random_state"):  # an engine: numbers alone
            layouts[name] = None
        else:
            layouts[name] = LikeTensors.of(bare(value).state_dict())
    return layouts
