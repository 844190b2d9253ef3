"""Metrics that declare nothing, and those of other packages: computed per rank, by what each rank saw."""

import functools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics

from dengine import Engine, MetricStateError, NotComputableError
from dengine.metrics import (
    MAE,
    MSE,
    Accuracy,
    Average,
    ConfusionMatrix,
    DistributedMetric,
    EpochMetric,
    F1Score,
    Loss,
    Metric,
    MetricFunction,
    Perplexity,
    RunningAverage,
    Throughput,
    TopKAccuracy,
    compute_all,
)

pytestmark = pytest.mark.filterwarnings("ignore:Metric .* declares no states:UserWarning")


class Mean:
    """A duck-typed mean, which divides by its count."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.count = 0.0, 0

    def update(self, output: Any) -> None:
        self.total, self.count = (
            self.total + float(torch.as_tensor(output).sum()),
            self.count + torch.as_tensor(output).numel(),
        )

    def compute(self) -> Any:
        return self.total / self.count


class Updating:
    total: Any
    count: Any

    def update(self, output: Any) -> None:
        self.total, self.count = (
            self.total + float(torch.as_tensor(output).sum()),
            self.count + torch.as_tensor(output).numel(),
        )


class MixedIn(Updating, Metric):
    def reset(self) -> None:
        self.total, self.count = 0.0, 0

    __init__ = reset

    def compute(self) -> float:
        return self.total / self.count


class Inherited(MixedIn):
    pass


class Twice(Inherited):
    def update(self, output: Any) -> None:
        super().update(output)


class Called(Mean):
    def __call__(self, output: Any) -> None:
        Mean.update(self, output)

    update = __call__


class Wrapping(Mean):
    def update(self, *args: Any, **kwargs: Any) -> None:
        return functools.partial(super().update)(*args, **kwargs)


class Delegating:
    """All its methods are those of another object."""

    def __init__(self) -> None:
        self.inner = Mean()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


def set_on_the_object() -> Any:
    metric = MixedIn()
    metric.update = functools.partial(Updating.update, metric)
    return metric


def inside_another() -> Any:
    return MetricFunction(lambda value: value, Mean())


DUCKS = [Mean, MixedIn, Inherited, Twice, Called, Wrapping, set_on_the_object, inside_another]


@pytest.mark.parametrize("make", DUCKS)
@pytest.mark.parametrize("around", [lambda metric: metric, lambda metric: DistributedMetric(metric)])
def test_ranks_weigh_what_they_saw_and_an_empty_one_is_not_counted(make: Any, around: Any, over_ranks: Any) -> None:
    shards = [[1.0, 2.0], [], [torch.tensor(6.0)]]
    assert over_ranks(lambda: {"mean": around(make())}, shards).values == {"mean": 3.0}


def test_a_delegating_metric_is_taken(over_ranks: Any) -> None:
    assert over_ranks(lambda: {"mean": Delegating()}, [[1.0, 2.0], [6.0]]).values == {"mean": 3.0}


@pytest.mark.parametrize("make", [*DUCKS, lambda: DistributedMetric(Mean()), lambda: DistributedMetric(Mean(), "max")])
def test_empty_batches_are_no_samples(make: Any, over_ranks: Any) -> None:
    empty = torch.empty(0)
    assert over_ranks(lambda: {"mean": make()}, [[torch.tensor([4.0])], [empty], []]).values == {"mean": 4.0}
    for shards in ([[empty], [empty]], [[], []], [[empty]]):
        for outcome in over_ranks(lambda: {"mean": make()}, shards).outcomes:
            assert isinstance(outcome, NotComputableError)
            assert "Metric 'mean'" in str(outcome)


def test_a_nan_of_an_empty_batch_is_not_counted(over_ranks: Any) -> None:
    class Plain(Mean):
        def compute(self) -> Any:
            return self.total / self.count if self.count else float("nan")

    shards = [[torch.tensor([4.0])], [torch.empty(0)]]
    assert over_ranks(lambda: {"mean": DistributedMetric(Plain())}, shards).values == {"mean": 4.0}


def test_a_real_division_by_zero_is_told(over_ranks: Any) -> None:
    class Ratio(Mean):
        def compute(self) -> Any:
            return 1 / self.total

    outcomes = over_ranks(lambda: {"ratio": Ratio()}, [[1.0], [torch.zeros(2)]]).outcomes
    assert isinstance(outcomes[0], MetricStateError)
    assert isinstance(outcomes[1], ZeroDivisionError)
    assert isinstance(over_ranks(lambda: {"ratio": Ratio()}, [[0.0]]).outcomes[0], ZeroDivisionError)


def test_nothing_is_asked_of_a_metric_before_it_was_updated(over_ranks: Any) -> None:
    class Strict(Mean):
        def compute(self) -> Any:
            assert self.count, "compute() before update()"
            return super().compute()

    assert over_ranks(lambda: {"a": Strict(), "b": DistributedMetric(Strict())}, [[1.0], []]).values == {
        "a": 1.0,
        "b": 1.0,
    }


def test_a_mix_in_with_declared_states_is_seen(over_ranks: Any) -> None:
    class Gathers:
        def update(self, output: Any) -> None:
            self.parts.append(output)  # type: ignore[attr-defined]

    class Gathered(Gathers, Metric):
        parts: Any

        def __init__(self) -> None:
            super().__init__()
            self.add_state("parts", [], reduce="cat")

        def compute(self) -> float:
            return float(self.parts.sum())

    def instance() -> Any:
        metric = Gathered()
        metric.update = lambda output: metric.parts.append(output)
        return metric

    shards = [[torch.ones(2)], [torch.ones(3)]]
    assert over_ranks(lambda: {"sum": Gathered(), "other": instance()}, shards).values == {"sum": 5.0, "other": 5.0}


def test_the_mean_of_a_metric_with_counts_is_weighted_by_them(over_ranks: Any) -> None:
    def metrics() -> dict[str, Any]:
        return {"mean": DistributedMetric(Average()), "max": DistributedMetric(Average(), "max")}

    shards = [[(1.0, 3), (2.0, 1)], [(5.0, 2)], [(7.0, 0)]]
    values = over_ranks(metrics, shards).values
    assert values["mean"] == pytest.approx((1.0 * 3 + 2.0 + 5.0 * 2) / 6)
    assert values["max"] == 5.0


# -- what compute() may give ---------------------------------------------------------------------------------------


class Gives:
    def __init__(self, value: Any) -> None:
        self.value = value

    def reset(self) -> None: ...

    def update(self, output: Any) -> None: ...

    def compute(self) -> Any:
        return self.value


class GivesToo(Metric):
    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value

    def update(self, output: Any) -> None: ...

    def compute(self) -> Any:
        return self.value


def value_of(metric: Any) -> dict[str, Any]:
    trainer = Engine(lambda engine, batch: batch)
    trainer.add_metric(metric, "m")
    return trainer.run([1.0]).metrics


@pytest.mark.parametrize("make", [Gives, GivesToo, lambda value: DistributedMetric(Gives(value))])
def test_one_process_gives_what_was_computed_in_its_own_dtype(make: Any) -> None:
    matrix = torch.tensor([[2**60 + 1, 0], [0, 3]])
    assert value_of(make(matrix))["m"].dtype == torch.int64
    assert value_of(make(matrix))["m"].tolist() == matrix.tolist()
    assert value_of(make(torch.ones(2, dtype=torch.bool)))["m"].dtype == torch.bool
    assert value_of(make(torch.ones(2, dtype=torch.float16)))["m"].dtype == torch.float16
    assert value_of(make(np.arange(3)))["m"].dtype == torch.int64
    assert value_of(make(np.float32(0.5))) == {"m": 0.5}
    assert value_of(make([1.0, 2.0]))["m"].tolist() == [1.0, 2.0]
    nested = {"a": 1, "b": {"c": torch.tensor(2.0), "d": np.float64(3)}, 4: torch.tensor([True])}
    values = value_of(make(nested))
    assert values.pop("m/4").dtype == torch.bool
    assert values == {"m/a": 1.0, "m/b/c": 2.0, "m/b/d": 3.0}
    assert value_of(make(torch.tensor([1j])))["m"].tolist() == [1j]


@pytest.mark.parametrize("make", [Gives, GivesToo, lambda value: DistributedMetric(Gives(value))])
@pytest.mark.parametrize(
    ("value", "named"),
    [
        (None, "None"),
        ("high", "a str"),
        ((1.0, 2.0), "a tuple"),
        ((torch.ones(2), torch.ones(3)), "a tuple"),
        ([None], "a list"),
        ({"a": {"b": "high"}}, "a str"),
        ({1.0}, "a set"),
        (object(), "a object"),
    ],
)
def test_anything_else_is_an_error_that_names_the_metric_and_the_type(
    make: Any, value: Any, named: str, over_ranks: Any
) -> None:
    with pytest.raises(TypeError, match=f"Metric 'm' .* computed {named}, but compute"):
        value_of(make(value))
    outcomes = over_ranks(lambda: {"m": make(value)}, [[1.0], [1.0]]).outcomes
    assert all(isinstance(outcome, TypeError) and named in str(outcome) for outcome in outcomes)


@pytest.mark.parametrize("value", [None, "high"])
def test_a_forgotten_return_is_an_error_of_any_metric(value: Any) -> None:
    class Declared(GivesToo):
        def __init__(self, value: Any) -> None:
            super().__init__(value)
            self.add_state("count", 0)

    for metric in (Declared(value), MetricFunction(lambda _: value, Average()), EpochMetric(lambda p, t: value)):
        with pytest.raises(TypeError, match="'m' computed"):
            trainer = Engine(lambda engine, batch: batch)
            trainer.add_metric(metric, "m")
            trainer.run([(1.0, 1.0)])


def test_tensors_and_mappings_are_averaged_over_ranks(over_ranks: Any) -> None:
    class Several(Mean):
        def compute(self) -> Any:
            parts = {"matrix": torch.full((2, 2), self.count), "inner": {"mean": super().compute()}}
            return {**parts, "signal": torch.tensor([self.total * 1j])}

    def metrics() -> dict[str, Any]:
        matrix = MetricFunction(lambda value: value["matrix"], Several())
        return {
            "m": Several(),
            "max": DistributedMetric(MetricFunction(lambda v: v["inner"], Several()), "max"),
            "x": matrix,
        }

    ranks = over_ranks(metrics, [[1.0, 2.0], [], [6.0]])
    values = ranks.values
    assert values["m/matrix"].tolist() == [[5 / 3] * 2] * 2
    assert values["m/inner/mean"] == pytest.approx(3.0)
    assert values["m/signal"].tolist() == pytest.approx([4j])
    assert values["max/mean"] == 6.0
    assert values["x"].tolist() == values["m/matrix"].tolist()


def test_ranks_that_compute_different_things_are_told_apart(over_ranks: Any) -> None:
    class Several(Mean):
        def compute(self) -> Any:
            return {"a": 1.0} if self.count == 1 else {"b": 1.0}

    outcomes = over_ranks(lambda: {"m": Several()}, [[1.0], [1.0, 2.0]]).outcomes
    assert all(isinstance(outcome, MetricStateError) and "'b'" in str(outcome) for outcome in outcomes)


def test_layouts_are_agreed_upon_once(over_ranks: Any) -> None:
    # At the start of the run nobody can tell what is in the mapping; a number costs no further agreement.
    assert over_ranks(lambda: {"m": Mean(), "d": DistributedMetric(Mean())}, [[1.0], [1.0]]).collectives == {"sum": 1}


# -- metrics of other packages -------------------------------------------------------------------------------------


class Torcheval:
    """The interface of torcheval's metrics, and the state of its accuracies."""

    def __init__(self, device: Any = None) -> None:
        self._state_name_to_default = {"num_correct": torch.tensor(0.0), "inputs": []}
        self.reset()

    def reset(self) -> "Torcheval":
        self.num_correct, self.num_total, self.inputs = torch.tensor(0.0), torch.tensor(0.0), []
        return self

    @torch.inference_mode()
    def update(self, input: torch.Tensor, target: torch.Tensor) -> "Torcheval":
        self.num_correct += (input.argmax(1) == target).sum()
        self.num_total += len(target)
        self.inputs.append(input)
        return self

    @torch.inference_mode()
    def compute(self) -> torch.Tensor:
        assert len(torch.cat(self.inputs)) == self.num_total
        return self.num_correct / self.num_total

    @torch.inference_mode()
    def merge_state(self, metrics: Iterable["Torcheval"]) -> "Torcheval":
        for metric in metrics:
            self.num_correct += metric.num_correct
            self.num_total += metric.num_total
            self.inputs.extend(metric.inputs)
        return self


def scored(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def test_a_merging_metric_is_exact_over_ranks_and_costs_no_collective_of_its_own(over_ranks: Any) -> None:
    made: list[Torcheval] = []

    def metrics() -> dict[str, Any]:
        made.append(Torcheval())
        return {"acc": made[-1], "own": Accuracy(), "double": 2 * MetricFunction(float, Torcheval())}

    whole = [scored(3), scored(1), scored(7)]
    ranks = over_ranks(metrics, [whole[:2], [], whole[2:]])
    assert ranks.values["acc"] == pytest.approx(ranks.values["own"])
    assert ranks.values["double"] == pytest.approx(2 * ranks.values["own"])
    assert ranks.collectives["gather"] == 1
    assert ranks.collectives["sum"] <= 2  # the second one after the shapes are agreed upon, in the first epoch
    assert sorted(int(metric.num_total) for metric in made) == [0, 4, 7]  # untouched
    outcomes = over_ranks(lambda: {"acc": Torcheval()}, [[], []]).outcomes
    assert all(isinstance(outcome, NotComputableError) for outcome in outcomes)


def test_a_merging_metric_takes_pairs_mappings_and_single_values_in_one_process() -> None:
    for output in (scored(5), dict(zip(("pred", "label"), scored(5), strict=True))):
        trainer = Engine(lambda engine, batch: batch)
        trainer.add_metrics({"acc": Torcheval(), "own": Accuracy(), "dist": DistributedMetric(Torcheval())})
        values = trainer.run([output]).metrics
        assert values["acc"] == values["dist"] == pytest.approx(values["own"])


def test_torchevals_own_metrics(over_ranks: Any) -> None:
    package = pytest.importorskip("torcheval.metrics")

    def metrics() -> dict[str, Any]:
        return {
            "acc": package.MulticlassAccuracy(),
            "auroc": package.MulticlassAUROC(num_classes=3),
            "f1": package.MulticlassF1Score(num_classes=3, average=None),
            "matrix": package.MulticlassConfusionMatrix(3),
        }

    whole = [scored(4), scored(9), scored(6)]
    expected = metrics()
    for metric in expected.values():
        for batch in whole:
            metric.update(*batch)
    values = over_ranks(metrics, [whole[:2], [], whole[2:]]).values
    for name, metric in expected.items():
        torch.testing.assert_close(torch.as_tensor(values[name]), metric.compute().squeeze(), check_dtype=False)


def test_any_duck_that_takes_prediction_and_target_gets_both(over_ranks: Any) -> None:
    class Right(Mean):
        def update(self, prediction: Any, target: Any) -> None:  # type: ignore[override]
            super().update((prediction.argmax(1) == target).double())

    values = over_ranks(lambda: {"m": Right(), "d": DistributedMetric(Right()), "a": Accuracy()}, [[scored(5)]]).values
    assert values["m"] == values["d"] == values["a"]


def test_an_update_that_nobody_can_call_is_refused_at_once() -> None:
    class Three(Mean):
        def update(self, a: Any, b: Any, c: Any) -> None: ...  # type: ignore[override]

    class Two(Metric):
        def update(self, prediction: Any, target: Any) -> None: ...  # type: ignore[override]

        def compute(self) -> float:
            return 0.0

    for metric in (Three(), Two()):
        with pytest.raises(TypeError, match=r"'m' .* update\(output\)"):
            Engine(lambda engine, batch: batch).add_metric(metric, "m")


def test_a_metric_tracker_is_refused_with_the_way_out() -> None:
    tracker = torchmetrics.MetricTracker(torchmetrics.MeanMetric(), maximize=True)
    with pytest.raises(TypeError, match=r"'m' is a MetricTracker.*add the metric"):
        Engine(lambda engine, batch: batch).add_metric(tracker, "m")
    with pytest.raises(TypeError, match="takes a metric"):
        DistributedMetric(tracker)


# -- functions -----------------------------------------------------------------------------------------------------


def test_a_function_of_metrics_gets_their_values_over_all_ranks(over_ranks: Any) -> None:
    def metrics() -> dict[str, Any]:
        accuracy, matrix = Accuracy(), ConfusionMatrix(num_classes=3)
        both = MetricFunction(lambda a, m, k: {"acc": a, "trace": m.diagonal().sum() * k}, accuracy, matrix, 2)
        return {
            "both": both,
            "acc": accuracy,
            "torchmetrics": MetricFunction(lambda value: 1 - value, torchmetrics.MeanSquaredError()),
            "sum": accuracy + torchmetrics.MeanSquaredError(),
            "nested": MetricFunction(lambda values: values["acc"], both),
        }

    def outputs(size: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = scored(size)[1]
        return labels, (labels + torch.arange(size)) % 3

    values = over_ranks(metrics, [[outputs(5)], [], [outputs(4), outputs(3)]]).values
    assert values["both/acc"] == values["acc"] == values["nested"]
    assert values["both/trace"] == round(values["acc"] * 12) * 2
    assert values["sum"] - values["acc"] == pytest.approx(1 - values["torchmetrics"])


@pytest.mark.parametrize("arguments", [(), (3, Accuracy()), (Accuracy(), abs), (abs,), (abs, 3), (abs, Accuracy)])
def test_a_function_without_metrics_is_refused(arguments: Any) -> None:
    with pytest.raises(TypeError):
        MetricFunction(*arguments)


# -- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (Accuracy(), "Accuracy"),
        (Accuracy(average="macro"), "Accuracy"),
        (TopKAccuracy(2), "TopKAccuracy"),
        (F1Score(), "F1Score"),
        (ConfusionMatrix(), "ConfusionMatrix"),
        (MSE(), "MSE"),
        (Loss(torch.nn.functional.mse_loss), "Loss"),
        (Average(), "Average"),
        (Perplexity(), "Perplexity"),
        (RunningAverage(), "RunningAverage"),
        (Throughput(), "Throughput"),
        (DistributedMetric(MAE()), "DistributedMetric"),
        (MAE() + 1, "MetricFunction"),
        (EpochMetric(lambda p, t: 0.0), "EpochMetric"),
    ],
)
def test_a_metric_without_a_sample_is_named_by_hand_and_by_an_engine(metric: Any, name: str) -> None:
    with pytest.raises(NotComputableError, match=rf"^{name} cannot be computed: no (sample|value) was seen"):
        metric.compute()
    with pytest.raises(NotComputableError, match="^Metric 'mine' cannot be computed: (no|it was)") as error:
        compute_all({"mine": metric})
    assert str(error.value).count("cannot be computed") == 1


def test_metrics_show_what_they_were_made_with() -> None:
    assert repr(Average()) == "Average()"
    assert repr(RunningAverage(alpha=0.5)) == "RunningAverage(alpha=0.5)"
    assert repr(TopKAccuracy(k=3)) == "TopKAccuracy(k=3)"
    assert repr(ConfusionMatrix(num_classes=3)).startswith("ConfusionMatrix(")
    assert "num_classes=3" in repr(ConfusionMatrix(num_classes=3))
    assert repr(Loss(torch.nn.MSELoss())) == "Loss(loss_fn=MSELoss())"
    assert repr(DistributedMetric(Average(), "max")) == "DistributedMetric(Average(), 'max')"
    assert repr(2 * Average() / MAE()) == "MetricFunction(divided, MetricFunction(mul, 2, Average()), MAE())"
    assert repr(GivesToo(torch.ones(2))) == "GivesToo(value=<Tensor>)"
    assert repr(Metric.__new__(GivesToo)) == "GivesToo()"
