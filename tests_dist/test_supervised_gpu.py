"""Supervised training over ranks on GPUs, against the gradient of the mean over the global batch."""

from typing import Any

import pytest
import torch
from gpus import over_gpus, spread
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import Events, create_supervised_trainer, distributed
from dengine.metrics import Accuracy, Average

pytestmark = pytest.mark.gpu
SHARDS = [[5, 3, 4, 2, 6], [1, 7, 2, 2]]
Batch = tuple[Tensor, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batches_of(rank: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(100 + rank)
    return [
        (torch.randn(n, 4, generator=generator, dtype=torch.float64), torch.randint(0, 3, (n,), generator=generator))
        for n in SHARDS[rank]
    ]


def trained(rank: int, size: int, backend: str, prepared: dict[str, Any] | None, options: dict[str, Any]) -> Any:
    """The weights that this rank has, and the metrics of the last epoch."""
    with distributed.process_group(backend) as here:
        model = net() if prepared is None else spread(net(), **prepared)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = create_supervised_trainer(model, optimizer, cross_entropy, gradient_accumulation_steps=2, **options)
        trainer.add_metrics({"acc": Accuracy(num_classes=3), "loss": Average()})
        metrics = trainer.run(batches_of(rank), max_epochs=2).metrics
        # Of a sharded model this rank's rows: torch crashes where it gathers them by Gloo from a GPU.
        found: Any = dict(distributed.unwrap_model(model).named_parameters())
        parts = {name: value.to_local() if hasattr(value, "to_local") else value for name, value in found.items()}
        assert all(part.device == here.device for part in parts.values()), f"the model is not on {here.device}"
        return {name: part.detach().cpu() for name, part in parts.items()}, dict(metrics)


def by_hand(size: int) -> tuple[nn.Module, float]:
    """The model, and the accuracy over the last epoch."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        correct = 0
        for first in range(0, 5, 2):
            batches = [batch for rank in range(size) for batch in batches_of(rank)[first : first + 2]]
            inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
            optimizer.zero_grad()
            pred = model(inputs)
            cross_entropy(pred, targets).backward()
            optimizer.step()
            correct += int((pred.argmax(1) == targets).sum())
    return model, correct / sum(map(sum, SHARDS[:size]))


@pytest.mark.parametrize(
    ("prepared", "options", "atol"),
    [
        pytest.param({}, {}, 1e-6, id="ddp"),
        pytest.param({"strategy": "fsdp"}, {}, 1e-6, id="fsdp"),
        pytest.param(None, {}, 1e-6, id="accelerate-fsdp"),
        pytest.param({}, {"mixed_precision": "bf16"}, 1e-2, id="ddp-bf16"),
        pytest.param({}, {"mixed_precision": "fp16"}, 1e-2, id="ddp-fp16"),
        pytest.param({"gradient_compression": "bf16"}, {}, 1e-2, id="ddp-compressed"),
        pytest.param({"static_graph": True, "gradient_as_bucket_view": True}, {}, 1e-6, id="ddp-options"),
    ],
)
@over_gpus
def test_a_step_is_that_of_the_mean_over_the_global_batch(
    backend: str, size: int, prepared: dict[str, Any] | None, options: dict[str, Any], atol: float
) -> None:
    if backend == "gloo" and prepared == {"gradient_compression": "bf16"}:
        pytest.skip("Gloo cannot send bfloat16")
    if size == 1 and prepared == {"gradient_compression": "bf16"}:
        pytest.skip("prepare_model() has one rank send nothing")
    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} if prepared is None else {}
    model, accuracy = by_hand(size)
    found = run_ranks(trained, size, backend, prepared, options, init=False, env=env, deadline_s=120.0)
    is_sharded = prepared is None or "strategy" in prepared
    for weights, metrics in found:
        for name, value in model.named_parameters():
            whole = torch.cat([theirs[name] for theirs, _ in found]) if is_sharded else weights[name]
            torch.testing.assert_close(whole, value.detach(), rtol=0, atol=atol)
        if atol < 1e-3:
            assert metrics["acc"] == accuracy


def waits(rank: int, size: int, accumulation: int) -> list[int]:
    """The iterations that ran to their end while any wait of the host for the GPU was an error."""
    with distributed.process_group():
        model = spread(net())
        optimizer = torch.optim.AdamW(model.parameters())
        trainer = create_supervised_trainer(
            model, optimizer, cross_entropy, gradient_accumulation_steps=accumulation, max_grad_norm=1.0
        )
        trainer.add_metrics({"acc": Accuracy(num_classes=3), "loss": Average()})
        batches = [(x.pin_memory(), y.pin_memory()) for x, y in batches_of(rank)[:4]]
        trainer.run(batches)  # what is made once
        done: list[int] = []
        trainer.on(Events.GET_BATCH_COMPLETED(once=2), lambda engine: torch.cuda.set_sync_debug_mode("error"))
        trainer.on(Events.ITERATION_COMPLETED, lambda engine: done.append(engine.state.iteration), priority=-1)
        trainer.on(
            Events.ITERATION_COMPLETED(once=4), lambda engine: torch.cuda.set_sync_debug_mode("default"), priority=-2
        )
        trainer.run(batches)
        return done


@pytest.mark.parametrize("accumulation", [1, 2])
@over_gpus
def test_no_iteration_over_ranks_waits_for_the_device(backend: str, size: int, accumulation: int) -> None:
    if backend == "gloo":
        pytest.skip("Gloo copies to the host")
    for done in run_ranks(waits, size, accumulation, init=False, deadline_s=120.0):
        assert done == [1, 2, 3, 4]
