"""What does not fit a mesh is an error on all ranks, which names the one that differs, and soon."""

import math
import time
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tensors import whole_tensor
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler

from dengine import Engine, distributed
from dengine.errors import ConsistencyError

AT_MOST_S = 60.0  # far below the 1800 s of `timeout`, however busy the machine is

# What one rank asks for while the others ask for {"dp": -1}, its own error, and what the others are told of it.
MALFORMED: list[tuple[Any, str, str]] = [
    ({"data": -1}, "ValueError: ", "mesh={\"data\": -1} has a dimension 'data'"),
    ({"dp": -1, "tp": -1}, "ValueError: ", 'mesh={"dp": -1, "tp": -1} leaves 2 sizes open (dp, tp)'),
    ({"dp": 2.0}, "TypeError: ", "mesh['dp']=2.0 must be a whole number"),
    ({"dp": 0}, "ValueError: ", "mesh['dp']=0 must be at least 1"),
    ({}, "ValueError: ", "mesh={} has no dimension"),
    ("dp=-1", "TypeError: ", "mesh= takes the sizes of its dimensions by name"),
    ({"dp": -1, "tp": 1}, "LaunchError: ", 'mesh={"dp": -1, "tp": 1}'),
    (None, "LaunchError: ", "none"),
]


def opened(mesh: Any) -> str:
    begun = time.monotonic()
    try:
        with distributed.process_group(mesh=mesh):
            told = "opened"
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    assert time.monotonic() - begun < AT_MOST_S, f"{mesh} took {time.monotonic() - begun:.0f} s"
    return told


def asks_in_turn(rank: int, size: int, is_there: bool) -> list[str]:
    told = [opened(mesh if rank == number % size else {"dp": -1}) for number, (mesh, _, _) in enumerate(MALFORMED)]
    assert dist.is_initialized() == is_there, "the group is left open, or gone"
    return [*told, opened({"dp": -1})]


@pytest.mark.parametrize(("size", "is_there"), [(2, False), (3, True), (4, False)])
def test_a_mesh_that_is_none_on_one_rank_is_refused_on_all_and_the_rank_is_named(size: int, is_there: bool) -> None:
    found = run_ranks(asks_in_turn, size, is_there, init=is_there)
    for number, (_, own, text) in enumerate(MALFORMED):
        odd = number % size
        assert found[odd][number].startswith(own)
        assert text in found[odd][number]
        for rank in set(range(size)) - {odd}:
            told = found[rank][number]
            assert told.startswith("LaunchError: The ranks ask for different meshes (")
            assert f"rank {odd}: {text}" in told
    assert [each[-1] for each in found] == ["opened"] * size, "what was refused is in the way of the next one"


def asks_alike(rank: int, size: int) -> list[str]:
    return [opened(mesh) for mesh in ({"dp": 5}, {"dp": -1, "tp": 3}, {"tp": 2, "x": 2}, {"dp": -1, "pp": -1}, [2])]


def test_a_mesh_that_is_none_on_all_ranks_says_what_is_wrong_on_each() -> None:
    for told in run_ranks(asks_alike, 4, init=False):
        assert "of 5 ranks, but there are 4. What fits, with the other sizes as they are: dp=4." in told[0]
        assert "which does not divide the 4 there are. What fits, with the other sizes as they are: tp=1 or" in told[1]
        assert told[2].startswith('ValueError: mesh={"tp": 2, "x": 2} has a dimension \'x\'')
        assert told[3].startswith("ValueError: ")
        assert told[4].startswith("TypeError: ")


def passes_meshes_of_torch(rank: int, size: int) -> list[str]:
    grid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    first = DeviceMesh("cpu", [0, 1], mesh_dim_names=("dp",))
    meshes = [
        first,
        grid["tp"],
        init_device_mesh("cpu", (4,)),
        init_device_mesh("cpu", (4,), mesh_dim_names=("x",)),
        grid if rank else None,
    ]
    told = [opened(mesh) for mesh in meshes]
    with distributed.process_group(mesh=grid) as here:
        return [*told, f"{here.coordinates} {here.data_rank} {here.data_size}"]


def test_a_mesh_of_torch_must_be_of_all_ranks_and_have_names_that_say_what_they_share() -> None:
    for rank, told in enumerate(run_ranks(passes_meshes_of_torch, 4)):
        assert "of 2 ranks, but there are 4, and it needs them all" in told[0]
        assert "of 2 ranks, but there are 4, and it needs them all" in told[1]
        assert "without names, which say what its ranks share" in told[2]
        assert "a dimension 'x', but the names are data: dp" in told[3]
        assert "The ranks ask for different meshes (rank 0: none; ranks 1, 2, 3: mesh=" in told[4]
        assert told[5] == f"{{'dp': {rank // 2}, 'tp': {rank % 2}}} {rank // 2} 2"


# -- models ------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, width: int = 8, device: str | None = None) -> None:
        super().__init__()
        self.first = nn.Linear(4, width, device=device)
        self.second = nn.Linear(width, 4, device=device)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.second(self.first(inputs).tanh())


def plan(*names: str) -> dict[str, Any]:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {name: RowwiseParallel() if "second" in name else ColwiseParallel() for name in names}


def prepared_wrongly() -> list[tuple[str, Any, dict[str, Any], str]]:
    """A case, the model and the options that one rank prepares it with, and what it says itself."""
    return [
        ("no module", "a net", {}, "TypeError: prepare_model() takes a torch.nn.Module, but got str"),
        ("name", Net(), {"tensor_parallel": plan("frist")}, "names 'frist', but there is no such module"),
        ("length", Net(9), {"tensor_parallel": plan("first", "second")}, "its length of 9 does not divide by 2"),
        ("strategy", Net(), {"strategy": "all"}, "strategy='all' must be one of auto, ddp, fsdp, none"),
        ("init_fn", Net(), {"init_fn": print}, "init_fn= initialises models on the meta device"),
        ("parts", Net(), {"parts": "pp"}, "there is none of that name"),
        ("blocks", Net(), {"blocks": [nn.GRU], "activation_checkpointing": True}, "There is no GRU in this Net"),
        ("meta", nn.Sequential(Bare()), {}, "no reset_parameters()"),
        ("shapes", Net(10), {"tensor_parallel": plan("first", "second")}, "ConsistencyError: "),
        ("no plan", Net(), {}, "ConsistencyError: "),
    ]


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, device="meta"))


def prepare_in_turn(rank: int, size: int) -> tuple[dict[str, str], list[str], Any]:
    told: dict[str, str] = {}
    changed: list[str] = []
    with distributed.process_group(mesh={"dp_shard": -1, "tp": 2}):
        for number, (name, wrong, options, _) in enumerate(prepared_wrongly()):
            model: Any = wrong if rank == number % size else Net()
            before = contents(model)
            begun = time.monotonic()
            try:
                given = options if rank == number % size else {"tensor_parallel": plan("first", "second")}
                distributed.prepare_model(model, **given)
                told[name] = "prepared"
            except Exception as error:
                told[name] = f"{type(error).__name__}: {error}"
            assert time.monotonic() - begun < AT_MOST_S, f"{name} took {time.monotonic() - begun:.0f} s"
            if contents(model) != before:
                changed.append(name)
        model = distributed.prepare_model(Net(), tensor_parallel=plan("first", "second"))
        # The output is awaited by whatever is done with it, but not by pickling it.
        return told, changed, whole_tensor(model(torch.ones(1, 4))).detach().clone()


def contents(model: Any) -> Any:
    """All that a model is made of, as far as a program can see: classes, tables, tensors by their identity."""
    if not isinstance(model, nn.Module):
        return model
    return [
        (type(module), {name: list(value.items()) if isinstance(value, dict) else value for name, value in found})
        for module in model.modules()
        for found in [vars(module).items()]
    ]


@pytest.mark.parametrize("size", [2, 4])
def test_what_does_not_fit_on_one_rank_is_refused_on_all_and_nothing_is_changed(size: int) -> None:
    found = run_ranks(prepare_in_turn, size, init=False)
    for number, (name, _, _, text) in enumerate(prepared_wrongly()):
        odd = number % size
        assert text in found[odd][0][name]
        for rank in set(range(size)) - {odd}:
            told = found[rank][0][name]
            assert told.startswith("ConsistencyError: ")
            if size > 2:
                assert f"differ between ranks: rank {odd} has" in told
            assert f"rank {odd} has" in told
            assert ("ConsistencyError" in text) or text.partition(": ")[2] in told or text in told, told
    assert [changed for _, changed, _ in found] == [[]] * size
    assert all(output.equal(found[0][2]) for _, _, output in found)


class Fickle(nn.Linear):
    """Cannot be initialised at first."""

    is_ready = False

    def reset_parameters(self) -> None:
        if not (self.is_ready or self.weight.is_meta):
            raise ArithmeticError("no numbers left")
        super().reset_parameters()


def with_an_unknown_option(rank: int, size: int) -> list[str]:
    told = []
    with distributed.process_group():
        for options in ([] if rank == 0 else ["unheard_of"], ["unheard_of"]):
            try:
                distributed.prepare_model(Net(), "ddp", **cast("Any", dict.fromkeys(options, 1)))
            except (TypeError, ConsistencyError) as error:
                told.append(f"{type(error).__name__}: {error}")
    return told


def test_an_option_that_ddp_does_not_know_is_refused_before_anything_is_sent() -> None:
    first, second = run_ranks(with_an_unknown_option, 2, init=False)
    text = "TypeError: DistributedDataParallel() takes no unheard_of: its options are "
    assert first[0].startswith("ConsistencyError: The arguments of prepare_model() differ between ranks: rank 1 has")
    assert all(told.startswith(text) for told in (second[0], second[1], first[1]))


def initialised_in_vain(rank: int, size: int, mesh: dict[str, int], options: dict[str, Any]) -> list[Any]:
    found: list[Any] = []
    with distributed.process_group(mesh=mesh) as here:
        model: Any = nn.Sequential(Net(device="meta"), Fickle(4, 4, device="meta"), nn.BatchNorm1d(4))
        calls: list[int] = []
        model[0].register_forward_hook(lambda *_: calls.append(1))
        handle = model.register_forward_hook(lambda *_: calls.append(2))
        if "tp" in mesh:
            options["tensor_parallel"] = plan("0.first", "0.second")
        before = contents(model)
        for _ in range(2):
            try:
                distributed.prepare_model(model, **options)
            except ArithmeticError as error:
                found.append(str(error))
            found.append(contents(model) == before)
        handle.remove()
        model[1].is_ready = True
        torch.manual_seed(4)
        prepared = distributed.prepare_model(model, **options)
        optimizer = torch.optim.SGD(prepared.parameters(), lr=0.5)
        for _ in range(2):
            inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(1))
            prepared(inputs.chunk(here.data_size)[here.data_rank]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        bare = distributed.unwrap_model(prepared)
        found.append({name: whole_tensor(value.detach()) for name, value in bare.named_parameters()})
        found.append(calls)
    return found


@pytest.mark.parametrize(
    ("mesh", "options"),
    [
        ({"dp_shard": 2}, {"blocks": [Net]}),
        ({"tp": 2}, {}),
        ({"dp": 1, "tp": 2}, {}),
        ({"dp": 2}, {"blocks": [Net], "activation_checkpointing": True}),
    ],
    ids=str,
)
def test_a_model_that_cannot_be_initialised_is_as_it_was_and_can_be_prepared_later(
    mesh: dict[str, int], options: dict[str, Any]
) -> None:
    first, second = run_ranks(initialised_in_vain, 2, mesh, options, init=False)
    assert first[:4] == ["no numbers left", True] * 2
    assert first[5] == [1] * 2, "hooks of the user's are lost, or cannot be removed"
    for name, value in first[4].items():
        assert value.equal(second[4][name]), name
        assert value.isfinite().all()


# -- data --------------------------------------------------------------------------------------------------------


def one_has_another_sampler(rank: int, size: int, mesh: dict[str, int], is_prepared: bool) -> None:
    data: Any = range(12)
    with distributed.process_group(mesh=mesh) as here:
        if rank == 1:  # takes all ranks for parts of the data
            loader = DataLoader(data, sampler=DistributedSampler(data, num_replicas=size, rank=rank))
        else:
            place: dict[str, Any] = {"num_replicas": here.data_size, "rank": here.data_rank}
            loader = DataLoader(data, sampler=distributed.ElasticSampler(data, **place))
        loader = distributed.prepare_data_loader(loader) if is_prepared else loader
        Engine(lambda engine, batch: None).run(loader)


@pytest.mark.parametrize(
    ("mesh", "is_prepared"), [({"tp": 2}, True), ({"dp": 1, "cp": 3}, False), ({"dp": 2, "tp": 2}, False)], ids=str
)
def test_a_sampler_that_fits_no_mesh_on_one_rank_ends_all_and_the_rank_is_named(
    mesh: dict[str, int], is_prepared: bool
) -> None:
    size = math.prod(mesh.values())
    outcomes = run_ranks(one_has_another_sampler, size, mesh, is_prepared, init=False, expect_failures=True)
    place = ", ".join(f"{name}={int(name == list(mesh)[-1])}" for name in mesh)
    for outcome in outcomes:
        assert f"This loader has a DistributedSampler for rank 1 of {size}, but this is rank 1" in outcome.error_message
        assert f"on a mesh ({place}), which is given part 0 of {mesh.get('dp', 1)}" in outcome.error_message
        assert outcome.error_type == ("ValueError" if outcome.rank == 1 else "RemoteRankError"), outcome
        assert outcome.seconds < AT_MOST_S
