"""Checkpoints of models of which ranks have different parts: nothing is lost, and every layout gets it back."""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tensors import whole_tensor
from torch import nn

from dengine import Engine, Events, distributed
from dengine.__main__ import main
from dengine.checkpoint import load, save, verify
from dengine.checkpoint.formats.sharded.files import METADATA, read_body, write_body
from dengine.checkpoint.formats.sharded.plan import read_shards, write_shards
from dengine.checkpoint.states.replicas import prints_of
from dengine.errors import CheckpointError
from dengine.handlers import EMA, Checkpoint, LRScheduler

Bits = dict[str, bytes]
NUM_LAYERS, WIDTH = 4, 6


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)) for _ in range(NUM_LAYERS)]


class Layers(nn.ModuleDict):
    def forward(self, batch: int) -> torch.Tensor:
        loss = torch.zeros(())
        for number, layer in enumerate(self.values()):
            inputs = torch.rand(5, WIDTH, generator=torch.Generator().manual_seed(100 * batch + number))
            loss = loss + layer(inputs).square().sum()
        return loss


def stage_of(index: int, num_stages: int, is_named: bool) -> nn.Module:
    """Some of the layers: by the names that they have in the whole model, or by names that all stages have."""
    each = NUM_LAYERS // num_stages
    own = dict(enumerate(layers()))
    numbers = range(index * each, (index + 1) * each)
    return Layers({f"layer{number if is_named else number % each}": own[number] for number in numbers})


def objects_of(model: nn.Module) -> dict[str, Any]:
    """Groups with options of their own, as many as there are layers: a stage has some of them."""
    inner = distributed.unwrap_model(model)
    groups: list[dict[str, Any]] = [{"params": list(layer.parameters())} for layer in inner.children()]
    optimizer = torch.optim.AdamW(groups, lr=0.1)

    def step(engine: Engine, batch: int) -> None:
        optimizer.zero_grad()
        model(batch).backward()
        optimizer.step()

    return {"model": model, "optimizer": optimizer, "ema": EMA(model), "trainer": Engine(step)}


def tensors_of(objects: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All of this rank's: of parts that are sharded, the whole ones. Collective."""
    inner = distributed.unwrap_model(objects["model"])
    found: dict[str, Any] = {f"model/{name}": value for name, value in inner.state_dict().items()}
    found |= {f"ema/{name}": value for name, value in objects["ema"].model.state_dict().items()}
    for name, parameter in inner.named_parameters():
        found |= {f"optimizer/{name}/{key}": value for key, value in objects["optimizer"].state[parameter].items()}
    return {name: whole_tensor(value.detach()).clone() for name, value in found.items()}


def bits_of(objects: Mapping[str, Any]) -> Bits:
    return {name: value.contiguous().numpy().tobytes() for name, value in tensors_of(objects).items()}


def prepared(mesh: Any, is_named: bool) -> dict[str, Any]:
    stage = stage_of(mesh.coordinates["pp"], mesh.mesh["pp"].size(), is_named)
    return objects_of(distributed.prepare_model(stage, parts="pp"))


def trained(objects: Mapping[str, Any], folder: Path, **options: Any) -> Checkpoint:
    checkpoint = Checkpoint(objects, folder, n_saved=None, **options)
    objects["trainer"].on(Events.ITERATION_COMPLETED, objects["ema"])
    objects["trainer"].on(Events.ITERATION_COMPLETED, checkpoint)
    objects["trainer"].run([1, 2])
    return checkpoint


MESHES: list[dict[str, int]] = [{"pp": 2, "dp": 2}, {"dp_shard": 2, "pp": 2}, {"pp": 4}]


def saved(rank: int, size: int, folder: Path) -> dict[str, Bits]:
    """On each mesh, with names of their own and with the same, twice: the second save has the plan of the first."""
    found = {}
    for number, mesh in enumerate(MESHES):
        with distributed.process_group(mesh=mesh) as here:
            for is_named in (True, False):
                objects = prepared(here, is_named)
                key = f"{number}{is_named}"
                checkpoint = trained(objects, folder / key, asynchronous=number == 1)
                assert checkpoint.last_path == folder / key / "checkpoint_2", checkpoint.last_path
                found[key] = bits_of(objects)
                fresh = prepared(here, is_named)
                assert Checkpoint.resume(folder / key, fresh) == folder / key / "checkpoint_2"
                assert bits_of(fresh) == found[key], key
                assert fresh["trainer"].state.iteration == 2
    return found


def loaded(rank: int, size: int, folder: Path) -> list[Bits]:
    """What other meshes, and four plain processes, have saved, in stages of other meshes."""
    found = []
    for mesh, keys in ((MESHES[0], ("1True", "whole")), (MESHES[1], ("2True",)), (MESHES[2], ("0True",))):
        with distributed.process_group(mesh=mesh) as here:
            for key in keys:
                objects = prepared(here, is_named=True)
                path = folder / key / "checkpoint_2" if key != "whole" else folder / key
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # one process has saved fewer generators
                    load(path, objects)
                found.append(bits_of(objects))
    return found


def whole_objects() -> dict[str, Any]:
    return objects_of(Layers({f"layer{number}": layer for number, layer in enumerate(layers())}))


def test_stages_come_back_in_every_layout_bit_for_bit(tmp_path: Path) -> None:
    of_ranks = run_ranks(saved, 4, tmp_path, deadline_s=150)
    unions: dict[str, Bits] = {}
    for key in of_ranks[0]:
        verify(tmp_path / key / "checkpoint_2")
        if key.endswith("True"):
            unions[key] = {name: value for found in of_ranks for name, value in found[key].items()}
            objects = whole_objects()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of other generators
                load(tmp_path / key / "checkpoint_2", objects)
            assert bits_of(objects) == unions[key], key
            assert [group["lr"] for group in objects["optimizer"].param_groups] == [0.1] * NUM_LAYERS
        else:
            model = read_shards(tmp_path / key / "checkpoint_2")["model"]
            name = "layer0.0.weight"
            for rank, found in enumerate(of_ranks):
                stage = {"0": rank // 2, "1": rank % 2, "2": rank}[key[0]]
                assert model[f"pp={stage}/{name}"].numpy().tobytes() == found[key][f"model/{name}"]
    save(tmp_path / "whole", objects)
    for rank, found in enumerate(run_ranks(loaded, 4, tmp_path, deadline_s=100)):
        for bits, key in zip(found, ("1True", key_of_whole(unions), "2True", "0True"), strict=True):
            assert bits == {name: unions[key][name] for name in bits}, (rank, key)
            assert len(bits) >= len(unions[key]) // 4


def key_of_whole(unions: Mapping[str, Bits]) -> str:
    return list(unions)[-1]  # which was loaded last


# -- what several parts have by one name ------------------------------------------------------------------------

TABLE = 7  # of a first and a last stage; its place among the layers


def numbered(here: Any, is_new: bool) -> dict[str, Any]:
    """Layers and a table whose elements, and the momentum of those that are stepped, tell which they are."""
    index, num_stages = here.coordinates["pp"], here.mesh["pp"].size()
    own = range(index * NUM_LAYERS // num_stages, (index + 1) * NUM_LAYERS // num_stages)
    numbers = {f"layer{number}": number for number in own}
    if index in (0, num_stages - 1):
        numbers["table"] = TABLE
    model = Layers()
    for name, number in numbers.items():
        model[name] = layer = nn.Linear(2, 2, bias=False)
        nn.init.constant_(layer.weight, -1 if is_new else number)
        layer.weight.grad = torch.full((2, 2), number + 10.0)
    stage = distributed.prepare_model(model, parts="pp")
    optimizer = torch.optim.SGD(stage.parameters(), lr=0.0, momentum=0.9)
    return {"model": stage, "optimizer": optimizer}


def seen(objects: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    state = objects["optimizer"].state
    return {
        name.removeprefix("module.").split(".")[0]: (
            float(weight.flatten()[0].detach()),
            float(state[weight]["momentum_buffer"].sum()) / 4 if weight in state else 0.0,
        )
        for name, weight in objects["model"].named_parameters()
    }


def with_tied_tables(rank: int, size: int, folder: Path) -> list[dict[str, tuple[float, float]]]:
    found = []
    for source, target in ((MESHES[0], MESHES[2]), (MESHES[2], MESHES[0])):
        for is_stepped in (True, False):
            path = folder / f"tied_{source['pp']}_{is_stepped}"
            with distributed.process_group(mesh=source) as here:
                objects = numbered(here, is_new=False)
                if is_stepped:
                    objects["optimizer"].step()
                save(path, objects)
            with distributed.process_group(mesh=target) as here:
                objects = numbered(here, is_new=True)
                load(path, objects)
                found.append(seen(objects))
    return found


def test_tied_tables_go_to_any_number_of_stages_with_their_optimizer(tmp_path: Path) -> None:
    for rank, (of_four, of_four_new, of_two, of_two_new) in enumerate(run_ranks(with_tied_tables, 4, tmp_path)):
        numbers = {f"layer{rank}": rank, **({"table": TABLE} if rank in (0, 3) else {})}
        assert of_four == {name: (number, number + 10) for name, number in numbers.items()}, rank
        assert of_four_new == {name: (number, 0) for name, number in numbers.items()}, rank
        first = 2 * (rank // 2)
        numbers = {f"layer{first}": first, f"layer{first + 1}": first + 1, "table": TABLE}
        assert of_two == {name: (number, number + 10) for name, number in numbers.items()}, rank
        assert of_two_new == {name: (number, 0) for name, number in numbers.items()}, rank


def with_own_groups(rank: int, size: int, folder: Path) -> tuple[list[float], str, float]:
    """Rates of a schedule that was loaded, what a stage of two says to those of four, and its weight then."""
    with distributed.process_group(mesh=MESHES[2]):

        def objects() -> dict[str, Any]:
            stage = distributed.prepare_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), parts="pp")
            nn.init.constant_(stage[0].weight, float(rank))
            groups: list[dict[str, Any]] = [{"params": stage[0].parameters(), "lr": 8.0 + rank}]
            groups += [{"params": stage[1].parameters(), "lr": 4.0}] if rank < 2 else []
            optimizer = torch.optim.SGD(groups)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
            return {"model": stage, "optimizer": optimizer, "schedule": LRScheduler(schedule), "bare": schedule}

        saved = objects()
        saved["bare"].step()
        save(folder / "groups", saved)
        fresh = objects()
        load(folder / "groups", fresh)
        fresh["bare"].step()
        rates = [group["lr"] for group in fresh["optimizer"].param_groups]
    with distributed.process_group(mesh=MESHES[0]):
        stage = distributed.prepare_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), parts="pp")
        nn.init.constant_(distributed.unwrap_model(stage)[0].weight, -1.0)
        try:
            load(folder / "groups", {"model": stage})
        except CheckpointError as error:
            return rates, str(error), float(distributed.unwrap_model(stage)[0].weight[0, 0])
    return rates, "loaded", 0.0


def as_two_stages(rank: int, size: int, folder: Path) -> str:
    """Fewer ranks than have saved: none of them was given the documents of all."""
    with distributed.process_group(mesh={"pp": 2}):
        stage = distributed.prepare_model(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), parts="pp")
        try:
            load(folder / "groups", {"model": stage})
        except CheckpointError as error:
            return str(error)
    return "loaded"


def test_schedules_and_names_of_several_parts_go_to_the_same_parts_alone(tmp_path: Path) -> None:
    for rank, (rates, message, weight) in enumerate(run_ranks(with_own_groups, 4, tmp_path)):
        assert rates == [(8.0 + rank) / 4, 1.0][: len(rates)], rank
        assert len(rates) == (2 if rank < 2 else 1)
        assert "0.weight" in message, message  # two of the four would have been left out
        assert weight == -1.0, rank  # as it was
    for message in run_ranks(as_two_stages, 2, tmp_path):
        assert "0.weight" in message, message


class Tipped(nn.ModuleDict):
    """Layers by their own names, and on some stages a tip, by a name that these have in common."""

    def __init__(self, index: int, num_stages: int, value: float) -> None:
        own = range(index * NUM_LAYERS // num_stages, (index + 1) * NUM_LAYERS // num_stages)
        names = [f"layer{number}" for number in own] + ["tip"] * (index < 2)
        super().__init__({name: nn.Linear(1, 1, bias=False) for name in names})
        for each in self.parameters():
            nn.init.constant_(each, value)


def of_fewer_stages(rank: int, size: int, folder: Path) -> list[tuple[str, float, list[str]]]:
    """Of two stages, loaded by four of which the last two have no tip: what is said, the tip then, what is left out."""
    with distributed.process_group(mesh=MESHES[0]) as here:
        index = here.coordinates["pp"]
        save(folder / "two", {"model": distributed.prepare_model(Tipped(index, 2, 10.0 + index), parts="pp")})
        if rank == 0:
            shutil.copytree(folder / "two", folder / "of_before")
            body = read_body(folder / "of_before" / METADATA)
            assert body["index"].pop("mesh") == {"pp": 2, "dp": 2}, body
            (folder / "of_before" / METADATA).unlink()
            write_body(folder / "of_before" / METADATA, body)
        distributed.barrier()
        again = distributed.prepare_model(Tipped(index, 2, 0.0), parts="pp")
        load(folder / "of_before", {"model": again})
        assert {float(each) for each in again.parameters()} == {10.0 + index}, index
    found = []
    with distributed.process_group(mesh=MESHES[2]):
        for name, is_partial in (
            ("two", False),
            ("two", True),
            ("of_before", False),
            ("of_before", True),
            ("whole_1.pt", False),
            ("imported", False),
        ):
            stage = distributed.prepare_model(Tipped(rank, 4, -1.0), parts="pp")
            message, left = "loaded", None
            try:
                left = load(folder / name, {"model": stage}, partial=is_partial)
            except CheckpointError as error:
                message = str(error)
            tip = next((float(each) for key, each in stage.named_parameters() if "tip" in key), -1.0)
            found.append((message, tip, left.missing_keys if left else []))
    return found


def test_a_stage_of_two_is_not_taken_for_one_of_four(tmp_path: Path) -> None:
    whole = nn.ModuleDict(
        {name: nn.Linear(1, 1, bias=False) for name in ("layer0", "layer1", "layer2", "layer3", "tip")}
    )
    for each in whole.parameters():
        nn.init.constant_(each, 3.0)
    save(tmp_path / "whole_1.pt", {"model": whole})
    assert main(["import", str(tmp_path / "whole_1.pt"), "-o", str(tmp_path / "imported")]) == 0
    for rank, found in enumerate(run_ranks(of_fewer_stages, 4, tmp_path)):
        *found, (of_file, tip, _), imported = found
        assert "whole_1.pt could not be loaded on rank 0 of 4, and every object is as it was" in of_file
        assert "a file with the whole of 'model', of which this rank has a part (pp=0)" in of_file
        assert tip == -1.0
        assert imported == ("loaded", 3.0 if rank < 2 else -1.0, [])
        assert [tip for _, tip, _ in found] == [-1.0] * 4, rank
        (strict, *_), (partial, _, left), (old, *_), (old_partial, *_) = found
        assert "'model/tip.weight' of this rank's part (pp=0) is not in it: it was saved of other parts" in strict
        assert partial == "loaded"
        assert left == (["model/tip.weight"] if rank < 2 else [])
        for message in (old, old_partial):
            assert "does not say how many parts" in message, message
            assert "'model/tip.weight'" in message


# -- what would be lost ------------------------------------------------------------------------------------------


def refused(rank: int, size: int, folder: Path) -> list[str]:
    messages = []

    def refuses(action: Any) -> None:
        try:
            action()
            messages.append("saved")
        except CheckpointError as error:
            messages.append(str(error))

    with distributed.process_group(mesh={"pp": 2}) as here:
        objects = prepared(here, is_named=True)
        refuses(lambda: save(folder / "c_1.pt", {"model": objects["model"]}))
        mistaken = objects if rank == 0 else {**objects, "model": stage_of(0, 2, True)}
        refuses(lambda: save(folder / "c_1", {"model": mistaken["model"]}))
    refuses(lambda: save(folder / "c_1", {"model": nn.Linear(2 + rank, 2)}))
    refuses(lambda: write_shards(folder / "c_1", {"a": {"x": torch.ones(2 + rank)}}))
    return messages


def test_what_differs_and_is_not_declared_is_refused_by_name_with_two_ranks(tmp_path: Path) -> None:
    first, second = run_ranks(refused, 2, tmp_path, deadline_s=60)
    assert first == second
    file, mistaken, shapes, bare = first
    assert "ranks have different parts of a model" in file
    assert "a path without an ending" in file
    assert "'model/layer0.0.weight'" in mistaken
    assert "rank 0" in mistaken
    assert "rank 1" in mistaken
    assert "'model/weight' of rank 1 is not that of rank 0" in shapes
    assert "parts=" in shapes
    assert "'a/x' is ((2,), 'float32') on rank 0 and ((3,), 'float32') on rank 1" in bare
    assert list(tmp_path.iterdir()) == []


def union_of_names(rank: int, size: int, folder: Path) -> Bits:
    """Nobody has declared anything, but no name is on two ranks."""
    states = {"a": {f"x{rank}": torch.full((2,), float(rank)), "same": torch.ones(1), "lr": rank}, f"b{rank}": {"n": 1}}
    write_shards(folder / "union", states)
    return {}


def test_the_names_are_the_union_over_the_ranks(tmp_path: Path) -> None:
    run_ranks(union_of_names, 3, tmp_path, deadline_s=60)
    states = read_shards(tmp_path / "union")
    assert [float(states["a"][f"x{rank}"][0]) for rank in range(3)] == [0, 1, 2]
    assert (sorted(states), states["a"]["lr"]) == (["a", "b0", "b1", "b2"], 0)


def num_prints(rank: int, size: int) -> tuple[int, int]:
    """What ranks send each other of each parameter at a save: of a model of the mesh, and of one laid out by hand."""
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    with distributed.process_group(mesh={"dp": 2, "tp": 2}) as here:
        layers = [nn.Sequential(nn.Linear(4, 4)) for _ in range(2)]
        prepared_one = distributed.prepare_model(layers[0], tensor_parallel={"0": ColwiseParallel()})
        assert here.mesh is not None
        by_hand = parallelize_module(layers[1], here.mesh["tp"], {"0": ColwiseParallel()})
        return len(prints_of({"model": prepared_one})), len(prints_of({"model": by_hand})["model"])


def test_ranks_send_no_digest_of_each_parameter_of_a_prepared_model() -> None:
    assert run_ranks(num_prints, 4, deadline_s=60) == [(0, 2)] * 4


# -- replicas ----------------------------------------------------------------------------------------------------


def diverged(rank: int, size: int, folder: Path, sizes: tuple[int, ...]) -> int:
    """Replicas whose values are their own number, by mistake."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    replica = mesh.get_local_rank("replica")
    local = torch.full((3, 2), float(replica))
    whole, placements = (mesh, [Replicate(), Shard(0)]) if sizes else (mesh["shard"], [Shard(0)])
    tensors = {f"x{number}": DTensor.from_local(local, whole, placements) for number in range(5)}
    write_shards(folder / f"of_{len(sizes)}", {"model": tensors})
    return replica


@pytest.mark.parametrize("sizes", [(2, 2), ()], ids=["hsdp", "beside"])
def test_all_pieces_of_a_tensor_are_of_one_replica(tmp_path: Path, sizes: tuple[int, ...]) -> None:
    run_ranks(diverged, 4, tmp_path, sizes, deadline_s=60)
    found = read_shards(tmp_path / f"of_{len(sizes)}")["model"]
    values = {name: set(tensor.flatten().tolist()) for name, tensor in found.items()}
    assert all(len(each) == 1 for each in values.values()), values
    assert {value for each in values.values() for value in each} == {0, 1}  # which share the work
