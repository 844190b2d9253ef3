"""A training job that goes wrong in one place on one rank; run by test_faults.py, bare or under torchrun.

    python faults.py FAULT PLACE CULPRIT STALL_TIMEOUT_S

Every rank prints, as its last line, `RESULT rank=... error=... seconds=...` where it could still speak; seconds are
those since the fault, which the culprit writes to $FAULT_FILE.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dengine import Engine, Events, distributed
from dengine.handlers import Checkpoint
from dengine.metrics import Metric

FAULTS = ("raise", "kill", "stop", "sleep", "exit", "_exit", "leave")
PLACES = ("step", "handler", "data", "metric", "checkpoint", "evaluation")
AT_ITERATION = 7  # the second of the second epoch


def happen(fault: str) -> None:
    Path(os.environ["FAULT_FILE"]).write_text(str(time.time()))
    match fault:
        case "raise":
            raise ValueError("sample 4711 is broken")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            while True:
                time.sleep(3600)
        case "exit":
            sys.exit(0)
        case "_exit":
            os._exit(0)


class Faulty:
    """Goes wrong at its n-th call, on one rank."""

    def __init__(self, fault: str, place: str, is_culprit: bool) -> None:
        self.fault, self.place, self.is_culprit = fault, place, is_culprit
        self.calls = 0

    def __call__(self, place: str, at: int = AT_ITERATION) -> None:
        if place == self.place and self.is_culprit:
            self.calls += 1
            if self.calls == at:
                happen(self.fault)


class Data:
    def __init__(self, faulty: Faulty, length: int) -> None:
        self.faulty, self.length = faulty, length

    def __iter__(self) -> Iterator[torch.Tensor]:
        for _ in range(self.length):
            self.faulty("data")
            yield torch.ones(2, 4)


class Mean(Metric):
    total: Any

    def __init__(self, faulty: Faulty) -> None:
        super().__init__()
        self.faulty = faulty
        self.add_state("total", 0.0, reduce="sum")

    def update(self, output: Any) -> None:
        self.faulty("metric")
        self.total += output

    def compute(self) -> float:
        return float(self.total)


class Saved:
    """Something to save whose `state_dict` goes wrong."""

    def __init__(self, faulty: Faulty) -> None:
        self.faulty = faulty

    def state_dict(self) -> dict[str, int]:
        self.faulty("checkpoint", 2)
        return {"one": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        pass


def train(fault: str, place: str, culprit: int, folder: str) -> None:
    here = distributed.world()
    is_culprit = here.rank == culprit
    faulty = Faulty(fault, place, is_culprit)
    model = distributed.prepare_model(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train_step(engine: Engine, batch: torch.Tensor) -> float:
        optimizer.zero_grad()
        faulty("step")
        loss = model(batch).sum()
        loss.backward()
        optimizer.step()
        return 1.0

    trainer = Engine(train_step)
    trainer.add_metric(Mean(faulty), "mean")
    evaluator = Engine(lambda engine, batch: faulty("evaluation"))
    trainer.on(Events.ITERATION_COMPLETED, lambda engine: faulty("handler"))
    trainer.on(Events.EPOCH_COMPLETED, Checkpoint({"model": model, "other": Saved(faulty)}, folder, n_saved=2))

    def validate(engine: Engine) -> None:
        evaluator.run([1, 2, 3, 4, 5])
        distributed.all_reduce(1.0)

    trainer.on(Events.EPOCH_COMPLETED, validate)
    length = 3 if fault == "leave" and is_culprit else 5
    if length == 3:
        trainer.on(Events.ITERATION_COMPLETED(once=3), lambda engine: happen("leave"))
    trainer.run(Data(faulty, length), max_epochs=1 if length == 3 else 4)


def main() -> None:
    fault, place, culprit, stall_timeout, folder = sys.argv[1:]
    rank = int(os.environ.get("RANK", 0))
    outcome = "done"
    try:
        with distributed.process_group(timeout=120, stall_timeout=float(stall_timeout)):
            train(fault, place, int(culprit), folder)
    except BaseException as error:
        outcome = (
            f"{type(error).__name__} culprit={getattr(error, 'rank', rank)} at={getattr(error, 'iteration', None)}"
        )
        raise
    finally:
        since = time.time() - float(Path(os.environ["FAULT_FILE"]).read_text())
        print(f"RESULT rank={rank} {outcome} seconds={since:.2f}", flush=True)


if __name__ == "__main__":
    main()
