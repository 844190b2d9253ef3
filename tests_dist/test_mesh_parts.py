"""Which tensors of a state are a part of a model along a dimension of the mesh."""

from typing import Any

import torch
from ranks import run_ranks
from torch import nn

from dengine import distributed
from dengine.comm.parts import parts_of_names, parts_of_optimizer
from dengine.handlers import EMA


def parts_of_a_stage(rank: int, size: int) -> list[Any]:
    with distributed.process_group(mesh={"pp": size}):
        shared, stage = nn.Linear(1, 1), nn.Sequential(nn.BatchNorm1d(1))
        model = nn.Module()
        model.stage = distributed.prepare_model(stage, parts="pp")
        model.shared = distributed.prepare_model(shared, "none")
        optimizer = torch.optim.SGD([*shared.parameters(), *stage.parameters()], lr=0.1)
        averaged = EMA(model).model
        return [
            parts_of_names(model, model.state_dict()),
            parts_of_names(averaged, averaged.state_dict()),
            parts_of_names(stage, ["0.weight"]),
            parts_of_names(shared, ["weight"]),
            parts_of_optimizer(optimizer),
        ]


def test_a_part_is_known_by_its_names_in_a_state_and_in_copies() -> None:
    names = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    of_model = {f"stage.0.{name}": ("pp",) for name in names}
    for found in run_ranks(parts_of_a_stage, 2):
        assert found == [of_model, of_model, {"0.weight": ("pp",)}, {}, {2: ("pp",), 3: ("pp",)}]
