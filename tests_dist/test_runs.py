"""Whole runs on real ranks: handlers that decide, files that one rank writes, shards that are empty."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.utils.data import DataLoader

from dengine import Engine, Events, distributed
from dengine.checkpoint.formats.sharded.plan import read_shards
from dengine.errors import CheckpointError
from dengine.handlers import Checkpoint, EarlyStopping, ProgressBar
from dengine.metrics import Accuracy, Average


def empty_shard(rank: int, size: int) -> tuple[int, int, float]:
    evaluator = Engine(lambda engine, batch: (batch, batch))
    evaluator.add_metric(Accuracy(), "acc")
    loader = distributed.prepare_data_loader(DataLoader(torch.arange(2), batch_size=4), exact=True)  # type: ignore[arg-type]
    state = evaluator.run(loader, max_epochs=2)
    return state.iteration, state.epochs_completed, float(state.metrics["acc"])


def test_a_rank_without_a_sample_runs_its_epochs_and_gets_the_metrics() -> None:
    assert run_ranks(empty_shard, 3) == [(2, 2, 1.0), (2, 2, 1.0), (0, 2, 1.0)]


def stopped_early(rank: int, size: int, scores_of_rank: list[list[float]]) -> int:
    """The score of each rank is its own: only one may decide."""
    trainer = Engine(lambda engine, batch: distributed.all_reduce(float(batch)))
    evaluator = Engine(lambda engine, batch: batch)
    evaluator.add_metric(Average(), "loss")
    stop = EarlyStopping(2, lambda engine: scores_of_rank[rank][trainer.state.epoch], trainer)
    evaluator.on(Events.EPOCH_COMPLETED, stop)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run([1.0]) and None)
    return trainer.run([1, 2, 3], max_epochs=6).epoch


def test_rank_zero_decides_when_to_stop_and_all_stop_together() -> None:
    scores = [[1, 2, 2, 2, 9, 9], [0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6]]
    assert run_ranks(stopped_early, 3, scores, deadline_s=30) == [3, 3, 3]


def failing_score(rank: int, size: int) -> None:
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.EPOCH_COMPLETED, EarlyStopping(2, lambda engine: dict[str, float]()["acc"], trainer))
    trainer.run([1])


def test_a_score_that_fails_on_rank_zero_fails_everywhere() -> None:
    outcomes = run_ranks(failing_score, 3, expect_failures=True, deadline_s=30)
    assert [outcome.error_type for outcome in outcomes] == ["KeyError", "RemoteRankError", "RemoteRankError"]
    assert all("acc" in outcome.error_message for outcome in outcomes)


def model_of(rank: int) -> nn.Module:
    torch.manual_seed(rank)
    return nn.Linear(3, 2)


def saving(rank: int, size: int, folder: str, strategy: str) -> tuple[list[str], str, list[str]]:
    model = distributed.prepare_model(model_of(rank), strategy)  # type: ignore[arg-type]
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    trainer = Engine(lambda engine, batch: batch)
    last = Checkpoint({"model": model, "optimizer": optimizer, "trainer": trainer}, folder, n_saved=2)
    # Each rank has a score of its own; rank 0's is taken.
    best = Checkpoint(
        {"model": model}, folder, "best", score_function=lambda e: rank * 10 + e.state.epoch, score_name="s"
    )
    trainer.on(Events.EPOCH_COMPLETED, last)
    trainer.on(Events.EPOCH_COMPLETED, best)
    trainer.run([0, 1], max_epochs=3)
    kept = [one.path.name for one in last.saved] + [one.path.name for one in best.saved]
    there = {path.name for path in Path(folder).iterdir()} - {"manifest.json"}
    return kept, str(last.last_path), sorted(there)


@pytest.mark.parametrize(("strategy", "ending"), [("ddp", ".pt"), ("fsdp", "")])
def test_a_file_or_a_folder_of_shards_is_written_and_every_rank_knows_the_outcome(
    tmp_path: Path, strategy: str, ending: str
) -> None:
    kept = [f"{name}{ending}" for name in ("checkpoint_4", "checkpoint_6", "best_6_s=2.0000")]
    newest = tmp_path / kept[1]
    for found, last_path, there in run_ranks(saving, 3, str(tmp_path), strategy):
        assert found == kept
        assert last_path == str(newest)
        assert there == sorted(kept)
    loaded = torch.load(newest, weights_only=True) if ending else read_shards(newest)
    assert loaded["dengine"]["world_size"] == 3
    # The oracle: rank 0's weights after the same step by one process, without a wrapper's prefix.
    expected = model_of(0)
    optimizer = torch.optim.Adam(expected.parameters())
    expected(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert loaded["model"].keys() == expected.state_dict().keys()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(loaded["model"][name], value)
    moments = loaded["optimizer"]["state"][0 if ending else "weight"]["exp_avg"]
    torch.testing.assert_close(moments, optimizer.state_dict()["state"][0]["exp_avg"])


def cannot_save(rank: int, size: int, folder: str) -> str:
    trainer = Engine(lambda engine, batch: batch)
    trainer.on(Events.EPOCH_COMPLETED, Checkpoint({"model": model_of(0)}, folder))
    try:
        trainer.run([0])
    except CheckpointError as error:
        return str(error)
    return "saved"


def test_a_save_that_fails_on_rank_zero_raises_on_every_rank_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file where the folder should be")
    for message in run_ranks(cannot_save, 3, str(tmp_path / "file" / "below"), deadline_s=30):
        assert "could not be saved" in message
        assert "NotADirectoryError" in message


def drawn(rank: int, size: int) -> None:
    trainer = Engine(lambda engine, batch: {"loss": 0.5})
    ProgressBar().attach(trainer, ["loss"], lambda output: output)
    trainer.run(range(3))


def test_only_rank_zero_draws_a_bar() -> None:
    first, second = run_ranks(drawn, 2, expect_failures=True)
    assert first.error_type is second.error_type is None
    assert "Epoch [1/1]: 100%" in first.output
    assert second.output == ""


def resumed(rank: int, size: int, at: int, length: int) -> tuple[list[list[int]], list[list[int]]]:
    """Batches of a run that is never interrupted, and of one that is, and then goes on with another engine."""

    def loader() -> Any:
        return distributed.prepare_data_loader(DataLoader(torch.arange(length), batch_size=2, shuffle=True))  # type: ignore[arg-type]

    whole: list[list[int]] = []
    Engine(lambda engine, batch: whole.append(batch.tolist())).run(loader(), max_epochs=3)
    parts: list[list[int]] = []
    first = Engine(lambda engine, batch: parts.append(batch.tolist()))
    first.run(loader(), max_epochs=3, max_iterations=at)
    second = Engine(lambda engine, batch: parts.append(batch.tolist()))
    second.load_state_dict(first.state_dict())
    second.run(loader(), max_epochs=3)
    return whole, parts


@pytest.mark.parametrize("at", [1, 3, 4, 5, 11])
def test_a_run_resumed_anywhere_sees_the_samples_of_one_never_interrupted(at: int) -> None:
    for whole, parts in run_ranks(resumed, 2, at, 15):
        assert parts == whole
