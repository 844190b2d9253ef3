"""The log of collective calls, with which ranks check that all call the same collectives in the same order.

If two ranks reduce loss and accuracy in a different order, both get wrong numbers, and nothing shows it: types and
sizes are the same. So the first rank to make a call enters it in the store before, and all others compare their call
with that entry. No rank waits for another one there.
"""

import contextlib
import json
import os
import sys
import sysconfig
from contextlib import suppress
from types import FrameType
from typing import Any

import torch
from torch.distributed import DistError, ProcessGroup, Store

from dengine import torch_internals
from dengine.control.deadlock import START_OF_RUN
from dengine.errors import ConsistencyError
from dengine.launch.parsing import has_fields, parse_object
from dengine.launch.world import World

__all__ = ["CallLog", "call_site", "num_joined", "user_line"]

_CHECKED_RANKS = 64  # of more ranks, this many check each call, in turn: else the load of the store would grow
_NUM_KEPT = 1024  # entries; no rank can be later by more
_NOT_USER_CODE = (
    os.path.dirname(os.path.dirname(__file__)) + os.sep,
    os.path.dirname(torch.__file__) + os.sep,
    contextlib.__file__,
    "<frozen ",
)
_STDLIB = sysconfig.get_path("stdlib") + os.sep
_PACKAGES = f"{os.sep}site-packages{os.sep}"  # this folder is inside that of the standard library


class CallLog:
    """The collectives that this rank has called, one after the other.

    Attributes:
        num_calls: the number of calls so far.
        current: the present or last one; "" before the first.
        is_inside: whether the rank is still in it.
    """

    def __init__(self, here: World, store: Store) -> None:
        self._here = here
        self._store = store
        self._stride = -(-here.size // _CHECKED_RANKS)
        self._section = "0"
        self.num_calls = 0
        self.current = ""
        self.is_inside = False

    def enter(self, what: str, site: str) -> None:
        """Note that this rank calls `what`; a `site` that is not empty must be the same on all ranks, too.

        Cost: one request to the store, of 0.03 ms on one host.
        Raises: ConsistencyError: another rank has called something else; both call sites are named.
        """
        self.num_calls += 1
        self.current = what
        self.is_inside = True
        if (self._here.rank - self.num_calls) % self._stride:
            return
        mine = {"what": what, "site": site, "from": call_site(), "rank": self._here.rank}
        first = self._first_call(mine)
        if (first["what"], first["site"]) != (what, site):
            self.is_inside = False
            raise ConsistencyError(_difference(first, mine))

    def wait(self, what: str) -> None:
        """Note that this rank waits for all others, although not in a collective."""
        self.num_calls += 1
        self.current = what
        self.is_inside = True

    def leave(self) -> None:
        self.is_inside = False

    def restart(self, run: int) -> None:
        """Start a new count after all ranks have left `run` by a failure, perhaps at different positions."""
        self._section = f"after/{run}"
        self.num_calls = 0

    def _first_call(self, mine: dict[str, Any]) -> dict[str, Any]:
        """The entry of the first rank to make this call: `mine` if that was this rank."""
        entry = b""
        with suppress(DistError):  # the store is gone, so there is nothing to compare
            entry = self._store.compare_set(self._key(self.num_calls), "", json.dumps(mine))
            if self._here.rank == 0 and self.num_calls > _NUM_KEPT:
                self._store.delete_key(self._key(self.num_calls - _NUM_KEPT))
        first = parse_object(entry) if entry else None
        is_call = first is not None and has_fields(first, what=str, site=str, rank=int) and "from" in first
        return first if first is not None and is_call else mine

    def _key(self, number: int) -> str:
        return f"collective/{self._section}/{number}"


def num_joined(size: int, *, but: ProcessGroup | None = None) -> int:
    """How many collectives this rank has joined in groups of all `size` ranks: DDP's, FSDP's, the user's own."""
    total = 0
    with suppress(Exception):  # a private counter of torch
        for group in torch_internals.process_groups():
            if group is not but and group.size() == size:
                total += torch_internals.num_collectives(group)
    return total


def call_site() -> str:
    """The line of the user's code that makes the call: the innermost one outside of this package and of torch."""
    return user_line(sys._getframe(1))


def user_line(frame: FrameType) -> str:
    """The line of the user's code that led to `frame`: the innermost one outside of this package, torch and the
    standard library.
    """
    while frame.f_back is not None and not _is_users(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} in {frame.f_code.co_name}"


def _is_users(file: str) -> bool:
    return not file.startswith(_NOT_USER_CODE) and (not file.startswith(_STDLIB) or _PACKAGES in file)


def _difference(first: dict[str, Any], second: dict[str, Any]) -> str:
    one, other = sorted((first, second), key=lambda call: int(call["rank"]))
    begins = [call["rank"] for call in (one, other) if call["what"].startswith(START_OF_RUN)]
    return (
        "The ranks call different collectives at the same place:"
        + "".join(f"\n  rank {call['rank']} calls {call['what']} at {call['from']}" for call in (one, other))
        + "\nCall the same ones in the same order on every rank. If two lines mean the same one, give both one "
        "name=." + (f" A run of rank {begins[0]}'s own is that of an Engine(..., distributed=False)." if begins else "")
    )
