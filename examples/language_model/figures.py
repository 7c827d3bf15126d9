"""The figure of one run."""

import io
from pathlib import Path

import matplotlib
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


def plot_run(folder: Path, rows: list[Row]) -> None:
    """Writes ``curves.png``: the losses, and the norm of the gradient."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9, 3.6), layout="constrained")
        losses, norms = figure.subplots(1, 2)
        for name, (label, color) in CURVES.items():
            points = [(row["step"], row[name]) for row in rows if name in row]
            if points:
                marker = "o" if len(points) == 1 else None
                losses.plot(*zip(*points, strict=True), label=label, color=color, marker=marker)
        losses.set(xlabel="step", ylabel="loss, nats per byte")
        losses.legend()
        norms.plot([row["step"] for row in rows], [row["gradient_norm"] for row in rows])
        norms.set(xlabel="step", ylabel="norm of the gradient, mean of the steps")
        save(figure, folder / "curves.png")


def save(figure: Figure, path: Path) -> None:
    """Replaces a picture in one step."""
    image = io.BytesIO()
    figure.savefig(image, dpi=150, bbox_inches="tight", format=path.suffix[1:])
    write_atomically(path, image.getvalue())
