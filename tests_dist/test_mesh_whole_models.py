"""Models that no mesh cuts up, and those that the ready-made trainer refuses: one process's numbers, or an error."""

from math import prod
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tensors import whole_parameters
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from dengine import Events, create_supervised_evaluator, create_supervised_trainer, distributed
from dengine.handlers import ConsistencyCheck
from dengine.metrics import Accuracy, Loss

MESHES: list[dict[str, int]] = [
    {"tp": 4},
    {"dp": 2, "tp": 2},
    {"tp": 2, "dp": 2},
    {"cp": 2, "tp": 2},
    {"pp": 4},
    {"pp": 2, "dp": 2},
    {"pp": 2, "tp": 2},
    {"ep": 4},
]


def net(seed: int = 0) -> Any:
    torch.manual_seed(seed)
    norm: Any = nn.BatchNorm1d(8)
    nn.init.normal_(norm.running_mean)
    return nn.Sequential(nn.Linear(6, 8), norm.eval(), nn.Tanh(), nn.Linear(8, 3))


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(22, 6, generator=generator), torch.randint(3, (22,), generator=generator))


def trained(model: nn.Module, num_parts: int) -> dict[str, Any]:
    """Weights and metrics after two epochs over uneven shards."""
    loader = DataLoader(samples(), batch_size=8 // num_parts, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    trainer = create_supervised_trainer(model, optimizer, nn.functional.cross_entropy, max_grad_norm=0.3)
    trainer.on(Events.EPOCH_COMPLETED, ConsistencyCheck(model, optimizer))
    trainer.run(distributed.prepare_data_loader(loader, exact=True, seed=3), max_epochs=2)
    evaluator = create_supervised_evaluator(model, {"acc": Accuracy(), "loss": Loss(nn.functional.cross_entropy)})
    found = evaluator.run(distributed.prepare_data_loader(loader, exact=True))
    return {"weights": whole_parameters(model), "metrics": dict(found.metrics)}


def trained_apart(rank: int, size: int) -> list[dict[str, Any]]:
    found = []
    for mesh in MESHES:
        for is_prepared in (True, False):
            with distributed.process_group(mesh=mesh) as here:
                model = net(seed=rank)  # only rank 0's counts
                if is_prepared:
                    model = distributed.prepare_model(model)
                found.append(trained(model, here.data_size))
    return found


def test_a_model_that_is_not_cut_up_is_the_same_on_all_ranks_of_a_mesh() -> None:
    expected = trained(net(), 1)
    for of_rank in run_ranks(trained_apart, 4, deadline_s=120):
        for case, found in enumerate(of_rank):
            mesh = MESHES[case // 2]
            assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6), mesh
            for name, value in expected["weights"].items():
                assert_close(found["weights"][name], value, rtol=1e-6, atol=1e-6, msg=f"{name} on {mesh}")


def refused(rank: int, size: int, mesh: dict[str, int], kind: str) -> list[str]:
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    seen = []
    with distributed.process_group(mesh=mesh) as here:
        model = net()
        if kind == "stage":
            model = distributed.prepare_model(model, parts="pp")
        elif kind == "by hand":
            assert here.mesh is not None
            parallelize_module(model, here.mesh["tp"], {"0": ColwiseParallel()})
        before = list(model.parameters())
        for make in (
            lambda: create_supervised_trainer(model, torch.optim.SGD(model.parameters(), lr=0.5), nn.MSELoss()),
            lambda: create_supervised_evaluator(model),
        ):
            try:
                make()
            except ValueError as error:
                seen.append(str(error))
        seen.append(str(all(one is other for one, other in zip(before, model.parameters(), strict=True))))
    return seen


@pytest.mark.parametrize(
    ("mesh", "kind", "words", "num"),
    [
        ({"dp_shard": 2}, "bare", "puts other parameters in the place of those of this Sequential", 1),
        ({"dp": 2, "tp": 2}, "by hand", "puts other parameters in the place of those of this Sequential", 1),
        ({"pp": 2}, "stage", "is a stage of a pipeline", 2),
    ],
)
def test_the_ready_made_trainer_refuses_what_it_could_not_train(
    mesh: dict[str, int], kind: str, words: str, num: int
) -> None:
    for *errors, is_same in run_ranks(refused, prod(mesh.values()), mesh, kind):
        assert len(errors) == num
        assert all(words in error for error in errors)
        assert is_same == "True"
