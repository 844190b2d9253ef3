"""The detector of ranks that are blocked in a collective knows files by their paths, which a move must not break."""

import os
from pathlib import Path

import dengine
from dengine.control.blocked import _WAITING_FILES


def test_every_file_of_the_package_in_which_a_rank_may_wait_exists() -> None:
    root = Path(dengine.__file__).parent.parent
    ours = [part for part in _WAITING_FILES if part.startswith(f"{os.sep}dengine{os.sep}")]
    assert ours
    assert [part for part in ours if not (root / part.lstrip(os.sep)).is_file()] == []
