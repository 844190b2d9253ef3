"""`python -m dengine plot RUN_DIR -o curves.png`: draw the learning curves of runs."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dengine.tools.arguments import a_path
from dengine.tracking.curves import Best, Curve, best_of, curves_of, smoothed
from dengine.tracking.files import TrackingError, read_json
from dengine.tracking.rows import ROWS, read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["configure", "run"]

_COLORS = {"training": "#4477aa", "validation": "#ee7733", "test": "#228833", "": "#4477aa"}
_RUN_COLORS = ("#4477aa", "#ee7733", "#228833", "#aa3377", "#66ccee", "#ccbb44", "#bbbbbb")
_DASHES = {"training": (0, (4, 2)), "validation": "-", "test": ":", "": "-"}
_BEST = "#cc3311"
_RATE = re.compile(r"lr|learning_rate|lr/.*")
_SPEED = re.compile(r".*(throughput|per_s(ec(ond)?)?|/s)$", re.IGNORECASE)
_MINOR = re.compile(r"(momentum|beta\d)(/.*)?")
_MAX_PANELS = 12
_MANY_POINTS = 150


@dataclass(frozen=True)
class Drawn:
    """A run to draw."""

    label: str
    curves: list[Curve]
    best: Best | None


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_dirs", nargs="+", type=a_path, metavar="RUN_DIR", help=f"a folder with a {ROWS}")
    parser.add_argument("-o", "--output", type=a_path, default=Path("curves.png"), help="default: curves.png")


def run(options: argparse.Namespace) -> int:
    """Run the command. Gives 0 if the picture was drawn, 2 if there is nothing to draw, or no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return _refused('matplotlib is missing: pip install "dengine[examples]"')
    output: Path = options.output
    if output.is_dir():
        return _refused(f"{output} is a folder: pass the name of the picture, -o {output / 'curves.png'}")
    if not output.suffix:
        output = output.with_name(f"{output.name}.png")
    try:
        runs = _with_unique_labels([_read(path) for path in options.run_dirs], options.run_dirs)
    except (TrackingError, OSError) as error:
        return _refused(str(error))
    panels = _panels(runs)
    num_columns = min(len(panels), 2 if len(panels) in (2, 4) else 3)
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(5.2 * num_columns, 3.7 * num_rows), layout="constrained")
    grid = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axes, name in zip(grid, panels, strict=False):
        _draw_panel(axes, name, runs)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    if len(runs) == 1:  # for several runs, the names are in the legends
        figure.suptitle(runs[0].label, fontsize=11, parse_math=False)
    try:
        figure.savefig(output, dpi=150)
    except (OSError, ValueError) as error:  # no such folder, no such format
        return _refused(f"{output} cannot be written: {error}")
    print(output)
    return 0


def _refused(reason: str) -> int:
    print(reason, file=sys.stderr)
    return 2


# -- what to draw ------------------------------------------------------------------------------------------------


def _read(path: Path) -> Drawn:
    """The run in a folder. Raises: TrackingError: there are no metrics, or a line is damaged; the message names it."""
    file = path if path.is_file() else path / ROWS
    if not file.is_file():
        raise TrackingError(f"{path} has no {ROWS}: pass the folder of a run, run.dir.")
    rows, damaged = read_rows(file)
    if damaged:
        lines = ", ".join(map(str, damaged[:5]))
        raise TrackingError(
            f"{file} is damaged in line {lines}: it holds no JSON object there. Delete the line, and plot again."
        )
    curves = [curve for curve in curves_of(rows) if not _MINOR.fullmatch(curve.name) and np.isfinite(curve.y).any()]
    if not curves:
        raise TrackingError(f"{file} has no metrics yet: {len(rows)} rows, and no number to draw in them.")
    label = read_json(file.with_name("run.json")).get("name") or file.parent.resolve().name
    return Drawn(str(label), curves, best_of(curves))


def _with_unique_labels(runs: Sequence[Drawn], paths: Sequence[Path]) -> list[Drawn]:
    """`runs`, with the names of their folders added to labels that several of them have."""
    labels = [run.label for run in runs]
    return [
        Drawn(f"{run.label} ({path.resolve().name})", run.curves, run.best) if labels.count(run.label) > 1 else run
        for run, path in zip(runs, paths, strict=True)
    ]


def _panels(runs: Sequence[Drawn]) -> list[str]:
    """The names of the panels: losses first, then other metrics, then learning rates and speeds."""
    names = list(dict.fromkeys(_panel(curve) for run in runs for curve in run.curves))
    order = {"learning rate": 2, "samples per second": 3}
    names.sort(key=lambda name: order.get(name, 0 if "loss" in name.lower() else 1))
    if len(names) > _MAX_PANELS:
        print(f"{len(names)} metrics: the first {_MAX_PANELS} are drawn.", file=sys.stderr)
    return names[:_MAX_PANELS]


def _panel(curve: Curve) -> str:
    if _RATE.fullmatch(curve.name):
        return "learning rate"
    return "samples per second" if _SPEED.fullmatch(curve.name) else curve.name


# -- how to draw it ----------------------------------------------------------------------------------------------


def _draw_panel(axes: "Axes", panel: str, runs: Sequence[Drawn]) -> None:
    shown: list[Curve] = []
    num_rates = 0
    for each_run, run_color in zip(runs, _cycle(len(runs)), strict=True):
        for curve in sorted((each for each in each_run.curves if _panel(each) == panel), key=lambda each: each.split):
            color = _COLORS[curve.split] if len(runs) == 1 else run_color
            if panel == "learning rate" and len(runs) == 1:
                color = _RUN_COLORS[num_rates % len(_RUN_COLORS)]
                num_rates += 1
            _draw_curve(axes, curve, color, _label(each_run, curve, panel, len(runs)), len(runs) > 1)
            shown.append(curve)
        if each_run.best is not None:
            _mark_best(axes, panel, each_run.best, _BEST if len(runs) == 1 else run_color, is_alone=len(runs) == 1)
    _set_scale(axes, panel, shown)
    axes.set_title(panel, loc="left", fontsize=11, fontweight="bold", parse_math=False)
    axes.set_xlabel(shown[0].over)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    if axes.get_legend_handles_labels()[0]:
        for text in axes.legend(frameon=False, fontsize=8).get_texts():
            text.set_parse_math(False)  # a dollar in a name does not start a formula


def _draw_curve(axes: "Axes", curve: Curve, color: str, label: str, is_overlay: bool) -> None:
    y = np.where(np.isfinite(curve.y), curve.y, np.nan)  # a gap for a value that is not finite
    dashes: Any = _DASHES[curve.split] if is_overlay else "-"
    if len(y) > _MANY_POINTS and curve.split != "validation" and not _RATE.fullmatch(curve.name):
        axes.plot(curve.x, y, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(curve.x, smoothed(y, max(len(y) // 40, 3)), color=color, linestyle=dashes, linewidth=1.6, label=label)
        return
    marker = "." if len(y) <= 60 else ""
    axes.plot(curve.x, y, color=color, linestyle=dashes, linewidth=1.6, marker=marker, markersize=5, label=label)


def _mark_best(axes: "Axes", panel: str, best: Best, color: str, *, is_alone: bool) -> None:
    if is_alone:
        axes.axvline(best.x, color=color, linestyle=":", linewidth=1, zorder=0)
    if panel == best.name:
        value = f"{best.y:.2%}" if _is_share(panel, np.array([best.y])) else f"{best.y:.4g}"
        label = f"best: {value} ({best.over} {best.x:g})"
        axes.plot(best.x, best.y, "*", color=color, markersize=13, markeredgecolor="white", zorder=5, label=label)


def _set_scale(axes: "Axes", panel: str, curves: Sequence[Curve]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
    values = np.concatenate([curve.y[np.isfinite(curve.y)] for curve in curves])
    ratio = values.max() / values.min() if values.min() > 0 else 0.0
    if ratio > 20 and ("loss" in panel.lower() or panel == "learning rate"):
        axes.set_yscale("log")
        if ratio < 1e3:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter("{x:g}")
    elif panel == "samples per second":
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:,.4g}" if values.max() < 1000 else "{x:,.0f}")
    elif panel == "learning rate":
        axes.set_ylim(bottom=min(0.0, values.min()))  # else a constant rate would show only noise
    elif _is_share(panel, values):
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))


def _is_share(panel: str, values: np.ndarray) -> bool:
    return bool("acc" in panel.lower() and values.size and values.min() >= 0 and values.max() <= 1)


def _label(run: Drawn, curve: Curve, panel: str, num_runs: int) -> str:
    # "lr/head" in the panel of learning rates is the group "head".
    part = curve.name.partition("/")[2] if panel == "learning rate" else ""
    own = " ".join(word for word in (part, curve.split) if word)
    return own if num_runs == 1 else " ".join(word for word in (run.label, own) if word)


def _cycle(count: int) -> list[str]:
    return [_RUN_COLORS[index % len(_RUN_COLORS)] for index in range(count)]
