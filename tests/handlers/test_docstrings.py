"""Every public handler is one class in one file, with an example; all examples give what they show."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

from dengine import handlers

MODULES = [f"dengine.handlers.{module.name}" for module in pkgutil.iter_modules(handlers.__path__)]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_show(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", handlers.__all__)
def test_every_handler_has_an_example_that_runs_an_engine(name: str) -> None:
    examples = doctest.DocTestParser().get_examples(getattr(handlers, name).__doc__)
    assert any(".run(" in example.source for example in examples), name


@pytest.mark.parametrize("name", handlers.__all__)
def test_no_two_handlers_share_a_file(name: str) -> None:
    module = inspect.getmodule(getattr(handlers, name))
    assert module is not None
    assert [other for other in handlers.__all__ if getattr(handlers, other).__module__ == module.__name__] == [name]


@pytest.mark.parametrize("name", handlers.__all__)
def test_a_handler_is_called_or_attached_but_never_both(name: str) -> None:
    handler = getattr(handlers, name)
    assert ("__call__" in vars(handler)) != hasattr(handler, "attach")
