"""Every public metric has an example, and all of them run."""

import doctest
import importlib
import pkgutil

import pytest
import torch

from dengine import metrics

MODULES = [module.name for module in pkgutil.walk_packages(metrics.__path__, "dengine.metrics.")]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_show(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


@pytest.mark.parametrize("name", [name for name in metrics.__all__ if name != "compute_all"])
def test_every_public_metric_has_an_example(name: str) -> None:
    docstring = getattr(metrics, name).__doc__
    assert doctest.DocTestParser().get_examples(docstring), name
