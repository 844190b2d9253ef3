"""The examples of the handlers' docstrings give what they show."""

import doctest
import importlib

import pytest

from dengine import handlers

MODULES = ("early_stopping", "ema", "lr_scheduler", "memory_monitor", "profiler", "progress_bar", "timer")


@pytest.mark.parametrize("name", MODULES)
def test_the_example_of_a_handler_runs(name: str) -> None:
    module = importlib.import_module(f"{handlers.__name__}.{name}")
    result = doctest.testmod(module)
    assert result.attempted > 3
    assert result.failed == 0
