"""Handlers on a mesh, above all where rank 0 has no output of the step: what they show, and when all ranks stop."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from dengine import Engine, Events, distributed
from dengine.handlers import EarlyStopping, LRScheduler, ProgressBar, TerminateOnNan, TrackingHandler
from dengine.metrics import Average, RunningAverage

LOSSES = [4.0, 2.0, 3.0]


class Rows:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append(row)


def engine_of() -> Engine:
    """Its step waits for all ranks, as one that trains does."""
    has_output = distributed.world().has_last_stage

    def step(engine: Engine, loss: float) -> Any:
        dist.barrier()
        return {"loss": torch.tensor(loss)} if has_output else None

    return Engine(step)


def loss_of(output: Any) -> Any:
    return output["loss"]


def handled(rank: int, size: int, mesh: dict[str, int]) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with distributed.process_group(mesh=mesh), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        rows, engine = Rows(), engine_of()
        engine.add_metric(Average(loss_of), "mean")
        engine.add_metric(RunningAverage(output_transform=loss_of), "running")
        ProgressBar().attach(engine, ["loss", "mean"], output_transform=dict)
        log = TrackingHandler(rows, metric_names=["loss", "running"], output_transform=lambda output: {**output})
        engine.on(Events.ITERATION_COMPLETED, log)
        engine.on(Events.EPOCH_COMPLETED, TrackingHandler(rows, metric_names="all"))
        engine.run(LOSSES)
        seen["rows"] = rows.rows
        seen["warned"] = any("shows nothing of this step's output" in str(each.message) for each in warned)

        engine, optimizer = engine_of(), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        engine.add_metric(Average(loss_of), "mean")
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        engine.on(Events.EPOCH_COMPLETED, LRScheduler(plateau, "mean"))
        stop = EarlyStopping(2, lambda engine: -engine.state.metrics["mean"], engine)
        engine.on(Events.EPOCH_COMPLETED, stop)
        seen["epochs"] = engine.run(LOSSES, max_epochs=9).epoch
        seen["lr"] = optimizer.param_groups[0]["lr"]

        for transform in (None, loss_of):
            engine = engine_of()
            engine.on(Events.ITERATION_COMPLETED, TerminateOnNan(transform))
            bad = float("nan") if rank == size - 1 else 1.0  # one rank of the last stage
            seen[f"nan {transform is None}"] = engine.run([1.0, bad, *[1.0] * 4000]).iteration
    return seen


@pytest.mark.parametrize("mesh", [{"pp": 2, "dp": 2}, {"pp": 2, "cp": 2}, {"dp": 2, "tp": 2}], ids=str)
def test_handlers_go_on_without_an_output_on_rank_0(mesh: dict[str, int]) -> None:
    found = run_ranks(handled, 4, mesh, init=False)
    rows = found[0].pop("rows")
    assert rows[-1] == {"mean": 3.0, "running": pytest.approx(4 * 0.98**2 + 2 * 0.02 * 0.98 + 3 * 0.02)}
    if "pp" in mesh:
        assert len(rows) == 1
        assert found[0].pop("warned")
    else:
        assert [row["loss"] for row in rows[:-1]] == LOSSES
        assert not found[0].pop("warned")
    for seen in found[1:]:
        assert seen.pop("rows") == []
        assert not seen.pop("warned")
    assert found == [found[0]] * 4
    assert found[0]["epochs"] == 3
    assert found[0]["lr"] == pytest.approx(0.01)
    assert 2 <= found[0]["nan True"] < 4002
    assert 2 <= found[0]["nan False"] < 4002
