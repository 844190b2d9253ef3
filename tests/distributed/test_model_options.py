"""Options of prepare_model in one process."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dengine import distributed


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = net()

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.inner(inputs)


@pytest.mark.parametrize("kind", [net, Own])
def test_a_compiled_model_keeps_its_class_its_names_and_its_values(kind: Callable[[], nn.Module]) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    for _ in range(2):  # each is compiled for itself
        model = kind()
        names = list(model.state_dict())
        plain = copy.deepcopy(model)
        compiled = distributed.prepare_model(model, compile={"backend": backend})
        assert compiled is model
        assert list(compiled.state_dict()) == names
        inputs = torch.randn(3, 2)
        assert torch.equal(compiled(inputs), plain(inputs))
        assert graphs, "it was not compiled"
        num_graphs = len(graphs)
        copied = copy.deepcopy(compiled)
        for again in (compiled, copied):
            assert torch.equal(again(inputs), plain(inputs))
        assert len(graphs) == num_graphs


def test_checkpointed_blocks_compute_anew_and_can_be_copied() -> None:
    model = net()
    calls: list[int] = []
    model[0].register_forward_hook(lambda *_: calls.append(1))
    model = nn.Sequential(model)
    distributed.prepare_model(model, activation_checkpointing=True, blocks=[nn.Sequential])
    model(torch.randn(3, 2, requires_grad=True)).sum().backward()
    assert len(calls) > 1
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied[0][0].weight.zero_()
        copied[0][2].weight.zero_()
    inputs = torch.randn(3, 2)
    assert not torch.equal(copied(inputs), model(inputs))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixed_precision": "bf16"}, "policy of strategy='fsdp'"),
        ({"mixed_precision": "bf8", "strategy": "fsdp"}, "must be 'bf16', 'fp16' or None"),
        ({"gradient_compression": "fp16", "strategy": "fsdp"}, "is DDP's"),
        ({"activation_checkpointing": True}, "needs blocks="),
        ({"activation_checkpointing": True, "blocks": [nn.Conv2d]}, "There is no Conv2d in this Sequential"),
        ({"blocks": [nn.Linear]}, "strategy='fsdp' shards"),
        ({"strategy": "none", "static_graph": True}, "takes no options"),
        ({"strategy": "fsdp", "mixed_precision": "bf16", "mp_policy": object()}, "give one of them"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distributed.prepare_model(net(), **options)
