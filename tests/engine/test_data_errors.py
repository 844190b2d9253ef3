"""Batches whose loading raised are left out with on_error="skip": counted, bounded, and the same after a resume."""

import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from dengine import Engine, Events, create_supervised_trainer, distributed
from dengine.metrics import Average

BAD = (3, 7, 16)


class Pictures(Dataset[Any]):
    """Some samples are corrupt."""

    def __init__(self, bad: tuple[int, ...] = BAD) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self.bad:
            torch.rand(3)
            raise OSError(f"picture {index} is truncated")
        return torch.tensor([float(index), torch.rand(()).item()])


class InBatches(Pictures):
    def __getitems__(self, indices: list[int]) -> list[torch.Tensor]:
        return [self[index] for index in indices]


class Needy(Exception):
    """Cannot be made from a message alone."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} {other}")


def prepared(dataset: Any = None, *, on_error: Any = "skip", max_errors: int | None = None, **options: Any) -> Any:
    options = {"batch_size": 4, **options}
    return distributed.prepare_data_loader(
        DataLoader(dataset or Pictures(), **options), on_error=on_error, max_errors=max_errors, seed=1
    )


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Pictures, InBatches])
def test_the_batches_with_errors_are_left_out_and_counted(kind: Any, workers: int, persistent: bool) -> None:
    seen: list[Any] = []
    engine = Engine(lambda engine, batch: seen.append(batch[:, 0].tolist()) or 1.0)
    engine.add_metric(Average(), "mean")
    loader = prepared(kind(), num_workers=workers, persistent_workers=persistent and workers > 0)
    with pytest.warns(RuntimeWarning) as caught:
        state = engine.run(loader, max_epochs=2)
    texts = [str(each.message) for each in caught if "leaves out" in str(each.message)]
    assert texts[0] == (
        "Rank 0 leaves out a batch (samples 0, 1, 2, 3), whose loading raised OSError: picture 3 is truncated. It is "
        "error 1 of at most 10 in this pass over the data."
    )
    assert len(texts) == 6
    assert seen == [[8.0, 9.0, 10.0, 11.0], [12.0, 13.0, 14.0, 15.0]] * 2
    assert (state.iteration, state.data_errors, state.metrics["data_errors"]) == (10, 6, 6.0)
    assert engine.run(prepared(Pictures(()))).metrics["data_errors"] == 0
    assert "data_errors" not in engine.run(prepared(Pictures(()), on_error="raise")).metrics


@pytest.mark.parametrize("workers", [0, 1])
def test_one_error_too_many_in_a_pass_is_raised_with_the_count(workers: int) -> None:
    engine = Engine(lambda engine, batch: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine.run(prepared(max_errors=3, num_workers=workers), max_epochs=3)
        with pytest.raises(
            OSError,
            match=r"(?s)Rank 0 cannot load a batch \(samples 16, 17, 18, 19\).*picture 16 is "
            r"truncated.*error 3 in this pass.*at most max_errors=2.*Traceback.*__getitem__",
        ):
            engine.run(prepared(max_errors=2, num_workers=workers))
        assert engine.state.iteration == 4
        with pytest.raises(OSError, match="error 1 in this pass"):
            engine.run(prepared(max_errors=0, num_workers=workers))
    with pytest.raises(OSError, match="picture 3 is truncated"):
        engine.run(prepared(on_error="raise", num_workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
def test_errors_of_any_kind_and_of_the_collate_function_are_left_out(workers: int) -> None:
    def collate(samples: list[int]) -> Any:
        if samples[0] == 4:
            raise Needy(1, 2)
        if samples[0] == 8:
            raise KeyError("label")
        return samples

    engine = Engine(lambda engine, batch: None)
    loader: Any = prepared(list(range(12)), collate_fn=collate, num_workers=workers)
    with pytest.warns(RuntimeWarning, match=r"samples 4, 5, 6, 7\), whose loading raised Needy: 1 2"):
        assert engine.run(loader).data_errors == 2
    for most, samples in ((0, "4, 5, 6, 7"), (1, "8, 9, 10, 11")):
        loader = prepared(list(range(12)), collate_fn=collate, num_workers=workers, max_errors=most)
        with warnings.catch_warnings(), pytest.raises(RuntimeError, match=f"cannot load a batch .samples {samples}"):
            warnings.simplefilter("ignore")
            engine.run(loader)


def test_a_sample_by_itself_is_raised_as_ever_and_without_batches_each_sample_is_one() -> None:
    loader = prepared(batch_size=None)
    with pytest.raises(OSError, match="picture 3"):
        loader.dataset[3]
    assert (len(loader.dataset), loader.dataset.bad) == (20, BAD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(loader)
    assert [index for index, each in enumerate(found) if each is None] == list(BAD)


def test_a_loader_may_be_prepared_again_without() -> None:
    again = distributed.prepare_data_loader(prepared())
    with pytest.raises(OSError, match="picture 3"):
        list(again)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("continued", [False, True])
@pytest.mark.parametrize("at", [1, 2, 4, 5, 6, 8, 9])
def test_a_resumed_run_leaves_the_same_batches_out_and_goes_on_counting(at: int, continued: bool, workers: int) -> None:
    def run(saved: Any) -> tuple[list[Any], list[Any]]:
        trace: list[Any] = []
        states: list[Any] = []
        engine = Engine(lambda engine, batch: batch.tolist())
        engine.on(
            Events.ITERATION_COMPLETED, lambda engine: trace.append((engine.state.output, engine.state.data_errors))
        )
        engine.on(
            Events.ITERATION_COMPLETED(once=at),
            lambda engine: states.append(deepcopy((engine.state_dict(), engine.random_state()))),
        )
        if saved is not None:
            engine.load_state_dict(saved[0])
            engine.load_random_state(saved[1])
        arguments: dict[str, Any] = {"epoch_length": 4, "continue_data": True} if continued else {}
        loader = prepared(shuffle=True, num_workers=workers, max_errors=3)
        engine.run(loader, max_epochs=None, max_iterations=14, **arguments)
        trace.append(loader.failures.state())
        return trace, states

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole, states = run(None)
        assert run(states[0])[0] == whole[at:]
    assert [output for output, _ in whole[:14]].count(None) > 4


def test_a_supervised_trainer_goes_on_without_them() -> None:
    class Pairs(Pictures):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index), torch.ones(1)

    model = torch.nn.Linear(2, 1)
    trainer = create_supervised_trainer(model, torch.optim.SGD(model.parameters(), 0.001), torch.nn.MSELoss())
    with pytest.warns(RuntimeWarning, match="leaves out"):
        assert trainer.run(prepared(Pairs())).data_errors == 3


def test_bad_input_is_named_with_the_way_out() -> None:
    class Stream(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(range(3))

    for arguments, error, message in (
        ({"on_error": "ignore"}, ValueError, 'on_error=\'ignore\' must be "raise" or "skip"'),
        ({"on_error": "raise", "max_errors": 3}, ValueError, 'max_errors=3 bounds.*pass on_error="skip" with it'),
        ({"max_errors": -1}, ValueError, "max_errors=-1 must be at least 0"),
        ({"max_errors": "all"}, TypeError, "max_errors='all' must be a whole number"),
        (
            {"dataset": Stream()},
            ValueError,
            "Stream is a stream, and one that has raised is over. Catch the error in it",
        ),
    ):
        given: Any = arguments
        with pytest.raises(error, match=message):
            prepared(**given)
