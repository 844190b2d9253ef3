"""Show the progress of a run, on rank 0."""

import shutil
import sys
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from dengine.distributed import world
from dengine.engine import Engine, Events
from dengine.handlers.arguments import (
    MetricNames,
    as_number,
    check_engine,
    check_function,
    checked_names,
    has_output,
    warn_of_no_output,
)
from dengine.handlers.priorities import Priority
from dengine.handlers.tracking_handler import metrics_and_outputs
from dengine.metrics.core.metric import OutputTransform
from dengine.naming import a_type, other_keywords, shown

if TYPE_CHECKING:
    from tqdm import tqdm

__all__ = ["ProgressBar"]

_REDRAW_S = 0.1
_LINE_S = 300.0  # so that a log file shows that an epoch of hours goes on
_LOG_COLUMNS = 100


class ProgressBar:
    """Shows a bar for each epoch: `Epoch [1/10]: 100%|███| 1000/1000 [01:23<00:00, 12.01it/s, loss=0.345]`, by tqdm.

    Rank 0 draws; on the other ranks `attach` does nothing. In a terminal and in a notebook the bar moves. If stderr is
    a file, there is a line when an epoch ends or is cut short, and one every five minutes before. Values on a GPU are
    read only when they are drawn, at most ten times a second, and not after a failure, when they may be unreadable. It
    writes to stderr, as tqdm does. One bar may show several engines.

    Args:
        persist: keep the bars of finished epochs; otherwise the next epoch's replaces them.
        desc: shown instead of "Epoch".

    Example:
        >>> from dengine import Engine
        >>> trainer = Engine(lambda engine, batch: {"loss": 1 / batch})
        >>> ProgressBar().attach(trainer, output_transform=lambda output: {"loss": output["loss"]})
        >>> state = trainer.run(range(1, 10), max_epochs=2)
    """

    @other_keywords(
        metric_names="pass it to attach(): ProgressBar().attach(engine, metric_names=...)",
        output_transform="pass it to attach(): ProgressBar().attach(engine, output_transform=...)",
        bar_format='the bar has one form; desc= is shown instead of "Epoch"',
    )
    def __init__(self, persist: bool = False, desc: str | None = None) -> None:
        self._persist = persist
        self._desc = desc or "Epoch"

    def __repr__(self) -> str:
        return shown(self, persist=self._persist or None, desc=self._desc)

    def attach(
        self,
        engine: Engine,
        metric_names: MetricNames = None,
        output_transform: OutputTransform | None = None,
    ) -> None:
        """Show the run of `engine`.

        Args:
            metric_names: values to show, by name: of `state.metrics`, or of the mapping that `output_transform` gives;
                "all" shows every metric that is a number, besides what `output_transform` gives.
            output_transform: turns the step's output into a number, or a mapping of names to numbers; values of a
                mapping that are not numbers are left out.

        Raises:
            TypeError: `engine` is not an Engine; `metric_names` is a string other than "all"; `output_transform` cannot
                be called with the output or (when shown) gives neither a number nor a mapping.
            ValueError: (when shown) a name in `metric_names` is both a metric's and an output's.
            KeyError: (at the end of the first epoch) there is no value with such a name; the message lists the names.
        """
        check_engine(self, engine)
        if isinstance(metric_names, str) and metric_names != "all":
            raise TypeError(f'metric_names={metric_names!r} must be a list of names: [{metric_names!r}], or "all".')
        names = checked_names(metric_names)
        check_function("output_transform", output_transform, "output")
        if world().rank == 0:
            _Display(self._persist, self._desc, names or (), output_transform).attach(engine)


class _Display:
    """The bar of one engine, or lines of text if stderr is a file."""

    def __init__(
        self,
        persist: bool,
        desc: str,
        metric_names: tuple[str, ...] | Literal["all"],
        output_transform: OutputTransform | None,
    ) -> None:
        self._persist = persist
        self._desc = desc
        self._metric_names = metric_names
        self._output_transform = output_transform
        self._bar: tqdm[Any] | None = None
        self._drawn_s = 0.0
        self._pause_s = 0.0  # the time from one drawing, or line, to the next
        self._started_s = 0.0
        self._first_iteration = 0
        self._num_done = 0  # state.epoch_iteration counts one that failed
        self._is_open = False  # whether there are iterations that no line or finished bar shows

    def attach(self, engine: Engine) -> None:
        engine.on(Events.STARTED | Events.EPOCH_STARTED, self._begin, priority=Priority.EARLY)
        # At the end of an iteration after the other handlers; at the end of an epoch before them, so that what they
        # print stands below the bar.
        engine.on(Events.ITERATION_COMPLETED, self._advance, priority=Priority.LATE)
        engine.on(Events.EPOCH_COMPLETED, self._finish, priority=Priority.EARLY)
        engine.on(Events.COMPLETED | Events.EXCEPTION_RAISED, self._leave, priority=Priority.EARLY)

    # -- handlers ------------------------------------------------------------------------------------------------

    def _begin(self, engine: Engine) -> None:
        self._close()  # the bar of a run that ended without an event
        self._started_s = time.time()
        # Not 0 if a run was resumed within an epoch.
        self._num_done = self._first_iteration = engine.state.epoch_iteration
        self._drawn_s = time.monotonic()
        if self._is_drawn():
            self._drawn_s = 0.0  # the first iteration is shown

    def _advance(self, engine: Engine) -> None:
        self._is_open = True
        self._num_done = engine.state.epoch_iteration
        now_s = time.monotonic()
        if now_s - self._drawn_s < self._pause_s:
            return
        self._drawn_s = now_s
        if self._is_drawn():
            self._draw(engine)
        else:
            self._print(engine)

    def _is_drawn(self) -> bool:
        """Whether a bar can be drawn. Sets the pause until the next drawing, too.

        This costs a system call, so it is called once an epoch, and when something is shown.
        """
        is_drawn = _is_interactive()
        self._pause_s = _REDRAW_S if is_drawn else _LINE_S
        return is_drawn

    def _finish(self, engine: Engine) -> None:
        if self._metric_names != "all":
            self._check_names(engine, self._metric_names)
        self._show_last(engine)

    def _check_names(self, engine: Engine, names: tuple[str, ...]) -> None:
        have = {**dict.fromkeys(engine.state.metrics), **self._output_values(engine)}
        missing = [name for name in names if name not in have]
        if missing and (self._output_transform is None or has_output(engine)):
            raise KeyError(
                f"The progress bar was asked to show {', '.join(map(repr, missing))}, but there is "
                f"{', '.join(map(repr, have)) or 'no value'}."
            )

    def _leave(self, engine: Engine) -> None:
        try:
            if self._is_open:
                self._show_last(engine)
        finally:
            self._close()

    # -- showing -------------------------------------------------------------------------------------------------

    def _show_last(self, engine: Engine) -> None:
        self._is_open = False
        if _is_interactive():
            self._draw(engine)
            self._close()
        else:
            self._print(engine)

    def _close(self) -> None:
        self._is_open = False
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _draw(self, engine: Engine) -> None:
        if self._bar is None:
            from tqdm.auto import tqdm  # a terminal's bar, or a notebook's

            size = shutil.get_terminal_size() if sys.stderr.isatty() else None
            # The delay keeps it from drawing itself before it has anything to show.
            self._bar = tqdm(
                desc=self._title(engine),
                initial=self._first_iteration,
                total=engine.state.epoch_length,
                leave=self._persist,
                delay=1e-9,
                # A pseudo-terminal may have no columns and no rows, in which tqdm would draw nothing.
                ncols=None if size is None else size.columns,
                nrows=None if size is None else size.lines,
            )
            self._bar.start_t = self._started_s  # not now: the first iteration is over
        self._bar.n = self._num_done
        self._bar.total = engine.state.epoch_length
        self._bar.set_postfix_str(self._shown_values(engine), refresh=False)
        self._bar.refresh()

    def _print(self, engine: Engine) -> None:
        from tqdm import tqdm

        line = tqdm.format_meter(
            self._num_done,
            # If the length is unknown until the epoch has ended, None gives a line without a percentage.
            engine.state.epoch_length,  # type: ignore[arg-type]
            time.time() - self._started_s,
            initial=self._first_iteration,
            prefix=self._title(engine),
            postfix=self._shown_values(engine),
            ncols=_LOG_COLUMNS,
        )
        print(line, file=sys.stderr, flush=True)

    def _title(self, engine: Engine) -> str:
        state = engine.state
        number = state.epoch + 1
        return f"{self._desc} [{number}]" if state.max_epochs is None else f"{self._desc} [{number}/{state.max_epochs}]"

    def _shown_values(self, engine: Engine) -> str:
        """The text after the bar. Values are read from a device only here."""
        if engine.state.exception is not None:  # the device may have failed, or wait for a rank that is gone
            return ""
        values = self._output_values(engine)
        if self._metric_names == "all":
            values = metrics_and_outputs(engine, values)
        elif self._metric_names:
            have = metrics_and_outputs(engine, values, self._metric_names)
            values = {name: have[name] for name in self._metric_names if name in have}
        numbers = {name: as_number(value) for name, value in values.items()}
        return ", ".join(f"{name}={number:.4g}" for name, number in numbers.items() if number is not None)

    def _output_values(self, engine: Engine) -> dict[str, Any]:
        if self._output_transform is None:
            return {}
        if not has_output(engine):
            warn_of_no_output("ProgressBar")
            return {}
        shown = self._output_transform(engine.state.output)
        if isinstance(shown, Mapping):
            return dict(shown)
        if as_number(shown) is None:
            raise TypeError(
                f"output_transform gave {a_type(shown)}, but must give a number, or a mapping of names "
                'to numbers: output_transform=lambda output: {"loss": output}.'
            )
        return {"output": shown}


def _is_interactive() -> bool:
    """Whether stderr is a terminal or a notebook, in which a bar can be redrawn."""
    return sys.stderr.isatty() or "ipykernel" in sys.modules
