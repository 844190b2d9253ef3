"""The parent-death signal, so that a rank does not outlive the torchrun that started it."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

__all__ = ["set_parent_death_signal"]

_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


def set_parent_death_signal(env: Mapping[str, str]) -> None:
    """Have Linux send this process SIGTERM when its parent, the agent of torchrun, dies.

    torchrun starts its ranks in sessions of their own. If it is killed by SIGKILL, as for lack of memory, they get no
    signal, and would go on training after their job has ended. SIGTERM rather than
    SIGKILL, so that `Preemption` saves. Children of this process do not inherit it.

    Does nothing in a process that torchrun did not start, nor on other systems. Cost: one system call.
    """
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in env:
        return
    agent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != agent:  # it was killed just before
        os.kill(os.getpid(), signal.SIGTERM)
