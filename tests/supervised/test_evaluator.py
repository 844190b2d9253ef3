"""The supervised evaluator in one process."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import Events, create_supervised_evaluator
from dengine.metrics import Accuracy, Loss


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 4, generator=generator), torch.arange(n) % 3) for n in (5, 2)]


def test_metrics_are_those_of_the_model_in_eval_mode() -> None:
    model = net()
    evaluator = create_supervised_evaluator(model, {"acc": Accuracy(), "loss": Loss(cross_entropy)})
    metrics = evaluator.run(batches()).metrics
    model.eval()
    inputs, targets = (torch.cat(parts) for parts in zip(*batches(), strict=True))
    with torch.no_grad():
        pred = model(inputs)
    assert metrics["acc"] == (pred.argmax(1) == targets).double().mean().item()
    assert metrics["loss"] == pytest.approx(cross_entropy(pred, targets).item(), rel=1e-6)


@pytest.mark.parametrize("ending", ["completed", "terminated", "failed"])
def test_the_model_is_left_in_the_mode_it_was_in_however_the_run_ends(ending: str) -> None:
    model = net()
    model[1].eval()
    evaluator = create_supervised_evaluator(model)

    @evaluator.on(Events.ITERATION_COMPLETED(once=1))
    def end(engine: Any) -> None:
        assert not model.training
        if ending == "terminated":
            engine.terminate()
        if ending == "failed":
            raise KeyError("lost")

    if ending == "failed":
        with pytest.raises(KeyError, match="lost"):
            evaluator.run(batches())
    else:
        evaluator.run(batches())
    assert [module.training for module in model.children()] == [True, False, True]
    assert model.training


def test_no_graph_is_kept_and_functions_are_called_as_said() -> None:
    evaluator = create_supervised_evaluator(
        net(),
        prepare_batch=lambda batch, device: (batch[0].to(device), batch[1] + 1),
        model_fn=lambda model, inputs: 2 * model(inputs),
        output_transform=lambda inputs, targets, pred: (inputs.shape, targets.min().item(), pred.requires_grad),
    )
    assert evaluator.run(batches()).output == ((2, 4), 1, False)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="torch.nn.Module, but got int"):
        create_supervised_evaluator(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model_fn=3 must be a function"):
        create_supervised_evaluator(net(), model_fn=3)  # type: ignore[arg-type]


def test_an_evaluator_of_its_own_leaves_the_model_as_it_was() -> None:
    model = net()
    model[1].eval()
    evaluator = create_supervised_evaluator(model, {"acc": Accuracy()}, distributed=False)
    everyone = create_supervised_evaluator(model, {"acc": Accuracy()})
    assert evaluator.run(batches()).metrics == everyone.run(batches()).metrics
    assert [module.training for module in model.children()] == [True, False, True]
    assert not evaluator.distributed
