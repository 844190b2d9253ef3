"""`python -m dengine`: what it prints, and with what exit code it ends."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from dengine import Engine, Events
from dengine.__main__ import COMMANDS, main
from dengine.checkpoint import save
from dengine.handlers import Checkpoint


def folder_of(folder: Path) -> Path:
    model, trainer = nn.Linear(3, 2), Engine(lambda engine, batch: None)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    objects = {"model": model, "optimizer": optimizer, "trainer": trainer}
    trainer.on(Events.EPOCH_COMPLETED, Checkpoint(objects, folder, n_saved=2))
    trainer.on(Events.EPOCH_COMPLETED, Checkpoint({"model": model}, folder, "best", 1, lambda engine: 0.5, "acc"))
    trainer.run([1, 2], max_epochs=2)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_file_is_shown_with_its_tensors_and_where_it_comes_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path)
    assert main(["inspect", str(tmp_path / "checkpoint_4.pt")]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"checkpoint_4\.pt: intact, SHA-256 [0-9a-f]{64}\n", shown)
    assert re.search(rf"step 4; .* kB; saved by 1 rank; dengine \S+, torch {re.escape(torch.__version__)}", shown)
    assert re.search(r"\n  weight +2x3 +float32 +24 B\n", shown)
    assert re.search(r"\n  iteration +4 +int\n", shown)
    assert re.search(r"\n  param_groups\[0\]\.lr +0\.1 +float\n", shown)
    assert shown.endswith("\n\ndengine: format 1; random number generators: of trainer on 1 rank\n")


def test_a_folder_is_shown_as_a_table_of_what_is_intact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path)
    assert main(["inspect", str(tmp_path)]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].split() == ["file", "step", "score", "size", "ranks", "dengine", "torch", "verified"]
    assert [row.split()[0] for row in rows[2:]] == ["best_2_acc=0.5000.pt", "checkpoint_2.pt", "checkpoint_4.pt"]
    assert all(row.endswith("intact") for row in rows[2:])
    assert "acc=0.5 " in rows[2]


@pytest.mark.parametrize("name", ["checkpoint_4.pt", "."])
def test_what_is_corrupt_is_named_with_exit_code_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder_of(tmp_path)
    flip(tmp_path / "checkpoint_4.pt")
    assert main(["inspect", str(tmp_path / name)]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"checkpoint_4\.pt was changed after it was saved", shown)
    assert name != "." or max(map(len, shown.splitlines()[:5])) < 120  # the reason is below the table
    assert shown.count("CORRUPT") == 1


def test_damaged_files_whose_names_tell_nothing_are_told_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path)
    (tmp_path / "trunc.pt").write_bytes((tmp_path / "checkpoint_4.pt").read_bytes()[:-300])
    (tmp_path / "garbage.pt").write_bytes(b"?")
    assert main(["inspect", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"\ntrunc\.pt \(\d+ bytes\) does not end with dengine's digest", shown)
    assert re.search(r"\ngarbage\.pt is truncated", shown)
    assert shown.count("CORRUPT") == 2


def test_a_lost_file_and_a_damaged_manifest_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder_of(tmp_path)
    (tmp_path / "checkpoint_2.pt").unlink()
    assert main(["inspect", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert re.search(r"\ncheckpoint_2\.pt .* LOST\n", shown)
    assert "\ncheckpoint_2.pt is listed in the manifest, but not there." in shown
    (tmp_path / "manifest.json").write_text("{")
    assert main(["inspect", str(tmp_path)]) == 1
    assert "manifest.json cannot be read" in capsys.readouterr().out


def test_a_file_that_something_else_wrote_is_never_unpickled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(nn.Linear(1, 1), tmp_path / "model.pt")
    assert main(["inspect", str(tmp_path / "model.pt")]) == 1
    assert "something else wrote it" in capsys.readouterr().out


def test_a_wrong_argument_is_a_plain_sentence_with_exit_code_two(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", str(tmp_path / "none.pt")]) == 2
    assert "none.pt does not exist." in capsys.readouterr().err
    assert main(["inspect", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    for arguments in (["inspect"], ["inspec", "x"], []):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 2


def test_a_part_of_a_checkpoint_or_of_its_folder_is_no_corrupt_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path / "c_1", {"model": nn.Linear(1, 1)})
    for path in (tmp_path / "manifest.json", tmp_path / "c_1" / "rank_00000.bin", tmp_path / "c_1" / "metadata.json"):
        assert main(["inspect", str(path)]) == 2
        assert f"{path} is a part of {path.parent}, which can be inspected." in capsys.readouterr().err


def test_a_metadata_json_of_something_else_does_not_hide_what_is_beside_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder_of(tmp_path)
    (tmp_path / "metadata.json").write_text("{}")
    for path in (tmp_path, tmp_path / "checkpoint_4.pt"):
        assert main(["inspect", str(path)]) == 0
        assert re.search(r"checkpoint_4\.pt.* intact", capsys.readouterr().out)


def test_help_lists_every_command_and_a_command_has_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)
    with pytest.raises(SystemExit) as ended:
        main(["inspect", "--help"])
    assert ended.value.code == 0
    assert "a checkpoint (.pt), or a folder" in capsys.readouterr().out


def test_it_runs_as_a_module(tmp_path: Path) -> None:
    save(tmp_path / "c_1.pt", {"model": nn.Linear(1, 1)})
    command = [sys.executable, "-m", "dengine", "inspect", str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert (printed.returncode, printed.stderr) == (0, "")
    assert "c_1.pt" in printed.stdout


def test_the_installed_command_is_this_main() -> None:
    project = Path(__file__).resolve().parents[1].joinpath("pyproject.toml").read_text()
    (command,) = re.findall(r'^\[project\.scripts\]\ndengine = "(.*)"$', project, re.MULTILINE)
    assert command == f"{main.__module__}:{main.__name__}"
