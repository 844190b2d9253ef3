"""Handle a stall: each rank prints its position, and a frozen process on its host is killed.

`liveness.py` finds the rank that is to blame.
"""

import faulthandler
import os
import signal
import tempfile
import time
from contextlib import suppress

from torch.distributed import DistError

from dengine.control.context import ControlContext
from dengine.control.failure import Failure, in_brackets, where_text
from dengine.control.heartbeat import Heartbeat
from dengine.launch.console import say

__all__ = ["show_stall", "stacks", "wait_for_stacks"]

_STACKS_S = 3.0  # the longest wait of the others for the stacks of the rank that hangs
_STACKS = "stacks"  # key in the store: the rank that hangs has shown its stacks
_POLL_S = 0.02


def show_stall(failure: Failure, context: ControlContext, heartbeat: Heartbeat, *, is_store_lost: bool) -> None:
    """Print the position of this rank, and kill the process that hangs if it is frozen.

    This must come before the loop gets the failure: after that this process may end at any moment.
    """
    here = context.here
    place = in_brackets(here.place_of(here.rank))
    say(f"dengine: rank {here.rank}{place} is {where_text(context.activity.position())}\n{stacks()}")
    with suppress(DistError):  # the store is gone, which its readers notice
        if failure.rank == here.rank:
            context.store.set(_STACKS, "shown")
        elif failure.is_frozen:
            _kill_frozen(failure.rank, heartbeat, is_store_lost=is_store_lost)


def wait_for_stacks(context: ControlContext) -> None:
    """Wait until the rank that hangs has printed its stacks: once this rank leaves, the launcher ends that one."""
    status, failure = context.status, context.status.failure
    if failure is None or failure.kind != "stalled" or failure.is_frozen or failure.rank == context.here.rank:
        return
    end_s = time.monotonic() + _STACKS_S
    with suppress(DistError):
        while not status.is_store_lost and time.monotonic() < end_s and not context.store.check([_STACKS]):
            time.sleep(_POLL_S)


def stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def _kill_frozen(rank: int, heartbeat: Heartbeat, *, is_store_lost: bool) -> None:
    """Kill a stopped process, which SIGTERM would not end. `is_store_lost`: the store cannot be asked."""
    if not is_store_lost:
        beat = heartbeat.latest(rank)
    elif rank == 0:
        beat = heartbeat.latest_of_host
    else:
        return  # that process cannot be found any more
    if heartbeat.is_known_alive(beat):
        with suppress(OSError):
            os.kill(beat["pid"], signal.SIGKILL)
