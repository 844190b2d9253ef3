"""Experts that are dealt out over the ranks of a mesh: the weights of one process, which runs all of them."""

from math import prod
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from experts import MoE, Net, StackedExperts
from ranks import run_ranks
from tensors import whole_parameters, whole_tensor
from tokens import LENGTH, data, loss_of, samples, trainer_of
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from dengine import Engine, Events, checkpoint, create_supervised_evaluator, distributed
from dengine.dtensor import cut_like, local_part
from dengine.errors import ConsistencyError
from dengine.handlers import EMA, ConsistencyCheck, TerminateOnNan
from dengine.metrics import Loss
from dengine.supervised import SupervisedEvents


def with_weights(net: Net) -> Net:
    """`net` with weights that depend on names alone, and routers that like some experts more than others."""
    for name, value in net.named_parameters():
        with torch.no_grad():
            whole = torch.randn(value.shape, generator=torch.Generator().manual_seed(crc32(name.encode()))) / 3
            value.copy_(cut_like(whole, value))
            if name.endswith("router.bias"):
                value.copy_(torch.tensor([0.2, 0.0, 0.2, 0.6]))
    return net


def plan() -> Any:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {
        "first": ColwiseParallel(output_layouts=Replicate()),
        "last": RowwiseParallel(input_layouts=Replicate()),
    }


def moes(model: nn.Module) -> list[MoE]:
    return [module for module in model.modules() if isinstance(module, MoE)]


def prepared(net: nn.Module, *, is_planned: bool = False, **options: Any) -> nn.Module:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    of_experts: Any = {"tensor_parallel": {"*.up": ColwiseParallel(), "*.down": RowwiseParallel()}}
    for layer in moes(net):
        assert distributed.prepare_model(layer.experts, parts="ep", **of_experts if is_planned else {}) is layer.experts
    return distributed.prepare_model(net, **options, **{"tensor_parallel": plan()} if is_planned else {})


def train(model: nn.Module, batch_size: int, accumulation: int) -> dict[str, torch.Tensor]:
    """The weights afterwards, and their averages as `average.NAME`."""
    torch.manual_seed(7)
    here = distributed.world()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    part, num_parts = here.coordinates.get("cp", 0), 2 if "cp" in here.coordinates else 1
    trainer = trainer_of(model, optimizer, accumulation, part, num_parts)
    average = EMA(model, decay=0.5)
    trainer.on(SupervisedEvents.OPTIMIZER_STEP_COMPLETED, average)
    trainer.on(Events.EPOCH_COMPLETED, ConsistencyCheck(model, optimizer))
    trainer.on(Events.ITERATION_COMPLETED, TerminateOnNan())
    trainer.run(data(batch_size), max_epochs=2)
    averaged = {f"average.{name}": value for name, value in whole_parameters(average.model).items()}
    return whole_parameters(model) | averaged


def trained(rank: int, size: int, mesh: dict[str, int]) -> list[Any]:
    with distributed.process_group(mesh=mesh) as here:
        found = []
        for accumulation in (1, 2):
            net = with_weights(Net())
            model = prepared(net, is_planned="tp" in mesh)
            weights = train(model, 8 // here.data_size, accumulation)
            found.append((weights, min(each for layer in moes(net) for each in layer.least)))
        return found


@pytest.mark.parametrize(
    "mesh",
    [
        {"dp": 2, "ep": 2},
        {"dp_shard": 2, "ep": 2},
        {"dp_replicate": 2, "ep": 2},
        {"ep": 4},
        {"ep": 2, "tp": 2},
        {"ep": 2, "cp": 2},
        {"ep": 2, "dp_shard": 2},
        {"dp_replicate": 2, "dp_shard": 2, "ep": 2},
    ],
    ids=str,
)
def test_the_gradient_is_that_of_the_mean_over_the_global_batch(mesh: dict[str, int]) -> None:
    expected = [train(with_weights(Net()), 8, accumulation) for accumulation in (1, 2)]
    begun = whole_parameters(with_weights(Net()))
    assert not any(each[name].equal(value) for each in expected for name, value in begun.items())
    seen: set[str] = set()
    least = []
    for of_rank in run_ranks(trained, prod(mesh.values()), mesh, deadline_s=240):
        for (weights, fewest), whole in zip(of_rank, expected, strict=True):
            least.append(fewest)
            seen |= weights.keys()
            for name, value in weights.items():
                assert_close(value, whole[name], rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")
    assert min(least) == 0  # an expert had no token of some rank
    assert seen == expected[0].keys()


def prepared_and_changed(rank: int, size: int, mesh: dict[str, int]) -> dict[str, Any]:
    with distributed.process_group(mesh=mesh) as here:
        torch.manual_seed(10 + rank)
        net = Net()
        for layer in moes(net):
            layer.experts.register_buffer("origin", torch.tensor(float(rank)))
        model = prepared(net)
        own = {name: float(value.sum()) for name, value in whole_parameters(model).items()}
        buffers = [layer.experts.get_buffer("origin") for layer in moes(net)]
        taken = [float(each) for each in buffers]
        for each in buffers:
            each.fill_(rank + 10)
        with distributed.evaluating(model):
            evaluated = [float(each) for each in buffers]

        check, refusal = ConsistencyCheck(model), ""
        check(Engine(lambda engine, batch: None))
        if rank == size - 1:
            with torch.no_grad():
                local_part(next(iter(moes(net)[1].experts.parameters()))).add_(1)
        try:
            check(Engine(lambda engine, batch: None))
        except ConsistencyError as error:
            refusal = str(error)

        torch.manual_seed(5)
        with torch.device("meta"):
            net = Net()
        model = prepared(net)
        made = whole_parameters(model)
        trained = train(model, 8 // here.data_size, 1)
        metrics = create_supervised_evaluator(model, {"loss": Loss(loss_of)}).run(data(2)).metrics
        return {
            "own": own,
            "taken": taken,
            "evaluated": evaluated,
            "refusal": refusal,
            "made": made,
            "loss": metrics["loss"],
            "trained": trained,
        }


@pytest.mark.parametrize("mesh", [{"dp": 2, "ep": 2}, {"dp_shard": 2, "ep": 2}, {"ep": 4}], ids=str)
def test_experts_are_those_of_their_first_copy_and_begin_and_stay_as_in_one_process(mesh: dict[str, int]) -> None:
    torch.manual_seed(5)
    with torch.device("meta"):
        net = Net()
    model = prepared(net)
    made = whole_parameters(model)
    trained = train(model, 8, 1)
    loss = create_supervised_evaluator(model, {"loss": Loss(loss_of)}).run(data(2)).metrics["loss"]
    assert not made["layers.0.experts.0.up.weight"].equal(made["layers.1.experts.0.up.weight"])
    assert not made["layers.0.experts.0.up.weight"].equal(made["layers.0.experts.3.up.weight"])
    found = run_ranks(prepared_and_changed, 4, mesh, deadline_s=240)
    for rank, each in enumerate(found):
        first = rank % mesh["ep"]
        assert each["own"] == found[first]["own"]
        assert each["taken"] == [first] * 2
        assert each["evaluated"] == [first + 10] * 2
        assert ("rank 3 (" in each["refusal"] and "'layers.1.experts." in each["refusal"]) == ("dp" in mesh)
        assert each["loss"] == pytest.approx(loss, rel=1e-6)
        for name, value in each["made"].items():
            assert value.equal(made[name])
        for name, value in each["trained"].items():
            assert_close(value, trained[name], rtol=1e-6, atol=1e-6)
    assert len({each["own"]["layers.0.router.weight"] for each in found}) == 1


def stacked(mesh: Any = None) -> Net:
    """With all experts of a layer in one parameter, which is cut up over `ep` as torch does it."""
    from torch.distributed.tensor import Shard, distribute_module, distribute_tensor

    def cut(name: str, module: nn.Module, mesh: Any) -> None:
        whole = module.get_parameter("weight")
        module.register_parameter(
            "weight", nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None))
        )

    net = Net(StackedExperts)
    for layer in moes(net) if mesh is not None else []:
        distribute_module(layer.experts, mesh, cut)
    return net


def trained_stacked(rank: int, size: int, mesh: dict[str, int]) -> list[dict[str, torch.Tensor]]:
    with distributed.process_group(mesh=mesh) as here:
        assert here.mesh is not None
        model = prepared(with_weights(stacked(here.mesh["ep"])))
        found = [train(model, 8 // here.data_size, 2)]
        torch.manual_seed(5)
        with torch.device("meta"):
            net = stacked(here.mesh["ep"])
        return [*found, whole_parameters(prepared(net))]


@pytest.mark.parametrize("mesh", [{"dp": 2, "ep": 2}, {"dp_shard": 2, "ep": 2}, {"ep": 4}], ids=str)
def test_experts_that_torch_has_cut_up_train_as_one_process(mesh: dict[str, int]) -> None:
    torch.manual_seed(5)
    with torch.device("meta"):
        net = stacked()
    made = whole_parameters(prepared(net))
    expected = [train(with_weights(stacked()), 8, 2), made]
    for found in run_ranks(trained_stacked, 4, mesh, deadline_s=240):
        for weights, whole in zip(found, expected, strict=True):
            assert weights.keys() == whole.keys()
            for name, value in weights.items():
                assert_close(value, whole[name], rtol=1e-6, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


def gradients_of_halves(rank: int, size: int) -> list[float]:
    found = []
    for mesh in ({"dp": 2, "ep": 2}, {"dp_shard": 2, "ep": 2}, {"ep": 4}):
        with distributed.process_group(mesh=mesh):
            experts = nn.Linear(2, 2, bias=False, dtype=torch.float16)
            model = nn.Sequential(experts)
            distributed.prepare_model(experts, parts="ep")
            distributed.prepare_model(model)(torch.ones(1, 2, dtype=torch.float16)).sum().backward()
            found.append(float(whole_tensor(experts.weight.grad).sum()))
    return found


def test_gradients_in_float16_are_divided_once() -> None:
    # Four elements, in each of which each rank with the expert sums up 1: over 4 ranks with data.
    assert run_ranks(gradients_of_halves, 4) == 4 * [[2.0, 2.0, 1.0]]


class Stage(nn.Module):
    """Some layers of a net, by their names in it."""

    def __init__(self, stage: int, num_stages: int) -> None:
        super().__init__()
        net = with_weights(Net())
        self.first = net.first if stage == 0 else nn.Identity()
        each = len(net.layers) // num_stages
        own = range(stage * each, (stage + 1) * each)
        self.layers = nn.ModuleDict({str(number): net.layers[number] for number in own})
        self.last = net.last if stage == num_stages - 1 else nn.Identity()

    def forward(self, values: torch.Tensor) -> Any:
        values = self.first(values)
        for layer in self.layers.values():
            values = layer(values)
        return self.last(values)


def train_stage(model: nn.Module, pipeline: Any, batch_size: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights, and the norm of each step's gradient; `pipeline` is None in one process."""
    inputs, labels = samples().tensors
    loader = DataLoader(TensorDataset(inputs[:16], labels[:16].clamp(min=0)), batch_size=batch_size, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    norms = []

    def step(engine: Engine, batch: list[torch.Tensor]) -> None:
        optimizer.zero_grad()
        if pipeline is None:
            loss_of(model(batch[0]), batch[1]).backward()
        else:
            pipeline(*batch)
        norms.append(float(distributed.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()

    engine = Engine(step)
    engine.on(Events.EPOCH_COMPLETED, ConsistencyCheck(model, optimizer))
    engine.run(distributed.prepare_data_loader(loader, seed=3), max_epochs=2)
    return whole_parameters(model), norms


def trained_stage(rank: int, size: int, mesh: dict[str, int]) -> tuple[dict[str, torch.Tensor], list[float]]:
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    with distributed.process_group(mesh=mesh) as here:
        assert here.mesh is not None
        stage, batch_size = here.coordinates["pp"], 8 // here.data_size
        is_last = stage == mesh["pp"] - 1
        net = Stage(stage, mesh["pp"])
        for layer in moes(net):
            distributed.prepare_model(layer.experts, parts="ep")
        model = distributed.prepare_model(net, parts="pp")
        values = torch.zeros(batch_size // 2, LENGTH, 6).requires_grad_(stage > 0)
        result = torch.zeros(batch_size // 2, LENGTH, 5 if is_last else 6).requires_grad_()
        group = here.mesh["pp"].get_group()
        made = PipelineStage(
            model, stage, mesh["pp"], here.device, input_args=(values,), output_args=(result,), group=group
        )
        schedule = ScheduleGPipe(made, 2, loss_fn=loss_of)

        def pipeline(inputs: torch.Tensor, labels: torch.Tensor) -> None:
            schedule.step(*([] if stage else [inputs]), target=labels if is_last else None)

        return train_stage(model, pipeline, batch_size)


def test_experts_in_the_stages_of_a_pipeline_train_as_in_one_process() -> None:
    expected, expected_norms = train_stage(Stage(0, 1), None, 8)
    seen: set[str] = set()
    for weights, norms in run_ranks(trained_stage, 4, {"pp": 2, "ep": 2}, deadline_s=240):
        assert norms == pytest.approx(expected_norms, rel=1e-6)
        seen |= weights.keys()
        for name, value in weights.items():
            assert_close(value, expected[name], rtol=1e-6, atol=1e-6)
    assert seen == expected.keys()


def refused(rank: int, size: int) -> list[str]:
    from torch.distributed.tensor import Shard, distribute_tensor

    with distributed.process_group(mesh={"ep": size}) as here:
        assert here.mesh is not None
        errors = []
        experts: Any = nn.Linear(2, 2)
        model = nn.Sequential(experts)
        prepare: Any = distributed.prepare_model
        cut = nn.Linear(2, 2)
        cut.weight = nn.Parameter(distribute_tensor(cut.weight.detach(), here.mesh["ep"], [Shard(0)]))
        for call in (
            lambda: distributed.prepare_model(experts, parts="ep", init_fn=print),
            lambda: distributed.prepare_model(experts, parts="ep", find_unused_parameters=True),
            lambda: distributed.prepare_model(nn.Sequential(cut)),
            lambda: prepare(prepare(model).module[0], parts="ep"),
            lambda: prepare(prepare(nn.Linear(2, 2), parts="ep"), parts="ep"),
        ):
            try:
                call()
                errors.append("")
            except ValueError as error:
                errors.append(str(error))
        return errors


def test_what_experts_cannot_have_is_said() -> None:
    for errors in run_ranks(refused, 2):
        assert "pass it to prepare_model(model)" in errors[0]
        assert "find_unused_parameters of DistributedDataParallel cannot be had" in errors[1]
        assert "'0.weight' is cut up over the dimension ep" in errors[2]
        assert "before prepare_model(model)" in errors[3]
        assert "was prepared with parts= already" in errors[4]


def state_of(model: nn.Module, optimizer: torch.optim.Optimizer, average: EMA) -> dict[str, torch.Tensor]:
    found = {**whole_parameters(model), **{f"average.{n}": v for n, v in whole_parameters(average.model).items()}}
    for name, parameter in model.named_parameters():
        found[f"momentum.{name}"] = whole_tensor(optimizer.state[parameter]["momentum_buffer"])
    return found


def saved_or_loaded(rank: int, size: int, mesh: dict[str, int], path: str, is_saved: bool) -> dict[str, torch.Tensor]:
    with distributed.process_group(mesh=mesh):
        model = prepared(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        objects: dict[str, Any] = {"model": model, "optimizer": optimizer, "average": EMA(model, decay=0.5)}
        if not is_saved:
            checkpoint.load(path, objects)
            return state_of(*objects.values())
        for _ in range(2):
            loss_of(model(samples()[:4][0]), samples()[:4][1]).backward()
            optimizer.step()
            objects["average"](Engine(lambda engine, batch: None))
        checkpoint.save(path, objects)
        return state_of(*objects.values())


def test_experts_are_saved_on_one_mesh_and_loaded_on_another_and_in_one_process(tmp_path: Path) -> None:
    path = str(tmp_path / "checkpoint")
    saved: dict[str, torch.Tensor] = {}
    for each in run_ranks(saved_or_loaded, 4, {"dp_shard": 2, "ep": 2}, path, True, deadline_s=120):
        saved |= each
    model = Net()
    objects: Any = model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), EMA(model, decay=0.5)
    checkpoint.load(path, dict(zip(("model", "optimizer", "average"), objects, strict=True)))
    alone = state_of(*objects)
    assert alone.keys() == saved.keys()
    for loaded in [alone, *run_ranks(saved_or_loaded, 4, {"ep": 4}, path, False, deadline_s=120)]:
        for name, value in loaded.items():
            assert value.equal(saved[name])
