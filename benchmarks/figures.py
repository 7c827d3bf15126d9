"""The figures, legible on a phone, on white and on a dark page.

python -m benchmarks.figures docs/results/benchmarks    # draws them again from the CSV files there
"""

import csv
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks.tables import file_name
from optax_sam import plots

Record = dict[str, Any]

WIDTH = 4.4  # inches; a phone shows it on about 326 pixels, 9 points on 9
STYLE = {"font.size": 9, "svg.hashsalt": "optax_sam"}
BLUE, ORANGE, GREEN = plots.COLORS[:3]
# Marker, color, and whether it is filled.
MARKS = {
    "flops": ("s", GREEN, "none"),
    "memory": ("D", ORANGE, "none"),
    "wall": ("o", BLUE, BLUE),
}
TITLES = {"flops": "FLOPs", "memory": "memory in all", "wall": "wall clock"}
AXES = ("depth", "width", "batch")  # the last has all lines: their names stand at its right
NAMES = {"sam, microbatches of 16": "sam,\nmicrobatches", "1-SAM, naive vmap": "1-SAM,\nnaive vmap"}


def steps(records: Sequence[Record]) -> Figure:
    """The cost of every step on one network, the wall clock with its quartiles."""
    names = {textwrap.fill(r["step"], 24): r for r in records if r["step"] != "SGD"}
    lines = np.array([name.count("\n") + 1 for name in names])
    places = np.cumsum(lines) - lines / 2  # each name as high as its lines
    height = 1.1 + 0.155 * lines.sum()
    figure = Figure(figsize=(WIDTH, height), layout="constrained", facecolor="none")
    axes = figure.subplots()
    prepare(axes)
    axes.set_title(
        f"{records[0]['network']}, batch {records[0]['batch']}",
        loc="left",
        fontsize=10,
        fontweight="bold",
        color=plots.TEXT,
    )
    for key, (marker, color, face) in MARKS.items():
        found = [(r, place) for r, place in zip(names.values(), places, strict=True) if r[key]]
        style = {"color": color, "markerfacecolor": face, "markersize": 5, "linestyle": ""}
        values = [record[key] for record, _ in found]
        axes.plot(values, [place for _, place in found], marker, label=TITLES[key], **style)
        for record, place in found:
            if key == "wall" and record["wall_low"]:
                axes.plot([record["wall_low"], record["wall_high"]], [place] * 2, color=color)
    axes.set_xscale("log")
    plain_numbers(axes.xaxis, axes.get_xlim())
    for multiple in (1, 2):  # SGD, and what a step of SAM needs at least
        axes.axvline(multiple, color=plots.TEXT, linewidth=0.8, linestyle=":")
    axes.set_xlabel("multiple of the SGD step")
    axes.set_yticks(places, [*names])
    axes.set_ylim(lines.sum() + 0.3, -0.3)
    legend = {"ncols": 3, "frameon": False, "labelcolor": plots.TEXT}
    figure.legend(loc="outside upper left", columnspacing=1, handletextpad=0.1, **legend)
    return figure


def growth(records: Sequence[Record]) -> Figure:
    """Multiples of SGD of the default size: a row for each measure, and one for the size of a group."""
    measures = [key for key in TITLES if any(record[f"sgd_{key}"] for record in records)]
    sizes = [axis for axis in AXES if any(record["axis"] == axis for record in records)]
    rows = len(measures) + 1
    height = 0.9 + 1.8 * rows
    # Names are placed by the layout, so that it must not move after them.
    figure = Figure(figsize=(WIDTH, height), facecolor="none")
    title = f"{records[0]['network']}: multiples of SGD at its default size"
    figure.text(0.01, 1 - 0.2 / height, title, fontsize=10, fontweight="bold", color=plots.TEXT)
    grid = figure.add_gridspec(
        rows, len(sizes), left=0.15, right=0.72, bottom=0.5 / height, top=1 - 0.75 / height,
        wspace=0.4, hspace=0.4,
    )  # fmt: skip
    for row, key in enumerate(measures):
        left = None
        for column, axis in enumerate(sizes):
            axes = figure.add_subplot(grid[row, column], sharey=left)
            axes.set_yscale("log")
            here = [record for record in records if record["axis"] == axis and record[key]]
            lines: dict[str, dict[int, float]] = {}
            for record in here:
                line = lines.setdefault(NAMES.get(record["step"], record["step"]), {})
                line[record["value"]] = record[key] * record[f"sgd_{key}"]
            draw(axes, axis, lines)
            if left is None:
                left = axes
                axes.set_ylabel(TITLES[key])
            else:
                axes.tick_params(labelleft=False)
            if axis != sizes[-1]:
                for name in [*axes.texts]:
                    name.remove()
    grouped = [record for record in records if record["step"] == "m-SAM"]
    of_groups = {TITLES[key]: {r["value"]: r[key] for r in grouped} for key in measures}
    axes = figure.add_subplot(grid[-1, :])
    draw(axes, "m, the examples in a group", of_groups)
    axes.set_ylabel("m-SAM")
    return figure


def draw(axes: Axes, along: str, lines: Mapping[str, Mapping[int, float]]) -> None:
    """Lines along a size, each named at its end."""
    values = sorted({value for line in lines.values() for value in line})
    axes.set_xscale("log", base=2)
    series = {name: [line.get(v, math.nan) for v in values] for name, line in lines.items()}
    plots.curves(series, values, xlabel=along, axes=axes)
    shown = values if "m," in along else (values[0], values[-1])  # the others have no room
    axes.set_xticks(values, [str(value) if value in shown else "" for value in values])
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "log":
        plain_numbers(axes.yaxis, axes.get_ylim())


def prepare(axes: Axes) -> None:
    """Quiet axes, that can be read on white and on dark."""
    axes.set_facecolor("none")
    axes.grid(color=plots.TEXT, alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(plots.TEXT)
    axes.tick_params(length=0, colors=plots.TEXT)
    axes.xaxis.label.set_color(plots.TEXT)


def plain_numbers(axis: Any, limits: Sequence[float]) -> None:
    """0.1, 1 and 10 in place of powers of 10, and others between them where there are few."""
    axis.set_major_locator(LogLocator(subs=(1,) if limits[1] > 60 * limits[0] else (1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def write(records: Sequence[Record], folder: Path, prefix: str = "") -> None:
    """A picture for each network, of its steps or, with the prefix ``growth_``, of its growth."""
    for network in dict.fromkeys(record["network"] for record in records):
        here = [record for record in records if record["network"] == network]
        with rc_context(STYLE):
            figure = growth(here) if prefix else steps(here)
            path = folder / f"{prefix}{file_name(network)}.svg"
            figure.savefig(path, metadata={"Date": None})


def main(folder: Path) -> None:
    """Draws what the CSV files hold."""
    for name, prefix in (("steps", ""), ("growth", "growth_")):
        with (folder / f"{name}.csv").open(newline="", encoding="utf-8") as file:
            rows = [*csv.DictReader(file)]
        write([{key: number(text) for key, text in row.items()} for row in rows], folder, prefix)


def number(text: str) -> float | int | str | None:
    """What a cell holds: nothing, a number or a text."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
