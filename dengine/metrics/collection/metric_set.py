"""The metrics of one engine: updated together, reduced together, each leaf once however often it is used."""

import gc
from collections.abc import Callable, Mapping, Sequence, Set
from copy import deepcopy
from dataclasses import dataclass
from threading import Lock
from typing import Any
from weakref import WeakSet

import torch

from dengine.comm.consistency import (
    Compared,
    Start,
    compare_start,
    prepared_parameters,
    refuse_differences,
    refuse_different_models,
)
from dengine.comm.rank_zero import refuse_on_rank_zero_alone
from dengine.errors import NotComputableError
from dengine.launch.world import World, world
from dengine.metrics.collection.live import Live, MetricValues
from dengine.metrics.collection.saved_state import give_back, held
from dengine.metrics.collection.stateful import leaf_of, tells_what_it_saw
from dengine.metrics.core.computed import flat
from dengine.metrics.core.kinds import (
    AnyMetric,
    evaluated,
    is_metric,
    is_tracker,
    leaves_of,
    shows_live,
    updated_through,
    updaters,
)
from dengine.metrics.core.metric import Metric, OutputTransform, counts_updates
from dengine.metrics.core.updates import Seen, check_update, default_transform, update_of
from dengine.metrics.reduction.reduce import Item, Reduction
from dengine.metrics.reduction.schema import entry_of
from dengine.types import MetricValue

__all__ = ["AnyMetric", "MetricSet", "compute_all"]


# The sets of engines that are alive: a metric belongs to one of them.
_alive: WeakSet["MetricSet"] = WeakSet()
_alive_lock = Lock()


@dataclass(frozen=True)
class _Claim:
    """What a set knows of a metric that it updates, which may be inside of another one."""

    name: str
    metric: Any
    updater: Any  # through which it is updated


class MetricSet:
    """Named metrics and, behind them, the leaves that hold states.

    Args:
        counts_once: this set alone updates the metrics, so that those that would count the same may read one leaf
            (`Metric.covers`), and no other such set may have them. Not where they are updated by hand, one by one, as
            they would count in a common leaf twice.
    """

    def __init__(self, *, counts_once: bool = True) -> None:
        self._counts_once = counts_once
        self._metrics: dict[str, Any] = {}
        self._claims: dict[int, _Claim] = {}  # by id: the metrics, and those inside of them
        self._leaves: dict[int, tuple[str, Any]] = {}  # by id: how the user knows it, and the metric
        self._seen: dict[int, Seen] = {}  # by id: of leaves that do not count their updates by themselves
        self._transforms: dict[int, OutputTransform | None] = {}
        self._given_transforms: dict[int, OutputTransform | None] = {}  # None: the metric's default
        self._reduction = Reduction()
        self._no_grad = torch.no_grad()  # to make one takes as long as to enter it, and that as long as some updates
        self._adds_to_no_graph = True
        # What an iteration runs, one call a leaf: compiled when a metric is added.
        self.updates: tuple[Callable[[Any], None], ...] = ()

    def add(self, name: str, metric: AnyMetric, output_transform: OutputTransform | None = None) -> None:
        self._add_checked({name: metric}, output_transform)

    def add_all(self, metrics: Mapping[str, AnyMetric]) -> None:
        self._add_checked(metrics, None)

    def _add_checked(self, metrics: Mapping[str, AnyMetric], output_transform: OutputTransform | None) -> None:
        claims = dict(self._claims)
        for name, metric in metrics.items():
            self._check(name, metric, output_transform)
            _claim(name, metric, claims)
        if self._counts_once:
            self._refuse_metrics_of_others(claims)
            with _alive_lock:
                _alive.add(self)
        self._claims = claims
        for name, metric in metrics.items():
            self._add(name, metric, output_transform)

    @property
    def names(self) -> list[str]:
        return list(self._metrics)

    def reset(self) -> None:
        for _, leaf in self._leaves.values():
            updated_through(leaf).reset()
            if isinstance(leaf, Metric):
                leaf.num_updates = 0  # a `reset` that was set on the object does not know of it
        for seen in self._seen.values():
            seen.clear()

    def held(self) -> list[dict[str, Any]]:
        """What each leaf has gathered so far. Cost: a copy to the host."""
        return [
            {
                "label": label,
                "held": held(leaf),
                **({"seen": vars(self._seen[key]).copy()} if key in self._seen else {}),
            }
            for key, (label, leaf) in self._leaves.items()
        ]

    def give_back(self, states: list[dict[str, Any]]) -> bool:
        """Have the leaves go on from what `held` gave; False, and nothing is done, where they are not the same ones."""
        if [state["label"] for state in states] != [label for label, _ in self._leaves.values()]:
            return False
        for state, (key, (_, leaf)) in zip(states, self._leaves.items(), strict=True):
            give_back(leaf, state["held"])
            if key in self._seen and "seen" in state:
                self._seen[key].num_updates = state["seen"]["num_updates"]
                self._seen[key].num_samples = state["seen"]["num_samples"]
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
            values.update(flat(name, _value(name, metric, reduced)))
        return values

    def shown_live(self, values: dict[str, MetricValue]) -> dict[str, MetricValue]:
        """`values`, of which those of live metrics are from now on read from the metrics: this rank's."""
        live = {name: Live(name, metric) for name, metric in self._metrics.items() if shows_live(metric)}
        if not live:
            return values
        shown = values if isinstance(values, MetricValues) else MetricValues(values)
        shown.follow(live)
        return shown

    def _check(self, name: str, metric: Any, output_transform: OutputTransform | None) -> None:
        if not isinstance(name, str):
            raise TypeError(f"A metric's name must be a string, but got {name!r}.")
        if not is_metric(metric):
            raise TypeError(f"Metric {name!r} must be an object with reset, update and compute, but is {metric!r}.")
        if is_tracker(metric):
            raise TypeError(
                f"Metric {name!r} is a MetricTracker, which keeps a copy for each epoch. An engine computes a metric "
                "for each epoch by itself: add the metric that the tracker was made with, and keep the values in a "
                "handler of EPOCH_COMPLETED."
            )
        check_update(name, metric)
        if name in self._metrics:
            raise ValueError(f"There is a metric named {name!r} already; the names are {', '.join(self._metrics)}.")
        if output_transform is not None and getattr(metric, "has_own_transform", False):
            raise ValueError(
                f"Metric {name!r} has an output_transform of its own: give it in one place, there or in add_metric()."
            )
        before = self._given_transforms.get(id(metric), output_transform)
        if before != output_transform:
            raise ValueError(
                f"Metric {name!r} is the object {self._claims[id(metric)].name!r} already, with another "
                "output_transform, but is updated once: make a second object."
            )

    def _refuse_metrics_of_others(self, claims: Mapping[int, _Claim]) -> None:
        """Raises: ValueError: another engine that is alive updates one of them, so that both would count in it."""
        new = claims.keys() - self._claims.keys()
        if self._others_with(new):
            gc.collect()  # an engine that nobody has may wait for it in a cycle with its handlers
        for other in self._others_with(new):
            claim = next(claims[key] for key in new if key in other._claims)
            raise ValueError(
                f"Metric {claim.name!r}: {claim.metric!r} is a metric of another engine too, as "
                f"{other._claims[id(claim.metric)].name!r}, and would count what both of them see. Make an object for "
                "each engine."
            )

    def _others_with(self, keys: Set[int]) -> list["MetricSet"]:
        with _alive_lock:
            others = list(_alive)
        return [other for other in others if other is not self and keys & other._claims.keys()]

    def _add(self, name: str, metric: Any, output_transform: OutputTransform | None) -> None:
        for leaf in leaves_of(metric):
            if id(leaf) not in self._leaves:
                self._add_leaf(name, metric, self._own_leaf(metric, leaf), output_transform)
        self._metrics[name] = metric
        self._adds_to_no_graph = all(
            getattr(leaf, "adds_to_no_graph", False)
            and updated_through(leaf) is leaf
            and counts_updates(leaf)
            and self._given_transforms[key] is None
            for key, (_, leaf) in self._leaves.items()
        )
        self.updates = tuple(self._update(key, leaf) for key, (_, leaf) in self._leaves.items())

    def _own_leaf(self, metric: Any, leaf: Any) -> Any:
        """`leaf`, or a copy where another engine has it: by way of an earlier one, in which two metrics shared it."""
        if not self._counts_once or id(leaf) in self._claims:
            return leaf
        with _alive_lock:
            others = list(_alive)
        if not any(id(leaf) in other._leaves for other in others if other is not self):
            return leaf
        own = deepcopy(leaf)
        own.reset()
        metric.replace_leaf(leaf, own)
        return own

    def _update(self, key: int, leaf: Any) -> Callable[[Any], None]:
        update = update_of(updated_through(leaf), self._transforms[key])
        return self._seen[key].counting(update) if key in self._seen else update

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
        self._leaves[id(leaf)] = (f"{name!r} ({type(metric).__qualname__})", leaf)
        self._given_transforms[id(leaf)] = given
        self._transforms[id(leaf)] = output_transform or default_transform(updated_through(leaf))
        if self._counts_once and not tells_what_it_saw(leaf):
            self._seen[id(leaf)] = Seen()

    def _drop_leaf(self, leaf: Metric, stand_in: Metric) -> None:
        for reader in self._metrics.values():
            if isinstance(reader, Metric):
                reader.replace_leaf(leaf, stand_in)
        del self._leaves[id(leaf)], self._transforms[id(leaf)], self._given_transforms[id(leaf)]

    def _collect(self, *, is_alone: bool) -> tuple[list[tuple[int, Any, int]], list[Item]]:
        """The items of all leaves, and which of them are whose: (leaf's id, leaf, number of items)."""
        owners, items = [], []
        for key, (label, metric) in self._leaves.items():
            leaf = leaf_of(metric, label, is_alone=is_alone, seen=self._seen.get(key))
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
        forms = self._reduction.forms()
        reduced = {}
        for key, leaf, count in owners:
            reduced[key] = leaf.reduced(values[:count], forms[:count])
            values, forms = values[count:], forms[count:]
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


def _claim(name: str, metric: Any, claims: dict[int, _Claim]) -> None:
    """Add `metric`, and the metrics inside of it, to `claims`.

    Raises:
        ValueError: one of them is updated already, in another way, so that it would count every batch twice.
    """
    for each, updater in updaters(metric):
        known = claims.setdefault(id(each), _Claim(name, each, updater))
        if known.updater is not updater:
            raise ValueError(
                f"Metric {name!r}: {each!r} is updated as {known.name!r} already, and would count every batch twice. "
                "Make a second object."
            )


def _may_replace(stand_in: Any, leaf: Metric) -> bool:
    """Whether `leaf` can go: the other tells as much, and neither has counted yet."""
    if not isinstance(stand_in, Metric) or any(updated_through(each) is not each for each in (stand_in, leaf)):
        return False
    return stand_in.covers(leaf) and not (stand_in.num_updates or leaf.num_updates)


def _value(name: str, metric: Any, reduced: Mapping[int, Any]) -> Any:
    try:
        return evaluated(metric, reduced)
    except NotComputableError as error:
        message = f"Metric {name!r} cannot be computed: {error.reason}."
        raise NotComputableError(message, reason=error.reason) from None
    except ValueError as error:
        if type(error) is not ValueError:
            raise
        raise ValueError(f"Metric {name!r} cannot be computed: {error}") from error
