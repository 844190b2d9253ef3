"""How far a run has started, as another thread reads it."""

from typing import Any

from dengine.control.run import END, OwnRun, Runs, position


class Crossing(OwnRun):
    """A run whose loop enters the next epoch, and goes on in it, while a thread reads how far it has started."""

    is_crossing = False

    def __getattribute__(self, name: str) -> Any:
        if name == "iteration" and self.is_crossing:
            self.is_crossing = False
            self.started = position(1, 1)
            self.iteration = 12
        return super().__getattribute__(name)


def test_it_grows_with_the_iterations_of_an_epoch() -> None:
    run = OwnRun(Runs())
    run.begin_at(7)
    assert run.started == -1
    run.started = position(3, 1)
    for done in range(1, 4):
        run.iteration = 7 + done
        assert run.started == position(3, 1 + done)
    run.started = position(3, END)
    assert run.started == position(3, END)
    run.started = position(4, 0)
    assert run.started == position(4, 0)


def test_a_thread_that_reads_while_an_epoch_is_entered_sees_it() -> None:
    run = Crossing(Runs())
    run.begin_at(10)
    run.started = position(0, 11)
    run.is_crossing = True
    assert run.started == position(1, 3)
