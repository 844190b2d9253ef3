"""Supervised training over real ranks, against the gradient of the mean over the global batch, computed here."""

import os
from collections.abc import Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from masked import IGNORED, Batch, batches_of, num_tokens
from ranks import run_ranks
from tensors import whole_tensor
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset, default_collate

from dengine import Engine, Events, SupervisedEvents, create_supervised_trainer, distributed
from dengine.control.call_log import num_joined

Shards = list[list[int]]  # for each rank the sizes of its batches
LR = 0.1


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def weights_by_hand(
    shards: Shards, accumulation: int, epochs: int, *, is_masked: bool, clip: float | None = None
) -> Any:
    """One process that sees the global batch of each step, and sums its loss over it."""
    model = net()
    of_ranks = [batches_of(rank, sizes, is_masked=is_masked) for rank, sizes in enumerate(shards)]
    length = max(map(len, of_ranks))
    for _ in range(epochs):
        for first in range(0, length, accumulation):
            batches = [batch for batches in of_ranks for batch in batches[first : first + accumulation]]
            loss = sum(cross_entropy(model(x), y, reduction="sum") for x, y in batches)
            count = sum(int((y != IGNORED).sum()) for _, y in batches)
            model.zero_grad()
            (loss / count).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= LR * parameter.grad
    return {name: value.detach() for name, value in model.named_parameters()}


def trained(
    rank: int, size: int, shards: Shards, is_masked: bool, epochs: int, strategy: str, options: dict[str, Any]
) -> tuple[dict[str, Tensor], int, int]:
    """The weights, the iterations, and the steps of the optimizer."""
    model = net(rank)  # rank 0's must win
    if rank == 0:
        model = net()
    if strategy == "ddp, static graph":
        model = distributed.prepare_model(model, static_graph=True, gradient_as_bucket_view=True)
    elif strategy != "bare":
        model = distributed.prepare_model(model, strategy)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    trainer = create_supervised_trainer(
        model, optimizer, cross_entropy, weight=num_tokens if is_masked else None, **options
    )
    steps = []
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: steps.append(engine.state.iteration))
    trainer.run(batches_of(rank, shards[rank], is_masked=is_masked), max_epochs=epochs)
    found: Any = {name: value.detach() for name, value in distributed.unwrap_model(model).named_parameters()}
    whole = {name: whole_tensor(value) for name, value in found.items()}
    return whole, trainer.state.iteration, len(steps)


UNEVEN: Shards = [[5, 3, 4, 2, 6], [1, 7, 2, 2, 1], [4, 4, 1, 3, 2]]
SHORTER: Shards = [[5, 3, 4, 2, 6], [1, 7, 2, 2], [4, 4, 1]]
EMPTY: Shards = [[5, 3, 1], [], [2, 2]]
ALIKE: Shards = [[3, 3, 3, 3, 2], [3, 3, 3, 3, 1], [3, 3, 3, 3]]  # but at the end


CASES = list(product(["bare", "ddp", "ddp, static graph", "fsdp"], [False, True], [1, 2, 3]))


def trained_in_each_case(rank: int, size: int, shards: Shards) -> list[tuple[dict[str, Tensor], int, int]]:
    return [
        trained(rank, size, shards, is_masked, 2, strategy, {"gradient_accumulation_steps": accumulation})
        for strategy, is_masked, accumulation in CASES
    ]


@pytest.mark.parametrize("shards", [UNEVEN[:1], SHORTER[:2], UNEVEN, SHORTER, EMPTY, ALIKE], ids=str)
def test_a_step_is_that_of_the_mean_over_the_global_batch(shards: Shards) -> None:
    length = max(map(len, shards))
    for found in run_ranks(trained_in_each_case, len(shards), shards, deadline_s=120.0):
        for (strategy, is_masked, accumulation), (weights, iterations, steps) in zip(CASES, found, strict=True):
            case = f"{strategy}, {is_masked=}, {accumulation=}"
            assert (iterations, steps) == (2 * length, 2 * -(-length // accumulation)), case
            expected = weights_by_hand(shards, accumulation, 2, is_masked=is_masked)
            for name, value in expected.items():
                error = (weights[name] - value).abs().max().item()
                assert error <= 1e-12, f"{case}: {name} is off by {error}"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_norm_that_is_clipped_is_that_of_the_whole_gradient(strategy: str) -> None:
    expected = weights_by_hand(SHORTER, 2, 2, is_masked=True, clip=0.05)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05}
    for weights, _, _ in run_ranks(trained, 3, SHORTER, True, 2, strategy, options):
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


def modes(rank: int, size: int, strategy: str) -> list[bool]:
    """Whether the model trained in each epoch, though it was given, and left behind by a handler, in eval mode."""
    model = net().eval()
    trainer = create_supervised_trainer(
        distributed.prepare_model(model, strategy),  # type: ignore[arg-type]
        torch.optim.SGD(model.parameters(), lr=LR),
        cross_entropy,
    )
    found: list[bool] = []
    trainer.on(Events.ITERATION_STARTED, lambda engine: found.append(model.training))
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: model.eval() and None)
    trainer.run(batches_of(rank, [2, 2], is_masked=False), max_epochs=2)
    return found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_model_in_eval_mode_is_trained_in_train_mode(strategy: str) -> None:
    assert run_ranks(modes, 2, strategy) == [[True] * 4] * 2


def complaints(rank: int, size: int) -> dict[str, str]:
    def told(data: Any, accumulation: int = 1) -> str:
        model = distributed.prepare_model(net())
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        trainer = create_supervised_trainer(model, optimizer, cross_entropy, gradient_accumulation_steps=accumulation)
        try:
            trainer.run(data)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return ""

    batches = batches_of(rank, [2, 2, 2, 2, 2, 2], is_masked=False)
    few = TensorDataset(torch.zeros(3, 4, dtype=torch.float64), torch.zeros(3, dtype=torch.int64))
    return {
        "no batch": told([]),
        "dropped": told(distributed.prepare_data_loader(DataLoader(few, 5, drop_last=True))),
        "accumulation": told(batches, accumulation=2 + rank),
    }


def test_no_batch_on_any_rank_and_other_accumulations_are_refused() -> None:
    for found in run_ranks(complaints, 2):
        assert "ValueError: The data (list) gave no batch on any rank" in found["no batch"]
        assert "ValueError: The data (DataLoader) gave no batch on any rank" in found["dropped"]
        assert "ConsistencyError: The settings of the engine differ between ranks" in found["accumulation"]
        assert "gradient_accumulation_steps" in found["accumulation"]


# -- scaled losses, as in 16 bits ---------------------------------------------------------------------------------


SCALED_CASES = list(product(["ddp", "fsdp"], [1, 2], [None, 0.05]))


def trained_with_a_scaler(rank: int, size: int, shards: Shards) -> Any:
    """For each case the weights and the scale."""
    found = {}
    for strategy, accumulation, clip in SCALED_CASES:
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
        options = {"accelerator": accelerator, "gradient_accumulation_steps": accumulation, "max_grad_norm": clip}
        weights, _, _ = trained(rank, size, shards, True, 2, strategy, options)
        found[strategy, accumulation, clip] = weights, accelerator.scaler.get_scale()
    return found


def test_scaled_losses_give_the_same_step() -> None:
    for found in run_ranks(trained_with_a_scaler, 2, SHORTER[:2]):
        for (strategy, accumulation, clip), (weights, scale) in found.items():
            case = f"{strategy}, {accumulation=}, {clip=}"
            assert scale == 2.0 ** (13 if accumulation == 1 else 12), case  # it grew every 3 steps, of 10 and 6
            for name, value in weights_by_hand(SHORTER[:2], accumulation, 2, is_masked=True, clip=clip).items():
                error = (weights[name] - value).abs().max().item()
                assert error <= 1e-6, f"{case}: {name} is off by {error}"


def overflowing(rank: int, size: int) -> list[tuple[list[bool], list[float]]]:
    """Which of six steps changed this rank's weights, and the scale after each."""
    found = []
    for strategy in ("ddp", "fsdp"):
        accelerator = Accelerator(cpu=True)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        model = distributed.prepare_model(net(), strategy)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        trainer = create_supervised_trainer(model, optimizer, cross_entropy, accelerator=accelerator)
        changes: list[bool] = []
        scales: list[float] = []
        before = [parameter.detach().clone() for parameter in model.parameters()]

        @trainer.on(Events.ITERATION_COMPLETED)
        def look(engine: Engine, model: Any = model, before: Any = before, changes: Any = changes) -> None:
            now = [parameter.detach().clone() for parameter in model.parameters()]
            changes.append(any(not one.equal(other) for one, other in zip(now, before, strict=True)))
            before[:] = now

        trainer.on(
            Events.ITERATION_COMPLETED, lambda engine, scales=scales: scales.append(engine.state.grad_scaler["scale"])
        )
        batches = batches_of(rank, [3] * 6, is_masked=False)
        if rank == size - 1:
            batches[2][0][0, 0] = float("inf")
        trainer.run(batches)
        found.append((changes, scales))
    return found


def test_an_overflow_on_one_rank_skips_the_step_of_all() -> None:
    for found in run_ranks(overflowing, 3):
        for changes, scales in found:
            assert changes == [True, True, False, True, True, True]
            assert scales == [2.0**10] * 2 + [2.0**9] * 4


# -- by accelerate ------------------------------------------------------------------------------------------------


def trained_by_accelerate(rank: int, size: int, shards: Shards) -> list[tuple[dict[str, Tensor], int, int]]:
    """As `trained`, sharded by accelerate's FSDP, which it uses where it believes in GPUs."""
    found = []
    for is_masked, accumulation in product([False, True], [1, 2]):
        AcceleratorState._reset_state(reset_partial_state=True)
        state = PartialState(cpu=True)
        state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        state._shared_state["device"] = torch.device("cpu")
        options = {"accelerator": Accelerator(), "gradient_accumulation_steps": accumulation, "max_grad_norm": 0.05}
        found.append(trained(rank, size, shards, is_masked, 2, "bare", options))
    return found


def test_accelerates_fsdp_takes_the_same_step() -> None:
    env = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
    for found in run_ranks(trained_by_accelerate, 3, SHORTER, env=env):
        for (is_masked, accumulation), (weights, _, _) in zip(product([False, True], [1, 2]), found, strict=True):
            for name, value in weights_by_hand(SHORTER, accumulation, 2, is_masked=is_masked, clip=0.05).items():
                torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-6)


def refused_by_kind(rank: int, size: int) -> list[str]:
    found = []
    for version, is_gpu in (("2", False), ("1", True)):
        os.environ["FSDP_VERSION"] = version
        AcceleratorState._reset_state(reset_partial_state=True)
        state = PartialState(cpu=True)
        if is_gpu:
            state._shared_state["distributed_type"] = DistributedType.MULTI_GPU
            state._shared_state["device"] = torch.device("cpu")
        model = net()
        try:
            create_supervised_trainer(model, torch.optim.SGD(model.parameters()), cross_entropy)
        except ValueError as error:
            found.append(str(error))
    return found


def test_what_accelerate_would_leave_out_in_silence_is_refused() -> None:
    for without_gpu, version_1 in run_ranks(refused_by_kind, 2, env={"ACCELERATE_USE_FSDP": "true"}):
        assert "FSDP, which it uses on GPUs only" in without_gpu
        assert 'strategy="fsdp"' in without_gpu
        assert "fsdp_version: 2" in version_1


# -- what is sent ------------------------------------------------------------------------------------------------


def bare_steps(model: nn.Module, batches: list[Batch]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    for inputs, targets in batches:
        optimizer.zero_grad()
        cross_entropy(model(inputs), targets).backward()
        optimizer.step()


def num_collectives(rank: int, size: int) -> dict[str, int]:
    """Joined in the default group by DDP and by this package: 6 steps of the optimizer each, after some to warm up."""
    counts = {}
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("bare", 1, {}),
        ("1 batch a step", 1, {}),
        ("4 batches a step", 4, {}),
        ("several buckets", 1, {"bucket_cap_mb": 1e-5}),
        ("several buckets, bare", 1, {"bucket_cap_mb": 1e-5}),
        ("weighted", 1, {}),
        ("weighted, 4 batches a step", 4, {}),
        ("loader", 1, {}),
        ("loader, collated by hand", 1, {}),
    ]
    for name, accumulation, kwargs in cases:
        model = distributed.prepare_model(net(), "ddp", **kwargs)
        batches: Any = batches_of(rank, [3] * 6 * accumulation, is_masked=False)
        if "loader" in name:  # 17 samples a rank
            inputs, targets = batches_of(0, [17 * size], is_masked=False)[0]
            collate = default_collate if name == "loader" else lambda samples: default_collate(samples)
            loader = DataLoader(TensorDataset(inputs, targets), batch_size=3, collate_fn=collate)
            batches = distributed.prepare_data_loader(loader)
        if "bare" in name:
            bare_steps(model, batches)
            before = num_joined(size)
            bare_steps(model, batches)
        else:
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            options: Any = {"gradient_accumulation_steps": accumulation}
            if "weighted" in name:
                options["weight"] = num_tokens
            trainer = create_supervised_trainer(model, optimizer, cross_entropy, **options)
            trainer.run(batches)
            before = num_joined(size)
            trainer.run(batches)
        counts[name] = num_joined(size) - before
    return counts


def test_a_step_sends_its_gradients_once_and_one_number_more_where_a_count_is_not_known_before() -> None:
    for counts in run_ranks(num_collectives, 2):
        assert counts["bare"] == 6
        # The ranks compare their metrics at the start of a run, and agree how long an epoch is, and its batches.
        assert counts["1 batch a step"] == counts["4 batches a step"] == 6 + 3
        assert counts["several buckets"] == counts["several buckets, bare"] + 3 > 6 + 3
        assert counts["weighted"] == counts["weighted, 4 batches a step"] == 6 + 6 + 2
        assert counts["loader"] == 6 + 1 + 3  # its last batch has 2 samples
        assert counts["loader, collated by hand"] == 6 + 6 + 3


def changed_midway(rank: int, size: int) -> None:
    batches = batches_of(rank, [3] * 6, is_masked=False)
    model = distributed.prepare_model(net())
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=LR), cross_entropy)

    @trainer.on(Events.ITERATION_COMPLETED(once=2))
    def cut(engine: Engine) -> None:
        if rank == 1:
            batches[3] = tuple(part[:2] for part in batches[3])

    with distributed.process_group():
        trainer.run(batches)


def test_a_batch_that_is_not_what_its_data_said_is_refused() -> None:
    first, second = run_ranks(changed_midway, 2, expect_failures=True)
    assert first.error_type == "RemoteRankError"
    assert second.error_type == "RuntimeError"
    assert "Batch 4 of the epoch has 2 samples" in second.error_message
    assert "weight=" in second.error_message


def equal_batches(rank: int, size: int) -> list[bool]:
    """Whether each weight is that of DDP's loop by hand, where all batches are of one size."""
    batches = batches_of(rank, [3] * 6, is_masked=False)
    by_hand, model = (distributed.prepare_model(net().float()) for _ in range(2))
    batches = [(inputs.float(), targets) for inputs, targets in batches]
    bare_steps(by_hand, batches)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    create_supervised_trainer(model, optimizer, cross_entropy).run(batches)
    return [torch.equal(*pair) for pair in zip(model.parameters(), by_hand.parameters(), strict=True)]


def test_where_all_batches_count_alike_the_steps_are_those_of_ddp_bit_for_bit() -> None:
    for are_equal in run_ranks(equal_batches, 3):
        assert all(are_equal)


def halved(state: object, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A hook of the user's own, which averages as DDP does."""
    work: Any = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
    future: torch.futures.Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
    return future


def with_another_hook(rank: int, size: int, kind: str) -> tuple[dict[str, Tensor], int]:
    model = distributed.prepare_model(net())
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    if kind == "hook":
        model.register_comm_hook(None, halved)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if kind == "second trainer":
        create_supervised_trainer(model, optimizer, cross_entropy)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, gradient_accumulation_steps=2)
    batches = batches_of(rank, SHORTER[rank], is_masked=False)
    trainer.run(batches)
    before = num_joined(size)
    trainer.run(batches)
    return {name: value.detach() for name, value in model.module.named_parameters()}, num_joined(size) - before


@pytest.mark.parametrize("kind", ["hook", "second trainer"])
def test_a_hook_of_the_users_own_or_another_trainer_is_not_in_the_way(kind: str) -> None:
    expected = weights_by_hand(SHORTER, 2, 2, is_masked=False)
    for weights, joined in run_ranks(with_another_hook, 3, kind):
        assert joined == 3 + 3 + 3
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-12)


def averaged_outside(rank: int, size: int) -> tuple[Tensor, Tensor]:
    model = distributed.prepare_model(net())
    create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=LR), cross_entropy)
    inputs, targets = batches_of(rank, [3], is_masked=False)[0]
    cross_entropy(model(inputs), targets).backward()
    alone = net()
    cross_entropy(alone(inputs), targets).backward()
    mine = next(alone.parameters()).grad
    assert mine is not None
    dist.all_reduce(mine)
    found = next(model.parameters()).grad
    assert found is not None
    return found, mine / size


def test_a_backward_pass_of_the_users_own_is_averaged_as_ddp_does() -> None:
    for found, expected in run_ranks(averaged_outside, 2):
        torch.testing.assert_close(found, expected)


# -- an accumulation that is cut short -----------------------------------------------------------------------------


class Stream:
    """Tells no length, so nobody knows which batch is the last one."""

    def __init__(self, batches: list[Batch]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.batches)


def cut_short(rank: int, size: int, how: str, strategy: str) -> tuple[dict[str, Tensor], list[int], int]:
    model = distributed.prepare_model(net(), strategy)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    trainer = create_supervised_trainer(model, optimizer, cross_entropy, gradient_accumulation_steps=3)
    steps: list[int] = []
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, lambda engine: steps.append(engine.state.iteration))
    batches = batches_of(rank, UNEVEN[rank], is_masked=False)
    if how == "stream":
        trainer.run(Stream(batches))
    elif how == "max_iterations":
        trainer.run([*batches, *batches], max_iterations=5)
    elif how == "terminate":
        if rank == 1:
            trainer.on(Events.ITERATION_COMPLETED(once=1), lambda engine: engine.terminate())
        with distributed.process_group():
            trainer.run([*batches, *batches])
    found: Any = dict(distributed.unwrap_model(model).named_parameters())
    whole = {name: whole_tensor(value) for name, value in found.items()}
    return {name: value.detach() for name, value in whole.items()}, steps, trainer.state.iteration


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("how", ["stream", "max_iterations"])
def test_an_accumulation_that_is_cut_short_is_stepped_with_what_it_has(how: str, strategy: str) -> None:
    expected = weights_by_hand(UNEVEN, 3, 1, is_masked=False)
    for weights, steps, _ in run_ranks(cut_short, 3, how, strategy):
        assert steps == [3, 5]
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-12)


def test_terminate_leaves_behind_a_whole_accumulation() -> None:
    for _, steps, iteration in run_ranks(cut_short, 3, "terminate", "ddp"):
        assert iteration % 3 == 0
        assert steps == list(range(3, iteration + 1, 3))
