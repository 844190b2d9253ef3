"""Several loaders side by side: how long, in which order, from which step, and what is refused."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import dengine
from dengine import Engine, Events
from dengine.data import zip_loaders
from dengine.distributed import ElasticSampler, prepare_data_loader
from dengine.handlers import Checkpoint


class Stream(IterableDataset[int]):
    """Of unknown length; gives numbers that tell the epoch."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.epochs: list[int] = []

    def __iter__(self) -> Iterator[int]:
        return iter([100 * self.epochs[-1] + number for number in range(self.size)])

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def numbers(size: int, *, shuffle: bool = True, num_workers: int = 0) -> DataLoader[Any]:
    data = TensorDataset(torch.arange(size))
    return prepare_data_loader(DataLoader(data, batch_size=2, shuffle=shuffle, num_workers=num_workers))


def orders(size: int, *epochs: int) -> list[list[int]]:
    """The batches of two of the passes of `numbers(size)` with these numbers."""
    batches = []
    for epoch in epochs:
        sampler = ElasticSampler(range(size), batch_size=2)
        sampler.set_epoch(epoch)
        indices = list(sampler)
        batches += [indices[start : start + 2] for start in range(0, size, 2)]
    return batches


def plain(step: dict[str, Any]) -> dict[str, Any]:
    step = {name: batch[0] if isinstance(batch, list | tuple) else batch for name, batch in step.items()}
    return {name: batch.tolist() if hasattr(batch, "tolist") else batch for name, batch in step.items()}


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("cycle", ["1a", "2b", "3a", "4b", "5a"]),
        ("min", ["1a", "2b"]),
        ("max", ["1a", "2b", "3None", "4None", "5None"]),
    ],
)
@pytest.mark.parametrize("is_long_first", [False, True])
@pytest.mark.parametrize("kind", [list, lambda batches: Unsized(batches)])
def test_the_length_is_that_of_the_mode(mode: Any, expected: list[str], is_long_first: bool, kind: Any) -> None:
    loaders = {"long": kind([1, 2, 3, 4, 5]), "short": kind(["a", "b"])}
    zipped = zip_loaders(mode, **dict(sorted(loaders.items(), reverse=not is_long_first)))
    for _ in range(2):
        steps = list(zipped)
        assert [f"{step['long']}{step['short']}" for step in steps] == expected
        assert list(steps[0]) == list(zipped.loaders)
    if kind is list:
        assert len(zipped) == len(expected)


class Unsized:
    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


def test_a_loader_that_begins_again_has_the_order_of_its_next_pass() -> None:
    zipped = zip_loaders(short=numbers(6), long=numbers(16))  # 3 and 8 batches: 3 passes an epoch
    for epoch in (0, 1, 2, 0):
        zipped.set_epoch(epoch)
        steps = list(map(plain, zipped))
        assert [step["long"] for step in steps] == orders(16, epoch)
        assert [step["short"] for step in steps] == orders(6, 3 * epoch, 3 * epoch + 1, 3 * epoch + 2)[:8]
    assert [plain(step)["long"] for step in zipped] == orders(16, 1)  # the next epoch, which nobody has set


def test_passes_of_streams_have_numbers_of_their_own() -> None:
    short, long = Stream(2), Stream(5)
    zipped = zip_loaders(short=short, long=long)
    for epoch in (0, 1):
        zipped.set_epoch(epoch)
        assert len(list(zipped)) == 5
    assert long.epochs == [0, 1]
    assert len(set(short.epochs)) == len(short.epochs) == 6


def run(step: Any, data: Any, folder: Path, **limits: Any) -> None:
    """Run `step` from the newest checkpoint in `folder` on, and save another one at the end."""
    trainer = Engine(step)
    checkpoint = Checkpoint({"trainer": trainer}, folder)
    Checkpoint.resume(folder, {"trainer": trainer})
    trainer.on(Events.ITERATION_COMPLETED(once=limits["max_iterations"]), checkpoint)
    trainer.run(data, **limits)


def steps_of(zipped: Any, folder: Path, *cuts: int) -> list[Any]:
    """The steps of two epochs, stopped at `cuts` and gone on with by other objects."""
    found: list[Any] = []
    for end in (*cuts, 99):
        run(lambda engine, step: found.append(plain(step)), zipped(), folder, max_epochs=2, max_iterations=end)
    return found


@pytest.mark.filterwarnings("ignore:To go on from where the run was left")
@pytest.mark.parametrize("mode", ["cycle", "min", "max"])
@pytest.mark.parametrize("kind", ["prepared", "workers", "lists", "plain", "streams"])
def test_a_resumed_run_goes_on_at_its_step(mode: Any, kind: str, tmp_path: Path) -> None:
    def zipped() -> Any:
        torch.manual_seed(0)
        if kind == "lists":
            return zip_loaders(mode, short=[1, 2, 3], long=list(range(8)))
        if kind == "streams":
            return zip_loaders(mode, short=Stream(3), long=Stream(8))
        if kind == "plain":  # shuffled by the global generator
            loaders = [DataLoader(TensorDataset(torch.arange(size)), batch_size=2, shuffle=True) for size in (6, 16)]
            return zip_loaders(mode, short=loaders[0], long=loaders[1])
        num_workers = 1 if kind == "workers" else 0
        return zip_loaders(mode, short=numbers(6, num_workers=num_workers), long=numbers(16, num_workers=num_workers))

    expected = steps_of(zipped, tmp_path)
    assert len(expected) == (6 if mode == "min" else 16)
    cuts = (2, 3, 5) if mode == "min" else (3, 6, 8, 15)
    for cut in (4,) if kind == "workers" else cuts:
        assert steps_of(zipped, tmp_path / str(cut), cut) == expected


@pytest.mark.parametrize("mode", ["cycle", "min", "max"])
def test_prepared_loaders_are_not_drawn_again(mode: Any, tmp_path: Path) -> None:
    class Counting(TensorDataset):
        asked = 0

        def __getitem__(self, index: int) -> Any:
            Counting.asked += 1
            return super().__getitem__(index)

        __getitems__ = None

    for end in (250, 252):
        Counting.asked = 0
        short, long = (DataLoader(Counting(torch.arange(size)), batch_size=1, shuffle=True) for size in (300, 1000))
        zipped = zip_loaders(mode, short=prepare_data_loader(short), long=prepare_data_loader(long))
        run(lambda engine, step: None, zipped, tmp_path, max_epochs=1, max_iterations=end)
    assert Counting.asked == 4


def test_a_zip_that_the_engine_does_not_see_goes_on_with_its_passes(tmp_path: Path) -> None:
    def passes(folder: Path, *cuts: int) -> list[Any]:
        found: list[Any] = []
        for end in (*cuts, 6):
            zipped = zip_loaders(short=numbers(6), long=numbers(16))
            step = lambda engine, batch, zipped=zipped: found.append(list(map(plain, zipped)))  # noqa: E731
            run(step, [0, 0], folder, max_epochs=3, max_iterations=end)
        return found

    expected = passes(tmp_path / "whole")
    assert len({str(each) for each in expected}) == 6
    assert passes(tmp_path / "cut", 3) == expected


def test_what_cannot_be_zipped_is_named() -> None:
    cases: list[tuple[Any, type[Exception], str]] = [
        (lambda: zip_loaders(), ValueError, "takes loaders by name"),
        (lambda: zip_loaders("longest", a=[1]), ValueError, "mode='longest' must be one of 'cycle', 'min', 'max'."),  # type: ignore[arg-type]
        (lambda: zip_loaders(a=iter([1])), TypeError, "a= is a list_iterator, which can be read once"),
        (lambda: zip_loaders(a=3), TypeError, "a= is an int"),  # type: ignore[arg-type]
        (lambda: list(zip_loaders(a=[1, 2], b=[])), ValueError, "b= of zip_loaders() gave no batch when it began anew"),
        (lambda: len(zip_loaders(a=Unsized([1]))), TypeError, "has no len()"),
    ]
    for build, error, message in cases:
        with pytest.raises(error, match=re.escape(message)):
            build()
    assert list(zip_loaders("min", a=[1, 2], b=[])) == []


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: zip_loaders("min", short=numbers(6), long=numbers(16)), "the mode was 'cycle' and is 'min'"),
        (lambda: zip_loaders(short=numbers(6), other=numbers(16)), "the loaders were short, long and are short, other"),
        (lambda: zip_loaders(short=numbers(8), long=numbers(16)), "of short, the number of samples was 6 and is 8"),
        (lambda: zip_loaders(short=numbers(6), long=numbers(16, shuffle=False)), "of long, shuffle was True and is"),
    ],
)
def test_other_data_than_the_run_was_started_with_are_refused(other: Any, message: str) -> None:
    trainer = Engine(lambda engine, step: None)
    trainer.run(zip_loaders(short=numbers(6), long=numbers(16)), max_epochs=2, max_iterations=5)
    resumed = Engine(lambda engine, step: None)
    resumed.load_state_dict(trainer.state_dict())
    with pytest.raises(ValueError, match=re.escape(message)):
        resumed.run(other(), max_epochs=2)


class CombinedLoader(Iterator[Any]):
    """As Lightning's: an iterator of itself that begins anew, and has no length before."""

    __module__ = "lightning.pytorch.utilities.combined_loader"

    def __init__(self, loaders: list[Any]) -> None:
        self.flattened = loaders
        self.batches: Any = None

    @property
    def sampler(self) -> list[Any]:
        return [loader.sampler for loader in self.flattened]

    def __len__(self) -> int:
        if self.batches is None:
            raise RuntimeError("Please call `iter(combined_loader)` first.")
        return max(map(len, self.flattened))

    def __iter__(self) -> Any:
        self.batches = [iter(loader) for loader in self.flattened]
        self.number = -1
        return self

    def __next__(self) -> Any:
        self.number += 1
        if self.number == max(map(len, self.flattened)):
            raise StopIteration
        step = {}
        for index, batches in enumerate(self.batches):
            batch = next(batches, None)
            if batch is None:
                self.batches[index] = iter(self.flattened[index])
                batch = next(self.batches[index])
            step[str(index)] = batch
        return step


@pytest.mark.filterwarnings("ignore:To go on from where the run was left")
@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_combined_loader_is_told_epochs_and_goes_on_where_it_was(is_prepared: bool, tmp_path: Path) -> None:
    def combined() -> Any:
        torch.manual_seed(0)
        if is_prepared:
            return CombinedLoader([numbers(6), numbers(16)])
        return CombinedLoader([DataLoader(TensorDataset(torch.arange(n)), 2, shuffle=True) for n in (6, 16)])

    expected = steps_of(combined, tmp_path)
    assert len(expected) == 16
    if is_prepared:
        assert [step["1"] for step in expected] == orders(16, 0, 1)
    for cut in (3, 6, 8, 13):
        assert steps_of(combined, tmp_path / str(cut), cut) == expected


def test_the_package_has_it_by_attribute() -> None:
    assert dengine.data.zip_loaders is zip_loaders
