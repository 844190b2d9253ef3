"""What all tests get: GPUs only where they ask for them, and Ctrl-C that can be tested."""

import os
import signal

import pytest
from hypothesis import HealthCheck, settings

# A shell that runs the tests in its background has SIGINT ignored, which children inherit, and Python leaves it so.
signal.signal(signal.SIGINT, signal.default_int_handler)

# No test depends on how fast the machine is: an example may take as long as it takes.
settings.register_profile("dengine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dengine")


def pytest_configure(config: pytest.Config) -> None:
    # Before anything asks for them. All other tests compare with what a CPU computes, over any number of ranks.
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and `-m gpu`"))
