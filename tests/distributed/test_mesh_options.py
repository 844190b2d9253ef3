"""What `prepare_model` says of meshes, plans and the meta device, in a run of one process."""

from typing import Any

import pytest
import torch
from torch import nn

from dengine import distributed


def on_meta(*layers: Any) -> nn.Sequential:
    with torch.device("meta"):
        return nn.Sequential(*[make() for make in layers])


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.empty(3))


def test_a_model_on_the_meta_device_is_initialised_by_its_own_modules() -> None:
    state = torch.random.get_rng_state()
    model = distributed.prepare_model(on_meta(lambda: nn.Linear(3, 4), lambda: nn.BatchNorm1d(4)))
    assert torch.random.get_rng_state().equal(state)
    found = model.state_dict()
    assert 0 < found["0.weight"].std() < 1
    assert found["0.weight"].abs().max() <= 3**-0.5
    assert found["1.running_var"].equal(torch.ones(4))
    assert found["1.num_batches_tracked"] == 0
    assert isinstance(found["0.weight"], torch.Tensor)


def test_the_seed_and_the_name_decide_upon_the_weights() -> None:
    def drawn(seed: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)
        model = distributed.prepare_model(on_meta(lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 3)))
        return dict(model.state_dict())

    first, again, other = drawn(1), drawn(1), drawn(2)
    assert first["0.weight"].equal(again["0.weight"])
    assert not first["0.weight"].equal(other["0.weight"])
    assert not first["0.weight"].equal(first["1.weight"])


def test_tied_weights_stay_tied_and_frozen_ones_frozen() -> None:
    model = on_meta(lambda: nn.Linear(3, 3), lambda: nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    distributed.prepare_model(model)
    assert model[0].weight is model[1].weight
    assert not model[0].bias.requires_grad
    assert model[0].weight.requires_grad


def test_a_module_that_cannot_initialise_itself_is_named_with_the_way_out() -> None:
    model = on_meta(lambda: nn.Linear(3, 3), Scale)
    with pytest.raises(ValueError, match=r"'1\.factor' is on the meta device, but its Scale has no .* init_fn="):
        distributed.prepare_model(model)
    assert model[0].weight.is_meta

    def fill(module: Any) -> None:
        if isinstance(module, Scale):
            module.factor.fill_(2.0)
        else:
            module.reset_parameters()

    distributed.prepare_model(model, init_fn=fill)
    assert model[1].factor.equal(torch.full((3,), 2.0))


def test_an_initialisation_of_a_model_that_has_its_values_is_refused() -> None:
    with pytest.raises(ValueError, match="has its values already"):
        distributed.prepare_model(nn.Linear(1, 1), init_fn=lambda module: None)


def test_a_plan_is_checked_in_a_run_of_one_process_and_changes_nothing() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    before = list(model.parameters())
    plan: Any = {"*": ColwiseParallel()}
    prepared = distributed.prepare_model(model, tensor_parallel=plan)
    assert prepared is model
    assert all(one is other for one, other in zip(before, model.parameters(), strict=True))
    for wrong in ({"2": RowwiseParallel()}, {"0.inner": RowwiseParallel()}):
        with pytest.raises(ValueError, match="there is no such module in this Sequential"):
            distributed.prepare_model(model, tensor_parallel=wrong)
    with pytest.raises(TypeError, match="takes a plan as torch's parallelize_module does"):
        distributed.prepare_model(model, tensor_parallel="colwise")  # type: ignore[arg-type]


def test_parts_are_the_stages_of_a_pipeline() -> None:
    model = nn.Linear(1, 1)
    assert distributed.prepare_model(model, parts="pp") is model
    with pytest.raises(ValueError, match="parts='tp' must be 'pp'"):
        distributed.prepare_model(model, parts="tp")  # type: ignore[arg-type]
