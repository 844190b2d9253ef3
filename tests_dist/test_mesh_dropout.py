"""Dropout on every grid of four ranks: the same bits in two runs, and in one that was killed and goes on."""

import os
import signal
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tensors import whole_parameters
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, Events, distributed
from dengine.handlers import Checkpoint, ConsistencyCheck

WIDTH, GLOBAL_BATCH, EPOCHS, KILLED_AT = 8, 8, 3, 8
MESHES: list[dict[str, int]] = [
    {"tp": 4},
    {"dp": 2, "tp": 2},
    {"dp_shard": 2, "tp": 2},
    {"cp": 2, "tp": 2},
    {"dp_replicate": 2, "dp_shard": 2},
    {"pp": 2, "dp": 2},
    {"pp": 2, "tp": 2},
]


class Stage(nn.Module):
    """The layers, or a half of them; `sums` of what it gave: whether ranks drop the same can be seen there."""

    def __init__(self, part: int, num_parts: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        made = [nn.Linear(WIDTH, WIDTH) for _ in range(4)]
        self.layers = nn.ModuleList(made[part * len(made) // num_parts : (part + 1) * len(made) // num_parts])
        self.drop = nn.Dropout(0.4)
        self.sums: list[float] = []

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for first, second in zip(self.layers[::2], self.layers[1::2], strict=True):
            values = self.drop(second(self.drop(first(self.drop(values)).tanh())))
        self.sums.append(values.detach().sum().item())
        return values


def plan() -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()}


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output, target)


def pipeline_of(model: nn.Module, index: int, group: Any, batch_size: int) -> Any:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    # Without a look at these, the stage makes a pass of its own at its first step, which draws random numbers.
    shape = torch.zeros(batch_size // 2, WIDTH, requires_grad=index > 0)
    stage = PipelineStage(
        model,
        index,
        2,
        torch.device("cpu"),
        input_args=shape,
        output_args=torch.zeros_like(shape).requires_grad_(),
        group=group,
    )
    schedule = ScheduleGPipe(stage, n_microbatches=2, loss_fn=loss_of)

    def backward(inputs: torch.Tensor, targets: torch.Tensor) -> None:
        schedule.step(*([] if index else [inputs]), target=targets if index else None)

    return backward


def run(mesh: dict[str, int], folder: str | None, *, dies: bool = False) -> dict[str, Any]:
    """One run, from the newest checkpoint in `folder` if there is one. Ranks that share samples drop the same."""
    here = distributed.world()
    index, num_stages = here.coordinates.get("pp", 0), mesh.get("pp", 1)
    stage = Stage(index, num_stages)
    options: dict[str, Any] = {"tensor_parallel": plan()} if "tp" in mesh else {}
    model = distributed.prepare_model(stage, parts="pp" if "pp" in mesh else None, **options)
    torch.manual_seed(11 + here.data_rank)
    backward = None
    if "pp" in mesh:
        assert here.mesh is not None
        backward = pipeline_of(model, index, here.mesh["pp"].get_group(), GLOBAL_BATCH // here.data_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)

    def step(engine: Engine, batch: list[torch.Tensor]) -> None:
        optimizer.zero_grad()
        if backward is None:
            loss_of(model(batch[0]), batch[1]).backward()
        else:
            backward(*batch)
        distributed.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()

    engine = Engine(step)
    engine.on(Events.EPOCH_COMPLETED, ConsistencyCheck(model, optimizer))
    objects = {"model": model, "optimizer": optimizer, "engine": engine}
    if folder is not None:
        Checkpoint.resume(folder, objects)
        engine.on(Events.ITERATION_COMPLETED(every=3), Checkpoint(objects, folder))
    if dies:
        engine.on(Events.ITERATION_STARTED(once=KILLED_AT), lambda _: os.kill(os.getpid(), signal.SIGKILL))
    inputs = torch.randn(4 * GLOBAL_BATCH, WIDTH, generator=torch.Generator().manual_seed(1))
    loader = DataLoader(TensorDataset(inputs, inputs.sin()), GLOBAL_BATCH // here.data_size, shuffle=True)
    engine.run(distributed.prepare_data_loader(loader, seed=3), max_epochs=EPOCHS)
    return {"weights": whole_parameters(model), "sums": stage.sums}


def twice_and_killed(rank: int, size: int, mesh: dict[str, int], folder: str) -> None:
    with distributed.process_group(mesh=mesh):
        torch.save([run(mesh, None), run(mesh, None)], Path(folder, f"whole.{rank}"))
        run(mesh, folder, dies=True)


def resumed(rank: int, size: int, mesh: dict[str, int], folder: str) -> tuple[dict[str, Any], int, int]:
    with distributed.process_group(mesh=mesh) as here:
        return run(mesh, folder), here.data_rank, here.coordinates.get("pp", 0)


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_dropout_is_the_same_in_every_run_and_after_a_kill(mesh: dict[str, int], tmp_path: Path) -> None:
    size, folder = prod(mesh.values()), str(tmp_path)
    killed = run_ranks(twice_and_killed, size, mesh, folder, expect_failures=True, deadline_s=120)
    assert {each.exitcode for each in killed} == {-signal.SIGKILL}, killed
    sums: dict[tuple[int, int], list[float]] = {}
    for rank, (found, data_rank, stage) in enumerate(run_ranks(resumed, size, mesh, folder, deadline_s=120)):
        first, second = torch.load(tmp_path / f"whole.{rank}")
        for name, value in first["weights"].items():
            assert second["weights"][name].equal(value), f"{name} in the second run"
            assert found["weights"][name].equal(value), f"{name} in the resumed run"
        assert first["sums"] == second["sums"]
        assert 0 < len(found["sums"]) < len(first["sums"])
        assert found["sums"] == first["sums"][-len(found["sums"]) :]
        # Ranks that share the samples have drawn the same masks.
        assert sums.setdefault((data_rank, stage), first["sums"]) == pytest.approx(first["sums"], abs=1e-5)
