"""What every test with real processes gets: `ranks` importable, here and in the children, and no process left over."""

import os
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

# pytest's importlib mode adds nothing. Not in a fixture: test modules import `ranks` while they are collected.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().with_name("support")))

from ranks import TAG, find_processes, kill_processes, new_tag, start_server

PATHS = [str(Path(__file__).resolve().with_name("support")), str(Path(__file__).resolve().parents[1])]
SETTLE_S = 2.0  # a process that was told to stop just before the test's end may need a moment


@pytest.fixture(scope="session")
def tag() -> Iterator[str]:
    """Marks all that this pytest process starts, directly or not; lets them import what tests can."""
    tag = new_tag()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(TAG, tag)
        patch.setenv("PYTHONPATH", os.pathsep.join(PATHS), prepend=os.pathsep)
        # torch's store asks for the name of every address that it connects to, and waits 5 s and more where a machine's
        # name server drops a question: glibc's own setting, for times that depend on the code alone.
        patch.setenv("RES_OPTIONS", "timeout:1 attempts:1")
        start_server()  # here, so that it belongs to the session and not to the first test that uses it
        yield tag


@pytest.fixture(autouse=True)
def no_process_left_over(tag: str) -> Iterator[None]:
    """Fails a test that leaves a process of ours running, and ends that process by its pid."""
    before = find_processes(tag=tag, parents={os.getpid()}).keys()
    yield
    end = time.monotonic() + SETTLE_S
    while (left := _new_since(before, tag)) and time.monotonic() < end:
        time.sleep(0.02)
    if left:
        kill_processes(lambda: _new_since(before, tag))
        pytest.fail(f"the test left {len(left)} processes running: {left}")


def _new_since(before: Collection[int], tag: str) -> dict[int, str]:
    found = find_processes(tag=tag, parents={os.getpid()})
    return {pid: command for pid, command in found.items() if pid not in before}
