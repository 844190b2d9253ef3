"""Iterations that belong together are left together."""

import pytest

from dengine import Engine, Events


@pytest.mark.parametrize(("at", "expected"), [(1, 3), (3, 3), (4, 6), (7, 8)])
@pytest.mark.parametrize("call", ["terminate", "preempt", "terminate_epoch"])
def test_a_stop_waits_for_the_rest_of_its_group_or_the_end_of_the_epoch(call: str, at: int, expected: int) -> None:
    engine = Engine(lambda engine, batch: batch, stop_every=3)
    engine.on(Events.ITERATION_COMPLETED(once=at), lambda engine: getattr(engine, call)())
    assert engine.run(range(8)).iteration == expected


def test_groups_begin_with_the_epoch() -> None:
    engine = Engine(lambda engine, batch: batch, stop_every=3)
    engine.on(Events.ITERATION_COMPLETED(once=5), lambda engine: engine.terminate())
    assert engine.run(range(4), max_epochs=3).iteration == 4 + 3


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.5, TypeError), (True, TypeError)])
def test_a_wrong_size_is_refused(value: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="stop_every"):
        Engine(lambda engine, batch: batch, stop_every=value)  # type: ignore[arg-type]
