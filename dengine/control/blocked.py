"""The blocked-in-collective detector: the time for which a rank has only waited for others.

Once its connections are shut, a rank should not wait at all.
"""

import os
import sys
import time

from dengine import torch_internals
from dengine.control.run import Runs

__all__ = ["BlockedDetector"]

# In addition to files of torch. A rank may compute there, too, so the processor time is checked.
_WAITING_FILES = ("/dengine/parallel/gradients.py".replace("/", os.sep),)
_MIN_LOAD = 0.1  # of one core: below it, a process computes nothing. Gloo's threads wake up a hundred times a s


class BlockedDetector:
    """Measures how long the thread of the loop has been blocked. Another thread asks it again and again.

    It does not see a wait in the script's own code for an asynchronous collective.
    Cost: no request to the store, no wait.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._since_s = self._looked_at_s = time.monotonic()
        self._cpu_s = time.process_time()

    def blocked_s(self) -> float:
        """The seconds for which every check has found the thread waiting, in a process that computes nothing."""
        now_s, cpu_s = time.monotonic(), time.process_time()
        frame = sys._current_frames().get(self._runs.thread_id)
        file = frame.f_code.co_filename if frame is not None else ""
        is_waiting = torch_internals.is_waiting_file(file) or any(part in file for part in _WAITING_FILES)
        # Of the whole process: the thread that calls backward() waits while another one computes on the GPU.
        if not is_waiting or cpu_s - self._cpu_s > _MIN_LOAD * (now_s - self._looked_at_s):
            self._since_s = now_s
        self._looked_at_s, self._cpu_s = now_s, cpu_s
        return now_s - self._since_s
