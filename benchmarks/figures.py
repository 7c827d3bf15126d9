"""The figures."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

Record = dict[str, Any]

GREY = "#666666"
# FLOPs, wall clock, memory: marker, color, and whether it is filled.
MARKS = {
    "flops": ("o", "#999999", "none"),
    "memory": ("D", "#d55e00", "none"),
    "wall": ("o", "#0072b2", "#0072b2"),
}
TITLES = {"flops": "FLOPs", "memory": "memory in all", "wall": "wall clock, quartiles"}
COLORS = {
    "SGD": "#999999",
    "sam": "#0072b2",
    "sam, microbatches of 16": "#56b4e9",
    "1-SAM, naive vmap": "#d55e00",
    "1-SAM": "#009e73",
    "m-SAM": "#cc79a7",
}


def steps(records: Sequence[Record]) -> Figure:
    """Every step's cost on every network, one panel for each network."""
    networks = list(dict.fromkeys(record["network"] for record in records))
    names = list(dict.fromkeys(record["step"] for record in records if record["step"] != "SGD"))
    figure = Figure(
        figsize=(2.6 + 2.6 * len(networks), 1.4 + 0.24 * len(names)), layout="constrained"
    )
    panels = figure.subplots(1, len(networks), sharey=True, squeeze=False)[0]
    for axes, network in zip(panels, networks, strict=True):
        here = {r["step"]: r for r in records if r["network"] == network}
        batch = here["SGD"]["batch"]
        style(axes, f"{network}\nbatch {batch}")
        for key, (marker, color, face) in MARKS.items():
            rows = [(names.index(s), r) for s, r in here.items() if s != "SGD" and r[key]]
            places, values = [p for p, _ in rows], [r[key] for _, r in rows]
            axes.plot(
                values, places, marker, color=color, markerfacecolor=face, label=TITLES[key], ms=5
            )
            if key == "wall":
                for place, row in rows:
                    if row["wall_low"]:
                        axes.plot([row["wall_low"], row["wall_high"]], [place] * 2, color=color)
        logarithmic(axes)
        axes.axvline(2, color="#bbbbbb", linewidth=0.8, linestyle=":")
        axes.set_xlabel("multiple of SGD", color=GREY)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False)
    return figure


def style(axes: Axes, title: str) -> None:
    """Quiet axes."""
    axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#aaaaaa")
    axes.tick_params(length=0, colors=GREY)


def logarithmic(axes: Axes) -> None:
    """A logarithmic axis of ratios with plain numbers."""
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    wide = high / low > 30
    axes.xaxis.set_major_locator(LogLocator(subs=(1,) if wide else (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def growth(records: Sequence[Record]) -> Figure:
    """One row for each measure, one column for each axis; all relative to SGD of the default size."""
    measures = [key for key in ("flops", "memory", "wall") if records[0][f"sgd_{key}"]]
    sizes = list(dict.fromkeys(record["axis"] for record in records))
    figure = Figure(figsize=(1 + 2.7 * len(sizes), 0.8 + 2.2 * len(measures)), layout="constrained")
    figure.suptitle(
        f"{records[0]['network']}: multiples of the SGD step of the default size",
        x=0.01,
        ha="left",
        fontsize=11,
        fontweight="bold",
    )
    panels = figure.subplots(len(measures), len(sizes), sharey="row", squeeze=False)
    for row, key in zip(panels, measures, strict=True):
        for axes, axis in zip(row, sizes, strict=True):
            style(axes, "")
            here = [record for record in records if record["axis"] == axis]
            for step in dict.fromkeys(record["step"] for record in here):
                found = [r for r in here if r["step"] == step and r[key]]
                axes.plot(
                    [r["value"] for r in found],
                    [r[key] * r[f"sgd_{key}"] for r in found],
                    marker="o",
                    ms=3.5,
                    linewidth=1.6,
                    color=COLORS[step],
                    label=step,
                )
            values = list(dict.fromkeys(record["value"] for record in here))
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.set_xticks(values, [str(value) for value in values])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            if axes is row[0]:
                axes.set_ylabel(TITLES[key].partition(",")[0], color=GREY)
            if key == measures[-1]:
                axes.set_xlabel(axis, color=GREY)
    labels: dict[str, Any] = {}
    for axes in panels[0]:
        labels |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        labels.values(), labels.keys(), loc="outside lower left", ncols=len(labels), frameon=False
    )
    return figure
