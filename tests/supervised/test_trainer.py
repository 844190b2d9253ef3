"""The supervised trainer in one process: the bits of the loop by hand, options, errors."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import Events, SupervisedEvents, create_supervised_trainer
from dengine.handlers import Checkpoint
from dengine.metrics import Accuracy, Average

Batch = tuple[Tensor, Tensor]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.2), nn.Linear(8, 3))


def batches_of(*sizes: int) -> list[Batch]:
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(size, 4, generator=generator), torch.randint(0, 3, (size,), generator=generator)) for size in sizes
    ]


def trainer_of(model: nn.Module, **options: Any) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    return create_supervised_trainer(model, optimizer, cross_entropy, **options)


def by_hand(batches: list[Batch], epochs: int, accumulation: int = 1, clip: float | None = None) -> nn.Module:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(7)
    for _ in range(epochs):
        for number, (inputs, targets) in enumerate(batches, start=1):
            loss = cross_entropy(model(inputs), targets) / accumulation
            loss.backward()
            if number % accumulation == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return model


def assert_same_bits(found: nn.Module, expected: nn.Module) -> None:
    for (name, one), other in zip(found.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


@pytest.mark.parametrize(("accumulation", "clip"), [(1, None), (1, 0.5), (2, None), (3, None), (7, 0.1)])
def test_a_run_has_the_bits_of_the_loop_by_hand(accumulation: int, clip: float | None) -> None:
    batches = batches_of(*[6] * 42)
    model = net()
    trainer = trainer_of(model, gradient_accumulation_steps=accumulation, max_grad_norm=clip)
    torch.manual_seed(7)
    trainer.run(batches, max_epochs=3)
    assert_same_bits(model, by_hand(batches, 3, accumulation, clip))


def test_batches_of_different_size_have_the_bits_of_the_loop_by_hand() -> None:
    batches = batches_of(6, 2, 5, 3)
    model = net()
    trainer = trainer_of(model)
    torch.manual_seed(7)
    trainer.run(batches, max_epochs=3)
    assert_same_bits(model, by_hand(batches, 3))


def test_the_output_is_loss_prediction_and_label_without_a_graph() -> None:
    batches = batches_of(5)
    trainer = trainer_of(net())
    trainer.add_metrics({"acc": Accuracy(), "loss": Average()})
    state = trainer.run(batches)
    assert state.output.keys() == {"loss", "pred", "label"}
    assert not any(value.requires_grad for value in state.output.values())
    assert state.metrics["loss"] == state.output["loss"].item()
    assert state.metrics["acc"] == (state.output["pred"].argmax(1) == batches[0][1]).double().mean().item()


def test_batches_models_and_outputs_of_another_form() -> None:
    model = net()
    batches = [{"x": inputs, "y": targets, "scale": 2.0} for inputs, targets in batches_of(5, 3)]
    trainer = trainer_of(
        model,
        prepare_batch=lambda batch, device: ((batch["x"].to(device), batch["scale"]), batch["y"].to(device)),
        model_fn=lambda model, inputs: model(inputs[0] * inputs[1]),
        output_transform=lambda inputs, targets, pred, loss: (inputs[1], targets.shape, pred.shape, loss.requires_grad),
    )
    assert trainer.run(batches).output == (2.0, (3,), (3, 3), False)


def test_what_a_batch_counts_is_asked_only_where_it_matters() -> None:
    def refuse(inputs: Tensor, targets: Tensor) -> int:
        raise AssertionError("asked")

    trainer_of(net(), weight=refuse).run(batches_of(5, 3))
    with pytest.raises(AssertionError, match="asked"):
        trainer_of(net(), weight=refuse, gradient_accumulation_steps=2).run(batches_of(5, 3))


def test_a_batch_of_weight_zero_leaves_no_trace() -> None:
    batches = batches_of(6, 6)
    model, alone = net().eval(), net().eval()
    for module in (model, alone):
        module.train()
        module[1].eval()
        module[3].eval()
    weights = itertools.cycle([0, 5])
    trainer_of(model, weight=lambda *_: next(weights), gradient_accumulation_steps=2).run(batches)
    trainer_of(alone).run(batches[1:])
    for one, other in zip(model.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_step_of_nothing_but_weight_zero_changes_no_gradient_to_nan() -> None:
    model = net()
    trainer_of(model, weight=lambda *_: 0, gradient_accumulation_steps=2).run(batches_of(6, 6))
    assert all(parameter.grad.abs().sum() == 0 for parameter in model.parameters())


def test_a_negative_weight_and_a_loss_of_many_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot count -1"):
        trainer_of(net(), weight=lambda *_: -1, gradient_accumulation_steps=2).run(batches_of(6, 6))
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(pred: Tensor, targets: Tensor) -> Tensor:
        return cross_entropy(pred, targets, reduction="none")

    with pytest.raises(ValueError, match=r"one number.*\[6\]"):
        create_supervised_trainer(model, optimizer, loss, gradient_accumulation_steps=2).run(batches_of(6, 6))


def test_the_optimizer_steps_as_often_as_the_event_fires() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    steps: list[int] = []
    optimizer.register_step_post_hook(lambda *_: steps.append(trainer.state.iteration))
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, gradient_accumulation_steps=2)
    fired: list[int] = []
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: fired.append(engine.state.iteration))
    trainer.run(batches_of(4, 4, 4, 4, 4), max_epochs=2)
    assert fired == steps == [2, 4, 5, 7, 9, 10]


def test_a_part_that_is_kept_in_eval_mode_stays_so_and_a_model_left_in_it_is_trained() -> None:
    model = net()
    model[1].eval()
    trainer_of(model).run(batches_of(4))
    assert (model.training, model[1].training) == (True, False)
    trainer_of(model.eval()).run(batches_of(4))
    assert (model.training, model[1].training) == (True, True)


def test_a_run_resumed_between_accumulations_has_the_bits_of_one_never_interrupted(tmp_path: Any) -> None:
    batches = batches_of(6, 3, 5, 4, 6, 6)

    def parts() -> dict[str, Any]:
        model = net()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        trainer = create_supervised_trainer(model, optimizer, cross_entropy, gradient_accumulation_steps=2)
        return {"model": model, "optimizer": optimizer, "trainer": trainer}

    whole = parts()
    torch.manual_seed(7)
    save = Checkpoint(whole, tmp_path, n_saved=9)
    whole["trainer"].on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED(once=4), save)
    whole["trainer"].run(batches, max_epochs=3)
    resumed = parts()
    assert Checkpoint.resume(tmp_path, resumed)
    resumed["trainer"].run(batches, max_epochs=3)
    assert_same_bits(resumed["model"], whole["model"])


def test_a_run_resumed_within_an_accumulation_says_what_is_lost(tmp_path: Any) -> None:
    batches = batches_of(6, 3, 5, 4)
    model = net()
    first = trainer_of(model, gradient_accumulation_steps=2)
    position: list[dict[str, Any]] = []
    first.on(Events.ITERATION_COMPLETED(once=3), lambda engine: position.append(engine.state_dict()))
    first.run(batches)
    second = trainer_of(model, gradient_accumulation_steps=2)
    second.load_state_dict(position[0])
    with pytest.warns(RuntimeWarning, match="gradients of 1 of its 2 batches"):
        second.run(batches)


class Failing:
    """Its second batch fails the first time."""

    def __init__(self) -> None:
        self.has_failed = False

    def __len__(self) -> int:
        return 2

    def __iter__(self) -> Iterator[Batch]:
        yield batches_of(6)[0]
        if not self.has_failed:
            self.has_failed = True
            raise RuntimeError("a bad disk")
        yield batches_of(6, 6)[1]


def test_a_run_after_a_failed_one_begins_a_new_accumulation() -> None:
    model, alone = net(), net()
    trainer, data = trainer_of(model, gradient_accumulation_steps=2), Failing()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="a bad disk"):
        trainer.run(data)
    model.load_state_dict(before)
    torch.manual_seed(3)
    trainer.run(data)
    torch.manual_seed(3)
    trainer_of(alone, gradient_accumulation_steps=2).run(batches_of(6, 6))
    assert_same_bits(model, alone)


def test_an_accelerator_of_ones_own_says_what_it_has() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    try:
        steps: list[int] = []
        model = net()
        trainer = trainer_of(model, accelerator=accelerator)
        trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: steps.append(engine.state.iteration))
        trainer.run(batches_of(3, 3, 3))
        assert steps == [2, 3]
        with pytest.raises(ValueError, match="gradient_accumulation_steps=3, but the Accelerator has 2"):
            trainer_of(net(), accelerator=accelerator, gradient_accumulation_steps=3)
        with pytest.raises(ValueError, match="mixed_precision='bf16'"):
            trainer_of(net(), accelerator=accelerator, mixed_precision="bf16")
    finally:
        accelerator.gradient_state._reset_state()


def test_what_accelerate_has_prepared_is_trained_with_the_same_bits() -> None:
    model = net()
    optimizer: Any = torch.optim.AdamW(model.parameters(), lr=0.01)
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    batches = batches_of(6, 2, 5)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, accelerator=accelerator)
    torch.manual_seed(7)
    trainer.run(batches, max_epochs=2)
    assert_same_bits(model, by_hand(batches, 2))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": "net"}, TypeError, "torch.nn.Module, but got str"),
        ({"optimizer": None}, TypeError, "torch.optim.Optimizer, but is a NoneType"),
        ({"loss_fn": 3}, TypeError, "loss_fn=3 must be a function"),
        ({"weight": 3}, TypeError, "weight=3 must be a function"),
        ({"gradient_accumulation_steps": 0}, ValueError, "at least 1"),
        ({"max_grad_norm": 0.0}, ValueError, "max_grad_norm=0.0"),
        ({"mixed_precision": "fp12"}, ValueError, "'fp12' must be one of"),
        ({"mixed_precision": "fp16"}, ValueError, "fp16.*bf16"),
        ({"accelerator": object()}, TypeError, "takes an accelerate.Accelerator"),
    ],
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    given: dict[str, Any] = {"model": model, "optimizer": optimizer, "loss_fn": cross_entropy, **arguments}
    with pytest.raises(error, match=message):
        create_supervised_trainer(given.pop("model"), given.pop("optimizer"), given.pop("loss_fn"), **given)


@pytest.mark.parametrize(("batch", "message"), [(torch.zeros(3, 4), "Tensor of 3"), ([1, 2, 3], "list of 3")])
def test_a_batch_that_is_no_pair_is_refused_with_the_way_out(batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match=f"{message}.*prepare_batch="):
        trainer_of(net()).run([batch])


def test_an_optimizer_of_another_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"None of the parameters of this Sequential is in the optimizer"):
        create_supervised_trainer(net(), torch.optim.SGD(net().parameters(), lr=0.1), cross_entropy)
    model = net()
    trainer = create_supervised_trainer(model, torch.optim.SGD(model[4].parameters(), lr=0.1), cross_entropy)
    trainer.run(batches_of(4))  # of a part of it


def test_an_optimizer_that_needs_a_closure_is_refused() -> None:
    model = net()
    with pytest.raises(TypeError, match="LBFGS"):
        create_supervised_trainer(model, torch.optim.LBFGS(model.parameters()), cross_entropy)


@pytest.mark.parametrize("loss", [1.5, None, (1, 2)])
def test_a_loss_that_is_no_tensor_is_told(loss: Any) -> None:
    model = net()
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.1), lambda pred, y: loss)
    with pytest.raises(TypeError, match="loss_fn must give a tensor"):
        trainer.run(batches_of(4))


@pytest.mark.parametrize("norm", ["1", True])
def test_a_norm_that_is_no_number_is_refused(norm: Any) -> None:
    with pytest.raises(TypeError, match="max_grad_norm=.* must be a number"):
        trainer_of(net(), max_grad_norm=norm)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_validation_that_leaves_eval_mode_behind_does_not_last(accumulation: int) -> None:
    model = net()
    trainer = trainer_of(model, gradient_accumulation_steps=accumulation)
    modes: list[bool] = []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: model.eval() and None)
    trainer.run(batches_of(4, 4, 4), max_epochs=2)
    assert modes == [True] * 6
