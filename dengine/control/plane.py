"""The interface of the control plane, and its implementation for a world of one."""

from contextlib import AbstractContextManager, nullcontext
from types import FrameType
from typing import Protocol

import torch.distributed as dist
from torch.distributed import ProcessGroup, Store

from dengine import torch_internals
from dengine.control.failure import line_of, traceback_of, write_error_file
from dengine.control.prepared import Prepared
from dengine.control.run import OwnRun, Run, Runs, Where
from dengine.launch.world import entered_plane
from dengine.torch_internals import HashStore

__all__ = ["RAISED_S", "NullPlane", "Plane", "plane"]

# The extra time for a report after a failure: a rank that raised is alive, and its thread may still be at work.
RAISED_S = 30.0
_UNWATCHED_S = 1800.0  # if no rank reports failures: as long as a collective of torch waits


class Plane(Protocol):
    """The interface of the control plane.

    It is `Control` (control.py), or `NullPlane` if there are no other ranks, or no store through which to reach them.
    """

    @property
    def group(self) -> ProcessGroup | None:
        """The process group of this package's own collectives, for tensors on the CPU. None: the default group."""

    @property
    def store(self) -> Store:
        """A store that the ranks share."""

    @property
    def prepared(self) -> Prepared: ...

    def patience_s(self, *, is_leaving: bool) -> float:
        """The seconds that another rank's report may still take. `is_leaving`: this rank leaves its run by an error."""

    def start(self) -> None:
        """Start the threads. Their end is `close`."""

    def begin_run(self, *, is_shared: bool, where: Where) -> Run:
        """Start the next run of an engine: one that all ranks run or (not `is_shared`) this rank's own. No
        communication. `where` gives the positions of the engines that run in some frames, for reports.

        Raises: RemoteRankError, StallError: a rank has failed before.
        """

    def enter_call(self, what: str, site: str) -> None:
        """Note that this rank calls the collective `what`; a `site` that is not empty must be the same on all ranks.

        Raises: ConsistencyError: another rank has called something else. RemoteRankError, StallError: one has failed.
        """

    def leave_call(self) -> None: ...

    def call_site(self) -> str:
        """The line of the user's code that makes the call, if the ranks compare it; else ""."""

    def tick(self) -> None:
        """Note that this rank is at work."""

    def exempt(self) -> AbstractContextManager[None]:
        """A context in which this rank may take any time, and does not count as hanging."""

    def failed(self, error: BaseException, here: FrameType) -> BaseException:
        """Report `error`, which leaves the block; gives the exception to raise instead. `here`: the frame that
        handles it.
        """

    def leave_together(self) -> None:
        """Wait until all ranks have come to the end of the block.

        Collective. Raises: RemoteRankError, StallError: a rank fails meanwhile. LaunchError: the store is gone.
        """

    def close(self, *, is_failing: bool) -> None:
        """End the threads; if this rank fails, free those who wait for it. Cost: 2.3 s at most, on rank 0 4.3 s."""


class NullPlane:
    """The plane of a world of one, and of a group of other code whose ranks share no store: it reports nothing.

    It has no state, so all instances are equal.
    """

    group = None

    @property
    def store(self) -> Store:
        return torch_internals.default_store() if dist.is_available() and dist.is_initialized() else HashStore()

    @property
    def prepared(self) -> Prepared:
        return Prepared()  # no other rank to compare with

    def patience_s(self, *, is_leaving: bool) -> float:
        return RAISED_S if is_leaving else _UNWATCHED_S

    def start(self) -> None:
        pass

    def begin_run(self, *, is_shared: bool, where: Where) -> Run:
        return OwnRun(Runs())

    def enter_call(self, what: str, site: str) -> None:
        pass

    def leave_call(self) -> None:
        pass

    def call_site(self) -> str:
        return ""

    def tick(self) -> None:
        pass

    def exempt(self) -> AbstractContextManager[None]:
        return nullcontext()

    def failed(self, error: BaseException, here: FrameType) -> BaseException:
        write_error_file(line_of(error), traceback_of(error), is_cause=True)
        return error

    def leave_together(self) -> None:
        pass

    def close(self, *, is_failing: bool) -> None:
        pass


_OUTSIDE = NullPlane()


def plane() -> Plane:
    """The control plane of the world that is open. Never communicates."""
    return entered_plane() or _OUTSIDE
