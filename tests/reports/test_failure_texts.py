"""What is told of an exception, whatever it came of and whatever its own methods do."""

import builtins
import queue
import sys

import pytest

from dengine.control.call_log import user_line
from dengine.control.failure import Failure, cause_chain, is_of_backend, line_of, repr_of, traceback_of
from dengine.control.undisturbed import undisturbed
from dengine.launch.parsing import parse_numbers, parse_object


def circle(length: int, *, by_context: bool) -> BaseException:
    errors: list[BaseException] = [ValueError(f"planted {number}") for number in range(length)]
    for number, error in enumerate(errors):
        following = errors[(number + 1) % length]
        if by_context:
            error.__context__ = following
        else:
            error.__cause__ = following
    return errors[0]


@pytest.mark.parametrize(
    ("length", "by_context"), [(1, False), (2, False), (100, False), (2, True), (100, True)]
)  # Python makes none its own context
def test_a_circle_of_causes_ends(length: int, by_context: bool) -> None:
    error = circle(length, by_context=by_context)
    assert len(cause_chain(error)) == length
    assert not is_of_backend(error)
    assert "ValueError: planted 0" in traceback_of(error)


def test_of_a_long_chain_the_first_and_the_last_are_shown() -> None:
    error: BaseException = KeyError("root")
    for number in range(100_000):
        above = RuntimeError(f"link {number}")
        above.__cause__, error = error, above
    text = traceback_of(error)
    assert "KeyError: 'root'" in text
    assert text.rstrip().endswith("RuntimeError: link 99999")
    assert len(text) < 20_000


class Mute(RuntimeError):
    def __str__(self) -> str:
        raise ZeroDivisionError

    __repr__ = __str__


class Exits(ValueError):
    def __str__(self) -> str:
        sys.exit(5)

    __repr__ = __str__


class LongTalk(ValueError):
    def __str__(self) -> str:
        return "x" * 10_000_000


def test_an_exception_without_a_text_and_one_with_a_long_one_are_told() -> None:
    assert "Mute" in line_of(Mute())
    assert "Mute" in traceback_of(Mute())
    assert not is_of_backend(Mute())
    assert len(line_of(LongTalk())) < 3_000


def test_an_exception_whose_text_ends_the_process_is_told_by_its_own_name() -> None:
    assert "Exits" in line_of(Exits())
    assert "Exits" in repr_of(Exits())
    assert "Exits" in traceback_of(Exits())


def test_the_line_of_a_wait_is_the_scripts_own_and_not_one_of_the_standard_library() -> None:
    found: list[str] = []

    class Queue(queue.Queue[int]):
        def _qsize(self) -> int:
            frame = sys._getframe(1)  # in queue.py
            found.append(user_line(frame))
            return 1

    Queue().qsize()
    assert "test_failure_texts.py" in found[0], found
    assert "in test_the_line_of_a_wait" in found[0], found


def test_a_group_is_a_broken_connection_if_all_of_it_is() -> None:
    group = getattr(builtins, "ExceptionGroup", None)
    if group is None:
        pytest.skip("Python 3.11")
    broken, own = RuntimeError("Connection closed by peer"), ValueError("planted")
    assert is_of_backend(group("both", [broken, group("within", [broken])]))
    assert not is_of_backend(group("both", [broken, group("within", [own])]))


def test_a_broken_connection_that_something_else_was_raised_from_is_seen() -> None:
    error = ValueError("planted")
    error.__cause__ = RuntimeError("[gloo] Connection reset by peer")
    assert is_of_backend(error)


def test_what_is_no_failure_is_refused() -> None:
    told = Failure("raised", 1, "ValueError: planted").to_dict()
    assert Failure.from_dict(told) == Failure("raised", 1, "ValueError: planted")
    for change in ({"kind": "no such kind"}, {"rank": "1"}, {"where": [{"epoch": 1}]}, {"where": 3}, {"more": 1}):
        with pytest.raises((TypeError, ValueError)):
            Failure.from_dict({**told, **change})


def test_what_is_malformed_is_left_out() -> None:
    assert parse_object(b'{"kind": "call"}') == {"kind": "call"}
    for text in (b"\xff", b"[]", b"3", b"{", b"[" * 100_000, b'{"a": ' + b"1" * 5000 + b"}"):
        assert parse_object(text) is None
    assert parse_numbers(b"1 x -2 \xff 99999999999999999999999 3") == [1, -2, 3]


def test_what_is_done_undisturbed_gives_its_result_or_its_error() -> None:
    assert undisturbed(lambda: 3) == (3, None)
    with pytest.raises(ZeroDivisionError):
        undisturbed(lambda: 1 // 0)
