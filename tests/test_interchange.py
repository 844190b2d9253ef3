"""`python -m dengine export` and `import`: what the other tools themselves read, and what they wrote."""

import json
import os
import pickle
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from dengine import Engine
from dengine.__main__ import main
from dengine.checkpoint import load, reading, save
from dengine.checkpoint.formats.sharded.read import read_whole_tensor
from dengine.handlers import Checkpoint
from dengine.tools.interchange import base


class Tied(nn.Module):
    """Two names of one memory, a buffer that is a number, other dtypes, and a tensor without elements."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.layer = nn.Linear(4, 4, dtype=torch.bfloat16)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("nothing", torch.empty(0, 3))


def tied(seed: int = 0) -> Tied:
    torch.manual_seed(seed)
    return Tied()


def saved(folder: Path, ending: str, model: nn.Module | None = None) -> Path:
    """A checkpoint of a model, its optimizer and the trainer: a file (".pt") or a folder ("")."""
    model = tied() if model is None else model
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    path = folder / f"checkpoint_7{ending}"
    save(path, {"model": model, "optimizer": optimizer, "trainer": Engine(lambda engine, batch: None)})
    return path


def assert_same(found: dict[str, Any], model: nn.Module, *, but: tuple[str, ...] = ()) -> None:
    expected = {name: value for name, value in model.state_dict().items() if name not in but}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def export(source: Path, target: Path, format: str, *more: str) -> int:
    return main(["export", str(source), "-o", str(target), "--format", format, *more])


def left_in(folder: Path) -> list[str]:
    return sorted(each.name for each in folder.iterdir())


@pytest.mark.parametrize("ending", [".pt", ""])
def test_torch_distributed_checkpoint_reads_the_export(tmp_path: Path, ending: str) -> None:
    model = tied()
    source, target = saved(tmp_path, ending, model), tmp_path / "out"
    assert export(source, target, "dcp") == 0
    other = tied(1)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=target, no_dist=True)
    assert_same(state, model)


@pytest.mark.parametrize("ending", [".pt", ""])
def test_torch_distributed_checkpoint_reads_nested_states_too(tmp_path: Path, ending: str) -> None:
    assert export(saved(tmp_path, ending), tmp_path / "out", "dcp", "--name", "optimizer") == 0
    first = "0" if ending else "embed.weight"  # a folder has the names of the parameters
    expected = {"state": {first: {"exp_avg": torch.zeros(5, 4)}}}
    dcp.load(expected, checkpoint_id=tmp_path / "out", no_dist=True)
    assert torch.equal(expected["state"][first]["exp_avg"], torch.full((5, 4), 1.0).mul(1 - 0.9))


@pytest.mark.parametrize("ending", [".pt", ""])
def test_torch_load_reads_the_export(tmp_path: Path, ending: str) -> None:
    model = tied()
    assert export(saved(tmp_path, ending, model), tmp_path / "out.pt", "torch") == 0
    assert_same(torch.load(tmp_path / "out.pt", weights_only=True), model)


@pytest.mark.parametrize("num_files", [1, 3])
def test_safetensors_reads_the_export_with_shared_memory_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_files: int
) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    if num_files > 1:
        monkeypatch.setattr(base, "FILE_BYTES", 80)
    model = tied()
    source, target = saved(tmp_path, ".pt", model), tmp_path / "out"
    assert export(source, target, "safetensors") == 0
    files = sorted(target.glob("*.safetensors"))
    assert len(files) == num_files
    assert files[0].stat().st_mode == source.stat().st_mode
    found = {name: tensor for file in files for name, tensor in safetensors.load_file(file).items()}
    assert_same(found, model, but=("head.weight",))
    if num_files == 1:
        assert left_in(target) == ["model.safetensors"]
        other = tied(1)
        safetensors.load_model(other, files[0])
        assert_same(other.state_dict(), model)
    else:
        index = json.loads((target / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
        assert sorted(set(index["weight_map"].values())) == [file.name for file in files]


def test_a_folder_keeps_each_name_in_safetensors(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    model = tied()
    assert export(saved(tmp_path, "", model), tmp_path / "out", "safetensors") == 0
    assert_same(safetensors.load_file(tmp_path / "out" / "model.safetensors"), model)


@pytest.mark.parametrize("ending", [".pt", ""])
@pytest.mark.parametrize("shard_bytes", [4 << 30, 20_000])
def test_transformers_reads_the_safetensors_of_one_of_its_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, shard_bytes: int
) -> None:
    transformers = pytest.importorskip("transformers")
    monkeypatch.setattr(base, "FILE_BYTES", shard_bytes)
    config = transformers.GPT2Config(n_layer=2, n_head=2, n_embd=16, vocab_size=99, n_positions=8)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    target = tmp_path / "out"
    compiled: Any = torch.compile(model, backend="eager")
    assert export(saved(tmp_path, ending, compiled), target, "safetensors") == 0
    assert (target / "model.safetensors.index.json").exists() == (shard_bytes < 1 << 20)
    config.save_pretrained(target)
    found, notes = transformers.GPT2LMHeadModel.from_pretrained(target, output_loading_info=True)
    assert not any(notes[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), notes
    assert_same(found.state_dict(), model)
    assert found.lm_head.weight is found.transformer.wte.weight


@pytest.mark.parametrize("format", ["safetensors", "dcp"])
def test_of_a_folder_one_tensor_is_in_memory_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    if format == "safetensors":
        pytest.importorskip("safetensors.torch")
    monkeypatch.setattr(base, "FILE_BYTES", 1)
    alive: list[weakref.ref[np.ndarray[Any, Any]]] = []
    most = 0

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal most
        memory = read_whole_tensor(*arguments).numpy().copy()  # which all tensors that share it keep alive
        alive.append(weakref.ref(memory))
        most = max(most, sum(each() is not None for each in alive))
        return torch.from_numpy(memory)

    monkeypatch.setattr(reading, "read_whole_tensor", counted)
    model = nn.Sequential(*[nn.Linear(3, 3) for _ in range(10)])
    assert export(saved(tmp_path, "", model), tmp_path / "out", format) == 0
    assert len(alive) == 20
    assert most <= 2


# -- import ------------------------------------------------------------------------------------------------------


def as_safetensors(model: nn.Module, folder: Path) -> Path:
    safetensors = pytest.importorskip("safetensors.torch")
    folder.mkdir()
    safetensors.save_model(model, str(folder / "weights.safetensors"))
    return folder


def as_dcp(model: nn.Module, folder: Path) -> Path:
    dcp.save(model.state_dict(), checkpoint_id=folder, no_dist=True)
    return folder


def as_nested_dcp(model: nn.Module, folder: Path) -> Path:
    dcp.save({"model": model.state_dict(), "step": 3}, checkpoint_id=folder, no_dist=True)
    return folder


def as_file(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder.with_suffix(".pth"))
    return folder.with_suffix(".pth")


def as_wrapped_file(model: nn.Module, folder: Path) -> Path:
    """As DDP around `torch.compile` names it, beside others."""
    state = {f"module._orig_mod.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": state, "epoch": 3}, folder.with_suffix(".bin"), _use_new_zipfile_serialization=False)
    return folder.with_suffix(".bin")


@pytest.mark.parametrize("make", [as_safetensors, as_dcp, as_nested_dcp, as_file, as_wrapped_file])
@pytest.mark.parametrize("ending", [".pt", ""])
def test_what_others_have_saved_is_resumed_from(
    tmp_path: Path, make: Callable[[nn.Module, Path], Path], ending: str
) -> None:
    model, other = tied(), tied(1)
    source = make(model, tmp_path / "source")
    target = tmp_path / "checkpoints" / f"checkpoint_0{ending}"
    if not ending:
        target.mkdir(parents=True)
    assert main(["import", str(source), "-o", str(target)]) == 0
    load(target, {"model": other})
    assert_same(other.state_dict(), model)
    again = tied(2)
    assert Checkpoint.resume(target.parent, {"model": again}) == target
    assert_same(again.state_dict(), model)
    assert main(["inspect", str(target)]) == 0


def test_what_is_no_tensor_in_a_folder_of_dcp_is_left_out_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = as_nested_dcp(tied(), tmp_path / "source")
    assert main(["import", str(source), "-o", str(tmp_path / "new_0.pt")]) == 0
    assert "1 values of" in (told := capsys.readouterr().err)
    assert "such as 'step': they are no tensors" in told


def test_an_export_is_imported_again_by_the_name_that_is_asked_for(tmp_path: Path) -> None:
    model, other = tied(), tied(1)
    source = saved(tmp_path, ".pt", model)
    for format, target in {"dcp": "as_dcp", "torch": "as.pt", "safetensors": "as_safetensors"}.items():
        if format == "safetensors":
            pytest.importorskip("safetensors.torch")
        assert export(source, tmp_path / target, format) == 0
        back = tmp_path / f"{format}_0.pt"
        assert main(["import", str(tmp_path / target), "-o", str(back), "--format", format, "--name", "net"]) == 0
        load(back, {"net": other})
        assert_same(other.state_dict(), model)


# -- what cannot be done -----------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def spoil(path: Path) -> None:
    """Every byte: of a folder, only what is exported is looked at."""
    path.write_bytes(bytes(byte ^ 1 for byte in path.read_bytes()))


@pytest.mark.parametrize("format", ["safetensors", "dcp", "torch"])
@pytest.mark.parametrize("ending", [".pt", ""])
def test_a_damaged_checkpoint_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, format: str
) -> None:
    if format == "safetensors":
        pytest.importorskip("safetensors.torch")
    source = saved(tmp_path, ending)
    damaged = source / "rank_00000.bin" if not ending else source
    spoil(damaged)
    before = left_in(tmp_path)
    assert export(source, tmp_path / ("out.pt" if format == "torch" else "out"), format) == 1
    told = capsys.readouterr().err
    assert told.startswith("CORRUPT: ")
    assert str(damaged) in told
    assert left_in(tmp_path) == before


REFUSED: dict[str, tuple[list[str], str]] = {
    "name": (
        ["{file}", "-o", "{new}", "--format", "dcp", "--name", "net"],
        "no 'net', but 'model', 'optimizer', 'trai",
    ),
    "taken folder": (["{file}", "-o", "{full}", "--format", "dcp"], "full exists and is not empty"),
    "taken file": (["{file}", "-o", "{file}", "--format", "torch"], "checkpoint_7.pt exists and is not empty"),
    "ending": (["{file}", "-o", "{new}", "--format", "torch"], "is one file, whose name ends with .pt"),
    "other ending": (["{file}", "-o", "{new}.pt", "--format", "safetensors"], "is a folder, but -o"),
    "nested": (
        ["{file}", "-o", "{new}", "--format", "safetensors", "--name", "optimizer"],
        "state, param_groups is no",
    ),
    "missing": (["{new}.pt", "-o", "{new}", "--format", "dcp"], "new.pt cannot be read"),
    "none": (["{full}/text", "-o", "{new}", "--format", "dcp"], "text"),
    "catalogue": (["{base}", "-o", "{new}", "--format", "dcp"], "is a folder of checkpoints"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_exported_is_told_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    if case == "nested":
        pytest.importorskip("safetensors.torch")
    arguments, words = REFUSED[case]
    file, full = saved(tmp_path, ".pt"), tmp_path / "full"
    full.mkdir()
    (full / "text").write_text("no checkpoint")
    before = left_in(tmp_path)
    places = {"file": file, "full": full, "new": tmp_path / "new", "base": tmp_path}
    code = main(["export", *(each.format(**places) for each in arguments)])
    assert code == (1 if case == "none" else 2)
    assert words in capsys.readouterr().err
    assert left_in(tmp_path) == before
    assert left_in(full) == ["text"]


class Code:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def bad_sources(folder: Path) -> dict[str, tuple[Path, int, str]]:
    """What there is -> its path, the exit code, and words of the message."""
    model = tied()
    made: dict[str, tuple[Path, int, str]] = {"missing": (folder / "missing", 2, "does not exist")}
    (folder / "text").mkdir()
    (folder / "text" / "notes.txt").write_text("?")
    made["unknown"] = folder / "text", 2, "is of no format that is known here"
    made["dengine's own"] = saved(folder, ""), 2, "is a checkpoint of dengine already"
    broken = as_file(model, folder / "broken")
    cut(broken)
    made["cut file"] = broken, 1, "cannot be read by torch.load(weights_only=True)"
    torch.save({"a": Code()}, folder / "code.pt")
    made["code"] = folder / "code.pt", 1, "cannot be read by torch.load(weights_only=True)"
    torch.save([torch.ones(1)], folder / "list.pt")
    made["list"] = folder / "list.pt", 1, "holds a list, no dict"
    torch.save({"epoch": 3}, folder / "numbers.pt")
    made["numbers"] = folder / "numbers.pt", 2, "holds no tensors"
    torch.save({"net": model.state_dict(), "ema": model.state_dict()}, folder / "several.pt")
    made["several"] = folder / "several.pt", 2, "there are 'net', 'ema'"
    for what in ("cut", "code"):
        as_dcp(model, folder / f"dcp {what}")
    cut(folder / "dcp cut" / "__0_0.distcp")
    made["cut dcp"] = folder / "dcp cut", 1, "is damaged"
    (folder / "dcp code" / ".metadata").write_bytes(pickle.dumps(Code()))
    made["dcp code"] = folder / "dcp code", 1, "it names posix.mkdir"
    return made


def test_what_cannot_be_imported_is_told_leaves_nothing_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    sources = bad_sources(tmp_path)
    before = left_in(tmp_path)
    for what, (source, code, words) in sources.items():
        for target in ("new_0.pt", "new_0"):
            assert main(["import", str(source), "-o", str(tmp_path / target)]) == code, what
            told = capsys.readouterr().err
            assert words in told, (what, told)
            assert str(source) in told, (what, told)
            assert left_in(tmp_path) == before, what
    full = tmp_path / "text"
    assert main(["import", str(as_file(tied(), tmp_path / "whole")), "-o", str(full)]) == 2
    assert "exists and is not empty" in capsys.readouterr().err
    assert main(["import", str(tmp_path / "whole.pth"), "-o", str(tmp_path / "new.1_0")]) == 2
    assert "must end with .pt, or have no ending" in capsys.readouterr().err


def test_damaged_safetensors_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = as_safetensors(tied(), tmp_path / "source")
    target, index = tmp_path / "new_0.pt", source / "model.safetensors.index.json"
    cut(source / "weights.safetensors")
    assert main(["import", str(source), "-o", str(target)]) == 1
    assert "weights.safetensors is damaged" in capsys.readouterr().err
    for content, words in {
        '{"weight_map": {"a": "gone.safetensors"}}': "gone.safetensors is missing",
        '{"weight_map": {"a": "../weights.safetensors"}}': "no file of its folder",
        "[]": "is damaged",
    }.items():
        index.write_text(content)
        assert main(["import", str(source), "-o", str(target)]) == 1
        assert words in capsys.readouterr().err
    assert left_in(tmp_path) == ["source"]


def test_without_the_package_the_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = saved(tmp_path, ".pt")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert export(source, tmp_path / "out", "safetensors") == 2
    assert 'pip install "dengine[safetensors]"' in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(source, tmp_path / "out", "dcp") == 0


def test_both_are_commands_of_the_package(tmp_path: Path) -> None:
    source = saved(tmp_path, ".pt")
    for arguments in (["export", source, "-o", tmp_path / "out.pt", "--format", "torch"], ["import", "--help"]):
        done = subprocess.run(
            [sys.executable, "-m", "dengine", *arguments], capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out.pt").is_file()
    assert "of 'model' in" not in done.stdout


def test_an_interrupt_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = saved(tmp_path, "")

    def interrupted(*arguments: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(reading, "read_whole_tensor", interrupted)
    before = left_in(tmp_path)
    for format, target in {"dcp": "out", "torch": "out.pt"}.items():
        with pytest.raises(KeyboardInterrupt):
            export(source, tmp_path / target, format)
        assert left_in(tmp_path) == before
