"""Over ranks, rank 0 records, and the others make the same calls."""

import json
import os
from pathlib import Path

import torch
from ranks import run_ranks

from dengine import Engine, Events, distributed
from dengine.handlers import ParamGroupLogger, TrackingHandler
from dengine.tracking import Track


def train(rank: int, size: int, folder: str, opens_first: bool) -> tuple[str, bool]:
    opened = Track.run("p", dir=folder) if opens_first else None
    with distributed.process_group(timeout=300), opened or Track.run("p", dir=folder) as run:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        trainer = Engine(lambda engine, batch: {"loss": float(rank)})
        log = TrackingHandler(run, ["loss"], lambda output: output)
        trainer.on(Events.ITERATION_COMPLETED(every=5), log)
        trainer.on(Events.EPOCH_COMPLETED, ParamGroupLogger(optimizer, run))
        trainer.run(range(10))
        run.log({"rank": rank}, step=99)
        weights = Path(folder) / f"weights-{rank}"
        weights.write_text(str(rank))
        run.log_artifact(Track.Artifact("model", type="model").add_file(weights, name="weights"), aliases=["final"])
        distributed.barrier("stored")
        used = (run.use_artifact("model:final").download() / "weights").read_text()
    return used, run.dir.exists()


def test_one_run_is_recorded_by_rank_0_and_every_rank_reads_its_artifact(tmp_path: Path) -> None:
    assert run_ranks(train, 3, str(tmp_path), False, init=False) == [("0", True), ("0", False), ("0", False)]
    (run_dir,) = (path.parent for path in tmp_path.glob("p/*/run.json"))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row.get("loss"), row.get("rank")) for row in rows] == [
        (5, 0.0, None),
        (10, 0.0, None),
        (10, None, None),
        (99, None, 0),
    ]
    assert json.loads((run_dir / "status.json").read_text())["status"] == "finished"


def test_a_run_opened_before_the_process_group_is_rank_0_s_too(tmp_path: Path) -> None:
    run_ranks(train, 2, str(tmp_path), True, init=False)
    assert len(list(tmp_path.glob("p/*/run.json"))) == 1


def handler_without_run(rank: int, size: int) -> int:
    logged: list[int] = []

    class Log:
        def log(self, values: dict[str, float], step: int) -> None:
            logged.append(step)

    trainer = Engine(lambda engine, batch: {"loss": 1.0})
    trainer.on(Events.ITERATION_COMPLETED, TrackingHandler(Log() if rank == 0 else None, ["loss"], lambda o: o))
    trainer.run(range(3))
    return len(logged)


def test_other_ranks_need_no_run() -> None:
    assert run_ranks(handler_without_run, 2) == [3, 0]


def fail(rank: int, size: int, folder: str) -> None:
    with distributed.process_group(timeout=300), Track.run("p", dir=folder) as run:

        def step(engine: Engine, batch: int) -> float:
            if rank == 1 and batch == 3:
                raise ValueError("bad batch")
            return distributed.all_reduce(float(batch))

        trainer = Engine(step)
        trainer.on(Events.ITERATION_COMPLETED, lambda engine: run.log({"x": engine.state.output}))
        trainer.run(range(10))


def test_where_another_rank_fails_the_run_is_marked_failed(tmp_path: Path) -> None:
    outcomes = run_ranks(fail, 2, str(tmp_path), init=False, expect_failures=True, deadline_s=60)
    assert all(outcome.error_type for outcome in outcomes)
    (status,) = tmp_path.glob("p/*/status.json")
    assert json.loads(status.read_text())["status"] == "failed"
    assert os.path.getsize(status.with_name("metrics.jsonl")) > 0
