"""The learning curves of examples/digits.py as a picture."""

from pathlib import Path

__all__ = ["draw_curves"]


def draw_curves(history: list[dict], path: Path) -> str:
    """Draw what `metrics.jsonl` holds, a dict an epoch. Returns where the picture is, or why there is none."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        return "not drawn, because matplotlib is missing: pip install matplotlib"
    epochs = [row["epoch"] for row in history]
    best = max(history, key=lambda row: row["val/acc"])
    figure = Figure(figsize=(10, 4), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    losses.plot(epochs, [row["train/loss"] for row in history], ".-", color="tab:blue", label="training")
    losses.plot(epochs, [row["val/loss"] for row in history], ".-", color="tab:orange", label="validation")
    losses.set(title="Cross-entropy loss", yscale="log")
    losses.yaxis.set_major_formatter("{x:g}")
    accuracies.plot(epochs, [row["val/acc"] for row in history], ".-", color="tab:orange", label="validation")
    label = f"best: {best['val/acc']:.2%} in epoch {best['epoch']}"
    accuracies.plot(best["epoch"], best["val/acc"], "*", color="tab:red", markersize=14, label=label)
    accuracies.set(title="Accuracy")
    accuracies.yaxis.set_major_formatter("{x:.1%}")
    for axes in (losses, accuracies):
        axes.axvline(best["epoch"], color="tab:red", linestyle=":", zorder=0)
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    return str(path)
