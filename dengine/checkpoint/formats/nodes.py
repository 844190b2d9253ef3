"""Copies of a checkpoint on each node, in a folder of the node's own, such as one in memory (`placement="node"`).

The first rank of each node is its keeper. All keepers save the same step; what training makes equal on all ranks each
takes from itself, and only the rest is rank 0's, sent through the ranks' store.
"""

import json
import os
import secrets
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dengine.checkpoint.disk.owner import take_over
from dengine.checkpoint.formats.base import SaveOutcome, SavePlan, agree, failure_text
from dengine.checkpoint.states.alike import Alike, canonical, digest
from dengine.checkpoint.states.snapshot import States
from dengine.comm.outcome import on_all_ranks
from dengine.control.mailbox import Mailbox
from dengine.distributed import all_gather_object, world
from dengine.errors import CheckpointError
from dengine.types import Stateful

__all__ = ["Copy", "Nodes"]


class Nodes:
    """The nodes, each with a copy in its own `folder`, of which `n_saved` are kept."""

    def __init__(self, folder: Path, n_saved: int) -> None:
        self._folder, self._n_saved = folder, n_saved
        self._has_space = False

    def plan(
        self,
        path: Path,
        plan: Callable[[], SavePlan],
        num_bytes: Callable[[], int],
        objects: Mapping[str, Stateful],
        is_leaving: threading.Event,
    ) -> "Copy | None":
        """The copy that this rank is to write of a save to `path`, as its `plan` says; None if it is no keeper.

        `num_bytes`: what one copy takes, asked for before the first save.

        Collective: one gather.

        Raises:
            CheckpointError: on every rank, if a node cannot take a copy, with what its folder has and what is needed.
        """
        here = world()
        made: list[SavePlan] = []

        def report() -> tuple[int, str, str] | None:
            if here.local_rank != 0:
                return None
            made.append(self._planned(plan, num_bytes))
            return made[0].entry.sequence, made[0].entry.writer, secrets.token_hex(8)

        everyone = on_all_ranks(report, f"save {path}", lambda error: (CheckpointError, _refusal(path, error)))
        self._has_space = True
        keepers = {rank: each for rank, each in enumerate(everyone) if each is not None}
        if here.rank not in keepers:
            return None
        # Copies of one save have the same description, so that they are the same files.
        sequence = max(sequence for sequence, *_ in keepers.values())
        _, writer, name = keepers[0]
        agreed = replace(made[0], entry=replace(made[0].entry, sequence=sequence, writer=writer))
        if len(keepers) == 1:
            return Copy(agreed)
        others = Mailbox(f"{name}/others", is_leaving, tuple(keepers))
        return SharedCopy(agreed, Alike(objects), others, Mailbox(f"{name}/reports", is_leaving, tuple(keepers)))

    def plan_folder(self, path: Path, plan: Callable[[], SavePlan], num_bytes: Callable[[], int]) -> SavePlan:
        """The plan of a save to the folder `path`, which all ranks write; `num_bytes`: what this rank writes of it.

        Collective: one broadcast; one gather before the first save.

        Raises:
            CheckpointError: as `plan`, or there are several nodes.
        """
        if not self._has_space:
            shares = all_gather_object((world().node_rank, num_bytes()))
            if len({node for node, _ in shares}) > 1:
                raise CheckpointError(
                    f'{path} was not saved: on several nodes, placement="node" takes only what all ranks have alike, '
                    "and here each has a part of its own (a sharded model, a stage or expert, a loader with a state). "
                    'Save into a folder that all nodes share, without placement="node".'
                )
        made = agree(lambda: self._planned(plan, lambda: sum(share for _, share in shares)), path)
        self._has_space = True
        return made

    def _planned(self, plan: Callable[[], SavePlan], num_bytes: Callable[[], int]) -> SavePlan:
        take_over(self._folder)
        made = plan()
        self._check_space(made, num_bytes)
        return made

    def _check_space(self, plan: SavePlan, num_bytes: Callable[[], int]) -> None:
        """
        Raises:
            CheckpointError: there is no room for what is kept, and for one more while it is written.
        """
        if self._has_space:
            return
        num_kept = len(plan.kept) + 1 if self._n_saved == sys.maxsize else self._n_saved
        each, num_copies = num_bytes(), num_kept + 1
        left = os.statvfs(self._folder)
        there = sum(entry.num_bytes for entry in (*plan.kept, *plan.dropped))
        free = left.f_bavail * left.f_frsize + there
        if free < each * num_copies:
            raise CheckpointError(
                f"{self._folder} has room for {_megabytes(free)}, and needs {_megabytes(each * num_copies)}: "
                f"{num_copies - 1} to keep, and one while it is written, of {_megabytes(each)} each. Keep fewer "
                "(n_saved=1), name a larger folder, or enlarge it (mount -o remount,size=... /dev/shm; docker run "
                "--shm-size=...)."
            )


@dataclass(frozen=True)
class Copy:
    """The copy of one save on the only node."""

    plan: SavePlan

    def write(self, states: States, save: Callable[[States, SavePlan], SaveOutcome]) -> SaveOutcome | None:
        """Call `save` with the states as rank 0 has them; gives the outcome on rank 0, once all keepers have saved.

        No collective; in a thread, or in the loop of each keeper.

        Raises:
            CheckpointError: on rank 0, if a keeper has failed.
        """
        return save(states, self.plan)

    def give_up(self, error: BaseException) -> None:
        """Tell rank 0 that there will be no copy."""


@dataclass(frozen=True)
class SharedCopy(Copy):
    """The copy of one save on this node, of several."""

    alike: Alike
    others: Mailbox
    reports: Mailbox

    def write(self, states: States, save: Callable[[States, SavePlan], SaveOutcome]) -> SaveOutcome | None:
        outcome = None
        try:
            outcome = save(canonical(self._as_on_rank_zero(states)), self.plan)
        except Exception as error:
            self.reports.post(json.dumps(_described(error)))
        else:
            self.reports.post("null")
        if not self.reports.is_mine:
            return None
        failures = [failure for each in self.reports.collect() if (failure := json.loads(each))]
        self.others.answered(is_last=True)
        if failures:
            raise CheckpointError("; ".join(failures))
        return outcome

    def give_up(self, error: BaseException) -> None:
        self.others.post("{}")
        self.reports.post(json.dumps(_described(error)))

    def _as_on_rank_zero(self, states: States) -> States:
        """`states` with rank 0's values of what ranks may not have alike. Only what differs is sent."""
        mine: dict[str, bytes] = {}
        try:
            mine = self.alike.others(states)
        finally:  # nobody waits for a rank that fails; what it answers then is no header, so that the others fail, too
            self.others.post(json.dumps({name: digest(content) for name, content in mine.items()}))
            if self.others.is_mine:
                digests = [json.loads(each) for each in self.others.collect()]
                self.others.answer(_joined(mine, digests) if mine else b"")
        if self.others.is_mine:
            return states
        return self.alike.with_others(states, _parts(self.others.answered()))


def _joined(mine: Mapping[str, bytes], digests: Sequence[Mapping[str, str]]) -> bytes:
    """The contents that another rank has otherwise, after a line with their names and lengths."""
    sent = {name: each for name, each in mine.items() if any(theirs.get(name) != digest(each) for theirs in digests)}
    header = json.dumps({name: len(each) for name, each in sent.items()}).encode()
    return b"\n".join([header, b"".join(sent.values())])


def _parts(joined: bytes) -> dict[str, bytes]:
    header, _, content = joined.partition(b"\n")
    parts, start = {}, 0
    for name, length in json.loads(header).items():
        parts[name] = content[start : start + length]
        start += length
    return parts


def _refusal(path: Path, error: Exception) -> str:
    return failure_text(path, CheckpointError(_described(error)))


def _described(error: BaseException) -> str:
    here = world()
    text = f"{error}" if isinstance(error, CheckpointError) else f"{type(error).__qualname__}: {error}"
    return f"on node {here.node_rank} (rank {here.rank}), {text}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f} MB"
