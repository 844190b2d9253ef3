"""Supervised training by DeepSpeed's ZeRO over real ranks, against weighted means that are computed here."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from masked import Batch, batches_of, num_tokens
from ranks import run_ranks
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dengine import Engine, create_supervised_evaluator, create_supervised_trainer, distributed
from dengine.checkpoint import load, save
from dengine.handlers import EMA
from dengine.metrics import Accuracy

pytest.importorskip("deepspeed", reason='needs DeepSpeed: pip install "dengine[deepspeed]"')

LR = 0.1
STAGES = [0, 1, 2, 3]
ENV = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
# For each rank the sizes of its batches.
UNEVEN = [[5, 3, 4, 2, 6], [1, 7, 2, 2, 1]]
SHORTER = [[5, 3, 4, 2, 6], [1, 7, 2, 2]]
CASES: dict[str, tuple[list[list[int]], dict[str, Any]]] = {
    "one batch a step": (UNEVEN, {}),
    "a shard that ends first": (SHORTER, {}),
    "tokens": (UNEVEN, {"is_masked": True}),
    "clipped": (UNEVEN, {"max_grad_norm": 0.05}),
    "accumulated": (SHORTER, {"gradient_accumulation_steps": 2}),
    "bf16": (UNEVEN, {"mixed_precision": "bf16"}),
}
ON_GPU: list[tuple[list[list[int]], dict[str, Any]]] = [
    (UNEVEN[:1], {"max_grad_norm": 0.05, "mixed_precision": precision}) for precision in ("no", "bf16", "fp16")
]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))


def sgd_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR)


def weights_by_hand(
    shards: list[list[int]],
    *,
    is_masked: bool = False,
    gradient_accumulation_steps: int = 1,
    max_grad_norm: float | None = None,
    **_: Any,
) -> dict[str, Tensor]:
    """Two epochs of one process that sees all ranks' batches: a mean over the ranks' samples for each batch of an
    accumulation, and the mean of those."""
    model = net()
    optimizer = sgd_of(model)
    of_ranks = [batches_of(rank, sizes, is_masked=is_masked, dtype=torch.float32) for rank, sizes in enumerate(shards)]
    length = max(map(len, of_ranks))
    for first in [*range(0, length, gradient_accumulation_steps)] * 2:
        step = range(first, min(first + gradient_accumulation_steps, length))
        optimizer.zero_grad()
        for number in step:
            batches = [batches[number] for batches in of_ranks if number < len(batches)]
            loss = torch.stack([cross_entropy(model(x), y, reduction="sum") for x, y in batches]).sum()
            (loss / sum(num_tokens(*batch) for batch in batches) / len(step)).backward()
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
        optimizer.step()
    return {name: value.detach() for name, value in model.named_parameters()}


def accuracy_by_hand(weights: dict[str, Tensor], shards: list[list[int]]) -> float:
    model = net()
    model.load_state_dict(weights)
    batches = [
        batch
        for rank, sizes in enumerate(shards)
        for batch in batches_of(rank, sizes, is_masked=False, dtype=torch.float32)
    ]
    is_right = torch.cat([model(inputs).argmax(1) == targets for inputs, targets in batches])
    return is_right.double().mean().item()


def configured(stage: int) -> None:
    """What `accelerate launch` says, for an Accelerator that is still to be made."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ["ACCELERATE_DEEPSPEED_ZERO_STAGE"] = str(stage)


def trained(rank: int, size: int, folder: str) -> dict[tuple[str, str], tuple[dict[str, Tensor], int, float]]:
    """For each stage and case the weights, the iterations, and the accuracy thereafter."""
    from accelerate.utils import DummyOptim

    found = {}
    for stage in STAGES:
        for case in CASES:
            configured(stage)
            model = net(rank)  # rank 0's must win
            found[f"stage {stage}", case] = trained_in(case, rank, model, sgd_of(model))
    model = net(rank)
    found["second trainer", "one batch a step"] = second_trainer(rank)
    os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = f"{folder}/deepspeed.json"
    configured(2)
    found["configured", "one batch a step"] = trained_in(
        "one batch a step", rank, model, DummyOptim(model.parameters())
    )
    return found


def second_trainer(rank: int) -> tuple[dict[str, Tensor], int, float]:
    """What the first one of a process was told must not hold for it; and every rank gets rank 0's buffers."""
    configured(2)
    trainer_of(*model_and_optimizer(), gradient_accumulation_steps=2, max_grad_norm=0.05)
    model = net(rank)
    model.register_buffer("mine", torch.tensor(float(rank)))
    model.eval()  # a trainer trains
    found = trained_in("one batch a step", rank, model, sgd_of(model))
    assert model.training, "the model was left in eval mode"
    assert float(model.get_buffer("mine")) == 0.0, "rank 0's buffer must win"
    return found


def trained_on_gpu(rank: int, size: int, number: int, folder: str) -> dict[int, dict[str, Tensor]]:
    """For each stage the weights."""
    CASES["on a GPU"] = ON_GPU[number]
    found = {}
    with distributed.process_group() as here:
        for stage in STAGES:
            os.environ["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = f"{folder}/{stage}.json"
            configured(stage)
            model = net()
            if stage == 0 and ON_GPU[number][1]["mixed_precision"] == "fp16":
                text = complaint(lambda model=model: trainer_of(model, sgd_of(model), mixed_precision="fp16"))
                assert "ValueError: DeepSpeed's stage 0 does not scale the loss" in text, text
                continue
            weights, _, _ = trained_in("on a GPU", rank, model, sgd_of(model))
            assert all(weight.device == here.device for weight in weights.values()), f"they are not on {here.device}"
            found[stage] = {name: weight.cpu() for name, weight in weights.items()}
    return found


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(len(ON_GPU)))
def test_deepspeed_trains_on_a_gpu_what_one_does_by_hand(number: int, tmp_path: Path) -> None:
    shards, options = ON_GPU[number]
    precision = options["mixed_precision"]
    for stage in STAGES:
        config = {
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_clipping": "auto",
            # From its usual scale on, steps are skipped until it is small enough.
            "fp16": {"enabled": precision == "fp16", "initial_scale_power": 8},
            "bf16": {"enabled": precision == "bf16"},
        }
        (tmp_path / f"{stage}.json").write_text(json.dumps(config))
    env = {"ACCELERATE_USE_DEEPSPEED": "true"}
    (found,) = run_ranks(trained_on_gpu, 1, number, str(tmp_path), init=False, env=env, deadline_s=120.0)
    for stage, weights in found.items():
        for name, value in weights_by_hand(shards, **options).items():
            error = (weights[name] - value).abs().max().item()
            assert error <= (1e-6 if precision == "no" else 5e-3), f"{stage}: {name} is off by {error}"


def trained_in(case: str, rank: int, model: nn.Module, optimizer: Any) -> tuple[dict[str, Tensor], int, float]:
    import deepspeed

    shards, options = CASES[case]
    options = dict(options)
    is_masked = options.pop("is_masked", False)
    weight = num_tokens if is_masked else None
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, weight=weight, **options)
    trainer.run(batches_of(rank, shards[rank], is_masked=is_masked, dtype=torch.float32), max_epochs=2)
    evaluator = create_supervised_evaluator(model, {"acc": Accuracy()})
    accuracy = evaluator.run(batches_of(rank, shards[rank], is_masked=False, dtype=torch.float32)).metrics["acc"]
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        weights = {name: value.detach().float().clone() for name, value in model.named_parameters()}
    return weights, trainer.state.iteration, float(accuracy)


def test_deepspeed_takes_the_mean_over_all_ranks(tmp_path: Path) -> None:
    config = {
        "optimizer": {"type": "SGD", "params": {"lr": LR}},
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": "auto",
    }
    (tmp_path / "deepspeed.json").write_text(json.dumps(config))
    for found in run_ranks(trained, 2, str(tmp_path), env=ENV, deadline_s=240.0):
        assert len(found) == len(STAGES) * len(CASES) + 2
        for (stage, case), (weights, iterations, accuracy) in found.items():
            shards, options = CASES[case]
            assert iterations == 2 * 5
            assert set(weights) == {"0.weight", "0.bias", "2.weight", "2.bias"}
            for name, value in weights_by_hand(shards, **options).items():
                error = (weights[name] - value).abs().max().item()
                assert error <= (5e-3 if case == "bf16" else 1e-6), f"{stage}, {case}: {name} is off by {error}"
            if case != "bf16":
                assert accuracy == pytest.approx(accuracy_by_hand(weights, shards), abs=1e-12), f"{stage}, {case}"


def trainer_of(model: nn.Module, optimizer: torch.optim.Optimizer, **options: Any) -> Engine:
    return create_supervised_trainer(model, optimizer, cross_entropy, **options)


def complaint(action: Callable[[], Any]) -> str:
    """ "" where there was none."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


class ShortData(list[Batch]):
    """It tells one batch more than it has."""

    def __len__(self) -> int:
        return super().__len__() + 1


def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = net()
    return model, sgd_of(model)


def complaints(rank: int, size: int, folder: str) -> dict[str, str]:
    from accelerate import Accelerator

    found = {}
    batches = batches_of(rank, UNEVEN[rank], is_masked=False, dtype=torch.float32)
    for stage in (0, 1, 3):
        configured(stage)
        model = net()
        optimizer = torch.optim.Adam(model.parameters())
        trainer = trainer_of(model, optimizer)
        trainer.run(batches)
        for name, value in {"model": model, "optimizer": optimizer, "trainer": trainer}.items():
            path = f"{folder}/{stage}-{name}.pt"
            found[f"{stage}: save {name}"] = complaint(lambda path=path, what={name: value}: save(path, what))
            if os.path.exists(path):
                found[f"{stage}: load {name}"] = complaint(lambda path=path, what={name: value}: load(path, what))

    found["3: average"] = complaint(lambda: EMA(model))
    found["3: save a part"] = complaint(lambda: save(f"{folder}/part.pt", {"model": model[0]}))  # of stage 3
    for strategy in ("ddp", "fsdp"):
        configured(2)
        wrapped = distributed.prepare_model(net(), strategy)
        found[strategy] = complaint(lambda wrapped=wrapped: trainer_of(wrapped, sgd_of(wrapped)))

    configured(2)
    model = net()
    optimizer = sgd_of(model)
    options: dict[str, Any] = {"gradient_accumulation_steps": 2}
    found["tokens"] = complaint(lambda: trainer_of(model, optimizer, weight=num_tokens, **options))
    trainer = trainer_of(model, optimizer, **options)
    found["no length"] = complaint(lambda: trainer.run(iter(batches)))
    short = ShortData(batches)
    found["ended early"] = complaint(lambda: trainer.run(short))
    found["after a failure"] = complaint(lambda: trainer.run(batches))
    trainer = trainer_of(*model_and_optimizer(), **options)
    found["length"] = complaint(lambda: trainer.run(iter(batches), epoch_length=5))

    configured(2)
    os.environ["ACCELERATE_GRADIENT_CLIPPING"] = "1.0"
    found["another norm"] = complaint(lambda: trainer_of(*model_and_optimizer(), max_grad_norm=0.5))
    del os.environ["ACCELERATE_GRADIENT_CLIPPING"]
    configured(2)
    found["cpu=True"] = complaint(lambda: trainer_of(net(), optimizer, accelerator=Accelerator(cpu=True)))
    return found


def test_what_deepspeed_keeps_or_cannot_do_is_refused(tmp_path: Path) -> None:
    for found in run_ranks(complaints, 2, str(tmp_path), env=ENV, deadline_s=120.0):
        told = {name: text for name, text in found.items() if text}
        for name, part in {
            "3: average": "ValueError: DeepSpeed's stage 3 has a part of each weight on each rank",
            "3: save a part": "DeepSpeed keeps a part of 'model' on each rank",
            "ddp": "is a DistributedDataParallel: pass the bare model",
            "fsdp": "is a FSDPSequential: pass the bare model",
            "ended early": "RuntimeError: The data ended after 1 of the 2 batches",
            "after a failure": "RuntimeError: A run of this trainer failed within a step",
            "1: save optimizer": "DeepSpeed keeps a part of 'optimizer' on each rank",
            "1: load model": "DeepSpeed trains 'model' from a copy of its own",
            "3: save model": "DeepSpeed keeps a part of 'model' on each rank",
            "3: save optimizer": "DeepSpeed keeps a part of 'optimizer' on each rank",
            "tokens": "ValueError: With DeepSpeed, the 2 batches of an accumulation count alike",
            "no length": "ValueError: With DeepSpeed, an accumulation must know",
            "another norm": "ValueError: max_grad_norm=0.5, but DeepSpeed's configuration says gradient_clipping=1.0",
            "cpu=True": "ValueError: accelerate is configured for DeepSpeed, but",
        }.items():
            assert part in told.pop(name, ""), name
        assert told == {}
