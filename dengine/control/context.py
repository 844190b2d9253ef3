"""The objects that the parts of this rank's control plane share: connections to other ranks, and the group's status."""

from torch.distributed import ProcessGroup

from dengine.control.activity import Activity
from dengine.control.call_log import CallLog
from dengine.control.channel import Messages, StoreEndpoint
from dengine.control.failure import Failure
from dengine.control.run import Runs
from dengine.control.sockets import Connections
from dengine.control.status import GroupStatus
from dengine.launch.world import World

__all__ = ["ControlContext"]

_REPORTS_PER_RUN = 8  # all ranks may fail at once: the first reports name the cause


class ControlContext:
    """The shared objects, made once when the group is open.

    Attributes:
        connections: the connections of the group, which close if a peer dies.
        group: the process group of this package's own collectives, for tensors on the CPU. If DDP shared it, a rank
            that is one collective ahead would join one of DDP's, and both would get wrong numbers.
        host_process: the identity of rank 0's process.
    """

    def __init__(
        self,
        here: World,
        endpoint: StoreEndpoint,
        connections: Connections,
        group: ProcessGroup | None,
        host_process: dict[str, object],
    ) -> None:
        self.here = here
        self.endpoint = endpoint
        self.connections = connections
        self.group = group
        self.host_process = host_process
        self.store = endpoint.connect()
        self.messages = Messages(endpoint, self.store, deletes_old=here.rank == 0)
        self.runs = Runs()
        self.status = GroupStatus(self.runs.wake)
        self.call_log = CallLog(here, self.store)
        self.activity = Activity(self.runs, self.call_log)

    def report(self, failure: Failure) -> None:
        """Report a failure to all ranks."""
        if self.store.add(f"failures/{failure.run}", 1) <= _REPORTS_PER_RUN:
            self.messages.publish(kind="failed", failure=failure.to_dict())
