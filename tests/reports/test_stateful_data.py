"""Data that keep their own position are restored by it: at once, exactly, and without the user's naming them."""

import hashlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset

from dengine import Engine, Events, distributed
from dengine.handlers import Checkpoint

NUM_SAMPLES, BATCH, EPOCHS = 20, 3, 3
drawn: list[int] = []  # the samples that the source was asked for


class Stream(IterableDataset[int]):
    """Shuffled by the number of the pass, which it counts by itself; restored in O(1)."""

    def __init__(self, length: int = NUM_SAMPLES) -> None:
        self.length = length
        self.number, self.position, self.is_restored = -1, 0, False

    def __iter__(self) -> Iterator[int]:
        if not self.is_restored:
            self.number, self.position = self.number + 1, 0
        self.is_restored = False
        order = torch.randperm(self.length, generator=torch.Generator().manual_seed(self.number)).tolist()
        while self.position < self.length:
            self.position += 1
            drawn.append(order[self.position - 1])
            yield order[self.position - 1]

    def state_dict(self) -> dict[str, int]:
        return {"number": self.number, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.number, self.position, self.is_restored = state["number"], state["position"], state["position"] > 0


class Sized(Stream):
    def __len__(self) -> int:
        return self.length


class Items:
    """A map-style data set."""

    def __len__(self) -> int:
        return NUM_SAMPLES

    def __getitem__(self, index: int) -> int:
        drawn.append(index)
        return index


def stateful_loader(dataset: Any, **options: Any) -> Any:
    torchdata = pytest.importorskip("torchdata.stateful_dataloader")
    return torchdata.StatefulDataLoader(dataset, batch_size=BATCH, **options)


def nodes() -> Any:
    nodes = pytest.importorskip("torchdata.nodes")
    # By the number of the pass: the generator of a sampler is no part of the state of these nodes.
    sampler = torch.utils.data.DistributedSampler(range(NUM_SAMPLES), num_replicas=1, rank=0)  # type: ignore[arg-type]
    node = nodes.SamplerWrapper(sampler)
    node = nodes.ParallelMapper(node, map_fn=noted, num_workers=2, method="thread")
    return nodes.Loader(nodes.Prefetcher(nodes.Batcher(node, BATCH, drop_last=False), prefetch_factor=2))


def noted(sample: int) -> int:
    drawn.append(sample)
    return sample


def sharded(shards: list[int]) -> Iterator[dict[str, int]]:
    for shard in shards:
        for sample in range(5):
            drawn.append(5 * shard + sample)
            yield {"x": 5 * shard + sample}


def hugging_face(**shuffle: int) -> Any:
    datasets = pytest.importorskip("datasets")
    stream = datasets.IterableDataset.from_generator(sharded, gen_kwargs={"shards": [0, 1, 2, 3]})
    return stream.shuffle(**shuffle) if shuffle else stream


def prepared(dataset: Any, **options: Any) -> Any:
    return distributed.prepare_data_loader(DataLoader(dataset, batch_size=BATCH, **options))


def flat(batch: Any) -> list[int]:
    return torch.as_tensor(batch["x"] if isinstance(batch, dict) else batch).reshape(-1).tolist()


class Killed(Exception):
    pass


def train(make: Callable[[], Any], folder: Path, kill: int | None = None, **options: Any) -> tuple[list[int], str]:
    """The samples of a run until `kill`, and a digest of the weights. Each batch draws random numbers, too."""
    torch.manual_seed(3)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    found: list[int] = []

    def step(engine: Engine, batch: Any) -> None:
        if engine.state.iteration == kill:
            raise Killed
        found.extend(flat(batch))
        inputs = torch.tensor(flat(batch), dtype=torch.float32).reshape(-1, 1) / NUM_SAMPLES
        loss = (model(inputs) + torch.rand(()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    trainer = Engine(step)
    objects = {"trainer": trainer, "model": model, "optimizer": optimizer}
    if kill is not None:
        trainer.on(Events.ITERATION_COMPLETED(once=kill - 1), Checkpoint(objects, folder))
    Checkpoint.resume(folder, objects)
    data = make()
    if kill is not None:
        with pytest.raises(Killed):
            trainer.run(data, max_epochs=EPOCHS, **options)
    else:
        trainer.run(data, max_epochs=EPOCHS, **options)
    digest = hashlib.sha256(b"".join(each.detach().numpy().tobytes() for each in model.parameters())).hexdigest()
    return found, digest


MAKES: dict[str, Callable[[], Any]] = {
    "own": Stream,
    "own with a length": Sized,
    "own in a loader": lambda: DataLoader(Stream(), batch_size=BATCH),
    "own in a loader with a length": lambda: DataLoader(Sized(), batch_size=BATCH),
    "StatefulDataLoader": lambda: stateful_loader(Items(), shuffle=True),
    "StatefulDataLoader with workers": lambda: stateful_loader(Items(), shuffle=True, num_workers=2),
    "StatefulDataLoader of a stream": lambda: stateful_loader(Stream()),
    "StatefulDataLoader of a stream with workers": lambda: stateful_loader(Stream(), num_workers=2),
    "nodes": nodes,
    "own prepared in a loader": lambda: prepared(Stream()),
    "StatefulDataLoader prepared": lambda: distributed.prepare_data_loader(stateful_loader(Items(), shuffle=True)),
    "Stateful Hugging Face prepared with workers": lambda: prepared(hugging_face(), num_workers=2),
    "Hugging Face": hugging_face,
    "Hugging Face in a loader": lambda: DataLoader(hugging_face(), batch_size=BATCH),
    "Hugging Face in a StatefulDataLoader": lambda: stateful_loader(hugging_face(), num_workers=2),
}


@pytest.mark.parametrize("name", MAKES)
def test_a_run_goes_on_from_the_position_of_its_data(name: str, tmp_path: Path) -> None:
    make = MAKES[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # nothing is drawn and dropped
        whole, weights = train(make, tmp_path / "whole")
        per_epoch, batch = len(whole) // EPOCHS, 1 if name.startswith("own") and "loader" not in name else BATCH
        num_batches = -(-per_epoch // batch)
        kills = (num_batches, num_batches + 1, num_batches + 3, 3, 2 * num_batches + 2)
        for kill in kills[: 3 if "Stateful" in name else 5]:  # workers take their time to start
            first, _ = train(make, tmp_path / str(kill), kill)
            drawn.clear()
            rest, again = train(make, tmp_path / str(kill))
            assert first + rest == whole, kill
            assert again == weights, kill
            if "workers" not in name and name != "nodes":  # whose threads go on for a moment after the run was killed
                assert len(drawn) < len(rest) + 9, kill  # none before the position, or few: the shard up to it


def test_a_shuffle_buffer_is_filled_as_it_was_with_a_warning_that_says_so(tmp_path: Path) -> None:
    def make() -> Any:
        return prepared(hugging_face(seed=3, buffer_size=7))

    whole, weights = train(make, tmp_path / "whole")
    first, _ = train(make, tmp_path / "parts", 11)
    with pytest.warns(RuntimeWarning, match=r"3 batches are drawn .*a shuffle buffer is not saved"):
        rest, again = train(make, tmp_path / "parts")
    assert (first + rest, again) == (whole, weights)


def test_data_of_workers_that_cannot_be_asked_are_drawn_with_a_warning_that_says_so(tmp_path: Path) -> None:
    def make() -> Any:
        return DataLoader(Stream(), batch_size=BATCH, num_workers=1)

    whole, weights = train(make, tmp_path / "whole")
    first, _ = train(make, tmp_path / "parts", 4)
    with pytest.warns(RuntimeWarning, match=r"3 batches are drawn .*StatefulDataLoader knows them"):
        rest, again = train(make, tmp_path / "parts")
    assert (first + rest, again) == (whole, weights)


class Refusing(Stream):
    def load_state_dict(self, state: dict[str, int]) -> None:
        raise KeyError("shard_idx")


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (Stream, lambda: [1, 2, 3], "they were a Stream, which keeps its position, and are a list"),
        (Stream, Sized, "the data were a Stream and are a Sized"),
        (Stream, type("Stream", (Refusing,), {}), "does not go on from the position .*KeyError: 'shard_idx'"),
        (
            lambda: stateful_loader(Stream(), num_workers=1),
            lambda: stateful_loader(Stream()),
            "num_workers was 1 and is 0",
        ),
    ],
)
def test_a_state_of_other_data_is_named_with_the_way_out(
    before: Callable[[], Any], after: Callable[[], Any], message: str, tmp_path: Path
) -> None:
    train(before, tmp_path, 4)
    with pytest.raises(ValueError, match=rf"(?s){message}.*allow_changed_data=True"):
        train(after, tmp_path)


def test_changed_data_are_drawn_up_to_the_position_if_that_is_wanted(tmp_path: Path) -> None:
    first, _ = train(Stream, tmp_path, 4)
    with pytest.warns(RuntimeWarning, match="3 batches are drawn"):
        rest, _ = train(Sized, tmp_path, allow_changed_data=True)
    assert first + rest == train(Stream, tmp_path / "whole")[0]
