"""Make sure that only one engine updates a metric, in only one way: else it would count samples twice."""

import gc
from collections.abc import Container, Mapping
from dataclasses import dataclass
from threading import Lock
from weakref import WeakSet

from dengine.metrics.core.kinds import AnyMetric, updaters

__all__ = ["MetricOwner"]


@dataclass(frozen=True)
class _Claim:
    """An owner's entry for a metric that it updates, which may be inside another one."""

    name: str
    metric: AnyMetric
    updater: AnyMetric  # the metric whose update() updates it


class MetricOwner:
    """The metrics of one engine, and those inside them. Owners that are alive know of each other.

    Args:
        stateful: the ids of the stateful metrics that are updated; the set may grow later.
    """

    def __init__(self, stateful: Container[int]) -> None:
        self._stateful = stateful
        self._claims: dict[int, _Claim] = {}  # by id of the metric

    def take(self, metrics: Mapping[str, AnyMetric], *, is_only_one: bool) -> None:
        """Own `metrics` from now on. If not `is_only_one`, other owners may have them, too.

        Raises:
            ValueError: one of them is updated already, by this owner in another way, or by another owner that is alive.
                Nothing is changed then.
        """
        claims = dict(self._claims)
        for name, metric in metrics.items():
            _add_claims(name, metric, claims)
        if is_only_one:
            self._refuse_metrics_of_others(claims)
            with _alive_lock:
                _alive.add(self)
        self._claims = claims

    def name_of(self, metric: object) -> str:
        return self._claims[id(metric)].name

    def is_updated_by_another(self, stateful: object) -> bool:
        """Whether another owner updates it, although it is not one of the metrics that this one was given."""
        return id(stateful) not in self._claims and any(id(stateful) in other._stateful for other in self._others())

    def _refuse_metrics_of_others(self, claims: Mapping[int, _Claim]) -> None:
        new = claims.keys() - self._claims.keys()
        if any(new & other._claims.keys() for other in self._others()):
            gc.collect()  # an engine that is no longer used may be in a reference cycle with its handlers
        for other in self._others():
            for key in new & other._claims.keys():
                claim = claims[key]
                raise ValueError(
                    f"Metric {claim.name!r}: {claim.metric!r} is a metric of another engine too, as "
                    f"{other._claims[key].name!r}, and would count what both of them see. Make an object for each "
                    "engine."
                )

    def _others(self) -> list["MetricOwner"]:
        with _alive_lock:
            return [other for other in _alive if other is not self]


_alive: WeakSet[MetricOwner] = WeakSet()
_alive_lock = Lock()


def _add_claims(name: str, metric: AnyMetric, claims: dict[int, _Claim]) -> None:
    """Add `metric`, and the metrics inside it, to `claims`.

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
