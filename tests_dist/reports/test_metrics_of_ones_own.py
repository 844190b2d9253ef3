"""Over real ranks: metrics of one's own and of other packages weigh what each rank saw; some show their value live."""

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from ranks import run_ranks

from dengine import Engine, Events
from dengine.metrics import Accuracy, DistributedMetric, EpochMetric, MetricFunction, RunningAverage

SIZES = [[3, 5], [4], []]  # of each rank's batches


class Duck:
    """A duck-typed accuracy, which divides by its count."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.right = self.total = 0

    def update(self, prediction: torch.Tensor, target: torch.Tensor) -> None:
        self.right += int((prediction.argmax(1) == target).sum())
        self.total += len(target)

    def compute(self) -> Any:
        return {"right": self.right / self.total, "total": torch.tensor([self.total])}


class Merging(Duck):
    """With the interface of torcheval's metrics."""

    def merge_state(self, metrics: Iterable["Merging"]) -> "Merging":
        for metric in metrics:
            self.right, self.total = self.right + metric.right, self.total + metric.total
        return self


def batch_of(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(size)
    return torch.randn(size, 3, generator=generator), torch.randint(0, 3, (size,), generator=generator)


def right(size: int) -> int:
    prediction, target = batch_of(size)
    return int((prediction.argmax(1) == target).sum())


def values_of(rank: int, size: int) -> tuple[dict[str, Any], list[float]]:
    evaluator = Engine(lambda engine, batch: batch)
    evaluator.add_metrics(
        {
            "duck": Duck(),
            "distributed": DistributedMetric(MetricFunction(lambda value: value["right"], Duck())),
            "merged": Merging(),
            "epoch": EpochMetric(lambda p, t: float((p.argmax(1) == t).double().mean())),
            "smooth": RunningAverage(0.0, metric=Accuracy()),
        }
    )
    live: list[Any] = []
    evaluator.on(Events.ITERATION_COMPLETED, lambda engine: live.append(engine.state.metrics["smooth"]))
    state = evaluator.run([batch_of(number) for number in SIZES[rank]], max_epochs=2)
    return {key: torch.as_tensor(value).tolist() for key, value in state.metrics.items()}, live


@pytest.mark.filterwarnings("ignore:Metric .* declares no states:UserWarning")
def test_metrics_of_ones_own_are_computed_by_what_each_rank_saw() -> None:
    outcomes = run_ranks(values_of, 3, deadline_s=120)
    whole = (right(3) + right(5) + right(4)) / 12
    of_ranks = [(right(3) + right(5)) / 8, right(4) / 4]
    for rank, (values, live) in enumerate(outcomes):
        assert live == [right(number) / number for number in SIZES[rank]] * 2
        assert values["duck/right"] == pytest.approx((2 * of_ranks[0] + of_ranks[1]) / 3)
        assert values["duck/total"] == pytest.approx([(2 * 8 + 4) / 3])
        assert values["distributed"] == pytest.approx(whole)
        assert (values["merged/right"], values["merged/total"]) == (pytest.approx(whole), [12])
        assert values["epoch"] == pytest.approx(whole)
        assert values["smooth"] == pytest.approx((right(5) / 5 + right(4) / 4) / 2)
