"""Let all ranks leave the block together, through the store.

It is no collective of the group: a rank that left its loop early would join one that the others are still in.
"""

import time

from torch.distributed import DistError

from dengine.control.channel import POLL_S
from dengine.control.context import ControlContext
from dengine.control.deadlock import END_OF_GROUP
from dengine.control.propagation import Failures
from dengine.control.status import ALL_LEFT

__all__ = ["LEAVE_S", "leave_together", "wait_for_readers"]

_LOOK_S = 1.0  # between two looks into the store while others are missing, of up to 500 ranks
_MAX_LOOKS_PER_S = 500  # of all ranks together, if there are more
LEAVE_S = 2.0  # the longest wait at the end for a thread, or until the others have read their messages


def leave_together(context: ControlContext, failures: Failures) -> None:
    """Wait until all ranks have come.

    Collective. Raises: RemoteRankError, StallError: a rank fails meanwhile. LaunchError: the store is gone.
    """
    try:
        if context.store.add("left", 1) == context.here.size:
            context.store.set(ALL_LEFT, "yes")  # before any rank reads the message, and closes
            context.messages.publish(kind="left")
    except DistError as error:
        raise failures.without_store("they cannot leave together", error) from None
    context.call_log.wait(END_OF_GROUP)
    try:
        _wait_until_all_left(context, failures)
    finally:
        context.call_log.leave()


def wait_for_readers(context: ControlContext) -> None:
    """Give the others time to read all messages: the store ends with this process."""
    end_s = time.monotonic() + LEAVE_S
    failure = context.status.failure
    is_one_lost = failure is not None and (failure.kind == "vanished" or failure.is_frozen)
    while context.store.add("gone", 0) < context.here.size - is_one_lost and time.monotonic() < end_s:
        time.sleep(POLL_S)


def _wait_until_all_left(context: ControlContext, failures: Failures) -> None:
    status = context.status
    period_s = max(_LOOK_S, context.here.size / _MAX_LOOKS_PER_S)
    while not status.all_left:
        failures.check()
        if status.is_store_lost:
            raise failures.without_store("they cannot leave together")
        if status.has_ended and not status.all_left:
            raise RuntimeError("The ranks could not leave together: another one has left by an error.")
        status.wait_for(lambda: status.all_left or status.failure is not None or status.has_ended, period_s)
        if not status.all_left and not status.is_store_lost:
            _look_into_store(context, failures)


def _look_into_store(context: ControlContext, failures: Failures) -> None:
    """Check in the store whether all have come: the last rank may have been killed before it could publish that."""
    mine = str(context.here.rank)
    try:
        if context.status.has_all_left(context.store):
            if context.store.compare_set("who_says_left", "", mine).decode() == mine:
                context.messages.publish(kind="left")
            context.status.update(all_left=True)
    except DistError as error:
        raise failures.without_store("they cannot leave together", error) from None
