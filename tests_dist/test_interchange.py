"""What several ranks have saved into a folder is exported by one process, whole."""

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from ranks import run_ranks
from torch import nn

from dengine import distributed
from dengine.__main__ import main
from dengine.checkpoint import save


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(3, 5), nn.Linear(5, 3)]


def saved(rank: int, size: int, folder: Path) -> None:
    with distributed.process_group(timeout=300):
        model = distributed.prepare_model(nn.Sequential(*layers()), "fsdp")
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        save(folder / "sharded_1", {"model": model, "optimizer": optimizer})
    with distributed.process_group(mesh={"pp": size}, timeout=300):
        stage = nn.Sequential()
        stage.add_module(str(rank), layers()[rank])
        save(folder / "stages_1", {"model": distributed.prepare_model(stage, parts="pp")})


def test_a_folder_of_several_ranks_is_exported_whole(tmp_path: Path) -> None:
    run_ranks(saved, 2, tmp_path, init=False, deadline_s=90)
    begun = nn.Sequential(*layers())
    trained = nn.Sequential(*layers())
    optimizer = torch.optim.SGD(trained.parameters(), momentum=0.9)
    trained(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    for name, expected in {"sharded": trained.state_dict(), "stages": begun.state_dict()}.items():
        for format, target in {"dcp": f"{name}_dcp", "torch": f"{name}.pt"}.items():
            assert main(["export", str(tmp_path / f"{name}_1"), "-o", str(tmp_path / target), "--format", format]) == 0
        found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
        torch.testing.assert_close(found, dict(expected))
        read = {key: torch.zeros_like(value) for key, value in expected.items()}
        dcp.load(read, checkpoint_id=tmp_path / f"{name}_dcp", no_dist=True)
        torch.testing.assert_close(read, found)
    arguments = ["export", str(tmp_path / "sharded_1"), "-o", str(tmp_path / "optimizer.pt"), "--format", "torch"]
    assert main([*arguments, "--name", "optimizer"]) == 0
    found = torch.load(tmp_path / "optimizer.pt", weights_only=True)
    assert found["param_groups"][0]["params"] == list(trained.state_dict())
