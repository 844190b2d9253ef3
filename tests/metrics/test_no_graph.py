"""What an engine's metrics gather has no graph behind it: one would grow by an iteration at a time."""

from typing import Any

import pytest
import torch

from dengine import Engine
from dengine.metrics import MSE, Accuracy, Average, Perplexity


class Doubled(Average):
    def update(self, output: Any) -> None:
        self.add(output["loss"] * 2, 1)

    def default_transform(self, output: Any) -> Any:
        return output


class OfItsOwn(Average):
    def default_transform(self, output: Any) -> Any:
        return output["loss"] * 2


def outputs(engine: Engine, batch: int) -> dict[str, torch.Tensor]:
    pred = torch.rand(4, 3, requires_grad=True) * 2
    return {"pred": pred, "label": torch.arange(4) % 3, "loss": pred.sum()}


@pytest.mark.parametrize(
    "metric",
    [
        Average(),
        Doubled(),
        OfItsOwn(),
        Average(output_transform=lambda output: output["pred"]),
        Accuracy(),
        Accuracy(output_transform=lambda output: (output["pred"] * 2, output["label"])),
        MSE(output_transform=lambda output: (output["pred"], output["pred"] * 2)),
        Perplexity(),
    ],
    ids=lambda metric: type(metric).__name__,
)
def test_no_state_has_a_graph(metric: Any) -> None:
    engine = Engine(outputs)
    engine.add_metric(metric, "it")
    engine.run(range(40))
    for leaf in metric.stateful_metrics():
        for name in leaf.states:
            value = getattr(leaf, name)
            assert not (isinstance(value, torch.Tensor) and value.requires_grad), name
