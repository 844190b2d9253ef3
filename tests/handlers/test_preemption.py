"""A signal ends the run after its iteration, with a save, and the signals are given back."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from dengine import Engine, Events
from dengine.checkpoint import verify
from dengine.handlers import Checkpoint, Preemption


def preempted(at: int, event: str = "step", number: int = signal.SIGUSR1, **options: Any) -> tuple[Engine, list[str]]:
    log: list[str] = []

    def send() -> None:
        os.kill(os.getpid(), number)

    def step(engine: Engine, batch: int) -> None:
        if event == "step" and engine.state.iteration == at:
            send()

    trainer = Engine(step)
    if event != "step":
        trainer.on(Events[event](once=at), lambda engine: send())
    for each in (Events.TERMINATED, Events.COMPLETED, Events.EPOCH_COMPLETED):
        trainer.on(each, lambda engine, name=each.name: log.append(name))
    Preemption(lambda engine: log.append(f"saved {engine.state.iteration}"), **options).attach(trainer)
    trainer.run(range(5), max_epochs=3)
    return trainer, log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
def test_a_signal_in_a_step_saves_after_that_iteration_and_completes_nothing(number: int) -> None:
    before = signal.getsignal(number)
    trainer, log = preempted(3, number=number)
    assert log == ["TERMINATED", "saved 3"]
    assert trainer.state.preempted
    assert trainer.state.iteration == 3
    assert signal.getsignal(number) is before


def test_a_preempted_run_waits_for_every_asynchronous_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.2)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", slow)
    trainer = Engine(lambda engine, batch: os.kill(os.getpid(), signal.SIGUSR1) if batch == 2 else None)
    other = Checkpoint({"trainer": trainer}, tmp_path, "other", asynchronous=True)
    trainer.on(Events.ITERATION_COMPLETED(once=3), other)
    Preemption(lambda engine: None).attach(trainer)
    state = trainer.run(range(5))
    assert state.preempted
    assert verify(tmp_path / "other_3.pt").step == 3
    assert other.last_path == tmp_path / "other_3.pt"


def test_a_signal_at_the_end_of_an_epoch_saves_before_the_next() -> None:
    trainer, log = preempted(1, "EPOCH_COMPLETED")
    assert log == ["EPOCH_COMPLETED", "TERMINATED", "saved 5"]
    assert trainer.state.epochs_completed == 1


def test_a_run_goes_on_where_it_was_saved() -> None:
    trainer, _ = preempted(7)
    again = Engine(lambda engine, batch: None)
    again.load_state_dict(trainer.state_dict())
    state = again.run(range(5), max_epochs=3)
    assert (state.iteration, state.preempted) == (15, False)


@pytest.mark.parametrize("fails", [False, True])
def test_signals_are_given_back_after_any_run(fails: bool) -> None:
    mine: list[int] = []
    before = signal.signal(signal.SIGUSR2, lambda number, frame: mine.append(number))
    try:
        trainer = Engine(lambda engine, batch: 1 / 0 if fails else None)
        Preemption(lambda engine: None).attach(trainer)
        try:
            trainer.run(range(2))
        except ZeroDivisionError:
            assert fails
        os.kill(os.getpid(), signal.SIGUSR2)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert mine == [signal.SIGUSR2]


@pytest.mark.parametrize("nested", [False, True])
def test_two_of_them_give_the_signals_back_as_they_were(nested: bool) -> None:
    before = signal.getsignal(signal.SIGUSR2)
    saved: list[str] = []
    trainer = Engine(lambda engine, batch: None if nested else os.kill(os.getpid(), signal.SIGUSR2))
    Preemption(lambda engine: saved.append("one")).attach(trainer)
    inner = Engine(lambda engine, batch: None) if nested else trainer
    Preemption(lambda engine: saved.append("two")).attach(inner)
    if nested:

        @trainer.on(Events.ITERATION_COMPLETED(once=2))
        def evaluate(engine: Engine) -> None:
            inner.run([1])
            os.kill(os.getpid(), signal.SIGUSR2)  # the trainer's again

    for _ in range(2):
        assert trainer.run(range(5)).preempted
        assert signal.getsignal(signal.SIGUSR2) is before
    assert saved == 2 * (["one"] if nested else ["one", "two"])


def test_further_signals_are_no_harm_and_one_after_the_run_is_as_before_it() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        saved: list[int] = []

        def save(engine: Engine) -> None:
            os.kill(os.getpid(), signal.SIGUSR1)  # while it is being saved
            saved.append(engine.state.iteration)

        def step(engine: Engine, batch: int) -> None:
            for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1):
                os.kill(os.getpid(), number)

        trainer = Engine(step)
        Preemption(save).attach(trainer)
        assert trainer.run(range(5)).preempted
        assert saved == [1]
        assert heard == []
        os.kill(os.getpid(), signal.SIGUSR1)
        assert heard == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("event", ["STARTED", "EPOCH_STARTED"])
def test_a_signal_before_the_first_iteration_saves_after_it(event: str) -> None:
    trainer, log = preempted(1, event)
    assert log == ["TERMINATED", "saved 1"]
    assert trainer.state.preempted


def test_a_signal_when_all_is_done_lets_the_run_complete() -> None:
    log: list[str] = []
    trainer = Engine(lambda engine, batch: None)
    trainer.on(Events.EPOCH_COMPLETED(once=2), lambda engine: os.kill(os.getpid(), signal.SIGUSR1))
    trainer.on(Events.COMPLETED, lambda engine: log.append("completed"))
    Preemption(lambda engine: log.append("saved")).attach(trainer)
    assert not trainer.run(range(3), max_epochs=2).preempted
    assert log == ["completed"]


class Writer:
    """Writes asynchronously: what it was asked to save is safe once it was waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def __call__(self, engine: Engine) -> None:
        self.log.append("save")

    def wait(self) -> None:
        self.log.append("wait")


def test_the_run_is_left_only_when_the_last_write_is_safe() -> None:
    writer = Writer()
    trainer = Engine(lambda engine, batch: os.kill(os.getpid(), signal.SIGTERM))
    Preemption(writer).attach(trainer)
    trainer.run([1, 2])
    assert writer.log == ["save", "wait"]


def test_a_terminated_run_that_nobody_preempted_saves_nothing_and_completes() -> None:
    log: list[str] = []
    trainer = Engine(lambda engine, batch: engine.terminate())
    Preemption(lambda engine: log.append("saved")).attach(trainer)
    trainer.on(Events.COMPLETED, lambda engine: log.append("completed"))
    assert not trainer.run([1, 2]).preempted
    assert log == ["completed"]


def test_outside_the_main_thread_it_says_that_it_hears_nothing() -> None:
    trainer = Engine(lambda engine, batch: None)
    Preemption(lambda engine: None).attach(trainer)
    caught: list[Warning] = []

    def run() -> None:
        with pytest.warns(RuntimeWarning, match="main thread") as warned:
            trainer.run([1])
        caught.extend(each.message for each in warned)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert caught


@pytest.mark.parametrize(
    ("signals", "words"), [((), "at least one"), ((signal.SIGKILL,), "SIGKILL"), ((4711,), "4711")]
)
def test_signals_that_cannot_be_heard_are_refused(signals: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Preemption(lambda engine: None, signals)


def test_what_cannot_be_called_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a Checkpoint"):
        Preemption("checkpoint")  # type: ignore[arg-type]


@pytest.mark.parametrize("signals", ["SIGTERM", 15])
def test_signals_that_are_no_list_are_refused(signals: Any) -> None:
    with pytest.raises(TypeError, match="must be a list of signals"):
        Preemption(print, signals=signals)
