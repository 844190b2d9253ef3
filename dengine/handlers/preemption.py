"""Save a checkpoint and end the run when a scheduler takes the machine away."""

import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Sequence
from types import FrameType
from typing import Any, TypeAlias

from dengine.engine import Engine, Events
from dengine.engine.handler_checks import collective
from dengine.handlers.arguments import check_engine
from dengine.handlers.priorities import Priority
from dengine.naming import shown

__all__ = ["Preemption"]

_Handler: TypeAlias = "Callable[[int, FrameType | None], Any] | int | None"


class Preemption:
    """Makes all ranks finish the same iteration, save, and leave the run after a signal to any of them.

    Then `engine.state.preempted` is true, and `COMPLETED` does not fire; the script should exit with the code that
    makes its scheduler restart it. The signal's handler only sets a flag; the flag is read after each iteration and
    epoch, and the ranks agree as for `terminate()`. While no run is under way, the signals have their previous
    handlers.

    Attach it on every rank, from the main thread: `Preemption(checkpoint).attach(trainer)`. Under torchrun the agent
    must pass signals on, and give the ranks time to save: `--signals-to-handle` and `--shutdown-timeout`. torchrun
    sends them to a rank's process group, and the workers of a prepared loader are not in it. If a scheduler sends
    SIGTERM to every single process, the workers die, and a rank that needs another batch raises: make it send SIGUSR1.

    Args:
        checkpoint: a `Checkpoint`, or any handler. It is called as `checkpoint(engine)` on every rank, and its write is
            waited for.
        signals: the signals; by default those with which SLURM and Kubernetes announce the end.

    Raises:
        TypeError: `checkpoint` is not callable, or `signals` is not a list of signals.
        ValueError: there is no signal, or one that cannot be handled.

    Example:
        >>> import os
        >>> trainer = Engine(lambda engine, batch: os.kill(os.getpid(), signal.SIGUSR1) if batch == 3 else None)
        >>> Preemption(lambda engine: print("saved after", engine.state.iteration)).attach(trainer)
        >>> trainer.run(range(10)).preempted
        saved after 4
        True
    """

    def __init__(
        self,
        checkpoint: Callable[[Engine], object],
        signals: Sequence[int] = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2),
    ) -> None:
        if not callable(checkpoint):
            raise TypeError(f"Preemption() takes a Checkpoint, or another handler, but got {checkpoint!r}.")
        if isinstance(signals, str) or not isinstance(signals, Iterable):
            raise TypeError(f"signals={signals!r} must be a list of signals, such as [signal.SIGTERM].")
        self._checkpoint = checkpoint
        self._is_collective = bool(getattr(checkpoint, "is_collective", False))
        self._signals = tuple(signal.Signals(number) for number in signals)
        if not self._signals:
            raise ValueError("signals=() would never save anything: name at least one signal.")
        for number in (signal.SIGKILL, signal.SIGSTOP):
            if number in self._signals:
                raise ValueError(f"{number.name} cannot be handled: no process can.")
        self._previous: dict[signal.Signals, _Handler] = {}
        self._received: signal.Signals | None = None
        self._is_listening = False

    def __repr__(self) -> str:
        return shown(self, self._checkpoint, signals=[number.name for number in self._signals])

    def attach(self, engine: Engine) -> None:
        """Handle signals during the runs of `engine`.

        Raises: TypeError: `engine` is not an Engine.
        """
        check_engine(self, engine)
        engine.on(Events.STARTED, self._begin, priority=Priority.SETUP)
        engine.on(Events.ITERATION_COMPLETED, self._look)
        # Last: a signal that comes while handlers at the end of an epoch evaluate need not wait for one more iteration.
        engine.on(Events.EPOCH_COMPLETED, self._look, priority=Priority.CLEANUP)
        engine.on(Events.TERMINATED, self._save_together if self._is_collective else self._save)
        for event in (Events.TERMINATED, Events.COMPLETED, Events.EXCEPTION_RAISED):
            engine.on(event, self._end, priority=Priority.CLEANUP)

    def _begin(self, engine: Engine) -> None:
        self._received, self._previous = None, {}
        if threading.current_thread() is not threading.main_thread():
            warnings.warn(
                "Preemption receives no signal: the run is not in the main thread.", RuntimeWarning, stacklevel=2
            )
            return
        for number in self._signals:
            self._previous.setdefault(number, signal.signal(number, self._note))
        self._is_listening = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = signal.Signals(number)

    def _look(self, engine: Engine) -> None:
        if self._received is not None:
            self._received = None
            engine.preempt()

    @collective
    def _save_together(self, engine: Engine) -> None:
        self._save(engine)

    def _save(self, engine: Engine) -> None:
        if engine.state.preempted:
            self._checkpoint(engine)
            wait = getattr(self._checkpoint, "wait", None)  # a checkpoint that writes asynchronously has it
            if callable(wait):
                wait()

    def _end(self, engine: Engine) -> None:
        """Restore the previous handlers. One that was not set by Python cannot be restored: the default replaces it."""
        if not self._is_listening:
            return
        self._is_listening = False
        for number in self._signals:
            if signal.getsignal(number) == self._note:  # else other code has set a handler since, and will restore ours
                previous = self._before(number)
                signal.signal(number, signal.SIG_DFL if previous is None else previous)

    def _before(self, number: signal.Signals) -> _Handler:
        """The previous handler of a signal; if that of another Preemption that has ended already, the one before it."""
        previous = self._previous[number]
        owner = getattr(previous, "__self__", None)
        return owner._before(number) if isinstance(owner, Preemption) and not owner._is_listening else previous
