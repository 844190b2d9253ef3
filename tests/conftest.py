"""Ranks as threads: the real packing, agreeing and unpacking of metrics, with exchanges in memory for collectives."""

import importlib
import pkgutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from dengine import metrics
from dengine.launch.world import World
from dengine.metrics.collection.metric_set import MetricSet

_MODULES = [
    importlib.import_module(module.name) for module in pkgutil.walk_packages(metrics.__path__, "dengine.metrics.")
]


@dataclass
class Ranks:
    """What `over_ranks` gives: every rank's values or exception, and the collectives of one rank by kind."""

    outcomes: list[Any] = field(default_factory=list)
    collectives: Counter[str] = field(default_factory=Counter)

    @property
    def values(self) -> dict[str, Any]:
        """The one answer that all ranks have."""
        first = self.outcomes[0]
        for rank, outcome in enumerate(self.outcomes):
            if isinstance(outcome, Exception):
                raise outcome
            assert str(outcome) == str(first), f"rank {rank} has {outcome}, rank 0 has {first}"
        return first


class _Exchange:
    def __init__(self, size: int) -> None:
        self.size = size
        self.here = threading.local()
        self.barrier = threading.Barrier(size, timeout=600)
        self.slots: list[Any] = [None] * size
        self.calls: Counter[str] = Counter()

    def all(self, kind: str, value: Any) -> list[Any]:
        self.slots[self.here.rank] = value
        if self.here.rank == 0:
            self.calls[kind] += 1
        self.barrier.wait()
        everyone = list(self.slots)
        self.barrier.wait()
        return everyone

    def world(self) -> World:
        return World(rank=self.here.rank, size=self.size)


OverRanks = Callable[[Callable[[], Mapping[str, Any]], Sequence[Sequence[Any]]], Ranks]


@pytest.fixture
def over_ranks(monkeypatch: pytest.MonkeyPatch) -> OverRanks:
    """`over_ranks(make, shards)`: metrics made by `make` on each rank, fed with that rank's outputs, and computed."""

    def run(make: Callable[[], Mapping[str, Any]], shards: Sequence[Sequence[Any]]) -> Ranks:
        exchange = _Exchange(len(shards))
        doubles = {
            "world": exchange.world,
            "world_for": lambda collective: exchange.world(),
            "gather_distinct": lambda value, here: exchange.all("object gather", value),
            "sum_tensor": lambda sent, here: torch.stack(exchange.all("sum", sent)).sum(0),
            "max_tensor": lambda sent, here: torch.stack(exchange.all("max", sent)).amax(0),
            "gather_bytes": lambda mine, sizes, here: exchange.all("gather", mine),
        }
        for module in _MODULES:
            for name in doubles.keys() & vars(module).keys():
                monkeypatch.setattr(module, name, doubles[name])

        def one_rank(rank: int) -> Any:
            exchange.here.rank = rank
            together = MetricSet()
            together.add_all(make())
            try:
                together.agree()
                if rank == 0:
                    exchange.calls.clear()
                together.reset()
                for output in shards[rank]:
                    together.update(output)
                return together.compute(distributed=True)
            except threading.BrokenBarrierError:
                raise AssertionError("the ranks do not make the same collectives") from None
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(shards)) as pool:
            return Ranks(list(pool.map(one_rank, range(len(shards)))), exchange.calls)

    return run
