"""Log the metrics and outputs of an engine to a tracked run, on rank 0."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from dengine.distributed import world
from dengine.engine import Engine
from dengine.handlers.arguments import MetricNames, check_function, checked_names, has_output, warn_of_no_output
from dengine.handlers.step import StepTransform, check_step_transform, step_of
from dengine.metrics.core.metric import OutputTransform
from dengine.naming import a_type, other_keywords, other_names, shown
from dengine.tracking.run import Run
from dengine.tracking.values import RowMaker, scalar

__all__ = ["Sink", "TrackingHandler", "metrics_and_outputs", "sink_of"]

Sink: TypeAlias = Callable[[dict[str, object], int], object]


@other_names(
    attach="it takes one event, so write engine.on(Events.ITERATION_COMPLETED(every=10), handler)",
)
class TrackingHandler:
    """Logs metrics and outputs to `run` whenever it is called: `trainer.on(Events.ITERATION_COMPLETED(every=10), log)`.

    Attach it on every rank: rank 0 logs, and on the others it does nothing. It is not a collective. Values are read
    from their device when it is called, and at no other time.

    Args:
        run: a run of `Track`, anything with `log(dict, step=)` (a wandb run), a `SummaryWriter`, the module `mlflow` or
            a run of `mlflow.start_run()`, a run of aim (`track`), a logger of clearml (`report_scalar`). On ranks other
            than 0 it may be None.
        metric_names: names in `state.metrics` and in the mapping that `output_transform` gives; "all" takes every
            metric and output, None every output. A vector becomes `name/0`, `name/1`, ...
        output_transform: turns the step's output into a scalar, or a mapping of names to values.
        global_step_transform: `(engine, event) -> int`, the step of the row; the engine's iteration by default, and at
            the end of an evaluation that a trainer's handler runs, the trainer's.

    Raises:
        TypeError: `run` cannot be logged to, `metric_names` is a string other than "all", or a transform is not
            callable; (when called) the value of a name in `metric_names` is not a scalar.
        ValueError: neither `metric_names` nor `output_transform` is given, so that there is nothing to log; (when
            called) a name is both a metric's and an output's, so that one of the values would be lost.
        KeyError: (when called) there is no value with a name in `metric_names`; the message lists the names. A metric
            of this engine that has not been computed yet, in the first epoch, is left out.

    Example:
        >>> import tempfile
        >>> from dengine import Engine, Events
        >>> from dengine.tracking import Track
        >>> trainer = Engine(lambda engine, batch: {"loss": 1.0 / batch})
        >>> with Track.run("example", dir=tempfile.mkdtemp()) as run:
        ...     log = TrackingHandler(run, metric_names=["loss"], output_transform=lambda output: output)
        ...     handle = trainer.on(Events.ITERATION_COMPLETED(every=2), log)
        ...     state = trainer.run([1, 2, 4, 8])
        >>> run.summary["loss"]
        0.125
    """

    @other_keywords(
        tag="give names by output_transform=, as lambda output: {'training/loss': output}",
        logger="it is called run=",
    )
    def __init__(
        self,
        run: object,
        metric_names: MetricNames = None,
        output_transform: OutputTransform | None = None,
        global_step_transform: StepTransform | None = None,
    ) -> None:
        names = checked_names(metric_names)
        check_function("output_transform", output_transform, "output")
        check_step_transform("global_step_transform", global_step_transform)
        if metric_names is None and output_transform is None:
            raise ValueError('There is nothing to log: pass metric_names= (a list, or "all") or output_transform=.')
        self._is_all = names == "all"
        self._names = None if names is None or names == "all" else list(names)
        self._output_transform = output_transform
        self._step_transform = global_step_transform
        self._sink = sink_of(run) if world().rank == 0 else None

    def __repr__(self) -> str:
        return shown(self, metric_names="all" if self._is_all else self._names, output_transform=self._output_transform)

    def __call__(self, engine: Engine) -> None:
        if self._sink is None:
            return
        values = self._values(engine)
        if values:
            self._sink(values, step_of(engine, self._step_transform))

    def _values(self, engine: Engine) -> dict[str, object]:
        outputs = self._outputs(engine)
        if self._names is None:
            # A whole output may hold predictions, too: without names, only values that fit into a row are taken.
            found = metrics_and_outputs(engine, outputs) if self._is_all else outputs
            spread = (_spread(name, value) for name, value in found.items())
            return {name: value for part in spread for name, value in part.items() if _fits(value)}
        have = metrics_and_outputs(engine, outputs, self._names)
        values: dict[str, object] = {}
        for name in self._names:
            if name in have:
                entries = _spread(name, have[name])
                values |= {part: None if value is None else scalar(part, value) for part, value in entries.items()}
            elif name not in engine.metric_names and (self._output_transform is None or has_output(engine)):
                raise KeyError(
                    f"TrackingHandler was asked to log {name!r}, but there is "
                    f"{', '.join(map(repr, dict.fromkeys([*have, *engine.metric_names]))) or 'no value'}."
                )
        return values

    def _outputs(self, engine: Engine) -> dict[str, object]:
        if self._output_transform is None:
            return {}
        if not has_output(engine):
            warn_of_no_output("TrackingHandler")
            return {}
        output = self._output_transform(engine.state.output)
        if isinstance(output, Mapping):
            return dict(output)
        if not _fits(output):
            raise TypeError(
                f"output_transform gave {a_type(output)}, but must give a number, or a mapping of names "
                'to values: output_transform=lambda output: {"loss": output}.'
            )
        return {"output": output}


def metrics_and_outputs(
    engine: Engine, outputs: Mapping[str, object], names: Sequence[str] | None = None
) -> dict[str, object]:
    """The metrics of `engine` and the `outputs` of its step, as one mapping.

    Raises: ValueError: one of `names` (by default any name) is in both, even if the metric has no value yet.
    """
    metrics = {*engine.state.metrics, *engine.metric_names}
    if both := [name for name in (outputs if names is None else names) if name in outputs and name in metrics]:
        raise ValueError(
            f"{both[0]!r} is a metric of the engine and in what output_transform gives, and one would hide the other: "
            f"rename the output, as in {{'batch_{both[0]}': ...}}."
        )
    have = engine.state.metrics
    # Looked up one by one: a live value is computed when it is looked up.
    wanted = have if names is None else [name for name in names if name in have]
    return {**{name: have[name] for name in wanted}, **outputs}


def sink_of(run: object) -> Sink:
    """A function that writes values to `run`, a run of one of the common trackers.

    Raises: TypeError: it is none of them.
    """
    if isinstance(run, Run):  # it reads and joins them itself
        return run.log
    row = RowMaker().row
    if callable(add_scalar := getattr(run, "add_scalar", None)):  # a SummaryWriter

        def add_scalars(values: dict[str, object], step: int) -> None:
            for name, value in _numbers(row(values)).items():
                add_scalar(name, value, step)

        return add_scalars
    if callable(log_metrics := getattr(run, "log_metrics", None)):  # the module mlflow
        return lambda values, step: log_metrics(_numbers(row(values)), step=step)
    if callable(log := getattr(run, "log", None)):
        return lambda values, step: log(row(values), step=step)
    if (run_id := getattr(getattr(run, "info", None), "run_id", None)) is not None:  # a run of mlflow.start_run()
        import mlflow

        return lambda values, step: mlflow.log_metrics(_numbers(row(values)), step=step, run_id=run_id)
    if (each := _one_by_one(run)) is not None:

        def log_each(values: dict[str, object], step: int) -> None:
            for name, value in _numbers(row(values)).items():
                each(name, value, step)

        return log_each
    raise TypeError(
        f"{run!r} cannot be logged to: pass a run of Track.run(), an object with log(dict, step=), a SummaryWriter, "
        "the module mlflow, a run of aim, or a logger of clearml."
    )


def _one_by_one(run: object) -> Callable[[str, float, int], object] | None:
    """A function that writes a single number to `run`, if the tracker takes numbers one by one."""
    if callable(track := getattr(run, "track", None)):  # a run of aim
        return lambda name, value, step: track(value, name=name, step=step)
    # A logger of clearml: a plot for what is before the last slash.
    if callable(report_scalar := getattr(run, "report_scalar", None)):

        def report(name: str, value: float, step: int) -> None:
            title, _, series = name.rpartition("/")
            report_scalar(title=title or name, series=series, value=value, iteration=step)

        return report
    return None


def _spread(name: str, value: Any) -> dict[str, Any]:
    """The entries of a vector (a score for each class) by name; any other value under its own name."""
    if isinstance(value, torch.Tensor) and value.ndim == 1 and len(value) != 1:
        return {f"{name}/{index}": entry for index, entry in enumerate(value.tolist())}
    return {name: value}


def _fits(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, (int, float, str)) or (hasattr(value, "item") and getattr(value, "size", 0) == 1)


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in row.items() if value is not None and not isinstance(value, str)}
