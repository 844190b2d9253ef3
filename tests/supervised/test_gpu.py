"""Supervised training on one GPU: bits, precisions, random numbers, and no wait for the device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import Events, SupervisedEvents, create_supervised_evaluator, create_supervised_trainer
from dengine.handlers import Checkpoint
from dengine.metrics import Accuracy, Average

pytestmark = pytest.mark.gpu

Batch = tuple[Tensor, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3)).cuda()


def batches_of(*sizes: int, device: str = "cuda") -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, generator=generator).to(device), torch.randint(0, 3, (n,), generator=generator).to(device))
        for n in sizes
    ]


@pytest.fixture(autouse=True)
def no_precision_left_over() -> Iterator[None]:
    """accelerate knows one precision a process."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def parts(**options: Any) -> dict[str, Any]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return {
        "model": model,
        "optimizer": optimizer,
        "trainer": create_supervised_trainer(model, optimizer, cross_entropy, **options),
    }


def assert_same_bits(found: nn.Module, expected: nn.Module) -> None:
    for one, other in zip(found.state_dict().values(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_run_has_the_bits_of_the_loop_by_hand(precision: str | None) -> None:
    run = parts(mixed_precision=precision)
    torch.manual_seed(7)
    run["trainer"].run(batches_of(6, 5, 4, device="cpu"), max_epochs=2)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(7)
    for _ in range(2):
        for inputs, targets in batches_of(6, 5, 4):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=precision is not None):
                loss = cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
    assert_same_bits(run["model"], model)


@pytest.mark.parametrize("precision", ["no", "bf16", "fp16"])
def test_a_resumed_run_has_the_bits_of_one_never_interrupted(precision: str, tmp_path: Any) -> None:
    batches = batches_of(6, 3, 5, 4, 6, 6)
    whole = parts(mixed_precision=precision, gradient_accumulation_steps=2)
    save = Checkpoint(whole, tmp_path)
    whole["trainer"].on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED(once=4), save)
    torch.manual_seed(7)
    whole["trainer"].run(batches, max_epochs=3)
    resumed = parts(mixed_precision=precision, gradient_accumulation_steps=2)
    assert Checkpoint.resume(tmp_path, resumed)
    torch.manual_seed(1234)  # the generators of the checkpoint must win
    resumed["trainer"].run(batches, max_epochs=3)
    assert_same_bits(resumed["model"], whole["model"])


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_no_iteration_waits_for_the_device(precision: str, accumulation: int) -> None:
    run = parts(mixed_precision=precision, gradient_accumulation_steps=accumulation, max_grad_norm=1.0)
    trainer = run["trainer"]
    trainer.add_metrics({"acc": Accuracy(num_classes=3), "loss": Average()})
    batches = batches_of(6, 3, 5, 4)
    trainer.run(batches)  # what is made once
    steps: list[int] = []
    trainer.on(Events.GET_BATCH_COMPLETED(once=1), lambda engine: torch.cuda.set_sync_debug_mode("error"))
    trainer.on(
        Events.ITERATION_COMPLETED(once=4),
        lambda engine: (torch.cuda.set_sync_debug_mode("default"), steps.append(4)),
        priority=-1,
    )
    try:
        trainer.run(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == [4]


def test_an_evaluation_is_that_of_the_model_in_eval_mode() -> None:
    model = net()
    evaluator = create_supervised_evaluator(model, {"acc": Accuracy()})
    batches = batches_of(7, 2, device="cpu")
    accuracy = evaluator.run(batches).metrics["acc"]
    inputs, targets = (torch.cat(part).cuda() for part in zip(*batches, strict=True))
    with torch.no_grad():
        expected = (model.eval()(inputs).argmax(1) == targets).double().mean().item()
    assert accuracy == expected


def test_a_count_on_the_device_rounds_gradients_of_16_bits_as_one_on_the_host() -> None:
    models = []
    for weight in (lambda inputs, targets: len(targets), lambda inputs, targets: (targets >= 0).sum()):
        model = net().to(torch.bfloat16)
        trainer = create_supervised_trainer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.5),
            cross_entropy,
            gradient_accumulation_steps=2,
            weight=weight,
            model_fn=lambda model, inputs: model(inputs.to(torch.bfloat16)),
        )
        torch.manual_seed(7)
        trainer.run(batches_of(6, 5, 7, 4))
        models.append(model)
    assert_same_bits(*models)
