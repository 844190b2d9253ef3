"""DTensors at the doors of the package: taken as whole tensors, on 4 ranks of a 2 x 2 mesh."""

import time
import warnings
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import nn

from dengine import Engine, Events, RankZeroCollectiveError, distributed
from dengine.handlers import TerminateOnNan, TrackingHandler
from dengine.metrics import MSE, Accuracy, Average, ConfusionMatrix, Loss, Perplexity, RunningAverage, TopKAccuracy


def logits() -> torch.Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(0))


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def metrics() -> dict[str, Any]:
    return {
        "accuracy": Accuracy(),
        "topk": TopKAccuracy(2),
        "confusion": ConfusionMatrix(),
        "loss": Loss(nn.functional.cross_entropy),
        "perplexity": Perplexity(),
        "mean": Average(lambda output: output[0].mean()),
        "running": RunningAverage(output_transform=lambda output: output[0].sum()),
        "mse": MSE(lambda output: (output[0], output[0] * 2)),
    }


def spread(value: torch.Tensor, *names: str) -> Any:
    """`value` on a 2 x 2 mesh, cut along its first dimension over the dimensions of these names."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    placements = [Shard(0) if name in names else Replicate() for name in ("dp", "tp")]
    return distribute_tensor(value, mesh, placements, src_data_rank=None)


def reduced(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.tensor import DTensor, Partial

    seen: dict[str, Any] = {}
    with distributed.process_group():
        value = spread(torch.arange(5.0), "dp")
        seen["sum"] = distributed.all_reduce(value)
        seen["nested"] = distributed.all_reduce({"a": [value, 1.0]}, "mean")
        seen["plain"] = type(seen["sum"]) is torch.Tensor
        seen["kept"] = value.full_tensor()
        seen["partial"] = distributed.all_reduce(
            DTensor.from_local(torch.ones(2), value.device_mesh, [Partial(), Partial()]), "max"
        )
        try:
            distributed.rank_zero_only(lambda: distributed.all_reduce(value))()
        except RankZeroCollectiveError as error:
            seen["alone"] = str(error)
    return seen


def test_an_all_reduce_of_a_dtensor_is_of_the_whole_tensor() -> None:
    for rank, seen in enumerate(run_ranks(reduced, 4)):
        assert seen["sum"].equal(4 * torch.arange(5.0))
        assert seen["nested"]["a"][0].equal(torch.arange(5.0))
        assert seen["nested"]["a"][1] == 1.0
        assert seen["partial"].equal(torch.full((2,), 4.0))
        assert seen["kept"].equal(torch.arange(5.0))
        assert seen["plain"]
        assert ("alone" in seen) == (rank == 0)


def evaluated(rank: int, size: int) -> dict[str, Any]:
    with distributed.process_group():
        output = (spread(logits(), "dp", "tp"), spread(LABELS, "tp"))
        engine = Engine(lambda engine, batch: output)
        engine.add_metrics(metrics())
        return dict(engine.run([0]).metrics)


def test_metrics_take_them_whole() -> None:
    engine = Engine(lambda engine, batch: (logits(), LABELS))
    engine.add_metrics(metrics())
    expected = dict(engine.run([0]).metrics)
    for found in run_ranks(evaluated, 4):
        assert found["confusion"].equal(4 * expected["confusion"])  # each of the 4 ranks has seen all samples
        for name in expected.keys() - {"confusion"}:
            assert found[name] == pytest.approx(expected[name], rel=1e-6), name


def with_torchmetrics(rank: int, size: int) -> float:
    from torchmetrics.aggregation import MeanMetric

    with distributed.process_group():
        value = spread(torch.arange(6.0), "dp")
        engine = Engine(lambda engine, batch: value)
        engine.add_metric(MeanMetric(), "mean", output_transform=lambda output: output)
        return float(engine.run([0]).metrics["mean"])


def test_metrics_of_torchmetrics_take_them_whole() -> None:
    pytest.importorskip("torchmetrics")
    assert run_ranks(with_torchmetrics, 4) == [2.5] * 4


def ended(rank: int, size: int) -> int:
    with distributed.process_group(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        engine = Engine(lambda engine, batch: {"loss": spread(torch.tensor([0.0, 0, 0, float(batch)]), "dp", "tp")})
        engine.on(Events.ITERATION_COMPLETED, TerminateOnNan())
        return engine.run([1.0, 2.0, float("nan"), *[3.0] * 10_000]).iteration


def test_a_nan_that_one_rank_has_ends_the_run_on_all() -> None:
    found = run_ranks(ended, 4)
    assert len(set(found)) == 1
    assert 3 <= found[0] < 10_003


class Recorder:
    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def log(self, row: dict[str, Any], step: int) -> None:
        self.rows.append(row)


def tracked(rank: int, size: int, *names: str) -> tuple[list[dict[str, Any]], str]:
    run, failure = Recorder(), ""
    try:
        with distributed.process_group():
            engine = Engine(lambda engine, batch: spread(torch.tensor([2.0]), *names))
            handler = TrackingHandler(run, output_transform=lambda output: {"loss": output})
            engine.on(Events.ITERATION_COMPLETED, handler)
            engine.run([0])
    except Exception as error:  # in the run, or at its end if a rank was through before rank 0 failed
        failure = f"{type(error).__name__}: {error}"
    return run.rows, failure


def test_a_tracker_logs_what_rank_0_has_whole() -> None:
    first, *others = run_ranks(tracked, 4)
    assert first == ([{"loss": 2.0}], "")
    assert others == [([], "")] * 3


def test_a_tracker_refuses_what_only_all_ranks_could_make_whole() -> None:
    first, *others = run_ranks(tracked, 4, "dp")
    assert "RankZeroCollectiveError: 'loss' is a DTensor" in first[1]
    assert all("RemoteRankError" in failure for _, failure in others)


def sent_at_once(rank: int, size: int) -> list[Any]:
    import torch.distributed._functional_collectives as functional

    def pending() -> torch.Tensor:
        if rank:
            time.sleep(0.5)  # rank 0 has pickled its result by then, unless it waits
        return functional.all_reduce(torch.ones(3), "sum", list(range(size)))

    with distributed.process_group():
        gathered = distributed.all_gather_object({"output": [pending()]})
        return [gathered, distributed.broadcast_object(pending()), distributed.all_reduce(pending(), "max")]


def test_the_result_of_a_collective_under_way_is_awaited_before_it_is_sent() -> None:
    expected = torch.full((3,), 2.0)
    for gathered, broadcast, reduced_over_ranks in run_ranks(sent_at_once, 2, init=False, deadline_s=60):
        for value in (*(each["output"][0] for each in gathered), broadcast, reduced_over_ranks):
            assert type(value) is torch.Tensor
            assert torch.equal(value, expected), value
