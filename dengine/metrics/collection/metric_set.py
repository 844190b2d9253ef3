"""The metrics of one engine: update and reduce them together, each state once however often it is used."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import torch

from dengine.comm.collectives import whole_tensors
from dengine.comm.consistency import (
    Compared,
    Start,
    compare_start,
    prepared_parameters,
    refuse_differences,
    refuse_different_models,
)
from dengine.dtensor import may_be_dtensors
from dengine.launch.world import World, world, world_for
from dengine.metrics.collection.live import Live, MetricValues
from dengine.metrics.collection.owner import MetricOwner
from dengine.metrics.collection.saved_state import load_state_dict, state_dict
from dengine.metrics.collection.stateful import adapter_of, knows_what_it_saw
from dengine.metrics.core.computed import flat
from dengine.metrics.core.kinds import AnyMetric, shows_live, stateful_of, updated_through, value_of
from dengine.metrics.core.metric import Metric, OutputTransform
from dengine.metrics.core.updates import Seen, check_metric, default_transform, update_of
from dengine.metrics.core.wrapped_methods import counts_updates
from dengine.metrics.reduction.reduce import Reduction, State
from dengine.metrics.reduction.schema import schemas_of
from dengine.types import MetricValue

__all__ = ["AnyMetric", "MetricSet"]


class MetricSet:
    """The named metrics of an engine, and the stateful metrics from which they are computed.

    Args:
        counts_once: only this set updates the metrics, so that those that count the same may form a compute group
            (`Metric.can_lead`), and no other such set may have them. False if the user updates them one by one: a group
            would count twice then.
        reduction: what another set of the same names has agreed on with the other ranks; by default nothing yet.
    """

    def __init__(self, *, counts_once: bool = True, reduction: Reduction | None = None) -> None:
        self._counts_once = counts_once
        self._metrics: dict[str, Any] = {}
        self._stateful: dict[int, tuple[str, Any]] = {}  # by id: the name that the user knows, and the metric
        self._owner = MetricOwner(self._stateful)
        self._seen: dict[int, Seen] = {}  # by id: for stateful metrics that do not count their updates themselves
        self._transforms: dict[int, OutputTransform | None] = {}
        self._given_transforms: dict[int, OutputTransform | None] = {}  # None: the metric's default
        self._reduction = reduction or Reduction()
        self._no_grad = torch.no_grad()  # kept, as to make one takes as long as some updates
        self._adds_to_no_graph = True
        # Read once an epoch, as an update may take less than a microsecond: whether a step's output may hold DTensors,
        # and whether it may be None, on a rank without the last stage (`pp`) or whose tokens are pooled (`cp`).
        self._may_be_spread = True
        self._may_be_none = False
        # The calls of an iteration, one for each stateful metric, prepared when a metric is added.
        self.updates: tuple[Callable[[Any], None], ...] = ()

    def add_all(self, metrics: Mapping[str, AnyMetric], output_transform: OutputTransform | None = None) -> None:
        for name, metric in metrics.items():
            self._check(name, metric, output_transform)
        self._owner.take(metrics, is_only_one=self._counts_once)
        for name, metric in metrics.items():
            self._add(name, metric, output_transform)
        self._adds_to_no_graph = all(
            getattr(stateful, "adds_to_no_graph", False)
            and updated_through(stateful) is stateful
            and isinstance(stateful, Metric)
            and counts_updates(stateful)
            and self._given_transforms[key] is None
            for key, (_, stateful) in self._stateful.items()
        )
        self.updates = tuple(self._update(key, stateful) for key, (_, stateful) in self._stateful.items())

    @property
    def names(self) -> list[str]:
        return list(self._metrics)

    def reset(self) -> None:
        here = world()
        self._may_be_spread = here.mesh is not None or may_be_dtensors()
        self._may_be_none = here.may_lack_output
        for _, stateful in self._stateful.values():
            updated_through(stateful).reset()
            if isinstance(stateful, Metric):
                stateful.num_updates = 0  # a `reset` that was set on the object does not do this
        for seen in self._seen.values():
            seen.clear()

    def state_dict(self) -> list[dict[str, Any]]:
        """The state of each stateful metric so far. Cost: a copy to the host."""
        return [
            {
                "label": label,
                "held": state_dict(stateful),
                **({"seen": vars(self._seen[key]).copy()} if key in self._seen else {}),
            }
            for key, (label, stateful) in self._stateful.items()
        ]

    def load_state_dict(self, states: list[dict[str, Any]]) -> bool:
        """Load what `state_dict` gave. False, and nothing is changed, if it is of other metrics."""
        if [state["label"] for state in states] != [label for label, _ in self._stateful.values()]:
            return False
        for state, (key, (_, stateful)) in zip(states, self._stateful.items(), strict=True):
            load_state_dict(stateful, state["held"])
            if key in self._seen and "seen" in state:
                self._seen[key].num_updates = state["seen"]["num_updates"]
                self._seen[key].num_samples = state["seen"]["num_samples"]
        return True

    def update(self, output: object) -> None:
        if self._may_be_spread:
            if output is None and self._may_be_none:
                return
            output = whole_tensors(output, "The metrics")
        if self._adds_to_no_graph:
            for update in self.updates:
                update(output)
            return
        with self._no_grad:
            for update in self.updates:
                update(output)

    def agree(self, compared: Sequence[Compared] = (), *, batches: int = 0, data: str = "") -> Start:
        """Compare the metrics of the ranks, the parameters of their models, and `compared`, before a run.

        `batches` and `data` are those of `compare_start`.

        Collective. Cost: an all-reduce of 5 numbers; object gathers if something differs, which may be legal: the
        number of classes that each rank has inferred.

        Raises:
            MetricStateError, ConsistencyError: on every rank; the message names a rank and the first difference.
        """
        parameters = prepared_parameters()
        states: list[State] = [] if self._reduction.is_agreed else self._collect(world())[1]
        entries = [entry for each in compared for entry in (each.subject, *each.entries)]
        entries += [*map(str, parameters.items()), *self._metrics, *map(repr, schemas_of(states))]
        found = compare_start(entries, batches=batches, data=data)
        if found.is_same:
            self._reduction.take(states)
            return found
        refuse_differences(compared)
        refuse_different_models(parameters)
        self._reduction.agree(states or self._collect(world())[1], world())
        return found

    def compute(self, *, distributed: bool) -> dict[str, MetricValue]:
        """The values of all metrics, over the samples of all ranks or, if not `distributed`, of this rank.

        Collective if distributed, except in a run of one process. Cost: see `Reduction.reduce`.

        Raises:
            NotComputableError: no sample was seen; the message names the metric. The same on every rank.
        """
        what = f"The reduction of the metrics {', '.join(self._metrics)}"
        here = world_for(what) if distributed and self._metrics else world()
        reduced = self._reduced(here if distributed else World(device=here.device))
        values: dict[str, MetricValue] = {}
        for name, metric in self._metrics.items():
            values.update(flat(name, value_of(name, metric, reduced)))
        return values

    def shown_live(self, values: dict[str, MetricValue]) -> dict[str, MetricValue]:
        """`values`, in which those of live metrics are this rank's present values from now on."""
        live = {name: Live(name, metric) for name, metric in self._metrics.items() if shows_live(metric)}
        if not live:
            return values
        shown = values if isinstance(values, MetricValues) else MetricValues(values)
        shown.follow(live)
        return shown

    def _check(self, name: str, metric: AnyMetric, output_transform: OutputTransform | None) -> None:
        check_metric(name, metric)
        if name in self._metrics:
            raise ValueError(f"There is a metric named {name!r} already; the names are {', '.join(self._metrics)}.")
        if output_transform is not None and getattr(metric, "has_own_transform", False):
            raise ValueError(
                f"Metric {name!r} has an output_transform of its own: give it in one place, there or in add_metric()."
            )
        before = self._given_transforms.get(id(metric), output_transform)
        if before != output_transform:
            raise ValueError(
                f"Metric {name!r} is the object {self._owner.name_of(metric)!r} already, with another "
                "output_transform, but is updated once: make a second object."
            )

    def _add(self, name: str, metric: AnyMetric, output_transform: OutputTransform | None) -> None:
        for stateful in stateful_of(metric):
            if id(stateful) not in self._stateful:
                self._add_stateful(name, metric, self._own_stateful(metric, stateful), output_transform)
        self._metrics[name] = metric

    def _own_stateful(self, metric: Any, stateful: Any) -> Any:
        """`stateful`, or a copy if another engine has it, from a metric that shared it."""
        if not self._counts_once or not self._owner.is_updated_by_another(stateful):
            return stateful
        own = deepcopy(stateful)
        own.reset()
        metric.read_from(stateful, own)
        return own

    def _update(self, key: int, stateful: AnyMetric) -> Callable[[Any], None]:
        update = update_of(updated_through(stateful), self._transforms[key])
        return self._seen[key].counting(update) if key in self._seen else update

    def _add_stateful(self, name: str, metric: Any, stateful: Any, output_transform: OutputTransform | None) -> None:
        given = output_transform or (stateful.transform if getattr(stateful, "has_own_transform", False) else None)
        if self._counts_once and isinstance(stateful, Metric):
            alike = [other for key, (_, other) in self._stateful.items() if self._given_transforms[key] == given]
            for other in alike:
                if _may_lead(other, stateful):
                    metric.read_from(stateful, other)
                    return
            for other in alike:
                if _may_lead(stateful, other):
                    self._drop_stateful(other, stateful)
        self._stateful[id(stateful)] = (f"{name!r} ({type(metric).__qualname__})", stateful)
        self._given_transforms[id(stateful)] = given
        self._transforms[id(stateful)] = output_transform or default_transform(updated_through(stateful))
        if self._counts_once and not knows_what_it_saw(stateful):
            self._seen[id(stateful)] = Seen()

    def _drop_stateful(self, stateful: Metric, leader: Metric) -> None:
        for reader in self._metrics.values():
            if isinstance(reader, Metric):
                reader.read_from(stateful, leader)
        del self._stateful[id(stateful)], self._transforms[id(stateful)], self._given_transforms[id(stateful)]

    def _collect(self, here: World) -> tuple[list[tuple[int, Any, int]], list[State]]:
        """The owners of states, as (id of the metric, its adapter, number of states), and the states of all metrics."""
        owners, states = [], []
        for key, (label, metric) in self._stateful.items():
            adapter = adapter_of(metric, label, here, seen=self._seen.get(key))
            mine = adapter.states()
            if not here.counts_samples:  # a rank with the same data and tokens does
                mine = [replace(state, is_seen=False) for state in mine]
            owners.append((key, adapter, len(mine)))
            states += mine
        return owners, states

    def _reduced(self, here: World) -> dict[int, Any]:
        """For each stateful metric, by its id, a copy with the reduced states."""
        try:
            owners, states = self._collect(here)
        except Exception as error:
            # The others wait in the all-reduce: it tells them that this rank has failed.
            self._reduction.fail(repr(error), here)
            raise
        values = self._reduction.reduce(states, here)
        forms = self._reduction.forms()
        reduced = {}
        for key, adapter, count in owners:
            reduced[key] = adapter.reduced(values[:count], forms[:count])
            values, forms = values[count:], forms[count:]
        return reduced


def _may_lead(leader: Any, stateful: Metric) -> bool:
    """Whether `leader` can replace `stateful`: it counts as much, and neither has counted yet."""
    if not isinstance(leader, Metric) or any(updated_through(each) is not each for each in (leader, stateful)):
        return False
    return leader.can_lead(stateful) and not (leader.num_updates or stateful.num_updates)
