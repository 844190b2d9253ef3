"""Sharded states over real ranks: written by some number of them, read by any other, bit for bit."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import Outcome, run_ranks
from tensors import whole_tensor
from torch import nn

from dengine import distributed
from dengine.checkpoint.formats.sharded.names import LikeParameters, named_optimizer_state, numbered_optimizer_state
from dengine.checkpoint.formats.sharded.plan import read_shards, write_shards
from dengine.checkpoint.formats.sharded.read import read_states
from dengine.checkpoint.formats.sharded.verify import verify_shards
from dengine.errors import CorruptCheckpointError

Bits = dict[str, tuple[str, tuple[int, ...], bytes]]


def bits(tensors: dict[str, torch.Tensor]) -> Bits:
    """The whole tensors, byte for byte. Collective where they are sharded."""
    found = {}
    for name, tensor in tensors.items():
        whole = whole_tensor(tensor.detach())
        content = whole.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = (str(whole.dtype), tuple(whole.shape), content)
    return found


def flat(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    model = distributed.unwrap_model(model)
    tensors = {f"model/{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in optimizer.state[parameter].items()}
    return tensors


def prepared(strategy: str, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Rows that do not divide (7), that are fewer than the ranks (2), a scalar, and buffers that are not sharded."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Linear(7, 2, bias=False)).to(torch.float32)
    model[1].register_parameter("scale", nn.Parameter(torch.rand(1)))
    model = distributed.prepare_model(model, strategy)  # type: ignore[arg-type]
    groups: list[dict[str, Any]] = [
        {"params": [*model.parameters()][:2], "lr": 0.3},
        {"params": [*model.parameters()][2:]},
    ]
    return model, torch.optim.AdamW(groups, lr=0.1)


def trained(strategy: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = prepared(strategy, seed=1)
    for step in range(3):
        optimizer.zero_grad()
        output = model(torch.randn(6, 5, generator=torch.Generator().manual_seed(step)))
        (output.sum() + distributed.unwrap_model(model)[1].scale.sum()).backward()
        optimizer.step()
    return model, optimizer


def save(rank: int, size: int, strategy: str, folder: Path) -> Bits:
    model, optimizer = trained(strategy)
    states = {
        "model": distributed.unwrap_model(model).state_dict(),
        "optimizer": named_optimizer_state(optimizer, model),
        "trainer": {"epoch": 3, "loss": float("nan"), "of": (1, {2: "two"})},
    }
    write_shards(folder, states)
    return bits(flat(model, optimizer))


def load(rank: int, size: int, strategy: str, folder: Path, again: Path | None = None) -> tuple[Bits, str]:
    """Load into a model of other weights, sharded as `strategy` says; save it `again`."""
    model, optimizer = prepared(strategy, seed=99 + rank)
    bare = distributed.unwrap_model(model)
    like = {
        "model": bare.state_dict(),
        "optimizer": LikeParameters(dict(bare.named_parameters())),
        "trainer": None,
    }
    states = read_shards(folder, like)
    if size > 1 and strategy == "fsdp":
        assert hasattr(states["optimizer"]["state"]["0.weight"]["exp_avg"], "to_local"), "the optimizer came whole"
    bare.load_state_dict(states["model"])
    optimizer.load_state_dict(numbered_optimizer_state(optimizer, model, states["optimizer"]))
    if again is not None:
        write_shards(again, {**states, "optimizer": named_optimizer_state(optimizer, model)})
    assert [group["lr"] for group in optimizer.param_groups] == [0.3, 0.1]
    return bits(flat(model, optimizer)), repr(states["trainer"])


def whole(folder: Path) -> Bits:
    """Without any model: as one process sees what is in the folder."""
    states = read_shards(folder)
    tensors = {f"model/{name}": tensor for name, tensor in states["model"].items()}
    for name, slots in states["optimizer"]["state"].items():
        tensors |= {f"optimizer/{name}/{key}": tensor for key, tensor in slots.items()}
    return bits(tensors)


def test_what_three_ranks_saved_is_loaded_by_two_four_and_one_and_back_bit_for_bit(tmp_path: Path) -> None:
    folder = tmp_path / "of_three"
    expected, *others = run_ranks(save, 3, "fsdp", folder, deadline_s=120)
    assert all(other == expected for other in others)
    assert len(expected) == 9 + 3 * 6
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of_three"]
    verify_shards(folder)
    assert whole(folder) == expected
    trainer = "{'epoch': 3, 'loss': nan, 'of': (1, {2: 'two'})}"
    cases = [(2, "fsdp"), (4, "fsdp"), (1, "none"), (2, "ddp"), (3, "fsdp")]
    for number, (size, strategy) in enumerate(cases):
        again = tmp_path / f"again_{number}"
        found = run_ranks(load, size, strategy, folder, again, deadline_s=120)
        assert found == [(expected, trainer)] * size, (size, strategy)
        assert whole(again) == expected
        folder = again  # each reads what the one before wrote


@pytest.mark.parametrize(("size", "strategy"), [(2, "ddp"), (1, "none")])
def test_what_was_saved_without_sharding_is_loaded_with_it(tmp_path: Path, size: int, strategy: str) -> None:
    folder = tmp_path / "whole"
    expected = run_ranks(save, size, strategy, folder, deadline_s=120)[0]
    found = run_ranks(load, 3, "fsdp", folder, deadline_s=120)
    assert [tensors for tensors, _ in found] == [expected] * 3


# -- layouts -----------------------------------------------------------------------------------------------------

DTYPES = [torch.bfloat16, torch.bool, torch.complex64]
SHAPES = [(), (5,), (3, 4), (4, 3, 2), (0, 3)]


def sources() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    numbers = {}
    for dtype in DTYPES:
        for shape in SHAPES:
            values = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator)
            numbers[f"{dtype} {shape}"] = values.to(dtype)
    return numbers


def laid_out(size: int, layout: str, fill: bool) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (size,) if layout in ("rows", "columns", "replicated") else (2, size // 2))
    placements: Any = {
        "rows": [Shard(0)],
        "columns": [Shard(1)],
        "replicated": [Replicate()],
        "hybrid": [Replicate(), Shard(0)],
        "tiles": [Shard(0), Shard(1)],
    }[layout]
    tensors = {}
    for name, source in sources().items():
        needed = 1 + max([place.dim for place in placements if isinstance(place, Shard)], default=-1)
        value = source if fill else torch.zeros_like(source)
        tensors[name] = distribute_tensor(value, mesh, placements) if value.dim() >= needed else value
    return tensors


def save_layout(rank: int, size: int, layout: str, folder: Path) -> None:
    write_shards(folder, {"tensors": laid_out(size, layout, fill=True)})


def load_layout(rank: int, size: int, layout: str, folder: Path) -> Bits:
    like = laid_out(size, layout, fill=False)
    found = read_shards(folder, {"tensors": like})["tensors"]
    for name, tensor in found.items():
        assert type(tensor) is type(like[name])
        assert getattr(tensor, "placements", None) == getattr(like[name], "placements", None)
    return bits(found)


def test_any_layout_is_read_as_any_other(tmp_path: Path) -> None:
    expected = bits(sources())
    saved = [("rows", 3), ("tiles", 4), ("hybrid", 4), ("replicated", 2)]
    for layout, size in saved:
        run_ranks(save_layout, size, layout, tmp_path / layout, deadline_s=120)
        assert bits(read_shards(tmp_path / layout)["tensors"]) == expected, layout
    asked = [("tiles", 4), ("columns", 3), ("rows", 4), ("hybrid", 2)]
    for (saved_layout, _), (layout, size) in zip(saved, asked, strict=True):
        found = run_ranks(load_layout, size, layout, tmp_path / saved_layout, deadline_s=120)
        assert found == [expected] * size, (saved_layout, layout)


def read_counted(rank: int, size: int, folder: Path) -> int:
    """Bytes of tensors that this rank takes from the folder."""
    counted = 0
    original = read_states.__globals__["checked_chunk"]

    def counting(where: Path, chunk: Any, dtype: torch.dtype) -> torch.Tensor:
        nonlocal counted
        counted += chunk.num_bytes
        return original(where, chunk, dtype)

    read_states.__globals__["checked_chunk"] = counting
    read_shards(folder, {"big": sharded_rows(size)})
    return counted


def sharded_rows(size: int) -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(torch.arange(1200.0), init_device_mesh("cpu", (size,)), [Shard(0)])


def save_rows(rank: int, size: int, folder: Path) -> list[int]:
    from torch.distributed.tensor import Replicate

    rows = sharded_rows(size)
    replicated = [rows.redistribute(placements=[Replicate()])[:100] for _ in range(6)]  # type: ignore[attr-defined]
    write_shards(folder, {"big": rows, "same": replicated, "own": [torch.full((30,), float(rank))] * 3})
    return [path.stat().st_size for path in sorted(folder.glob("*.bin"))]


def test_each_rank_writes_its_part_and_a_share_of_what_is_replicated_and_reads_what_it_needs(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    sizes, *_ = run_ranks(save_rows, 3, folder)
    assert sum(sizes) == 4 * (1200 + 600 + 90)
    assert sizes == [4 * (400 + 200 + 90), 4 * (400 + 200), 4 * (400 + 200)]
    assert run_ranks(read_counted, 3, folder) == [4 * 400] * 3
    assert run_ranks(read_counted, 2, folder) == [4 * 800] * 2  # 600 of them, and the parts are checked whole


def test_of_what_is_neither_sharded_nor_replicated_rank_zero_s_counts(tmp_path: Path) -> None:
    run_ranks(save_rows, 3, tmp_path / "rows")
    assert all(bool((tensor == 0).all()) for tensor in read_shards(tmp_path / "rows")["own"])


# -- failures ----------------------------------------------------------------------------------------------------


def failing(rank: int, size: int, folder: Path, failure: str) -> None:
    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    rename = os.rename

    def read_only(source: Any, target: Any) -> None:
        if target == folder:  # the harness renames too
            raise OSError(30, "Read-only file system")
        rename(source, target)

    states: dict[str, Any] = {"x": [torch.ones(3) for _ in range(6)], "rows": sharded_rows(size)}
    if failure == "disk" and rank == 1:
        os.fsync = no_space
    if failure == "commit" and rank == 0:
        os.rename = read_only
    if failure == "object" and rank == 1:
        states["x"].append(object())
    if failure == "differ" and rank == 1:
        states["x"][2] = torch.ones(4)
    if failure == "more" and rank == 1:
        states["x"].append(torch.ones(1))
    write_shards(folder, states)


@pytest.mark.parametrize(
    ("failure", "error_type", "message"),
    [
        ("disk", "CheckpointError", "Rank 1 could not write {folder}: OSError: [Errno 28] No space left on device"),
        ("commit", "CheckpointError", "Rank 0 could not commit {folder}: OSError: [Errno 30] Read-only file system"),
        ("object", "TypeError", "Rank 1 could not plan {folder}: 'x/6' is a builtins.object"),
        ("differ", "CheckpointError", "'x/2' is ((3,), 'float32') on rank 0 and ((4,), 'float32') on rank 1"),
        ("more", "CheckpointError", "'x/6' is not there on rank 0 and ((1,), 'float32') on rank 1"),
    ],
)
def test_a_failure_of_one_rank_is_raised_on_all_and_nothing_is_left(
    tmp_path: Path, failure: str, error_type: str, message: str
) -> None:
    outcomes = run_ranks(failing, 3, tmp_path / "saved", failure, expect_failures=True)
    assert [outcome.error_type for outcome in outcomes] == [error_type] * 3
    for outcome in outcomes:
        assert message.format(folder=tmp_path / "saved") in outcome.error_message
    assert list(tmp_path.iterdir()) == []


def killed(rank: int, size: int, folder: Path, victim: int, at: str) -> None:
    def die(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    states = {"x": [torch.ones(3) for _ in range(6)], "rows": sharded_rows(size)}
    if rank == victim:
        setattr(os, at, die)
    write_shards(folder, states)


@pytest.mark.parametrize(("victim", "at"), [(1, "fsync"), (2, "fsync"), (0, "fsync"), (0, "rename")])
def test_a_rank_killed_while_writing_leaves_no_folder_under_the_final_name(
    tmp_path: Path, victim: int, at: str
) -> None:
    folder = tmp_path / "saved"
    outcomes: list[Outcome[None]] = run_ranks(killed, 3, folder, victim, at, expect_failures=True, deadline_s=60)
    assert outcomes[victim].exitcode == -signal.SIGKILL
    assert all(outcome.error_type is not None for outcome in outcomes)
    assert all(path.name.startswith(".saved.") for path in tmp_path.iterdir())
    run_ranks(save_rows, 2, folder)  # and the next run is not in its way
    verify_shards(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def try_reading(rank: int, size: int, folder: Path) -> str:
    with pytest.raises(CorruptCheckpointError) as raised:
        read_shards(folder, {"big": sharded_rows(size)})
    return str(raised.value)


@pytest.mark.parametrize("spoil", ["flip", "remove"])
def test_what_one_rank_finds_changed_is_raised_on_all(tmp_path: Path, spoil: str) -> None:
    folder = tmp_path / "rows"
    run_ranks(save_rows, 3, folder)
    spoilt = folder / "rank_00001.bin"
    content = bytearray(spoilt.read_bytes())
    content[7] ^= 1
    actions: dict[str, Callable[[], object]] = {"flip": lambda: spoilt.write_bytes(content), "remove": spoilt.unlink}
    actions[spoil]()
    messages = run_ranks(try_reading, 3, folder)
    assert len(set(messages)) == 1
    assert messages[0].startswith(f"Rank 1 could not read {folder}: {spoilt} ")
