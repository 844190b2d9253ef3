"""What a person sees: in a terminal, and in a log file."""

import re
import sys
import time
from typing import Any

import pytest
import torch

from dengine import Engine, Events
from dengine.handlers import ProgressBar

LINE = re.compile(r"Epoch \[2/2\]: 100%\|█+\| 5/5 \[00:0\d<00:00, +[\d.]+it/s, loss=0\.345\]")


def shown(
    capsys: pytest.CaptureFixture[str], bar: ProgressBar, output: Any, num_epochs: int = 2, **options: Any
) -> str:
    trainer = Engine(lambda engine, batch: time.sleep(0.03) or output)
    bar.attach(trainer, **options)
    trainer.run(range(5), max_epochs=num_epochs)
    return capsys.readouterr().err


def test_a_log_file_gets_one_line_an_epoch_in_the_format_of_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, ProgressBar(), {"loss": torch.tensor(0.345)}, output_transform=lambda o: o).splitlines()
    assert len(lines) == 2
    assert LINE.fullmatch(lines[1]), lines[1]


def test_a_terminal_gets_a_bar_that_moves(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    text = shown(
        capsys, ProgressBar(persist=True), {"loss": 0.345}, metric_names=["loss"], output_transform=lambda o: o
    )
    assert len([part for part in text.split("\r") if "Epoch [1/2]" in part]) >= 3
    assert "100%" in text


def test_values_are_read_only_when_they_are_shown() -> None:
    class Value:
        reads = 0

        def __float__(self) -> float:
            Value.reads += 1
            return 1.0

    def read(output: Any) -> dict[str, float]:
        return {"loss": float(output)}

    trainer = Engine(lambda engine, batch: Value())
    ProgressBar().attach(trainer, output_transform=read)
    trainer.run(range(1000))
    assert Value.reads <= 3


def test_metrics_of_the_epoch_are_shown_at_its_end(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Engine(lambda engine, batch: (torch.tensor([1]), torch.tensor([1])))
    from dengine.metrics import Accuracy

    trainer.add_metric(Accuracy(), "acc")
    ProgressBar(desc="Training").attach(trainer, metric_names=["acc"])
    trainer.run([0])
    assert re.search(r"Training \[1/1\].*acc=1\]", capsys.readouterr().err)


def test_a_name_that_is_not_there_lists_those_that_are(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyError, match="asked to show 'los', but there is 'loss'"):
        shown(capsys, ProgressBar(), {"loss": 1.0}, metric_names=["los"], output_transform=lambda o: o)


def test_a_string_is_not_a_list_of_names() -> None:
    with pytest.raises(TypeError, match=r"must be a list of names: \['loss'\]"):
        ProgressBar().attach(Engine(lambda engine, batch: batch), metric_names="loss")


def test_what_is_no_number_is_left_out_of_a_mapping(capsys: pytest.CaptureFixture[str]) -> None:
    output = {"loss": 0.5, "pred": torch.zeros(3, 4), "name": "x"}
    text = shown(capsys, ProgressBar(), output, 1, output_transform=lambda o: o)
    assert "loss=0.5]" in text
    assert "pred" not in text


def test_data_of_unknown_length_and_an_exception_leave_no_bar_open(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Engine(lambda engine, batch: 1 / batch)
    bar = ProgressBar()
    bar.attach(trainer)
    trainer.run(number for number in (1, 2))
    assert "2/2" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        trainer.run([1, 0])
    assert bar._bar is None


def test_a_run_resumed_within_an_epoch_begins_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    first = Engine(lambda engine, batch: batch)
    first.on(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate())
    first.run(range(5))
    second = Engine(lambda engine, batch: batch)
    ProgressBar().attach(second)
    second.load_state_dict(first.state_dict())
    second.run(range(5))
    assert "100%" in capsys.readouterr().err
