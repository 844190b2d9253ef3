"""Small things that a newcomer tries first, and that have to work or to say what does."""

import importlib
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch

import dengine
from dengine import distributed
from dengine.naming import type_name


def test_a_barrier_needs_no_name() -> None:
    distributed.barrier()
    distributed.barrier("with one")


def test_the_version_is_that_of_the_installed_package() -> None:
    assert dengine.__version__ == version("dengine")


@pytest.mark.parametrize(
    "room", ["checkpoint", "config", "distributed", "engine", "errors", "handlers", "metrics", "supervised", "tracking"]
)
def test_each_sub_package_is_there_after_import_dengine(room: str) -> None:
    code = f"import dengine; assert dengine.{room}.__name__ == 'dengine.{room}'; assert '{room}' in dir(dengine)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


def test_the_version_is_told_without_loading_torch() -> None:
    code = "import sys, dengine; dengine.__version__; assert 'torch' not in sys.modules; dir(dengine)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600)


@pytest.mark.parametrize(("name", "module"), [("TrackingError", "tracking"), ("MissingKeyError", "config")])
def test_every_exception_is_in_errors_and_where_it_was(name: str, module: str) -> None:
    error = getattr(dengine.errors, name)
    assert error is getattr(dengine, name) is getattr(getattr(dengine, module), name)
    assert error.__module__ == "dengine.errors"
    assert name in dengine.errors.__all__


def test_all_errors_of_the_package_are_importable_from_it() -> None:
    for name in dengine.errors.__all__:
        assert getattr(dengine, name) is getattr(dengine.errors, name)
        assert name in dengine.__all__


def test_a_missing_key_is_still_caught_as_it_was() -> None:
    cfg = dengine.config.Conf.from_dict({"a": 1})
    for kind in (AttributeError, KeyError, dengine.ConfigError, ValueError):
        with pytest.raises(kind):
            cfg.b  # noqa: B018
    assert not hasattr(cfg, "b")


@pytest.mark.parametrize(
    ("module", "name", "here"),
    [
        ("dengine", "Trainer", "create_supervised_trainer"),
        ("dengine", "idist", "dengine.distributed"),
        ("dengine.handlers", "EMAHandler", "EMA"),
        ("dengine.handlers", "ModelCheckpoint", "Checkpoint"),
        ("dengine.metrics", "MeanSquaredError", r"MSE\(\)"),
        ("dengine.metrics", "MetricsLambda", "MetricFunction"),
        ("dengine.distributed", "auto_model", "prepare_model"),
        ("dengine.distributed", "get_rank", r"world\(\)\.rank"),
        ("dengine.distributed", "one_rank_first", "rank_zero_first"),
    ],
)
def test_a_name_of_another_library_in_a_module_is_translated(module: str, name: str, here: str) -> None:
    found = importlib.import_module(module)
    assert not hasattr(found, name)
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute '{name}'.*{here}"):
        getattr(found, name)
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'$"):
        found.nonsense  # noqa: B018


def test_what_other_libraries_call_on_a_metric_is_translated() -> None:
    metric = dengine.metrics.Accuracy()
    assert not hasattr(metric, "attach")
    with pytest.raises(AttributeError, match=r"'attach': write engine\.add_metric\(metric, name\)"):
        metric.attach(dengine.Engine(lambda engine, batch: batch), "acc")  # type: ignore[attr-defined]
    for kind in (dengine.metrics.Accuracy, dengine.metrics.Recall, dengine.metrics.ConfusionMatrix):
        with pytest.raises(TypeError, match=r'takes no is_multilabel=: write task="multilabel"'):
            kind(is_multilabel=True)  # type: ignore[call-arg]


def test_a_metric_of_ones_own_may_have_such_a_name() -> None:
    class Mine(dengine.metrics.Metric):
        def attach(self) -> str:
            return "mine"

        def reset(self) -> None: ...
        def update(self, output: object) -> None: ...
        def compute(self) -> float:
            return 0.0

    assert Mine().attach() == "mine"


def test_a_prepared_loader_is_called_by_the_name_that_its_user_knows() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(2)), batch_size=2)
    assert type_name(dengine.distributed.prepare_data_loader(loader)) == "DataLoader"
    assert type_name([]) == "list"
