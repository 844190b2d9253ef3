"""File systems of a few megabytes, which are soon full."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    yield from _mounted(tmp_path / "disk", "1m")


@pytest.fixture
def disk_of_eight(tmp_path: Path) -> Iterator[Path]:
    """A file system of 8 MB."""
    yield from _mounted(tmp_path / "disk", "8m")


def _mounted(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    if mounted:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    if not mounted:
        pytest.skip("mounting a tmpfs takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
