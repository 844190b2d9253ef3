"""The metrics of one engine: updated together, reduced together, each leaf once however often it is used."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from dengine.distributed.consistency import (
    Compared,
    Start,
    compare_start,
    prepared_parameters,
    refuse_differences,
    refuse_different_models,
)
from dengine.distributed.rank_zero import refuse_on_rank_zero_alone
from dengine.distributed.world import World, world
from dengine.errors import NotComputableError
from dengine.metrics.held import give_back, held
from dengine.metrics.kinds import AnyMetric, MetricLike
from dengine.metrics.layout import entry_of
from dengine.metrics.leaf import leaf_of
from dengine.metrics.metric import Metric, OutputTransform
from dengine.metrics.reduction import Item, Reduction
from dengine.metrics.transform import is_torchmetrics, prediction_and_target
from dengine.types import MetricValue

__all__ = ["AnyMetric", "MetricSet", "compute_all"]


class MetricSet:
    """Named metrics and, behind them, the leaves that hold states.

    Args:
        counts_once: let metrics that would count the same read one leaf (`Metric.covers`). Only where this set alone
            updates them: updated by hand as well, one by one, they would count in a common leaf twice.
    """

    def __init__(self, *, counts_once: bool = True) -> None:
        self._counts_once = counts_once
        self._metrics: dict[str, Any] = {}
        self._leaves: dict[int, tuple[str, Any]] = {}  # by id: how the user knows it, and the metric
        self._transforms: dict[int, OutputTransform | None] = {}
        self._given_transforms: dict[int, OutputTransform | None] = {}  # None: the metric's default
        self._reduction = Reduction()
        self._no_grad = torch.no_grad()  # to make one takes as long as to enter it, and that as long as some updates
        self._adds_to_no_graph = True
        # What an iteration runs, one call a leaf: compiled when a metric is added.
        self.updates: tuple[Callable[[Any], None], ...] = ()

    def add(self, name: str, metric: AnyMetric, output_transform: OutputTransform | None = None) -> None:
        self._check(name, metric, output_transform)
        self._add(name, metric, output_transform)

    def add_all(self, metrics: Mapping[str, AnyMetric]) -> None:
        for name, metric in metrics.items():
            self._check(name, metric, None)
        for name, metric in metrics.items():
            self._add(name, metric, None)

    @property
    def names(self) -> list[str]:
        return list(self._metrics)

    def reset(self) -> None:
        for _, leaf in self._leaves.values():
            leaf.reset()

    def held(self) -> list[dict[str, Any]]:
        """What each leaf has gathered so far. Cost: a copy to the host."""
        return [{"label": label, "held": held(leaf)} for label, leaf in self._leaves.values()]

    def give_back(self, states: list[dict[str, Any]]) -> bool:
        """Have the leaves go on from what `held` gave; False, and nothing is done, where they are not the same ones."""
        if [state["label"] for state in states] != [label for label, _ in self._leaves.values()]:
            return False
        for state, (_, leaf) in zip(states, self._leaves.values(), strict=True):
            give_back(leaf, state["held"])
        return True

    def update(self, output: Any) -> None:
        if self._adds_to_no_graph:
            for update in self.updates:
                update(output)
            return
        with self._no_grad:
            for update in self.updates:
                update(output)

    def agree(self, compared: Sequence[Compared] = (), *, batches: int = 0, data: str = "") -> Start:
        """Have the ranks compare their metrics, the parameters of their models, and what is `compared`, before a run.

        `batches` and `data` are as of `compare_start`.

        Collective. Cost: an all-reduce of 5 numbers; object gathers if something differs, as it may: the number of
        classes that each has inferred.

        Raises:
            MetricStateError, ConsistencyError: on every rank, naming the rank and the first thing that differs.
        """
        refuse_on_rank_zero_alone("A run of an Engine")
        if world().size == 1:
            return Start(is_same=True, most_batches=batches, is_same_data=True)
        parameters = prepared_parameters()
        items: list[Item] = [] if self._reduction.is_agreed else self._collect(is_alone=False)[1]
        entries = [entry for each in compared for entry in (each.subject, *each.entries)]
        entries += [*map(str, parameters.items()), *self._metrics, *map(repr, map(entry_of, items))]
        found = compare_start(entries, batches=batches, data=data)
        if found.is_same:
            self._reduction.take(items)
            return found
        refuse_differences(compared)
        refuse_different_models(parameters)
        self._reduction.agree(items or self._collect(is_alone=False)[1])
        return found

    def compute(self, *, distributed: bool) -> dict[str, MetricValue]:
        """All values, over the samples of all ranks or, not `distributed`, over this rank's.

        Collective where distributed, except in a run of one process. Cost: see `Reduction.reduce`.

        Raises:
            NotComputableError: nothing was seen; it names the metric. Alike on every rank.
        """
        if distributed and self._metrics:
            refuse_on_rank_zero_alone(f"The reduction of the metrics {', '.join(self._metrics)}")
        here = world() if distributed else World(device=world().device)
        reduced = self._reduced(here)
        values: dict[str, MetricValue] = {}
        for name, metric in self._metrics.items():
            values.update(_flat(name, _value(name, metric, reduced)))
        return values

    def _check(self, name: str, metric: Any, output_transform: OutputTransform | None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"A metric's name must be a string, but got {name!r}.")
        if isinstance(metric, type) or not isinstance(metric, MetricLike):
            raise TypeError(f"Metric {name!r} must be an object with reset, update and compute, but is {metric!r}.")
        if name in self._metrics:
            raise ValueError(f"There is a metric named {name!r} already; the names are {', '.join(self._metrics)}.")
        if output_transform is not None and getattr(metric, "has_own_transform", False):
            raise ValueError(
                f"Metric {name!r} has an output_transform of its own: give it in one place, there or in add_metric()."
            )

    def _add(self, name: str, metric: Any, output_transform: OutputTransform | None) -> None:
        for leaf in metric.leaves() if isinstance(metric, Metric) else (metric,):
            if id(leaf) not in self._leaves:
                self._add_leaf(name, metric, leaf, output_transform)
        self._metrics[name] = metric
        self._adds_to_no_graph = all(
            getattr(leaf, "adds_to_no_graph", False) and self._given_transforms[key] is None
            for key, (_, leaf) in self._leaves.items()
        )
        self.updates = tuple(_update(leaf, self._transforms[key]) for key, (_, leaf) in self._leaves.items())

    def _add_leaf(self, name: str, metric: Any, leaf: Any, output_transform: OutputTransform | None) -> None:
        given = output_transform or (leaf.transform if getattr(leaf, "has_own_transform", False) else None)
        if self._counts_once and isinstance(leaf, Metric):
            alike = [other for key, (_, other) in self._leaves.items() if self._given_transforms[key] == given]
            for other in alike:
                if _may_replace(other, leaf):
                    metric.replace_leaf(leaf, other)
                    return
            for other in alike:
                if _may_replace(leaf, other):
                    self._drop_leaf(other, leaf)
            leaf.num_sets += 1
        self._leaves[id(leaf)] = (f"{name!r} ({type(metric).__qualname__})", leaf)
        self._given_transforms[id(leaf)] = given
        self._transforms[id(leaf)] = output_transform or _own_transform(leaf)

    def _drop_leaf(self, leaf: Metric, stand_in: Metric) -> None:
        for reader in self._metrics.values():
            if isinstance(reader, Metric):
                reader.replace_leaf(leaf, stand_in)
        del self._leaves[id(leaf)], self._transforms[id(leaf)], self._given_transforms[id(leaf)]

    def _collect(self, *, is_alone: bool) -> tuple[list[tuple[int, Any, int]], list[Item]]:
        """The items of all leaves, and which of them are whose: (leaf's id, leaf, number of items)."""
        owners, items = [], []
        for key, (label, metric) in self._leaves.items():
            leaf = leaf_of(metric, label, is_alone=is_alone)
            mine = leaf.items()
            owners.append((key, leaf, len(mine)))
            items += mine
        return owners, items

    def _reduced(self, here: World) -> dict[int, Any]:
        """A metric with the reduced states for each leaf, by the leaf's id."""
        try:
            owners, items = self._collect(is_alone=here.size == 1)
        except Exception as error:
            if here.size > 1:
                # The others wait in the all-reduce: they learn there that this rank has failed.
                self._reduction.fail(repr(error), here)
            raise
        values = self._reduction.reduce(items, here)
        reduced = {}
        for key, leaf, count in owners:
            reduced[key] = leaf.reduced(values[:count])
            values = values[count:]
        return reduced


def compute_all(metrics: Mapping[str, AnyMetric]) -> dict[str, MetricValue]:
    """The values of `metrics` over the samples of all ranks, as an engine computes them at the end of an epoch.

    Collective: call on all ranks with the same names. Cost: one object gather, then as `Engine.add_metric`.

    Raises:
        NotComputableError: nothing was seen; it names the metric. MetricStateError: the ranks' metrics differ.
    """
    together = MetricSet(counts_once=False)
    together.add_all(metrics)
    return together.compute(distributed=True)


def _own_transform(metric: Any) -> OutputTransform | None:
    if isinstance(metric, Metric):
        return metric.transform
    return prediction_and_target if is_torchmetrics(metric) else None


def _may_replace(stand_in: Any, leaf: Metric) -> bool:
    """Whether `leaf` can go: the other tells as much, neither has counted yet, and no other engine updates them."""
    return (
        isinstance(stand_in, Metric)
        and stand_in.covers(leaf)
        and not (stand_in.num_updates or leaf.num_updates)
        and stand_in.num_sets + leaf.num_sets <= 1
    )


def _update(metric: Any, transform: OutputTransform | None) -> Callable[[Any], None]:
    if is_torchmetrics(metric):

        def update_spread(output: Any) -> None:
            arguments = transform(output) if transform is not None else output
            metric.update(*arguments) if isinstance(arguments, (tuple, list)) else metric.update(arguments)

        return update_spread
    update: Callable[[Any], None] = metric.update
    if transform is None:
        return update
    return lambda output: update(transform(output))


def _value(name: str, metric: Any, reduced: Mapping[int, Any]) -> Any:
    try:
        return metric.evaluate(reduced) if isinstance(metric, Metric) else reduced[id(metric)].compute()
    except NotComputableError as error:
        raise NotComputableError(f"Metric {name!r} cannot be computed: {error}.") from None
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ValueError(f"Metric {name!r} cannot be computed: {error}") from error


def _flat(name: str, value: Any) -> dict[str, MetricValue]:
    """The entries of `state.metrics`: numbers as floats, tensors on the CPU, a mapping's values as `name/key`."""
    if isinstance(value, Mapping):
        return {key: one for part, inner in value.items() for key, one in _flat(f"{name}/{part}", inner).items()}
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return {name: value.item() if value.ndim == 0 else value}
    return {name: float(value) if isinstance(value, (int, float)) else value}
