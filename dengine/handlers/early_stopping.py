"""End the training when a score has not improved for a while."""

import math
from collections.abc import Callable, Mapping
from typing import Literal

from dengine.checks import is_number, is_whole_number, number, whole_number
from dengine.comm.outcome import from_rank_zero
from dengine.engine import Engine, Events
from dengine.handlers.score import check_score_function, score_of
from dengine.naming import a_type, other_keywords, other_names, shown
from dengine.types import MetricValue

__all__ = ["EarlyStopping"]


@other_names(
    attach="it takes one event, so write evaluator.on(Events.EPOCH_COMPLETED, handler)",
)
class EarlyStopping:
    """Terminates `trainer` once `score_function` has not improved in `patience` calls in a row.

    Attach it on every rank, to the engine whose metrics the score reads: `evaluator.on(Events.EPOCH_COMPLETED, stop)`.
    Rank 0 decides, and all ranks stop. Collective, unless the engine is one rank's own. Cost: one small object
    broadcast a call. A new run of `trainer` begins without a best score. A run that is resumed after the patience had
    run out ends before its next iteration.

    Args:
        patience: calls without an improvement after which the training ends.
        score_function: `score_function(engine) -> float`, called on rank 0. NaN is not an improvement.
        trainer: the engine to terminate.
        min_delta: an improvement must be larger than this.
        cumulative_delta: measure `min_delta` from the score of the last improvement; otherwise from the best score
            so far, which small improvements raise, too.
        mode: "max": a higher score is better; "min": a lower one is, as with a loss.
        start_after: the number of calls at the beginning of the training that are ignored: they compute no score, and
            do not count.

    Raises:
        TypeError, ValueError: an argument is wrong. TypeError: (when called) `score_function` did not give a number.

    Example:
        >>> from dengine import Engine, Events
        >>> trainer = Engine(lambda engine, batch: batch)
        >>> scores = iter([0.1, 0.5, 0.4, 0.3, 0.9])
        >>> stop = EarlyStopping(patience=2, score_function=lambda engine: next(scores), trainer=trainer)
        >>> handle = trainer.on(Events.EPOCH_COMPLETED, stop)
        >>> trainer.run([0], max_epochs=5).epoch
        3
    """

    is_collective = True

    @other_keywords(
        threshold="it is called min_delta=",
        cumulative="it is called cumulative_delta=",
    )
    def __init__(
        self,
        patience: int,
        score_function: Callable[[Engine], MetricValue],
        trainer: Engine,
        min_delta: float = 0.0,
        cumulative_delta: bool = False,
        mode: Literal["max", "min"] = "max",
        start_after: int = 0,
    ) -> None:
        self._patience = whole_number("patience", patience, least=1)
        check_score_function(score_function)
        if not isinstance(trainer, Engine):
            raise TypeError(f"trainer={trainer!r} must be the Engine to stop.")
        min_delta = number("min_delta", min_delta)
        if not min_delta >= 0:
            raise ValueError(f"min_delta={min_delta} must be at least 0: it says by how much a score must be better.")
        if mode not in ("max", "min"):
            raise ValueError(f'mode={mode!r} must be "max" (a higher score is better) or "min" (a lower one is).')
        self._score_function = score_function
        self._trainer = trainer
        self._min_delta = float(min_delta)
        self._is_cumulative = cumulative_delta
        self._sign = 1 if mode == "max" else -1
        self._start_after = whole_number("start_after", start_after, least=0)
        self._best: float | None = None
        self._num_calls_without_improvement = 0
        self._num_passed_over = 0
        self._is_loaded = False  # since the last run began
        trainer.on(Events.STARTED, self._begin)

    def __repr__(self) -> str:
        return shown(
            self,
            patience=self._patience,
            score_function=self._score_function,
            min_delta=self._min_delta or None,
            mode="min" if self._sign < 0 else None,
            start_after=self._start_after or None,
            best=self._best,
        )

    def __call__(self, engine: Engine) -> None:
        if self._num_passed_over < self._start_after:
            self._num_passed_over += 1
            return
        if engine.distributed:
            score = from_rank_zero(lambda: self._score(engine), "compute the score for early stopping")
        else:
            score = self._score(engine)
        if self._has_improved(score):
            self._num_calls_without_improvement = 0
            return
        self._num_calls_without_improvement += 1
        if self._num_calls_without_improvement >= self._patience:
            self._trainer.terminate()

    def state_dict(self) -> dict[str, float | int | None]:
        """The best score (None before the first one), the number of calls since then, and the number of ignored
        calls.
        """
        state_dict: dict[str, float | int | None] = {
            "best": self._best,
            "num_calls_without_improvement": self._num_calls_without_improvement,
        }
        return {**state_dict, "num_passed_over": self._num_passed_over} if self._start_after else state_dict

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        """Continue from a `state_dict()`. If it has no number of ignored calls, no more calls are ignored.

        Raises:
            ValueError: an entry is missing, unknown or wrong; the message names it, and nothing is changed.
        """
        wanted = {"best", "num_calls_without_improvement"}
        if not isinstance(state_dict, Mapping):
            raise ValueError(f"The state of EarlyStopping is a dict, but got {a_type(state_dict)}.")
        if missing := wanted - state_dict.keys():
            raise ValueError(f"The state of EarlyStopping lacks {', '.join(sorted(missing))}.")
        if unknown := state_dict.keys() - wanted - {"num_passed_over"}:
            raise ValueError(
                f"The state of EarlyStopping has unknown entries: {', '.join(sorted(map(repr, unknown)))}."
            )
        best = state_dict["best"]
        if best is not None and not is_number(best):
            raise ValueError(f"best={best!r} in the state of EarlyStopping must be a number or None.")
        num_calls = _count(state_dict, "num_calls_without_improvement")
        num_passed_over = (
            _count(state_dict, "num_passed_over") if "num_passed_over" in state_dict else self._start_after
        )
        self._best = None if best is None else float(best)
        self._num_calls_without_improvement = num_calls
        self._num_passed_over = num_passed_over
        self._is_loaded = True

    def _begin(self, engine: Engine) -> None:
        is_loaded, self._is_loaded = self._is_loaded, False
        if is_loaded and self._num_calls_without_improvement >= self._patience:
            # Else a run that was saved after its last epoch, and then killed or preempted, would get one epoch more.
            engine.terminate()
        elif not is_loaded and engine.state.iteration == 0:
            self._best, self._num_calls_without_improvement, self._num_passed_over = None, 0, 0

    def _score(self, engine: Engine) -> float:
        return score_of(engine, self._score_function, "early stopping")

    def _has_improved(self, score: float) -> bool:
        """Whether `score` is an improvement; it becomes the best score if later ones are to be compared with it."""
        if math.isnan(score):
            return False
        if self._best is None:
            self._best = score
            return True
        new, best = self._sign * score, self._sign * self._best
        has_improved = new > best + self._min_delta
        if has_improved or (new > best and not self._is_cumulative):
            self._best = score
        return has_improved


def _count(state_dict: Mapping[str, object], name: str) -> int:
    value = state_dict[name]
    if not is_whole_number(value) or value < 0:
        raise ValueError(f"{name}={value!r} in the state of EarlyStopping must be a whole number of at least 0.")
    return value
