"""A pipeline of torch's schedules in the step of an engine, on a mesh: the weights and losses of one process."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tensors import whole_parameters
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, Events, distributed
from dengine.metrics import Average

NUM_LAYERS, WIDTH, LENGTH, GLOBAL_BATCH = 4, 4, 4, 8


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {f"layer{i}": nn.Linear(WIDTH, WIDTH) for i in range(NUM_LAYERS)}


class Stage(nn.Module):
    """Some of the layers, by the names that they have in the whole model."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        each = NUM_LAYERS // num_stages
        for name, layer in list(layers().items())[stage * each : (stage + 1) * each]:
            self.add_module(name, layer)

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        for layer in self.children():
            values = layer(values).tanh()
        return values


def plan(stage: nn.Module) -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    first, second = (name for name, _ in stage.named_children())
    return {first: ColwiseParallel(), second: RowwiseParallel()}


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(3 * GLOBAL_BATCH, LENGTH, WIDTH, generator=generator)
    return TensorDataset(inputs, inputs.roll(1, -1).sin())


def loss_of(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return nn.functional.mse_loss(output, target)


def train(model: nn.Module, pipeline: Any, part: slice, batch_size: int) -> dict[str, Any]:
    """Weights and the loss of each epoch; `pipeline` is None in one process."""
    loader = distributed.prepare_data_loader(
        DataLoader(samples(), batch_size=batch_size, shuffle=True, drop_last=True), seed=3
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)

    def step(engine: Engine, batch: list[torch.Tensor]) -> torch.Tensor | None:
        inputs, targets = (each[:, part] for each in batch)
        optimizer.zero_grad()
        if pipeline is None:
            loss = loss_of(model(inputs), targets)
            loss.backward()
        else:
            loss = pipeline(inputs, targets)
        distributed.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        return None if loss is None else loss.detach()

    engine = Engine(step)
    engine.add_metric(Average(), "loss")
    losses: list[float] = []
    engine.on(Events.EPOCH_COMPLETED, lambda engine: losses.append(float(engine.state.metrics["loss"])))
    engine.run(loader, max_epochs=2)
    return {"weights": whole_parameters(model), "losses": losses}


def trained(rank: int, size: int, mesh: dict[str, int]) -> dict[str, Any]:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    with distributed.process_group(mesh=mesh) as here:
        index, num_stages = here.coordinates["pp"], mesh["pp"]
        stage: nn.Module = Stage(index, num_stages)
        options: dict[str, Any] = {"tensor_parallel": plan(stage)} if "tp" in mesh else {}
        model = distributed.prepare_model(stage, parts="pp", **options)
        assert here.mesh is not None
        schedule = ScheduleGPipe(
            PipelineStage(model, index, num_stages, here.device, group=here.mesh["pp"].get_group()), 2, loss_fn=loss_of
        )

        def pipeline(inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor | None:
            losses: list[torch.Tensor] = []
            first, last = index == 0, index == num_stages - 1
            schedule.step(*([inputs] if first else []), target=targets if last else None, losses=losses)
            return torch.stack(losses).mean() if last else None

        num_parts = mesh.get("cp", 1)
        length, place = LENGTH // num_parts, here.coordinates.get("cp", 0)
        part = slice(place * length, (place + 1) * length)
        return train(model, pipeline, part, GLOBAL_BATCH // here.data_size)


@pytest.mark.parametrize(
    "mesh",
    [
        {"pp": 4},
        {"pp": 2, "dp": 2},
        {"pp": 2, "dp_shard": 2},
        {"pp": 2, "cp": 2},
        {"pp": 2, "tp": 2},
        {"pp": 2, "dp_replicate": 2, "tp": 2},
        {"pp": 2, "dp_shard": 2, "tp": 2},
        {"pp": 2, "tp": 2, "cp": 2},
        {"pp": 2, "dp_shard": 2, "cp": 2},
    ],
    ids=str,
)
def test_a_pipeline_trains_as_one_process(mesh: dict[str, int]) -> None:
    size = 1
    for each in mesh.values():
        size *= each
    begun = whole_parameters(Stage(0, 1))
    expected = train(Stage(0, 1), None, slice(None), GLOBAL_BATCH)
    assert not any(value.equal(begun[name]) for name, value in expected["weights"].items())
    seen: set[str] = set()
    for found in run_ranks(trained, size, mesh, deadline_s=180):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
        seen |= found["weights"].keys()
        for name, value in found["weights"].items():
            assert_close(value, expected["weights"][name], rtol=1e-6, atol=1e-6)
    assert seen == expected["weights"].keys()
