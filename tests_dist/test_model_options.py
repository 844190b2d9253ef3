"""Options of prepare_model over real ranks: what is sent, kept and compiled; names do not change."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tensors import whole_tensor
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import create_supervised_trainer, distributed


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.inner(x))


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(4, 3))


def batch_of(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(4 + rank, 4, generator=generator), torch.arange(4 + rank) % 3


def trained(rank: int, size: int, strategy: str, options: dict[str, Any]) -> dict[str, Any]:
    model = net()
    if options.get("activation_checkpointing") or strategy == "fsdp":
        options = {"blocks": (Block,), **options}
    model = distributed.prepare_model(model, strategy, **options)  # type: ignore[arg-type]
    dtypes: list[torch.dtype] = []  # one for each call
    inner = distributed.unwrap_model(model)[0].inner
    inner.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), cross_entropy)
    trainer.run([batch_of(rank)])
    state: Any = distributed.unwrap_model(model).state_dict()
    whole = {name: whole_tensor(value) for name, value in state.items()}
    return {"weights": whole, "dtypes": dtypes, "calls": len(dtypes)}


def by_hand(size: int) -> dict[str, Tensor]:
    model = net()
    inputs, targets = (torch.cat(parts) for parts in zip(*map(batch_of, range(size)), strict=True))
    cross_entropy(model(inputs), targets).backward()
    return {name: value.detach() - 0.1 * value.grad for name, value in model.named_parameters()}


@pytest.mark.parametrize(
    ("strategy", "options", "atol"),
    [
        ("ddp", {"static_graph": True, "gradient_as_bucket_view": True}, 1e-6),
        ("ddp", {"gradient_compression": "fp16"}, 1e-3),
        ("ddp", {"activation_checkpointing": True}, 1e-6),
        ("fsdp", {"activation_checkpointing": True}, 1e-6),
        ("fsdp", {"mixed_precision": "bf16"}, 1e-2),
        ("ddp", {"compile": {"backend": "aot_eager"}}, 1e-6),
        ("fsdp", {"compile": {"backend": "aot_eager"}}, 1e-6),
    ],
    ids=str,
)
def test_the_options_train_what_one_process_does_under_the_same_names(
    strategy: str, options: dict[str, Any], atol: float
) -> None:
    for found in run_ranks(trained, 2, strategy, options):
        expected = by_hand(2)
        assert found["weights"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found["weights"][name].float(), value, rtol=0, atol=atol)
        assert set(found["dtypes"]) == {torch.bfloat16 if "mixed_precision" in options else torch.float32}
        assert found["calls"] == (2 if "activation_checkpointing" in options else 1)


def refused(rank: int, size: int) -> str:
    with pytest.raises(ValueError, match="needs NCCL") as error:
        distributed.prepare_model(net(), gradient_compression="bf16")
    return str(error.value)


def test_compression_that_gloo_cannot_send_is_refused() -> None:
    assert "'fp16' can be sent by Gloo" in run_ranks(refused, 2)[0]
