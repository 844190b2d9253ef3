"""Half precision on a mesh: all ranks leave out the step of which one rank alone has an infinite gradient."""

from typing import Any

import pytest
import torch
from ranks import run_ranks
from tensors import whole_parameters
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader, TensorDataset

from dengine import create_supervised_trainer, distributed

pytest.importorskip("accelerate")

CASES = [(1, None), (1, 0.2), (2, 0.2)]  # batches of an accumulation, and the norm that is clipped to
LENGTH = 4  # tokens of a sample
MESHES: list[dict[str, int]] = [
    {"tp": 4},
    {"dp": 2, "tp": 2},
    {"dp_shard": 2, "tp": 2},
    {"cp": 2, "tp": 2},
    {"dp_shard": 4},
    {"dp_replicate": 2, "dp_shard": 2},
    {"dp_shard": 2, "cp": 2},
    {"dp": 2, "cp": 2},
]


class Overflow(nn.Module):
    """As if the gradient of one feature did not fit into 16 bits, in some passes."""

    def __init__(self) -> None:
        super().__init__()
        self.num_passes = 0
        self.is_here = True  # on this rank

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        self.num_passes += 1
        if self.num_passes in (2, 5) and self.is_here:
            values.register_hook(lambda gradient: torch.cat([gradient[..., :-1], gradient[..., -1:] * torch.inf], -1))
        return values


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)  # whose gradients, the first ones of the optimizer, are finite
        self.first = nn.Linear(6, 8)
        self.overflow = Overflow()
        self.second = nn.Linear(8, 5)

    def forward(self, inputs: torch.Tensor) -> Any:
        return self.norm(self.second(self.overflow(self.first(inputs)).tanh()))


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def plan() -> Any:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    return {"first": ColwiseParallel(), "second": RowwiseParallel()}


def samples() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    inputs = torch.randn(32, LENGTH, 6, generator=generator)
    return TensorDataset(inputs, torch.randint(5, (32, LENGTH), generator=generator))


def loss_of(pred: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(pred.float().flatten(0, 1), labels.flatten())


def train(
    model: nn.Module, num_parts: int, tokens: slice, accumulation: int, norm: float | None, precision: str = "fp16"
) -> dict[str, Any]:
    """Weights and the scale of the loss. On the CPU there is no fp16: here it is its scaling alone."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16" if precision == "bf16" else None)
    if precision == "fp16":
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=100)

    def own_tokens(batch: Any, device: torch.device) -> Any:
        inputs, labels = batch
        return inputs[:, tokens], labels[:, tokens]

    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    trainer = create_supervised_trainer(
        model,
        optimizer,
        loss_of,
        accelerator=accelerator,
        gradient_accumulation_steps=accumulation,
        max_grad_norm=norm,
        prepare_batch=own_tokens,
        weight=lambda inputs, labels: labels.numel(),
    )
    loader = DataLoader(samples(), batch_size=8 // num_parts, shuffle=True)
    trainer.run(distributed.prepare_data_loader(loader, seed=3), max_epochs=2)
    return {"weights": whole_parameters(model), "scale": getattr(trainer.state, "grad_scaler", None)}


def trained(rank: int, size: int, mesh: dict[str, int]) -> list[dict[str, Any]]:
    with distributed.process_group(mesh=mesh) as here:
        found = []
        for accumulation, norm in CASES:
            model = net()
            # The last feature is on the last rank of tp; only the last rank of data and of cp has it overflow.
            model.overflow.is_here = all(here.coordinates[name] == num - 1 for name, num in mesh.items())
            prepared = distributed.prepare_model(model, **({"tensor_parallel": plan()} if "tp" in mesh else {}))
            length, place = LENGTH // mesh.get("cp", 1), here.coordinates.get("cp", 0)
            tokens = slice(place * length, (place + 1) * length)
            found.append(train(prepared, here.data_size, tokens, accumulation, norm))
        return found


@pytest.mark.parametrize("mesh", MESHES, ids=str)
def test_a_gradient_that_is_infinite_on_one_rank_has_all_leave_the_step_out(mesh: dict[str, int]) -> None:
    expected = [train(net(), 1, slice(None), *case) for case in CASES]
    assert [each["scale"]["scale"] for each in expected] == [256.0] * 3
    for of_rank in run_ranks(trained, 4, mesh, deadline_s=120):
        for case, found, wanted in zip(CASES, of_rank, expected, strict=True):
            assert found["scale"] == wanted["scale"], case
            for name, value in wanted["weights"].items():
                assert_close(found["weights"][name], value, rtol=1e-6, atol=1e-6, msg=f"{name} in {case}")


def finite_net() -> Net:
    model = net()
    model.overflow.is_here = False
    return model


def in_bfloat16(rank: int, size: int, mesh: dict[str, int], is_fsdp: bool) -> dict[str, Any]:
    with distributed.process_group(mesh=mesh) as here:
        options: dict[str, Any] = {"tensor_parallel": plan()} if "tp" in mesh else {}
        options.update({"mixed_precision": "bf16"} if is_fsdp else {})
        model = distributed.prepare_model(finite_net(), **options)
        length, place = LENGTH // mesh.get("cp", 1), here.coordinates.get("cp", 0)
        tokens = slice(place * length, (place + 1) * length)
        found = train(model, here.data_size, tokens, 2, 0.2, "fsdp" if is_fsdp else "bf16")
        return {**found, "dtypes": {each.grad.dtype for each in model.parameters() if each.grad is not None}}


@pytest.mark.parametrize(
    ("mesh", "is_fsdp"),
    [
        ({"dp_shard": 2, "tp": 2}, True),
        ({"dp_shard": 2, "cp": 2}, True),
        ({"dp": 2, "tp": 2}, False),
        ({"cp": 2, "tp": 2}, False),
    ],
    ids=str,
)
def test_bfloat16_trains_as_one_process_but_for_what_is_rounded(mesh: dict[str, int], is_fsdp: bool) -> None:
    expected = train(finite_net(), 1, slice(None), 2, 0.2, "no")["weights"]
    begun = whole_parameters(finite_net())
    for found in run_ranks(in_bfloat16, 4, mesh, is_fsdp):
        assert found["dtypes"] == {torch.float32}
        for name, value in expected.items():
            assert_close(found["weights"][name], value, rtol=0, atol=0.01)
            assert not torch.allclose(found["weights"][name], value, rtol=0, atol=1e-6), "it was not rounded"
            assert (value - begun[name]).abs().max() > 0.05
