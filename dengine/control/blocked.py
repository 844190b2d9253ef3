"""The blocked-in-collective detector: how long a rank has done nothing but wait for others.

Once its connections are shut, a rank should not wait at all.
"""

import os
import sys
import time

from dengine import torch_internals
from dengine.control.run import Runs

__all__ = ["BlockedDetector"]

# Besides torch's own files. It may compute there, too: hence the look at the processor time.
_WAITING_FILES = ("/dengine/parallel/gradients.py".replace("/", os.sep),)
_MIN_LOAD = 0.1  # of one core: a process below it computes nothing. Gloo's own threads look around a hundred times a s


class BlockedDetector:
    """For how long the thread of the loop has been blocked, as another thread sees it that asks again and again.

    Does not see a wait in the script's own code for an asynchronous collective that the script started.
    Cost: no request to the store, no wait.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._since_s = self._looked_at_s = time.monotonic()
        self._cpu_s = time.process_time()

    def blocked_s(self) -> float:
        """For how many seconds every look has found the thread waiting, in a process that computes nothing."""
        now_s, cpu_s = time.monotonic(), time.process_time()
        frame = sys._current_frames().get(self._runs.thread_id)
        file = frame.f_code.co_filename if frame is not None else ""
        is_waiting = torch_internals.is_waiting_file(file) or any(part in file for part in _WAITING_FILES)
        # The whole process: the thread that calls for a backward pass waits while another one computes on the GPU.
        if not is_waiting or cpu_s - self._cpu_s > _MIN_LOAD * (now_s - self._looked_at_s):
            self._since_s = now_s
        self._looked_at_s, self._cpu_s = now_s, cpu_s
        return now_s - self._since_s
