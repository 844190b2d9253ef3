"""What a person sees: in a terminal, and in a log file."""

import fcntl
import io
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
import types
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from dengine import Engine, Events
from dengine.handlers import ProgressBar

LINE = re.compile(r"Epoch \[2/2\]: 100%\|█+\| 5/5 \[00:0\d<00:00, +[\d.]+it/s, loss=0\.345\]")


def become_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """To be called in the test itself: before it, stderr is another one."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)


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
    become_terminal(monkeypatch)
    text = shown(
        capsys, ProgressBar(persist=True), {"loss": 0.345}, metric_names=["loss"], output_transform=lambda o: o
    )
    assert len([part for part in text.split("\r") if "Epoch [1/2]" in part]) >= 3
    assert "100%" in text


SCRIPT = """
from dengine import Engine
from dengine.handlers import ProgressBar
trainer = Engine(lambda engine, batch: 0.345)
ProgressBar(persist=True).attach(trainer, output_transform=lambda output: {"loss": output})
trainer.run(range(7))
"""


@pytest.mark.parametrize("rows_and_columns", [(0, 0), (30, 90)])
def test_a_real_terminal_shows_it_also_where_it_does_not_know_its_size(rows_and_columns: tuple[int, int]) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *rows_and_columns, 0, 0))
    process = subprocess.run([sys.executable, "-c", SCRIPT], stdout=theirs, stderr=theirs, timeout=600)
    os.close(theirs)
    shown = os.read(ours, 100_000).decode()
    os.close(ours)
    assert process.returncode == 0
    assert re.search(r"Epoch \[1/1\]: 100%\|█+\| 7/7 .*loss=0\.345\]\r?\n$", shown), shown


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


def test_a_transform_that_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="output_transform='loss' must be callable"):
        ProgressBar().attach(Engine(lambda engine, batch: batch), output_transform="loss")  # type: ignore[arg-type]


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
    assert re.search(r"Epoch \[1/1\]: +50%.* 1/2 ", capsys.readouterr().err)


def test_a_failing_run_closes_the_bar_in_a_terminal_and_reads_no_value_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    become_terminal(monkeypatch)
    reads: list[Any] = []

    def step(engine: Engine, batch: int) -> int:
        time.sleep(0.11)
        return 1 // batch

    trainer = Engine(step)
    ProgressBar().attach(trainer, output_transform=lambda output: reads.append(output) or {"x": output})
    with pytest.raises(ZeroDivisionError):
        trainer.run([1, 1, 0])
    assert len(reads) == 2
    assert len(tqdm._instances) == 0  # type: ignore[attr-defined]


def test_an_epoch_that_is_cut_short_is_a_line_too(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Engine(lambda engine, batch: engine.terminate() if batch == 3 else None)
    ProgressBar().attach(trainer)
    trainer.run(range(10))
    (line,) = capsys.readouterr().err.splitlines()
    assert " 4/10 " in line


def test_a_long_epoch_gives_a_line_every_five_minutes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 0.0

    def clock() -> float:
        return now_s

    def step(engine: Engine, batch: int) -> None:
        nonlocal now_s
        now_s += 10

    monkeypatch.setattr(time, "monotonic", clock)
    trainer = Engine(step)
    ProgressBar().attach(trainer)
    trainer.run(range(100))  # 1000 s
    counts = re.findall(r" (\d+)/100 ", capsys.readouterr().err)
    assert counts == ["30", "60", "90", "100"]


def test_one_bar_shows_two_engines_each_with_values_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    bar = ProgressBar()
    trainer, evaluator = Engine(lambda engine, batch: {"loss": 0.5}), Engine(lambda engine, batch: {"acc": 0.25})
    bar.attach(trainer, ["loss"], lambda output: output)
    bar.attach(evaluator, ["acc"], lambda output: output)
    trainer.on(Events.EPOCH_COMPLETED, lambda engine: evaluator.run(range(3)) and None)
    trainer.run(range(5))
    first, second = capsys.readouterr().err.splitlines()
    assert " 5/5 " in first
    assert "loss=0.5]" in first
    assert " 3/3 " in second
    assert "acc=0.25]" in second


def test_a_notebook_gets_its_own_kind_of_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []

    class Widget(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            made.append(self)
            super().__init__(*args, **{**options, "file": io.StringIO()})

    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    monkeypatch.setattr("tqdm.auto.tqdm", Widget)
    trainer = Engine(lambda engine, batch: time.sleep(0.03))
    ProgressBar().attach(trainer)
    trainer.run(range(5), max_epochs=2)
    assert [bar.desc for bar in made] == ["Epoch [1/2]", "Epoch [2/2]"]
    assert [bar.n for bar in made] == [5, 5]


def test_no_value_is_read_in_an_iteration_that_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    become_terminal(monkeypatch)
    reads: list[int] = []

    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.overloadpacket.__name__ == "_local_scalar_dense":
                reads.append(1)
            return func(*args, **(kwargs or {}))

    loss = torch.tensor(1.0)
    trainer = Engine(lambda engine, batch: loss)
    ProgressBar().attach(trainer, output_transform=lambda output: {"loss": output})
    started_s = time.monotonic()
    with Reads():
        trainer.run(range(5000))
    assert 2 <= len(reads) <= 3 + (time.monotonic() - started_s) / 0.1


def test_a_run_resumed_within_an_epoch_begins_where_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    first = Engine(lambda engine, batch: batch)
    first.on(Events.ITERATION_COMPLETED(once=3), lambda engine: engine.terminate())
    first.run(range(5))
    second = Engine(lambda engine, batch: batch)
    ProgressBar().attach(second)
    second.load_state_dict(first.state_dict())
    second.run(range(5))
    assert "100%" in capsys.readouterr().err


def test_a_bar_that_is_attached_within_an_epoch_shows_no_more_than_another(capsys: pytest.CaptureFixture[str]) -> None:
    trainer = Engine(lambda engine, batch: None)
    trainer.on(Events.EPOCH_STARTED, lambda engine: ProgressBar().attach(engine))
    trainer.run(range(50))
    assert len(capsys.readouterr().err.splitlines()) <= 2
