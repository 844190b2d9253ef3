"""The last steps of a run, kept so that they can be done again from a snapshot."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dengine.distributed import world
from dengine.handlers.step_states import Snapshot
from dengine.launch.memory import host_memory_free
from dengine.random_state import Generators

__all__ = ["LoggedStep", "StepLog", "set_groups", "settings_of"]

_GIB = 1 << 30


@dataclass
class LoggedStep:
    """One iteration: its batch, the settings of the optimizer's groups, and the generators at its start and end."""

    iteration: int
    batch: Any
    settings: list[dict[str, Any]]
    start: Generators
    end: Generators | None = None


class StepLog:
    """Snapshots of what steps change, and the iterations since the oldest of them.

    Args:
        every: iterations from one snapshot to the next.
        num_snapshots: how many are kept.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, every: int, num_snapshots: int) -> None:
        self._model, self._optimizer = model, optimizer
        self._every, self._num = every, num_snapshots
        self._snapshots: list[Snapshot] = []  # the oldest first
        self._free: list[Snapshot] = []  # whose memory can be used again
        self._checked = 0  # bytes of one snapshot that are known to fit
        self.steps: list[LoggedStep] = []
        self.check_memory(Snapshot(model, optimizer).num_bytes)

    def clear(self) -> None:
        """Forget everything, as what is between two epochs cannot be done again."""
        self._free += self._snapshots
        self._snapshots, self.steps = [], []

    def is_due(self, iteration: int, open_since: int) -> bool:
        """Whether a snapshot is due at the end of `iteration`, and one before `open_since` would be left: the first
        iteration whose verdict is not known.
        """
        if not self._snapshots:
            return True
        left = [*self._snapshots[len(self._snapshots) == self._num :]]
        is_time = iteration - self._snapshots[-1].iteration >= self._every
        return is_time and (open_since > iteration or any(each.iteration < open_since for each in left))

    def snapshot(self, iteration: int, more: dict[str, Any]) -> None:
        """Take a snapshot, of `more` too, and forget what only an older one needs."""
        if len(self._snapshots) == self._num:
            self._free.append(self._snapshots.pop(0))
        taken = self._free.pop() if self._free else Snapshot(self._model, self._optimizer)
        self.check_memory(taken.num_bytes)
        taken.take(iteration, more)
        self._snapshots.append(taken)
        oldest = self._snapshots[0].iteration
        self.steps = [each for each in self.steps if each.iteration > oldest]

    def last_before(self, iteration: int) -> Snapshot:
        """The last snapshot before `iteration`. Later ones are dropped: what they hold was wrong."""
        while self._snapshots[-1].iteration >= iteration:
            self._free.append(self._snapshots.pop())
        return self._snapshots[-1]

    def note(self, iteration: int, batch: object) -> None:
        """Note an iteration, right before its step."""
        self.steps.append(LoggedStep(iteration, batch, settings_of(self._optimizer), Generators()))

    def drop(self, first: int, last: int) -> None:
        """Forget the iterations from `first` to `last`: they are not done again."""
        self.steps = [each for each in self.steps if not first <= each.iteration <= last]

    def check_memory(self, num_bytes: int) -> None:
        """Check that all snapshots fit into memory. Raises: MemoryError: they do not."""
        if num_bytes <= self._checked:
            return
        num_ranks = max(world().local_size, 1)
        free = host_memory_free() // num_ranks
        kept = len(self._snapshots) + len(self._free)
        needed = num_bytes * self._num - self._checked * kept
        if needed > free:
            raise MemoryError(
                f"Guard keeps {self._num} snapshot{'s' if self._num > 1 else ''} of {num_bytes / _GIB:.2f} GiB, the "
                f"weights and the state of the optimizer, in host memory, but {free / _GIB:.2f} GiB are free for each "
                f"of the {num_ranks} ranks of this host: take fewer by num_snapshots=, shard the model, or run fewer "
                "ranks on a host."
            )
        self._checked = num_bytes


def settings_of(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The settings of each group, such as its learning rate."""
    return [
        {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in group.items()
            if name != "params"
        }
        for group in optimizer.param_groups
    ]


@torch.no_grad()
def set_groups(optimizer: torch.optim.Optimizer, settings: list[dict[str, Any]]) -> None:
    """Set what `settings_of` gave."""
    for group, values in zip(optimizer.param_groups, settings, strict=False):
        for name, value in values.items():
            if isinstance(value, Tensor) and isinstance(group.get(name), Tensor):
                group[name].copy_(value)
            else:
                group[name] = value
