"""Two hosts for each test of this folder, where there is what it needs: what a test does to a host is its own."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from net_hosts import Hosts

CANNOT = 77


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    found = Hosts(tmp_path / "hosts", tmp_path)
    begun = found.control("up", "2")
    if begun.returncode == CANNOT and "DENGINE_REQUIRE_HOSTS" not in os.environ:
        pytest.skip(begun.stdout.strip())
    try:
        assert begun.returncode == 0, begun.stdout
        yield found
    finally:
        found.down()
