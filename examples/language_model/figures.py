"""The figure of one run."""

import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .logs import Row
from .output_folder import write_atomically

STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "font.size": 10,
    "legend.frameon": False,
}

CURVES = {
    "loss": ("training", "#7f7f7f"),
    "validation_loss": ("validation", "#1f77b4"),
    "earlier_loss": ("validation, earlier text", "#d1495b"),
}
SHARES = {
    "noisy_accuracy": ("held out, given labels", "#1f77b4"),
    "clean_accuracy": ("held out, true labels", "#2ca02c"),
    "fitted": ("learned, correct labels", "#7f7f7f"),
    "memorized": ("learned, wrong labels", "#d1495b"),
}


def plot_run(folder: Path, rows: list[Row]) -> None:
    """Writes ``curves.png``: the losses, the norm of the gradient and, of classes, the accuracies."""
    has_classes = "noisy_accuracy" in rows[-1]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(13 if has_classes else 9, 3.6), layout="constrained")
        losses, norms, *shares = figure.subplots(1, 2 + has_classes)
        _lines(losses, CURVES, rows)
        losses.set(xlabel="step", ylabel=f"loss, nats per {'text' if has_classes else 'byte'}")
        if has_classes:
            _lines(shares[0], SHARES, rows)
            shares[0].set(xlabel="step", ylabel="share that is predicted", ylim=(0, 1))
        norms.plot([row["step"] for row in rows], [row["gradient_norm"] for row in rows])
        norms.set(xlabel="step", ylabel="norm of the gradient, mean of the steps")
        save(figure, folder / "curves.png")


def _lines(axes: Axes, curves: dict[str, tuple[str, str]], rows: list[Row]) -> None:
    for name, (label, color) in curves.items():
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            marker = "o" if len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
    axes.legend()


def save(figure: Figure, path: Path) -> None:
    """Replaces a picture in one step."""
    image = io.BytesIO()
    figure.savefig(image, dpi=150, bbox_inches="tight", format=path.suffix[1:])
    write_atomically(path, image.getvalue())
