"""`prepare_model` on the mesh of `process_group(mesh=)`: 4 ranks train as one process does on the whole batch."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tensors import whole_tensor
from torch import nn
from torch.testing import assert_close

from dengine import create_supervised_evaluator, distributed

STEPS = 3


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.register_buffer("shift", torch.full((3,), 0.5))

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.head(self.norm(self.second(self.first(inputs).tanh()))) + self.shift


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def plan() -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"first": ColwiseParallel(), "second": RowwiseParallel()}


def samples() -> torch.Tensor:
    return torch.randn(STEPS, 8, 6, generator=torch.Generator().manual_seed(1))


def as_any(value: Any) -> Any:
    return value


def whole(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = whole_tensor(value.detach())
    return tensor


def state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    bare = distributed.unwrap_model(model)
    return {name: whole(value).clone() for name, value in bare.state_dict().items()}


def train(model: nn.Module, shard: Callable[[torch.Tensor], torch.Tensor]) -> dict[str, torch.Tensor]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    for inputs in samples():
        model(shard(inputs)).square().mean().backward()
        distributed.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        optimizer.zero_grad()
    return state_of(model)


def trained(rank: int, size: int, mesh: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import parallelize_module

    seen: dict[str, Any] = {}
    with distributed.process_group(mesh=mesh) as here:
        model: nn.Module = net(seed=rank)  # only rank 0's weights count
        if options.pop("laid_out", False):
            assert here.mesh is not None
            model = parallelize_module(net(), here.mesh["tp"], plan())
        elif "tp" in mesh:
            options["tensor_parallel"] = plan()
        if not options.pop("is_drawn_apart", True):
            model = net()
        model = distributed.prepare_model(model, **options)
        seen["before"] = state_of(model)
        seen["kind"] = type(model).__name__
        seen["held"] = sum(each.to_local().numel() for each in model.parameters() if hasattr(each, "to_local"))
        num_data = here.data_size * mesh.get("cp", 1)
        data_rank = here.data_rank * mesh.get("cp", 1) + here.coordinates.get("cp", 0)
        seen["after"] = train(model, lambda inputs: inputs.chunk(num_data)[data_rank])
    return seen


def averaged(rank: int, size: int, mesh: dict[str, int], options: dict[str, Any]) -> dict[str, Any]:
    from dengine.handlers import EMA

    seen: dict[str, Any] = {}
    with distributed.process_group(mesh=mesh) as here:
        if "tp" in mesh:
            options["tensor_parallel"] = plan()
        model = distributed.prepare_model(net(), **options)
        ema = EMA(model, decay=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for inputs in samples():
            model(inputs.chunk(here.data_size)[here.data_rank]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema(as_any(None))
        with torch.no_grad():
            seen["output"] = ema.model(samples()[0])
        seen["after"] = state_of(ema.model)
        before = {name: whole(value).clone() for name, value in ema.state_dict()["model"].items()}
        ema.load_state_dict({"num_updates": 3, "model": {name: value + 1 for name, value in before.items()}})
        seen["loaded"] = state_of(ema.model)
    return seen


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ({"dp_shard": 2, "tp": 2}, {}),
        ({"dp_shard": 2, "tp": 2}, {"strategy": "fsdp", "blocks": (nn.Linear,)}),
        ({"dp": 2, "tp": 2}, {}),
        ({"tp": 4}, {}),
        ({"dp_replicate": 2, "dp_shard": 2}, {}),
    ],
)
def test_an_average_of_weights_is_laid_out_as_they_are(mesh: dict[str, int], options: dict[str, Any]) -> None:
    from dengine.handlers import EMA

    model = net()
    ema = EMA(model, decay=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for inputs in samples():
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema(as_any(None))
    expected = state_of(ema.model)
    with torch.no_grad():
        output = ema.model(samples()[0])
    for seen in run_ranks(averaged, 4, mesh, options, deadline_s=120):
        assert_close(seen["output"], output, rtol=1e-5, atol=1e-6)
        for name, value in expected.items():
            assert_close(seen["after"][name], value, rtol=1e-6, atol=1e-6)
            assert_close(seen["loaded"][name], value + 1, rtol=1e-6, atol=1e-6)


def saved(rank: int, size: int, mesh: dict[str, int], folder: str) -> dict[str, torch.Tensor]:
    from dengine import checkpoint

    with distributed.process_group(mesh=mesh):
        model = distributed.prepare_model(net(), **({"tensor_parallel": plan()} if "tp" in mesh else {}))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        model(samples()[0]).square().mean().backward()
        optimizer.step()
        checkpoint.save(folder, {"model": model, "optimizer": optimizer})
        own = state_of(model)
        optimizer.step()
        checkpoint.load(folder, {"model": model, "optimizer": optimizer})
        now = state_of(model)
        assert all(now[name].equal(own[name]) for name in own), "not what was saved"
        optimizer.step()
        return state_of(model)


@pytest.mark.parametrize("mesh", [{"dp": 2, "tp": 2}, {"dp_shard": 2, "tp": 2}, {"dp_shard": 2, "cp": 2}], ids=str)
def test_a_checkpoint_of_a_mesh_is_loaded_by_one_process(mesh: dict[str, int], tmp_path: Path) -> None:
    from dengine import checkpoint

    first, *_ = run_ranks(saved, 4, mesh, str(tmp_path / "saved"), deadline_s=120)
    model = net(seed=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpoint.load(tmp_path / "saved", {"model": model, "optimizer": optimizer})
    begun = net()
    begun(samples()[0]).square().mean().backward()
    for parameter, twin in zip(model.parameters(), begun.parameters(), strict=True):
        parameter.grad = twin.grad
    optimizer.step()  # the ranks' second one, of the same gradient
    for name, value in state_of(model).items():
        assert_close(first[name], value, rtol=1e-6, atol=1e-6)


def with_options(rank: int, size: int) -> dict[str, Any]:
    from torch.distributed.tensor import Shard

    seen: dict[str, Any] = {}
    with distributed.process_group(mesh={"dp_shard": 2}):
        model = net()
        wide = model.second.weight
        model = as_any(
            distributed.prepare_model(
                model,
                ignored_params={model.norm.weight},
                shard_placement_fn=lambda parameter: Shard(1) if parameter is wide else None,
                mixed_precision="bf16",
                blocks=(nn.LayerNorm,),
            )
        )
        seen["ignored"] = type(model.norm.weight) is nn.Parameter
        seen["placements"] = [str(model.second.weight.placements), str(model.first.weight.placements)]
        seen["blocks"] = type(model.norm).__name__
        seen["state"] = state_of(model)
        try:
            distributed.prepare_model(net(), static_graph=True)
        except TypeError as error:
            seen["unknown"] = str(error)
    return seen


def test_options_of_fsdp_are_taken_where_the_mesh_says_that_it_shards() -> None:
    for seen in run_ranks(with_options, 2):
        assert seen["ignored"]
        assert seen["placements"] == ["(Shard(dim=1),)", "(Shard(dim=0),)"]
        assert seen["blocks"] == "FSDPLayerNorm"
        assert "fully_shard() takes no static_graph" in seen["unknown"]
        for name, value in state_of(net()).items():
            assert seen["state"][name].equal(value)


CASES: dict[str, tuple[dict[str, int], dict[str, Any], str]] = {
    "replicas and tp": ({"dp": 2, "tp": 2}, {}, "ReplicateNet"),
    "replicas and tp by hand": ({"dp": 2, "tp": 2}, {"laid_out": True}, "ReplicateNet"),
    "shards and tp": ({"dp_shard": 2, "tp": 2}, {}, "FSDPNet"),
    "shards and tp by hand": ({"dp_shard": 2, "tp": 2}, {"laid_out": True}, "FSDPNet"),
    "shards by layer and tp": ({"dp_shard": 2, "tp": 2}, {"strategy": "fsdp", "blocks": (nn.Linear,)}, "FSDPNet"),
    "replicas of shards": ({"dp_replicate": 2, "dp_shard": 2}, {}, "FSDPNet"),
    "shards and cp": ({"dp_shard": 2, "cp": 2}, {}, "FSDPNet"),
    "replicas and cp": ({"dp": 2, "cp": 2}, {}, "DistributedDataParallel"),
    "all replicas": ({"dp": 4}, {}, "DistributedDataParallel"),
    "dp sharded": ({"dp": 4}, {"strategy": "fsdp"}, "FSDPNet"),
    "tp alone": ({"tp": 4}, {}, "Net"),
    "replicas and a tp of one": ({"dp": 4, "tp": 1}, {}, "DistributedDataParallel"),
    "shards and a tp of one": ({"dp_shard": 4, "tp": 1}, {}, "FSDPNet"),
}


@pytest.mark.parametrize("name", CASES)
def test_every_mesh_trains_as_one_process(name: str) -> None:
    mesh, options, kind = CASES[name]
    before, after = state_of(net()), train(net(), lambda inputs: inputs)
    for seen in run_ranks(trained, 4, mesh, dict(options), deadline_s=120):
        assert seen["kind"] == kind
        for key, value in before.items():
            assert seen["before"][key].equal(value), f"{key} began as another one"
        for key, value in after.items():
            assert_close(seen["after"][key], value, rtol=1e-6, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}")


def in_blocks(rank: int, size: int) -> list[dict[str, torch.Tensor]]:
    """One block after the other: their `tp` is of the same ranks, in groups of other names."""
    found = []
    for mesh in ({"dp": 2, "tp": 2}, {"dp_replicate": 1, "dp_shard": 2, "tp": 2}, {"tp": 2, "dp": 2}):
        with distributed.process_group(mesh=mesh) as here:
            model = distributed.prepare_model(net(), tensor_parallel=plan())
            found.append(train(model, partial(part_of, here.data_rank)))
    return found


def part_of(number: int, inputs: torch.Tensor) -> torch.Tensor:
    return inputs.chunk(2)[number]


def test_blocks_with_meshes_come_one_after_the_other_in_one_process() -> None:
    expected = train(net(), lambda inputs: inputs)
    for blocks in run_ranks(in_blocks, 4, init=False, deadline_s=120):
        for after in blocks:
            for name, value in expected.items():
                assert_close(after[name], value, rtol=1e-6, atol=1e-6)


def drawn(rank: int, size: int, mesh: dict[str, int] | None, strategy: Any, is_planned: bool) -> Any:
    torch.manual_seed(5 + rank)  # only rank 0's seed counts
    with distributed.process_group(mesh=mesh):
        with torch.device("meta"):
            model: nn.Module = Net()
        state = torch.random.get_rng_state()
        options: dict[str, Any] = {"tensor_parallel": plan()} if is_planned else {}
        model = distributed.prepare_model(model, strategy, init_fn=initialise, **options)
        assert torch.random.get_rng_state().equal(state), "the generators went on"
        return state_of(model)


def initialise(module: Any) -> None:
    if isinstance(module, Net):
        module.shift.fill_(0.5)
    else:
        module.reset_parameters()


def test_a_model_on_the_meta_device_is_the_same_on_every_mesh() -> None:
    torch.manual_seed(5)
    with torch.device("meta"):
        model: nn.Module = Net()
    expected = state_of(distributed.prepare_model(model, init_fn=initialise))
    assert expected["first.weight"].std() > 0
    assert not expected["first.weight"][:4].equal(expected["second.weight"].T[:4, :2])
    for mesh, strategy, is_planned in (
        ({"dp_shard": 2, "tp": 2}, "auto", True),
        ({"dp": 2, "tp": 2}, "auto", True),
        ({"dp_replicate": 2, "dp_shard": 2}, "fsdp", False),
        (None, "fsdp", False),
        (None, "ddp", False),
        (None, "none", False),
    ):
        for found in run_ranks(drawn, 4, mesh, strategy, is_planned, deadline_s=120):
            for name, value in expected.items():
                assert found[name].equal(value), (mesh, strategy, name)


class Named(nn.Module):
    """Some of the layers of `Net`, by the names that they have there."""

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, getattr(Net(), name))


def drawn_in_stages(rank: int, size: int, mesh: dict[str, int]) -> dict[str, torch.Tensor]:
    torch.manual_seed(5 + rank)  # only rank 0's seed counts
    with distributed.process_group(mesh=mesh) as here:
        names = ["second", "norm", "head"] if here.coordinates["pp"] else ["first"]
        with torch.device("meta"):
            stage = Named(names)
        options: dict[str, Any] = {}
        if "tp" in mesh:
            options["tensor_parallel"] = {name: style for name, style in plan().items() if name in names}
        return state_of(distributed.prepare_model(stage, parts="pp", **options))


@pytest.mark.parametrize("mesh", [{"pp": 2, "tp": 2}, {"pp": 2, "dp_shard": 2}, {"pp": 2, "dp": 2}], ids=str)
def test_stages_on_the_meta_device_get_the_weights_of_the_whole_model(mesh: dict[str, int]) -> None:
    torch.manual_seed(5)
    with torch.device("meta"):
        model: nn.Module = Net()
    expected = state_of(distributed.prepare_model(model, init_fn=initialise))
    seen: set[str] = set()
    for found in run_ranks(drawn_in_stages, 4, mesh):
        seen |= found.keys()
        for name, value in found.items():
            assert value.equal(expected[name]), name
    assert seen == expected.keys() - {"shift"}


def staged(rank: int, size: int) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with distributed.process_group(mesh={"pp": 2, "dp": 2}) as here:
        stage = here.coordinates["pp"]
        # Each stage has modules of its own, with as many weights as it likes; ranks of dp begin apart.
        torch.manual_seed(rank)
        layers = nn.ModuleDict({"0": nn.Linear(4, 4)} if stage == 0 else {"1": nn.Linear(4, 2), "2": nn.BatchNorm1d(2)})
        own = [each.detach().clone() for each in layers.parameters()]
        model = distributed.prepare_model(layers, "ddp", parts="pp")
        seen["kind"] = type(model).__name__
        seen["kept"] = [each.detach() for each in model.parameters()]
        seen["own"] = own
        for each in model.parameters():
            each.grad = torch.full_like(each, 1.0 + stage)
        seen["norm"] = float(distributed.clip_grad_norm_(model.parameters(), 1.0))
        if stage == 1:
            as_any(layers["2"]).running_mean.fill_(float(rank))
        with distributed.evaluating(model) as bare:
            seen["mean"] = [buffer.clone() for buffer in bare.buffers()][:1]
        # The model is not compared with that of the other stage when a run begins, either.
        from dengine import Engine

        Engine(lambda engine, batch: None).run([0])
        other = nn.Linear(2, 2 if rank != 3 else 3)
        try:
            distributed.prepare_model(other, parts="pp")
        except Exception as error:
            seen["other"] = f"{type(error).__name__}: {error}"
    return seen


def test_stages_of_a_pipeline_keep_their_own_weights() -> None:
    first, second, third, fourth = run_ranks(staged, 4)
    for one, two in ((first, second), (third, fourth)):
        for start, kept, other in zip(one["own"], one["kept"], two["kept"], strict=True):
            assert kept.equal(start)
            assert other.equal(start)
    numel = [20, 14]
    for seen in (first, second, third, fourth):
        assert seen["kind"] == "DistributedDataParallel"
        assert seen["norm"] == pytest.approx((numel[0] + 4 * numel[1]) ** 0.5, rel=1e-6)
        assert "ConsistencyError: The parameters of the model differ between ranks: rank 3" in seen["other"]
    assert fourth["mean"][0].equal(torch.full((2,), 2.0))


class Scaled(nn.Module):
    scale: Any

    def __init__(self) -> None:
        super().__init__()
        self.inner = net()
        self.register_buffer("scale", torch.arange(8.0))


def with_cut_buffer(rank: int, size: int, mesh: dict[str, int]) -> dict[str, Any]:
    from torch.distributed.tensor import Shard, distribute_tensor
    from torch.distributed.tensor.parallel import parallelize_module

    with distributed.process_group(mesh=mesh) as here:
        assert here.mesh is not None
        model = as_any(Scaled())
        parallelize_module(model.inner, here.mesh["tp"], plan())
        # Ranks begin apart along the dimensions of data, of which the first counts.
        first = torch.arange(8.0) + 10 * here.data_rank
        model.scale = distribute_tensor(first, here.mesh["tp"], [Shard(0)], src_data_rank=None)
        model = as_any(distributed.unwrap_model(distributed.prepare_model(model)))
        seen = {"prepared": model.scale.full_tensor()}
        model.scale.to_local().add_(here.data_rank)
        with distributed.evaluating(model) as bare:
            seen["judged"] = as_any(bare).scale.full_tensor()
        seen["after"] = model.scale.full_tensor() - here.data_rank
        try:
            create_supervised_evaluator(model, distributed=False)
        except ValueError as error:
            seen["alone"] = str(error)
        return seen


@pytest.mark.parametrize("mesh", [{"dp": 2, "tp": 2}, {"dp_shard": 2, "tp": 2}, {"tp": 4}], ids=str)
def test_a_buffer_that_is_cut_up_over_tp_keeps_its_parts(mesh: dict[str, int]) -> None:
    for seen in run_ranks(with_cut_buffer, 4, mesh):
        for when in ("prepared", "judged", "after"):
            assert seen[when].equal(torch.arange(8.0)), when
        assert "spread over the ranks" in seen["alone"]


def refused(rank: int, size: int) -> dict[str, str]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    seen: dict[str, str] = {}
    with distributed.process_group(mesh={"dp_shard": 2, "tp": 2}):
        model = net()
        before = dict(model.named_parameters())
        odd = nn.Sequential(nn.Linear(4, 3))
        for name, target, options in (
            ("name", model, {"tensor_parallel": {"frist": ColwiseParallel()}}),
            ("length", odd, {"tensor_parallel": {"0": ColwiseParallel()}}),
            ("layer", model, {"tensor_parallel": {"norm": RowwiseParallel()}}),
            ("style", model, {"tensor_parallel": {"first": "colwise"}}),
            ("plan", model, {"tensor_parallel": 3}),
            ("ddp", model, {"strategy": "ddp"}),
            ("parts", model, {"parts": "pp"}),
            ("init_fn", model, {"init_fn": initialise}),
            ("statistics", nn.Sequential(nn.Linear(4, 4), nn.SyncBatchNorm(4)), {}),
        ):
            try:
                distributed.prepare_model(target, **options)
            except Exception as error:
                seen[name] = f"{type(error).__name__}: {error}"
        now = dict(model.named_parameters())
        seen["same"] = str(type(model) is Net and all(now[name] is before[name] for name in before))
    return seen


def test_what_does_not_fit_is_refused_on_all_ranks_and_changes_nothing() -> None:
    for seen in run_ranks(refused, 4):
        assert "ValueError: tensor_parallel= names 'frist', but there is no such module" in seen["name"]
        assert "'first'" in seen["name"]
        assert "its length of 3 does not divide by 2" in seen["length"]
        assert "'norm', which is a LayerNorm" in seen["layer"]
        assert "TypeError: tensor_parallel['first'] must be a style" in seen["style"]
        assert "TypeError: tensor_parallel= takes a plan" in seen["plan"]
        assert "has the dimension dp_shard" in seen["ddp"]
        assert "there is none of that name" in seen["parts"]
        assert "has its values already" in seen["init_fn"]
        assert "'1' is a SyncBatchNorm over all ranks" in seen["statistics"]
        assert seen["same"] == "True"


def tied(rank: int, size: int) -> Any:
    with distributed.process_group():
        model: Any = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
        model[1].weight = model[0].weight
        model[0].weight.requires_grad_(True)
        own = model[0].weight.detach().clone()
        frozen = nn.Parameter(torch.ones(3) * rank, requires_grad=False)
        model[0].register_parameter("scale", frozen)
        prepared = distributed.prepare_model(model, "fsdp")
        is_tied = prepared[0].weight is prepared[1].weight
        found = [whole(each) for each in prepared.parameters()]
        prepared(torch.arange(6)).sum().backward()
        return is_tied, len(found), [each.requires_grad for each in prepared.parameters()], found, own


def test_tied_and_frozen_weights_stay_so_when_they_are_sharded() -> None:
    seen = run_ranks(tied, 2)
    for is_tied, num, requires, found, _ in seen:
        assert is_tied
        assert num == 2
        assert requires == [True, False]
        assert found[0].equal(seen[0][4])
        assert found[1].equal(torch.zeros(3))


def peak(rank: int, size: int, mesh: dict[str, int] | None) -> float:
    import resource

    from torch.distributed.tensor.parallel import ColwiseParallel

    num = 128
    options: dict[str, Any] = {"strategy": "fsdp"} if mesh is None else {}
    if mesh is not None and "tp" in mesh:
        options["tensor_parallel"] = {"*": ColwiseParallel()}
    with distributed.process_group(mesh=mesh):
        # What is imported and begun for any model.
        distributed.prepare_model(nn.Sequential(nn.Linear(4, 4)), **options)
        model = nn.Sequential(*[nn.Linear(512, 512, bias=False) for _ in range(num)])
        dist.barrier()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        distributed.prepare_model(model, **options)
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 / num  # in tensors of 1 MiB


@pytest.mark.parametrize(
    ("mesh", "part"),
    [
        (None, 0.25),
        ({"dp_shard": 2, "tp": 2}, 0.5),  # cut twice: on the CPU the first cuts leave holes as large as the parts
        ({"dp_replicate": 2, "dp_shard": 2}, 0.5),
        ({"dp": 2, "tp": 2}, 0.5),
        ({"tp": 4}, 0.25),
        ({"pp": 2, "tp": 2}, 0.5),
    ],
    ids=str,
)
def test_no_rank_needs_more_memory_than_for_its_part_and_one_tensor(mesh: dict[str, int] | None, part: float) -> None:
    for found in run_ranks(peak, 4, mesh):
        assert found < part + 0.1


def offloaded(rank: int, size: int) -> list[float]:
    from torch.distributed.fsdp import CPUOffloadPolicy

    with distributed.process_group() as here:
        model = distributed.prepare_model(net(), "fsdp", offload_policy=CPUOffloadPolicy())
        return [float(each.sum()) for each in train(model, lambda inputs: inputs.chunk(here.size)[here.rank]).values()]


def test_offloading_to_the_cpu_is_nothing_where_all_is_there() -> None:
    expected = [float(each.sum()) for each in train(net(), lambda inputs: inputs).values()]
    for found in run_ranks(offloaded, 2):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-5)
