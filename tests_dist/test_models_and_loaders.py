"""Models and data over real ranks, against the same computation by one process here."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from ranks import run_ranks
from tensors import whole_tensor
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from dengine import Engine, create_supervised_trainer, distributed
from dengine.metrics import Accuracy


def data_set(size: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(size, 4, generator=generator), torch.arange(size) % 3)


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


# -- loaders -----------------------------------------------------------------------------------------------------


def samples(rank: int, size: int, length: int, options: dict[str, Any]) -> list[list[int]]:
    """The batches of two epochs."""
    loader = DataLoader(torch.arange(length), batch_size=2, shuffle=True)  # type: ignore[arg-type]
    batches: list[list[int]] = []
    engine = Engine(lambda engine, batch: batches.append(batch.tolist()))
    engine.run(distributed.prepare_data_loader(loader, **options), max_epochs=2)
    return batches


@pytest.mark.parametrize("length", [1, 2, 3, 7, 12, 13])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_two_exact_epochs_hold_every_sample_twice_in_two_orders(length: int, size: int) -> None:
    found = run_ranks(samples, size, length, {"exact": True})
    seen = [sample for batches in found for batch in batches for sample in batch]
    assert sorted(seen) == sorted(2 * list(range(length)))
    if length > 6:
        first_epoch = [batches[: len(batches) // 2] for batches in found]
        second_epoch = [batches[len(batches) // 2 :] for batches in found]
        assert first_epoch != second_epoch  # set_epoch was called


def test_global_batches_are_the_same_for_any_number_of_ranks() -> None:
    def global_batches(size: int) -> list[list[int]]:
        found = run_ranks(samples, size, 24, {"global_batch_size": 12})
        return [sorted(sum(step, [])) for step in zip(*found, strict=True)]

    assert global_batches(1) == global_batches(2) == global_batches(3) == global_batches(4)


class Slow(Dataset[int]):
    """Too slow for all to be fetched when the signal comes."""

    def __len__(self) -> int:
        return 30

    def __getitem__(self, index: int) -> int:
        time.sleep(0.02)
        return index


def with_a_signal_to_the_group(rank: int, size: int, number: int) -> tuple[int, list[int]]:
    heard: list[int] = []
    signal.signal(number, lambda number, frame: heard.append(number))
    loader = DataLoader(Slow(), num_workers=2)
    batches = []
    for batch in distributed.prepare_data_loader(loader, exact=True):
        batches.append(batch)
        if len(batches) == 3:
            os.killpg(0, number)
    return len(batches), heard


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_rank_leaves_it_its_workers(number: int) -> None:
    assert run_ranks(with_a_signal_to_the_group, 2, number) == [(15, [number])] * 2


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(11))


def streamed(rank: int, size: int, exact: bool) -> list[list[int]]:
    loader = distributed.prepare_data_loader(DataLoader(Stream(), batch_size=2, num_workers=1), exact=exact)
    return [batch.tolist() for batch in loader]


def test_a_stream_is_dealt_out_by_batch_and_padded_only_for_training() -> None:
    assert run_ranks(streamed, 2, True) == [[[0, 1], [4, 5], [8, 9]], [[2, 3], [6, 7], [10]]]
    exact = run_ranks(streamed, 4, True)
    assert sorted(sum((sum(batches, []) for batches in exact), [])) == list(range(11))
    assert [len(batches) for batches in run_ranks(streamed, 4, False)] == [2, 2, 2, 2]


# -- models ------------------------------------------------------------------------------------------------------


def trained(rank: int, size: int, strategy: str, seeds: list[int]) -> dict[str, torch.Tensor]:
    """Three steps of SGD on global batches of 12, without batch norm: its statistics are of a rank's own batch."""
    torch.manual_seed(seeds[rank])
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    net = distributed.prepare_model(model, strategy)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loader = distributed.prepare_data_loader(DataLoader(data_set(36), shuffle=True), global_batch_size=12)

    def step(engine: Engine, batch: Any) -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(batch[0]), batch[1]).backward()
        optimizer.step()

    Engine(step).run(loader)
    state = distributed.unwrap_model(net).state_dict()
    return {name: whole_tensor(value) for name, value in state.items()}


@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
@pytest.mark.parametrize("size", [2, 3])
def test_training_on_many_ranks_is_training_on_one(strategy: str, size: int) -> None:
    (expected,) = run_ranks(trained, 1, "auto", [5])
    # Only rank 0 starts from the same weights: the others must take them over.
    for found in run_ranks(trained, size, strategy, [5, 6, 7], deadline_s=120):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value)


def wrapped(rank: int, size: int) -> tuple[bool, bool, bool]:
    model = net(0)
    frozen = nn.Linear(1, 1).requires_grad_(False)
    ddp = distributed.prepare_model(model, static_graph=True)
    return (
        isinstance(ddp, DistributedDataParallel) and ddp.static_graph,
        distributed.unwrap_model(ddp) is model,
        distributed.prepare_model(frozen) is frozen,
    )


def test_ddp_takes_its_options_and_nothing_is_wrapped_that_cannot_train() -> None:
    assert run_ranks(wrapped, 2) == [(True, True, True)] * 2


def supervised(model: nn.Module, wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """As a trainer leaves a model that it got wrapped."""
    wrapped = wrap(model)
    create_supervised_trainer(wrapped, torch.optim.SGD(wrapped.parameters(), 0.1), mse_loss)
    return wrapped


def wrapped_by(kind: str, options: dict[str, Any]) -> Callable[[nn.Module], nn.Module]:
    if kind == "prepare_model":
        return lambda model: distributed.prepare_model(model, **options)
    if kind == "torch":
        return lambda model: supervised(model, DistributedDataParallel)
    return lambda model: supervised(model, Accelerator(cpu=True).prepare_model)


def gradients(rank: int, size: int, kind: str, options: dict[str, Any]) -> tuple[list[bool], bool, bool]:
    """Of a wrapper that has stepped before and of a new one, as after a restart, from one input."""
    wrap = wrapped_by(kind, options)
    old, new, kept = (nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5)) for _ in range(3))
    new.load_state_dict(old.state_dict())
    inputs = torch.randn(3, 8, 16, generator=torch.Generator().manual_seed(rank))
    stepped = wrap(old)
    for each in inputs[:2]:
        stepped(each).square().sum().backward()
    old.zero_grad()
    fresh = wrap(new)
    has_none = all(each.grad is None for each in new.parameters())
    new.load_state_dict(old.state_dict())  # both begin with rank 0's, that of the first one
    for model in (stepped, fresh):
        model(inputs[2]).square().sum().backward()
    pairs = zip(old.parameters(), new.parameters(), strict=True)
    kept[0].weight.grad = torch.ones(32, 16)
    wrap(kept)
    has_kept = bool((kept[0].weight.grad == 1).all()) and kept[2].weight.grad is None
    return [torch.equal(one.grad, other.grad) for one, other in pairs], has_none, has_kept  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("prepare_model", {}),
        ("prepare_model", {"gradient_as_bucket_view": True}),
        ("prepare_model", {"find_unused_parameters": True}),
        ("torch", {}),
        ("accelerate", {}),
    ],
)
def test_the_first_step_after_a_restart_adds_gradients_up_in_the_order_of_any_later_one(
    kind: str, options: dict[str, Any]
) -> None:
    # Of three numbers the sum depends on the order, which depends on the place in DDP's buckets.
    for equal, has_none, has_kept in run_ranks(gradients, 3, kind, options):
        assert equal == [True] * 4
        assert has_none
        assert has_kept


def evaluated(rank: int, size: int, length: int) -> tuple[float, list[bool], bool, float]:
    """Train one step, so that batch statistics differ between ranks; evaluate over uneven shards."""
    model = net(rank)
    ddp = distributed.prepare_model(model)
    ddp.train()
    ddp(torch.randn(6, 4, generator=torch.Generator().manual_seed(rank))).sum().backward()
    own = model[1].running_mean.clone()
    loader = distributed.prepare_data_loader(DataLoader(data_set(length), batch_size=2), exact=True)

    def step(engine: Engine, batch: Any) -> Any:
        with torch.no_grad():
            return distributed.unwrap_model(ddp)(batch[0]), batch[1]

    evaluator = Engine(step)
    evaluator.add_metric(Accuracy(), "acc")
    with distributed.evaluating(ddp) as bare:
        assert bare is model
        assert not bare.training
        assert not ddp.training
        first_mean = float(model[1].running_mean[0])
        evaluator.run(loader)
    modes = [module.training for module in ddp.modules()]
    acc = evaluator.state.metrics["acc"]
    return float(acc), modes, torch.equal(model[1].running_mean, own), first_mean


@pytest.mark.parametrize("length", [1, 2, 3, 7, 13])
def test_an_evaluation_with_batch_norm_over_uneven_shards_is_that_of_rank_zeros_model(length: int) -> None:
    results = run_ranks(evaluated, 3, length, deadline_s=60)
    accuracies, modes, restored, means = zip(*results, strict=True)
    assert len(set(accuracies)) == len(set(means)) == 1
    assert all(all(mode) for mode in modes)
    assert all(restored)
    # The oracle: rank 0's model, as it was after its step, over the whole data set.
    model = net(0)
    model.train()
    model(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)))
    model.eval()
    inputs, labels = data_set(length).tensors
    with torch.no_grad():
        expected = (model(inputs).argmax(1) == labels).double().mean().item()
    assert accuracies[0] == expected
