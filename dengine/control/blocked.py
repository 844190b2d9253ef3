"""How long a rank has done nothing but wait in a collective. Once its connections are shut, that should be no time."""

import os
import sys
import time

from dengine.control.stop import Runs

__all__ = ["BlockedDetector"]

# Where a thread waits for other ranks, in torch or for what it has begun itself; it computes there, too.
_WAITING_FILES = tuple(
    part.replace("/", os.sep)
    for part in ("/torch/autograd/", "/torch/distributed/", "/torch/nn/parallel/", "/dengine/parallel/gradients.py")
)
_MIN_LOAD = 0.1  # of one core: a process below it computes nothing. Gloo's own threads look around a hundred times a s


class BlockedDetector:
    """Of the thread whose loop runs; asked again and again, by another one. Linux and others; no request, no wait.

    A wait for an asynchronous collective that the script began, in the script's own code, is not seen as one.
    """

    def __init__(self, runs: Runs) -> None:
        self._runs = runs
        self._since_s = self._looked_at_s = time.monotonic()
        self._cpu_s = time.process_time()

    def blocked_s(self) -> float:
        """For how long all that was seen since was a wait for others, in a process that computes nothing."""
        now_s, cpu_s = time.monotonic(), time.process_time()
        frame = sys._current_frames().get(self._runs.thread_id)
        is_waiting = frame is not None and any(part in frame.f_code.co_filename for part in _WAITING_FILES)
        # The whole process: the thread that calls for a backward pass waits while another one computes on the GPU.
        if not is_waiting or cpu_s - self._cpu_s > _MIN_LOAD * (now_s - self._looked_at_s):
            self._since_s = now_s
        self._looked_at_s, self._cpu_s = now_s, cpu_s
        return now_s - self._since_s
