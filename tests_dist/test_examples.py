"""The other examples on two ranks: what they print is what one process finds for the same weights."""

import contextlib
import io
import json
import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run_example(rank: int, size: int, name: str, *options: str) -> str:
    sys.path.insert(0, str(EXAMPLES))
    sys.argv = [f"{name}.py", *options]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return printed.getvalue()


def printed_by_rank_zero(name: str, *options: str) -> str:
    first, second = run_ranks(run_example, 2, name, *options, init=False, deadline_s=200.0)
    assert second == ""
    return first


def checkpoint_in(printed: str) -> dict[str, Any]:
    (path,) = re.findall("^Checkpoint: (.*)$", printed, re.MULTILINE)
    return torch.load(path, weights_only=True)


def test_the_gan_takes_the_steps_of_both_its_engines(tmp_path: Path) -> None:
    printed = printed_by_rank_zero("gan", "epochs=2", "measure_every=1", "num_samples=201", f"output={tmp_path}")
    assert re.findall(r"^epoch (\d)  distance", printed, re.MULTILINE) == ["1", "2"]
    saved = checkpoint_in(printed)
    assert saved["average"]["num_updates"] == 28
    assert int(saved["generator"]["1.num_batches_tracked"]) == 2 * 28  # in its own steps, and in the critic's
    (picture,) = re.findall("^Picture: +(.*)$", printed, re.MULTILINE)
    assert Path(picture).is_file()


def test_the_language_model_finds_the_perplexity_of_one_process_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 21 texts are held out: one rank has one more of them, and each has other numbers of tokens
    options = ("max_texts=210", "warm_up=2", "save_every=2", "model.num_layers=1", f"output={tmp_path}")
    printed_by_rank_zero("language_model", "epochs=1", *options)
    printed = printed_by_rank_zero("language_model", "epochs=2", *options)
    assert "Going on from" in printed
    (perplexity,) = re.findall("texts held out: (.*)$", printed, re.MULTILINE)

    monkeypatch.syspath_prepend(EXAMPLES)
    module = runpy.run_path(str(EXAMPLES / "language_model.py"))
    net = module["GPT"](128, width=128, num_heads=4, num_layers=1, dropout=0.1).eval()
    net.load_state_dict(checkpoint_in(printed)["model"])
    with torch.no_grad():
        loss, count = module["loss_and_count"](net, module["docstrings"](128, 210)[:21])
    assert float(perplexity) == pytest.approx(float((loss / count).exp()), rel=1e-5)


def curve(folder: Path) -> dict[str, list[float]]:
    """What a run of the language model has recorded, by name."""
    (numbers,) = folder.glob("language_model/*/metrics.jsonl")
    rows = [json.loads(line) for line in numbers.read_text().splitlines()]
    names = ("train/loss", "train/perplexity", "val/perplexity")
    return {name: [row[name] for row in rows if name in row] for name in names}


@pytest.mark.parametrize(("size", "mesh"), [(2, "tp=2"), (4, "dp_shard=2,tp=2")])
def test_on_a_mesh_the_language_model_learns_what_it_learns_in_one_process(
    tmp_path: Path, size: int, mesh: str
) -> None:
    options = ("epochs=2", "max_texts=210", "warm_up=2", "model.num_layers=1", "model.dropout=0")
    run_ranks(run_example, 1, "language_model", *options, f"output={tmp_path / 'one'}", init=False, deadline_s=200.0)
    spread = (*options, "--mesh", mesh, f"output={tmp_path / 'mesh'}")
    printed = run_ranks(run_example, size, "language_model", *spread, init=False, deadline_s=300.0)
    assert "Checkpoint: " in printed[0]
    one, on_mesh = curve(tmp_path / "one"), curve(tmp_path / "mesh")
    assert [len(values) for values in one.values()] == [1, 2, 2]
    if "dp_shard" in mesh:  # a single loss is of the texts of rank 0
        assert len(on_mesh.pop("train/loss")) == len(one.pop("train/loss"))
    for name, values in one.items():
        assert on_mesh[name] == pytest.approx(values, rel=1e-4), name
