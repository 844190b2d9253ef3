"""`dengine plot`: a picture, or a sentence that says why there is none."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dengine.tools import plot
from dengine.tracking import Track


def recorded(folder: Path, name: str | None = None) -> Path:
    with Track.run("p", name, dir=folder) as run:
        for epoch in range(5):
            row = {"train/loss": 1 / (epoch + 1), "val": {"loss": 2 / (epoch + 1), "acc": epoch / 5}, "epoch": epoch}
            run.log({**row, "lr": 10.0**-epoch, "samples_per_s": 1000.0}, step=epoch)
    return run.dir


def plotted(*arguments: object) -> int:
    parser = argparse.ArgumentParser()
    plot.configure(parser)
    return plot.run(parser.parse_args([*map(str, arguments)]))


def test_a_run_becomes_a_picture_with_a_panel_for_each_metric(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    figures: list[Any] = []

    class Figure(figure_module.Figure):  # type: ignore[name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            figures.append(self)

    monkeypatch.setattr(figure_module, "Figure", Figure)
    assert plotted(recorded(tmp_path), "-o", tmp_path / "curves.png") == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    panels = {axes.get_title(loc="left"): axes for axes in figures[0].axes}
    assert list(panels) == ["loss", "acc", "learning rate", "samples per second"]
    assert [text.get_text() for text in panels["loss"].get_legend().get_texts()] == ["training", "validation"]
    assert [text.get_text() for text in panels["acc"].get_legend().get_texts()] == [
        "validation",
        "best: 80.00% (epoch 4)",
    ]
    assert panels["learning rate"].get_yscale() == "log"


def test_several_runs_lie_over_each_other_and_those_of_one_name_are_with_unique_labels(tmp_path: Path) -> None:
    runs = [recorded(tmp_path, "same"), recorded(tmp_path, "same"), recorded(tmp_path, "other")]
    drawn = plot._with_unique_labels([plot._read(run) for run in runs], runs)
    assert [each.label for each in drawn] == [f"same ({runs[0].name})", f"same ({runs[1].name})", "other"]
    assert plotted(*runs, "-o", tmp_path / "curves.svg") == 0


def test_the_half_line_of_a_run_that_goes_on_is_left_out(tmp_path: Path) -> None:
    run_dir = recorded(tmp_path)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "ti')
    assert plotted(run_dir, "-o", tmp_path / "curves.png") == 0


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "has no metrics.jsonl: pass the folder of a run"),
        ("", "has no metrics yet: 0 rows"),
        ('{"step": 1, "phase": "x"}\n', "has no metrics yet: 1 rows"),
        ('{"step": 1, "x": 1}\n{"step"\n[1]\n', "is damaged in line 2, 3: it holds no JSON object"),
        ('{"step": 1, "x": "NaN"}\n', "no number to draw"),
    ],
)
def test_what_cannot_be_drawn_is_a_sentence_and_exit_code_2(
    lines: str | None, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if lines is not None:
        (tmp_path / "metrics.jsonl").write_text(lines)
    assert plotted(tmp_path, "-o", tmp_path / "curves.png") == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.err.count("\n") == 1
    assert printed.out == ""
    assert not (tmp_path / "curves.png").exists()


def test_a_picture_that_cannot_be_written_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = recorded(tmp_path)
    for output in (tmp_path / "nowhere" / "curves.png", tmp_path / "curves.nonsense"):
        assert plotted(run_dir, "-o", output) == 2
        assert "cannot be written" in capsys.readouterr().err


def test_names_that_look_like_formulas_and_numbers_beyond_the_floats_are_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib.figure")
    with Track.run("p", r"$x_$ \frac", dir=tmp_path) as run:
        for step in range(3):
            run.log({r"$a_$ \frac": step, r"lr/$b_$ \frac": 0.1, "huge": 10**400 if step else 1})
    assert plotted(run.dir, run.dir, "-o", tmp_path / "two.png") == 0
    assert plotted(run.dir, "-o", tmp_path / "one.png") == 0


def test_a_picture_without_a_suffix_gets_one_and_a_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib.figure")
    run_dir = recorded(tmp_path)
    assert plotted(run_dir, "-o", tmp_path / "curves") == 0
    assert capsys.readouterr().out == f"{tmp_path / 'curves.png'}\n"
    assert (tmp_path / "curves.png").is_file()
    (tmp_path / "empty").mkdir()
    assert plotted(run_dir, "-o", tmp_path / "empty") == 2
    assert f"empty is a folder: pass the name of the picture, -o {tmp_path}/empty/curves.png" in capsys.readouterr().err
    assert not (tmp_path / "empty.png").exists()


def test_without_matplotlib_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = recorded(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plotted(run_dir) == 2
    assert 'pip install "dengine[examples]"' in capsys.readouterr().err


def test_rows_of_other_writers_are_drawn_as_well(tmp_path: Path) -> None:
    rows = [{"epoch": n + 1, "step": 44 * n, "train/loss": 1.0, "val/acc": 0.5} for n in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plotted(tmp_path / "metrics.jsonl", "-o", tmp_path / "curves.png") == 0
