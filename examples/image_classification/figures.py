"""The figures of one run."""

import io
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

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
    "test_accuracy": ("test accuracy", "#1f77b4"),
    "clean_fit": ("correct labels fitted", "#2f9e5b"),
    "memorized": ("wrong labels memorized", "#d1495b"),
    "recovered": ("true class of wrong labels predicted", "#8e5bb5"),
}

COORDINATES = {
    "coordinates_a": ("A: r ≥ 1", "#8e5bb5"),
    "coordinates_b": ("B: 0 < r < 1", "#d1495b"),
    "coordinates_c": ("C: r ≤ 0", "#7f7f7f"),
}


def plot_run(
    folder: Path, rows: list[Row], labels: np.ndarray, predicted: np.ndarray, wrong: np.ndarray
) -> None:
    """Writes ``curves.png`` and, if there are wrong labels, ``confusion.png``.

    Args:
      folder: of the run.
      rows: one per epoch.
      labels: true classes of the training examples, shape ``(n,)``.
      predicted: by the trained network, shape ``(n,)``.
      wrong: True where the training label is wrong, shape ``(n,)``.
    """
    with matplotlib.rc_context(STYLE):
        save(_curves(rows), folder / "curves.png")
        if wrong.any():
            save(_confusion(labels[wrong], predicted[wrong]), folder / "confusion.png")


def save(figure: Figure, path: Path) -> None:
    """Replaces a picture in one step."""
    image = io.BytesIO()
    figure.savefig(image, dpi=150, bbox_inches="tight", format=path.suffix[1:])
    write_atomically(path, image.getvalue())


def plot_lines(axes, rows: list[Row], curves: dict[str, tuple[str, str]]) -> None:
    """The shares in percent, over the epochs that were evaluated."""
    for name, (label, color) in curves.items():
        points = [(row["epoch"], 100 * row[name]) for row in rows if name in row]
        if points:
            marker = "o" if len(points) == 1 else None
            axes.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def legend_below(axes) -> None:
    """A legend that hides no line."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), ncol=2, fontsize=8)


def _curves(rows: list[Row]) -> Figure:
    figure = Figure(figsize=(13, 3.9), layout="constrained")
    accuracy, loss, coordinates = figure.subplots(1, 3)
    plot_lines(accuracy, rows, CURVES)
    accuracy.set(ylabel="share of examples, %", ylim=(0, 100))
    legend_below(accuracy)
    loss.plot([row["epoch"] for row in rows], [row["loss"] for row in rows], color="#333333")
    loss.set(xlabel="epoch", ylabel="training loss (noisy labels)")
    loss.xaxis.set_major_locator(MaxNLocator(integer=True))
    plot_lines(coordinates, rows, COORDINATES)
    coordinates.set(ylabel="share of coordinates, %", ylim=(0, 100))
    coordinates.set_title("coordinates by r = g'/g at SAM's perturbation", fontsize=10)
    legend_below(coordinates)
    return figure


def _confusion(labels: np.ndarray, predicted: np.ndarray) -> Figure:
    classes = int(max(labels.max(), predicted.max())) + 1
    counts = np.zeros((classes, classes))
    np.add.at(counts, (labels, predicted), 1)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.grid(False)
    if classes <= 20:
        axes.set(xticks=range(classes), yticks=range(classes))
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title("training examples with a wrong label", fontsize=10)
    figure.colorbar(image, label="share of the true class, %")
    return figure
