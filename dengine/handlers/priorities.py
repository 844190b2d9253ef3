"""The priorities of the handlers that come with the package, from the first to the last of an event.

A user's handler has priority 0, and few ever need another one. Within one priority there are phases
(dengine/engine/phases.py): a handler that saves comes after the others.
"""

import sys
from enum import IntEnum

__all__ = ["Priority"]


class Priority(IntEnum):
    """The priorities of handlers; the highest is called first."""

    CLOCK_FIRST = 1_500_000  # reads the clock before any handler takes time
    GUARD = 1_200_000  # keeps what a step may change, and judges it before any handler relies on it
    SETUP = 1_000_000  # prepares the model, an optimizer or the signals for all other handlers
    VALUES = 2_000  # adds values that trackers, bars and the user's own handlers read
    EARLY = 1_000  # timers that stop, and bars
    LATE = -1_000  # timers that go on, and bars that show what the user's own handlers have done
    TRACE_END = -2_000  # an iteration ends after its other handlers, so that they are in the trace
    CLEANUP = -1_000_000  # ends what SETUP has prepared
    CLOCK_LAST = -1_500_000  # reads the clock after all handlers have taken their time
    FINISHED = -sys.maxsize  # waits for everything that the others have begun
