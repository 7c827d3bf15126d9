"""The figures of a fit."""

import io
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from .criteria import comparable
from .data import Features
from .methods import METHODS
from .search import Result

if TYPE_CHECKING:
    from .fit import Fitted, Outcome

STYLE: dict[Any, Any] = {
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
    "fitted": ("labels fitted", "#7f7f7f"),
}


def draw(outcome: "Outcome") -> dict[str, bytes]:
    """All figures, as PNG files."""
    with matplotlib.rc_context(STYLE):
        drawn = {
            "radius.png": along_radius(outcome),
            "epochs.png": along_epochs(outcome),
            "confusion.png": confusion(outcome.chosen, outcome.data),
        }
        return {name: png(figure) for name, figure in drawn.items()}


def along_radius(outcome: "Outcome") -> Figure:
    """Accuracy and memorization along ρ in the first round, each at its best decay."""
    first = [result for result in outcome.results if result.rung == 0]
    known = outcome.data.clean_labels is not None
    panels = [("held_out", "accuracy on held-out noisy labels, %")]
    if any(np.isfinite(result.measures["clean_accuracy"]) for result in first):
        panels.append(("clean_accuracy", "accuracy on clean labels, %"))
    panels.append(
        ("memorized", "wrong labels memorized, %") if known else ("fitted", "labels fitted, %")
    )
    heads = list(dict.fromkeys(result.setting.head for result in first))
    figure = Figure(figsize=(4.3 * len(panels), 3.2 * len(heads) + 0.5), layout="constrained")
    grid = figure.subplots(len(heads), len(panels), squeeze=False)
    for head, all_axes in zip(heads, grid, strict=True):
        ours = [result for result in first if result.setting.head == head]
        for (measure, name), axes in zip(panels, all_axes, strict=True):
            _plot_radius(axes, ours, measure)
            axes.set_title(f"{head}: {name}", fontsize=9, loc="left")
            axes.set_xlabel("radius ρ")
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncol=min(len(handles), 5)
    )
    return figure


def _plot_radius(axes: Axes, results: list[Result], measure: str) -> None:
    axes.set_xscale("log")
    ticks = sorted({result.setting.rho for result in results if result.setting.rho > 0})
    losses = list(dict.fromkeys(result.setting.loss for result in results))
    for family in dict.fromkeys(result.setting.family for result in results):
        ours = [result for result in results if result.setting.family == family]
        setting, points = ours[0].setting, []
        marker = "osD^v"[losses.index(setting.loss)]
        color = METHODS[setting.method].color
        for rho in sorted({result.setting.rho for result in ours}):
            at = [result for result in ours if result.setting.rho == rho]
            best = max(at, key=lambda result: comparable(result.measures["held_out"]))
            points.append((rho, 100 * best.measures[measure]))
        if setting.method == "sgd":
            style = ["--", ":", "-.", (0, (1, 4)), (0, (6, 4))][losses.index(setting.loss)]
            axes.axhline(points[0][1], color=color, linestyle=style, label=setting.name)
        else:
            x, y = zip(*points, strict=True)
            axes.plot(x, y, color=color, marker=marker, markersize=4, label=setting.name)
    if ticks:
        axes.set_xticks(ticks)
        axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def along_epochs(outcome: "Outcome") -> Figure:
    """Left: held-out noisy accuracy of the last round. Then the refits, chosen and SGD."""
    refits = [outcome.chosen]
    if outcome.sgd is not None and outcome.sgd is not outcome.chosen:
        refits.append(outcome.sgd)
    figure = Figure(figsize=(4.6 * (1 + len(refits)), 4.4), layout="constrained")
    first, *others = figure.subplots(1, 1 + len(refits), squeeze=False)[0]
    last = [result for result in outcome.results if result.rung == outcome.results[-1].rung]
    for index, setting in enumerate(dict.fromkeys(result.setting for result in last)):
        curve = 100 * np.mean([r.curve for r in last if r.setting == setting], axis=0)
        style = ["-", "--", ":", "-."][index % 4]
        color = METHODS[setting.method].color
        _line(first, curve, color=color, linestyle=style, label=setting.label)
    first.set_title("accuracy on held-out noisy labels, %", fontsize=9, loc="left")
    for axes, fitted in zip(others, refits, strict=True):
        for name, (label, color) in CURVES.items():
            if name in fitted.curves and not (name == "fitted" and "memorized" in fitted.curves):
                _line(axes, 100 * fitted.curves[name], color=color, label=label)
        axes.set_ylim(0, 101)
        axes.set_title(f"refit: {fitted.setting.label}, %", fontsize=9, loc="left")
    for axes in (first, *others):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8)
    return figure


def _line(axes: Axes, curve: np.ndarray, **style: str) -> None:
    marker = "o" if len(curve) == 1 else None
    axes.plot(np.arange(1, len(curve) + 1), curve, marker=marker, **style)  # type: ignore[arg-type]


def confusion(fitted: "Fitted", data: Features) -> Figure:
    """Observed against predicted classes, in shares of the observed class."""
    predicted = fitted.logits.argmax(-1)
    counts = np.zeros((data.num_classes, data.num_classes))
    np.add.at(counts, (data.labels, predicted), 1)
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    figure = Figure(figsize=(6.0, 5.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.grid(False)
    if data.num_classes <= 30:
        ticks = range(data.num_classes)
        names = [name if len(name) <= 14 else name[:13] + "…" for name in data.class_names]
        axes.set_xticks(ticks, names, rotation=90 if max(map(len, names)) > 3 else 0)
        axes.set_yticks(ticks, names)
    if data.num_classes <= 12:
        for (row, column), share in np.ndenumerate(shares):
            if share >= 0.5:
                color = "white" if share > 60 else "#333333"
                axes.text(
                    column, row, f"{share:.0f}", ha="center", va="center", color=color, size=8
                )
    axes.set(xlabel="predicted class", ylabel="observed class")
    axes.set_title(f"{fitted.setting.label}: all rows", fontsize=9, loc="left")
    figure.colorbar(image, label="share of the observed class, %")
    return figure


def png(figure: Figure) -> bytes:
    """The bytes of a PNG file."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=150)
    return stream.getvalue()
